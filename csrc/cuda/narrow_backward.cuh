// narrow_backward.cuh: gradients of the scan of narrow_forward.cuh; the equations are at the head of wide_backward.cuh.
//
// Chunks go by from the last. The state before a chunk was saved; states inside it come from joining the segments'
// maps forwards, gradients of the state from joining g -> a g + c backwards, at the same barrier. dB and dC are summed
// over the block's channels by exchanges and leave as one partial result a block; what belongs to a channel is summed
// over time in registers and over lanes and warps at the end of a route. Gradients of a low-rank step size and of its
// weights are products of what the lanes hold already, in the high and low halves of the step size's gradient.
#include "narrow.cuh"

constexpr int kRankTiles = (kRank + 7) / 8;
constexpr int kSums = 48 + (kTensor ? kRankTiles * 128 : 0);  // of a warp, at the end of a route

struct alignas(16) BlockMemory {
    float2 totals[2][kMaxWarps][kChannels];       // a warp's joined map (a, b), of two chunks in turn
    float2 totals_back[2][kMaxWarps][kChannels];  // and that of gradients, (a, c)
    float carry[2][kChannels];                    // the gradient behind the chunk
    float sums[kMaxWarps][kSums];                 // of dA, dD and the bias by channel, then of the weights
    Shelf shelves[kMaxWarps];
    float4 sum[1];  // (tokens, 16), where routes are added up
};
extern "C" __device__ int launch_shape[2] = {0, (int)sizeof(BlockMemory)};
extern "C" __device__ const uint4 nothing = {0, 0, 0, 0};  // a dy of zeros, for channels that are not there

// Derivative of the step size at v in its own units, from s: log2(e) (1 - 2^-s), by its series where that would cancel.
DEVICE float slope(float s) {
    if constexpr (!kSoftplus) return kPerUnit;
    if constexpr (kExact) return softplus_slope(s);
    const float series = s * fmaf(s, fmaf(s, fmaf(s, -kLn2 * kLn2 * kLn2 / 24, kLn2 * kLn2 / 6), -kLn2 / 2), 1.f);
    return s < 0.09f ? series : fmaf(-kLog2e, ex2(-s), kLog2e);
}

extern "C" __global__ void __launch_bounds__(32 * kMaxWarps, MIN_BLOCKS) narrow_backward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    BlockMemory& block = *reinterpret_cast<BlockMemory*>(shared);
    char* sum = reinterpret_cast<char*>(block.sum);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int quad = lane & 3, segment = lane >> 2;
    const int channels = (int)p.channels, steps = (int)p.steps;
    const int blocks = (channels + kChannels - 1) / kChannels, tile = blockIdx.x % blocks;
    const int first = tile * kChannels + 4 * quad, valid = channels - first;
    // Lanes below 16 join the warps' maps of states, the others those of gradients, each for one channel.
    const int channel = tile * kChannels + lane % kChannels;
    const bool backwards = lane >= kChannels, in_range = channel < channels;
    const int from = kMerge ? 0 : blockIdx.x / blocks % (int)p.routes, to = kMerge ? (int)p.routes : from + 1;
    const long long batch = kMerge ? blockIdx.x / blocks : blockIdx.x / blocks / (int)p.routes;
    const int chunk_steps = warps * kWarpSteps, chunks = (steps + chunk_steps - 1) / chunk_steps;
    Shelf& shelf = block.shelves[warp];
    OwnSteps own = {lane};

    struct Round {  // a chunk of a route; past the last one it stays within the route's table
        int route, chunk;
    };
    auto after = [&](Round r) {
        if (--r.chunk < 0) r.chunk = chunks - 1, r.route = min(r.route + 1, to - 1);
        return r;
    };
    auto fetch_tokens = [&](Round r) {
        own.fetch_tokens(p.indices + (long long)r.route * steps, r.chunk * chunk_steps + warp * kWarpSteps, steps);
    };
    // Where the tensors lie for the route that is being read.
    Place at_x, at_dy, at_dt, at_B, at_C;
    auto turn_to = [&](int route) {
        at_x = place_of<X_TYPE>(p.x, batch, p.x_b, route, p.x_k, p.x_l, p.x_d, first, valid);
        at_dy = place_of<Y_TYPE>(p.dy, batch, p.dy_b, route, p.dy_k, p.dy_l, p.dy_d, first, valid);
        if (!p.dy || valid <= 0) at_dy = {(unsigned long long)&nothing, 0, 0, 0};
        at_dt = place_of<DT_TYPE>(p.dt, batch, p.dt_b, route, p.dt_k, p.dt_l, p.dt_d, kRank ? 2 * quad : first,
                                  kRank ? kRank - 2 * quad : valid);
        at_B = place_of<B_TYPE>(p.B, batch, p.B_b, route, p.B_k, p.B_l, 0, 0, 1);
        at_C = place_of<C_TYPE>(p.C, batch, p.C_b, route, p.C_k, p.C_l, 0, 0, 1);
    };
    auto read_dy = [&](int token) {
        Pack<Y_TYPE, 4> dy = read<Y_TYPE, 4>(at_dy, token);
        if constexpr (!kVector) {  // channels past the last have no share in dB and dC
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (j < valid) continue;
                if constexpr (sizeof(Y_TYPE) == 4) dy.words[j] = 0;
                else dy.words[j / 2] &= j % 2 ? 0xffffu : 0xffff0000u;
            }
        }
        return dy;
    };
    auto behind = [&](int route) {
        const long long at = (batch * p.routes + route) * channels + channel;
        return p.dlast_state && in_range ? p.dlast_state[at] : 0.f;
    };

    // What the lane has read of the chunk to come; its tokens must be on the shelf already.
    Pack<X_TYPE, 4> x[kSteps];
    Pack<Y_TYPE, 4> dy[kSteps];
    Pack<DT_TYPE, 4> dt[kRank ? 1 : kSteps];
    Ranks ranks;
    float A[4], D[4], bias[4], dA[4], dD[4], dbias[4];
    float dweight[kTensor ? kRankTiles : 1][4];
    Weights weights;
    unsigned turned_high[kTensor ? kRankTiles : 1][2], turned_low[kTensor ? kRankTiles : 1][2];  // depth: channels
    auto enter = [&](int route) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const bool there = j < valid;
            const long long at = (long long)route * channels + first + j;
            A[j] = there ? p.A[at] * kDecay : 0.f;
            D[j] = there && p.D ? p.D[at] : 0.f;
            bias[j] = there && p.dt_bias ? p.dt_bias[at] * kPerUnit : 0.f;
            dA[j] = dD[j] = dbias[j] = 0.f;
        }
        if constexpr (kTensor) {
            weights.read(p, route, tile, lane);
#pragma unroll
            for (int ranks_of = 0; ranks_of < kRankTiles; ++ranks_of) {
                const int rank = 8 * ranks_of + segment;
                float w[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    w[j] = j < valid && rank < kRank ? p.dt_weight[((long long)route * channels + first + j) * kRank + rank] : 0.f;
                    dweight[ranks_of][j] = 0.f;
                }
                split(w[0], w[1], turned_high[ranks_of][0], turned_low[ranks_of][0]);
                split(w[2], w[3], turned_high[ranks_of][1], turned_low[ranks_of][1]);
            }
        }
    };
    // The end of a route, seen by all after the next barrier: what belongs to a channel, summed over the warps.
    auto leave = [&](int route) {
        const long long sequence = batch * p.routes + route;
        for (int i = threadIdx.x; i < kSums; i += blockDim.x) {
            float total = 0.f;
#pragma unroll 1
            for (int w = 0; w < warps; ++w) total += block.sums[w][i];
            if (i < 48) {
                float* result = i < 16 ? p.dA : i < 32 ? p.dD : p.ddt_bias;
                const int c = tile * kChannels + i % 16;
                if (result && c < channels) result[sequence * channels + c] = i < 16 ? total * kUnit : total;
            } else {
                const int n = (i - 48) % 128 / 8, c = tile * kChannels + channel_of(n % 8, n / 8);
                const int rank = (i - 48) / 128 * 8 + i % 8;
                if (c < channels && rank < kRank) p.ddt_weight[(sequence * channels + c) * kRank + rank] = total;
            }
        }
    };

    Round now = {from, chunks - 1}, next = after(now);
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
            dy[t] = read_dy(tokens[t]);
            if constexpr (kRank == 0) dt[t] = read<DT_TYPE, 4>(at_dt, tokens[t]);
        }
        if constexpr (kTensor) ranks.read(at_dt, tokens, lane);
    }
    if (kMerge) clear_sum(sum, (int)p.tokens);
    if (warp == 0 && backwards) block.carry[0][lane % kChannels] = behind(from);

    const int rounds = (to - from) * chunks;
    for (int round = 0; round < rounds; ++round) {
        const int turn = round & 1;
        const long long sequence = batch * p.routes + now.route;
        const Round second = after(next);
        const bool there = now.chunk * chunk_steps + warp * kWarpSteps + segment * kSteps < steps;  // the first step
        if (now.chunk == chunks - 1) enter(now.route);

        // What the shelf gets at the end of the round.
        if (next.chunk == chunks - 1) turn_to(next.route);
        int tokens_ahead[kOwn];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) tokens_ahead[i] = own.ahead[i];
        own.fetch_weights(at_B, at_C, tokens_ahead);
        fetch_tokens(second);
        // The state before the chunk, or the gradient behind it, is joined with those of the warps.
        float joined = 0.f;
        if (!backwards && in_range) joined = __ldg(p.saved + (sequence * chunks + now.chunk) * channels + channel);

        float s[kSteps][4], a[kSteps][4], state[kSteps][4], h[4], g[4];
        float2 BC[kSteps];
        read_row(BC, shelf.weights[segment]);
        {
            float total_a[4], total_b[4], total_c[4], total_d[4];
            {
                int tokens[kSteps], tokens_next[kSteps];
                read_row(tokens_next, shelf.tokens[turn ^ 1][segment]);
                read_row(tokens, shelf.tokens[turn][segment]);
                weights.step_sizes(s, bias, ranks, tokens, p, batch, now.route, first, valid);
#pragma unroll
                for (int t = 0; t < kSteps; ++t) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float v = step_size(kRank ? s[t][j] : fmaf(dt[kRank ? 0 : t].get(j), kPerUnit, bias[j]));
                        s[t][j] = (kWhole ? there : tokens[t] != -2) ? v : 0.f;
                        a[t][j] = decay(s[t][j], A[j]);
                        const float b = s[t][j] * (x[t].get(j) * BC[t].x);
                        total_b[j] = t ? fmaf(a[t][j], total_b[j], b) : b;
                        total_a[j] = t ? total_a[j] * a[t][j] : a[t][j];
                    }
                    if constexpr (kRank == 0) dt[t] = read<DT_TYPE, 4>(at_dt, tokens_next[t]);
                }
            }
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                total_c[j] = 0.f, total_d[j] = total_a[j];
#pragma unroll
                for (int t = kSteps - 1; t >= 0; --t) total_c[j] = a[t][j] * fmaf(BC[t].y, dy[t].get(j), total_c[j]);
            }

            // Join the segments, states forwards and gradients backwards.
            float before_a[4], before_b[4], behind_a[4], behind_c[4];
            join<false>(total_a, total_b, before_a, before_b, lane);
            join<true>(total_d, total_c, behind_a, behind_c, lane);
            if (segment == kSegments - 1) {
                float4* totals = reinterpret_cast<float4*>(block.totals[turn][warp] + 4 * quad);
                totals[0] = make_float4(total_a[0], total_b[0], total_a[1], total_b[1]);
                totals[1] = make_float4(total_a[2], total_b[2], total_a[3], total_b[3]);
            }
            if (segment == 0) {
                float4* totals = reinterpret_cast<float4*>(block.totals_back[turn][warp] + 4 * quad);
                totals[0] = make_float4(total_d[0], total_c[0], total_d[1], total_c[1]);
                totals[1] = make_float4(total_d[2], total_c[2], total_d[3], total_c[3]);
            }
            __syncthreads();
            if (now.chunk == chunks - 1 && now.route > from) {
                leave(now.route - 1);
                if (chunks == 1) __syncthreads();  // this round ends a route too
            }
            if (backwards) joined = block.carry[turn][lane % kChannels];
            const float2* total = backwards ? block.totals_back[turn][warps - 1] : block.totals[turn][0];
            total += lane % kChannels;
            const int count = backwards ? warps - 1 - warp : warp, stride = backwards ? -kChannels : kChannels;
#pragma unroll 2
            for (int w = 0; w < count; ++w, total += stride) joined = fmaf(total->x, joined, total->y);
            if (warp == 0 && backwards) {
                const float through = fmaf(total->x, joined, total->y);
                if (now.chunk == 0 && p.dinitial_state && in_range) p.dinitial_state[sequence * channels + channel] = through;
                block.carry[turn ^ 1][lane % kChannels] = now.chunk ? through : behind(next.route);
            }
            __syncwarp();
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                h[j] = fmaf(before_a[j], __shfl_sync(kAll, joined, 4 * quad + j), before_b[j]);
                g[j] = fmaf(behind_a[j], __shfl_sync(kAll, joined, kChannels + 4 * quad + j), behind_c[j]);
            }
        }

        // Through the segment forwards for the states, backwards for the gradients. What is read of the next chunk takes
        // the place of what is used up.
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                state[t][j] = h[j];
                h[j] = fmaf(a[t][j], h[j], s[t][j] * (x[t].get(j) * BC[t].x));
            }
        }
        float sums[16];  // dB and dC of a step, of the next ...
        float (*dx_out)[4] = a, (*ddt_out)[4] = s;  // take the place of what is used up
        int tokens[kSteps];
        read_row(tokens, shelf.tokens[turn ^ 1][segment]);
        sums[14] = sums[15] = 0.f;
#pragma unroll
        for (int t = kSteps - 1; t >= 0; --t) {
            float dB = 0.f, dC = 0.f;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float u = x[t].get(j), out = dy[t].get(j), step = s[t][j];
                g[j] = fmaf(BC[t].y, out, g[j]);
                const float after = t + 1 < kSteps ? state[t + 1 < kSteps ? t + 1 : 0][j] : h[j], gb = g[j] * BC[t].x;
                dB = fmaf(g[j], step * u, dB);
                dC = fmaf(out, after, dC);
                g[j] *= a[t][j];
                const float product = g[j] * state[t][j];
                dx_out[t][j] = fmaf(step, gb, D[j] * out);
                float ds = fmaf(u, gb, product * (A[j] * kLn2)) * slope(step);
                if (!kSoftplus && step == 0.f) ds = 0.f;  // a step past the end
                ddt_out[t][j] = ds;
                dA[j] = fmaf(product, step, dA[j]);
                if (!kWhole || there) dD[j] = fmaf(out, u, dD[j]);
                dbias[j] += ds;
            }
            sums[2 * t] = dB * kUnit, sums[2 * t + 1] = dC;
            x[t] = read<X_TYPE, 4>(at_x, tokens[t]);
            dy[t] = read_dy(tokens[t]);
        }
        if constexpr (kMerge) {
            if (!kWhole || there) add_to_sum(sum, shelf.places[turn][segment], shelf.tokens[turn][segment], lane, dx_out);
        }
        reduce_scatter<16, 2, 1>(sums, lane);
        read_row(tokens, shelf.tokens[turn][segment]);
        if (!kWhole || there) {
            if constexpr (!kTensor) {
                write_steps<DDT_TYPE>(p.ddt, batch * p.ddt_b + now.route * p.ddt_k + first * p.ddt_d, (int)p.ddt_l,
                                      (int)p.ddt_d, tokens, ddt_out, valid);
            }
            if constexpr (!kMerge) {
                write_steps<DX_TYPE>(p.dx, batch * p.dx_b + now.route * p.dx_k + first * p.dx_d, (int)p.dx_l, (int)p.dx_d,
                                     tokens, dx_out, valid);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int t = owned_from<16, 2, 1>(lane) / 2 + i;
                const int step = now.chunk * chunk_steps + warp * kWarpSteps + segment * kSteps + t;
                if (t < kSteps && step < steps) {
                    const long long at = ((tile * p.batch + batch) * p.routes + now.route) * steps + step;
                    reinterpret_cast<float2*>(p.dBC)[at] = make_float2(sums[2 * i], sums[2 * i + 1]);
                }
            }
        }
        if constexpr (kTensor) {
            const long long base = (tile * p.batch + batch) * p.tokens * p.routes + now.route;
#pragma unroll
            for (int i = 0; i < kProducts; ++i) {
                // Halves of two steps' gradients: rows are tokens, the depth is channels; and turned, the other way round.
                unsigned high[4], low[4], turned[4], turned_rest[4];
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    const int t = 2 * i + n % 2, pair = n / 2 * 2;
                    if (t < kSteps) split(ddt_out[t < kSteps ? t : 0][pair], ddt_out[t < kSteps ? t : 0][pair + 1], high[n], low[n]);
                    else high[n] = low[n] = 0;
                    const int to_place = n % 2 * 2 + n / 2;
                    turned[to_place] = transpose(high[n]), turned_rest[to_place] = transpose(low[n]);
                }
#pragma unroll
                for (int ranks_of = 0; ranks_of < kRankTiles; ++ranks_of) {
                    const unsigned* columns = ranks.words[i][ranks_of / 2] + ranks_of % 2 * 2;
                    const unsigned columns_turned[2] = {transpose(columns[0]), transpose(columns[1])};
                    multiply_add(dweight[ranks_of], turned, columns_turned);
                    multiply_add(dweight[ranks_of], turned_rest, columns_turned);
                    float out[4] = {0.f, 0.f, 0.f, 0.f};
                    multiply_add(out, high, turned_high[ranks_of]);
                    multiply_add(out, low, turned_high[ranks_of]);
                    multiply_add(out, high, turned_low[ranks_of]);
                    const int rank = 8 * ranks_of + 2 * quad;
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const int t = 2 * i + j;
                        if (t < kSteps && (kWhole ? there : tokens[t < kSteps ? t : 0] >= 0)) {
                            Pack<DDT_TYPE, 2> packed;
                            packed.set(out + 2 * j);
                            store<kRank % 2 == 0>(packed, (DDT_TYPE*)p.ddt +
                                (base + (long long)tokens[t < kSteps ? t : 0] * (int)p.routes) * kRank + rank, 1, kRank - rank);
                        }
                    }
                }
            }
            read_row(tokens, shelf.tokens[turn ^ 1][segment]);
            ranks.read(at_dt, tokens, lane);
        }

        if (now.chunk == 0) {
            // The end of a route: sum what belongs to a channel over the segments.
#pragma unroll
            for (int i = 0; i < 12; ++i) {
                float v = i < 4 ? dA[i] : i < 8 ? dD[i - 4] : dbias[i - 8];
#pragma unroll
                for (int offset = 4; offset < 32; offset *= 2) v += __shfl_xor_sync(kAll, v, offset);
                if (segment == 0) block.sums[warp][i / 4 * 16 + 4 * quad + i % 4] = v;
            }
            if constexpr (kTensor) {
#pragma unroll
                for (int ranks_of = 0; ranks_of < kRankTiles; ++ranks_of) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {  // rows of the product: channels, first those of one half
                        block.sums[warp][48 + ranks_of * 128 + (segment + i / 2 * 8) * 8 + 2 * quad + i % 2] =
                            dweight[ranks_of][i];
                    }
                }
            }
        }
        __syncwarp();
        own.put_tokens(shelf, turn);
        own.put_weights(shelf, tokens_ahead);
        __syncwarp();
        now = next, next = second;
    }

    __syncthreads();
    leave(to - 1);
    if constexpr (kMerge) {
        write_sum<DX_TYPE>(sum, (DX_TYPE*)p.dx + batch * p.dx_b, (int)p.dx_l, (int)p.dx_d, (int)p.tokens,
                           tile * kChannels, channels);
    }
}
