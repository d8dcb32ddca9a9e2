"""The initialisations that the state-space parameters are published with, always computed in float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def init_a_log_(A_log: Tensor) -> Tensor:
    """Fill A_log (..., N) with log(1), ..., log(N), so that A = -exp(A_log) is S4D-real: -1, ..., -N.

    Reference: Gu et al. 2022, arXiv:2206.11893, S4D-Real; as in Mamba, arXiv:2312.00752, section 3.6.
    """
    n = torch.arange(1, A_log.shape[-1] + 1, dtype=torch.float32, device=A_log.device)
    return A_log.copy_(n.log().expand_as(A_log))


@torch.no_grad()
def init_dt_bias_(bias: Tensor, dt_min: float = 1e-3, dt_max: float = 0.1, floor: float = 1e-4) -> Tensor:
    """Fill a bias so that softplus(bias) is log-uniform in [dt_min, dt_max], at least `floor`.

    Reference: Mamba, arXiv:2312.00752, section 3.6.
    """
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.rand(bias.shape, dtype=torch.float32, device=bias.device).mul_(high - low).add_(low).exp_().clamp_(floor)
    # The inverse of softplus: log(exp(dt) - 1) = dt + log(1 - exp(-dt)).
    return bias.copy_(dt + torch.log(-torch.expm1(-dt)))


@torch.no_grad()
def init_dt_weight_(weight: Tensor, rank: int, scale: float = 1.0) -> Tensor:
    """Fill the projection from rank R to step sizes with U(-R^-1/2, R^-1/2) times `scale`."""
    bound = rank**-0.5 * scale
    return weight.uniform_(-bound, bound)


@torch.no_grad()
def init_in_float32_(tensor: Tensor, init: Callable[..., object], **options: float) -> Tensor:
    """Fill a tensor with what `init` makes of a float32 one: a normal drawn in bfloat16 has false tails."""
    wide = torch.empty_like(tensor, dtype=torch.float32)
    init(wide, **options)
    return tensor.copy_(wide)
