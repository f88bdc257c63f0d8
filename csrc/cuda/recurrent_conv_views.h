// How recurrent_conv's kernels address the tensors of a Scan.
#pragma once

#include <cstdint>

#include "common/recurrent_conv_index.h"
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

}  // namespace rcu_ops::cuda
