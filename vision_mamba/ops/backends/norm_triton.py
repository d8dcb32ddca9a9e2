"""Norms of rows in Triton: one program takes some rows whole, so that a row is read once."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_mamba.ops.backends.triton import _on, _unavailable
from vision_mamba.ops.fused import Kernels, Tensors

MAX_WIDTH = 8192  # channels that a program's registers have room for


@triton.jit
def norm_forward(
    p_x, p_branch, p_weight, p_bias, p_y, p_total, rows, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    RMS: tl.constexpr, BRANCH: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_column = tl.arange(0, BLOCK)
    m_column = i_column < WIDTH
    mask = (i_row < rows)[:, None] & m_column[None, :]
    at = i_row[:, None] * WIDTH + i_column[None, :]
    b_x = tl.load(p_x + at, mask, 0.0)
    b_v = b_x.to(tl.float32)
    if BRANCH:
        b_total = (b_v + tl.load(p_branch + at, mask, 0.0).to(tl.float32)).to(b_x.dtype)
        tl.store(p_total + at, b_total, mask)
        b_v = b_total.to(tl.float32)
    if not RMS:
        b_v = tl.where(mask, b_v - (tl.sum(b_v, 1) / WIDTH)[:, None], 0.0)
    b_y = b_v * tl.rsqrt(tl.sum(b_v * b_v, 1) / WIDTH + eps)[:, None]
    b_y *= tl.load(p_weight + i_column, m_column, 0.0).to(tl.float32)[None, :]
    if BIAS:
        b_y += tl.load(p_bias + i_column, m_column, 0.0).to(tl.float32)[None, :]
    tl.store(p_y + at, b_y, mask)


@triton.jit
def norm_backward(
    p_x, p_weight, p_dy, p_dtotal, p_dx, p_dbranch, p_parts, rows, eps, programs,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    RMS: tl.constexpr, BRANCH: tl.constexpr, BIAS: tl.constexpr, DY: tl.constexpr, DTOTAL: tl.constexpr,
):  # fmt: skip
    """Each program takes every so many rows, and leaves its sums over them for weight and bias."""
    i_column = tl.arange(0, BLOCK)
    m_column = i_column < WIDTH
    b_weight = tl.load(p_weight + i_column, m_column, 0.0).to(tl.float32)[None, :]
    b_dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    b_dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for i_tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), programs):
        i_row = i_tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        mask = (i_row < rows)[:, None] & m_column[None, :]
        at = i_row[:, None] * WIDTH + i_column[None, :]
        b_dx = tl.zeros((ROWS, BLOCK), tl.float32)
        if DY:
            b_v = tl.load(p_x + at, mask, 0.0).to(tl.float32)
            b_dy = tl.load(p_dy + at, mask, 0.0).to(tl.float32)
            if not RMS:
                b_v = tl.where(mask, b_v - (tl.sum(b_v, 1) / WIDTH)[:, None], 0.0)
            b_rate = tl.rsqrt(tl.sum(b_v * b_v, 1) / WIDTH + eps)[:, None]
            b_v *= b_rate
            b_dweight += b_dy * b_v
            b_dbias += b_dy
            b_dv = b_dy * b_weight
            b_dx = b_dv - b_v * (tl.sum(b_dv * b_v, 1) / WIDTH)[:, None]
            if not RMS:
                b_dx -= (tl.sum(b_dv, 1) / WIDTH)[:, None]
            b_dx *= b_rate
        if DTOTAL:
            b_dx += tl.load(p_dtotal + at, mask, 0.0).to(tl.float32)
        tl.store(p_dx + at, b_dx, mask)
        if BRANCH:
            tl.store(p_dbranch + at, b_dx, mask)
    p_part = p_parts + tl.program_id(0) * 2 * WIDTH + i_column
    tl.store(p_part, tl.sum(b_dweight, 0), m_column)
    if BIAS:
        tl.store(p_part + WIDTH, tl.sum(b_dbias, 0), m_column)


class Tile(NamedTuple):
    """Columns and rows of a program, and its warps."""

    block: int
    rows: int
    warps: int


def tile(width: int, elements: int) -> Tile:
    """Rows so that a program holds about so many elements, 16 to a thread."""
    block = triton.next_power_of_2(width)
    rows = max(1, elements // block)
    return Tile(block, rows, max(1, min(16, rows * block // 512)))


@functools.cache
def _programs(device: torch.device, warps: int) -> int:
    if device.type != "cuda":  # the interpreter's
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count * max(1, 16 // warps)


def _refuses(tensors: Tensors, options: dict[str, Any]) -> bool:
    x, branch, *_ = tensors
    assert x is not None
    if _unavailable(x.device) is not None or x.numel() == 0 or not x.is_contiguous() or x.shape[-1] > MAX_WIDTH:
        return True
    if branch is not None and (branch.shape != x.shape or torch.promote_types(x.dtype, branch.dtype) != x.dtype):
        return True
    return any(t is not None and t.dtype == torch.float64 for t in tensors)


def _result_type(x: Tensor, options: dict[str, Any]) -> torch.dtype:
    if options["out_dtype"] is not None:
        return options["out_dtype"]
    return torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype


def _forward(tensors: Tensors, options: dict[str, Any]) -> tuple[tuple[Tensor, ...], Tensors]:
    x, branch, weight, bias = tensors
    assert x is not None and weight is not None
    width = x.shape[-1]
    rows = x.numel() // width
    y = torch.empty_like(x, dtype=_result_type(x, options))
    total = None if branch is None else torch.empty_like(x)
    block, many, warps = tile(width, 2048)
    with _on(x.device):
        norm_forward[((rows + many - 1) // many,)](
            x, None if branch is None else branch.contiguous(), weight, bias, y, total, rows, options["eps"],
            width, block, many, options["rms"], branch is not None, bias is not None, num_warps=warps,
        )  # fmt: skip
    if branch is None:
        return (y,), (x, weight, bias, None)
    # Of the branch, only its type is needed.
    return (y, total), (total, weight, bias, branch.new_empty(0))


def _backward(kept: Tensors, options: dict[str, Any], grads: Tensors) -> Tensors:
    x, weight, bias, branch = kept
    assert x is not None and weight is not None
    dy = None if grads[0] is None else grads[0].contiguous()
    dtotal = None if branch is None or grads[1] is None else grads[1].contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    dx = torch.empty_like(x)
    apart = branch is not None and branch.dtype != x.dtype
    dbranch = torch.empty_like(x, dtype=branch.dtype) if apart else None  # type: ignore[union-attr]
    block, many, warps = tile(width, 2048)
    programs = min(_programs(x.device, warps), (rows + many - 1) // many)
    parts = torch.empty((programs, 2, width), dtype=torch.float32, device=x.device)
    with _on(x.device):
        norm_backward[(programs,)](
            x, weight, dy, dtotal, dx, dbranch, parts, rows, options["eps"], programs,
            width, block, many, options["rms"], apart, bias is not None, dy is not None, dtotal is not None,
            num_warps=warps,
        )  # fmt: skip
    sums = parts.sum(0)
    dweight = sums[0].to(weight.dtype)
    dbias = None if bias is None else sums[1].to(bias.dtype)
    return dx, dx if branch is not None and not apart else dbranch, dweight, dbias


KERNELS = Kernels(_refuses, _forward, _backward)
