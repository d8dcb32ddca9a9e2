// walk_backward.cuh: gradients of the scan of walk_forward.cuh; the equations are at the head of wide_backward.cuh.
//
// Tiles go by from the last. The state before a tile was saved; the states inside it are computed once more and stay in
// registers, as do the decays. dB and dC are sums over the warp's channels, on the tensor cores in TF32 (in two terms
// where a result has more digits than bfloat16). Gradients of a low-rank step size and of its weights are products of the
// tile's gradients, in high and low halves. What belongs to a step is added up over the block's warps in shared memory
// and leaves as one partial result a block. What belongs to a channel is its lane's own, and is added up over the `items`
// of the batch that a warp takes one after the other.
constexpr bool kBack = true;
#include "walk_gradients.cuh"

constexpr bool kOneTerm = sizeof(B_TYPE) == 2 && sizeof(C_TYPE) == 2 && FEW_DIGITS;

struct alignas(16) WarpMemory {
    Rows<X_TYPE> x[kAhead + 1];
    Rows<Y_TYPE> dy[kAhead + 1];
    StepSizes sizes;
    Rows<DX_TYPE> dx[2];  // of this tile and the last one in turn
    SizeGradients ddt;
};
// Of many columns there is no room for two blocks' shares of two tiles.
constexpr int kShareTurns = kRank > 32 ? 1 : 2;
struct alignas(16) BlockMemory {
    Pairs pairs[2];  // of this tile and the next in turn
    float dBC[2][kWarps][32];  // the warps' shares of this tile and the last one in turn
    SizeGradients::Shares ddt[kShareTurns][kWarps];
    struct { unsigned long long dBC, ddt; } sums[2];  // where they go, of this item and the last one in turn
    WarpMemory warps[kWarps];
};
extern "C" __device__ int launch_shape[2] = {32 * kWarps, (int)sizeof(BlockMemory)};
extern "C" __device__ const uint4 nothing = {0, 0, 0, 0};  // a dy of zeros

// The step of a tile whose sum a lane is left with, of dB or where lane & 8 of dC; see `sum_quads` and `reduce_scatter`.
DEVICE int lane_step(int lane) { return (lane >> 4) * 8 + 2 * (lane & 3) + (lane >> 2 & 1); }

extern "C" __global__ void __launch_bounds__(32 * kWarps, MIN_BLOCKS) walk_backward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    BlockMemory& block = *reinterpret_cast<BlockMemory*>(shared);
    WarpMemory& own = block.warps[warp];
    const int steps = (int)p.steps, tiles = (steps + kTile - 1) / kTile;
    Work work(p, tiles, lane, warp);
    const int route = work.route, first = work.first, channel = work.channel, from = work.from, to = work.to;
    const Table table(p, route);
    const int together = first - warp * kChannels;  // the first of the block's channels
    constexpr int kApart = sizeof(WarpMemory);
    WarpMemory& all = block.warps[0];
    const unsigned row = (unsigned)p.channels * 4;

    float A[kRun], D[kRun], bias[kRun], dA[kRun] = {}, dD[kRun] = {}, dbias[kRun] = {};
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
        const long long at = (long long)route * p.channels + channel + j;
        A[j] = p.A[at] * kDecay;
        D[j] = p.D ? p.D[at] : 0.f;
        bias[j] = p.dt_bias && !kRank ? p.dt_bias[at] * kPerUnit : 0.f;
    }
    WeightGradients gradients;
    gradients.clear();
    own.sizes.read_weights(p, route, first, lane);
    own.ddt.read_weights(p, route, first, lane);
    float picks[8];  // of `sum_quads`
#pragma unroll
    for (int t = 0; t < 8; ++t) picks[t] = lane / 4 == t ? 1.f : 0.f;

#pragma unroll 1
    for (long long item = work.share * kItems; item < (work.share + 1) * kItems; ++item) {
        work.take(p, item);
        const long long batch = work.batch, sequence = work.sequence;
        const Place at_x = place_of<X_TYPE>(p.x, batch, p.x_b, route, p.x_k, p.x_l,
                                            Rows<X_TYPE>::offset(thread, together));
        Place at_dy = place_of<Y_TYPE>(p.dy, batch, p.dy_b, route, p.dy_k, p.dy_l,
                                       Rows<Y_TYPE>::offset(thread, together));
        if (!p.dy) at_dy = {(unsigned long long)&nothing, 0};
        const Place at_dt = place_of<DT_TYPE>(p.dt, batch, p.dt_b, route, p.dt_k, p.dt_l,
                                              kRank ? 4 * (lane & 3) : Rows<DT_TYPE>::offset(thread, together));
        const Place at_dx = place_of_share<DX_TYPE>(p, p.dx, batch, p.dx_b, route, p.dx_k, p.dx_l,
                                                    Rows<DX_TYPE>::offset(thread, together));
        const Place at_ddt = place_of<DDT_TYPE>(p.ddt, batch, p.ddt_b, route, p.ddt_k, p.ddt_l,
                                                Rows<DDT_TYPE>::offset(thread, together));
        const PairPlace at_pair(p, batch, route, lane);
        unsigned long long saved = (unsigned long long)(p.saved + sequence * tiles * p.channels + channel);
        const long long partial = work.group / kWarps * p.batch + batch;  // of results that are sums over all channels
        auto& sums_at = block.sums[item & 1];
        if (threadIdx.x == 0) {
            sums_at.dBC = (unsigned long long)(p.dBC + (partial * p.routes + route) * steps * 2);
            sums_at.ddt = (unsigned long long)((DDT_TYPE*)p.ddt + (partial * p.tokens * p.routes + route) * kRank);
        }
        keep(saved);
        auto fetch = [&](int tile, int stage, int token) {
            if (tile >= from) {
                if constexpr (kPass != 1) all.x[stage].fetch(at_x, token, thread, kApart);
                all.dy[stage].fetch(at_dy, token, thread, kApart);
                all.sizes.fetch(stage, at_dt, token, thread, kApart);
            }
            commit_copies();
        };
        auto fetch_state = [&](float* to, int tile) {
#pragma unroll
            for (int j = 0; j < kRun; ++j) to[j] = __ldg((const float*)multiply_add_wide(max(tile, 0), row, saved) + j);
        };

        float g[kRun], span[kRun] = {};
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
            g[j] = p.dlast_state && to == tiles ? p.dlast_state[sequence * p.channels + channel + j] : 0.f;
        }
        work.join(p, g, A);
        __syncwarp();

        int tokens[kAhead + 2];  // of this tile, and of those to come; the last is on its way
#pragma unroll
        for (int i = 0; i <= kAhead + 1; ++i) tokens[i] = table.token(to - 1 - i, lane);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) fetch(to - 1 - i, i, tokens[i]);
        Ranks ranks;
        if constexpr (kRank > 0) ranks.fetch(at_dt, tokens[0], lane);
        if (warp == 0) block.pairs[0].put(at_pair.fetch(tokens[0]), lane);
        unsigned pair = at_pair.fetch(tokens[1]);
        float next_state[kRun];
        fetch_state(next_state, to - 1);

        int stage = 0;
        await_copies<kAhead - 1>();
        __syncthreads();  // the first tile is there, and all are through with the last item
#pragma unroll 1
        for (int tile = to - 1; tile >= from; --tile) {
            const int left = steps - tile * kTile, turn = to - tile & 1;
            const Pairs& pairs = block.pairs[to - 1 - tile & 1];
            if (warp == 0) {
                block.pairs[to - tile & 1].put(pair, lane);
                pair = at_pair.fetch(tokens[2]);
            }
            fetch(tile - kAhead, stage == 0 ? kAhead : stage - 1, tokens[kAhead]);
            const Ranks columns = ranks;
            if constexpr (kRank > 0) {
                own.sizes.form(ranks, lane);
                ranks.fetch(at_dt, tokens[1], lane);
            }
            const int token = tokens[0];
#pragma unroll
            for (int i = 0; i <= kAhead; ++i) tokens[i] = tokens[i + 1];
            tokens[kAhead + 1] = table.token(tile - kAhead - 2, lane);
            float h[kRun];
#pragma unroll
            for (int j = 0; j < kRun; ++j) h[j] = next_state[j];
            fetch_state(next_state, tile - 1);
            __syncwarp();
            if (left < kTile) {  // steps past the end: neither their sizes nor their gradients
                const float never[2] = {kNever, kNever}, zero[2] = {0.f, 0.f};
                for (int t = left; t < kTile; ++t) {
                    own.sizes.set(never, stage, t, lane);
                    own.dy[stage].set(zero, t, lane);
                }
            }

            if constexpr (kPass == 1) {  // g -> a g + c of the segment
#pragma unroll
                for (int start = kTile - kBatch; start >= 0; start -= kBatch) {
                    float out[kBatch][kRun], s[kBatch][kRun];
                    float2 BC[kBatch];
                    pairs.get<kBatch>(BC, start);
#pragma unroll
                    for (int t = 0; t < kBatch; ++t) {
                        own.dy[stage].get(out[t], start + t, lane);
                        own.sizes.get(s[t], stage, start + t, lane, bias);
                    }
#pragma unroll
                    for (int t = kBatch - 1; t >= 0; --t) {
#pragma unroll
                        for (int j = 0; j < kRun; ++j) {
                            s[t][j] = step_size(s[t][j]);
                            g[j] = decay(s[t][j], A[j]) * fmaf(BC[t].y, out[t][j], g[j]);
                            span[j] += s[t][j];
                        }
                    }
                }
                stage = stage == kAhead ? 0 : stage + 1;
                await_copies<kAhead - 1>();
                __syncthreads();
                continue;
            }
            float u[kTile][kRun], s[kTile][kRun], a[kTile][kRun], before[kTile][kRun], slope[kTile][kRun];
            float2 BC[kTile];
            pairs.get<kTile>(BC, 0);
#pragma unroll
            for (int t = 0; t < kTile; ++t) {
                own.x[stage].get(u[t], t, lane);
                own.sizes.get(s[t], stage, t, lane, bias);
            }
#pragma unroll
            for (int t = 0; t < kTile; ++t) {
#pragma unroll
                for (int j = 0; j < kRun; ++j) {
                    s[t][j] = step_size(s[t][j], slope[t][j]);
                    a[t][j] = decay(s[t][j], A[j]);
                    before[t][j] = h[j];
                    h[j] = fmaf(a[t][j], h[j], s[t][j] * (u[t][j] * BC[t].x));
                }
            }
            float of_A[kRun] = {}, of_D[kRun] = {}, of_bias[kRun] = {};  // of the tile, for the sake of long routes
            float sums[8] = {};
#pragma unroll
            for (int start = kTile - kBatch; start >= 0; start -= kBatch) {
                float out[kBatch][kRun], ddt[kBatch][kRun], shares[4];  // shares of dB and dC, of two steps
                float2 BC[kBatch];
                pairs.get<kBatch>(BC, start);
#pragma unroll
                for (int i = 0; i < kBatch; ++i) own.dy[stage].get(out[i], start + i, lane);
#pragma unroll
                for (int i = kBatch - 1; i >= 0; --i) {
                    const int t = start + i;
                    float dB = 0.f, dC = 0.f;
#pragma unroll
                    for (int j = 0; j < kRun; ++j) {
                        g[j] = fmaf(BC[i].y, out[i][j], g[j]);
                        const float after = t + 1 < kTile ? before[t + 1 < kTile ? t + 1 : 0][j] : h[j], gb = g[j] * BC[i].x;
                        dB = fmaf(g[j], s[t][j] * u[t][j], dB);
                        dC = fmaf(out[i][j], after, dC);
                        g[j] *= a[t][j];
                        const float product = g[j] * before[t][j];
                        of_A[j] = fmaf(product, s[t][j], of_A[j]);
                        of_D[j] = fmaf(out[i][j], u[t][j], of_D[j]);
                        out[i][j] = fmaf(s[t][j], gb, D[j] * out[i][j]);
                        ddt[i][j] = fmaf(u[t][j], gb, product * (A[j] * kLn2)) * slope[t][j];
                        of_bias[j] += ddt[i][j];
                    }
                    shares[i % 2 * 2] = dB, shares[i % 2 * 2 + 1] = dC;
                    if (i % 2 == 0) sum_quads<kOneTerm>(sums + t / 8 * 4, picks + t % 8, shares);
                }
                own.dx[turn].put(out, start, lane);
                own.ddt.put(turn, ddt, start, lane);
            }
#pragma unroll
            for (int j = 0; j < kRun; ++j) dA[j] += of_A[j], dD[j] += of_D[j], dbias[j] += of_bias[j];
            __syncwarp();
            own.ddt.multiply(gradients, block.ddt[turn % kShareTurns][warp], columns, lane);
            // Lanes hold the shares of steps 2 (lane % 4) and the next of eight; the sums over quads leave each with one.
            reduce_scatter<8, 16, 4>(sums, lane);
            block.dBC[turn][warp][lane] = sums[0];
            await_copies<kAhead - 1>();
            __syncthreads();  // the next tile is there, and all are through with this one
            all.dx[turn].leave(at_dx, token, thread, kApart, left);
            all.ddt.leave(turn, at_ddt, token, thread, kApart, left);
            if (warp == kWarps - 1 && lane_step(lane) < left) {
                float sum = 0.f;
#pragma unroll
                for (int of = 0; of < kWarps; ++of) sum += block.dBC[turn][of][lane];
                char* to = (char*)multiply_add_wide(tile, kTile * 8, sums_at.dBC) + lane_step(lane) * 8;
                ((float*)to)[lane >> 3 & 1] = sum * (lane & 8 ? 1.f : kUnit);
            }
            SizeGradients::add_up(block.ddt[turn % kShareTurns], (DDT_TYPE*)sums_at.ddt, token, (int)p.routes, lane, warp,
                                  left);
            if constexpr (kShareTurns == 1) __syncthreads();
            stage = stage == kAhead ? 0 : stage + 1;
        }

        if constexpr (kPass == 1) {
            work.leave(p, g, span);
        } else if (p.dinitial_state && from == 0) {
#pragma unroll
            for (int j = 0; j < kRun; ++j) p.dinitial_state[sequence * p.channels + channel + j] = g[j];
        }
    }
    if constexpr (kPass == 1) return;
    const long long share = (kPass ? work.share * p.segments + work.segment : work.share) * p.routes + route;
    const long long at = share * p.channels + channel;
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
        p.dA[at + j] = dA[j] * kUnit;
        if (p.dD) p.dD[at + j] = dD[j];
        if (p.ddt_bias) p.ddt_bias[at + j] = dbias[j];
    }
    if constexpr (kRank > 0) gradients.leave(p.ddt_weight + (share * p.channels + first) * kRank, lane);
}
