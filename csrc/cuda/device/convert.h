// Number formats: from and to the arithmetic's type, and pairs of 16-bit values in one register.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

// The type in which values of T are accumulated: double for double, float otherwise.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }

// Round to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T narrow(Accumulator<T> v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(v);
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(v);
  else
    return v;
}

// Two values in one register, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, 4);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, 4);
  }
  return bits;
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    __nv_bfloat162 pair;
    memcpy(static_cast<void*>(&pair), &bits, 4);
    return __bfloat1622float2(pair);
  } else {
    __half2 pair;
    memcpy(static_cast<void*>(&pair), &bits, 4);
    return __half22float2(pair);
  }
}

}  // namespace rcu_ops::cuda
