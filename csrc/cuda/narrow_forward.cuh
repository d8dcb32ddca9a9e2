// narrow_forward.cuh: h_t = exp(s_t A) h_{t-1} + s_t B_t x_t, y_t = C_t h_t + D x_t, for one state a channel.
#include "narrow.cuh"

struct alignas(16) BlockMemory {
    float4 totals[2][kMaxWarps][kChannels / 2];  // a warp's joined map (a, b) of both channels, of two chunks in turn
    float carry[2][kChannels];                   // the state before the chunk
    float sum[1];                                // (tokens, 16), where routes are added up
};
extern "C" __device__ int launch_shape[2] = {0, (int)sizeof(BlockMemory)};  // threads, and rows of the sum, come later

// What a lane has read of a chunk.
struct Raw {
    int tokens[kSteps];  // -1 = a padding step, -2 = past the end
    Pack<X_TYPE, 2> x[kSteps];
    Pack<DT_TYPE, 2> dt[kRank ? 1 : kSteps];
    unsigned ranks[kTensor ? kProducts * kDepth * 2 : 1];
    Pack<B_TYPE, 1> B[kSteps];
    Pack<C_TYPE, 1> C[kSteps];
};

extern "C" __global__ void __launch_bounds__(32 * kMaxWarps, MIN_BLOCKS) narrow_forward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    BlockMemory& block = *reinterpret_cast<BlockMemory*>(shared);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int q = lane & 3, pair = lane >> 2;
    const int channels = (int)p.channels, steps = (int)p.steps;
    const int blocks = (channels + kChannels - 1) / kChannels;
    const int first = blockIdx.x % blocks * kChannels + 2 * pair, valid = channels - first;
    const int from = kMerge ? 0 : blockIdx.x / blocks % (int)p.routes, routes = kMerge ? (int)p.routes : 1;
    const long long batch = kMerge ? blockIdx.x / blocks : blockIdx.x / blocks / (int)p.routes;
    const int chunk_steps = 4 * warps * kSteps, chunks = (steps + chunk_steps - 1) / chunk_steps;
    const int rounds = routes * chunks, own_step = (warp * 4 + q) * kSteps;

    auto fetch_tokens = [&](int* tokens, int route, int chunk) {
        const int start = chunk * chunk_steps + own_step;
        const int* table = p.indices + (long long)min(route, from + routes - 1) * steps;
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
            const int step = start + t;
            const int token = __ldg(table + min(step, steps - 1));
            tokens[t] = step < steps ? token : -2;
        }
    };
    // The lane's tokens must be in place already.
    auto fetch = [&](Raw& raw, int route) {
        const Place x = place_of<X_TYPE>(p.x, batch, p.x_b, route, p.x_k, p.x_l, p.x_d, first, valid);
        const Place B = place_of<B_TYPE>(p.B, batch, p.B_b, route, p.B_k, p.B_l, 0, 0, 1);
        const Place C = place_of<C_TYPE>(p.C, batch, p.C_b, route, p.C_k, p.C_l, 0, 0, 1);
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
            raw.x[t] = read<X_TYPE, 2>(x, raw.tokens[t]);
            raw.B[t] = read<B_TYPE, 1>(B, raw.tokens[t]);
            raw.C[t] = read<C_TYPE, 1>(C, raw.tokens[t]);
        }
        if constexpr (kRank == 0) {
            const Place dt = place_of<DT_TYPE>(p.dt, batch, p.dt_b, route, p.dt_k, p.dt_l, p.dt_d, first, valid);
#pragma unroll
            for (int t = 0; t < kSteps; ++t) raw.dt[t] = read<DT_TYPE, 2>(dt, raw.tokens[t]);
        }
        if constexpr (kTensor) fetch_ranks(raw.ranks, raw.tokens, p, batch, route, lane);
    };

    float A[2], D[2], bias[2];
    Weights weights;
    auto enter = [&](int route) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const bool there = j < valid;
            const long long at = (long long)route * channels + first + j;
            A[j] = there ? p.A[at] * kLog2e : 0.f;
            D[j] = there && p.D ? p.D[at] : 0.f;
            bias[j] = there && p.dt_bias ? p.dt_bias[at] : 0.f;
        }
        weights.read(p, route, first, lane);
    };
    auto start_of = [&](int route, int j) {
        const long long at = ((batch * p.routes + route) * channels) + first + j;
        return p.initial_state && j < valid ? p.initial_state[at] : 0.f;
    };

    if (kMerge) {
        for (int i = threadIdx.x; i < (int)p.tokens * kChannels; i += blockDim.x) block.sum[i] = 0.f;
    }
    if (warp == 0 && q == 0) {
        block.carry[0][2 * pair] = start_of(from, 0);
        block.carry[0][2 * pair + 1] = start_of(from, 1);
    }
    int ahead[kSteps];
    Raw raw;
    int route = from, chunk = 0;                     // of this round
    int next_route = from, next_chunk = 0;           // of the round whose tokens were read last
    auto advance = [&](int& r, int& c) {
        if (++c == chunks) c = 0, ++r;
    };
    fetch_tokens(raw.tokens, from, 0);
    advance(next_route, next_chunk);
    fetch_tokens(ahead, next_route, next_chunk);
    fetch(raw, from);
    for (int round = 0; round < rounds; ++round, advance(route, chunk)) {
        const int turn = round & 1;
        const long long sequence = batch * p.routes + route;
        if (chunk == 0) enter(route);

        // Decays and inputs of the segment, and what it does to a state.
        float a[kSteps][2], b[kSteps][2], c[kSteps], total_a[2] = {1.f, 1.f}, total_b[2] = {0.f, 0.f};
        int tokens[kSteps];
        Pack<X_TYPE, 2> x[kSteps];
        weights.step_sizes(b, raw.ranks, raw.tokens, p, batch, route, first, valid);
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
            tokens[t] = raw.tokens[t], x[t] = raw.x[t], c[t] = raw.C[t].get(0);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float s = (kRank ? b[t][j] : raw.dt[kRank ? 0 : t].get(j)) + bias[j];
                if (kSoftplus) s = softplus<sizeof(DT_TYPE) == 4>(s);
                if (tokens[t] == -2) s = 0.f;
                a[t][j] = ex2(s * A[j]);
                b[t][j] = s * raw.x[t].get(j) * raw.B[t].get(0);
                total_b[j] = fmaf(a[t][j], total_b[j], b[t][j]);
                total_a[j] *= a[t][j];
            }
        }
        // The next chunk's loads travel while this one is joined.
#pragma unroll
        for (int t = 0; t < kSteps; ++t) raw.tokens[t] = ahead[t];
        if (round + 1 < rounds) fetch(raw, next_route);
        advance(next_route, next_chunk);
        fetch_tokens(ahead, next_route, next_chunk);

        float before_a[2], before_b[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int offset = 1; offset < 4; offset *= 2) {
                const float other_a = __shfl_up_sync(kAll, total_a[j], offset, 4);
                const float other_b = __shfl_up_sync(kAll, total_b[j], offset, 4);
                if (q >= offset) {
                    total_b[j] = fmaf(total_a[j], other_b, total_b[j]);
                    total_a[j] *= other_a;
                }
            }
            before_a[j] = __shfl_up_sync(kAll, total_a[j], 1, 4);
            before_b[j] = __shfl_up_sync(kAll, total_b[j], 1, 4);
            if (q == 0) before_a[j] = 1.f, before_b[j] = 0.f;
        }
        if (q == 3) block.totals[turn][warp][pair] = make_float4(total_a[0], total_b[0], total_a[1], total_b[1]);
        __syncthreads();
        float h[2] = {block.carry[turn][2 * pair], block.carry[turn][2 * pair + 1]};
        if (p.saved && warp == 0 && q == 0) {
            for (int j = 0; j < 2 && j < valid; ++j) {
                p.saved[(sequence * chunks + chunk) * channels + first + j] = h[j];
            }
        }
        for (int w = 0; w < warp; ++w) {
            const float4 total = block.totals[turn][w][pair];
            h[0] = fmaf(total.x, h[0], total.y);
            h[1] = fmaf(total.z, h[1], total.w);
        }
        if (warp == warps - 1 && q == 3) {
            const bool last = chunk == chunks - 1;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float after = fmaf(total_a[j], h[j], total_b[j]);
                if (last && p.last_state && j < valid) p.last_state[sequence * channels + first + j] = after;
                block.carry[turn ^ 1][2 * pair + j] = !last ? after : round + 1 < rounds ? start_of(route + 1, j) : 0.f;
            }
        }
        h[0] = fmaf(before_a[0], h[0], before_b[0]);
        h[1] = fmaf(before_a[1], h[1], before_b[1]);

        // Once more through the segment, now with the state it starts from.
        Y_TYPE* y = (Y_TYPE*)p.y + batch * p.y_b + route * p.y_k + first * p.y_d;
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
            float out[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                h[j] = fmaf(a[t][j], h[j], b[t][j]);
                out[j] = fmaf(c[t], h[j], D[j] * x[t].get(j));
            }
            if constexpr (kMerge) {
                add_to(block.sum + place(tokens[t], pair), out[0], out[1], tokens[t] >= 0);
            } else if (tokens[t] >= 0) {
                Pack<Y_TYPE, 2> packed;
                packed.set(out);
                store<kVector>(packed, y + (long long)tokens[t] * (int)p.y_l, (int)p.y_d, valid);
            }
        }
    }

    if constexpr (kMerge) {
        __syncthreads();
        write_sum<Y_TYPE>(block.sum, (Y_TYPE*)p.y + batch * p.y_b, (int)p.y_l, (int)p.y_d, (int)p.tokens,
                          blockIdx.x % blocks * kChannels, channels);
    }
}
