"""Plans for few sequences, over whose time clusters of blocks share."""

from __future__ import annotations

import torch
from torch import Tensor

from vision_mamba.ops.backends import cuda_kernels as kernels
from vision_mamba.ops.backends import few_cuda as few
from vision_mamba.ops.backends import gpu, nvrtc
from vision_mamba.ops.backends.calls_cuda import (
    backward_fields,
    ddt_like,
    is_in_order,
    seen_by_routes,
    sizes,
    strides,
    types_of,
)
from vision_mamba.ops.backends.cuda_kernels import TYPES
from vision_mamba.ops.backends.launch import Launch
from vision_mamba.ops.backends.plans_cuda import HEADER, Plan, parts_shape, parts_type
from vision_mamba.ops.call import ScanCall


def forward(call: ScanCall, complete: bool, y: Tensor, device: int) -> Plan:
    how, view, parts = _way(call, complete, call.merge, False, y, device, min(_largest(device), nvrtc.PORTABLE))
    specialisation = few.forward((*types_of(call), TYPES[view.dtype]), how)
    return _plan(specialisation, how, call, sizes(call) | strides("y", view), parts, device)


def backward(call: ScanCall, complete: bool, dy: Tensor | None, dx: Tensor, device: int) -> Plan:
    plan = _backward(call, complete, dy, dx, device, _largest(device))
    if plan.scan.kernel.runs(plan.scan.threads, plan.scan.more_shared):
        return plan
    return _backward(call, complete, dy, dx, device, nvrtc.PORTABLE)


def _backward(call: ScanCall, complete: bool, dy: Tensor | None, dx: Tensor, device: int, largest: int) -> Plan:
    seen, ddt = seen_by_routes(call, dy), ddt_like(call)
    more = [t for t in (seen, None if call.rank else ddt) if t is not None]
    how, view, parts = _way(call, complete, call.shared_x, True, dx, device, largest, *more)
    fields = backward_fields(call, view, seen, ddt)
    if how.whole_rows:
        for name, tensor in (("dB", call.B), ("dC", call.C)):
            fields |= strides(name, torch.empty_like(tensor, device="meta"))
    x, dt, B, C = types_of(call)
    ddt_type = "Float" if call.rank and call.states > 1 else dt
    types = (x, dt, B, C, TYPES[call.y_dtype])
    specialisation = few.backward(types, how, TYPES[view.dtype], ddt_type, kernels.sums(B, C))
    return _plan(specialisation, how, call, fields, parts, device)


def _way(
    call: ScanCall, complete: bool, wanted: bool, back: bool, result: Tensor, device: int, largest: int, *more: Tensor
) -> tuple[few.Few, Tensor, torch.dtype | None]:
    """How few sequences are taken, and the result or the routes' shares of it: in the cluster routes are added up, if
    that is `wanted`, where all visit every token and its shared memory holds their shares."""

    def chosen(merge: bool, out: Tensor) -> few.Few | None:
        ways = few.options(call, merge, largest, is_in_order(call), back, out, *more)
        return few.choose(call, ways, back, gpu.multiprocessors(device), nvrtc.shared_limit(device))

    together = wanted and call.routes > 1
    how = chosen(True, result) if together and complete else None
    if how is not None:
        return how, result.unsqueeze(2).expand(-1, -1, call.routes, -1), None
    parts = None
    if together:
        parts = parts_type(result)
        view = torch.empty(parts_shape(call, call.routes), dtype=parts, device="meta").transpose(1, 2)
    else:
        view = result.unsqueeze(2) if wanted else result
    how = chosen(False, view)
    assert how is not None, "`takes_call` has seen to it"
    return how, view, parts


def _plan(
    wanted: nvrtc.Specialisation,
    how: few.Few,
    call: ScanCall,
    fields: dict[str, int],
    parts: torch.dtype | None,
    device: int,
) -> Plan:
    fields |= dict(segments=few.saved(call)[2])
    launch = Launch.of(wanted, device, how.grid(call), HEADER, fields, 32 * how.warps, how.sum_shared(call.tokens))
    groups, shares = few.tiles(call) // how.together, how.rounds(call) if how.chain else how.span
    return Plan(
        launch, how.merge, parts, segments=shares, groups=groups, blocks=how.words(call), whole_rows=how.whole_rows
    )


def _largest(device: int) -> int:
    """Blocks that can be joined to a cluster."""
    capability = gpu.capability(device)
    return 2 * nvrtc.PORTABLE if capability in _LARGE else nvrtc.PORTABLE if capability >= (9, 0) else 1


_LARGE = ((9, 0), (10, 0))  # with larger clusters than any device with clusters promises
