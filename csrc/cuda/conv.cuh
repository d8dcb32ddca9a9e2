// conv.cuh: what both passes of the convolutions along a sequence share: four taps and SiLU. Of two ways the one is causal
// from the start and the other from the end, as in Vim; a single one has as many taps before its token as it is told.
// Along routes, as in LocalVim, each of them goes its single way through the tokens in its own order, with taps of its own.
// A thread takes kRun channels of a chunk of a sequence and goes through its tokens with those around it in registers: a
// ring of seven, the tokens t - 3 to t + 3. So tokens are taken seven at a time, and read that far ahead.
#pragma once
#include "rows.cuh"

constexpr int kRing = 7;

constexpr int kWays = WAYS, kBefore = BEFORE;
constexpr bool kAhead = AHEAD;
constexpr bool kRoutes = ROUTES;  // steps are tokens by a table, which names each one once a route
// From one token to the next; what is known when the kernel is compiled takes no instruction.
constexpr int kChannels = CHANNELS, kXStep = X_STEP, kDxStep = DX_STEP;

// How far before its token the first tap of a way lies, and how far behind it the last.
DEVICE constexpr int before(int way) { return way == 0 ? kBefore : 0; }
DEVICE constexpr int behind(int way) { return 3 - before(way); }

struct Taps {
    float way[kWays][4][kRun], bias[kWays][kRun];

    DEVICE void read(const Rows& p, int route, int channel) {
#pragma unroll
        for (int k = 0; k < kWays; ++k) {
#pragma unroll
            for (int j = 0; j < kRun; ++j) {
                const long long at = (k + route) * kChannels + channel + j;
                bias[k][j] = p.bias[at];
                Pack<Float, 4> taps;
                load<true>(taps, (const Float*)p.weight + at * 4, 1, 4);
#pragma unroll
                for (int i = 0; i < 4; ++i) way[k][i][j] = taps.get(i);
            }
        }
    }
    // The ring's entry of a tap, where `here` is that of the token. The second way's taps come in reverse.
    static DEVICE constexpr int entry(int k, int here, int tap) {
        return (here + kRing + (k == 0 ? tap - kBefore : 3 - tap)) % kRing;
    }
    // Before SiLU.
    DEVICE float sum(int k, const float (*ring)[kRun], int here, int j) const {
        float v = bias[k][j];
#pragma unroll
        for (int tap = 0; tap < 4; ++tap) v = fmaf(way[k][tap][j], ring[entry(k, here, tap)][j], v);
        return v;
    }
};

struct Place {
    int channel, chunk, route;
    long long batch;
    bool there;

    DEVICE long long token(const Rows& p, int step, bool exists = true) const {
        if constexpr (kRoutes) return exists ? __ldg(p.table + route * p.tokens + step) : 0;
        else return step;
    }
};
DEVICE Place place_of(const Rows& p) {
    constexpr int runs = kChannels / kRun;
    const long long i = blockIdx.x * 128ll + threadIdx.x, piece = i / runs;
    const long long sequence = piece / p.chunks, routes = kRoutes ? p.routes : 1;
    return {(int)(i % runs) * kRun, (int)(piece % p.chunks), (int)(sequence % routes), sequence / routes,
            sequence < p.batch * routes};
}
template <class T> DEVICE Pack<T, kRun> read(const T* from, long long stride, long long token, bool there) {
    Pack<T, kRun> pack;
    load<true>(pack, from + token * stride, 1, there ? kRun : 0);
    return pack;
}
// How many results of a token lie side by side.
DEVICE long long results(const Rows& p) { return kRoutes ? p.routes : kWays; }
