// conv_forward.cuh: y_t0 = silu(bias_0 + sum_j w_0j x_{t-kBefore+j}), y_t1 = silu(bias_1 + sum_j w_1j x_{t+3-j}); y is
// (B, L, ways, D), or (B, L, routes, D) along routes.
// Grid: one thread = kRun channels of a chunk of a sequence.
#include "conv.cuh"

extern "C" __device__ int launch_shape[2] = {128, 0};

extern "C" __global__ void __launch_bounds__(128) conv_forward(const __grid_constant__ Rows p) {
    const Place place = place_of(p);
    if (!place.there) return;
    const int length = (int)p.tokens, from = place.chunk * (int)p.chunk_steps, to = min(from + (int)p.chunk_steps, length);
    const X_TYPE* x = (const X_TYPE*)p.x + place.batch * p.x_b + place.channel;
    X_TYPE* y = (X_TYPE*)p.y + (place.batch * length * results(p) + place.route) * kChannels + place.channel;
    Taps taps;
    taps.read(p, place.route, place.channel);
    float ring[kRing][kRun];  // step t is entry (t - from) mod 7
#pragma unroll
    for (int i = -3; i < 3; ++i) {
        const int step = from + i;
        const bool exists = step >= 0 && step < length;
        const Pack<X_TYPE, kRun> pack = read(x, kXStep, place.token(p, step, exists), exists);
#pragma unroll
        for (int j = 0; j < kRun; ++j) ring[(i + kRing) % kRing][j] = pack.get(j);
    }
    // The next seven are read while seven are worked on.
    Pack<X_TYPE, kRun> ahead[kRing], next[kRing];
    const auto fetch = [&](Pack<X_TYPE, kRun>* tokens, int first) {
        if (!kRoutes && first < to && first + kRing + 3 <= length) {  // nearly always, and without a question for each
#pragma unroll
            for (int i = 0; i < kRing; ++i) tokens[i] = read(x + (first + 3) * (long long)kXStep, kXStep, i, true);
            return;
        }
#pragma unroll
        for (int i = 0; i < kRing; ++i) {
            const int step = first + i + 3;
            const bool exists = step < length && first < to;
            tokens[i] = read(x, kXStep, place.token(p, step, exists), exists);
        }
    };
    if constexpr (kAhead) fetch(next, from);
    for (int first = from; first < to; first += kRing) {
        if constexpr (kAhead) {
#pragma unroll
            for (int i = 0; i < kRing; ++i) ahead[i] = next[i];
            fetch(next, first + kRing);
        } else {
            fetch(ahead, first);
        }
#pragma unroll
        for (int i = 0; i < kRing; ++i) {
            const int step = first + i;
            float out[kWays][kRun];
#pragma unroll
            for (int j = 0; j < kRun; ++j) {
                ring[(i + 3) % kRing][j] = ahead[i].get(j);
#pragma unroll
                for (int k = 0; k < kWays; ++k) {
                    const float v = taps.sum(k, ring, i, j);
                    out[k][j] = v * sigmoid(v);
                }
            }
            if (step < to) {
                const long long token = place.token(p, step);
#pragma unroll
                for (int k = 0; k < kWays; ++k) {
                    Pack<X_TYPE, kRun> pack;
                    pack.set(out[k]);
                    store<true>(pack, y + (results(p) * token + k) * kChannels, 1, kRun);
                }
            }
        }
    }
}
