// map.cuh: what both passes of VMamba's convolution share: 3 x 3 taps a channel over a map that is channels last, then SiLU;
// or no SiLU, but the map itself beside them, as in VSSD: that is one more in the middle tap.
// A thread takes kRun channels of a strip of the map, some rows high, and goes along it with three columns in registers.
// Three columns are taken at a time, so that each has its place in the ring of three.
#pragma once
#include "rows.cuh"

extern "C" __device__ int launch_shape[2] = {128, 0};

constexpr bool kShortcut = SHORTCUT;

struct Window {
    float tap[9][kRun], bias[kRun];

    DEVICE void read(const Rows& p, int channel) {
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
            bias[j] = p.bias ? p.bias[channel + j] : 0.f;
#pragma unroll
            for (int i = 0; i < 9; ++i) tap[i][j] = p.weight[(channel + j) * 9 + i] + (kShortcut && i == 4 ? 1.f : 0.f);
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

// kRows rows of a map about a strip, from `first` on, in this thread's channels; tokens lie `stride` elements apart. An image
// has less than 2^31 elements.
template <int kRows> struct Rowset {
    int width, row, column;  // elements from a row, and from a column, to the next
    unsigned there;          // bit r: whether that row is one of the map's

    DEVICE Rowset(const Rows& p, int first, long long stride)
        : width((int)p.width), row((int)(p.width * stride)), column((int)stride), there(0) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) there |= (unsigned)(first + r >= 0 && first + r < p.height) << r;
    }
    DEVICE bool holds(int r, int c) const { return (there >> r & 1) && (unsigned)c < (unsigned)width; }
    // `rows` is where the first row begins, or would.
    template <class T> DEVICE Pack<T, kRun> read(const T* rows, int r, int c) const {
        Pack<T, kRun> pack;
        load<true>(pack, rows + (r * row + c * column), 1, holds(r, c) ? kRun : 0);
        return pack;
    }
    template <class T> DEVICE void write(const float* v, T* rows, int r, int c, bool wanted) const {
        Pack<T, kRun> pack;
        pack.set(v);
        store<true>(pack, rows + (r * row + c * column), 1, wanted && (there >> r & 1) ? kRun : 0);
    }
};
