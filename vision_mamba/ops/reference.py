"""The definition of the scan: a loop over time that reads like the equation, in any float type.

Along every route k and channel d, with s_t = softplus(dt_t + dt_bias) and h_0 = initial_state or 0:

    h_t = exp(s_t A) h_{t-1} + s_t B_t x_t          y_t = <C_t, h_t> + D x_t
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_mamba.ops.call import ScanCall


def take_steps(tokens: Tensor, indices: Tensor | None) -> Tensor:
    """Read a map in the order of the routes: (B, L, K, X) tokens -> (B, S, K, X) steps; a padding step reads 0."""
    if indices is None:
        return tokens
    table = indices.long().T  # (S, K)
    routes = torch.arange(table.shape[1], device=table.device)
    steps = tokens[:, table.clamp(min=0), routes]
    return steps.masked_fill((table < 0)[None, :, :, None], 0)


def put_tokens(steps: Tensor, indices: Tensor | None, tokens: int) -> Tensor:
    """Undo take_steps: (B, S, K, X) steps -> (B, L, K, X) tokens; a token off a route gets 0 from it.

    It reads through the inverse table rather than writing through the table, so nothing is ever added in two orders.
    """
    if indices is None:
        return steps
    table = indices.long()
    routes, length = table.shape
    clock = torch.arange(length, device=table.device).expand(routes, length)
    # One more column takes what the padding steps write; -1 stays where no step of the route comes by.
    inverse = torch.full((routes, tokens + 1), -1, dtype=table.dtype, device=table.device)
    inverse = inverse.scatter(1, table.masked_fill(table < 0, tokens), clock)[:, :tokens]
    return take_steps(steps, inverse)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Products keep the type of their arguments, float32, which autocast would round to half precision."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def prepare(call: ScanCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u (B, S, K, D), s (B, S, K, D), B and C (B, S, K, N) along the routes, in the type of the sums."""
    dtype, routes = call.sum_dtype, call.routes
    x = call.x.unsqueeze(2).expand(-1, -1, routes, -1) if call.shared_x else call.x
    u, dt, B, C = (take_steps(t.to(dtype), call.indices) for t in (x, call.dt, call.B, call.C))
    if call.dt_weight is not None:
        with without_autocast(x.device):
            dt = torch.einsum("bskr,kdr->bskd", dt, call.dt_weight.to(dtype))
    if call.dt_bias is not None:
        dt = dt + call.dt_bias.to(dtype)
    if call.dt_softplus:
        # The identity above 20 differs from softplus by less than exp(-20), below the rounding of 20 in float32.
        dt = F.softplus(dt, threshold=20)
    return u, dt, B, C


def finish(call: ScanCall, y: Tensor, u: Tensor) -> Tensor:
    """Add the skip, put y (B, S, K, D) back in token order, add the routes up if asked, and round once."""
    if call.D is not None:
        y = y + call.D.to(y.dtype) * u
    y = put_tokens(y, call.indices, call.tokens)
    if call.merge:
        y = y.sum(2)
    return y.to(call.y_dtype)


def forward(call: ScanCall, save: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The scan by its definition; differentiable by autograd. Costs S steps of small tensors: for tests, not for use.

    Returns: y, the last state or an empty tensor, and an empty tensor (nothing is kept for backward).
    """
    u, s, B, C = prepare(call)
    A = call.A.to(u.dtype)
    shape = (call.batch, call.routes, call.channels, call.states)
    h = u.new_zeros(shape) if call.initial_state is None else call.initial_state.to(u.dtype)
    ys = []
    for t in range(call.steps):
        s_t = s[:, t].unsqueeze(-1)  # (B, K, D, 1)
        h = torch.exp(s_t * A) * h + s_t * B[:, t].unsqueeze(-2) * u[:, t].unsqueeze(-1)
        ys.append((C[:, t].unsqueeze(-2) * h).sum(-1))
    y = finish(call, torch.stack(ys, 1), u)
    return y, h if call.return_last_state else call.new_last_state(), call.x.new_empty(0)
