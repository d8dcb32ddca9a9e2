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
// groups), 0 in columns of other steps. Then over the columns through shared memory, over the blocks by the host's sum
// of partial results; all in fixed order.
// What limits the kernel are words that lanes read from shared memory, whether or not others read the same. So numbers
// of B and C of 16 bits are handed round by the tensor cores, exactly, and no two lanes of a bank write or read at
// once.
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
// Whether the numbers of B and C are handed round by the tensor cores.
constexpr bool kSpread = sizeof(B_TYPE) == 2 && sizeof(C_TYPE) == 2;
constexpr int kPairPitch = 84, kSecond = 48;  // of a pair of steps, and from the first to the second
constexpr int kPitch = 2 * kStates + 8;       // so that rows meet other banks
constexpr int kStepPitch = kTile + 4;
constexpr int kApart = kTeam / kTile;  // rows of B and C between two of a lane
constexpr int kShares = (2 * kStates + kApart - 1) / kApart;

using Rows = float[kSpread ? kTile / 2 : kTile][kSpread ? kPairPitch : kPitch];  // B, then C
struct Row {
    float4 of[kWarpChannels + 1];  // s x, dy, s, x
};
struct alignas(16) WarpMemory {
    Row rows[kTile];
    alignas(16) float s[kWarpChannels][kStepPitch];
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
    SUM_TYPE *dB, *dC;
    const float* saved;    // states before tiles, as if there were one before the first
    const float* initial;  // that one, or null
    int sums_stride;
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

// Sums over the four lanes of a quad of v factor, of two steps: v has the first two states of both, then the others.
DEVICE void add_products(float (*d)[4], const float (*v)[4], int q, int t, const float* factor) {
    const float f0 = q == t % 4 ? factor[0] : 0.f, f1 = q == t % 4 + 1 ? factor[1] : 0.f;
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

// d = A B, A 16 x 4 and B 4 x 8, as above.
DEVICE void multiply_tf32(float* d, float a0, float a1, float b0) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(b0)), "f"(0.f));
#endif
}
// Where a number of B or C stands in shared memory. To be handed round, a lane gives those of two neighbouring states,
// of one of two steps.
DEVICE float* place_of(Rows& rows, int t, int of) {
    return kSpread ? &rows[t / 2][t % 2 * kSecond + of] : &rows[t][of];
}
// B or C of a lane's states, of two steps. one: what says for which lanes' numbers a lane asks.
DEVICE void get_rows(float (*v)[kOwn], const Rows& rows, int kind, int t, int lane, const float* one) {
    if constexpr (kSpread) {
        const int at = (lane >> 1 & 1) * kSecond + kind * kStates + (lane >> 3) * kOwn + (lane & 1) * 2;
        const float2 own = *reinterpret_cast<const float2*>(&rows[t / 2][at]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float d[4];
            multiply_tf32(d, own.x, own.y, one[i]);
            v[i][0] = d[0], v[i][1] = d[2], v[i][2] = d[1], v[i][3] = d[3];
        }
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int at = kind * kStates + kOwn * (lane >> 3);
            get_four(v[i], *reinterpret_cast<const float4*>(&rows[t + i][at]));
        }
    }
}

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

// One step of the rows from `row` on, of so many that are there.
template <class T> DEVICE void read_rows(unsigned* bits, const T* tensor, int row, int stride, int there) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int of = row + r;
        bits[r] = read_bits(at_row(tensor, kWhole ? of : min(of, there - 1), stride * (int)sizeof(T)));
    }
}

struct Incoming {
    unsigned x[kRows], dt[kRows], dy[kRows], bc[kShares];
    float4 begin;
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) wave_backward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    BlockMemory& block = *reinterpret_cast<BlockMemory*>(shared);
    // The same in all lanes, which the compiler does not see otherwise.
    const int lane = threadIdx.x & 31, warp = __shfl_sync(kAll, (int)threadIdx.x >> 5, 0);
    const int turn = warp / kColumns, column = warp % kColumns;
    const int q = lane >> 3, group = lane & 7;
    WarpMemory& own = block.warps[turn][column];
    const int channels = (int)p.channels, steps = (int)p.steps;
    const int blocks = (channels + kBlockChannels - 1) / kBlockChannels;
    const int of_block = (int)blockIdx.x % blocks, sequence = (int)blockIdx.x / blocks;
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
        const long long sum = (((long long)batch * steps) * p.routes + route) * blocks + of_block;
        block.dB = (SUM_TYPE*)p.dB + sum * kStates, block.dC = (SUM_TYPE*)p.dC + sum * kStates;
        block.saved = p.saved + ((long long)sequence * (tiles - 1) - 1) * row_of_states + of_first * kStates;
        block.initial = p.initial_state ? p.initial_state + sequence * row_of_states + of_first * kStates : nullptr;
        block.sums_stride = (int)p.routes * blocks * kStates * (int)sizeof(SUM_TYPE);
    }
    // Of a lane's states of its channel, or of the last one that is there.
    const int own_states = min(column * kWarpChannels + group, there - 1) * kStates + kOwn * q;
    float A[kOwn];
    get_four(A, *reinterpret_cast<const float4*>(
                    p.A + (sequence % (int)p.routes) * row_of_states + of_first * kStates + own_states));
#pragma unroll
    for (int n = 0; n < kOwn; ++n) A[n] *= kLog2e;
    own.columns[0][lane] = own.columns[1][lane] = own.dA[lane] = make_float4(0.f, 0.f, 0.f, 0.f);

    float one[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) one[i] = (lane >> 1 & 1) == i && (lane >> 2 & 1) == (lane & 1) ? 1.f : 0.f;
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
                in.bc[k] = read_bits(at_row(B, row, (int)p.B_n * (int)sizeof(B_TYPE)));
            } else if (row < 2 * kStates) {
                in.bc[k] = read_bits(at_row(C, row - kStates, (int)p.C_n * (int)sizeof(C_TYPE)));
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
        Row& row = own.rows[l % kTile];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const bool here = valid && (kWhole || column * kWarpChannels + first + r < there);
            const float x = here ? widen_bits<X_TYPE>(in.x[r]) : 0.f, dy = here ? widen_bits<Y_TYPE>(in.dy[r]) : 0.f;
            row.of[first + r] = make_float4(s[r] * x, dy, s[r], x);
            own.s[first + r][l % kTile] = s[r];
        }
#pragma unroll
        for (int k = 0; k < kShares; ++k) {
            const int of = 2 * column + (int)(l / kTile) + k * kApart;
            const float v = is_of_B(k, of) ? widen_bits<B_TYPE>(in.bc[k]) : widen_bits<C_TYPE>(in.bc[k]);
            if (of < 2 * kStates) *place_of(block.rows[turn][odd], (int)(l % kTile), of) = valid ? v : 0.f;
        }
        own.begin[lane] = in.begin;
    };

    auto leave = [&](int tile, int odd) {  // the sums of a tile, over the columns
#pragma unroll
        for (int k = 0; k < (8 * kTile + kTeam - 1) / kTeam; ++k) {
            const int i = (int)(thread() - turn * kTeam) + k * kTeam, t = i / 8, part = i % 8, step = tile * kTile + t;
            if (i >= 8 * kTile || step >= steps) continue;
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
            store<true>(packed, at_row((part < 4 ? block.dB : block.dC) + part % 4 * 4, step, block.sums_stride), 1, 4);
        }
    };

    __syncthreads();
    fetch(tiles - 1 - turn);
    stage(tiles - 1 - turn, 0);
    int odd = 0;
#pragma unroll 1
    for (int tile = tiles - 1 - turn; tile >= 0; tile -= kTurns, odd ^= 1) {
        barrier_sync<kTeam>(1 + turn);  // rows are there, and sums of the tile before
        if (tile + kTurns < tiles) leave(tile + kTurns, odd ^ 1);
        const auto& rows = block.rows[turn][odd];
        // Decays, which become the gradients that go on to the step before.
        float go[kTile][kOwn], sums[2][4], kept[kKept ? kKept : 1][2][4];
        {
            float h[kOwn], s_four[4];
            Leaving leaving;
            get_four(h, own.begin[lane]);
#pragma unroll
            for (int t = 0; t < kTile; t += 2) {
                float behind[2][4], out[2];
                if (t % 4 == 0) get_four(s_four, *reinterpret_cast<const float4*>(own.s[group] + t));
                float b[2][kOwn];
                get_rows(b, rows, 0, t, lane, one);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const Row& row = own.rows[t + i];
                    const float2 both = *reinterpret_cast<const float2*>(&row.of[group]);
                    const float s = s_four[(t + i) % 4];
                    out[i] = both.y;
#pragma unroll
                    for (int n = 0; n < kOwn; ++n) {
                        go[t + i][n] = decay(s, A[n]);
                        h[n] = fmaf(go[t + i][n], h[n], both.x * b[i][n]);
                        behind[n / 2][2 * i + n % 2] = h[n];
                    }
                }
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    if (t / 2 >= kHeld) kept[t / 2 >= kHeld ? t / 2 - kHeld : 0][i / 4][i % 4] = behind[i / 4][i % 4];
                    else if (i % 4 == 0) own.held[t / 2 >= kHeld ? 0 : t / 2][i / 4][lane] = four(behind[i / 4]);
                }
                if (t % 4 == 0) clear(sums);
                if (t % 4 == 0 && t > 0) leaving.leave(own.sums[odd] + t - 4, kStates, lane);
                add_products(sums, behind, q, t, out);
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
            const float* at = p.dlast_state + sequence * row_of_states + of_first * kStates + own_states;
            if (p.dlast_state) last = __ldg(reinterpret_cast<const float4*>(at));
            get_four(carried, last);
        }
        float* inner_at = own.inner[0][group] + q;
        float inner[4], done;
        Leaving leaving;
#pragma unroll
        for (int t = kTile - 2; t >= 0; t -= 2) {
            float g[2][4], u[2], b[2][kOwn], c[2][kOwn];
            get_rows(b, rows, 0, t, lane, one);
            get_rows(c, rows, 1, t, lane, one);
#pragma unroll
            for (int i = 1; i >= 0; --i) {
                const float2 both = *reinterpret_cast<const float2*>(&own.rows[t + i].of[group]);
                u[i] = both.x;
                float& sum = inner[(t + i) % 4];
#pragma unroll
                for (int n = 0; n < kOwn; ++n) {
                    const float g_now = fmaf(c[i][n], both.y, carried[n]);
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
            float* at = p.dinitial_state + sequence * row_of_states + of_first * kStates + own_states;
            *reinterpret_cast<float4*>(at) = four(carried);
        }
        // All else.
        float dA[kOwn], behind[2][4], s_four[4];
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
            if (t % 4 == 2 && t + 2 < kTile) inner_at[kWarpChannels * kStepPitch + t + 2] = done;
            if (t % 4 == 0) {
                reduce_scatter<4, 16, 8>(inner, lane);
                done = inner[0];
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) behind[i / 4][i % 4] = ahead[i / 4][i % 4];
            if (t == kAskAt) fetch(tile - kTurns);  // what is past the first tile is not used
        }
        inner_at[kWarpChannels * kStepPitch] = done;
        __syncwarp();
        {
            float so_far[kOwn];
            get_four(so_far, own.dA[lane]);
#pragma unroll
            for (int n = 0; n < kOwn; ++n) so_far[n] += dA[n];
            own.dA[lane] = four(so_far);
        }
        {
            const unsigned l = thread() & 31;
            const int step = tile * kTile + (int)(l % kTile);
            DX_TYPE* dx = block.dx + step;
            DDT_TYPE* ddt = block.ddt + step;
            float shares[2][kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int place = (int)(l / kTile) * kRows + r;
                const float4 of = own.rows[l % kTile].of[place];
                const float gB = own.inner[0][place][l % kTile], out = of.y, s = of.z, x = of.w;
                const float dx_out = fmaf(block.D[column * kWarpChannels + place], out, s * gB);
                float ddt_out = fmaf(x, gB, own.inner[1][place][l % kTile] * kLn2);
                if (kSoftplus) ddt_out *= softplus_slope<sizeof(DT_TYPE) == 2>(s);
                else if (step >= steps) ddt_out = 0.f;
                shares[0][r] = out * x, shares[1][r] = ddt_out;
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
    for (int i = threadIdx.x; i < kBlockChannels * kStates; i += kThreads) {
        const int channel = i / kStates, state = i % kStates;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < kTurns; ++w) {
            sum += (&block.warps[w][channel / kWarpChannels].dA[state / 4 * 8 + channel % 8].x)[state % 4];
        }
        if (channel < there) p.dA[sequence * row_of_states + of_first * kStates + i] = sum;
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
        if (to && channel < there) to[(long long)sequence * channels + of_first + channel] = sum;
    }
}
