// cp.async: copies from global to shared memory that run beside the thread which issued them (sm_80).
//
// A copy belongs to the group that its thread commits next. async_wait<N>() returns when all but the newest N groups of
// *this* thread have landed; other threads see the bytes after that wait and a barrier. Between issue and wait both
// ends belong to the copy.
#pragma once

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

// Copy Bytes (4, 8 or 16) from `global` to `shared`, both aligned to Bytes.
template <int Bytes>
__device__ __forceinline__ void async_copy(void* shared, const void* global) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (Bytes == 16)  // past L1: streamed once
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(Bytes) : "memory");
}

// Close the current group, which may be empty.
__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int Groups>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

}  // namespace rcu_ops::cuda
