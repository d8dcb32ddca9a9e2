// What the CUDA kernels need of a GPU, on a CPU: a block's threads are fibers of one thread, which take turns wherever they
// wait for each other; blocks run one after the other, but for those of a cluster. Memory that is copied asynchronously
// changes only when the copy is waited for, and shared memory begins as NaN. A fiber that waits for what never comes, or a
// write behind the shared memory that a block has, ends the program with a message.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <type_traits>
#include <vector>

#define __CUDA_ARCH__ 900
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __builtin_assume(condition) ((void)0)

using std::fabs, std::fma;
template <class A, class B> std::common_type_t<A, B> min(A a, B b) { return a < b ? a : b; }
template <class A, class B> std::common_type_t<A, B> max(A a, B b) { return a > b ? a : b; }

struct uint2 { unsigned x, y; };
struct int2 { int x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct dim3 { unsigned x, y, z; };

// With -fsanitize=thread, ThreadSanitizer takes fibers for threads, of which only barriers let one see what another has
// written: an access that merely happens to come later is reported. What this file does by itself it does unseen.
#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
namespace emulated {
struct Unseen {
    Unseen() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
    ~Unseen() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
};
}  // namespace emulated
#else
#define __tsan_get_current_fiber() nullptr
#define __tsan_create_fiber(flags) nullptr
#define __tsan_destroy_fiber(fiber) ((void)0)
#define __tsan_switch_to_fiber(fiber, flags) ((void)0)
#define __tsan_acquire(what) ((void)0)
#define __tsan_release(what) ((void)0)
namespace emulated {
struct Unseen {
    Unseen() {}
};
}  // namespace emulated
#endif

namespace emulated {

template <class To, class From> To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

struct Copy {
    char* to;
    char data[16];
    int bytes;
};
struct Warp {
    unsigned long long sent[2][32][4];  // of two exchanges in turn
    unsigned arrived = 0;
    char seen[8];  // what lets lanes see what others have written, each time another one
};
struct Barrier {
    unsigned arrived = 0;
    char seen[64];
};
struct Block {
    dim3 index;
    char* shared;
    std::vector<Warp> warps;
    Barrier barriers[16];
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Block* block;
    dim3 thread;
    std::vector<Copy> asked;  // not committed yet
    std::deque<std::vector<Copy>> groups;
    unsigned exchanges, meetings;
    bool done;
    void* known;  // to ThreadSanitizer
};
// In eight bytes of shared memory: arrivals and bytes that a phase still waits for, and how many arrivals a phase has.
struct Mailbox {
    unsigned char left, count;
    unsigned short phase;
    int bytes;
};

constexpr char kBehind = 0x5a;  // what stands behind a block's shared memory

inline dim3 grid, threads;
inline std::vector<Block> cluster;
inline std::vector<Fiber> fibers;
inline Fiber* current;
inline ucontext_t scheduler;
inline void* known_scheduler;
inline char all_done;
inline unsigned met;                 // at the cluster's barrier
inline unsigned long long progress;  // of what fibers wait for

[[noreturn]] inline void fail(const char* what) {
    const unsigned block = current ? current->block->index.x : 0, thread = current ? current->thread.x : 0;
    fprintf(stderr, "emulated kernel, block %u, thread %u: %s\n", block, thread, what);
    abort();
}
#define UNSEEN __attribute__((no_sanitize("thread"), noinline)) inline
UNSEEN Fiber& self() { return *current; }
UNSEEN Block& block() { return *current->block; }
inline char* shared(size_t at = 0) { return block().shared + at; }
UNSEEN void pause() {
    __tsan_switch_to_fiber(known_scheduler, 1);
    swapcontext(&current->context, &scheduler);
}
UNSEEN void go_on(Fiber& fiber) {
    current = &fiber;
    __tsan_switch_to_fiber(fiber.known, 1);
    swapcontext(&scheduler, &fiber.context);
}
template <class Ready> void wait(Ready ready) {
    while (!ready()) pause();
    ++progress;
}

inline Warp& warp() { return block().warps[self().thread.x / 32]; }
inline int lane() { return self().thread.x % 32; }

// Every lane of the warp sends, and then sees what all have sent.
template <class T> const unsigned long long (*exchange(const T& value))[4] {
    static_assert(sizeof(T) <= 32);
    Unseen here;
    Warp& own = warp();
    const unsigned turn = self().exchanges++;
    auto* sent = own.sent[turn % 2];
    memcpy(sent[lane()], &value, sizeof value);
    ++own.arrived, ++progress;
    const unsigned all = 32 * (turn + 1);
    wait([&] { return (int)(own.arrived - all) >= 0; });
    return sent;
}
template <class T> T from_lane(const T& value, int lane) {
    Unseen here;
    T found;
    memcpy(&found, exchange(value)[lane & 31], sizeof found);
    return found;
}

inline void barrier(int at, int count, bool waits) {
    Unseen here;
    if (at < 0 || at > 15) fail("no such barrier");
    Barrier& own = block().barriers[at];
    const unsigned time = own.arrived++ / count, all = (time + 1) * count;
    __tsan_release(&own.seen[time % sizeof own.seen]);
    ++progress;
    if (!waits) return;
    wait([&] { return (int)(own.arrived - all) >= 0; });
    __tsan_acquire(&own.seen[time % sizeof own.seen]);
}

template <class To, class... Numbers> void store(To to, Numbers... numbers) {
    if ((size_t)to % (4 * sizeof...(numbers))) fail("a write that is not aligned");
    unsigned word[] = {bits<unsigned>(numbers)...};
    memcpy((void*)to, word, sizeof word);
}
template <class... Numbers> void load(const char* from, Numbers&... numbers) {
    if ((size_t)from % (4 * sizeof...(numbers))) fail("a read that is not aligned");
    ((memcpy(&numbers, from, 4), from += 4), ...);
}

template <class T> T read(const void* from) {
    if ((size_t)from % sizeof(T)) fail("a read that is not aligned");
    return *(const T*)from;
}

// An mbarrier; of its bytes, each phase in turn stands for what its arrivals let others see.
inline void begin_mailbox(size_t at, int count) {
    Unseen here;
    *(Mailbox*)shared(at) = {(unsigned char)count, (unsigned char)count, 0, 0};
}
inline void turn_over(Mailbox& own) {
    if (own.left == 0 && own.bytes == 0) own.left = own.count, ++own.phase;
    ++progress;
}
inline void arrive(size_t at, int bytes = 0) {
    Unseen here;
    Mailbox& own = *(Mailbox*)shared(at);
    if (own.left == 0) fail("an mbarrier that was not initialised, or has enough arrivals");
    __tsan_release(shared(at) + own.phase % 8);
    --own.left, own.bytes += bytes;
    turn_over(own);
}
inline bool arrived(size_t at, int parity) {
    Unseen here;
    const unsigned phase = ((Mailbox*)shared(at))->phase;
    if ((phase & 1) == (unsigned)parity) return pause(), false;
    if (phase > 0) __tsan_acquire(shared(at) + (phase - 1) % 8);
    ++progress;
    return true;
}

// Clusters. A place in another block's shared memory has the block's rank in its upper bits.
constexpr int kRankAt = 20;
inline int rank() { return block().index.x % cluster.size(); }
inline unsigned place_at(size_t at, int rank) { return (unsigned)at | (unsigned)(rank + 1) << kRankAt; }
inline char* at_place(unsigned place) {
    if (place >> kRankAt == 0 || place >> kRankAt > cluster.size()) fail("no block of the cluster has this place");
    return cluster[(place >> kRankAt) - 1].shared + (place & ((1u << kRankAt) - 1));
}
template <class... Numbers> void send(unsigned to, unsigned mail, Numbers... numbers) {
    Unseen here;
    store(at_place(to), numbers...);
    Mailbox& own = *(Mailbox*)at_place(mail);
    own.bytes -= 4 * (int)sizeof...(numbers);
    turn_over(own);
}
inline void meet() {
    Unseen here;
    ++met, ++self().meetings, ++progress;
}
inline void await_all() {
    Unseen here;
    const unsigned all = self().meetings * fibers.size();
    wait([&] { return (int)(met - all) >= 0; });
}

inline void copy_later(size_t to, const void* from, int bytes) {  // nowhere: zeros
    if (to % bytes || (size_t)from % bytes) fail("an asynchronous copy that is not aligned");
    Copy copy{shared(to), {}, bytes};
    if (from) memcpy(copy.data, from, bytes);
    self().asked.push_back(copy);
}
inline void commit() { self().groups.push_back(std::move(self().asked)), self().asked.clear(); }
inline void finish(size_t left) {
    for (; self().groups.size() > left; self().groups.pop_front()) {
        for (const Copy& copy : self().groups.front()) memcpy(copy.to, copy.data, copy.bytes);
    }
}

// Numbers in 16 bits, and 19.
inline unsigned short to_bfloat(float v) {
    const unsigned b = bits<unsigned>(v);
    return (b & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (b + 0x7fffu + (b >> 16 & 1)) >> 16;
}
inline float of_bfloat(unsigned short v) { return bits<float>((unsigned)v << 16); }
inline float of_half(unsigned short v) {
    const int exponent = v >> 10 & 31, rest = v & 1023;
    const float size = exponent == 31 ? (rest ? NAN : INFINITY)
                                      : ldexpf(exponent ? rest + 1024 : rest, (exponent ? exponent : 1) - 25);
    return v >> 15 ? -size : size;
}
inline unsigned short to_half(float v) {  // to nearest, ties to even, as ldexp and rint do
    const unsigned short sign = std::signbit(v) ? 0x8000 : 0;
    if (std::isnan(v)) return 0x7fff;
    if (v == 0) return sign;
    int exponent;
    frexpf(v, &exponent);
    exponent = max(exponent, -13);  // below, numbers are as far apart as the smallest ones with all digits
    const float digits = rintf(ldexpf(fabs(v), 11 - exponent));
    if (std::isinf(v) || ldexpf(digits, exponent - 11) >= 65536.f) return sign | 0x7c00;
    return sign | (unsigned short)((exponent + 13) * 1024 + (int)digits);
}
inline float to_tf32(unsigned v) { return bits<float>(v & 0xffffe000u); }  // the tensor cores cut
inline unsigned pair(unsigned short low, unsigned short high) { return low | (unsigned)high << 16; }
inline unsigned sum_bfloats(unsigned a, unsigned b) {
    return pair(to_bfloat(of_bfloat(a) + of_bfloat(b)), to_bfloat(of_bfloat(a >> 16) + of_bfloat(b >> 16)));
}

// D = A B + C, A 16 x depth and B depth x 8, of which a lane's words hold `each` neighbours in a row of A, a column of B.
template <int kDepth, int kEach, int kA, int kB, class Word, class Other, class Number>
void multiply(float* d, const float (&c)[4], const Word (&a)[kA], const Other (&b)[kB], Number number) {
    Unseen here;
    struct Sent { unsigned a[kA], b[kB]; } own;
    for (int r = 0; r < kA; ++r) own.a[r] = bits<unsigned>(a[r]);
    for (int r = 0; r < kB; ++r) own.b[r] = bits<unsigned>(b[r]);
    const auto* sent = exchange(own);
    float A[16][kDepth], B[kDepth][8];
    for (int l = 0; l < 32; ++l) {
        Sent of;
        memcpy(&of, sent[l], sizeof of);
        for (int r = 0; r < kA; ++r) {
            for (int e = 0; e < kEach; ++e) A[l / 4 + r % 2 * 8][kEach * (l % 4) + e + r / 2 * 4 * kEach] = number(of.a[r], e);
        }
        for (int r = 0; r < kB; ++r) {
            for (int e = 0; e < kEach; ++e) B[kEach * (l % 4) + e + r * 4 * kEach][l / 4] = number(of.b[r], e);
        }
    }
    for (int i = 0; i < 4; ++i) {
        const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
        float sum = c[i];
        for (int k = 0; k < kDepth; ++k) sum += A[row][k] * B[k][column];
        d[i] = sum;
    }
}
inline float bfloat_at(unsigned word, int e) { return of_bfloat(word >> 16 * e); }
inline float half_at(unsigned word, int e) { return of_half(word >> 16 * e); }
inline float tf32_at(unsigned word, int) { return to_tf32(word); }

inline unsigned transposed(unsigned word) {
    Unseen here;
    const auto* sent = exchange(word);
    unsigned found = 0;
    for (int e = 0; e < 2; ++e) {  // row lane / 4, columns 2 (lane % 4) and the next
        const int row = lane() % 4 * 2 + e, column = lane() / 4;
        unsigned of;
        memcpy(&of, sent[row * 4 + column / 2], sizeof of);
        found |= (of >> 16 * (column % 2) & 0xffff) << 16 * e;
    }
    return found;
}

template <class Kernel> void run(Kernel kernel, unsigned blocks, unsigned count, size_t bytes, unsigned joined = 1) {
    static void (*start)() = [] {};
    static Kernel* body;
    body = &kernel;
    start = [] {
        (*body)();
        {
            Unseen here;
            __tsan_release(&all_done);
            self().done = true, ++progress;
        }
        pause();
    };
    known_scheduler = __tsan_get_current_fiber();
    grid = {blocks, 1, 1}, threads = {count, 1, 1};
    fibers.resize(count * joined), cluster.resize(joined);
    if (bytes >> kRankAt || blocks % joined) fail("too much shared memory, or part of a cluster");
    const size_t room = (bytes + 1023) / 1024 * 1024 + 1024;
    for (Block& own : cluster) own.shared = (char*)aligned_alloc(1024, room);
    for (unsigned first = 0; first < blocks; first += joined) {
        met = 0;
        for (unsigned b = 0; b < joined; ++b) {
            Block& own = cluster[b];
            own.index = {first + b, 0, 0};
            memset(own.shared, 0xff, bytes), memset(own.shared + bytes, kBehind, room - bytes);
            own.warps.assign((count + 31) / 32, {});
            for (Barrier& barrier : own.barriers) barrier = {};
        }
        for (unsigned t = 0; t < count * joined; ++t) {
            Fiber& fiber = fibers[t];
            fiber.stack.resize(1 << 16), fiber.thread = {t % count, 0, 0}, fiber.block = &cluster[t / count];
            fiber.exchanges = fiber.meetings = 0, fiber.done = false;
            fiber.asked.clear(), fiber.groups.clear();
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, start, 0);
            fiber.known = __tsan_create_fiber(0);
        }
        for (bool left = true; left;) {
            Unseen here;
            left = false;
            const unsigned long long before = progress;
            for (Fiber& fiber : fibers) {
                if (fiber.done) continue;
                left = true;
                go_on(fiber);
            }
            if (left && progress == before) fail("all threads wait");
        }
        current = nullptr;
        __tsan_acquire(&all_done);
        for (Fiber& fiber : fibers) __tsan_destroy_fiber(fiber.known);
        for (Block& own : cluster) {
            const auto kept = std::count(own.shared + bytes, own.shared + room, kBehind);
            if ((size_t)kept != room - bytes) fail("a write behind its shared memory");
            for (Barrier& barrier : own.barriers) {
                if (barrier.arrived % 32) fail("a barrier that part of a warp came to");
            }
        }
    }
    for (Block& own : cluster) free(own.shared);
}

}  // namespace emulated

#define threadIdx (emulated::self().thread)
#define blockIdx (emulated::block().index)
#define gridDim (emulated::grid)
#define blockDim (emulated::threads)

inline float __uint_as_float(unsigned v) { return emulated::bits<float>(v); }
inline unsigned __float_as_uint(float v) { return emulated::bits<unsigned>(v); }
inline int __float_as_int(float v) { return emulated::bits<int>(v); }
inline float __int_as_float(int v) { return emulated::bits<float>(v); }
template <class T> T __ldg(const T* at) { return *at; }
template <class T> T __ldcg(const T* at) { return *at; }
template <class T> void __stcg(T* at, T v) { *at = v; }
template <class T> bool __isGlobal(T*) { return true; }
inline size_t __cvta_generic_to_shared(const void* at) { return (const char*)at - emulated::shared(); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long both = a | (unsigned long long)b << 32;
    unsigned found = 0;
    for (int i = 0; i < 4; ++i) found |= (unsigned)(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return found;
}
inline void __syncwarp(unsigned = ~0u) {
    char* seen = &emulated::warp().seen[emulated::self().exchanges % 8];
    __tsan_release(seen);
    emulated::exchange(0);
    __tsan_acquire(seen);
}
inline void __syncthreads() { emulated::barrier(0, emulated::threads.x, true); }
[[noreturn]] inline void __assertfail(const char* what, const char*, unsigned, const char*, size_t) { emulated::fail(what); }
inline void __nanosleep(unsigned) { emulated::pause(); }
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T> T __shfl_sync(unsigned, T v, int lane, int width = 32) {
    return emulated::from_lane(v, (emulated::lane() & -width) | (lane & (width - 1)));
}
template <class T> T __shfl_xor_sync(unsigned, T v, int mask, int = 32) {
    return emulated::from_lane(v, emulated::lane() ^ mask);
}
template <class T> T __shfl_up_sync(unsigned, T v, unsigned by, int width = 32) {
    const int lane = emulated::lane();
    return emulated::from_lane(v, lane % width < (int)by ? lane : lane - by);
}
template <class T> T __shfl_down_sync(unsigned, T v, unsigned by, int width = 32) {
    const int lane = emulated::lane();
    return emulated::from_lane(v, lane % width + (int)by >= width ? lane : lane + by);
}
inline unsigned __ballot_sync(unsigned, bool v) {
    emulated::Unseen here;
    const auto* sent = emulated::exchange((unsigned)v);
    unsigned all = 0;
    for (int l = 0; l < 32; ++l) all |= (sent[l][0] & 1) << l;
    return all;
}
inline bool __any_sync(unsigned m, bool v) { return __ballot_sync(m, v) != 0; }
inline bool __all_sync(unsigned m, bool v) { return __ballot_sync(m, v) == ~0u; }
template <class T> T atomicAdd(T* at, T v) { return __atomic_fetch_add(at, v, __ATOMIC_RELAXED); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
