// narrow.cuh: what both passes over a scan of one state share. Such a scan moves many bytes for little arithmetic, and
// its maps h -> a h + b are cheap to join, so time is split over threads.
//
// Grid: a block = one b and 16 channels, walking all routes one after the other and adding them up in shared memory
// (kMerge), or one route of them. Lane = four neighbouring channels, 4 (lane % 4), and one of the warp's eight segments,
// lane / 4; a segment = kSteps steps, taken in the lane's registers. All segments of a block make a chunk; they are
// joined by exchanges in the warp and through shared memory between warps, one barrier a chunk.
// What belongs to a step alone (its token, its B and C) is fetched once by one lane of the warp and laid on the warp's
// shelf in shared memory, so that a lane's own work is loads at constant places, x, dt and arithmetic. x and dt of the
// next chunk travel to registers while this one is computed.
// A low-rank step size in bfloat16 is formed on the tensor cores from the high and low halves of the weights: the
// lanes' places are those of the product's tile, so the result lies where it is needed.
#pragma once
#include "single.cuh"

constexpr bool kVector = VECTOR;         // x, dt, y and their like: channels are neighbours, fours aligned
constexpr bool kVectorRank = VECTOR_RANK;  // a low-rank dt: columns are neighbours, pairs aligned
constexpr bool kMerge = MERGE;
constexpr bool kWhole = WHOLE;           // no step is padding, and a segment is all there or not at all
constexpr int kSteps = STEPS;
constexpr int kMaxWarps = MAX_WARPS;
constexpr int kChannels = 16;
constexpr int kSegments = 8;             // of a warp
constexpr int kWarpSteps = kSegments * kSteps;
constexpr int kOwn = (kWarpSteps + 31) / 32;  // steps that a lane fetches for its warp
constexpr int kProducts = (kSteps + 1) / 2;   // tiles of 8 segments x 2 steps
constexpr int kDepth = (kRank + 15) / 16;     // 16 columns of the rank each
constexpr bool kTensor = kRank > 0 && TENSOR;
static_assert(kSteps <= 8, "a row of the shelf holds eight");

// A segment's tokens, or its pairs of B and C, on the shelf; read 16 bytes at a time.
struct alignas(16) TokenRow { int at[8]; };
struct alignas(16) PairRow { float2 at[8]; };

struct Shelf {
    TokenRow tokens[2][kSegments];  // of a chunk and the next in turn: -1 = a padding step, -2 = past the end
    TokenRow places[kMerge ? 2 : 1][kSegments];
    PairRow weights[kSegments];     // B and C; 0 where there is no token
};

// Where a token's 16 channels lie in the sum over routes, in bytes. Neighbours change places so that two segments that
// a quarter of the warp takes at once mostly meet other banks, be they rows or columns of a map.
DEVICE int place_of_token(int token) {
    return (token ^ (__popc(token & (kSteps % 2 ? 0x80 : 0x388)) & 1)) * 64;
}

DEVICE void read_row(int* to, const TokenRow& row) {
#pragma unroll
    for (int t = 0; t < kSteps; t += 4) {
        const int4 four = *reinterpret_cast<const int4*>(row.at + t);
        to[t] = four.x;
        if (t + 1 < kSteps) to[t + 1 < kSteps ? t + 1 : 0] = four.y;
        if (t + 2 < kSteps) to[t + 2 < kSteps ? t + 2 : 0] = four.z;
        if (t + 3 < kSteps) to[t + 3 < kSteps ? t + 3 : 0] = four.w;
    }
}
DEVICE void read_row(float2* to, const PairRow& row) {
#pragma unroll
    for (int t = 0; t < kSteps; t += 2) {
        const float4 two = *reinterpret_cast<const float4*>(row.at + t);
        to[t] = make_float2(two.x, two.y);
        if (t + 1 < kSteps) to[t + 1 < kSteps ? t + 1 : 0] = make_float2(two.z, two.w);
    }
}

// A tensor as one lane reads it, at (b, k) and its channels. Lanes past the last channel read channel 0 and steps off the
// route token 0, so that no load waits for a branch; what they read is zeroed. An address is one multiply-add.
struct Place {
    unsigned long long base;
    unsigned step, stride;  // bytes between tokens and between channels
    int last;               // the last channel of the lane that is there

    DEVICE const char* at(int token) const {
        return (const char*)(base + (unsigned long long)(unsigned)(kWhole ? token : max(token, 0)) * step);
    }
};
template <class T>
DEVICE Place place_of(const void* data, long long batch, long long b, int route, long long k, long long l, long long d,
                      int first, int valid) {
    const long long lane = valid > 0 ? first * d : 0;
    Place place = {(unsigned long long)data + (batch * b + route * k + lane) * (long long)sizeof(T),
                   (unsigned)(l * sizeof(T)), (unsigned)(d * sizeof(T)), max(min(valid, 4) - 1, 0)};
    keep(place.base);
    return place;
}
// kWhole: the token is one.
template <class T, int V> DEVICE Pack<T, V> read(const Place& place, int token) {
    Pack<T, V> pack;
    const char* at = place.at(token);
    if constexpr (V == 1) {
        if constexpr (sizeof(T) == 4) pack.words[0] = __ldg((const unsigned*)at);
        else pack.words[0] = __ldg((const unsigned short*)at);
    } else if constexpr (kVector && sizeof(T) == 2) {
        const uint2 two = __ldg((const uint2*)at);
        pack.words[0] = two.x, pack.words[1] = two.y;
    } else if constexpr (kVector) {
        const uint4 four = __ldg((const uint4*)at);
        pack.words[0] = four.x, pack.words[1] = four.y, pack.words[2] = four.z, pack.words[3] = four.w;
    } else {
        pack.clear();
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const char* element = at + min(j, place.last) * (unsigned long long)place.stride;
            if constexpr (sizeof(T) == 4) pack.words[j] = __ldg((const unsigned*)element);
            else pack.words[j / 2] |= (unsigned)__ldg((const unsigned short*)element) << j % 2 * 16;
        }
    }
    if (!kWhole && token < 0) pack.clear();
    return pack;
}
// The steps of a chunk that a lane fetches for its warp: their tokens, and B and C there.
struct OwnSteps {
    int lane;
    int ahead[kOwn];  // tokens in the chunk after next; -1 = a padding step, -2 = past the end
    Pack<B_TYPE, 1> B[kOwn];
    Pack<C_TYPE, 1> C[kOwn];

    DEVICE bool mine(int i) const { return kWarpSteps % 32 == 0 || lane + 32 * i < kWarpSteps; }
    DEVICE TokenRow& row(TokenRow* rows, int i) const { return rows[(lane + 32 * i) / kSteps & (kSegments - 1)]; }

    DEVICE void fetch_tokens(const int* table, int start, int steps) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const int step = start + lane + 32 * i, token = __ldg(table + min(step, steps - 1));
            ahead[i] = step < steps ? token : -2;
        }
    }
    DEVICE void fetch_weights(const Place& at_B, const Place& at_C, const int* tokens) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            B[i] = read<B_TYPE, 1>(at_B, max(tokens[i], 0));
            C[i] = read<C_TYPE, 1>(at_C, max(tokens[i], 0));
        }
    }
    DEVICE void put_tokens(Shelf& shelf, int turn) const {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            if (!mine(i)) continue;
            const int token = kWhole ? max(ahead[i], 0) : ahead[i];  // some token, so that no load waits for a branch
            row(shelf.tokens[turn], i).at[(lane + 32 * i) % kSteps] = token;
            if constexpr (kMerge) row(shelf.places[turn], i).at[(lane + 32 * i) % kSteps] = place_of_token(token);
        }
    }
    DEVICE void put_weights(Shelf& shelf, const int* tokens) const {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            if (!mine(i)) continue;
            shelf.weights[(lane + 32 * i) / kSteps].at[(lane + 32 * i) % kSteps] =
                tokens[i] < 0 ? make_float2(0.f, 0.f) : make_float2(B[i].get(0) * kUnit, C[i].get(0));
        }
    }
};

// The columns of a low-rank step size that the lane holds of A in `multiply_add`, by products: rows are the segments at
// step 2i, then at step 2i + 1.
struct Ranks {
    unsigned words[kTensor ? kProducts : 1][kTensor ? kDepth : 1][4];

    DEVICE void read(const Place& dt, const int* tokens, int lane) {
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
            const char* at = dt.at(tokens[t]);
#pragma unroll
            for (int word = 0; word < 2 * kDepth; ++word) {
                const int rank = 8 * word + 2 * (lane & 3);
                unsigned two = 0;
                if (kWhole || tokens[t] >= 0) {
                    if constexpr (kVectorRank) {
                        if (rank < kRank) two = __ldg((const unsigned*)(at + 8 * word * sizeof(DT_TYPE)));
                    } else {
                        if (rank < kRank) two = __ldg((const unsigned short*)(at + 8 * word * dt.stride));
                        if (rank + 1 < kRank) {
                            two |= (unsigned)__ldg((const unsigned short*)(at + (8 * word + 1) * dt.stride)) << 16;
                        }
                    }
                }
                words[t / 2][word / 2][word % 2 * 2 + t % 2] = two;
                if (t + 1 == kSteps && t % 2 == 0) words[t / 2][word / 2][word % 2 * 2 + 1] = 0;  // there is no such step
            }
        }
    }
};

// A column of B in `multiply_add` is channel 4 (n / 2) + n % 2, and 2 more in the second product, so that the lane's
// two columns of each result are its four channels. This is the channel at row or column n of the given half.
DEVICE int channel_of(int n, int half) { return 4 * (n / 2) + n % 2 + 2 * half; }

// The weights of a low-rank step size.
struct Weights {
    unsigned high[kTensor ? kDepth : 1][2][2], low[kTensor ? kDepth : 1][2][2];

    DEVICE void read(const Params& p, int route, int tile, int lane) {
        if constexpr (kTensor) {
#pragma unroll
            for (int d = 0; d < kDepth; ++d) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int channel = tile * kChannels + channel_of(lane >> 2, half);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int rank = 16 * d + 8 * i + 2 * (lane & 3);
                        float v[2];
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
                            const bool there = channel < (int)p.channels && rank + j < kRank;
                            v[j] = there ? p.dt_weight[((long long)route * p.channels + channel) * kRank + rank + j] : 0.f;
                        }
                        split(v[0] * kPerUnit, v[1] * kPerUnit, high[d][half][i], low[d][half][i]);
                    }
                }
            }
        }
    }

    // Step sizes before softplus, from the bias on, of every step and the lane's four channels.
    DEVICE void step_sizes(float (*dt)[4], const float* bias, const Ranks& ranks, const int* tokens, const Params& p,
                           long long batch, int route, int first, int valid) const {
        if constexpr (kTensor) {
#pragma unroll
            for (int i = 0; i < kProducts; ++i) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float d[4] = {bias[2 * half], bias[2 * half + 1], bias[2 * half], bias[2 * half + 1]};
#pragma unroll
                    for (int k = 0; k < kDepth; ++k) {
                        multiply_add(d, ranks.words[i][k], high[k][half]);
                        multiply_add(d, ranks.words[i][k], low[k][half]);
                    }
                    dt[2 * i][2 * half] = d[0], dt[2 * i][2 * half + 1] = d[1];
                    if (2 * i + 1 < kSteps) {
                        float* odd = dt[2 * i + 1 < kSteps ? 2 * i + 1 : 0];
                        odd[2 * half] = d[2], odd[2 * half + 1] = d[3];
                    }
                }
            }
        } else if constexpr (kRank > 0) {
            const DT_TYPE* row = (const DT_TYPE*)p.dt + batch * p.dt_b + route * p.dt_k;
#pragma unroll
            for (int t = 0; t < kSteps; ++t) {
#pragma unroll
                for (int j = 0; j < 4; ++j) dt[t][j] = bias[j];
            }
#pragma unroll 1
            for (int r = 0; r < kRank; ++r) {
                const float* weight = p.dt_weight + ((long long)route * p.channels + first) * kRank + r;
                float w[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) w[j] = j < valid ? __ldg(weight + j * kRank) * kPerUnit : 0.f;
#pragma unroll
                for (int t = 0; t < kSteps; ++t) {
                    Pack<DT_TYPE, 1> one;
                    load<false>(one, row + (long long)tokens[t] * (int)p.dt_l + r * p.dt_d, 0, tokens[t] >= 0);
#pragma unroll
                    for (int j = 0; j < 4; ++j) dt[t][j] = fmaf(w[j], one.get(0), dt[t][j]);
                }
            }
        }
    }
};

// Add a lane's channels of a segment to the sum over routes. A route visits a token once, so all can be read before any
// is written.
DEVICE void add_to_sum(char* sum, const TokenRow& row, const TokenRow& tokens, int lane, const float (*values)[4]) {
    int places[kSteps];
    float4 old[kSteps];
    read_row(places, row);
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
        if (kWhole || tokens.at[t] >= 0) old[t] = *reinterpret_cast<const float4*>(sum + places[t] + (lane & 3) * 16);
    }
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
        if (kWhole || tokens.at[t] >= 0) {
            const float* v = values[t];
            *reinterpret_cast<float4*>(sum + places[t] + (lane & 3) * 16) =
                make_float4(old[t].x + v[0], old[t].y + v[1], old[t].z + v[2], old[t].w + v[3]);
        }
    }
}

DEVICE void clear_sum(char* sum, int tokens) {  // neighbours change places, so there is an even number of them
    for (int i = threadIdx.x; i < (tokens + 1) / 2 * 8; i += blockDim.x) {
        reinterpret_cast<float4*>(sum)[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
}

// Write a lane's channels of a segment, where there is a token.
template <class T>
DEVICE void write_steps(void* data, long long base, int step, int stride, const int* tokens, const float (*values)[4],
                        int valid) {
    if (valid <= 0) return;
    unsigned long long to = (unsigned long long)data + base * (long long)sizeof(T);
    keep(to);
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
        if (kWhole || tokens[t] >= 0) {
            Pack<T, 4> packed;
            packed.set(values[t]);
            store<kVector>(packed, (T*)(to + (unsigned long long)(unsigned)tokens[t] * (unsigned)(step * sizeof(T))), stride,
                           valid);
        }
    }
}

// Write the sum over routes: a thread takes eight channels of a token.
template <class T>
DEVICE void write_sum(const char* sum, T* to, int token_stride, int stride, int tokens, int first, int channels) {
    for (int i = threadIdx.x; i < 2 * tokens; i += blockDim.x) {
        const int token = i >> 1, eight = i & 1;
        const char* at = sum + place_of_token(token) + 32 * eight;
        const float4 low = *reinterpret_cast<const float4*>(at), high = *reinterpret_cast<const float4*>(at + 16);
        const float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        Pack<T, 8> packed;
        packed.set(v);
        store<true>(packed, to + (long long)token * token_stride + (first + 8ll * eight) * stride, stride,
                    channels - first - 8 * eight);
    }
}

// Join the maps h -> a h + b of the warp's segments: (a, b) become those of this segment and all before it in the warp,
// (before_a, before_b) those of all before it. kBack: of all behind it.
template <bool kBack> DEVICE void join(float* a, float* b, float* before_a, float* before_b, int lane) {
    const int from_end = kBack ? 7 - (lane >> 2) : lane >> 2;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) {
            const float other_a = kBack ? __shfl_down_sync(kAll, a[j], offset) : __shfl_up_sync(kAll, a[j], offset);
            const float other_b = kBack ? __shfl_down_sync(kAll, b[j], offset) : __shfl_up_sync(kAll, b[j], offset);
            if (from_end * 4 >= offset) {
                b[j] = fmaf(a[j], other_b, b[j]);
                a[j] *= other_a;
            }
        }
        before_a[j] = kBack ? __shfl_down_sync(kAll, a[j], 4) : __shfl_up_sync(kAll, a[j], 4);
        before_b[j] = kBack ? __shfl_down_sync(kAll, b[j], 4) : __shfl_up_sync(kAll, b[j], 4);
        if (from_end == 0) before_a[j] = 1.f, before_b[j] = 0.f;
    }
}
