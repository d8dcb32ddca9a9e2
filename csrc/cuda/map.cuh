// map.cuh: what both passes of VMamba's convolution share: 3 x 3 taps a channel over a map that is channels last, then SiLU.
// A thread takes kRun channels of a strip of the map, some rows high, and goes along it with three columns in registers.
// Three columns are taken at a time, so that each has its place in the ring of three.
#pragma once
#include "rows.cuh"

extern "C" __device__ int launch_shape[2] = {128, 0};

struct Window {
    float tap[9][kRun], bias[kRun];

    DEVICE void read(const Rows& p, int channel) {
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
            bias[j] = p.bias ? p.bias[channel + j] : 0.f;
#pragma unroll
            for (int i = 0; i < 9; ++i) tap[i][j] = p.weight[(channel + j) * 9 + i];
        }
    }
    // Before SiLU, at row `row` of the columns that begin one row above it.
    template <int kHigh> DEVICE float at(const float (*ring)[kHigh][kRun], int left, int row, int j) const {
        float v = bias[j];
#pragma unroll
        for (int i = 0; i < 9; ++i) v = fmaf(tap[i][j], ring[(left + i % 3) % 3][row + i / 3][j], v);
        return v;
    }
};

// Columns of an image of which the origin is its first element in this thread's channels.
struct Map {
    int height, width;
    long long channels;

    template <class T> DEVICE Pack<T, kRun> read(const T* origin, int row, int column) const {
        Pack<T, kRun> pack;
        const bool there = row >= 0 && row < height && column >= 0 && column < width;
        load<true>(pack, origin + ((long long)row * width + column) * channels, 1, there ? kRun : 0);
        return pack;
    }
    template <class T> DEVICE void write(const float* v, T* origin, int row, int column, bool wanted) const {
        Pack<T, kRun> pack;
        pack.set(v);
        store<true>(pack, origin + ((long long)row * width + column) * channels, 1, wanted && row < height ? kRun : 0);
    }
};
