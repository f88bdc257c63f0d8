// As probes.cu, for what an sm_90 has and an sm_80 has not.
#include "cuda/device/barrier.h"
#include "cuda/device/cluster.h"
#include "cuda/device/launch.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shared_memory.h"
#include "probes.h"

namespace rcu_ops::cuda {
namespace {

// The blocks of a cluster add up their numbers, each in rank order through the others' shared memory, and push their own to
// the next one's. out [blocks][4]: rank, size, sum, what was pushed. Barriers: 0 all, 1 without the second, 2 without the last.
template <int Missing>
__global__ void cluster_probe(int* out) {
  auto* memory = dynamic_shared<int>();
  const int rank = cluster_rank(), size = cluster_size(), thread = static_cast<int>(threadIdx.x);
  if (thread == 0) memory[0] = 10 + static_cast<int>(blockIdx.x);
  cluster_barrier();
  int sum = 0;
  for (int r = 0; r < size; ++r) sum += *cluster_shared(memory, r);
  if (thread == 33) *cluster_shared(memory + 1, (rank + 1) % size) = rank;
  if constexpr (Missing != 1) cluster_barrier();
  if (thread == 0) {
    int* at = out + 4 * blockIdx.x;
    at[0] = rank;
    at[1] = size;
    at[2] = sum;
    at[3] = memory[1];
  }
  if constexpr (Missing == 2) sum += *cluster_shared(memory, (rank + 1) % size);
  if (sum == 1) out[0] = 0;
}

// ---- faults ----------------------------------------------------------------------------------------------------------

__global__ void mapping_too_early(int* out) { out[threadIdx.x] = *cluster_shared(dynamic_shared<int>(), 1 - cluster_rank()); }
__global__ void mapping_beyond_the_cluster(int* out) {
  cluster_barrier();
  out[threadIdx.x] = *cluster_shared(dynamic_shared<int>(), 2);
}
__global__ void cluster_arrive_twice(int* out) {
  cluster_arrive();
  cluster_arrive();
  out[threadIdx.x] = 1;
}
__global__ void cluster_never_waited(int* out) {
  cluster_arrive();
  out[threadIdx.x] = 1;
}
// One block's shared memory is read while it may have exited: mapped before the last barrier, read after it.
__global__ void read_after_exit(int* out) {
  auto* memory = dynamic_shared<int>();
  memory[threadIdx.x] = 3;
  cluster_barrier();
  const int* other = cluster_shared(memory, 1 - cluster_rank());
  cluster_barrier();
  if (blockIdx.x == 0) out[threadIdx.x] = other[threadIdx.x];
}

template <void (*Kernel)(int*), size_t SharedBytes>
Error cluster_fault(const std::vector<void*>& s) {
  return launch_clusters("cluster fault", Kernel, 2, dim3(2), dim3(64), SharedBytes, Stream(), static_cast<int*>(s[0]));
}
template <int Missing, int Cluster>
Error clusters(const std::vector<void*>& s) {
  return launch_clusters("cluster_probe", cluster_probe<Missing>, Cluster, dim3(6), dim3(64), 64, Stream(),
                         static_cast<int*>(s[0]));
}

}  // namespace

const Probes& probes_sm90() {
  static const Probes all = {
      {"cluster_of_3", clusters<0, 3>},
      {"cluster_of_1", clusters<0, 1>},
      {"cluster_of_4", clusters<0, 4>},
      {"cluster_without_a_barrier", clusters<1, 3>},
      {"cluster_without_the_last_barrier", clusters<2, 3>},
      {"mapping_too_early", cluster_fault<mapping_too_early, 256>},
      {"mapping_beyond_the_cluster", cluster_fault<mapping_beyond_the_cluster, 256>},
      {"cluster_arrive_twice", cluster_fault<cluster_arrive_twice, 0>},
      {"cluster_never_waited", cluster_fault<cluster_never_waited, 0>},
      {"read_after_exit", cluster_fault<read_after_exit, 256>},
  };
  return all;
}

}  // namespace rcu_ops::cuda
