"""Where several layers may run as one, by kernels: see `ops.mixers`. Elsewhere each runs by itself.

A block of a residual stream that can do so has three methods more. `joins(x)` says whether it does now. `join(x,
branch, ...)` takes the stream and what is still to be added to it, and gives both on: so a sum is taken where it is
read next, together with the norm there. `ahead()` names the weights of its products and the logarithms of its scan's A,
which are cast, and A computed, for all blocks at once.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_modules

from vision_mamba import ops
from vision_mamba.layers.norm import LayerNorm, RMSNorm
from vision_mamba.ops import mixers
from vision_mamba.ops.compiled import goes_into_graphs


def eager_on_gpu(x: object) -> bool:
    """Whether this is a tensor on a GPU, and nobody traces or compiles what is done to it."""
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return isinstance(x, Tensor) and x.is_cuda and not watched and not of_modules._has_any_global_hook()


def chains_on_gpu(x: object) -> bool:
    """The same where torch.compile may trace: it takes chains of layers as they are."""
    return eager_on_gpu(x) or goes_into_graphs(x)


def untouched(module: object, *kinds: type[nn.Module]) -> bool:
    """Whether a module is one of those as they were written: not replaced, and with no hook that waits for its call."""
    return type(module) in kinds and not (
        "forward" in vars(module)
        or module._forward_hooks  # type: ignore[attr-defined]
        or module._forward_pre_hooks  # type: ignore[attr-defined]
        or module._backward_hooks  # type: ignore[attr-defined]
        or module._backward_pre_hooks  # type: ignore[attr-defined]
    )


def is_product(layer: object) -> bool:
    """Whether a layer is a product with its weight and nothing else."""
    return untouched(layer, nn.Linear) and layer.bias is None  # type: ignore[attr-defined]


def is_centred(conv: object) -> bool:
    """Whether a convolution gives a map of the same size, with zeros around it, as `ops.conv_map` does."""
    if not untouched(conv, nn.Conv2d):
        return False
    assert isinstance(conv, nn.Conv2d)
    centred = conv.padding == tuple(size // 2 for size in conv.kernel_size) and conv.padding_mode == "zeros"
    return centred and conv.stride == conv.dilation == (1, 1)


def is_usual_norm(norm: object) -> bool:
    return untouched(norm, LayerNorm, RMSNorm) and norm.weight is not None and norm.eps is not None  # type: ignore


def is_usual_mlp(mlp: object) -> bool:
    """Whether an MLP is two linear layers about an exact GELU, without dropout now."""
    if not untouched(mlp, timm.layers.Mlp):
        return False
    assert isinstance(mlp, timm.layers.Mlp)
    exact = untouched(mlp.act, nn.GELU, timm.layers.GELU) and getattr(mlp.act, "approximate", "none") == "none"
    drops = mlp.training and (mlp.drop1.p > 0 or mlp.drop2.p > 0)
    linear = all(untouched(layer, nn.Linear) and layer.bias is not None for layer in (mlp.fc1, mlp.fc2))
    return exact and not drops and linear and type(mlp.norm) is nn.Identity


def weights_of(mlp: Any) -> list[Tensor]:
    """What a usual MLP multiplies and adds, all in the type of products."""
    return [] if mlp is None else [mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias]


def is_usual_conv_norm(conv: object, norm: object) -> bool:
    """Whether a norm may take over the bias of the convolution before it."""
    return untouched(conv, nn.Conv2d) and conv.bias is not None and is_usual_norm(norm)  # type: ignore[attr-defined]


def conv_norm(x: Tensor, conv: Any, norm: Any) -> Tensor:
    """(B, C, H, W) -> (B, H', W', C'), a convolution and the norm of channels behind it, which adds the bias."""
    y = conv._conv_forward(x, conv.weight, None).permute(0, 2, 3, 1)
    half = norm.before_product and torch.is_autocast_enabled("cuda")
    return ops.normed(
        y, norm.weight, getattr(norm, "bias", None), norm.eps, rms=isinstance(norm, RMSNorm),
        out_dtype=torch.get_autocast_dtype("cuda") if half else None, shift=conv.bias,
    )  # fmt: skip


def conv_beside(x: Tensor, conv: Any) -> Tensor:
    """x + conv(x) of maps (B, H, W, C), in one pass; conv is depthwise."""
    return ops.conv_map(x, conv.weight, conv.bias, shortcut=True)


def norm_linear(x: Tensor, branch: Tensor | None, norm: Any, linear: Any, step: int = 1) -> tuple[Tensor, Tensor]:
    """linear(norm(x + branch)) of a usual norm and a layer without bias, and x + branch.

    The first may have more channels than the layer gives, up to a multiple of `step`.
    """
    how = dict(eps=norm.eps, rms=isinstance(norm, RMSNorm), step=step)
    found = mixers.norm_linear(x, branch, norm.weight, getattr(norm, "bias", None), linear.weight, **how)
    if found is None:
        x = x if branch is None else x + branch
        found = linear(norm(x)), x
    return found


def norm_mlp(x: Tensor, branch: Tensor | None, norm: Any, mlp: Any) -> tuple[Tensor, Tensor]:
    """mlp(norm(x + branch)) of a usual norm and a usual MLP, and x + branch."""
    how = dict(eps=norm.eps, rms=isinstance(norm, RMSNorm))
    first, second = mlp.fc1, mlp.fc2
    parameters = (norm.weight, getattr(norm, "bias", None), first.weight, first.bias, second.weight, second.bias)
    found = mixers.norm_mlp(x, branch, *parameters, **how)
    if found is None:
        x = x if branch is None else x + branch
        found = mlp(norm(x)), x
    return found


def run(blocks: Iterable[nn.Module], x: Tensor, *given: Any) -> Tensor:
    """Blocks one after the other, joined where they can be."""
    x, branch = stream(blocks, x, *given)
    return x if branch is None else x + branch


def stream(blocks: Iterable[nn.Module], x: Tensor, *given: Any) -> tuple[Tensor, Tensor | None]:
    """The same, of which the last sum is left to who reads it."""
    branch: Tensor | None = None
    every: list[Any] = list(blocks)
    joining = [hasattr(block, "join") and block.joins(x) for block in every]
    with _ahead(x, [block for block, joins in zip(every, joining, strict=True) if joins]):
        for block, joins in zip(every, joining, strict=True):
            if joins:
                x, branch = block.join(x, branch, *given)
            else:
                x = block(x if branch is None else x + branch, *given)
                branch = None
    return x, branch


def product_sum(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch for a product or a convolution, in whose type it may be already."""
    found = mixers.product_sum(x, branch)
    return x + branch if found is None else found


def _ahead(x: Tensor, blocks: list[Any]) -> AbstractContextManager[None]:
    if not blocks or torch.compiler.is_compiling():
        return nullcontext()
    weights, logs = zip(*[block.ahead() for block in blocks], strict=True)
    return mixers.ahead(x, list(chain(*weights)), list(chain(*logs)))
