// Host twin of csrc/cuda/device/barrier.h.
#pragma once

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

inline void block_barrier(cuda_host::Location where = cuda_host::Location::current()) {
  cuda_host::block_barrier(where);
}
inline void warp_barrier(cuda_host::Location where = cuda_host::Location::current()) { cuda_host::warp_barrier(where); }
inline void group_barrier(int id, int threads, cuda_host::Location where = cuda_host::Location::current()) {
  cuda_host::group_barrier(id, threads, where);
}
inline void async_proxy_fence() { cuda_host::async_proxy_fence(); }
inline void require_resident_grid(cuda_host::Location where = cuda_host::Location::current()) {
  cuda_host::require_cooperative(where);
}

}  // namespace rcu_ops::cuda
