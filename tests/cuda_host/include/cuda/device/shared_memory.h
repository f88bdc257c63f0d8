// Host twin of csrc/cuda/device/shared_memory.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

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

template <unsigned Alignment>
unsigned shared_distance(unsigned bytes, cuda_host::Location where = cuda_host::Location::current()) {
  if (bytes % Alignment != 0 || bytes >= 256 * 1024)
    cuda_host::fail("a distance in shared memory of " + std::to_string(bytes) + " bytes, no multiple of " +
                        std::to_string(Alignment) + " below 256 KiB",
                    where);
  return bytes;
}

}  // namespace rcu_ops::cuda
