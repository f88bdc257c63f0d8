// Small parts of recurrent_conv's plain kernels, the ones for any dtype and strides.
#pragma once

#include "common/recurrent_conv_gpu_plan.h"
#include "common/recurrent_conv_index.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

// plain_lanes adjacent numbers, read and written as whole 16-byte words.
template <typename S>
struct alignas(16) Lanes {
  S v[plain_lanes];
};

template <typename Visit>
__device__ __forceinline__ void for_tile(bool along_channels, int64_t channels, int columns, Visit visit) {
  for_tile(threadIdx.x, blockDim.x, along_channels, channels, columns, visit);
}
template <int Batch, typename Load, typename Keep>
__device__ __forceinline__ void for_tile_loaded(bool along_channels, int64_t channels, int columns, Load load,
                                                Keep keep) {
  for_tile_loaded<Batch>(threadIdx.x, blockDim.x, along_channels, static_cast<int>(channels), columns, load, keep);
}

}  // namespace rcu_ops::cuda
