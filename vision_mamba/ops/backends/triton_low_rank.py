"""A step size of low rank in Triton: dt = low dt_weight^T for every token and route, and the gradients of both factors.

The scan itself multiplies out a low rank where it is small (triton_kernels.py); else dt is multiplied out before it, in
float32. The gradient of all of dt, which the scan leaves, is multiplied back after it in either case. Grid: one program
= ROWS tokens of the batch, one route and BLOCK_D channels; back, a chunk of such tiles, each read one ahead, whose
sum of weights' gradients stays in registers. A float32 goes to the tensor cores in several terms. Sums over chunks, and
over blocks of channels, are written as shares and added up in a fixed order.
"""

import triton
import triton.language as tl

from vision_mamba.ops.backends.triton_kernels import _follow, _halved, _load_weight


@triton.jit
def _offsets(o_row, tokens, s_b, s_l, FLAT: tl.constexpr):
    """(ROWS, 1): where rows, which are tokens of the batch, begin; FLAT if those of all items are evenly spaced."""
    o_row = o_row.to(tl.int64)
    return (o_row * s_l if FLAT else (o_row // tokens) * s_b + (o_row % tokens) * s_l)[:, None]


@triton.jit
def _products_back(b_ddt, b_rest, b_low, b_weight, PRECISION: tl.constexpr):
    """The gradients of columns, (ROWS, BLOCK_R), and of weights, (BLOCK_R, BLOCK_D).

    Beside bfloat16 a float32 is two terms of it, 16 bits, as which b_ddt may come, with b_rest; a sum of many is closer
    than each. What is added up further is transposed, so that the compiler does not do that in the tensor cores, which
    cut off instead of rounding.
    """
    if PRECISION == "ieee" or b_low.dtype != tl.bfloat16:
        b_dlow = tl.dot(b_ddt, tl.trans(b_weight), input_precision=PRECISION)
        return b_dlow, tl.trans(tl.dot(tl.trans(b_ddt), b_low.to(tl.float32), input_precision=PRECISION))
    else:
        if b_ddt.dtype == tl.float32:
            b_ddt, b_rest = _halved(b_ddt)
        b_weight_high, b_weight_rest = _halved(b_weight)
        b_dlow = tl.dot(b_rest, tl.trans(b_weight_high))
        b_dlow = tl.dot(b_ddt, tl.trans(b_weight_rest), b_dlow)
        b_dlow = tl.dot(b_ddt, tl.trans(b_weight_high), b_dlow)
        b_dweight = tl.dot(tl.trans(b_rest), b_low)
        return b_dlow, tl.trans(tl.dot(tl.trans(b_ddt), b_low, b_dweight))


@triton.jit
def multiply_out(
    p_low,
    p_weight,  # (K, D, R)
    p_dt,  # (B, L, K, D)
    rows,
    tokens,
    channels,
    rank,
    s_b,
    s_l,
    s_k,
    s_r,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
):
    i_k, routes = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    o_row, o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_R)
    o_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_row, m_r, m_d = o_row < rows, o_r < rank, o_d < channels
    p_low += i_k * s_k + _offsets(o_row, tokens, s_b, s_l, FLAT) + o_r[None, :] * s_r
    b_low = tl.load(p_low, mask=m_row[:, None] & m_r[None, :], other=0.0).to(tl.float32)
    b_weight = _load_weight(p_weight, i_k, channels, rank, o_d, o_r, m_d, m_r)
    # (ROWS, BLOCK_D)
    b_dt = tl.dot(b_low, b_weight, input_precision=PRECISION)
    p_dt += ((o_row.to(tl.int64) * routes + i_k) * channels)[:, None] + o_d[None, :]
    tl.store(p_dt, b_dt, mask=m_row[:, None] & m_d[None, :])


@triton.jit
def multiply_back(
    p_ddt,  # (B, L, K, D), HALVED (B, L, K, 2, D)
    p_low,
    p_weight,  # (K, D, R)
    p_dlow,  # a share of each block of channels
    p_dweight,  # (chunks, K, D, R)
    rows,
    tokens,
    channels,
    rank,
    s_b,
    s_l,
    s_k,
    s_r,
    s_dp,
    s_db,
    s_dl,
    s_dk,
    s_dr,
    tiles,  # of a chunk
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
    HALVED: tl.constexpr,
    STAGES: tl.constexpr,  # tiles that are loaded or multiplied at a time
    FOLLOWS: tl.constexpr,
):
    _follow(FOLLOWS)
    i_chunk, i_k, routes = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first, end = i_chunk * tiles * ROWS, tl.minimum((i_chunk + 1) * tiles * ROWS, rows)
    o_t, o_r = tl.arange(0, ROWS), tl.arange(0, BLOCK_R)
    o_d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_r, m_d = (o_r < rank)[None, :], (o_d < channels)[None, :]
    p_low += i_k * s_k
    p_dlow += tl.program_id(2).to(tl.int64) * s_dp + i_k * s_dk
    width = channels * (2 if HALVED else 1)
    p_ddt += (first.to(tl.int64) * routes + i_k) * width
    o_ddt = o_t[:, None] * (routes * width) + o_d[None, :]
    b_weight = _load_weight(p_weight, i_k, channels, rank, o_d, o_r, o_d < channels, o_r < rank)
    b_dweight = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for _ in tl.range(0, tiles, num_stages=STAGES):
        # (ROWS, BLOCK_R), (ROWS, BLOCK_D)
        o_row = first + o_t
        m_row = (o_row < end)[:, None]
        o_low = _offsets(o_row, tokens, s_b, s_l, FLAT) + o_r[None, :] * s_r
        b_low = tl.load(p_low + o_low, mask=m_row & m_r, other=0.0)
        b_ddt = tl.load(p_ddt + o_ddt, mask=m_row & m_d, other=0.0)
        b_rest = tl.load(p_ddt + channels + o_ddt, mask=m_row & m_d, other=0.0) if HALVED else b_ddt
        b_dlow, b_product = _products_back(b_ddt, b_rest, b_low, b_weight, PRECISION)
        b_dweight += b_product
        o_low = _offsets(o_row, tokens, s_db, s_dl, FLAT) + o_r[None, :] * s_dr
        tl.store(p_dlow + o_low, b_dlow, mask=m_row & m_r)
        first += ROWS
        p_ddt += ROWS * routes.to(tl.int64) * width
    p_dweight += (i_chunk * routes + i_k) * channels * rank
    o_weight = o_d[None, :] * rank + o_r[:, None]
    tl.store(p_dweight + o_weight, b_dweight, mask=(o_r < rank)[:, None] & m_d)
