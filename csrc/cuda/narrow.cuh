// narrow.cuh: what both passes over a scan of one state share. Such a scan moves many bytes for little arithmetic, and
// its maps h -> a h + b are cheap to join, so time is split over threads.
//
// Grid: a block = one b and 16 channels, walking all routes one after the other and adding them up in shared memory
// (kMerge), or one route of them. Lane = two neighbouring channels, 2 (lane / 4), and one of the warp's four segments,
// lane % 4; a segment = kSteps steps whose step sizes, decays and inputs stay in the lane's registers. All segments of a
// block make a chunk; they are joined by exchanges in the warp and through shared memory between warps, one barrier a
// chunk, and the lane then runs through its registers again from the state it now knows.
// A low-rank step size in bfloat16 is formed on the tensor cores from the high and low halves of the weights: the
// lanes' places are those of the product's tile, so the result lies where it is needed.
#pragma once
#include "common.cuh"

constexpr int kRank = RANK;
constexpr bool kVector = VECTOR;         // x, dt, y and their like: channels are neighbours, pairs aligned
constexpr bool kVectorRank = VECTOR_RANK;  // a low-rank dt: columns are neighbours, pairs aligned
constexpr bool kMerge = MERGE;
constexpr int kSteps = STEPS;
constexpr int kMaxWarps = MAX_WARPS;
constexpr int kChannels = 16;
constexpr int kProducts = (kSteps + 1) / 2;   // tiles of 4 segments x 2 steps
constexpr int kDepth = (kRank + 15) / 16;     // 16 columns of the rank each
constexpr bool kTensor = kRank > 0 && TENSOR;
constexpr bool kSoftplus = SOFTPLUS;

// Where the pair of a token's channels lies in the sum over routes: rows of 16 channels, pairs moved about so that
// segments meet few banks twice.
DEVICE int place(int token, int pair) {
    return token * kChannels + 2 * (pair ^ ((token >> 1 ^ token >> 3) & 1) * 4);
}

// A tensor as one lane reads it, at (b, k) and its channels. Lanes past the last channel read channel 0 and steps off the
// route token 0, so that no load waits for a branch; what they read is zeroed. An address is one multiply-add.
struct Place {
    const char* base;
    unsigned step, second;  // bytes between tokens, and from the first channel to the second

    DEVICE const char* at(int token) const { return base + (unsigned long long)(unsigned)max(token, 0) * step; }
};
template <class T>
DEVICE Place place_of(const void* data, long long batch, long long b, int route, long long k, long long l, long long d,
                      int first, int valid) {
    const long long lane = valid > 0 ? first * d : 0;
    return {(const char*)data + (batch * b + route * k + lane) * (long long)sizeof(T), (unsigned)(l * sizeof(T)),
            valid > 1 ? (unsigned)(d * sizeof(T)) : 0u};
}
template <class T, int V> DEVICE Pack<T, V> read(const Place& place, int token) {
    Pack<T, V> pack;
    const char* at = place.at(token);
    if constexpr (V == 1 || (kVector && sizeof(T) == 2)) {
        if constexpr (V * sizeof(T) == 4) pack.words[0] = __ldg((const unsigned*)at);
        else pack.words[0] = __ldg((const unsigned short*)at);
    } else if constexpr (kVector) {
        const uint2 two = __ldg((const uint2*)at);
        pack.words[0] = two.x, pack.words[1] = two.y;
    } else if constexpr (sizeof(T) == 4) {
        pack.words[0] = __ldg((const unsigned*)at), pack.words[1] = __ldg((const unsigned*)(at + place.second));
    } else {
        pack.words[0] = __ldg((const unsigned short*)at) | __ldg((const unsigned short*)(at + place.second)) << 16;
    }
    if (token < 0) pack.clear();
    return pack;
}

// Add a pair of values to a sum in shared memory, if asked, without a branch.
DEVICE void add_to(float* sum, float v0, float v1, bool wanted) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t.reg .f32 a, b;\n\tsetp.ne.u32 p, %3, 0;\n\t"
        "@p ld.shared.v2.f32 {a, b}, [%0];\n\t@p add.f32 a, a, %1;\n\t@p add.f32 b, b, %2;\n\t"
        "@p st.shared.v2.f32 [%0], {a, b};\n\t}"
        :: "r"((unsigned)__cvta_generic_to_shared(sum)), "f"(v0), "f"(v1), "r"((unsigned)wanted) : "memory");
}

// High and low bfloat16 halves of two neighbouring weights.
DEVICE void split(float v0, float v1, unsigned& high, unsigned& low) {
    high = narrow_pair<Bfloat>(v0, v1);
    low = narrow_pair<Bfloat>(v0 - __uint_as_float(high << 16), v1 - __uint_as_float(high & 0xffff0000u));
}

// The columns of a low-rank step size that the lane holds of B in `multiply_add`: product i joins, for each of the
// warp's segments, the steps 2i and 2i + 1.
DEVICE void fetch_ranks(unsigned* ranks, const int* tokens, const Params& p, long long batch, int route, int lane) {
    const int segment = lane >> 3;
    const bool odd = lane >> 2 & 1;
    const char* base = (const char*)p.dt + (batch * p.dt_b + route * p.dt_k) * (long long)sizeof(DT_TYPE);
    const unsigned step = (unsigned)(p.dt_l * sizeof(DT_TYPE)), stride = (unsigned)(p.dt_d * sizeof(DT_TYPE));
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
        const int even_token = __shfl_sync(kAll, tokens[2 * i], segment);
        const int odd_token =
            2 * i + 1 < kSteps ? __shfl_sync(kAll, tokens[2 * i + 1 < kSteps ? 2 * i + 1 : 0], segment) : -2;
        const int token = odd ? odd_token : even_token;
        const char* row = base + (unsigned long long)(unsigned)max(token, 0) * step;
#pragma unroll
        for (int word = 0; word < 2 * kDepth; ++word) {
            const int rank = 8 * word + 2 * (lane & 3);
            unsigned two = 0;
            if constexpr (kVectorRank) {
                if (rank < kRank) two = __ldg((const unsigned*)(row + rank * sizeof(DT_TYPE)));
            } else {
                if (rank < kRank) two = __ldg((const unsigned short*)(row + rank * stride));
                if (rank + 1 < kRank) two |= __ldg((const unsigned short*)(row + (rank + 1) * stride)) << 16;
            }
            ranks[i * 2 * kDepth + word] = token < 0 ? 0 : two;
        }
    }
}

// The weights of a low-rank step size for the lane's two channels.
struct Weights {
    unsigned high[kTensor ? kDepth : 1][4], low[kTensor ? kDepth : 1][4];

    DEVICE void read(const Params& p, int route, int first, int lane) {
        if constexpr (kTensor) {
#pragma unroll
            for (int d = 0; d < kDepth; ++d) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int rank = 16 * d + 8 * (i / 2) + 2 * (lane & 3), channel = first + i % 2;
                    float v[2];
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const bool there = channel < (int)p.channels && rank + j < kRank;
                        v[j] = there ? p.dt_weight[(route * p.channels + channel) * kRank + rank + j] : 0.f;
                    }
                    split(v[0], v[1], high[d][i], low[d][i]);
                }
            }
        }
    }

    // dt of every step and both channels, before the bias.
    DEVICE void step_sizes(float (*dt)[2], const unsigned* ranks, const int* tokens, const Params& p, long long batch,
                           int route, int first, int valid) const {
        if constexpr (kTensor) {
#pragma unroll
            for (int i = 0; i < kProducts; ++i) {
                float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                for (int k = 0; k < kDepth; ++k) {
                    multiply_add(d, high[k], ranks + (i * kDepth + k) * 2);
                    multiply_add(d, low[k], ranks + (i * kDepth + k) * 2);
                }
                dt[2 * i][0] = d[0], dt[2 * i][1] = d[2];
                if (2 * i + 1 < kSteps) dt[2 * i + 1][0] = d[1], dt[2 * i + 1][1] = d[3];
            }
        } else if constexpr (kRank > 0) {
            const DT_TYPE* row = (const DT_TYPE*)p.dt + batch * p.dt_b + route * p.dt_k;
#pragma unroll
            for (int t = 0; t < kSteps; ++t) dt[t][0] = dt[t][1] = 0.f;
#pragma unroll 2
            for (int r = 0; r < kRank; ++r) {
                const float* weight = p.dt_weight + (route * p.channels + first) * kRank + r;
                const float w0 = valid > 0 ? __ldg(weight) : 0.f, w1 = valid > 1 ? __ldg(weight + kRank) : 0.f;
#pragma unroll
                for (int t = 0; t < kSteps; ++t) {
                    Pack<DT_TYPE, 1> one;
                    load<false>(one, row + (long long)tokens[t] * (int)p.dt_l + r * p.dt_d, 0, tokens[t] >= 0);
                    dt[t][0] = fmaf(w0, one.get(0), dt[t][0]);
                    dt[t][1] = fmaf(w1, one.get(0), dt[t][1]);
                }
            }
        }
    }
};

// Write the sum over routes: a thread takes eight channels of a token.
template <class T>
DEVICE void write_sum(const float* sum, T* to, int token_stride, int stride, int tokens, int first, int channels) {
    for (int i = threadIdx.x; i < 2 * tokens; i += blockDim.x) {
        const int token = i >> 1, eight = i & 1;
        float v[8];
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
            const float2 two = *reinterpret_cast<const float2*>(sum + place(token, 4 * eight + pair));
            v[2 * pair] = two.x, v[2 * pair + 1] = two.y;
        }
        Pack<T, 8> packed;
        packed.set(v);
        store<true>(packed, to + (long long)token * token_stride + (first + 8ll * eight) * stride, stride,
                          channels - first - 8 * eight);
    }
}
