"""Plans for one state: the narrow kernels, and those that walk with each route or add routes up in their blocks."""

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
    seen_by_routes,
    sizes,
    strides,
    type_of_ddt,
    types_of,
)
from vision_mamba.ops.backends.cuda_kernels import TYPES, vector
from vision_mamba.ops.backends.launch import Launch
from vision_mamba.ops.backends.plans_cuda import HEADER, Plan, adding_up, goes_first
from vision_mamba.ops.call import ScanCall


def saved_pieces(call: ScanCall) -> int:
    """States that are saved of a route."""
    if _may_walk(call):
        return (call.steps + kernels.CHECKPOINT - 1) // kernels.CHECKPOINT
    _, pieces = _narrow_chunk(call)
    return pieces


def forward(call: ScanCall, complete: bool, y: Tensor, device: int) -> Plan:
    walk = _walk(call, complete)
    merged = None if walk is None else _plan_merged(call, y, device)
    if merged is not None:
        return merged
    in_block = walk is None and _sum_fits(call, y, device)
    parts, merging, view = adding_up(call, call.merge, y, in_block, first=walk is not None)
    fields = sizes(call) | strides("y", view)
    types = (*types_of(call), TYPES[view.dtype])
    if walk is not None:
        walking, room = functools.partial(kernels.walk_forward, types), 2 * kernels.WALK_ROOM
        plan = _walk_plan(walking, walk, call, fields, parts, room, kernels.WALK_FORWARD, device)
        return plan._replace(first=goes_first(parts, y))
    kernel = kernels.narrow_forward(types, _narrow(call, complete, merging, view))
    return _narrow_plan(kernel, call, fields, merging, parts, device)


def backward(call: ScanCall, complete: bool, dy: Tensor | None, dx: Tensor, device: int) -> Plan:
    walk = _walk(call, complete)
    in_block = walk is None and _sum_fits(call, dx, device)
    parts, merging, view = adding_up(call, call.shared_x, dx, in_block, first=walk is not None)
    seen, ddt = seen_by_routes(call, dy), ddt_like(call)
    fields, (dx_type, ddt_type) = backward_fields(call, view, seen, ddt), (TYPES[view.dtype], type_of_ddt(call))
    types = (*types_of(call), TYPES[call.y_dtype])
    if walk is not None:
        walking = functools.partial(kernels.walk_backward, types, dx=dx_type, ddt=ddt_type)
        walk = kernels.walk(call.channels, 1, call.rank)
        room, held = kernels.WALK_ROOM, kernels.walk_held(call.rank)
        plan = _walk_plan(walking, walk, call, fields, parts, room, held, device, _most_shares(call))
        return plan._replace(first=goes_first(parts, dx))
    how = _narrow(call, complete, merging, view, *across_channels(call, seen, view, ddt))
    kernel = kernels.narrow_backward(types, how, dx_type, ddt_type)
    return _narrow_plan(kernel, call, fields, merging, parts, device)


def _most_shares(call: ScanCall) -> int:
    """Shares of sums over the batch that take no more memory than what the routes leave of dx, and dx itself."""
    share = 4 * call.routes * call.channels * (call.states + 2 + call.rank)
    return max(1, (call.routes + 1) * call.x.numel() * call.x.element_size() // share)


def _may_walk(call: ScanCall) -> bool:
    """Whether the walking kernels may take a call of one state, as far as its sizes tell."""
    fits = call.dt_softplus and call.steps == call.tokens
    return fits and kernels.walks(call.steps, call.batch * call.routes, call.channels)


def _walk(call: ScanCall, complete: bool) -> kernels.Walk | None:
    """How the walking kernels take a call, or None where its sizes, its layout or its device are not for them."""
    if not _may_walk(call) or not complete or gpu.capability(call.x.device.index) < (8, 0):
        return None
    results = (torch.empty_like(call.x, device="meta"), torch.empty_like(call.dt, device="meta"))
    if not vector(8, call.x, results[0], *(() if call.rank else (call.dt, results[1]))):
        return None
    if call.rank and not (rank_in_kernel(call) and call.rank % 2 == 0 and vector(2, call.dt)):
        return None
    return kernels.walk(call.channels, kernels.walk_run(call.channels, call.rank), call.rank)


def _plan_merged(call: ScanCall, y: Tensor, device: int) -> Plan | None:
    """Where a block can hold the sums of its channels over the routes, and the device is filled well by such blocks."""
    if not call.merge or call.routes == 1 or not vector(8, y):
        return None
    types, shared = (*types_of(call), TYPES[y.dtype]), nvrtc.shared_limit(device)
    how = kernels.merged(types, call.tokens, call.routes, call.channels, call.rank, shared)
    if how is None:
        return None
    held = how.blocks(types, call.tokens, shared)
    blocks = call.batch * call.channels // (32 * how.run)
    if not kernels.fills(blocks, held * gpu.multiprocessors(device)):
        return None
    can_pair = how.run == 1 and how.sums == "Bfloat" and gpu.capability(device) >= (9, 0)
    pairs = kernels.paired(types, call.tokens, call.routes, call.rank, shared) if can_pair else None
    if pairs is None:
        wanted, threads, more = kernels.walk_merged(types, how, held), how.threads, how.sums_shared(call.tokens)
    else:
        wanted, threads, more = kernels.walk_paired(types, pairs), pairs.threads, pairs.sums_shared(call.tokens)
    fields = sizes(call) | strides("y", y.unsqueeze(2))
    return Plan(Launch.of(wanted, device, blocks, HEADER, fields, threads, more), True, None)


def _walk_plan(
    wanted: Callable[[kernels.Walk], nvrtc.Specialisation],
    how: kernels.Walk,
    call: ScanCall,
    fields: dict[str, int],
    parts: torch.dtype | None,
    room: int,
    held: int,
    device: int,
    shares: int | None = None,
) -> Plan:
    """One launch, or two over routes in segments where sequences are too few: `room` warps a multiprocessor are enough,
    of which it holds `held`. `shares`: of sums over the batch at most, or as many as it has items."""
    processors = gpu.multiprocessors(device)
    groups = call.channels // (32 * how.run * how.warps)
    blocks = call.batch * call.routes * groups
    segments, per_segment = kernels.wide_segments(call.steps, blocks * how.warps, room * processors)
    items = kernels.walk_items(call.batch, blocks * how.warps, held * processors) if segments == 1 else 1
    if segments == 1 and shares is not None:
        few_shares = (n for n in (1, 2, 4, 8) if call.batch % n == 0 and call.batch // n <= shares)
        items = max(items, next(few_shares, items))
    fields |= dict(segments=segments, segment_tiles=per_segment)

    def launch(part: int, count: int) -> Launch:
        return Launch.of(wanted(how._replace(part=part, items=items)), device, blocks * count // items, HEADER, fields)

    if segments == 1:
        return Plan(launch(0, 1), False, parts, groups=groups, items=items)
    return Plan(launch(2, segments), False, parts, launch(1, segments - 1), segments, groups)


def _sum_fits(call: ScanCall, result: Tensor, device: int) -> bool:
    """Whether blocks keep their channels' sums over routes in shared memory: where a multiprocessor has room for three
    such blocks, since what one leaves of the L1 cache holds too few loads under way; and where taking the routes one
    after the other leaves a block for everyone."""
    blocks = call.batch * _narrow_blocks(call)
    shared = kernels.narrow_shared(_narrow_chunk(call)[0], call.rank, call.tokens)
    return 3 * shared <= nvrtc.shared_limit(device) and blocks >= gpu.multiprocessors(device) and vector(8, result)


def _narrow_blocks(call: ScanCall) -> int:
    return (call.channels + kernels.NARROW_CHANNELS - 1) // kernels.NARROW_CHANNELS


def _narrow(call: ScanCall, complete: bool, merging: bool, view: Tensor, *across: Tensor | None) -> kernels.Narrow:
    across = across or (call.x, view, None if call.rank else call.dt)
    segment = kernels.narrow_segment(call.steps)
    return kernels.Narrow(
        segment,
        _max_warps(call),
        call.rank,
        call.dt_softplus,
        merging,
        whole=complete and call.steps == call.tokens and call.steps % segment == 0,
        vector=vector(4, *across),
        vector_rank=call.rank > 0 and call.rank % 2 == 0 and vector(2, call.dt),
        tensor_rank=rank_in_kernel(call),
    )


def _narrow_plan(
    wanted: nvrtc.Specialisation,
    call: ScanCall,
    fields: dict[str, int],
    merging: bool,
    parts: torch.dtype | None,
    device: int,
) -> Plan:
    warps, _ = _narrow_chunk(call)
    groups = _narrow_blocks(call)
    grid = call.batch * groups * (1 if merging else call.routes)
    more = 4 * kernels.NARROW_CHANNELS * (call.tokens + call.tokens % 2) if merging else 0
    launch = Launch.of(wanted, device, grid, HEADER, fields, 32 * warps, more)
    return Plan(launch, merging, parts, groups=groups)


def _max_warps(call: ScanCall) -> int:
    return kernels.narrow_warps(call.batch * call.routes, call.channels)


def _narrow_chunk(call: ScanCall) -> tuple[int, int]:
    return kernels.narrow_chunk(call.steps, _max_warps(call))
