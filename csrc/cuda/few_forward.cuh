// few_forward.cuh: h_t = exp(s_t A) h_{t-1} + s_t B_t x_t, y_t = <C_t, h_t> + D x_t, where sequences are few: time is split
// over all that a cluster of blocks has, in one launch.
//
// Grid: a cluster of kCluster blocks = one b and kChannels channels, of all routes (kMerge) or of one. Its warps are dealt
// out evenly to the routes; the warps of a route have kWarpSteps neighbouring steps each, and take as many rounds as it
// takes. Lane = kRun neighbouring channels, kRun (lane % 4), and one of the warp's eight segments, lane / 4, of kSteps
// steps, which stay in registers.
// The segments' maps h -> a h + b are joined by exchanges in the warp, those of the warps through shared memory, those of
// the blocks of a route through the cluster's. One state: y_t and C_t a_1 ... a_t of a segment are kept until the state
// before it is known. Several: the segment is gone through once more then; with few of them their decays are kept (kHold).
// Routes are added up in shared memory: a token belongs to one block of the cluster, and each route writes its share of y
// there, into a place of its own. So no share goes through memory, and the sum is in order of routes.
#pragma once
#include "few.cuh"

// Decays are kept from one look at a segment to the next; in a chain they would leave room for fewer warps.
constexpr bool kHold = kStates <= 4 && !kChain;

struct Shelf : Steps {  // of a warp
    float start[kElements];                        // states before the warp
    float2 before[kOne ? 1 : kStates][32];  // those before a segment, from 0 before the warp
};
struct alignas(16) BlockMemory {
    float2 totals[kOnce || kChain ? 1 : 2][kWarps][kElements];  // the warps' joined maps (a, b), of two rounds in turn
    float2 shares[kSpan > 1 ? 2 : 1][kSpan][kElements];  // the blocks'
    float carry[2][kWarps / kPart][kElements];           // states before a round
    float2 number;
    Mail of_shares[2], of_sum;
    Shelf shelves[kWarps];
    float4 sum[1];  // (routes, the block's tokens, kChannels)
};
extern "C" __device__ int launch_shape[2] = {0, (int)sizeof(BlockMemory)};

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(32 * kWarps, kChain ? 16 / kWarps : 1)
few_forward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    BlockMemory& block = *reinterpret_cast<BlockMemory*>(shared);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int quad = lane & 3, segment = lane >> 2;
    const int channels = (int)p.channels, steps = (int)p.steps;
    const int rank = cluster_rank(), tiles = (channels + kChannels - 1) / kChannels;
    int unit = blockIdx.x / kCluster, chunk = 0;
    if constexpr (kChain) {
        const int units = tiles * (int)(p.batch * p.routes), turn = take_turn(p.order, block.number, block.of_sum);
        unit = turn % units, chunk = turn / units;
    }
    const int tile = unit % tiles, rest = unit / tiles;
    const int of_routes = (rank * kWarps + warp) / kRouteWarps;  // of the cluster's
    const int place_in_route = (rank * kWarps + warp) % kRouteWarps;
    const int part = warp % kPart, first_warp = warp - part, span = rank % kSpan, in_block = warp / kPart;
    const int route = kMerge ? of_routes : rest % (int)p.routes;
    const int batch = kMerge ? rest : rest / (int)p.routes;
    const long long sequence = (long long)batch * (int)p.routes + route;
    const int from = tile * kChannels, first = from + kRun * quad, valid = channels - first;
    const int round_steps = kRouteWarps * kWarpSteps, chunks = (steps + round_steps - 1) / round_steps;
    const int rounds = kChain || kOnce ? 1 : chunks;
    Shelf& shelf = block.shelves[warp];
    OwnSteps own = {lane};
    const int* table = p.indices + (long long)route * steps;
    const int begin = (chunk * kRouteWarps + place_in_route) * kWarpSteps;
    own.fetch_tokens(table, begin, steps);
    if (!kChain && kCluster > 1) {
        if (threadIdx.x == 0) {
            open_mail(block.of_sum, kMerge ? pushed((int)p.tokens, rank) : 0);
            open_mail(block.of_shares[0], kSpan * kElements * 8);
            open_mail(block.of_shares[1], kSpan * kElements * 8);
            show_mail();
        }
        cluster_begin();  // so that no block writes to one that has not begun
    }

    const Place at_x = place_of<X_TYPE>(p.x, batch, p.x_b, route, p.x_k, p.x_l, p.x_d, first, valid);
    const Place at_dt = place_of<DT_TYPE>(p.dt, batch, p.dt_b, route, p.dt_k, p.dt_l, p.dt_d, kRank ? 2 * quad : first,
                                          kRank ? 1 : valid);
    const Place at_B = place_of<B_TYPE>(p.B, batch, p.B_b, route, p.B_k, p.B_l, p.B_n, 0, 1);
    const Place at_C = place_of<C_TYPE>(p.C, batch, p.C_b, route, p.C_k, p.C_l, p.C_n, 0, 1);
    const Place at_y = place_of<Y_TYPE>(p.y, batch, p.y_b, route, p.y_k, p.y_l, p.y_d, first, valid);

    // What is small is asked for first and used last.
    float small[3 * kRun];
    const long long at_channel = (long long)route * channels + first;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
        const bool there = j < valid;
        small[j] = kOne && there ? __ldg(p.A + at_channel + j) : 0.f;
        small[kRun + j] = there && p.D ? __ldg(p.D + at_channel + j) : 0.f;
        small[2 * kRun + j] = there && p.dt_bias ? __ldg(p.dt_bias + at_channel + j) : 0.f;
    }
    Weights weights;
    weights.fetch(p, route, from, lane);
    own.put_tokens(shelf, 0);
    own.fetch_rows(at_B, at_C);
    __syncwarp();
    Values<X_TYPE> x;
    Values<DT_TYPE> dt;
    Ranks ranks;
    int tokens[kSteps];
    read_tokens(tokens, shelf.tokens[0][segment]);
    x.fetch(at_x, tokens);
    if constexpr (kRank > 0) ranks.fetch(at_dt, tokens, lane);
    else dt.fetch(at_dt, tokens);
    float A[kRun], D[kRun], bias[kRun];  // A of one state
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
        A[j] = small[j] * kDecay, D[j] = small[kRun + j], bias[j] = small[2 * kRun + j] * kPerUnit;
    }
    weights.halve();
    if (part == 0 && (!kChain || chunk == 0)) {
        for (int e = lane; e < kElements; e += 32) {  // (N, channels)
            const int channel = from + e % kChannels;
            const bool given = p.initial_state && channel < channels;
            block.carry[0][in_block][e] = given ? p.initial_state[(sequence * channels + channel) * kStates + e / kChannels] : 0.f;
        }
    }
    bool begun = false;  // all blocks of the cluster have

    for (int round = 0; round < rounds; ++round) {
        const int turn = round & 1;
        const bool more = round + 1 < rounds;
        own.put_rows(shelf);
        if (more) own.fetch_tokens(table, begin + (round + 1) * round_steps, steps);
        if constexpr (!kOne) stage_rows(shelf, at_B, at_C, turn, lane);
        read_tokens(tokens, shelf.tokens[turn][segment]);
        float s[kSteps][kRun], y[kSteps][kRun];
        x.clear(at_x, tokens);
        if constexpr (kRank > 0) ranks.clear(tokens);
        else dt.clear(at_dt, tokens);
        weights.step_sizes(s, bias, ranks);
#pragma unroll
        for (int t = 0; t < kSteps; ++t) {
#pragma unroll
            for (int j = 0; j < kRun; ++j) {
                if constexpr (kRank == 0) s[t][j] = fmaf(dt.get(t, j), kPerUnit, bias[j]);
                s[t][j] = step_size(s[t][j]);
                if (tokens[t] == -2) s[t][j] = 0.f;
                y[t][j] = x.get(t, j);
            }
        }
        if (more) {  // what is read for the next round takes the place of what is used up
            own.put_tokens(shelf, turn ^ 1);
            own.fetch_rows(at_B, at_C);
        }
        __syncwarp();
        if (more) {
            read_tokens(tokens, shelf.tokens[turn ^ 1][segment]);
            x.fetch(at_x, tokens);
            if constexpr (kRank > 0) ranks.fetch(at_dt, tokens, lane);
            else dt.fetch(at_dt, tokens);
        }

        // Each segment from a state of 0, and the maps of the warp's joined.
        float through[kOne ? kSteps : 1][kRun], su[kOne ? 1 : kSteps][kRun], before_a[kRun], before_b[kRun];
        float held[kHold ? kStates : 1][kHold ? kSteps : 1][kRun];
        float sums[4][kRun];  // of step sizes over 1, 2, 4 segments up to this one, and over those before it
        if constexpr (kOne) {
            const Pack<B_TYPE, kSteps> B = read_row(shelf.B[0][segment]);
            const Pack<C_TYPE, kSteps> C = read_row(shelf.C[0][segment]);
            float a[kRun], b[kRun];
#pragma unroll
            for (int t = 0; t < kSteps; ++t) {
#pragma unroll
                for (int j = 0; j < kRun; ++j) {
                    const float one = decay(s[t][j], A[j]), u = y[t][j], in = s[t][j] * (u * (B.get(t) * kUnit));
                    b[j] = t ? fmaf(one, b[j], in) : in;
                    a[j] = t ? a[j] * one : one;
                    y[t][j] = fmaf(C.get(t), b[j], D[j] * u);
                    through[t][j] = C.get(t) * a[j];
                }
            }
#pragma unroll
            for (int j = 0; j < kRun; ++j) {
#pragma unroll
                for (int offset = 4; offset < 32; offset *= 2) {
                    const float other_a = __shfl_up_sync(kAll, a[j], offset), other_b = __shfl_up_sync(kAll, b[j], offset);
                    if (lane >= offset) b[j] = fmaf(a[j], other_b, b[j]), a[j] *= other_a;
                }
                before_a[j] = __shfl_up_sync(kAll, a[j], 4), before_b[j] = __shfl_up_sync(kAll, b[j], 4);
                if (segment == 0) before_a[j] = 1.f, before_b[j] = 0.f;
                else if (segment == kSegments - 1) block.totals[turn][warp][kRun * quad + j] = make_float2(a[j], b[j]);
            }
        } else {
#pragma unroll
            for (int j = 0; j < kRun; ++j) {
                float sum = 0.f;
#pragma unroll
                for (int t = 0; t < kSteps; ++t) {
                    sum += s[t][j];
                    su[t][j] = s[t][j] * y[t][j] * kUnit;
                    y[t][j] *= D[j];
                }
#pragma unroll
                for (int level = 0; level < 3; ++level) {
                    sums[level][j] = sum;
                    const float other = __shfl_up_sync(kAll, sum, 4 << level);
                    if (lane >= 4 << level) sum += other;
                }
                sums[3][j] = __shfl_up_sync(kAll, sum, 4);
                if (segment == 0) sums[3][j] = 0.f;
            }
            const float* A_at = p.A + at_channel * kStates;
            constexpr int kUnroll = kHold ? kStates : 2;
#pragma unroll kUnroll
            for (int n = 0; n < kStates; ++n) {
                const Pack<B_TYPE, kSteps> B = read_row(shelf.B[n][segment]);
                float ends[kRun];
#pragma unroll
                for (int j = 0; j < kRun; ++j) {
                    const float An = j < valid ? __ldg(A_at + j * kStates + n) * kDecay : 0.f;
                    float b = 0.f;
#pragma unroll
                    for (int t = 0; t < kSteps; ++t) {
                        const float a = decay(s[t][j], An), in = su[t][j] * B.get(t);
                        if constexpr (kHold) held[n][t][j] = a;
                        b = t ? fmaf(a, b, in) : in;
                    }
#pragma unroll
                    for (int level = 0; level < 3; ++level) {
                        const float other = __shfl_up_sync(kAll, b, 4 << level);
                        const float a = decay(sums[level][j], An);
                        if (lane >= 4 << level) b = fmaf(a, other, b);
                    }
                    if (segment == kSegments - 1) {
                        float all = sums[3][j];
#pragma unroll
                        for (int t = 0; t < kSteps; ++t) all += s[t][j];
                        block.totals[turn][warp][n * kChannels + kRun * quad + j] =
                            make_float2(decay(all, An), b);
                    }
                    ends[j] = __shfl_up_sync(kAll, b, 4);
                    if (segment == 0) ends[j] = 0.f;
                }
                shelf.before[n][lane] = make_float2(ends[0], ends[1]);
            }
        }

        // The states before the warp.
        __syncthreads();
        if constexpr (kSpan > 1) {
            if (part == kPart - 1) {
                if (!begun) cluster_wait();
                for (int e = lane; e < kElements; e += 32) {
                    float2 all = block.totals[turn][first_warp][e];
#pragma unroll
                    for (int w = 1; w < kPart; ++w) {
                        const float2 one = block.totals[turn][first_warp + w][e];
                        all.y = fmaf(one.x, all.y, one.y), all.x *= one.x;
                    }
#pragma unroll
                    for (int i = 0; i < kSpan; ++i) {
                        send(&block.shares[turn][span][e], rank - span + i, all.x, all.y, block.of_shares[turn]);
                    }
                }
            } else if (!begun) {
                cluster_wait();
            }
            begun = true;
            if (threadIdx.x == 0 && round) expect_mail(block.of_shares[turn ^ 1], kSpan * kElements * 8);
            await_mail(block.of_shares[turn], round >> 1);
        }
        if constexpr (kChain) {
            const long long link = (long long)unit * chunks + chunk;
            unsigned* words = (unsigned*)p.order + 1 + link * kElements;
            for (int e = threadIdx.x; e < kElements; e += 32 * kWarps) {
                float2 all = block.totals[0][0][e];
#pragma unroll
                for (int w = 1; w < kWarps; ++w) {
                    const float2 one = block.totals[0][w][e];
                    all.y = fmaf(one.x, all.y, one.y), all.x *= one.x;
                }
                const float carried = chunk ? await_number(words - kElements + e) : block.carry[0][0][e];
                const float behind = fmaf(all.x, carried, all.y);
                if (chunk + 1 < chunks) leave_number(words + e, behind);
                block.carry[0][0][e] = carried;
                const int channel = from + e % kChannels;
                if (chunk + 1 == chunks && p.last_state && channel < channels) {
                    p.last_state[(sequence * channels + channel) * kStates + e / kChannels] = behind;
                }
            }
            __syncthreads();
        }
        const int at_warp = (chunk + round) * kRouteWarps + place_in_route;
        const int at_save = at_warp * kWarpSteps / kSaved - 1;
        const bool saves = p.saved && at_save >= 0 && at_warp * kWarpSteps % kSaved == 0 && at_warp * kWarpSteps < steps;
        for (int e = lane; e < kElements; e += 32) {
            const float carried = block.carry[turn][in_block][e];
            float h = carried;
            if constexpr (kSpan > 1) {
#pragma unroll
                for (int i = 0; i < kSpan - 1; ++i) {
                    const float2 one = block.shares[turn][i][e];
                    if (i < span) h = fmaf(one.x, h, one.y);
                }
            }
#pragma unroll
            for (int w = 0; w < kPart - 1; ++w) {  // without a loop, so that they are all read at once
                const float2 one = block.totals[turn][first_warp + w][e];
                if (w < part) h = fmaf(one.x, h, one.y);
            }
            shelf.start[e] = h;
            if (const int channel = from + e % kChannels; saves && channel < channels) {
                const long long at = sequence * p.segments + at_save;
                p.saved[(at * channels + channel) * kStates + e / kChannels] = h;
            }
            if (!kChain && part == kPart - 1) {
                float behind = carried;
                if constexpr (kSpan > 1) {
#pragma unroll
                    for (int i = 0; i < kSpan; ++i) {
                        const float2 one = block.shares[turn][i][e];
                        behind = fmaf(one.x, behind, one.y);
                    }
                } else {
                    const float2 one = block.totals[turn][warp][e];
                    behind = fmaf(one.x, h, one.y);
                }
                block.carry[turn ^ 1][in_block][e] = behind;
                const int channel = from + e % kChannels;
                if (!more && p.last_state && span == 0 && channel < channels) {
                    p.last_state[(sequence * channels + channel) * kStates + e / kChannels] = behind;
                }
            }
        }
        __syncwarp();

        // Results.
        if constexpr (kOne) {
#pragma unroll
            for (int j = 0; j < kRun; ++j) {
                const float start = fmaf(before_a[j], shelf.start[kRun * quad + j], before_b[j]);
#pragma unroll
                for (int t = 0; t < kSteps; ++t) y[t][j] = fmaf(through[t][j], start, y[t][j]);
            }
        } else {
            const float* A_at = p.A + at_channel * kStates;
            constexpr int kUnroll = kHold ? kStates : 2;
#pragma unroll kUnroll
            for (int n = 0; n < kStates; ++n) {
                const Pack<B_TYPE, kSteps> B = read_row(shelf.B[n][segment]);
                const Pack<C_TYPE, kSteps> C = read_row(shelf.C[n][segment]);
                const float2 ends = shelf.before[n][lane];
#pragma unroll
                for (int j = 0; j < kRun; ++j) {
                    const float An = j < valid ? __ldg(A_at + j * kStates + n) * kDecay : 0.f;
                    float h = fmaf(decay(sums[3][j], An), shelf.start[n * kChannels + kRun * quad + j],
                                   j ? ends.y : ends.x);
#pragma unroll
                    for (int t = 0; t < kSteps; ++t) {
                        const float a = kHold ? held[kHold ? n : 0][kHold ? t : 0][j] : decay(s[t][j], An);
                        h = fmaf(a, h, su[t][j] * B.get(t));
                        y[t][j] = fmaf(C.get(t), h, y[t][j]);
                    }
                }
            }
        }
        read_tokens(tokens, shelf.tokens[turn][segment]);
        if constexpr (kMerge) {
            if (!begun) cluster_wait();
            begun = true;
            push(block.sum, y, tokens, of_routes, quad, (int)p.tokens, 0, block.of_sum);
        } else {
            write_steps<Y_TYPE>(at_y, tokens, y, (int)p.y_d, valid);
        }
        __syncwarp();  // the shelf is free
    }
    if constexpr (kMerge) {
        if constexpr (kCluster > 1) {
            await_mail<true>(block.of_sum, 0);
        } else {
            __syncthreads();
        }
        write_sum<Y_TYPE>(block.sum, (Y_TYPE*)p.y + batch * p.y_b + from * p.y_d, p.y_l, p.y_d, rank, (int)p.tokens,
                          channels - from);
    } else if (kCluster > 1 && !begun) {
        cluster_wait();
    }
}
