// rows.cuh: what the kernels beside the scans share: their one argument, and sums over neighbouring lanes. A row is a
// token's channels. Each field is eight bytes, as in params.cuh.
#pragma once
#include "common.cuh"

struct Rows {
    const void* x;
    const void* branch;   // added to x first, or null
    const void* z;        // of the gate
    const float* weight;  // (channels), or (2, channels, 4) taps of either way, or (channels, 3, 3)
    const float* bias;    // (channels), or (2, channels)
    const float* shift;   // (channels) that a norm's rows are shifted by
    const int* table;     // (routes, tokens) the token of each step
    const float* gate;    // (batch, routes, channels) what routes are weighed by
    const float* slopes;  // (batch, routes, channels) gradients of the sums of routes' normed rows
    const void* dy;
    const void* dtotal;
    void* y;
    void* total;    // x + branch
    void* dx;
    void* dbranch;
    void* dz;
    float* parts;   // of weight and bias, sums that are still to be added up
    long long batch;
    long long tokens;
    long long channels;
    long long routes;
    long long chunks;       // of a sequence
    long long chunk_steps;  // tokens of one
    // Strides in elements: b batch, l token.
    long long x_b;
    long long x_l;
    long long z_b;
    long long z_l;
    long long dx_b;
    long long dx_l;
    long long dz_l;
    // Of a map, whose tokens lie row by row.
    long long height;
    long long width;
    long long workers;  // that share its pieces, each with sums of its own
};

constexpr int kRun = RUN;  // neighbouring channels of a thread at a time; divides the channels

DEVICE float reciprocal(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
DEVICE float sigmoid(float v) { return reciprocal(1.f + ex2(-v * kLog2e)); }
// Derivative of v sigmoid(v), from s = sigmoid(v).
DEVICE float silu_slope(float v, float s) { return s * fmaf(v, 1.f - s, 1.f); }

// Of the normal distribution P(v) to 1e-7 and P'(v): Abramowitz and Stegun 7.1.26, whose exponential is that of the density.
DEVICE void normal(float v, float& below, float& density) {
    const float e = ex2(v * v * (-0.5f * kLog2e)), t = reciprocal(fmaf(fabsf(v), 0.23164190f, 1.f));
    float tail = fmaf(t, 0.53070271f, -0.72657601f);
    tail = fmaf(t, tail, 0.71070687f);
    tail = fmaf(t, tail, -0.14224837f);
    tail = fmaf(t, tail, 0.12741480f) * t * e;
    below = v < 0.f ? tail : 1.f - tail;
    density = e * 0.39894228f;
}

// The sum of v over kLanes neighbouring lanes, in each of them.
template <int kLanes> DEVICE float sum_lanes(float v) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAll, v, offset);
    return v;
}
