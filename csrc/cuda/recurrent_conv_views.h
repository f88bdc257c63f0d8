// How recurrent_conv's kernels address the tensors of a Scan.
#pragma once

#include <cstdint>

#include "common/recurrent_conv_index.h"
#include "cuda/device/async_copy.h"
#include "cuda/device/convert.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

// Number `i` of a state tensor that may have the arithmetic's type S or that of the data, T.
template <typename T, typename S>
__device__ __forceinline__ S load_state(const View& v, int64_t i, DType dtype) {
  return v.dtype == dtype ? widen(static_cast<const T*>(v.data)[i]) : static_cast<const S*>(v.data)[i];
}
template <typename T, typename S>
__device__ __forceinline__ void store_state(const View& v, int64_t i, DType dtype, S value) {
  if (v.dtype == dtype)
    static_cast<T*>(v.data)[i] = narrow<T>(value);
  else
    static_cast<S*>(v.data)[i] = value;
}

// Calls function(LongWord()) or function(ShortWord{bytes}).
template <typename Function>
__device__ __forceinline__ void with_word(int bytes, Function function) {
  if (bytes == LongWord::bytes)
    function(LongWord());
  else
    function(ShortWord{bytes});
}

// What a product with the rounded state leaves out. Nothing where the state is infinite or NaN: there the rounded one
// already says all.
__device__ __forceinline__ float rest_of(float h, float rounded) {
  const float rest = h - rounded;
  return rest - rest == 0 ? rest : 0.0f;
}

// Copies a word into a slot, through registers only where it is too short for an asynchronous copy.
template <typename T>
__device__ __forceinline__ void copy_word(LongWord, unsigned char* slot, const T* from) {
  async_copy<16>(slot, from);
}
template <typename T>
__device__ __forceinline__ void copy_word(ShortWord word, unsigned char* slot, const T* from) {
  if (word.bytes == 8)
    async_copy<8>(slot, from);
  else if (word.bytes == 4)
    async_copy<4>(slot, from);
  else
    *reinterpret_cast<T*>(slot) = *from;
}

// Copies a word out of a slot.
template <typename T>
__device__ __forceinline__ void store_word(LongWord, T* to, const unsigned char* slot) {
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(slot);
}
template <typename T>
__device__ __forceinline__ void store_word(ShortWord word, T* to, const unsigned char* slot) {
  if (word.bytes == 8)
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(slot);
  else if (word.bytes == 4)
    *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(slot);
  else
    *to = *reinterpret_cast<const T*>(slot);
}

}  // namespace rcu_ops::cuda
