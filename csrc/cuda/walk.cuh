// walk.cuh: what both passes share where sequences of one state a channel are many: a lane has a channel for itself.
//
// Grid: a warp = one (b, k), 32 kRun neighbouring channels, kRun of them a lane's own, and a segment of the route, which
// it walks along in tiles of kTile steps. Nothing goes from lane to lane but what a step has for all channels. A block's
// warps have neighbouring channels of one route and keep step, so that memory is asked for long rows at a time.
// Routes are taken whole where there are enough of them (kPass 0); else a first launch takes each segment from nothing
// (kPass 1), and in a second one a segment joins what the others before it have left (kPass 2).
// Rows of x and dt are copied to shared memory asynchronously, kAhead tiles ahead, in pieces of 16 bytes, and results
// leave the same way. A block's threads move its rows together: whole lines of L2, where a warp's own are half of one.
// Calls are those whose routes visit every token once, with softplus, channels neighbours, rows aligned.
#pragma once
#include "single.cuh"

constexpr int kPass = PASS;
constexpr int kRun = RUN;
constexpr int kWarps = WARPS;  // of a block; divides the warps of a route
constexpr int kTogether = MERGE ? 1 : kWarps;  // warps that move their rows together
constexpr int kAhead = AHEAD;
constexpr int kItems = ITEMS;  // of the batch that a warp takes one after the other
constexpr int kTile = 16;
constexpr int kBatch = 8;      // steps that are taken at once, so that loads and arithmetic of neighbours overlap
constexpr int kChannels = 32 * kRun;
constexpr float kNever = -6e4f;  // what is read of a step past the end: its step size is 0 then

DEVICE unsigned shared_address(const void* at) { return (unsigned)__cvta_generic_to_shared(at); }
DEVICE void copy_async(void* to, const void* from) {  // L2 fetches 128 bytes: the block's next warp wants the rest
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
#endif
}
DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kLeft> DEVICE void await_copies() {  // all but the last kLeft groups
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

DEVICE void write(void* to, uint4 v) {  // to global memory, which the compiler cannot see of an address of our making
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Sums of numbers as they lie in memory, float32 or pairs in bfloat16.
DEVICE unsigned sum_pair(unsigned a, unsigned b) {
    unsigned r = 0;
#if __CUDA_ARCH__ >= 800
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3f803f80u), "r"(b));  // a * 1 + b
#endif
    return r;
}
template <class T> DEVICE unsigned sum(unsigned a, unsigned b) {
    if constexpr (sizeof(T) == 4) return __float_as_uint(__uint_as_float(a) + __uint_as_float(b));
    else return sum_pair(a, b);
}
template <class T> DEVICE uint4 sum(uint4 a, uint4 b) {
    return {sum<T>(a.x, b.x), sum<T>(a.y, b.y), sum<T>(a.z, b.z), sum<T>(a.w, b.w)};
}

// base + index * step in one instruction. (In three, if the sum is part of the assembly or the product of C++.)
DEVICE unsigned long long multiply_add_wide(unsigned index, unsigned step, unsigned long long base) {
    unsigned long long product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(index), "r"(step));
    return product + base;
}

// Where a tensor's rows lie for a lane.
struct Place {
    unsigned long long base;
    unsigned step;  // bytes between tokens

    DEVICE char* at(int token) const { return (char*)multiply_add_wide(token, step, base); }
};
// `offset` in bytes.
template <class T>
DEVICE Place place_of(const void* data, long long batch, long long b, long long route, long long k, long long l,
                      int offset) {
    Place place = {(unsigned long long)data + (batch * b + route * k) * (long long)sizeof(T) + offset,
                   (unsigned)(l * sizeof(T))};
    keep(place.base);
    return place;
}

// The same of a route's share of a result; see `first_share`.
template <class T>
DEVICE Place place_of_share(const Params& p, const void* data, long long batch, long long b, int route, long long k,
                            long long l, int offset) {
    if (!p.first_share) return place_of<T>(data, batch, b, route, k, l, offset);
    if (route == 0) return place_of<T>(p.first_share, batch, p.tokens * l, 0, 0, l, offset);
    return place_of<T>(data, batch, b, route - 1, k, l, offset);
}

// Rows of a tile, of which a lane moves pieces of 16 bytes.
template <class T> struct alignas(16) Rows {
    T at[kTile][kChannels];

    static constexpr int kPieces = kChannels * (int)sizeof(T) / 16;  // of a row
    static constexpr int kBlockPieces = kPieces * kTogether;      // of the row that is moved
    static constexpr int kTurns = kTile * kPieces / 32, kTurnRows = 32 / kPieces;
    DEVICE static int row(int thread, int turn) { return thread / kBlockPieces + turn * kTurnRows; }
    // The piece that a thread moves first, if warps keep their rows `apart` bytes from one another.
    DEVICE static int place(int thread, int apart) {
        const int piece = thread % kBlockPieces;
        return piece / kPieces * apart + thread / kBlockPieces * (int)sizeof(at[0]) + piece % kPieces * 16;
    }

    // The lane's channels of a row.
    DEVICE void get(float* to, int step, int lane) const {
        Pack<T, kRun> pack;
        const char* from = (const char*)at[step] + lane * kRun * (int)sizeof(T);
        if constexpr (sizeof(T) * kRun == 2) pack.words[0] = *(const unsigned short*)from;
        else if constexpr (sizeof(T) * kRun == 4) pack.words[0] = *(const unsigned*)from;
        else {
            const uint2 two = *(const uint2*)from;
            pack.words[0] = two.x, pack.words[1] = two.y;
        }
#pragma unroll
        for (int j = 0; j < kRun; ++j) to[j] = pack.get(j);
    }
    DEVICE void set(const float* from, int step, int lane) {
        Pack<T, kRun> pack;
        pack.set(from);
        char* to = (char*)at[step] + lane * kRun * (int)sizeof(T);
        if constexpr (sizeof(T) * kRun == 2) *(unsigned short*)to = (unsigned short)pack.words[0];
        else if constexpr (sizeof(T) * kRun == 4) *(unsigned*)to = pack.words[0];
        else *(uint2*)to = make_uint2(pack.words[0], pack.words[1]);
    }
    // The same of kBatch steps, for `leave`. Where a lane has 16 bits a step, words of two steps; they trade places so
    // that eight lanes that read 16 bytes each meet distinct banks.
    static constexpr bool kPaired = sizeof(T) * kRun == 2;
    DEVICE void put(const float (*from)[kRun], int start, int lane) {
        if constexpr (kPaired) {
#pragma unroll
            for (int t = 0; t < kBatch; t += 2) {
                unsigned* words = (unsigned*)at + (start + t) / 2 * 32;
                words[(start + t) / 2 % 2 ? lane ^ 4 : lane] = narrow_pair<T>(from[t][0], from[t + 1][0]);
            }
        } else {
#pragma unroll
            for (int t = 0; t < kBatch; ++t) set(from[t], start + t, lane);
        }
    }
    // A thread's piece of a row, in bytes from the sequence's first channel; `first`: the block's.
    DEVICE static int offset(int thread, int first) { return first * (int)sizeof(T) + thread % kBlockPieces * 16; }
    // All of the first warp's rows, from which others lie `apart`. Lane t % kTile has the token of step t.
    DEVICE void fetch(const Place& from, int token, int thread, int apart) {
        if constexpr (kBack) keep(thread);  // registers are dearer there than what follows from it
        char* to = (char*)at + place(thread, apart);
#pragma unroll
        for (int turn = 0; turn < kTurns; ++turn) {
            const int of = __shfl_sync(kAll, token, row(thread, turn));
            copy_async(to + turn * kTurnRows * (int)sizeof(at[0]), from.at(of));
        }
    }
    DEVICE void leave(const Place& to, int token, int thread, int apart, int rows) const {
        if (rows >= kTile) leave_rows<false>(to, token, thread, apart, rows);
        else leave_rows<true>(to, token, thread, apart, rows);
    }
    template <bool kSome> DEVICE void leave_rows(const Place& to, int token, int thread, int apart, int rows) const {
        if constexpr (kBack) keep(thread);
        if constexpr (kPaired) {
            const int pair = thread / kBlockPieces, piece = thread % kBlockPieces;
            const uint4* words = (const uint4*)((const char*)at + piece / kPieces * apart) + pair * 8;
            const int first = piece % kPieces * 2, turned = pair & 1;
            const uint4 a = words[first ^ turned], b = words[(first + 1) ^ turned];
            const int even = __shfl_sync(kAll, token, 2 * pair), odd = __shfl_sync(kAll, token, 2 * pair + 1);
            const uint4 low = {__byte_perm(a.x, a.y, 0x5410), __byte_perm(a.z, a.w, 0x5410),
                               __byte_perm(b.x, b.y, 0x5410), __byte_perm(b.z, b.w, 0x5410)};
            const uint4 high = {__byte_perm(a.x, a.y, 0x7632), __byte_perm(a.z, a.w, 0x7632),
                                __byte_perm(b.x, b.y, 0x7632), __byte_perm(b.z, b.w, 0x7632)};
            if (!kSome || 2 * pair < rows) write(to.at(even), low);
            if (!kSome || 2 * pair + 1 < rows) write(to.at(odd), high);
        } else {
            const char* from = (const char*)at + place(thread, apart);
#pragma unroll
            for (int turn = 0; turn < kTurns; ++turn) {
                const int of = __shfl_sync(kAll, token, row(thread, turn));
                const uint4 piece = *(const uint4*)(from + turn * kTurnRows * (int)sizeof(at[0]));
                if (!kSome || row(thread, turn) < rows) write(to.at(of), piece);
            }
        }
    }
    // Add `rows` of them to sums in shared memory, a row of each token, when `turn` lets it.
    template <class Turn> DEVICE void add(char* sums, int token, int lane, int rows, Turn turn) const {
        constexpr int kMoved = kPaired ? 2 : kTurns;
        uint4 pieces[kMoved];
        char* to[kMoved];
        bool there[kMoved];
        auto take = [&](int i, int step, uint4 piece) {
            pieces[i] = piece, there[i] = step < rows;
            to[i] = sums + __shfl_sync(kAll, token, step) * (int)sizeof(at[0]) + lane % kPieces * 16;
        };
        if constexpr (kPaired) {
            const int pair = lane / kPieces, first = lane % kPieces * 2, turned = pair & 1;
            const uint4* words = (const uint4*)at + pair * 8;
            const uint4 a = words[first ^ turned], b = words[(first + 1) ^ turned];
            take(0, 2 * pair, uint4{__byte_perm(a.x, a.y, 0x5410), __byte_perm(a.z, a.w, 0x5410),
                                    __byte_perm(b.x, b.y, 0x5410), __byte_perm(b.z, b.w, 0x5410)});
            take(1, 2 * pair + 1, uint4{__byte_perm(a.x, a.y, 0x7632), __byte_perm(a.z, a.w, 0x7632),
                                        __byte_perm(b.x, b.y, 0x7632), __byte_perm(b.z, b.w, 0x7632)});
        } else {
#pragma unroll
            for (int i = 0; i < kMoved; ++i) {
                const int step = lane / kPieces + i * kTurnRows;
                take(i, step, *(const uint4*)((const char*)at[step] + lane % kPieces * 16));
            }
        }
        turn();
#pragma unroll
        for (int i = 0; i < kMoved; ++i) pieces[i] = sum<T>(*(const uint4*)to[i], pieces[i]);
#pragma unroll
        for (int i = 0; i < kMoved; ++i) {
            if (there[i]) *(uint4*)to[i] = pieces[i];
        }
    }
};

// The table of a route as lanes read it, one step each of a tile.
struct Table {
    unsigned long long base;
    int last;

    DEVICE Table(const Params& p, int route)
        : base((unsigned long long)(p.indices + route * p.steps)), last((int)p.steps - 1) {
        keep(base);
    }
    DEVICE int token(int tile, int lane) const {
        return __ldg((const int*)multiply_add_wide(min(max(tile * kTile + lane % kTile, 0), last), 4, base));
    }
};

// What a warp does: a segment of a route of `items` of the batch, kChannels channels from `first` on. A segment is
// kTile-step tiles from `from` to before `to`; there is one where routes are taken whole.
struct Work {
    int route, group, first, channel, segment, from, to;
    long long share;            // of the batch: `items` from share * items on
    long long batch, sequence;  // of the item at hand

    DEVICE Work(const Params& p, int tiles, int lane, int warp) {
        const int groups = (int)p.channels / kChannels, segments = kPass ? (int)p.segments : 1;
        // The first pass has no use for the end of a route, or its start where it goes back.
        const int count = segments - (kPass == 1);
        long long unit = blockIdx.x * (long long)kWarps + warp;
        group = (int)(unit % groups), unit /= groups;
        route = (int)(unit % p.routes), unit /= p.routes;
        segment = (int)(unit % count), share = unit / count;
        first = group * kChannels, channel = first + lane * kRun;
        if (kPass == 1 && kBack) ++segment;
        const int each = kPass ? (int)p.segment_tiles : tiles;
        from = segment * each, to = min(from + each, tiles);
    }
    DEVICE void take(const Params& p, long long item) { batch = item, sequence = batch * p.routes + route; }
    // Where segment `of` keeps what the first pass tells the second.
    DEVICE long long edge(const Params& p, int of) const { return (sequence * p.segments + of) * p.channels + channel; }
    // What precedes the segment, from that of all before it; kBack: all behind it.
    DEVICE void join(const Params& p, float* state, const float* A) const {
        if constexpr (kPass == 2) {
            const int last = (int)p.segments - 1, count = kBack ? last - segment : segment;
            const float steps = (float)p.segment_tiles * kTile * 1e-8f;  // see `decay`
#pragma unroll 4
            for (int i = 0; i < count; ++i) {
                const long long at = edge(p, kBack ? last - i : i);
#pragma unroll
                for (int j = 0; j < kRun; ++j) {
                    // The outermost segment has begun with what the route does.
                    state[j] = fmaf(i ? ex2(fmaf(p.spans[at + j], A[j], steps)) : 0.f, state[j], p.edges[at + j]);
                }
            }
        }
    }
    DEVICE void leave(const Params& p, const float* state, const float* span) const {
#pragma unroll
        for (int j = 0; j < kRun; ++j) p.edges[edge(p, segment) + j] = state[j], p.spans[edge(p, segment) + j] = span[j];
    }
};

template <class T> DEVICE unsigned raw(const void* at) {
    if constexpr (sizeof(T) == 4) return __ldg((const unsigned*)at);
    else return __ldg((const unsigned short*)at);
}
// What a step has for all channels.
struct alignas(16) Pairs {
    float2 at[kTile];  // B and C

    // `word` is as it was read for this tile during the last one: to convert it there would be to wait for it.
    DEVICE void put(unsigned word, int lane) {
        keep(word);
        const Pack<B_TYPE, 1> B = {{word}};
        const Pack<C_TYPE, 1> C = {{word}};
        (&at[0].x)[lane % kTile * 2 + lane / kTile] = lane < kTile ? B.get(0) * kUnit : C.get(0);
    }
    template <int kCount> DEVICE void get(float2* to, int step) const {
#pragma unroll
        for (int t = 0; t < kCount; t += 2) {
            const float4 two = *(const float4*)&at[step + t];
            to[t] = make_float2(two.x, two.y), to[t + 1] = make_float2(two.z, two.w);
        }
    }
};
// The lower half of the lanes fetches B of the tile's steps, the upper half C.
struct PairPlace {
    Place place;
    bool of_C;

    DEVICE PairPlace(const Params& p, long long batch, int route, int lane) : of_C(lane >= kTile) {
        place = of_C ? place_of<C_TYPE>(p.C, batch, p.C_b, route, p.C_k, p.C_l, 0)
                     : place_of<B_TYPE>(p.B, batch, p.B_b, route, p.B_k, p.B_l, 0);
    }
    DEVICE unsigned fetch(int token) const {
        const char* at = place.at(token);
        if constexpr (sizeof(B_TYPE) == sizeof(C_TYPE)) return raw<B_TYPE>(at);
        else return of_C ? raw<C_TYPE>(at) : raw<B_TYPE>(at);
    }
};
