// wide_backward.cuh: gradients of the scan of wide_forward.cuh. With g_t = dL/dh_t, steps taken backwards:
//     g_t = C_t dy_t + exp(s_{t+1} A) g_{t+1}      dC_t = sum_d dy_t h_t         dB_t = sum_d g_t s_t x_t
//     dx_t = s_t <g_t, B_t> + D dy_t               ds_t = x_t <g_t, B_t> + <g_t exp(s_t A) h_{t-1}, A>
//     dA = sum_t g_t exp(s_t A) h_{t-1} s_t, where g_t exp(s_t A) is what goes on to the step before.
//
// Grid: a block = one (b, k) and kBlockChannels channels, a warp = kWarpChannels of them. Lane (q, group), q in the high
// bits, holds states q kStates.. of kSlots channels; its slot j is channel ((j ^ q) % kSlots) kGroups + group of the
// warp, so that sums over q leave a lane its own channel by exchanges without selection.
// Steps go by in tiles of kTile, from the last. Forward saved the state before every kEvery-th tile but the first; where a
// tile's is not among them, the block goes through the one before it once more. A warp runs through a tile once and keeps
// every state, those of the first kHeld steps in shared memory, those of the last kSub in registers: so each state is
// computed once. Decays are computed again on the way back: registers that kept them would cost more, in warps that do
// not fit, than the exponentials do.
// Before and after the scan of a tile a thread has one run of channels of one row, so that a warp touches few rows of
// device memory at a time; the next tile is on its way while this one's results are worked out. What limits the kernel
// are words that lanes read from shared memory, broadcast or not: so values stay narrow there, and are read once.
// dB, dC: summed over a lane's channels, over the lanes by the tensor cores (or by exchanges where lanes that share
// states are fewer than four), over the warps through shared memory, over the blocks by the host's sum of partial
// results: all in fixed order. A block takes groups of channels in turn (p.turns), adding to what it has written of both,
// and for each of them several items of the batch (p.items), whose share of the sums over the batch it keeps meanwhile.
// kAdd: routes are added up in dx, of which there are p.apart shares; a block waits until the one that took the same
// channels p.apart routes before is done. It has begun, since blocks are numbered as they begin, route by route.
#pragma once
// Before the first segment there is no one to want the gradient of the state that it begins with.
constexpr int kFirstSegment = PASS == 1, kSegmentsLeft = PASS == 1;
constexpr bool kFirstShorter = false;
constexpr int kBuffers = 1;       // tiles in shared memory
constexpr bool kThrift = true;    // with registers
#include "wide_sums.cuh"

constexpr bool kAdd = ADD;  // shares of a sum over routes are fewer than routes: a block adds to what another has left
constexpr int kSub = SUB;
constexpr int kHeld = kTile - kSub;
// Spans of the first kHeld steps that stand in the program side by side: where it is long, instructions come late.
// Where a loop spills registers there is none.
constexpr int kSpans = kRank == 0 ? 1 : kExact || __CUDA_ARCH__ < 900 ? 4 : 2;
constexpr bool kDirect = kWarps == 1;  // a warp's sums are the block's
constexpr int kFlush = 64;             // tiles after which partial sums of dA leave the registers
// Where there is room for them in shared memory a thread keeps its shares of dD and ddt_bias for all channels of its run,
// else they are added over lanes after every tile.
constexpr bool kColumnsApart = kRank == 0 && !kExact && kRun * sizeof(X_TYPE) <= 16;
constexpr int kColumnLow = kColumnsApart ? 2 * kRowHigh : kRowLow;
constexpr int kColumns = owned_count<2 * kRun, kRowHigh, kColumnLow>(), kColumnRun = kColumns < 4 ? kColumns : 4;

static_assert(kSub >= 2 && kSub % kSpan == 0 && kHeld % kSpan == 0);
static_assert(kLowRing > 1 || !kTensorRank || !kCopies);  // a tile's columns wait in registers until its place is free

constexpr int kSumShare = kTile * 2 * kRow / kThreads;  // of a tile's sums of dB and dC
constexpr int kSumRun = kSumShare < 1 ? 1 : kSumShare < 4 ? kSumShare : kRow < 4 ? kRow : 4;
constexpr int kSumParts = kSumShare < 1 ? 1 : kSumShare / kSumRun;

using AskedDy = Asked<Y_TYPE, kRun, kVectorX>;

// Whether the state before a tile waits in shared memory, where it is copied to on its way, or else in registers.
constexpr bool kBegin = kCopies;

// The channel of slot j of a thread, in the block.
DEVICE int place_of(unsigned thread, int j) {
    const int group = thread % kGroups, q = thread % 32 / kGroups;
    return thread / 32 * kWarpChannels + ((j ^ q) & (kSlots - 1)) * kGroups + group;
}

// Where what is asked for of a tile comes to. It has a name, since NVRTC 12 does not find its members otherwise.
struct Rows {
    Places places;
    alignas(16) unsigned dy[kRows][AskedDy::kApart ? kThreads : 1][AskedDy::kWords];
};

struct alignas(16) BlockMemory {
    const Y_TYPE* of_dy;  // of the block's channels, as what stage has
    DX_TYPE* dx;
    DDT_TYPE* ddt;
    SUM_TYPE *dB, *dC;
    // What is needed seldom, of the group of channels at hand: here, since registers are scarce, and one that is spilled
    // comes back from L2, as shared memory leaves the L1 cache next to nothing.
    const float* saved;  // states before tiles
    const float* initial;  // the first one, or null
    const int* indices;
    float* dA;
    int first, last_tile, sums_stride;
    bool adds;  // to what another block has left of dx
    unsigned index;
    int turn, item;
    float* middle;
    long long sequence, share, dx_by_item;
    Stage stage;               // su: s, s x -> <g, B>; in between, pairs of ddt, of two channels in the first's place
    float2 dz[kTile][kPitch];  // dy, x or none -> <g h A>
    alignas(16) float columns[kColumns / kColumnRun][kThreads][kColumnRun];  // a thread's shares of dD and ddt_bias
    float sums[kDirect ? 1 : kWarps][kDirect ? 1 : kTile][2 * kRow];  // dB, then dC
    union {
        Rows rows;  // between the scans of two tiles
        float held[kWarps][kHeld][kSlots][32][kStates];  // the states behind the first steps
    };
    alignas(16) float begin[kBegin ? kWarps : 1][kSlots][kBegin ? 32 : 1][kStates];  // the state before them
    float4 dweight[kTensorRank ? kWarps : 1][kTensorRank ? (kOwnTiles + 1) / 2 : 1][kTensorRank ? kRankTiles : 1][32];
};
extern "C" __device__ int launch_shape[2] = {kThreads, (int)sizeof(BlockMemory)};

// The next item of the batch.
DEVICE void advance(const Params& p, BlockMemory& block, const Source& from) {
    const long long states = from.states, rows = p.tokens * block.sums_stride;
    block.stage.x += p.x_b, block.stage.dt += p.dt_b, block.stage.B += p.B_b, block.stage.C += p.C_b;
    block.of_dy += p.dy_b;
    block.dx += block.dx_by_item;
    if (kTensorRank) block.ddt = (DDT_TYPE*)((float*)block.ddt + rows * kRank);
    else block.ddt += p.ddt_b;
    block.dB += rows * states, block.dC += rows * states;
    block.saved += p.routes * ((from.tiles - 1) / kEvery) * p.channels * kRow;
    if (block.initial) block.initial += p.routes * p.channels * states;
    block.middle += p.routes * p.channels * kRow;
    block.sequence += p.routes, ++block.item;
}

// Of one of the block's groups of channels, for one item of the batch after the other; the sums over channels of the
// groups before it are added to.
DEVICE void scan_back(const Params& p, BlockMemory& block) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;

    const Source from(p, -1, block.turn, block.index, 0, (int)p.items);
    const int channels = from.channels, steps = from.steps, states = from.states, run = from.run;
    const int route = from.route, blocks = from.blocks, first = from.first;
    const long long batch = from.batch, sequence = from.sequence;
    const int q = lane / kGroups, group = lane % kGroups;
    const long long first_sum = (batch * p.tokens * p.routes + route) * blocks + from.block;
    // Of sums over segments and batch.
    const long long share = ((int)batch / (int)p.items * from.segments + from.segment) * p.routes + route;
    if (threadIdx.x == 0) {
        block.saved = p.saved + ((sequence * ((from.tiles - 1) / kEvery) - 1) * channels + first) * kRow;
        block.initial = p.initial_state ? p.initial_state + (sequence * channels + first) * states : nullptr;
        block.indices = from.indices, block.last_tile = from.last_tile, block.first = first;
        block.adds = kAdd && route >= (int)p.apart;
        block.dA = p.dA + (share * channels + first) * states, block.sums_stride = (int)p.routes * blocks;
        block.of_dy = (const Y_TYPE*)p.dy + batch * p.dy_b + route * p.dy_k + first * p.dy_d;
        block.dx = from.result<DX_TYPE>(p, p.dx, p.dx_b, p.dx_k, p.dx_d);
        block.ddt = (DDT_TYPE*)p.ddt + batch * p.ddt_b + route * p.ddt_k + first * p.ddt_d;
        block.dB = (SUM_TYPE*)p.dB + first_sum * states, block.dC = (SUM_TYPE*)p.dC + first_sum * states;
        if (kTensorRank) block.ddt = (DDT_TYPE*)((float*)p.ddt + first_sum * kRank);
        block.middle = p.middle + (sequence * from.segments + from.segment) * channels * kRow;
        block.item = 0, block.sequence = sequence, block.share = share;
        block.dx_by_item = p.first_share && from.share == 0 ? p.tokens * p.channels : p.dx_b;
    }
    from.prepare(block.stage, p);

    int places[kSlots];  // of the slots' channels in the block
    float A[kSlots][kStates], dA[kSlots][kStates], carried[kSlots][kStates];
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
        places[j] = place_of(threadIdx.x, j);
        const int channel = first + places[j];
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
            const int state = q * kStates + n;
            const bool there = channel < channels && state < states;
            const long long at = (long long)channel * states + state;
            A[j][n] = there ? p.A[(long long)route * channels * states + at] * kDecay : 0.f;
            dA[j][n] = 0.f;
        }
    }
    float span[kSlots] = {};
    for (int i = threadIdx.x; kTensorRank && i < (int)(sizeof(block.dweight) / sizeof(float4)); i += kThreads) {
        block.dweight[0][0][0][i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) block.columns[i / kColumnRun][threadIdx.x][i % kColumnRun] = 0.f;

    const int tiles = from.tiles;
    auto copy = [](float (*to)[kStates], const float (*from)[kStates]) {
#pragma unroll
        for (int i = 0; i < kSlots * kStates; ++i) to[i / kStates][i % kStates] = from[i / kStates][i % kStates];
    };
    auto held_at = [&](int t, int j) -> float* {
        if (kBegin && t < 0) return block.begin[kBegin ? warp : 0][j][kBegin ? lane : 0];
        return block.held[warp][t][j][lane];
    };
    auto recall = [&](float (*to)[kStates], int t) {  // the state after step t
#pragma unroll
        for (int j = 0; j < kSlots; ++j) get<kStates>(to[j], held_at(t, j));
    };
    auto saved = [&](float (*h)[kStates], int tile) {  // the state before a tile, or before the one that precedes it
        const unsigned own = thread(), q = own % 32 / kGroups, row = (unsigned)tile / kEvery;
        auto place = [&](int j) { return kWhole ? place_of(own, j) : min(place_of(own, j), channels - 1 - block.first); };
        auto begin = [&](int j) { return block.begin[kBegin ? own / 32 : 0][j][kBegin ? own % 32 : 0]; };
        if (row > 0) {
            unsigned long long skipped;
            asm("mul.wide.u32 %0, %1, %2;" : "=l"(skipped) : "r"(row), "r"(channels * kRow * (int)sizeof(float)));
            const float* first = (const float*)((const char*)block.saved + skipped);
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
                const float* at = first + (place(j) * kRow + (int)q * kStates);
                if (kBegin) copy_async<4 * kStates>(begin(j), at, true);
                else get<kStates>(h[j], at);
            }
        } else {
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
#pragma unroll
                for (int n = 0; n < kStates; ++n) {
                    const int state = q * kStates + n;
                    h[j][n] = block.initial && state < states ? block.initial[place(j) * states + state] : 0.f;
                }
                if (kBegin) put<kStates>(begin(j), h[j]);
            }
        }
    };

    Incoming in;
    AskedDy dy_in[kRows];
    float h[kSlots][kStates];  // between two tiles the state before the next one
    auto fetch = [&](int tile, unsigned own) {
        const int* tokens = block.stage.tokens[(unsigned)tile % kRing];
        in.fetch(from, p, block.stage, block.rows.places, tile, own);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int token = tokens[own_row(r, own)];
            const Y_TYPE* at = at_token(block.of_dy, token, p.dy_l, from.run_at(p.dy_d));
            unsigned* place = block.rows.dy[r][AskedDy::kApart ? threadIdx.x : 0];
            dy_in[r].ask(place, at, (int)p.dy_d, token >= 0 && p.dy ? from.valid : 0);
        }
    };
    auto unpack = [&](int tile) {
        Pack<Y_TYPE, kRun> dy[kRows];
        wait_for_copies();
#pragma unroll
        for (int r = 0; r < kRows; ++r) dy[r] = dy_in[r].take(block.rows.dy[r][AskedDy::kApart ? threadIdx.x : 0]);
        in.unpack<true>(from, p, block.stage, block.rows.places, tile, block.dz, [&](int r, int i) { return dy[r].get(i); });
    };

    auto steps_of = [&](float2* su, int t) {  // s, s x of the slots
#pragma unroll
        for (int j = 0; j < kSlots; ++j) su[j] = block.stage.su[0][t][places[j]];
    };
    auto forwards = [&](int t) {
        float b[kStates];
        float2 su[kSlots];
        steps_of(su, t);
        get<kStates>(b, block.stage.rows[0][t] + q * kStates);
#pragma unroll
        for (int j = 0; j < kSlots; ++j) {
#pragma unroll
            for (int n = 0; n < kStates; ++n) h[j][n] = fmaf(decay(su[j].x, A[j][n]), h[j][n], su[j].y * b[n]);
        }
    };
    // The state between two that are saved. Forward's steps once more.
    const bool halved = kEvery > 1 && kPass != 1;
    auto middle_of = [&](int j) {
        return block.middle + (long long)min(first + places[j], channels - 1) * kRow + q * kStates;
    };
    auto ask = [&](int tile, unsigned own) {
        if (halved && tile % kEvery) in.fetch(from, p, block.stage, block.rows.places, tile - 1, own);
        else fetch(tile, own);
    };
    auto stage = [&](int tile) {
        const bool twice = halved && tile % kEvery;
        // Every warp has multiplied with what is in the tile's place.
        if (kTensorRank && (twice || kLowRing == 1)) __syncthreads();
        if (twice) {
            in.unpack<false>(from, p, block.stage, block.rows.places, tile - 1, block.dz, [](int, int) { return 0.f; });
            __syncthreads();
            in.multiply_rank(from, block.stage, tile - 1, block.dz);
            fetch(tile, thread());
            if (kBegin) recall(h, -1);
#pragma unroll 4
            for (int t = 0; t < kTile; ++t) forwards(t);
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
                if (kBegin) put<kStates>(held_at(-1, j), h[j]);
                else if (first + places[j] < channels) put<kStates>(middle_of(j), h[j]);
            }
            __syncthreads();
        }
        unpack(tile);
    };
    auto token_of = [&](int tile) {  // of a tile and, where states are saved for every other one, the one before
        const int of = tile - threadIdx.x / kTile;
        const int step = of * kTile + threadIdx.x % kTile;
        return of >= 0 && step < steps ? __ldg(block.indices + step) : -2;
    };
    auto keep_token = [&](int tile, int token) {
        const int of = tile - threadIdx.x / kTile;
        if (of >= 0) block.stage.tokens[(unsigned)of % kRing][threadIdx.x % kTile] = token;
    };

    // The first of two kernels has registers enough to read a tile while it scans another.
    constexpr int kTokensAhead = kPass == 1 ? 2 : 1;
#pragma unroll 1
    for (bool again = false;; again = true) {
        if (again && threadIdx.x == 0) advance(p, block, from);
        __syncthreads();
#pragma unroll
        for (int j = 0; j < kSlots; ++j) {
#pragma unroll
            for (int n = 0; n < kStates; ++n) {
                const int state = q * kStates + n;
                const bool there = first + places[j] < channels && state < states;
                const bool given = p.dlast_state && there && from.last_tile == from.tiles;
                const long long of = block.sequence * channels + first + places[j];
                carried[j][n] = given ? p.dlast_state[of * states + state] : 0.f;
            }
            if constexpr (kPass == 2) {
                from.join(p, carried[j], A[j], places[j], q * kStates, from.segments - 1, from.segment, -1);
            }
        }
        for (int i = kTokensAhead; i > 0; --i) {
            if (threadIdx.x < kEvery * kTile) keep_token(from.last_tile - i, token_of(from.last_tile - i));
        }
        __syncthreads();
        ask(from.last_tile - 1, thread());
        if (kPass != 1) saved(h, from.last_tile - 1);
        stage(from.last_tile - 1);
        // Used here, so that the loop's first use waits for nothing that the loop has asked for.
#pragma unroll
        for (int i = 0; i < kSlots * kStates; ++i) A[i / kStates][i % kStates] += 0.f;
        for (int tile = from.last_tile - 1; tile >= from.first_tile; --tile) {
            const int start = tile * kTile;
            const int* tokens = block.stage.tokens[(unsigned)tile % kRing];
            const bool more = tile > from.first_tile;
            int ahead = 0;
            if (threadIdx.x < kEvery * kTile && more) ahead = token_of(tile - kTokensAhead);
            __syncthreads();
            in.multiply_rank(from, block.stage, tile, block.dz);
            if constexpr (kPass == 1) {
                if (more) fetch(tile - 1, thread());
                // The gradient of the state alone.
#pragma unroll 4
                for (int t = kTile - 1; t >= 0; --t) {
                    float c[kStates];
                    get<kStates>(c, block.stage.rows[0][t] + kRow + q * kStates);
#pragma unroll
                    for (int j = 0; j < kSlots; ++j) {
                        const float s = block.stage.su[0][t][places[j]].x, out = block.dz[t][places[j]].x;
#pragma unroll
                        for (int n = 0; n < kStates; ++n) {
                            carried[j][n] = fmaf(c[n], out, carried[j][n]) * decay(s, A[j][n]);
                        }
                        span[j] += s;
                    }
                }
                __syncthreads();
                if (threadIdx.x < kEvery * kTile && more) keep_token(tile - kTokensAhead, ahead);
                if (more) unpack(tile - 1);
                continue;
            }

            const bool whole = start + kHeld < steps;  // not only padding behind the first steps
            float sums_over_groups[kTensor ? 4 : kSums];
            auto row_at = [&](int t) {
                // The sums of a lone warp take the place of B and C, which nothing reads again.
                return kDirect ? block.stage.rows[0][t] : block.sums[kDirect ? 0 : warp][kDirect ? 0 : t];
            };
            // A step's <g, B> and <g h A> are left when the next one's numbers are read, which would wait for them.
            constexpr int kOwned = owned_count<2, 16, kGroups * kSlots>();
            float pending[kOwned];
            auto leave = [&](int t, int span) {
                __syncwarp();  // every lane has read this row
                if (span == 0) leave_groups(sums_over_groups, t, lane, row_at);
                if (owns_first<2, 16, kGroups * kSlots>(lane)) {
                    const int owned = owned_from<2, 16, kGroups * kSlots>(lane);
#pragma unroll
                    for (int i = 0; i < kOwned; ++i) {
                        (owned + i ? block.dz : block.stage.su[0])[t][places[0]].y = pending[i];
                    }
                }
            };
            auto backwards = [&](int t, int span, const float (*before)[kStates], const float (*after)[kStates],
                                 bool first = false) {
                float b[kStates], c[kStates], g[kSlots][kStates], u[kSlots], out[kSlots];
                float inner[2][kSlots];  // <g, B> and <g h A> of the slots
                float2 su[kSlots];
                steps_of(su, t);
                get<kStates>(b, block.stage.rows[0][t] + q * kStates);
                get<kStates>(c, block.stage.rows[0][t] + kRow + q * kStates);
#pragma unroll
                for (int j = 0; j < kSlots; ++j) u[j] = su[j].y, out[j] = block.dz[t][places[j]].x;
                if (!first) leave(t + 1, (span + 1) % kSpan);
#pragma unroll
                for (int j = 0; j < kSlots; ++j) {
#pragma unroll
                    for (int n = 0; n < kStates; ++n) {
                        g[j][n] = fmaf(c[n], out[j], carried[j][n]);
                        carried[j][n] = g[j][n] * decay(su[j].x, A[j][n]);
                        const float product = carried[j][n] * before[j][n];
                        inner[0][j] = n ? fmaf(g[j][n], b[n], inner[0][j]) : g[j][n] * b[n];
                        inner[1][j] = n ? fmaf(product, A[j][n], inner[1][j]) : product * A[j][n];
                        dA[j][n] = fmaf(product, su[j].x, dA[j][n]);
                    }
                }
                float sums[kSums], own[2];
#pragma unroll
                for (int j = 0; j < kSlots; ++j) {
#pragma unroll
                    for (int n = 0; n < kStates; ++n) {
                        sums[n] = j ? fmaf(g[j][n], u[j], sums[n]) : g[j][n] * u[j];
                        sums[kStates + n] = j ? fmaf(out[j], after[j][n], sums[kStates + n]) : out[j] * after[j][n];
                    }
                }
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    own[i] = inner[i][0];
#pragma unroll
                    for (int j = 1; j < kSlots; ++j) own[i] += __shfl_xor_sync(kAll, inner[i][j], j * kGroups);
                }
                reduce_scatter<2, 16, kGroups * kSlots>(own, lane);
                sum_groups(sums_over_groups, sums, span, lane);
#pragma unroll
                for (int i = 0; i < kOwned; ++i) pending[i] = own[i];
            };

            auto hold = [&](int t) {
#pragma unroll
                for (int j = 0; j < kSlots; ++j) put<kStates>(held_at(t, j), h[j]);
            };
            if (kBegin) recall(h, -1);
#pragma unroll 4
            for (int t = 0; t < kHeld; ++t) {
                forwards(t);
                hold(t);
            }
            if (whole) {
                float history[kSub][kSlots][kStates], before[kSlots][kStates];  // states after the last steps, and before
#pragma unroll
                for (int t = 0; t < kSub; ++t) {
                    forwards(kHeld + t);
                    copy(history[t], h);
                }
#pragma unroll
                for (int t = kSub - 1; t > 0; --t) {
                    backwards(kHeld + t, t % kSpan, history[t - 1], history[t], t == kSub - 1);
                }
                recall(before, kHeld - 1);
                backwards(kHeld, 0, before, history[0]);
            } else {  // nothing is left of steps past the end
#pragma unroll
                for (int i = 0; i < kOwned; ++i) pending[i] = 0.f;
#pragma unroll
                for (float& sum : sums_over_groups) sum = 0.f;
            }
            // What another block has left of dx comes while the rest is scanned.
            Pack<DX_TYPE, kRun> so_far[kRows];
#pragma unroll
            for (int r = 0; r < (kAdd ? kRows : 0); ++r) {
                const int token = block.adds ? tokens[own_row(r)] : -1;
                load<kVectorX, true>(so_far[r], at_token(block.dx, token, p.dx_l, from.run_at(p.dx_d)), (int)p.dx_d,
                                     token >= 0 ? from.valid : 0);
            }
            float begin[kSlots][kStates];
            if (!kBegin && kEvery > 1 && tile % kEvery) {
#pragma unroll
                for (int j = 0; j < kSlots; ++j) {
                    get<kStates>(begin[j], middle_of(j));
                }
            } else if (!kBegin) {
                saved(begin, tile);
            }
            recall(h, kHeld - 1);
#pragma unroll kSpans
            for (int last = kHeld - kSpan; last >= 0; last -= kSpan) {
#pragma unroll
                for (int span = kSpan - 1; span >= 0; --span) {
                    float before[kSlots][kStates];
                    if (kBegin || last + span > 0) recall(before, last + span - 1);
                    else copy(before, begin);
                    backwards(last + span, span, before, h);
                    copy(h, before);
                }
            }
            leave(0, 0);
            if (threadIdx.x < kEvery * kTile) keep_token(tile - 1, ahead);
            __syncthreads();
            const unsigned own = thread();
            Pack<X_TYPE, kRun> x_now[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) x_now[r] = in.taken_x(block.stage, tile, r);
            if (more) ask(tile - 1, own);
            if (more) saved(h, tile - 1);

            // dx and ddt of a thread's run, and its shares of dD and ddt_bias.
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int row = own_row(r, own), token = tokens[row];
                float dx_out[kRun], ddt_out[kRun], skip[kRun], su[2 * kRun], dz[2 * kRun];
                float columns[kColumns], shares[2 * kRun];
                get<kRun>(skip, block.stage.D + run);
#pragma unroll
                for (int i = 0; i < kColumns; i += kColumnRun) {
                    get<kColumnRun>(columns + i, block.columns[i / kColumnRun][threadIdx.x]);
                }
                get<2 * kRun>(su, &block.stage.su[0][row][run].x);
                get<2 * kRun>(dz, &block.dz[row][run].x);
#pragma unroll
                for (int i = 0; i < kRun; ++i) {
                    const float s = su[2 * i], gB = su[2 * i + 1], out = dz[2 * i], u = x_now[r].get(i);
                    dx_out[i] = fmaf(skip[i], out, s * gB);
                    if (kAdd) dx_out[i] += so_far[r].get(i);
                    const float through_decay = dz[2 * i + 1];
                    ddt_out[i] = kExact ? fmaf(u, gB, through_decay * kLn2) : fmaf(u, gB * kLog2e, through_decay);
                    // Past the end s is 0, and so is the slope.
                    if (kSoftplus) ddt_out[i] *= kExact ? softplus_slope(s) : softplus2_slope(s);
                    else if (token == -2) ddt_out[i] = 0.f;
                    shares[i] = out * u, shares[kRun + i] = ddt_out[i];
                    if constexpr (kColumnsApart) columns[i] = fmaf(out, u, columns[i]), columns[kRun + i] += ddt_out[i];
                }
                if constexpr (!kColumnsApart) {
                    reduce_scatter<2 * kRun, kRowHigh, kColumnLow>(shares, lane);
#pragma unroll
                    for (int i = 0; i < kColumns; ++i) columns[i] += shares[i];
                }
#pragma unroll
                for (int i = 0; i < kColumns; i += kColumnRun) {
                    put<kColumnRun>(block.columns[i / kColumnRun][threadIdx.x], columns + i);
                }
                if (token >= 0) {
                    Pack<DX_TYPE, kRun> dx_row;
                    dx_row.set(dx_out);
                    store_run<kVectorX>(dx_row, at_token(block.dx, token, p.dx_l, from.run_at(p.dx_d)), (int)p.dx_d,
                                    from.valid);
                    if constexpr (!kTensorRank) {
                        Pack<DDT_TYPE, kRun> ddt_row;
                        ddt_row.set(ddt_out);
                        store_run<kVectorX>(ddt_row, at_token(block.ddt, token, p.ddt_l, from.run_at(p.ddt_d)),
                                            (int)p.ddt_d, from.valid);
                    }
                }
                if constexpr (kTensorRank) {
#pragma unroll
                    for (int i = 0; i < kRun; i += 2) {
                        uint2* at = reinterpret_cast<uint2*>(&block.stage.su[0][row][run + i]);
                        *at = pair_of(ddt_out[i], ddt_out[i + 1]);
                    }
                }
            }
            // dB and dC of the tile, added over the warps.
#pragma unroll
            for (int k = 0; k < kSumParts; ++k) {
                const unsigned i = (k * kThreads + own) * kSumRun, row = i / (2 * kRow) % kTile, value = i % (2 * kRow);
                const int token = tokens[row], state = value % kRow;
                if ((kSumShare < 1 && i >= kTile * 2 * kRow) || token < 0) continue;
                float sum[kSumRun];
                get<kSumRun>(sum, (kDirect ? block.stage.rows[0][row] : block.sums[0][kDirect ? 0 : row]) + value);
#pragma unroll
                for (int w = 1; w < kWarps; ++w) {
                    float more[kSumRun];
                    get<kSumRun>(more, block.sums[w][row] + value);
#pragma unroll
                    for (int n = 0; n < kSumRun; ++n) sum[n] += more[n];
                }
#pragma unroll
                for (int n = 0; n < kSumRun; ++n) {
                    if (kTensor && !kTwoTerms) sum[n] *= value < kRow ? kTruncated * kUnit : kTruncated;
                    else if (!kExact && value < kRow) sum[n] *= kUnit;
                }
                SUM_TYPE* to = at_token(value < kRow ? block.dB : block.dC, token, block.sums_stride * states, state);
                Pack<SUM_TYPE, kSumRun> packed;
                if (block.turn > 0) {
                    load<kVectorBC, true>(packed, to, 1, states - state);
#pragma unroll
                    for (int n = 0; n < kSumRun; ++n) sum[n] += packed.get(n);
                }
                packed.set(sum);
                store<kVectorBC>(packed, to, 1, states - state);
            }
            // Partial sums keep the rounding of a long route's sum down.
            const bool often = (from.last_tile - from.first_tile) * (int)p.items > kFlush;
            if ((tile - from.first_tile) % kFlush == 0 && (often || block.item + 1 == (int)p.items)) {
                const int q = own % 32 / kGroups;
#pragma unroll
                for (int j = 0; j < kSlots; ++j) {
                    const bool there = kWhole || block.first + places[j] < channels;
#pragma unroll
                    for (int n = 0; n < kStates; ++n) {
                        const int state = q * kStates + n;
                        if (there && state < states) {
                            float* at = block.dA + place_of(own, j) * states + state;
                            const bool adding = often && (block.item > 0 || tile + kFlush < block.last_tile);
                            *at = (adding ? *at : 0.f) + dA[j][n] * kUnit;
                        }
                        dA[j][n] = 0.f;
                    }
                }
            }
            if constexpr (kTensorRank) {
                __syncthreads();
                multiply_back(block, tile, (float*)block.ddt, block.sums_stride * kRank, block.turn > 0);
            }
            if (more) stage(tile - 1);
        }
        if constexpr (kPass == 1) {
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
                if (first + places[j] < channels) {
                    put<kStates>(from.edge(p, from.segment, places[j]) + q * kStates, carried[j]);
                    if (q == 0) *from.span(p, from.segment, places[j]) = span[j];
                }
            }
            return;
        }

        if (p.dinitial_state && from.segment == 0) {
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
                const int channel = first + places[j];
#pragma unroll
                for (int n = 0; n < kStates; ++n) {
                    const int state = q * kStates + n;
                    if (channel < channels && state < states) {
                        const long long of = block.sequence * channels + channel;
                        p.dinitial_state[of * states + state] = carried[j][n];
                    }
                }
            }
        }
        const bool last = block.item + 1 == (int)p.items;
        __syncthreads();
        if (last) break;
    }

    // Of a tile of dweight a lane has channels lane / 4 and lane / 4 + 8, columns 2 (lane % 4) and the next.
    for (int i = 0; kTensorRank && i < (kOwnTiles + 1) / 2 * kRankTiles * 4; ++i) {
        const int m = i / 4 / kRankTiles, tile = i / 4 % kRankTiles;
        const int of = 16 * m + lane / 4 + i % 4 / 2 * 8, channel = first + warp * kWarpChannels + of;
        const int rank = 8 * tile + 2 * (lane % 4) + i % 2;
        if (of < kWarpChannels && channel < channels && rank < kRank) {
            p.ddt_weight[(block.share * channels + channel) * kRank + rank] = (&block.dweight[warp][m][tile][lane].x)[i % 4];
        }
    }
    // dD and ddt_bias, over the rows.
    __syncthreads();
    constexpr int kParts = kTile / kRows / (kColumnsApart ? 1 : kRowsTogether);
    float(*parts)[2][kBlockChannels] = reinterpret_cast<float(*)[2][kBlockChannels]>(block.held);
    static_assert(sizeof(block.held) >= sizeof(*parts) * kParts);
    if (owns_first<2 * kRun, kRowHigh, kColumnLow>(lane)) {
        const int owned = owned_from<2 * kRun, kRowHigh, kColumnLow>(lane);
        const int part = own_row(0) / (kColumnsApart ? 1 : kRowsTogether);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const float sum = block.columns[i / kColumnRun][threadIdx.x][i % kColumnRun];
            parts[part][(owned + i) / kRun][run + (owned + i) % kRun] = sum;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * kBlockChannels; i += kThreads) {
        float sum = 0.f;
#pragma unroll
        for (int n = 0; n < kParts; ++n) sum += parts[n][i / kBlockChannels][i % kBlockChannels];
        const int channel = first + i % kBlockChannels;
        float* to = i < kBlockChannels ? p.dD : p.ddt_bias;
        if (to && channel < channels) to[block.share * channels + channel] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) wide_backward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    BlockMemory& block = *reinterpret_cast<BlockMemory*>(shared);
    volatile int* done = p.order + 1;
    if (threadIdx.x == 0) {
        block.turn = 0, block.index = blockIdx.x;
        if constexpr (kAdd) {
            // Blocks are numbered as they begin, so that the one waited for has begun.
            const unsigned apart = gridDim.x / (unsigned)p.routes * (unsigned)p.apart;
            block.index = (unsigned)atomicAdd(p.order, 1);
            if (block.index >= apart) {
                while (!done[block.index - apart]) __nanosleep(100);
                __threadfence();
            }
        }
    }
    __syncthreads();
    for (int turn = 0; turn < (int)p.turns; ++turn) {
        if (threadIdx.x == 0) block.turn = turn;
        __syncthreads();
        scan_back(p, block);
        __syncthreads();
    }
    if (kAdd && threadIdx.x == 0) {
        __threadfence();
        done[block.index] = 1;
    }
}
