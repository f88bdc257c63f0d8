// Dynamic shared memory: the only shared memory kernels use, so that its extent is known to the launch alone.
#pragma once

#include <cstddef>

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

// The block's dynamic shared memory from byte `offset` on; its start is aligned to 1024 bytes, the period of the
// widest swizzle. Uninitialised.
template <typename T>
__device__ __forceinline__ T* dynamic_shared(size_t offset = 0) {
  extern __shared__ __align__(1024) unsigned char rcu_ops_dynamic_shared[];
  return reinterpret_cast<T*>(rcu_ops_dynamic_shared + offset);
}

}  // namespace rcu_ops::cuda
