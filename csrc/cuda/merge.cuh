// merge.cuh: out[b][l][d] = sum_k partial[b][k][l][d] in float32 and in order of k, all contiguous. ADD: to what is there,
// which is the first route's share.
// Grid: one thread = kRun neighbouring channels of one row.
#pragma once
#include "common.cuh"

constexpr int kRun = RUN;  // divides the channels

// 64-bit division takes four times as long.
DEVICE long long divide(long long a, long long b) {
    return (unsigned long long)a >> 32 ? a / b : (long long)((unsigned)a / (unsigned)b);
}

extern "C" __device__ int launch_shape[2] = {256, 0};

extern "C" __global__ void __launch_bounds__(256) merge(const __grid_constant__ Params p) {
    const long long runs = p.channels / kRun;
    const long long i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= p.batch * p.tokens * runs) return;
    const long long row = divide(i, runs), channel = (i - row * runs) * kRun;
    const long long others = divide(row, p.tokens) * (p.routes - 1) * p.tokens;  // rows of other routes that precede it
    const X_TYPE* at = (const X_TYPE*)p.x + (row + others) * p.channels + channel;
    Y_TYPE* to = (Y_TYPE*)p.y + row * p.channels + channel;
    float sum[kRun] = {};
    if constexpr (ADD) {
        Pack<Y_TYPE, kRun> there;
        load<true, true>(there, to, 1, kRun);
#pragma unroll
        for (int j = 0; j < kRun; ++j) sum[j] = there.get(j);
    }
    for (int k = 0; k < (int)p.routes; ++k) {
        Pack<X_TYPE, kRun> part;
        load<true>(part, at + k * p.tokens * p.channels, 1, kRun);
#pragma unroll
        for (int j = 0; j < kRun; ++j) sum[j] += part.get(j);
    }
    Pack<Y_TYPE, kRun> packed;
    packed.set(sum);
    store<true>(packed, to, 1, kRun);
}
