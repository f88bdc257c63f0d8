// Host twin of csrc/cuda/device/async_copy.h.
#pragma once

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

template <int Bytes>
void async_copy(void* shared, const void* global, cuda_host::Location where = cuda_host::Location::current()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  cuda_host::async_copy(shared, global, Bytes, where);
}
inline void async_commit() { cuda_host::async_commit(); }
template <int Groups>
void async_wait() {
  cuda_host::async_wait(Groups);
}

}  // namespace rcu_ops::cuda
