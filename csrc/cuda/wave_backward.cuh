// wave_backward.cuh: gradients of the scan of wide_backward.cuh for long routes of few sequences, whose tokens follow
// each other in memory in the order of the route and whose channels don't: 16 states a channel, step sizes given whole.
//
// Grid: a block = one (b, k) and kBlockChannels channels. Its warps take tiles of kTile steps in turn, from the last:
// warps of one `turn` and of all columns, each of kWarpChannels channels, are a team. The states of a tile do not
// depend on the gradients behind it: so a warp computes decays and states (from the one that forward has saved before
// the tile) before it waits for the gradient of the state behind its tile from the warp before; runs through the tile;
// hands on; and does all else after that. So each of them is computed once. Decays become the gradients that go on to
// the step before, in registers; states wait in shared memory, those behind the last steps in registers, too.
// Lane (q, group), q in the high bits, holds states 4 q to 4 q + 3 of channel `group` of its column. Before and after
// the scan it has step lane % kTile of four channels, so that a warp touches few rows of device memory.
// dB, dC: summed over a warp's channels by the tensor cores, which multiply as well, two steps and two states at a
// time: A holds g or h, of rows (q, half of the groups), B the factor s x or dy in column (step modulo 4, half of the
// groups), 0 in columns of other steps. Then over the columns through shared memory, over the blocks by further ones;
// all in fixed order.
// Blocks are numbered as they begin. Those beyond the scan's take multiprocessors that it leaves idle, or comes to
// leave, and add up the shares of dB and dC while it goes on. They wait for blocks that have begun, and nobody waits
// for them. What belongs to channels is added up over the batch by the last block that has them.
// What limits the kernel are words that lanes read from shared memory, whether or not others read the same. So numbers
// of B and C of 16 bits are handed round by the tensor cores, exactly, steps of a channel lie side by side, and no two
// lanes of a bank write or read at once. All that a write to shared memory has to wait for, reads behind it in the
// program wait for too: so what is read next stands in front of it.
#pragma once
#include "tf32.cuh"

constexpr bool kSoftplus = SOFTPLUS;
constexpr bool kWhole = WHOLE;         // blocks are full of channels
constexpr bool kTwoTerms = TWO_TERMS;  // numbers go to the tensor cores with their rest
constexpr int kColumns = COLUMNS;
constexpr int kTurns = 2;
constexpr int kTile = 16;
constexpr int kStates = 16;
constexpr int kOwn = 4;   // states of a lane
constexpr int kRows = 4;  // channels of which a lane has a step
constexpr int kWarpChannels = 8;
constexpr int kBlockChannels = kColumns * kWarpChannels;
constexpr int kTeam = 32 * kColumns;
constexpr int kThreads = kTurns * kTeam;
constexpr int kKept = 3;  // pairs of steps behind which states stay in registers, the last ones
constexpr int kHeld = kTile / 2 - kKept;
constexpr int kAskAt = 8;  // on the way back, the step at which decays have left registers to ask for another tile
// Whether numbers of B and C are handed round by the tensor cores.
constexpr bool kSpread = kAlike<B_TYPE, C_TYPE> && sizeof(B_TYPE) == 2;
constexpr int kSpreadPitch = 2 * kStates + 4;         // so that rows meet other banks
constexpr int kPitch = 2 * kStates + 8;
constexpr int kStepPitch = kTile + 4;
constexpr int kApart = kTeam / kTile;  // rows of B and C between two of a lane
constexpr int kShares = (2 * kStates + kApart - 1) / kApart;
constexpr int kTileSums = kTile * 2 * kStates;  // that a block leaves: step by step, of dB and then of dC
constexpr int kRun = 16 / sizeof(SUM_TYPE);     // of these that a lane adds up
// p.order: blocks that have begun, pieces of dB and dC that have been taken, levels of tiles (below), groups of channels.
constexpr int kTaken = 1, kLevels = 2, kGroups = 33;

template <bool> struct RowsOf {
    using Type = float[kTile][kPitch];
};
template <> struct RowsOf<true> {
    using Type = unsigned short[kTile][kSpreadPitch];  // as they were read
};
using Rows = RowsOf<kSpread>::Type;  // B, then C
struct alignas(16) WarpMemory {
    float s[kWarpChannels][kStepPitch], x[kWarpChannels][kStepPitch];
    float dy[kWarpChannels][kStepPitch], sx[kWarpChannels][kStepPitch];
    float inner[2][kWarpChannels][kStepPitch];  // <g, B>, <g h A>
    float4 held[kHeld][2][32];     // the states behind two steps: the first two of both, then the others
    float4 begin[32];              // the state before them
    float sums[2][kTile][kPitch];  // dB, then dC, of two tiles in turn
    float4 columns[2][32];         // a lane's shares of dD and ddt_bias
    float4 dA[32];
};
struct alignas(16) BlockMemory {
    WarpMemory warps[kTurns][kColumns];
    alignas(16) Rows rows[kTurns][2];        // of two tiles in turn
    float4 gradients[kTurns][kColumns][32];  // handed on
    alignas(16) float bias[kBlockChannels];
    float D[kBlockChannels];
    const X_TYPE* x;  // where the block's channels begin
    const DT_TYPE* dt;
    const Y_TYPE* dy;
    const B_TYPE* B;
    const C_TYPE* C;
    DX_TYPE* dx;
    DDT_TYPE* ddt;
    SUM_TYPE* sums;
    const float* saved;    // states before tiles, as if there were one before the first
    const float* initial;  // that one, or null
    long long states;      // where the block's begin in tensors that have kStates of each channel
    int sums_stride;       // bytes from one tile to the next
    int number;            // of the block
    int last;              // whether it is the last that has its channels
};
extern "C" __device__ int launch_shape[2] = {kThreads, (int)sizeof(BlockMemory)};

// A barrier of so many threads: some wait, others go on.
template <int kCount> DEVICE void barrier_sync(int id) {
    asm volatile("barrier.sync %0, %1;" :: "r"(id), "n"(kCount) : "memory");
}
template <int kCount> DEVICE void barrier_arrive(int id) {
    asm volatile("barrier.arrive %0, %1;" :: "r"(id), "n"(kCount) : "memory");
}

DEVICE void get_four(float* v, const float4& at) {
    const float4 four = at;
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}
DEVICE float4 four(const float* v) { return make_float4(v[0], v[1], v[2], v[3]); }

// Sums over the four lanes of a quad of v factor, of two steps: v has the first two states of both, then the others. A
// lane has the factor of step q of four.
DEVICE void add_products(float (*d)[4], const float (*v)[4], int q, int t, float factor) {
    const float f0 = q == t % 4 ? factor : 0.f, f1 = q == t % 4 + 1 ? factor : 0.f;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        multiply_add_tf32(d[i], v[i][0], v[i][1], v[i][2], v[i][3], f0, f1);
        if constexpr (kTwoTerms) {
            multiply_add_tf32(d[i], rest(v[i][0]), rest(v[i][1]), rest(v[i][2]), rest(v[i][3]), f0, f1);
            multiply_add_tf32(d[i], v[i][0], v[i][1], v[i][2], v[i][3], rest(f0), rest(f1));
        }
    }
}
DEVICE void clear(float (*d)[4]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) d[i / 4][i % 4] = 0.f;
}
// The sums of four steps. A lane has those of step lane % 4, of the half of the groups that is its own and of the
// other. They are left later than exchanged: what is read from shared memory behind that would wait for it.
struct Leaving {
    float kept[2], got[2];
    DEVICE void exchange(const float (*d)[4], int lane) {
        const bool upper = lane & 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float sent = upper ? d[0][2 * i + 1] : d[1][2 * i];
            kept[i] = upper ? d[1][2 * i + 1] : d[0][2 * i];
            got[i] = __shfl_xor_sync(kAll, sent, 4);
        }
    }
    DEVICE void leave(float (*at)[kPitch], int first, int lane) const {
        float* to = at[lane & 3] + first + (lane >> 3) * kOwn + (lane & 4 ? 2 : 0);
        *reinterpret_cast<float2*>(to) = make_float2(kept[0] + got[0], kept[1] + got[1]);
    }
};

// d = A B, A 16 x 8 and B 8 x 8: the lane gives of A the rows lane / 4 and lane / 4 + 8, columns 2 (lane % 4) and the
// next; of B column lane / 4 of those rows; and has of d what it gives of A.
template <class T> DEVICE void multiply_short(float* d, unsigned a0, unsigned a1, unsigned b0) {
#if __CUDA_ARCH__ >= 800
    if constexpr (kAlike<T, Bfloat>) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a0), "r"(a1), "r"(b0), "f"(0.f));
    } else {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a0), "r"(a1), "r"(b0), "f"(0.f));
    }
#endif
}
// B or C of a lane's states. To be handed round, four steps are read at once, a lane's own being one of them.
struct Given {
    uint2 own;
    DEVICE void read(const Rows& rows, int kind, int first, int lane) {
        if constexpr (kSpread) {
            own = *reinterpret_cast<const uint2*>(&rows[first + (lane & 3)][kind * kStates + (lane >> 3) * kOwn]);
        }
    }
    // Of two steps. one: what says for which lanes' numbers a lane asks.
    DEVICE void get(float (*v)[kOwn], const Rows& rows, int kind, int t, int lane, const unsigned* one) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if constexpr (kSpread) multiply_short<B_TYPE>(v[i], own.x, own.y, one[(t + i) % 4]);
            else get_four(v[i], *reinterpret_cast<const float4*>(&rows[t + i][kind * kStates + kOwn * (lane >> 3)]));
        }
    }
};

DEVICE unsigned thread() {  // the compiler must not keep what is worked out from it, for registers are scarcer
    unsigned t = threadIdx.x;
    asm volatile("" : "+r"(t));
    return t;
}

// Element `row` of a tensor whose rows are so many bytes apart. A product and a sum become one instruction so.
template <class T> DEVICE T* at_row(T* tensor, int row, int bytes) {
    __builtin_assume(__isGlobal(tensor));  // where a pointer comes from shared memory, this isn't seen
    long long product;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(product) : "r"(row), "r"(bytes));
    return (T*)((char*)tensor + product);
}

// Whether a row of B and C is of B, as far as possible decided beforehand.
DEVICE bool is_of_B(int k, int row) { return (k + 1) * kApart <= kStates || (k * kApart < kStates && row < kStates); }

// A number's bits, as read_bits; its neighbours are wanted soon, so L2 fetches the whole line.
template <class T> DEVICE unsigned read_along(const T* at) {
    unsigned bits = 0;
#if __CUDA_ARCH__ >= 800
    if constexpr (sizeof(T) == 4) {
        asm("ld.global.nc.L2::128B.u32 %0, [%1];" : "=r"(bits) : "l"(at));
    } else {
        unsigned short half;
        asm("ld.global.nc.L2::128B.u16 %0, [%1];" : "=h"(half) : "l"(at));
        bits = half;
    }
#endif
    return bits;
}
// One step of the rows from `row` on, of so many that are there.
template <class T> DEVICE void read_rows(unsigned* bits, const T* tensor, int row, int stride, int there) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int of = row + r;
        bits[r] = read_along(at_row(tensor, kWhole ? of : min(of, there - 1), stride * (int)sizeof(T)));
    }
}

struct Incoming {
    unsigned x[kRows], dt[kRows], dy[kRows], bc[kShares];
    float4 begin;
};

// Counts of what other blocks may read. The sums of tiles from kTurns 2^level to twice that have left when all teams have
// counted on that level; those of tiles before, on level 0. A count takes a wait for all that was written: so few of them
// are enough to let those who add up be close behind at the end.
DEVICE void count(int* at, int by) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" :: "l"(at), "r"(by) : "memory");
}
DEVICE int count_last(int* at) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(at) : "memory");
    return before;
}
DEVICE int counted(const int* at) {
    int v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}

template <class T> DEVICE void put_run(T* at, const float* sum, int stride) {
    Pack<T, kRun> packed;
    packed.set(sum);
    if (stride == 1) store<true>(packed, at, 1, kRun);
    else store<false>(packed, at, stride, kRun);
}
// dB and dC from the shares of `blocks` blocks, from the last tile on. A warp takes some steps, each of kLanes lanes.
DEVICE void add_up(const Params& p, int blocks) {
    constexpr int kLanes = kStates / kRun, kSteps = 32 / kLanes, kPieces = 2 * kTile / kSteps;
    const int lane = threadIdx.x & 31, sequences = (int)(p.batch * p.routes);
    const int tiles = ((int)p.steps + kTile - 1) / kTile, of_tile = sequences * kPieces;
    auto take = [&] { return lane == 0 ? atomicAdd(p.order + kTaken, 1) : 0; };
    int seen = 31, taken = take();  // a level above all
    while (true) {
        const int i = __shfl_sync(kAll, taken, 0);
        if (i >= tiles * of_tile) return;
        taken = take();  // while this one's shares are on their way
        const int tile = tiles - 1 - i / of_tile, sequence = i % of_tile / kPieces, piece = i % kPieces;
        const int level = tile < 2 * kTurns ? 0 : 31 - __clz(tile / kTurns);
        if (level < seen) {
            if (lane == 0) {
                while (counted(p.order + kLevels + level) < kTurns * sequences * blocks) __nanosleep(200);
            }
            __syncwarp();
            seen = level;
        }
        const int t = piece / 2 * kSteps + lane / kLanes, kind = piece % 2, n = lane % kLanes * kRun;
        const int step = tile * kTile + t;
        if (step >= (int)p.steps) continue;
        const SUM_TYPE* from = (const SUM_TYPE*)p.rows + ((long long)sequence * tiles + tile) * blocks * kTileSums;
        float sum[kRun] = {};
        add_parts<16, true>(sum, from + (2 * t + kind) * kStates + n, kTileSums, blocks);
        const int b = sequence / (int)p.routes, k = sequence % (int)p.routes;
        if (kind) put_run((C_TYPE*)p.dC + b * p.dC_b + step * p.dC_l + k * p.dC_k + n * p.dC_n, sum, (int)p.dC_n);
        else put_run((B_TYPE*)p.dB + b * p.dB_b + step * p.dB_l + k * p.dB_k + n * p.dB_n, sum, (int)p.dB_n);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1) wave_backward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    BlockMemory& block = *reinterpret_cast<BlockMemory*>(shared);
    if (threadIdx.x == 0) block.number = atomicAdd(p.order, 1);
    __syncthreads();
    // The same in all lanes, which the compiler does not see otherwise.
    const int lane = threadIdx.x & 31, warp = __shfl_sync(kAll, (int)threadIdx.x >> 5, 0);
    const int turn = warp / kColumns, column = warp % kColumns;
    const int q = lane >> 3, group = lane & 7;
    WarpMemory& own = block.warps[turn][column];
    const int channels = (int)p.channels, steps = (int)p.steps;
    const int blocks = (channels + kBlockChannels - 1) / kBlockChannels;
    const int number = __shfl_sync(kAll, block.number, 0), of_scan = (int)(p.batch * p.routes) * blocks;
    if (number >= of_scan) {
        add_up(p, blocks);
        return;
    }
    const int of_block = number % blocks, sequence = number / blocks;
    const int of_first = of_block * kBlockChannels, there = channels - of_first;  // channels from there on
    const int tiles = (steps + kTile - 1) / kTile;
    const long long row_of_states = (long long)channels * kStates;

    for (int i = threadIdx.x; i < kBlockChannels; i += kThreads) {
        const long long at = (long long)(sequence % (int)p.routes) * channels + of_first + i;
        block.bias[i] = i < there && p.dt_bias ? p.dt_bias[at] : 0.f;
        block.D[i] = i < there && p.D ? p.D[at] : 0.f;
    }
    if (threadIdx.x == 0) {
        const int route = sequence % (int)p.routes, batch = sequence / (int)p.routes;
        block.x = (const X_TYPE*)p.x + batch * p.x_b + route * p.x_k + of_first * p.x_d;
        block.dt = (const DT_TYPE*)p.dt + batch * p.dt_b + route * p.dt_k + of_first * p.dt_d;
        block.dy = (const Y_TYPE*)p.dy + batch * p.dy_b + route * p.dy_k + of_first * p.dy_d;
        block.B = (const B_TYPE*)p.B + batch * p.B_b + route * p.B_k;
        block.C = (const C_TYPE*)p.C + batch * p.C_b + route * p.C_k;
        block.dx = (DX_TYPE*)p.dx + batch * p.dx_b + route * p.dx_k + of_first * p.dx_d;
        block.ddt = (DDT_TYPE*)p.ddt + batch * p.ddt_b + route * p.ddt_k + of_first * p.ddt_d;
        block.sums = (SUM_TYPE*)p.rows + ((long long)sequence * tiles * blocks + of_block) * kTileSums;
        block.saved = p.saved + ((long long)sequence * (tiles - 1) - 1) * row_of_states + of_first * kStates;
        block.initial = p.initial_state ? p.initial_state + sequence * row_of_states + of_first * kStates : nullptr;
        block.states = sequence * row_of_states + of_first * kStates;
        block.sums_stride = blocks * kTileSums * (int)sizeof(SUM_TYPE);
    }
    // Of a lane's states of its channel, or of the last one that is there.
    const int own_states = min(column * kWarpChannels + group, there - 1) * kStates + kOwn * q;
    float A[kOwn];
    get_four(A, *reinterpret_cast<const float4*>(
                    p.A + (sequence % (int)p.routes) * row_of_states + of_first * kStates + own_states));
#pragma unroll
    for (int n = 0; n < kOwn; ++n) A[n] *= kLog2e;
    own.columns[0][lane] = own.columns[1][lane] = own.dA[lane] = make_float4(0.f, 0.f, 0.f, 0.f);

    unsigned one[4];  // for each step of four: column lane / 4 asks for the state of its parity
#pragma unroll
    for (int i = 0; i < 4; ++i) one[i] = (lane & 3) == i ? narrow<B_TYPE>(1.f).bits << (lane & 4 ? 16 : 0) : 0;
    Incoming in;
    auto fetch = [&](int tile) {
        const unsigned l = thread() & 31;
        const int step = min(max(tile, 0) * kTile + (int)(l % kTile), steps - 1);
        const int place = column * kWarpChannels + (int)(l / kTile) * kRows;
        read_rows(in.x, block.x + step, place, (int)p.x_d, there);
        read_rows(in.dt, block.dt + step, place, (int)p.dt_d, there);
        read_rows(in.dy, block.dy + step, place, (int)p.dy_d, there);
        const B_TYPE* B = at_row(block.B, step, (int)p.B_l * (int)sizeof(B_TYPE));
        const C_TYPE* C = at_row(block.C, step, (int)p.C_l * (int)sizeof(C_TYPE));
#pragma unroll
        for (int k = 0; k < kShares; ++k) {
            const int row = 2 * column + (int)(l / kTile) + k * kApart;
            if (is_of_B(k, row)) {
                in.bc[k] = read_along(at_row(B, row, (int)p.B_n * (int)sizeof(B_TYPE)));
            } else if (row < 2 * kStates) {
                in.bc[k] = read_along(at_row(C, row - kStates, (int)p.C_n * (int)sizeof(C_TYPE)));
            }
        }
        const float* at = tile > 0 ? at_row(block.saved, tile, channels * kStates * (int)sizeof(float)) : block.initial;
        in.begin = make_float4(0.f, 0.f, 0.f, 0.f);
        if (at) in.begin = __ldg(reinterpret_cast<const float4*>(at + own_states));
    };
    auto stage = [&](int tile, int odd) {
        const unsigned l = thread() & 31;
        const bool valid = tile * kTile + (int)(l % kTile) < steps;
        const int first = (int)(l / kTile) * kRows;
        float s[kRows];  // before any is written: what is read behind that waits for it
        get_four(s, *reinterpret_cast<const float4*>(block.bias + column * kWarpChannels + first));
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            s[r] += widen_bits<DT_TYPE>(in.dt[r]);
            if (kSoftplus) s[r] = softplus<sizeof(DT_TYPE) == 4>(s[r]);
            if (!valid) s[r] = 0.f;
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const bool here = valid && (kWhole || column * kWarpChannels + first + r < there);
            const float x = here ? widen_bits<X_TYPE>(in.x[r]) : 0.f, dy = here ? widen_bits<Y_TYPE>(in.dy[r]) : 0.f;
            own.s[first + r][l % kTile] = s[r], own.x[first + r][l % kTile] = x;
            own.dy[first + r][l % kTile] = dy, own.sx[first + r][l % kTile] = s[r] * x;
        }
#pragma unroll
        for (int k = 0; k < kShares; ++k) {
            const int of = 2 * column + (int)(l / kTile) + k * kApart;
            if (of >= 2 * kStates) continue;
            auto& at = block.rows[turn][odd][l % kTile][of];
            if constexpr (kSpread) at = valid ? in.bc[k] : 0;
            else at = !valid ? 0.f : is_of_B(k, of) ? widen_bits<B_TYPE>(in.bc[k]) : widen_bits<C_TYPE>(in.bc[k]);
        }
        own.begin[lane] = in.begin;
    };

    auto leave = [&](int tile, int odd) {  // the sums of a tile, over the columns
#pragma unroll
        for (int k = 0; k < (8 * kTile + kTeam - 1) / kTeam; ++k) {
            const int i = (int)(thread() - turn * kTeam) + k * kTeam, t = i / 8, part = i % 8;
            if (i >= 8 * kTile) continue;
            float sum[4];
            get_four(sum, *reinterpret_cast<const float4*>(block.warps[turn][0].sums[odd][t] + 4 * part));
#pragma unroll
            for (int w = 1; w < kColumns; ++w) {
                const float4 v = *reinterpret_cast<const float4*>(block.warps[turn][w].sums[odd][t] + 4 * part);
                sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
            }
            if constexpr (!kTwoTerms) {
                const float factor = part < 4 || sizeof(Y_TYPE) == 4 ? kTruncated * kTruncated : kTruncated;
#pragma unroll
                for (int n = 0; n < 4; ++n) sum[n] *= factor;
            }
            Pack<SUM_TYPE, 4> packed;
            packed.set(sum);
            store<true>(packed, at_row(block.sums + 4 * i, tile, block.sums_stride), 1, 4);
        }
    };

    __syncthreads();
    fetch(tiles - 1 - turn);
    stage(tiles - 1 - turn, 0);
    int odd = 0;
#pragma unroll 1
    for (int tile = tiles - 1 - turn; tile >= 0; tile -= kTurns, odd ^= 1) {
        barrier_sync<kTeam>(1 + turn);  // rows are there, and sums of the tile before
        // Those of two tiles before have left. A warp that leaves none has the time to wait until they are written.
        const int round = tile / kTurns + 2;
        if ((round & (round - 1)) == 0 && column == kColumns - 1 && lane == 0) count(p.order + kLevels + 31 - __clz(round), 1);
        // What the first steps take is asked for before the sums leave.
        const auto& rows = block.rows[turn][odd];
        float h[kOwn], s_four[4], sx_four[4], out;
        Given given;
        get_four(h, own.begin[lane]);
        auto get_steps = [&](int t) {
            get_four(s_four, *reinterpret_cast<const float4*>(own.s[group] + t));
            get_four(sx_four, *reinterpret_cast<const float4*>(own.sx[group] + t));
            out = own.dy[group][t + q];
            given.read(rows, 0, t, lane);
        };
        get_steps(0);
        if (tile + kTurns < tiles) leave(tile + kTurns, odd ^ 1);
        // Decays, which become the gradients that go on to the step before.
        float go[kTile][kOwn], sums[2][4], kept[kKept ? kKept : 1][2][4];
        {
            Leaving leaving;
#pragma unroll
            for (int t = 0; t < kTile; t += 2) {
                float behind[2][4], b[2][kOwn];
                const float factor = out;
                given.get(b, rows, 0, t, lane, one);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float s = s_four[(t + i) % 4], sx = sx_four[(t + i) % 4];
#pragma unroll
                    for (int n = 0; n < kOwn; ++n) {
                        go[t + i][n] = decay(s, A[n]);
                        h[n] = fmaf(go[t + i][n], h[n], sx * b[i][n]);
                        behind[n / 2][2 * i + n % 2] = h[n];
                    }
                }
                if (t % 4 == 2 && t + 2 < kTile) get_steps(t + 2);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    if (t / 2 >= kHeld) kept[t / 2 >= kHeld ? t / 2 - kHeld : 0][i / 4][i % 4] = behind[i / 4][i % 4];
                    else if (i % 4 == 0) own.held[t / 2 >= kHeld ? 0 : t / 2][i / 4][lane] = four(behind[i / 4]);
                }
                if (t % 4 == 0) clear(sums);
                if (t % 4 == 0 && t > 0) leaving.leave(own.sums[odd] + t - 4, kStates, lane);
                add_products(sums, behind, q, t, factor);
                if (t % 4 == 2) leaving.exchange(sums, lane);
            }
            leaving.leave(own.sums[odd] + kTile - 4, kStates, lane);
        }
        // The chain, and what needs its gradients alone.
        float carried[kOwn];
        if (tile < tiles - 1) {
            barrier_sync<64>(1 + kTurns + warp);
            get_four(carried, block.gradients[turn][column][lane]);
        } else {
            float4 last = make_float4(0.f, 0.f, 0.f, 0.f);
            const float* at = p.dlast_state + block.states + own_states;
            if (p.dlast_state) last = __ldg(reinterpret_cast<const float4*>(at));
            get_four(carried, last);
        }
        float* inner_at = own.inner[0][group] + q;
        float inner[4], done, dy_four[4], u;
        Leaving leaving;
        Given of_B, of_C;
#pragma unroll
        for (int t = kTile - 2; t >= 0; t -= 2) {
            float g[2][4], b[2][kOwn], c[2][kOwn];
            if (t % 4 == 2) get_four(dy_four, *reinterpret_cast<const float4*>(own.dy[group] + t - 2));
            if (t % 4 == 2) u = own.sx[group][t - 2 + q];
            if (t % 4 == 2) of_B.read(rows, 0, t - 2, lane), of_C.read(rows, 1, t - 2, lane);
            of_B.get(b, rows, 0, t, lane, one);
            of_C.get(c, rows, 1, t, lane, one);
#pragma unroll
            for (int i = 1; i >= 0; --i) {
                const float dy = dy_four[(t + i) % 4];
                float& sum = inner[(t + i) % 4];
#pragma unroll
                for (int n = 0; n < kOwn; ++n) {
                    const float g_now = fmaf(c[i][n], dy, carried[n]);
                    carried[n] = go[t + i][n] *= g_now;
                    g[n / 2][2 * i + n % 2] = g_now;
                    sum = n ? fmaf(g_now, b[i][n], sum) : g_now * b[i][n];
                }
            }
            if (t % 4 == 2) clear(sums);
            add_products(sums, g, q, t, u);
            if (t % 4 == 2 && t + 2 < kTile) leaving.leave(own.sums[odd] + t + 2, 0, lane), inner_at[t + 2] = done;
            if (t % 4 == 0) {
                leaving.exchange(sums, lane);
                reduce_scatter<4, 16, 8>(inner, lane);
                done = inner[0];
            }
        }
        leaving.leave(own.sums[odd], 0, lane), inner_at[0] = done;
        if (tile > 0) {
            const int next = (turn + 1) % kTurns;
            block.gradients[next][column][lane] = four(carried);
            barrier_arrive<64>(1 + kTurns + next * kColumns + column);
        } else if (p.dinitial_state && (kWhole || column * kWarpChannels + group < there)) {
            float* at = p.dinitial_state + block.states + own_states;
            *reinterpret_cast<float4*>(at) = four(carried);
        }
        // All else.
        float dA[kOwn], behind[2][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (kKept) behind[i / 4][i % 4] = kept[kKept ? kKept - 1 : 0][i / 4][i % 4];
            else if (i % 4 == 0) get_four(behind[i / 4], own.held[kHeld - 1][i / 4][lane]);
        }
#pragma unroll
        for (int t = kTile - 2; t >= 0; t -= 2) {
            float ahead[2][4], before[2][kOwn];
            if (t % 4 == 2) get_four(s_four, *reinterpret_cast<const float4*>(own.s[group] + t - 2));
            if (t > 0) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const int pair = t > 0 ? t / 2 - 1 : 0;
                    if (pair >= kHeld) ahead[i / 4][i % 4] = kept[pair >= kHeld ? pair - kHeld : 0][i / 4][i % 4];
                    else if (i % 4 == 0) get_four(ahead[i / 4], own.held[pair >= kHeld ? 0 : pair][i / 4][lane]);
                }
#pragma unroll
                for (int n = 0; n < kOwn; ++n) before[0][n] = ahead[n / 2][2 + n % 2];
            } else {
                get_four(before[0], own.begin[lane]);
            }
#pragma unroll
            for (int n = 0; n < kOwn; ++n) before[1][n] = behind[n / 2][n % 2];
#pragma unroll
            for (int i = 1; i >= 0; --i) {
                const float s = s_four[(t + i) % 4];
                float& sum = inner[(t + i) % 4];
#pragma unroll
                for (int n = 0; n < kOwn; ++n) {
                    const float product = go[t + i][n] * before[i][n];
                    sum = n ? fmaf(product, A[n], sum) : product * A[n];
                    dA[n] = t + i + 1 < kTile ? fmaf(product, s, dA[n]) : product * s;
                }
            }
            if (t == kAskAt) fetch(tile - kTurns);  // what is past the first tile is not used
            if (t % 4 == 0) {
                if (t + 4 < kTile) inner_at[kWarpChannels * kStepPitch + t + 4] = done;
                reduce_scatter<4, 16, 8>(inner, lane);
                done = inner[0];
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) behind[i / 4][i % 4] = ahead[i / 4][i % 4];
        }
        {
            const unsigned l = thread() & 31;
            float so_far[kOwn], s[kRows], x[kRows], dy[kRows];
            get_four(so_far, own.dA[lane]);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int place = (int)(l / kTile) * kRows + r;
                dy[r] = own.dy[place][l % kTile], s[r] = own.s[place][l % kTile], x[r] = own.x[place][l % kTile];
            }
            inner_at[kWarpChannels * kStepPitch] = done;
            __syncwarp();
#pragma unroll
            for (int n = 0; n < kOwn; ++n) so_far[n] += dA[n];
            own.dA[lane] = four(so_far);
            const int step = tile * kTile + (int)(l % kTile);
            DX_TYPE* dx = block.dx + step;
            DDT_TYPE* ddt = block.ddt + step;
            float shares[2][kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int place = (int)(l / kTile) * kRows + r;
                const float gB = own.inner[0][place][l % kTile];
                const float dx_out = fmaf(block.D[column * kWarpChannels + place], dy[r], s[r] * gB);
                float ddt_out = fmaf(x[r], gB, own.inner[1][place][l % kTile] * kLn2);
                if (kSoftplus) ddt_out *= softplus_slope<sizeof(DT_TYPE) == 2>(s[r]);
                else if (step >= steps) ddt_out = 0.f;
                shares[0][r] = dy[r] * x[r], shares[1][r] = ddt_out;
                if (step < steps && (kWhole || column * kWarpChannels + place < there)) {
                    const int of = column * kWarpChannels + place;
                    *at_row(dx, of, (int)p.dx_d * (int)sizeof(DX_TYPE)) = narrow<DX_TYPE>(dx_out);
                    *at_row(ddt, of, (int)p.ddt_d * (int)sizeof(DDT_TYPE)) = narrow<DDT_TYPE>(ddt_out);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float so_far[kRows];
                get_four(so_far, own.columns[i][l]);
#pragma unroll
                for (int r = 0; r < kRows; ++r) so_far[r] += shares[i][r];
                own.columns[i][l] = four(so_far);
            }
        }
        if (tile >= kTurns) stage(tile - kTurns, odd ^ 1);
    }
    __syncthreads();
    if (turn < tiles) leave((tiles - 1 - turn) % kTurns, odd ^ 1);
    const int first = block.number % blocks * kBlockChannels;  // once more, rather than in a register all the time
    for (int i = threadIdx.x; i < kBlockChannels * kStates; i += kThreads) {
        const int channel = i / kStates, state = i % kStates;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < kTurns; ++w) {
            sum += (&block.warps[w][channel / kWarpChannels].dA[state / 4 * 8 + channel % 8].x)[state % 4];
        }
        if (first + channel < channels) p.dA[block.states + i] = sum;
    }
    for (int i = threadIdx.x; i < 2 * kBlockChannels; i += kThreads) {
        const int kind = i / kBlockChannels, channel = i % kBlockChannels, place = channel % kWarpChannels;
        float sum = 0.f;
        for (int w = 0; w < kTurns; ++w) {
#pragma unroll
            for (int l = 0; l < kTile; ++l) {
                const float4& four = block.warps[w][channel / kWarpChannels].columns[kind][place / kRows * kTile + l];
                sum += (&four.x)[place % kRows];
            }
        }
        float* to = kind ? p.ddt_bias : p.dD;
        if (to && first + channel < channels) to[block.states / kStates + channel] = sum;
    }
    __syncthreads();
    if (threadIdx.x == 0) count(p.order + kLevels, kTurns);
    if (!p.sum_channels) return;
    // The last block of those that have its channels adds up over the batch.
    const int of_routes = (int)p.routes * blocks;
    if (threadIdx.x == 32) block.last = count_last(p.order + kGroups + block.number % of_routes) + 1 == p.batch;
    __syncthreads();
    if (!block.last) return;
    const long long all = p.routes * channels, before = block.states / kStates % all;
    for (int i = threadIdx.x; i < min(channels - first, kBlockChannels) * (kStates / 4 + 2); i += kThreads) {
        const int channel = i / (kStates / 4 + 2), part = i % (kStates / 4 + 2);
        if (part < kStates / 4) {
            const long long at = (before + channel) * kStates + part * 4;
            float sum[4] = {};
            add_parts<8, true>(sum, (const Float*)p.dA + at, all * kStates, (int)p.batch);
            *reinterpret_cast<float4*>(p.sum_channels + at) = four(sum);
        } else {
            const float* from = part == kStates / 4 ? p.dD : p.ddt_bias;
            float sum[1] = {};
            if (from) add_parts<8, true>(sum, (const Float*)from + before + channel, all, (int)p.batch);
            p.sum_channels[all * (kStates + part - kStates / 4) + before + channel] = sum[0];
        }
    }
}
