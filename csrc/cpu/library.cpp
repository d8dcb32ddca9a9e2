// The C interface of the CPU kernels, the choice of instruction set, memory and threads.
#include <algorithm>
#include <atomic>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "work.h"

#define DECLARE(level)                              \
  namespace level {                                 \
  void run_forward(const vision_mamba::Job& job);   \
  void run_backward(const vision_mamba::Job& job);  \
  }
DECLARE(baseline)
DECLARE(avx2)
DECLARE(avx512)

namespace vision_mamba {

Buffer::Buffer(int64_t floats)
    : data(floats ? static_cast<float*>(::operator new(sizeof(float) * floats, std::align_val_t(64))) : nullptr) {}
Buffer::~Buffer() { ::operator delete(data, std::align_val_t(64)); }

// Threads are started for each call and joined before it returns: about 20 us each, nothing to keep alive across a fork,
// and no second OpenMP runtime beside torch's.
void parallel(int64_t items, int64_t threads, int64_t scratch_floats, Task task, const void* context) {
  threads = std::max<int64_t>(1, std::min(items, threads));
  const int64_t stride = (scratch_floats + 15) / 16 * 16;
  const Buffer scratch(stride * threads);
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t self) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      task(context, item, scratch.data + self * stride);
    }
  };
  std::vector<std::thread> helpers;
  helpers.reserve(threads - 1);
  try {
    for (int64_t i = 1; i < threads; ++i) helpers.emplace_back(work, i);
  } catch (const std::system_error&) {
    // The system gives no more threads; those there are do all items.
  }
  work(0);
  for (std::thread& helper : helpers) helper.join();
}

namespace {

struct Level {
  const char* name;
  bool (*supported)();
  void (*forward)(const Job&);
  void (*backward)(const Job&);
};

#if defined(VISION_MAMBA_AVX2) || defined(VISION_MAMBA_AVX512)
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

const Level kLevels[] = {  // best first
#if defined(VISION_MAMBA_AVX512)
    {"avx512", has_avx512, avx512::run_forward, avx512::run_backward},
#endif
#if defined(VISION_MAMBA_AVX2)
    {"avx2", has_avx2, avx2::run_forward, avx2::run_backward},
#endif
    {"baseline", [] { return true; }, baseline::run_forward, baseline::run_backward},
};
constexpr int kLevelCount = sizeof(kLevels) / sizeof(kLevels[0]);

// Threads beyond the time they save are not started. The estimate is of a 512-bit processor; slower ones start a few
// threads late.
int64_t useful_threads(const ScanParams& p, double passes) {
  const double steps = static_cast<double>(p.batch) * p.routes * p.steps * p.channels;
  const double microseconds = passes * steps * (4 + p.states) * 2.5e-4, each = 40;
  return std::max<int64_t>(1, std::min<int64_t>(p.threads, static_cast<int64_t>(microseconds / each)));
}

// Tokens that a route never visits: none if it has as many true steps as there are tokens, since it visits each once.
void find_unvisited(const ScanParams& p, std::vector<int32_t>& tokens, std::vector<int64_t>& offsets) {
  offsets.assign(p.routes + 1, 0);
  std::vector<char> visited;
  for (int64_t route = 0; route < p.routes; ++route) {
    const int32_t* indices = p.indices + route * p.steps;
    if (p.steps - std::count(indices, indices + p.steps, -1) != p.tokens) {
      visited.assign(p.tokens, 0);
      for (int64_t t = 0; t < p.steps; ++t) {
        if (indices[t] >= 0) visited[indices[t]] = 1;
      }
      for (int64_t token = 0; token < p.tokens; ++token) {
        if (!visited[token]) tokens.push_back(static_cast<int32_t>(token));
      }
    }
    offsets[route + 1] = static_cast<int64_t>(tokens.size());
  }
}

int run(const ScanParams& p, void (*pass)(const Job&), double passes) {
  try {
    std::vector<int32_t> unvisited;
    std::vector<int64_t> offsets;
    if (p.indices) find_unvisited(p, unvisited, offsets);
    pass(Job{&p, useful_threads(p, passes), unvisited.empty() ? nullptr : unvisited.data(), offsets.data()});
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

}  // namespace
}  // namespace vision_mamba

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// What the other side must agree on: the version of the interface and the size of its struct.
EXPORT int64_t vision_mamba_cpu_abi() { return VISION_MAMBA_ABI * 4096 + static_cast<int64_t>(sizeof(ScanParams)); }

// Steps between two saved states.
EXPORT int64_t vision_mamba_cpu_tile() { return kTile; }

// Name of a level that this build has, best first, whether or not the processor supports it; null after the last.
EXPORT const char* vision_mamba_cpu_level(int64_t level) {
  return level < vision_mamba::kLevelCount ? vision_mamba::kLevels[level].name : nullptr;
}
EXPORT int vision_mamba_cpu_supports(int64_t level) { return vision_mamba::kLevels[level].supported(); }

// 0, or 1 if memory ran out; the outputs are then undefined.
EXPORT int vision_mamba_cpu_forward(const ScanParams* p) {
  return vision_mamba::run(*p, vision_mamba::kLevels[p->level].forward, 1);
}
EXPORT int vision_mamba_cpu_backward(const ScanParams* p) {
  return vision_mamba::run(*p, vision_mamba::kLevels[p->level].backward, 3);
}
