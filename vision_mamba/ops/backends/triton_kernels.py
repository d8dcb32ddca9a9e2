"""The scan in Triton: forward, backward, and the sum of shares that both leave to a second launch.

Along every route, with v_t = dt_t + dt_bias and s_t = softplus(v_t):

    h_t = exp(s_t A) h_{t-1} + s_t B_t x_t          y_t = <C_t, h_t> + D x_t

Grid: one program = one batch item, one route and GROUPS x LANES channels. It holds their states, (GROUPS, BLOCK_N,
LANES) float32, in registers, and walks the route STEPS at a time, following the index table. Channels lie across the
lanes of a warp, so a step reads neighbouring elements of one token whatever the order; lanes that LANES leaves over
share a channel's states, and GROUPS channels a lane save exchanges where dB and dC are summed over channels.

Tiles: x, dt and dy come STEPS rows at once, so that many loads are in flight and all lanes form the step sizes; `_row`
then takes a row out for the recurrence. Where a thread holds whole columns that is free: the compiler sees which
register it is. The row strides are kept from specialisation for that: known to be a multiple of 16, they would make
the compiler spread a tile's rows over the lanes to load 16 bytes each.

Backward: forward saves the states every STEPS steps. From there a program computes the tile's states once more, keeps
them in registers, and walks back with g_t = dL/dh_t = C_t dy_t + exp(s_{t+1} A) g_{t+1}. No (B, L, D, N) anywhere.

Precision: states and sums float32; log2(e) is folded into A, so that a decay is one exp2. Sums that cross programs are
written as shares and added in order by `merge`, so results are equal bit by bit from run to run.

Names: p_ pointer, b_ block loaded, o_ offsets, m_ mask, i_ index; sizes are words; s_xl is the stride of x along its
tokens (b batch, l tokens, k routes, d channels, n states, r rank).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Arguments whose divisibility must not decide the layout of a tile; see above.
_PLAIN = [
    *("channels", "steps"),
    *("s_xb", "s_xl", "s_xk", "s_dtb", "s_dtl", "s_dtk", "s_yb", "s_yl", "s_yk"),
    *("s_dyb", "s_dyl", "s_dyk", "s_dxb", "s_dxl", "s_dxk", "s_ddtp", "s_ddtb", "s_ddtl", "s_ddtk"),
]


@triton.jit
def _row(tile, o_t, t):
    """Row t of a float32 (STEPS, X, Y) tile as (X, Y). A sum of integers, since x + 0 is x for those and folds away."""
    return tl.sum(tl.where((o_t == t)[:, None, None], tile.to(tl.int32, bitcast=True), 0), 0).to(
        tl.float32, bitcast=True
    )


@triton.jit
def _put(tile, o_t, t, row):
    """The tile with (X, Y) in its row t."""
    return tl.where((o_t == t)[:, None, None], row[None, :, :], tile)


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
def _token(p_indices, t, steps, LONG: tl.constexpr):
    """The token that a route visits at step t, or a vector of them; -1 for padding and past the end."""
    if p_indices is None:
        token = tl.where(t < steps, t, -1)
    else:
        token = tl.load(p_indices + t, mask=t < steps, other=-1)
    return token.to(tl.int64) if LONG else token


@triton.jit
def _place(o_token, o_d, s_l, s_d):
    return o_token[:, None, None] * s_l + o_d[None, :, :] * s_d


@triton.jit
def _load_tile(p_tile, o_token, o_d, m_d, s_l, s_d):
    # (STEPS, GROUPS, LANES)
    m_tile = (o_token >= 0)[:, None, None] & m_d[None, :, :]
    return tl.load(p_tile + _place(o_token, o_d, s_l, s_d), mask=m_tile, other=0.0)


@triton.jit
def _load_row(p_row, token, o_n, states, s_l, s_n):
    # (BLOCK_N,); a padding step has no states
    m_n = o_n < tl.where(token >= 0, states, 0)
    return tl.load(p_row + token * s_l + o_n * s_n, mask=m_n, other=0.0).to(tl.float32)


@triton.jit
def _load_column(p_column, o_token, s_l):
    # (STEPS,): the only state of a tile's tokens
    return tl.load(p_column + o_token * s_l, mask=o_token >= 0, other=0.0)


@triton.jit
def _store_row(p_row, b_row, token, o_n, states, s_l, s_n):
    # (BLOCK_N,)
    m_n = o_n < tl.where(token >= 0, states, 0)
    tl.store(p_row + token * s_l + o_n * s_n, b_row, mask=m_n)


@triton.jit
def _load_ahead(
    p_x, p_dt, p_B, p_C, o_token, o_d, m_d, s_xl, s_xd, s_dtl, s_dtd, s_Bl, s_Cl, WHOLE: tl.constexpr, ONE: tl.constexpr
):
    """A tile of x; of dt, if it comes whole; and B and C, if they have one state. Else x or tokens stand in, unused.

    Called a tile ahead of its use: the compiler moves loads down to where they are used, but not into the next pass.
    """
    b_x = _load_tile(p_x, o_token, o_d, m_d, s_xl, s_xd)
    b_dt = b_x
    if WHOLE:
        b_dt = _load_tile(p_dt, o_token, o_d, m_d, s_dtl, s_dtd)
    b_B, b_C = o_token, o_token
    if ONE:
        b_B, b_C = _load_column(p_B, o_token, s_Bl), _load_column(p_C, o_token, s_Cl)
    return b_x, b_dt, b_B, b_C


@triton.jit
def _multiply_out(p_dt, p_indices, b_weight, start, steps, rank, o_t, o_r, b_x, s_dtl, s_dtd, LONG: tl.constexpr):
    """A tile of dt from its columns of low rank, row by row."""
    b_dt = tl.zeros(b_x.shape, tl.float32)
    for t in tl.static_range(b_x.shape[0]):
        b_low = _load_row(p_dt, _token(p_indices, start + t, steps, LONG), o_r, rank, s_dtl, s_dtd)
        b_dt = _put(b_dt, o_t, t, tl.sum(b_low[None, :, None] * b_weight, 1))
    return b_dt


@triton.jit
def _load_parameters(p_A, p_D, p_dt_weight, p_dt_bias, i_k, channels, states, rank, o_d, o_n, o_r, m_d, m_n, m_r):
    """A log2(e) (GROUPS, BLOCK_N, LANES), D and dt_bias (GROUPS, LANES), dt_weight as A with BLOCK_R; absent is 0."""
    o_channel = i_k * channels + o_d
    # (GROUPS, BLOCK_N, LANES)
    o_A, m_A = o_channel[:, None, :] * states + o_n[None, :, None], m_d[:, None, :] & m_n[None, :, None]
    b_A = tl.load(p_A + o_A, mask=m_A, other=0.0).to(tl.float32) * LOG2E
    # (GROUPS, BLOCK_R, LANES)
    o_weight, m_weight = o_channel[:, None, :] * rank + o_r[None, :, None], m_d[:, None, :] & m_r[None, :, None]
    b_weight = tl.zeros(m_weight.shape, tl.float32)
    if p_dt_weight is not None:
        b_weight = tl.load(p_dt_weight + o_weight, mask=m_weight, other=0.0).to(tl.float32)
    # (GROUPS, LANES)
    b_D, b_bias = tl.zeros(m_d.shape, tl.float32), tl.zeros(m_d.shape, tl.float32)
    if p_D is not None:
        b_D = tl.load(p_D + o_channel, mask=m_d, other=0.0).to(tl.float32)
    if p_dt_bias is not None:
        b_bias = tl.load(p_dt_bias + o_channel, mask=m_d, other=0.0).to(tl.float32)
    return b_A, b_D, b_weight, b_bias


@triton.jit(do_not_specialize=[name for name in _PLAIN if name[2:4] not in ("dy", "dx", "dd")])
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
    p_y,
    p_last,  # (B, K, D, N) or None
    p_saved,  # (B, K, tiles, N, D) or None: the states before every SAVED steps
    routes,
    channels,
    states,
    rank,
    steps,
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
    STEPS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LONG: tl.constexpr,
):
    blocks = tl.cdiv(channels, GROUPS * LANES)
    i_d, i_bk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    i_b, i_k, i_bk = (i_bk // routes).to(tl.int64), (i_bk % routes).to(tl.int64), i_bk.to(tl.int64)
    o_t, o_n, o_r = tl.arange(0, STEPS), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    o_d = (i_d.to(tl.int64) if LONG else i_d) * (GROUPS * LANES)
    o_d += tl.arange(0, GROUPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    m_d, m_n, m_r = o_d < channels, o_n < states, o_r < rank
    m_nd = m_d[:, None, :] & m_n[None, :, None]
    p_x += i_b * s_xb + i_k * s_xk
    p_dt += i_b * s_dtb + i_k * s_dtk
    p_B += i_b * s_Bb + i_k * s_Bk
    p_C += i_b * s_Cb + i_k * s_Ck
    p_y += i_b * s_yb + i_k * s_yk
    if p_indices is not None:
        p_indices += i_k * steps

    b_A, b_D, b_weight, b_bias = _load_parameters(
        p_A, p_D, p_dt_weight, p_dt_bias, i_k, channels, states, rank, o_d, o_n, o_r, m_d, m_n, m_r
    )
    o_state = (i_bk * channels + o_d)[:, None, :] * states + o_n[None, :, None]
    if p_initial is not None:
        # (GROUPS, BLOCK_N, LANES)
        b_h = tl.load(p_initial + o_state, mask=m_nd, other=0.0).to(tl.float32)
    else:
        b_h = tl.zeros((GROUPS, BLOCK_N, LANES), tl.float32)

    # Tokens are read two tiles ahead, their tensors one.
    o_token, o_next = _token(p_indices, o_t, steps, LONG), _token(p_indices, STEPS + o_t, steps, LONG)
    b_x, b_dt, b_B, b_C = _load_ahead(
        p_x, p_dt, p_B, p_C, o_token, o_d, m_d, s_xl, s_xd, s_dtl, s_dtd, s_Bl, s_Cl, p_dt_weight is None, BLOCK_N == 1
    )
    for start in range(0, steps, STEPS):
        if p_saved is not None:  # noqa: SIM102 (the first condition is settled by the compiler, the second is not)
            if start % SAVED == 0:
                i_tile = i_bk * tl.cdiv(steps, SAVED) + start // SAVED
                o_saved = (i_tile * states + o_n)[None, :, None] * channels + o_d[:, None, :]
                tl.store(p_saved + o_saved, b_h, mask=m_nd)
        next_x, next_dt, next_B, next_C = _load_ahead(
            p_x,
            p_dt,
            p_B,
            p_C,
            o_next,
            o_d,
            m_d,
            s_xl,
            s_xd,
            s_dtl,
            s_dtd,
            s_Bl,
            s_Cl,
            p_dt_weight is None,
            BLOCK_N == 1,
        )
        # (STEPS,)
        o_after = _token(p_indices, start + 2 * STEPS + o_t, steps, LONG)

        b_x = b_x.to(tl.float32)
        if p_dt_weight is None:
            b_v = b_dt.to(tl.float32) + b_bias[None, :, :]
        else:
            b_v = _multiply_out(p_dt, p_indices, b_weight, start, steps, rank, o_t, o_r, b_x, s_dtl, s_dtd, LONG)
            b_v += b_bias[None, :, :]
        b_s = _softplus(b_v) if SOFTPLUS else b_v
        b_s = tl.where((start + o_t < steps)[:, None, None], b_s, 0.0)  # past the end the state stays as it is
        b_sx = b_s * b_x
        b_y = tl.zeros((STEPS, GROUPS, LANES), tl.float32)
        if BLOCK_N == 1:  # one state: all but the recurrence itself is done a tile at a time
            b_a = tl.exp2(b_s * tl.sum(b_A, 1)[None, :, :])
            b_u = b_sx * b_B.to(tl.float32)[:, None, None]
            for t in tl.static_range(STEPS):
                b_h = _row(b_a, o_t, t)[:, None, :] * b_h + _row(b_u, o_t, t)[:, None, :]
                b_y = _put(b_y, o_t, t, tl.sum(b_h, 1))
            b_y *= b_C.to(tl.float32)[:, None, None]
        else:
            for t in tl.static_range(STEPS):
                token = _token(p_indices, start + t, steps, LONG)
                # (BLOCK_N,)
                b_Bt = _load_row(p_B, token, o_n, states, s_Bl, s_Bn)
                b_Ct = _load_row(p_C, token, o_n, states, s_Cl, s_Cn)
                b_a = tl.exp2(_row(b_s, o_t, t)[:, None, :] * b_A)
                b_h = b_a * b_h + _row(b_sx, o_t, t)[:, None, :] * b_Bt[None, :, None]
                b_y = _put(b_y, o_t, t, tl.sum(b_h * b_Ct[None, :, None], 1))
        m_tile = (o_token >= 0)[:, None, None] & m_d[None, :, :]
        tl.store(p_y + _place(o_token, o_d, s_yl, s_yd), b_y + b_D[None, :, :] * b_x, mask=m_tile)
        o_token, o_next = o_next, o_after
        b_x, b_dt, b_B, b_C = next_x, next_dt, next_B, next_C

    if p_last is not None:
        tl.store(p_last + o_state, b_h, mask=m_nd)


@triton.jit(do_not_specialize=[name for name in _PLAIN if name[2:4] not in ("yb", "yl", "yk")])
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
    p_saved,  # (B, K, tiles, N, D)
    p_dy,  # or None
    p_dlast,  # (B, K, D, N) or None
    p_dx,
    p_ddt,  # as dt; a share of each block of channels if dt has low rank
    p_dB,  # a share of each block of channels
    p_dC,  # likewise
    p_dper_channel,  # (B, K, N + 2 + R, D): gradients of A, D, dt_bias, dt_weight
    p_dinitial,  # (B, K, D, N) or None
    routes,
    channels,
    states,
    rank,
    steps,
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
    s_ddtp,  # from share to share
    s_ddtb,
    s_ddtl,
    s_ddtk,
    s_ddtd,
    s_dBp,
    s_dBb,
    s_dBl,
    s_dBk,
    s_dBn,
    s_dCp,
    s_dCb,
    s_dCl,
    s_dCk,
    s_dCn,
    SOFTPLUS: tl.constexpr,
    STEPS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LONG: tl.constexpr,
):
    blocks = tl.cdiv(channels, GROUPS * LANES)
    i_d, i_bk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    i_b, i_k, i_bk = (i_bk // routes).to(tl.int64), (i_bk % routes).to(tl.int64), i_bk.to(tl.int64)
    o_t, o_n, o_r = tl.arange(0, STEPS), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    o_d = (i_d.to(tl.int64) if LONG else i_d) * (GROUPS * LANES)
    o_d += tl.arange(0, GROUPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    i_d = i_d.to(tl.int64)
    m_d, m_n, m_r = o_d < channels, o_n < states, o_r < rank
    m_nd = m_d[:, None, :] & m_n[None, :, None]
    p_x += i_b * s_xb + i_k * s_xk
    p_dt += i_b * s_dtb + i_k * s_dtk
    p_B += i_b * s_Bb + i_k * s_Bk
    p_C += i_b * s_Cb + i_k * s_Ck
    p_dx += i_b * s_dxb + i_k * s_dxk
    p_ddt += i_b * s_ddtb + i_k * s_ddtk
    p_dB += i_d * s_dBp + i_b * s_dBb + i_k * s_dBk
    p_dC += i_d * s_dCp + i_b * s_dCb + i_k * s_dCk
    if p_dt_weight is not None:
        p_ddt += i_d * s_ddtp
    if p_dy is not None:
        p_dy += i_b * s_dyb + i_k * s_dyk
    if p_indices is not None:
        p_indices += i_k * steps

    b_A, b_D, b_weight, b_bias = _load_parameters(
        p_A, p_D, p_dt_weight, p_dt_bias, i_k, channels, states, rank, o_d, o_n, o_r, m_d, m_n, m_r
    )
    o_state = (i_bk * channels + o_d)[:, None, :] * states + o_n[None, :, None]
    # exp(s_{t+1} A) g_{t+1}, (GROUPS, BLOCK_N, LANES): what comes back from later steps
    if p_dlast is not None:
        b_g = tl.load(p_dlast + o_state, mask=m_nd, other=0.0).to(tl.float32)
    else:
        b_g = tl.zeros((GROUPS, BLOCK_N, LANES), tl.float32)
    b_dA = tl.zeros((GROUPS, BLOCK_N, LANES), tl.float32)
    b_dD = tl.zeros((GROUPS, LANES), tl.float32)
    b_dbias = tl.zeros((GROUPS, LANES), tl.float32)
    b_dweight = tl.zeros((GROUPS, BLOCK_R, LANES), tl.float32)

    tiles = tl.cdiv(steps, STEPS)
    # Tokens are read two tiles ahead, their tensors one; before the first tile lies nothing, as behind the last.
    o_last = (tiles - 1) * STEPS + o_t
    o_token = _token(p_indices, o_last, steps, LONG)
    o_next = _token(p_indices, tl.where(o_last < STEPS, steps, o_last - STEPS), steps, LONG)
    b_x, b_dt, b_B, b_C = _load_ahead(
        p_x, p_dt, p_B, p_C, o_token, o_d, m_d, s_xl, s_xd, s_dtl, s_dtd, s_Bl, s_Cl, p_dt_weight is None, BLOCK_N == 1
    )
    b_dy = b_x
    if p_dy is not None:
        b_dy = _load_tile(p_dy, o_token, o_d, m_d, s_dyl, s_dyd)
    for i_back in range(0, tiles):
        i_tile = tiles - 1 - i_back
        start = i_tile * STEPS
        # The states before each step of the tile come from the saved one, (GROUPS, BLOCK_N, LANES).
        o_saved = ((i_bk * tiles + i_tile) * states + o_n)[None, :, None] * channels + o_d[:, None, :]
        b_h = tl.load(p_saved + o_saved, mask=m_nd, other=0.0)
        next_x, next_dt, next_B, next_C = _load_ahead(
            p_x,
            p_dt,
            p_B,
            p_C,
            o_next,
            o_d,
            m_d,
            s_xl,
            s_xd,
            s_dtl,
            s_dtd,
            s_Bl,
            s_Cl,
            p_dt_weight is None,
            BLOCK_N == 1,
        )
        next_dy = next_x
        if p_dy is not None:
            next_dy = _load_tile(p_dy, o_next, o_d, m_d, s_dyl, s_dyd)
        # (STEPS,)
        o_after = start - 2 * STEPS + o_t
        o_after = _token(p_indices, tl.where(o_after < 0, steps, o_after), steps, LONG)

        b_x = b_x.to(tl.float32)
        if p_dt_weight is None:
            b_v = b_dt.to(tl.float32) + b_bias[None, :, :]
        else:
            b_v = _multiply_out(p_dt, p_indices, b_weight, start, steps, rank, o_t, o_r, b_x, s_dtl, s_dtd, LONG)
            b_v += b_bias[None, :, :]
        m_t = (start + o_t < steps)[:, None, None]
        b_s = tl.where(m_t, _softplus(b_v) if SOFTPLUS else b_v, 0.0)
        b_sx = b_s * b_x
        if p_dy is not None:
            b_dy = b_dy.to(tl.float32)
        else:
            b_dy = tl.zeros((STEPS, GROUPS, LANES), tl.float32)

        if BLOCK_N == 1:
            b_a = tl.exp2(b_s * tl.sum(b_A, 1)[None, :, :])
            b_Bs = b_B.to(tl.float32)[:, None, None]
            b_u, b_y = b_sx * b_Bs, b_C.to(tl.float32)[:, None, None] * b_dy
            b_before, b_gs = tl.zeros((STEPS, GROUPS, LANES), tl.float32), tl.zeros((STEPS, GROUPS, LANES), tl.float32)
            for t in tl.static_range(STEPS):
                b_before = _put(b_before, o_t, t, tl.sum(b_h, 1))
                b_h = _row(b_a, o_t, t)[:, None, :] * b_h + _row(b_u, o_t, t)[:, None, :]
            for t in tl.static_range(STEPS - 1, -1, -1):
                b_g += _row(b_y, o_t, t)[:, None, :]
                b_gs = _put(b_gs, o_t, t, tl.sum(b_g, 1))
                b_g *= _row(b_a, o_t, t)[:, None, :]
            b_kept = b_a * b_before  # the part of h_t that was there before
            tl.store(p_dC + o_token * s_dCl, tl.sum(tl.sum((b_kept + b_u) * b_dy, 1), 1), mask=o_token >= 0)
            tl.store(p_dB + o_token * s_dBl, tl.sum(tl.sum(b_gs * b_sx, 1), 1), mask=o_token >= 0)
            b_dsx = b_gs * b_Bs
            b_kept *= b_gs
            b_ds = b_kept * tl.sum(b_A, 1)[None, :, :]
            b_dA += tl.sum(b_s * b_kept, 0)[:, None, :]
        else:
            before = (b_h,)
            for t in tl.static_range(STEPS - 1):
                b_Bt = _load_row(p_B, _token(p_indices, start + t, steps, LONG), o_n, states, s_Bl, s_Bn)
                b_h = (
                    tl.exp2(_row(b_s, o_t, t)[:, None, :] * b_A) * b_h
                    + _row(b_sx, o_t, t)[:, None, :] * b_Bt[None, :, None]
                )
                before = before + (b_h,)  # type: ignore[assignment] # noqa: RUF005 (Triton knows no star)
            b_ds = tl.zeros((STEPS, GROUPS, LANES), tl.float32)  # through the decay, for A log2(e)
            b_dsx = tl.zeros((STEPS, GROUPS, LANES), tl.float32)  # through s x
            for t in tl.static_range(STEPS - 1, -1, -1):
                token = _token(p_indices, start + t, steps, LONG)
                # (BLOCK_N,)
                b_Bt = _load_row(p_B, token, o_n, states, s_Bl, s_Bn)
                b_Ct = _load_row(p_C, token, o_n, states, s_Cl, s_Cn)
                b_st, b_sxt = _row(b_s, o_t, t)[:, None, :], _row(b_sx, o_t, t)[:, None, :]
                b_dyt = _row(b_dy, o_t, t)[:, None, :]
                b_a = tl.exp2(b_st * b_A)
                b_kept = b_a * before[t]
                b_g += b_Ct[None, :, None] * b_dyt
                b_h = b_kept + b_sxt * b_Bt[None, :, None]
                _store_row(p_dC, tl.sum(tl.sum(b_h * b_dyt, 0), 1), token, o_n, states, s_dCl, s_dCn)
                _store_row(p_dB, tl.sum(tl.sum(b_g * b_sxt, 0), 1), token, o_n, states, s_dBl, s_dBn)
                b_dsx = _put(b_dsx, o_t, t, tl.sum(b_g * b_Bt[None, :, None], 1))
                b_kept *= b_g
                b_ds = _put(b_ds, o_t, t, tl.sum(b_kept * b_A, 1))
                b_dA += b_st * b_kept
                b_g *= b_a

        b_dv = b_ds * LN2 + b_dsx * b_x
        if SOFTPLUS:
            b_dv *= _slope(b_v)
        b_dv = tl.where(m_t, b_dv, 0.0)
        b_dx = b_s * b_dsx + b_D[None, :, :] * b_dy
        b_dD += tl.sum(b_dy * b_x, 0)
        b_dbias += tl.sum(b_dv, 0)
        m_tile = (o_token >= 0)[:, None, None] & m_d[None, :, :]
        tl.store(p_dx + _place(o_token, o_d, s_dxl, s_dxd), b_dx, mask=m_tile)
        if p_dt_weight is None:
            tl.store(p_ddt + _place(o_token, o_d, s_ddtl, s_ddtd), b_dv, mask=m_tile)
        else:
            for t in tl.static_range(STEPS):
                token = _token(p_indices, start + t, steps, LONG)
                # (BLOCK_R,)
                b_low = _load_row(p_dt, token, o_r, rank, s_dtl, s_dtd)
                b_dvt = _row(b_dv, o_t, t)[:, None, :]
                b_dweight += b_low[None, :, None] * b_dvt
                _store_row(p_ddt, tl.sum(tl.sum(b_weight * b_dvt, 0), 1), token, o_r, rank, s_ddtl, s_ddtd)
        o_token, o_next = o_next, o_after
        b_x, b_dt, b_B, b_C, b_dy = next_x, next_dt, next_B, next_C, next_dy

    # (GROUPS, LANES) in each row of (N + 2 + R, D)
    p_dper_channel += i_bk * (states + 2 + rank) * channels + o_d
    o_row = o_n[None, :, None] * channels
    tl.store(p_dper_channel[:, None, :] + o_row, b_dA, mask=m_nd)
    tl.store(p_dper_channel + states * channels, b_dD, mask=m_d)
    tl.store(p_dper_channel + (states + 1) * channels, b_dbias, mask=m_d)
    if p_dt_weight is not None:
        o_row = (states + 2 + o_r)[None, :, None] * channels
        tl.store(p_dper_channel[:, None, :] + o_row, b_dweight, mask=m_d[:, None, :] & m_r[None, :, None])
    if p_dinitial is not None:
        tl.store(p_dinitial + o_state, b_g, mask=m_nd)


@triton.jit
def merge(p_shares, p_sum, shares, size, BLOCK: tl.constexpr):
    """Add up the leading axis of (shares, size) in order; one program = BLOCK sums."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, shares):
        # (BLOCK,)
        b_sum += tl.load(p_shares + o, mask=m, other=0.0).to(tl.float32)
        p_shares += size
    tl.store(p_sum + o, b_sum, mask=m)
