// map_backward.cuh: gradients of map_forward.cuh, from x again. With g the gradients before SiLU:
//     dx_rc = sum_ij w_ij g_(r-i+1)(c-j+1)        dw_ij = sum_rc g_rc x_(r+i-1)(c+j-1)        dbias = sum_rc g_rc
//
// g is computed for the strip and one row and column around it, of which the strip's own count for the weights.
// Grid: threads as forward, of strips of kStrip rows, each of which takes every so many pieces and leaves its sums for
// weight and bias, (such threads, 10, channels), the bias last.
#include "map.cuh"

constexpr int kStrip = STRIP;

extern "C" __global__ void __launch_bounds__(128, MIN_BLOCKS) map_backward(const __grid_constant__ Rows p) {
    const long long runs = p.channels / kRun, i = blockIdx.x * 128ll + threadIdx.x, strips = (p.height + kStrip - 1) / kStrip;
    const long long pieces = p.batch * strips * p.chunks, worker = i / runs;
    if (worker >= p.workers) return;
    const int channel = (int)(i % runs) * kRun;
    Window window;
    window.read(p, channel);
    float sums[10][kRun] = {};
    for (long long piece = worker; piece < pieces; piece += p.workers) {
        const int top = (int)(piece / p.chunks % strips) * kStrip;
        const int from = (int)(piece % p.chunks) * (int)p.chunk_steps, to = min(from + (int)p.chunk_steps, (int)p.width);
        const long long batch = piece / p.chunks / strips;
        const Rowset<kStrip + 4> of_x(p, top - 2, p.x_l), of_dy(p, top - 2, p.channels), of_dx(p, top - 2, p.dx_l);
        const X_TYPE* x = (const X_TYPE*)p.x + batch * p.x_b + channel + (top - 2ll) * of_x.row;
        const X_TYPE* dy = (const X_TYPE*)p.dy + batch * p.tokens * p.channels + channel + (top - 2ll) * of_dy.row;
        X_TYPE* dx = (X_TYPE*)p.dx + batch * p.dx_b + channel + (top - 2ll) * of_dx.row;
        // Column c is entry (c - from + 2) mod 3 of both rings.
        float ring[3][kStrip + 4][kRun], g[3][kStrip + 2][kRun];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
            for (int r = 0; r < kStrip + 4; ++r) {
                const Pack<X_TYPE, kRun> pack = of_x.read(x, r, from - 2 + c);
#pragma unroll
                for (int j = 0; j < kRun; ++j) ring[c][r][j] = pack.get(j);
            }
#pragma unroll
            for (int r = 0; r < kStrip + 2; ++r) {
#pragma unroll
                for (int j = 0; j < kRun; ++j) g[c][r][j] = 0.f;
            }
        }
        for (int first = from - 1; first < to + 1; first += 3) {
            Pack<X_TYPE, kRun> ahead[3][kStrip + 4], grads[3][kStrip + 2];
#pragma unroll
            for (int c = 0; c < 3; ++c) {
#pragma unroll
                for (int r = 0; r < kStrip + 4; ++r) ahead[c][r] = of_x.read(x, r, first + c + 1);
#pragma unroll
                for (int r = 0; r < kStrip + 2; ++r) grads[c][r] = of_dy.read(dy, r + 1, first + c);
            }
#pragma unroll
            for (int c = 0; c < 3; ++c) {
                const int column = first + c;
                const bool counts = column >= from && column < to;
#pragma unroll
                for (int r = 0; r < kStrip + 4; ++r) {
#pragma unroll
                    for (int j = 0; j < kRun; ++j) ring[(c + 2) % 3][r][j] = ahead[c][r].get(j);
                }
#pragma unroll
                for (int r = 0; r < kStrip + 2; ++r) {
#pragma unroll
                    for (int j = 0; j < kRun; ++j) {
                        const float v = window.at(ring, c, r, j);
                        const float found = grads[c][r].get(j) * (kShortcut ? 1.f : silu_slope(v, sigmoid(v)));
                        g[(c + 2) % 3][r][j] = found;
                        if (r == 0 || r == kStrip + 1) continue;
                        const float own = counts ? found : 0.f;
#pragma unroll
                        for (int t = 0; t < 9; ++t) {
                            sums[t][j] = fmaf(own, ring[(c + t % 3) % 3][r + t / 3][j], sums[t][j]);
                        }
                        sums[9][j] += own;
                    }
                }
                // The column before has all its neighbours now.
#pragma unroll
                for (int r = 0; r < kStrip; ++r) {
                    float out[kRun];
#pragma unroll
                    for (int j = 0; j < kRun; ++j) {
                        out[j] = 0.f;
#pragma unroll
                        for (int t = 0; t < 9; ++t) {
                            out[j] = fmaf(window.tap[t][j], g[(c + 2 - t % 3) % 3][r + 2 - t / 3][j], out[j]);
                        }
                    }
                    of_dx.write(out, dx, r + 2, column - 1, column - 1 >= from && column - 1 < to);
                }
            }
        }
    }
    float* parts = p.parts + worker * 10 * p.channels + channel;
#pragma unroll
    for (int t = 0; t < 10; ++t) {
        Pack<Float, kRun> pack;
        pack.set(sums[t]);
        store<true>(pack, (Float*)parts + t * p.channels, 1, kRun);
    }
}
