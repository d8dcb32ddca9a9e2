// routes_weigh.cuh: with rows v_k = y_tk of K routes, times silu(z_t) if there is a gate, out_t = sum_k v_k gate_k. Or, from the
// gradient of out, that of the gates: sum_t v_k dout_t.
// Grid: one thread = kRun channels of a chunk of a sequence. Sums for the gates leave as (batch, chunks, routes, channels).
#include "rows.cuh"

constexpr int kRoutes = ROUTES;
constexpr bool kGated = GATED, kSlopes = SLOPES;
extern "C" __device__ int launch_shape[2] = {128, 0};

extern "C" __global__ void __launch_bounds__(128) routes_weigh(const __grid_constant__ Rows p) {
    const long long runs = p.channels / kRun, i = blockIdx.x * 128ll + threadIdx.x, piece = i / runs;
    const long long batch = piece / p.chunks, channel = i % runs * kRun, first = piece % p.chunks * p.chunk_steps;
    if (batch >= p.batch) return;
    const long long last = min(first + p.chunk_steps, p.tokens);
    float weights[kRoutes][kRun];  // the gates, or their gradients
#pragma unroll
    for (int k = 0; k < kRoutes; ++k) {
        Pack<Float, kRun> pack;
        pack.clear();
        if constexpr (!kSlopes) load<true>(pack, (const Float*)p.gate + (batch * kRoutes + k) * p.channels + channel, 1, kRun);
#pragma unroll
        for (int j = 0; j < kRun; ++j) weights[k][j] = pack.get(j);
    }
#pragma unroll 2
    for (long long t = first; t < last; ++t) {
        const long long token = batch * p.tokens + t;
        Pack<X_TYPE, kRun> y[kRoutes];
#pragma unroll
        for (int k = 0; k < kRoutes; ++k) {
            load<true>(y[k], (const X_TYPE*)p.x + (token * kRoutes + k) * p.channels + channel, 1, kRun);
        }
        Pack<B_TYPE, kRun> z;
        if constexpr (kGated) load<true>(z, (const B_TYPE*)p.z + token * p.z_l + channel, 1, kRun);
        Pack<Y_TYPE, kRun> result;
        if constexpr (kSlopes) load<true>(result, (const Y_TYPE*)p.dy + token * p.channels + channel, 1, kRun);
        float out[kRun];
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
            float factor = 1.f;
            if constexpr (kGated) factor = z.get(j) * sigmoid(z.get(j));
            if constexpr (kSlopes) {
                factor *= result.get(j);
#pragma unroll
                for (int k = 0; k < kRoutes; ++k) weights[k][j] = fmaf(y[k].get(j), factor, weights[k][j]);
            } else {
                float sum = 0.f;
#pragma unroll
                for (int k = 0; k < kRoutes; ++k) sum = fmaf(y[k].get(j), weights[k][j], sum);
                out[j] = sum * factor;
            }
        }
        if constexpr (!kSlopes) {
            result.set(out);
            store<true>(result, (Y_TYPE*)p.y + token * p.channels + channel, 1, kRun);
        }
    }
    if constexpr (kSlopes) {
#pragma unroll
        for (int k = 0; k < kRoutes; ++k) {
            Pack<Float, kRun> pack;
            pack.set(weights[k]);
            store<true>(pack, (Float*)p.parts + (piece * kRoutes + k) * p.channels + channel, 1, kRun);
        }
    }
}
