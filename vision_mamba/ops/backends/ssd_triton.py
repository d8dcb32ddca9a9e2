"""The state-space dual scan on any GPU that Triton reaches: how a call is cut up, and the launches of both passes."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vision_mamba.ops import contract
from vision_mamba.ops.backends.triton import _INTERPRETED, _like, _on, _padded, _unavailable
from vision_mamba.ops.registry import Backend
from vision_mamba.ops.ssd_call import GRADIENTS, SsdCall

_MAX_CHANNELS = 128
_LEAST = 16  # rows and columns of the smallest product
_CARRIED = 1024  # states of one program of `carry`
_SEGMENT = 4  # chunks at least in a segment, below which its own start costs too much


class Tile(NamedTuple):
    """What one program holds: steps of a chunk, channels at most, warps, and chunks in flight."""

    steps: int
    channels: int
    warps: int = 4
    stages: int = 2


#: Tiles by the states they have room for: with factors of 16 bits, and of 32.
Tiles = dict[int, Tile]
FORWARD: dict[int, Tiles] = {
    16: {64: Tile(64, 64), 128: Tile(64, 64), 256: Tile(64, 32)},
    32: {64: Tile(32, 64), 128: Tile(32, 32), 256: Tile(32, 16)},
}
BACKWARD: dict[int, Tiles] = {
    16: {64: Tile(64, 128), 128: Tile(64, 128, 8, 1), 256: Tile(32, 128, 8, 1)},
    32: {64: Tile(32, 128, 4, 1), 128: Tile(32, 128, 8, 1), 256: Tile(16, 128, 8, 1)},
}


def _factors(call: SsdCall) -> str:
    """Type that the factors of products have, or for float32 the way to multiply them, as `multiply` takes it."""
    types = {call.x.dtype, call.B.dtype, call.C.dtype}
    if torch.float32 in types:
        return "tf32x3" if torch.version.hip is None and call.x.device.type != "xpu" else "ieee"
    return "float16" if torch.float16 in types else "bfloat16"


def _tile(tables: dict[int, Tiles], call: SsdCall) -> Tile:
    table = tables[16 if _factors(call) == "bfloat16" else 32]
    tile = next(tile for room, tile in table.items() if call.states <= room)
    asked = tile.steps if call.chunk is None else min(call.chunk, 128)
    steps = max(_LEAST, min(_padded(asked), _padded(call.steps)))
    return tile._replace(steps=steps, channels=max(_LEAST, min(tile.channels, _padded(call.channels))))


def _refuses(call: SsdCall) -> str | None:
    if call.x.dtype == torch.float64:
        return "float64 is computed by 'eager' and 'reference' alone; convert with .float()."
    if call.channels > _MAX_CHANNELS:
        return f"heads have {call.channels} channels, over {_MAX_CHANNELS}; use more and narrower heads."
    return None


@functools.cache
def _processors(device: torch.device) -> int:
    return (
        1
        if device.type == "cpu"
        else torch.get_device_module(device).get_device_properties(device).multi_processor_count
    )


class Route(NamedTuple):
    """One route of a call: the same letters without an axis of routes."""

    x: Tensor  # (B, L, H, P)
    dt: Tensor  # (B, L, H)
    A: Tensor  # (H,)
    B: Tensor  # (B, L, G, N)
    C: Tensor  # (B, L, G, N)
    D: Tensor | None  # (H,) or (H, P)
    bias: Tensor | None  # (H,)
    indices: Tensor | None  # (S,)
    descending: bool
    initial: Tensor | None  # (B, H, P, N)


def _route(call: SsdCall, k: int) -> Route:
    def own(t: Tensor | None) -> Tensor | None:
        return None if t is None else t[k].contiguous()

    state = None if call.initial_state is None else call.initial_state[:, k].contiguous()
    x = call.x if call.shared_x else call.x[:, :, k]
    return Route(
        x, call.dt[:, :, k], call.A[k].contiguous(), call.B[:, :, k], call.C[:, :, k], own(call.D), own(call.dt_bias),
        own(call.indices), k >= call.routes - call.descending, state,
    )  # fmt: skip


class Plan(NamedTuple):
    """How the route of a call is cut: `segments` of `chunks` chunks of `tile.steps` steps."""

    tile: Tile
    segments: int
    chunks: int

    @property
    def blocks(self) -> int:
        return self.segments * self.chunks


def _plan(tables: dict[int, Tiles], call: SsdCall) -> Plan:
    tile = _tile(tables, call)
    total = -(-call.steps // tile.steps)
    programs = call.batch * call.heads * -(-call.channels // tile.channels)
    wanted = -(-2 * _processors(call.x.device) // programs)
    chunks = -(-total // max(1, min(wanted, total // _SEGMENT)))
    return Plan(tile, -(-total // chunks), chunks)


def _shape(call: SsdCall, plan: Plan, r: Route) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sizes and constants that all kernels share."""
    high = float("inf") if call.dt_max is None else call.dt_max
    sizes = dict(heads=call.heads, per_group=call.heads // call.groups, steps=call.steps, tokens=call.tokens)
    sizes |= dict(low=call.dt_min, high=high)
    constants: dict[str, Any] = dict(P=call.channels, N=call.states, T=plan.tile.steps, CAUSAL=call.causal)
    constants |= dict(BLOCK_P=plan.tile.channels, BLOCK_N=max(_LEAST, _padded(call.states)))
    constants |= dict(DESCENDING=r.descending, SOFTPLUS=call.dt_softplus, FACTORS=_factors(call))
    return sizes, constants | dict(num_warps=plan.tile.warps, num_stages=plan.tile.stages)


def _strides(name: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    strides = (0,) * len(axes) if tensor is None else tensor.stride()
    return {f"s_{name}{axis}": stride for axis, stride in zip(axes, strides, strict=True)}


def _state_strides(name: str, state: Tensor | None, user: bool) -> dict[str, int]:
    """Of states (B, H, P, N) as the caller has them, or (B, H, segments, N, P)."""
    if state is not None and user:
        state = state.mT.unsqueeze(2)
    return _strides(name, state, "bhsnc")


def _walk(
    call: SsdCall, plan: Plan, r: Route, x: Tensor, adjoint: bool, before: Tensor | None, user: bool,
    each: Tensor | None, after: Tensor | None, decay: Tensor | None,
) -> None:  # fmt: skip
    """Launch `states`: of x and B, or of dy and C backwards. `user`: before and after have the caller's layout."""
    from vision_mamba.ops.backends import ssd_triton_kernels

    sizes, constants = _shape(call, plan, r)
    B = r.C if adjoint else r.B
    grid = (call.batch * call.heads * plan.segments, -(-call.channels // plan.tile.channels))
    strides = _strides("x", x, "blhc") | _strides("dt", r.dt, "blh") | _strides("B", B, "blgn")
    strides |= _state_strides("h", before, user) | _state_strides("a", after, user)
    ssd_triton_kernels.states[grid](
        x, r.dt, r.A, B, r.bias, r.indices, before, each, after, decay,
        **sizes, segments=plan.segments, chunks=plan.chunks, **strides, **constants, ADJOINT=adjoint,
    )  # fmt: skip


def _enter(
    call: SsdCall, plan: Plan, r: Route, x: Tensor, adjoint: bool, start: Tensor | None, end: Tensor | None
) -> tuple[Tensor | None, bool]:
    """The state before each segment and whether it has the caller's layout; `end` takes that after the last."""
    from vision_mamba.ops.backends import ssd_triton_kernels

    if plan.segments == 1 and call.causal:
        return start, True
    shape = (call.batch, call.heads, plan.segments, call.states, call.channels)
    added = x.new_empty(shape, dtype=torch.float32)
    before, decay = torch.empty_like(added), added.new_empty(shape[:3])
    _walk(call, plan, r, x, adjoint, None, False, None, added, decay)
    size = call.states * call.channels
    ssd_triton_kernels.carry[(call.batch * call.heads, -(-size // _CARRIED))](
        added, decay, start, before, end, call.heads, plan.segments, 0 if start is None else start.stride(0),
        0 if end is None else end.stride(0), P=call.channels, N=call.states, ADJOINT=adjoint, BLOCK=_CARRIED,
    )  # fmt: skip
    return before, False


def _total(call: SsdCall, plan: Plan, r: Route, x: Tensor, adjoint: bool, start: Tensor | None) -> Tensor:
    """Not causal: the one state, (B, H, P, N)."""
    end = x.new_empty((call.batch, call.heads, call.channels, call.states), dtype=torch.float32)
    _enter(call, plan, r, x, adjoint, start, end)
    return end


def _forward(call: SsdCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    from vision_mamba.ops.backends import ssd_triton_kernels

    y, last = call.new_output(), call.new_last_state()
    if not contract.visits_all(call):
        y.zero_()
    plan = _plan(FORWARD, call)
    grid = (call.batch * call.heads * plan.segments, -(-call.channels // plan.tile.channels))
    with _on(call.x.device):
        for k in range(call.routes):
            r = _route(call, k)
            sizes, constants = _shape(call, plan, r)
            out = y if call.merge else y[:, :, k]
            end = last[:, k] if call.return_last_state else None
            if call.causal:
                before, user = _enter(call, plan, r, r.x, False, r.initial, None)
            else:
                before, user = _total(call, plan, r, r.x, False, r.initial), True
            strides = _strides("x", r.x, "blhc") | _strides("dt", r.dt, "blh") | _strides("B", r.B, "blgn")
            strides |= _strides("C", r.C, "blgn") | _skip_strides(r) | _strides("y", out, "blhc")
            strides |= _state_strides("h", before, user) | dict(s_lastb=0 if end is None else end.stride(0))
            if not call.causal:
                strides |= dict(s_hs=0)
            ssd_triton_kernels.forward[grid](
                r.x, r.dt, r.A, r.B, r.C, r.D, r.bias, r.indices, before, out, end,
                **sizes, segments=plan.segments, chunks=plan.chunks, **strides, **constants,
                ADD=call.merge and k > 0,
            )  # fmt: skip
    return y, last, call.x.new_empty(0)


def _skip_strides(r: Route) -> dict[str, int]:
    return dict(
        s_Dh=0 if r.D is None else r.D.stride(0), s_Dc=r.D.stride(1) if r.D is not None and r.D.dim() == 2 else 0
    )


def _backward(call: SsdCall, saved: Tensor, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    dx, ddt, dB, dC = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (call.x, call.dt, call.B, call.C)
    )
    if not contract.visits_all(call):
        for gradient in (dx, ddt, dB, dC):
            gradient.zero_()
    dinitial = None if call.initial_state is None else call.initial_state.new_empty(call.initial_state.shape)
    sums: list[dict[str, Tensor | None]] = []
    with _on(call.x.device):
        for k in range(call.routes):
            seed = None if dy is None else dy if call.merge else dy[:, :, k]
            if seed is None:
                seed = call.x.new_zeros(()).expand(call.batch, call.tokens, call.heads, call.channels)
            end = None if dlast is None else dlast[:, k].contiguous()
            dstart = None if dinitial is None else dinitial[:, k]
            shares = (dx if call.shared_x else dx[:, :, k], ddt[:, :, k], dB[:, :, k], dC[:, :, k])
            sums.append(_backward_route(call, _route(call, k), seed, end, shares, dstart, call.shared_x and k > 0))
    found: dict[str, Tensor | None] = dict(x=dx, dt=ddt, B=dB, C=dC, initial_state=dinitial)
    for name in ("A", "D", "dt_bias"):
        parts = [each[name] for each in sums]
        found[name] = None if parts[0] is None else torch.stack([part for part in parts if part is not None])
    return tuple(_like(getattr(call, name), found[name]) for name in GRADIENTS)


def _backward_route(
    call: SsdCall, r: Route, dy: Tensor, dlast: Tensor | None, results: tuple[Tensor, ...], dinitial: Tensor | None,
    add: bool,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Write the gradients of one route's tensors; returns those of its parameters."""
    from vision_mamba.ops.backends import ssd_triton_backward

    plan = _plan(BACKWARD, call)
    walk = plan._replace(tile=plan.tile._replace(channels=min(64, plan.tile.channels)))
    dx, ddt, dB, dC = results
    kind = torch.bfloat16 if _factors(call) == "bfloat16" else torch.float32
    shape = (call.batch, call.heads, plan.blocks, call.states, call.channels)
    if call.causal:
        h, g = (call.x.new_empty(shape, dtype=kind) for _ in range(2))
        before, user = _enter(call, walk, r, r.x, False, r.initial, None)
        _walk(call, walk, r, r.x, False, before, user, h, None, None)
        before, user = _enter(call, walk, r, dy, True, dlast, dinitial)
        _walk(call, walk, r, dy, True, before, user, g, dinitial if plan.segments == 1 else None, None)
    else:
        g = _total(call, walk, r, dy, True, dlast)
        h = _total(call, walk, r, r.x, False, r.initial)
        if dinitial is not None:
            dinitial.copy_(g)
        h, g = (t.mT.contiguous().unsqueeze(2).expand(shape) for t in (h, g))
    sizes, constants = _shape(call, plan, r)
    chunks = -(-call.steps // plan.tile.steps)
    parts = call.x.new_empty((2, call.batch, call.heads, chunks), dtype=torch.float32)
    each = r.D is not None and r.D.dim() == 2
    dD = None if r.D is None else parts.new_empty((*parts.shape[1:], *r.D.shape[1:]))
    programs = call.batch * call.groups * chunks
    per_group = call.heads // call.groups
    # A divisor of the heads of a group, large enough to fill the GPU.
    wanted = min(per_group, -(-2 * _processors(call.x.device) // programs))
    shares = next(n for n in range(wanted, per_group + 1) if per_group % n == 0)
    dB_shares, dC_shares = (
        t.unsqueeze(0) if shares == 1 else t.new_empty((shares, *t.shape), dtype=torch.float32) for t in (dB, dC)
    )
    if shares > 1 and not contract.visits_all(call):
        dB_shares.zero_()
        dC_shares.zero_()
    strides = _strides("x", r.x, "blhc") | _strides("dt", r.dt, "blh") | _strides("B", r.B, "blgn")
    strides |= _strides("C", r.C, "blgn") | _skip_strides(r) | _strides("dy", dy, "blhc") | _strides("dx", dx, "blhc")
    strides |= _strides("ddt", ddt, "blh") | _strides("dB", dB_shares, "sblgn") | _strides("dC", dC_shares, "sblgn")
    strides |= dict(zip(("s_hb", "s_hh", "s_ht"), h.stride(), strict=False))
    assert h.stride()[:3] == g.stride()[:3]
    constants["BLOCK_P"] = max(_LEAST, _padded(call.channels))
    ssd_triton_backward.backward[(programs * shares,)](
        r.x, r.dt, r.A, r.B, r.C, r.D, r.bias, r.indices, dy, h, g,
        dx, ddt, dB_shares, dC_shares, parts[0], None if r.bias is None else parts[1], dD,
        batch=call.batch, **sizes, shares=shares, chunks=chunks, **strides, **constants,
        ADD=add, EACH_CHANNEL=each,
    )  # fmt: skip
    if shares > 1:
        dB.copy_(dB_shares.sum(0))
        dC.copy_(dC_shares.sum(0))
    return dict(
        A=parts[0].sum((0, 2)),
        dt_bias=None if r.bias is None else parts[1].sum((0, 2)),
        D=None if dD is None else dD.sum((0, 2)),
    )


BACKEND = Backend("triton", _unavailable, _refuses, _forward, _backward, automatic=not _INTERPRETED)
