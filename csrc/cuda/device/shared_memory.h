// Dynamic shared memory: the only shared memory kernels use, so that its extent is known to the launch alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

// The block's dynamic shared memory from byte `offset` on; its start is aligned to 1024 bytes, the period of the
// widest swizzle. Uninitialised.
template <typename T>
__device__ __forceinline__ T* dynamic_shared(size_t offset = 0) {
  extern __shared__ __align__(1024) unsigned char rcu_ops_dynamic_shared[];
  return reinterpret_cast<T*>(rcu_ops_dynamic_shared + offset);
}

// Where `p` is in shared memory, in bytes, as instructions and descriptors have it; aligned to Alignment bytes, which
// the host machine checks.
template <unsigned Alignment>
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// `bytes`, from one place in shared memory to another: a multiple of Alignment below 256 KiB, which the host machine
// checks.
template <unsigned Alignment>
__device__ __forceinline__ unsigned shared_distance(unsigned bytes) {
  return bytes;
}

}  // namespace rcu_ops::cuda
