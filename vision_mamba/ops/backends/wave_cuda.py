"""Plans for long routes of few sequences: the wave kernels, whose warps take the tiles of a route in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from vision_mamba.ops.backends import cuda_kernels as kernels
from vision_mamba.ops.backends import gpu, nvrtc
from vision_mamba.ops.backends.calls_cuda import (
    backward_fields,
    ddt_like,
    is_in_order,
    saved_every,
    seen_by_routes,
    sizes,
    strides,
    types_of,
)
from vision_mamba.ops.backends.cuda_kernels import TYPES
from vision_mamba.ops.backends.launch import Launch
from vision_mamba.ops.backends.plans_cuda import HEADER, Plan
from vision_mamba.ops.call import ScanCall

_FAR = 2**28  # elements from one row to the next from which on its bytes would not fit 32 bits


def forward(call: ScanCall, y: Tensor, device: int) -> Plan | None:
    """None where the kernel does not take the call, or would leave too much of the device idle."""
    if not 8 < call.states <= kernels.WAVE_STATES or call.rank or not is_in_order(call):
        return None
    if gpu.capability(device) < (8, 0) or (call.merge and call.routes > 1):
        return None
    view = y.unsqueeze(2) if call.merge else y
    if any(tensor.stride(1) != 1 for tensor in (call.x, call.dt, call.B, call.C, view)):
        return None
    columns = call.batch * call.routes * -(-call.channels // kernels.WAVE_FORWARD)
    together = kernels.wave_forward_columns(call.steps, columns, gpu.multiprocessors(device))
    if not together:
        return None
    whole = call.channels % kernels.WAVE_FORWARD == 0 and call.states == kernels.WAVE_STATES
    how = kernels.WaveForward(together, call.dt_softplus, whole, saved_every(call))
    wanted = kernels.wave_forward((*types_of(call), TYPES[view.dtype]), how)
    blocks = -(-columns // together)
    return Plan(Launch.of(wanted, device, blocks, HEADER, sizes(call) | strides("y", view)), False, None)


def backward(call: ScanCall, dy: Tensor | None, dx: Tensor, device: int) -> Plan | None:
    """None where the kernel does not take the call, or would leave too much of the device idle."""
    if dy is None or call.states != kernels.WAVE_STATES or call.rank or not is_in_order(call):
        return None
    if saved_every(call) > 1 or (call.shared_x and call.routes > 1):
        return None
    if gpu.capability(device) < (8, 0) or nvrtc.shared_limit(device) < kernels.WAVE_SHARED:
        return None
    view = dx.unsqueeze(2) if call.shared_x else dx
    seen, ddt = seen_by_routes(call, dy), ddt_like(call)
    assert seen is not None
    across = (call.x, call.dt, seen, view, ddt)
    rows = {f"d{name}": torch.empty_like(tensor, device="meta") for name, tensor in (("B", call.B), ("C", call.C))}
    far = max(stride for tensor in (*across, call.B, call.C, *rows.values()) for stride in tensor.stride()[1:])
    if far >= _FAR or any(tensor.stride(1) != 1 for tensor in across):
        return None
    groups = -(-call.channels // kernels.WAVE_CHANNELS)
    blocks, processors = call.batch * call.routes * groups, gpu.multiprocessors(device)
    if not kernels.wave_fills(call.steps, blocks, processors):
        return None
    how = kernels.WaveBackward(call.dt_softplus, call.channels % kernels.WAVE_CHANNELS == 0)
    types = (*types_of(call), TYPES[call.y_dtype])
    wanted = kernels.wave_backward(types, how, TYPES[view.dtype], TYPES[ddt.dtype])
    fields = backward_fields(call, view, seen, ddt) | strides("dB", rows["dB"]) | strides("dC", rows["dC"])
    more = -blocks % processors + processors  # add up what the others leave: where there is room, then where they were
    launch = Launch.of(wanted, device, blocks + more, HEADER, fields)
    return Plan(
        launch, False, None, groups=groups, blocks=kernels.WAVE_COUNTS - 1 + call.routes * groups, whole_rows=True,
        rows=blocks * kernels.wave_rows(call.steps),
    )  # fmt: skip
