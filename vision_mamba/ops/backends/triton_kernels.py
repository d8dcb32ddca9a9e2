"""The scan in Triton for one state a channel, and what all of its kernels share.

Along every route, with v_t = dt_t + dt_bias and s_t = softplus(v_t):

    h_t = exp(s_t A) h_{t-1} + s_t B_t x_t          y_t = <C_t, h_t> + D x_t

Grid: one program = one batch item, one route and CHANNELS channels. It holds their states in registers and walks the
route STEPS at a time, following the index table. A step reads neighbouring elements of one token whatever the order.
Several states a channel are in triton_wide.py.

Tiles: x, dt and dy come STEPS rows at once, so that many loads are in flight, each of 16 bytes where the rows are so
aligned; a tile's rows and the neighbours in a row so lie in different lanes. All but the recurrence itself is done a
tile at a time in this layout: offsets and masks are computed once for eight elements, and a sum over channels takes
two shuffles. What the recurrence reads is laid out anew, with a thread holding whole columns, and so is what it leaves
(`_turned`); `_row` then takes a row out for free: the compiler sees which register it is.

The compiler would rather compute twice than change a layout: it moves the change to before the tile becomes float32,
which is the cheaper place for it, and does all that follows in both layouts, softplus included. It does so only where
one tile is concerned, so `_float` pretends that there are two.

Low rank: a tile of dt is the product of rows of columns with dt_weight, on the tensor cores where there are any, with
each float32 in several terms. The backward pass writes the gradient of all of dt, in two terms if dt is bfloat16, which
triton_low_rank.py multiplies back: sums of weights' gradients beside the rest of a tile would not fit into registers.

Gradients of B and C are written in the order of steps, side by side: single numbers at tokens far apart were a third of
the time, since memory is written in sectors.

Routes: where there are programs enough, one takes ROUTES of a batch item in turn and adds up their y in memory, which
the nearest cache holds, so that fewer shares are left to triton_sums.py.

Backward: forward saves the states every STEPS steps. From there a program computes the tile's states once more, keeps
them in registers, and walks back with g_t = dL/dh_t = C_t dy_t + exp(s_{t+1} A) g_{t+1}. No (B, L, D, N) anywhere.

Segments: a long route of few sequences is cut, for more programs. A first launch, with ENDS, finds what each segment
adds to the state at its end, and its sum of step sizes; in the second, a segment begins with what those before it make
of the initial state, backward with what those after it make of the gradient of the last one.

Precision: states and sums float32; log2(e) is folded into A, so that a decay is one exp2. Sums that cross programs are
written as shares and added in order by triton_sums.py, so results are equal bit by bit from run to run.

Names: p_ pointer, b_ block loaded, o_ offsets, m_ mask, i_ index; sizes are words; s_xl is the stride of x along its
tokens (b batch, l tokens, k routes, d channels, n states, r rank).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: Added to the exponent of a decay: near 1, a GPU's exp2 is 7e-9 too small on average, which thousands of steps add up.
BIAS = tl.constexpr(1e-8)


@triton.jit
def _decay(v):
    """e = exp(-|v|), from which come softplus(v) and its derivative."""
    return tl.exp2(tl.abs(v) * -LOG2E)


@triton.jit
def _softplus(v):
    """max(v, 0) + log1p(e), which neither overflows nor cancels; log1p(e) = e P(e) to 2e-7, P minimax on [0, 1]."""
    e = _decay(v)
    p = 0.0052326880395412445 * e - 0.029505213722586632
    p = p * e + 0.07822591066360474
    p = p * e - 0.13663242757320404
    p = p * e + 0.19106005132198334
    p = p * e - 0.2484298199415207
    p = p * e + 0.3331909775733948
    p = p * e - 0.4999949336051941
    p = p * e + 0.9999999403953552
    return tl.maximum(v, 0.0) + e * p


@triton.jit
def _slope(v):
    """Derivative of softplus, sigmoid(v)."""
    e = _decay(v)
    return tl.where(v >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _step_sizes(b_v, m_t, SOFTPLUS: tl.constexpr):
    """v as softplus takes it, and the step sizes: 0 past the end, so that the state stays as it is."""
    if SOFTPLUS:
        b_v = tl.where(m_t[:, None], b_v, float("-inf"))
        return b_v, _softplus(b_v)
    else:
        b_v = tl.where(m_t[:, None], b_v, 0.0)
        return b_v, b_v


@triton.jit
def _token(p_indices, t, steps, LONG: tl.constexpr):
    """The token that a route visits at step t, or a vector of them; -1 for padding and past the end."""
    if p_indices is None:
        token = tl.where(t < steps, t, -1)
    else:
        token = tl.load(p_indices + t, mask=t < steps, other=-1)
    return token.to(tl.int64) if LONG else token


@triton.jit
def _load_rows(p_rows, o_token, o, m, s_l, s_o):
    # (STEPS, X): what X says of a tile's tokens
    return tl.load(
        p_rows + o_token[:, None] * s_l + o[None, :] * s_o, mask=(o_token >= 0)[:, None] & m[None, :], other=0.0
    )


@triton.jit
def _load_low(p_low, o_token, o_r, rank, s_l, s_r, ALIGNED: tl.constexpr):
    # (STEPS, BLOCK_R): columns of a tile's tokens. What the compiler is told of their alignment widens the loads.
    o_low, m_r = o_token[:, None] * s_l, o_r < rank
    if ALIGNED > 1:
        o_low, m_r = tl.multiple_of(o_low, [ALIGNED, ALIGNED]), tl.max_constancy(m_r, [ALIGNED])
    return tl.load(p_low + o_low + o_r[None, :] * s_r, mask=(o_token >= 0)[:, None] & m_r[None, :], other=0.0)


@triton.jit
def _store_rows(p_rows, b_rows, o_token, o, m, s_l, s_o):
    # (STEPS, X)
    tl.store(p_rows + o_token[:, None] * s_l + o[None, :] * s_o, b_rows, mask=(o_token >= 0)[:, None] & m[None, :])


@triton.jit
def _load_weight(p_dt_weight, i_k, channels, rank, o_d, o_r, m_d, m_r):
    # (BLOCK_R, channels)
    o_weight = (i_k * channels + o_d)[None, :] * rank + o_r[:, None]
    return tl.load(p_dt_weight + o_weight, mask=m_d[None, :] & m_r[:, None], other=0.0).to(tl.float32)


@triton.jit
def _product(b_low, b_weight, b_rest, PRECISION: tl.constexpr):
    """(STEPS, channels): columns times weights. For tensor cores, columns of 16 bits are one term, weights are two."""
    if PRECISION == "ieee" or b_low.dtype == tl.float32:
        return tl.dot(b_low.to(tl.float32), b_weight, input_precision=PRECISION)
    elif b_low.dtype == tl.bfloat16:
        return tl.dot(b_low, b_weight) + tl.dot(b_low, b_rest)
    else:
        b_low = b_low.to(tl.float32)
        return tl.dot(b_low, b_weight, input_precision="tf32") + tl.dot(b_low, b_rest, input_precision="tf32")


@triton.jit
def _terms(b_weight, p_low, PRECISION: tl.constexpr):
    """Weights as `_product` takes them: the first 8 or 11 bits, and those that follow."""
    if PRECISION == "ieee" or p_low.dtype.element_ty == tl.float32:
        return b_weight, b_weight
    elif p_low.dtype.element_ty == tl.bfloat16:
        b_high = b_weight.to(tl.bfloat16)
        return b_high, (b_weight - b_high.to(tl.float32)).to(tl.bfloat16)
    else:
        b_high = (b_weight.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        return b_high, b_weight - b_high


@triton.jit
def _halved(tile):
    """A float32 tile in two terms of bfloat16: its first bits, cut off, and the rest, rounded."""
    bits = tile.to(tl.int32, bitcast=True)
    rest = tile - (bits & -65536).to(tl.float32, bitcast=True)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), rest.to(tl.bfloat16)


@triton.jit
def _follow(FOLLOWS: tl.constexpr):
    """Where a GPU can, let the next launch come up while this one runs; nothing is touched before the last one ends."""
    if FOLLOWS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _float(tile, other, o_t):
    """The tile in float32; `other`, as loaded, is never taken, but keeps what follows from being computed twice."""
    return tl.where((o_t >= 0)[:, None], tile.to(tl.float32), other.to(tl.float32))


@triton.jit
def _turned(tile):
    """The tile with whole columns in a thread; where an axis comes and goes, the compiler lays out anew."""
    return tl.sum(tile[:, None, :], 1)


@triton.jit
def _spread(tile, LOADED: tl.constexpr):
    """The tile, laid out by a product, as a load lays it out: 16 bytes of LOADED in a thread, the rest in lanes."""
    STEPS: tl.constexpr = tile.shape[0]
    CHANNELS: tl.constexpr = tile.shape[1]
    MOST: tl.constexpr = 128 // LOADED.primitive_bitwidth
    RUN: tl.constexpr = CHANNELS if CHANNELS < MOST else MOST
    tile = tl.permute(tl.reshape(tile, (STEPS, CHANNELS // RUN, RUN)), (2, 0, 1))
    tile = tl.permute(tl.sum(tile[:, None, :, :], 1), (1, 2, 0))
    return tl.reshape(tile, (STEPS, CHANNELS))


@triton.jit
def _row(tile, o_t, t):
    """Row t of a float32 (STEPS, channels) tile. A sum of integers, since x + 0 is x for those and folds away."""
    return tl.sum(tl.where((o_t == t)[:, None], tile.to(tl.int32, bitcast=True), 0), 0).to(tl.float32, bitcast=True)


@triton.jit
def _put(tile, o_t, t, row):
    """The tile with (channels,) in its row t."""
    return tl.where((o_t == t)[:, None], row[None, :], tile)


@triton.jit
def _load_column(p_column, o_token, s_l):
    # (STEPS,): the only state of a tile's tokens
    return tl.load(p_column + o_token * s_l, mask=o_token >= 0, other=0.0)


@triton.jit
def _load_ahead(p_x, p_dt, p_B, p_C, o_token, o_d, m_d, s_xl, s_xd, s_dtl, s_dtd, s_Bl, s_Cl, WHOLE: tl.constexpr):
    """A tile of x, of dt if it comes whole, of B and C.

    Called a tile ahead of its use: the compiler moves loads down to where they are used, but not into the next pass.
    """
    b_x = _load_rows(p_x, o_token, o_d, m_d, s_xl, s_xd)
    b_dt = _load_rows(p_dt, o_token, o_d, m_d, s_dtl, s_dtd) if WHOLE else b_x
    return b_x, b_dt, _load_column(p_B, o_token, s_Bl), _load_column(p_C, o_token, s_Cl)


@triton.jit
def _segment(i_s, segments, steps, MULTIPLE: tl.constexpr):
    """First step of a segment, and the one behind its last: a long route in few sequences is cut for more programs."""
    length = tl.cdiv(tl.cdiv(steps, MULTIPLE), segments) * MULTIPLE
    return tl.minimum(i_s * length, steps), tl.minimum((i_s + 1) * length, steps)


@triton.jit
def _pass_on(b_state, b_A, p_ends, p_spans, o_end, m_d):
    """What a segment makes of the state, or of its gradient, that comes to it."""
    b_span, b_end = tl.load(p_spans + o_end, mask=m_d, other=0.0), tl.load(p_ends + o_end, mask=m_d, other=0.0)
    return tl.exp2(b_span * b_A) * b_state + b_end


@triton.jit
def _load_saved(p_saved, i_bk, i_tile, tiles, channels, o_d, m_d):
    # (channels,): the state before a tile. Where there is none, the next is as good: no step depends on it.
    return tl.load(p_saved + (i_bk * tiles + tl.minimum(tl.maximum(i_tile, 0), tiles - 1)) * channels + o_d, mask=m_d)


@triton.jit
def _load_parameter(p_parameter, o_channel, m_d):
    # (channels,); an absent one is 0
    if p_parameter is None:
        return tl.zeros(m_d.shape, tl.float32)
    else:
        return tl.load(p_parameter + o_channel, mask=m_d, other=0.0).to(tl.float32)


@triton.jit
def forward(
    p_x,
    p_dt,
    p_A,  # (K, D, N) contiguous, as are the parameters and states below
    p_B,
    p_C,
    p_D,  # (K, D) or None
    p_indices,  # (K, S) or None
    p_dt_weight,  # (K, D, R) or None
    p_dt_bias,  # (K, D) or None
    p_initial,  # (B, K, D, N) or None
    p_ends,  # (B, K, segments, D, N): what each segment adds to the state at its end, or None
    p_spans,  # (B, K, segments, D): its sum of step sizes, or None
    p_y,
    p_last,  # (B, K, D, N) or None
    p_saved,  # (B, K, tiles, D, N) or None: the states before every SAVED steps
    routes,
    channels,
    rank,
    steps,
    segments,
    s_xb,
    s_xl,
    s_xk,
    s_xd,
    s_dtb,
    s_dtl,
    s_dtk,
    s_dtd,
    s_Bb,
    s_Bl,
    s_Bk,
    s_Bn,
    s_Cb,
    s_Cl,
    s_Ck,
    s_Cn,
    s_yb,
    s_yl,
    s_yk,
    s_yd,
    SOFTPLUS: tl.constexpr,
    SAVED: tl.constexpr,
    ENDS: tl.constexpr,  # fill p_ends and p_spans, and nothing else
    ROUTES: tl.constexpr,  # that a program takes one after the other and adds up in p_y, of which there are fewer then
    WRITTEN: tl.constexpr,  # p_y holds something to add to from the start
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,  # elements that columns of low rank come in
    FOLLOWS: tl.constexpr,
):
    _follow(FOLLOWS)
    blocks = tl.cdiv(channels, CHANNELS)
    i_d, i_group = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    i_s, groups = tl.program_id(1), routes // ROUTES
    i_b, i_group = i_group // groups, i_group % groups
    o_t, o_r = tl.arange(0, STEPS), tl.arange(0, BLOCK_R)
    first = (i_d.to(tl.int64) if LONG else i_d) * CHANNELS
    o_d = first + tl.arange(0, CHANNELS)
    m_d, m_r = o_d < channels, o_r < rank
    p_y += i_b * s_yb + i_group * s_yk
    for i_turn in range(0, ROUTES):
        i_k = i_group * ROUTES + i_turn
        i_bk = i_b * routes + i_k
        q_x = p_x + i_b * s_xb + i_k * s_xk
        o_dt = i_b * s_dtb + i_k * s_dtk
        q_dt = p_dt + (tl.multiple_of(o_dt, [ALIGNED]) if ALIGNED > 1 else o_dt)
        q_B = p_B + i_b * s_Bb + i_k * s_Bk
        q_C = p_C + i_b * s_Cb + i_k * s_Ck
        q_indices = p_indices
        if p_indices is not None:
            q_indices = p_indices + i_k * steps

        # (CHANNELS,)
        o_channel, o_state = i_k * channels + o_d, i_bk * channels + o_d
        b_A = tl.load(p_A + o_channel, mask=m_d, other=0.0).to(tl.float32) * LOG2E
        b_D, b_bias = _load_parameter(p_D, o_channel, m_d), _load_parameter(p_dt_bias, o_channel, m_d)
        b_h = tl.zeros((CHANNELS,), tl.float32)
        if p_initial is not None and not ENDS:
            b_h = tl.load(p_initial + o_state, mask=m_d, other=0.0).to(tl.float32)
        if p_ends is not None and not ENDS:
            for i_before in range(0, i_s):
                b_h = _pass_on(b_h, b_A, p_ends, p_spans, (i_bk * segments + i_before) * channels + o_d, m_d)
        if p_dt_weight is not None:
            b_weight = _load_weight(p_dt_weight, i_k, channels, rank, o_d, o_r, m_d, m_r)
            b_high, b_rest = _terms(b_weight, p_dt, PRECISION)

        first_step, last_step = _segment(i_s, segments, steps, SAVED if SAVED > STEPS else STEPS)
        b_span = tl.zeros((STEPS, CHANNELS), tl.float32)
        # Tokens are read two tiles ahead, their tensors one.
        o_token = _token(q_indices, first_step + o_t, steps, LONG)
        o_next = _token(q_indices, first_step + STEPS + o_t, steps, LONG)
        b_x, b_dt, b_B, b_C = _load_ahead(
            q_x, q_dt, q_B, q_C, o_token, o_d, m_d, s_xl, s_xd, s_dtl, s_dtd, s_Bl, s_Cl, p_dt_weight is None
        )
        if p_dt_weight is not None:
            b_low = _load_low(q_dt, o_token, o_r, rank, s_dtl, s_dtd, ALIGNED)
        for start in range(first_step, last_step, STEPS):
            i_tile = i_bk * tl.cdiv(steps, SAVED) + start // SAVED
            if p_saved is not None and SAVED > STEPS:  # noqa: SIM102 (the first is settled by the compiler)
                if start % SAVED == 0:
                    tl.store(p_saved + i_tile * channels + o_d, b_h, mask=m_d)
            next_x, next_dt, next_B, next_C = _load_ahead(
                q_x, q_dt, q_B, q_C, o_next, o_d, m_d, s_xl, s_xd, s_dtl, s_dtd, s_Bl, s_Cl, p_dt_weight is None
            )
            # (STEPS,)
            o_after = _token(q_indices, start + 2 * STEPS + o_t, steps, LONG)

            if (ROUTES > 1 or WRITTEN) and not ENDS:
                o_sum = tl.where(i_turn > 0, o_token, -1) if not WRITTEN else o_token
                b_sum = _load_rows(p_y, o_sum, o_d, m_d, s_yl, s_yd)

            loaded_x = b_x
            b_x = b_x.to(tl.float32)
            if p_dt_weight is None:
                b_v = b_dt
            else:
                b_v = _spread(_product(b_low, b_high, b_rest, PRECISION), p_x.dtype.element_ty)
                b_low = _load_low(q_dt, o_next, o_r, rank, s_dtl, s_dtd, ALIGNED)
            b_v, b_s = _step_sizes(_float(b_v, loaded_x, o_t) + b_bias[None, :], start + o_t < steps, SOFTPLUS)
            b_a = _turned(tl.exp2(b_s * b_A[None, :] + BIAS))
            b_u = _turned(b_s * b_x * b_B.to(tl.float32)[:, None])
            b_y = tl.zeros((STEPS, CHANNELS), tl.float32)
            for t in tl.static_range(STEPS):
                if p_saved is not None and SAVED <= STEPS and t % SAVED == 0:
                    tl.store(p_saved + (i_tile + t // SAVED) * channels + o_d, b_h, mask=m_d & (start + t < steps))
                b_h = _row(b_a, o_t, t) * b_h + _row(b_u, o_t, t)
                b_y = _put(b_y, o_t, t, b_h)
            if ENDS:
                b_span += b_s
            else:
                b_y = _float(b_y, loaded_x, o_t) * b_C.to(tl.float32)[:, None] + b_D[None, :] * b_x
                if ROUTES > 1 or WRITTEN:
                    b_y += b_sum.to(tl.float32)
                _store_rows(p_y, b_y, o_token, o_d, m_d, s_yl, s_yd)
            o_token, o_next = o_next, o_after
            b_x, b_dt, b_B, b_C = next_x, next_dt, next_B, next_C

        if ENDS:
            o_end = (i_bk * segments + i_s) * channels + o_d
            tl.store(p_ends + o_end, b_h, mask=m_d)
            tl.store(p_spans + o_end, tl.sum(b_span, 0), mask=m_d)
        elif p_last is not None:  # noqa: SIM102 (the first condition is settled by the compiler, the second is not)
            if i_s == segments - 1:
                tl.store(p_last + o_state, b_h, mask=m_d)
        if ROUTES > 1:
            tl.debug_barrier()  # what the route wrote is seen by all lanes


@triton.jit
def backward(
    p_x,
    p_dt,
    p_A,
    p_B,
    p_C,
    p_D,
    p_indices,
    p_dt_weight,
    p_dt_bias,
    p_saved,  # (B, K, tiles, D, N)
    p_dy,  # or None
    p_dlast,  # (B, K, D, N) or None
    p_ends,  # as forward: what each segment adds to what it hands back to the one before
    p_spans,
    p_dx,
    p_ddt,  # of the whole dt, of low rank too
    p_dB,  # (blocks, B, K, S): a share of each block of channels in the order of steps, as dC
    p_dC,
    p_dper_channel,  # (B, segments, N + 2, K, D): gradients of A, D, dt_bias
    p_dinitial,  # (B, K, D, N) or None
    routes,
    channels,
    rank,
    steps,
    segments,
    s_xb,
    s_xl,
    s_xk,
    s_xd,
    s_dtb,
    s_dtl,
    s_dtk,
    s_dtd,
    s_Bb,
    s_Bl,
    s_Bk,
    s_Bn,
    s_Cb,
    s_Cl,
    s_Ck,
    s_Cn,
    s_dyb,
    s_dyl,
    s_dyk,
    s_dyd,
    s_dxb,
    s_dxl,
    s_dxk,
    s_dxd,
    s_ddtb,
    s_ddtl,
    s_ddtk,
    s_ddtd,
    items,
    SOFTPLUS: tl.constexpr,
    ENDS: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,  # elements that columns of low rank come in
    HALVED: tl.constexpr,  # p_ddt takes two terms of bfloat16, the second `channels` elements behind the first
    FOLLOWS: tl.constexpr,
):
    _follow(FOLLOWS)
    blocks = tl.cdiv(channels, CHANNELS)
    i_d, i_bk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    i_s = tl.program_id(1)
    i_b, i_k, i_bk = (i_bk // routes).to(tl.int64), (i_bk % routes).to(tl.int64), i_bk.to(tl.int64)
    o_t, o_r = tl.arange(0, STEPS), tl.arange(0, BLOCK_R)
    first = (i_d.to(tl.int64) if LONG else i_d) * CHANNELS
    o_d = first + tl.arange(0, CHANNELS)
    m_d, m_r = o_d < channels, o_r < rank
    p_x += i_b * s_xb + i_k * s_xk
    o_dt = i_b * s_dtb + i_k * s_dtk
    p_dt += tl.multiple_of(o_dt, [ALIGNED]) if ALIGNED > 1 else o_dt
    p_B += i_b * s_Bb + i_k * s_Bk
    p_C += i_b * s_Cb + i_k * s_Ck
    p_dx += i_b * s_dxb + i_k * s_dxk
    p_ddt += i_b * s_ddtb + i_k * s_ddtk
    i_share = (i_d.to(tl.int64) * items + i_b) * routes + i_k
    p_dB += i_share * steps
    p_dC += i_share * steps
    if p_dy is not None:
        p_dy += i_b * s_dyb + i_k * s_dyk
    if p_indices is not None:
        p_indices += i_k * steps

    # (CHANNELS,)
    o_channel, o_state = i_k * channels + o_d, i_bk * channels + o_d
    b_A = tl.load(p_A + o_channel, mask=m_d, other=0.0).to(tl.float32) * LOG2E
    b_D, b_bias = _load_parameter(p_D, o_channel, m_d), _load_parameter(p_dt_bias, o_channel, m_d)
    b_g = tl.zeros((CHANNELS,), tl.float32)  # exp(s_{t+1} A) g_{t+1}: what comes back from later steps
    if p_dlast is not None and not ENDS:
        b_g = tl.load(p_dlast + o_state, mask=m_d, other=0.0).to(tl.float32)
    if p_ends is not None and not ENDS:
        for i_after in range(segments - 1, i_s, -1):
            b_g = _pass_on(b_g, b_A, p_ends, p_spans, (i_bk * segments + i_after) * channels + o_d, m_d)
    b_dA = tl.zeros((STEPS, CHANNELS), tl.float32)
    b_dD, b_dbias = b_dA, b_dA
    if p_dt_weight is not None:
        b_weight = _load_weight(p_dt_weight, i_k, channels, rank, o_d, o_r, m_d, m_r)
        b_high, b_rest = _terms(b_weight, p_dt, PRECISION)

    if ENDS:
        i_s += 1  # the first segment hands nothing back
    tiles = tl.cdiv(steps, STEPS)
    first_step, last_step = _segment(i_s, segments, steps, STEPS)
    first_tile, last_tile = first_step // STEPS, tl.cdiv(last_step, STEPS)
    b_span = tl.zeros((STEPS, CHANNELS), tl.float32)
    # Tokens are read two tiles ahead, their tensors one; before the first tile lies nothing, as behind the last.
    o_last = (last_tile - 1) * STEPS + o_t
    o_token = _token(p_indices, o_last, steps, LONG)
    o_next = _token(p_indices, tl.where(o_last < STEPS, steps, o_last - STEPS), steps, LONG)
    b_x, b_dt, b_B, b_C = _load_ahead(
        p_x, p_dt, p_B, p_C, o_token, o_d, m_d, s_xl, s_xd, s_dtl, s_dtd, s_Bl, s_Cl, p_dt_weight is None
    )
    b_dy = b_x
    if p_dy is not None:
        b_dy = _load_rows(p_dy, o_token, o_d, m_d, s_dyl, s_dyd)
    b_h = b_g
    if not ENDS:
        b_h = _load_saved(p_saved, i_bk, last_tile - 1, tiles, channels, o_d, m_d)
    if p_dt_weight is not None:
        b_low = _load_low(p_dt, o_token, o_r, rank, s_dtl, s_dtd, ALIGNED)
    for i_back in range(first_tile, last_tile):
        i_tile = first_tile + last_tile - 1 - i_back
        start = i_tile * STEPS
        next_h = b_h
        if not ENDS:  # the state before each step of the tile comes from the saved one
            next_h = _load_saved(p_saved, i_bk, i_tile - 1, tiles, channels, o_d, m_d)
        next_x, next_dt, next_B, next_C = _load_ahead(
            p_x, p_dt, p_B, p_C, o_next, o_d, m_d, s_xl, s_xd, s_dtl, s_dtd, s_Bl, s_Cl, p_dt_weight is None
        )
        next_dy = next_x
        if p_dy is not None:
            next_dy = _load_rows(p_dy, o_next, o_d, m_d, s_dyl, s_dyd)
        # (STEPS,)
        o_after = start - 2 * STEPS + o_t
        o_after = _token(p_indices, tl.where(o_after < 0, steps, o_after), steps, LONG)

        loaded_x = b_x
        b_x = b_x.to(tl.float32)
        if p_dt_weight is None:
            b_v = b_dt
        else:
            b_v = _spread(_product(b_low, b_high, b_rest, PRECISION), p_x.dtype.element_ty)
            b_low = _load_low(p_dt, o_next, o_r, rank, s_dtl, s_dtd, ALIGNED)
        b_v, b_s = _step_sizes(_float(b_v, loaded_x, o_t) + b_bias[None, :], start + o_t < steps, SOFTPLUS)
        b_sx = b_s * b_x
        if p_dy is not None:
            b_dy = _float(b_dy, loaded_x, o_t)
        else:
            b_dy = tl.zeros((STEPS, CHANNELS), tl.float32)

        b_a = tl.exp2(b_s * b_A[None, :] + BIAS)
        b_at = _turned(b_a)
        b_y = _turned(b_C.to(tl.float32)[:, None] * b_dy)
        if ENDS:
            for t in tl.static_range(STEPS - 1, -1, -1):
                b_g = (b_g + _row(b_y, o_t, t)) * _row(b_at, o_t, t)
            b_span += b_s
        else:
            b_Bs = b_B.to(tl.float32)[:, None]
            b_u = b_sx * b_Bs
            b_ut = _turned(b_u)
            b_before = tl.zeros((STEPS, CHANNELS), tl.float32)
            b_gs = b_before
            for t in tl.static_range(STEPS):
                b_before = _put(b_before, o_t, t, b_h)
                b_h = _row(b_at, o_t, t) * b_h + _row(b_ut, o_t, t)
            b_g += _row(b_y, o_t, STEPS - 1)
            b_gs = _put(b_gs, o_t, STEPS - 1, b_g)
            for t in tl.static_range(STEPS - 2, -1, -1):
                b_g = _row(b_at, o_t, t + 1) * b_g + _row(b_y, o_t, t)
                b_gs = _put(b_gs, o_t, t, b_g)
            b_g *= _row(b_at, o_t, 0)
            b_kept = b_a * b_before  # the part of h_t that was there before
            m_t = start + o_t < steps
            tl.store(p_dC + start + o_t, tl.sum((b_kept + b_u) * b_dy, 1), mask=m_t)
            tl.store(p_dB + start + o_t, tl.sum(b_gs * b_sx, 1), mask=m_t)
            b_dsx = b_gs * b_Bs
            b_kept *= b_gs
            b_dA += b_s * b_kept

            b_dv = b_kept * b_A[None, :] * LN2 + b_dsx * b_x
            if SOFTPLUS:
                b_dv *= tl.exp2((b_v - b_s) * LOG2E)  # softplus' derivative, sigmoid(v) = exp(v - softplus(v))
            else:
                b_dv = tl.where((start + o_t < steps)[:, None], b_dv, 0.0)
            b_dx = b_s * b_dsx + b_D[None, :] * b_dy
            b_dD += b_dy * b_x
            b_dbias += b_dv
            _store_rows(p_dx, b_dx, o_token, o_d, m_d, s_dxl, s_dxd)
            if HALVED:
                b_ddt, b_ddt_rest = _halved(b_dv)
                _store_rows(p_ddt, b_ddt, o_token, o_d, m_d, s_ddtl, s_ddtd)
                _store_rows(p_ddt + channels, b_ddt_rest, o_token, o_d, m_d, s_ddtl, s_ddtd)
            else:
                _store_rows(p_ddt, b_dv, o_token, o_d, m_d, s_ddtl, s_ddtd)
        o_token, o_next = o_next, o_after
        b_x, b_dt, b_B, b_C, b_dy, b_h = next_x, next_dt, next_B, next_C, next_dy, next_h

    if ENDS:
        o_end = (i_bk * segments + i_s) * channels + o_d
        tl.store(p_ends + o_end, b_g, mask=m_d)
        tl.store(p_spans + o_end, tl.sum(b_span, 0), mask=m_d)
    else:
        p_dper_channel += (i_b * segments + i_s) * 3 * routes * channels + o_channel
        tl.store(p_dper_channel, tl.sum(b_dA, 0), mask=m_d)
        tl.store(p_dper_channel + routes * channels, tl.sum(b_dD, 0), mask=m_d)
        tl.store(p_dper_channel + 2 * routes * channels, tl.sum(b_dbias, 0), mask=m_d)
        if p_dinitial is not None:  # noqa: SIM102
            if i_s == 0:
                tl.store(p_dinitial + o_state, b_g, mask=m_d)
