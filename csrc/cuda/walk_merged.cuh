// walk_merged.cuh: as walk_forward.cuh, for a block that takes all routes of its channels and adds them up in shared memory:
// no share of a route is written apart, and the map comes from DRAM once.
// Grid: a block = one batch item and kChannels neighbouring channels; kTurns of its warps go along a route and take the
// tiles in turn. All of a step but its state is done before the state comes from the warp of the tile before. Results are
// added to the sums tile by tile and route by route, each warp waiting for the one before, so that no two meet at a token
// and sums come out alike each time. A sum has the digits of SUM_TYPE, the state and all of a step float32.
constexpr bool kBack = false;
#include "walk_sizes.cuh"

constexpr int kTurns = TURNS;
constexpr int kRoutes = kWarps / kTurns;
constexpr int kStages = kAhead + 1;
constexpr int kPart = kTurns > 1 ? kTile : kBatch;  // steps that are taken at once

// Step sizes before softplus, and after them the tile's results.
struct alignas(16) ReadThenResults : ReadSizes {
    Rows<SUM_TYPE> y;

    DEVICE void form(const HeldWeights&, const Ranks&, int) {}
};
struct alignas(16) FormedThenResults {
    union {
        Sizes sizes;
        Rows<SUM_TYPE> y;  // when all lanes have read what was formed
    };

    DEVICE void fetch(int, const Place&, int, int, int) {}
    DEVICE void form(const HeldWeights& weights, const Ranks& ranks, int lane) { weights.form(sizes, ranks, lane); }
    DEVICE void get(float* to, int, int t, int lane, const float*) const {
#pragma unroll
        for (int j = 0; j < kRun; ++j) to[j] = sizes.at[t][lane * kRun + j];
    }
    DEVICE void set(const float* from, int, int t, int lane) {
#pragma unroll
        for (int j = 0; j < kRun; ++j) sizes.at[t][lane * kRun + j] = from[j];
    }
};
template <bool kFormed> struct ChooseResults { using Type = ReadThenResults; };
template <> struct ChooseResults<true> { using Type = FormedThenResults; };

struct alignas(16) WarpMemory {
    Rows<X_TYPE> x[kStages];
    ChooseResults<(kRank > 0)>::Type sizes;
    Pairs pairs;
    float state[kTurns > 1 ? kChannels : 4];  // what the warp of the tile before has left
};
struct alignas(16) BlockMemory { WarpMemory warps[kWarps]; };  // the sums follow: of each token kChannels of SUM_TYPE
extern "C" __device__ int launch_shape[2] = {0, (int)sizeof(BlockMemory)};  // 32 kWarps threads

// Barriers of two warps of which one waits: for its turn to add, and for its state. One of these is the block's barrier
// too, which is used only before them.
DEVICE void await_warp(int at) {
    asm volatile("bar.sync %0, 64;" ::"r"(at) : "memory");
}
DEVICE void tell_warp(int at) {
    asm volatile("bar.arrive %0, 64;" ::"r"(at) : "memory");
}
DEVICE int turn_of(int warp) { return warp + 1; }
DEVICE int state_of(int warp) { return warp + 1 + kWarps & 15; }

extern "C" __global__ void __launch_bounds__(32 * kWarps, MIN_BLOCKS) walk_merged(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    const int thread = threadIdx.x;
    int lane = thread & 31, warp = thread >> 5;
    keep(lane), keep(warp);  // or they are computed anew at each use
    const int route = warp % kRoutes, from = warp / kRoutes;
    BlockMemory& block = *reinterpret_cast<BlockMemory*>(shared);
    WarpMemory& own = block.warps[warp];
    char* sums = shared + sizeof(BlockMemory);
    const int steps = (int)p.steps, tiles = (steps + kTile - 1) / kTile, groups = (int)p.channels / kChannels;
    const int group = (int)(blockIdx.x % (unsigned)groups), first = group * kChannels, channel = first + lane * kRun;
    const long long batch = blockIdx.x / (unsigned)groups, sequence = batch * kRoutes + route;
    const Table table(p, route);
    const unsigned row = (unsigned)p.channels * 4;

    const Place at_x = place_of<X_TYPE>(p.x, batch, p.x_b, route, p.x_k, p.x_l, Rows<X_TYPE>::offset(lane, first));
    const Place at_dt = place_of<DT_TYPE>(p.dt, batch, p.dt_b, route, p.dt_k, p.dt_l,
                                          kRank ? 4 * (lane & 3) : Rows<DT_TYPE>::offset(lane, first));
    const PairPlace at_pair(p, batch, route, lane);
    auto fetch = [&](int tile, int stage, int token) {
        if (tile < tiles) {
            own.x[stage].fetch(at_x, token, lane, 0);
            own.sizes.fetch(stage, at_dt, token, lane, 0);
        }
        commit_copies();
    };
    int tokens[kStages + 2];  // of this tile of the warp, and of those to come; the last is on its way
#pragma unroll
    for (int i = 0; i <= kStages + 1; ++i) tokens[i] = table.token(from + i * kTurns, lane);
#pragma unroll
    for (int i = 0; i < kStages; ++i) fetch(from + i * kTurns, i, tokens[i]);
    Ranks ranks;
    if constexpr (kRank > 0) ranks.fetch(at_dt, tokens[0], lane);
    own.pairs.put(at_pair.fetch(tokens[0]), lane);
    unsigned pair = at_pair.fetch(tokens[1]);

    float A[kRun], D[kRun], bias[kRun], h[kRun];
#pragma unroll
    for (int j = 0; j < kRun; ++j) {
        const long long at = (long long)route * p.channels + channel + j;
        A[j] = p.A[at] * kDecay;
        D[j] = p.D ? p.D[at] : 0.f;
        bias[j] = p.dt_bias && !kRank ? p.dt_bias[at] * kPerUnit : 0.f;
        h[j] = p.initial_state ? p.initial_state[sequence * p.channels + channel + j] : 0.f;
    }
    HeldWeights weights;
    if constexpr (kRank > 0) weights.read(p, route, first, lane);
    constexpr int kSumPieces = Rows<SUM_TYPE>::kPieces;
#pragma unroll 4
    for (int i = thread; i < (int)p.tokens * kSumPieces; i += 32 * kWarps) ((uint4*)sums)[i] = uint4{0, 0, 0, 0};

    unsigned long long saved = (unsigned long long)(p.saved + sequence * tiles * p.channels + channel);
    keep(saved);
    int stage = 0;
    __syncthreads();
#pragma unroll 1
    for (int tile = from; tile < tiles; tile += kTurns) {
        const int left = steps - tile * kTile;
        if constexpr (kRank > 0) {
            own.sizes.form(weights, ranks, lane);
            ranks.fetch(at_dt, tokens[1], lane);
        }
        await_copies<kStages - 1>();
        __syncwarp();
        if (left < kTile) {  // steps past the end: their sizes become 0, so that they leave the state alone
            const float never[2] = {kNever, kNever};
#pragma unroll 1
            for (int t = left; t < kTile; ++t) own.sizes.set(never, stage, t, lane);
        }
        float y[kTile][kRun];
#pragma unroll
        for (int start = 0; start < kTile; start += kPart) {
            float a[kPart][kRun], b[kPart][kRun];
            float (*v)[kRun] = y + start;
            float2 BC[kPart];
            own.pairs.get<kPart>(BC, start);
#pragma unroll
            for (int t = 0; t < kPart; ++t) {
                own.x[stage].get(b[t], start + t, lane);
                own.sizes.get(a[t], stage, start + t, lane, bias);
            }
#pragma unroll
            for (int t = 0; t < kPart; ++t) {
#pragma unroll
                for (int j = 0; j < kRun; ++j) {
                    const float s = step_size(a[t][j]);
                    a[t][j] = decay(s, A[j]);
                    v[t][j] = D[j] * b[t][j];
                    b[t][j] = s * (b[t][j] * BC[t].x);
                }
            }
            if (start + kPart == kTile) {
                __syncwarp();  // all lanes have read what comes next to the same places
                own.pairs.put(pair, lane);
                pair = at_pair.fetch(tokens[2]);
                fetch(tile + kStages * kTurns, stage, tokens[kStages]);
            }
            if (start == 0) {
                if (kTurns > 1 && tile > 0) {
                    await_warp(state_of(warp));
#pragma unroll
                    for (int j = 0; j < kRun; ++j) h[j] = own.state[lane * kRun + j];
                }
                if (p.saved) {
#pragma unroll
                    for (int j = 0; j < kRun; ++j) ((float*)multiply_add_wide(tile, row, saved))[j] = h[j];
                }
            }
#pragma unroll
            for (int t = 0; t < kPart; ++t) {
#pragma unroll
                for (int j = 0; j < kRun; ++j) {
                    h[j] = fmaf(a[t][j], h[j], b[t][j]);
                    v[t][j] = fmaf(BC[t].y, h[j], v[t][j]);
                }
            }
            if (kTurns > 1 && tile + 1 < tiles) {
                const int next = route + (from + 1) % kTurns * kRoutes;
#pragma unroll
                for (int j = 0; j < kRun; ++j) block.warps[next].state[lane * kRun + j] = h[j];
                tell_warp(state_of(next));
            }
        }
#pragma unroll
        for (int i = 0; i < kTile; i += kBatch) own.sizes.y.put(y + i, i, lane);
        __syncwarp();
        own.sizes.y.add(sums, tokens[0], lane, left, [&] {
            if (tile + route > 0) await_warp(turn_of(warp));
            else __syncwarp();  // what was read gives way to the next tile's step sizes
        });
        if (route + 1 < kRoutes) tell_warp(turn_of(warp + 1));
        else if (tile + 1 < tiles) tell_warp(turn_of((from + 1) % kTurns * kRoutes));
#pragma unroll
        for (int i = 0; i <= kStages; ++i) tokens[i] = tokens[i + 1];
        tokens[kStages + 1] = table.token(tile + (kStages + 2) * kTurns, lane);
        stage = stage == kAhead ? 0 : stage + 1;
    }
    if (p.last_state && from == (tiles - 1) % kTurns) {
#pragma unroll
        for (int j = 0; j < kRun; ++j) p.last_state[sequence * p.channels + channel + j] = h[j];
    }
    const int end = kRoutes - 1 + (tiles - 1) % kTurns * kRoutes;  // the warp that has added last
    if (warp == end) {
        for (int i = 0; i < kWarps; ++i) {
            if (i != end) tell_warp(turn_of(i));
        }
        __syncwarp();
    } else {
        await_warp(turn_of(warp));
    }
    const Place at_y = place_of<Y_TYPE>(p.y, batch, p.y_b, 0, 0, p.y_l, first * (int)sizeof(Y_TYPE));
    constexpr int kPieces = Rows<Y_TYPE>::kPieces, kMany = 16 / (int)sizeof(Y_TYPE);
    constexpr int kWords = kMany * (int)sizeof(SUM_TYPE) / 16;
#pragma unroll 4
    for (int i = thread; i < (int)p.tokens * kPieces; i += 32 * kWarps) {
        Pack<SUM_TYPE, kMany> sum;
#pragma unroll
        for (int n = 0; n < kWords; ++n) ((uint4*)sum.words)[n] = ((const uint4*)sums)[i * kWords + n];
        float v[kMany];
#pragma unroll
        for (int n = 0; n < kMany; ++n) v[n] = sum.get(n);
        Pack<Y_TYPE, kMany> y;
        y.set(v);
        write(at_y.at(i / kPieces) + i % kPieces * 16, make_uint4(y.words[0], y.words[1], y.words[2], y.words[3]));
    }
}
