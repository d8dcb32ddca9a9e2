// sums.cuh: what other kernels left in parts, added up for several results in one launch:
//     to[a d0 + b d1 + c d2] = sum over part of from[part stride + a s0 + b s1 + c s2]
//
// Each sum is in float32 and in a fixed order: a block's warps take every eighth part, and are added one after the other.
// Grid: for each job in turn, one block for 32 neighbouring c; of a single part, which is but moved, one for eight of these.

struct Job {
    const float* from;
    float* to;
    long long parts, stride;
    long long n1, n2;  // how many b and c there are
    long long s0, s1, s2;
    long long d0, d1, d2;
    long long first;  // of its blocks
    long long tiles;  // of 32 neighbours
};
struct Sums {
    Job jobs[JOBS];
};

constexpr int kWarps = 8;
extern "C" __device__ int launch_shape[2] = {32 * kWarps, 0};

extern "C" __global__ void __launch_bounds__(32 * kWarps) sums(const __grid_constant__ Sums p) {
    __shared__ float shares[kWarps][32];
    int which = 0;
#pragma unroll
    for (int i = 1; i < JOBS; ++i) which += blockIdx.x >= p.jobs[i].first;
    const Job& job = p.jobs[which];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool moved = job.parts == 1;
    const long long block = blockIdx.x - job.first, tile = moved ? block * kWarps + warp : block;
    if (moved && tile >= job.tiles) return;
    const long long across = (job.n2 + 31) / 32, c = tile % across * 32 + lane, b = tile / across % job.n1;
    const long long a = tile / across / job.n1;
    const bool there = c < job.n2;
    const float* from = job.from + a * job.s0 + b * job.s1 + c * job.s2;
    float sum = 0.f;
    if (moved) {
        if (there) sum = *from;
    } else {
        if (there) {
#pragma unroll 16
            for (long long part = warp; part < job.parts; part += kWarps) sum += from[part * job.stride];
        }
        shares[warp][lane] = sum;
        __syncthreads();
        if (warp > 0) return;
#pragma unroll
        for (int i = 1; i < kWarps; ++i) sum += shares[i][lane];
    }
    if (there) job.to[a * job.d0 + b * job.d1 + c * job.d2] = sum;
}
