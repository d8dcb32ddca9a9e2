// wide_forward.cuh: h_t = exp(s_t A) h_{t-1} + s_t B_t x_t, y_t = <C_t, h_t> + D x_t, for several states a channel.
//
// Grid: a block = one (b, k) and kBlockChannels channels, a warp = kWarpChannels of them, walking the route's steps in
// tiles (see wide_stage.cuh). Lane (group, q), q in the low bits, holds states q kStates.. of kSlots channels in registers,
// float32. The scan proper touches shared memory and registers alone, whatever the formats and strides.
// <C_t, h_t>: slot j of lane q is channel j ^ q of its group, so that a lane gets the sum of its own channel's y by
// kSlots - 1 exchanges and no selection.
// One barrier a tile: while a tile is scanned, threads write the results of the one before, unpack the next and fetch the
// one after it. Registers are what is scarce (the compiler keeps pointers in slow local memory otherwise), so the rows of
// x that are wanted again for D x, and whatever belongs to the block, wait in shared memory. Where sequences are many,
// wide_flow.cuh takes them.
// kMerge: a block takes the routes one after the other and adds them up in y, which it alone writes.
#pragma once
// Of long segments the first kernel does the first one whole, the second the others; no one waits for the last one's end.
constexpr int kFirstSegment = LONG && PASS == 2, kSegmentsLeft = LONG || PASS == 1;
constexpr bool kFirstShorter = LONG;
constexpr int kBuffers = 2;       // tiles in shared memory
constexpr bool kThrift = false;  // with registers
#include "wide_stage.cuh"

constexpr bool kMerge = MERGE;
constexpr int kHalf = kTile / 2;
static_assert(!kCopies);

constexpr int kYPitch = kBlockChannels + 4;

struct alignas(16) BlockMemory {
    Stage stage;
    Places places;
    float y[2][kTile][kYPitch];
    Y_TYPE* out;
};
extern "C" __device__ int launch_shape[2] = {kThreads, (int)sizeof(BlockMemory)};

// A route, or a segment of it. kEnd: its end is wanted. kResults: so is y.
template <bool kEnd, bool kResults>
DEVICE void scan_route(const Params& p, BlockMemory& block, const Source& from, int turn) {
    Stage& stage = block.stage;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const bool adding = turn > 0;
    const int channels = from.channels, steps = from.steps, states = from.states, run = from.run;
    if (threadIdx.x == 0) block.out = from.result<Y_TYPE>(p, p.y, p.y_b, p.y_k, p.y_d);
    float span[kSlots] = {};
    from.prepare(stage, p);

    Incoming in;
    auto unpack = [&](int tile) {
        in.unpack<false>(from, p, stage, block.places, tile, stage.su[tile % kBuffers], [](int, int) { return 0.f; });
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            unsigned* place = stage.x_places[tile % kRingX][r][threadIdx.x];
            const Pack<X_TYPE, kRun> x = in.x[r].take(place);
#pragma unroll
            for (int i = 0; i < AskedX::kWords; ++i) place[i] = x.words[i];
        }
    };
    Pack<Y_TYPE, kRun> so_far[kMerge ? kRows : 1];
    // y of the tile before, of a thread's run.
    auto finish = [&](int tile) {
        const int* tokens = stage.tokens[tile % kRing];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int row = own_row(r), token = tokens[row];
            Y_TYPE* to = at_token(block.out, token, p.y_l, from.run_at(p.y_d));
            float out[kRun], skip[kRun];
            Pack<Y_TYPE, kRun> packed;
            get<kRun>(out, block.y[tile & 1][row] + run);
            get<kRun>(skip, stage.D + run);
            Pack<X_TYPE, kRun> x;
#pragma unroll
            for (int i = 0; i < AskedX::kWords; ++i) x.words[i] = stage.x_places[tile % kRingX][r][threadIdx.x][i];
#pragma unroll
            for (int i = 0; i < kRun; ++i) out[i] = fmaf(skip[i], x.get(i), out[i]);
            if (adding) {
#pragma unroll
                for (int i = 0; i < kRun; ++i) out[i] += so_far[kMerge ? r : 0].get(i);
            }
            if (token >= 0) {
                packed.set(out);
                store_run<kVectorX>(packed, to, (int)p.y_d, from.valid);
            }
        }
    };
    for (int i = threadIdx.x; i < 3 * kTile; i += kThreads) {
        const int tile = from.first_tile + i / kTile;
        stage.tokens[tile % kRing][i % kTile] = from.token_at(tile * kTile + i % kTile);
    }
    __syncthreads();
    in.fetch(from, p, stage, block.places, from.first_tile);
    const int q = lane % kLanes, group = lane / kLanes;
    int places[kSlots];  // of the slots' channels in the block
    float A[kSlots][kStates], h[kSlots][kStates];
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
        places[j] = warp * kWarpChannels + ((j ^ q) & (kSlots - 1)) * kGroups + group;
        const int channel = from.first + places[j];
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
            const int state = q * kStates + n;
            const bool there = channel < channels && state < states;
            const long long at = (long long)channel * states + state;
            A[j][n] = there ? p.A[(long long)from.route * channels * states + at] * kDecay : 0.f;
            const bool given = there && p.initial_state && from.segment == 0;
            h[j][n] = given ? p.initial_state[from.sequence * channels * states + at] : 0.f;
        }
        if constexpr (kPass == 2) from.join(p, h[j], A[j], places[j], q * kStates, 0, from.segment, 1);
    }
    unpack(from.first_tile);
    if (from.first_tile + 1 < from.last_tile) in.fetch(from, p, stage, block.places, from.first_tile + 1);
    for (int tile = from.first_tile; tile < from.last_tile; ++tile) {
        const bool more = tile + 1 < from.last_tile;
        __syncthreads();
        in.multiply_rank(from, stage, tile, stage.su[tile % kBuffers]);
        if (kResults && p.saved && tile > 0 && tile % kEvery == 0) {
            const long long row = from.sequence * ((from.tiles - 1) / kEvery) + tile / kEvery - 1;
            float* at = p.saved + row * channels * kRow + q * kStates;
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
                const int channel = from.first + places[j];
                if (channel < channels) put_whole<kStates>(at + (long long)channel * kRow, h[j]);
            }
        }
        if (kResults && tile > from.first_tile) finish(tile - 1);
        int ahead = 0;
        if (threadIdx.x < kTile) ahead = from.token_at((tile + 3) * kTile + threadIdx.x);
        if (more) unpack(tile + 1);
        if (tile + 2 < from.last_tile) in.fetch(from, p, stage, block.places, tile + 2);
        if (adding) {
            const int* tokens = stage.tokens[tile % kRing];
#pragma unroll
            for (int r = 0; r < (kMerge ? kRows : 1); ++r) {
                const int token = tokens[own_row(r)];
                const Y_TYPE* at = at_token(block.out, token, p.y_l, from.run_at(p.y_d));
                load<kVectorX, true>(so_far[r], at, (int)p.y_d, token >= 0 ? from.valid : 0);
            }
        }
        const float2(*su_rows)[kPitch] = stage.su[tile % kBuffers];
        const float(*rows)[2 * kRow] = stage.rows[tile % kBuffers];

#pragma unroll 1
        for (int start = 0; start < kTile && tile * kTile + start < steps; start += kHalf) {
            // Results wait in registers: a store between the steps would hold back the next step's loads.
            float results[kHalf];
#pragma unroll
            for (int t = 0; t < kHalf; ++t) {
                float b[kStates];
                get<kStates>(b, rows[start + t] + q * kStates);
#pragma unroll
                for (int j = 0; j < kSlots; ++j) {
                    const float2 su = su_rows[start + t][places[j]];
#pragma unroll
                    for (int n = 0; n < kStates; ++n) h[j][n] = fmaf(decay(su.x, A[j][n]), h[j][n], su.y * b[n]);
                    if (kEnd) span[j] += su.x;
                }
                if (!kResults) continue;
                float c[kStates], sum[kSlots];
                get<kStates>(c, rows[start + t] + kRow + q * kStates);
#pragma unroll
                for (int j = 0; j < kSlots; ++j) {
                    sum[j] = 0.f;
#pragma unroll
                    for (int n = 0; n < kStates; ++n) sum[j] = fmaf(c[n], h[j][n], sum[j]);
                }
#pragma unroll
                for (int j = 1; j < kSlots; ++j) sum[0] += __shfl_xor_sync(kAll, sum[j], j);
#pragma unroll
                for (int offset = kSlots; offset < kLanes; offset *= 2) {
                    sum[0] += __shfl_xor_sync(kAll, sum[0], offset);
                }
                results[t] = sum[0];
            }
            if (!kResults) continue;
            if (kSlots == kLanes || q < kSlots) {
#pragma unroll
                for (int t = 0; t < kHalf; ++t) block.y[tile & 1][start + t][places[0]] = results[t];
            }
        }
        if (threadIdx.x < kTile) stage.tokens[(tile + 3) % kRing][threadIdx.x] = ahead;
    }
    if constexpr (kResults) {
        __syncthreads();
        finish(from.last_tile - 1);
    }

    if constexpr (kEnd) {
#pragma unroll
        for (int j = 0; j < kSlots; ++j) {
            if (from.first + places[j] < channels) {
                put<kStates>(from.edge(p, from.segment, places[j]) + q * kStates, h[j]);
                if (q == 0) *from.span(p, from.segment, places[j]) = span[j];
            }
        }
    } else if (p.last_state && from.last_tile == from.tiles) {
#pragma unroll
        for (int j = 0; j < kSlots; ++j) {
            const int channel = from.first + places[j];
#pragma unroll
            for (int n = 0; n < kStates; ++n) {
                const int state = q * kStates + n;
                if (channel < channels && state < states) {
                    p.last_state[(from.sequence * channels + channel) * states + state] = h[j][n];
                }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) wide_forward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    BlockMemory& block = *reinterpret_cast<BlockMemory*>(shared);
    if constexpr (kMerge) {
        for (int route = 0; route < (int)p.routes; ++route) {
            if (route > 0) __syncthreads();
            scan_route<false, true>(p, block, Source(p, route, 0, blockIdx.x), route);
        }
    } else {
        const Source from(p, -1, 0, blockIdx.x);
        if constexpr (kPass != 1) scan_route<false, true>(p, block, from, -1);
        else if (kLong && from.segment == 0) scan_route<true, kLong>(p, block, from, -1);
        else scan_route<true, false>(p, block, from, -1);
    }
}
