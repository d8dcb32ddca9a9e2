// wide_backward.cuh: gradients of the scan of wide_forward.cuh. With g_t = dL/dh_t, steps taken backwards:
//     g_t = C_t dy_t + exp(s_{t+1} A) g_{t+1}      dC_t = sum_d dy_t h_t         dB_t = sum_d g_t s_t x_t
//     dx_t = s_t <g_t, B_t> + D dy_t               ds_t = x_t <g_t, B_t> + <g_t exp(s_t A) h_{t-1}, A>
//     dA = sum_t g_t exp(s_t A) h_{t-1} s_t, where g_t exp(s_t A) is what goes on to the step before.
//
// Grid: a block = one (b, k) and kBlockChannels channels, a warp = kWarpChannels of them. Lane (q, group), q in the high
// bits, holds states q kStates.. of kSlots channels; its slot j is channel ((j ^ q) % kSlots) kGroups + group of the
// warp, so that sums over q leave a lane its own channel by exchanges without selection.
// Steps go by in tiles of kCheckpoint, from the last. Forward saved the state before each tile; a warp runs through the
// tile once and keeps every state, those of the first kHeld steps in shared memory, those of the last kSub in
// registers: so each state is computed once. Decays are computed again on the way back: registers that kept them would
// cost more, in warps that do not fit, than the exponentials do.
// Before and after the scan of a tile a thread has one run of channels of one row, so that a warp touches few rows of
// device memory at a time; the next tile is on its way while this one's results are worked out. What limits the kernel
// are words that lanes read from shared memory, broadcast or not: so values stay narrow there, and are read once.
// dB, dC: summed over a lane's channels, over the lanes by the tensor cores (or by exchanges where lanes that share
// states are fewer than four), over the warps through shared memory, over the blocks by the host's sum of partial
// results: all in fixed order.
#pragma once
#include "wide.cuh"

constexpr int kTile = kCheckpoint;
constexpr int kSub = SUB;
constexpr int kHeld = kTile - kSub;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlockChannels = kWarps * kWarpChannels;
constexpr int kPitch = kBlockChannels + 2;  // so that rows meet other banks
constexpr int kRun = kWarpChannels < 16 ? kWarpChannels / 2 : 8;  // channels a thread loads at a time, of one step
constexpr int kRuns = kBlockChannels / kRun;
constexpr int kRows = kTile * kRuns / kThreads;  // rows of which a thread has a run
constexpr int kShare = kTile * kRow / kThreads;
constexpr int kRowRun = kShare < 1 ? 1 : kShare < 4 ? kShare : 4;  // states a thread loads at a time, of one step
constexpr int kParts = kShare < 4 ? 1 : kShare / 4;
constexpr bool kPartsAhead = kParts <= 2;
constexpr int kSums = 2 * kStates;     // dB and dC of a lane's states
constexpr bool kDirect = kWarps == 1;  // a warp's sums are the block's
constexpr int kFlush = 64;             // tiles after which partial sums of dA leave the registers

#if __CUDA_ARCH__ >= 800
constexpr bool kTensor = kGroups >= 4 && kSums <= 16;
#else
constexpr bool kTensor = false;
#endif
// Numbers go to the tensor cores in their upper 19 bits, and where results are more exact than that their rest as well.
constexpr bool kTwoTerms = TWO_TERMS;
constexpr float kTruncated = 1.000352f;  // what cutting off 13 bits takes from a number on average, given back
constexpr int kSpan = kTensor ? 16 / kSums : 1;  // steps whose sums the tensor cores take together

static_assert(kTile == 16 && kRun >= 1 && kRows >= 1);
static_assert(kSub % kSpan == 0 && kHeld % kSpan == 0);

struct alignas(16) BlockMemory {
    float2 su[kTile][kPitch];  // s, s x -> <g, B>
    float2 dz[kTile][kPitch];  // dy, (none) -> <g h A>
    float rows[kTile][2 * kRow];  // B, then C
    float sums[kDirect ? 1 : kWarps][kDirect ? 1 : kTile][2 * kRow];  // dB, then dC
    float held[kWarps][kHeld][kSlots][32][kStates];  // the state after each of the first steps
    float bias[kBlockChannels];
    float D[kBlockChannels];
    float weight[kRank + 1][kBlockChannels];
    float rank[kRank ? kTile : 1][kRank + 1];
    int tokens[2][kTile];  // of two tiles in turn
};
extern "C" __device__ int launch_shape[2] = {kThreads, (int)sizeof(BlockMemory)};

// A thread's run of channels, the same in all its rows, and those rows: eight neighbouring lanes have two runs of four
// rows, for the banks' sake.
DEVICE int own_run() { return (threadIdx.x & 1) + 2 * ((threadIdx.x >> 3) % (kRuns / 2)); }
DEVICE int own_row(int r) { return (threadIdx.x >> 1 & 3) + 4 * ((r * kThreads + threadIdx.x) / 8 / (kRuns / 2)); }

// A thread's share of the rows of B and C.
struct Part {
    int row, state;
    bool there;
    DEVICE explicit Part(int k) {
        const int i = (k * kThreads + threadIdx.x) * kRowRun;
        row = i / kRow % kTile, state = i % kRow, there = kShare > 0 || i < kTile * kRow;
    }
};

// d += A B, 16 x 8 and 8 x 8, in tf32: the lane gives of A the rows lane / 4 and lane / 4 + 8 of column lane % 4, then of
// column lane % 4 + 4; of B column lane / 4 of those rows; and has of d those rows, columns 2 (lane % 4) and the next.
DEVICE void multiply_add_tf32(float* d, float a0, float a1, float a2, float a3, float2 b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
          "r"(__float_as_uint(b.x)), "r"(__float_as_uint(b.y)));
#endif
}
DEVICE float one_if_equal(float a, float b) {
    float r;
    asm("set.eq.f32.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
DEVICE float rest(float v) { return v - __uint_as_float(__float_as_uint(v) & 0xffffe000u); }

// Sum dB and dC of a lane's states, values[0 .. kSums), over the groups of lanes, and leave them in row_at(t)[kind kRow +
// state]. On the tensor cores, A holds four values at a time, and B is 1 in one column for the first two of them and in
// the next for the others: so a lane finds in d[i] the sums, over the four lanes of its quad, of values
// 4 (lane % 4) + i, counted over kSpan steps, the last of which writes.
template <class RowAt>
DEVICE void sum_groups(float* d, const float* values, int t, int span, int lane, RowAt row_at) {
    const int q = lane / kGroups;
    if constexpr (kTensor) {
        if (span == kSpan - 1) d[0] = d[1] = d[2] = d[3] = 0.f;
#pragma unroll
        for (int i = 0; i < kSums; i += 4) {
            const float column = (span * kSums + i) / 2;
            const float2 b = make_float2(one_if_equal(lane >> 2, column), one_if_equal(lane >> 2, column + 1));
            const float* v = values + i;
            multiply_add_tf32(d, v[0], v[2], v[1], v[3], b);
            if constexpr (kTwoTerms) multiply_add_tf32(d, rest(v[0]), rest(v[2]), rest(v[1]), rest(v[3]), b);
        }
        if (span > 0) return;
        constexpr int kCount = owned_count<4, kGroups / 2, 4>();
        reduce_scatter<4, kGroups / 2, 4>(d, lane);
        if (owns_first<4, kGroups / 2, 4>(lane)) {
            const int value = 4 * (lane & 3) % kSums + owned_from<4, kGroups / 2, 4>(lane);
            float* row = row_at(t + 4 * (lane & 3) / kSums);
#pragma unroll
            for (int i = 0; i < kCount; i += kCount < 2 ? 1 : 2) {
                const int kind = (value + i) / kStates, state = (value + i) % kStates;
                put<(kCount < 2 ? 1 : 2)>(row + kind * kRow + q * kStates + state, d + i);
            }
        }
    } else {
        float sums[kSums];
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] = values[i];
        reduce_scatter<kSums, kGroups / 2, 1>(sums, lane);
        if (owns_first<kSums, kGroups / 2, 1>(lane)) {
            const int from = owned_from<kSums, kGroups / 2, 1>(lane);
#pragma unroll
            for (int i = 0; i < owned_count<kSums, kGroups / 2, 1>(); ++i) {
                row_at(t)[(from + i) / kStates * kRow + q * kStates + (from + i) % kStates] = sums[i];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) wide_backward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    BlockMemory& block = *reinterpret_cast<BlockMemory*>(shared);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;

    const int channels = (int)p.channels, steps = (int)p.steps, states = (int)p.states;
    const int blocks = (channels + kBlockChannels - 1) / kBlockChannels, block_of_channels = blockIdx.x % blocks;
    const int route = blockIdx.x / blocks % (int)p.routes;
    const long long batch = blockIdx.x / blocks / (int)p.routes;
    const long long sequence = batch * p.routes + route;
    const int first = block_of_channels * kBlockChannels;

    // Places in the scan, and a run of channels while loading and storing. Channels past the last are all 0.
    const int q = lane / kGroups, group = lane % kGroups;
    const int run = own_run() * kRun, valid_run = channels - first - run;
    const X_TYPE* x = (const X_TYPE*)p.x + batch * p.x_b + route * p.x_k + (first + run) * p.x_d;
    const DT_TYPE* dt = (const DT_TYPE*)p.dt + batch * p.dt_b + route * p.dt_k + (kRank ? 0 : (first + run) * p.dt_d);
    const B_TYPE* B = (const B_TYPE*)p.B + batch * p.B_b + route * p.B_k;
    const C_TYPE* C = (const C_TYPE*)p.C + batch * p.C_b + route * p.C_k;
    const Y_TYPE* dy = (const Y_TYPE*)p.dy + batch * p.dy_b + route * p.dy_k + (first + run) * p.dy_d;
    DX_TYPE* dx = (DX_TYPE*)p.dx + batch * p.dx_b + route * p.dx_k + (first + run) * p.dx_d;
    DDT_TYPE* ddt = (DDT_TYPE*)p.ddt + batch * p.ddt_b + route * p.ddt_k + (first + run) * p.ddt_d;
    const int* indices = p.indices + (long long)route * steps;
    const long long first_sum = ((batch * p.tokens * p.routes + route) * blocks + block_of_channels) * states;
    float *dB = p.dB + first_sum, *dC = p.dC + first_sum;
    const int sums_stride = (int)p.routes * blocks * states;

    int places[kSlots];  // of the slots' channels in the block
    float A[kSlots][kStates], dA[kSlots][kStates], carried[kSlots][kStates];
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
        places[j] = warp * kWarpChannels + ((j ^ q) & (kSlots - 1)) * kGroups + group;
        const int channel = first + places[j];
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
            const int state = q * kStates + n;
            const bool there = channel < channels && state < states;
            const long long at = (long long)channel * states + state;
            A[j][n] = there ? p.A[(long long)route * channels * states + at] * kLog2e : 0.f;
            carried[j][n] = there && p.dlast_state ? p.dlast_state[sequence * channels * states + at] : 0.f;
            dA[j][n] = 0.f;
        }
    }
    for (int i = threadIdx.x; i < kBlockChannels; i += kThreads) {
        const bool there = first + i < channels;
        const long long at = (long long)route * channels + first + i;
        block.bias[i] = there && p.dt_bias ? p.dt_bias[at] : 0.f;
        block.D[i] = there && p.D ? p.D[at] : 0.f;
        for (int r = 0; r < kRank; ++r) block.weight[r][i] = there ? p.dt_weight[at * kRank + r] : 0.f;
    }
    // A thread's share of dD and ddt_bias.
    constexpr int kColumns = owned_count<2 * kRun, 4, 2>();
    float columns[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) columns[i] = 0.f;

    const int tiles = (steps + kTile - 1) / kTile;
    auto copy = [](float (*to)[kStates], const float (*from)[kStates]) {
#pragma unroll
        for (int i = 0; i < kSlots * kStates; ++i) to[i / kStates][i % kStates] = from[i / kStates][i % kStates];
    };
    auto recall = [&](float (*to)[kStates], int t) {
#pragma unroll
        for (int j = 0; j < kSlots; ++j) get<kStates>(to[j], block.held[warp][t][j][lane]);
    };
    auto saved = [&](float (*h)[kStates], int tile) {  // the state before a tile
#pragma unroll
        for (int j = 0; j < kSlots; ++j) {
            const int channel = min(first + places[j], channels - 1);
            get<kStates>(h[j], p.saved + ((sequence * tiles + tile) * channels + channel) * kRow + q * kStates);
        }
    };

    // What is read of a tile and not yet unpacked.
    Pack<X_TYPE, kRun> x_in[kRows];
    Pack<DT_TYPE, kRun> dt_in[kRank ? 1 : kRows];
    Pack<Y_TYPE, kRun> dy_in[kRows];
    Pack<B_TYPE, kRowRun> B_in[kPartsAhead ? kParts : 1];
    Pack<C_TYPE, kRowRun> C_in[kPartsAhead ? kParts : 1];
    float h[kSlots][kStates];
    auto fetch_part = [&](int k, int slot, const int* tokens) {
        const Part part(k);
        const int token = part.there ? tokens[part.row] : -1, valid = token >= 0 ? states - part.state : 0;
        load<kVectorBC>(B_in[slot], at_token(B, token, p.B_l) + part.state * (int)p.B_n, (int)p.B_n, valid);
        load<kVectorBC>(C_in[slot], at_token(C, token, p.C_l) + part.state * (int)p.C_n, (int)p.C_n, valid);
    };
    auto fetch = [&](int tile) {
        const int* tokens = block.tokens[tile & 1];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int token = tokens[own_row(r)], valid = token >= 0 ? valid_run : 0;
            load<kVectorX>(x_in[r], at_token(x, token, p.x_l), (int)p.x_d, valid);
            if constexpr (kRank == 0) load<kVectorX>(dt_in[r], at_token(dt, token, p.dt_l), (int)p.dt_d, valid);
            if (p.dy) load<kVectorX>(dy_in[r], at_token(dy, token, p.dy_l), (int)p.dy_d, valid);
            else dy_in[r].clear();
        }
#pragma unroll
        for (int k = 0; kPartsAhead && k < kParts; ++k) fetch_part(k, k, tokens);
        saved(h, tile);
    };
    auto unpack = [&](int tile) {
        const int* tokens = block.tokens[tile & 1];
        if constexpr (kRank > 0) {
            for (int i = threadIdx.x; i < kTile * kRank; i += kThreads) {
                const int row = i / kRank, rank = i % kRank, token = tokens[row];
                block.rank[row][rank] = token >= 0 ? widen(at_token(dt, token, p.dt_l)[rank * (int)p.dt_d]) : 0.f;
            }
            __syncthreads();
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int row = own_row(r), token = tokens[row];
            float s[kRun];
            get<kRun>(s, block.bias + run);
            if constexpr (kRank == 0) {
#pragma unroll
                for (int i = 0; i < kRun; ++i) s[i] += dt_in[r].get(i);
            } else {
#pragma unroll 4
                for (int c = 0; c < kRank; ++c) {
                    float weight[kRun];
                    get<kRun>(weight, block.weight[c] + run);
#pragma unroll
                    for (int i = 0; i < kRun; ++i) s[i] = fmaf(weight[i], block.rank[row][c], s[i]);
                }
            }
            float su[2 * kRun], dz[2 * kRun];
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
                if (kSoftplus) s[i] = softplus<sizeof(DT_TYPE) == 4>(s[i]);
                if (token == -2) s[i] = 0.f;  // past the end the state stays as it is
                su[2 * i] = s[i], su[2 * i + 1] = s[i] * x_in[r].get(i);
                dz[2 * i] = dy_in[r].get(i), dz[2 * i + 1] = 0.f;
            }
            put<2 * kRun>(&block.su[row][run].x, su);
            put<2 * kRun>(&block.dz[row][run].x, dz);
        }
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
            const Part part(k);
            const int slot = kPartsAhead ? k : 0;
            if (!kPartsAhead) fetch_part(k, 0, tokens);
            if (!part.there) continue;
            float values[kRowRun];
#pragma unroll
            for (int n = 0; n < kRowRun; ++n) values[n] = B_in[slot].get(n);
            put<kRowRun>(block.rows[part.row] + part.state, values);
#pragma unroll
            for (int n = 0; n < kRowRun; ++n) values[n] = C_in[slot].get(n);
            put<kRowRun>(block.rows[part.row] + kRow + part.state, values);
        }
    };

    if (threadIdx.x < kTile) {
        const int step = (tiles - 1) * kTile + threadIdx.x;
        block.tokens[(tiles - 1) & 1][threadIdx.x] = step < steps ? __ldg(indices + step) : -2;
    }
    __syncthreads();
    fetch(tiles - 1);
    unpack(tiles - 1);
    for (int tile = tiles - 1; tile >= 0; --tile) {
        const int start = tile * kTile;
        const int* tokens = block.tokens[tile & 1];
        int ahead = 0;
        if (threadIdx.x < kTile && tile > 0) ahead = __ldg(indices + start - kTile + threadIdx.x);
        Pack<X_TYPE, kRun> x_now[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) x_now[r] = x_in[r];
        __syncthreads();

        const bool whole = start + kHeld < steps;  // not only padding behind the first steps
        auto forwards = [&](int t) {
            float b[kStates];
            get<kStates>(b, block.rows[t] + q * kStates);
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
                const float2 su = block.su[t][places[j]];
#pragma unroll
                for (int n = 0; n < kStates; ++n) h[j][n] = fmaf(decay(su.x, A[j][n]), h[j][n], su.y * b[n]);
            }
        };
        float product_of_sums[4];
        auto row_at = [&](int t) {
            // The sums of a lone warp take the place of B and C, which nothing reads again.
            return kDirect ? block.rows[t] : block.sums[kDirect ? 0 : warp][kDirect ? 0 : t];
        };
        auto backwards = [&](int t, int span, const float (*before)[kStates], const float (*after)[kStates]) {
            float b[kStates], c[kStates], sums[kSums], inner[2];
            float others[2][kSlots];  // <g, B> and <g h A> of the slots
            get<kStates>(b, block.rows[t] + q * kStates);
            get<kStates>(c, block.rows[t] + kRow + q * kStates);
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
                const float2 su = block.su[t][places[j]];
                const float out = block.dz[t][places[j]].x;
                others[0][j] = others[1][j] = 0.f;
#pragma unroll
                for (int n = 0; n < kStates; ++n) {
                    const float g = fmaf(c[n], out, carried[j][n]);
                    carried[j][n] = g * decay(su.x, A[j][n]);
                    const float product = carried[j][n] * before[j][n];
                    sums[n] = j ? fmaf(g, su.y, sums[n]) : g * su.y;
                    sums[kStates + n] = j ? fmaf(out, after[j][n], sums[kStates + n]) : out * after[j][n];
                    others[0][j] = n ? fmaf(g, b[n], others[0][j]) : g * b[n];
                    others[1][j] = n ? fmaf(product, A[j][n], others[1][j]) : product * A[j][n];
                    dA[j][n] = fmaf(product, su.x, dA[j][n]);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                inner[i] = others[i][0];
#pragma unroll
                for (int j = 1; j < kSlots; ++j) inner[i] += __shfl_xor_sync(kAll, others[i][j], j * kGroups);
            }
            reduce_scatter<2, 16, kGroups * kSlots>(inner, lane);
            if (kDirect) __syncwarp();
            sum_groups(product_of_sums, sums, t, span, lane, row_at);
            __syncwarp();  // every lane has read this row
            if (owns_first<2, 16, kGroups * kSlots>(lane)) {
                const int from = owned_from<2, 16, kGroups * kSlots>(lane);
#pragma unroll
                for (int i = 0; i < owned_count<2, 16, kGroups * kSlots>(); ++i) {
                    (from + i ? block.dz : block.su)[t][places[0]].y = inner[i];
                }
            }
        };

#pragma unroll 4
        for (int t = 0; t < kHeld; ++t) {
            forwards(t);
#pragma unroll
            for (int j = 0; j < kSlots; ++j) put<kStates>(block.held[warp][t][j][lane], h[j]);
        }
        if (whole) {
            float history[kSub][kSlots][kStates], before[kSlots][kStates];  // states after the last steps, and before
#pragma unroll
            for (int t = 0; t < kSub; ++t) {
                forwards(kHeld + t);
                copy(history[t], h);
            }
#pragma unroll
            for (int t = kSub - 1; t > 0; --t) backwards(kHeld + t, t % kSpan, history[t - 1], history[t]);
            recall(before, kHeld - 1);
            backwards(kHeld, 0, before, history[0]);
        }
        float begin[kSlots][kStates];
        saved(begin, tile);
        recall(h, kHeld - 1);
#pragma unroll 1
        for (int last = kHeld - kSpan; last >= 0; last -= kSpan) {
#pragma unroll
            for (int span = kSpan - 1; span >= 0; --span) {
                float before[kSlots][kStates];
                if (last + span > 0) recall(before, last + span - 1);
                else copy(before, begin);
                backwards(last + span, span, before, h);
                copy(h, before);
            }
        }
        if (threadIdx.x < kTile) block.tokens[~tile & 1][threadIdx.x] = ahead;
        __syncthreads();
        if (tile > 0) fetch(tile - 1);

        // dx and ddt of a thread's run, and its shares of dD and ddt_bias.
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int row = own_row(r), token = tokens[row];
            float dx_out[kRun], ddt_out[kRun], skip[kRun], su[2 * kRun], dz[2 * kRun], shares[2 * kRun];
            get<kRun>(skip, block.D + run);
            get<2 * kRun>(su, &block.su[row][run].x);
            get<2 * kRun>(dz, &block.dz[row][run].x);
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
                const float s = su[2 * i], gB = su[2 * i + 1], out = dz[2 * i], u = x_now[r].get(i);
                dx_out[i] = fmaf(skip[i], out, s * gB);
                ddt_out[i] = fmaf(u, gB, dz[2 * i + 1] * kLn2);
                if (kSoftplus) ddt_out[i] *= softplus_slope(s);
                if (token == -2) ddt_out[i] = 0.f;
                shares[i] = out * u, shares[kRun + i] = ddt_out[i];
            }
            if (token >= 0) {
                Pack<DX_TYPE, kRun> dx_row;
                Pack<DDT_TYPE, kRun> ddt_row;
                dx_row.set(dx_out), ddt_row.set(ddt_out);
                store<kVectorX>(dx_row, at_token(dx, token, p.dx_l), (int)p.dx_d, valid_run);
                store<kVectorX>(ddt_row, at_token(ddt, token, p.ddt_l), (int)p.ddt_d, valid_run);
            }
            reduce_scatter<2 * kRun, 4, 2>(shares, lane);
#pragma unroll
            for (int i = 0; i < kColumns; ++i) columns[i] += shares[i];
        }
        // dB and dC of the tile, added over the warps.
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
            const Part part(k);
            if (!part.there) continue;
            const int token = tokens[part.row];
#pragma unroll
            for (int kind = 0; kind < 2; ++kind) {
                float sum[kRowRun];
                get<kRowRun>(sum, (kDirect ? block.rows[part.row] : block.sums[0][kDirect ? 0 : part.row]) +
                                      kind * kRow + part.state);
#pragma unroll
                for (int w = 1; w < kWarps; ++w) {
                    float more[kRowRun];
                    get<kRowRun>(more, block.sums[w][part.row] + kind * kRow + part.state);
#pragma unroll
                    for (int n = 0; n < kRowRun; ++n) sum[n] += more[n];
                }
                float* to = at_token(kind ? dC : dB, token, sums_stride) + part.state;
#pragma unroll
                for (int n = 0; n < kRowRun; ++n) {
                    if constexpr (kTensor && !kTwoTerms) sum[n] *= kTruncated;
                    if (!kVectorBC && token >= 0 && part.state + n < states) to[n] = sum[n];
                }
                if (kVectorBC && token >= 0) put<kRowRun>(to, sum);
            }
        }
        if (tile % kFlush == 0) {
            // Partial sums keep the rounding of a long route's sum down.
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
                const int channel = first + places[j];
#pragma unroll
                for (int n = 0; n < kStates; ++n) {
                    const int state = q * kStates + n;
                    if (channel < channels && state < states) {
                        float* at = p.dA + (sequence * channels + channel) * states + state;
                        *at = (tile + kFlush < tiles ? *at : 0.f) + dA[j][n];
                    }
                    dA[j][n] = 0.f;
                }
            }
        }
        if (tile > 0) unpack(tile - 1);
    }

    if (p.dinitial_state) {
#pragma unroll
        for (int j = 0; j < kSlots; ++j) {
            const int channel = first + places[j];
#pragma unroll
            for (int n = 0; n < kStates; ++n) {
                const int state = q * kStates + n;
                if (channel < channels && state < states) {
                    p.dinitial_state[(sequence * channels + channel) * states + state] = carried[j][n];
                }
            }
        }
    }

    // dD and ddt_bias, over the four quarters of the rows.
    __syncthreads();
    float* quarters = block.held[0][0][0][0];
    if (owns_first<2 * kRun, 4, 2>(lane)) {
        const int from = owned_from<2 * kRun, 4, 2>(lane);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const int kind = (from + i) / kRun, channel = run + (from + i) % kRun;
            quarters[(own_row(0) / 4 * 2 + kind) * kBlockChannels + channel] = columns[i];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * kBlockChannels; i += kThreads) {
        float sum = 0.f;
#pragma unroll
        for (int r = 0; r < 4 / kRows; ++r) sum += quarters[r * 2 * kBlockChannels + i];
        const int channel = first + i % kBlockChannels;
        float* to = i < kBlockChannels ? p.dD : p.ddt_bias;
        if (to && channel < channels) to[sequence * channels + channel] = sum;
    }
}
