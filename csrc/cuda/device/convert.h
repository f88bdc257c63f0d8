// Number formats: from and to the arithmetic's type, and pairs of 16-bit values in one register.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device/number16.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

// The type in which values of T are accumulated: double for double, float otherwise.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(float v) { return v; }

// Round to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T narrow(Accumulator<T> v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return to_bf16(v);
  else if constexpr (std::is_same_v<T, __half>)
    return to_half(v);
  else
    return v;
}

// Two values in one register, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return pack_bf16(low, high);
  else
    return pack_half(low, high);
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return unpack_bf16(bits);
  else
    return unpack_half(bits);
}

}  // namespace rcu_ops::cuda
