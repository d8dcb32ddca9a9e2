// What library.cpp offers to the kernels: memory and threads. Plain declarations, so that the files compiled for newer
// processors share no inline code with it.
#pragma once

#include <stdint.h>

#include "../params.h"

namespace vision_mamba {

// Uninitialised floats, aligned to a cache line, freed at the end of the scope. Throws std::bad_alloc.
class Buffer {
 public:
  explicit Buffer(int64_t floats);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data;
};

// Run task(context, item, scratch) for every item in 0 .. items - 1, on at most `threads` threads, this one among them.
// Items are taken in order by whoever is free, so their results must not depend on who runs them.
typedef void (*Task)(const void* context, int64_t item, float* scratch);
void parallel(int64_t items, int64_t threads, int64_t scratch_floats, Task task, const void* context);

// A scan and what follows from its index table: the tokens that a route never visits, where outputs must be set to 0.
struct Job {
  const ScanParams* params;
  int64_t threads;          // worth starting for this amount of work
  const int32_t* unvisited;  // tokens, route after route; null if there are none
  const int64_t* offsets;   // (K + 1) places in `unvisited`
};

}  // namespace vision_mamba
