// conv.cuh: what both passes of Vim's convolution share: four taps and SiLU along a sequence, causal from its start and
// from its end. A thread takes kRun channels of a chunk of a sequence and goes through its tokens with those around it in
// registers: a ring of seven, the tokens t - 3 to t + 3. So tokens are taken seven at a time, and read that far ahead.
#pragma once
#include "rows.cuh"

constexpr int kRing = 7;

struct Taps {
    float way[2][4][kRun], bias[2][kRun];

    DEVICE void read(const Rows& p, int channel) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
#pragma unroll
            for (int j = 0; j < kRun; ++j) {
                const long long at = k * p.channels + channel + j;
                bias[k][j] = p.bias[at];
                Pack<Float, 4> taps;
                load<true>(taps, (const Float*)p.weight + at * 4, 1, 4);
#pragma unroll
                for (int i = 0; i < 4; ++i) way[k][i][j] = taps.get(i);
            }
        }
    }
    // Before SiLU, at the token of which the ring's entry is `here`. The last tap is on the token itself.
    DEVICE float first(const float (*ring)[kRun], int here, int j) const {
        float v = bias[0][j];
#pragma unroll
        for (int i = 0; i < 4; ++i) v = fmaf(way[0][i][j], ring[(here + 4 + i) % kRing][j], v);
        return v;
    }
    DEVICE float second(const float (*ring)[kRun], int here, int j) const {
        float v = bias[1][j];
#pragma unroll
        for (int i = 0; i < 4; ++i) v = fmaf(way[1][i][j], ring[(here + 3 - i) % kRing][j], v);
        return v;
    }
};

struct Place {
    int channel, chunk;
    long long batch;
    bool there;
};
DEVICE Place place_of(const Rows& p) {
    const long long runs = p.channels / kRun, i = blockIdx.x * 128ll + threadIdx.x, sequence = i / runs;
    return {(int)(i % runs) * kRun, (int)(sequence % p.chunks), sequence / p.chunks, sequence < p.batch * p.chunks};
}
template <class T> DEVICE Pack<T, kRun> read(const T* from, long long stride, int token, bool there) {
    Pack<T, kRun> pack;
    load<true>(pack, from + token * stride, 1, there ? kRun : 0);
    return pack;
}
