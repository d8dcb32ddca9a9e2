// single.cuh: what all kernels share that scan one state a channel: units of step sizes, and softplus.
#pragma once
#include "common.cuh"

constexpr int kRank = RANK;
constexpr bool kSoftplus = SOFTPLUS;

// Step sizes in 16 bits are taken in units of ln 2, so that neither softplus nor the decay multiplies by log2(e); B
// makes up for it. In 32 bits they stay as they are, for the sake of softplus's last digits.
constexpr bool kExact = sizeof(DT_TYPE) == 4;
constexpr float kUnit = kExact ? 1.f : kLn2, kPerUnit = kExact ? 1.f : kLog2e, kDecay = kExact ? kLog2e : 1.f;

DEVICE float step_size(float v) {
    if constexpr (!kSoftplus) return v;
    else return kExact ? softplus<true>(v) : softplus2(v);
}

// Keep a value in a register: the compiler may not compute it anew at each use, nor take a sum of it apart.
DEVICE void keep(unsigned long long& value) { asm volatile("" : "+l"(value)); }
DEVICE void keep(unsigned& value) { asm volatile("" : "+r"(value)); }
DEVICE void keep(int& value) { asm volatile("" : "+r"(value)); }

// High and low bfloat16 halves of two neighbouring weights.
DEVICE void split(float v0, float v1, unsigned& high, unsigned& low) {
    high = narrow_pair<Bfloat>(v0, v1);
    low = narrow_pair<Bfloat>(v0 - __uint_as_float(high << 16), v1 - __uint_as_float(high & 0xffff0000u));
}
