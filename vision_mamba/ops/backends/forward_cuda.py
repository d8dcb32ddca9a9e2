"""The scan's forward pass on CUDA: what runs a kind of call is made once, and then makes results and launches."""

from __future__ import annotations

import torch
from torch import Tensor

from vision_mamba.ops.backends import cuda_kernels as kernels
from vision_mamba.ops.backends import few_cuda as few
from vision_mamba.ops.backends import few_plans_cuda as few_plans
from vision_mamba.ops.backends import narrow_cuda as narrow
from vision_mamba.ops.backends import wave_cuda as wave
from vision_mamba.ops.backends import wide_cuda as wide
from vision_mamba.ops.backends.calls_cuda import (
    ROWS,
    SMALL,
    as_taken,
    is_far,
    is_realigned,
    plan_key,
    tables_in_order,
)
from vision_mamba.ops.backends.launch import Plans, is_whole, maker, on, room_for
from vision_mamba.ops.backends.plans_cuda import Plan, new_edges, new_parts
from vision_mamba.ops.backends.shares_cuda import merger
from vision_mamba.ops.call import ScanCall
from vision_mamba.ops.contract import visits_all
from vision_mamba.ops.known import Run

runners: Plans = Plans()


def forward(call: ScanCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    with on(call.x.device.index):
        prepared = as_taken(call)
        addresses = [t.data_ptr() for t in prepared if isinstance(t, Tensor)]
        y, last, saved = _runner(prepared, visits_all(call), save)(addresses)
        # The memory order of y is that of x, and was promised.
        return y if prepared.x is call.x else call.new_output().copy_(y), last, saved


def prepare(call: ScanCall, save: bool) -> Run | None:
    """What runs each call like this one; None where the kernels take other tensors than those of the call."""
    device = call.x.device.index
    small = (getattr(call, name) for name in SMALL)
    if call.rank > kernels.MAX_RANK or not all(t is None or is_whole(t) for t in small):
        return None
    if (call.indices is not None and not call.indices.is_contiguous()) or is_realigned(call):
        return None
    if any(is_far(getattr(call, name)) for name in ROWS):
        return None
    with on(device):
        in_order = (call.x.device, call.routes, call.tokens) if call.indices is None else None
        run = _runner(as_taken(call), visits_all(call), save)
    place = sum(t is not None for t in call[: ScanCall._fields.index("indices")])

    def start(addresses: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        if torch._C._cuda_getDevice() != device:
            with torch.cuda.device(device):
                return start(addresses)
        if in_order is not None:
            addresses.insert(place, tables_in_order.get(*in_order).data_ptr())
        return run(addresses)

    return start


def _runner(call: ScanCall, complete: bool, save: bool) -> Run:
    key = (plan_key(call, complete), call.return_last_state, save, tuple([t is None for t in call[:10]]))
    run = runners.get(key)
    if run is None:
        run = runners[key] = _new_runner(call, complete, save)
    return run


def _new_runner(call: ScanCall, complete: bool, save: bool) -> Run:
    """A forward pass over the tensors of a prepared call, in their order; all that is kept of them here are sizes."""
    device = call.x.device.index
    y, last, saved = call.new_output(), call.new_last_state(), new_saved(call) if save else call.x.new_empty(0)
    plan = _plan(call, complete, y, device)
    parts = None if plan.parts is None else new_parts(call, plan)
    between = {} if parts is None else dict(y=parts)
    if plan.edges is not None:
        between |= new_edges(call, plan.segments)
    order = call.x.new_empty(1 + plan.blocks, dtype=torch.int32) if plan.blocks else None
    wanted = dict(order=order, last_state=last if call.return_last_state else None, saved=saved if save else None)
    makers = {name: maker(t) for name, t in wanted.items() if t is not None}
    given = [name for name, t in zip(ScanCall._fields, call, strict=True) if isinstance(t, Tensor)]
    # The address of y comes last, where the scan does not look if it writes parts of it alone.
    names = [*given, *between, *makers, *(["y"] if parts is None else ["first_share"] if plan.first else [])]
    launches = [launch.ready(names) for launch in (plan.edges, plan.scan) if launch is not None]
    merge = None if parts is None else merger(parts, y, plan.first)
    new, new_room = [*makers.values(), maker(y)], room_for(list(between.values()))
    to_clear, counts = not plan.merging and not complete, plan.blocks > 0
    # Where they are among what is made. What was not asked for has no elements, and can be the same for all.
    place_last, place_saved = (list(makers).index(n) if n in makers else None for n in ("last_state", "saved"))
    no_last, not_saved = None if call.return_last_state else last, None if save else saved
    stream_of = torch._C._cuda_getCurrentRawStream  # the public function makes an object each time

    def run(addresses: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        made = [make() for make in new]
        if counts:
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


def new_saved(call: ScanCall) -> Tensor:
    """Room for the states that a forward pass leaves for the backward pass."""
    if few.takes_call(call, back=True):
        return call.x.new_empty(few.saved(call), dtype=torch.float32)
    pieces = narrow.saved_pieces(call) if call.states == 1 else wide.saved_pieces(call)
    states = 1 << (call.states - 1).bit_length()  # as many as lanes hold
    return call.x.new_empty((call.batch, call.routes, pieces, call.channels, states), dtype=torch.float32)


def _plan(call: ScanCall, complete: bool, y: Tensor, device: int) -> Plan:
    if few.takes_call(call):
        return few_plans.forward(call, complete, y, device)
    plan = wave.forward(call, y, device)
    if plan is not None:
        return plan
    kind = wide if call.states > 1 else narrow
    return kind.forward(call, complete, y, device)
