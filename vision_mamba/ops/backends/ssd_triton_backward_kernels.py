"""Backward of the state-space dual scan in Triton: every gradient of a chunk, for all heads that share its B and C.

With g the gradient of the state after the chunk, S_ij = <C_i, B_j>, G_ij = <dy_i, x_j>, E_ij = exp(c_i - c_j) for
j <= i, and W = E S G s_j below the diagonal; the rest as in ssd_triton_kernels:

    dx_j = s_j z_j + D dy_j,          z_j = sum_i E_ij S_ij dy_i + exp(c_T - c_j) g^T B_j
    dC_i = sum_j (E G)_ij s_j B_j + exp(c_i) h dy_i          dB_j = s_j sum_i (E G)_ij C_i + exp(c_T - c_j) s_j g x_j
    ds_j = sum_i (E S G)_ij + exp(c_T - c_j) <x_j, g^T B_j> + A da_j
                                      da_t = sum_{j<t<=i} W_ij + sum_{i>=t} <dy_i, exp(c_i) h^T C_i>
                                            + sum_{j<t} exp(c_T - c_j) s_j <x_j, g^T B_j> + exp(c_T) <g, h>

Each line of da_t adds what passes through the decay of step t. The first is a running sum of row sums less column sums
of one and the same W: what cancels in it cancels to the last digits, as <dy, y> - <x, dx> of rounded outputs does not.

Grid: one program = one chunk, batch item, group, and share of the group's heads. S is formed once for all of them, and
so are the products with B and C: they are linear in E G s, which is summed over heads first, a (T, T) block. Blocks of
(T, T) are transposed here, [j, i], as the product that each head needs has them.
"""

import triton
import triton.language as tl

from vision_mamba.ops.backends.ssd_triton_kernels import (
    left,
    load_rows,
    load_state,
    multiply,
    route,
    store_rows,
    triangle,
)
from vision_mamba.ops.backends.triton_kernels import _slope, _softplus


@triton.jit
def backward(
    p_x, p_dt, p_s, p_c, p_low, p_A, p_B, p_C, p_D, p_bias, p_indices, p_dy, p_h, p_g,
    p_dx, p_ddt, p_dB, p_dC, p_dA, p_dbias, p_dD,
    heads, per_group, shares, steps, tokens, chunks, padded, low, high,
    s_xb, s_xl, s_xh, s_xc, s_dtb, s_dtl, s_dth, s_Bb, s_Bl, s_Bg, s_Bn, s_Cb, s_Cl, s_Cg, s_Cn,
    s_Dh, s_Dc, s_dyb, s_dyl, s_dyh, s_dyc, s_dxb, s_dxl, s_dxh, s_dxc, s_ddtb, s_ddtl, s_ddth,
    s_dBs, s_dBb, s_dBl, s_dBg, s_dBn, s_dCs, s_dCb, s_dCl, s_dCg, s_dCn, s_hb, s_hh, s_ht,
    P: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DESCENDING: tl.constexpr, SOFTPLUS: tl.constexpr, ADD: tl.constexpr,
    FACTORS: tl.constexpr, EACH_CHANNEL: tl.constexpr,
):  # fmt: skip
    """h and g are (B, H, chunks, N, P) with strides over the first three; dA, dbias and dD come as sums of chunks."""
    i_t = tl.program_id(0) % chunks
    i_share = tl.program_id(0) // chunks % shares
    i_g = tl.program_id(0) // chunks // shares % (heads // per_group)
    i_b = (tl.program_id(0) // chunks // shares // (heads // per_group)).to(tl.int64)
    o_c, o_n, o_t = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, T)
    o_l, m_l, m_t = route(p_indices, i_t * T, steps, tokens, DESCENDING, T)
    b_B = load_rows(p_B + i_b * s_Bb + i_g * s_Bg, o_l, m_l, o_n, s_Bl, s_Bn, N, BLOCK_N)  # (T, N)
    b_C = load_rows(p_C + i_b * s_Cb + i_g * s_Cg, o_l, m_l, o_n, s_Cl, s_Cn, N, BLOCK_N)  # (T, N)
    b_dB, b_dC = tl.zeros((T, BLOCK_N), tl.float32), tl.zeros((T, BLOCK_N), tl.float32)
    if CAUSAL:
        b_S = multiply(b_B, tl.trans(b_C), tl.zeros((T, T), tl.float32), FACTORS)
        b_EGs = tl.zeros((T, T), tl.float32)  # summed over heads
    per_share = per_group // shares
    for i in range(per_share):
        i_h = i_g * per_group + i_share * per_share + i
        A = tl.load(p_A + i_h).to(tl.float32)
        i_step = (i_b * heads + i_h) * padded + i_t * T
        b_s = tl.load(p_s + i_step + o_t)
        b_x = load_rows(p_x + i_b * s_xb + i_h * s_xh, o_l, m_l, o_c, s_xl, s_xc, P, BLOCK_P)  # (T, P)
        b_dy = load_rows(p_dy + i_b * s_dyb + i_h * s_dyh, o_l, m_l, o_c, s_dyl, s_dyc, P, BLOCK_P)  # (T, P)
        o_state = i_b * s_hb + i_h * s_hh + i_t * s_ht
        b_h = load_state(p_h + o_state, o_n, o_c, P, 1, N, P)  # (N, P)
        b_g = load_state(p_g + o_state, o_n, o_c, P, 1, N, P)  # (N, P)
        b_z = multiply(b_B, b_g, tl.zeros((T, BLOCK_P), tl.float32), FACTORS)
        b_x32, b_dy32 = b_x.to(tl.float32), b_dy.to(tl.float32)
        if CAUSAL:
            b_left = left(p_c, p_low, i_step, T)
            b_z *= b_left[:, None]
            b_ds = tl.sum(b_x32 * b_z, 1)
            b_q = b_s * b_ds
            b_da = tl.cumsum(b_q, 0) - b_q
            b_da += tl.exp2(tl.load(p_c + i_step + T - 1)) * tl.sum(b_h.to(tl.float32) * b_g.to(tl.float32))
            b_since = b_dy32 * tl.exp2(tl.load(p_c + i_step + o_t))[:, None]
            b_dCh = multiply(b_since, tl.trans(b_h), tl.zeros((T, BLOCK_N), tl.float32), FACTORS)
            b_dC += b_dCh
            b_r = tl.sum(b_C.to(tl.float32) * b_dCh, 1)
            b_dB = multiply(b_x32 * (b_s * b_left)[:, None], tl.trans(b_g), b_dB, FACTORS)
            b_E = triangle(p_c, p_low, i_step, b_S, True, T)
            b_z = multiply(b_E * b_S, b_dy, b_z, FACTORS)
            b_EG = multiply(b_x, tl.trans(b_dy), tl.zeros((T, T), tl.float32), FACTORS) * b_E
            b_EGs += b_EG * b_s[:, None]
            b_EG *= b_S
            b_ds += tl.sum(b_EG, 1)
            b_EG = tl.where(o_t[:, None] < o_t[None, :], b_EG * b_s[:, None], 0.0)
            b_r += tl.sum(b_EG, 0) - tl.sum(b_EG, 1)
            b_da += tl.cumsum(b_r, 0, reverse=True)
            b_ds += A * b_da
            b_w = b_s
        else:
            b_w = -A * b_s
            b_dC = multiply(b_dy, tl.trans(b_h), b_dC, FACTORS)
            b_dB = multiply(b_x32 * b_w[:, None], tl.trans(b_g), b_dB, FACTORS)
            b_da = -tl.sum(b_x32 * b_z, 1)
            b_ds = A * b_da
        b_dA = tl.where(m_t, b_s * b_da, 0.0)
        b_dx = b_w[:, None] * b_z
        # Through the limits, and softplus before them.
        b_v = tl.load(p_dt + i_b * s_dtb + i_h * s_dth + o_l * s_dtl, mask=m_l, other=0.0).to(tl.float32)
        if p_bias is not None:
            b_v += tl.load(p_bias + i_h).to(tl.float32)
        b_u = _softplus(b_v) if SOFTPLUS else b_v
        b_dv = tl.where(m_t & (b_u >= low) & (b_u <= high), b_ds, 0.0)
        if SOFTPLUS:
            b_dv *= _slope(b_v)
        p_row = p_ddt + i_b * s_ddtb + i_h * s_ddth + o_l * s_ddtl
        tl.store(p_row, b_dv.to(p_ddt.dtype.element_ty), mask=m_l)
        i_part = (i_b * heads + i_h) * chunks + i_t
        tl.store(p_dA + i_part, tl.sum(b_dA))
        if p_dbias is not None:
            tl.store(p_dbias + i_part, tl.sum(b_dv))
        if p_D is not None:
            b_D = tl.load(p_D + i_h * s_Dh + o_c * s_Dc, mask=o_c < P, other=0.0).to(tl.float32)
            b_dx += b_D[None, :] * b_dy32
            if EACH_CHANNEL:
                tl.store(p_dD + i_part * P + o_c, tl.sum(b_x32 * b_dy32, 0), mask=o_c < P)
            else:
                tl.store(p_dD + i_part, tl.sum(b_x32 * b_dy32))
        p_row = p_dx + i_b * s_dxb + i_h * s_dxh
        if ADD:
            b_dx += load_rows(p_row, o_l, m_l, o_c, s_dxl, s_dxc, P, BLOCK_P).to(tl.float32)
        store_rows(p_row, b_dx, o_l, m_l, o_c, s_dxl, s_dxc, P, BLOCK_P)
    if CAUSAL:
        b_dC = multiply(tl.trans(b_EGs), b_B, b_dC, FACTORS)
        b_dB = multiply(b_EGs, b_C, b_dB, FACTORS)
    p_dB += i_share * s_dBs + i_b * s_dBb + i_g * s_dBg
    p_dC += i_share * s_dCs + i_b * s_dCb + i_g * s_dCg
    store_rows(p_dB, b_dB, o_l, m_l, o_n, s_dBl, s_dBn, N, BLOCK_N)
    store_rows(p_dC, b_dC, o_l, m_l, o_n, s_dCl, s_dCn, N, BLOCK_N)
