// Number formats: from and to the arithmetic's type, and pairs of 16-bit values in one register.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/types.h"
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

// ---- formats known at run time ----
//
// Kernels whose loads and stores are a small part of them are compiled once for both 16-bit formats, whose numbers are
// then of type uint16_t, or for all that are added up in fp32. The condition is the same for the whole grid.

__device__ __forceinline__ float widen(uint16_t v, bool bf16) { return bf16 ? unpack_bf16(v).x : unpack_half(v).x; }
__device__ __forceinline__ double widen(double v, bool) { return v; }
__device__ __forceinline__ float widen(float v, bool) { return v; }
template <typename T>
__device__ __forceinline__ T narrow(Accumulator<T> v, bool bf16) {
  if constexpr (std::is_same_v<T, uint16_t>)
    return static_cast<uint16_t>(bf16 ? pack_bf16(v, 0) : pack_half(v, 0));
  else
    return v;
}
__device__ __forceinline__ uint32_t pack(float low, float high, bool bf16) {
  return bf16 ? pack_bf16(low, high) : pack_half(low, high);
}
__device__ __forceinline__ float2 unpack(uint32_t bits, bool bf16) {
  return bf16 ? unpack_bf16(bits) : unpack_half(bits);
}

// Calls function(T()) with the 16-bit format: what differs by more than a conversion, such as a loop of products.
template <typename Function>
__device__ __forceinline__ void with_format(bool bf16, Function function) {
  if (bf16)
    function(__nv_bfloat16());
  else
    function(__half());
}

// Number `at` of an array, which is of doubles where S is double, and else fp32, bf16 or fp16.
template <typename S = float>
__device__ __forceinline__ S load_number(const void* data, DType dtype, int64_t at) {
  if constexpr (sizeof(S) == 8)
    return static_cast<const double*>(data)[at];
  else
    return dtype == DType::f32 ? static_cast<const float*>(data)[at]
                               : widen(static_cast<const uint16_t*>(data)[at], dtype == DType::bf16);
}
template <typename S>
__device__ __forceinline__ void store_number(void* data, DType dtype, int64_t at, S value) {
  if constexpr (sizeof(S) == 8)
    static_cast<double*>(data)[at] = value;
  else if (dtype == DType::f32)
    static_cast<float*>(data)[at] = value;
  else
    static_cast<uint16_t*>(data)[at] = narrow<uint16_t>(value, dtype == DType::bf16);
}

}  // namespace rcu_ops::cuda
