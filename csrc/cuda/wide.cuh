// wide.cuh: what both passes for several states a channel share: sizes, runs of floats in shared memory, numbers on the
// tensor cores. How a tile comes into shared memory is in wide_stage.cuh.
#pragma once
#include "common.cuh"

constexpr int kLanes = LANES;    // lanes that share a channel
constexpr int kStates = STATES;  // states a lane holds of each of its channels
constexpr int kSlots = SLOTS;    // channels of a lane
constexpr bool kSoftplus = SOFTPLUS;
constexpr int kRank = RANK;  // columns of a low-rank step size, 0 = dt comes whole
constexpr int kWarps = WARPS;
constexpr bool kVectorX = VECTOR_X;        // x, dt and what goes with them: channels are neighbours, aligned, whole runs
constexpr bool kVectorBC = VECTOR_BC;      // B, C: states are neighbours, aligned, as many as lanes hold
constexpr bool kVectorRank = VECTOR_RANK;  // a low-rank step size: pairs of columns are neighbours, aligned
constexpr bool kTensorRank = TENSOR_RANK;  // it is multiplied on the tensor cores
constexpr bool kWhole = WHOLE;  // blocks are full of channels, and lanes of states
constexpr int kPass = PASS;                // of two over a route in segments, or 0
constexpr bool kLong = LONG;               // of segments that take long enough for their code to be read first
constexpr int kTile = 16;                  // steps that are in shared memory at a time
constexpr int kEvery = EVERY;              // tiles between two states that forward saves: 1 or 2

// Whether what is read ahead waits in shared memory rather than in registers.
#if __CUDA_ARCH__ >= 800
constexpr bool kCopies = COPIES;
#else
constexpr bool kCopies = false;
#endif

constexpr int kRing = kBuffers == 1 ? 2 * kEvery : kCopies ? 5 : 8;  // tiles whose tokens are in shared memory

constexpr int kThreads = 32 * kWarps;
constexpr int kGroups = 32 / kLanes;
constexpr int kWarpChannels = kSlots * kGroups;
constexpr int kBlockChannels = kWarps * kWarpChannels;
constexpr int kPitch = kBlockChannels + 2;  // so that rows meet other banks
constexpr int kRow = kLanes * kStates;      // states of a row of B in shared memory, the last ones 0
constexpr int kRun = kWarpChannels < 16 ? kWarpChannels / 2 : 8;  // channels a thread loads at a time, of one step
constexpr int kRuns = kBlockChannels / kRun;
constexpr int kRows = kTile * kRuns / kThreads;  // rows of which a thread has a run
constexpr int kShare = kTile * kRow / kThreads;
constexpr int kRowRun = kShare < 1 ? 1 : kShare < 4 ? kShare : 4;  // states a thread loads at a time, of one step
constexpr int kParts = kShare < 4 ? 1 : kShare / 4;
constexpr bool kPartsAhead = kParts <= 2;
constexpr int kRankTiles = kRank ? (kRank + 7) / 8 : 1;  // of eight columns
constexpr int kRankWords = 4 * kRankTiles;   // of two columns
constexpr int kRankPitch = kRankWords % 8 ? kRankWords : kRankWords + 4;
constexpr int kRankParts = kTensorRank ? (kTile * kRankWords + kThreads - 1) / kThreads : 1;
constexpr int kChannelTiles = kBlockChannels / 8;
constexpr int kOwnTiles = kWarpChannels / 8;

static_assert(kSlots <= kLanes || kLanes == 1);
static_assert(kRun >= 1 && kRows >= 1 && kRuns % 2 == 0);
static_assert(!kTensorRank || kWarpChannels % 8 == 0);

// Element `more` of a token's row. One multiplication: the compiler would take three for 64 bits.
template <class T> DEVICE T* at_token(T* tensor, int token, long long stride, int more = 0) {
    __builtin_assume(__isGlobal(tensor));  // where a pointer comes from shared memory, this isn't seen
    long long at;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(at) : "r"(token), "r"((int)stride), "l"((long long)more));
    return tensor + at;
}

// V neighbouring floats in shared or device memory, four at a time where that is aligned.
template <int V> DEVICE void get(float* v, const float* at) {
    if constexpr (V % 4 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(at + i);
            v[i] = four.x, v[i + 1] = four.y, v[i + 2] = four.z, v[i + 3] = four.w;
        }
    } else if constexpr (V % 2 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 2) {
            const float2 two = *reinterpret_cast<const float2*>(at + i);
            v[i] = two.x, v[i + 1] = two.y;
        }
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) v[i] = at[i];
    }
}
template <int V> DEVICE void put(float* at, const float* v) {
    if constexpr (V % 4 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            *reinterpret_cast<float4*>(at + i) = make_float4(v[i], v[i + 1], v[i + 2], v[i + 3]);
        }
    } else if constexpr (V % 2 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 2) *reinterpret_cast<float2*>(at + i) = make_float2(v[i], v[i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) at[i] = v[i];
    }
}

// The same to device memory, where the compiler would take fours apart rather than bring them together in registers.
template <int V> DEVICE void put_whole(float* at, const float* v) {
    if constexpr (V % 4 == 0) {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
                         :: "l"(at + i), "f"(v[i]), "f"(v[i + 1]), "f"(v[i + 2]), "f"(v[i + 3]) : "memory");
        }
    } else {
        put<V>(at, v);
    }
}

// A run of elements that lie apart, all there: from one address to the next by an addition, where the compiler would
// multiply for each.
template <bool kVector, class T, int V> DEVICE void store_run(const Pack<T, V>& pack, T* at, int stride, int valid) {
    if (kVector || !kLong || valid < V) {
        store<kVector>(pack, at, stride, valid);
        return;
    }
    const long long step = (long long)stride * (int)sizeof(T);
    char* to = (char*)at;
#pragma unroll
    for (int i = 0; i < V; ++i, to += step) {
        if constexpr (sizeof(T) == 4) *reinterpret_cast<unsigned*>(to) = pack.words[i];
        else *reinterpret_cast<unsigned short*>(to) = (unsigned short)(pack.words[i / 2] >> i % 2 * 16);
    }
}

// High and low bfloat16 halves of two numbers.
DEVICE uint2 halves(float v0, float v1) {
    const unsigned high = narrow_pair<Bfloat>(v0, v1);
    return {high, narrow_pair<Bfloat>(v0 - __uint_as_float(high << 16), v1 - __uint_as_float(high & 0xffff0000u))};
}
// d += A B in tf32, 16 x 8 and 8 x 8: the lane gives of A the rows lane / 4 and lane / 4 + 8 of column lane % 4, then of
// column lane % 4 + 4; of B column lane / 4 of those rows; and has of d those rows, columns 2 (lane % 4) and the next.
// Of the numbers the upper 19 bits count.
DEVICE void multiply_add_tf32(float* d, float a0, float a1, float a2, float a3, float b0, float b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#endif
}
constexpr float kTruncated = 1.000352f;  // what cutting off 13 bits takes from a number on average, given back

// What a thread has asked for of a row and not yet used: where a copy without registers is possible, on its way into a
// place of its own in shared memory, so that no barrier is needed to read it; in registers elsewhere.
template <int kBytes> DEVICE void copy_async(void* to, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
    const unsigned at = (unsigned)__cvta_generic_to_shared(to);
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < kBytes; i += 16) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                         :: "r"(at + i), "l"((const char*)from + i), "r"(there ? 16 : 0) : "memory");
        }
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :: "r"(at), "l"(from), "n"(kBytes), "r"(there ? kBytes : 0) : "memory");
    }
#endif
}
DEVICE void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    if (kCopies) asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
template <class T, int V, bool kVector> struct Asked {
    static constexpr int kWords = Pack<T, V>::kWords, kBytes = V * (int)sizeof(T);
    static constexpr bool kApart = kCopies && kVector && (kBytes == 4 || kBytes == 8 || kBytes % 16 == 0);
    // Elements of 16 bits that are loaded one by one are put together when they are taken, where there are registers for
    // them: before, one would wait for them.
    static constexpr bool kSingle = !kVector && V > 1 && kLong && sizeof(T) == 2 && (kBuffers > 1 || kPass == 1);
    static constexpr bool kEach = kSingle || (!kVector && V > 1 && kLong && sizeof(T) == 4);
    Pack<T, V> pack;
    unsigned single[kSingle ? V : 1];

    DEVICE void ask(unsigned* place, const T* at, int stride, int valid) {
        if constexpr (kApart) copy_async<kBytes>(place, at, valid > 0);
        else if constexpr (!kEach) load<kVector>(pack, at, stride, valid);
        else ask_each(at, (long long)stride * (int)sizeof(T), valid);
    }
    // All are there but for a few blocks' last channels; then from one address to the next by an addition.
    DEVICE void ask_each(const T* at, long long step, int valid) {
        unsigned* to = kSingle ? single : pack.words;
        const char* from = (const char*)at;
        if (valid >= V) {
#pragma unroll
            for (int i = 0; i < V; ++i, from += step) to[i] = read_bits((const T*)from);
        } else {
#pragma unroll
            for (int i = 0; i < V; ++i, from += step) to[i] = i < valid ? read_bits((const T*)from) : 0;
        }
    }
    static DEVICE unsigned read_bits(const T* at) {
        if constexpr (sizeof(T) == 4) return __ldg(reinterpret_cast<const unsigned*>(at));
        else return __ldg(reinterpret_cast<const unsigned short*>(at));
    }
    DEVICE Pack<T, V> take(const unsigned* place) const {
        if constexpr (kSingle) {
            Pack<T, V> taken;
#pragma unroll
            for (int i = 0; i < V; i += 2) taken.words[i / 2] = single[i] | single[kSingle ? i + 1 : 0] << 16;
            return taken;
        } else if constexpr (kApart) {
            float words[kWords];
            get<kWords>(words, (const float*)place);
            Pack<T, V> taken;
#pragma unroll
            for (int i = 0; i < kWords; ++i) taken.words[i] = __float_as_uint(words[i]);
            return taken;
        } else {
            return pack;
        }
    }
};
