// narrow_forward.cuh: h_t = exp(s_t A) h_{t-1} + s_t B_t x_t, y_t = C_t h_t + D x_t, for one state a channel.
//
// A lane runs once through its segment from a state of 0, keeping y_t and C_t a_1 ... a_t; when the state h before the
// segment is known, y_t + C_t a_1 ... a_t h is the result. Nothing else of a step has to be kept.
#include "narrow.cuh"

struct alignas(16) BlockMemory {
    float2 totals[2][kMaxWarps][kChannels];  // a warp's joined map (a, b), of two chunks in turn
    float carry[2][kChannels];               // the state before the chunk
    Shelf shelves[kMaxWarps];
    float4 sum[1];  // (tokens, 16), where routes are added up
};
extern "C" __device__ int launch_shape[2] = {0, (int)sizeof(BlockMemory)};  // threads, and rows of the sum, come later

extern "C" __global__ void __launch_bounds__(32 * kMaxWarps, MIN_BLOCKS) narrow_forward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    BlockMemory& block = *reinterpret_cast<BlockMemory*>(shared);
    char* sum = reinterpret_cast<char*>(block.sum);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int quad = lane & 3, segment = lane >> 2;
    const int channels = (int)p.channels, steps = (int)p.steps;
    const int blocks = (channels + kChannels - 1) / kChannels, tile = blockIdx.x % blocks;
    const int first = tile * kChannels + 4 * quad, valid = channels - first;
    const int channel = tile * kChannels + lane;  // of the lanes that join the warps
    const bool joins = lane < kChannels;
    const int from = kMerge ? 0 : blockIdx.x / blocks % (int)p.routes, to = kMerge ? (int)p.routes : from + 1;
    const long long batch = kMerge ? blockIdx.x / blocks : blockIdx.x / blocks / (int)p.routes;
    const int chunk_steps = warps * kWarpSteps, chunks = (steps + chunk_steps - 1) / chunk_steps;
    Shelf& shelf = block.shelves[warp];
    OwnSteps own = {lane};

    struct Round {  // a chunk of a route; past the last one it stays within the route's table
        int route, chunk;
    };
    auto after = [&](Round r) {
        if (++r.chunk == chunks) r.chunk = 0, r.route = min(r.route + 1, to - 1);
        return r;
    };
    auto fetch_tokens = [&](Round r) {
        own.fetch_tokens(p.indices + (long long)r.route * steps, r.chunk * chunk_steps + warp * kWarpSteps, steps);
    };
    // Where the tensors lie for the route that is being read.
    Place at_x, at_dt, at_B, at_C;
    auto turn_to = [&](int route) {
        at_x = place_of<X_TYPE>(p.x, batch, p.x_b, route, p.x_k, p.x_l, p.x_d, first, valid);
        at_dt = place_of<DT_TYPE>(p.dt, batch, p.dt_b, route, p.dt_k, p.dt_l, p.dt_d, kRank ? 2 * quad : first,
                                  kRank ? kRank - 2 * quad : valid);
        at_B = place_of<B_TYPE>(p.B, batch, p.B_b, route, p.B_k, p.B_l, 0, 0, 1);
        at_C = place_of<C_TYPE>(p.C, batch, p.C_b, route, p.C_k, p.C_l, 0, 0, 1);
    };
    // What the lane has read of the chunk to come; its tokens must be on the shelf already.
    Pack<X_TYPE, 4> x[kSteps];
    Pack<DT_TYPE, 4> dt[kRank ? 1 : kSteps];
    Ranks ranks;

    float A[4], D[4], bias[4];
    Weights weights;
    auto enter = [&](int route) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const bool there = j < valid;
            const long long at = (long long)route * channels + first + j;
            A[j] = there ? p.A[at] * kDecay : 0.f;
            D[j] = there && p.D ? p.D[at] : 0.f;
            bias[j] = there && p.dt_bias ? p.dt_bias[at] * kPerUnit : 0.f;
        }
    };
    auto start_of = [&](int route) {
        const long long at = (batch * p.routes + route) * channels + channel;
        return p.initial_state && channel < channels ? p.initial_state[at] : 0.f;
    };

    Round now = {from, 0}, next = after(now);
    turn_to(from);
    fetch_tokens(now);
    own.put_tokens(shelf, 0);
    own.fetch_weights(at_B, at_C, own.ahead);
    own.put_weights(shelf, own.ahead);
    fetch_tokens(next);
    own.put_tokens(shelf, 1);
    __syncwarp();
    {
        int tokens[kSteps];
        read_row(tokens, shelf.tokens[0][segment]);
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
            x[t] = read<X_TYPE, 4>(at_x, tokens[t]);
            if constexpr (kRank == 0) dt[t] = read<DT_TYPE, 4>(at_dt, tokens[t]);
        }
        if constexpr (kTensor) ranks.read(at_dt, tokens, lane);
    }
    enter(from);
    weights.read(p, from, tile, lane);
    if (kMerge) clear_sum(sum, (int)p.tokens);
    if (warp == 0 && joins) block.carry[0][lane] = start_of(from);

    const int rounds = (to - from) * chunks;
    for (int round = 0; round < rounds; ++round) {
        const int turn = round & 1;
        const long long sequence = batch * p.routes + now.route;
        const Round second = after(next);
        const bool there = now.chunk * chunk_steps + warp * kWarpSteps + segment * kSteps < steps;  // the first step

        // What the shelf gets at the end of the round.
        if (next.chunk == 0) turn_to(next.route);
        int tokens_ahead[kOwn];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) tokens_ahead[i] = own.ahead[i];
        own.fetch_weights(at_B, at_C, tokens_ahead);
        fetch_tokens(second);

        // Through the segment from a state of 0. What is read of the next chunk takes the place of what is used up.
        float y[kSteps][4], through[kSteps][4], total_a[4], total_b[4];
        float2 BC[kSteps];
        int tokens[kSteps], tokens_next[kSteps];
        read_row(tokens_next, shelf.tokens[turn ^ 1][segment]);
        read_row(tokens, shelf.tokens[turn][segment]);
        read_row(BC, shelf.weights[segment]);
        weights.step_sizes(y, bias, ranks, tokens, p, batch, now.route, first, valid);
        if constexpr (kTensor) ranks.read(at_dt, tokens_next, lane);
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float s = step_size(kRank ? y[t][j] : fmaf(dt[kRank ? 0 : t].get(j), kPerUnit, bias[j]));
                if (!kWhole && tokens[t] == -2) s = 0.f;
                const float a = decay(s, A[j]), u = x[t].get(j), b = s * (u * BC[t].x);
                total_b[j] = t ? fmaf(a, total_b[j], b) : b;
                total_a[j] = t ? total_a[j] * a : a;
                y[t][j] = fmaf(BC[t].y, total_b[j], D[j] * u);
                through[t][j] = BC[t].y * total_a[j];
            }
            x[t] = read<X_TYPE, 4>(at_x, tokens_next[t]);
            if constexpr (kRank == 0) dt[t] = read<DT_TYPE, 4>(at_dt, tokens_next[t]);
        }
        if (next.chunk == 0) enter(next.route);

        float before_a[4], before_b[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (kWhole && !there) total_a[j] = 1.f, total_b[j] = 0.f;
        }
        join<false>(total_a, total_b, before_a, before_b, lane);
        if (segment == kSegments - 1) {
            float4* totals = reinterpret_cast<float4*>(block.totals[turn][warp] + 4 * quad);
            totals[0] = make_float4(total_a[0], total_b[0], total_a[1], total_b[1]);
            totals[1] = make_float4(total_a[2], total_b[2], total_a[3], total_b[3]);
        }
        __syncthreads();
        float h = 0.f;
        if (joins) {
            h = block.carry[turn][lane];
            if (p.saved && warp == 0 && channel < channels) p.saved[(sequence * chunks + now.chunk) * channels + channel] = h;
#pragma unroll 4
            for (int w = 0; w < warp; ++w) {
                const float2 total = block.totals[turn][w][lane];
                h = fmaf(total.x, h, total.y);
            }
            if (warp == warps - 1) {
                const float2 total = block.totals[turn][warp][lane];
                const float behind = fmaf(total.x, h, total.y);
                const bool last = now.chunk == chunks - 1;
                if (last && p.last_state && channel < channels) p.last_state[sequence * channels + channel] = behind;
                block.carry[turn ^ 1][lane] = last ? start_of(next.route) : behind;
            }
        }
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float start = fmaf(before_a[j], __shfl_sync(kAll, h, 4 * quad + j), before_b[j]);
#pragma unroll
            for (int t = 0; t < kSteps; ++t) y[t][j] = fmaf(through[t][j], start, y[t][j]);
        }
        if (!kWhole || there) {
            if constexpr (kMerge) {
                add_to_sum(sum, shelf.places[turn][segment], shelf.tokens[turn][segment], lane, y);
            } else {
                read_row(tokens, shelf.tokens[turn][segment]);
                write_steps<Y_TYPE>(p.y, batch * p.y_b + now.route * p.y_k + first * p.y_d, (int)p.y_l, (int)p.y_d, tokens, y,
                                    valid);
            }
        }
        __syncwarp();
        own.put_tokens(shelf, turn);
        own.put_weights(shelf, tokens_ahead);
        __syncwarp();
        if (kTensor && next.chunk == 0) weights.read(p, next.route, tile, lane);
        now = next, next = second;
    }

    if constexpr (kMerge) {
        __syncthreads();
        write_sum<Y_TYPE>(sum, (Y_TYPE*)p.y + batch * p.y_b, (int)p.y_l, (int)p.y_d, (int)p.tokens, tile * kChannels,
                          channels);
    }
}
