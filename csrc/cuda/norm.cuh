// norm.cuh: what both passes of a norm over rows share. A group of lanes takes a row whole: each lane kTimes runs of
// neighbouring channels, kLanes runs apart.
#pragma once
#include "rows.cuh"

constexpr int kWidth = WIDTH;
constexpr int kLanes = LANES;  // of a row; divides 32
constexpr int kTimes = (kWidth / kRun + kLanes - 1) / kLanes;
constexpr bool kRms = RMS;     // no mean and no bias
constexpr bool kBranch = BRANCH;
constexpr bool kShift = SHIFT;  // the same for every row is added first
constexpr float kEpsilon = EPSILON;

struct Row {
    float at[kTimes][kRun];

    // Nothing but zeros where there is no such row or channel.
    template <class T> DEVICE void read(const void* from, long long row, bool there, int lane) {
#pragma unroll
        for (int i = 0; i < kTimes; ++i) {
            const int column = (i * kLanes + lane) * kRun;
            Pack<T, kRun> pack;
            load<true>(pack, (const T*)from + row * kWidth + column, 1, there ? kWidth - column : 0);
#pragma unroll
            for (int j = 0; j < kRun; ++j) at[i][j] = pack.get(j);
        }
    }
    template <class T> DEVICE void write(void* to, long long row, bool there, int lane) const {
#pragma unroll
        for (int i = 0; i < kTimes; ++i) {
            const int column = (i * kLanes + lane) * kRun;
            Pack<T, kRun> pack;
            pack.set(at[i]);
            store<true>(pack, (T*)to + row * kWidth + column, 1, there ? kWidth - column : 0);
        }
    }
    template <class F> DEVICE void each(F f) {
#pragma unroll
        for (int i = 0; i < kTimes; ++i) {
#pragma unroll
            for (int j = 0; j < kRun; ++j) f(i, j, at[i][j]);
        }
    }
    DEVICE void shift(const float* by, int lane) {
        Row other;
        other.read<Float>(by, 0, true, lane);
        each([&](int i, int j, float& v) { v += other.at[i][j]; });
    }
    // Take the mean away, and return what the row is to be divided by, inverted.
    DEVICE float centre(int lane) {
        if constexpr (!kRms) {
            float sum = 0.f;
            each([&](int, int, float& v) { sum += v; });
            const float mean = sum_lanes<kLanes>(sum) * (1.f / kWidth);
            each([&](int i, int, float& v) { v = (i * kLanes + lane) * kRun < kWidth ? v - mean : 0.f; });
        }
        float squares = 0.f;
        each([&](int, int, float& v) { squares = fmaf(v, v, squares); });
        return rsqrtf(fmaf(sum_lanes<kLanes>(squares), 1.f / kWidth, kEpsilon));
    }
};
