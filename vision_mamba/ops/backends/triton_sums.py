"""Sums in Triton of what programs leave in shares, added up in a fixed order, all of a pass in one launch."""

import triton
import triton.language as tl

from vision_mamba.ops.backends.triton_kernels import _follow


@triton.jit
def _load_sum(p_shares, o, shares, size):
    # (BLOCK,)
    b_sum = tl.zeros(o.shape, tl.float32)
    for _ in range(0, shares):
        b_sum += tl.load(p_shares + o, mask=o < size, other=0.0).to(tl.float32)
        p_shares += size
    return b_sum


@triton.jit
def _add_up(p_shares, p_sum, shares, size, i_block, BLOCK: tl.constexpr):
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_sum + o, _load_sum(p_shares, o, shares, size), mask=o < size)


@triton.jit
def _bring_home(
    p_shares, p_sum, shares, size, i_block, p_indices, routes, steps, s_b, s_l, s_k,
    BLOCK: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Shares (shares, B, K, S) are in the order of steps, their sum, (B, L, K), in that of tokens."""
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    b_sum = _load_sum(p_shares, o, shares, size)
    o_step = o if LONG else o.to(tl.int32)  # to divide 64 bits takes long
    o_t, o_k = o_step % steps, o_step // steps % routes
    o_token = o_t
    if p_indices is not None:
        o_token = tl.load(p_indices + o_k * steps + o_t, mask=o < size, other=-1)
    o_sum = (o_step // steps // routes).to(tl.int64) * s_b + o_token.to(tl.int64) * s_l + o_k * s_k
    tl.store(p_sum + o_sum, b_sum, mask=(o < size) & (o_token >= 0))


@triton.jit
def merge(
    p_first,
    p_first_sum,
    first_shares,
    first_size,
    p_second,  # or None, as those that follow
    p_second_sum,
    second_shares,
    second_size,
    p_third,
    p_third_sum,
    third_shares,
    third_size,
    p_fourth,
    p_fourth_sum,
    fourth_shares,
    fourth_size,
    p_fifth,
    p_fifth_sum,
    fifth_shares,
    fifth_size,
    p_sixth,
    p_sixth_sum,
    sixth_shares,
    sixth_size,
    p_indices,
    routes,
    steps,
    s_firstb,
    s_firstl,
    s_firstk,
    s_secondb,
    s_secondl,
    s_secondk,
    ON_WAY: tl.constexpr,  # the first two are in the order of steps
    BLOCK: tl.constexpr,
    LONG: tl.constexpr,  # sizes past 32 bits
    FOLLOWS: tl.constexpr,
):
    """Add up the leading axis of up to six (shares, size) in order; one program = BLOCK sums."""
    _follow(FOLLOWS)
    i = tl.program_id(0).to(tl.int64)
    second = tl.cdiv(first_size, BLOCK)
    third = second + tl.cdiv(second_size, BLOCK)
    fourth = third + tl.cdiv(third_size, BLOCK)
    fifth = fourth + tl.cdiv(fourth_size, BLOCK)
    sixth = fifth + tl.cdiv(fifth_size, BLOCK)
    if i < second:
        if ON_WAY:
            _bring_home(
                p_first, p_first_sum, first_shares, first_size, i,
                p_indices, routes, steps, s_firstb, s_firstl, s_firstk, BLOCK, LONG,
            )  # fmt: skip
        else:
            _add_up(p_first, p_first_sum, first_shares, first_size, i, BLOCK)
    elif i < third:
        if ON_WAY:
            _bring_home(
                p_second, p_second_sum, second_shares, second_size, i - second,
                p_indices, routes, steps, s_secondb, s_secondl, s_secondk, BLOCK, LONG,
            )  # fmt: skip
        elif p_second is not None:
            _add_up(p_second, p_second_sum, second_shares, second_size, i - second, BLOCK)
    elif i < fourth:
        if p_third is not None:
            _add_up(p_third, p_third_sum, third_shares, third_size, i - third, BLOCK)
    elif i < fifth:
        if p_fourth is not None:
            _add_up(p_fourth, p_fourth_sum, fourth_shares, fourth_size, i - fourth, BLOCK)
    elif i < sixth:
        if p_fifth is not None:
            _add_up(p_fifth, p_fifth_sum, fifth_shares, fifth_size, i - fifth, BLOCK)
    elif p_sixth is not None:
        _add_up(p_sixth, p_sixth_sum, sixth_shares, sixth_size, i - sixth, BLOCK)
