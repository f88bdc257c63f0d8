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

template <int Bytes>
struct Word;
template <>
struct Word<16> {
  using Type = uint4;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<2> {
  using Type = uint16_t;
};

// Calls function(Word<bytes>()).
template <typename Function>
__device__ __forceinline__ void with_word(int bytes, Function function) {
  if (bytes == 16)
    function(Word<16>());
  else if (bytes == 8)
    function(Word<8>());
  else if (bytes == 4)
    function(Word<4>());
  else
    function(Word<2>());
}

template <typename W>
constexpr int word_bytes = sizeof(typename W::Type);

// What a product with the rounded state leaves out. Nothing where the state is infinite or NaN: there the rounded one
// already says all.
__device__ __forceinline__ float rest_of(float h, float rounded) {
  const float rest = h - rounded;
  return rest - rest == 0 ? rest : 0.0f;
}

// Copies word by word, through registers only where a word is too short for an asynchronous copy.
template <typename W, typename T>
__device__ __forceinline__ void copy_word(W, unsigned char* slot, const T* from) {
  if constexpr (word_bytes<W> >= 4)
    async_copy<word_bytes<W>>(slot, from);
  else
    *reinterpret_cast<T*>(slot) = *from;
}

}  // namespace rcu_ops::cuda
