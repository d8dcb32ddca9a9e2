"""The state-space dual scan of Mamba-2: one decay a head, so that a scan is a handful of matrix products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vision_mamba.ops import registry, ssd_call
from vision_mamba.ops.operator import once
from vision_mamba.ops.ssd_call import SsdCall

#: What `direction` says to the operator: causal, routes, and how many of these run from the last token to the first.
DIRECTIONS = {"causal": (True, 1, 0), "reversed": (True, 1, 1), "both": (True, 2, 1), "none": (False, 1, 0)}

_check_plain = once(ssd_call.check_one_route)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    direction: str = "causal",
    indices: Tensor | None = None,
    merge: bool = True,
    chunk: int | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan tokens with heads of many channels, each with one decay, by matrix products: state-space duality.

    With s = clamp(dt + dt_bias, through softplus if asked, dt_limit) and a state h (P, N), along every head:
        h_t = exp(s_t A) h_{t-1} + s_t x_t B_t^T         y_t = h_t C_t + D x_t
    which is the product with a matrix of L x L, y = (exp(segment sums of s A) * (C B^T)) (s x) + D x.

    Args:
        x: (B, L, H, P) tokens of H heads with P channels; float32, float16, bfloat16 (float64 on eager and reference).
        dt: (B, L, H) step sizes before bias, softplus and limits.
        A: (H,) decay rates, negative for a stable state; float32 is kept, anything else is widened to it.
        B: (B, L, G, N) input weights of each token; heads in G equal parts, side by side, have one each.
        C: (B, L, G, N) output weights of each token.
        D: (H,) skip weights, (H, P) one a channel, or None for no skip.
        dt_bias: (H,) added to dt before softplus.
        dt_softplus: send dt + dt_bias through log(1 + exp(.)), the identity above 20.
        dt_limit: lowest and highest step size, after softplus.
        initial_state: (B, H, P, N) the state before the first token; (B, 2, H, P, N) with direction "both".
        return_last_state: return the state after the last token too, in the shape of `initial_state`.
        direction: "causal"; "reversed", from the last token to the first; "both", the sum of these two, with the skip
            once; or "none", where no token comes before another and nothing decays (VSSD): every token reads
            h = h_0 + sum_t -s_t A x_t B_t^T.
        indices: int32 (K, S), the token that each of K routes visits at each step, as in `cross_selective_scan`: -1 is
            a padding step. Then there is an axis of routes: x (B, L, H, P) shared or (B, L, K, H, P), dt (B, L, K, H),
            B and C (B, L, K, G, N), A and dt_bias (K, H), D (K, H) or (K, H, P), states (B, K, H, P, N). The direction
            is "causal" or "none": a route that runs backwards is a row of the table.
        merge: with `indices`, add the routes up; else every route's result comes by itself, (B, L, K, H, P).
        chunk: tokens that are multiplied at once. It changes speed and memory, and the result by rounding alone; by
            default each backend takes what suits it, and one may round it to what its matrix units take.
        out_dtype: type of the result; x's by default.
        backend: the implementation to run (see `available_backends`); the library's choice by default.

    Returns: y (B, L, H, P), or (y, last state) with return_last_state.
    Raises: ValueError if an argument breaks the contract; BackendError if the named backend refuses, with its reason.
    Numerics: state, step sizes and sums in float32; bitwise deterministic. `eager` holds every result to the bound of
        its type in tests/tolerances.py. On matrix units (`triton`) products take their factors in the widest type of
        x, B and C, and all results are held to the bound of that.
    Reference: Dao and Gu 2024, Mamba-2, arXiv:2405.21060, section 6; Shi et al. 2024, VSSD, arXiv:2407.18559.

    >>> x, dt, A = torch.randn(2, 10, 4, 8), torch.rand(2, 10, 4), -torch.rand(4)
    >>> B, C = torch.randn(2, 10, 1, 16), torch.randn(2, 10, 1, 16)
    >>> y, state = ssd(x, dt, A, B, C, return_last_state=True)
    >>> y.shape, state.shape
    (torch.Size([2, 10, 4, 8]), torch.Size([2, 4, 8, 16]))
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"ssd: direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}.")
    causal, routes, descending = DIRECTIONS[direction]
    if not isinstance(dt_limit, tuple | list) or len(dt_limit) != 2:
        raise ValueError(f"ssd: dt_limit must be (lowest, highest), got {dt_limit!r}.")
    if indices is None and not merge:
        raise ValueError("ssd: merge=False keeps the routes of an index table apart; give indices, or leave it out.")
    low, high = dt_limit
    call = SsdCall(
        x, dt, A, B, C, D, indices, dt_bias, initial_state, causal, descending, dt_softplus, float(low),
        None if high == math.inf else float(high), merge, return_last_state, chunk, out_dtype,
    )  # fmt: skip
    ssd_call.check_tensors(call)
    if indices is not None and descending:
        raise ValueError(
            f"ssd: direction must be 'causal' or 'none' with indices, got {direction!r}; a route that runs backwards "
            f"is a row of the table."
        )
    if indices is None:
        _check_plain(call._replace(initial_state=None, descending=0))
        call = _with_routes(call, routes)
    y, last = torch.ops.vision_mamba.ssd(*call, backend or registry.forced())
    if not return_last_state:
        return y
    return y, last if indices is not None or routes > 1 else last.squeeze(1)


def _with_routes(call: SsdCall, routes: int) -> SsdCall:
    """The same arguments for every route, as views with an axis of routes; each route takes its part of the skip."""

    def tokens(t: Tensor) -> Tensor:
        t = t.unsqueeze(2)
        return t if routes == 1 else t.expand(-1, -1, routes, *[-1] * (t.dim() - 3))

    def parameter(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.expand(routes, *t.shape)

    skip = call.D if call.D is None or routes == 1 else call.D / routes
    state = call.initial_state
    if state is not None:
        ssd_call.check_state(call, routes)
        state = state.unsqueeze(1) if routes == 1 else state
    return call._replace(
        dt=tokens(call.dt), A=call.A.expand(routes, -1), B=tokens(call.B), C=tokens(call.C), D=parameter(skip),
        dt_bias=parameter(call.dt_bias), initial_state=state, merge=True,
    )  # fmt: skip
