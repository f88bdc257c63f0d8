// Host twin of csrc/cuda/device/shared_memory.h.
#pragma once

#include <cstddef>

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

template <typename T>
T* dynamic_shared(size_t offset = 0) {
  return reinterpret_cast<T*>(cuda_host::dynamic_shared() + offset);
}

}  // namespace rcu_ops::cuda
