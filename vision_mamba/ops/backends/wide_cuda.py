"""Plans for several states: the wide kernels, whose warps share out channels and states."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from vision_mamba.ops.backends import cuda_kernels as kernels
from vision_mamba.ops.backends import gpu, nvrtc
from vision_mamba.ops.backends.calls_cuda import (
    across_channels,
    backward_fields,
    ddt_like,
    rank_in_kernel,
    saved_every,
    seen_by_routes,
    sizes,
    strides,
    tokens_first,
    type_of_ddt,
    types_of,
)
from vision_mamba.ops.backends.cuda_kernels import TYPES, vector
from vision_mamba.ops.backends.launch import Launch
from vision_mamba.ops.backends.plans_cuda import HEADER, Plan, adding_up, goes_first, parts_shape
from vision_mamba.ops.call import ScanCall


def saved_pieces(call: ScanCall) -> int:
    """States that are saved of a route: before the first tile it is the initial one."""
    tiles = (call.steps + kernels.CHECKPOINT - 1) // kernels.CHECKPOINT
    return (tiles - 1) // saved_every(call)


def forward(call: ScanCall, complete: bool, y: Tensor, device: int) -> Plan:
    tile = _forward_tile(call, device)
    parts, merging, view = adding_up(call, call.merge, y, in_block=False, first=True)
    across = call.x, None if call.rank else call.dt
    flows, in_order = _flows(call, _wide(call, tile, False, *across, y)), False
    if parts is not None and complete:
        in_order = flows and _in_order(call, tile, y, device)
        merging = not in_order and _in_turn(call, tile, y, device)
        if in_order or merging:
            parts, view = None, y.unsqueeze(2).expand(-1, -1, call.routes, -1)
    whole = call.channels % (tile.warps * tile.shape.channels) == 0
    how = _wide(call, tile, False, *across, view)
    how = how._replace(merge=merging, copies=flows and how.vector_x, add=in_order, whole=flows and whole)
    wanted = functools.partial(kernels.wide_forward, (*types_of(call), TYPES[view.dtype]))
    plan = _wide_plan(wanted, how, call, sizes(call) | strides("y", view), parts, call.routes, 1, device, first=True)
    return plan._replace(first=goes_first(parts, y))


def backward(call: ScanCall, complete: bool, dy: Tensor | None, dx: Tensor, device: int) -> Plan:
    tile = kernels.backward_tile(call.states, nvrtc.shared_limit(device), call.rank)
    parts, _, view = adding_up(call, call.shared_x, dx, in_block=False, first=True)
    apart = 0
    if goes_first(parts, dx):
        apart = _apart(call, tile, device)
        if apart == 1:
            parts, view = None, dx.unsqueeze(2).expand(-1, -1, call.routes, -1)
        else:
            view = torch.empty(parts_shape(call, apart - 1), dtype=parts, device="meta").transpose(1, 2)
    seen, ddt = seen_by_routes(call, dy), ddt_like(call)
    blocks, processors = call.batch * call.routes * tile.groups(call.channels), gpu.multiprocessors(device)
    copies = call.rank == 0 and blocks >= tile.blocks * processors  # a low rank needs the shared memory
    row, block = tile.shape.lanes * tile.shape.states, tile.warps * tile.shape.channels
    whole = call.channels % block == 0 and call.states == row
    how = _wide(call, tile, copies, *across_channels(call, seen, view, ddt))
    how = how._replace(add=0 < apart < call.routes, whole=whole)
    types = (*types_of(call), TYPES[call.y_dtype])
    wanted = functools.partial(kernels.wide_backward, types, dx=TYPES[view.dtype], ddt=type_of_ddt(call))
    at_once = call.batch * (apart or call.routes)
    turns = kernels.wide_turns(tile, at_once, call.channels, processors) if how.every > 1 else 1
    items = kernels.wide_items(tile, call.batch, at_once * tile.groups(call.channels) // turns, processors)
    fields = backward_fields(call, view, seen, ddt)
    plan = _wide_plan(wanted, how, call, fields, parts, apart or call.routes, turns, device, items=items)
    middle = how.every > 1 and not (copies and gpu.capability(device) >= (8, 0))
    return plan._replace(first=apart > 1, middle=middle)


def _apart(call: ScanCall, tile: kernels.Tile, device: int) -> int:
    """Shares of dx, to which routes are added one after the other: as few as leave the device filled."""
    blocks, processors = call.batch * tile.groups(call.channels), gpu.multiprocessors(device)
    segments, _ = kernels.wide_segments(call.steps, call.routes * blocks, tile.blocks * processors)
    if segments > 1:  # blocks take segments, and no one knows when a route is done
        return call.routes
    whole = tile.waves(call.routes * blocks, processors)
    divisors = (n for n in range(1, call.routes + 1) if call.routes % n == 0)
    return next(n for n in divisors if call.routes // n * tile.waves(n * blocks, processors) <= whole)


def _forward_tile(call: ScanCall, device: int) -> kernels.Tile:
    few, many = kernels.forward_tiles(call.states)
    blocks = call.batch * call.routes * many.groups(call.channels)
    if tokens_first(call) or 2 * blocks < many.blocks * gpu.multiprocessors(device):
        return few
    return many


def _flows(call: ScanCall, how: kernels.Wide) -> bool:
    """Whether the kernel for many sequences goes forwards: rows are read in whole pieces, a lane has eight states."""
    many = how.tile != kernels.forward_tiles(call.states)[0]
    low = call.rank == 0 or (how.tensor_rank and how.vector_rank)
    return many and how.vector_x and how.vector_bc and low


def _in_order(call: ScanCall, tile: kernels.Tile, y: Tensor, device: int) -> bool:
    """Whether blocks add to what those of an earlier route have left: where these fill the device, so that they are
    done when they are waited for, and where the sum of some routes doesn't overflow."""
    blocks = call.batch * tile.groups(call.channels)
    return y.dtype != torch.float16 and blocks >= tile.blocks * gpu.multiprocessors(device)


def _in_turn(call: ScanCall, tile: kernels.Tile, y: Tensor, device: int) -> bool:
    """Whether blocks take the routes one after the other and add them up in y: where that fills the device as often,
    and where the sum of some of them doesn't overflow."""
    blocks, processors = call.batch * tile.groups(call.channels), gpu.multiprocessors(device)
    waves = call.routes * tile.waves(blocks, processors)
    return y.dtype != torch.float16 and waves <= tile.waves(call.routes * blocks, processors)


def _wide(call: ScanCall, tile: kernels.Tile, copies: bool, *across: Tensor | None) -> kernels.Wide:
    shape = tile.shape
    row = shape.lanes * shape.states
    return kernels.Wide(
        tile,
        call.rank,
        call.dt_softplus,
        vector_x=vector(min(shape.channels // 2, 8), *across),
        vector_bc=call.states == row and vector(min(row, 4), call.B, call.C),
        vector_rank=call.rank > 0 and call.rank % 2 == 0 and vector(2, call.dt),
        tensor_rank=rank_in_kernel(call),
        tokens_first=tokens_first(call),
        copies=copies,
        every=saved_every(call),
    )


def _wide_plan(
    wanted: Callable[[kernels.Wide], nvrtc.Specialisation],
    how: kernels.Wide,
    call: ScanCall,
    fields: dict[str, int],
    parts: torch.dtype | None,
    apart: int,
    turns: int,
    device: int,
    first: bool = False,
    items: int = 1,
) -> Plan:
    """One launch, or two over routes in segments where sequences are too few for the device; `first`: where segments
    are long the first of two does all of the first one."""
    groups = how.tile.groups(call.channels)
    blocks = call.batch * groups * (1 if how.merge else call.routes)
    room = how.tile.blocks * gpu.multiprocessors(device)
    segments, per_segment = kernels.wide_segments(call.steps, blocks, room)
    how = how._replace(long=segments > 1 and per_segment >= kernels.LONG)
    alone = first and how.long
    if alone:
        segments, per_segment = kernels.wide_segments(call.steps, blocks, room, True)
    if how.merge or how.add or segments == 1:
        groups, blocks = groups // turns, blocks // turns // items
        launch = Launch.of(wanted(how), device, blocks, HEADER, fields | dict(apart=apart, turns=turns, items=items))
        waited = blocks if how.add else 0
        return Plan(launch, how.merge, parts, groups=groups, apart=apart, blocks=waited, items=items)
    fields |= dict(segments=segments, segment_tiles=per_segment, apart=apart, turns=1, items=1)
    how = how._replace(copies=how.copies and not first)  # forwards they belong to the kernel that takes routes whole
    edges, scan = (
        Launch.of(wanted(how._replace(part=part)), device, blocks * count, HEADER, fields)
        for part, count in ((1, segments - 1), (2, segments - alone))
    )
    return Plan(scan, False, parts, edges, segments, groups, apart=apart)
