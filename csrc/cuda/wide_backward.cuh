// wide_backward.cuh: gradients of the scan of wide_forward.cuh. With g_t = dL/dh_t, steps taken backwards:
//     g_t = C_t dy_t + exp(s_{t+1} A) g_{t+1}      dC_t = sum_d dy_t h_t         dB_t = sum_d g_t s_t x_t
//     dx_t = s_t <g_t, B_t> + D dy_t               ds_t = x_t <g_t, B_t> + <g_t exp(s_t A) h_{t-1}, A>
//     dA = sum_t g_t exp(s_t A) h_{t-1} s_t, where g_t exp(s_t A) is what goes on to the step before.
//
// Grid: a block = one (b, k) and kWarps * kWarpChannels channels, a warp = kWarpChannels of them. Lane (q, group), q in
// the high bits, holds states q kStates.. of kSlots channels; its slot j is channel ((j ^ q) % kSlots) kGroups + group
// of the warp, so that sums over q leave a lane its own channel by exchanges without selection.
// Steps go by in tiles of kCheckpoint, from the last. Forward saved the state before each tile; a warp runs through the
// tile once and keeps every state, those of the first kHeld steps in shared memory, those of the last kSub in
// registers: so each state is computed once. Decays are computed again on the way back: registers that kept them would
// cost more, in warps that do not fit, than the exponentials do.
// dB, dC: summed over a lane's channels, over the lanes by the tensor cores (or by exchanges where lanes that share
// states are fewer than four), over the warps through shared memory, over the blocks by the host's sum of partial
// results: all in fixed order.
#pragma once
#include "wide.cuh"

constexpr int kTile = kCheckpoint;
constexpr int kSub = SUB;
constexpr int kHeld = kTile - kSub;
constexpr int kPitch = kWarpChannels + 1;  // odd, so that lanes on neighbouring rows meet other banks
constexpr int kLaneChannels = kWarpChannels / 2;
constexpr int kRun = kLaneChannels < 8 ? kLaneChannels : 8;  // channels a lane loads at a time, of one step
constexpr int kRowUnit = kRow < 4 ? kRow : 4;                // states a thread loads at a time, of one step
constexpr int kSums = 2 * kStates;                           // dB and dC of a lane's states
constexpr bool kDirect = kWarps == 1;  // a warp's sums are the block's, and go straight to memory
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

static_assert(kTile == 16, "two lanes share a row of the tile");
static_assert(kSub % kSpan == 0 && kHeld % kSpan == 0);

struct alignas(16) WarpMemory {
    float4 steps[kTile][kPitch];  // s, s x -> <g, B>, dy -> a share of dD, (none) -> <g h A> -> a share of ddt_bias
    float held[kHeld][kSlots][32][kStates];  // the state after each of the first steps
    float sums[kDirect ? 1 : kTile][2 * kRow];  // dB, then dC
    float bias[kWarpChannels];
    float D[kWarpChannels];
    float weight[kRank + 1][kWarpChannels];
};
struct alignas(16) BlockMemory {
    float rows[kTile][2 * kRow];  // B, then C
    int tokens[2][kTile];         // of two tiles in turn
    float2 chosen[16];            // (1, 0) at 8, (0, 1) at 9
    float rank[kRank ? kTile : 1][kRank + 1];
    WarpMemory warps[kWarps];
};
extern "C" __device__ int launch_shape[2] = {32 * kWarps, (int)sizeof(BlockMemory)};

// Which of a tile's rows of B and C a thread reads, and sums up at the end.
constexpr int kParts = (kTile * 2 * kRow / kRowUnit + 32 * kWarps - 1) / (32 * kWarps);
struct Part {
    int kind, row, state;
    bool there;
    DEVICE explicit Part(int k) {
        const int i = k * 32 * kWarps + threadIdx.x;
        kind = i * kRowUnit / (kTile * kRow);
        row = i * kRowUnit / kRow % kTile;
        state = i * kRowUnit % kRow;
        there = kind < 2;
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
DEVICE float rest(float v) { return v - __uint_as_float(__float_as_uint(v) & 0xffffe000u); }

// Sum dB and dC of a lane's states, values[0 .. kSums), over the groups of lanes, and leave them in row_at(t)[kind kRow +
// state]. On the tensor cores, A holds four values at a time, and B is 1 in one column for the first two of them and in
// the next for the others: so a lane finds in d[i] the sums, over the four lanes of its quad, of values
// 4 (lane % 4) + i, counted over kSpan steps, the last of which writes.
template <class RowAt>
DEVICE void sum_groups(float* d, const float2* chosen, const float* values, int t, int span, int lane, RowAt row_at) {
    const int q = lane / kGroups;
    if constexpr (kTensor) {
        if (span == kSpan - 1) d[0] = d[1] = d[2] = d[3] = 0.f;
#pragma unroll
        for (int i = 0; i < kSums; i += 4) {
            const float2 b = chosen[8 + (lane >> 2) - (span * kSums + i) / 2];
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

extern "C" __global__ void __launch_bounds__(32 * kWarps, MIN_BLOCKS) wide_backward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    BlockMemory& block = *reinterpret_cast<BlockMemory*>(shared);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    WarpMemory& mine = block.warps[warp];

    const int channels = (int)p.channels, steps = (int)p.steps, states = (int)p.states;
    const int blocks = (channels + kWarpChannels * kWarps - 1) / (kWarpChannels * kWarps);
    const int block_of_channels = blockIdx.x % blocks;
    const int route = blockIdx.x / blocks % (int)p.routes;
    const long long batch = blockIdx.x / blocks / (int)p.routes;
    const int first = (block_of_channels * kWarps + warp) * kWarpChannels;  // may lie past the end: then all is 0
    const long long sequence = batch * p.routes + route;

    // Places in the scan, and places while loading and storing: a row of the tile and half of its channels.
    const int q = lane / kGroups, group = lane % kGroups;
    const int row = lane & 15, half = lane >> 4, first_run = half * kLaneChannels;
    const X_TYPE* x = (const X_TYPE*)p.x + batch * p.x_b + route * p.x_k + (first + first_run) * p.x_d;
    const DT_TYPE* dt = (const DT_TYPE*)p.dt + batch * p.dt_b + route * p.dt_k + (kRank ? 0 : (first + first_run) * p.dt_d);
    const B_TYPE* B = (const B_TYPE*)p.B + batch * p.B_b + route * p.B_k;
    const C_TYPE* C = (const C_TYPE*)p.C + batch * p.C_b + route * p.C_k;
    const Y_TYPE* dy = (const Y_TYPE*)p.dy + batch * p.dy_b + route * p.dy_k + (first + first_run) * p.dy_d;
    DX_TYPE* dx = (DX_TYPE*)p.dx + batch * p.dx_b + route * p.dx_k + (first + first_run) * p.dx_d;
    DDT_TYPE* ddt = (DDT_TYPE*)p.ddt + batch * p.ddt_b + route * p.ddt_k + (first + first_run) * p.ddt_d;
    const int* indices = p.indices + (long long)route * steps;
    const long long first_sum = ((batch * p.tokens * p.routes + route) * blocks + block_of_channels) * states;
    float *dB = p.dB + first_sum, *dC = p.dC + first_sum;
    const int sums_stride = (int)p.routes * blocks * states;

    int places[kSlots];  // of the slots' channels in the warp
    float A[kSlots][kStates], dA[kSlots][kStates], carried[kSlots][kStates];
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
        places[j] = ((j ^ q) & (kSlots - 1)) * kGroups + group;
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
    for (int i = lane; i < kWarpChannels; i += 32) {
        const bool there = first + i < channels;
        const long long at = (long long)route * channels + first + i;
        mine.bias[i] = there && p.dt_bias ? p.dt_bias[at] : 0.f;
        mine.D[i] = there && p.D ? p.D[at] : 0.f;
        for (int r = 0; r < kRank; ++r) mine.weight[r][i] = there ? p.dt_weight[at * kRank + r] : 0.f;
    }
    // Column sums of a tile: lane i adds dD of channel i, ddt_bias of channel i - kWarpChannels, as far as lanes go.
    constexpr int kColumns = (2 * kWarpChannels + 31) / 32;
    float columns[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) columns[i] = 0.f;

    // The state before a tile.
    const int tiles = (steps + kTile - 1) / kTile;
    auto saved = [&](float (*h)[kStates], int tile) {
#pragma unroll
        for (int j = 0; j < kSlots; ++j) {
            const int channel = min(first + places[j], channels - 1);
            get<kStates>(h[j], p.saved + ((sequence * tiles + tile) * channels + channel) * kRow + q * kStates);
        }
    };
    auto token_at = [&](int step) {
        return step < steps ? __ldg(indices + step) : -2;
    };

    if (threadIdx.x < 16) block.chosen[threadIdx.x] = make_float2(threadIdx.x == 8, threadIdx.x == 9);
    if (threadIdx.x < kTile) block.tokens[(tiles - 1) & 1][threadIdx.x] = token_at((tiles - 1) * kTile + threadIdx.x);
    __syncthreads();
    for (int tile = tiles - 1; tile >= 0; --tile) {
        const int start = tile * kTile;
        const int* tokens = block.tokens[tile & 1];
        int ahead = 0;
        if (threadIdx.x < kTile && tile > 0) ahead = __ldg(indices + start - kTile + threadIdx.x);
        const int token = tokens[row];
        float h[kSlots][kStates];
        saved(h, tile);

        // The block's rows of B, C and of a low-rank step size.
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
            const Part part(k);
            if (!part.there) continue;
            const int of = tokens[part.row], valid = of >= 0 ? states - part.state : 0;
            float values[kRowUnit];
            if (part.kind == 0) {
                Pack<B_TYPE, kRowUnit> pack;
                load<kVectorBC>(pack, at_token(B, of, p.B_l) + part.state * (int)p.B_n, (int)p.B_n, valid);
#pragma unroll
                for (int n = 0; n < kRowUnit; ++n) values[n] = pack.get(n);
            } else {
                Pack<C_TYPE, kRowUnit> pack;
                load<kVectorBC>(pack, at_token(C, of, p.C_l) + part.state * (int)p.C_n, (int)p.C_n, valid);
#pragma unroll
                for (int n = 0; n < kRowUnit; ++n) values[n] = pack.get(n);
            }
            put<kRowUnit>(block.rows[part.row] + part.kind * kRow + part.state, values);
        }
        if constexpr (kRank > 0) {
            for (int i = threadIdx.x; i < kTile * kRank; i += 32 * kWarps) {
                const int at = i / kRank, rank = i % kRank;
                const int of = tokens[at];
                block.rank[at][rank] = of >= 0 ? widen(at_token(dt, of, p.dt_l)[rank * (int)p.dt_d]) : 0.f;
            }
            __syncthreads();
        }

        // This warp's channels: two lanes unpack a row.
        __syncwarp();
        Pack<X_TYPE, kRun> x_row[kLaneChannels / kRun];
#pragma unroll
        for (int r = 0; r < kLaneChannels / kRun; ++r) {
            const int run = first_run + r * kRun, valid = token >= 0 ? channels - first - run : 0;
            Pack<DT_TYPE, kRun> dt_row;
            Pack<Y_TYPE, kRun> dy_row;
            load<kVectorX>(x_row[r], at_token(x, token, p.x_l) + r * kRun * (int)p.x_d, (int)p.x_d, valid);
            if (kRank == 0) load<kVectorX>(dt_row, at_token(dt, token, p.dt_l) + r * kRun * (int)p.dt_d, (int)p.dt_d, valid);
            if (p.dy) load<kVectorX>(dy_row, at_token(dy, token, p.dy_l) + r * kRun * (int)p.dy_d, (int)p.dy_d, valid);
            else dy_row.clear();
            float s[kRun];
            get<kRun>(s, mine.bias + run);
            if constexpr (kRank == 0) {
#pragma unroll
                for (int i = 0; i < kRun; ++i) s[i] += dt_row.get(i);
            } else {
#pragma unroll 4
                for (int c = 0; c < kRank; ++c) {
                    float weight[kRun];
                    get<kRun>(weight, mine.weight[c] + run);
#pragma unroll
                    for (int i = 0; i < kRun; ++i) s[i] = fmaf(weight[i], block.rank[row][c], s[i]);
                }
            }
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
                if (kSoftplus) s[i] = softplus<sizeof(DT_TYPE) == 4>(s[i]);
                if (token == -2) s[i] = 0.f;
                mine.steps[row][run + i] = make_float4(s[i], s[i] * x_row[r].get(i), dy_row.get(i), 0.f);
            }
        }
        __syncthreads();
        if (threadIdx.x < kTile) block.tokens[~tile & 1][threadIdx.x] = ahead;

        const bool whole = start + kHeld < steps;  // not only padding behind the first steps
        auto forwards = [&](int t) {
            float b[kStates];
            get<kStates>(b, block.rows[t] + q * kStates);
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
                const float4 step = mine.steps[t][places[j]];
#pragma unroll
                for (int n = 0; n < kStates; ++n) h[j][n] = fmaf(decay(step.x, A[j][n]), h[j][n], step.y * b[n]);
            }
        };
        float product_of_sums[4];
        auto row_at = [&](int t) {
            // The sums of a lone warp take the place of B and C, which nothing reads again.
            return kDirect ? block.rows[t] : mine.sums[kDirect ? 0 : t];
        };
        auto backwards = [&](int t, int span, const float (*before)[kStates], const float (*after)[kStates]) {
            float b[kStates], c[kStates], sums[kSums], inner[2];
            float others[2][kSlots];  // <g, B> and <g h A> of the slots
            get<kStates>(b, block.rows[t] + q * kStates);
            get<kStates>(c, block.rows[t] + kRow + q * kStates);
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
                const float4 step = mine.steps[t][places[j]];
                others[0][j] = others[1][j] = 0.f;
#pragma unroll
                for (int n = 0; n < kStates; ++n) {
                    const float g = fmaf(c[n], step.z, carried[j][n]);
                    carried[j][n] = g * decay(step.x, A[j][n]);
                    const float product = carried[j][n] * before[j][n];
                    sums[n] = j ? fmaf(g, step.y, sums[n]) : g * step.y;
                    sums[kStates + n] = j ? fmaf(step.z, after[j][n], sums[kStates + n]) : step.z * after[j][n];
                    others[0][j] = n ? fmaf(g, b[n], others[0][j]) : g * b[n];
                    others[1][j] = n ? fmaf(product, A[j][n], others[1][j]) : product * A[j][n];
                    dA[j][n] = fmaf(product, step.x, dA[j][n]);
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
            sum_groups(product_of_sums, block.chosen, sums, t, span, lane, row_at);
            __syncwarp();  // every lane has read this row of steps
            if (owns_first<2, 16, kGroups * kSlots>(lane)) {
                const int from = owned_from<2, 16, kGroups * kSlots>(lane);
#pragma unroll
                for (int i = 0; i < owned_count<2, 16, kGroups * kSlots>(); ++i) {
                    float* at = reinterpret_cast<float*>(&mine.steps[t][places[0]]);
                    at[from + i ? 3 : 1] = inner[i];
                }
            }
        };

        auto copy = [](float (*to)[kStates], const float (*from)[kStates]) {
#pragma unroll
            for (int i = 0; i < kSlots * kStates; ++i) to[i / kStates][i % kStates] = from[i / kStates][i % kStates];
        };
        auto recall = [&](float (*to)[kStates], int t) {
#pragma unroll
            for (int j = 0; j < kSlots; ++j) get<kStates>(to[j], mine.held[t][j][lane]);
        };
#pragma unroll 4
        for (int t = 0; t < kHeld; ++t) {
            forwards(t);
#pragma unroll
            for (int j = 0; j < kSlots; ++j) put<kStates>(mine.held[t][j][lane], h[j]);
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
        __syncwarp();

        // A lane finishes half a row: dx and ddt, and their shares of dD and ddt_bias.
#pragma unroll
        for (int r = 0; r < kLaneChannels / kRun; ++r) {
            const int run = first_run + r * kRun, valid = token >= 0 ? channels - first - run : 0;
            float dx_out[kRun], ddt_out[kRun], skip[kRun];
            get<kRun>(skip, mine.D + run);
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
                const float4 step = mine.steps[row][run + i];  // s, <g, B>, dy, <g h A> in units of 1 / ln 2
                const float u = x_row[r].get(i);
                dx_out[i] = fmaf(skip[i], step.z, step.x * step.y);
                ddt_out[i] = fmaf(u, step.y, step.w * kLn2);
                if (kSoftplus) ddt_out[i] *= softplus_slope(step.x);
                if (token == -2) ddt_out[i] = 0.f;
                mine.steps[row][run + i] = make_float4(0.f, 0.f, step.z * u, ddt_out[i]);
            }
            if (token >= 0) {
                Pack<DX_TYPE, kRun> dx_row;
                Pack<DDT_TYPE, kRun> ddt_row;
                dx_row.set(dx_out), ddt_row.set(ddt_out);
                store<kVectorX>(dx_row, at_token(dx, token, p.dx_l) + r * kRun * (int)p.dx_d, (int)p.dx_d, valid);
                store<kVectorX>(ddt_row, at_token(ddt, token, p.ddt_l) + r * kRun * (int)p.ddt_d, (int)p.ddt_d, valid);
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const int column = lane + 32 * i;
            if (column < 2 * kWarpChannels) {
                const float* at = column < kWarpChannels ? &mine.steps[0][column].z
                                                         : &mine.steps[0][column - kWarpChannels].w;
                float sum = 0.f;
#pragma unroll
                for (int t = 0; t < kTile; ++t) sum += at[4 * kPitch * t];
                columns[i] += sum;
            }
        }

        // dB and dC of the tile, added over the warps.
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
            const Part part(k);
            if (!part.there) continue;
            const int of = tokens[part.row], at = part.kind * kRow + part.state;
            float sum[kRowUnit];
            get<kRowUnit>(sum, (kDirect ? block.rows[part.row] : block.warps[0].sums[kDirect ? 0 : part.row]) + at);
#pragma unroll
            for (int w = 1; w < kWarps; ++w) {
                float more[kRowUnit];
                get<kRowUnit>(more, block.warps[w].sums[kDirect ? 0 : part.row] + at);
#pragma unroll
                for (int n = 0; n < kRowUnit; ++n) sum[n] += more[n];
            }
            if (of < 0) continue;
            float* to = at_token(part.kind ? dC : dB, of, sums_stride) + part.state;
#pragma unroll
            for (int n = 0; n < kRowUnit; ++n) {
                if constexpr (kTensor && !kTwoTerms) sum[n] *= kTruncated;
                if (!kVectorBC && part.state + n < states) to[n] = sum[n];
            }
            if (kVectorBC) put<kRowUnit>(to, sum);
        }
        if (kDirect) __syncthreads();

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
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
        const int column = lane + 32 * i, channel = first + column % kWarpChannels;
        if (column < 2 * kWarpChannels && channel < channels) {
            float* to = column < kWarpChannels ? p.dD : p.ddt_bias;
            if (to) to[sequence * channels + channel] = columns[i];
        }
    }
}
