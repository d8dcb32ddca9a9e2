// params.cuh: the one argument of every scan kernel. Each field is eight bytes, so that the host packs it as a row of
// 64-bit integers, by the names it reads from this very file. Strides count elements; the letters after the
// underscore are B batch, L token, K route, D channel (or R rank, or N state).
#pragma once

struct Params {
    // Tensors of the call. Small ones are float32 and contiguous; null where the call leaves one out.
    const void* x;
    const void* dt;
    const void* B;
    const void* C;
    const int* indices;          // (K, S)
    const float* A;              // (K, D, N)
    const float* D;              // (K, D)
    const float* dt_weight;      // (K, D, R)
    const float* dt_bias;        // (K, D)
    const float* initial_state;  // (B, K, D, N)
    // Results of the forward pass.
    void* y;
    float* last_state;  // (B, K, D, N), or null
    float* saved;       // (B, K, checkpoints, D, N), or null
    // Gradients that come in, and gradients and their partial sums that go out.
    const void* dy;
    const float* dlast_state;  // (B, K, D, N), or null
    void* dx;
    void* first_share;     // (B, L, D): where the first route's share of y or dx goes, if not to those of the others
    void* ddt;             // like dt, or (B, L, K, D); of a low rank (B, L, K, channel tiles, R), where N = 1 (tiles, B, L, K, R)
    void* dB;              // (B, L, K, channel tiles, N); (B, L, K, N) and of any strides where it is the gradient itself
    void* dC;
    float* dA;             // (B / items, segments, K, D, N)
    float* dD;             // (B / items, segments, K, D), or null
    float* ddt_bias;       // (B / items, segments, K, D), or null
    float* ddt_weight;     // (B / items, segments, K, D, R), or null
    float* dinitial_state; // (B, K, D, N), or null
    float* dBC;            // of one state a channel (channel tiles, B, K, S, 2): dB and dC in the order of steps
    // Where finish.cuh puts the sums of these parts, or wave_backward.cuh those over the batch.
    void* sum_dB;          // (B, L, K, N)
    void* sum_dC;          // (B, L, K, N)
    void* sum_ddt;         // (B, L, K, R)
    float* sum_channels;   // (K, D, N) of A, (K, D) of D, (K, D) of the bias, (K, D, R) of the weights
    // Where routes are taken in segments of tiles: local states at the segments' ends, and sums of step sizes.
    float* edges;  // (B, K, segments, D, N), N as many as lanes hold
    float* spans;  // (B, K, segments, D)
    float* middle;  // (B, K, segments, D, N), N as many as lanes hold: states between two that are saved, or null
    int* order;     // zeros: how many blocks have begun, then for each whether it is done (wave_backward.cuh: counts); or null
    void* rows;     // of wave_backward.cuh: shares of dB and dC
    // Sizes.
    long long segments;
    long long segment_tiles;
    long long shares;  // of sums over the batch, over which they are added up
    long long apart;   // shares of a sum over routes: a route's is the one of its number modulo that
    long long turns;   // groups of channels that a block takes one after the other
    long long items;   // of the batch that a block takes one after the other, for the sums over the batch
    long long batch;
    long long tokens;
    long long routes;
    long long steps;
    long long channels;
    long long states;
    long long tiles;  // of channels
    // Strides.
    long long x_b;
    long long x_l;
    long long x_k;
    long long x_d;
    long long dt_b;
    long long dt_l;
    long long dt_k;
    long long dt_d;
    long long B_b;
    long long B_l;
    long long B_k;
    long long B_n;
    long long C_b;
    long long C_l;
    long long C_k;
    long long C_n;
    long long y_b;
    long long y_l;
    long long y_k;
    long long y_d;
    long long dy_b;
    long long dy_l;
    long long dy_k;
    long long dy_d;
    long long dx_b;
    long long dx_l;
    long long dx_k;
    long long dx_d;
    long long ddt_b;
    long long ddt_l;
    long long ddt_k;
    long long ddt_d;
    // Of dB and dC where few_backward.cuh and wave_backward.cuh write them as they are wanted.
    long long dB_b;
    long long dB_l;
    long long dB_k;
    long long dB_n;
    long long dC_b;
    long long dC_l;
    long long dC_k;
    long long dC_n;
};
