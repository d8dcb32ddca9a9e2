// wide.cuh: what both passes for several states a channel share: the places of lanes, runs of channels in shared memory,
// and a low-rank step size on the tensor cores.
#pragma once
#include "common.cuh"

constexpr int kLanes = LANES;    // lanes that share a channel
constexpr int kStates = STATES;  // states a lane holds of each of its channels
constexpr int kSlots = SLOTS;    // channels of a lane
constexpr bool kSoftplus = SOFTPLUS;
constexpr int kRank = RANK;      // columns of a low-rank step size, 0 = dt comes whole
constexpr int kWarps = WARPS;
constexpr bool kVectorX = VECTOR_X;    // x, dt and what goes with them: channels are neighbours, aligned, whole runs
constexpr bool kVectorBC = VECTOR_BC;  // B, C: states are neighbours, aligned, as many as lanes hold
constexpr int kCheckpoint = CHECKPOINT;  // steps between two states that forward saves

constexpr int kGroups = 32 / kLanes;
constexpr int kWarpChannels = kSlots * kGroups;
constexpr int kRow = kLanes * kStates;  // states of a row of B in shared memory, the last ones 0
static_assert(kSlots <= kLanes || kLanes == 1);

template <class T> DEVICE T* at_token(T* tensor, int token, long long stride) {
    return tensor + (long long)token * (int)stride;
}

DEVICE float decay(float s, float A) { return ex2(s * A); }

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
// High and low bfloat16 halves of two numbers.
DEVICE void halves(float v0, float v1, unsigned& high, unsigned& low) {
    high = narrow_pair<Bfloat>(v0, v1);
    low = narrow_pair<Bfloat>(v0 - __uint_as_float(high << 16), v1 - __uint_as_float(high & 0xffff0000u));
}
