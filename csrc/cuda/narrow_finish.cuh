// narrow_finish.cuh: add up the partial results that narrow_backward.cuh left: dB and dC over tiles of channels, in the
// order of steps, and put where their tokens are; a low-rank step size's gradient over those tiles; and what belongs to
// a channel over the batch. Each sum in float32 and in a fixed order.
//
// Grid: one thread = one sum, or kRun neighbours of the low-rank gradient; blocks of the longest sums come first.
#pragma once
#include "common.cuh"

constexpr int kRank = RANK;  // of a step size whose gradient was multiplied in the kernel, or 0
constexpr int kRun = RUN;    // divides batch * tokens * routes * rank

extern "C" __device__ int launch_shape[2] = {256, 0};

extern "C" __global__ void __launch_bounds__(256) narrow_finish(const __grid_constant__ Params p) {
    const long long per_item = p.routes * p.channels, sequences = p.batch * p.routes;
    const long long sums[3] = {per_item * (3 + kRank), p.batch * p.tokens * p.routes * kRank / kRun, sequences * p.steps};
    long long i = blockIdx.x;
    int job = 0;
    for (; job < 3; ++job) {
        const long long blocks = (sums[job] + 255) / 256;
        if (i < blocks) break;
        i -= blocks;
    }
    i = i * 256 + threadIdx.x;
    if (job > 2 || i >= sums[job]) return;

    if (job == 0) {
        // Sums over the batch: of dA, dD and the bias, then of the weights.
        const int which = (int)min(i / per_item, 3ll);
        const float* from = which == 0 ? p.dA : which == 1 ? p.dD : which == 2 ? p.ddt_bias : p.ddt_weight;
        const long long at = i - which * per_item, stride = which == 3 ? per_item * kRank : per_item;
        float sum = 0.f;
#pragma unroll 8
        for (long long b = 0; b < p.batch; ++b) sum += from[b * stride + at];
        p.sum_channels[i] = sum;
    } else if (job == 1) {
        if constexpr (kRank > 0) {
            float sum[kRun] = {};
#pragma unroll 4
            for (long long tile = 0; tile < p.tiles; ++tile) {
                Pack<DDT_TYPE, kRun> part;
                load<true>(part, (const DDT_TYPE*)p.ddt + (tile * sums[1] + i) * kRun, 1, kRun);
#pragma unroll
                for (int j = 0; j < kRun; ++j) sum[j] += part.get(j);
            }
            Pack<DDT_TYPE, kRun> packed;
            packed.set(sum);
            store<true>(packed, (DDT_TYPE*)p.sum_ddt + i * kRun, 1, kRun);
        }
    } else {
        const long long sequence = i / p.steps, batch = sequence / p.routes, route = sequence % p.routes;
        const int token = p.indices[route * p.steps + i % p.steps];
        if (token < 0) return;
        const float2* from = (const float2*)p.dBC + i;
        float2 sum = {0.f, 0.f};
#pragma unroll 4
        for (long long tile = 0; tile < p.tiles; ++tile) {
            const float2 part = from[tile * sums[2]];
            sum.x += part.x, sum.y += part.y;
        }
        const long long at = (batch * p.tokens + token) * p.routes + route;
        ((B_TYPE*)p.sum_dB)[at] = narrow<B_TYPE>(sum.x);
        ((C_TYPE*)p.sum_dC)[at] = narrow<C_TYPE>(sum.y);
    }
}
