// walk_forward.cuh: h_t = exp(s_t A) h_{t-1} + s_t B_t x_t, y_t = C_t h_t + D x_t, for one state a channel.
// See walk.cuh.
constexpr bool kBack = false;  // segments follow one another forwards
#include "walk_sizes.cuh"

struct alignas(16) WarpMemory {
    Rows<X_TYPE> x[kAhead + 1];
    StepSizes sizes;
    Rows<Y_TYPE> y[2];  // of this tile and the last one in turn
};
struct alignas(16) BlockMemory {
    Pairs pairs[2];  // of this tile and the next in turn
    WarpMemory warps[kWarps];
};
extern "C" __device__ int launch_shape[2] = {32 * kWarps, (int)sizeof(BlockMemory)};

extern "C" __global__ void __launch_bounds__(32 * kWarps, MIN_BLOCKS) walk_forward(const __grid_constant__ Params p) {
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

    float A[kRun], D[kRun], bias[kRun];
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
        const long long at = (long long)route * p.channels + channel + j;
        A[j] = p.A[at] * kDecay;
        D[j] = p.D ? p.D[at] : 0.f;
        bias[j] = p.dt_bias && !kRank ? p.dt_bias[at] * kPerUnit : 0.f;
    }
    own.sizes.read_weights(p, route, first, lane);

#pragma unroll 1
    for (long long item = work.share * kItems; item < (work.share + 1) * kItems; ++item) {
        work.take(p, item);
        const long long batch = work.batch, sequence = work.sequence;
        const Place at_x = place_of<X_TYPE>(p.x, batch, p.x_b, route, p.x_k, p.x_l,
                                            Rows<X_TYPE>::offset(thread, together));
        const Place at_dt = place_of<DT_TYPE>(p.dt, batch, p.dt_b, route, p.dt_k, p.dt_l,
                                              kRank ? 4 * (lane & 3) : Rows<DT_TYPE>::offset(thread, together));
        const Place at_y = place_of_share<Y_TYPE>(p, p.y, batch, p.y_b, route, p.y_k, p.y_l,
                                                  Rows<Y_TYPE>::offset(thread, together));
        const PairPlace at_pair(p, batch, route, lane);
        auto fetch = [&](int tile, int stage, int token) {
            if (tile < to) {
                all.x[stage].fetch(at_x, token, thread, kApart);
                all.sizes.fetch(stage, at_dt, token, thread, kApart);
            }
            commit_copies();
        };

        float h[kRun], span[kRun] = {};
#pragma unroll
        for (int j = 0; j < kRun; ++j) {
            h[j] = p.initial_state && from == 0 ? p.initial_state[sequence * p.channels + channel + j] : 0.f;
        }
        work.join(p, h, A);
        __syncwarp();

        int tokens[kAhead + 2];  // of this tile, and of those to come; the last is on its way
#pragma unroll
        for (int i = 0; i <= kAhead + 1; ++i) tokens[i] = table.token(from + i, lane);
#pragma unroll
        for (int i = 0; i < kAhead; ++i) fetch(from + i, i, tokens[i]);
        Ranks ranks;
        if constexpr (kRank > 0) ranks.fetch(at_dt, tokens[0], lane);
        if (warp == 0) block.pairs[0].put(at_pair.fetch(tokens[0]), lane);
        unsigned pair = at_pair.fetch(tokens[1]);

        unsigned long long saved = (unsigned long long)(p.saved + sequence * tiles * p.channels + channel);
        keep(saved);
        int stage = 0;
        await_copies<kAhead - 1>();
        __syncthreads();  // the first tile is there, and all are through with the last item
#pragma unroll 1
        for (int tile = from; tile < to; ++tile) {
            const int left = steps - tile * kTile, turn = tile - from & 1;
            if (kPass != 1 && p.saved) {
#pragma unroll
                for (int j = 0; j < kRun; ++j) ((float*)multiply_add_wide(tile, row, saved))[j] = h[j];
            }
            if (warp == 0) {
                block.pairs[tile - from + 1 & 1].put(pair, lane);
                pair = at_pair.fetch(tokens[2]);
            }
            fetch(tile + kAhead, stage == 0 ? kAhead : stage - 1, tokens[kAhead]);
            if constexpr (kRank > 0) {
                own.sizes.form(ranks, lane);
                ranks.fetch(at_dt, tokens[1], lane);
            }
            const int token = tokens[0];
#pragma unroll
            for (int i = 0; i <= kAhead; ++i) tokens[i] = tokens[i + 1];
            tokens[kAhead + 1] = table.token(tile + kAhead + 2, lane);
            __syncwarp();
            if (left < kTile) {  // steps past the end: their sizes become 0, so that they leave the state alone
                const float never[2] = {kNever, kNever};
                for (int t = left; t < kTile; ++t) own.sizes.set(never, stage, t, lane);
            }
#pragma unroll
            for (int start = 0; start < kTile; start += kBatch) {
                float u[kBatch][kRun], v[kBatch][kRun];
                float2 BC[kBatch];
                block.pairs[tile - from & 1].get<kBatch>(BC, start);
#pragma unroll
                for (int t = 0; t < kBatch; ++t) {
                    own.x[stage].get(u[t], start + t, lane);
                    own.sizes.get(v[t], stage, start + t, lane, bias);
                }
#pragma unroll
                for (int t = 0; t < kBatch; ++t) {
#pragma unroll
                    for (int j = 0; j < kRun; ++j) {
                        const float s = step_size(v[t][j]);
                        h[j] = fmaf(decay(s, A[j]), h[j], s * (u[t][j] * BC[t].x));
                        if constexpr (kPass == 1) span[j] += s;
                        v[t][j] = fmaf(BC[t].y, h[j], D[j] * u[t][j]);
                    }
                }
                if constexpr (kPass != 1) own.y[turn].put(v, start, lane);
            }
            await_copies<kAhead - 1>();
            __syncthreads();  // the next tile is there, and all are through with this one
            if constexpr (kPass != 1) all.y[turn].leave(at_y, token, thread, kApart, left);
            stage = stage == kAhead ? 0 : stage + 1;
        }
        if constexpr (kPass == 1) {
            work.leave(p, h, span);
        } else if (p.last_state && to == tiles) {
#pragma unroll
            for (int j = 0; j < kRun; ++j) p.last_state[sequence * p.channels + channel + j] = h[j];
        }
    }
}
