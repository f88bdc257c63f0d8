// Numbers in global memory that threads of different blocks exchange. T: a 32- or 64-bit unsigned integer, aligned.
//
// What a thread did before a release, and what it had seen others do (a block_barrier before it makes that the whole
// block's work), is seen by a thread that acquires the released value, and by its block after a barrier. Relaxed
// accesses order nothing.
#pragma once

#include <cstdint>

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

template <typename T>
__device__ __forceinline__ T load_relaxed(const T* p) {
  T value;
  if constexpr (sizeof(T) == 8)
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(__cvta_generic_to_global(p)) : "memory");
  else
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(p)) : "memory");
  return value;
}

template <typename T>
__device__ __forceinline__ T load_acquire(const T* p) {
  T value;
  if constexpr (sizeof(T) == 8)
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(__cvta_generic_to_global(p)) : "memory");
  else
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(p)) : "memory");
  return value;
}

template <typename T>
__device__ __forceinline__ void store_release(T* p, T value) {
  if constexpr (sizeof(T) == 8)
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "l"(value) : "memory");
  else
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(value) : "memory");
}

// *p += value, without waiting for the sum; a release.
template <typename T>
__device__ __forceinline__ void add_release(T* p, T value) {
  if constexpr (sizeof(T) == 8)
    asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "l"(value) : "memory");
  else
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(value) : "memory");
}

// *p += value; returns what was there before. Acquire and release: of all that add, each sees the work of those before
// it.
template <typename T>
__device__ __forceinline__ T fetch_add(T* p, T value) {
  T before;
  if constexpr (sizeof(T) == 8)
    asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
                 : "=l"(before)
                 : "l"(__cvta_generic_to_global(p)), "l"(value)
                 : "memory");
  else
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(p)), "r"(value)
                 : "memory");
  return before;
}

// Returns once ready() does, which reads memory (load_acquire, for what follows to be in order) and changes nothing.
// Whoever makes it true must be certain to run: a thread of the same block, cluster or cooperative launch.
template <typename Ready>
__device__ __forceinline__ void wait_until(Ready ready) {
  while (!ready()) {
  }
}

}  // namespace rcu_ops::cuda
