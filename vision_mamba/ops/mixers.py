"""Chains of a model's layers that run as one, by kernels: token mixers behind their first projection, and MLPs.

The layers themselves are the plain twins of these: they run wherever the kernels do not.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from vision_mamba.ops.compiled import ChainOperator, Shapes
from vision_mamba.ops.fused import Joined, Kernels


def _kernels(name: str) -> Any:
    def make() -> Kernels:
        from vision_mamba.ops.backends import local_cuda, mixers_cuda

        return getattr(local_cuda if hasattr(local_cuda, name) else mixers_cuda, name)

    return make


def _chain(name: str, options: str, stream: bool) -> Joined:
    """A chain by its name and the schema of its options, eager and in compilers' graphs."""

    def shapes() -> Shapes:
        from vision_mamba.ops.backends import mixers_shapes

        return getattr(mixers_shapes, name.upper())

    kernels = _kernels(name.upper())
    return Joined(name, kernels, ChainOperator(name, options, stream, kernels, shapes))


def ahead(x: Tensor, weights: list[Tensor], logs: list[Tensor]) -> AbstractContextManager[None]:
    """While it lasts, chains behind x find these weights in the type of their products, and A = -exp(log) of these
    logarithms, all made at once."""
    from vision_mamba.ops.backends import mixers_cuda

    return mixers_cuda.ahead(x, weights, logs)


#: Of a stream x and a branch: x + branch, at once in the type of products under autocast.
product_sum = Joined("product_sum", _kernels("PRODUCT_SUM"))

#: Of a stream x and a branch or None: linear(norm(x + branch)), and x + branch. Of the norm it keeps the sum alone. The
#: product's channels may be filled up by zeros to a multiple of a step: other widths take far longer.
norm_linear = _chain("norm_linear", "float eps, bool rms, int step=1", True)

#: Of a stream x and a branch or None: fc2(gelu(fc1(norm(x + branch)))), and x + branch. It keeps the sum, and what
#: fc1 gives.
norm_mlp = _chain("norm_mlp", "float eps, bool rms", True)

#: VMamba's mixer behind its first projection: with u = `conv_map`(x) and columns (r_k, B_k, C_k) = X_k u,
#: out_proj(norm(sum_k scan_k(u, W_k r_k + b_k, A_k, B_k, C_k, D_k))). Of maps it keeps x, u and the sum. The norm's
#: result may be gated, and the sum may be `layers.local.RouteAttention`'s, which has the routes' results kept too.
scan_map = _chain("scan_map", "float eps, ScalarType out_dtype, bool gate, float? attention_eps=None", False)

#: Vim's mixer behind its first projection, of which x and z are the halves: with u = `conv_both_ways`(x) and columns as
#: above, scale * out_proj(gated(sum_k scan_k(...), z)). Of sequences it keeps x, z and the sum.
scan_both_ways = _chain("scan_both_ways", "float scale", False)

#: LocalVim's mixer behind its first projection, of which x and z are the halves: with u_k the causal convolution of x
#: along route k and columns as above, scale * out_proj(attention(silu(z) scan_k(...) of all k)), where no route has
#: padding. Of sequences it keeps x, z and the routes' results.
scan_routes = Joined("scan_routes", _kernels("SCAN_ROUTES"))

#: `norm_linear` and `scan_both_ways` one after the other. Of sequences it keeps the stream and the sum over the routes:
#: x and z take a product to compute again, and more memory than anything else that a layer could keep.
norm_both_ways = _chain("norm_both_ways", "float eps, bool rms, float scale", True)
