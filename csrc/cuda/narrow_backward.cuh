// narrow_backward.cuh: gradients of the scan of narrow_forward.cuh; the equations are at the head of wide_backward.cuh.
//
// Chunks go by from the last. The state before a chunk was saved; states inside it come from joining the segments'
// maps forwards, gradients of the state from joining g -> a g + c backwards, at the same barrier. dB and dC are summed
// over the block's channels by exchanges and leave as one partial result a block; what belongs to a channel is summed
// over time in registers and over lanes and warps at the end of a route. Gradients of a low-rank step size and of its
// weights are products of what the lanes hold already, in the high and low halves of the step size's gradient.
#include "narrow.cuh"

constexpr int kRankTiles = 2 * kDepth;  // of eight columns

struct alignas(16) BlockMemory {
    float4 totals[2][kMaxWarps][kChannels / 2];  // a warp's joined map (a, b) of both channels, of two chunks in turn
    float2 totals_back[2][kMaxWarps][kChannels / 2];  // and c of the map of gradients
    float carry[2][kChannels];                        // the gradient behind the chunk
    float scratch[kMaxWarps][kTensor ? kRankTiles * 128 + 48 : 48];
    float sum[1];  // (tokens, 16), where routes are added up
};
extern "C" __device__ int launch_shape[2] = {0, (int)sizeof(BlockMemory)};

extern "C" __global__ void __launch_bounds__(32 * kMaxWarps, MIN_BLOCKS) narrow_backward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    BlockMemory& block = *reinterpret_cast<BlockMemory*>(shared);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    const int q = lane & 3, pair = lane >> 2;
    const int channels = (int)p.channels, steps = (int)p.steps;
    const int blocks = (channels + kChannels - 1) / kChannels, tile = blockIdx.x % blocks;
    const int first = tile * kChannels + 2 * pair, valid = channels - first;
    const int from = kMerge ? 0 : blockIdx.x / blocks % (int)p.routes, routes = kMerge ? (int)p.routes : 1;
    const long long batch = kMerge ? blockIdx.x / blocks : blockIdx.x / blocks / (int)p.routes;
    const int chunk_steps = 4 * warps * kSteps, chunks = (steps + chunk_steps - 1) / chunk_steps;
    const int rounds = routes * chunks, own_step = (warp * 4 + q) * kSteps;

    auto token_at = [&](int route, int chunk, int t) {
        const int step = chunk * chunk_steps + own_step + t;
        const int token = __ldg(p.indices + (long long)min(route, from + routes - 1) * steps + min(step, steps - 1));
        return step < steps ? token : -2;
    };
    auto behind = [&](int route, int j) {
        const long long at = ((batch * p.routes + route) * channels) + first + j;
        return p.dlast_state && j < valid ? p.dlast_state[at] : 0.f;
    };

    if (kMerge) {
        for (int i = threadIdx.x; i < (int)p.tokens * kChannels; i += blockDim.x) block.sum[i] = 0.f;
    }
    if (warp == 0 && q == 0) {
        block.carry[0][2 * pair] = behind(from, 0);
        block.carry[0][2 * pair + 1] = behind(from, 1);
    }
    float A[2], D[2], bias[2], dA[2], dD[2], dbias[2];
    float dweight[kTensor ? kRankTiles : 1][4];
    Weights weights;
    int ahead[kSteps];
#pragma unroll
    for (int t = 0; t < kSteps; ++t) ahead[t] = token_at(from, chunks - 1, t);

    int route = from, chunk = chunks - 1;
    for (int round = 0; round < rounds; ++round) {
        const int turn = round & 1;
        const long long sequence = batch * p.routes + route;
        const Place x_at = place_of<X_TYPE>(p.x, batch, p.x_b, route, p.x_k, p.x_l, p.x_d, first, valid);
        const Place dy_at = place_of<Y_TYPE>(p.dy, batch, p.dy_b, route, p.dy_k, p.dy_l, p.dy_d, first, valid);
        const Place B_at = place_of<B_TYPE>(p.B, batch, p.B_b, route, p.B_k, p.B_l, 0, 0, 1);
        const Place C_at = place_of<C_TYPE>(p.C, batch, p.C_b, route, p.C_k, p.C_l, 0, 0, 1);

        int tokens[kSteps];
        Pack<X_TYPE, 2> x[kSteps];
        Pack<Y_TYPE, 2> dy[kSteps];
        Pack<DT_TYPE, 2> dt[kRank ? 1 : kSteps];
        Pack<B_TYPE, 1> B[kSteps];
        Pack<C_TYPE, 1> C[kSteps];
        unsigned ranks[kTensor ? kProducts * kDepth * 2 : 1];
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
            tokens[t] = ahead[t];
            x[t] = read<X_TYPE, 2>(x_at, tokens[t]);
            if (p.dy) dy[t] = read<Y_TYPE, 2>(dy_at, tokens[t]);
            else dy[t].clear();
            dy[t].keep(valid);  // channels past the last have no share in dB and dC
            B[t] = read<B_TYPE, 1>(B_at, tokens[t]);
            C[t] = read<C_TYPE, 1>(C_at, tokens[t]);
        }
        if constexpr (kRank == 0) {
            const Place dt_at = place_of<DT_TYPE>(p.dt, batch, p.dt_b, route, p.dt_k, p.dt_l, p.dt_d, first, valid);
#pragma unroll
            for (int t = 0; t < kSteps; ++t) dt[t] = read<DT_TYPE, 2>(dt_at, tokens[t]);
        }
        if constexpr (kTensor) fetch_ranks(ranks, tokens, p, batch, route, lane);
        const int next_chunk = chunk ? chunk - 1 : chunks - 1, next_route = chunk ? route : route + 1;
#pragma unroll
        for (int t = 0; t < kSteps; ++t) ahead[t] = token_at(next_route, next_chunk, t);
        float h[2], g[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            h[j] = j < valid ? __ldg(p.saved + (sequence * chunks + chunk) * channels + first + j) : 0.f;
        }
        if (chunk == chunks - 1) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const bool there = j < valid;
                const long long at = (long long)route * channels + first + j;
                A[j] = there ? p.A[at] * kLog2e : 0.f;
                D[j] = there && p.D ? p.D[at] : 0.f;
                bias[j] = there && p.dt_bias ? p.dt_bias[at] : 0.f;
                dA[j] = dD[j] = dbias[j] = 0.f;
            }
            weights.read(p, route, first, lane);
#pragma unroll
            for (int i = 0; i < (kTensor ? kRankTiles : 1); ++i) {
                for (int j = 0; j < 4; ++j) dweight[i][j] = 0.f;
            }
        }

        float s[kSteps][2], a[kSteps][2], state[kSteps][2];
        float total_a[2] = {1.f, 1.f}, total_b[2] = {0.f, 0.f}, total_c[2] = {0.f, 0.f};
        weights.step_sizes(s, ranks, tokens, p, batch, route, first, valid);
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                float v = (kRank ? s[t][j] : dt[kRank ? 0 : t].get(j)) + bias[j];
                if (kSoftplus) v = softplus<sizeof(DT_TYPE) == 4>(v);
                s[t][j] = tokens[t] == -2 ? 0.f : v;
                a[t][j] = ex2(s[t][j] * A[j]);
                total_b[j] = fmaf(a[t][j], total_b[j], s[t][j] * x[t].get(j) * B[t].get(0));
                total_a[j] *= a[t][j];
            }
        }
#pragma unroll
        for (int t = kSteps - 1; t >= 0; --t) {
#pragma unroll
            for (int j = 0; j < 2; ++j) total_c[j] = a[t][j] * fmaf(C[t].get(0), dy[t].get(j), total_c[j]);
        }

        // Join the segments, states forwards and gradients backwards.
        float before_a[2], before_b[2], behind_a[2], behind_c[2], total_d[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            total_d[j] = total_a[j];  // the product of decays once more, joined from the other side
#pragma unroll
            for (int offset = 1; offset < 4; offset *= 2) {
                const float other_a = __shfl_up_sync(kAll, total_a[j], offset, 4);
                const float other_b = __shfl_up_sync(kAll, total_b[j], offset, 4);
                const float other_d = __shfl_down_sync(kAll, total_d[j], offset, 4);
                const float other_c = __shfl_down_sync(kAll, total_c[j], offset, 4);
                if (q >= offset) {
                    total_b[j] = fmaf(total_a[j], other_b, total_b[j]);
                    total_a[j] *= other_a;
                }
                if (q + offset < 4) {
                    total_c[j] = fmaf(total_d[j], other_c, total_c[j]);
                    total_d[j] *= other_d;
                }
            }
            before_a[j] = __shfl_up_sync(kAll, total_a[j], 1, 4);
            before_b[j] = __shfl_up_sync(kAll, total_b[j], 1, 4);
            behind_a[j] = __shfl_down_sync(kAll, total_d[j], 1, 4);
            behind_c[j] = __shfl_down_sync(kAll, total_c[j], 1, 4);
            if (q == 0) before_a[j] = 1.f, before_b[j] = 0.f;
            if (q == 3) behind_a[j] = 1.f, behind_c[j] = 0.f;
        }
        if (q == 3) block.totals[turn][warp][pair] = make_float4(total_a[0], total_b[0], total_a[1], total_b[1]);
        if (q == 0) block.totals_back[turn][warp][pair] = make_float2(total_c[0], total_c[1]);
        __syncthreads();
        for (int w = 0; w < warp; ++w) {
            const float4 total = block.totals[turn][w][pair];
            h[0] = fmaf(total.x, h[0], total.y);
            h[1] = fmaf(total.z, h[1], total.w);
        }
        g[0] = block.carry[turn][2 * pair], g[1] = block.carry[turn][2 * pair + 1];
        for (int w = warps - 1; w > warp; --w) {
            const float4 total = block.totals[turn][w][pair];
            const float2 back = block.totals_back[turn][w][pair];
            g[0] = fmaf(total.x, g[0], back.x);
            g[1] = fmaf(total.z, g[1], back.y);
        }
        if (warp == 0 && q == 0) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float through = fmaf(total_d[j], g[j], total_c[j]);
                if (chunk == 0 && p.dinitial_state && j < valid) p.dinitial_state[sequence * channels + first + j] = through;
                block.carry[turn ^ 1][2 * pair + j] = chunk ? through : round + 1 < rounds ? behind(route + 1, j) : 0.f;
            }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            h[j] = fmaf(before_a[j], h[j], before_b[j]);
            g[j] = fmaf(behind_a[j], g[j], behind_c[j]);
        }

        // Through the segment forwards for the states, backwards for the gradients.
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                state[t][j] = h[j];
                h[j] = fmaf(a[t][j], h[j], s[t][j] * x[t].get(j) * B[t].get(0));
            }
        }
        float sums[16];  // dB of the steps, then dC
        sums[7] = sums[15] = 0.f;
        DX_TYPE* dx = (DX_TYPE*)p.dx + batch * p.dx_b + route * p.dx_k + first * p.dx_d;
        DDT_TYPE* ddt = (DDT_TYPE*)p.ddt + batch * p.ddt_b + route * p.ddt_k + first * p.ddt_d;
#pragma unroll
        for (int t = kSteps - 1; t >= 0; --t) {
            float dx_out[2], ddt_out[2];
            sums[t] = sums[8 + t] = 0.f;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float u = x[t].get(j), out = dy[t].get(j), b = B[t].get(0), su = s[t][j] * u;
                g[j] = fmaf(C[t].get(0), out, g[j]);
                const float after = t + 1 < kSteps ? state[t + 1 < kSteps ? t + 1 : 0][j] : h[j], gb = g[j] * b;
                sums[t] = fmaf(g[j], su, sums[t]);
                sums[8 + t] = fmaf(out, after, sums[8 + t]);
                g[j] *= a[t][j];
                const float product = g[j] * state[t][j];
                dx_out[j] = fmaf(D[j], out, s[t][j] * gb);
                float ds = fmaf(u, gb, product * (A[j] * kLn2));
                if (kSoftplus) ds *= softplus_slope(s[t][j]);
                if (tokens[t] == -2) ds = 0.f;
                ddt_out[j] = ds;
                dA[j] = fmaf(product, s[t][j], dA[j]);
                dD[j] = fmaf(out, u, dD[j]);
                dbias[j] += ds;
                if constexpr (kTensor) s[t][j] = ds;
            }
            if constexpr (kMerge) add_to(block.sum + place(tokens[t], pair), dx_out[0], dx_out[1], tokens[t] >= 0);
            if (tokens[t] >= 0) {
                if constexpr (!kMerge) {
                    Pack<DX_TYPE, 2> packed;
                    packed.set(dx_out);
                    store<kVector>(packed, dx + (long long)tokens[t] * (int)p.dx_l, (int)p.dx_d, valid);
                }
                if constexpr (!kTensor) {
                    Pack<DDT_TYPE, 2> packed;
                    packed.set(ddt_out);
                    store<kVector>(packed, ddt + (long long)tokens[t] * (int)p.ddt_l, (int)p.ddt_d, valid);
                }
            }
        }
        reduce_scatter<16, 16, 4>(sums, lane);
        {
            const int own = owned_from<16, 16, 4>(lane);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int t = (own + i) & 7;
                const long long token = t < kSteps ? token_at(route, chunk, t) : -1;
                if (token >= 0) {
                    (own & 8 ? p.dC : p.dB)[((tile * p.batch + batch) * p.tokens + token) * p.routes + route] = sums[i];
                }
            }
        }
        if constexpr (kTensor) {
#pragma unroll
            for (int i = 0; i < kProducts; i += 2) {
                // Of both products and both channels: the halves of two steps of the lane's segment.
                unsigned high[4], low[4], high_t[4], low_t[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int t = 2 * (i + j / 2);
                    split(s[t][j % 2], t + 1 < kSteps ? s[t + 1 < kSteps ? t + 1 : 0][j % 2] : 0.f, high[j], low[j]);
                    const int turned = (j & 1) * 2 + j / 2;  // rows of the product by tokens, its depth by channels
                    high_t[turned] = transpose(high[j]);
                    low_t[turned] = transpose(low[j]);
                }
                long long token[2];
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int t = 2 * (i + j);
                    const int even = __shfl_sync(kAll, tokens[t], lane >> 3);
                    const int odd = t + 1 < kSteps ? __shfl_sync(kAll, tokens[t + 1 < kSteps ? t + 1 : 0], lane >> 3) : -2;
                    token[j] = lane & 4 ? odd : even;
                }
#pragma unroll
                for (int tile_of_ranks = 0; tile_of_ranks < kRankTiles; ++tile_of_ranks) {
                    const int d = tile_of_ranks / 2, half = tile_of_ranks % 2 * 2;
                    const unsigned columns[2] = {transpose(ranks[i * 2 * kDepth + tile_of_ranks]),
                                                 transpose(ranks[(i + 1) * 2 * kDepth + tile_of_ranks])};
                    multiply_add(dweight[tile_of_ranks], high, columns);
                    multiply_add(dweight[tile_of_ranks], low, columns);
                    const unsigned w_high[2] = {transpose(weights.high[d][half]), transpose(weights.high[d][half + 1])};
                    const unsigned w_low[2] = {transpose(weights.low[d][half]), transpose(weights.low[d][half + 1])};
                    float out[4] = {0.f, 0.f, 0.f, 0.f};
                    multiply_add(out, high_t, w_high);
                    multiply_add(out, low_t, w_high);
                    multiply_add(out, high_t, w_low);
                    const int rank = 8 * tile_of_ranks + 2 * (lane & 3);
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        if (token[j] >= 0) {
                            Pack<DDT_TYPE, 2> packed;
                            packed.set(out + 2 * j);
                            store<kRank % 2 == 0>(packed, (DDT_TYPE*)p.ddt +
                                (((tile * p.batch + batch) * p.tokens + token[j]) * p.routes + route) * kRank + rank,
                                1, kRank - rank);
                        }
                    }
                }
            }
        }

        if (chunk == 0) {
            // The end of a route: sum what belongs to a channel over the segments.
            float of_channel[6] = {dA[0], dA[1], dD[0], dD[1], dbias[0], dbias[1]};
#pragma unroll
            for (int i = 0; i < 6; ++i) {
                of_channel[i] += __shfl_xor_sync(kAll, of_channel[i], 1);
                of_channel[i] += __shfl_xor_sync(kAll, of_channel[i], 2);
                if (q == 0) block.scratch[warp][i / 2 * 16 + 2 * pair + i % 2] = of_channel[i];
            }
            if constexpr (kTensor) {
#pragma unroll
                for (int ranks_of = 0; ranks_of < kRankTiles; ++ranks_of) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int at = 48 + ranks_of * 128 + (2 * pair + i / 2) * 8 + 2 * q + i % 2;
                        block.scratch[warp][at] = dweight[ranks_of][i];
                    }
                }
            }
            __syncthreads();
            for (int i = threadIdx.x; i < 48; i += blockDim.x) {
                float sum = 0.f;
                for (int w = 0; w < warps; ++w) sum += block.scratch[w][i];
                const int channel = tile * kChannels + i % 16;
                float* to = i < 16 ? p.dA : i < 32 ? p.dD : p.ddt_bias;
                if (to && channel < channels) to[sequence * channels + channel] = sum;
            }
            if constexpr (kTensor) {
                for (int i = threadIdx.x; i < kRankTiles * 128; i += blockDim.x) {
                    float sum = 0.f;
                    for (int w = 0; w < warps; ++w) sum += block.scratch[w][48 + i];
                    const int channel = tile * kChannels + i % 128 / 8, rank = i / 128 * 8 + i % 8;
                    if (channel < channels && rank < kRank) {
                        p.ddt_weight[(sequence * channels + channel) * kRank + rank] = sum;
                    }
                }
            }
            __syncthreads();
        }
        route = next_route, chunk = next_chunk;
    }

    if constexpr (kMerge) {
        __syncthreads();
        write_sum<DX_TYPE>(block.sum, (DX_TYPE*)p.dx + batch * p.dx_b, (int)p.dx_l, (int)p.dx_d, (int)p.tokens,
                           tile * kChannels, channels);
    }
}
