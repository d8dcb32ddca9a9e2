// routes_backward.cuh: gradients of y and z from what routes_weigh.cuh and routes_sums.cuh make of them, in one pass. With
// s = silu(z), rows v_k = y_k s, n_k what the norm makes of v_k at a rate of 1 / sqrt(var + epsilon), and g_k the gradient of
// the sum of n_k over tokens, which is the same for all of them:
//     dv_k = dout gate_k + (g_k - n_k mean(g_k n_k) - mean(g_k)) rate_k      dy_k = dv_k s      dz = silu'(z) sum_k dv_k y_k
// Grid: blocks of kThreads / kLanes tokens.
#include "norm.cuh"

constexpr int kRoutes = ROUTES;
constexpr bool kGated = GATED;
constexpr int kThreads = 128;
extern "C" __device__ int launch_shape[2] = {kThreads, 0};

extern "C" __global__ void __launch_bounds__(kThreads) routes_backward(const __grid_constant__ Rows p) {
    const int lane = threadIdx.x % kLanes;
    const long long token = (long long)blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
    const bool there = token < p.batch * p.tokens;
    const long long batch = there ? token / p.tokens : 0;
    Row dout, silu, dsilu;
    dout.read<Y_TYPE>(p.dy, token, there, lane);
    if constexpr (kGated) {
        silu.read<B_TYPE>((const B_TYPE*)p.z + token * p.z_l, 0, there, lane);
        silu.each([](int, int, float& v) { v *= sigmoid(v); });
        dsilu.each([](int, int, float& v) { v = 0.f; });
    }
#pragma unroll 1
    for (int k = 0; k < kRoutes; ++k) {
        Row y, slopes, gate;
        y.read<X_TYPE>(p.x, token * kRoutes + k, there, lane);
        Row n = y;
        if constexpr (kGated) n.each([&](int i, int j, float& v) { v *= silu.at[i][j]; });
        const float found = n.centre(lane), rate = there ? found : 0.f;  // infinite of no row if epsilon is 0
        slopes.read<Float>(p.slopes, batch * kRoutes + k, there, lane);
        float with_n = 0.f, alone = 0.f;
        slopes.each([&](int i, int j, float& g) {
            n.at[i][j] *= rate;
            with_n = fmaf(g, n.at[i][j], with_n);
            alone += g;
        });
        with_n = sum_lanes<kLanes>(with_n) * (1.f / kWidth);
        alone = sum_lanes<kLanes>(alone) * (1.f / kWidth);
        gate.read<Float>(p.gate, batch * kRoutes + k, there, lane);
        slopes.each([&](int i, int j, float& g) {
            g = fmaf(dout.at[i][j], gate.at[i][j], (fmaf(-n.at[i][j], with_n, g) - alone) * rate);
            if constexpr (kGated) {
                dsilu.at[i][j] = fmaf(g, y.at[i][j], dsilu.at[i][j]);
                g *= silu.at[i][j];
            }
        });
        slopes.write<X_TYPE>(p.dx, token * kRoutes + k, there, lane);
    }
    if constexpr (kGated) {
        Row z;
        z.read<B_TYPE>((const B_TYPE*)p.z + token * p.z_l, 0, there, lane);
        dsilu.each([&](int i, int j, float& v) { v *= silu_slope(z.at[i][j], sigmoid(z.at[i][j])); });
        dsilu.write<B_TYPE>((B_TYPE*)p.dz + token * p.dz_l, 0, there, lane);
    }
}
