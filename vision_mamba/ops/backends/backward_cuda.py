"""The scan's backward pass on CUDA: room for the gradients and for what adds up to them, and the launches."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from vision_mamba.ops.backends import cuda_kernels as kernels
from vision_mamba.ops.backends import few_cuda as few
from vision_mamba.ops.backends import few_plans_cuda as few_plans
from vision_mamba.ops.backends import narrow_cuda as narrow
from vision_mamba.ops.backends import wave_cuda as wave
from vision_mamba.ops.backends import wide_cuda as wide
from vision_mamba.ops.backends.calls_cuda import as_taken, is_far, plan_key, rank_in_kernel, tokens_first
from vision_mamba.ops.backends.cuda_kernels import TYPES, vector
from vision_mamba.ops.backends.launch import Plans, on, whole
from vision_mamba.ops.backends.plans_cuda import Plan, new_edges, new_parts
from vision_mamba.ops.backends.shares_cuda import channel_sums, finish, merge
from vision_mamba.ops.call import GRADIENTS, ScanCall
from vision_mamba.ops.contract import visits_all

plans: Plans = Plans()


def backward(asked: ScanCall, saved: Tensor, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    device = asked.x.device.index
    with on(device):
        call = as_taken(asked)
        batch, tokens, routes, channels, states = call.batch, call.tokens, call.routes, call.channels, call.states
        dy = None if dy is None else dy.to(call.y_dtype)
        # Where rows of x are read number by number, so are those of dy.
        as_it_lies = few.takes_call(call, back=True) or (states > 1 and tokens_first(call))
        aligned = dy is None or (dy.stride(-1) == 1 and dy.data_ptr() % 16 == 0 and (states > 1 or vector(8, dy)))
        if dy is not None and (is_far(dy) or not (aligned or as_it_lies)):
            dy = dy.contiguous()
        dlast = None if dlast is None else whole(dlast)
        dx = torch.empty_like(call.x)
        complete = visits_all(asked)
        key = (plan_key(call, complete), None if dy is None else (dy.stride(), dy.data_ptr() & 15))
        plan = plans.get(key)
        if plan is None:
            plan = plans[key] = _plan(call, complete, dy, dx, device)
        target = dx if plan.parts is None else new_parts(call, plan)
        products = call.rank > 0 and rank_in_kernel(call)
        blocks = plan.groups
        shares = batch // plan.items * plan.segments
        single = states == 1
        if products and not single:
            ddt = call.dt.new_empty((batch, tokens, routes, blocks, call.rank), dtype=torch.float32)
        elif products:
            ddt = call.dt.new_empty((blocks, batch, tokens, routes, call.rank))
        elif call.rank:
            ddt = call.dt.new_empty((batch, tokens, routes, channels), dtype=torch.float32)
        else:
            ddt = torch.empty_like(call.dt)
        new = functools.partial(call.x.new_empty, dtype=torch.float32)
        in_pairs = single and not plan.whole_rows  # dB and dC
        if plan.whole_rows:
            rows: tuple[Tensor, ...] = (torch.empty_like(call.B), torch.empty_like(call.C))
        elif in_pairs:
            rows = (new((blocks, batch, routes, call.steps, 2)),)
        else:
            rows = new((2, batch, tokens, routes, blocks, states), dtype=_type_of_rows(call)).unbind()
        dinitial = None if call.initial_state is None else torch.empty_like(call.initial_state)
        parts = channel_sums(call, shares, call.rank if products else 0)
        parts |= dict(dBC=rows[0]) if in_pairs else dict(dB=rows[0], dC=rows[1])
        # A single share of what has the result's type is the result.
        done = plan.whole_rows or (not single and blocks == 1 and call.B.dtype == call.C.dtype == rows[0].dtype)
        if not complete:
            for tensor in (ddt, *((target,) if not plan.merging else ()), *(() if in_pairs else rows)):
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
        sums = parts
        if plan.rows:
            addresses["rows"] = new(plan.rows, dtype=_type_of_rows(call))
            if shares > 1:
                sums = parts | channel_sums(call, 1, 0)
                shares, addresses["sum_channels"] = 1, sums["dA"]
        if plan.edges is not None:
            addresses |= new_edges(call, plan.segments)
            plan.edges(device, **addresses)
        plan.scan(device, **addresses)
        if plan.parts is not None:
            merge(target, dx, plan.first)
        del target, addresses  # the routes' shares make room for what follows

        found: dict[str, Tensor | None] = dict(x=dx, dt=ddt, initial_state=dinitial)
        found |= finish(call, complete, shares, blocks, sums, ddt if products else None, done)
        if done:
            found |= dict(zip("BC", rows if plan.whole_rows else (row[:, :, :, 0] for row in rows), strict=True))
        del parts, sums, rows
        if asked.dt_weight is not None and not products:
            low_rank, weight = asked.dt.to(torch.float32), asked.dt_weight.to(torch.float32)
            found["dt"] = torch.einsum("blkd,kdr->blkr", ddt, weight)
            found["dt_weight"] = torch.einsum("blkd,blkr->kdr", ddt, low_rank)
        return tuple(_like(found.get(name), getattr(asked, name)) for name in GRADIENTS)


def _type_of_rows(call: ScanCall) -> torch.dtype:
    """Of blocks' shares of the gradients of B and C."""
    half = kernels.sums(TYPES[call.B.dtype], TYPES[call.C.dtype]) == "Bfloat"
    return torch.bfloat16 if half else torch.float32


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


def _plan(call: ScanCall, complete: bool, dy: Tensor | None, dx: Tensor, device: int) -> Plan:
    if few.takes_call(call, back=True):
        return few_plans.backward(call, complete, dy, dx, device)
    plan = wave.backward(call, dy, dx, device)
    if plan is not None:
        return plan
    kind = wide if call.states > 1 else narrow
    return kind.backward(call, complete, dy, dx, device)
