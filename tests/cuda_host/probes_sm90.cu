// As probes.cu, for what an sm_90 has and an sm_80 has not.
#include "cuda/device/barrier.h"
#include "cuda/device/cluster.h"
#include "cuda/device/launch.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shared_memory.h"
#include "cuda/device/wgmma.h"
#include "probes.h"

namespace rcu_ops::cuda {
namespace {

// The blocks of a cluster add up their numbers, each in rank order through the others' shared memory, and push their
// own to the next one's. out [blocks][4]: rank, size, sum, what was pushed. Barriers: 0 all, 1 without the second, 2
// without the last.
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

// a [128 threads][4], shared memory [bytes] in; d [128][N / 2] in and out. b, and a unless it is in registers, begin at
// the bytes that `at` names: a, b, and how far the next 8 rows and (without a swizzle) the next 8 numbers along k are.
enum class Missing { nothing, proxy_fence, fence, wait };
template <typename T, int N, Swizzle Mode, bool SharedA, Missing Left = Missing::nothing>
__global__ void wgmma_probe(const uint32_t* a, const uint32_t* shared, const int* at, float* d, int words) {
  auto* memory = dynamic_shared<uint32_t>();
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < words; i += 128) memory[i] = shared[i];
  float sum[N / 2];
  uint32_t x[4];
  for (int i = 0; i < N / 2; ++i) sum[i] = d[N / 2 * thread + i];
  for (int i = 0; i < 4; ++i) x[i] = a[4 * thread + i];
  if constexpr (Left != Missing::proxy_fence) async_proxy_fence();
  group_barrier(3, 128);
  const SharedMatrix left(dynamic_shared<char>(at[0]), Mode, static_cast<unsigned>(at[2]),
                          static_cast<unsigned>(at[3]));
  const SharedMatrix right(dynamic_shared<char>(at[1]), Mode, static_cast<unsigned>(at[2]),
                           static_cast<unsigned>(at[3]));
  if constexpr (Left != Missing::fence) wgmma_fence(sum);
  if constexpr (SharedA)
    wgmma<T>(sum, left, right);
  else
    wgmma<T>(sum, x, right);
  wgmma_commit();
  if constexpr (Left != Missing::wait) wgmma_wait<0>(sum);
  for (int i = 0; i < N / 2; ++i) d[N / 2 * thread + i] = sum[i];
  if constexpr (Left == Missing::wait) wgmma_wait<0>(sum);
}

// A descriptor of the last parameters, 32 bytes further on where that is asked for.
__global__ void descriptor_probe(const int* at, uint64_t* bits) {
  const SharedMatrix matrix(dynamic_shared<char>(at[0]), static_cast<Swizzle>(at[1]), static_cast<unsigned>(at[2]),
                            static_cast<unsigned>(at[3]));
  bits[0] = matrix.bits();
  bits[1] = matrix.at(static_cast<unsigned>(at[4])).bits();
  bits[2] = shared_address<16>(dynamic_shared<char>());
}
Error descriptor(const std::vector<void*>& s) {
  return launch("descriptor_probe", descriptor_probe, dim3(1), dim3(1), 32 * 1024, Stream(),
                static_cast<const int*>(s[0]), static_cast<uint64_t*>(s[1]));
}

// ---- faults ---------------------------------------------------------------------------------------------------------

__global__ void mapping_too_early(int* out) {
  out[threadIdx.x] = *cluster_shared(dynamic_shared<int>(), 1 - cluster_rank());
}
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

__global__ void group_barrier_of_too_many(int* out) {
  if (threadIdx.x < 32) group_barrier(2, 64);
  out[threadIdx.x] = 1;
}

__global__ void misaligned_rows_of_a_matrix(int* out) {
  out[threadIdx.x] = static_cast<int>(SharedMatrix(dynamic_shared<char>(), Swizzle::none, 264, 128).bits());
}
// Begins at the `Row`th row, and has the next 8 rows so far on.
template <unsigned Row, unsigned NextRows>
__global__ void matrix_between_rows_of_8(int* out) {
  float sum[32] = {};
  const uint32_t x[4] = {};
  wgmma_fence(sum);
  wgmma<__half>(sum, x, SharedMatrix(dynamic_shared<char>(64 * Row), Swizzle::row64, NextRows));
  wgmma_commit();
  wgmma_wait<0>(sum);
  out[threadIdx.x] = static_cast<int>(sum[0]);
}

template <void (*Kernel)(int*), int Threads = 64, size_t SharedBytes = 0>
Error fault(const std::vector<void*>& s) {
  return launch("fault", Kernel, dim3(1), dim3(Threads), SharedBytes, Stream(), static_cast<int*>(s[0]));
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
template <typename T, int N, Swizzle Mode, bool SharedA, Missing Left = Missing::nothing>
Error products(const std::vector<void*>& s) {
  const int* at = static_cast<const int*>(s[2]);
  return launch("wgmma_probe", wgmma_probe<T, N, Mode, SharedA, Left>, dim3(1), dim3(128), static_cast<size_t>(at[4]),
                Stream(), static_cast<const uint32_t*>(s[0]), static_cast<const uint32_t*>(s[1]), at,
                static_cast<float*>(s[3]), at[4] / 4);
}

}  // namespace

const Probes& probes_sm90() {
  using bf16 = __nv_bfloat16;
  static const Probes all = {
      {"wgmma_256_bf16_registers_128", products<bf16, 256, Swizzle::row128, false>},
      {"wgmma_64_f16_registers_64", products<__half, 64, Swizzle::row64, false>},
      {"wgmma_128_bf16_shared_32", products<bf16, 128, Swizzle::row32, true>},
      {"wgmma_64_f16_shared_16", products<__half, 64, Swizzle::none, true>},
      {"wgmma_64_bf16_registers_16", products<bf16, 64, Swizzle::none, false>},
      {"wgmma_64_f16_shared_64", products<__half, 64, Swizzle::row64, true>},
      {"wgmma_64_bf16_shared_128", products<bf16, 64, Swizzle::row128, true>},
      {"wgmma_without_proxy_fence", products<bf16, 64, Swizzle::row128, false, Missing::proxy_fence>},
      {"wgmma_without_fence", products<bf16, 64, Swizzle::row128, false, Missing::fence>},
      {"wgmma_without_wait", products<bf16, 64, Swizzle::row128, false, Missing::wait>},
      {"descriptor", descriptor},
      {"group_barrier_of_too_many", fault<group_barrier_of_too_many>},
      {"misaligned_rows_of_a_matrix", fault<misaligned_rows_of_a_matrix, 64, 2048>},
      {"matrix_at_row_4", fault<matrix_between_rows_of_8<4, 512>, 128, 8192>},
      {"matrix_every_9_rows", fault<matrix_between_rows_of_8<0, 576>, 128, 8192>},
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
