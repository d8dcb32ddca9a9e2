// norm_backward.cuh: gradients of norm_forward.cuh from the row before the norm, whose mean and variance are taken again.
//
// With n = (v - mean) / sqrt(var + epsilon) and g = dy weight:
//     dv = (g - n mean(g n) - mean(g)) / sqrt(var + epsilon) + dtotal        dweight = sum dy n        dbias = sum dy
//
// With AGAIN the forward pass's result is written once more, for those who did not keep it.
// Grid: each block takes every so many rows and leaves its sums for weight and bias, (blocks, 2, kWidth), or 3 with that of
// the shift.
#include "norm.cuh"

constexpr bool kAgain = AGAIN;
constexpr int kThreads = 256;
constexpr int kGroups = kThreads / kLanes;
extern "C" __device__ int launch_shape[2] = {kThreads, 0};

extern "C" __global__ void __launch_bounds__(kThreads) norm_backward(const __grid_constant__ Rows p) {
    constexpr int kSums = kShift ? 3 : 2;
    __shared__ float sums[kSums][kTimes * kLanes * kRun];
    const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
    Row weight, dweight, dbias, dshift;
    weight.read<Float>(p.weight, 0, true, lane);
    dweight.each([](int, int, float& v) { v = 0.f; });
    dbias.each([](int, int, float& v) { v = 0.f; });
    dshift.each([](int, int, float& v) { v = 0.f; });
    for (long long first = (long long)blockIdx.x * kGroups; first < p.batch; first += (long long)gridDim.x * kGroups) {
        const long long row = first + group;
        const bool there = row < p.batch;
        Row dv;
        if (p.dy) {
            Row n;
            n.read<X_TYPE>(p.x, row, there, lane);
            if constexpr (kShift) n.shift(p.shift, lane);
            dv.read<Y_TYPE>(p.dy, row, there, lane);
            const float found = n.centre(lane), rate = there ? found : 0.f;  // infinite of no row if epsilon is 0
            float with_n = 0.f, alone = 0.f;
            dv.each([&](int i, int j, float& g) {
                n.at[i][j] *= rate;
                dweight.at[i][j] = fmaf(g, n.at[i][j], dweight.at[i][j]);
                dbias.at[i][j] += g;
                g *= weight.at[i][j];
                with_n = fmaf(g, n.at[i][j], with_n);
                alone += g;
            });
            with_n = sum_lanes<kLanes>(with_n) * (1.f / kWidth);
            alone = kRms ? 0.f : sum_lanes<kLanes>(alone) * (1.f / kWidth);
            dv.each([&](int i, int j, float& g) { g = (fmaf(-n.at[i][j], with_n, g) - alone) * rate; });
            if constexpr (kAgain) {
                Row bias;
                if (p.bias) bias.read<Float>(p.bias, 0, true, lane);
                n.each([&](int i, int j, float& v) { v = fmaf(v, weight.at[i][j], p.bias ? bias.at[i][j] : 0.f); });
                n.write<Y_TYPE>(p.y, row, there, lane);
            }
        } else {
            dv.each([](int, int, float& v) { v = 0.f; });
        }
        if (p.dtotal) {
            Row dtotal;
            dtotal.read<X_TYPE>(p.dtotal, row, there, lane);
            dv.each([&](int i, int j, float& g) { g += dtotal.at[i][j]; });
        }
        if constexpr (kShift) dv.each([&](int i, int j, float& g) { dshift.at[i][j] += g; });
        dv.write<X_TYPE>(p.dx, row, there, lane);
        if constexpr (kBranch) dv.write<B_TYPE>(p.dbranch, row, there, lane);
    }
    // The block's groups one after the other: always in the same order.
    for (int turn = 0; turn < kGroups; ++turn) {
        if (group == turn) {
            dweight.each([&](int i, int j, float& v) {
                const int at = (i * kLanes + lane) * kRun + j;
                sums[0][at] = turn ? sums[0][at] + v : v;
                sums[1][at] = turn ? sums[1][at] + dbias.at[i][j] : dbias.at[i][j];
                if constexpr (kShift) sums[2][at] = turn ? sums[2][at] + dshift.at[i][j] : dshift.at[i][j];
            });
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < kWidth; i += kThreads) {
#pragma unroll
        for (int s = 0; s < kSums; ++s) p.parts[((long long)kSums * blockIdx.x + s) * kWidth + i] = sums[s][i];
    }
}
