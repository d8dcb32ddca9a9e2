// few.cuh: what both passes share where sequences are few: a cluster of blocks takes them, see few_forward.cuh.
#pragma once
#include "few_cluster.cuh"

constexpr int kStates = STATES;
constexpr int kRun = 2;            // channels of a lane
constexpr int kSteps = STEPS;      // of a segment
constexpr int kSaved = 64;         // steps between two states that are saved
constexpr int kWarps = WARPS;      // of a block
constexpr int kRoutes = ROUTES;    // of a cluster
constexpr bool kOnce = ONCE;       // one round is enough
constexpr bool kChain = CHAIN;     // a block has one round, and waits for the one before it of its route
constexpr bool kMerge = MERGE;
constexpr bool kVector = VECTOR;   // x, dt, y: channels are neighbours, runs of a lane aligned
constexpr bool kAlong = ALONG;     // of all tensors tokens are neighbours, eights aligned, in the order of the route
constexpr bool kTable = TABLE;     // a route is not simply all tokens in their order
constexpr int kRowRun = ROW_RUN;   // neighbouring states of B and C that are read together
constexpr int kSegments = 8;
constexpr int kWarpSteps = kSegments * kSteps;
constexpr int kChannels = 4 * kRun;
constexpr int kElements = kStates * kChannels;  // states of a cluster
constexpr int kRouteWarps = kCluster * kWarps / kRoutes;
constexpr int kPart = kRouteWarps < kWarps ? kRouteWarps : kWarps;  // warps of a route in a block
constexpr int kSpan = kRouteWarps / kPart;                          // blocks of a route
constexpr int kOwn = kWarpSteps / 32;                               // steps whose tokens, B and C a lane fetches
constexpr bool kOne = kStates == 1;
constexpr int kProducts = kSteps / 2;
constexpr int kDepth = (kRank + 15) / 16;
static_assert(kCluster * kWarps % kRoutes == 0 && kRouteWarps % kPart == 0 && kWarps % kPart == 0);
static_assert(!kAlong || kRank == 0);
static_assert(!kChain || (kCluster == 1 && kRoutes == 1 && !kMerge));

template <class T> struct alignas(kSteps * sizeof(T) < 16 ? 8 : 16) Row { T at[kSteps]; };

// What belongs to the steps of a warp.
struct Steps {
    // Of this round and the next in turn: -1 = a padding step, -2 = past the end.
    alignas(16) int tokens[2][kSegments][kSteps];
    Row<B_TYPE> B[kStates][kSegments];
    Row<C_TYPE> C[kStates][kSegments];
};

// A tensor as one lane reads it, at (b, k) and its channels. Steps off the route read token 0, so that no load waits for a
// branch; what they read is zeroed.
struct Place {
    unsigned long long base;
    unsigned step, stride;  // bytes between tokens and between channels
    int valid;              // channels of the lane that are there

    DEVICE const char* at(int token) const { return (const char*)(base + (unsigned long long)(unsigned)max(token, 0) * step); }
};
template <class T>
DEVICE Place place_of(const void* data, unsigned batch, unsigned long long b, unsigned route, unsigned long long k,
                      unsigned long long l, unsigned long long d, int first, int valid) {
    const unsigned lane = valid > 0 ? first : 0;
    return {(unsigned long long)data + (batch * b + route * k + lane * d) * sizeof(T), (unsigned)(l * sizeof(T)),
            (unsigned)(d * sizeof(T)), valid};
}
// Loads that stay on their side of a barrier. Others are put off by the assembler until after waits for what was loaded
// before, and each of these is a trip to memory.
template <int kWords> DEVICE void read_words(unsigned* words, const char* at) {
    static_assert(kWords == 1 || kWords == 2 || kWords == 4);
    if constexpr (kWords == 1) {
        asm volatile("ld.global.u32 %0, [%1];" : "=r"(words[0]) : "l"(at));
    } else if constexpr (kWords == 2) {
        asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(at));
    } else {
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(at));
    }
}
DEVICE float read_float(const float* at) {
    unsigned word;
    read_words<1>(&word, (const char*)at);
    return __uint_as_float(word);
}
DEVICE unsigned read_half(const char* at) {
    unsigned short half;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(half) : "l"(at));
    return half;
}
// Of V neighbours only those up to `last` are there.
template <class T, int V, bool kWhole> DEVICE void read(Pack<T, V>& pack, const char* at, unsigned stride, int last) {
    pack.clear();
    if constexpr (kWhole) {
        constexpr int kWords = Pack<T, V>::kWords, kRead = kWords % 4 == 0 ? 4 : kWords % 2 == 0 ? 2 : 1;
#pragma unroll
        for (int i = 0; i < kWords; i += kRead) read_words<kRead>(pack.words + i, at + 4 * i);
    } else {
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const char* element = at + min(j, last) * (unsigned long long)stride;
            unsigned word;
            if constexpr (sizeof(T) == 4) read_words<1>(&word, element);
            else word = read_half(element);
            if (j > last) word = 0;
            if constexpr (sizeof(T) == 4) pack.words[j] = word;
            else pack.words[j / 2] |= word << j % 2 * 16;
        }
    }
}
// What was read counts only if it is `there`. This waits for it, so all that is read together is read before.
template <class T, int V> DEVICE void clear_unless(bool there, Pack<T, V>& pack) {
#pragma unroll
    for (int i = 0; i < Pack<T, V>::kWords; ++i) pack.words[i] = there ? pack.words[i] : 0;
}

// A lane's channels of its segment: fetched, then cleared where they don't count.
template <class T> struct Values {
    Pack<T, kAlong ? kSteps : kRun> at[kAlong ? kRun : kSteps];

    DEVICE float get(int t, int j) const { return kAlong ? at[kAlong ? j : 0].get(t) : at[kAlong ? 0 : t].get(j); }
    DEVICE void fetch(const Place& place, const int* tokens) {
        if constexpr (kAlong) {
#pragma unroll
            for (int j = 0; j < kRun; ++j) {
                const char* from = place.at(tokens[0]) + (j < place.valid ? j : 0) * (unsigned long long)place.stride;
                read<T, kSteps, true>(at[j], from, 0, 0);
            }
        } else {
#pragma unroll
            for (int t = 0; t < kSteps; ++t) {
                read<T, kRun, kVector>(at[t], place.at(tokens[t]), place.stride, max(place.valid, 1) - 1);
            }
        }
    }
    DEVICE void clear(const Place& place, const int* tokens) {
        if constexpr (kAlong) {
#pragma unroll
            for (int j = 0; j < kRun; ++j) clear_unless(tokens[0] >= 0 && j < place.valid, at[j]);
        } else {
#pragma unroll
            for (int t = 0; t < kSteps; ++t) clear_unless(tokens[t] >= 0 && place.valid > 0, at[t]);
        }
    }
};

DEVICE void read_tokens(int* to, const int* row) {
#pragma unroll
    for (int t = 0; t < kSteps; t += 4) {
        const int4 four = *(const int4*)(row + t);
        to[t] = four.x, to[t + 1] = four.y, to[t + 2] = four.z, to[t + 3] = four.w;
    }
}
template <class T> DEVICE Pack<T, kSteps> read_row(const Row<T>& row) {
    Pack<T, kSteps> pack;
    constexpr int kWords = Pack<T, kSteps>::kWords;
    if constexpr (kWords % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) {
            const uint4 four = ((const uint4*)&row)[i / 4];
            pack.words[i] = four.x, pack.words[i + 1] = four.y, pack.words[i + 2] = four.z, pack.words[i + 3] = four.w;
        }
    } else {
        const uint2 two = *(const uint2*)&row;
        pack.words[0] = two.x, pack.words[1] = two.y;
    }
    return pack;
}

// The steps that a lane fetches for its warp, lane + 32 i: their tokens, and B and C there.
struct OwnSteps {
    int lane, token[kOwn];
    Pack<B_TYPE, 1> B[kOne ? kOwn : 1];
    Pack<C_TYPE, 1> C[kOne ? kOwn : 1];

    DEVICE void fetch_tokens(const int* table, int start, int steps) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const int step = start + lane + 32 * i;
            if constexpr (kTable) token[i] = step < steps ? __ldg(table + step) : -2;
            else token[i] = step < steps ? step : -2;
        }
    }
    DEVICE void put_tokens(Steps& shelf, int turn) const {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const int step = lane + 32 * i;
            shelf.tokens[turn][step / kSteps][step % kSteps] = token[i];
        }
    }
    // One state: B and C come a round ahead.
    DEVICE void fetch_rows(const Place& at_B, const Place& at_C) {
        if constexpr (kOne) {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                read<B_TYPE, 1, false>(B[i], at_B.at(token[i]), 0, 0);
                read<C_TYPE, 1, false>(C[i], at_C.at(token[i]), 0, 0);
            }
        }
    }
    DEVICE void put_rows(Steps& shelf) {
        if constexpr (kOne) {
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                clear_unless(token[i] >= 0, B[i]), clear_unless(token[i] >= 0, C[i]);
                const int step = lane + 32 * i;
                put(shelf.B[0][step / kSteps], step % kSteps, B[i].words[0]);
                put(shelf.C[0][step / kSteps], step % kSteps, C[i].words[0]);
            }
        }
    }
    template <class T> static DEVICE void put(Row<T>& row, int t, unsigned word) {
        if constexpr (sizeof(T) == 4) row.at[t].bits = word;
        else row.at[t].bits = (unsigned short)word;
    }
};
// Several states: a warp's rows of B, or of C, on their way to the shelf, so many states of them at a time.
constexpr int kStage = kStates < 16 ? kStates : 16;
template <class T> struct StagedRows {
    static constexpr int kPacks = kAlong ? (kStage * kSegments + 31) / 32 : kOwn * (kStage / kRowRun);
    Pack<T, kAlong ? kSteps : kRowRun> at[kPacks];

    DEVICE void fetch(const Place& from, const Steps& shelf, int turn, int lane, int first) {
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            const Spot spot = find(i, lane, first);
            const char* row = from.at(spot.token(shelf, turn)) + min(spot.n, kStates - 1) * (unsigned long long)from.stride;
            if constexpr (kAlong) read<T, kSteps, true>(at[i], row, 0, 0);
            else read<T, kRowRun, (kRowRun > 1)>(at[i], row, 0, 0);
        }
    }
    DEVICE void put(Row<T> (*rows)[kSegments], const Steps& shelf, int turn, int lane, int first) {
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            const Spot spot = find(i, lane, first);
            clear_unless(spot.token(shelf, turn) >= 0, at[i]);
            if (spot.n >= kStates) continue;
            if constexpr (kAlong) {
                store<true>(at[i], (T*)&rows[spot.n][spot.segment], 1, kSteps);
            } else {
#pragma unroll
                for (int k = 0; k < kRowRun; ++k) {
                    unsigned word = at[i].words[k * (int)sizeof(T) / 4];
                    if (sizeof(T) == 2 && k % 2) word >>= 16;
                    OwnSteps::put(rows[spot.n + k][spot.segment], spot.t, word);
                }
            }
        }
    }

private:
    struct Spot {
        int n, segment, t;

        DEVICE int token(const Steps& shelf, int turn) const { return shelf.tokens[turn][segment][t]; }
    };
    static DEVICE Spot find(int i, int lane, int first) {
        if constexpr (kAlong) {
            const int all = lane + 32 * i;
            return {all < kStage * kSegments ? first + all / kSegments : kStates, all % kSegments, 0};
        } else {
            constexpr int kRuns = kStage / kRowRun;
            const int step = lane + i / kRuns * 32;
            return {first + i % kRuns * kRowRun, step / kSteps, step % kSteps};
        }
    }
};
DEVICE void stage_rows(Steps& shelf, const Place& at_B, const Place& at_C, int turn, int lane) {
#pragma unroll 1
    for (int first = 0; first < kStates; first += kStage) {
        StagedRows<B_TYPE> B;
        StagedRows<C_TYPE> C;
        B.fetch(at_B, shelf, turn, lane, first), C.fetch(at_C, shelf, turn, lane, first);
        __syncwarp();  // no load waits for what is done with another
        B.put(shelf.B, shelf, turn, lane, first), C.put(shelf.C, shelf, turn, lane, first);
    }
}

// A low-rank step size on the tensor cores: of columns what the lane holds of A in `multiply_add`, rows are the segments at
// step 2 i, then at step 2 i + 1; of weights what it holds of B. Columns of the product are channels, so the result lies
// where it is needed.
struct Ranks {
    unsigned words[kRank ? kProducts : 1][kRank ? kDepth : 1][4];

    DEVICE void fetch(const Place& dt, const int* tokens, int lane) {
        if constexpr (kRank > 0) {
#pragma unroll
            for (int t = 0; t < kSteps; ++t) {
                const char* at = dt.at(tokens[t]);
#pragma unroll
                for (int word = 0; word < 2 * kDepth; ++word) {
                    // Beyond the last column any number will do: its weight is 0.
                    const int over = 8 * word + 8 <= kRank ? 0 : max(8 * word + 2 * (lane & 3) - (kRank - 2), 0);
                    unsigned two = 0;
                    if (8 * word < kRank) read_words<1>(&two, at + 16 * word - 2 * over);
                    words[t / 2][word / 2][word % 2 * 2 + t % 2] = two;
                }
            }
        }
    }
    DEVICE void clear(const int* tokens) {
        if constexpr (kRank > 0) {
#pragma unroll
            for (int t = 0; t < kSteps; ++t) {
#pragma unroll
                for (int word = 0; word < 2 * kDepth; ++word) {
                    unsigned& two = words[t / 2][word / 2][word % 2 * 2 + t % 2];
                    two = tokens[t] >= 0 ? two : 0;
                }
            }
        }
    }
};
struct Weights {
    float2 raw[kRank ? kDepth : 1][2];
    unsigned high[kRank ? kDepth : 1][2], low[kRank ? kDepth : 1][2];

    DEVICE void fetch(const Params& p, long long route, int from, int lane) {
        if constexpr (kRank > 0) {
            const int channel = from + lane / 4;
#pragma unroll
            for (int d = 0; d < kDepth; ++d) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int rank = 16 * d + 8 * i + 2 * (lane & 3);
                    float2 v = {0.f, 0.f};
                    if (channel < (int)p.channels && rank < kRank) {  // the rank is even
                        const float* at = p.dt_weight + (route * p.channels + channel) * kRank + rank;
                        v = make_float2(__ldg(at), __ldg(at + 1));
                    }
                    raw[d][i] = v;
                }
            }
        }
    }
    DEVICE void halve() {
        if constexpr (kRank > 0) {
#pragma unroll
            for (int d = 0; d < kDepth; ++d) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    split(raw[d][i].x * kPerUnit, raw[d][i].y * kPerUnit, high[d][i], low[d][i]);
                }
            }
        }
    }
    DEVICE void step_sizes(float (*s)[kRun], const float* bias, const Ranks& ranks) const {
        if constexpr (kRank > 0) {
#pragma unroll
            for (int i = 0; i < kProducts; ++i) {
                float d[4] = {bias[0], bias[1], bias[0], bias[1]};
#pragma unroll
                for (int k = 0; k < kDepth; ++k) {
                    multiply_add(d, ranks.words[i][k], high[k]);
                    multiply_add(d, ranks.words[i][k], low[k]);
                }
                s[2 * i][0] = d[0], s[2 * i][1] = d[1], s[2 * i + 1][0] = d[2], s[2 * i + 1][1] = d[3];
            }
        }
    }
};

// Add a lane's channels of a segment to what is summed up over routes.
DEVICE void push(float4* all, const float (*values)[kRun], const int* tokens, int route, int quad, int length, int base,
                 Mail& mail) {
    const int slots = (length + kCluster - 1) / kCluster;
    float* sum = (float*)all + route * slots * kChannels + kRun * quad;
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
        const int token = max(tokens[t], 0), owner = (unsigned)token % kCluster;
        float* to = sum + (unsigned)token / kCluster * kChannels;
        send(to, base + owner, values[t][0], values[t][1], mail, tokens[t] >= 0);
    }
}
// Bytes of what is pushed to a block.
DEVICE int pushed(int length, int rank) { return kRoutes * kChannels * 4 * ((length - rank + kCluster - 1) / kCluster); }
// Write the sum over routes of the block's tokens.
template <class T>
DEVICE void write_sum(const float4* sum, T* out, long long token_stride, long long stride, int rank, int length, int valid) {
    constexpr int kPieces = kChannels / 4;
    static_assert(32 * kWarps % kPieces == 0);
    const int slots = (length + kCluster - 1) / kCluster, piece = threadIdx.x % kPieces * 4;
    const int first = threadIdx.x / kPieces * kCluster + rank;
    constexpr int kAtOnce = 32 * kWarps / kPieces * kCluster;
    T* to = out + first * token_stride + piece * stride;
#pragma unroll 1
    for (int i = threadIdx.x, token = first; token < length; i += 32 * kWarps, token += kAtOnce) {
        float v[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int k = 0; k < kRoutes; ++k) {
            const float4 one = sum[k * slots * kPieces + i];
            v[0] += one.x, v[1] += one.y, v[2] += one.z, v[3] += one.w;
        }
        Pack<T, 4> packed;
        packed.set(v);
        store<MERGE_VECTOR>(packed, to, (int)stride, valid - piece);
        to += kAtOnce * token_stride;
    }
}
// Write a lane's channels of a segment where they belong.
template <class T>
DEVICE void write_steps(const Place& place, const int* tokens, const float (*values)[kRun], int stride, int valid) {
    if constexpr (kAlong) {
        if (tokens[0] < 0) return;
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
            Pack<T, kSteps> packed;
            float row[kSteps];
#pragma unroll
            for (int t = 0; t < kSteps; ++t) row[t] = values[t][j];
            packed.set(row);
            if (j < valid) store<true>(packed, (T*)(place.at(tokens[0]) + j * (unsigned long long)place.stride), 1, kSteps);
        }
    } else {
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
            Pack<T, kRun> packed;
            packed.set(values[t]);
            if (tokens[t] >= 0) store<kVector>(packed, (T*)place.at(tokens[t]), stride, valid);
        }
    }
}
