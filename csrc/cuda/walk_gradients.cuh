// walk_gradients.cuh: sums over the channels of a warp on the tensor cores, for walk_backward.cuh.
#pragma once
#include "walk_sizes.cuh"

DEVICE float reciprocal(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
// The step size, and its derivative by what was read, 1 / (1 + exp(-v)), in the step size's units.
DEVICE float step_size(float v, float& slope) {
    const float e = ex2(-fabsf(v) * (kExact ? kLog2e : 1.f));
    const float whole = reciprocal(fmaf(e, kUnit, kUnit));
    slope = v >= 0.f ? whole : e * whole;
    return step_size(v);
}

// D += A B on the tensor cores: A 16 x 8 and B 8 x 8 in TF32, D 16 x 8 in float32. Lane l holds of A the rows l / 4 and
// l / 4 + 8 of column l % 4, and the same 4 further; of B the column l / 4 of rows l % 4 and l % 4 + 4.
DEVICE void multiply_add_tf32(float* d, const float* a, const float* b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
          "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
#endif
}
// Sums of two numbers a step over a quad of lanes each, on the tensor cores: those of steps 2 i and 2 i + 1 of eight go to
// columns of that number, the first number's to rows 0 to 7 and the second's to the others. `picks` are 1 for the lanes of
// quads 2 i and 2 i + 1 and else 0. TF32 drops the last 13 bits; a second term brings them back.
template <bool kOneTerm> DEVICE void sum_quads(float* to, const float* picks, const float* values) {
    if constexpr (kOneTerm) {
        multiply_add_tf32(to, values, picks);
    } else {
        float most[4], rest[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            most[i] = __uint_as_float(__float_as_uint(values[i]) & 0xffffe000u), rest[i] = values[i] - most[i];
        }
        multiply_add_tf32(to, most, picks);
        multiply_add_tf32(to, rest, picks);
    }
}

// Gradients of a low-rank step size's weights, summed over the steps that the warp has taken.
struct WeightGradients {
    static constexpr int kTiles = kRank ? (kRank + 7) / 8 : 1, kHalves = 2 * kRun;
    float at[kTiles][kHalves][4];  // rows: 16 channels each, columns: 8 of the rank

    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < kTiles * kHalves * 4; ++i) at[i / 4 / kHalves][i / 4 % kHalves][i % 4] = 0.f;
    }
    DEVICE void leave(float* to, int lane) const {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int half = 0; half < kHalves; ++half) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int channel = 16 * half + lane / 4 + i / 2 * 8, rank = 8 * n + 2 * (lane & 3) + i % 2;
                    if (rank < kRank) to[channel * kRank + rank] = at[n][half][i];
                }
            }
        }
    }
};

// Gradients of a low-rank step size: products of the tile's gradients with the weights, and with the columns, which give
// the weights' gradients.
struct MultipliedSizes {
    static constexpr int kTiles = kRank ? (kRank + 7) / 8 : 1, kHalves = 2 * kRun;
    struct alignas(16) Shares { float4 at[kTiles][32]; };  // of a warp, as lanes hold the products
    Sizes sizes;
    uint4 words[kTiles][kHalves][32];  // what the lanes hold of B in `multiply_add`; depth: 16 channels each

    DEVICE void read_weights(const Params& p, long long route, int first, int lane) {
#pragma unroll 1
        for (int half = 0; half < kHalves; ++half) {
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                unsigned high[2], low[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int channel = 16 * half + 8 * i + 2 * (lane & 3), rank = 8 * n + lane / 4;
                    const float* weight = p.dt_weight + (route * p.channels + first + channel) * kRank + rank;
                    const bool there = rank < kRank;
                    split(there ? weight[0] : 0.f, there ? weight[kRank] : 0.f, high[i], low[i]);
                }
                words[n][half][lane] = make_uint4(high[0], high[1], low[0], low[1]);
            }
        }
    }
    DEVICE void put(int, const float (*from)[kRun], int start, int lane) {
#pragma unroll
        for (int t = 0; t < kBatch; ++t) {
#pragma unroll
            for (int j = 0; j < kRun; ++j) sizes.at[start + t][lane * kRun + j] = from[t][j];
        }
    }
    DEVICE void leave(int, const Place&, int, int, int, int) const {}
    DEVICE void multiply(WeightGradients& gradients, Shares& shares, const Ranks& columns, int lane) const {
        float out[kTiles][4];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0.f;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
            unsigned a[4], rest[4], turned[4], turned_rest[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {  // steps of i % 2, channels of i / 2
                const float2 two = *(const float2*)&sizes.at[lane / 4 + i % 2 * 8][16 * half + i / 2 * 8 + 2 * (lane & 3)];
                split(two.x, two.y, a[i], rest[i]);
                turned[i % 2 * 2 + i / 2] = transpose(a[i]), turned_rest[i % 2 * 2 + i / 2] = transpose(rest[i]);
            }
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                const uint4 four = words[n][half][lane];
                const unsigned high[2] = {four.x, four.y}, low[2] = {four.z, four.w};
                multiply_add(out[n], a, high);
                multiply_add(out[n], rest, high);
                multiply_add(out[n], a, low);
                const unsigned* two = columns.words[n / 2] + n % 2 * 2;
                const unsigned b[2] = {transpose(two[0]), transpose(two[1])};
                multiply_add(gradients.at[n][half], turned, b);
                multiply_add(gradients.at[n][half], turned_rest, b);
            }
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n) shares.at[n][lane] = make_float4(out[n][0], out[n][1], out[n][2], out[n][3]);
    }
    // The sums of the warps' shares: each warp takes some of the columns.
    DEVICE static void add_up(const Shares* shares, DDT_TYPE* to, int token, int routes, int lane, int warp, int left) {
        int rows[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) rows[i] = __shfl_sync(kAll, token, lane / 4 + 8 * i);
#pragma unroll 1
        for (int n = warp; n < kTiles; n += kWarps) {
            float sum[4] = {};
#pragma unroll
            for (int of = 0; of < kWarps; ++of) {
                const float4 four = shares[of].at[n][lane];
                sum[0] += four.x, sum[1] += four.y, sum[2] += four.z, sum[3] += four.w;
            }
            const int rank = 8 * n + 2 * (lane & 3);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (lane / 4 + 8 * i >= left) continue;
                Pack<DDT_TYPE, 2> packed;
                packed.set(sum + 2 * i);
                store<true>(packed, to + (long long)rows[i] * routes * kRank + rank, 1, kRank - rank);
            }
        }
    }
};
template <class T> struct WholeSizes {
    Rows<T> rows[2];  // of this tile and the last one in turn

    DEVICE void put(int turn, const float (*from)[kRun], int start, int lane) { rows[turn].put(from, start, lane); }
    DEVICE void leave(int turn, const Place& to, int token, int thread, int apart, int left) const {
        rows[turn].leave(to, token, thread, apart, left);
    }
    DEVICE void read_weights(const Params&, int, int, int) {}
    struct Shares {};
    DEVICE void multiply(WeightGradients&, Shares&, const Ranks&, int) const {}
    DEVICE static void add_up(const Shares*, T*, int, int, int, int, int) {}
};
template <bool kFormed> struct ChooseGradients { using Type = WholeSizes<DDT_TYPE>; };
template <> struct ChooseGradients<true> { using Type = MultipliedSizes; };
using SizeGradients = ChooseGradients<(kRank > 0)>::Type;
