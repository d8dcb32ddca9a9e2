// wide_forward.cuh: h_t = exp(s_t A) h_{t-1} + s_t B_t x_t, y_t = <C_t, h_t> + D x_t, for several states a channel.
//
// Grid: one warp = one (b, k) and kWarpChannels channels, walking the route's steps; warps of a block share nothing.
// Lanes: kLanes lanes share a group of kSlots channels, each holding kStates states of every channel of its group in
// registers, float32. Slot j of lane q is channel q ^ j of the group: so lane q gets the sum of its own channel's y by
// kSlots - 1 exchanges and no selection.
// Tiles: kTile steps at a time. Every lane loads a run of channels of one step, four lanes a step, a tile ahead; forms
// the step size once (low-rank product, bias, softplus) and leaves (s, s x) as float32 in shared memory, beside the
// rows of B and C. The scan proper then touches shared memory and registers alone, whatever the formats and strides.
#pragma once
#include "wide.cuh"

constexpr int kTile = 8;
constexpr int kRun = kWarpChannels / 4;  // channels a lane loads, of one step
constexpr int kRowRun = kRow < 4 ? 1 : kRow / 4;
constexpr int kRanks = (kRank + 3) / 4;  // columns of dt a lane loads

static_assert(kWarpChannels % 4 == 0);

struct alignas(16) WarpMemory {
    float2 steps[kTile][kWarpChannels];  // s and s x
    float y[kTile][kWarpChannels];
    float B[kTile][kRow];
    float C[kTile][kRow];
    float bias[kWarpChannels];
    float D[kWarpChannels];
    float rank[kTile][kRank + 1];
    float weight[kRank + 1][kWarpChannels];
};
extern "C" __device__ int launch_shape[2] = {32 * kWarps, kWarps * (int)sizeof(WarpMemory)};

// What a lane has read of a tile and not yet unpacked.
struct Raw {
    Pack<X_TYPE, kRun> x;
    Pack<DT_TYPE, kRank ? 1 : kRun> dt;
    Pack<DT_TYPE, kRank ? 2 * ((kRanks + 1) / 2) : 1> ranks;
    Pack<B_TYPE, kRowRun> B;
    Pack<C_TYPE, kRowRun> C;
    int token;  // -1 = a padding step, -2 = past the end
};

extern "C" __global__ void __launch_bounds__(32 * kWarps, MIN_BLOCKS) wide_forward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    WarpMemory& mine = reinterpret_cast<WarpMemory*>(shared)[warp];

    const int channels = (int)p.channels, steps = (int)p.steps, states = (int)p.states;
    const int blocks = (channels + kWarpChannels * kWarps - 1) / (kWarpChannels * kWarps);
    const int route = blockIdx.x / blocks % (int)p.routes;
    const long long batch = blockIdx.x / blocks / (int)p.routes;
    const int first = (blockIdx.x % blocks * kWarps + warp) * kWarpChannels;
    if (first >= channels) return;
    const long long sequence = batch * p.routes + route;

    // Places in the scan: lane q of its group, channels first + group * kSlots + slot.
    const int q = lane % kLanes, group = lane / kLanes * kSlots;
    const int slot = q & (kSlots - 1);
    // Places while loading and storing: one row of the tile, one run of its channels or states.
    const int row = lane >> 2, quarter = lane & 3;
    const int run = quarter * kRun, valid = channels - first - run;
    const int row_run = quarter * kRowRun, row_valid = kRow < 4 && quarter >= kRow ? 0 : states - row_run;

    const X_TYPE* x = (const X_TYPE*)p.x + batch * p.x_b + route * p.x_k + (first + run) * p.x_d;
    const DT_TYPE* dt = (const DT_TYPE*)p.dt + batch * p.dt_b + route * p.dt_k;
    if constexpr (kRank == 0) dt += (first + run) * p.dt_d;
    else dt += quarter * p.dt_d;
    const B_TYPE* B = (const B_TYPE*)p.B + batch * p.B_b + route * p.B_k + row_run * p.B_n;
    const C_TYPE* C = (const C_TYPE*)p.C + batch * p.C_b + route * p.C_k + row_run * p.C_n;
    Y_TYPE* y = (Y_TYPE*)p.y + batch * p.y_b + route * p.y_k + (first + run) * p.y_d;
    const int* indices = p.indices + (long long)route * steps;

    for (int i = lane; i < kWarpChannels; i += 32) {
        bool there = first + i < channels;
        long long at = (long long)route * channels + first + i;
        mine.bias[i] = there && p.dt_bias ? p.dt_bias[at] : 0.f;
        mine.D[i] = there && p.D ? p.D[at] : 0.f;
        for (int r = 0; r < kRank; ++r) mine.weight[r][i] = there ? p.dt_weight[at * kRank + r] : 0.f;
    }

    float A[kSlots][kStates], h[kSlots][kStates];
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
        const int channel = first + group + (slot ^ j);
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
            const int state = q * kStates + n;
            const bool there = channel < channels && state < states;
            const long long at = (long long)channel * states + state;
            A[j][n] = there ? p.A[(long long)route * channels * states + at] * kLog2e : 0.f;
            h[j][n] = there && p.initial_state ? p.initial_state[sequence * channels * states + at] : 0.f;
        }
    }

    auto token_of = [&](int step) {
        return step >= steps ? -2 : __ldg(indices + step);
    };
    auto fetch = [&](Raw& raw, int token) {
        raw.token = token;
        const bool there = token >= 0;
        load<kVectorX>(raw.x, x + (long long)token * (int)p.x_l, (int)p.x_d, there ? valid : 0);
        if constexpr (kRank == 0) {
            load<kVectorX>(raw.dt, dt + (long long)token * (int)p.dt_l, (int)p.dt_d, there ? valid : 0);
        } else {
            const int left = kRank - quarter;
            load<false>(raw.ranks, dt + (long long)token * (int)p.dt_l, 4 * (int)p.dt_d, there ? (left + 3) / 4 : 0);
        }
        load<kVectorBC>(raw.B, B + (long long)token * (int)p.B_l, (int)p.B_n, there ? row_valid : 0);
        load<kVectorBC>(raw.C, C + (long long)token * (int)p.C_l, (int)p.C_n, there ? row_valid : 0);
    };

    Raw raw;
    fetch(raw, token_of(row));
    int next = token_of(row + kTile);
    for (int start = 0; start < steps; start += kTile) {
        // Unpack the tile into shared memory, and start reading the one that takes its place.
        if (kRow >= 4 || quarter < kRow) {
#pragma unroll
            for (int i = 0; i < kRowRun; ++i) {
                mine.B[row][row_run + i] = raw.B.get(i);
                mine.C[row][row_run + i] = raw.C.get(i);
            }
        }
        if constexpr (kRank > 0) {
#pragma unroll
            for (int i = 0; i < kRanks; ++i) {
                if (quarter + 4 * i < kRank) mine.rank[row][quarter + 4 * i] = raw.ranks.get(i);
            }
        }
        __syncwarp();
        float s[kRun];
        if constexpr (kRank == 0) {
#pragma unroll
            for (int i = 0; i < kRun; ++i) s[i] = raw.dt.get(i);
        } else {
#pragma unroll
            for (int i = 0; i < kRun; ++i) s[i] = 0.f;
#pragma unroll 4
            for (int r = 0; r < kRank; ++r) {
                const float value = mine.rank[row][r];
#pragma unroll
                for (int i = 0; i < kRun; ++i) s[i] = fmaf(mine.weight[r][run + i], value, s[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            s[i] += mine.bias[run + i];
            if (kSoftplus) s[i] = softplus<sizeof(DT_TYPE) == 4>(s[i]);
            if (raw.token == -2) s[i] = 0.f;  // past the end the state stays as it is
            mine.steps[row][run + i] = make_float2(s[i], s[i] * raw.x.get(i));
        }
        const Pack<X_TYPE, kRun> x_now = raw.x;
        const int token = raw.token;
        fetch(raw, next);
        next = token_of(start + 2 * kTile + row);
        __syncwarp();

        if (p.saved && start % kCheckpoint == 0) {
            const long long checkpoints = (steps + kCheckpoint - 1) / kCheckpoint;
            float* at = p.saved + (sequence * checkpoints + start / kCheckpoint) * channels * kRow + q * kStates;
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
                const int channel = first + group + (slot ^ j);
                if (channel < channels) put<kStates>(at + (long long)channel * kRow, h[j]);
            }
        }

        // Results wait in registers: a store between the steps would hold back the next step's loads.
        float results[kTile];
#pragma unroll
        for (int t = 0; t < kTile; ++t) {
            float b[kStates], c[kStates], sum[kSlots];
#pragma unroll
            for (int n = 0; n < kStates; ++n) {
                b[n] = mine.B[t][q * kStates + n];
                c[n] = mine.C[t][q * kStates + n];
            }
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
                const float2 step = mine.steps[t][group + (slot ^ j)];
                sum[j] = 0.f;
#pragma unroll
                for (int n = 0; n < kStates; ++n) {
                    h[j][n] = fmaf(ex2(step.x * A[j][n]), h[j][n], step.y * b[n]);
                    sum[j] = fmaf(c[n], h[j][n], sum[j]);
                }
            }
            float mine_y = sum[0];
#pragma unroll
            for (int j = 1; j < kSlots; ++j) mine_y += __shfl_xor_sync(kAll, sum[j], j);
#pragma unroll
            for (int offset = kSlots; offset < kLanes; offset *= 2) {
                mine_y += __shfl_xor_sync(kAll, mine_y, offset);
            }
            results[t] = mine_y;
        }
        if (kSlots == kLanes || q < kSlots) {
#pragma unroll
            for (int t = 0; t < kTile; ++t) mine.y[t][group + slot] = results[t];
        }
        __syncwarp();

        if (token >= 0) {
            float out[kRun];
            Pack<Y_TYPE, kRun> packed;
#pragma unroll
            for (int i = 0; i < kRun; ++i) out[i] = fmaf(mine.D[run + i], x_now.get(i), mine.y[row][run + i]);
            packed.set(out);
            store<kVectorX>(packed, y + (long long)token * (int)p.y_l, (int)p.y_d, valid);
        }
    }

    if (p.last_state) {
#pragma unroll
        for (int j = 0; j < kSlots; ++j) {
            const int channel = first + group + (slot ^ j);
#pragma unroll
            for (int n = 0; n < kStates; ++n) {
                const int state = q * kStates + n;
                if (channel < channels && state < states) {
                    p.last_state[(sequence * channels + channel) * states + state] = h[j][n];
                }
            }
        }
    }
}
