// tf32.cuh: products of float32 numbers on the tensor cores, which take the upper 19 bits of each.
#pragma once
#include "common.cuh"

// d += A B in tf32, 16 x 8 and 8 x 8: the lane gives of A the rows lane / 4 and lane / 4 + 8 of column lane % 4, then of
// column lane % 4 + 4; of B column lane / 4 of those rows; and has of d those rows, columns 2 (lane % 4) and the next.
// Of the numbers the upper 19 bits count.
DEVICE void multiply_add_tf32(float* d, float a0, float a1, float a2, float a3, float b0, float b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
#endif
}
constexpr float kTruncated = 1.000352f;  // what cutting off 13 bits takes from a number on average, given back
// What they take of a number, and what is cut off.
DEVICE float upper(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); }
DEVICE float rest(float v) { return v - upper(v); }
