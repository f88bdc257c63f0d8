// Barriers. Each orders the shared and global memory accesses of the threads that meet at it.
#pragma once

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

// All threads of the block, none exited.
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

// All 32 threads of the warp, none exited.
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// States that the launch is cooperative; the host machine checks it.
__device__ __forceinline__ void require_resident_grid() {}

}  // namespace rcu_ops::cuda
