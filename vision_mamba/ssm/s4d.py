"""S4D: a layer of diagonal linear time-invariant state-space models, one a channel."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_mamba.ssm.discretize import discretize
from vision_mamba.ssm.hippo import diagonal
from vision_mamba.ssm.system import fft_convolve, powers

#: Rules that keep a stable model stable at any step; forward Euler is not one.
METHODS = ("zoh", "bilinear")


class S4D(nn.Module):
    """Run each channel through its own diagonal state-space model, then mix the channels.

    With A' and B' discretised from A and 1 at the channel's step, the sum over one of each conjugate pair of states:
        y_t = 2 Re <C, h_t> + D x_t,     h_t = A' h_{t-1} + B' x_t          out = GLU(W gelu(y))

    A sequence is one convolution; with a cache, state by state or chunk by chunk, it is the recurrence. Both agree.
    Only the product of B and C is seen, so B is 1 and the initial one is in C.

    Args:
        dim: D, channels.
        d_state: N, real dimensions of a channel's state; N/2 complex ones are kept.
        init: where A starts, see `vision_mamba.ssm.diagonal`: "legs", "inv", "lin", "real" or "random".
        method: "zoh" or "bilinear".
        dt_min: smallest step at the start, in tokens^-1; steps start log-uniform from here to dt_max.
        dt_max: largest step at the start.
        train_a: learn A, and the steps; else both stay as they start.

    Shape: (B, L, D) -> (B, L, D).
    Raises: ValueError for an unknown init or method, or an odd d_state.
    Numerics: kernel, states and convolution in float32 (float64 if the parameters are), whatever the input's type.
    Reference: Gu et al. 2022, arXiv:2206.11893, listing 1.

    >>> layer, x = S4D(4, 8), torch.randn(2, 10, 4)
    >>> layer(x).shape
    torch.Size([2, 10, 4])
    >>> cache = layer.allocate_inference_cache(2)
    >>> steps = [layer.step(x[:, t : t + 1], *cache)[0] for t in range(10)]
    >>> bool(torch.allclose(torch.cat(steps, 1), layer(x), atol=1e-5))
    True
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        init: str = "legs",
        method: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        train_a: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if method not in METHODS:
            raise ValueError(
                f"S4D: method must be one of {', '.join(METHODS)}, which are stable at any step, got {method!r}."
            )
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"S4D: steps must start from 0 < dt_min <= dt_max, got {dt_min} and {dt_max}.")
        self.dim, self.d_state, self.init, self.method = dim, d_state, init, method
        self.dt_min, self.dt_max = dt_min, dt_max
        pairs = len(diagonal(init, d_state)[0])
        # Half precision is too coarse for what is exponentiated or summed over a whole sequence.
        wide: dict[str, Any] = {
            "device": device,
            "dtype": torch.promote_types(dtype or torch.get_default_dtype(), torch.float32),
        }
        self.log_dt = nn.Parameter(torch.empty(dim, **wide), requires_grad=train_a)
        self.A_real_log = nn.Parameter(torch.empty(dim, pairs, **wide), requires_grad=train_a)
        self.A_imag = nn.Parameter(torch.empty(dim, pairs, **wide), requires_grad=train_a)
        self.C = nn.Parameter(torch.empty(dim, pairs, 2, **wide))
        self.D = nn.Parameter(torch.empty(dim, **wide))
        self.out_proj = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill what is not in a submodule: A as named, log-uniform steps, C and D from the normal distribution."""
        A, B = diagonal(self.init, self.d_state)
        self.log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max))
        self.A_real_log.copy_((-A.real).log().expand_as(self.A_real_log))
        self.A_imag.copy_(A.imag.expand_as(self.A_imag))
        C = torch.randn(self.C.shape[:2], dtype=torch.complex128) * B
        self.C.copy_(torch.view_as_real(C))
        self.D.normal_()

    def extra_repr(self) -> str:
        return f"{self.dim}, d_state={self.d_state}, init={self.init!r}, method={self.method!r}"

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """A', B' and C of one of each pair, (D, N/2) complex."""
        wide = torch.promote_types(self.C.dtype, torch.float32)
        A = torch.complex(-self.A_real_log.to(wide).exp(), self.A_imag.to(wide))
        A, B = discretize(A, torch.ones_like(A), self.log_dt.to(wide).exp(), self.method, diagonal=True)
        return A, B, torch.view_as_complex(self.C.to(wide))

    def kernel(self, length: int) -> Tensor:
        """The convolution kernel K (length, D), real, without the skip."""
        A, B, C = self.discrete()
        return 2 * (powers(A, length) * (B * C)).sum(-1).real

    def forward(self, x: Tensor, cache: tuple[Tensor] | None = None) -> Tensor:
        """The whole sequence, or its next part: a cache is continued from, and left at the last token."""
        return self._mix(self._run(x, cache), x)

    def step(self, x: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor]:
        """The next token (B, 1, D) by the recurrence; returns its output and the state, which is updated in place."""
        if x.dim() != 3 or x.shape[1] != 1:
            raise ValueError(f"S4D.step: x must be one token (batch, 1, {self.dim}), got {tuple(x.shape)}.")
        self._check("S4D.step", x, ssm_state)
        A, B, C = self.discrete()
        # A copy of the state, since backward may want what is overwritten.
        h = A * ssm_state.clone() + B * x.transpose(1, 2).to(B.real.dtype)
        ssm_state.copy_(h.detach())
        return self._mix(2 * (C * h).sum(-1).real.unsqueeze(1), x), ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor]:
        """The state before the first token: (B, D, N/2) complex zeros, whatever the length and the type to come."""
        real = torch.promote_types(self.C.dtype, torch.float32)
        shape = (batch_size, self.dim, self.d_state // 2)
        return (torch.zeros(shape, dtype=real.to_complex(), device=self.C.device),)

    def _run(self, x: Tensor, cache: tuple[Tensor] | None) -> Tensor:
        self._check("S4D", x, None if cache is None else cache[0])
        length = x.shape[1]
        if cache is None:
            return fft_convolve(x, self.kernel(length))
        A, B, C = self.discrete()
        table = powers(A, length + 1)  # (L + 1, D, N/2)
        y = fft_convolve(x, 2 * (table[:-1] * (B * C)).sum(-1).real)
        # What came before decays by A' a token; what comes now has decayed by A' for every token since.
        state = cache[0].clone()
        y = y + 2 * torch.einsum("ldn,bdn->bld", table[1:], C * state).real
        inputs = x.to(y.dtype).to(table.dtype)
        last = table[-1] * state + B * torch.einsum("ldn,bld->bdn", table[:-1].flip(0), inputs)
        cache[0].copy_(last.detach())
        return y

    def _check(self, where: str, x: Tensor, state: Tensor | None) -> None:
        if x.dim() != 3 or x.shape[2] != self.dim or x.shape[1] < 1:
            raise ValueError(f"{where}: x must be (batch, tokens, {self.dim}), got {tuple(x.shape)}.")
        expected = (x.shape[0], self.dim, self.d_state // 2)
        if state is not None and state.shape != expected:
            raise ValueError(
                f"{where}: the state must be (batch, channels, pairs) = {expected}, got {tuple(state.shape)}; make it "
                f"by allocate_inference_cache({x.shape[0]}), which returns a tuple."
            )

    def _mix(self, y: Tensor, x: Tensor) -> Tensor:
        y = F.gelu(y + self.D.to(y.dtype) * x.to(y.dtype))
        return F.glu(self.out_proj(y.to(self.out_proj.weight.dtype)), -1)
