"""The state-space dual scan on a CPU: the C++ kernel of the selective scan, on channels that share a decay.

A head with P channels is P channels of a selective scan whose rows of A and step sizes are the same, and a group of
heads with its own B and C is a route. That computes every decay P N times; it still takes a fraction of the time of the
chunked products, whose (T, T) matrices of decays go through memory (`results/ssd_cpu.jsonl`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_mamba.ops.backends import cpu
from vision_mamba.ops.registry import Backend
from vision_mamba.ops.ssd_call import SsdCall
from vision_mamba.ops.ssd_reference import route_table


def _unlimited(call: SsdCall) -> bool:
    return call.dt_softplus and call.dt_min <= 0 and call.dt_max is None


def _refuses(call: SsdCall) -> str | None:
    if call.x.dtype == torch.float64:
        return "float64 is computed by 'eager' and 'reference' alone; convert with .float()."
    if not call.causal:
        return "without an order there is nothing to scan; 'eager' takes two matrix products."
    if call.indices is not None and not _unlimited(call):
        return "it limits no step sizes on a table, whose padding steps have some too; use softplus and no limits."
    return None


def forward(call: SsdCall, save: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The scan by `cross_selective_scan`, which autograd differentiates by its own kernel.

    Returns: y, the last state or an empty tensor, and an empty tensor (nothing is kept for backward).
    """
    groups, heads, width = call.groups, call.heads // call.groups, call.channels
    routes, channels = call.routes * groups, heads * width
    x = call.x.unsqueeze(2).expand(-1, -1, call.routes, -1, -1) if call.shared_x else call.x
    dt, bias, softplus = call.dt, call.dt_bias, call.dt_softplus
    if not _unlimited(call):
        dt = dt.float() if bias is None else dt.float() + bias.float()
        dt = (F.softplus(dt, threshold=20) if softplus else dt).clamp(call.dt_min, call.dt_max)
        bias, softplus = None, False
    table, state = route_table(call), call.initial_state
    y, last = torch.ops.vision_mamba.cross_selective_scan(
        x.reshape(*x.shape[:2], routes, channels),
        _spread(dt, width).reshape(*dt.shape[:2], routes, channels),
        _spread(call.A, width).reshape(routes, channels, 1).expand(-1, -1, call.states),
        call.B.flatten(2, 3),
        call.C.flatten(2, 3),
        None if call.D is None else _skip(call.D, width).reshape(routes, channels),
        None if table is None else table.repeat_interleave(groups, 0),
        None,
        None if bias is None else _spread(bias, width).reshape(routes, channels),
        None if state is None else state.reshape(call.batch, routes, channels, call.states),
        softplus,
        call.merge and groups == 1,
        call.return_last_state,
        torch.float32 if call.merge and groups > 1 else call.y_dtype,
        "cpu",
    )
    y = y.unflatten(-1, (heads, width))
    if groups > 1 or not call.merge:
        y = y.reshape(*y.shape[:2], call.routes, call.heads, width)
        y = y.sum(2).to(call.y_dtype) if call.merge else y
    if not call.return_last_state:
        return y, call.new_last_state(), call.x.new_empty(0)
    return y, last.reshape(call.batch, call.routes, call.heads, width, call.states), call.x.new_empty(0)


def _spread(t: Tensor, width: int) -> Tensor:
    """What a head has, for each of its channels."""
    return t.unsqueeze(-1).expand(*t.shape, width)


def _skip(D: Tensor, width: int) -> Tensor:
    return D if D.dim() == 3 else _spread(D, width)


BACKEND = Backend("cpu", cpu.BACKEND.unavailable, _refuses, forward)
