// Barriers. Each orders the shared and global memory accesses of the threads that meet at it.
#pragma once

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

// All threads of the block, none exited.
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

// All 32 threads of the warp, none exited.
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }

// `threads` threads of the block, whole warps, that all name barrier `id`, 1 to 15.
__device__ __forceinline__ void group_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Between ordinary accesses to shared memory and those of wgmma and bulk copies: every thread that made the former
// calls it before the barrier after which the latter are issued.
__device__ __forceinline__ void async_proxy_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// States that the launch is cooperative; the host machine checks it.
__device__ __forceinline__ void require_resident_grid() {}

}  // namespace rcu_ops::cuda
