// Thread-block clusters (sm_90): blocks with neighbouring blockIdx.x that run at the same time on one part of the chip
// (launch_clusters), wait for each other in hardware, and read and write each other's shared memory.
//
// Another block's shared memory is there from the cluster's first barrier on, and until its block exits: a kernel
// begins with a cluster_barrier before it maps anything, and ends with one after the last access.
#pragma once

#include <cstdint>

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

// Of this block within its cluster, and how many there are: 0 and 1 in a launch without clusters.
__device__ __forceinline__ int cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ int cluster_size() {
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return static_cast<int>(size);
}

// A barrier of all threads of the cluster; orders their accesses to shared and global memory. Every arrival is followed
// by the same thread's wait; between them is time for work that needs no other block. All lanes of a warp together.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

// The place in block `rank`'s shared memory that `own` is in this block's: a pointer to read and write through.
template <typename T>
__device__ __forceinline__ T* cluster_shared(T* own, int rank) {
  unsigned long long at;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(at) : "l"(own), "r"(rank));
  return reinterpret_cast<T*>(at);
}

}  // namespace rcu_ops::cuda
