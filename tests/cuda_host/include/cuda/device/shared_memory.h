// Host twin of csrc/cuda/device/shared_memory.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

template <typename T>
T* dynamic_shared(size_t offset = 0) {
  return reinterpret_cast<T*>(cuda_host::dynamic_shared() + offset);
}

template <unsigned Alignment>
uint32_t shared_address(const void* p, cuda_host::Location where = cuda_host::Location::current()) {
  return cuda_host::shared_address(p, Alignment, where);
}

}  // namespace rcu_ops::cuda
