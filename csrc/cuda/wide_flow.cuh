// wide_flow.cuh: the scan of wide_forward.cuh where sequences are many, channels and states neighbours in memory, aligned:
// h_t = exp(s_t A) h_{t-1} + s_t B_t x_t, y_t = <C_t, h_t> + D x_t.
//
// Grid, lanes and slots are those of wide_forward.cuh, but a warp minds its own channels alone and waits for no other.
// The scan proper is bound by the special function unit, what is around it by instructions; so both are one stream: while
// a warp scans kPiece steps, it takes a channel a step of what lies before and behind them, (s, s x) of the next piece
// and y of the one before, a lane having a run of eight channels of one row. Rows come two pieces ahead by copies without
// conditions, padding and what lies past the end from token 0, put right where it is unpacked.
#pragma once
constexpr int kFirstSegment = 0, kSegmentsLeft = 0;
constexpr bool kFirstShorter = false;
constexpr int kBuffers = 2;
constexpr bool kThrift = false;
#include "wide_stage.cuh"

constexpr bool kMerge = MERGE, kAdd = ADD;  // a block takes the routes one after the other, or adds to what another has left
constexpr bool kAdds = kMerge || kAdd;
constexpr int kPiece = 8;  // steps
static_assert(kPass == 0 && kVectorX && kVectorBC && kSlots == kLanes && kWarpChannels == 32 && kRun == 8 && kRow == 16);
static_assert(kRank == 0 || (kTensorRank && kVectorRank));

using RunX = Pack<X_TYPE, kRun>;
using RunDt = Pack<DT_TYPE, kRun>;
using RunY = Pack<Y_TYPE, kRun>;
using PartB = Pack<B_TYPE, 4>;
using PartC = Pack<C_TYPE, 4>;
constexpr int kSuPitch = kWarpChannels + 2;
constexpr int kXPitch = kWarpChannels * (int)sizeof(X_TYPE) / 4 + 4;  // so that pairs of rows by fours of channels meet other banks

// Of a piece, and with it of every other one. In this order no type spills registers that another order does.
struct alignas(16) PieceMemory {
    alignas(16) unsigned B[32][PartB::kWords];
    alignas(16) unsigned C[32][PartC::kWords];
    alignas(16) unsigned dt[kRank ? 1 : 32][RunDt::kWords];
    alignas(16) unsigned low[kRank ? kRankTiles : 1][32][Low::kWords];  // a low-rank step size: a lane's pairs of columns
    alignas(16) unsigned before[kAdds ? 32 : 1][RunY::kWords];          // y of earlier routes
    alignas(16) float2 su[kPiece][kSuPitch];  // s, s x; when it is scanned, y in the first half of a row
    float rows[kPiece][2 * kRow];             // B, then C
};
// Of a warp. Pieces of the route in turn: x from when it comes until y is finished, the rest until it is unpacked.
struct alignas(16) WarpMemory {
    PieceMemory pieces[2];
    float bias[kWarpChannels];
    float D[kWarpChannels];
    long long x_at[32], dt_at[32], B_at[32], C_at[32], y_at[32];  // where a lane's part of token 0 lies
    int tokens[8][kPiece];  // of pieces in turn; -2 past the end
    alignas(16) unsigned x[4][kPiece][kXPitch];
    alignas(16) uint4 weights[kRank ? 2 : 1][kRank ? kRankTiles : 1][32];  // of a low rank: those of pairs, of two channels each
};
extern "C" __device__ int launch_shape[2] = {kThreads, kWarps * (int)sizeof(WarpMemory)};

// address + index stride, in one instruction: left to itself the compiler takes two or three.
DEVICE unsigned long long product(unsigned index, unsigned stride) {
    unsigned long long at;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(at) : "r"(index), "r"(stride));
    return at;
}
DEVICE long long at_index(long long address, unsigned index, unsigned stride) {
    return address + (long long)product(index, stride);
}
template <int kWords> DEVICE void put_words(long long at, const unsigned* words) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                     :: "l"(at + 4 * i), "r"(words[i]), "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3]));
    }
}
template <int kBytes> DEVICE void copy(void* to, long long from) {
#if __CUDA_ARCH__ >= 800
    const unsigned at = (unsigned)__cvta_generic_to_shared(to);
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < kBytes; i += 16) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(at + i), "l"(from + i) : "memory");
        }
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" :: "r"(at), "l"(from), "n"(kBytes) : "memory");
    }
#else
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) ((unsigned*)to)[i] = __ldcg((const unsigned*)from + i);
#endif
}

struct Scan {
    const Params& p;
    WarpMemory& m;
    const Source from;
    const int lane, first, run, row;  // first: channel of the warp; run: of the warp's, the lane's; row: of a piece

    DEVICE Scan(const Params& p, WarpMemory& m, const Source& from)
        : p(p), m(m), from(from), lane(threadIdx.x & 31), first(from.first + (int)(threadIdx.x >> 5) * kWarpChannels),
          run(8 * ((lane & 1) + 2 * (lane >> 3 & 1))), row((lane >> 1 & 3) + 4 * (lane >> 4)) {}

    DEVICE int token_of(int piece, int row) const { return m.tokens[piece & 7][row]; }
    // Of four pieces.
    DEVICE void fetch_tokens(int piece) {
        const int step = piece * kPiece + lane;
        int* to = &m.tokens[piece & 4][lane];
        if (step < from.steps) copy<4>(to, (long long)(from.indices + step));
        else *to = -2;
    }
    DEVICE void fetch(int piece) {
        const unsigned token = max(token_of(piece, row), 0), of_B = max(token_of(piece, lane / 4), 0);
        const long long x = m.x_at[lane], dt = m.dt_at[lane], B = m.B_at[lane], C = m.C_at[lane];
        copy<4 * RunX::kWords>(own_x(piece), at_index(x, token, (unsigned)p.x_l * (unsigned)sizeof(X_TYPE)));
        if constexpr (kRank == 0) {
            copy<4 * RunDt::kWords>(m.pieces[piece & 1].dt[lane], at_index(dt, token, (unsigned)p.dt_l * (unsigned)sizeof(DT_TYPE)));
        } else {
            const long long low = at_index(dt, of_B, (unsigned)p.dt_l * (unsigned)sizeof(DT_TYPE));
#pragma unroll
            for (int i = 0; i < kRankTiles; ++i) {
                unsigned* to = m.pieces[piece & 1].low[i][lane];
                if (8 * i + 2 * (lane % 4) < kRank) copy<4 * Low::kWords>(to, low + 8 * i * (int)sizeof(DT_TYPE));
            }
        }
        copy<4 * PartB::kWords>(m.pieces[piece & 1].B[lane], at_index(B, of_B, (unsigned)p.B_l * (unsigned)sizeof(B_TYPE)));
        copy<4 * PartC::kWords>(m.pieces[piece & 1].C[lane], at_index(C, of_B, (unsigned)p.C_l * (unsigned)sizeof(C_TYPE)));
    }
    DEVICE unsigned* own_x(int piece) const { return m.x[piece & 3][row] + run * (int)sizeof(X_TYPE) / 4; }
    // A lane's run of y of a piece.
    struct Place {
        int token;
        long long first;  // of token 0
    };
    DEVICE Place place_in_y(int piece) const { return {token_of(piece, row), m.y_at[lane]}; }
    DEVICE long long at(const Place& y) const {
        return at_index(y.first, max(y.token, 0), (unsigned)p.y_l * (unsigned)sizeof(Y_TYPE));
    }

    // B and C of a piece.
    struct PartRows {
        PartB b;
        PartC c;
    };
    // Whether what is read beside the scan is read in front of what is written and asked for, which it would wait for
    // otherwise: rows of 32 bits leave no registers for that.
    static constexpr bool kEarly = sizeof(PartRows) <= 16;
    DEVICE PartRows rows_of(int piece) const {
        return {taken<PartB>(m.pieces[piece & 1].B[lane]), taken<PartC>(m.pieces[piece & 1].C[lane])};
    }
    DEVICE void put_rows(int piece, const PartRows& part) {
        const PartB& b = part.b;
        const PartC& c = part.c;
        float* to = m.pieces[piece & 1].rows[lane / 4] + lane % 4 * 4;
        float values[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) values[n] = kUnit * b.get(n);
        put<4>(to, values);
#pragma unroll
        for (int n = 0; n < 4; ++n) values[n] = c.get(n);
        put<4>(to + kRow, values);
    }
    // What a lane has of a piece's step sizes: of a run of channels at one step; of a low rank of four channels at two
    // steps, of which two are beside each other in a product's result.
    struct Sizes {
        float v[kRun], bias[kRank ? 4 : kRun];
        RunX x;
        DEVICE float size(int i) const {
            if constexpr (kRank == 0) return Incoming::step_size(fmaf(v[i], kPerUnit, bias[i]));
            else return Incoming::step_size(fmaf(v[i], kPerUnit, bias[i % 4]));
        }
    };
    DEVICE Sizes sizes_of(int piece) const {
        Sizes sizes;
        if constexpr (kRank == 0) {
            const RunDt dt = taken<RunDt>(m.pieces[piece & 1].dt[lane]);
            sizes.x = taken<RunX>(own_x(piece));
            get<kRun>(sizes.bias, m.bias + run);
#pragma unroll
            for (int i = 0; i < kRun; ++i) sizes.v[i] = dt.get(i);
        } else {
            get<4>(sizes.bias, m.bias + lane / 4 * 4);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                constexpr int kWords = RunX::kWords / 2;
                get<kWords>((float*)sizes.x.words + i * kWords,
                            (const float*)((const X_TYPE*)m.x[piece & 3][lane % 4 * 2 + i] + lane / 4 * 4));
            }
            uint2 b[kRankTiles + 1] = {};
#pragma unroll
            for (int i = 0; i < kRankTiles; ++i) b[i] = pair_of(taken<Low>(m.pieces[piece & 1].low[i][lane]));
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float d[4] = {};
#pragma unroll
                for (int i = 0; i < kRankTiles; i += 2) {
                    const uint4 w = m.weights[half][i][lane];
                    uint4 more = {0, 0, 0, 0};
                    if (i + 1 < kRankTiles) more = m.weights[half][i + 1 < kRankTiles ? i + 1 : 0][lane];
                    const uint2 pairs[4] = {{w.x, w.z}, {w.y, w.w}, {more.x, more.z}, {more.y, more.w}};
                    multiply_pairs<true, kExact>(d, pairs, b + i, min(2, kRankTiles - i));
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) sizes.v[i % 2 * 4 + 2 * half + i / 2] = d[i];
            }
        }
        return sizes;
    }
    DEVICE void put_su(int piece, const float* su) {
        if constexpr (kRank == 0) {
            put<2 * kRun>(&m.pieces[piece & 1].su[row][run].x, su);
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) put<8>(&m.pieces[piece & 1].su[lane % 4 * 2 + i][lane / 4 * 4].x, su + 8 * i);
        }
    }
    // Padding steps have no x and no B, and a step size from the bias alone; past the end the state stays as it is. A lane
    // puts right eight channels of a step, the quarter of B of that step too.
    DEVICE void put_right(int piece) {
        __syncwarp();
        const int token = token_of(piece, lane / 4);
        if (token >= 0) return;
#pragma unroll 1
        for (int i = 0; i < kRun; ++i) {
            const int channel = lane % 4 * 8 + i;
            m.pieces[piece & 1].su[lane / 4][channel] = make_float2(token == -1 ? Incoming::step_size(m.bias[channel]) : 0.f, 0.f);
            m.pieces[piece & 1].rows[lane / 4][lane % 4 * 4 + i % 4] = 0.f;
        }
    }
    // Whether a piece has steps without a token.
    DEVICE bool lacks(int piece) const { return __any_sync(kAll, token_of(piece, lane % 8) < 0); }
    // Of a channel of the warp, where its y lies in a row of su: quarters of runs so that lanes that finish meet other
    // banks.
    static DEVICE int place_of_y(int channel) {
        return (4 * (channel >> 3 & 1) + 2 * (channel >> 4) + (channel >> 2 & 1)) * 4 + (channel & 3);
    }
    DEVICE void put_y(const Place& to, const float* y) {
        RunY packed;
        packed.set(y);
        const bool there = kWhole || first + run < from.channels;
        if (there && to.token >= 0) put_words<RunY::kWords>(at(to), packed.words);
    }

    DEVICE void prepare() {
        const int run_first = min(first + run, from.channels - kRun), part = lane % 4 * 4;  // past the last, those before it
        m.x_at[lane] = (long long)((const X_TYPE*)p.x + from.batch * p.x_b + from.route * p.x_k + run_first);
        m.dt_at[lane] = (long long)((const DT_TYPE*)p.dt + from.batch * p.dt_b + from.route * p.dt_k +
                                  (kRank ? lane % 4 * 2 : run_first));
        m.B_at[lane] = (long long)((const B_TYPE*)p.B + from.batch * p.B_b + from.route * p.B_k + part);
        m.C_at[lane] = (long long)((const C_TYPE*)p.C + from.batch * p.C_b + from.route * p.C_k + part);
        m.y_at[lane] = (long long)(from.result<Y_TYPE>(p, p.y, p.y_b, p.y_k, 1) + (run_first - from.first));
        const long long at = (long long)from.route * from.channels + min(first + lane, from.channels - 1);
        m.bias[lane] = p.dt_bias ? p.dt_bias[at] * kPerUnit : 0.f;
        m.D[lane] = p.D ? p.D[at] : 0.f;
        for (int i = 0; kRank > 0 && i < kRankTiles; ++i) {
            const int rank = 8 * i + 2 * (lane % 4);
            for (int word = 0; word < Low::kWords; ++word) m.pieces[0].low[i][lane][word] = m.pieces[1].low[i][lane][word] = 0;
            for (int half = 0; half < 2; ++half) {
                uint2 pairs[2];
                for (int c = 0; c < 2; ++c) {
                    const int channel = min(first + lane / 4 * 4 + 2 * half + c, from.channels - 1);
                    const float* of = p.dt_weight + ((long long)from.route * from.channels + channel) * kRank + rank;
                    pairs[c] = pair_of(rank < kRank ? of[0] : 0.f, rank < kRank ? of[1] : 0.f);
                }
                m.weights[kRank ? half : 0][kRank ? i : 0][lane] = {pairs[0].x, pairs[1].x, pairs[0].y, pairs[1].y};
            }
        }
    }

    template <bool kAdding> DEVICE void route() {
        const int steps = from.steps, channels = from.channels, pieces = (steps + kPiece - 1) / kPiece;
        const int q = lane % kLanes, group = lane / kLanes;
        fetch_tokens(0);
        if (lane < kPiece) m.tokens[7][lane] = -2;  // before the first piece
        prepare();
        wait_for_copies();
        __syncwarp();
        fetch(0);
        fetch(1);
        int saves = p.saved ? 2 * kEvery - 1 : -1;
        asm volatile("" : "+r"(saves));  // else it is read again each time
        int places[kSlots];  // of the slots' channels in the warp
        float A[kSlots][kStates], h[kSlots][kStates];
#pragma unroll
        for (int j = 0; j < kSlots; ++j) {
            places[j] = (j ^ q) * kGroups + group;
            const long long channel = min(first + places[j], channels - 1);
            const float* of_A = p.A + (from.route * channels + channel) * kRow + q * kStates;
#pragma unroll
            for (int n = 0; n < kStates; ++n) A[j][n] = of_A[n] * kDecay, h[j][n] = 0.f;
            if (p.initial_state) {
                const float* of_h = p.initial_state + (from.sequence * channels + channel) * kRow + q * kStates;
#pragma unroll
                for (int n = 0; n < kStates; ++n) h[j][n] = of_h[n];
            }
        }
        const int to_result = place_of_y(places[0]), own_result = place_of_y(run);
        wait_for_copies();
        {
            __syncwarp();
            float su[2 * kRun];
            const Sizes sizes = sizes_of(0);
#pragma unroll
            for (int i = 0; i < kRun; ++i) su[2 * i] = sizes.size(i), su[2 * i + 1] = su[2 * i] * sizes.x.get(i);
            put_su(0, su);
            put_rows(0, rows_of(0));
            if (lacks(0)) put_right(0);
        }
#pragma unroll 1
        for (int piece = 0; piece < pieces; ++piece) {
            wait_for_copies();
            __syncwarp();
            if ((piece & saves) == 0 && piece > 0) {
                const long long at = from.sequence * ((from.tiles - 1) / kEvery) + piece / (2 * kEvery) - 1;
#pragma unroll
                for (int j = 0; j < kSlots; ++j) {
                    const int channel = first + places[j];
                    if (kWhole || channel < channels) {
                        put_whole<kStates>(p.saved + (at * channels + channel) * kRow + q * kStates, h[j]);
                    }
                }
            }
            bool lacking = kEarly && lacks(piece + 1);
            fetch(piece + 2);
            if (kAdding) copy<4 * RunY::kWords>(m.pieces[piece & 1].before[kAdds ? lane : 0], at(place_in_y(piece)));
            if (piece % 4 == 1) fetch_tokens(piece + 3);
            if (!kEarly) lacking = lacks(piece + 1);

            // The next piece's step sizes, and y of the one before.
            const Sizes sizes = sizes_of(piece + 1);
            const RunX x_before = taken<RunX>(own_x(piece - 1));
            RunY before;
            if constexpr (kAdding) before = taken<RunY>(m.pieces[piece + 1 & 1].before[kAdds ? lane : 0]);
            float out[kRun], skip[kRun], su[2 * kRun];
            get<kRun>(out, &m.pieces[piece + 1 & 1].su[row][0].x + own_result);
            get<kRun>(skip, m.D + run);

            // Results wait in registers: a store between the steps would hold back the next step's loads.
            float results[kPiece];
#pragma unroll
            for (int t = 0; t < kPiece; ++t) {
                float b[kStates], c[kStates], sum[kSlots];
                get<kStates>(b, m.pieces[piece & 1].rows[t] + q * kStates);
#pragma unroll
                for (int j = 0; j < kSlots; ++j) {
                    const float2 su = m.pieces[piece & 1].su[t][places[j]];
#pragma unroll
                    for (int n = 0; n < kStates; ++n) h[j][n] = fmaf(decay(su.x, A[j][n]), h[j][n], su.y * b[n]);
                }
                get<kStates>(c, m.pieces[piece & 1].rows[t] + kRow + q * kStates);
#pragma unroll
                for (int j = 0; j < kSlots; ++j) {
                    sum[j] = 0.f;
#pragma unroll
                    for (int n = 0; n < kStates; ++n) sum[j] = fmaf(c[n], h[j][n], sum[j]);
                }
#pragma unroll
                for (int j = 1; j < kSlots; ++j) sum[0] += __shfl_xor_sync(kAll, sum[j], j);
                results[t] = sum[0];

                su[2 * t] = sizes.size(t);
                su[2 * t + 1] = su[2 * t] * sizes.x.get(t);
                out[t] = fmaf(skip[t], x_before.get(t), out[t]);
                if constexpr (kAdding) out[t] += before.get(t);
            }
            PartRows rows;
            Place to;
            if (kEarly) rows = rows_of(piece + 1), to = place_in_y(piece - 1);
            __syncwarp();  // every lane has read what is written now
            put_su(piece + 1, su);
#pragma unroll
            for (int t = 0; t < kPiece; ++t) (&m.pieces[piece & 1].su[t][0].x)[to_result] = results[t];
            if (!kEarly) rows = rows_of(piece + 1), to = place_in_y(piece - 1);
            put_rows(piece + 1, rows);
            put_y(to, out);
            if (lacking) put_right(piece + 1);
        }
        wait_for_copies();
        __syncwarp();
        float out[kRun];
        const RunX x = taken<RunX>(own_x(pieces - 1));
        RunY before;
        if constexpr (kAdding) before = taken<RunY>(m.pieces[pieces - 1 & 1].before[kAdds ? lane : 0]);
        get<kRun>(out, &m.pieces[pieces - 1 & 1].su[row][0].x + own_result);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            out[i] = fmaf(m.D[run + i], x.get(i), out[i]);
            if constexpr (kAdding) out[i] += before.get(i);
        }
        put_y(place_in_y(pieces - 1), out);
        if (p.last_state) {
#pragma unroll
            for (int j = 0; j < kSlots; ++j) {
                const int channel = first + places[j];
                if (kWhole || channel < channels) {
                    put<kStates>(p.last_state + (from.sequence * channels + channel) * kRow + q * kStates, h[j]);
                }
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS) wide_flow(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) char shared[];
    WarpMemory& memory = reinterpret_cast<WarpMemory*>(shared)[threadIdx.x >> 5];
    if constexpr (kMerge) {
        Scan(p, memory, Source(p, 0, 0, blockIdx.x)).route<false>();
#pragma unroll 1
        for (int route = 1; route < (int)p.routes; ++route) {
            __syncwarp();
            Scan(p, memory, Source(p, route, 0, blockIdx.x)).route<true>();
        }
    } else if constexpr (kAdd) {
        // Blocks are numbered as they begin, one route after the other, so that the one waited for has begun.
        int* number = reinterpret_cast<int*>(shared);
        if (threadIdx.x == 0) *number = atomicAdd(p.order, 1);
        __syncthreads();
        const int index = *number, blocks = gridDim.x / (int)p.routes;
        __syncthreads();
        const Source from(p, -1, 0, index);
        volatile int* done = p.order + 1;
        if (from.route == 0) {
            Scan(p, memory, from).route<false>();
        } else {
            if ((threadIdx.x & 31) == 0) {
                while (done[index - blocks] == 0) __nanosleep(100);
                __threadfence();
            }
            __syncwarp();
            Scan(p, memory, from).route<true>();
        }
        if (from.route + 1 < (int)p.routes) {
            __syncthreads();
            if (threadIdx.x == 0) {
                __threadfence();
                done[index] = 1;
            }
        }
    } else {
        Scan(p, memory, Source(p, -1, 0, blockIdx.x)).route<false>();
    }
}
