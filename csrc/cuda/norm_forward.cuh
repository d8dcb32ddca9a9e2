// norm_forward.cuh: y = (v - mean) / sqrt(var + epsilon) * weight + bias of each row v = x, x + shift, or x + branch,
// which is rounded to x's type, and written out too.
// Grid: blocks of kThreads / kLanes rows.
#include "norm.cuh"

constexpr int kThreads = 128;
extern "C" __device__ int launch_shape[2] = {kThreads, 0};

extern "C" __global__ void __launch_bounds__(kThreads) norm_forward(const __grid_constant__ Rows p) {
    const int lane = threadIdx.x % kLanes;
    const long long row = (long long)blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
    const bool there = row < p.batch;
    Row v;
    v.read<X_TYPE>(p.x, row, there, lane);
    if constexpr (kBranch) {
        Row branch;
        branch.read<B_TYPE>(p.branch, row, there, lane);
        v.each([&](int i, int j, float& a) { a = widen(narrow<X_TYPE>(a + branch.at[i][j])); });
        v.write<X_TYPE>(p.total, row, there, lane);
    }
    if constexpr (kShift) v.shift(p.shift, lane);
    const float rate = v.centre(lane);
    Row weight;
    weight.read<Float>(p.weight, 0, true, lane);
    v.each([&](int i, int j, float& a) { a *= rate * weight.at[i][j]; });
    if (p.bias) {
        Row bias;
        bias.read<Float>(p.bias, 0, true, lane);
        v.each([&](int i, int j, float& a) { a += bias.at[i][j]; });
    }
    v.write<Y_TYPE>(p.y, row, there, lane);
}
