"""Backward of the state-space dual scan in Triton: gradients of the inputs, of the weights, and of the step sizes.

With g the gradient of the state after the chunk, S_ij = <C_i, B_j>, G_ij = <dy_i, x_j>, E_ij = exp(c_i - c_j) for
j <= i, and W = E S G s_j below the diagonal; the rest as in ssd_triton_kernels:

    dx_j = s_j z_j + D dy_j,          z_j = sum_i E_ij S_ij dy_i + exp(c_T - c_j) g^T B_j
    dC_i = sum_j (E G)_ij s_j B_j + exp(c_i) h dy_i          dB_j = s_j sum_i (E G)_ij C_i + exp(c_T - c_j) s_j g x_j
    ds_j = <x_j, z_j> + A da_j
                                      da_t = sum_{j<t<=i} W_ij + sum_{i>=t} <dy_i, exp(c_i) h^T C_i>
                                            + sum_{j<t} exp(c_T - c_j) s_j <x_j, g^T B_j> + exp(c_T) <g, h>

Each line of da_t adds what passes through the decay of step t. The first is a running sum of row sums less column sums
of one and the same W: what cancels in it cancels to the last digits, as <dy, y> - <x, dx> of rounded outputs does not.
The last digits of every sum still add up in dA, s_1 + ... + s_i times each. Where factors are not bfloat16, the part of
the first line in dA is therefore summed by itself, from terms W_ij s_j (s_{j+1} + ... + s_i) of which nothing cancels.

Three kernels, since one that did all of it would not fit into the registers. `inputs`, a program a chunk and head,
writes dx and the addends of ds and da as rows (B, H, steps). `weights`, a program a chunk and share of a group's heads,
sums dB and dC over these; products with B and C come last, since they are linear in E G s, which is summed first.
`rates` takes rows of several heads through the running sums, limits and softplus to ddt, dA and the bias. Blocks of
(T, T) are transposed here, [j, i], as the product that each head needs has them.
"""

import triton
import triton.language as tl

from vision_mamba.ops.backends.ssd_triton_kernels import (
    SIZES,
    left,
    load_rows,
    load_state,
    multiply,
    multiply_both,
    route,
    split,
    store_rows,
    triangle,
)
from vision_mamba.ops.backends.triton_kernels import _slope, _softplus


@triton.jit
def load_both(p_state, p_rest, o_state, o_n, o_c, N: tl.constexpr, P: tl.constexpr, FACTORS: tl.constexpr):
    """A state (N, P) in the two parts of `split`, which are kept apart if there is a p_rest."""
    b_h = load_state(p_state + o_state, o_n, o_c, P, 1, N, P)
    if p_rest is not None:
        b_high, b_rest = b_h, load_state(p_rest + o_state, o_n, o_c, P, 1, N, P)
    else:
        b_high, b_rest = split(b_h, FACTORS)
    return b_high, b_rest


@triton.jit
def join(b_high, b_rest, FACTORS: tl.constexpr):
    b_h = b_high.to(tl.float32)
    if FACTORS == "bfloat16" or FACTORS == "float16":
        b_h += b_rest.to(tl.float32)
    return b_h


@triton.jit
def between(b_s):
    """s_{j+1} + ... + s_i at [j, i]; summed in float64, so that differences have all digits of float32."""
    b_sum = tl.cumsum(tl.minimum(b_s, 1e36).to(tl.float64), 0)
    b_high = b_sum.to(tl.float32)
    b_low = (b_sum - b_high.to(tl.float64)).to(tl.float32)
    return b_high[None, :] - b_high[:, None] + (b_low[None, :] - b_low[:, None])


@triton.jit(do_not_specialize=SIZES)
def inputs(
    p_x, p_s, p_c, p_low, p_A, p_B, p_C, p_D, p_indices, p_dy, p_h, p_g, p_h_rest, p_g_rest,
    p_dx, p_rows, p_carried, p_inner, p_dD,
    heads, per_group, steps, tokens, chunks, padded,
    s_xb, s_xl, s_xh, s_xc, s_Bb, s_Bl, s_Bg, s_Bn, s_Cb, s_Cl, s_Cg, s_Cn, s_Dh, s_Dc,
    s_dyb, s_dyl, s_dyh, s_dyc, s_dxb, s_dxl, s_dxh, s_dxc, s_hb, s_hh, s_ht, s_row,
    P: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DESCENDING: tl.constexpr, ADD: tl.constexpr, FACTORS: tl.constexpr,
    EACH_CHANNEL: tl.constexpr,
):  # fmt: skip
    """dx, sums of chunks for dD, and rows: <x, z>, what adds to da after a step, and what adds up to it.

    With p_inner the sums of W are a row of their own, and p_inner has what they make of dA.
    h and g are (B, H, chunks, N, P) with strides over the first three, and what they are rounded by, if they are.
    """
    i_h = (tl.program_id(0) % heads).to(tl.int64)
    i_t = tl.program_id(0) // heads % chunks
    i_b = (tl.program_id(0) // heads // chunks).to(tl.int64)
    i_g = i_h // per_group
    o_c, o_n, o_t = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, T)
    o_l, m_l, _ = route(p_indices, i_t * T, steps, tokens, DESCENDING, T)
    i_step = (i_b * heads + i_h) * padded + i_t * T
    o_state = i_b * s_hb + i_h * s_hh + i_t * s_ht
    b_B = load_rows(p_B + i_b * s_Bb + i_g * s_Bg, o_l, m_l, o_n, s_Bl, s_Bn, N, BLOCK_N)  # (T, N)
    b_g, b_g_rest = load_both(p_g, p_g_rest, o_state, o_n, o_c, N, P, FACTORS)  # (N, P)
    b_x = load_rows(p_x + i_b * s_xb + i_h * s_xh, o_l, m_l, o_c, s_xl, s_xc, P, BLOCK_P)  # (T, P)
    b_dy = load_rows(p_dy + i_b * s_dyb + i_h * s_dyh, o_l, m_l, o_c, s_dyl, s_dyc, P, BLOCK_P)  # (T, P)
    b_s = tl.load(p_s + i_step + o_t)
    b_e = b_x.to(tl.float32) * b_dy.to(tl.float32)
    i_part = (i_b * heads + i_h) * chunks + i_t
    if p_D is not None:
        if EACH_CHANNEL:
            tl.store(p_dD + i_part * P + o_c, tl.sum(b_e, 0), mask=o_c < P)
        else:
            tl.store(p_dD + i_part, tl.sum(tl.sum(b_e, 1)))
    b_z = multiply_both(b_B, b_g, b_g_rest, tl.zeros((T, BLOCK_P), tl.float32), FACTORS)
    p_rows += i_step + o_t
    if CAUSAL:
        b_C = load_rows(p_C + i_b * s_Cb + i_g * s_Cg, o_l, m_l, o_n, s_Cl, s_Cn, N, BLOCK_N)  # (T, N)
        b_h, b_h_rest = load_both(p_h, p_h_rest, o_state, o_n, o_c, N, P, FACTORS)  # (N, P)
        carried = tl.exp2(tl.load(p_c + i_step + T - 1)) * tl.sum(
            join(b_h, b_h_rest, FACTORS) * join(b_g, b_g_rest, FACTORS)
        )
        tl.store(p_carried + i_part, carried)
        b_z *= left(p_c, p_low, i_step, T)[:, None]
        b_own = tl.sum(b_x.to(tl.float32) * b_z, 1)
        b_y = multiply_both(b_C, b_h, b_h_rest, tl.zeros((T, BLOCK_P), tl.float32), FACTORS)
        b_until = tl.sum(b_dy.to(tl.float32) * b_y, 1) * tl.exp2(tl.load(p_c + i_step + o_t))
        tl.store(p_rows + s_row, b_s * b_own)
        b_S = multiply(b_B, tl.trans(b_C), tl.zeros((T, T), tl.float32), FACTORS)
        b_S *= triangle(p_c, p_low, i_step, b_S, True, T)
        b_z = multiply(b_S, b_dy, b_z, FACTORS)
        b_W = multiply(b_x, tl.trans(b_dy), tl.zeros((T, T), tl.float32), FACTORS) * b_S
        b_W = tl.where(o_t[:, None] < o_t[None, :], b_W, 0.0)
        b_later = tl.sum(b_W, 1)
        # The diagonal passes through no decay.
        b_own += b_later + tl.sum(b_B.to(tl.float32) * b_C.to(tl.float32), 1) * tl.sum(b_e, 1)
        b_W *= b_s[:, None]
        b_passed = tl.sum(b_W, 0) - b_s * b_later
        if p_inner is not None:
            tl.store(p_inner + i_part, tl.sum(tl.sum(b_W * between(b_s), 1)))
            tl.store(p_rows + s_row + s_row + s_row, b_passed)
        else:
            b_until += b_passed
        tl.store(p_rows + s_row + s_row, b_until)
        b_w = b_s
    else:
        b_own = tl.sum(b_x.to(tl.float32) * b_z, 1)
        b_w = -tl.load(p_A + i_h).to(tl.float32) * b_s
    tl.store(p_rows, b_own)
    b_z *= b_w[:, None]
    if p_D is not None:
        b_D = tl.load(p_D + i_h * s_Dh + o_c * s_Dc, mask=o_c < P, other=0.0).to(tl.float32)
        b_z += b_D[None, :] * b_dy.to(tl.float32)
    p_dx += i_b * s_dxb + i_h * s_dxh
    if ADD:
        b_z += load_rows(p_dx, o_l, m_l, o_c, s_dxl, s_dxc, P, BLOCK_P).to(tl.float32)
    store_rows(p_dx, b_z, o_l, m_l, o_c, s_dxl, s_dxc, P, BLOCK_P)


@triton.jit(do_not_specialize=SIZES)
def weights(
    p_x, p_s, p_c, p_low, p_A, p_B, p_C, p_indices, p_dy, p_h, p_g, p_dB, p_dC,
    heads, per_group, shares, steps, tokens, chunks, padded,
    s_xb, s_xl, s_xh, s_xc, s_Bb, s_Bl, s_Bg, s_Bn, s_Cb, s_Cl, s_Cg, s_Cn, s_dyb, s_dyl, s_dyh, s_dyc,
    s_dBs, s_dBb, s_dBl, s_dBg, s_dBn, s_dCs, s_dCb, s_dCl, s_dCg, s_dCn, s_hb, s_hh, s_ht,
    P: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DESCENDING: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """dB and dC of a chunk, summed over the heads of a share of a group; with their strides the shares are apart."""
    i_share = tl.program_id(0) % shares
    i_g = tl.program_id(0) // shares % (heads // per_group)
    i_t = tl.program_id(0) // shares // (heads // per_group) % chunks
    i_b = (tl.program_id(0) // shares // (heads // per_group) // chunks).to(tl.int64)
    o_c, o_n, o_t = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, T)
    o_l, m_l, _ = route(p_indices, i_t * T, steps, tokens, DESCENDING, T)
    b_dB, b_dC = tl.zeros((T, BLOCK_N), tl.float32), tl.zeros((T, BLOCK_N), tl.float32)
    if CAUSAL:
        b_EGs = tl.zeros((T, T), tl.float32)  # summed over heads
    per_share = per_group // shares
    first = (i_g * per_group + i_share * per_share).to(tl.int64)
    for i_h in range(first, first + per_share):
        i_step = (i_b * heads + i_h) * padded + i_t * T
        o_state = i_b * s_hb + i_h * s_hh + i_t * s_ht
        b_x = load_rows(p_x + i_b * s_xb + i_h * s_xh, o_l, m_l, o_c, s_xl, s_xc, P, BLOCK_P)  # (T, P)
        b_dy = load_rows(p_dy + i_b * s_dyb + i_h * s_dyh, o_l, m_l, o_c, s_dyl, s_dyc, P, BLOCK_P)  # (T, P)
        b_g = load_state(p_g + o_state, o_n, o_c, P, 1, N, P)  # (N, P)
        b_h = load_state(p_h + o_state, o_n, o_c, P, 1, N, P)  # (N, P)
        b_s = tl.load(p_s + i_step + o_t)
        if CAUSAL:
            b_G = multiply(b_x, tl.trans(b_dy), tl.zeros((T, T), tl.float32), FACTORS)
            b_EGs += b_G * triangle(p_c, p_low, i_step, b_G, True, T) * b_s[:, None]
            b_w = b_s * left(p_c, p_low, i_step, T)
            b_since = b_dy.to(tl.float32) * tl.exp2(tl.load(p_c + i_step + o_t))[:, None]
            b_dC = multiply(b_since, tl.trans(b_h), b_dC, FACTORS)
        else:
            b_w = -tl.load(p_A + i_h).to(tl.float32) * b_s
            b_dC = multiply(b_dy, tl.trans(b_h), b_dC, FACTORS)
        b_dB = multiply(b_x.to(tl.float32) * b_w[:, None], tl.trans(b_g), b_dB, FACTORS)
    if CAUSAL:
        b_B = load_rows(p_B + i_b * s_Bb + i_g * s_Bg, o_l, m_l, o_n, s_Bl, s_Bn, N, BLOCK_N)  # (T, N)
        b_C = load_rows(p_C + i_b * s_Cb + i_g * s_Cg, o_l, m_l, o_n, s_Cl, s_Cn, N, BLOCK_N)  # (T, N)
        b_dC = multiply(tl.trans(b_EGs), b_B, b_dC, FACTORS)
        b_dB = multiply(b_EGs, b_C, b_dB, FACTORS)
    p_dB += i_share * s_dBs + i_b * s_dBb + i_g * s_dBg
    p_dC += i_share * s_dCs + i_b * s_dCb + i_g * s_dCg
    store_rows(p_dB, b_dB, o_l, m_l, o_n, s_dBl, s_dBn, N, BLOCK_N)
    store_rows(p_dC, b_dC, o_l, m_l, o_n, s_dCl, s_dCn, N, BLOCK_N)


@triton.jit(do_not_specialize=SIZES)
def rates(
    p_dt, p_s, p_A, p_bias, p_indices, p_rows, p_carried, p_inner, p_ddt, p_dA, p_dbias,
    heads, steps, tokens, chunks, padded, low, high, s_dtb, s_dtl, s_dth, s_ddtb, s_ddtl, s_ddth, s_row,
    T: tl.constexpr, HEADS: tl.constexpr, CAUSAL: tl.constexpr, DESCENDING: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """ddt of a chunk and HEADS heads from the rows of `inputs`; sums of chunks for dA and the bias."""
    i_b, i_t = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    o_h, o_t = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, T)
    m_h = o_h < heads
    o_l, m_l, m_t = route(p_indices, i_t * T, steps, tokens, DESCENDING, T)
    o_row = (i_b * heads + o_h[:, None]) * padded + i_t * T + o_t[None, :]
    o_part = (i_b * heads + o_h) * chunks + i_t
    b_A = tl.load(p_A + o_h, mask=m_h, other=0.0).to(tl.float32)[:, None]
    b_s = tl.load(p_s + o_row, mask=m_h[:, None], other=0.0)  # (HEADS, T)
    b_own = tl.load(p_rows + o_row, mask=m_h[:, None], other=0.0)
    if CAUSAL:
        b_past = tl.load(p_rows + s_row + o_row, mask=m_h[:, None], other=0.0)
        b_until = tl.load(p_rows + s_row + s_row + o_row, mask=m_h[:, None], other=0.0)
        b_da = tl.cumsum(b_past, 1) - b_past + tl.cumsum(b_until, 1, reverse=True)
        b_da += tl.load(p_carried + o_part, mask=m_h, other=0.0)[:, None]
        b_dA = tl.sum(tl.where(m_t[None, :], b_s * b_da, 0.0), 1)
        if p_inner is not None:
            b_dA += tl.load(p_inner + o_part, mask=m_h, other=0.0)
            b_passed = tl.load(p_rows + s_row + s_row + s_row + o_row, mask=m_h[:, None], other=0.0)
            b_da += tl.cumsum(b_passed, 1, reverse=True)
        b_ds = b_own + b_A * b_da
    else:
        b_ds = -b_A * b_own
        b_dA = -tl.sum(tl.where(m_t[None, :], b_s * b_own, 0.0), 1)
    tl.store(p_dA + o_part, b_dA, mask=m_h)
    # Through the limits, and softplus before them.
    m_tile = m_h[:, None] & m_l[None, :]
    p_tile = p_dt + i_b * s_dtb + o_h[:, None] * s_dth + o_l[None, :] * s_dtl
    b_v = tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_v += tl.load(p_bias + o_h, mask=m_h, other=0.0).to(tl.float32)[:, None]
    b_u = _softplus(b_v) if SOFTPLUS else b_v
    b_dv = tl.where(m_t[None, :] & (b_u >= low) & (b_u <= high), b_ds, 0.0)
    if SOFTPLUS:
        b_dv *= _slope(b_v)
    p_tile = p_ddt + i_b * s_ddtb + o_h[:, None] * s_ddth + o_l[None, :] * s_ddtl
    tl.store(p_tile, b_dv.to(p_ddt.dtype.element_ty), mask=m_tile)
    if p_dbias is not None:
        tl.store(p_dbias + o_part, tl.sum(b_dv, 1), mask=m_h)
