// gelu_forward.cuh: gelu(x) = x P(x), with P the normal distribution, of numbers that lie in one piece.
// Grid: one thread = kPacks times kRun neighbours, as far apart as a block's threads reach.
#include "rows.cuh"

constexpr int kThreads = 256;
constexpr int kPacks = 2;  // that a thread reads before it computes
extern "C" __device__ int launch_shape[2] = {kThreads, 0};

extern "C" __global__ void __launch_bounds__(kThreads) gelu_forward(const __grid_constant__ Rows p) {
    const long long first = ((long long)blockIdx.x * kPacks * kThreads + threadIdx.x) * kRun;
    Pack<X_TYPE, kRun> x[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const long long at = first + i * kThreads * kRun;
        load<true>(x[i], (const X_TYPE*)p.x + at, 1, at < p.batch ? kRun : 0);
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const long long at = first + i * kThreads * kRun;
        float out[kRun];
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
            float below, density;
            normal(x[i].get(j), below, density);
            out[j] = x[i].get(j) * below;
        }
        x[i].set(out);
        store<true>(x[i], (X_TYPE*)p.y + at, 1, at < p.batch ? kRun : 0);
    }
}
