// gelu_backward.cuh: behind gelu(h) = h P(h), with P the normal distribution: from h (p.x) and the gradient of gelu's result
// (p.dy) its gradient dh = dy (P(h) + h P'(h)), gelu(h) once more (p.y), and the sums of dh over all rows, which are the
// gradient of the bias before. With SUMS alone: the sums of p.x over all rows.
// Grid: blocks of kRows rows by kColumns runs of channels; the blocks of the same channels share the rows, and leave their
// sums one after the other, (blocks of the same channels, channels).
#include "rows.cuh"

constexpr bool kSums = SUMS;
constexpr int kThreads = 256;
constexpr int kColumns = 16;
constexpr int kRows = kThreads / kColumns;
constexpr int kAhead = 2;  // rows that a thread reads before it computes
extern "C" __device__ int launch_shape[2] = {kThreads, 0};

extern "C" __global__ void __launch_bounds__(kThreads) gelu_backward(const __grid_constant__ Rows p) {
    __shared__ float sums[kRows][kColumns * kRun];
    const int runs = (int)p.channels / kRun, tiles = (runs + kColumns - 1) / kColumns;
    const int lane = threadIdx.x % kColumns, group = threadIdx.x / kColumns;
    const int tile = blockIdx.x % tiles, block = blockIdx.x / tiles, blocks = gridDim.x / tiles;
    const int channel = (tile * kColumns + lane) * kRun;
    const bool there = channel < p.channels;
    float sum[kRun] = {};
    const long long step = (long long)blocks * kRows;
    for (long long first = (long long)block * kRows + group; first < p.batch; first += kAhead * step) {
        Pack<X_TYPE, kRun> x[kAhead];
        Pack<Y_TYPE, kRun> dy[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const long long at = (first + i * step) * p.channels + channel;
            const int valid = there && first + i * step < p.batch ? kRun : 0;
            load<true>(x[i], (const X_TYPE*)p.x + at, 1, valid);
            if constexpr (!kSums) load<true>(dy[i], (const Y_TYPE*)p.dy + at, 1, valid);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const long long at = (first + i * step) * p.channels + channel;
            const int valid = there && first + i * step < p.batch ? kRun : 0;
            if constexpr (kSums) {
#pragma unroll
                for (int j = 0; j < kRun; ++j) sum[j] += x[i].get(j);
            } else {
                float a[kRun], dh[kRun];
#pragma unroll
                for (int j = 0; j < kRun; ++j) {
                    const float v = x[i].get(j);
                    float below, density;
                    normal(v, below, density);
                    a[j] = v * below;
                    dh[j] = dy[i].get(j) * fmaf(v, density, below);
                    sum[j] += dh[j];
                }
                Pack<Y_TYPE, kRun> out;
                out.set(a);
                store<true>(out, (Y_TYPE*)p.y + at, 1, valid);
                Pack<X_TYPE, kRun> gradient;
                gradient.set(dh);
                store<true>(gradient, (X_TYPE*)p.dx + at, 1, valid);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < kRun; ++j) sums[group][lane * kRun + j] = sum[j];
    __syncthreads();
    // Always in the same order.
    const int own = tile * kColumns * kRun + threadIdx.x;
    if (threadIdx.x < kColumns * kRun && own < p.channels) {
        float whole = 0.f;
#pragma unroll
        for (int i = 0; i < kRows; ++i) whole += sums[i][threadIdx.x];
        p.parts[block * p.channels + own] = whole;
    }
}
