// wide_stage.cuh: how a block brings a tile of kTile steps of its kBlockChannels channels into shared memory, for both
// passes over several states a channel.
//
// While loading and storing, a thread has one run of channels of one row (or a few) of the tile, so that a warp touches
// few rows of device memory at a time. It is read a tile ahead, into registers or a place of the thread's own in shared
// memory (struct Incoming), and unpacked as float32 when the scan of the tile before is done. A low-rank step size is
// multiplied after the barrier behind that, by each warp for its own channels.
#pragma once
#include "wide.cuh"

// A thread's run of channels, the same in all its rows, and those rows. Eight neighbouring lanes have two runs of four
// rows, for the banks' sake; where tokens are neighbours in memory, sixteen have all rows of one run. Lanes whose numbers
// differ in the bits from kRowHigh down to kRowLow have the same run.
constexpr bool kTokensFirst = TOKENS_FIRST && kRows == 1;
constexpr int kRowHigh = kTokensFirst ? 8 : 4, kRowLow = kTokensFirst ? 1 : 2;
constexpr int kRowsTogether = kTokensFirst ? 16 : 4;  // of those lanes
DEVICE unsigned thread() {  // the compiler must not keep what is worked out from it, for registers are scarcer
    unsigned t = threadIdx.x;
    if (kThrift) asm volatile("" : "+r"(t));
    return t;
}
DEVICE int own_run(unsigned t = thread()) {
    return kTokensFirst ? t / kTile : (t & 1) + 2 * ((t >> 3) % (kRuns / 2));
}
DEVICE int own_row(int r, unsigned t = thread()) {
    return kTokensFirst ? t % kTile : (t >> 1 & 3) + 4 * ((r * kThreads + t) / 8 / (kRuns / 2));
}

// A thread's share of the rows of B and C.
struct Part {
    int row, state;
    bool there, of_C;  // of_C: of kHalves
    DEVICE explicit Part(int k, unsigned t = thread()) {
        const unsigned i = (k * kThreads + t) * kRowRun;
        row = i / kRow % kTile, state = i % kRow;
        there = kShare > 0 || i < kTile * kRow, of_C = t >= kThreads / 2;
    }
};

constexpr int kRingX = kBuffers == 1 ? 1 : kCopies ? 3 : 2;  // tiles of which x waits in shared memory, for D x too
using AskedX = Asked<X_TYPE, kRun, kVectorX>;
using AskedDt = Asked<DT_TYPE, kRun, kVectorX>;
constexpr bool kPlacesX = AskedX::kApart || kBuffers > 1;
using AskedB = Asked<B_TYPE, kRowRun, kVectorBC>;
using AskedC = Asked<C_TYPE, kRowRun, kVectorBC>;
// Tiles whose low-rank step sizes are in shared memory: going back, one in float32, so that as many blocks fit.
constexpr int kLowRing = kBuffers > 1 && kCopies ? 3 : kBuffers == 1 && kExact ? 1 : 2;

// A tile in shared memory. A token of -1 is a padding step, -2 is past the end.
struct alignas(16) Stage {
    float2 su[kBuffers][kTile][kPitch];     // s, s x
    float rows[kBuffers][kTile][2 * kRow];  // B, then C
    float bias[kBlockChannels];
    float nothing[kRun < 2 ? 2 : kRun];  // a bias whose step sizes are 0
    float D[kBlockChannels];
    int tokens[kRing][kTile];  // of tiles in turn
    // Where the block's channels begin; kept here since registers are scarce.
    const X_TYPE* x;
    const DT_TYPE* dt;
    const B_TYPE* B;
    const C_TYPE* C;
    // A low-rank step size: as pairs, of tiles in turn, and those of its weights, for each 8 x 8 of them channel lane / 4,
    // columns 2 (lane % 4) and the next; or all as float32.
    alignas(16) unsigned low[kLowRing][kTensorRank ? kTile : 1][kTensorRank ? kRankPitch : 1][Low::kWords];
    alignas(16) uint2 weight_pairs[kTensorRank ? kChannelTiles : 1][kTensorRank ? kRankTiles : 1][32];
    alignas(16) float low_wide[kBuffers][kRank && !kTensorRank ? kTile : 1][kRank + 1];
    alignas(16) float weight[kTensorRank ? 1 : kRank + 1][kTensorRank ? 1 : kBlockChannels];
    // Where a thread finds what it has asked for; x of kRingX tiles in turn.
    alignas(16) unsigned x_places[kRingX][kRows][kPlacesX ? kThreads : 1][kPlacesX ? AskedX::kWords : 1];
};
struct alignas(16) Places {
    alignas(16) unsigned dt[kRank ? 1 : kRows][kRank ? 1 : kThreads][AskedDt::kWords];
    alignas(16) unsigned B[kPartsAhead ? kParts : 1][kThreads][AskedB::kWords];
    alignas(16) unsigned C[kPartsAhead ? kParts : 1][kHalves ? 1 : kThreads][AskedC::kWords];
};

constexpr int kFirstLess = 4;  // as FIRST_LESS in cuda_kernels.py

// Which sequence, which of its segments, which channels, and where a thread reads them.
//
// Where sequences are few, a route is split into segments of whole tiles, so that there is work for every multiprocessor.
// A first kernel, kPass 1, scans a segment from nothing and leaves the state at its end and the sum of its step sizes,
// whose exponential takes any other state through; the second, kPass 2, joins what lies before its segment. What lies
// before the first segment is known, so that where segments are long the first kernel of forward does all there is to do
// with it, which is shorter by one part in kFirstLess for that.
struct Source {
    int channels, steps, states, route, share, run, valid, first, block, blocks;  // block: of the blocks of a route
    int segment, segments, first_tile, last_tile, tiles;  // tiles first_tile to last_tile - 1
    long long batch, sequence;
    const int* indices;

    // turn: the route, where a block takes them one after the other, or -1.
    // group: of the block's groups of channels, which it takes one after the other.
    // index: which block it is; routes are what it changes with last where some wait for others.
    // item: of the `items` of the batch that a block takes one after the other.
    DEVICE Source(const Params& p, int turn, int group, unsigned index, int item = 0, int items = 1) {
        channels = (int)p.channels, steps = (int)p.steps, states = kWhole ? kRow : (int)p.states;
        blocks = (channels + kBlockChannels - 1) / kBlockChannels / (int)p.turns, block = index % blocks;
        tiles = (steps + kTile - 1) / kTile;
        unsigned rest = index / blocks;
        segment = 0, segments = 1, first_tile = 0, last_tile = tiles;
        if constexpr (kPass > 0) {
            segments = (int)p.segments;
            const int taken = segments - kSegmentsLeft, whole = (int)p.segment_tiles;
            segment = rest % taken + kFirstSegment, rest /= taken;
            const int less = kFirstShorter ? whole / kFirstLess : 0;
            first_tile = segment > 0 ? segment * whole - less : 0;
            last_tile = min((segment + 1) * whole - less, tiles);
        }
        if (turn >= 0) route = turn, batch = rest;
        else if (p.order) route = rest / ((int)p.batch / items), batch = rest % ((int)p.batch / items) * items + item;
        else route = rest % (int)p.routes, batch = rest / (int)p.routes * items + item;
        share = p.first_share ? route % (int)p.apart : 0;
        sequence = batch * p.routes + route;
        first = (block * (int)p.turns + group) * kBlockChannels, run = own_run() * kRun;
        valid = kWhole ? kRun : channels - first - run;
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
    // Where the route's share of a result begins.
    template <class T>
    DEVICE T* result(const Params& p, void* all, long long by_batch, long long by_route, long long by_channel) const {
        if (p.first_share && share == 0) return (T*)p.first_share + batch * p.tokens * channels + first;
        return (T*)all + batch * by_batch + (p.first_share ? share - 1 : route) * by_route + first * by_channel;
    }
    // Of a thread's run, where channels are so far apart.
    DEVICE int run_at(long long stride) const { return kVectorX ? run : run * (int)stride; }
    DEVICE int token_at(int step) const { return step < steps ? __ldg(indices + step) : -2; }

    // The bias of a step's channels from `first` on; past the end the state stays as it is.
    static DEVICE const float* bias(const Stage& stage, int first, int token) {
        return token == -2 ? stage.nothing : stage.bias + first;
    }
    // What belongs to the channels; those past the last are all 0.
    DEVICE void prepare(Stage& stage, const Params& p) const {
        if (threadIdx.x == 0) {
            stage.x = (const X_TYPE*)p.x + batch * p.x_b + route * p.x_k + first * p.x_d;
            stage.dt = (const DT_TYPE*)p.dt + batch * p.dt_b + route * p.dt_k + (kRank ? 0 : first * p.dt_d);
            stage.B = (const B_TYPE*)p.B + batch * p.B_b + route * p.B_k;
            stage.C = (const C_TYPE*)p.C + batch * p.C_b + route * p.C_k;
        }
        if (threadIdx.x < kRun || threadIdx.x < 2) stage.nothing[threadIdx.x] = kSoftplus ? -1e30f : 0.f;
        for (int i = threadIdx.x; i < kBlockChannels; i += kThreads) {
            const bool there = first + i < channels;
            const long long at = (long long)route * channels + first + i;
            stage.bias[i] = there && p.dt_bias ? p.dt_bias[at] * kPerUnit : 0.f;
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
            stage.weight_pairs[eight][tile][lane] =
                pair_of(there && rank < kRank ? at[0] : 0.f, there && rank + 1 < kRank ? at[1] : 0.f);
        }
    }
};

// What a thread has asked for of a tile and not yet unpacked.
struct Incoming {
    AskedX x[kRows];
    AskedDt dt[kRank ? 1 : kRows];
    AskedB B[kPartsAhead ? kParts : 1];
    AskedC C[kPartsAhead ? kParts : 1];
    Asked<DT_TYPE, 2, kVectorRank> low[kRankParts];

    DEVICE void fetch_part(const Source& from, const Params& p, const Stage& stage, Places& places, const int* tokens, int k,
                           int slot, unsigned own) {
        const Part part(k, own);
        const int token = part.there ? tokens[part.row] : -1, valid = token >= 0 ? from.states - part.state : 0;
        if constexpr (kHalves) {
            const void* rows = part.of_C ? (const void*)stage.C : stage.B;
            const B_TYPE* at = at_token((const B_TYPE*)rows, token, part.of_C ? p.C_l : p.B_l, part.state);
            B[slot].ask(places.B[slot][threadIdx.x], at, 1, valid);
            return;
        }
        const int in_B = part.state * (kVectorBC ? 1 : (int)p.B_n), in_C = part.state * (kVectorBC ? 1 : (int)p.C_n);
        B[slot].ask(places.B[slot][threadIdx.x], at_token(stage.B, token, p.B_l, in_B), (int)p.B_n, valid);
        C[slot].ask(places.C[slot][threadIdx.x], at_token(stage.C, token, p.C_l, in_C), (int)p.C_n, valid);
    }
    DEVICE void fetch(const Source& from, const Params& p, Stage& stage, Places& places, int tile,
                      unsigned own = thread()) {
        const int* tokens = stage.tokens[(unsigned)tile % kRing];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int token = tokens[own_row(r, own)], valid = token >= 0 ? from.valid : 0;
            x[r].ask(stage.x_places[(unsigned)tile % kRingX][r][threadIdx.x],
                     at_token(stage.x, token, p.x_l, from.run_at(p.x_d)), (int)p.x_d, valid);
            if constexpr (kRank == 0) {
                dt[r].ask(places.dt[r][threadIdx.x], at_token(stage.dt, token, p.dt_l, from.run_at(p.dt_d)),
                          (int)p.dt_d, valid);
            }
        }
#pragma unroll
        for (int k = 0; kPartsAhead && k < kParts; ++k) fetch_part(from, p, stage, places, tokens, k, k, own);
        if constexpr (kTensorRank) {
#pragma unroll
            for (int k = 0; k < kRankParts; ++k) {
                const int i = k * kThreads + thread(), row = i / kRankWords, rank = 2 * (i % kRankWords);
                const int token = row < kTile ? tokens[row] : -1;
                if (row < kTile) {
                    low[k].ask(stage.low[(unsigned)tile % kLowRing][row][i % kRankWords],
                               at_token(stage.dt, token, p.dt_l) + rank * (int)p.dt_d, (int)p.dt_d,
                               token >= 0 ? kRank - rank : 0);
                }
            }
        }
    }
    DEVICE Pack<X_TYPE, kRun> taken_x(const Stage& stage, int tile, int r) const {
        return x[r].take(stage.x_places[(unsigned)tile % kRingX][r][threadIdx.x]);
    }
    // beside(r, i): what goes beside x or takes its place in `through`, where backward keeps dL/dy.
    template <bool kBeside, class Beside>
    DEVICE void unpack(const Source& from, const Params& p, Stage& stage, Places& places, int tile,
                       float2 (*through)[kPitch], Beside beside) {
        wait_for_copies();
        const int* tokens = stage.tokens[(unsigned)tile % kRing];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int row = own_row(r), token = tokens[row];
            float su[2 * kRun], other[2 * kRun];
            const Pack<X_TYPE, kRun> x = taken_x(stage, tile, r);
            if constexpr (kRank == 0) {
                const Pack<DT_TYPE, kRun> dt = this->dt[r].take(places.dt[r][threadIdx.x]);
                float bias[kRun];
                get<kRun>(bias, from.bias(stage, from.run, token));
#pragma unroll
                for (int i = 0; i < kRun; ++i) {
                    const float s = step_size(fmaf(dt.get(i), kPerUnit, bias[i]));
                    su[2 * i] = s, su[2 * i + 1] = s * x.get(i);
                }
                put<2 * kRun>(&stage.su[tile % kBuffers][row][from.run].x, su);
            }
            if constexpr (kRank > 0 || kBeside) {
#pragma unroll
                for (int i = 0; i < kRun; ++i) other[2 * i] = beside(r, i), other[2 * i + 1] = x.get(i);
                put<2 * kRun>(&through[row][from.run].x, other);
            }
        }
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
            const Part part(k);
            const int slot = kPartsAhead ? k : 0;
            if (!kPartsAhead) {
                fetch_part(from, p, stage, places, tokens, k, 0, thread());
                wait_for_copies();
            }
            if (!part.there) continue;
            float values[kRowRun];
            float* row = stage.rows[tile % kBuffers][part.row] + part.state;
            const float unit = kHalves && part.of_C ? 1.f : kUnit;
            const Pack<B_TYPE, kRowRun> b = B[slot].take(places.B[slot][threadIdx.x]);
#pragma unroll
            for (int n = 0; n < kRowRun; ++n) values[n] = b.get(n) * unit;
            put<kRowRun>(kHalves && part.of_C ? row + kRow : row, values);
            if constexpr (!kHalves) {
                const Pack<C_TYPE, kRowRun> c = C[slot].take(places.C[slot][threadIdx.x]);
#pragma unroll
                for (int n = 0; n < kRowRun; ++n) values[n] = c.get(n);
                put<kRowRun>(row + kRow, values);
            }
        }
        if constexpr (kTensorRank) {
#pragma unroll
            for (int k = 0; k < kRankParts; ++k) {
                const int i = k * kThreads + thread();
                unsigned* at = stage.low[(unsigned)tile % kLowRing][i / kRankWords][i % kRankWords];
                if (!low[k].kApart && i < kTile * kRankWords) {
                    const Low pair = low[k].take(at);
                    at[0] = pair.words[0];
                    if (kExact) at[Low::kWords - 1] = pair.words[Low::kWords - 1];
                }
            }
        } else if constexpr (kRank > 0) {
            for (int i = threadIdx.x; i < kTile * kRank; i += kThreads) {
                const int row = i / kRank, rank = i % kRank, token = tokens[row];
                const DT_TYPE* at = at_token(stage.dt, token, p.dt_l) + rank * (int)p.dt_d;
                stage.low_wide[tile % kBuffers][row][rank] = token >= 0 ? widen(*at) * kPerUnit : 0.f;
            }
        }
    }
    static DEVICE float step_size(float v) {
        if constexpr (!kSoftplus) return v;
        else return kExact ? softplus<true>(v) : softplus2(v);
    }
    // Behind the barrier: (s, s x) from a low-rank step size and the x beside.
    DEVICE void multiply_rank(const Source& from, Stage& stage, int tile, float2 (*through)[kPitch]) const {
        const int* tokens = stage.tokens[(unsigned)tile % kRing];
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
        if constexpr (kTensorRank) {
            uint2 a[(kRankTiles + 1) / 2][4] = {};
#pragma unroll
            for (int i = 0; i < (kRankTiles + 1) / 2 * 4; ++i) {
                const int eight = i / 4 * 2 + i % 4 / 2, word = eight * 4 + lane % 4;
                if (eight >= kRankTiles) continue;
                a[i / 4][i % 4] = pair_of(taken<Low>(stage.low[(unsigned)tile % kLowRing][lane / 4 + 8 * (i % 2)][word]));
            }
#pragma unroll
            for (int c = 0; c < kOwnTiles; ++c) {
                float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                for (int i = 0; i < (kRankTiles + 1) / 2; ++i) {
                    const uint2(*weights)[32] = stage.weight_pairs[warp * kOwnTiles + c];
                    uint2 w[2] = {weights[2 * i][lane], {0, 0}};
                    if (2 * i + 1 < kRankTiles) w[1] = weights[2 * i + 1 < kRankTiles ? 2 * i + 1 : 0][lane];
                    multiply_pairs<kExact, true>(d, a[i], w, min(2, kRankTiles - 2 * i));
                }
                const int channel = warp * kWarpChannels + 8 * c + 2 * (lane % 4);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int row = lane / 4 + 8 * half, token = tokens[row];
                    float pair[4], bias[2];
                    get<4>(pair, &through[row][channel].x);
                    get<2>(bias, from.bias(stage, channel, token));
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const float s = step_size(fmaf(d[2 * half + i], kPerUnit, bias[i]));
                        pair[2 * i] = s, pair[2 * i + 1] *= s;
                    }
                    put<4>(&stage.su[tile % kBuffers][row][channel].x, pair);
                }
            }
            __syncwarp();
        } else if constexpr (kRank > 0) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int row = own_row(r), token = tokens[row];
                float s[kRun], su[2 * kRun], pairs[2 * kRun];
                get<kRun>(s, from.bias(stage, from.run, token));
                get<2 * kRun>(pairs, &through[row][from.run].x);
#pragma unroll 4
                for (int c = 0; c < kRank; ++c) {
                    float weight[kRun];
                    get<kRun>(weight, stage.weight[c] + from.run);
#pragma unroll
                    for (int i = 0; i < kRun; ++i) s[i] = fmaf(weight[i], stage.low_wide[tile % kBuffers][row][c], s[i]);
                }
#pragma unroll
                for (int i = 0; i < kRun; ++i) {
                    su[2 * i] = step_size(s[i]);
                    su[2 * i + 1] = su[2 * i] * pairs[2 * i + 1];
                }
                put<2 * kRun>(&stage.su[tile % kBuffers][row][from.run].x, su);
            }
            __syncthreads();
        }
    }
};
