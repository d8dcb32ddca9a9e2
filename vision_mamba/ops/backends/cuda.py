"""The CUDA C++ kernels of csrc/cuda behind the scan's registration: plans made once a shape, and their launches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vision_mamba.constants import Constants
from vision_mamba.ops.backends import cuda_kernels as kernels
from vision_mamba.ops.backends import few_cuda as few
from vision_mamba.ops.backends import nvrtc
from vision_mamba.ops.backends.cuda_kernels import TYPES, vector
from vision_mamba.ops.backends.launch import Launch, Plans, maker, on, room_for
from vision_mamba.ops.call import GRADIENTS, ScanCall
from vision_mamba.ops.contract import visits_all
from vision_mamba.ops.known import Run
from vision_mamba.ops.registry import Backend

_HEADER = "params.cuh"
_SMALL = ("A", "D", "dt_weight", "dt_bias", "initial_state")  # the kernels take these in float32 and contiguous


@functools.cache
def _unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"its tensors are on {device.type}; move them with .to('cuda')."
    if torch.version.hip is not None:
        return "this torch is built for ROCm; the backend 'triton' is for it."
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; check the driver with nvidia-smi, and that torch is a CUDA build."
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < nvrtc.OLDEST:
        return f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; at least 7.0 is needed."
    reason = nvrtc.missing()
    if reason is None and 10 * major + minor not in nvrtc.known_architectures():
        version, known = ".".join(map(str, nvrtc.compiler_version())), nvrtc.known_architectures()
        return (
            f"NVRTC {version} compiles for sm_{known[0]} to sm_{known[-1]}, not for this sm_{major}{minor}; "
            f"install a torch built for another CUDA version."
        )
    return reason


def _refuses(call: ScanCall) -> str | None:
    if call.x.dtype == torch.float64:
        return "float64 is computed by 'eager' and 'reference' alone; convert with .float()."
    return None


def _new_saved(call: ScanCall) -> Tensor:
    if _may_be_few(call):
        segments = (call.steps + few.SAVED - 1) // few.SAVED
        return call.x.new_empty((call.batch, call.routes, segments, call.states, call.channels), dtype=torch.float32)
    states = 1 << (call.states - 1).bit_length()  # as many as lanes hold
    if states == 1 and not _may_walk(call):
        _, pieces = _narrow_chunk(call)
    else:
        pieces = (call.steps + kernels.CHECKPOINT - 1) // kernels.CHECKPOINT
        if states > 1:  # before the first tile it is the initial one
            pieces = (pieces - 1) // _every(call)
    shape = (call.batch, call.routes, pieces, call.channels, states)
    return call.x.new_empty(shape, dtype=torch.float32)


def _every(call: ScanCall) -> int:
    every: int = kernels.wide_every(call.batch * call.routes, call.channels)
    return every


def _max_warps(call: ScanCall) -> int:
    return kernels.narrow_warps(call.batch * call.routes, call.channels)


def _narrow_chunk(call: ScanCall) -> tuple[int, int]:
    return kernels.narrow_chunk(call.steps, _max_warps(call))


class _Plan(NamedTuple):
    scan: Launch
    merging: bool  # the kernel adds the routes up itself
    parts: torch.dtype | None  # type of the routes' shares that are added up afterwards, or None
    edges: Launch | None = None  # what goes before the scan where routes are taken in segments
    segments: int = 1
    groups: int = 1  # of channels, whose shares of a backward pass's sums over channels are added up
    items: int = 1  # of the batch, of whose sums over the batch there is one share
    first: bool = False  # the first route's share is written where the result goes, and those of others added to it
    apart: int = 0  # shares of a sum over routes, where kernels are told
    blocks: int = 0  # where blocks wait for others of a route before: how many there are
    middle: bool = False  # states between two that were saved need a place in memory


def _forward(call: ScanCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    with on(call.x.device.index):
        prepared = _prepared(call)
        addresses = [t.data_ptr() for t in prepared if isinstance(t, Tensor)]
        return _runner(prepared, visits_all(call), save)(addresses)


def _prepare(call: ScanCall, save: bool) -> Run | None:
    """What runs each call like this one; None where the kernels take other tensors than those of the call."""
    device = call.x.device.index
    small = (getattr(call, name) for name in _SMALL)
    if call.rank > kernels.MAX_RANK or not all(t is None or _fits(t) for t in small):
        return None
    if call.indices is not None and not call.indices.is_contiguous():
        return None
    with on(device):
        in_order = (call.x.device, call.routes, call.tokens) if call.indices is None else None
        run = _runner(_prepared(call), visits_all(call), save)
    place = sum(t is not None for t in call[: ScanCall._fields.index("indices")])

    def start(addresses: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        if torch._C._cuda_getDevice() != device:
            with torch.cuda.device(device):
                return start(addresses)
        if in_order is not None:
            addresses.insert(place, _in_order.get(*in_order).data_ptr())
        return run(addresses)

    return start


def _runner(call: ScanCall, complete: bool, save: bool) -> Run:
    key = (_key(call, complete), call.return_last_state, save, tuple([t is None for t in call[:10]]))
    run = _forward_plans.get(key)
    if run is None:
        run = _forward_plans[key] = _new_runner(call, complete, save)
    return run


def _new_runner(call: ScanCall, complete: bool, save: bool) -> Run:
    """A forward pass over the tensors of a prepared call, in their order; all that is kept of them here are sizes."""
    device = call.x.device.index
    y, last, saved = call.new_output(), call.new_last_state(), _new_saved(call) if save else call.x.new_empty(0)
    plan = _plan_forward(call, complete, y, device)
    parts = None if plan.parts is None else _new_parts(call, plan)
    between = {} if parts is None else dict(y=parts)
    if plan.edges is not None:
        between |= _new_edges(call, plan.segments)
    order = call.x.new_empty(1 + plan.blocks, dtype=torch.int32) if plan.blocks else None
    wanted = dict(order=order, last_state=last if call.return_last_state else None, saved=saved if save else None)
    makers = {name: maker(t) for name, t in wanted.items() if t is not None}
    given = [name for name, t in zip(ScanCall._fields, call, strict=True) if isinstance(t, Tensor)]
    # The address of y comes last, where the scan does not look if it writes parts of it alone.
    names = [*given, *between, *makers, *(["y"] if parts is None else ["first_share"] if plan.first else [])]
    launches = [launch.ready(names) for launch in (plan.edges, plan.scan) if launch is not None]
    merge = None if parts is None else _merger(parts, y, plan.first)
    new, new_room = [*makers.values(), maker(y)], room_for(list(between.values()))
    to_clear = not plan.merging and not complete
    # Where they are among what is made. What was not asked for has no elements, and can be the same for all.
    place_last, place_saved = (list(makers).index(n) if n in makers else None for n in ("last_state", "saved"))
    no_last, not_saved = None if call.return_last_state else last, None if save else saved
    stream_of = torch._C._cuda_getCurrentRawStream  # the public function makes an object each time

    def run(addresses: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        made = [make() for make in new]
        if order is not None:
            made[0].zero_()
        y = made[-1]
        room, begins = new_room()
        addresses.extend(begins)
        if to_clear:
            if merge is not None:
                for tensor in room:
                    tensor.zero_()
            if merge is None or plan.first:
                y.zero_()
        for tensor in made:
            addresses.append(tensor.data_ptr())
        stream = stream_of(device)
        for launch in launches:
            launch(stream, addresses)
        if merge is not None:
            merge(stream, begins[0], y)
        last = no_last if place_last is None else made[place_last]
        return y, last, not_saved if place_saved is None else made[place_saved]  # type: ignore[return-value]

    return run


def _backward(asked: ScanCall, saved: Tensor, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    device = asked.x.device.index
    with on(device):
        call = _prepared(asked)
        batch, tokens, routes, channels, states = call.batch, call.tokens, call.routes, call.channels, call.states
        dy = None if dy is None else dy.to(call.y_dtype)
        # Where rows of x are read number by number, so are those of dy.
        as_it_lies = _few(call) or (states > 1 and _tokens_first(call))
        aligned = dy is None or (dy.stride(-1) == 1 and dy.data_ptr() % 16 == 0 and (states > 1 or vector(8, dy)))
        if dy is not None and not aligned and not as_it_lies:
            dy = dy.contiguous()
        dlast = None if dlast is None else dlast.to(torch.float32).contiguous()
        dx = torch.empty_like(call.x)
        complete = visits_all(asked)
        key = (_key(call, complete), None if dy is None else (dy.stride(), dy.data_ptr() & 15))
        plan = _backward_plans.get(key)
        if plan is None:
            plan = _backward_plans[key] = _plan_backward(call, complete, dy, dx, device)
        target = dx if plan.parts is None else _new_parts(call, plan)
        products = call.rank > 0 and _rank_in_kernel(call)
        blocks = plan.groups
        shares = batch // plan.items * plan.segments
        narrow = states == 1
        if products and not narrow:
            ddt = call.dt.new_empty((batch, tokens, routes, blocks, call.rank), dtype=torch.float32)
        elif products:
            ddt = call.dt.new_empty((blocks, batch, tokens, routes, call.rank))
        elif call.rank:
            ddt = call.dt.new_empty((batch, tokens, routes, channels), dtype=torch.float32)
        else:
            ddt = torch.empty_like(call.dt)
        new = functools.partial(call.x.new_empty, dtype=torch.float32)
        if narrow:
            dBC = new((blocks, batch, routes, call.steps, 2))
        else:
            half = kernels.sums(TYPES[call.B.dtype], TYPES[call.C.dtype]) == "Bfloat"
            dtype = torch.bfloat16 if half else torch.float32
            dBC = new((2, batch, tokens, routes, blocks, states), dtype=dtype)
        dA = new((shares, routes, channels, states))
        per_channel = new((2, shares, routes, channels))
        dweight = new((shares, routes, channels, call.rank)) if products else None
        dinitial = None if call.initial_state is None else torch.empty_like(call.initial_state)
        parts = dict(dA=dA, dD=per_channel[0], ddt_bias=per_channel[1], ddt_weight=dweight)
        parts |= dict(dBC=dBC) if narrow else dict(dB=dBC[0], dC=dBC[1])
        # A single share of what has the result's type is the result.
        done = not narrow and blocks == 1 and call.B.dtype == call.C.dtype == dBC.dtype
        if not complete:
            for tensor in (ddt, *((target,) if not plan.merging else ()), *(() if narrow else (dBC,))):
                tensor.zero_()
            if plan.first:
                dx.zero_()
        addresses = dict(
            x=call.x, dt=call.dt, B=call.B, C=call.C, indices=call.indices, A=call.A, D=call.D,
            dt_weight=call.dt_weight, dt_bias=call.dt_bias, initial_state=call.initial_state, saved=saved, dy=dy,
            dlast_state=dlast, dx=target, ddt=ddt, dinitial_state=dinitial,
            first_share=dx if plan.first else None, **parts,
        )  # fmt: skip
        if plan.middle:
            addresses["middle"] = new((batch, routes, plan.segments, channels, saved.shape[-1]))
        if plan.blocks:
            addresses["order"] = call.x.new_zeros(1 + plan.blocks, dtype=torch.int32)
        if plan.edges is not None:
            addresses |= _new_edges(call, plan.segments)
            plan.edges(device, **addresses)
        plan.scan(device, **addresses)
        if plan.parts is not None:
            _merge(target, dx, plan.first)
        del target, addresses  # the routes' shares make room for what follows

        found: dict[str, Tensor | None] = dict(x=dx, dt=ddt, initial_state=dinitial)
        found |= _finish(call, complete, shares, blocks, parts, ddt if products else None, done)
        if done:
            found |= dict(B=dBC[0].view(call.B.shape), C=dBC[1].view(call.C.shape))
        del parts, dA, per_channel, dweight, dBC
        if asked.dt_weight is not None and not products:
            low_rank, weight = asked.dt.to(torch.float32), asked.dt_weight.to(torch.float32)
            found["dt"] = torch.einsum("blkd,kdr->blkr", ddt, weight)
            found["dt_weight"] = torch.einsum("blkd,blkr->kdr", ddt, low_rank)
        return tuple(_like(found.get(name), getattr(asked, name)) for name in GRADIENTS)


_forward_plans: Plans = Plans()
_backward_plans: Plans = Plans()


def _key(call: ScanCall, complete: bool) -> tuple[Any, ...]:
    """All that a plan depends on."""
    tensors = tuple((t.dtype, t.shape, t.stride(), t.data_ptr() & 15) for t in (call.x, call.dt, call.B, call.C))
    flags = (call.dt_softplus, call.merge, call.out_dtype, call.rank, call.A.shape, call.steps)
    return (call.x.device.index, tensors, flags, complete, _is_in_order(call))


def _plan_forward(call: ScanCall, complete: bool, y: Tensor, device: int) -> _Plan:
    if _few(call):
        return _plan_few_forward(call, complete, y, device)
    if call.states > 1:
        return _plan_wide_forward(call, complete, y, device)
    walk = _walk(call, complete)
    merged = None if walk is None else _plan_merged(call, y, device)
    if merged is not None:
        return merged
    parts, merging, view = _merging(call, call.merge, y, device, apart=walk is not None)
    fields = _sizes(call) | _strides("y", view)
    x, dt, B, C = _types(call)
    types = (x, dt, B, C, TYPES[view.dtype])
    if walk is not None:
        walking, room = functools.partial(kernels.walk_forward, types), 2 * kernels.WALK_ROOM
        plan = _walk_plan(walking, walk, call, fields, parts, room, kernels.WALK_FORWARD, device)
        return plan._replace(first=_first(parts, y))
    kernel = kernels.narrow_forward(types, _narrow(call, complete, merging, view))
    return _narrow_plan(kernel, call, fields, merging, parts, device)


def _plan_few_forward(call: ScanCall, complete: bool, y: Tensor, device: int) -> _Plan:
    how, view, parts = _few_way(call, complete, call.merge, False, y, device)
    specialisation = few.forward((*_types(call), TYPES[view.dtype]), how)
    return _few_plan(specialisation, how, call, _sizes(call) | _strides("y", view), parts, device)


def _plan_few_backward(call: ScanCall, complete: bool, dy: Tensor | None, dx: Tensor, device: int) -> _Plan:
    seen, ddt = _seen(call, dy), _ddt_like(call)
    more = [t for t in (seen, None if call.rank else ddt) if t is not None]
    how, view, parts = _few_way(call, complete, call.shared_x, True, dx, device, *more)
    fields = _sizes(call) | _strides("dx", view) | _strides("ddt", ddt)
    if seen is not None:
        fields |= _strides("dy", seen)
    x, dt, B, C = _types(call)
    ddt_type = "Float" if call.rank and call.states > 1 else dt
    types = (x, dt, B, C, TYPES[call.y_dtype])
    specialisation = few.backward(types, how, TYPES[view.dtype], ddt_type, kernels.sums(B, C))
    return _few_plan(specialisation, how, call, fields, parts, device)


def _few_way(
    call: ScanCall, complete: bool, wanted: bool, back: bool, result: Tensor, device: int, *more: Tensor
) -> tuple[few.Few, Tensor, torch.dtype | None]:
    """How few sequences are taken, and the result or the routes' shares of it: in the cluster routes are added up, if
    that is `wanted`, where all visit every token and its shared memory holds their shares."""

    def chosen(merge: bool, out: Tensor) -> few.Few | None:
        ways = few.options(call, merge, _capability(device) >= (9, 0), _is_in_order(call), back, out, *more)
        return few.choose(call, ways, back, _multiprocessors(device), nvrtc.shared_limit(device))

    together = wanted and call.routes > 1
    how = chosen(True, result) if together and complete else None
    if how is not None:
        return how, result.unsqueeze(2).expand(-1, -1, call.routes, -1), None
    parts = None
    if together:
        parts = _parts_type(result)
        view = torch.empty(_parts(call, call.routes), dtype=parts, device="meta").transpose(1, 2)
    else:
        view = result.unsqueeze(2) if wanted else result
    how = chosen(False, view)
    assert how is not None, "_few has seen to it"
    return how, view, parts


def _few_plan(
    wanted: nvrtc.Specialisation,
    how: few.Few,
    call: ScanCall,
    fields: dict[str, int],
    parts: torch.dtype | None,
    device: int,
) -> _Plan:
    fields |= dict(segments=(call.steps + few.SAVED - 1) // few.SAVED)
    launch = Launch.of(wanted, device, how.grid(call), _HEADER, fields, 32 * how.warps, how.sum_shared(call.tokens))
    groups, shares = few.tiles(call) // how.together, how.rounds(call) if how.chain else how.span
    return _Plan(launch, how.merge, parts, segments=shares, groups=groups, blocks=max(0, 2 * how.words(call) - 1))


def _plan_wide_forward(call: ScanCall, complete: bool, y: Tensor, device: int) -> _Plan:
    tile = _forward_tile(call, device)
    parts, merging, view = _merging(call, call.merge, y, device, apart=True)
    if parts is not None and complete and _in_turn(call, tile, y, device):
        parts, merging, view = None, True, y.unsqueeze(2).expand(-1, -1, call.routes, -1)
    copies = tile != kernels.forward_tiles(call.states, call.rank)[0]
    how = _wide(call, tile, copies, call.x, view, None if call.rank else call.dt)._replace(merge=merging)
    wanted = functools.partial(kernels.wide_forward, (*_types(call), TYPES[view.dtype]))
    plan = _wide_plan(wanted, how, call, _sizes(call) | _strides("y", view), parts, call.routes, 1, device, first=True)
    return plan._replace(first=_first(parts, y))


def _plan_backward(call: ScanCall, complete: bool, dy: Tensor | None, dx: Tensor, device: int) -> _Plan:
    if _few(call):
        return _plan_few_backward(call, complete, dy, dx, device)
    walk = _walk(call, complete)
    tile = kernels.backward_tile(call.states, nvrtc.shared_limit(device))
    parts, merging, view = _merging(call, call.shared_x, dx, device, apart=walk is not None)
    apart = 0
    if call.states > 1 and _first(parts, dx):
        apart = _apart(call, tile, device)
        if apart == 1:
            parts, view = None, dx.unsqueeze(2).expand(-1, -1, call.routes, -1)
        else:
            view = torch.empty(_parts(call, apart - 1), dtype=parts, device="meta").transpose(1, 2)
    seen, ddt = _seen(call, dy), _ddt_like(call)
    products = call.rank > 0 and _rank_in_kernel(call)
    ddt_type = TYPES[torch.float32 if call.rank and not products else call.dt.dtype]
    fields = _sizes(call) | _strides("dx", view) | _strides("ddt", ddt)
    if seen is not None:
        fields |= _strides("dy", seen)
    x, dt, B, C = _types(call)
    types = (x, dt, B, C, TYPES[call.y_dtype])
    if walk is not None:
        walking = functools.partial(kernels.walk_backward, types, dx=TYPES[view.dtype], ddt=ddt_type)
        walk = kernels.walk(call.channels, 1, call.rank)
        plan = _walk_plan(walking, walk, call, fields, parts, kernels.WALK_ROOM, kernels.walk_held(call.rank), device)
        return plan._replace(first=_first(parts, dx))
    across = (call.x, seen, view, *(() if products else (ddt,)), *(() if call.rank else (call.dt,)))
    if call.states == 1:
        how = _narrow(call, complete, merging, view, *across)
        kernel = kernels.narrow_backward(types, how, TYPES[view.dtype], ddt_type)
        return _narrow_plan(kernel, call, fields, merging, parts, device)
    blocks, processors = call.batch * call.routes * tile.groups(call.channels), _multiprocessors(device)
    copies = call.rank == 0 and blocks >= tile.blocks * processors  # a low rank needs the shared memory
    row, block = tile.shape.lanes * tile.shape.states, tile.warps * tile.shape.channels
    whole = call.channels % block == 0 and call.states == row
    wide = _wide(call, tile, copies, *across)._replace(add=0 < apart < call.routes, whole=whole)
    wanted = functools.partial(kernels.wide_backward, types, dx=TYPES[view.dtype], ddt=ddt_type)
    at_once = call.batch * (apart or call.routes)
    turns = kernels.wide_turns(tile, at_once, call.channels, processors) if wide.every > 1 else 1
    items = kernels.wide_items(tile, call.batch, at_once * tile.groups(call.channels) // turns, processors)
    return _wide_plan(wanted, wide, call, fields, parts, apart or call.routes, turns, device, items=items)._replace(
        first=apart > 1, middle=wide.every > 1 and not (copies and _capability(device) >= (8, 0))
    )


def _seen(call: ScanCall, dy: Tensor | None) -> Tensor | None:
    """The gradient that comes in as each route sees it, (B, L, K, D)."""
    return None if dy is None else dy.unsqueeze(2).expand(-1, -1, call.routes, -1) if call.merge else dy


def _ddt_like(call: ScanCall) -> Tensor:
    """A gradient of whole step sizes, without memory."""
    if call.rank:
        return call.dt.new_empty((call.batch, call.tokens, call.routes, call.channels), device="meta")
    return torch.empty_like(call.dt, device="meta")


def _apart(call: ScanCall, tile: kernels.Tile, device: int) -> int:
    """Shares of dx, to which routes are added one after the other: as few as leave the device filled."""
    blocks, processors = call.batch * tile.groups(call.channels), _multiprocessors(device)
    segments, _ = kernels.wide_segments(call.steps, call.routes * blocks, tile.blocks * processors)
    if segments > 1:  # blocks take segments, and no one knows when a route is done
        return call.routes
    whole = tile.waves(call.routes * blocks, processors)
    divisors = (n for n in range(1, call.routes + 1) if call.routes % n == 0)
    return next(n for n in divisors if call.routes // n * tile.waves(n * blocks, processors) <= whole)


def _forward_tile(call: ScanCall, device: int) -> kernels.Tile:
    few, many = kernels.forward_tiles(call.states, call.rank)
    blocks = call.batch * call.routes * many.groups(call.channels)
    if _tokens_first(call) or 2 * blocks < many.blocks * _multiprocessors(device):
        return few
    return many


def _in_turn(call: ScanCall, tile: kernels.Tile, y: Tensor, device: int) -> bool:
    """Whether blocks take the routes one after the other and add them up in y: where that fills the device as often,
    and where the sum of some of them doesn't overflow."""
    blocks, processors = call.batch * tile.groups(call.channels), _multiprocessors(device)
    waves = call.routes * tile.waves(blocks, processors)
    return y.dtype != torch.float16 and waves <= tile.waves(call.routes * blocks, processors)


def _tokens_first(call: ScanCall) -> bool:
    return call.x.stride(1) == 1 != call.x.stride(-1)


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
        tensor_rank=_rank_in_kernel(call),
        tokens_first=_tokens_first(call),
        copies=copies,
        every=_every(call),
    )


def _may_be_few(call: ScanCall) -> bool:
    """Whether time is split over clusters of blocks, as far as sizes and types tell."""
    low = 0 < call.rank <= kernels.MAX_RANK  # beyond, it is multiplied out
    fits = not low or (call.rank % 2 == 0 and kernels.on_tensor_cores(call.rank, TYPES.get(call.dt.dtype, "")))
    return fits and few.takes(call.states, call.batch * call.routes * call.channels, call.steps)


def _few(call: ScanCall) -> bool:
    """The same for what is known of a call's layout and device, alike in both passes."""
    if not _may_be_few(call):
        return False
    device = call.x.device.index
    if call.rank and not (_capability(device) >= (8, 0) and vector(2, call.dt)):
        return False
    return few.fits(call, nvrtc.shared_limit(device))


def _may_walk(call: ScanCall) -> bool:
    """Whether the walking kernels may take a call of one state, as far as its sizes tell."""
    fits = call.dt_softplus and call.steps == call.tokens
    return fits and kernels.walks(call.steps, call.batch * call.routes, call.channels)


def _walk(call: ScanCall, complete: bool) -> kernels.Walk | None:
    """How the walking kernels take a call, or None where its sizes, its layout or its device are not for them."""
    if call.states > 1 or not _may_walk(call) or not complete or _capability(call.x.device.index) < (8, 0):
        return None
    results = (torch.empty_like(call.x, device="meta"), torch.empty_like(call.dt, device="meta"))
    if not vector(8, call.x, results[0], *(() if call.rank else (call.dt, results[1]))):
        return None
    if call.rank and not (_rank_in_kernel(call) and call.rank % 2 == 0 and vector(2, call.dt)):
        return None
    return kernels.walk(call.channels, kernels.walk_run(call.channels, call.rank), call.rank)


def _plan_merged(call: ScanCall, y: Tensor, device: int) -> _Plan | None:
    """Where a block can hold the sums of its channels over the routes, and the device is filled well by such blocks."""
    if not call.merge or call.routes == 1 or not vector(8, y):
        return None
    types, shared = (*_types(call), TYPES[y.dtype]), nvrtc.shared_limit(device)
    how = kernels.merged(types, call.tokens, call.routes, call.channels, call.rank, shared)
    if how is None:
        return None
    held = how.blocks(types, call.tokens, shared)
    blocks = call.batch * call.channels // (32 * how.run)
    if not kernels.fills(blocks, held * _multiprocessors(device)):
        return None
    threads, more = 32 * how.routes * how.turns, how.sums_shared(call.tokens)
    fields = _sizes(call) | _strides("y", y.unsqueeze(2))
    launch = Launch.of(kernels.walk_merged(types, how, held), device, blocks, _HEADER, fields, threads, more)
    return _Plan(launch, True, None)


def _walk_plan(
    wanted: Callable[[kernels.Walk], nvrtc.Specialisation],
    how: kernels.Walk,
    call: ScanCall,
    fields: dict[str, int],
    parts: torch.dtype | None,
    room: int,
    held: int,
    device: int,
) -> _Plan:
    """One launch, or two over routes in segments where sequences are too few: `room` warps a multiprocessor are enough,
    of which it holds `held`."""
    processors = _multiprocessors(device)
    groups = call.channels // (32 * how.run * how.warps)
    blocks = call.batch * call.routes * groups
    segments, per_segment = kernels.wide_segments(call.steps, blocks * how.warps, room * processors)
    items = kernels.walk_items(call.batch, blocks * how.warps, held * processors) if segments == 1 else 1
    fields |= dict(segments=segments, segment_tiles=per_segment)

    def launch(part: int, count: int) -> Launch:
        return Launch.of(wanted(how._replace(part=part, items=items)), device, blocks * count // items, _HEADER, fields)

    if segments == 1:
        return _Plan(launch(0, 1), False, parts, groups=groups, items=items)
    return _Plan(launch(2, segments), False, parts, launch(1, segments - 1), segments, groups)


def _merging(
    call: ScanCall, wanted: bool, result: Tensor, device: int, apart: bool
) -> tuple[torch.dtype | None, bool, Tensor]:
    """How routes are added up into a result: the type of their shares or None, whether the kernel does it (not where it
    takes routes apart), and the result, or its shares, as the kernel sees them: (B, L, K, D)."""
    if not wanted:
        return None, False, result
    if call.routes == 1:
        return None, False, result.unsqueeze(2)
    if call.states == 1 and not apart and _sum_fits(call, result, device):
        return None, True, result.unsqueeze(2)
    parts = _parts_type(result)
    first = (call.states > 1 or apart) and _first(parts, result)
    return parts, False, torch.empty(_parts(call, call.routes - first), dtype=parts, device="meta").transpose(1, 2)


def _parts_type(result: Tensor) -> torch.dtype:
    """Of the routes' shares of a result: not float16, where a share can overflow though the sum does not."""
    return torch.bfloat16 if result.dtype == torch.bfloat16 else torch.float32


def _first(parts: torch.dtype | None, result: Tensor) -> bool:
    """Whether the walking and the wide kernels write the first route's share where the result goes."""
    return parts == result.dtype and result.is_contiguous()


def _sum_fits(call: ScanCall, result: Tensor, device: int) -> bool:
    """Whether blocks keep their channels' sums over routes in shared memory: where a multiprocessor has room for three
    such blocks, since what one leaves of the L1 cache holds too few loads under way; and where taking the routes one
    after the other leaves a block for everyone."""
    blocks = call.batch * _narrow_blocks(call)
    shared = kernels.narrow_shared(_narrow_chunk(call)[0], call.rank, call.tokens)
    return 3 * shared <= nvrtc.shared_limit(device) and blocks >= _multiprocessors(device) and vector(8, result)


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
        tensor_rank=_rank_in_kernel(call),
    )


def _narrow_plan(
    wanted: nvrtc.Specialisation,
    call: ScanCall,
    fields: dict[str, int],
    merging: bool,
    parts: torch.dtype | None,
    device: int,
) -> _Plan:
    warps, _ = _narrow_chunk(call)
    groups = _narrow_blocks(call)
    grid = call.batch * groups * (1 if merging else call.routes)
    more = 4 * kernels.NARROW_CHANNELS * (call.tokens + call.tokens % 2) if merging else 0
    launch = Launch.of(wanted, device, grid, _HEADER, fields, 32 * warps, more)
    return _Plan(launch, merging, parts, groups=groups)


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
) -> _Plan:
    """One launch, or two over routes in segments where sequences are too few for the device; `first`: where segments
    are long the first of two does all of the first one."""
    groups = how.tile.groups(call.channels)
    blocks = call.batch * groups * (1 if how.merge else call.routes)
    room = how.tile.blocks * _multiprocessors(device)
    segments, per_segment = kernels.wide_segments(call.steps, blocks, room)
    how = how._replace(long=segments > 1 and per_segment >= kernels.LONG)
    alone = first and how.long
    if alone:
        segments, per_segment = kernels.wide_segments(call.steps, blocks, room, True)
    if how.merge or segments == 1:
        groups, blocks = groups // turns, blocks // turns // items
        launch = Launch.of(wanted(how), device, blocks, _HEADER, fields | dict(apart=apart, turns=turns, items=items))
        waited = blocks if how.add else 0
        return _Plan(launch, how.merge, parts, groups=groups, apart=apart, blocks=waited, items=items)
    fields |= dict(segments=segments, segment_tiles=per_segment, apart=apart, turns=1, items=1)
    edges, scan = (
        Launch.of(wanted(how._replace(part=part)), device, blocks * count, _HEADER, fields)
        for part, count in ((1, segments - 1), (2, segments - alone))
    )
    return _Plan(scan, False, parts, edges, segments, groups, apart=apart)


def _new_edges(call: ScanCall, segments: int) -> dict[str, Tensor]:
    shape = (call.batch, call.routes, segments, call.channels)
    edges = call.A.new_empty((*shape, 1 << (call.states - 1).bit_length()))
    return dict(edges=edges, spans=call.A.new_empty(shape))


def _merger(parts: Tensor, out: Tensor, add: bool) -> Callable[[int, int, Tensor], None]:
    """A function of a stream, the address of parts, and out: out[b, l, d] = sum over k of parts[b, k, l, d], in order
    of k, and if `add` after what is in out."""
    device, in_order = out.device.index, out.is_contiguous()
    batch, routes, tokens, channels = parts.shape
    run = next(n for n in (8, 4, 2, 1) if channels % n == 0)
    fields = dict(batch=batch, tokens=tokens, routes=routes, channels=channels)
    grid = (batch * tokens * (channels // run) + 255) // 256
    wanted = kernels.merge(TYPES[parts.dtype], TYPES[out.dtype], run, add)
    launch = Launch.of(wanted, device, grid, _HEADER, fields).ready(("x", "y"))

    def merge(stream: int, parts: int, out: Tensor) -> None:
        if in_order:
            launch(stream, (parts, out.data_ptr()))
            return
        result = torch.empty_like(out, memory_format=torch.contiguous_format)
        launch(stream, (parts, result.data_ptr()))
        out.copy_(result)

    return merge


def _merge(parts: Tensor, out: Tensor, add: bool) -> None:
    key = (out.device.index, parts.shape, parts.dtype, out.dtype, out.is_contiguous(), add)
    merge = _merges.get(key)
    if merge is None:
        merge = _merges[key] = _merger(parts, out, add)
    merge(torch._C._cuda_getCurrentRawStream(out.device.index), parts.data_ptr(), out)


_merges: Plans = Plans()


def _finish(
    call: ScanCall,
    complete: bool,
    shares: int,
    tiles: int,
    parts: dict[str, Tensor | None],
    ddt: Tensor | None,
    done: bool,
) -> dict[str, Tensor | None]:
    """The sums of what a backward kernel left in parts, in one launch; see csrc/cuda/finish.cuh. `done`: dB and dC are
    sums already."""
    device, rank = call.x.device.index, 0 if ddt is None else call.rank
    batch, tokens, routes, channels, states = call.batch, call.tokens, call.routes, call.channels, call.states
    dB, dC = (None if done else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (call.B, call.C))
    if dB is not None and dC is not None and not complete and states == 1:
        dB.zero_(), dC.zero_()
    sum_ddt = None if ddt is None else call.dt.new_empty(call.dt.shape)
    sizes = [routes * channels * width for width in (states, 1, 1, rank)]
    of_channels = call.A.new_empty(sum(sizes))
    key = (
        device,
        call.B.shape,
        call.steps,
        channels,
        rank,
        call.dt.dtype,
        call.B.dtype,
        call.C.dtype,
        shares,
        tiles,
        done,
    )
    launch = _finishes.get(key)
    if launch is None:
        rows = batch * tokens * routes
        run = next(n for n in (8, 4, 2, 1) if (rows * rank if states == 1 else rank) % n == 0)
        state_run = 1 if states == 1 else next(n for n in (4, 2, 1) if states % n == 0)
        of_states = [batch * routes * call.steps] if states == 1 else 2 * [rows * states // state_run]
        of_states = [] if done else of_states  # they come last
        fields = dict(batch=batch, tokens=tokens, routes=routes, channels=channels, steps=call.steps, tiles=tiles)
        types = (TYPES[call.dt.dtype], TYPES[call.B.dtype], TYPES[call.C.dtype])
        wanted = kernels.finish(types, states, rank, run)
        grid = sum((count + 255) // 256 for count in (sum(sizes), rows * rank // run, *of_states))
        launch = _finishes[key] = Launch.of(wanted, device, grid, _HEADER, fields | dict(shares=shares))
    launch(
        device, indices=call.indices, ddt=ddt, sum_dB=dB, sum_dC=dC, sum_ddt=sum_ddt, sum_channels=of_channels, **parts
    )
    of_A, of_D, of_bias, of_weight = of_channels.split(sizes)
    found: dict[str, Tensor | None] = dict(B=dB, C=dC, A=of_A.view(routes, channels, states))
    found |= dict(D=of_D.view(routes, channels), dt_bias=of_bias.view(routes, channels))
    if ddt is not None:
        found |= dict(dt=sum_ddt, dt_weight=of_weight.view(routes, channels, rank))
    return found


_finishes: Plans = Plans()


def _new_parts(call: ScanCall, plan: _Plan) -> Tensor:
    return call.x.new_empty(_parts(call, (plan.apart or call.routes) - plan.first), dtype=plan.parts)


def _parts(call: ScanCall, shares: int) -> tuple[int, ...]:
    """Shape of the routes' shares of a result: each route's in one piece, since they are written route by route."""
    return (call.batch, shares, call.tokens, call.channels)


def _like(gradient: Tensor | None, argument: Tensor | None) -> Tensor | None:
    """The gradient in the type and memory order of its argument, as the operator promises."""
    if argument is None or gradient is None:
        return None
    if gradient.dtype == argument.dtype and gradient.stride() == argument.stride() and argument.is_contiguous():
        return gradient  # what follows would say so too, at the price of a launch
    promised = torch.empty_like(argument, device="meta")
    if gradient.dtype == promised.dtype and gradient.stride() == promised.stride():
        return gradient
    return torch.empty_like(argument).copy_(gradient)


def _prepared(call: ScanCall) -> ScanCall:
    """The call as the kernels take it: small tensors in float32 and contiguous, no low-rank step size of a high rank.

    What this makes lives as long as the call, which is as long as kernels are being launched.
    """
    changed: dict[str, Any] = {}
    for name in _SMALL:
        tensor = getattr(call, name)
        if tensor is not None and not _fits(tensor):
            changed[name] = tensor.to(torch.float32).contiguous()
    if call.indices is None:
        changed["indices"] = _in_order.get(call.x.device, call.routes, call.tokens)
    elif not call.indices.is_contiguous():
        changed["indices"] = call.indices.contiguous()
    if changed:
        call = call._replace(**changed)
    if call.rank > kernels.MAX_RANK:  # a matrix product does it better
        assert call.dt_weight is not None
        dt = torch.einsum("blkr,kdr->blkd", call.dt.float(), call.dt_weight)
        call = call._replace(dt=dt, dt_weight=None)
    return call


def _fits(parameter: Tensor) -> bool:
    return parameter.dtype == torch.float32 and parameter.is_contiguous()


def _is_in_order(call: ScanCall) -> bool:
    """Of a prepared call."""
    return call.indices is _in_order.made(call.x.device, call.routes, call.tokens)


def _make_in_order(device: torch.device, routes: int, tokens: int) -> Tensor:
    """The table of routes that visit tokens in their order."""
    return torch.arange(tokens, device=device, dtype=torch.int32).repeat(routes, 1)


_in_order = Constants(_make_in_order)


def _rank_in_kernel(call: ScanCall) -> bool:
    """Whether backward leaves the gradients of a low-rank step size and of its weights, not that of the step size."""
    device = call.x.device.index
    if not kernels.on_tensor_cores(call.rank, TYPES[call.dt.dtype]) or _capability(device) < (8, 0):
        return False
    return call.states == 1 or kernels.wide_shape(call.states, 2).channels % 8 == 0


def _sizes(call: ScanCall) -> dict[str, int]:
    """Fields of struct Params that both passes fill alike."""
    x = call.x.unsqueeze(2).expand(-1, -1, call.routes, -1) if call.shared_x else call.x
    fields = dict(batch=call.batch, tokens=call.tokens, routes=call.routes, steps=call.steps)
    fields |= dict(channels=call.channels, states=call.states)
    for name, tensor in (("x", x), ("dt", call.dt), ("B", call.B), ("C", call.C)):
        fields |= _strides(name, tensor)
    return fields


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    axes = "blkn" if name in ("B", "C") else "blkd"
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, tensor.stride(), strict=True)}


def _types(call: ScanCall) -> tuple[str, str, str, str]:
    return TYPES[call.x.dtype], TYPES[call.dt.dtype], TYPES[call.B.dtype], TYPES[call.C.dtype]


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


BACKEND = Backend("cuda", _unavailable, _refuses, _forward, _backward, _new_saved, prepare=_prepare)
