// wide_sums.cuh: sums over channels in the backward pass: of dB and dC over a warp's lanes, and of the gradients of a
// low-rank step size and of its weights over a block's channels.
#pragma once
#include "wide_stage.cuh"

constexpr int kSums = 2 * kStates;     // dB and dC of a lane's states

#if __CUDA_ARCH__ >= 800
constexpr bool kTensor = kGroups >= 4 && kSums <= 16;
#else
constexpr bool kTensor = false;
#endif
// Numbers go to the tensor cores in their upper 19 bits, and where results are more exact than that their rest as well.
constexpr bool kTwoTerms = TWO_TERMS;
constexpr int kSpan = kTensor ? 16 / kSums : 1;  // steps whose sums the tensor cores take together

DEVICE float one_if_equal(float a, float b) {
    float r;
    asm("set.eq.f32.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

// Sum dB and dC of a lane's states, values[0 .. kSums), over the groups of lanes; leave_groups puts what comes of it into
// row_at(t)[kind kRow + state]. On the tensor cores, A holds four values at a time, and B is 1 in one column for the first
// two of them and in the next for the others: so a lane finds in d[i] the sums, over the four lanes of its quad, of values
// 4 (lane % 4) + i, counted over kSpan steps; those of the last one, with span 0, are the sums.
DEVICE void sum_groups(float* d, const float* values, int span, int lane) {
    if constexpr (kTensor) {
        if (span == kSpan - 1) d[0] = d[1] = d[2] = d[3] = 0.f;
#pragma unroll
        for (int i = 0; i < kSums; i += 4) {
            const float column = (span * kSums + i) / 2;
            const float b0 = one_if_equal(lane >> 2, column), b1 = one_if_equal(lane >> 2, column + 1);
            const float* v = values + i;
            multiply_add_tf32(d, v[0], v[2], v[1], v[3], b0, b1);
            if constexpr (kTwoTerms) multiply_add_tf32(d, rest(v[0]), rest(v[2]), rest(v[1]), rest(v[3]), b0, b1);
        }
        if (span == 0) reduce_scatter<4, kGroups / 2, 4>(d, lane);
    } else {
#pragma unroll
        for (int i = 0; i < kSums; ++i) d[i] = values[i];
        reduce_scatter<kSums, kGroups / 2, 1>(d, lane);
    }
}
template <class RowAt> DEVICE void leave_groups(const float* d, int t, int lane, RowAt row_at) {
    const int q = lane / kGroups;
    if constexpr (kTensor) {
        if (!owns_first<4, kGroups / 2, 4>(lane)) return;
        constexpr int kCount = owned_count<4, kGroups / 2, 4>();
        const int value = 4 * (lane & 3) % kSums + owned_from<4, kGroups / 2, 4>(lane);
        float* row = row_at(t + 4 * (lane & 3) / kSums);
#pragma unroll
        for (int i = 0; i < kCount; i += kCount < 2 ? 1 : 2) {
            const int kind = (value + i) / kStates, state = (value + i) % kStates;
            put<(kCount < 2 ? 1 : 2)>(row + kind * kRow + q * kStates + state, d + i);
        }
    } else {
        if (!owns_first<kSums, kGroups / 2, 1>(lane)) return;
        const int from = owned_from<kSums, kGroups / 2, 1>(lane);
#pragma unroll
        for (int i = 0; i < owned_count<kSums, kGroups / 2, 1>(); ++i) {
            row_at(t)[(from + i) / kStates * kRow + q * kStates + (from + i) % kStates] = d[i];
        }
    }
}

// Gradients of a low-rank step size and of its weights, from the pairs of ddt that every thread has left in su. A warp
// takes the weights of its own channels, and every kWarps-th eight columns of the step size for all channels.
template <class Memory> DEVICE void multiply_back(Memory& block, int of_tile, float* to, int stride, bool adding) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    Stage& stage = block.stage;
    auto of_channels = [&](uint2* pairs, int channel) {  // as A of multiply_pairs: rows are steps
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            pairs[i] = {0, 0};
            if (i < 2 || kOwnTiles > 1) {
                const float2& at = stage.su[0][lane / 4 + 8 * (i % 2)][channel + 8 * (i / 2) + 2 * (lane % 4)];
                pairs[i] = *reinterpret_cast<const uint2*>(&at);
            }
        }
    };
#pragma unroll
    for (int m = 0; m < (kOwnTiles + 1) / 2; ++m) {
        uint2 pairs[4], turned[4];
        of_channels(pairs, warp * kWarpChannels + 16 * m);
#pragma unroll
        for (int i = 0; i < 4; ++i) turned[i % 2 * 2 + i / 2] = transpose(pairs[i]);
#pragma unroll
        for (int tile = 0; tile < kRankTiles; ++tile) {
            uint2 columns[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const unsigned* at = stage.low[of_tile % kLowRing][lane / 4 + 8 * i][tile * 4 + lane % 4];
                columns[i] = transpose(pair_of(taken<Low>(at)));
            }
            float sum[4];
            float* at = &block.dweight[warp][m][tile][lane].x;
            get<4>(sum, at);
            multiply_pairs<true, kExact>(sum, turned, columns);
            put<4>(at, sum);
        }
    }
#pragma unroll 1
    for (int tile = warp; tile < kRankTiles; tile += kWarps) {
        float out[4] = {0.f, 0.f, 0.f, 0.f};
        constexpr int kTogether = kOwnTiles > 1 ? 2 : 1;
#pragma unroll
        for (int c = 0; c < kChannelTiles; c += kTogether) {
            uint2 pairs[4], weights[2] = {};
            of_channels(pairs, 8 * c);
#pragma unroll
            for (int i = 0; i < kTogether; ++i) weights[i] = transpose(stage.weight_pairs[c + i][tile][lane]);
            multiply_pairs<true, true>(out, pairs, weights, kTogether);
        }
        const int rank = 8 * tile + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = stage.tokens[of_tile % kRing][lane / 4 + 8 * (i / 2)];
            if (token >= 0 && rank + i % 2 < kRank) {
                float* at = at_token(to, token, stride, rank + i % 2);
                *at = (adding ? *at : 0.f) + out[i];
            }
        }
    }
}
