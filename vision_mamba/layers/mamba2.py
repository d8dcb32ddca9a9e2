"""Mamba-2's token mixer: one projection, a convolution, the state-space dual scan, a gated norm; any direction."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_mamba.layers.init import init_dt_bias_
from vision_mamba.layers.mamba import convolve, require_sizes, require_tokens
from vision_mamba.ops import conv_along, gated, normed, ssd
from vision_mamba.ops.ssd import DIRECTIONS


class GatedRMSNorm(nn.Module):
    """Root-mean-square norm of equal groups of channels, gated by silu(z) before or after.

        norm(x silu(z)) w,     or, with norm_before_gate,     norm(x) w silu(z)

    Args:
        dim: channels.
        groups: parts, side by side, that are normalised each by itself.
        norm_before_gate: which of both orders.
        eps: added to the mean square.

    >>> GatedRMSNorm(8, groups=2)(torch.randn(2, 3, 8), torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        dim: int,
        groups: int = 1,
        norm_before_gate: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.groups, self.norm_before_gate, self.eps = groups, norm_before_gate, eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, groups={self.groups}, norm_before_gate={self.norm_before_gate}"

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.norm_before_gate:
            return gated(self._normed(x, wide), z, wide).to(x.dtype)
        return self._normed(gated(x, z, wide), x.dtype)

    def _normed(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(wide)
        if self.groups == 1:
            return normed(x.to(wide), weight, None, self.eps, rms=True, out_dtype=out_dtype)
        ones = torch.ones_like(weight[: len(weight) // self.groups])
        groups = normed(x.to(wide).unflatten(-1, (self.groups, -1)), ones, None, self.eps, rms=True)
        return (groups.flatten(-2) * weight).to(out_dtype)


class Mamba2(nn.Module):
    """Mix tokens by a short depthwise convolution and heads of a state-space dual scan, gated and normed: Mamba-2.

    With (z, xBC, dt) = in_proj(u) per token and (x, B, C) the parts of silu(conv(xBC)):
        y = out_proj(norm(ssd(x, dt, A, B, C, D), z)),     A = -exp(A_log), one a head,     ssd as ops.ssd

    Parameters have the names and shapes of mamba_ssm's `Mamba2`, so its checkpoints load as they are. With a cache,
    what comes is the next part of a sequence, as in `Mamba`; that is for the causal direction alone.

    For pictures, whose tokens have no order, `direction="both"` reads the sequence from both ends with the same
    parameters, and "none" lets every token read all others. The convolution then looks to both sides.

    Args:
        d_model: E, width of the tokens.
        d_state: N, states of a channel.
        d_conv: W, taps of the convolution.
        conv_init: bound of the uniform start of its taps; torch's own by default.
        expand: inner width over outer width.
        headdim: P, channels of a head.
        d_ssm: width that goes through the scan, a multiple of P; the rest is a gated MLP. All by default.
        ngroups: G, heads in as many groups have a B and a C each, and a norm of their own.
        A_init_range: bounds of the uniform start of -A.
        D_has_hdim: a skip weight for each channel, rather than for each head.
        rmsnorm: norm and gate; else the gate alone.
        norm_before_gate: norm(y) silu(z) rather than norm(y silu(z)).
        dt_min: smallest step size at the start; they are log-uniform from here to dt_max.
        dt_max: largest step size at the start.
        dt_init_floor: no step size starts below.
        dt_limit: lowest and highest step size at any time.
        bias: give in_proj and out_proj a bias.
        conv_bias: give the convolution a bias.
        direction: of the scan, as in `ops.ssd`.
        chunk_size: tokens that the scan multiplies at once; the backend's choice by default.

    Shape: (B, L, E) -> (B, L, E).
    Raises: ValueError for sizes and ranges that are none, widths that do not divide, an unknown direction,
        and for tokens or a cache that do not fit.
    Numerics: A_log, D and dt_bias are float32 at least, and so are states and sums, and the norm.
    Reference: Dao and Gu 2024, Mamba-2, arXiv:2405.21060, section 7.

    >>> mixer, x = Mamba2(32, d_state=16, headdim=8), torch.randn(2, 10, 32)
    >>> mixer(x).shape
    torch.Size([2, 10, 32])
    >>> cache = mixer.allocate_inference_cache(2, max_seqlen=10)
    >>> prompt = mixer(x[:, :7], cache)
    >>> rest = [mixer.step(x[:, t : t + 1], *cache)[0] for t in range(7, 10)]
    >>> bool(torch.allclose(torch.cat((prompt, *rest), 1), mixer(x), atol=1e-5))
    True
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: float = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        direction: str = "causal",
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        require_sizes("Mamba2", d_model=d_model, d_state=d_state, d_conv=d_conv, headdim=headdim, ngroups=ngroups)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        # Half precision is too coarse for what is exponentiated or summed over a whole sequence.
        float_type = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        wide: dict[str, Any] = {"device": device, "dtype": float_type}
        self.d_model, self.d_state, self.d_conv, self.headdim = d_model, d_state, d_conv, headdim
        self.d_inner = int(expand * d_model)
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.ngroups, self.dt_limit, self.chunk_size, self.direction = ngroups, dt_limit, chunk_size, direction
        if not 0 < self.d_ssm <= self.d_inner or self.d_ssm % headdim:
            raise ValueError(
                f"Mamba2: headdim must divide d_ssm, and that be at most the {self.d_inner} inner channels, got "
                f"headdim {headdim} and d_ssm {self.d_ssm}; choose another headdim, d_model or expand."
            )
        self.nheads = self.d_ssm // headdim
        if self.nheads % ngroups:
            raise ValueError(f"Mamba2: ngroups must divide the {self.nheads} heads, got {ngroups}; choose a divisor.")
        if len(A_init_range) != 2 or not 0 < A_init_range[0] <= A_init_range[1]:
            raise ValueError(f"Mamba2: A_init_range must be (low, high) with 0 < low <= high, got {A_init_range}.")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"Mamba2: steps must start from 0 < dt_min <= dt_max, got {dt_min} and {dt_max}.")
        if len(dt_limit) != 2 or not dt_limit[0] < dt_limit[1]:
            raise ValueError(f"Mamba2: dt_limit must be (lowest, highest) with lowest < highest, got {dt_limit}.")
        if direction not in DIRECTIONS:
            raise ValueError(f"Mamba2: direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}.")
        self._start = (A_init_range, dt_min, dt_max, dt_init_floor, conv_init)

        d_mlp = self.d_inner - self.d_ssm
        conv_dim = self.d_ssm + 2 * ngroups * d_state
        self.widths = [d_mlp, d_mlp, self.d_ssm, conv_dim, self.nheads]
        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=bias, **dd)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, groups=conv_dim, bias=conv_bias, **dd)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **wide))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **wide))
        self.D = nn.Parameter(torch.empty(self.d_ssm if D_has_hdim else self.nheads, **wide))
        self.norm = GatedRMSNorm(self.d_ssm, ngroups, norm_before_gate, **dd) if rmsnorm else None
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill what is not in a submodule as published."""
        A_init_range, dt_min, dt_max, floor, conv_init = self._start
        init_dt_bias_(self.dt_bias, dt_min, dt_max, floor)
        with torch.no_grad():
            self.A_log.uniform_(*A_init_range).log_()
        nn.init.ones_(self.D)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The whole sequence, or its next part: a cache is continued from, and left at the last token."""
        if cache is not None and self.direction != "causal":
            raise ValueError(
                f"Mamba2: a cache continues a causal sequence, but direction is {self.direction!r}; give it the whole "
                f"sequence."
            )
        states = [[self.conv1d.in_channels, self.d_conv], [self.nheads, self.headdim, self.d_state]]
        require_tokens("Mamba2", x, self.d_model, cache, states)
        gate, value, z, xBC, dt = self.in_proj(x).split(self.widths, -1)
        xBC = self._convolve(xBC, None if cache is None else cache[0])
        x, B, C = xBC.split([self.d_ssm, *[self.ngroups * self.d_state] * 2], -1)
        y = ssd(
            x.unflatten(-1, (self.nheads, self.headdim)),
            dt,
            -torch.exp(self.A_log),
            B.unflatten(-1, (self.ngroups, self.d_state)),
            C.unflatten(-1, (self.ngroups, self.d_state)),
            self.D if len(self.D) == self.nheads else self.D.unflatten(0, (self.nheads, self.headdim)),
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            # A copy, since backward may want the state that is overwritten below.
            initial_state=None if cache is None else cache[1].clone(),
            return_last_state=cache is not None,
            direction=self.direction,
            chunk=self.chunk_size,
        )
        if cache is not None:
            y, last = y
            cache[1].copy_(last.detach())
        y = y.flatten(2)  # type: ignore[union-attr]
        y = gated(y, z) if self.norm is None else self.norm(y, z)
        return self.out_proj(torch.cat((F.silu(gate) * value, y), -1) if gate.shape[-1] else y)

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next token (B, 1, E); returns its output (B, 1, E) and both states, which are updated in place."""
        if x.dim() != 3 or x.shape[1] != 1:
            raise ValueError(
                f"Mamba2.step: x must be one token (batch, 1, {self.d_model}), got {tuple(x.shape)}; "
                f"give more of them to forward, with the same states as its cache."
            )
        return self(x, (conv_state, ssm_state)), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """The states before the first token: zeros for the last W inputs (B, X, W) and for the scan (B, H, P, N).

        They are as large for any length, so max_seqlen changes nothing. `dtype` is that of the inputs, by default the
        weights'; the state of the scan is float32 at least, whatever the inputs are.
        """
        weight = self.conv1d.weight
        conv = weight.new_zeros((batch_size, len(weight), self.d_conv), dtype=dtype or weight.dtype)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return conv, weight.new_zeros((batch_size, self.nheads, self.headdim, self.d_state), dtype=wide)

    def _convolve(self, x: Tensor, conv_state: Tensor | None) -> Tensor:
        """The depthwise convolution of (B, L, X): causal from zeros or from the inputs before, mirrored, or centred."""
        if self.direction == "reversed":
            return conv_along(x, self.conv1d.weight.flip(-1), self.conv1d.bias, before=0)
        before = self.d_conv - 1 if self.direction == "causal" else self.d_conv // 2
        return convolve(self.conv1d, x, before, conv_state)
