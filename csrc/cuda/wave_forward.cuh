// wave_forward.cuh: h_t = exp(s_t A) h_{t-1} + s_t B_t x_t, y_t = <C_t, h_t> + D x_t, for long routes of few sequences that
// go in order through tokens which are neighbours in memory.
//
// Grid: a block = kColumns columns, a column = one (b, k) and 16 channels, which each of its kTurns warps holds whole; they
// take the tiles of eight steps in turn (wave.cuh). Columns have nothing to do with each other, but that they keep step: a
// multiprocessor's scheduler prefers some blocks to others, which are left alone in the end.
// Lane (group, q), q in the low bits, holds states 4 q to 4 q + 3 of channels group and group + 8, and x and dt of steps q
// and q + 4 of these channels; only the step sizes are exchanged through shared memory. s x B and <C, h> are products on
// the tensor cores, whose layout is that of the states and of x: of s x, in two halves, with the B of one step, the others
// being 0; and of the states behind a step with the C of all eight, of which one counts.
// The decays of a tile do not hang on the state before it; the chain leaves the states behind every step in the decays'
// place, for <C, h> once the last one is handed on. They are made at the end of the loop, for the tile that is next: made
// in the same turn, the assembler would move them behind the wait for the state, into the chain. All loads are of one
// counter, so that what waits for one of them waits for all: they are asked for at one place, before the decays.
// Precision: states and sums in float32. s x B is good to 2^-17 where B is bfloat16, to 2^-21 otherwise. <C, h> takes 11
// digits of h where y is stored in 16 bits, two terms of each otherwise.
#pragma once
#include "tf32.cuh"
#include "wave.cuh"

constexpr int kTurns = TURNS;      // warps of a column
constexpr int kColumns = COLUMNS;  // of a block
constexpr bool kSoftplus = SOFTPLUS;
constexpr bool kWhole = WHOLE;  // columns are full of channels, and lanes of states

constexpr int kTile = 8;            // steps
constexpr int kSaved = 16 * EVERY;  // steps between two states that are saved
constexpr int kRow = 16;            // states
constexpr int kChannels = 16;       // of a column
constexpr int kTogether = 32;       // tiles of a warp between two at which columns wait for each other
constexpr int kThreads = 32 * kTurns * kColumns;
constexpr int kPitch = kTile + 4;  // so that rows meet other banks

template <class T> constexpr bool kIsBfloat = false;
template <> constexpr bool kIsBfloat<Bfloat> = true;
constexpr bool kShort = kIsBfloat<B_TYPE>;
constexpr bool kFewDigits = sizeof(Y_TYPE) == 2;

// Of a number whose softplus is 0 whatever bias is added: dt past the end.
template <class T> constexpr unsigned kLowest = 0xf149f2cau;
template <> constexpr unsigned kLowest<Bfloat> = 0xf14au;
template <> constexpr unsigned kLowest<Half> = 0xfbffu;

template <class T> DEVICE void write(T* at, float v) {
    if constexpr (sizeof(T) == 4) *reinterpret_cast<unsigned*>(at) = __float_as_uint(v);
    else *reinterpret_cast<unsigned short*>(at) = narrow<T>(v).bits;
}

// A number that the compiler keeps rather than work it out again.
DEVICE unsigned kept(unsigned v) { return __shfl_sync(kAll, v, threadIdx.x & 31); }
DEVICE void put_shared(unsigned at, float v) { asm volatile("st.shared.f32 [%0], %1;" :: "r"(at), "f"(v) : "memory"); }
DEVICE float4 get_shared(unsigned at) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(at) : "memory");
    return v;
}

// d = A B in bfloat16, 16 x 8 and 8 x 8: of A the lane gives rows lane / 4 and lane / 4 + 8 of columns 2 (lane % 4) and the
// next; of B column lane / 4 of those rows; and has of d those rows and columns.
DEVICE void product(float* d, unsigned a0, unsigned a1, unsigned b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a0), "r"(a1), "r"(b), "f"(0.f));
#endif
}

// The columns' first warps wait for each other now and then.
DEVICE void keep_step(int tile) {
    if (kColumns > 1 && tile % (kTurns * kTogether) == 0) {
        asm volatile("bar.sync %0, %1;" :: "n"(1 + kColumns * kTurns), "n"(32 * kColumns) : "memory");
    }
}

static_assert(kColumns * kTurns <= 14);  // barriers, beside that of __syncthreads and that of columns
struct BlockMemory {
    Wave<kTurns, 8>::Memory waves[kColumns];
    float s[kColumns * kTurns][kChannels][kPitch];  // of each warp's tile
};
extern "C" __device__ int launch_shape[2] = {kThreads, (int)sizeof(BlockMemory)};

extern "C" __global__ void __launch_bounds__(kThreads, 3 / kColumns) wave_forward(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    BlockMemory& block = *reinterpret_cast<BlockMemory*>(shared);
    const int lane = threadIdx.x & 31, warp = __shfl_sync(kAll, (int)threadIdx.x >> 5, 0);
    const int turn = warp / kColumns, column = warp % kColumns;  // so that a scheduler has different turns
    const int q = lane % 4, group = lane / 4;
    const int channels = (int)p.channels, steps = (int)p.steps, states = kWhole ? kRow : (int)p.states;
    const int groups = (channels + kChannels - 1) / kChannels, tiles = (steps + kTile - 1) / kTile;
    const unsigned number = blockIdx.x * kColumns + column, sequence = number / groups;
    const int first = number % groups * kChannels + group, route = sequence % (int)p.routes;
    const long long batch = sequence / (int)p.routes;
    if (batch >= p.batch) {  // of the last block
        for (int tile = turn; tile < tiles; tile += kTurns) keep_step(tile);
        return;
    }
    // Of B a lane reads steps q and q + 4 of states state_B and state_B + 2, of C its four states of step_C: these are what
    // it gives to the products, whose columns are then the states as lanes hold them, and steps as lanes have x.
    const int state_B = 4 * (group / 2) + group % 2, step_C = group / 2 + 4 * (group % 2);
    const X_TYPE* x = (const X_TYPE*)p.x + batch * p.x_b + route * p.x_k + first * p.x_d + q;
    const DT_TYPE* dt = (const DT_TYPE*)p.dt + batch * p.dt_b + route * p.dt_k + first * p.dt_d + q;
    const B_TYPE* B = (const B_TYPE*)p.B + batch * p.B_b + route * p.B_k + state_B * p.B_n + q;
    const C_TYPE* C = (const C_TYPE*)p.C + batch * p.C_b + route * p.C_k + 4 * q * p.C_n + step_C;
    Y_TYPE* y = (Y_TYPE*)p.y + batch * p.y_b + route * p.y_k + first * p.y_d + q;
    bool there[2];
    float bias[2], skip[2], A[2][4], h[8];  // of h, as of what goes into it, both channels of a state are neighbours
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const int channel = first + 8 * j;
        const long long at = (long long)route * channels + channel;
        there[j] = kWhole || channel < channels;
        bias[j] = there[j] && p.dt_bias ? p.dt_bias[at] : 0.f;
        skip[j] = there[j] && p.D ? p.D[at] : 0.f;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const bool both = there[j] && 4 * q + n < states;
            const bool given = both && turn == 0 && p.initial_state;
            A[j][n] = both ? p.A[at * states + 4 * q + n] * kLog2e : 0.f;
            const long long state = ((long long)sequence * channels + channel) * states + 4 * q + n;
            h[2 * n + j] = given ? p.initial_state[state] : 0.f;
        }
    }

    unsigned in_dt[2][2], in_x[2][2], in_B[2][2], in_C[4];
    auto past = [&](int tile, int step) { return tile * kTile + step >= steps; };
    auto ask_dt = [&](int tile, bool all) {
        const DT_TYPE* from = dt + tile * kTile;
#pragma unroll
        for (int j = 0; j < 2; ++j, from += 8 * p.dt_d) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const bool beyond = !all && past(tile, q + 4 * k);
                in_dt[j][k] = beyond ? kLowest<DT_TYPE> : there[j] ? read_bits(from + 4 * k) : 0;
            }
        }
    };
    auto ask_x_and_B = [&](int tile, bool all) {
        const X_TYPE* from_x = x + tile * kTile;
        const B_TYPE* from_B = B + tile * kTile;
#pragma unroll
        for (int j = 0; j < 2; ++j, from_x += 8 * p.x_d, from_B += 2 * p.B_n) {
            const bool has = kWhole || state_B + 2 * j < states;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const bool in_time = all || !past(tile, q + 4 * k);
                in_x[j][k] = in_time && there[j] ? read_bits(from_x + 4 * k) : 0;
                in_B[j][k] = in_time && has ? read_bits(from_B + 4 * k) : 0;
            }
        }
    };
    auto ask_C = [&](int tile, bool all) {
        const C_TYPE* from = C + tile * kTile;
#pragma unroll
        for (int n = 0; n < 4; ++n, from += p.C_n) {
            const bool in_time = all || !past(tile, step_C);
            in_C[n] = in_time && (kWhole || 4 * q + n < states) ? read_bits(from) : 0;
        }
    };
    // Where the lane's states before the first tile would be saved; the first that are come one row later.
    const long long pieces = ((steps + 15) / 16 - 1) / EVERY;
    float* saved = p.saved + (((long long)sequence * pieces - 1) * channels + first) * kRow + 4 * q;
    const unsigned saved_by = (unsigned)channels * kRow;
    const Wave<kTurns, 8> wave{block.waves[column], 1 + column * kTurns};
    const unsigned own = kept((unsigned)__cvta_generic_to_shared(block.s[warp][group])), own_s = kept(own + 4 * q);
    float a[kTile][8], u[2][2], left[2][2], out[2][2];
    unsigned halves[2][2], of_B[2][2];
    // All of a tile that needs no state before it: step sizes, s x in two halves (with a bfloat16 B side by side in
    // bfloat16, apart in TF32 otherwise), decays. In between, what is read next is asked for.
    auto prepare = [&](int tile) {
        float s[2][2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float v = widen_bits<DT_TYPE>(in_dt[j][k]) + bias[j];
                if (kSoftplus) s[j][k] = softplus<sizeof(DT_TYPE) == 4>(v);
                else s[j][k] = past(tile, q + 4 * k) ? 0.f : v;
                put_shared(own_s + 4 * (8 * j * kPitch + 4 * k), s[j][k]);
            }
        }
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float of_x = widen_bits<X_TYPE>(in_x[j][k]), v = s[j][k] * of_x;
                out[j][k] = skip[j] * of_x;
                u[j][k] = kShort ? __uint_as_float((__float_as_uint(v) + 0x8000u) & 0xffff0000u) : upper(v);
                left[j][k] = v - u[j][k];
                halves[j][k] = narrow_pair<Bfloat>(u[j][k], left[j][k]);
                of_B[j][k] = kShort ? __byte_perm(in_B[j][k], 0, 0x1010) : in_B[j][k];
            }
        }
        const int next = tile + kTurns;
        if ((next + 1) * kTile <= steps) ask_C(tile, true), ask_dt(next, true), ask_x_and_B(next, true);
        else ask_C(tile, false), ask_dt(next, false), ask_x_and_B(next, false);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
            for (int t = 0; t < kTile; t += 4) {
                const float4 four = get_shared(own + 4 * (8 * j * kPitch + t));
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    a[t][2 * n + j] = decay(four.x, A[j][n]), a[t + 1][2 * n + j] = decay(four.y, A[j][n]);
                    a[t + 2][2 * n + j] = decay(four.z, A[j][n]), a[t + 3][2 * n + j] = decay(four.w, A[j][n]);
                }
            }
        }
    };
    if ((turn + 1) * kTile <= steps) ask_dt(turn, true), ask_x_and_B(turn, true);
    else ask_dt(turn, false), ask_x_and_B(turn, false);
    prepare(turn);
    for (int tile = turn; tile < tiles; tile += kTurns) {
        const bool full = (tile + 1) * kTile <= steps;
        keep_step(tile);
        auto input = [&](float* ub, int t) {  // s x B of a step
            float d[4] = {}, e[4] = {};
            const int k = t / 4;
            const bool mine = q == t % 4;
            if (kShort) {
                product(d, halves[0][k], halves[1][k], mine ? of_B[0][k] : 0u);
                product(e, halves[0][k], halves[1][k], mine ? of_B[1][k] : 0u);
            } else {
                const float b0 = mine ? widen_bits<B_TYPE>(of_B[0][k]) : 0.f;
                const float b1 = mine ? widen_bits<B_TYPE>(of_B[1][k]) : 0.f;
                multiply_add_tf32(d, u[0][k], u[1][k], left[0][k], left[1][k], b0, b0);
                multiply_add_tf32(e, u[0][k], u[1][k], left[0][k], left[1][k], b1, b1);
                if (sizeof(B_TYPE) == 4) {
                    multiply_add_tf32(d, u[0][k], u[1][k], 0.f, 0.f, rest(b0), 0.f);
                    multiply_add_tf32(e, u[0][k], u[1][k], 0.f, 0.f, rest(b1), 0.f);
                }
            }
            ub[0] = d[0], ub[1] = d[2], ub[2] = d[1], ub[3] = d[3], ub[4] = e[0], ub[5] = e[2], ub[6] = e[1], ub[7] = e[3];
        };
        if (tile > 0) wave.take(h, turn);
#pragma unroll
        for (int t = 0; t < kTile; ++t) {
            float ub[8];
            input(ub, t);
#pragma unroll
            for (int n = 0; n < 8; ++n) a[t][n] = h[n] = fmaf(a[t][n], h[n], ub[n]);
        }
        if (tile + 1 < tiles) wave.hand_on(h, turn);
        if (p.saved && tile + 1 < tiles && (tile + 1) % (kSaved / kTile) == 0) {
            float* at = saved + (unsigned long long)(unsigned)((tile + 1) / (kSaved / kTile)) * saved_by;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (there[j]) {
                    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" :: "l"(at + 8 * kRow * j), "f"(h[j]),
                                 "f"(h[2 + j]), "f"(h[4 + j]), "f"(h[6 + j]) : "memory");
                }
            }
        }
        float c[4], sum[2][2];
#pragma unroll
        for (int n = 0; n < 4; ++n) c[n] = widen_bits<C_TYPE>(in_C[n]);
#pragma unroll
        for (int t = 0; t < kTile; ++t) {
            float d[4] = {};
            const float* v = a[t];
            multiply_add_tf32(d, v[0], v[1], v[2], v[3], c[0], c[1]);
            multiply_add_tf32(d, v[4], v[5], v[6], v[7], c[2], c[3]);
            if (!kFewDigits) {
                multiply_add_tf32(d, v[0], v[1], v[2], v[3], rest(c[0]), rest(c[1]));
                multiply_add_tf32(d, v[4], v[5], v[6], v[7], rest(c[2]), rest(c[3]));
                multiply_add_tf32(d, rest(v[0]), rest(v[1]), rest(v[2]), rest(v[3]), c[0], c[1]);
                multiply_add_tf32(d, rest(v[4]), rest(v[5]), rest(v[6]), rest(v[7]), c[2], c[3]);
            }
            const bool mine = t % 4 == 0 || q == t % 4;
            sum[0][t / 4] = mine ? d[t / 4] : sum[0][t / 4], sum[1][t / 4] = mine ? d[2 + t / 4] : sum[1][t / 4];
        }
        Y_TYPE* to = y + tile * kTile;
#pragma unroll
        for (int j = 0; j < 2; ++j, to += 8 * p.y_d) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const float v = kFewDigits ? fmaf(sum[j][k], kTruncated, out[j][k]) : sum[j][k] + out[j][k];
                const bool in_time = full || tile * kTile + q + 4 * k < steps;
                if (in_time && there[j]) write(to + 4 * k, v);
            }
        }
        __syncwarp();
        prepare(tile + kTurns);
    }
    if (p.last_state && (tiles - 1) % kTurns == turn) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int channel = first + 8 * (i % 2), state = 4 * q + i / 2;
            if (channel < channels && state < states) {
                p.last_state[((long long)sequence * channels + channel) * states + state] = h[i];
            }
        }
    }
}
