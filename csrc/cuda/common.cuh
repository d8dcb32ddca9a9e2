// common.cuh: number formats, vector loads and stores, and the functions of the step size. No header of CUDA's or
// torch's is needed, so that the run-time compiler alone builds it.
#pragma once
#include "params.cuh"

#define DEVICE __device__ __forceinline__

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLog2eRest = 1.925963033500e-8f;  // log2(e) - float(log2(e))
constexpr float kLn2 = 0.6931471805599453f;
constexpr unsigned kAll = 0xffffffffu;

// The three formats, by what they are stored in. They are types of their own, so that overloads tell them apart.
struct Float { unsigned bits; };
struct Half { unsigned short bits; };
struct Bfloat { unsigned short bits; };
template <class, class> constexpr bool kAlike = false;
template <class T> constexpr bool kAlike<T, T> = true;

DEVICE float ex2(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
// What a state keeps over a step of s; A in units in which 2^(s A) is that. ex2 is 7e-9 too small on average where decays
// are close to 1, which over thousands of steps adds up.
DEVICE float decay(float s, float A) { return ex2(fmaf(s, A, 1e-8f)); }
DEVICE float widen(Float v) { return __uint_as_float(v.bits); }
DEVICE float widen(Bfloat v) { return __uint_as_float((unsigned)v.bits << 16); }
DEVICE float widen(Half v) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v.bits));
    return r;
}

// A number's bits, where numbers wait in registers as they were read, and what it is.
template <class T> DEVICE unsigned read_bits(const T* at) {
    if constexpr (sizeof(T) == 4) return __ldg(reinterpret_cast<const unsigned*>(at));
    else return __ldg(reinterpret_cast<const unsigned short*>(at));
}
template <class T> DEVICE float widen_bits(unsigned bits) {
    if constexpr (sizeof(T) == 4) return __uint_as_float(bits);
    else return widen(T{(unsigned short)bits});
}

template <class T> DEVICE T narrow(float v);
template <> DEVICE Float narrow<Float>(float v) { return {__float_as_uint(v)}; }
template <> DEVICE Half narrow<Half>(float v) {
    Half r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(v));
    return r;
}
template <> DEVICE Bfloat narrow<Bfloat>(float v) {
#if __CUDA_ARCH__ >= 800
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(0.f), "f"(v));
    return {(unsigned short)r};
#else
    unsigned bits = __float_as_uint(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {(unsigned short)0x7fff};
    return {(unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
#endif
}

// Two numbers in one register, the first in the low half.
template <class T> DEVICE unsigned narrow_pair(float low, float high) {
    return narrow<T>(low).bits | (unsigned)narrow<T>(high).bits << 16;
}
#if __CUDA_ARCH__ >= 800
template <> DEVICE unsigned narrow_pair<Half>(float low, float high) {
    unsigned r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
template <> DEVICE unsigned narrow_pair<Bfloat>(float low, float high) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
#endif

// V neighbouring elements in 32-bit registers, as they lie in memory.
template <class T, int V> struct Pack {
    static constexpr int kWords = (V * (int)sizeof(T) + 3) / 4;
    unsigned words[kWords];

    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < kWords; ++i) words[i] = 0;
    }
    DEVICE void keep(int count) {  // the first of two elements, both, or none
        if constexpr (kWords == 2) {
            if (count < 2) words[1] = 0;
            if (count < 1) words[0] = 0;
        } else {
            if (count < 2) words[0] = count < 1 ? 0 : words[0] & 0xffffu;
        }
    }
    DEVICE float get(int i) const {
        if constexpr (sizeof(T) == 4) {
            return __uint_as_float(words[i]);
        } else {
            return widen(T{(unsigned short)(i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu)});
        }
    }
    DEVICE void set(const float* v) {
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int i = 0; i < V; ++i) words[i] = __float_as_uint(v[i]);
        } else if constexpr (V == 1) {
            words[0] = narrow<T>(v[0]).bits;
        } else {
#pragma unroll
            for (int i = 0; i < V; i += 2) words[i / 2] = narrow_pair<T>(v[i], v[i + 1]);
        }
    }
};

// What this kernel doesn't write can be read through the texture path, what other blocks of it write from L2 alone.
template <bool kWritten, class T> DEVICE T read(const T* at) {
    if constexpr (kWritten) return __ldcg(at);
    else return __ldg(at);
}

// Read V elements of which `valid` exist. kVector: they are neighbours, aligned, and all there or none. kWritten: the
// kernel itself may have written them.
template <bool kVector, bool kWritten = false, class T, int V>
DEVICE void load(Pack<T, V>& pack, const T* at, int stride, int valid) {
    pack.clear();
    if constexpr (kVector) {
        if (valid <= 0) return;
        constexpr int kBytes = V * (int)sizeof(T);
        if constexpr (kBytes % 16 == 0) {
#pragma unroll
            for (int i = 0; i < kBytes / 16; ++i) {
                uint4 v = read<kWritten>(reinterpret_cast<const uint4*>(at) + i);
                pack.words[4 * i] = v.x, pack.words[4 * i + 1] = v.y;
                pack.words[4 * i + 2] = v.z, pack.words[4 * i + 3] = v.w;
            }
        } else if constexpr (kBytes % 8 == 0) {
#pragma unroll
            for (int i = 0; i < kBytes / 8; ++i) {
                uint2 v = read<kWritten>(reinterpret_cast<const uint2*>(at) + i);
                pack.words[2 * i] = v.x, pack.words[2 * i + 1] = v.y;
            }
        } else if constexpr (kBytes % 4 == 0) {
#pragma unroll
            for (int i = 0; i < kBytes / 4; ++i) pack.words[i] = read<kWritten>(reinterpret_cast<const unsigned*>(at) + i);
        } else {
            pack.words[0] = read<kWritten>(reinterpret_cast<const unsigned short*>(at));
        }
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) {
            if (i < valid) {
                if constexpr (sizeof(T) == 4) {
                    pack.words[i] = read<kWritten>(reinterpret_cast<const unsigned*>(at + (long long)i * stride));
                } else {
                    unsigned bits = read<kWritten>(reinterpret_cast<const unsigned short*>(at + (long long)i * stride));
                    pack.words[i / 2] |= bits << (i % 2 * 16);
                }
            }
        }
    }
}

template <bool kVector, class T, int V>
DEVICE void store(const Pack<T, V>& pack, T* at, int stride, int valid) {
    if constexpr (kVector) {
        if (valid <= 0) return;
        constexpr int kBytes = V * (int)sizeof(T);
        if constexpr (kBytes % 16 == 0) {
#pragma unroll
            for (int i = 0; i < kBytes / 16; ++i) {
                reinterpret_cast<uint4*>(at)[i] = make_uint4(pack.words[4 * i], pack.words[4 * i + 1],
                                                             pack.words[4 * i + 2], pack.words[4 * i + 3]);
            }
        } else if constexpr (kBytes % 8 == 0) {
#pragma unroll
            for (int i = 0; i < kBytes / 8; ++i) {
                reinterpret_cast<uint2*>(at)[i] = make_uint2(pack.words[2 * i], pack.words[2 * i + 1]);
            }
        } else if constexpr (kBytes % 4 == 0) {
#pragma unroll
            for (int i = 0; i < kBytes / 4; ++i) reinterpret_cast<unsigned*>(at)[i] = pack.words[i];
        } else {
            *reinterpret_cast<unsigned short*>(at) = (unsigned short)pack.words[0];
        }
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) {
            if (i < valid) {
                if constexpr (sizeof(T) == 4) {
                    *reinterpret_cast<unsigned*>(at + (long long)i * stride) = pack.words[i];
                } else {
                    *reinterpret_cast<unsigned short*>(at + (long long)i * stride) =
                        (unsigned short)(pack.words[i / 2] >> (i % 2 * 16));
                }
            }
        }
    }
}

// Sums of kCount neighbours over parts that lie `stride` apart, in order; kTogether are asked for before the first is used,
// also where parts are fewer.
template <int kTogether, bool kWritten, class T, int kCount>
DEVICE void add_parts(float (&sum)[kCount], const T* from, long long stride, int parts) {
    for (int first = 0; first < parts; first += kTogether) {
        Pack<T, kCount> packs[kTogether];
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
            load<true, kWritten>(packs[n], from + (first + n) * stride, 1, first + n < parts ? kCount : 0);
        }
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
#pragma unroll
            for (int j = 0; j < kCount; ++j) sum[j] += packs[n].get(j);
        }
    }
}

// log(1 + exp(v)) = max(v, 0) + log1p(e), e = exp(-|v|), which neither overflows nor cancels; log1p(e) / e is a
// polynomial on [0, 1], good to 3e-7. kExact: exp keeps its relative error where |v| is large, which takes the rounding
// of v log2(e) into account.
template <bool kExact> DEVICE float softplus(float v) {
    const float scaled = -fabsf(v) * kLog2e;
    float e = ex2(scaled);
    if constexpr (kExact) {
        const float rest = fmaf(-fabsf(v), kLog2e, -scaled) - fabsf(v) * kLog2eRest;
        e = fmaf(e, rest * kLn2, e);
    }
    float tail = fmaf(e, -0.00853920411f, 0.0440896162f);
    tail = fmaf(e, tail, -0.107681692f);
    tail = fmaf(e, tail, 0.1774524f);
    tail = fmaf(e, tail, -0.244954623f);
    tail = fmaf(e, tail, 0.332754797f);
    tail = fmaf(e, tail, -0.499974054f);
    tail = fmaf(e, tail, 0.999999806f);
    return fmaf(e, tail, fmaxf(v, 0.f));
}

// log2(1 + 2^v); the polynomial is log2(1 + e) / e on [0, 1], good to 2e-6.
DEVICE float softplus2(float v) {
    const float e = ex2(-fabsf(v));
    float tail = fmaf(e, 0.020401156f, -0.095797464f);
    tail = fmaf(e, tail, 0.21528445f);
    tail = fmaf(e, tail, -0.33908898f);
    tail = fmaf(e, tail, 0.47766837f);
    tail = fmaf(e, tail, -0.72115946f);
    tail = fmaf(e, tail, 1.4426932f);
    return fmaf(e, tail, fmaxf(v, 0.f));
}

// Derivative of softplus at v, from s = softplus(v): 1 - exp(-s), by its series where that would cancel. kFew: good
// to 4e-6.
template <bool kFew = false> DEVICE float softplus_slope(float s) {
    if constexpr (kFew) {
        const float series = s * fmaf(s, fmaf(s, 1.f / 6, -0.5f), 1.f);
        return s < 0.03125f ? series : 1.f - ex2(-s * kLog2e);
    }
    float series = s * fmaf(s, fmaf(s, fmaf(s, fmaf(s, fmaf(s, -1.f / 720, 1.f / 120), -1.f / 24), 1.f / 6), -0.5f), 1.f);
    return s < 0.25f ? series : 1.f - ex2(-s * kLog2e);
}

// The same from s in units of ln 2; good to 4e-6.
DEVICE float softplus2_slope(float s) {
    const float series = s * fmaf(s, fmaf(s, 0.0555041f, -0.24022651f), 0.69314718f);
    return s < 0.045f ? series : 1.f - ex2(-s);
}

// Sum v[0..M) over the lanes whose numbers differ in the bits from kHigh down to kLow, and leave each lane with
// M / lanes of the sums (at least one): v[0..] of a lane are the entries from owned_from on. Each level sends half.
template <int M, int kHigh, int kLow> DEVICE void reduce_scatter(float* v, int lane) {
    if constexpr (kHigh >= kLow) {
        if constexpr (M > 1) {
            bool upper = lane & kHigh;
#pragma unroll
            for (int i = 0; i < M / 2; ++i) {
                float sent = upper ? v[i] : v[i + M / 2];
                float kept = upper ? v[i + M / 2] : v[i];
                v[i] = kept + __shfl_xor_sync(kAll, sent, kHigh);
            }
            reduce_scatter<M / 2, kHigh / 2, kLow>(v, lane);
        } else {
            v[0] += __shfl_xor_sync(kAll, v[0], kHigh);
            reduce_scatter<1, kHigh / 2, kLow>(v, lane);
        }
    }
}
template <int M, int kHigh, int kLow> DEVICE int owned_from(int lane) {
    if constexpr (kHigh >= kLow && M > 1) {
        return ((lane & kHigh) ? M / 2 : 0) + owned_from<M / 2, kHigh / 2, kLow>(lane);
    } else {
        return 0;
    }
}
// How many sums a lane keeps, and whether it is the first of the lanes that keep the same.
template <int M, int kHigh, int kLow> __device__ constexpr int owned_count() {
    if constexpr (kHigh >= kLow && M > 1) return owned_count<M / 2, kHigh / 2, kLow>();
    else return M;
}
template <int M, int kHigh, int kLow> DEVICE bool owns_first(int lane) {
    if constexpr (kHigh >= kLow) {
        if constexpr (M > 1) return owns_first<M / 2, kHigh / 2, kLow>(lane);
        else return (lane & (2 * kHigh - kLow)) == 0;
    } else {
        return true;
    }
}

// D += A B on the tensor cores: A 16 x 16 and B 16 x 8 in bfloat16, D 16 x 8 in float32. Lane l holds of A the rows
// l / 4 and l / 4 + 8, columns 2 (l % 4) and the next, and the same 8 further; of B the column l / 4 and those rows; of D
// the rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
DEVICE void multiply_add(float* d, const unsigned* a, const unsigned* b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
// Transpose an 8 x 8 matrix of 16-bit elements, of which a lane holds row l / 4, columns 2 (l % 4) and the next.
DEVICE unsigned transpose(unsigned v) {
    unsigned r = v;
#if __CUDA_ARCH__ >= 800
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
#endif
    return r;
}

// Compile-time choices, given on the command line as -D.
#ifndef X_TYPE
#define X_TYPE Float
#define DT_TYPE Float
#define B_TYPE Float
#define C_TYPE Float
#define Y_TYPE Float
#endif
