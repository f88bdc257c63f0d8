// Host twin of csrc/cuda/device/number16.h: the toolkit's own types and conversions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace rcu_ops::cuda {

using ::__half;
using ::__nv_bfloat16;

inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
inline float widen(__half v) { return __half2float(v); }

inline __nv_bfloat16 to_bf16(float v) { return __float2bfloat16_rn(v); }
inline __half to_half(float v) { return __float2half_rn(v); }

inline uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  std::memcpy(&bits, &pair, 4);
  return bits;
}
inline uint32_t pack_half(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  std::memcpy(&bits, &pair, 4);
  return bits;
}
inline float2 unpack_bf16(uint32_t bits) {
  __nv_bfloat162 pair;
  std::memcpy(static_cast<void*>(&pair), &bits, 4);
  return __bfloat1622float2(pair);
}
inline float2 unpack_half(uint32_t bits) {
  __half2 pair;
  std::memcpy(static_cast<void*>(&pair), &bits, 4);
  return __half22float2(pair);
}

}  // namespace rcu_ops::cuda
