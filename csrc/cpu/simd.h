// A register of floats and what the scan needs of it, in the compiler's vector extensions (GCC and Clang): one lane is
// one channel. Compiled once per instruction set; VISION_MAMBA_LEVEL names the set and keeps the copies apart.
// Nothing of the standard library is used here: an inline function compiled for a newer processor must not be the copy
// that the linker keeps for all.
#pragma once

#include <stdint.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace VISION_MAMBA_LEVEL {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kStates = 8;  // kStates: states that one sweep over time keeps in registers
#elif defined(__AVX2__)
constexpr int kLanes = 8, kStates = 4;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kStates = 8;
#else
constexpr int kLanes = 4, kStates = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t Int __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), may_alias));
typedef Vec UnalignedVec __attribute__((aligned(4)));
typedef Halves UnalignedHalves __attribute__((aligned(2)));

#define INLINE inline __attribute__((always_inline))

INLINE Vec splat(float v) { return Vec{} + v; }
INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }

// Lane l of the result is lane kMask[l] of a and b laid end to end.
template <int... kMask>
INLINE Vec shuffle(Vec a, Vec b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, kMask...);
#else
  return __builtin_shuffle(a, b, Int{kMask...});
#endif
}
template <int... kLane>
struct Lanes {};
template <int kCount, int... kLane>
struct MakeLanes : MakeLanes<kCount - 1, kCount - 1, kLane...> {};
template <int... kLane>
struct MakeLanes<0, kLane...> {
  typedef Lanes<kLane...> type;
};
typedef MakeLanes<kLanes>::type AllLanes;

// Lanes whose bit kBit is clear come from a, the others from b; kCross moves each to the place of its partner.
template <int kBit, int... kLane>
INLINE Vec pick(Vec a, Vec b, Lanes<kLane...>) {
  return shuffle<((kLane & kBit) ? kLanes + kLane : kLane)...>(a, b);
}
template <int kBit, int... kLane>
INLINE Vec pick_crossed(Vec a, Vec b, Lanes<kLane...>) {
  return shuffle<((kLane & kBit) ? kLanes + (kLane ^ kBit) : (kLane ^ kBit))...>(a, b);
}
template <int kBit, int... kLane>
INLINE Vec low_halves(Vec a, Vec b, Lanes<kLane...>) {
  return shuffle<((kLane & kBit) ? kLanes + (kLane ^ kBit) : kLane)...>(a, b);
}
template <int kBit, int... kLane>
INLINE Vec high_halves(Vec a, Vec b, Lanes<kLane...>) {
  return shuffle<((kLane & kBit) ? kLanes + kLane : (kLane ^ kBit))...>(a, b);
}

// Lane l of the result is the sum of v[l], always added in the same order. Halving: at each level two vectors become
// one whose halves hold their partial sums.
template <int kBit = kLanes / 2>
INLINE Vec sums(Vec* v) {
  for (int i = 0; i < kBit; ++i) {
    v[i] = pick<kBit>(v[i], v[i + kBit], AllLanes()) + pick_crossed<kBit>(v[i], v[i + kBit], AllLanes());
  }
  if constexpr (kBit > 1) return sums<kBit / 2>(v);
  return v[0];
}

// Transpose kLanes rows of kLanes floats in place.
template <int kBit = kLanes / 2>
INLINE void transpose(Vec* v) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & kBit) continue;
    const Vec a = v[i], b = v[i + kBit];
    v[i] = low_halves<kBit>(a, b, AllLanes());
    v[i + kBit] = high_halves<kBit>(a, b, AllLanes());
  }
  if constexpr (kBit > 1) transpose<kBit / 2>(v);
}

// ---- float16 and bfloat16 in memory

INLINE Bits widen(const uint16_t* p) { return __builtin_convertvector(*reinterpret_cast<const UnalignedHalves*>(p), Bits); }
INLINE void narrow(uint16_t* p, Bits bits) {
  *reinterpret_cast<UnalignedHalves*>(p) = __builtin_convertvector(bits, Halves);
}

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

INLINE Vec load(const BFloat16* p) { return reinterpret_cast<Vec>(widen(&p->bits) << 16); }
INLINE void store(BFloat16* p, Vec v) {
  const Bits bits = reinterpret_cast<Bits>(v);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  narrow(&p->bits, v == v ? rounded : Bits{} + 0x7fc0);
}

INLINE Vec load(const Float16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__) && defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  const Bits half = widen(&p->bits), sign = (half & 0x8000) << 16, magnitude = half & 0x7fff;
  const Bits normal = (magnitude << 13) + (112u << 23);
  const Bits special = (magnitude << 13) | 0x7f800000;
  // A subnormal is a small integer times 2^-24; going through the integer works with subnormals switched off.
  const Bits subnormal = reinterpret_cast<Bits>(__builtin_convertvector(reinterpret_cast<Int>(magnitude), Vec) * 0x1p-24f);
  return reinterpret_cast<Vec>(sign | (magnitude < 0x400 ? subnormal : magnitude >= 0x7c00 ? special : normal));
#endif
}
INLINE void store(Float16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
#elif defined(__F16C__) && defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
#else
  const Bits all = reinterpret_cast<Bits>(v), sign = (all >> 16) & 0x8000, bits = all & 0x7fffffff;
  const Bits normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  // Adding 0.5 makes the hardware round at the place of the last subnormal bit, 2^-24.
  const Bits subnormal = reinterpret_cast<Bits>(reinterpret_cast<Vec>(bits) + 0.5f) - 0x3f000000;
  const Bits infinite = Bits{} + 0x7c00, nan = Bits{} + 0x7e00;
  const Bits finite = bits < (113u << 23) ? subnormal : bits >= 0x477ff000 ? infinite : normal;
  narrow(&p->bits, sign | (v == v ? finite : nan));
#endif
}

// One value, through a register: only edges and odd strides come here.
INLINE float load_one(const float* p) { return *p; }
INLINE void store_one(float* p, float v) { *p = v; }
template <class T>
INLINE float load_one(const T* p) {
  T row[kLanes] = {*p};
  return load(row)[0];
}
template <class T>
INLINE void store_one(T* p, float v) {
  T row[kLanes];
  store(row, splat(v));
  *p = row[0];
}

// ---- elementary functions, relative error about 1e-7

// b where either is not a number; compilers do not see one instruction in the general form.
#if defined(__AVX512F__)
INLINE Vec smaller(Vec a, Vec b) { return reinterpret_cast<Vec>(_mm512_min_ps(__m512(a), __m512(b))); }
INLINE Vec larger(Vec a, Vec b) { return reinterpret_cast<Vec>(_mm512_max_ps(__m512(a), __m512(b))); }
#elif defined(__AVX2__)
INLINE Vec smaller(Vec a, Vec b) { return reinterpret_cast<Vec>(_mm256_min_ps(__m256(a), __m256(b))); }
INLINE Vec larger(Vec a, Vec b) { return reinterpret_cast<Vec>(_mm256_max_ps(__m256(a), __m256(b))); }
#else
INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
#endif

INLINE Vec reciprocal(Vec v) {
#if defined(__AVX512F__)
  const Vec guess = reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(v)));  // a sixth of a division's time
  return guess + guess * (1.0f - v * guess);
#else
  return 1.0f / v;
#endif
}

// 2^f for |f| <= 1/2: minimax with exactly 1 at 0 and a slope true to rounding there, so that slow decays carry no bias.
INLINE Vec exp2_fraction(Vec f) {
  Vec p = f * 0.001326472731307149f + 0.009671512991189957f;
  p = p * f + 0.05550733581185341f;
  p = p * f + 0.24022242426872253f;
  p = p * f + 0.6931470036506653f;
  return p * f + 1.0f;
}

// 2^n * p for integral n; what is below the normal numbers counts as 0.
INLINE Vec scale(Vec p, Vec n) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  return reinterpret_cast<Vec>(reinterpret_cast<Int>(p) + (__builtin_convertvector(n, Int) << 23));
#endif
}

INLINE Vec nearest(Vec z) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_roundscale_ps(reinterpret_cast<__m512>(z), 0));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_round_ps(reinterpret_cast<__m256>(z), 8));
#else
  constexpr float kShift = 0x1.8p23f;  // pushes the fraction out of the mantissa
  return (z + kShift) - kShift;
#endif
}

// 2^z for finite z.
INLINE Vec exp2(Vec z) {
#if defined(__AVX512F__)
  const Vec f = reinterpret_cast<Vec>(_mm512_reduce_ps(reinterpret_cast<__m512>(z), 0));  // half the time of rounding
  return scale(exp2_fraction(f), z - f);
#else
  // The exponent is put in place by adding to it. Below -127 the sum would wrap; at -127 it gives what counts as 0.
  z = larger(smaller(z, splat(127.99f)), splat(-127.0f));
  const Vec n = nearest(z);
  return scale(exp2_fraction(z - n), n);
#endif
}

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The logistic functions of x from e = exp(-|x|), accurate to rounding for every x.
INLINE Vec exp_minus_abs(Vec x) {
  const Vec m = larger(reinterpret_cast<Vec>(reinterpret_cast<Bits>(x) | 0x80000000u), splat(-88.0f));  // e counts as 0
  const Vec n = nearest(m * kLog2E);
  // ln 2 in two parts: the first has few enough bits for an exact product.
  return scale(exp2_fraction(((m - n * 0.693359375f) + n * 2.12194440e-4f) * kLog2E), n);
}

// log(1 + exp(x)) = max(x, 0) + log(1 + e), the logarithm as e times a minimax polynomial.
INLINE Vec softplus(Vec x, Vec e) {
  const Vec e2 = e * e, e4 = e2 * e2;  // in halves, which shortens the chain
  const Vec low = (e * -0.24857164f + 0.33321323f) * e2 + (e * -0.49999648f + 1.0f);
  const Vec high = (e * -0.030065834f + 0.079204605f) * e2 + (e * -0.13753808f + 0.19153658f);
  return larger(x, Vec{}) + e * ((e4 * 0.0053648345f + high) * e4 + low);
}

// Its derivative, 1 / (1 + exp(-x)).
INLINE Vec sigmoid(Vec x, Vec e) { return (x < 0.0f ? e : splat(1.0f)) * reciprocal(1.0f + e); }

// Subnormal numbers cost a hundred cycles each and decaying states are full of them: read and write them as 0.
struct FlushSubnormals {
#if defined(__SSE2__)
  unsigned before = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(before | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  uint64_t before;
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    asm volatile("msr fpcr, %0" : : "r"(before | (1u << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#endif
};

}  // namespace VISION_MAMBA_LEVEL
