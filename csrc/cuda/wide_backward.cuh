// wide_backward.cuh: gradients of the scan of wide_forward.cuh. With g_t = dL/dh_t, steps taken backwards:
//     g_t = C_t dy_t + exp(s_{t+1} A) g_{t+1}      dC_t = sum_d dy_t h_t         dB_t = sum_d g_t s_t x_t
//     dx_t = s_t <g_t, B_t> + D dy_t               ds_t = x_t <g_t, B_t> + <g_t exp(s_t A) h_{t-1}, A>
//     dA = sum_t g_t exp(s_t A) h_{t-1} s_t, where g_t exp(s_t A) is what goes on to the step before.
//
// Grid: a block = one (b, k) and kWarps * kWarpChannels channels, a warp = kWarpChannels of them; lanes as in forward,
// in natural order of the slots. The steps go by in tiles of kCheckpoint, from the last: forward saved the state before
// each tile; the warp runs through the tile to keep the state before every kSub steps in shared memory, then takes the
// subtiles from the last, with kSub steps of states in registers. Decays are computed again on the way back: the
// registers that keep them would cost more, in warps that do not fit, than the exponentials do.
// dB, dC: summed over the lanes by exchanges, over the warps through shared memory, over the blocks by the host's sum
// of partial results, all in fixed order.
#pragma once
#include "common.cuh"

constexpr int kLanes = LANES;
constexpr int kStates = STATES;
constexpr int kSlots = SLOTS;
constexpr bool kSoftplus = SOFTPLUS;
constexpr int kRank = RANK;
constexpr int kWarps = WARPS;
constexpr bool kVectorX = VECTOR_X;
constexpr bool kVectorBC = VECTOR_BC;
constexpr int kCheckpoint = CHECKPOINT;

constexpr int kTile = kCheckpoint;
constexpr int kSub = SUB;
constexpr int kSubs = kTile / kSub;
constexpr int kWarpChannels = kSlots * 32 / kLanes;
constexpr int kRun = kWarpChannels < 8 ? kWarpChannels : 8;  // channels a lane loads at a time, of one step
constexpr int kPitch = kWarpChannels + 4;                    // so that lanes on neighbouring rows meet other banks
constexpr int kRow = kLanes * kStates;
constexpr int kRowPitch = kRow + (kRow % 4 ? 4 - kRow % 4 : 0);
constexpr bool kDirect = kWarps == 1;  // a warp's sums are the block's, and go straight to memory
constexpr int kSums = 2 * kStates;  // dB and dC of a lane's states

static_assert(kTile == 32, "a lane loads one row of the tile");

struct alignas(16) WarpMemory {
    float s[kTile][kPitch];
    float u[kTile][kPitch];   // s x, later <g, B>, later a share of dD
    float dy[kTile][kPitch];  // later <g h A>, later a share of ddt_bias
    float mid[kSubs][kSlots * kStates][32];
    float sums[kDirect ? 1 : kTile][2 * kRowPitch];  // dB, then dC
    float bias[kWarpChannels];
    float D[kWarpChannels];
    float weight[kRank + 1][kWarpChannels];
};
struct alignas(16) BlockMemory {
    float B[kTile][kRowPitch];
    float C[kTile][kRowPitch];
    int tokens[kTile];
    float rank[kRank ? kTile : 1][kRank + 1];
    WarpMemory warps[kWarps];
};
extern "C" __device__ int launch_shape[2] = {32 * kWarps, (int)sizeof(BlockMemory)};

// A run of channels in shared memory, four at a time where that is aligned.
DEVICE void get(float* v, const float* at) {
    if constexpr (kRun % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kRun; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(at + i);
            v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < kRun; ++i) v[i] = at[i];
    }
}
DEVICE void put(float* at, const float* v) {
    if constexpr (kRun % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kRun; i += 4) {
            *reinterpret_cast<float4*>(at + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kRun; ++i) at[i] = v[i];
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

    const int q = lane % kLanes, group = lane / kLanes * kSlots;
    const X_TYPE* x = (const X_TYPE*)p.x + batch * p.x_b + route * p.x_k + first * p.x_d;
    const DT_TYPE* dt = (const DT_TYPE*)p.dt + batch * p.dt_b + route * p.dt_k + (kRank ? 0 : first * p.dt_d);
    const B_TYPE* B = (const B_TYPE*)p.B + batch * p.B_b + route * p.B_k;
    const C_TYPE* C = (const C_TYPE*)p.C + batch * p.C_b + route * p.C_k;
    const Y_TYPE* dy = (const Y_TYPE*)p.dy + batch * p.dy_b + route * p.dy_k + first * p.dy_d;
    DX_TYPE* dx = (DX_TYPE*)p.dx + batch * p.dx_b + route * p.dx_k + first * p.dx_d;
    DDT_TYPE* ddt = (DDT_TYPE*)p.ddt + batch * p.ddt_b + route * p.ddt_k + first * p.ddt_d;
    const int* indices = p.indices + (long long)route * steps;

    auto sums_row = [&](long long token) {
        return ((block_of_channels * p.batch + batch) * p.tokens + token) * p.routes + route;
    };

    float A[kSlots][kStates], dA[kSlots][kStates], carried[kSlots][kStates];
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
        const int channel = first + group + j;
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

    const int tiles = (steps + kTile - 1) / kTile;
    for (int tile = tiles - 1; tile >= 0; --tile) {
        const int start = tile * kTile;
        // The block's rows of B, C and of a low-rank step size.
        if (threadIdx.x < kTile) {
            const int step = start + threadIdx.x;
            block.tokens[threadIdx.x] = step >= steps ? -2 : __ldg(indices + step);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < kTile * kRow; i += 32 * kWarps) {
            const int row = i / kRow, state = i % kRow;
            const long long token = block.tokens[row];
            const bool there = token >= 0 && state < states;
            block.B[row][state] = there ? widen(B[token * (int)p.B_l + state * (int)p.B_n]) : 0.f;
            block.C[row][state] = there ? widen(C[token * (int)p.C_l + state * (int)p.C_n]) : 0.f;
        }
        if constexpr (kRank > 0) {
            for (int i = threadIdx.x; i < kTile * kRank; i += 32 * kWarps) {
                const int row = i / kRank, rank = i % kRank;
                const long long token = block.tokens[row];
                block.rank[row][rank] = token >= 0 ? widen(dt[token * (int)p.dt_l + rank * (int)p.dt_d]) : 0.f;
            }
            __syncthreads();
        }

        __syncwarp();
        // This warp's channels: a lane unpacks one row.
        const long long token = block.tokens[lane];
#pragma unroll
        for (int run = 0; run < kWarpChannels; run += kRun) {
            const int valid = token >= 0 ? channels - first - run : 0;
            Pack<X_TYPE, kRun> x_row;
            Pack<DT_TYPE, kRun> dt_row;
            Pack<Y_TYPE, kRun> dy_row;
            load<kVectorX>(x_row, x + token * (int)p.x_l + run * p.x_d, (int)p.x_d, valid);
            if (kRank == 0) load<kVectorX>(dt_row, dt + token * (int)p.dt_l + run * p.dt_d, (int)p.dt_d, valid);
            if (p.dy) load<kVectorX>(dy_row, dy + token * (int)p.dy_l + run * p.dy_d, (int)p.dy_d, valid);
            else dy_row.clear();
            float s[kRun], u[kRun], out[kRun];
            get(s, mine.bias + run);
            if constexpr (kRank == 0) {
#pragma unroll
                for (int i = 0; i < kRun; ++i) s[i] += dt_row.get(i);
            } else {
#pragma unroll 4
                for (int r = 0; r < kRank; ++r) {
                    float weight[kRun];
                    get(weight, mine.weight[r] + run);
#pragma unroll
                    for (int i = 0; i < kRun; ++i) s[i] = fmaf(weight[i], block.rank[lane][r], s[i]);
                }
            }
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
                if (kSoftplus) s[i] = softplus<sizeof(DT_TYPE) == 4>(s[i]);
                if (token == -2) s[i] = 0.f;
                u[i] = s[i] * x_row.get(i);
                out[i] = dy_row.get(i);
            }
            put(mine.s[lane] + run, s);
            put(mine.u[lane] + run, u);
            put(mine.dy[lane] + run, out);
        }
        __syncthreads();

        // The states before every subtile.
        float h[kSlots][kStates];
        {
            const float* at = p.saved + (sequence * tiles + tile) * channels * states;
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
                const int channel = first + group + j;
#pragma unroll
                for (int n = 0; n < kStates; ++n) {
                    const int state = q * kStates + n;
                    const bool there = channel < channels && state < states;
                    h[j][n] = there ? at[(long long)channel * states + state] : 0.f;
                    mine.mid[0][j * kStates + n][lane] = h[j][n];
                }
            }
        }
#pragma unroll 1
        for (int sub = 1; sub < kSubs; ++sub) {
#pragma unroll
            for (int t = 0; t < kSub; ++t) {
                const int row = (sub - 1) * kSub + t;
#pragma unroll
                for (int j = 0; j < kSlots; ++j) {
                    const float s = mine.s[row][group + j], u = mine.u[row][group + j];
#pragma unroll
                    for (int n = 0; n < kStates; ++n) {
                        h[j][n] = fmaf(ex2(s * A[j][n]), h[j][n], u * block.B[row][q * kStates + n]);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < kSlots * kStates; ++i) mine.mid[sub][i][lane] = h[i / kStates][i % kStates];
        }

        // The subtiles from the last.
#pragma unroll 1
        for (int sub = kSubs - 1; sub >= 0; --sub) {
            float history[kSub][kSlots][kStates];  // the state after each step
#pragma unroll
            for (int t = 0; t < kSub; ++t) {
                const int row = sub * kSub + t;
#pragma unroll
                for (int j = 0; j < kSlots; ++j) {
                    const float s = mine.s[row][group + j], u = mine.u[row][group + j];
#pragma unroll
                    for (int n = 0; n < kStates; ++n) {
                        const float before = t ? history[t - 1][j][n] : mine.mid[sub][j * kStates + n][lane];
                        history[t][j][n] = fmaf(ex2(s * A[j][n]), before, u * block.B[row][q * kStates + n]);
                    }
                }
            }
#pragma unroll
            for (int t = kSub - 1; t >= 0; --t) {
                const int row = sub * kSub + t;
                float sums[kSums], inner[2 * kSlots];  // inner: <g, B> of the slots, then <g (h - u B), A>
#pragma unroll
                for (int n = 0; n < kSums; ++n) sums[n] = 0.f;
#pragma unroll
                for (int j = 0; j < 2 * kSlots; ++j) inner[j] = 0.f;
#pragma unroll
                for (int j = 0; j < kSlots; ++j) {
                    const float s = mine.s[row][group + j], u = mine.u[row][group + j], dy_t = mine.dy[row][group + j];
#pragma unroll
                    for (int n = 0; n < kStates; ++n) {
                        const float b = block.B[row][q * kStates + n], c = block.C[row][q * kStates + n];
                        const float g = fmaf(c, dy_t, carried[j][n]);
                        const float before = t ? history[t - 1][j][n] : mine.mid[sub][j * kStates + n][lane];
                        carried[j][n] = g * ex2(s * A[j][n]);
                        const float product = carried[j][n] * before;
                        sums[n] = fmaf(g, u, sums[n]);
                        sums[kStates + n] = fmaf(dy_t, history[t][j][n], sums[kStates + n]);
                        inner[j] = fmaf(g, b, inner[j]);
                        inner[kSlots + j] = fmaf(product, A[j][n], inner[kSlots + j]);
                        dA[j][n] = fmaf(product, s, dA[j][n]);
                    }
                }
                reduce_scatter<kSums, 16, kLanes>(sums, lane);
                if (owns_first<kSums, 16, kLanes>(lane)) {
                    const int from = owned_from<kSums, 16, kLanes>(lane);
#pragma unroll
                    for (int i = 0; i < owned_count<kSums, 16, kLanes>(); ++i) {
                        const int kind = (from + i) / kStates, state = q * kStates + (from + i) % kStates;
                        if constexpr (!kDirect) {
                            mine.sums[row][kind * kRowPitch + state] = sums[i];
                        } else if (block.tokens[row] >= 0 && state < states) {
                            (kind ? p.dC : p.dB)[sums_row(block.tokens[row]) * states + state] = sums[i];
                        }
                    }
                }
                reduce_scatter<2 * kSlots, kLanes / 2, 1>(inner, lane);
                __syncwarp();  // every lane has read this row of u and dy
                if (owns_first<2 * kSlots, kLanes / 2, 1>(lane)) {
                    const int from = owned_from<2 * kSlots, kLanes / 2, 1>(lane);
#pragma unroll
                    for (int i = 0; i < owned_count<2 * kSlots, kLanes / 2, 1>(); ++i) {
                        const int j = (from + i) % kSlots;
                        if (from + i < kSlots) mine.u[row][group + j] = inner[i];
                        else mine.dy[row][group + j] = inner[i] * kLn2;
                    }
                }
            }
        }
        __syncwarp();

        // A lane finishes one row: dx and ddt, and its shares of dD and ddt_bias.
#pragma unroll
        for (int run = 0; run < kWarpChannels; run += kRun) {
            const int valid = token >= 0 ? channels - first - run : 0;
            Pack<X_TYPE, kRun> x_row;
            Pack<Y_TYPE, kRun> dy_row;
            load<kVectorX>(x_row, x + token * (int)p.x_l + run * p.x_d, (int)p.x_d, valid);
            if (p.dy) load<kVectorX>(dy_row, dy + token * (int)p.dy_l + run * p.dy_d, (int)p.dy_d, valid);
            else dy_row.clear();
            float dx_out[kRun], ddt_out[kRun], s[kRun], gB[kRun], ghA[kRun], skip[kRun];
            get(s, mine.s[lane] + run);
            get(gB, mine.u[lane] + run);
            get(ghA, mine.dy[lane] + run);
            get(skip, mine.D + run);
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
                const float u = x_row.get(i), out = dy_row.get(i);
                dx_out[i] = fmaf(skip[i], out, s[i] * gB[i]);
                ddt_out[i] = fmaf(u, gB[i], ghA[i]);
                if (kSoftplus) ddt_out[i] *= softplus_slope(s[i]);
                if (token == -2) ddt_out[i] = 0.f;
                gB[i] = out * u;
            }
            put(mine.u[lane] + run, gB);
            put(mine.dy[lane] + run, ddt_out);
            if (token >= 0) {
                Pack<DX_TYPE, kRun> dx_row;
                Pack<DDT_TYPE, kRun> ddt_row;
                dx_row.set(dx_out), ddt_row.set(ddt_out);
                store<kVectorX>(dx_row, dx + token * (int)p.dx_l + run * p.dx_d, (int)p.dx_d, valid);
                store<kVectorX>(ddt_row, ddt + token * (int)p.ddt_l + run * p.ddt_d, (int)p.ddt_d, valid);
            }
        }
        __syncthreads();

#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const int column = lane + 32 * i, channel = column % kWarpChannels;
            if (column < 2 * kWarpChannels) {
#pragma unroll 8
                for (int row = 0; row < kTile; ++row) {
                    columns[i] += column < kWarpChannels ? mine.u[row][channel] : mine.dy[row][channel];
                }
            }
        }
        // dB and dC of the tile, added over the warps.
        for (int i = threadIdx.x; !kDirect && i < kTile * kRow * 2; i += 32 * kWarps) {
            const int state = i % kRow, kind = i / kRow % 2, row = i / kRow / 2;
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum += block.warps[w].sums[row][kind * kRowPitch + state];
            if (block.tokens[row] >= 0 && state < states) {
                (kind ? p.dC : p.dB)[sums_row(block.tokens[row]) * states + state] = sum;
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
        const int channel = first + group + j;
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
            const int state = q * kStates + n;
            if (channel < channels && state < states) {
                const long long at = (sequence * channels + channel) * states + state;
                p.dA[at] = dA[j][n];
                if (p.dinitial_state) p.dinitial_state[at] = carried[j][n];
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
