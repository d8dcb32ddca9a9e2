"""The convolution before Vim's scan, both ways in one read, and the gate behind it, in Triton."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vision_mamba.ops.backends.norm_triton import _programs
from vision_mamba.ops.backends.triton import _on, _unavailable
from vision_mamba.ops.fused import Kernels, Tensors

TAPS = 4  # fewer are filled up with zeros
TILE = (8, 64, 4)  # tokens, channels and warps of a program
GATE_RUN = 1024  # elements of a program of the gate


@triton.jit
def _silu(b_v):
    return b_v / (1.0 + tl.exp(-b_v))


@triton.jit
def _silu_slope(b_v):
    b_s = 1.0 / (1.0 + tl.exp(-b_v))
    return b_s * (1.0 + b_v * (1.0 - b_s))


@triton.jit
def _column(p_from, o_channel, m_channel, stride):
    return tl.load(p_from + o_channel * stride, m_channel, 0.0).to(tl.float32)[None, :]


@triton.jit
def _seen(p_x, o_token, s_xl, length, m_channel):
    """The tokens there, zeros where there are none."""
    mask = ((o_token >= 0) & (o_token < length))[:, None] & m_channel[None, :]
    return tl.load(p_x + o_token.to(tl.int64)[:, None] * s_xl, mask, 0.0).to(tl.float32)


@triton.jit
def conv_forward(
    p_x, p_weight, p_bias, p_y, length, channels, s_xb, s_xl, TOKENS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Each program takes a run of tokens of one item and a run of channels."""
    tiles = tl.cdiv(length, TOKENS)
    i_batch = (tl.program_id(0) // tiles).to(tl.int64)
    o_token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    o_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_channel = o_channel < channels
    p_from = p_x + i_batch * s_xb + o_channel[None, :]
    p_w0 = p_weight
    p_w1 = p_weight + 4 * channels
    b_y0 = tl.zeros((TOKENS, CHANNELS), tl.float32) + _column(p_bias, o_channel, m_channel, 1)
    b_y1 = tl.zeros((TOKENS, CHANNELS), tl.float32) + _column(p_bias + channels, o_channel, m_channel, 1)
    for i in tl.static_range(7):
        b_x = _seen(p_from, o_token + (i - 3), s_xl, length, m_channel)
        if i < 4:
            b_y0 += _column(p_w0 + i, o_channel, m_channel, 4) * b_x
        if i > 2:
            b_y1 += _column(p_w1 + (6 - i), o_channel, m_channel, 4) * b_x
    mask = (o_token < length)[:, None] & m_channel[None, :]
    p_to = p_y + (i_batch * length + o_token)[:, None] * 2 * channels + o_channel[None, :]
    tl.store(p_to, _silu(b_y0), mask)
    tl.store(p_to + channels, _silu(b_y1), mask)


@triton.jit
def _before_silu(b_bias, b_w0, b_w1, b_w2, b_w3, b_x0, b_x1, b_x2, b_x3):
    return b_bias + b_w0 * b_x0 + b_w1 * b_x1 + b_w2 * b_x2 + b_w3 * b_x3


@triton.jit
def conv_backward(
    p_x, p_weight, p_bias, p_dy, p_dx, p_parts, batch, length, channels, s_xb, s_xl, programs,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx_t = sum_d w_0(3-d) g_{t+d,0} + w_1(3-d) g_{t-d,1}, g being the gradient before SiLU.

    The four results of either way that see a token see, all together, seven tokens; so those are read once and the
    results computed again. Each program takes every so many runs of tokens, of one run of channels, and leaves its sums
    for weight and bias: (programs, 16, channels), of which rows 0 to 4 and 8 to 12 are taps and bias of either way.
    """
    tiles = tl.cdiv(length, TOKENS)
    o_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_channel = o_channel < channels
    p_w1 = p_weight + 4 * channels
    b_bias0 = _column(p_bias, o_channel, m_channel, 1)
    b_bias1 = _column(p_bias + channels, o_channel, m_channel, 1)
    b_w00 = _column(p_weight, o_channel, m_channel, 4)
    b_w01 = _column(p_weight + 1, o_channel, m_channel, 4)
    b_w02 = _column(p_weight + 2, o_channel, m_channel, 4)
    b_w03 = _column(p_weight + 3, o_channel, m_channel, 4)
    b_w10 = _column(p_w1, o_channel, m_channel, 4)
    b_w11 = _column(p_w1 + 1, o_channel, m_channel, 4)
    b_w12 = _column(p_w1 + 2, o_channel, m_channel, 4)
    b_w13 = _column(p_w1 + 3, o_channel, m_channel, 4)
    i_sum = tl.arange(0, 16)[:, None]
    b_sums = tl.zeros((16, CHANNELS), tl.float32)
    for i_tile in range(tl.program_id(0), batch * tiles, programs):
        i_batch = i_tile // tiles + tl.zeros((1,), tl.int64)
        o_t = i_tile % tiles * TOKENS + tl.arange(0, TOKENS)
        p_from = p_x + i_batch * s_xb + o_channel[None, :]
        b_x0 = _seen(p_from, o_t - 3, s_xl, length, m_channel)
        b_x1 = _seen(p_from, o_t - 2, s_xl, length, m_channel)
        b_x2 = _seen(p_from, o_t - 1, s_xl, length, m_channel)
        b_x3 = _seen(p_from, o_t, s_xl, length, m_channel)
        b_x4 = _seen(p_from, o_t + 1, s_xl, length, m_channel)
        b_x5 = _seen(p_from, o_t + 2, s_xl, length, m_channel)
        b_x6 = _seen(p_from, o_t + 3, s_xl, length, m_channel)
        p_g0 = p_dy + i_batch * length * 2 * channels + o_channel[None, :]
        p_g1 = p_g0 + channels
        # The first way, results at this token and the next three.
        b_g = _seen(p_g0, o_t, 2 * channels, length, m_channel)
        b_g *= _silu_slope(_before_silu(b_bias0, b_w00, b_w01, b_w02, b_w03, b_x0, b_x1, b_x2, b_x3))
        b_dx = b_w03 * b_g
        b_sums += tl.where(i_sum == 0, tl.sum(b_g * b_x0, 0)[None, :], 0.0)
        b_sums += tl.where(i_sum == 1, tl.sum(b_g * b_x1, 0)[None, :], 0.0)
        b_sums += tl.where(i_sum == 2, tl.sum(b_g * b_x2, 0)[None, :], 0.0)
        b_sums += tl.where(i_sum == 3, tl.sum(b_g * b_x3, 0)[None, :], 0.0)
        b_sums += tl.where(i_sum == 4, tl.sum(b_g, 0)[None, :], 0.0)
        b_g = _seen(p_g0, o_t + 1, 2 * channels, length, m_channel)
        b_dx += b_w02 * b_g * _silu_slope(_before_silu(b_bias0, b_w00, b_w01, b_w02, b_w03, b_x1, b_x2, b_x3, b_x4))
        b_g = _seen(p_g0, o_t + 2, 2 * channels, length, m_channel)
        b_dx += b_w01 * b_g * _silu_slope(_before_silu(b_bias0, b_w00, b_w01, b_w02, b_w03, b_x2, b_x3, b_x4, b_x5))
        b_g = _seen(p_g0, o_t + 3, 2 * channels, length, m_channel)
        b_dx += b_w00 * b_g * _silu_slope(_before_silu(b_bias0, b_w00, b_w01, b_w02, b_w03, b_x3, b_x4, b_x5, b_x6))
        # The second, at this token and the three before it.
        b_g = _seen(p_g1, o_t, 2 * channels, length, m_channel)
        b_g *= _silu_slope(_before_silu(b_bias1, b_w10, b_w11, b_w12, b_w13, b_x6, b_x5, b_x4, b_x3))
        b_dx += b_w13 * b_g
        b_sums += tl.where(i_sum == 8, tl.sum(b_g * b_x6, 0)[None, :], 0.0)
        b_sums += tl.where(i_sum == 9, tl.sum(b_g * b_x5, 0)[None, :], 0.0)
        b_sums += tl.where(i_sum == 10, tl.sum(b_g * b_x4, 0)[None, :], 0.0)
        b_sums += tl.where(i_sum == 11, tl.sum(b_g * b_x3, 0)[None, :], 0.0)
        b_sums += tl.where(i_sum == 12, tl.sum(b_g, 0)[None, :], 0.0)
        b_g = _seen(p_g1, o_t - 1, 2 * channels, length, m_channel)
        b_dx += b_w12 * b_g * _silu_slope(_before_silu(b_bias1, b_w10, b_w11, b_w12, b_w13, b_x5, b_x4, b_x3, b_x2))
        b_g = _seen(p_g1, o_t - 2, 2 * channels, length, m_channel)
        b_dx += b_w11 * b_g * _silu_slope(_before_silu(b_bias1, b_w10, b_w11, b_w12, b_w13, b_x4, b_x3, b_x2, b_x1))
        b_g = _seen(p_g1, o_t - 3, 2 * channels, length, m_channel)
        b_dx += b_w10 * b_g * _silu_slope(_before_silu(b_bias1, b_w10, b_w11, b_w12, b_w13, b_x3, b_x2, b_x1, b_x0))
        mask = (o_t < length)[:, None] & m_channel[None, :]
        tl.store(p_dx + (i_batch * length + o_t)[:, None] * channels + o_channel[None, :], b_dx, mask)
    p_part = p_parts + (tl.program_id(0) * 16 + i_sum) * channels + o_channel[None, :]
    tl.store(p_part, b_sums, (i_sum >= 0) & m_channel[None, :])


@triton.jit
def gate_forward(p_y, p_z, p_out, rows, channels, s_yr, s_zr, RUN: tl.constexpr):
    i_run = tl.program_id(0).to(tl.int64) * RUN + tl.arange(0, RUN)
    mask = i_run < rows * channels
    i_row = i_run // channels
    o_channel = i_run % channels
    b_y = tl.load(p_y + i_row * s_yr + o_channel, mask, 0.0).to(tl.float32)
    b_z = tl.load(p_z + i_row * s_zr + o_channel, mask, 0.0).to(tl.float32)
    tl.store(p_out + i_run, b_y * _silu(b_z), mask)


@triton.jit
def gate_backward(p_y, p_z, p_dout, p_dy, p_dz, rows, channels, s_yr, s_zr, RUN: tl.constexpr):
    i_run = tl.program_id(0).to(tl.int64) * RUN + tl.arange(0, RUN)
    mask = i_run < rows * channels
    i_row = i_run // channels
    o_channel = i_run % channels
    b_y = tl.load(p_y + i_row * s_yr + o_channel, mask, 0.0).to(tl.float32)
    b_z = tl.load(p_z + i_row * s_zr + o_channel, mask, 0.0).to(tl.float32)
    b_dout = tl.load(p_dout + i_run, mask, 0.0).to(tl.float32)
    tl.store(p_dy + i_run, b_dout * _silu(b_z), mask)
    tl.store(p_dz + i_run, b_dout * b_y * _silu_slope(b_z), mask)


def _unfit(*tensors: Tensor | None) -> bool:
    """Whether kernels cannot take these: no Triton, nothing to do, no room for indices, or float64."""
    first = tensors[0]
    assert first is not None
    if _unavailable(first.device) is not None or first.numel() == 0:
        return True
    return any(t is not None and t.dtype == torch.float64 for t in tensors)


def _refuses_conv(tensors: Tensors, options: dict[str, Any]) -> bool:
    x, weight, _ = tensors
    assert x is not None and weight is not None
    return _unfit(*tensors) or weight.shape[2] > TAPS or x.stride(2) != 1


def _filled(weight: Tensor) -> Tensor:
    return F.pad(weight, (TAPS - weight.shape[2], 0)).contiguous()


def _conv_forward(tensors: Tensors, options: dict[str, Any]) -> tuple[tuple[Tensor, ...], Tensors]:
    x, weight, bias = tensors
    assert x is not None and weight is not None and bias is not None
    batch, length, channels = x.shape
    tokens, many, warps = TILE
    y = x.new_empty(batch, length, 2, channels)
    # Tiles of tokens are on the grid's first axis, which alone may be long.
    grid = (batch * ((length + tokens - 1) // tokens), (channels + many - 1) // many)
    with _on(x.device):
        conv_forward[grid](
            x, _filled(weight), bias.contiguous(), y, length, channels, x.stride(0), x.stride(1), tokens, many,
            num_warps=warps,
        )  # fmt: skip
    return (y,), (x, weight, bias)


def _conv_backward(kept: Tensors, options: dict[str, Any], grads: Tensors) -> Tensors:
    (dy,), (x, weight, bias) = grads, kept
    assert x is not None and weight is not None and bias is not None and dy is not None
    batch, length, channels = x.shape
    tokens, many, warps = TILE
    blocks = (channels + many - 1) // many
    programs = max(1, min(batch * ((length + tokens - 1) // tokens), _programs(x.device, warps) // blocks))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = torch.empty((programs, 2, 8, channels), dtype=torch.float32, device=x.device)
    with _on(x.device):
        conv_backward[(programs, blocks)](
            x, _filled(weight), bias.contiguous(), dy.contiguous(), dx, parts, batch, length, channels, x.stride(0),
            x.stride(1), programs, tokens, many, num_warps=warps,
        )  # fmt: skip
    sums = parts.sum(0)
    return dx, sums[:, TAPS - weight.shape[2] : TAPS].transpose(1, 2).to(weight.dtype), sums[:, TAPS].to(bias.dtype)


def _refuses_gate(tensors: Tensors, options: dict[str, Any]) -> bool:
    y, z = tensors
    assert y is not None and z is not None
    return _unfit(y, z) or y.shape != z.shape or y.dim() != 3 or not (_in_rows(y) and _in_rows(z))


def _in_rows(t: Tensor) -> bool:
    """Whether all rows of channels lie equally far apart."""
    return t.stride(2) == 1 and t.stride(0) == t.shape[1] * t.stride(1)


def _gate_forward(tensors: Tensors, options: dict[str, Any]) -> tuple[tuple[Tensor, ...], Tensors]:
    y, z = tensors
    assert y is not None and z is not None
    out = y.new_empty(y.shape, dtype=torch.promote_types(y.dtype, z.dtype))
    rows, channels = out.numel() // out.shape[2], out.shape[2]
    with _on(y.device):
        gate_forward[((out.numel() + GATE_RUN - 1) // GATE_RUN,)](
            y, z, out, rows, channels, y.stride(1), z.stride(1), GATE_RUN, num_warps=4
        )
    return (out,), (y, z)


def _gate_backward(kept: Tensors, options: dict[str, Any], grads: Tensors) -> Tensors:
    (dout,), (y, z) = grads, kept
    assert y is not None and z is not None and dout is not None
    dout = dout.contiguous()
    dy, dz = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (y, z))
    rows, channels = dout.numel() // dout.shape[2], dout.shape[2]
    with _on(y.device):
        gate_backward[((dout.numel() + GATE_RUN - 1) // GATE_RUN,)](
            y, z, dout, dy, dz, rows, channels, y.stride(1), z.stride(1), GATE_RUN, num_warps=4
        )
    return dy, dz


CONV_BOTH_WAYS = Kernels(_refuses_conv, _conv_forward, _conv_backward)
GATED = Kernels(_refuses_gate, _gate_forward, _gate_backward)
