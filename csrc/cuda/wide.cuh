// wide.cuh: what both passes for several states a channel share: sizes, runs of floats in shared memory, numbers on the
// tensor cores. How a tile comes into shared memory is in wide_stage.cuh.
#pragma once
#include "tf32.cuh"

constexpr int kLanes = LANES;    // lanes that share a channel
constexpr int kStates = STATES;  // states a lane holds of each of its channels
constexpr int kSlots = SLOTS;    // channels of a lane
constexpr bool kSoftplus = SOFTPLUS;
constexpr int kRank = RANK;  // columns of a low-rank step size, 0 = dt comes whole
// Step sizes in 16 bits are taken in units of ln 2, so that neither softplus nor the decay multiplies by log2(e); B
// makes up for it. In 32 bits they stay as they are, for the sake of softplus's last digits.
constexpr bool kExact = sizeof(DT_TYPE) == 4;
constexpr float kUnit = kExact ? 1.f : kLn2, kPerUnit = kExact ? 1.f : kLog2e, kDecay = kExact ? kLog2e : 1.f;
constexpr int kWarps = WARPS;
constexpr bool kVectorX = VECTOR_X;        // x, dt and what goes with them: channels are neighbours, aligned, whole runs
constexpr bool kVectorBC = VECTOR_BC;      // B, C: states are neighbours, aligned, as many as lanes hold
constexpr bool kVectorRank = VECTOR_RANK;  // a low-rank step size: pairs of columns are neighbours, aligned
constexpr bool kTensorRank = TENSOR_RANK;  // it is multiplied on the tensor cores
constexpr bool kWhole = WHOLE;  // blocks are full of channels, and lanes of states
constexpr int kPass = PASS;                // of two over a route in segments, or 0
constexpr bool kLong = LONG;               // of segments that take long enough for their code to be read first
constexpr int kTile = 16;                  // steps that are in shared memory at a time
constexpr int kEvery = EVERY;              // tiles between two states that forward saves: 1 or 2, or 4 for few_backward.cuh

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
// Whether one half of the threads takes B, the other C, so that each loads more at a time.
constexpr bool kHalves = kCopies && kVectorBC && kAlike<B_TYPE, C_TYPE> && (kShare == 1 || kShare == 2);
// States a thread loads at a time, of one step.
constexpr int kRowRun = kHalves ? 2 * kShare : kShare < 1 ? 1 : kShare < 4 ? kShare : 4;
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

// Element `more` of a token's row. The product is an instruction of its own here, which becomes one with the addition
// behind it; written in C++ it would be three.
template <class T> DEVICE T* at_token(T* tensor, int token, long long stride, int more = 0) {
    __builtin_assume(__isGlobal(tensor));  // where a pointer comes from shared memory, this isn't seen
    long long at;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(at) : "r"(token), "r"((int)stride * (int)sizeof(T)));
    return (T*)((char*)tensor + at) + more;
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

// What lies in shared memory as it did in device memory.
template <class P> DEVICE P taken(const unsigned* from) {
    float words[P::kWords];
    get<P::kWords>(words, (const float*)from);
    P pack;
#pragma unroll
    for (int i = 0; i < P::kWords; ++i) pack.words[i] = __float_as_uint(words[i]);
    return pack;
}

// A low-rank step size, its weights and its gradient go to the tensor cores by pairs of neighbours in a row: where the step
// size is bfloat16, as the pair's high and its low halves in that type, of which a step size has the high ones alone; else
// as the two numbers themselves, for TF32, whose upper bits hold all of a step size in float16 and leave a rest of others.
constexpr bool kTf32 = !kAlike<DT_TYPE, Bfloat>;
using Low = Pack<DT_TYPE, 2>;
DEVICE uint2 pair_of(float v0, float v1) {
    if constexpr (kTf32) return {__float_as_uint(v0), __float_as_uint(v1)};
    const unsigned high = narrow_pair<Bfloat>(v0, v1);
    return {high, narrow_pair<Bfloat>(v0 - __uint_as_float(high << 16), v1 - __uint_as_float(high & 0xffff0000u))};
}
DEVICE uint2 pair_of(const Low& low) {
    if constexpr (kTf32) return {__float_as_uint(low.get(0)), __float_as_uint(low.get(1))};
    else return {low.words[0], 0};
}
// Transpose an 8 x 8 matrix as multiply_add has them: a lane's pair is of row lane / 4, columns 2 (lane % 4) and the next.
DEVICE uint2 transpose(uint2 v) {
    if constexpr (!kTf32) return {transpose(v.x), transpose(v.y)};
    const unsigned low = transpose(__byte_perm(v.x, v.y, 0x5410)), high = transpose(__byte_perm(v.x, v.y, 0x7632));
    return {__byte_perm(low, high, 0x5410), __byte_perm(low, high, 0x7632)};
}
// d += A B, laid out as for multiply_add, of pairs. kTwoA, kTwoB: a number has two terms; the product of the lesser ones is
// left out. eights: of two runs of eight columns of A, how many are there.
template <bool kTwoA, bool kTwoB> DEVICE void multiply_pairs(float* d, const uint2* a, const uint2* b, int eights = 2) {
    if constexpr (kTf32) {
#pragma unroll
        for (int i = 0; i < eights; ++i) {  // a pair's columns go four apart in A and B alike, which changes no sum
            const uint2 top = a[2 * i], bottom = a[2 * i + 1];
            const float a0 = __uint_as_float(top.x), a1 = __uint_as_float(bottom.x), a2 = __uint_as_float(top.y);
            const float a3 = __uint_as_float(bottom.y), b0 = __uint_as_float(b[i].x), b1 = __uint_as_float(b[i].y);
            multiply_add_tf32(d, a0, a1, a2, a3, b0, b1);
            if (kTwoA) multiply_add_tf32(d, rest(a0), rest(a1), rest(a2), rest(a3), b0, b1);
            if (kTwoB) multiply_add_tf32(d, a0, a1, a2, a3, rest(b0), rest(b1));
        }
    } else {
        const unsigned high_a[4] = {a[0].x, a[1].x, a[2].x, a[3].x}, high_b[2] = {b[0].x, b[1].x};
        const unsigned rest_a[4] = {a[0].y, a[1].y, a[2].y, a[3].y}, rest_b[2] = {b[0].y, b[1].y};
        multiply_add(d, high_a, high_b);
        if (kTwoA) multiply_add(d, rest_a, high_b);
        if (kTwoB) multiply_add(d, high_a, rest_b);
    }
}

// What a thread has asked for of a row and not yet used: where a copy without registers is possible, on its way into a
// place of its own in shared memory, so that no barrier is needed to read it; in registers elsewhere.
template <int kBytes> DEVICE void copy_async(void* to, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
    const unsigned at = (unsigned)__cvta_generic_to_shared(to);
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < kBytes; i += 16) {
            asm volatile("{ .reg .pred none; setp.eq.u32 none, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, none; }"
                         :: "r"(at + i), "l"((const char*)from + i), "r"((unsigned)there) : "memory");
        }
    } else {
        asm volatile("{ .reg .pred none; setp.eq.u32 none, %3, 0; cp.async.ca.shared.global [%0], [%1], %2, none; }"
                     :: "r"(at), "l"(from), "n"(kBytes), "r"((unsigned)there) : "memory");
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
