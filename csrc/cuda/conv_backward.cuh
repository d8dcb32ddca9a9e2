// conv_backward.cuh: gradients of conv_forward.cuh, from x again. With g the gradients before SiLU:
//     dx_t = sum_j w_0j g_{t+kBefore-j,0} + w_1j g_{t-3+j,1}      dw_0j = sum_t g_t0 x_{t-kBefore+j}   dw_1j = sum_t g_t1 x_{t+3-j}
//
// Every g adds to four entries of a second ring, the gradients of the tokens t - 3 to t + 3; the oldest is whole and
// leaves. A chunk's own tokens take g from up to three tokens around it, as far as taps reach; those are computed by two
// chunks, and counted for the weights by one.
// Along routes the gradient of x leaves as (B, L, routes, D), still to be added up.
// Grid: as forward. Sums for weight and bias leave as (sequences, chunks, ways, 5, channels), the bias last; of a batch with
// routes, these follow one another.
#include "conv.cuh"

extern "C" __device__ int launch_shape[2] = {128, 0};

extern "C" __global__ void __launch_bounds__(128) conv_backward(const __grid_constant__ Rows p) {
    const Place place = place_of(p);
    if (!place.there) return;
    const int length = (int)p.tokens, from = place.chunk * (int)p.chunk_steps, to = min(from + (int)p.chunk_steps, length);
    const X_TYPE* x = (const X_TYPE*)p.x + place.batch * p.x_b + place.channel;
    const X_TYPE* dy = (const X_TYPE*)p.dy + (place.batch * length * results(p) + place.route) * kChannels + place.channel;
    X_TYPE* dx = (X_TYPE*)p.dx + place.batch * p.dx_b + place.route * kChannels + place.channel;
    Taps taps;
    taps.read(p, place.route, place.channel);
    // Step t is entry (t - from + 3) mod 7 of both rings.
    float ring[kRing][kRun], out[kRing][kRun], sums[kWays][5][kRun] = {};
#pragma unroll
    for (int i = 0; i < kRing; ++i) {
#pragma unroll
        for (int j = 0; j < kRun; ++j) out[i][j] = 0.f;
    }
#pragma unroll
    for (int i = -3; i < 3; ++i) {
        const int step = from - 3 + i;
        const bool exists = step >= 0 && step < length;
        const Pack<X_TYPE, kRun> pack = read(x, kXStep, place.token(p, step, exists), exists);
#pragma unroll
        for (int j = 0; j < kRun; ++j) ring[(i + kRing) % kRing][j] = pack.get(j);
    }
    // The next seven are read while seven are worked on.
    struct Seven {
        Pack<X_TYPE, kRun> x[kRing], dy[kWays][kRing];
    } now, next;
    const auto fetch = [&](Seven& seven, int first) {
        if (!kRoutes && first >= from && first + kRing <= to && first + kRing + 3 <= length) {  // nearly always, as forward
            const X_TYPE* x_at = x + (first + 3) * (long long)kXStep;
            const X_TYPE* dy_at = dy + first * (long long)(kWays * kChannels);
#pragma unroll
            for (int i = 0; i < kRing; ++i) {
                seven.x[i] = read(x_at, kXStep, i, true);
#pragma unroll
                for (int k = 0; k < kWays; ++k) seven.dy[k][i] = read(dy_at, kChannels, i * kWays + k, true);
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < kRing; ++i) {
            const int step = first + i;
            const bool exists = step + 3 >= 0 && step + 3 < length && first < to + 3;
            seven.x[i] = read(x, kXStep, place.token(p, step + 3, exists), exists);
#pragma unroll
            for (int k = 0; k < kWays; ++k) {
                const bool reaches = step >= max(from - behind(k), 0) && step < min(to + before(k), length);
                seven.dy[k][i] = read(dy + k * kChannels, results(p) * kChannels, place.token(p, step, reaches), reaches);
            }
        }
    };
    if constexpr (kAhead) fetch(next, from - 3);
    for (int first = from - 3; first < to + 3; first += kRing) {
        if constexpr (kAhead) {
            now = next;
            fetch(next, first + kRing);
        } else {
            fetch(now, first);
        }
#pragma unroll
        for (int i = 0; i < kRing; ++i) {
            const int step = first + i;
            const bool counts = step >= from && step < to;
#pragma unroll
            for (int j = 0; j < kRun; ++j) {
                ring[(i + 3) % kRing][j] = now.x[i].get(j);
#pragma unroll
                for (int k = 0; k < kWays; ++k) {
                    const float v = taps.sum(k, ring, i, j), g = now.dy[k][i].get(j) * silu_slope(v, sigmoid(v));
                    const float own = counts ? g : 0.f;
#pragma unroll
                    for (int tap = 0; tap < 4; ++tap) {
                        const int entry = Taps::entry(k, i, tap);
                        out[entry][j] = fmaf(taps.way[k][tap][j], g, out[entry][j]);
                        sums[k][tap][j] = fmaf(own, ring[entry][j], sums[k][tap][j]);
                    }
                    sums[k][4][j] += own;
                }
            }
            float* whole = out[(i + 4) % kRing];
            if (step - 3 >= from && step - 3 < to) {
                Pack<X_TYPE, kRun> pack;
                pack.set(whole);
                store<true>(pack, dx + place.token(p, step - 3) * (long long)kDxStep, 1, kRun);
            }
#pragma unroll
            for (int j = 0; j < kRun; ++j) whole[j] = 0.f;
        }
    }
    const long long sequence = kRoutes ? place.batch * p.routes + place.route : place.batch;
    float* parts = p.parts + (sequence * p.chunks + place.chunk) * 5 * kWays * kChannels + place.channel;
#pragma unroll
    for (int i = 0; i < 5 * kWays; ++i) {
        Pack<Float, kRun> pack;
        pack.set(sums[i / 5][i % 5]);
        store<true>(pack, (Float*)parts + i * kChannels, 1, kRun);
    }
}
