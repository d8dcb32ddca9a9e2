// map_forward.cuh: y = silu(bias + sum_ij w_ij x_(r+i-1)(c+j-1)), of maps (B, height, width, channels), zeros around them;
// with SHORTCUT x_rc instead of SiLU.
// Grid: one thread = kRun channels of kStrip rows by chunk_steps columns.
#include "map.cuh"

constexpr int kStrip = STRIP;

extern "C" __global__ void __launch_bounds__(128, MIN_BLOCKS) map_forward(const __grid_constant__ Rows p) {
    const long long runs = p.channels / kRun, i = blockIdx.x * 128ll + threadIdx.x, strips = (p.height + kStrip - 1) / kStrip;
    const long long piece = i / runs, strip = piece / p.chunks, batch = strip / strips;
    if (batch >= p.batch) return;
    const int channel = (int)(i % runs) * kRun, top = (int)(strip % strips) * kStrip;
    const int from = (int)(piece % p.chunks) * (int)p.chunk_steps, to = min(from + (int)p.chunk_steps, (int)p.width);
    const Rowset<kStrip + 2> of_x(p, top - 1, p.x_l), of_y(p, top - 1, p.channels);
    const X_TYPE* x = (const X_TYPE*)p.x + batch * p.x_b + channel + (top - 1ll) * of_x.row;
    X_TYPE* y = (X_TYPE*)p.y + batch * p.tokens * p.channels + channel + (top - 1ll) * of_y.row;
    Window window;
    window.read(p, channel);
    float ring[3][kStrip + 2][kRun];  // column c is entry (c - from + 1) mod 3
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int r = 0; r < kStrip + 2; ++r) {
            const Pack<X_TYPE, kRun> pack = of_x.read(x, r, from - 1 + c);
#pragma unroll
            for (int j = 0; j < kRun; ++j) ring[c][r][j] = pack.get(j);
        }
    }
    for (int first = from; first < to; first += 3) {
        Pack<X_TYPE, kRun> ahead[3][kStrip + 2];
#pragma unroll
        for (int c = 0; c < 3; ++c) {
#pragma unroll
            for (int r = 0; r < kStrip + 2; ++r) ahead[c][r] = of_x.read(x, r, first + c + 1);
        }
#pragma unroll
        for (int c = 0; c < 3; ++c) {
#pragma unroll
            for (int r = 0; r < kStrip + 2; ++r) {
#pragma unroll
                for (int j = 0; j < kRun; ++j) ring[(c + 2) % 3][r][j] = ahead[c][r].get(j);
            }
#pragma unroll
            for (int r = 0; r < kStrip; ++r) {
                float out[kRun];
#pragma unroll
                for (int j = 0; j < kRun; ++j) {
                    const float v = window.at(ring, c, r, j);
                    out[j] = kShortcut ? v : v * sigmoid(v);
                }
                of_y.write(out, y, r + 1, first + c, first + c < to);
            }
        }
    }
}
