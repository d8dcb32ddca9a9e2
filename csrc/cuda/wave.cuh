// wave.cuh: warps of a block that take the tiles of a route in turn, handing the states between them on.
//
// Warp `turn` of kTurns takes the tiles turn, turn + kTurns and so on, counted in the order in which the pass goes through
// the route. All of a tile that does not depend on the state before it is done before that state is asked for; what it
// takes from there to the state behind the tile is the one chain of the route. Each lane hands kWords floats to the same
// lane of the next warp through shared memory: it writes them and arrives at a barrier of the two warps, where the other
// waits. A place is written again a round later, when the chain has led through the warp that has read it.
#pragma once
#include "common.cuh"

// A barrier of two warps, of fifteen that a block has beside that of __syncthreads: one waits, the other goes on.
DEVICE void pair_wait(int barrier) { asm volatile("bar.sync %0, 64;" :: "r"(barrier) : "memory"); }
DEVICE void pair_arrive(int barrier) { asm volatile("bar.arrive %0, 64;" :: "r"(barrier) : "memory"); }

template <int kTurns, int kWords> struct Wave {
    static_assert(kWords % 4 == 0 && kTurns >= 2);
    struct Memory {
        float4 states[kTurns][kWords / 4][32];
    };
    Memory& memory;
    const int barrier;  // the first of kTurns

    // Of warp `turn`: the state before its tile, which is not the first.
    DEVICE void take(float* h, int turn) const {
        pair_wait(barrier + turn);
#pragma unroll
        for (int i = 0; i < kWords / 4; ++i) {
            const float4 four = memory.states[turn][i][threadIdx.x & 31];
            h[4 * i] = four.x, h[4 * i + 1] = four.y, h[4 * i + 2] = four.z, h[4 * i + 3] = four.w;
        }
    }
    // The state behind its tile, which is not the last.
    DEVICE void hand_on(const float* h, int turn) const {
        const int next = turn + 1 < kTurns ? turn + 1 : 0;
#pragma unroll
        for (int i = 0; i < kWords / 4; ++i) {
            memory.states[next][i][threadIdx.x & 31] = make_float4(h[4 * i], h[4 * i + 1], h[4 * i + 2], h[4 * i + 3]);
        }
        pair_arrive(barrier + next);
    }
};
