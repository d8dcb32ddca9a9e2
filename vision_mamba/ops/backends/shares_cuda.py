"""What the scan's kernels leave in shares, added up in order: routes into a result, blocks' sums into gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vision_mamba.ops.backends import cuda_kernels as kernels
from vision_mamba.ops.backends.cuda_kernels import TYPES
from vision_mamba.ops.backends.launch import Launch, Plans
from vision_mamba.ops.backends.plans_cuda import HEADER
from vision_mamba.ops.call import ScanCall

_merges: Plans = Plans()
_finishes: Plans = Plans()


def merger(parts: Tensor, out: Tensor, add: bool) -> Callable[[int, int, Tensor], None]:
    """A function of a stream, the address of parts, and out: out[b, l, d] = sum over k of parts[b, k, l, d], in order
    of k, and if `add` after what is in out."""
    device, in_order = out.device.index, out.is_contiguous()
    batch, routes, tokens, channels = parts.shape
    run = next(n for n in (8, 4, 2, 1) if channels % n == 0)
    fields = dict(batch=batch, tokens=tokens, routes=routes, channels=channels)
    grid = (batch * tokens * (channels // run) + 255) // 256
    wanted = kernels.merge(TYPES[parts.dtype], TYPES[out.dtype], run, add)
    launch = Launch.of(wanted, device, grid, HEADER, fields).ready(("x", "y"))

    def merge(stream: int, parts: int, out: Tensor) -> None:
        if in_order:
            launch(stream, (parts, out.data_ptr()))
            return
        result = torch.empty_like(out, memory_format=torch.contiguous_format)
        launch(stream, (parts, result.data_ptr()))
        out.copy_(result)

    return merge


def merge(parts: Tensor, out: Tensor, add: bool) -> None:
    key = (out.device.index, parts.shape, parts.dtype, out.dtype, out.is_contiguous(), add)
    merge = _merges.get(key)
    if merge is None:
        merge = _merges[key] = merger(parts, out, add)
    merge(torch._C._cuda_getCurrentRawStream(out.device.index), parts.data_ptr(), out)


def channel_sums(call: ScanCall, shares: int, rank: int) -> dict[str, Tensor | None]:
    """Room in one piece for what a backward pass sums up by channels, so many shares of each."""
    shape = (shares, call.routes, call.channels)
    widths = dict(dA=call.states, dD=1, ddt_bias=1, ddt_weight=rank)
    room = call.A.new_empty(sum(widths.values()) * math.prod(shape))
    pieces = room.split([width * math.prod(shape) for width in widths.values()])
    shaped = dict(zip(widths, pieces, strict=True))
    return dict(
        dA=shaped["dA"].view(*shape, call.states), dD=shaped["dD"].view(shape), ddt_bias=shaped["ddt_bias"].view(shape),
        ddt_weight=shaped["ddt_weight"].view(*shape, rank) if rank else None,
    )  # fmt: skip


def finish(
    call: ScanCall,
    complete: bool,
    shares: int,
    tiles: int,
    parts: dict[str, Tensor | None],
    ddt: Tensor | None,
    done: bool,
) -> dict[str, Tensor | None]:
    """The sums of what a backward kernel left in parts, in one launch if there are any; see csrc/cuda/finish.cuh.
    `done`: dB and dC are sums already."""
    device, rank = call.x.device.index, 0 if ddt is None else call.rank
    batch, tokens, routes, channels, states = call.batch, call.tokens, call.routes, call.channels, call.states
    dB, dC = (None if done else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (call.B, call.C))
    if dB is not None and dC is not None and not complete and states == 1:
        dB.zero_(), dC.zero_()
    sum_ddt = None if ddt is None else call.dt.new_empty(call.dt.shape)
    # A single share is the sum.
    by_channel = parts if shares == 1 else channel_sums(call, 1, rank)
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
    if key not in _finishes:
        rows = batch * tokens * routes
        run = next(n for n in (8, 4, 2, 1) if (rows * rank if states == 1 else rank) % n == 0)
        state_run = 1 if states == 1 else next(n for n in (8, 4, 2, 1) if states % n == 0)
        of_states = [batch * routes * call.steps] if states == 1 else 2 * [rows * states // state_run]
        of_states = [] if done else of_states  # they come last
        fields = dict(batch=batch, tokens=tokens, routes=routes, channels=channels, steps=call.steps, tiles=tiles)
        types = (TYPES[call.dt.dtype], TYPES[call.B.dtype], TYPES[call.C.dtype])
        wanted = kernels.finish(types, states, rank, run)
        of_channels = 0 if shares == 1 else routes * channels * (states + 2 + rank)
        grid = sum((count + 255) // 256 for count in (of_channels, rows * rank // run, *of_states))
        _finishes[key] = Launch.of(wanted, device, grid, HEADER, fields | dict(shares=shares)) if grid else None
    launch = _finishes[key]
    if launch is not None:
        begin = None if shares == 1 else by_channel["dA"]
        launch(
            device, indices=call.indices, ddt=ddt, sum_dB=dB, sum_dC=dC, sum_ddt=sum_ddt, sum_channels=begin, **parts
        )
    names = dict(A="dA", D="dD", dt_bias="ddt_bias", dt_weight="ddt_weight")
    sums = {name: by_channel[part] for name, part in names.items()}
    found: dict[str, Tensor | None] = {name: None if t is None else t[0] for name, t in sums.items()}
    found |= dict(B=dB, C=dC)
    return found if ddt is None else found | dict(dt=sum_ddt)
