// mma.sync: d += a b on the matrix unit, one warp (sm_80). fp32 accumulators.
//
// Fragments, with g = lane / 4 and q = lane % 4 (PTX manual, "Matrix fragments for mma.m16n8k16 / m16n8k8"):
//   d[16][8]  d0,d1: row g, columns 2q, 2q+1;  d2,d3: row g+8, the same columns
//   16-bit, k = 16, two values per register, the lower index in the lower half:
//     a[16][16]  a0: row g, k 2q..;  a1: row g+8, k 2q..;  a2: row g, k 2q+8..;  a3: row g+8, k 2q+8..
//     b[16][8]   b0: k 2q.., column g;  b1: k 2q+8.., column g
//   tf32, k = 8, one value (the bits of a float) per register:
//     a[16][8]   a0: row g, k q;  a1: row g+8, k q;  a2: row g, k q+4;  a3: row g+8, k q+4
//     b[8][8]    b0: k q, column g;  b1: k q+4, column g
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

// T: __nv_bfloat16 or __half.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __half>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// The lower 13 bits of a and b are ignored.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace rcu_ops::cuda
