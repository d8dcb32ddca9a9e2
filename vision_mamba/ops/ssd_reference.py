"""The definition of the state-space dual scan: a loop over time that reads like the equation, in any float type.

Along every route k and head h, with s_t = clamp(softplus(dt_t + dt_bias)) and h_0 = initial_state or 0, x_t a row of P
channels and h_t a matrix (P, N):

    h_t = exp(s_t A) h_{t-1} + s_t x_t B_t^T          y_t = h_t C_t + D x_t
    h = h_0 + sum_t -s_t A x_t B_t^T                  y_t = h C_t + D x_t                    (not causal)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_mamba.ops.reference import put_tokens, take_steps
from vision_mamba.ops.ssd_call import SsdCall


def route_table(call: SsdCall) -> Tensor | None:
    """The tokens that each route visits, int32 (K, S); None where they are 0, 1, ..., L - 1 for all."""
    if call.indices is not None or not call.descending:
        return call.indices
    clock = torch.arange(call.tokens, dtype=torch.int32, device=call.x.device).expand(call.routes, -1)
    backwards = torch.arange(call.routes, device=call.x.device) >= call.routes - call.descending
    return torch.where(backwards.unsqueeze(1), call.tokens - 1 - clock, clock)


def prepare(call: SsdCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u (B, S, K, H, P), s (B, S, K, H), B and C (B, S, K, G, N) along the routes, in the type of the sums."""
    dtype, table = call.sum_dtype, route_table(call)
    x = call.x.unsqueeze(2).expand(-1, -1, call.routes, -1, -1) if call.shared_x else call.x
    u, B, C = (_along(t.to(dtype), table) for t in (x, call.B, call.C))
    s = take_steps(call.dt.to(dtype), table)
    if call.dt_bias is not None:
        s = s + call.dt_bias.to(dtype)
    if call.dt_softplus:
        # The identity above 20 differs from softplus by less than exp(-20), below the rounding of 20 in float32.
        s = F.softplus(s, threshold=20)
    return u, s.clamp(call.dt_min, call.dt_max), B, C


def _along(tokens: Tensor, table: Tensor | None) -> Tensor:
    """(B, L, K, X, Y) tokens -> (B, S, K, X, Y) steps."""
    return tokens if table is None else take_steps(tokens.flatten(3), table).unflatten(3, tokens.shape[3:])


def finish(call: SsdCall, y: Tensor, u: Tensor) -> Tensor:
    """Add the skip, put y (B, S, K, H, P) back in token order, add the routes up if asked, and round once."""
    if call.D is not None:
        D = call.D.to(y.dtype)
        y = y + (D if D.dim() == 3 else D.unsqueeze(-1)) * u
    y = put_tokens(y.flatten(3), route_table(call), call.tokens).unflatten(3, y.shape[3:])
    if call.merge:
        y = y.sum(2)
    return y.to(call.y_dtype)


def start(call: SsdCall, like: Tensor) -> Tensor:
    """The state before the first step, (B, K, H, P, N)."""
    if call.initial_state is not None:
        return call.initial_state.to(like.dtype)
    return like.new_zeros((call.batch, call.routes, call.heads, call.channels, call.states))


def forward(call: SsdCall, save: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The scan by its definition; differentiable by autograd. Costs S steps of small tensors: for tests, not for use.

    Returns: y, the last state or an empty tensor, and an empty tensor (nothing is kept for backward).
    """
    u, s, B, C = prepare(call)
    A = call.A.to(u.dtype)
    h = start(call, u)
    B, C = (t.repeat_interleave(call.heads // call.groups, 3) for t in (B, C))  # (B, S, K, H, N)
    written = [torch.einsum("bkh,bkhp,bkhn->bkhpn", s[:, t], u[:, t], B[:, t]) for t in range(call.steps)]
    if call.causal:
        states = []
        for t in range(call.steps):
            h = torch.exp(s[:, t] * A)[..., None, None] * h + written[t]
            states.append(h)
    else:
        h = h + sum(-A[..., None, None] * w for w in written)
        states = [h] * call.steps
    ys = [torch.einsum("bkhpn,bkhn->bkhp", h_t, C[:, t]) for t, h_t in enumerate(states)]
    y = finish(call, torch.stack(ys, 1), u)
    return y, h if call.return_last_state else call.new_last_state(), call.x.new_empty(0)
