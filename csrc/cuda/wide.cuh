// wide.cuh: what both passes for several states a channel share: how a block brings a tile of kTile steps of its
// kBlockChannels channels into shared memory, and a low-rank step size on the tensor cores.
//
// While loading and storing, a thread has one run of channels of one row (or a few) of the tile, so that a warp touches
// few rows of device memory at a time. It is read a tile ahead, into registers (struct Incoming), and unpacked as
// float32 when the scan of the tile before is done. A low-rank step size is multiplied after the barrier behind that,
// by each warp for its own channels.
#pragma once
#include "common.cuh"

constexpr int kLanes = LANES;    // lanes that share a channel
constexpr int kStates = STATES;  // states a lane holds of each of its channels
constexpr int kSlots = SLOTS;    // channels of a lane
constexpr bool kSoftplus = SOFTPLUS;
constexpr int kRank = RANK;  // columns of a low-rank step size, 0 = dt comes whole
constexpr int kWarps = WARPS;
constexpr bool kVectorX = VECTOR_X;        // x, dt and what goes with them: channels are neighbours, aligned, whole runs
constexpr bool kVectorBC = VECTOR_BC;      // B, C: states are neighbours, aligned, as many as lanes hold
constexpr bool kVectorRank = VECTOR_RANK;  // a low-rank step size: pairs of columns are neighbours, aligned
constexpr bool kTensorRank = TENSOR_RANK;  // it is multiplied on the tensor cores
constexpr int kPass = PASS;                // of two over a route in segments, or 0
constexpr int kTile = 16;                  // steps between two states that forward saves

constexpr int kThreads = 32 * kWarps;
constexpr int kGroups = 32 / kLanes;
constexpr int kWarpChannels = kSlots * kGroups;
constexpr int kBlockChannels = kWarps * kWarpChannels;
constexpr int kPitch = kBlockChannels + 2;  // so that rows meet other banks
constexpr int kRow = kLanes * kStates;      // states of a row of B in shared memory, the last ones 0
constexpr int kRun = kWarpChannels < 16 ? kWarpChannels / 2 : 8;  // channels a thread loads at a time, of one step
constexpr int kRuns = kBlockChannels / kRun;
constexpr int kRows = kTile * kRuns / kThreads;  // rows of which a thread has a run
constexpr int kShare = kTile * kRow / kThreads;
constexpr int kRowRun = kShare < 1 ? 1 : kShare < 4 ? kShare : 4;  // states a thread loads at a time, of one step
constexpr int kParts = kShare < 4 ? 1 : kShare / 4;
constexpr bool kPartsAhead = kParts <= 2;
constexpr int kRankTiles = kRank ? (kRank + 7) / 8 : 1;  // of eight columns
constexpr int kRankWords = 4 * kRankTiles;   // of two columns
constexpr int kRankPitch = kRankWords % 8 ? kRankWords : kRankWords + 4;
constexpr int kRankParts = kTensorRank ? (kTile * kRankWords + kThreads - 1) / kThreads : 1;
constexpr int kChannelTiles = kBlockChannels / 8;
constexpr int kOwnTiles = kWarpChannels / 8;

static_assert(kSlots <= kLanes || kLanes == 1);
static_assert(kRun >= 1 && kRows >= 1 && kRuns % 2 == 0);
static_assert(!kTensorRank || kWarpChannels % 8 == 0);

DEVICE float decay(float s, float A) {
    // ex2 is 7e-9 too small on average where decays are close to 1, which over thousands of steps adds up.
    return ex2(fmaf(s, A, 1e-8f));
}
template <class T> DEVICE T* at_token(T* tensor, int token, long long stride) {
    return tensor + (long long)token * (int)stride;
}

// V neighbouring floats in shared or device memory, four at a time where that is aligned.
template <int V> DEVICE void get(float* v, const float* at) {
    if constexpr (V % 4 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(at + i);
            v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
        }
    } else if constexpr (V % 2 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 2) {
            const float2 two = *reinterpret_cast<const float2*>(at + i);
            v[i] = two.x, v[i + 1] = two.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] = at[i];
    }
}
template <int V> DEVICE void put(float* at, const float* v) {
    if constexpr (V % 4 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            *reinterpret_cast<float4*>(at + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
        }
    } else if constexpr (V % 2 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 2) *reinterpret_cast<float2*>(at + i) = make_float2(v[i], v[i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) at[i] = v[i];
    }
}

// High and low bfloat16 halves of two numbers.
DEVICE uint2 halves(float v0, float v1) {
    const unsigned high = narrow_pair<Bfloat>(v0, v1);
    return {high, narrow_pair<Bfloat>(v0 - __uint_as_float(high << 16), v1 - __uint_as_float(high & 0xffff0000u))};
}
// d += A B in tf32, 16 x 8 and 8 x 8: the lane gives of A the rows lane / 4 and lane / 4 + 8 of column lane % 4, then of
// column lane % 4 + 4; of B column lane / 4 of those rows; and has of d those rows, columns 2 (lane % 4) and the next.
// Of the numbers the upper 19 bits count.
DEVICE void multiply_add_tf32(float* d, float a0, float a1, float a2, float a3, float b0, float b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#endif
}
constexpr float kTruncated = 1.000352f;  // what cutting off 13 bits takes from a number on average, given back

// A thread's run of channels, the same in all its rows, and those rows. Eight neighbouring lanes have two runs of four
// rows, for the banks' sake; where tokens are neighbours in memory, sixteen have all rows of one run. Lanes whose numbers
// differ in the bits from kRowHigh down to kRowLow have the same run.
constexpr bool kTokensFirst = TOKENS_FIRST && kRows == 1;
constexpr int kRowHigh = kTokensFirst ? 8 : 4, kRowLow = kTokensFirst ? 1 : 2;
constexpr int kRowsTogether = kTokensFirst ? 16 : 4;  // of those lanes
DEVICE int own_run() {
    return kTokensFirst ? threadIdx.x / kTile : (threadIdx.x & 1) + 2 * ((threadIdx.x >> 3) % (kRuns / 2));
}
DEVICE int own_row(int r) {
    if (kTokensFirst) return threadIdx.x % kTile;
    return (threadIdx.x >> 1 & 3) + 4 * ((r * kThreads + threadIdx.x) / 8 / (kRuns / 2));
}

// A thread's share of the rows of B and C.
struct Part {
    int row, state;
    bool there;
    DEVICE explicit Part(int k) {
        const int i = (k * kThreads + threadIdx.x) * kRowRun;
        row = i / kRow % kTile, state = i % kRow, there = kShare > 0 || i < kTile * kRow;
    }
};

// A tile in shared memory. A token of -1 is a padding step, -2 is past the end.
struct alignas(16) Stage {
    float2 su[kTile][kPitch];     // s, s x
    float rows[kTile][2 * kRow];  // B, then C
    float bias[kBlockChannels];
    float D[kBlockChannels];
    int tokens[4][kTile];  // of four tiles in turn
    // A low-rank step size: as pairs of bfloat16, of two tiles in turn, and the halves of its weights, for each 8 x 8 of
    // them channel lane / 4, columns 2 (lane % 4) and the next; or all as float32.
    alignas(16) unsigned low[2][kTensorRank ? kTile : 1][kTensorRank ? kRankPitch : 1];
    alignas(16) uint2 weight_halves[kTensorRank ? kChannelTiles : 1][kTensorRank ? kRankTiles : 1][32];
    alignas(16) float low_wide[kRank && !kTensorRank ? kTile : 1][kRank + 1];
    alignas(16) float weight[kTensorRank ? 1 : kRank + 1][kBlockChannels];
};

// Which sequence, which of its segments, which channels, and where a thread reads them.
//
// Where sequences are few, a route is split into segments of whole tiles, so that there is work for every multiprocessor.
// A first kernel, kPass 1, scans a segment from nothing and leaves the state at its end and the sum of its step sizes,
// whose exponential takes any other state through; the second, kPass 2, joins what lies before its segment.
struct Source {
    int channels, steps, states, route, run, valid, first, block, blocks;
    int segment, segments, first_tile, last_tile, tiles;  // tiles first_tile to last_tile - 1
    long long batch, sequence;
    const X_TYPE* x;
    const DT_TYPE* dt;
    const B_TYPE* B;
    const C_TYPE* C;
    const int* indices;

    DEVICE explicit Source(const Params& p) {
        channels = (int)p.channels, steps = (int)p.steps, states = (int)p.states;
        blocks = (channels + kBlockChannels - 1) / kBlockChannels, block = blockIdx.x % blocks;
        tiles = (steps + kTile - 1) / kTile;
        unsigned rest = blockIdx.x / blocks;
        segment = 0, segments = 1, first_tile = 0, last_tile = tiles;
        if constexpr (kPass > 0) {
            segments = (int)p.segments;
            const int taken = segments - (kPass == 1);  // no one waits for the end of the last segment
            segment = rest % taken + (kPass == 1 ? kFirstSegment : 0), rest /= taken;
            first_tile = segment * (int)p.segment_tiles, last_tile = min(first_tile + (int)p.segment_tiles, tiles);
        }
        route = rest % (int)p.routes, batch = rest / (int)p.routes;
        sequence = batch * p.routes + route;
        first = block * kBlockChannels, run = own_run() * kRun, valid = channels - first - run;
        x = (const X_TYPE*)p.x + batch * p.x_b + route * p.x_k + (first + run) * p.x_d;
        dt = (const DT_TYPE*)p.dt + batch * p.dt_b + route * p.dt_k + (kRank ? 0 : (first + run) * p.dt_d);
        B = (const B_TYPE*)p.B + batch * p.B_b + route * p.B_k;
        C = (const C_TYPE*)p.C + batch * p.C_b + route * p.C_k;
        indices = p.indices + (long long)route * steps;
    }
    // What a lane has of a channel's states at the end of a segment, and the sum of the channel's step sizes.
    DEVICE float* edge(const Params& p, int of, int place) const {
        return p.edges + (((sequence * segments + of) * channels) + min(first + place, channels - 1)) * kRow;
    }
    DEVICE float* span(const Params& p, int of, int place) const {
        return p.spans + (sequence * segments + of) * channels + min(first + place, channels - 1);
    }
    // The state behind segments begin, begin + by and so on up to before end.
    DEVICE void join(const Params& p, float* h, const float* A, int place, int from_state, int begin, int end, int by) const {
#pragma unroll 1
        for (int of = begin; of != end; of += by) {
            float local[kStates];
            get<kStates>(local, edge(p, of, place) + from_state);
            const float sum = *span(p, of, place);
#pragma unroll
            for (int n = 0; n < kStates; ++n) h[n] = fmaf(decay(sum, A[n]), h[n], local[n]);
        }
    }
    DEVICE int token_at(int step) const { return step < steps ? __ldg(indices + step) : -2; }

    // What belongs to the channels; those past the last are all 0.
    DEVICE void prepare(Stage& stage, const Params& p) const {
        for (int i = threadIdx.x; i < kBlockChannels; i += kThreads) {
            const bool there = first + i < channels;
            const long long at = (long long)route * channels + first + i;
            stage.bias[i] = there && p.dt_bias ? p.dt_bias[at] : 0.f;
            stage.D[i] = there && p.D ? p.D[at] : 0.f;
            for (int r = 0; r < (kTensorRank ? 0 : kRank); ++r) {
                stage.weight[r][i] = there ? p.dt_weight[at * kRank + r] : 0.f;
            }
        }
        for (int i = threadIdx.x; kTensorRank && i < kChannelTiles * kRankTiles * 32; i += kThreads) {
            const int lane = i % 32, tile = i / 32 % kRankTiles, eight = i / 32 / kRankTiles;
            const int channel = first + 8 * eight + lane / 4, rank = 8 * tile + 2 * (lane % 4);
            const float* at = p.dt_weight + ((long long)route * channels + channel) * kRank + rank;
            const bool there = channel < channels;
            stage.weight_halves[eight][tile][lane] =
                halves(there && rank < kRank ? at[0] : 0.f, there && rank + 1 < kRank ? at[1] : 0.f);
        }
    }
};

// What a thread has read of a tile and not yet unpacked.
struct Incoming {
    Pack<X_TYPE, kRun> x[kRows];
    Pack<DT_TYPE, kRun> dt[kRank ? 1 : kRows];
    Pack<B_TYPE, kRowRun> B[kPartsAhead ? kParts : 1];
    Pack<C_TYPE, kRowRun> C[kPartsAhead ? kParts : 1];
    unsigned low[kRankParts];

    DEVICE void fetch_part(const Source& from, const Params& p, const int* tokens, int k, int slot) {
        const Part part(k);
        const int token = part.there ? tokens[part.row] : -1, valid = token >= 0 ? from.states - part.state : 0;
        load<kVectorBC>(B[slot], at_token(from.B, token, p.B_l) + part.state * (int)p.B_n, (int)p.B_n, valid);
        load<kVectorBC>(C[slot], at_token(from.C, token, p.C_l) + part.state * (int)p.C_n, (int)p.C_n, valid);
    }
    DEVICE void fetch(const Source& from, const Params& p, const int* tokens) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int token = tokens[own_row(r)], valid = token >= 0 ? from.valid : 0;
            load<kVectorX>(x[r], at_token(from.x, token, p.x_l), (int)p.x_d, valid);
            if constexpr (kRank == 0) load<kVectorX>(dt[r], at_token(from.dt, token, p.dt_l), (int)p.dt_d, valid);
        }
#pragma unroll
        for (int k = 0; kPartsAhead && k < kParts; ++k) fetch_part(from, p, tokens, k, k);
        if constexpr (kTensorRank) {
#pragma unroll
            for (int k = 0; k < kRankParts; ++k) {
                const int i = k * kThreads + threadIdx.x, row = i / kRankWords, rank = 2 * (i % kRankWords);
                const int token = row < kTile ? tokens[row] : -1;
                Pack<DT_TYPE, 2> pair;
                load<kVectorRank>(pair, at_token(from.dt, token, p.dt_l) + rank * (int)p.dt_d, (int)p.dt_d,
                                  token >= 0 ? kRank - rank : 0);
                low[k] = pair.words[0];
            }
        }
    }
    // beside(r, i): what goes beside x or takes its place in `through`, where backward keeps dL/dy.
    template <bool kBeside, class Beside>
    DEVICE void unpack(const Source& from, const Params& p, Stage& stage, int tile, float2 (*through)[kPitch],
                       Beside beside) {
        const int* tokens = stage.tokens[tile & 3];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int row = own_row(r), token = tokens[row];
            float su[2 * kRun], other[2 * kRun];
            if constexpr (kRank == 0) {
                float bias[kRun];
                get<kRun>(bias, stage.bias + from.run);
#pragma unroll
                for (int i = 0; i < kRun; ++i) {
                    const float s = step_size(dt[r].get(i) + bias[i], token);
                    su[2 * i] = s, su[2 * i + 1] = s * x[r].get(i);
                }
                put<2 * kRun>(&stage.su[row][from.run].x, su);
            }
            if constexpr (kRank > 0 || kBeside) {
#pragma unroll
                for (int i = 0; i < kRun; ++i) other[2 * i] = beside(r, i), other[2 * i + 1] = x[r].get(i);
                put<2 * kRun>(&through[row][from.run].x, other);
            }
        }
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
            const Part part(k);
            const int slot = kPartsAhead ? k : 0;
            if (!kPartsAhead) fetch_part(from, p, tokens, k, 0);
            if (!part.there) continue;
            float values[kRowRun];
#pragma unroll
            for (int n = 0; n < kRowRun; ++n) values[n] = B[slot].get(n);
            put<kRowRun>(stage.rows[part.row] + part.state, values);
#pragma unroll
            for (int n = 0; n < kRowRun; ++n) values[n] = C[slot].get(n);
            put<kRowRun>(stage.rows[part.row] + kRow + part.state, values);
        }
        if constexpr (kTensorRank) {
#pragma unroll
            for (int k = 0; k < kRankParts; ++k) {
                const int i = k * kThreads + threadIdx.x;
                if (i < kTile * kRankWords) stage.low[tile & 1][i / kRankWords][i % kRankWords] = low[k];
            }
        } else if constexpr (kRank > 0) {
            for (int i = threadIdx.x; i < kTile * kRank; i += kThreads) {
                const int row = i / kRank, rank = i % kRank, token = tokens[row];
                const DT_TYPE* at = at_token(from.dt, token, p.dt_l) + rank * (int)p.dt_d;
                stage.low_wide[row][rank] = token >= 0 ? widen(*at) : 0.f;
            }
        }
    }
    // Past the end the state stays as it is.
    static DEVICE float step_size(float v, int token) {
        if (kSoftplus) v = softplus<sizeof(DT_TYPE) == 4>(v);
        return token == -2 ? 0.f : v;
    }
    // Behind the barrier: (s, s x) from a low-rank step size and the x beside.
    DEVICE void multiply_rank(const Source& from, Stage& stage, int tile, float2 (*through)[kPitch]) const {
        const int* tokens = stage.tokens[tile & 3];
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        if constexpr (kTensorRank) {
            unsigned a[(kRankTiles + 1) / 2][4];
#pragma unroll
            for (int i = 0; i < (kRankTiles + 1) / 2 * 4; ++i) {
                const int eight = i / 4 * 2 + i % 4 / 2, word = eight * 4 + lane % 4;
                a[i / 4][i % 4] = eight < kRankTiles ? stage.low[tile & 1][lane / 4 + 8 * (i % 2)][word] : 0;
            }
#pragma unroll
            for (int c = 0; c < kOwnTiles; ++c) {
                float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                for (int i = 0; i < (kRankTiles + 1) / 2; ++i) {
                    const uint2(*weights)[32] = stage.weight_halves[warp * kOwnTiles + c];
                    const uint2 w0 = weights[2 * i][lane];
                    uint2 w1 = {0, 0};
                    if (2 * i + 1 < kRankTiles) w1 = weights[2 * i + 1 < kRankTiles ? 2 * i + 1 : 0][lane];
                    const unsigned high[2] = {w0.x, w1.x}, rest[2] = {w0.y, w1.y};
                    multiply_add(d, a[i], high);
                    multiply_add(d, a[i], rest);
                }
                const int channel = warp * kWarpChannels + 8 * c + 2 * (lane % 4);
                float bias[2];
                get<2>(bias, stage.bias + channel);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = lane / 4 + 8 * half, token = tokens[row];
                    float pair[4];
                    get<4>(pair, &through[row][channel].x);
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const float s = step_size(d[2 * half + i] + bias[i], token);
                        pair[2 * i] = s, pair[2 * i + 1] *= s;
                    }
                    put<4>(&stage.su[row][channel].x, pair);
                }
            }
            __syncwarp();
        } else if constexpr (kRank > 0) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int row = own_row(r), token = tokens[row];
                float s[kRun], su[2 * kRun];
                get<kRun>(s, stage.bias + from.run);
#pragma unroll 4
                for (int c = 0; c < kRank; ++c) {
                    float weight[kRun];
                    get<kRun>(weight, stage.weight[c] + from.run);
#pragma unroll
                    for (int i = 0; i < kRun; ++i) s[i] = fmaf(weight[i], stage.low_wide[row][c], s[i]);
                }
#pragma unroll
                for (int i = 0; i < kRun; ++i) {
                    su[2 * i] = step_size(s[i], token);
                    su[2 * i + 1] = su[2 * i] * x[r].get(i);
                }
                put<2 * kRun>(&stage.su[row][from.run].x, su);
            }
            __syncthreads();
        }
    }
};
