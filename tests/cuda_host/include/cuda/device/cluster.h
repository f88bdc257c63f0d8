// Host twin of csrc/cuda/device/cluster.h.
#pragma once

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

inline int cluster_rank() { return cuda_host::cluster_rank(); }
inline int cluster_size() { return cuda_host::cluster_size(); }
inline void cluster_arrive(cuda_host::Location where = cuda_host::Location::current()) {
  cuda_host::cluster_arrive(where);
}
inline void cluster_wait(cuda_host::Location where = cuda_host::Location::current()) { cuda_host::cluster_wait(where); }
inline void cluster_barrier(cuda_host::Location where = cuda_host::Location::current()) {
  cuda_host::cluster_arrive(where);
  cuda_host::cluster_wait(where);
}
template <typename T>
T* cluster_shared(T* own, int rank, cuda_host::Location where = cuda_host::Location::current()) {
  return static_cast<T*>(cuda_host::map_shared(own, rank, where));
}

}  // namespace rcu_ops::cuda
