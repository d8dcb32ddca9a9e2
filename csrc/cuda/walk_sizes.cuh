// walk_sizes.cuh: step sizes of a tile in shared memory, read as they are or formed from a low rank, and their gradients.
// A low-rank step size in bfloat16 is formed on the tensor cores from the high and low halves of the weights; its gradient
// and that of the weights are products of the tile's gradients, in two halves as well.
#pragma once
#include "walk.cuh"

constexpr int kDepth = (kRank + 15) / 16;  // 16 columns of the rank each

// Columns of a low-rank step size as the lane holds them of A in `multiply_add`: rows are the tile's steps.
struct Ranks {
    unsigned words[kRank ? kDepth : 1][4];

    DEVICE void fetch(const Place& place, int token, int lane) {  // the place of the lane's first column
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const char* row = place.at(__shfl_sync(kAll, token, lane / 4 + 8 * i));
#pragma unroll
            for (int word = 0; word < 2 * kDepth; ++word) {
                // Beyond the last column any number will do: its weight is 0.
                const int over = 8 * word + 8 <= kRank ? 0 : max(8 * word + 2 * (lane & 3) - (kRank - 2), 0);
                words[word / 2][word % 2 * 2 + i] = 0;
                if (8 * word < kRank) {
                    words[word / 2][word % 2 * 2 + i] = __ldg((const unsigned*)(row + 16 * word - 2 * over));
                }
            }
        }
    }
};

// Step sizes before softplus, of a tile. Rows are padded so that a product's fragments meet distinct banks.
struct alignas(16) Sizes { float at[kTile][kChannels + 8]; };

// What a lane holds of B in `multiply_add`: high and low halves of the weights of 8 channels from `at` on, of 16 columns.
DEVICE uint4 weights_of(const Params& p, long long at, int depth, int lane) {
    unsigned high[2], low[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int rank = 16 * depth + 8 * i + 2 * (lane & 3);
        const float* weight = p.dt_weight + (at + lane / 4) * kRank + rank;
        const float v0 = rank < kRank ? weight[0] : 0.f, v1 = rank + 1 < kRank ? weight[1] : 0.f;
        split(v0 * kPerUnit, v1 * kPerUnit, high[i], low[i]);
    }
    return make_uint4(high[0], high[1], low[0], low[1]);
}
// The n-th 8 channels' step sizes of a tile: `weights(d)` are their weights of the d-th 16 columns.
template <class Of> DEVICE void form(Sizes& sizes, const Ranks& ranks, float2 bias, Of weights, int n, int lane) {
    float d[4] = {bias.x, bias.y, bias.x, bias.y};
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
        const uint4 four = weights(k);
        const unsigned high[2] = {four.x, four.y}, low[2] = {four.z, four.w};
        multiply_add(d, ranks.words[k], high);
        multiply_add(d, ranks.words[k], low);
    }
    float* to = &sizes.at[lane / 4][8 * n + 2 * (lane & 3)];
    *(float2*)to = make_float2(d[0], d[1]);
    *(float2*)(to + 8 * (kChannels + 8)) = make_float2(d[2], d[3]);
}

// Weights of a warp's channels in shared memory.
struct Weights {
    uint4 words[kRank ? kDepth : 1][kRank ? 4 * kRun : 1][32];
    float bias[kRank ? kChannels : 2];

    DEVICE void read(const Params& p, long long route, int first, int lane) {
        const long long at = route * p.channels + first;
#pragma unroll 1
        for (int n = 0; n < 4 * kRun; ++n) {
#pragma unroll
            for (int d = 0; d < kDepth; ++d) words[d][n][lane] = weights_of(p, at + 8 * n, d, lane);
        }
#pragma unroll
        for (int j = 0; j < kRun; ++j) bias[lane + 32 * j] = p.dt_bias ? p.dt_bias[at + lane + 32 * j] * kPerUnit : 0.f;
    }
    DEVICE void form(Sizes& sizes, const Ranks& ranks, int lane) const {
#pragma unroll
        for (int n = 0; n < 4 * kRun; ++n) {
            const float2 two = *(const float2*)&bias[8 * n + 2 * (lane & 3)];
            ::form(sizes, ranks, two, [&](int k) { return words[k][n][lane]; }, n, lane);
        }
    }
};
// The same in registers.
struct HeldWeights {
    uint4 words[kRank ? kDepth : 1][kRank ? 4 * kRun : 1];
    float2 bias[kRank ? 4 * kRun : 1];

    DEVICE void read(const Params& p, long long route, int first, int lane) {
#pragma unroll
        for (int n = 0; n < 4 * kRun; ++n) {
            const long long at = route * p.channels + first + 8 * n;
#pragma unroll
            for (int d = 0; d < kDepth; ++d) words[d][n] = weights_of(p, at, d, lane);
            const float* two = p.dt_bias + at + 2 * (lane & 3);
            bias[n] = p.dt_bias ? make_float2(two[0] * kPerUnit, two[1] * kPerUnit) : make_float2(0.f, 0.f);
        }
    }
    DEVICE void form(Sizes& sizes, const Ranks& ranks, int lane) const {
#pragma unroll
        for (int n = 0; n < 4 * kRun; ++n) {
            ::form(sizes, ranks, bias[n], [&](int k) { return words[k][n]; }, n, lane);
        }
    }
};

// Step sizes before softplus in shared memory: as they are read, or formed from a low rank.
struct ReadSizes {
    Rows<DT_TYPE> stages[kAhead + 1];

    DEVICE void fetch(int stage, const Place& place, int token, int thread, int apart) {
        stages[stage].fetch(place, token, thread, apart);
    }
    DEVICE void read_weights(const Params&, int, int, int) {}
    DEVICE void form(const Ranks&, int) {}
    DEVICE void get(float* to, int stage, int t, int lane, const float* bias) const {
        stages[stage].get(to, t, lane);
#pragma unroll
        for (int j = 0; j < kRun; ++j) to[j] = fmaf(to[j], kPerUnit, bias[j]);
    }
    DEVICE void set(const float* from, int stage, int t, int lane) { stages[stage].set(from, t, lane); }
};
struct FormedSizes {
    Sizes sizes;
    Weights weights;

    DEVICE void read_weights(const Params& p, int route, int first, int lane) { weights.read(p, route, first, lane); }
    DEVICE void fetch(int, const Place&, int, int, int) {}
    DEVICE void form(const Ranks& ranks, int lane) { weights.form(sizes, ranks, lane); }
    DEVICE void get(float* to, int, int t, int lane, const float*) const {
        if constexpr (kRun == 1) {
            to[0] = sizes.at[t][lane];
        } else {
            const float2 two = *(const float2*)&sizes.at[t][2 * lane];
            to[0] = two.x, to[kRun - 1] = two.y;
        }
    }
    DEVICE void set(const float* from, int, int t, int lane) {
#pragma unroll
        for (int j = 0; j < kRun; ++j) sizes.at[t][lane * kRun + j] = from[j];
    }
};
template <bool kFormed> struct Choose { using Type = ReadSizes; };
template <> struct Choose<true> { using Type = FormedSizes; };
using StepSizes = Choose<(kRank > 0)>::Type;
