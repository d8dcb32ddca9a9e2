"""Where several layers may run as one, by kernels: see `ops.mixers`. Elsewhere each runs by itself."""

import timm.layers
import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_modules

from vision_mamba.ops import mixers


def eager_on_gpu(x: object) -> bool:
    """Whether this is a tensor on a GPU, and nobody traces or compiles what is done to it."""
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return isinstance(x, Tensor) and x.is_cuda and not watched and not of_modules._has_any_global_hook()


def untouched(module: object, *kinds: type[nn.Module]) -> bool:
    """Whether a module is one of those as they were written: not replaced, and with no hook that waits for its call."""
    return type(module) in kinds and not (
        module._forward_hooks  # type: ignore[attr-defined]
        or module._forward_pre_hooks  # type: ignore[attr-defined]
        or module._backward_hooks  # type: ignore[attr-defined]
        or module._backward_pre_hooks  # type: ignore[attr-defined]
    )


class Mlp(timm.layers.Mlp):
    """timm's, of which kernels keep one tensor of hidden width for the backward pass rather than two."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: type[nn.Module] = nn.GELU,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, hidden_features, act_layer=act_layer, drop=drop, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            y = self._joined(x)
            if y is not None:
                return y
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))

    def _joined(self, x: Tensor) -> Tensor | None:
        if not (eager_on_gpu(x) and untouched(self.fc1, nn.Linear) and untouched(self.fc2, nn.Linear)):
            return None
        exact = untouched(self.act, nn.GELU, timm.layers.GELU) and getattr(self.act, "approximate", "none") == "none"
        drops = self.training and (self.drop1.p > 0 or self.drop2.p > 0)
        if not exact or drops or type(self.norm) is not nn.Identity:
            return None
        return mixers.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
