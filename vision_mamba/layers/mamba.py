"""Mamba's token mixer: a causal convolution and a selective state-space model (S6), at once or token by token."""

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from vision_mamba.layers.init import init_a_log_, init_dt_bias_, init_dt_weight_
from vision_mamba.ops import conv_along, gated


def init_dt_constant_(weight: Tensor, rank: int, scale: float = 1.0) -> Tensor:
    """Fill the projection from rank R to step sizes with R^-1/2 times `scale`."""
    return nn.init.constant_(weight, rank**-0.5 * scale)


#: How the projection to step sizes starts, by the published names.
DT_INITS: dict[str, Callable[..., Tensor]] = {"random": init_dt_weight_, "constant": init_dt_constant_}


def require_sizes(where: str, **sizes: object) -> None:
    """Raise ValueError unless all are whole numbers from 1."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or size < 1:
            raise ValueError(f"{where}: {name} must be a whole number from 1, got {size!r}.")


def require_tokens(
    where: str, x: Tensor, width: int, cache: tuple[Tensor, ...] | None, states: list[list[int]]
) -> None:
    """Raise ValueError unless x is (B, L, width) with a token at least, and a cache has states (B, *sizes) for it."""
    if x.dim() != 3 or x.shape[2] != width or x.shape[1] < 1:
        raise ValueError(f"{where}: x must be (batch, tokens, {width}) with a token at least, got {tuple(x.shape)}.")
    if cache is not None and [list(state.shape) for state in cache] != [[x.shape[0], *sizes] for sizes in states]:
        found = ", ".join(str(tuple(state.shape)) for state in cache)
        raise ValueError(
            f"{where}: the cache must hold (batch, ...) states of {', '.join(map(str, states))} for a batch of "
            f"{x.shape[0]}, got {found}; make it by allocate_inference_cache({x.shape[0]})."
        )


def convolve(conv: nn.Conv1d, x: Tensor, before: int, state: Tensor | None = None) -> Tensor:
    """silu(conv(x)) of tokens (B, L, D), with `before` taps before each and zeros around, or a state (B, D, W) before.

    The state, the last W inputs, goes on with x; then the convolution is causal.
    """
    weight, bias = conv.weight, conv.bias
    if state is None:
        return conv_along(x, weight, bias, before=before)
    inputs = torch.cat((state.mT.to(x.dtype), x), 1)
    taps = weight.shape[2]
    state.copy_(inputs[:, -taps:].detach().mT)
    return conv_along(inputs[:, 1:], weight, bias, before=taps - 1)[:, taps - 1 :]


class StepProjection(nn.Linear):
    """From R columns to the step sizes of D channels before softplus; starts with steps log-uniform in a range.

    The weight keeps the variance of its input; the bias is the inverse of softplus and stays float32 at least.
    """

    def __init__(
        self,
        rank: int,
        channels: int,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        floor: float = 1e-4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dt_init not in DT_INITS:
            raise ValueError(f"Mamba: dt_init must be one of {', '.join(DT_INITS)}, got {dt_init!r}.")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"Mamba: steps must start from 0 < dt_min <= dt_max, got {dt_min} and {dt_max}.")
        self.dt_init, self.dt_scale, self.dt_min, self.dt_max, self.floor = dt_init, dt_scale, dt_min, dt_max, floor
        super().__init__(rank, channels, device=device, dtype=dtype)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.bias = nn.Parameter(self.bias.detach().to(wide))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        DT_INITS[self.dt_init](self.weight, self.in_features, self.dt_scale)
        init_dt_bias_(self.bias, self.dt_min, self.dt_max, self.floor)


class Mamba(nn.Module):
    """Mix tokens by a causal depthwise convolution and a selective scan, gated: the block of Mamba-1.

    With (x, z) the halves of in_proj(u), x' = silu(conv(x)), and (r, B, C) = x_proj(x') per token:
        y = out_proj(silu(z) * scan(x', dt_proj(r), A, B, C, D)),     A = -exp(A_log),     scan as ops.selective_scan

    Parameters have the names and shapes of mamba_ssm's `Mamba`, so its checkpoints load as they are. With a cache, what
    comes is the next part of a sequence: a prompt, then token by token, gives what the whole sequence gives at once.

    Args:
        d_model: E, width of the tokens.
        d_state: N, states of a channel.
        d_conv: W, taps of the convolution.
        expand: D / E, inner width over outer width.
        dt_rank: R, rank of the step sizes; E / 16 rounded up by default.
        dt_min: smallest step size at the start; they are log-uniform from here to dt_max.
        dt_max: largest step size at the start.
        dt_init: start of dt_proj's weight, "random" or "constant".
        dt_scale: factor on that.
        dt_init_floor: no step size starts below.
        conv_bias: give the convolution a bias.
        bias: give in_proj and out_proj a bias.
        groups: G, channels in as many groups have a B and a C each; G divides D.
        selective_B: B of each token, by x_proj; else a parameter `B` (D, N) for all tokens, which starts at 1.
        selective_C: C of each token; else a parameter `C` (D, N), which starts normal. Either constant one makes every
            channel a group of its own, which costs as much more memory traffic as there are channels in a group.

    Shape: (B, L, E) -> (B, L, E).
    Raises: ValueError for sizes or a range of steps that are none, an unknown dt_init, groups that do not divide D, and
        for tokens or a cache that do not fit.
    Numerics: A_log, D and the bias of the steps are float32 at least, and so are states and sums, by the operator.
    Reference: Gu and Dao 2023, arXiv:2312.00752, section 3.4.

    >>> mixer, x = Mamba(32), torch.randn(2, 10, 32)
    >>> mixer(x).shape
    torch.Size([2, 10, 32])
    >>> cache = mixer.allocate_inference_cache(2, max_seqlen=10)
    >>> prompt = mixer(x[:, :7], cache)
    >>> rest = [mixer.step(x[:, t : t + 1], *cache)[0] for t in range(7, 10)]
    >>> bool(torch.allclose(torch.cat((prompt, *rest), 1), mixer(x), atol=1e-6))
    True
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        groups: int = 1,
        selective_B: bool = True,
        selective_C: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        require_sizes("Mamba", d_model=d_model, d_state=d_state, d_conv=d_conv, dt_rank=dt_rank, groups=groups)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        # Half precision is too coarse for what is exponentiated or summed over a whole sequence.
        wide: dict[str, Any] = {
            "device": device,
            "dtype": torch.promote_types(dtype or torch.get_default_dtype(), torch.float32),
        }
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = d_inner = int(expand * d_model)
        self.dt_rank = dt_rank
        if d_inner < 1 or d_inner % groups:
            raise ValueError(
                f"Mamba: groups must divide the {d_inner} inner channels, got {groups}; choose a divisor, or another "
                f"d_model or expand."
            )
        self.groups = groups
        # Routes of the operator are the groups here: a B and a C for each. A constant one is each channel's own.
        self.routes = groups if selective_B and selective_C else d_inner

        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=bias, **dd)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, padding=d_conv - 1, groups=d_inner, bias=conv_bias, **dd)
        self.widths = [self.dt_rank, groups * d_state * selective_B, groups * d_state * selective_C]
        self.x_proj = nn.Linear(d_inner, sum(self.widths), bias=False, **dd)
        steps = (dt_init, dt_scale, dt_min, dt_max, dt_init_floor)
        self.dt_proj = StepProjection(self.dt_rank, d_inner, *steps, **dd)
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state, **wide))
        self.B = None if selective_B else nn.Parameter(torch.empty(d_inner, d_state, **dd))
        self.C = None if selective_C else nn.Parameter(torch.empty(d_inner, d_state, **dd))
        self.D = nn.Parameter(torch.empty(d_inner, **wide))
        self.out_proj = nn.Linear(d_inner, d_model, bias=bias, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill what is not in a submodule as published."""
        init_a_log_(self.A_log)
        nn.init.ones_(self.D)
        if self.B is not None:
            nn.init.ones_(self.B)
        if self.C is not None:
            nn.init.normal_(self.C)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The whole sequence, or its next part: a cache is continued from, and left at the last token."""
        states = [[self.d_inner, self.d_conv], [self.d_inner, self.d_state]]
        require_tokens("Mamba", x, self.d_model, cache, states)
        x, z = self.in_proj(x).chunk(2, -1)
        x = convolve(self.conv1d, x, self.d_conv - 1, None if cache is None else cache[0])
        dt, B, C = self.x_proj(x).split(self.widths, -1)
        state = None
        if cache is not None:
            # A copy, since backward may want the state that is overwritten below.
            state = cache[1].clone().unflatten(1, (self.routes, -1))
        y, last = torch.ops.vision_mamba.cross_selective_scan(
            x.unflatten(-1, (self.routes, -1)),
            dt.unsqueeze(2).expand(-1, -1, self.routes, -1),
            self._by_route(-torch.exp(self.A_log)),
            self._weights(B, self.B),
            self._weights(C, self.C),
            self._by_route(self.D),
            None,
            self._by_route(self.dt_proj.weight),
            self._by_route(self.dt_proj.bias),
            state,
            True,  # dt_softplus
            False,  # merge: groups are side by side
            cache is not None,  # return_last_state
        )
        if cache is not None:
            cache[1].copy_(last.detach().flatten(1, 2))
        return self.out_proj(gated(y.flatten(2), z))

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next token (B, 1, E); returns its output (B, 1, E) and both states, which are updated in place."""
        if x.dim() != 3 or x.shape[1] != 1:
            raise ValueError(
                f"Mamba.step: x must be one token (batch, 1, {self.d_model}), got {tuple(x.shape)}; "
                f"give more of them to forward, with the same states as its cache."
            )
        return self(x, (conv_state, ssm_state)), conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """The states before the first token: zeros for the last W inputs (B, D, W) and for the scan (B, D, N).

        They are as large for any length, so max_seqlen changes nothing. `dtype` is that of the inputs, by default the
        weights'; the state of the scan is float32 at least, whatever the inputs are.
        """
        weight = self.conv1d.weight
        conv = weight.new_zeros((batch_size, self.d_inner, self.d_conv), dtype=dtype or weight.dtype)
        wide = torch.promote_types(weight.dtype, torch.float32)
        return conv, weight.new_zeros((batch_size, self.d_inner, self.d_state), dtype=wide)

    def _by_route(self, weight: Tensor) -> Tensor:
        """(D, ...) -> (K, D / K, ...), a view."""
        return weight.unflatten(0, (self.routes, -1))

    def _weights(self, columns: Tensor, constant: Tensor | None) -> Tensor:
        """B or C of each token and route (B, L, K, N): columns (B, L, G N), or a constant (D, N)."""
        batch, length = columns.shape[:2]
        if constant is not None:
            return constant.expand(batch, length, -1, -1)
        columns = columns.unflatten(-1, (self.groups, self.d_state))
        return columns.repeat_interleave(self.routes // self.groups, 2) if self.routes > self.groups else columns
