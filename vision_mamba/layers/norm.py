"""timm's norms over the last axis, on GPUs in one kernel that reads and writes what its neighbours have and want."""

from typing import TypeVar

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch import Tensor, nn

from vision_mamba import ops

Module = TypeVar("Module", bound=nn.Module)


@torch.fx.wrap
@register_notrace_function
def _normed(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, before_product: bool) -> Tensor:
    if torch.jit.is_scripting():  # as part of a traced graph
        shape = [x.shape[-1]]
        return F.rms_norm(x, shape, weight, eps) if rms else F.layer_norm(x, shape, weight, bias, eps)
    else:
        out_dtype = None
        if before_product and x.is_cuda and torch.is_autocast_enabled("cuda"):
            out_dtype = torch.get_autocast_dtype("cuda")
        return ops.normed(x, weight, bias, eps, rms=rms, out_dtype=out_dtype)


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
