// few_backward.cuh: gradients of the scan of few_forward.cuh, with warps and steps as there; the equations are at the head
// of wide_backward.cuh. The state before each warp but the first was saved, so that states are computed again within warps;
// the gradients of states, g -> a g + c, are joined backwards as states are forwards. dB and dC are summed over the cluster's
// channels and leave as one partial result a cluster; what belongs to a channel, as one for each block of a route.
#pragma once
#include "few_rows.cuh"

constexpr bool kHold = kStates <= 4;  // decays are kept from one look at a segment to the next
constexpr int kRankTiles = (kRank + 7) / 8;
constexpr int kSums = kElements + 2 * kChannels + kRankTiles * 64;  // of dA, dD and the bias, then of the weights

struct Shelf : Rows {  // of a warp
    float start[kElements];                  // gradients behind the warp
    alignas(16) float2 behind[kStates][32];  // those behind a segment, from 0 behind the warp
    float first[kElements];                  // states before the warp
};
struct alignas(16) BlockMemory {
    float2 totals[kOnce || kChain ? 1 : 2][kWarps][kElements];  // the warps' joined maps (a, c), of two rounds in turn
    float2 shares[kSpan > 1 ? 2 : 1][kSpan][kElements];  // the blocks'
    float carry[2][kWarps / kPart][kElements];           // gradients behind a round
    float sums[kWarps][kSums];
    float2 number;
    Mail of_shares[2], of_sum, of_number;
    Shelf shelves[kWarps];
    float4 sum[1];  // (routes, the block's tokens, kChannels)
};
extern "C" __device__ int launch_shape[2] = {0, (int)sizeof(BlockMemory)};

extern "C" __device__ const uint4 nothing[2] = {};  // a dy of zeros

// Derivative of the step size at v in its own units, from s: log2(e) (1 - 2^-s), by its series where that would cancel.
DEVICE float slope(float s) {
    if constexpr (!kSoftplus) return kPerUnit;
    if constexpr (kExact) return softplus_slope(s);
    const float series = s * fmaf(s, fmaf(s, fmaf(s, -kLn2 * kLn2 * kLn2 / 24, kLn2 * kLn2 / 6), -kLn2 / 2), 1.f);
    return s < 0.09f ? series : fmaf(-kLog2e, ex2(-s), kLog2e);
}

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(32 * kWarps)
few_backward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    BlockMemory& block = *reinterpret_cast<BlockMemory*>(shared);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int quad = lane & 3, segment = lane >> 2;
    const int channels = (int)p.channels, steps = (int)p.steps;
    const int rank = cluster_rank() % kCluster, mate = cluster_rank() / kCluster, base = mate * kCluster;
    const int groups = (channels + kChannels - 1) / kChannels / kTogether;  // of tiles that are taken together
    const int round_steps = kRouteWarps * kWarpSteps, chunks = (steps + round_steps - 1) / round_steps;
    const int rounds = kChain || kOnce ? 1 : chunks;
    if (JOINED > 1 && threadIdx.x == 0) {
        open_mail(block.of_sum, kMerge ? pushed((int)p.tokens, rank) : 0);
        open_mail(block.of_shares[0], kSpan * kElements * 8);
        open_mail(block.of_shares[1], kSpan * kElements * 8);
        open_mail(block.of_number, 8);
        for (int w = 0; w < kWarps; ++w) open_mail(block.shelves[w].mail, kRowBytes);
        show_mail();
    }
    cluster_begin();  // so that no block writes to one that has not begun
    int unit = blockIdx.x / JOINED, last = chunks - 1;
    if constexpr (kChain) {
        const int units = groups * (int)(p.batch * p.routes), turn = take_turn(p.order, block.number, block.of_number);
        unit = turn % units, last = chunks - 1 - turn / units;
    }
    const int group = unit % groups, tile = group * kTogether + mate, rest = unit / groups;
    const int of_routes = (rank * kWarps + warp) / kRouteWarps;  // of the cluster's
    const int place_in_route = (rank * kWarps + warp) % kRouteWarps;
    const int part = warp % kPart, first_warp = warp - part, span = rank % kSpan, in_block = warp / kPart;
    const int route = kMerge ? of_routes : rest % (int)p.routes;
    const long long batch = kMerge ? rest : rest / (int)p.routes, sequence = batch * p.routes + route;
    const int from = tile * kChannels, first = from + kRun * quad, valid = channels - first;
    Shelf& shelf = block.shelves[warp];
    float* own_sums = block.sums[warp];

    OwnSteps own = {lane};
    const int* table = p.indices + (long long)route * steps;
    const int begin = place_in_route * kWarpSteps;
    own.fetch_tokens(table, begin + last * round_steps, steps);

    const Place at_x = place_of<X_TYPE>(p.x, batch, p.x_b, route, p.x_k, p.x_l, p.x_d, first, valid);
    Place at_dy = place_of<Y_TYPE>(p.dy, batch, p.dy_b, route, p.dy_k, p.dy_l, p.dy_d, first, valid);
    if (!p.dy) at_dy = {(unsigned long long)&nothing, 0, 0, 0};
    const Place at_dt = place_of<DT_TYPE>(p.dt, batch, p.dt_b, route, p.dt_k, p.dt_l, p.dt_d, kRank ? 2 * quad : first,
                                          kRank ? 1 : valid);
    const Place at_B = place_of<B_TYPE>(p.B, batch, p.B_b, route, p.B_k, p.B_l, p.B_n, 0, 1);
    const Place at_C = place_of<C_TYPE>(p.C, batch, p.C_b, route, p.C_k, p.C_l, p.C_n, 0, 1);
    const Place at_dx = place_of<DX_TYPE>(p.dx, batch, p.dx_b, route, p.dx_k, p.dx_l, p.dx_d, first, valid);
    const Place at_ddt = place_of<DDT_TYPE>(p.ddt, batch, p.ddt_b, route, p.ddt_k, p.ddt_l, p.ddt_d, first, valid);

    float D[kRun], bias[kRun], dD[kRun] = {}, dbias[kRun] = {};
    const long long at_channel = (long long)route * channels + first;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
        const bool there = j < valid;
        D[j] = there && p.D ? p.D[at_channel + j] : 0.f;
        bias[j] = there && p.dt_bias ? p.dt_bias[at_channel + j] * kPerUnit : 0.f;
    }
    const float* A_at = p.A + at_channel * kStates;
    Weights weights;
    weights.fetch(p, route, from, lane);
    weights.halve();
    // The weights once more, as a factor whose depth is channels; and the sums of their gradients.
    unsigned turned_high[kRank ? kRankTiles : 1], turned_low[kRank ? kRankTiles : 1];
    float dweight[kRank ? kRankTiles : 1][2];
    if constexpr (kRank > 0) {
#pragma unroll
        for (int i = 0; i < kRankTiles; ++i) {
            float w[kRun];
#pragma unroll
            for (int j = 0; j < kRun; ++j) {
                const bool there = j < valid && 8 * i + segment < kRank;
                w[j] = there ? p.dt_weight[(at_channel + j) * kRank + 8 * i + segment] : 0.f;
            }
            split(w[0], w[1], turned_high[i], turned_low[i]);
            dweight[i][0] = dweight[i][1] = 0.f;
        }
    }
    for (int e = lane; e < kElements; e += 32) {  // (N, channels)
        own_sums[e] = 0.f;
        const int channel = from + e % kChannels;
        const bool given = p.dlast_state && channel < channels;
        if (part == 0 && (!kChain || last + 1 == chunks)) {
            block.carry[0][in_block][e] = given ? p.dlast_state[(sequence * channels + channel) * kStates + e / kChannels] : 0.f;
        }
    }
    own.put_tokens(shelf, 0);
    __syncwarp();
    bool begun = kChain && kTogether > 1;  // all blocks of the cluster have

    for (int round = 0; round < rounds; ++round) {
        const int turn = round & 1, chunk = last - round;
        const bool more = round + 1 < rounds;
        int tokens[kSteps];
        read_tokens(tokens, shelf.tokens[turn][segment]);
        Values<X_TYPE> x;
        Values<Y_TYPE> dy;
        Values<DT_TYPE> dt;
        Ranks ranks;
        own.fetch_rows(at_B, at_C);
        if constexpr (kRank > 0) ranks.fetch(at_dt, tokens, lane);
        else dt.fetch(at_dt, tokens);
        x.fetch(at_x, tokens);
        dy.fetch(at_dy, tokens);
        const int at_warp = chunk * kRouteWarps + place_in_route, at_segment = at_warp * kSegments + segment;
        // The state before the first warp is the initial one; those past the end are not needed.
        const float* past = at_warp == 0 ? p.initial_state : at_warp * kWarpSteps < steps ? p.saved : nullptr;
        if (past) past += (at_warp == 0 ? sequence : sequence * p.segments + at_warp - 1) * channels * kStates;
        float states[(kElements + 31) / 32];
#pragma unroll
        for (int i = 0; i < (kElements + 31) / 32; ++i) {
            const int e = lane + 32 * i, channel = from + e % kChannels;
            const bool there = past && e < kElements && channel < channels;
            states[i] = there ? read_float(past + channel * kStates + e / kChannels) : 0.f;
        }
        if constexpr (!kOne) stage_rows(shelf, at_B, at_C, turn, lane);
        own.put_rows(shelf);
        if (more) own.fetch_tokens(table, begin + (chunk - 1) * round_steps, steps);
#pragma unroll
        for (int i = 0; i < (kElements + 31) / 32; ++i) {
            if (lane + 32 * i < kElements) shelf.first[lane + 32 * i] = states[i];
        }
        if constexpr (kRank > 0) ranks.clear(tokens);
        else dt.clear(at_dt, tokens);
        x.clear(at_x, tokens), dy.clear(at_dy, tokens);
        float s[kSteps][kRun];
        weights.step_sizes(s, bias, ranks);
        float forward_sums[4][kRun];  // of step sizes over 1, 2, 4 segments up to this one, and over those before it
        float sums[4][kRun];  // of step sizes over 1, 2, 4 segments from this one on, and over those behind it
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
            float sum = 0.f;
#pragma unroll
            for (int t = 0; t < kSteps; ++t) {
                if constexpr (kRank == 0) s[t][j] = fmaf(dt.get(t, j), kPerUnit, bias[j]);
                s[t][j] = step_size(s[t][j]);
                if (tokens[t] == -2) s[t][j] = 0.f;
                sum += s[t][j];
            }
            float before = sum;
#pragma unroll
            for (int level = 0; level < 3; ++level) {
                forward_sums[level][j] = before;
                const float other = __shfl_up_sync(kAll, before, 4 << level);
                if (lane >= 4 << level) before += other;
            }
            forward_sums[3][j] = __shfl_up_sync(kAll, before, 4);
            if (segment == 0) forward_sums[3][j] = 0.f;
#pragma unroll
            for (int level = 0; level < 3; ++level) {
                sums[level][j] = sum;
                const float other = __shfl_down_sync(kAll, sum, 4 << level);
                if (segment + (1 << level) < kSegments) sum += other;
            }
            sums[3][j] = __shfl_down_sync(kAll, sum, 4);
            if (segment == kSegments - 1) sums[3][j] = 0.f;
        }
        __syncwarp();

        // Each segment with no gradient behind it, and the maps of the warp's joined.
        float kept[kHold ? kStates : 1][kHold ? kSteps : 1][kRun];
        constexpr int kUnroll = kHold ? kStates : 1;
#pragma unroll kUnroll
        for (int n = 0; n < kStates; ++n) {
            const Pack<C_TYPE, 8> C = read_row(shelf.C[n][segment]);
            float ends[kRun];
#pragma unroll
            for (int j = 0; j < kRun; ++j) {
                const float An = j < valid ? __ldg(A_at + j * kStates + n) * kDecay : 0.f;
                float c = 0.f;
#pragma unroll
                for (int t = kSteps - 1; t >= 0; --t) {
                    const float a = decay(s[t][j], An);
                    if constexpr (kHold) kept[n][t][j] = a;
                    c = a * fmaf(C.get(t), dy.get(t, j), c);
                }
#pragma unroll
                for (int level = 0; level < 3; ++level) {
                    const float other = __shfl_down_sync(kAll, c, 4 << level);
                    const float a = decay(sums[level][j], An);
                    if (segment + (1 << level) < kSegments) c = fmaf(a, other, c);
                }
                if (segment == 0) {
                    float all = sums[3][j];
#pragma unroll
                    for (int t = 0; t < kSteps; ++t) all += s[t][j];
                    block.totals[turn][warp][n * kChannels + kRun * quad + j] =
                        make_float2(decay(all, An), c);
                }
                ends[j] = __shfl_down_sync(kAll, c, 4);
                if (segment == kSegments - 1) ends[j] = 0.f;
            }
            shelf.behind[n][lane] = make_float2(ends[0], ends[1]);
        }

        // The gradients behind the warp.
        __syncthreads();
        if constexpr (kSpan > 1) {
            if (!begun) cluster_wait();
            begun = true;
            if (part == 0) {
                for (int e = lane; e < kElements; e += 32) {
                    float2 all = block.totals[turn][first_warp + kPart - 1][e];
#pragma unroll
                    for (int w = kPart - 2; w >= 0; --w) {
                        const float2 one = block.totals[turn][first_warp + w][e];
                        all.y = fmaf(one.x, all.y, one.y), all.x *= one.x;
                    }
#pragma unroll
                    for (int i = 0; i < kSpan; ++i) {
                        send(&block.shares[turn][span][e], base + rank - span + i, all.x, all.y, block.of_shares[turn]);
                    }
                }
            }
            if (threadIdx.x == 0 && round) expect_mail(block.of_shares[turn ^ 1], kSpan * kElements * 8);
            await_mail(block.of_shares[turn], round >> 1);
        }
        if constexpr (kChain) {
            const long long link = ((long long)unit * kTogether + mate) * chunks + chunk;
            unsigned* words = (unsigned*)p.order + 1 + link * kElements;
            for (int e = threadIdx.x; e < kElements; e += 32 * kWarps) {
                float2 all = block.totals[0][kWarps - 1][e];
#pragma unroll
                for (int w = kWarps - 2; w >= 0; --w) {
                    const float2 one = block.totals[0][w][e];
                    all.y = fmaf(one.x, all.y, one.y), all.x *= one.x;
                }
                const float carried = chunk + 1 < chunks ? await_number(words + kElements + e) : block.carry[0][0][e];
                const float before = fmaf(all.x, carried, all.y);
                if (chunk) leave_number(words + e, before);
                block.carry[0][0][e] = carried;
                const int channel = from + e % kChannels;
                if (!chunk && p.dinitial_state && channel < channels) {
                    p.dinitial_state[(sequence * channels + channel) * kStates + e / kChannels] = before;
                }
            }
            __syncthreads();
        }
        for (int e = lane; e < kElements; e += 32) {
            const float carried = block.carry[turn][in_block][e];
            float g = carried;
            if constexpr (kSpan > 1) {
#pragma unroll
                for (int i = kSpan - 1; i > 0; --i) {
                    const float2 one = block.shares[turn][i][e];
                    if (i > span) g = fmaf(one.x, g, one.y);
                }
            }
#pragma unroll
            for (int w = kPart - 1; w > 0; --w) {  // without a loop, so that they are all read at once
                const float2 one = block.totals[turn][first_warp + w][e];
                if (w > part) g = fmaf(one.x, g, one.y);
            }
            shelf.start[e] = g;
            if (!kChain && part == 0) {
                float before = carried;
                if constexpr (kSpan > 1) {
#pragma unroll
                    for (int i = kSpan - 1; i >= 0; --i) {
                        const float2 one = block.shares[turn][i][e];
                        before = fmaf(one.x, before, one.y);
                    }
                } else {
                    const float2 one = block.totals[turn][warp][e];
                    before = fmaf(one.x, g, one.y);
                }
                block.carry[turn ^ 1][in_block][e] = before;
                const int channel = from + e % kChannels;
                if (!more && p.dinitial_state && span == 0 && channel < channels) {
                    p.dinitial_state[(sequence * channels + channel) * kStates + e / kChannels] = before;
                }
            }
        }
        __syncwarp();

        if constexpr (kSumRows) {
            if (round || !begun) cluster_wait();
            begun = true;
        }

        // Through the segment forwards for the states, backwards for the gradients.
        float dx[kSteps][kRun], ds[kSteps][kRun];
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
#pragma unroll
            for (int j = 0; j < kRun; ++j) dx[t][j] = ds[t][j] = 0.f;
        }
#pragma unroll kUnroll
        for (int n = 0; n < kStates; ++n) {
            const Pack<B_TYPE, 8> B = read_row(shelf.B[n][segment]);
            const Pack<C_TYPE, 8> C = read_row(shelf.C[n][segment]);
            const float2 ends = shelf.behind[n][lane];
            float of_rows[2 * kSteps];  // dB and dC of a step, of the next ...
#pragma unroll
            for (int t = 0; t < 2 * kSteps; ++t) of_rows[t] = 0.f;
#pragma unroll
            for (int j = 0; j < kRun; ++j) {
                const float An = j < valid ? __ldg(A_at + j * kStates + n) * kDecay : 0.f;
                // The state before the segment, from that before the warp and what each segment adds.
                float state[kSteps], a[kSteps], added = 0.f, dA = 0.f;
#pragma unroll
                for (int t = 0; t < kSteps; ++t) {
                    a[t] = kHold ? kept[kHold ? n : 0][kHold ? t : 0][j] : decay(s[t][j], An);
                    added = fmaf(a[t], added, s[t][j] * x.get(t, j) * (B.get(t) * kUnit));
                }
#pragma unroll
                for (int level = 0; level < 3; ++level) {
                    const float other = __shfl_up_sync(kAll, added, 4 << level);
                    const float past = decay(forward_sums[level][j], An);
                    if (lane >= 4 << level) added = fmaf(past, other, added);
                }
                added = __shfl_up_sync(kAll, added, 4);
                if (segment == 0) added = 0.f;
                float h = fmaf(decay(forward_sums[3][j], An), shelf.first[n * kChannels + kRun * quad + j], added);
#pragma unroll
                for (int t = 0; t < kSteps; ++t) {
                    state[t] = h;
                    h = fmaf(a[t], h, s[t][j] * x.get(t, j) * (B.get(t) * kUnit));
                }
                float g = fmaf(decay(sums[3][j], An),
                               shelf.start[n * kChannels + kRun * quad + j], j ? ends.y : ends.x);
#pragma unroll
                for (int t = kSteps - 1; t >= 0; --t) {
                    const float u = x.get(t, j), out = dy.get(t, j);
                    g = fmaf(C.get(t), out, g);
                    const float gb = g * (B.get(t) * kUnit);
                    of_rows[2 * t] = fmaf(g, s[t][j] * u, of_rows[2 * t]);
                    of_rows[2 * t + 1] = fmaf(out, t + 1 < kSteps ? state[t + 1 < kSteps ? t + 1 : 0] : h, of_rows[2 * t + 1]);
                    dx[t][j] = fmaf(s[t][j], gb, dx[t][j]);
                    g *= a[t];
                    const float product = g * state[t];
                    ds[t][j] = fmaf(u, gb, fmaf(product, An * kLn2, ds[t][j]));
                    dA = fmaf(product, s[t][j], dA);
                }
#pragma unroll
                for (int offset = 4; offset < 32; offset *= 2) dA += __shfl_xor_sync(kAll, dA, offset);
                if (segment == 0) own_sums[n * kChannels + kRun * quad + j] += dA;
            }
            reduce_scatter<16, 2, 1>(of_rows, lane);
            const int t = owned_from<16, 2, 1>(lane) / 2;  // and the next
            if constexpr (!kRows) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int step = at_segment * kSteps + t + i;
                    if (step < steps) {
                        const long long at = ((group * p.batch + batch) * p.routes + route) * steps + step;
                        reinterpret_cast<float2*>(p.dBC)[at] = make_float2(of_rows[2 * i] * kUnit, of_rows[2 * i + 1]);
                    }
                }
            } else if constexpr (kSumRows) {
                leave_rows(shelf, n, segment * kSteps + t, of_rows, mate, rank);
            } else {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    shelf.dB[n][segment * kSteps + t + i] = narrow<RowType>(of_rows[2 * i] * kUnit);
                    shelf.dC[n][segment * kSteps + t + i] = narrow<RowType>(of_rows[2 * i + 1]);
                }
            }
        }
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
#pragma unroll
            for (int j = 0; j < kRun; ++j) {
                const float out = dy.get(t, j);
                dx[t][j] = fmaf(D[j], out, dx[t][j]);
                ds[t][j] *= slope(s[t][j]);
                if (!kSoftplus && tokens[t] == -2) ds[t][j] = 0.f;
                dD[j] = fmaf(out, x.get(t, j), dD[j]);
                dbias[j] += ds[t][j];
            }
        }

        // What goes out.
        if constexpr (!kOne && !kSumRows) {
            __syncwarp();
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                const int step = lane + 32 * i, of = step / kSteps, t = step % kSteps, token = shelf.tokens[turn][of][t];
                if (token < 0) continue;
                const long long at = (((batch * p.tokens + token) * p.routes + route) * groups + group) * kStates;
                constexpr int kMost = 16 / (int)sizeof(SUM_TYPE), kNext = kStates % kMost == 0 ? kMost : kStates % 2 ? 1 : 2;
#pragma unroll 4
                for (int n = 0; n < kStates; n += kNext) {
                    Pack<SUM_TYPE, kNext> packed;
                    float v[kNext];
#pragma unroll
                    for (int k = 0; k < kNext; ++k) v[k] = widen(shelf.dB[n + k][of * kSteps + t]);
                    packed.set(v);
                    store<true>(packed, (SUM_TYPE*)p.dB + at + n, 1, kNext);
#pragma unroll
                    for (int k = 0; k < kNext; ++k) v[k] = widen(shelf.dC[n + k][of * kSteps + t]);
                    packed.set(v);
                    store<true>(packed, (SUM_TYPE*)p.dC + at + n, 1, kNext);
                }
            }
        }
        if constexpr (kRank > 0) {
#pragma unroll
            for (int i = 0; i < kProducts; ++i) {
                // Halves of two steps' gradients: rows are tokens, the depth is channels; and turned, the other way round.
                unsigned high[4] = {}, low[4] = {}, turned[4] = {}, turned_rest[4] = {};
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    split(ds[2 * i + n][0], ds[2 * i + n][1], high[n], low[n]);
                    turned[2 * n] = transpose(high[n]), turned_rest[2 * n] = transpose(low[n]);
                }
#pragma unroll
                for (int r = 0; r < kRankTiles; ++r) {
                    const unsigned* columns = ranks.words[i][r / 2] + r % 2 * 2;
                    const unsigned columns_turned[2] = {transpose(columns[0]), transpose(columns[1])};
                    float of_weights[4] = {dweight[r][0], dweight[r][1], 0.f, 0.f};
                    multiply_add(of_weights, turned, columns_turned);
                    multiply_add(of_weights, turned_rest, columns_turned);
                    dweight[r][0] = of_weights[0], dweight[r][1] = of_weights[1];
                    float out[4] = {0.f, 0.f, 0.f, 0.f};
                    const unsigned whole[2] = {turned_high[r], 0}, rest_of[2] = {turned_low[r], 0};
                    multiply_add(out, high, whole);
                    multiply_add(out, low, whole);
                    multiply_add(out, high, rest_of);
                    const int column = 8 * r + 2 * quad;
#pragma unroll
                    for (int j = 0; j < 2; ++j) {
                        const int token = tokens[2 * i + j];
                        Pack<DDT_TYPE, 2> packed;
                        packed.set(out + 2 * j);
                        if constexpr (kSumRows) {
                            leave_columns(shelf, segment * kSteps + 2 * i + j, column, packed, mate, rank);
                            continue;
                        }
                        if (token < 0) continue;
                        const long long row = (batch * p.tokens + token) * p.routes + route;
                        const long long at = kOne ? group * p.batch * p.tokens * p.routes + row : row * groups + group;
                        store<kRank % 2 == 0>(packed, (DDT_TYPE*)p.ddt + at * kRank + column, 1, kRank - column);
                    }
                }
            }
        } else {
            write_steps<DDT_TYPE>(at_ddt, tokens, ds, (int)p.ddt_d, valid);
        }
        if constexpr (kMerge) {
            if (!begun) cluster_wait();
            begun = true;
            push(block.sum, dx, tokens, of_routes, quad, (int)p.tokens, base, block.of_sum);
        } else {
            write_steps<DX_TYPE>(at_dx, tokens, dx, (int)p.dx_d, valid);
        }
        if constexpr (kSumRows) {
            await_mail(shelf.mail, round);
            __syncwarp();
            if (more && lane == 0) expect_mail(shelf.mail, kRowBytes);
            sum_rows(p, shelf, turn, lane, mate, group, groups, batch, route, at_warp * kWarpSteps);
            if (more) cluster_begin();  // what was read may be overwritten
        }
        if (more) own.put_tokens(shelf, turn ^ 1);
        __syncwarp();
    }

    // What belongs to a channel, summed over the segments, and over the warps of a route in the block.
#pragma unroll
    for (int i = 0; i < 2 * kRun; ++i) {
        float v = i < kRun ? dD[i % kRun] : dbias[i % kRun];
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) v += __shfl_xor_sync(kAll, v, offset);
        if (segment == 0) own_sums[kElements + i / kRun * kChannels + kRun * quad + i % kRun] = v;
    }
    if constexpr (kRank > 0) {
#pragma unroll
        for (int r = 0; r < kRankTiles; ++r) {  // rows of the product are channels
#pragma unroll
            for (int i = 0; i < 2; ++i) own_sums[kElements + 2 * kChannels + r * 64 + segment * 8 + 2 * quad + i] = dweight[r][i];
        }
    }
    __syncthreads();
    if constexpr (kMerge) await_mail<true>(block.of_sum, 0);
    const long long share = (kChain ? batch * chunks + last : batch * kSpan + span) * p.routes + route;
    for (int i = part * 32 + lane; i < kSums; i += 32 * kPart) {
        float total = 0.f;
#pragma unroll 4
        for (int w = 0; w < kPart; ++w) total += block.sums[first_warp + w][i];
        if (i < kElements) {
            const int channel = from + i % kChannels;
            if (channel < channels) p.dA[(share * channels + channel) * kStates + i / kChannels] = total * kUnit;
        } else if (i < kElements + 2 * kChannels) {
            const int channel = from + i % kChannels;
            float* to = i < kElements + kChannels ? p.dD : p.ddt_bias;
            if (to && channel < channels) to[share * channels + channel] = total;
        } else {
            const int at = i - kElements - 2 * kChannels, channel = from + at % 64 / 8, column = at / 64 * 8 + at % 8;
            if (channel < channels && column < kRank) p.ddt_weight[(share * channels + channel) * kRank + column] = total;
        }
    }
    if constexpr (kMerge) {
        write_sum<DX_TYPE>(block.sum, (DX_TYPE*)p.dx + batch * p.dx_b + from * p.dx_d, p.dx_l, p.dx_d, rank,
                           (int)p.tokens, channels - from);
    } else if (JOINED > 1 && !begun) {
        cluster_wait();
    }
}
