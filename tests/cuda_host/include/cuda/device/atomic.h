// Host twin of csrc/cuda/device/atomic.h. The compiler's atomics, which ThreadSanitizer knows.
#pragma once

#include <cstdint>

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

template <typename T>
T load_relaxed(const T* p) {
  return __atomic_load_n(p, __ATOMIC_RELAXED);
}
template <typename T>
T load_acquire(const T* p) {
  return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
template <typename T>
void store_release(T* p, T value) {
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
}
template <typename T>
void add_release(T* p, T value) {
  __atomic_fetch_add(p, value, __ATOMIC_RELEASE);
}
template <typename T>
T fetch_add(T* p, T value) {
  return __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL);
}

template <typename Ready>
void wait_until(Ready ready, cuda_host::Location where = cuda_host::Location::current()) {
  for (bool first = true; !ready(); first = false) cuda_host::poll(first, where);
}

}  // namespace rcu_ops::cuda
