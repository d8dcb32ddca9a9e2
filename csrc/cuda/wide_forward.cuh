// wide_forward.cuh: h_t = exp(s_t A) h_{t-1} + s_t B_t x_t, y_t = <C_t, h_t> + D x_t, for several states a channel.
//
// Grid: a block = one (b, k) and kBlockChannels channels, a warp = kWarpChannels of them, walking the route's steps in
// tiles (see wide_stage.cuh). Lane (group, q), q in the low bits, holds states q kStates.. of kSlots channels in registers,
// float32. The scan proper touches shared memory and registers alone, whatever the formats and strides.
// <C_t, h_t>: on the tensor cores where y has few digits, eight steps' C at a time: A = h, a row a channel, B = C, a
// column a step, of which column t is right for step t. Else slot j of lane q is channel j ^ q of its group, so that a
// lane gets the sum of its own channel's y by kSlots - 1 exchanges and no selection.
#pragma once
constexpr int kFirstSegment = 0;  // of those whose ends are wanted
#include "wide_stage.cuh"

constexpr int kHalf = kTile / 2;
constexpr int kYPitch = kBlockChannels + 4;
#if __CUDA_ARCH__ >= 800
constexpr bool kTensorY = TENSOR_Y && kLanes == 4 && kStates % 2 == 0 && kSlots <= 2;
#else
constexpr bool kTensorY = false;
#endif

struct alignas(16) BlockMemory {
    Stage stage;
    float y[kTile][kYPitch];
};
extern "C" __device__ int launch_shape[2] = {kThreads, (int)sizeof(BlockMemory)};

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) wide_forward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    BlockMemory& block = *reinterpret_cast<BlockMemory*>(shared);
    Stage& stage = block.stage;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const Source from(p);
    const int channels = from.channels, steps = from.steps, states = from.states, run = from.run;
    Y_TYPE* y = (Y_TYPE*)p.y + from.batch * p.y_b + from.route * p.y_k + (from.first + run) * p.y_d;

    const int q = lane % kLanes, group = lane / kLanes;
    int places[kSlots];  // of the slots' channels in the block
    float A[kSlots][kStates], h[kSlots][kStates];
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
        places[j] = warp * kWarpChannels + (kTensorY ? j : (j ^ q) & (kSlots - 1)) * kGroups + group;
        const int channel = from.first + places[j];
#pragma unroll
        for (int n = 0; n < kStates; ++n) {
            const int state = q * kStates + n;
            const bool there = channel < channels && state < states;
            const long long at = (long long)channel * states + state;
            A[j][n] = there ? p.A[(long long)from.route * channels * states + at] * kLog2e : 0.f;
            const bool given = there && p.initial_state && from.segment == 0;
            h[j][n] = given ? p.initial_state[from.sequence * channels * states + at] : 0.f;
        }
        if constexpr (kPass == 2) from.join(p, h[j], A[j], places[j], q * kStates, 0, from.segment, 1);
    }
    float span[kSlots] = {};
    from.prepare(stage, p);

    Incoming in;
    auto unpack = [&](int tile) {
        in.unpack<false>(from, p, stage, tile, stage.su, [](int, int) { return 0.f; });
    };
    if (threadIdx.x < 2 * kTile) {
        const int tile = from.first_tile + threadIdx.x / kTile, step = threadIdx.x % kTile;
        stage.tokens[tile & 3][step] = from.token_at(tile * kTile + step);
    }
    __syncthreads();
    in.fetch(from, p, stage.tokens[from.first_tile & 3]);
    unpack(from.first_tile);
    for (int tile = from.first_tile; tile < from.last_tile; ++tile) {
        const int* tokens = stage.tokens[tile & 3];
        const bool more = tile + 1 < from.last_tile;
        int ahead = 0;
        if (threadIdx.x < kTile) ahead = from.token_at((tile + 2) * kTile + threadIdx.x);
        Pack<X_TYPE, kRun> x_now[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) x_now[r] = in.x[r];
        __syncthreads();
        in.multiply_rank(from, stage, tile, stage.su);
        if (more) in.fetch(from, p, stage.tokens[tile + 1 & 3]);

        if (kPass != 1 && p.saved) {
            float* at = p.saved + (from.sequence * from.tiles + tile) * channels * kRow + q * kStates;
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
                const int channel = from.first + places[j];
                if (channel < channels) put<kStates>(at + (long long)channel * kRow, h[j]);
            }
        }
#pragma unroll 1
        for (int start = 0; start < kTile && tile * kTile + start < steps; start += kHalf) {
            // Results wait in registers: a store between the steps would hold back the next step's loads.
            float results[kTensorY ? 2 * kSlots : kHalf];
            float c_steps[kTensorY ? kStates : 1];
            if constexpr (kTensorY) get<kStates>(c_steps, stage.rows[start + lane / 4] + kRow + q * kStates);
#pragma unroll
            for (int t = 0; t < kHalf; ++t) {
                float b[kStates];
                get<kStates>(b, stage.rows[start + t] + q * kStates);
#pragma unroll
                for (int j = 0; j < kSlots; ++j) {
                    const float2 su = stage.su[start + t][places[j]];
#pragma unroll
                    for (int n = 0; n < kStates; ++n) h[j][n] = fmaf(decay(su.x, A[j][n]), h[j][n], su.y * b[n]);
                    if (kPass == 1) span[j] += su.x;
                }
                if (kPass == 1) continue;
                if constexpr (kTensorY) {
                    float d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
                    for (int n = 0; n < kStates; n += 2) {
                        constexpr int kOther = kSlots - 1;
                        multiply_add_tf32(d, h[0][n], kSlots > 1 ? h[kOther][n] : 0.f, h[0][n + 1],
                                          kSlots > 1 ? h[kOther][n + 1] : 0.f, c_steps[n], c_steps[n + 1]);
                    }
                    // Lane q has the columns of steps 2q and 2q + 1.
#pragma unroll
                    for (int j = 0; j < kSlots; ++j) {
                        results[2 * j + t % 2] = t < 2 || q == t / 2 ? d[2 * j + t % 2] : results[2 * j + t % 2];
                    }
                } else {
                    float c[kStates], sum[kSlots];
                    get<kStates>(c, stage.rows[start + t] + kRow + q * kStates);
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
            }
            if (kPass == 1) continue;
            if constexpr (kTensorY) {
#pragma unroll
                for (int i = 0; i < 2 * kSlots; ++i) {
                    block.y[start + 2 * q + i % 2][places[i / 2]] = results[i] * kTruncated;
                }
            } else if (kSlots == kLanes || q < kSlots) {
#pragma unroll
                for (int t = 0; t < kHalf; ++t) block.y[start + t][places[0]] = results[t];
            }
        }
        if (threadIdx.x < kTile) stage.tokens[tile + 2 & 3][threadIdx.x] = ahead;
        __syncthreads();

#pragma unroll
        for (int r = 0; r < (kPass == 1 ? 0 : kRows); ++r) {
            const int row = own_row(r), token = tokens[row];
            float out[kRun], skip[kRun];
            get<kRun>(out, block.y[row] + run);
            get<kRun>(skip, stage.D + run);
#pragma unroll
            for (int i = 0; i < kRun; ++i) out[i] = fmaf(skip[i], x_now[r].get(i), out[i]);
            if (token >= 0) {
                Pack<Y_TYPE, kRun> packed;
                packed.set(out);
                store<kVectorX>(packed, at_token(y, token, p.y_l), (int)p.y_d, from.valid);
            }
        }
        if (more) unpack(tile + 1);
    }

    if constexpr (kPass == 1) {
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
