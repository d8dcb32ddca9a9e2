"""The floor under a scan on a GPU: what its bytes and its exponentials take at the rates measured on this very device.

A scan must read its inputs and write its results once, and must take one exponential a state and step; a backward pass
needs those again, since keeping them would cost more bytes than anything else. Everything beyond that is the kernel's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vision_mamba.ops.call import ScanCall

_COPIED = 2**31  # bytes


def floor_ms(call: ScanCall, which: str) -> dict[str, float]:
    """Milliseconds for the bytes and for the exponentials of a pass ("fwd", "bwd", "fwdbwd") of a call on a GPU."""
    read = sum(map(_bytes, (call.x, call.dt, call.B, call.C)))
    y = call.batch * call.tokens * call.channels * (1 if call.merge else call.routes) * call.y_dtype.itemsize
    exponentials = call.batch * call.steps * call.routes * call.channels * call.states
    # Backward reads what forward read and dy, and writes a gradient for each input.
    moved = {"fwd": read + y, "bwd": 2 * read + y}
    passes = [which] if which in moved else ["fwd", "bwd"]
    device = call.x.device
    found = {
        "bytes": sum(moved[one] for one in passes) / copied_bytes_per_ms(device),
        "exponentials": len(passes) * exponentials / exponentials_per_ms(device),
    }
    return {name: round(ms, 4) for name, ms in found.items()}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@functools.cache
def copied_bytes_per_ms(device: torch.device) -> float:
    """Bytes read and written in a millisecond of a large copy."""
    source = torch.empty(_COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED / _best_ms(lambda: target.copy_(source))


@functools.cache
def exponentials_per_ms(device: torch.device) -> float:
    """exp2 in a millisecond where nothing else is done, of all special-function units."""
    import triton
    import triton.language as tl

    @triton.jit
    def exponentials(p_out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
        o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        b = o.to(tl.float32) * 1e-9
        for _ in range(ROUNDS):
            b = tl.exp2(b)  # grows to infinity, at the same speed
        tl.store(p_out + o, b)

    rounds, block, grid = 4096, 2048, 16 * torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(grid * block, device=device)
    return rounds * block * grid / _best_ms(lambda: exponentials[(grid,)](out, ROUNDS=rounds, BLOCK=block, num_warps=4))


def _best_ms(work: Callable[[], Any]) -> float:
    times = list[float]()
    for _ in range(8):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)
