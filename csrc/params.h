// One scan as the kernels see it: a flat C struct, filled by vision_mamba/ops/backends from a checked call.
// Letters as everywhere: B batch, L tokens, K routes, S steps of a route, D channels, N states, R rank of the step size.
#pragma once

#include <stdint.h>

// Changes whenever the structs below do; the Python side refuses a library that speaks another version.
#define VISION_MAMBA_ABI 1

constexpr int kTile = 64;  // steps of a tile of the CPU kernels, and between two saved states

enum ScalarType { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// A tensor indexed by (batch, token, route, column); a stride of 0 where an axis is shared. data == 0: absent.
struct Tokens {
  void* data;
  int64_t batch, token, route, column;  // strides in elements
  int64_t type;                         // ScalarType
};

struct ScanParams {
  int64_t batch, tokens, steps, routes, channels, states, rank;  // rank 0: dt comes whole
  int64_t shared_x, merge, softplus;                             // flags
  int64_t threads;                                               // at most so many
  int64_t level;                                                 // which build of the kernel, see library.cpp

  Tokens x, dt, B, C, y;
  const int32_t* indices;       // (K, S), -1 = padding step; null: step t visits token t
  const float* A;               // (K, D, N); this and all below float32, contiguous, null where absent
  const float* D;               // (K, D)
  const float* dt_weight;       // (K, D, R)
  const float* dt_bias;         // (K, D)
  const float* initial_state;   // (B, K, D, N)
  float* last_state;            // (B, K, D, N)
  float* saved;                 // (B, K, T - 1, N, D): the state before every tile of kTile steps but the first of T

  // Backward alone. Whatever has a gradient gets it here, every element written.
  Tokens dy, dx, ddt, dB, dC;   // dy.data null: zero
  const float* dlast;           // (B, K, D, N)
  float *dA, *dD, *ddt_weight, *ddt_bias, *dinitial_state;
};
