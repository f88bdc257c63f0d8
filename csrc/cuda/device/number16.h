// The 16-bit formats: their types, and conversions from and to fp32, to nearest with ties to even (sm_80).
//
// The types have the names that the toolkit gives them. Its own headers of them, which every kernel file would include,
// take the compiler as long as many a kernel does.
#pragma once

#include <cstdint>

namespace rcu_ops::cuda {

struct alignas(2) __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(2) __half {
  uint16_t bits;
};

__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
__device__ __forceinline__ float widen(__half v) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
}

__device__ __forceinline__ __nv_bfloat16 to_bf16(float v) {
  __nv_bfloat16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(v));
  return narrow;
}
__device__ __forceinline__ __half to_half(float v) {
  __half narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(v));
  return narrow;
}

// Two numbers in one register, the first in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
__device__ __forceinline__ float2 unpack_bf16(uint32_t bits) {
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}
__device__ __forceinline__ float2 unpack_half(uint32_t bits) {
  return {widen(__half{static_cast<uint16_t>(bits)}), widen(__half{static_cast<uint16_t>(bits >> 16)})};
}

}  // namespace rcu_ops::cuda
