"""The state-space dual scan in Triton, on matrix units: outputs of a segment, states at chunk ends, carries between.

Along a route and head, for a chunk of T steps with a_t = s_t A, c_t = a_1 + ... + a_t and the state h before it:

    y_i = sum_{j<=i} exp(c_i - c_j) s_j <C_i, B_j> x_j + exp(c_i) h^T C_i + D x_i
    h' = exp(c_T) h + sum_j exp(c_T - c_j) s_j B_j x_j^T                                           h is (N, P) here

Grid: one program = one batch item, head, segment of the route, and block of channels. It walks the chunks of its
segment with h in registers, so that nothing but x, dt, B, C is read and nothing but y written. Heads vary fastest:
those that run at one time share B and C in the cache. A route is cut into several segments only where batch and heads
are too few to fill the GPU; then `states` finds what each segment adds, and `carry` goes through the segments in order.
`prepare` has computed s and c before, (B, H, steps): what is loaded needs no scan, and lies where the products want it.

Precision: sums and states are float32. Factors of a product have the widest type of x, B and C: bfloat16; float16 as
tf32, rounded here since the unit would cut, with the range of float32; float32 in three tf32 products. For the latter
two c is summed in float64 and kept as two float32, so that c_i - c_j has all its digits however long the sums are; for
bfloat16 the digits of one float32 are enough, since a decay below 2^-256 counts as that. States for the backward pass
are summed and kept in two parts, the rounded one and the rest: the gradient of A is a sum over all steps in which the
rounding errors of one state would add up, since they are the same for every step of a chunk.

Names: p_ pointer, b_ block loaded, o_ offsets, m_ mask, i_ index; sizes are words; s_xl is the stride of x along its
tokens (b batch, l tokens, h heads, c channels, g groups, n states, s segments). One launch is one route.
"""

import triton
import triton.language as tl

from vision_mamba.ops.backends.triton_kernels import LOG2E, _softplus

#: Arguments whose values make no better code, so that other sizes need no other kernel.
SIZES = ["heads", "per_group", "shares", "steps", "tokens", "segments", "chunks"]


@triton.jit
def _tf32(b):
    """Float32 rounded to the 10 bits of mantissa that tf32 keeps."""
    bits = b.to(tl.float32).to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def multiply(b_a, b_b, b_sum, FACTORS: tl.constexpr):
    """b_sum + b_a b_b, in float32; factors as the head of this file says."""
    if FACTORS == "bfloat16":
        b_sum = tl.dot(b_a.to(tl.bfloat16), b_b.to(tl.bfloat16), b_sum)
    elif FACTORS == "float16":
        if b_a.dtype == tl.float16 and b_b.dtype == tl.float16:
            b_sum = tl.dot(b_a, b_b, b_sum)
        else:
            b_sum = tl.dot(_tf32(b_a), _tf32(b_b), b_sum, input_precision="tf32")
    else:
        b_sum = tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_sum, input_precision=FACTORS)
    return b_sum


@triton.jit
def split(b, FACTORS: tl.constexpr):
    """A float32 factor as a product takes it, and the rest of it, not to be read where products take it whole."""
    if FACTORS == "bfloat16":
        b_high = b.to(tl.bfloat16)
        b_rest = b - b_high.to(tl.float32)
    elif FACTORS == "float16":
        b_high = _tf32(b)
        b_rest = b - b_high
    else:
        b_high, b_rest = b, b
    return b_high, b_rest


@triton.jit
def multiply_both(b_a, b_high, b_rest, b_sum, FACTORS: tl.constexpr):
    """b_sum + b_a (b_high + b_rest), in two products; b_a is of a type that is not rounded."""
    b_sum = multiply(b_a, b_high, b_sum, FACTORS)
    if FACTORS == "bfloat16" or FACTORS == "float16":
        b_sum = multiply(b_a, b_rest, b_sum, FACTORS)
    return b_sum


@triton.jit
def route(p_indices, start, steps, tokens, DESCENDING: tl.constexpr, T: tl.constexpr):
    """Of T steps: which tokens they visit, which of them visit any, and which are steps at all."""
    o_t = start + tl.arange(0, T)
    m_t = o_t < steps
    if p_indices is not None:
        o_l = tl.load(p_indices + o_t, mask=m_t, other=-1)
    elif DESCENDING:
        o_l = tokens - 1 - o_t
    else:
        o_l = o_t
    return o_l.to(tl.int64), m_t & (o_l >= 0), m_t


@triton.jit
def load_rows(p_rows, o_l, m_l, o_c, s_l, s_c, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(T, BLOCK) of a (tokens, SIZE) matrix; what lies outside is 0."""
    p_tile = p_rows + o_l[:, None] * s_l + o_c[None, :] * s_c
    if SIZE % BLOCK == 0:
        return tl.load(p_tile, mask=m_l[:, None], other=0.0)
    return tl.load(p_tile, mask=m_l[:, None] & (o_c < SIZE)[None, :], other=0.0)


@triton.jit
def store_rows(p_rows, b_rows, o_l, m_l, o_c, s_l, s_c, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    p_tile = p_rows + o_l[:, None] * s_l + o_c[None, :] * s_c
    m = m_l[:, None] if SIZE % BLOCK == 0 else m_l[:, None] & (o_c < SIZE)[None, :]
    tl.store(p_tile, b_rows.to(p_rows.dtype.element_ty), mask=m)


@triton.jit
def load_state(p_state, o_n, o_c, s_n, s_c, N: tl.constexpr, P: tl.constexpr):
    """(N, P), padded with 0."""
    m = (o_n < N)[:, None] & (o_c < P)[None, :]
    return tl.load(p_state + o_n.to(tl.int64)[:, None] * s_n + o_c.to(tl.int64)[None, :] * s_c, mask=m, other=0.0)


@triton.jit
def store_state(p_state, b_h, o_n, o_c, s_n, s_c, N: tl.constexpr, P: tl.constexpr):
    m = (o_n < N)[:, None] & (o_c < P)[None, :]
    tl.store(p_state + o_n.to(tl.int64)[:, None] * s_n + o_c.to(tl.int64)[None, :] * s_c, b_h, mask=m)


@triton.jit
def triangle(p_c, p_low, i_step, b_like, TRANSPOSED: tl.constexpr, T: tl.constexpr):
    """exp(c_i - c_j) at [i, j], or at [j, i] if TRANSPOSED, 0 where j > i; (T, T), of the chunk that starts at i_step.

    Nothing of `b_like`, the matrix it will be multiplied by, is added to the sums: the exponentials are then taken
    where that lies in registers, and need not be brought there through shared memory.
    """
    o_t = tl.arange(0, T)
    b_c = tl.load(p_c + i_step + o_t)
    b_sum = b_c[:, None] - b_c[None, :]
    if p_low is not None:
        b_low = tl.load(p_low + i_step + o_t)
        b_sum += b_low[:, None] - b_low[None, :]
    if TRANSPOSED:
        return tl.exp2(tl.where(o_t[:, None] <= o_t[None, :], b_like * 0.0 - b_sum, -float("inf")))
    return tl.exp2(tl.where(o_t[:, None] >= o_t[None, :], b_like * 0.0 + b_sum, -float("inf")))


@triton.jit
def left(p_c, p_low, i_step, T: tl.constexpr):
    """exp(c_T - c_t), (T,), of the chunk that starts at i_step."""
    o_t = i_step + tl.arange(0, T)
    b_sum = tl.load(p_c + i_step + T - 1) - tl.load(p_c + o_t)
    if p_low is not None:
        b_sum += tl.load(p_low + i_step + T - 1) - tl.load(p_low + o_t)
    return tl.exp2(b_sum)


@triton.jit(do_not_specialize=SIZES)
def prepare(
    p_dt, p_A, p_bias, p_indices, p_s, p_c, p_low, heads, steps, tokens, padded, low, high, s_dtb, s_dtl, s_dth,
    T: tl.constexpr, HEADS: tl.constexpr, CAUSAL: tl.constexpr, DESCENDING: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """s and c, in units of log2 so that a decay is one exp2, of HEADS heads and T steps: (B, H, padded) each."""
    chunks = padded // T
    i_b, i_t = (tl.program_id(0) // chunks).to(tl.int64), tl.program_id(0) % chunks
    o_h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    m_h = o_h < heads
    o_l, m_l, m_t = route(p_indices, i_t * T, steps, tokens, DESCENDING, T)
    p_tile = p_dt + i_b * s_dtb + o_h[:, None] * s_dth + o_l[None, :] * s_dtl
    b_s = tl.load(p_tile, mask=m_h[:, None] & m_l[None, :], other=0.0).to(tl.float32)  # (HEADS, T)
    if p_bias is not None:
        b_s += tl.load(p_bias + o_h, mask=m_h, other=0.0).to(tl.float32)[:, None]
    b_s = _softplus(b_s) if SOFTPLUS else b_s
    # Steps behind the last have size 0, which leaves the state as it is.
    b_s = tl.where(m_t[None, :], tl.minimum(tl.maximum(b_s, low), high), 0.0)
    o_out = (i_b * heads + o_h[:, None]) * padded + i_t * T + tl.arange(0, T)[None, :]
    tl.store(p_s + o_out, b_s, mask=m_h[:, None])
    if CAUSAL:
        b_A = tl.load(p_A + o_h, mask=m_h, other=0.0).to(tl.float32)
        b_a = tl.maximum(b_s * (b_A * LOG2E)[:, None], -256.0)
        if p_low is not None:
            b_c = tl.cumsum(b_a.to(tl.float64), 1)
            b_high = b_c.to(tl.float32)
            tl.store(p_low + o_out, (b_c - b_high.to(tl.float64)).to(tl.float32), mask=m_h[:, None])
        else:
            b_high = tl.cumsum(b_a, 1)
        tl.store(p_c + o_out, b_high, mask=m_h[:, None])


@triton.jit(do_not_specialize=SIZES)
def forward(
    p_x, p_s, p_c, p_low, p_B, p_C, p_D, p_indices, p_before, p_y, p_last,
    heads, per_group, steps, tokens, segments, chunks,
    s_xb, s_xl, s_xh, s_xc, s_Bb, s_Bl, s_Bg, s_Bn, s_Cb, s_Cl, s_Cg, s_Cn,
    s_Dh, s_Dc, s_hb, s_hh, s_hs, s_hn, s_hc, s_yb, s_yl, s_yh, s_yc, s_lastb,
    P: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DESCENDING: tl.constexpr, ADD: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """Outputs of the `chunks` chunks of a segment, from the state before it; added to y if ADD."""
    i_h = (tl.program_id(0) % heads).to(tl.int64)
    i_s = tl.program_id(0) // heads % segments
    i_b = (tl.program_id(0) // heads // segments).to(tl.int64)
    i_g = i_h // per_group
    o_c, o_n, o_t = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, T)
    p_x += i_b * s_xb + i_h * s_xh
    p_y += i_b * s_yb + i_h * s_yh
    p_B += i_b * s_Bb + i_g * s_Bg
    p_C += i_b * s_Cb + i_g * s_Cg
    if p_D is not None:
        b_D = tl.load(p_D + i_h * s_Dh + o_c * s_Dc, mask=o_c < P, other=0.0).to(tl.float32)
    if p_before is not None:
        p_before += i_b * s_hb + i_h * s_hh + i_s * s_hs
        b_h = load_state(p_before, o_n, o_c, s_hn, s_hc, N, P).to(tl.float32)
    else:
        b_h = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    for i in range(chunks):
        i_t = i_s * chunks + i
        o_l, m_l, _ = route(p_indices, i_t * T, steps, tokens, DESCENDING, T)
        b_x = load_rows(p_x, o_l, m_l, o_c, s_xl, s_xc, P, BLOCK_P)  # (T, P)
        b_C = load_rows(p_C, o_l, m_l, o_n, s_Cl, s_Cn, N, BLOCK_N)  # (T, N)
        b_y = multiply(b_C, b_h, tl.zeros((T, BLOCK_P), tl.float32), FACTORS)
        if CAUSAL:
            b_B = load_rows(p_B, o_l, m_l, o_n, s_Bl, s_Bn, N, BLOCK_N)  # (T, N)
            i_step = ((i_b * heads + i_h) * segments * chunks + i_t) * T
            b_s = tl.load(p_s + i_step + o_t)
            b_y *= tl.exp2(tl.load(p_c + i_step + o_t))[:, None]
            b_scores = multiply(b_C, tl.trans(b_B), tl.zeros((T, T), tl.float32), FACTORS)
            b_scores *= triangle(p_c, p_low, i_step, b_scores, False, T)
            b_y = multiply(b_scores * b_s[None, :], b_x, b_y, FACTORS)
            b_w = left(p_c, p_low, i_step, T) * b_s
            b_h *= tl.exp2(tl.load(p_c + i_step + T - 1))
            b_h = multiply(tl.trans(b_B), b_x.to(tl.float32) * b_w[:, None], b_h, FACTORS)
        if p_D is not None:
            b_y += b_D[None, :] * b_x.to(tl.float32)
        if ADD:
            b_y += load_rows(p_y, o_l, m_l, o_c, s_yl, s_yc, P, BLOCK_P).to(tl.float32)
        store_rows(p_y, b_y, o_l, m_l, o_c, s_yl, s_yc, P, BLOCK_P)
    if p_last is not None:  # noqa: SIM102  known when compiling, unlike the next
        if i_s == segments - 1:
            store_state(p_last + i_b * s_lastb + i_h * P * N, b_h, o_n, o_c, 1, N, N, P)


@triton.jit(do_not_specialize=SIZES)
def states(
    p_x, p_s, p_c, p_low, p_A, p_B, p_indices, p_before, p_each, p_rest, p_after, p_decay,
    heads, per_group, steps, tokens, segments, chunks,
    s_xb, s_xl, s_xh, s_xc, s_Bb, s_Bl, s_Bg, s_Bn, s_hb, s_hh, s_hs, s_hn, s_hc, s_ab, s_ah, s_as, s_an, s_ac,
    P: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DESCENDING: tl.constexpr, ADJOINT: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """States alone: before each chunk into `each` and `rest`, after the segment into `after`, and the segment's decay.

    ADJOINT walks backwards with g = dL/dh, from x = dy and B = C: g = exp(c_T) g' + sum_i exp(c_i) C_i dy_i^T. What it
    writes into `each` is then the gradient of the state after each chunk.
    """
    i_h = (tl.program_id(0) % heads).to(tl.int64)
    i_s = tl.program_id(0) // heads % segments
    i_b = (tl.program_id(0) // heads // segments).to(tl.int64)
    o_c, o_n, o_t = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, T)
    p_x += i_b * s_xb + i_h * s_xh
    p_B += i_b * s_Bb + i_h // per_group * s_Bg
    if p_before is not None:
        p_before += i_b * s_hb + i_h * s_hh + i_s * s_hs
        b_h = load_state(p_before, o_n, o_c, s_hn, s_hc, N, P).to(tl.float32)
    else:
        b_h = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    decay = 0.0
    for i in range(chunks):
        i_t = i_s * chunks + (chunks - 1 - i if ADJOINT else i)
        i_step = ((i_b * heads + i_h) * segments * chunks + i_t) * T
        if p_each is not None:
            o_tile = ((i_b * heads + i_h) * segments * chunks + i_t) * (N * P)
            store_state(p_each + o_tile, b_h.to(p_each.dtype.element_ty), o_n, o_c, P, 1, N, P)
            if p_rest is not None:
                _, b_rest = split(b_h, FACTORS)
                store_state(p_rest + o_tile, b_rest.to(p_rest.dtype.element_ty), o_n, o_c, P, 1, N, P)
        o_l, m_l, m_t = route(p_indices, i_t * T, steps, tokens, DESCENDING, T)
        b_x = load_rows(p_x, o_l, m_l, o_c, s_xl, s_xc, P, BLOCK_P)  # (T, P)
        b_B = load_rows(p_B, o_l, m_l, o_n, s_Bl, s_Bn, N, BLOCK_N)  # (T, N)
        if CAUSAL:
            if ADJOINT:
                b_w = tl.exp2(tl.load(p_c + i_step + o_t))
            else:
                b_w = left(p_c, p_low, i_step, T) * tl.load(p_s + i_step + o_t)
            total = tl.load(p_c + i_step + T - 1)
            b_h *= tl.exp2(total)
            decay += total
        else:
            b_w = tl.where(m_t, 1.0, 0.0)
            if not ADJOINT:
                b_w = -tl.load(p_s + i_step + o_t) * tl.load(p_A + i_h).to(tl.float32)
        b_high, b_rest = split(b_x.to(tl.float32) * b_w[:, None], FACTORS)
        b_h = multiply_both(tl.trans(b_B), b_high, b_rest, b_h, FACTORS)
    if p_after is not None:
        store_state(p_after + i_b * s_ab + i_h * s_ah + i_s * s_as, b_h, o_n, o_c, s_an, s_ac, N, P)
    if p_decay is not None:
        tl.store(p_decay + (i_b * heads + i_h) * segments + i_s, tl.exp2(decay))


@triton.jit(do_not_specialize=SIZES)
def carry(
    p_added, p_decay, p_start, p_before, p_end, heads, segments, s_startb, s_endb,
    P: tl.constexpr, N: tl.constexpr, ADJOINT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The state before each segment from what each adds, (B, H, segments, N, P); start and end are (B, H, P, N)."""
    i_b, i_h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < N * P
    o_user = o % P * N + o // P  # (N, P) -> (P, N)
    if p_start is not None:
        b_h = tl.load(p_start + i_b * s_startb + i_h * N * P + o_user, mask=m, other=0.0).to(tl.float32)
    else:
        b_h = tl.zeros((BLOCK,), tl.float32)
    for i in range(segments):
        i_s = (i_b * heads + i_h) * segments + (segments - 1 - i if ADJOINT else i)
        tl.store(p_before + i_s * (N * P) + o, b_h, mask=m)
        b_h = b_h * tl.load(p_decay + i_s) + tl.load(p_added + i_s * (N * P) + o, mask=m, other=0.0)
    if p_end is not None:
        tl.store(p_end + i_b * s_endb + i_h * N * P + o_user, b_h.to(p_end.dtype.element_ty), mask=m)
