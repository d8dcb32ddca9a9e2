"""The scan in Triton for several states a channel; equations, grid and names are those of triton_kernels.py.

A step size of low rank comes multiplied out by triton_low_rank.py.

Layout: a warp shares LANES x GROUPS channels; a thread has GROUPS of them and BLOCK_N / PARTS states of each, so that
sums over states and over channels both stay mostly within a thread. States are tensors of (PARTS, LANES, WARPS,
GROUPS, RUNS, RUN): of what is loaded, the compiler gives a thread the RUN <= 4 last neighbours, and the first axes to
the lanes. A tile of time is (STEPS, GROUPS, WARPS, LANES, PARTS), the same for all PARTS, or (STEPS, RUNS, RUN, WARPS,
LANES, PARTS), the same for all WARPS and LANES: what is not loaded, the compiler lays out from the last axis on. So
both have the same lanes, and taking a row out of a tile moves nothing between them. What changes lanes is done a tile
at a time, before the loop over its steps and after it. Lanes of neighbouring PARTS have neighbouring runs, so that
states are written in whole sectors of memory. A sum over lanes is a change of layout and a sum within threads, not
shuffles: a sixth fewer instructions in all at 16 states. Where tokens lie side by side, as in the classic layout, the
compiler loads with the steps of a tile in neighbouring lanes, and sums come back with them there (ALONG), or each would
change lanes once more.
"""

import triton
import triton.language as tl

from vision_mamba.ops.backends.triton_kernels import (
    BIAS,
    LN2,
    LOG2E,
    _float,
    _load_rows,
    _segment,
    _slope,
    _softplus,
    _store_rows,
    _token,
    _turned,
)

#: The same number to 24 bits, written otherwise.
SAME_BIAS = tl.constexpr(1.0001e-8)
#: Decays of a tile that a thread of the backward pass keeps; more are made twice.
KEPT = tl.constexpr(16)


@triton.jit
def _spread_channels(
    tile,
    STEPS: tl.constexpr,
    GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """(STEPS, channels) as (STEPS, GROUPS, WARPS, LANES, PARTS)."""
    tile = tl.permute(tl.reshape(tile, (STEPS, WARPS, LANES, GROUPS)), (0, 3, 1, 2))
    return tl.broadcast_to(tile[:, :, :, :, None], (STEPS, GROUPS, WARPS, LANES, PARTS))


@triton.jit
def _spread_states(
    tile,
    STEPS: tl.constexpr,
    RUNS: tl.constexpr,
    RUN: tl.constexpr,
    WARPS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """(STEPS, BLOCK_N) as (STEPS, RUNS, RUN, WARPS, LANES, PARTS), in float32."""
    tile = tl.permute(tl.reshape(tile, (STEPS, RUNS, PARTS, RUN)), (0, 1, 3, 2))
    return tl.broadcast_to(tile[:, :, :, None, None, :], (STEPS, RUNS, RUN, WARPS, LANES, PARTS))


@triton.jit
def _channels(tile, o_t, t):
    """Row t of a tile as (PARTS, LANES, WARPS, GROUPS, 1, 1). A sum of integers folds away, since x + 0 is x."""
    rows = tl.where((o_t == t)[:, None, None, None, None], tile.to(tl.int32, bitcast=True), 0)
    row = tl.permute(tl.sum(rows, 0).to(tl.float32, bitcast=True), (3, 2, 1, 0))
    return row[:, :, :, :, None, None]


@triton.jit
def _states(tile, o_t, t):
    """Row t of a tile as (PARTS, LANES, WARPS, 1, RUNS, RUN)."""
    rows = tl.where((o_t == t)[:, None, None, None, None, None], tile.to(tl.int32, bitcast=True), 0)
    row = tl.permute(tl.sum(rows, 0).to(tl.float32, bitcast=True), (4, 3, 2, 0, 1))
    return row[:, :, :, None, :, :]


@triton.jit
def _put_channels(tile, o_t, t, row):
    """The tile with a row's sum over the states of a thread in its row t."""
    row = tl.permute(tl.sum(tl.sum(row, 5), 4), (3, 2, 1, 0))
    return tl.where((o_t == t)[:, None, None, None, None], row[None], tile)


@triton.jit
def _put_states(tile, o_t, t, row):
    """The tile with a row's sum over the channels of a thread in its row t."""
    row = tl.permute(tl.sum(row, 3), (3, 4, 2, 1, 0))
    return tl.where((o_t == t)[:, None, None, None, None, None], row[None], tile)


@triton.jit
def _gather_channels(tile, STEPS: tl.constexpr, CHANNELS: tl.constexpr, ALONG: tl.constexpr):
    """The sum of a tile over PARTS as (STEPS, channels); ALONG the tokens, lanes get it as loads of x lie."""
    if ALONG:
        tile = tl.reshape(tl.permute(tile, (4, 2, 3, 1, 0)), (tile.shape[4], CHANNELS * STEPS))
        return tl.trans(tl.reshape(tl.sum(_turned(tile), 0), (CHANNELS, STEPS)))
    else:
        return tl.reshape(tl.permute(tl.sum(tile, 4), (0, 2, 3, 1)), (STEPS, CHANNELS))


@triton.jit
def _gather_states(tile, STEPS: tl.constexpr, BLOCK_N: tl.constexpr, ALONG: tl.constexpr):
    """The sum of a tile over WARPS and LANES as (STEPS, BLOCK_N)."""
    tile = tl.permute(tile, (3, 4, 1, 5, 2, 0) if ALONG else (3, 4, 0, 1, 5, 2))
    tile = tl.sum(_turned(tl.reshape(tile, (tile.shape[0] * tile.shape[1], STEPS * BLOCK_N))), 0)
    return tl.trans(tl.reshape(tile, (BLOCK_N, STEPS))) if ALONG else tl.reshape(tile, (STEPS, BLOCK_N))


@triton.jit
def _load_ahead(p_x, p_dt, p_B, p_C, o_token, o_d, o_n, m_d, m_n, s_xl, s_xd, s_dtl, s_dtd, s_Bl, s_Bn, s_Cl, s_Cn):
    """A tile of x, dt, B and C; called a tile ahead of its use."""
    b_x, b_dt = _load_rows(p_x, o_token, o_d, m_d, s_xl, s_xd), _load_rows(p_dt, o_token, o_d, m_d, s_dtl, s_dtd)
    return b_x, b_dt, _load_rows(p_B, o_token, o_n, m_n, s_Bl, s_Bn), _load_rows(p_C, o_token, o_n, m_n, s_Cl, s_Cn)


@triton.jit
def _pass_on(b_state, b_A, p_ends, p_spans, i_end, channels, BLOCK_N: tl.constexpr, o_h, o_channel, m_h):
    """What a segment makes of the state, or of its gradient, that comes to it."""
    b_span = tl.load(p_spans + i_end * channels + o_channel, mask=o_channel < channels, other=0.0)
    b_end = tl.load(p_ends + i_end * channels * BLOCK_N + o_h, mask=m_h, other=0.0)
    return tl.exp2(b_span * b_A) * b_state + b_end


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
    p_A,  # (K, D, BLOCK_N) contiguous, as are the parameters and states below
    p_B,
    p_C,
    p_D,  # (K, D) or None
    p_indices,  # (K, S) or None
    p_dt_bias,  # (K, D) or None
    p_initial,  # (B, K, D, BLOCK_N) or None
    p_ends,  # (B, K, segments, D, BLOCK_N): what each segment adds to the state at its end, or None
    p_spans,  # (B, K, segments, D): its sum of step sizes, or None
    p_y,
    p_last,  # (B, K, D, N) or None
    p_saved,  # (B, K, tiles, D, BLOCK_N) or None: the states before every SAVED steps
    routes,
    channels,
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
    states,
    SOFTPLUS: tl.constexpr,
    SAVED: tl.constexpr,
    ENDS: tl.constexpr,  # fill p_ends and p_spans, and nothing else
    STEPS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    WARPS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LONG: tl.constexpr,
    ALONG: tl.constexpr,  # tokens lie side by side in memory
):
    CHANNELS: tl.constexpr = GROUPS * LANES * WARPS
    RUN: tl.constexpr = BLOCK_N // PARTS if BLOCK_N // PARTS < 4 else 4
    RUNS: tl.constexpr = BLOCK_N // PARTS // RUN
    blocks = tl.cdiv(channels, CHANNELS)
    i_d, i_bk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    i_s = tl.program_id(1)
    i_b, i_k, i_bk = (i_bk // routes).to(tl.int64), (i_bk % routes).to(tl.int64), i_bk.to(tl.int64)
    o_t, o_n = tl.arange(0, STEPS), tl.arange(0, BLOCK_N)
    first = (i_d.to(tl.int64) if LONG else i_d) * CHANNELS
    o_d = first + tl.arange(0, CHANNELS)
    m_d, m_n = o_d < channels, o_n < states
    # Channels and states of (PARTS, LANES, WARPS, GROUPS, RUNS, RUN)
    o_channel = tl.arange(0, WARPS)[None, :] * LANES + tl.arange(0, LANES)[:, None]
    o_channel = first + (o_channel[:, :, None] * GROUPS + tl.arange(0, GROUPS))[None, :, :, :, None, None]
    o_state = tl.arange(0, RUNS)[None, :] * PARTS + tl.arange(0, PARTS)[:, None]  # 16 bytes of each part in turn
    o_state = (o_state[:, :, None] * RUN + tl.arange(0, RUN))[:, None, None, None, :, :]
    m_h, o_h = (o_channel < channels) & (o_state >= 0), o_channel * BLOCK_N + o_state
    m_given, o_given = m_h & (o_state < states), o_channel * states + o_state
    p_x += i_b * s_xb + i_k * s_xk
    p_dt += i_b * s_dtb + i_k * s_dtk
    p_B += i_b * s_Bb + i_k * s_Bk
    p_C += i_b * s_Cb + i_k * s_Ck
    p_y += i_b * s_yb + i_k * s_yk
    if p_indices is not None:
        p_indices += i_k * steps

    b_A = tl.load(p_A + i_k * channels * BLOCK_N + o_h, mask=m_h, other=0.0).to(tl.float32) * LOG2E
    b_D, b_bias = _load_parameter(p_D, i_k * channels + o_d, m_d), _load_parameter(p_dt_bias, i_k * channels + o_d, m_d)
    b_h = tl.zeros(b_A.shape, tl.float32)
    if p_initial is not None and not ENDS:
        b_h = tl.load(p_initial + i_bk * channels * BLOCK_N + o_h, mask=m_h, other=0.0).to(tl.float32)
    if p_ends is not None and not ENDS:
        for i_before in range(0, i_s):
            b_h = _pass_on(
                b_h, b_A, p_ends, p_spans, i_bk * segments + i_before, channels, BLOCK_N, o_h, o_channel, m_h
            )

    first_step, last_step = _segment(i_s, segments, steps, SAVED if SAVED > STEPS else STEPS)
    b_span = tl.zeros((STEPS, CHANNELS), tl.float32)
    # Tokens are read two tiles ahead, their tensors one.
    o_token = _token(p_indices, first_step + o_t, steps, LONG)
    o_next = _token(p_indices, first_step + STEPS + o_t, steps, LONG)
    b_x, b_dt, b_B, b_C = _load_ahead(
        p_x, p_dt, p_B, p_C, o_token, o_d, o_n, m_d, m_n, s_xl, s_xd, s_dtl, s_dtd, s_Bl, s_Bn, s_Cl, s_Cn
    )
    for start in range(first_step, last_step, STEPS):
        i_tile = i_bk * tl.cdiv(steps, SAVED) + start // SAVED
        if p_saved is not None and SAVED > STEPS:  # noqa: SIM102 (the first is settled by the compiler)
            if start % SAVED == 0:
                tl.store(p_saved + i_tile * channels * BLOCK_N + o_h, b_h, mask=m_h)
        next_x, next_dt, next_B, next_C = _load_ahead(
            p_x, p_dt, p_B, p_C, o_next, o_d, o_n, m_d, m_n, s_xl, s_xd, s_dtl, s_dtd, s_Bl, s_Bn, s_Cl, s_Cn
        )
        # (STEPS,)
        o_after = _token(p_indices, start + 2 * STEPS + o_t, steps, LONG)

        loaded_B, loaded_C, loaded_x = b_B, b_C, b_x
        b_x = _float(b_x, b_dt, o_t)
        b_v = _float(b_dt, loaded_x, o_t) + b_bias[None, :]
        b_s = _softplus(b_v) if SOFTPLUS else b_v
        b_s = tl.where((start + o_t < steps)[:, None], b_s, 0.0)  # past the end the state stays as it is
        b_ss = _spread_channels(b_s, STEPS, GROUPS, WARPS, LANES, PARTS)
        b_us = _spread_channels(b_s * b_x, STEPS, GROUPS, WARPS, LANES, PARTS)
        b_Bs = _spread_states(_float(b_B, loaded_C, o_t), STEPS, RUNS, RUN, WARPS, LANES, PARTS)
        b_Cs = _spread_states(_float(b_C, loaded_B, o_t), STEPS, RUNS, RUN, WARPS, LANES, PARTS)
        b_ys = tl.zeros((STEPS, GROUPS, WARPS, LANES, PARTS), tl.float32)
        for t in tl.static_range(STEPS):
            if p_saved is not None and SAVED <= STEPS and t % SAVED == 0:
                o_saved = (i_tile + t // SAVED) * channels * BLOCK_N + o_h
                tl.store(p_saved + o_saved, b_h, mask=m_h & (tl.full(m_h.shape, start + t, tl.int32) < steps))
            b_a = tl.exp2(_channels(b_ss, o_t, t) * b_A + BIAS)
            b_h = b_a * b_h + _channels(b_us, o_t, t) * _states(b_Bs, o_t, t)
            if not ENDS:
                b_ys = _put_channels(b_ys, o_t, t, b_h * _states(b_Cs, o_t, t))
        if ENDS:
            b_span += b_s
        else:
            b_y = _gather_channels(b_ys, STEPS, CHANNELS, ALONG) + b_D[None, :] * b_x
            _store_rows(p_y, b_y, o_token, o_d, m_d, s_yl, s_yd)
        o_token, o_next = o_next, o_after
        b_x, b_dt, b_B, b_C = next_x, next_dt, next_B, next_C

    if ENDS:
        i_end = i_bk * segments + i_s
        tl.store(p_ends + i_end * channels * BLOCK_N + o_h, b_h, mask=m_h)
        tl.store(p_spans + i_end * channels + o_d, tl.sum(b_span, 0), mask=m_d)
    elif p_last is not None:  # noqa: SIM102 (the first condition is settled by the compiler, the second is not)
        if i_s == segments - 1:
            tl.store(p_last + i_bk * channels * states + o_given, b_h, mask=m_given)


@triton.jit
def backward(
    p_x,
    p_dt,
    p_A,
    p_B,
    p_C,
    p_D,
    p_indices,
    p_dt_bias,
    p_saved,  # (B, K, tiles, D, BLOCK_N)
    p_dy,  # or None
    p_dlast,  # (B, K, D, BLOCK_N) or None
    p_ends,  # as forward: what each segment adds to what it hands back to the one before
    p_spans,
    p_dx,
    p_ddt,
    p_dB,  # a share of each block of channels, as dC
    p_dC,
    p_dper_channel,  # (B, segments, N + 2, K, D): gradients of A, D, dt_bias
    p_dinitial,  # (B, K, D, N) or None
    routes,
    channels,
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
    states,
    SOFTPLUS: tl.constexpr,
    ENDS: tl.constexpr,
    STEPS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    WARPS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LONG: tl.constexpr,
    ALONG: tl.constexpr,  # tokens lie side by side in memory
):
    CHANNELS: tl.constexpr = GROUPS * LANES * WARPS
    RUN: tl.constexpr = BLOCK_N // PARTS if BLOCK_N // PARTS < 4 else 4
    RUNS: tl.constexpr = BLOCK_N // PARTS // RUN
    blocks = tl.cdiv(channels, CHANNELS)
    i_d, i_bk = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    i_s = tl.program_id(1)
    i_b, i_k, i_bk = (i_bk // routes).to(tl.int64), (i_bk % routes).to(tl.int64), i_bk.to(tl.int64)
    o_t, o_n = tl.arange(0, STEPS), tl.arange(0, BLOCK_N)
    first = (i_d.to(tl.int64) if LONG else i_d) * CHANNELS
    o_d = first + tl.arange(0, CHANNELS)
    m_d, m_n = o_d < channels, o_n < states
    # Channels and states of (PARTS, LANES, WARPS, GROUPS, RUNS, RUN)
    o_channel = tl.arange(0, WARPS)[None, :] * LANES + tl.arange(0, LANES)[:, None]
    o_channel = first + (o_channel[:, :, None] * GROUPS + tl.arange(0, GROUPS))[None, :, :, :, None, None]
    o_state = tl.arange(0, RUNS)[None, :] * PARTS + tl.arange(0, PARTS)[:, None]  # 16 bytes of each part in turn
    o_state = (o_state[:, :, None] * RUN + tl.arange(0, RUN))[:, None, None, None, :, :]
    m_h, o_h = (o_channel < channels) & (o_state >= 0), o_channel * BLOCK_N + o_state
    m_given, o_given = m_h & (o_state < states), o_channel * states + o_state
    p_x += i_b * s_xb + i_k * s_xk
    p_dt += i_b * s_dtb + i_k * s_dtk
    p_B += i_b * s_Bb + i_k * s_Bk
    p_C += i_b * s_Cb + i_k * s_Ck
    p_dx += i_b * s_dxb + i_k * s_dxk
    p_ddt += i_b * s_ddtb + i_k * s_ddtk
    i_share = i_d.to(tl.int64)
    p_dB += i_share * s_dBp + i_b * s_dBb + i_k * s_dBk
    p_dC += i_share * s_dCp + i_b * s_dCb + i_k * s_dCk
    if p_dy is not None:
        p_dy += i_b * s_dyb + i_k * s_dyk
    if p_indices is not None:
        p_indices += i_k * steps

    b_A = tl.load(p_A + i_k * channels * BLOCK_N + o_h, mask=m_h, other=0.0).to(tl.float32) * LOG2E
    b_D, b_bias = _load_parameter(p_D, i_k * channels + o_d, m_d), _load_parameter(p_dt_bias, i_k * channels + o_d, m_d)
    b_g = tl.zeros(b_A.shape, tl.float32)  # exp(s_{t+1} A) g_{t+1}: what comes back from later steps
    if p_dlast is not None and not ENDS:
        b_g = tl.load(p_dlast + i_bk * channels * BLOCK_N + o_h, mask=m_h, other=0.0).to(tl.float32)
    if p_ends is not None and not ENDS:
        for i_after in range(segments - 1, i_s, -1):
            b_g = _pass_on(b_g, b_A, p_ends, p_spans, i_bk * segments + i_after, channels, BLOCK_N, o_h, o_channel, m_h)
    b_dA = tl.zeros(b_A.shape, tl.float32)
    b_dD, b_dbias = tl.zeros((STEPS, CHANNELS), tl.float32), tl.zeros((STEPS, CHANNELS), tl.float32)

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
        p_x, p_dt, p_B, p_C, o_token, o_d, o_n, m_d, m_n, s_xl, s_xd, s_dtl, s_dtd, s_Bl, s_Bn, s_Cl, s_Cn
    )
    b_dy = b_x
    if p_dy is not None:
        b_dy = _load_rows(p_dy, o_token, o_d, m_d, s_dyl, s_dyd)
    for i_back in range(first_tile, last_tile):
        i_tile = first_tile + last_tile - 1 - i_back
        start = i_tile * STEPS
        b_h = tl.zeros(b_A.shape, tl.float32)
        if not ENDS:  # the states before each step of the tile come from the saved ones
            b_h = tl.load(p_saved + (i_bk * tiles + i_tile) * channels * BLOCK_N + o_h, mask=m_h, other=0.0)
        next_x, next_dt, next_B, next_C = _load_ahead(
            p_x, p_dt, p_B, p_C, o_next, o_d, o_n, m_d, m_n, s_xl, s_xd, s_dtl, s_dtd, s_Bl, s_Bn, s_Cl, s_Cn
        )
        next_dy = next_x
        if p_dy is not None:
            next_dy = _load_rows(p_dy, o_next, o_d, m_d, s_dyl, s_dyd)
        # (STEPS,)
        o_after = start - 2 * STEPS + o_t
        o_after = _token(p_indices, tl.where(o_after < 0, steps, o_after), steps, LONG)

        loaded_B, loaded_C, loaded_x = b_B, b_C, b_x
        b_x = _float(b_x, b_dt, o_t)
        b_v = _float(b_dt, loaded_x, o_t) + b_bias[None, :]
        m_t = (start + o_t < steps)[:, None]
        b_s = tl.where(m_t, _softplus(b_v) if SOFTPLUS else b_v, 0.0)
        if p_dy is not None:
            b_dy = b_dy.to(tl.float32)
        else:
            b_dy = tl.zeros((STEPS, CHANNELS), tl.float32)
        b_ss = _spread_channels(b_s, STEPS, GROUPS, WARPS, LANES, PARTS)
        b_dys = _spread_channels(b_dy, STEPS, GROUPS, WARPS, LANES, PARTS)
        b_Cs = _spread_states(_float(b_C, loaded_B, o_t), STEPS, RUNS, RUN, WARPS, LANES, PARTS)
        if ENDS:
            for t in tl.static_range(STEPS - 1, -1, -1):
                b_g += _states(b_Cs, o_t, t) * _channels(b_dys, o_t, t)
                b_g *= tl.exp2(_channels(b_ss, o_t, t) * b_A + BIAS)
            b_span += b_s
        else:
            b_us = _spread_channels(b_s * b_x, STEPS, GROUPS, WARPS, LANES, PARTS)
            b_Bs = _spread_states(_float(b_B, loaded_C, o_t), STEPS, RUNS, RUN, WARPS, LANES, PARTS)
            history = (b_h,)
            for t in tl.static_range(STEPS):
                b_a = tl.exp2(_channels(b_ss, o_t, t) * b_A + BIAS)
                b_h = b_a * b_h + _channels(b_us, o_t, t) * _states(b_Bs, o_t, t)
                history = history + (b_h,)  # type: ignore[assignment] # noqa: RUF005 (Triton knows no star)
            b_kepts = tl.zeros((STEPS, GROUPS, WARPS, LANES, PARTS), tl.float32)
            b_gBs = tl.zeros((STEPS, GROUPS, WARPS, LANES, PARTS), tl.float32)
            b_dBs = tl.zeros((STEPS, RUNS, RUN, WARPS, LANES, PARTS), tl.float32)
            b_dCs = tl.zeros((STEPS, RUNS, RUN, WARPS, LANES, PARTS), tl.float32)
            for t in tl.static_range(STEPS - 1, -1, -1):
                b_st = _channels(b_ss, o_t, t)
                b_dyt = _channels(b_dys, o_t, t)
                b_g += _states(b_Cs, o_t, t) * b_dyt
                b_dCs = _put_states(b_dCs, o_t, t, history[t + 1] * b_dyt)
                b_dBs = _put_states(b_dBs, o_t, t, b_g * _channels(b_us, o_t, t))
                b_gBs = _put_channels(b_gBs, o_t, t, b_g * _states(b_Bs, o_t, t))
                # With another exponent than above the compiler does not keep those decays: many registers are dearer.
                b_g *= tl.exp2(b_st * b_A + (BIAS if STEPS * GROUPS * RUNS * RUN <= KEPT else SAME_BIAS))
                b_kept = b_g * history[t]
                b_kepts = _put_channels(b_kepts, o_t, t, b_kept * b_A)
                b_dA += b_st * b_kept

            _store_rows(p_dB, _gather_states(b_dBs, STEPS, BLOCK_N, ALONG), o_token, o_n, m_n, s_dBl, s_dBn)
            _store_rows(p_dC, _gather_states(b_dCs, STEPS, BLOCK_N, ALONG), o_token, o_n, m_n, s_dCl, s_dCn)
            b_gB = _gather_channels(b_gBs, STEPS, CHANNELS, ALONG)
            b_dv = _gather_channels(b_kepts, STEPS, CHANNELS, ALONG) * LN2 + b_gB * b_x
            if SOFTPLUS:
                b_dv *= _slope(b_v)
            b_dv = tl.where(m_t, b_dv, 0.0)
            b_dD += b_dy * b_x
            b_dbias += b_dv
            _store_rows(p_dx, b_s * b_gB + b_D[None, :] * b_dy, o_token, o_d, m_d, s_dxl, s_dxd)
            _store_rows(p_ddt, b_dv, o_token, o_d, m_d, s_ddtl, s_ddtd)
        o_token, o_next = o_next, o_after
        b_x, b_dt, b_B, b_C, b_dy = next_x, next_dt, next_B, next_C, next_dy

    if ENDS:
        i_end = i_bk * segments + i_s
        tl.store(p_ends + i_end * channels * BLOCK_N + o_h, b_g, mask=m_h)
        tl.store(p_spans + i_end * channels + o_d, tl.sum(b_span, 0), mask=m_d)
    else:
        p_dper_channel += (i_b * segments + i_s) * (states + 2) * routes * channels + i_k * channels
        tl.store(p_dper_channel + o_state * routes * channels + o_channel, b_dA, mask=m_given)
        tl.store(p_dper_channel + states * routes * channels + o_d, tl.sum(b_dD, 0), mask=m_d)
        tl.store(p_dper_channel + (states + 1) * routes * channels + o_d, tl.sum(b_dbias, 0), mask=m_d)
        if p_dinitial is not None:  # noqa: SIM102
            if i_s == 0:
                tl.store(p_dinitial + i_bk * channels * states + o_given, b_g, mask=m_given)
