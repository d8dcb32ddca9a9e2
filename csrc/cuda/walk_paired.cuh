// walk_paired.cuh: as walk_merged.cuh, where a multiprocessor has room for the sums of 32 channels only, in bfloat16.
// Grid: a block = one batch item and 32 neighbouring channels. A warp takes tiles of two routes, a lane two channels of
// one of them; kTurns warps take the tiles of their routes in turn. Two more warps, each for half of the channels, empty
// the sums and add what the others leave, tile by tile and route by route: so no warp waits for another's turn to add, and
// sums come out alike each time.
// What does not hang on the state before a tile is done at the end of the loop, for the warp's next one: over that end
// nothing is moved, and it is short from one state to the next.
// A low-rank step size is a product on the tensor cores. Lanes get the very sizes they use, of two steps at a time, where
// the routes' and channels' weights are side by side in the first factor, and the second has zeros for all but one of them.
constexpr bool kBack = false;
#include "walk.cuh"

constexpr int kTurns = TURNS;
constexpr int kPairs = kWarps / kTurns;  // of routes
constexpr int kRoutes = 2 * kPairs;
constexpr int kAdders = 2;
constexpr int kAllThreads = 32 * (kAdders + kWarps);
static_assert(kRun == 1 && sizeof(X_TYPE) == 2 && sizeof(DT_TYPE) == 2 && sizeof(Y_TYPE) == 2);
static_assert(kRank <= 8 && kRank % 2 == 0 && kWarps <= 15);  // barriers beside that of __syncthreads
static_assert(kRank == 0 || kAlike<DT_TYPE, Bfloat>);

// What a tile's steps add: rows of two routes, which trade places so that eight lanes read distinct banks.
struct alignas(16) Left {
    unsigned rows[kTile][2][16];
    int to[2][kTile];  // where, in bytes, or less than 0 past the end
};
struct alignas(16) WarpMemory {
    Left left;
    float B[2][kTile], C[2][kTile];
    float2 state[32];  // what the warp of the tile before has left
    float2 bias[32];
};
struct alignas(16) BlockMemory {
    WarpMemory warps[kTurns][kPairs];
    unsigned long long full[kTurns], taken[kTurns], all;  // mbarriers: a turn's tiles are left, are taken; all is added
};
// kAllThreads threads; the sums follow, of each token 32 channels
extern "C" __device__ int launch_shape[2] = {0, (int)sizeof(BlockMemory)};

// Barriers of two warps of which one waits for its state.
DEVICE void await_warp(int at) { asm volatile("bar.sync %0, 64;" ::"r"(at) : "memory"); }
DEVICE void tell_warp(int at) { asm volatile("bar.arrive %0, 64;" ::"r"(at) : "memory"); }
DEVICE int state_of(int warp) { return warp + 1 & 15; }

DEVICE void begin(unsigned long long* at, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(count) : "memory");
}
DEVICE void tell(unsigned long long* at) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(shared_address(at)) : "memory");
}
DEVICE void await(unsigned long long* at, int parity) {
#if __CUDA_ARCH__ >= 900
    unsigned done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(shared_address(at)), "r"(parity) : "memory");
    } while (!done);
#endif
}

// Two channels of a row. x is wanted by all routes, which is what L2 is to keep; step sizes and y only once.
DEVICE unsigned read_pair(const char* at, unsigned long long policy) {
    unsigned word = 0;
#if __CUDA_ARCH__ >= 800
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.u32 %0, [%1], %2;"
                 : "=r"(word) : "l"(at), "l"(policy));
#endif
    return word;
}
template <bool kFirst> DEVICE unsigned long long evicted() {
    unsigned long long policy = 0;
#if __CUDA_ARCH__ >= 800
    if constexpr (kFirst) asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    else asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
#endif
    return policy;
}
// To L2. All loads of a warp are counted together, so that who waits for x also waits for step sizes that were asked for
// just before.
DEVICE void prefetch(const char* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }
DEVICE void write_once(char* to, uint4 v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
// Not a branch, which would wait for all that is on its way.
DEVICE void write_if(bool wanted, unsigned long long to, const float* v) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; @p st.global.v2.f32 [%1], {%2, %3}; }"
                 ::"r"((unsigned)wanted), "l"(to), "f"(v[0]), "f"(v[1]) : "memory");
}
template <class T> DEVICE float of_pair(unsigned word, int j) { return Pack<T, 2>{{word}}.get(j); }
DEVICE void get_tile(float* v, const float* at) {
#pragma unroll
    for (int t = 0; t < kTile; t += 4) {
        const float4 four = *(const float4*)(at + t);
        v[t] = four.x, v[t + 1] = four.y, v[t + 2] = four.z, v[t + 3] = four.w;
    }
}
// Where a token's sums lie: rows of an even and of an odd line of a map meet other banks where both are eight apart.
DEVICE int row_of(int token) { return token ^ (token >> 3 & 1); }

// A lane has channels 2 (lane / 4) and the next of 16, of which bit 0 tells; bit 1 tells the route.
DEVICE int half_of(int lane) { return lane >> 1 & 1; }
DEVICE int word_of(int lane) { return (lane & 1) * 8 + lane / 4; }
// Of the tokens, and of B and C, it keeps one step of its route.
DEVICE int step_of(int lane) { return lane & 1 | lane >> 1 & 14; }
DEVICE int lane_of(int half, int step) { return step & 1 | half << 1 | (step & 14) << 1; }
// What the lane of the same route has which keeps a step.
DEVICE int of_step(int value, int step) {
    int found;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x21f, 0xffffffff;"
                 : "=r"(found) : "r"(value), "r"(lane_of(0, step)));
    return found;
}

// Step sizes before softplus, of a tile that was asked for.
struct ReadPairs {
    Place at;
    unsigned long long policy;
    unsigned words[kTile];

    DEVICE ReadPairs(const Params& p, long long batch, int pair, int first, int lane) : policy(evicted<true>()) {
        const int route = 2 * pair + half_of(lane);
        at = place_of<DT_TYPE>(p.dt, batch, p.dt_b, route, p.dt_k, p.dt_l, 4 * word_of(lane) + 2 * first);
    }
    DEVICE void expect(int token) const { prefetch(at.at(token)); }
    DEVICE void ask(int token, int) {
#pragma unroll
        for (int t = 0; t < kTile; ++t) words[t] = read_pair(at.at(of_step(token, t)), policy);
    }
    DEVICE void get(float (*v)[2], float2 bias) const {
#pragma unroll
        for (int t = 0; t < kTile; ++t) {
            v[t][0] = fmaf(of_pair<DT_TYPE>(words[t], 0), kPerUnit, bias.x);
            v[t][1] = fmaf(of_pair<DT_TYPE>(words[t], 1), kPerUnit, bias.y);
        }
    }
};
// The same of a low rank, whose columns are two a lane. The first factor has 16 channels by 32 columns: the eight of the
// first route's lower and upper channels, and of the second route's. The second one has for each of these four, by two
// steps, the step's columns where they belong.
struct FormedPairs {
    Place at;
    unsigned long long policy;
    unsigned words[kTile / 2], high[2][4], low[2][4];

    DEVICE FormedPairs(const Params& p, long long batch, int pair, int first, int lane) : policy(evicted<false>()) {
        const int of = 2 * pair + lane / 16, column = 2 * (lane & 3);
        // Beyond the last column any of the row will do: its weight is 0.
        at = place_of<DT_TYPE>(p.dt, batch, p.dt_b, of, p.dt_k, p.dt_l, 2 * min(column, kRank - 2));
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const long long channel = (2 * pair + i / 4) * p.channels + first + i / 2 % 2 * 16 + 2 * (lane / 4) + i % 2;
            const float* weight = p.dt_weight + channel * kRank + column;
            const float v0 = column < kRank ? weight[0] : 0.f, v1 = column + 1 < kRank ? weight[1] : 0.f;
            split(v0 * kPerUnit, v1 * kPerUnit, high[i / 4][i % 4], low[i / 4][i % 4]);
        }
    }
    DEVICE void expect(int) const {}  // so few bytes
    DEVICE void ask(int token, int lane) {
        const int from = lane_of(lane / 16, lane >> 2 & 1);
#pragma unroll
        for (int i = 0; i < kTile / 2; ++i) {
            words[i] = read_pair(at.at(__shfl_sync(kAll, token, from + lane_of(0, 2 * i))), policy);
        }
    }
    DEVICE void get(float (*v)[2], float2 bias) const {
        const int of = (threadIdx.x & 31) >> 3;
#pragma unroll
        for (int i = 0; i < kTile / 2; ++i) {
            float d[4] = {bias.x, bias.x, bias.y, bias.y};
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const unsigned two[2] = {of == 2 * k ? words[i] : 0, of == 2 * k + 1 ? words[i] : 0};
                multiply_add(d, high[k], two);
                multiply_add(d, low[k], two);
            }
            v[2 * i][0] = d[0], v[2 * i + 1][0] = d[1], v[2 * i][1] = d[2], v[2 * i + 1][1] = d[3];
        }
    }
};
template <bool kFormed> struct ChoosePairs { using Type = ReadPairs; };
template <> struct ChoosePairs<true> { using Type = FormedPairs; };

// Of all tiles in their order, and of a tile's routes in theirs, what warps leave is added to the sums.
DEVICE void add_up(BlockMemory& block, char* sums, int tokens, int tiles, int adder, int lane) {
    struct Taken {
        uint4 pieces[kRoutes];
        int to[kRoutes];
    } even, odd;
    const int step = lane / 2, piece = adder * 2 + lane % 2;
    char* own = sums + piece * 16;
    for (int row = step; row < (tokens + 1 & ~1); row += 16) *(uint4*)(own + row * 64) = uint4{0, 0, 0, 0};
    __syncwarp();
    int turn = 0, parity = 0;
    auto take = [&](Taken& taken) {
        await(&block.full[turn], parity);
#pragma unroll
        for (int k = 0; k < kRoutes; ++k) {
            const Left& from = block.warps[turn][k / 2].left;
            taken.to[k] = from.to[k % 2][step];
            taken.pieces[k] = *(const uint4*)&from.rows[step][k % 2 ^ (step & 1)][piece * 4];
        }
    };
    auto add = [&](const Taken& taken, bool all) {
#pragma unroll
        for (int k = 0; k < kRoutes; ++k) {
            uint4* to = (uint4*)(own + taken.to[k]);
            if (all || taken.to[k] >= 0) *to = sum<Bfloat>(*to, taken.pieces[k]);
            __syncwarp();
        }
    };
    auto advance = [&] {
        __syncwarp();
        if (lane == 0) tell(&block.taken[turn]);
        if (++turn == kTurns) turn = 0, parity ^= 1;
    };
    take(even);
#pragma unroll 1
    for (int left = tiles;; left -= 2) {  // the next tile's are read before a tile's are added; the last may not be whole
        advance();
        if (left == 1) {
            add(even, false);
            break;
        }
        take(odd);
        add(even, true);
        advance();
        if (left == 2) {
            add(odd, false);
            break;
        }
        take(even);
        add(odd, true);
    }
    __syncwarp();
    if (lane == 0) tell(&block.all);
}

// Tiles of two routes in turn, left to be added up.
DEVICE void go_along(const Params& p, BlockMemory& block, int warp, int lane, int first, long long batch) {
    const int pair = warp % kPairs, from = warp / kPairs, half = half_of(lane), route = 2 * pair + half;
    const int steps = (int)p.steps, tiles = (steps + kTile - 1) / kTile, step = step_of(lane);
    const int channel = first + 2 * word_of(lane), following = from + 1 == kTurns ? 0 : from + 1;
    const long long sequence = batch * kRoutes + route;
    WarpMemory& own = block.warps[from][pair];
    WarpMemory& heir = block.warps[following][pair];  // of the state
    const int heirs_state = state_of(following * kPairs + pair);
    const Place at_x = place_of<X_TYPE>(p.x, batch, p.x_b, route, p.x_k, p.x_l, 2 * channel);
    const Place at_B = place_of<B_TYPE>(p.B, batch, p.B_b, route, p.B_k, p.B_l, 0);
    const Place at_C = place_of<C_TYPE>(p.C, batch, p.C_b, route, p.C_k, p.C_l, 0);
    const int* table = p.indices + route * steps;
    auto token_of = [&](int tile) { return __ldg(table + min(tile * kTile + step, steps - 1)); };

    float A[2], D[2], h[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const long long at = (long long)route * p.channels + channel + j;
        A[j] = p.A[at] * kDecay;
        D[j] = p.D ? p.D[at] : 0.f;
        if (p.dt_bias) (&own.bias[lane].x)[j] = p.dt_bias[at] * kPerUnit;
        h[j] = p.initial_state ? p.initial_state[sequence * p.channels + channel + j] : 0.f;
    }
    unsigned long long saved = (unsigned long long)(p.saved + sequence * tiles * p.channels + channel);
    keep(saved);
    const unsigned row = (unsigned)p.channels * 4;

    ChoosePairs<(kRank > 0)>::Type sizes(p, batch, pair, first, lane);
    const unsigned long long last = p.x_k ? evicted<true>() : evicted<false>();  // routes may have x of their own
    unsigned x[kTile], next_B, next_C;
    float a[kTile][2], b[kTile][2];
    auto ask = [&](int token) {
        sizes.ask(token, lane);
        prefetch(at_x.at(token));
        next_B = raw<B_TYPE>(at_B.at(token)), next_C = raw<C_TYPE>(at_C.at(token));
    };
    // All of a tile but its state. Its x is asked for here; what comes first is on its way since the warp's last tile.
    auto prepare = [&](int tile, int token, int next) {
        // The bias is read here, or the compiler would do all that follows between a state and the next.
        sizes.get(a, p.dt_bias ? own.bias[lane] : float2{0.f, 0.f});
        own.B[half][step] = Pack<B_TYPE, 1>{{next_B}}.get(0) * kUnit;
        own.C[half][step] = Pack<C_TYPE, 1>{{next_C}}.get(0);
#pragma unroll
        for (int t = 0; t < kTile; ++t) x[t] = read_pair(at_x.at(of_step(token, t)), last);
        ask(next);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2 * kTile; ++i) {
            float& s = b[i / 2][i % 2];
            s = step_size(a[i / 2][i % 2]);
            a[i / 2][i % 2] = decay(s, A[i % 2]);
        }
        float B[kTile];
        get_tile(B, own.B[half]);
#pragma unroll
        for (int t = 0; t < kTile; ++t) {
#pragma unroll
            for (int j = 0; j < 2; ++j) b[t][j] *= of_pair<X_TYPE>(x[t], j) * B[t];
        }
        const int left = steps - tile * kTile;
        if (left < kTile) {
#pragma unroll
            for (int i = 0; i < 2 * kTile; ++i) {
                if (i / 2 >= left) a[i / 2][i % 2] = 1.f, b[i / 2][i % 2] = 0.f;
            }
        }
    };
    int token = token_of(from), next = token_of(from + kTurns), after = token_of(from + 2 * kTurns);
    ask(token);
    __syncwarp();
    prepare(from, token, next);
    if (from == kTurns - 1) {  // the route's first state
        heir.state[lane] = make_float2(h[0], h[1]);
        tell_warp(heirs_state);
    }
    int parity = 1;
#pragma unroll 1
    for (int tile = from; tile < tiles; tile += kTurns) {
        sizes.expect(after);
        await_warp(state_of(warp));
        h[0] = own.state[lane].x, h[1] = own.state[lane].y;
        write_if(p.saved, multiply_add_wide(tile, row, saved), h);
#pragma unroll
        for (int i = 0; i < 2 * kTile; ++i) b[i / 2][i % 2] = h[i % 2] = fmaf(a[i / 2][i % 2], h[i % 2], b[i / 2][i % 2]);
        if (tile + 1 < tiles) {
            heir.state[lane] = make_float2(h[0], h[1]);
            tell_warp(heirs_state);
        }
        float C[kTile];
        get_tile(C, own.C[half]);
        unsigned y[kTile];
#pragma unroll
        for (int t = 0; t < kTile; ++t) {
            y[t] = narrow_pair<Bfloat>(fmaf(C[t], b[t][0], D[0] * of_pair<X_TYPE>(x[t], 0)),
                                       fmaf(C[t], b[t][1], D[1] * of_pair<X_TYPE>(x[t], 1)));
        }
        await(&block.taken[from], parity);
        parity ^= 1;
#pragma unroll
        for (int t = 0; t < kTile; ++t) own.left.rows[t][half ^ (t & 1)][word_of(lane)] = y[t];
        own.left.to[half][step] = tile * kTile + step < steps ? row_of(token) * 64 : -1;
        __syncwarp();
        if (lane == 0) tell(&block.full[from]);
        token = next, next = after;
        after = token_of(tile + 3 * kTurns);
        prepare(tile + kTurns, token, next);
    }
    if (p.last_state && from == (tiles - 1) % kTurns) {
#pragma unroll
        for (int j = 0; j < 2; ++j) p.last_state[sequence * p.channels + channel + j] = h[j];
    }
}

extern "C" __global__ void __launch_bounds__(kAllThreads, 1) walk_paired(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    // The oldest warps of a scheduler go first: those that add. A warp's number is the same in all lanes.
    const int thread = threadIdx.x, lane = thread & 31, warp = __shfl_sync(kAll, thread >> 5, 0) - kAdders;
    BlockMemory& block = *reinterpret_cast<BlockMemory*>(shared);
    char* sums = shared + sizeof(BlockMemory);
    const int groups = (int)p.channels / 32, first = (int)(blockIdx.x % (unsigned)groups) * 32;
    const long long batch = blockIdx.x / (unsigned)groups;

    if (thread < kTurns) begin(&block.full[thread], kPairs), begin(&block.taken[thread], kAdders);
    if (thread == 0) begin(&block.all, kAdders);
    __syncthreads();
    if (warp < 0) add_up(block, sums, (int)p.tokens, ((int)p.steps + kTile - 1) / kTile, warp + kAdders, lane);
    else go_along(p, block, warp, lane, first, batch);
    await(&block.all, 0);
    const Place at_y = place_of<Y_TYPE>(p.y, batch, p.y_b, 0, 0, p.y_l, first * (int)sizeof(Y_TYPE));
#pragma unroll 4
    for (int i = thread; i < (int)p.tokens * 4; i += kAllThreads) {
        write_once(at_y.at(i / 4) + i % 4 * 16, *(const uint4*)(sums + row_of(i / 4) * 64 + i % 4 * 16));
    }
}
