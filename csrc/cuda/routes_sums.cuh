// routes_sums.cuh: of each route k the sum over tokens t of (v - mean) / sqrt(var + epsilon), of rows v = y_tk, times silu(z_t)
// if there is a gate.
// Grid: blocks of a chunk of tokens of one route and batch, routes next to each other since they read the same z. A group of
// lanes takes every so many tokens. The sums leave as (batch, chunks, routes, kWidth).
#include "norm.cuh"

constexpr int kRoutes = ROUTES;
constexpr bool kGated = GATED;
constexpr int kThreads = 128;
constexpr int kGroups = kThreads / kLanes;
extern "C" __device__ int launch_shape[2] = {kThreads, 0};

extern "C" __global__ void __launch_bounds__(kThreads) routes_sums(const __grid_constant__ Rows p) {
    __shared__ float shared[kTimes * kLanes * kRun];
    const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, route = blockIdx.x % kRoutes;
    const long long piece = blockIdx.x / kRoutes, batch = piece / p.chunks, first = piece % p.chunks * p.chunk_steps;
    const long long last = min(first + p.chunk_steps, p.tokens);
    Row sums;
    sums.each([](int, int, float& v) { v = 0.f; });
    for (long long t = first; t < last; t += kGroups) {
        const bool there = t + group < last;
        const long long token = batch * p.tokens + t + group;
        Row v;
        v.read<X_TYPE>(p.x, token * kRoutes + route, there, lane);
        if constexpr (kGated) {
            Row z;
            z.read<B_TYPE>((const B_TYPE*)p.z + token * p.z_l, 0, there, lane);
            v.each([&](int i, int j, float& a) { a *= z.at[i][j] * sigmoid(z.at[i][j]); });
        }
        const float found = v.centre(lane), rate = there ? found : 0.f;  // infinite of no row if epsilon is 0
        sums.each([&](int i, int j, float& sum) { sum = fmaf(v.at[i][j], rate, sum); });
    }
    // The block's groups one after the other: always in the same order.
    for (int turn = 0; turn < kGroups; ++turn) {
        if (group == turn) {
            sums.each([&](int i, int j, float& sum) {
                float& to = shared[(i * kLanes + lane) * kRun + j];
                to = turn ? to + sum : sum;
            });
        }
        __syncthreads();
    }
    float* parts = p.parts + (piece * kRoutes + route) * kWidth;
    for (int i = threadIdx.x; i < kWidth; i += kThreads) parts[i] = shared[i];
}
