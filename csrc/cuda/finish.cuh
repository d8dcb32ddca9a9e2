// finish.cuh: add up the partial results of a backward kernel: what belongs to a channel over the batch, and over the
// segments of a route; dB, dC and a low-rank step size's gradient over the blocks that share their channels. Each sum is
// in float32 and in a fixed order. narrow_backward.cuh leaves dB and dC in pairs and in the order of steps, and blocks as
// the slowest axis; wide_backward.cuh keeps tokens' rows of blocks together.
//
// SUM_TYPE: of the shares of dB and dC that wide_backward.cuh leaves.
//
// Grid: one thread = one sum, or a run of neighbouring ones; blocks of the longest sums come first.
#pragma once
#include "common.cuh"

constexpr int kStates = STATES;
constexpr bool kNarrow = kStates == 1;
constexpr int kRank = RANK;      // of a step size whose gradient was multiplied in the kernel, or 0
constexpr int kRun = RUN;        // of the step size's gradient; divides batch * tokens * routes * rank, or the rank
constexpr int kStateRun = kNarrow ? 1 : kStates % 8 == 0 ? 8 : kStates % 4 == 0 ? 4 : kStates % 2 == 0 ? 2 : 1;

extern "C" __device__ int launch_shape[2] = {256, 0};

// kCount neighbours of a sum over parts that lie `stride` apart.
template <class T, class To, int kCount>
DEVICE void add_up(const T* from, long long stride, int parts, To* to) {
    float sum[kCount] = {};
    add_parts<4, false>(sum, from, stride, parts);
    Pack<To, kCount> packed;
    packed.set(sum);
    store<true>(packed, to, 1, kCount);
}
// The same of rows of kWidth numbers, the parts of a row one after the other.
template <class T, class To, int kCount, int kWidth>
DEVICE void add_up_row(const void* from, int parts, void* to, long long i) {
    const long long row = i * kCount / kWidth;
    add_up<T, To, kCount>((const T*)from + row * (parts - 1) * kWidth + i * kCount, kWidth, parts, (To*)to + i * kCount);
}

extern "C" __global__ void __launch_bounds__(256) finish(const __grid_constant__ Params p) {
    const long long channels = p.routes * p.channels, sequences = p.batch * p.routes, rows = sequences * p.tokens;
    const long long sums[4] = {p.sum_channels ? channels * (kStates + 2 + kRank) : 0, rows * kRank / kRun,
                               kNarrow ? sequences * p.steps : rows * kStates / kStateRun,
                               kNarrow ? 0 : rows * kStates / kStateRun};
    const int tiles = (int)p.tiles;
    long long i = blockIdx.x;
    int job = 0;
    for (; job < 4; ++job) {
        const long long blocks = (sums[job] + 255) / 256;
        if (i < blocks) break;
        i -= blocks;
    }
    i = i * 256 + threadIdx.x;
    if (job > 3 || i >= sums[job]) return;

    if (job == 0) {
        // Of A (K, D, N), of D and the bias (K, D), of the weights (K, D, R), in this order.
        const float* parts[4] = {p.dA, p.dD, p.ddt_bias, p.ddt_weight};
        const long long sizes[4] = {channels * kStates, channels, channels, channels * kRank};
        long long at = i;
        int which = 0;
        while (at >= sizes[which]) at -= sizes[which++];
        const long long stride = sizes[which];
        const float* from = parts[which] + at;
        float sum = 0.f;
#pragma unroll 8
        for (long long share = 0; share < p.shares; ++share) sum += from[share * stride];
        p.sum_channels[i] = sum;
    } else if (job == 1) {
        if constexpr (kRank > 0 && kNarrow) {
            add_up<DDT_TYPE, DT_TYPE, kRun>((const DDT_TYPE*)p.ddt + i * kRun, rows * kRank, tiles,
                                            (DT_TYPE*)p.sum_ddt + i * kRun);
        } else if constexpr (kRank > 0) {
            add_up_row<DDT_TYPE, DT_TYPE, kRun, kRank>(p.ddt, tiles, p.sum_ddt, i);
        }
    } else if constexpr (!kNarrow) {
        if (job == 2) add_up_row<SUM_TYPE, B_TYPE, kStateRun, kStates>(p.dB, tiles, p.sum_dB, i);
        else add_up_row<SUM_TYPE, C_TYPE, kStateRun, kStates>(p.dC, tiles, p.sum_dC, i);
    } else {
        const long long sequence = i / p.steps, batch = sequence / p.routes, route = sequence % p.routes;
        const int token = p.indices[route * p.steps + i % p.steps];
        if (token < 0) return;
        const float2* from = (const float2*)p.dBC + i;
        float2 sum = {0.f, 0.f};
#pragma unroll 4
        for (int tile = 0; tile < tiles; ++tile) {
            const float2 part = from[tile * sums[2]];
            sum.x += part.x, sum.y += part.y;
        }
        const long long at = (batch * p.tokens + token) * p.routes + route;
        ((B_TYPE*)p.sum_dB)[at] = narrow<B_TYPE>(sum.x);
        ((C_TYPE*)p.sum_dC)[at] = narrow<C_TYPE>(sum.y);
    }
}
