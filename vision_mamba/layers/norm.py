"""timm's norms over the last axis, on GPUs in one kernel that reads and writes what its neighbours have and want."""

from typing import TypeVar

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from vision_mamba import ops
from vision_mamba.layers.joined import eager_on_gpu, untouched

Module = TypeVar("Module", bound=nn.Module)


@torch.fx.wrap
@register_notrace_function
def _normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, before_product: bool) -> Tensor:
    if torch.jit.is_scripting():  # as part of a traced graph
        shape = [x.shape[-1]]
        return F.rms_norm(x, shape, weight, eps) if rms else F.layer_norm(x, shape, weight, bias, eps)
    else:
        return ops.normed(x, weight, bias, eps, rms=rms, out_dtype=_out_dtype(x, before_product))


def _out_dtype(x: Tensor, before_product: bool) -> torch.dtype | None:
    if before_product and x.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.get_autocast_dtype("cuda")
    return None


class LayerNorm(timm.layers.LayerNorm):
    """Layer norm over the last axis; see `ops.normed`.

    Under autocast it computes and gives float32 as torch's does; on GPUs half precision where only products read the
    result, which would cast it: see `before_product`.
    """

    before_product: bool = False

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting() or self.weight is None:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return _normed(x, self.weight, self.bias, self.eps, False, self.before_product)


class RMSNorm(nn.RMSNorm):
    """Division by the root of the mean square over the last axis; otherwise as `LayerNorm`."""

    before_product: bool = False

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting() or self.weight is None or self.eps is None:
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return _normed(x, self.weight, None, self.eps, True, self.before_product)


#: By timm's names; other names are left to timm.
NORMS: dict[str, type[nn.Module]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


def before_product(norm: Module) -> Module:
    """Mark a norm whose result only linear layers and convolutions read."""
    if isinstance(norm, (LayerNorm, RMSNorm)):
        norm.before_product = True
    return norm


def joins_stream(x: Tensor, *norms: nn.Module) -> bool:
    """Whether `add_norm` may stand for additions to x and these norms."""
    return eager_on_gpu(x) and all(
        untouched(norm, LayerNorm, RMSNorm) and norm.weight is not None and norm.eps is not None for norm in norms
    )


def add_norm(norm: nn.Module, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm of x + branch, and that sum, in one pass forwards and backwards; without a branch, of x and x itself."""
    rms, before_product = isinstance(norm, RMSNorm), bool(norm.before_product)
    bias = None if rms else norm.bias
    dtype = _out_dtype(x, before_product)
    return ops.add_normed(x, branch, norm.weight, bias, norm.eps, rms=rms, out_dtype=dtype)  # type: ignore[arg-type]
