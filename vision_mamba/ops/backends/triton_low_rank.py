"""A step size of low rank in Triton: dt = low dt_weight^T for every token and route, and the gradients of both factors.

The scan itself takes low rank where it is small (triton_kernels.py); else dt is multiplied out before it, in float32.
The gradient of all of dt, which the scan leaves, is multiplied back after it. Grid: one program = ROWS tokens of one
route, BLOCK_D channels at a time. A float32 goes to the tensor cores in several terms. Sums over tokens are written
as one share a program and added up by the host in a fixed order.
"""

import triton
import triton.language as tl

from vision_mamba.ops.backends.triton_kernels import _load_weight


@triton.jit
def _load_low(p_low, o_row, m_row, o_r, m_r, tokens, s_b, s_l, s_r):
    # (ROWS, BLOCK_R); a row is a token of the batch
    o_low = (o_row // tokens) * s_b + (o_row % tokens) * s_l
    return tl.load(p_low + o_low[:, None] + o_r[None, :] * s_r, mask=m_row[:, None] & m_r[None, :], other=0.0)


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
):
    i_k, routes = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    o_row, o_r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_R)
    m_row, m_r = o_row < rows, o_r < rank
    b_low = _load_low(p_low + i_k * s_k, o_row, m_row, o_r, m_r, tokens, s_b, s_l, s_r).to(tl.float32)
    p_dt += ((o_row * routes + i_k) * channels)[:, None]
    for start in range(0, channels, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < channels
        b_weight = _load_weight(p_weight, i_k, channels, rank, o_d, o_r, m_d, m_r)
        # (ROWS, BLOCK_D)
        b_dt = tl.dot(b_low, b_weight, input_precision=PRECISION)
        tl.store(p_dt + o_d[None, :], b_dt, mask=m_row[:, None] & m_d[None, :])


@triton.jit
def multiply_back(
    p_ddt,  # (B, L, K, D)
    p_low,
    p_weight,  # (K, D, R)
    p_dlow,
    p_dweight,  # (programs, K, D, R)
    rows,
    tokens,
    channels,
    rank,
    s_b,
    s_l,
    s_k,
    s_r,
    s_db,
    s_dl,
    s_dk,
    s_dr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    PRECISION_LOW: tl.constexpr,  # of the gradient of the columns
):
    i_program, i_k, routes = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    o_row, o_r = i_program * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_R)
    m_row, m_r = o_row < rows, o_r < rank
    b_low = _load_low(p_low + i_k * s_k, o_row, m_row, o_r, m_r, tokens, s_b, s_l, s_r).to(tl.float32)
    p_ddt += ((o_row * routes + i_k) * channels)[:, None]
    p_dweight += (i_program * routes + i_k) * channels * rank
    b_dlow = tl.zeros((ROWS, BLOCK_R), tl.float32)
    for start in range(0, channels, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < channels
        b_weight = _load_weight(p_weight, i_k, channels, rank, o_d, o_r, m_d, m_r)
        # (ROWS, BLOCK_D)
        b_ddt = tl.load(p_ddt + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0)
        # Transposed, so that the compiler does not add up in the tensor cores, which cut off what should be rounded.
        b_dlow += tl.trans(tl.dot(b_weight, tl.trans(b_ddt), input_precision=PRECISION_LOW))
        b_dweight = tl.dot(tl.trans(b_ddt), b_low, input_precision=PRECISION)
        o_weight = o_d[:, None] * rank + o_r[None, :]
        tl.store(p_dweight + o_weight, b_dweight, mask=m_d[:, None] & m_r[None, :])
    o_low = (o_row // tokens) * s_db + (o_row % tokens) * s_dl
    p_dlow += i_k * s_dk + o_low[:, None] + o_r[None, :] * s_dr
    tl.store(p_dlow, b_dlow, mask=m_row[:, None] & m_r[None, :])
