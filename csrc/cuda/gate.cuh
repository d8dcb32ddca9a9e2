// gate.cuh: y = x silu(z), or, with BACKWARD, dx and dz from dy, and y again where it is wanted, times SCALE. Rows of x, z and dz may lie
// further apart than they are long. Forwards x may come in SHARES that are added up first; the sum, rounded to their type,
// is written too where it is wanted.
// Grid: one thread = kRun neighbouring channels of a row.
#include "rows.cuh"

constexpr bool kBackward = BACKWARD;
constexpr int kShares = SHARES;
constexpr float kScale = SCALE;  // of what a gate gives, forwards and again

extern "C" __device__ int launch_shape[2] = {256, 0};

extern "C" __global__ void __launch_bounds__(256) gate(const __grid_constant__ Rows p) {
    const long long runs = p.channels / kRun, i = blockIdx.x * 256ll + threadIdx.x, row = i / runs;
    if (row >= p.batch) return;
    const long long channel = i % runs * kRun;
    Pack<X_TYPE, kRun> x;
    Pack<B_TYPE, kRun> z;
    load<true>(x, (const X_TYPE*)p.x + row * p.x_l + channel, 1, kRun);
    load<true>(z, (const B_TYPE*)p.z + row * p.z_l + channel, 1, kRun);
    float out[2][kRun], again[kRun];
    if constexpr (kBackward) {
        Pack<Y_TYPE, kRun> dy;
        load<true>(dy, (const Y_TYPE*)p.dy + i * kRun, 1, kRun);
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
            const float v = z.get(j), s = sigmoid(v);
            out[0][j] = dy.get(j) * v * s, out[1][j] = dy.get(j) * x.get(j) * silu_slope(v, s);
            again[j] = kScale * x.get(j) * v * s;
        }
        Pack<X_TYPE, kRun> dx;
        Pack<B_TYPE, kRun> dz;
        dx.set(out[0]), dz.set(out[1]);
        store<true>(dx, (X_TYPE*)p.dx + i * kRun, 1, kRun);
        store<true>(dz, (B_TYPE*)p.dz + row * p.dz_l + channel, 1, kRun);
        if (p.y) {
            Pack<Y_TYPE, kRun> y;
            y.set(again);
            store<true>(y, (Y_TYPE*)p.y + i * kRun, 1, kRun);
        }
    } else {
        Pack<Y_TYPE, kRun> y;
        if constexpr (kShares > 1) {
#pragma unroll
            for (int j = 0; j < kRun; ++j) out[0][j] = x.get(j);
#pragma unroll
            for (int k = 1; k < kShares; ++k) {
                Pack<X_TYPE, kRun> share;
                load<true>(share, (const X_TYPE*)p.x + row * p.x_l + k * p.channels + channel, 1, kRun);
#pragma unroll
                for (int j = 0; j < kRun; ++j) out[0][j] += share.get(j);
            }
            x.set(out[0]);
            if (p.total) store<true>(x, (X_TYPE*)p.total + i * kRun, 1, kRun);
        }
#pragma unroll
        for (int j = 0; j < kRun; ++j) out[0][j] = kScale * x.get(j) * z.get(j) * sigmoid(z.get(j));
        y.set(out[0]);
        store<true>(y, (Y_TYPE*)p.y + i * kRun, 1, kRun);
    }
}
