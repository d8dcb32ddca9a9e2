// conv_backward.cuh: gradients of conv_forward.cuh, from x again. With g the gradients before SiLU:
//     dx_t = sum_d w_0(3-d) g_{t+d,0} + w_1(3-d) g_{t-d,1}        dw_0j = sum_t g_t0 x_{t-3+j}        dw_1j = sum_t g_t1 x_{t+3-j}
//
// Every g adds to four entries of a second ring, the gradients of the tokens t - 3 to t + 3; the oldest is whole and
// leaves. A chunk's own tokens take the first way's g from up to three tokens behind it, and the second way's from three
// before it; those are computed by two chunks, and counted for the weights by one.
// Grid: as forward. Sums for weight and bias leave as (sequences, chunks, 2, 5, channels), the bias last.
#include "conv.cuh"

extern "C" __device__ int launch_shape[2] = {128, 0};

extern "C" __global__ void __launch_bounds__(128) conv_backward(const __grid_constant__ Rows p) {
    const Place place = place_of(p);
    if (!place.there) return;
    const int length = (int)p.tokens, from = place.chunk * (int)p.chunk_steps, to = min(from + (int)p.chunk_steps, length);
    const X_TYPE* x = (const X_TYPE*)p.x + place.batch * p.x_b + place.channel;
    const X_TYPE* dy = (const X_TYPE*)p.dy + place.batch * length * 2 * p.channels + place.channel;
    X_TYPE* dx = (X_TYPE*)p.dx + place.batch * length * p.channels + place.channel;
    Taps taps;
    taps.read(p, place.channel);
    // Token t is entry (t - from + 3) mod 7 of both rings.
    float ring[kRing][kRun], out[kRing][kRun], sums[2][5][kRun] = {};
#pragma unroll
    for (int i = 0; i < kRing; ++i) {
#pragma unroll
        for (int j = 0; j < kRun; ++j) out[i][j] = 0.f;
    }
#pragma unroll
    for (int i = -3; i < 3; ++i) {
        const int token = from - 3 + i;
        const Pack<X_TYPE, kRun> pack = read(x, p.x_l, token, token >= 0 && token < length);
#pragma unroll
        for (int j = 0; j < kRun; ++j) ring[(i + kRing) % kRing][j] = pack.get(j);
    }
    for (int first = from - 3; first < to + 3; first += kRing) {
        Pack<X_TYPE, kRun> ahead[kRing], grads[2][kRing];
#pragma unroll
        for (int i = 0; i < kRing; ++i) {
            const int token = first + i;
            ahead[i] = read(x, p.x_l, token + 3, token + 3 >= 0 && token + 3 < length);
            grads[0][i] = read(dy, 2 * p.channels, token, token >= from && token < min(to + 3, length));
            grads[1][i] = read(dy + p.channels, 2 * p.channels, token, token >= 0 && token < to);
        }
#pragma unroll
        for (int i = 0; i < kRing; ++i) {
            const int token = first + i;
            const bool counts = token >= from && token < to;
#pragma unroll
            for (int j = 0; j < kRun; ++j) {
                ring[(i + 3) % kRing][j] = ahead[i].get(j);
                const float a = taps.first(ring, i, j), b = taps.second(ring, i, j);
                const float g0 = grads[0][i].get(j) * silu_slope(a, sigmoid(a));
                const float g1 = grads[1][i].get(j) * silu_slope(b, sigmoid(b));
#pragma unroll
                for (int d = 0; d < 4; ++d) {
                    float& before = out[(i + kRing - d) % kRing][j];
                    before = fmaf(taps.way[0][3 - d][j], g0, before);
                    float& behind = out[(i + d) % kRing][j];
                    behind = fmaf(taps.way[1][3 - d][j], g1, behind);
                }
                const float own0 = counts ? g0 : 0.f, own1 = counts ? g1 : 0.f;
#pragma unroll
                for (int tap = 0; tap < 4; ++tap) {
                    sums[0][tap][j] = fmaf(own0, ring[(i + 4 + tap) % kRing][j], sums[0][tap][j]);
                    sums[1][tap][j] = fmaf(own1, ring[(i + 3 - tap) % kRing][j], sums[1][tap][j]);
                }
                sums[0][4][j] += own0, sums[1][4][j] += own1;
            }
            float* whole = out[(i + 4) % kRing];
            if (token - 3 >= from && token - 3 < to) {
                Pack<X_TYPE, kRun> pack;
                pack.set(whole);
                store<true>(pack, dx + (token - 3) * p.channels, 1, kRun);
            }
#pragma unroll
            for (int j = 0; j < kRun; ++j) whole[j] = 0.f;
        }
    }
    float* parts = p.parts + (place.batch * p.chunks + place.chunk) * 10 * p.channels + place.channel;
#pragma unroll
    for (int i = 0; i < 10; ++i) {
        Pack<Float, kRun> pack;
        pack.set(sums[i / 5][i % 5]);
        store<true>(pack, (Float*)parts + i * p.channels, 1, kRun);
    }
}
