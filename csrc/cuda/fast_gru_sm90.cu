// fast_gru on the matrix unit, all steps forward in one cooperative launch of blocks in clusters (sm_90).
#include "cuda/fast_gru_steps.h"

namespace rcu_ops::cuda {
#ifdef RCU_OPS_SM90A
namespace {

// See all_steps.
template <typename T>
__global__ void __launch_bounds__(threads, 1)
    fast_gru_cluster_steps(const Steps p, const PersistentPlan plan, unsigned char* scratch) {
  all_steps<T, true>(p, plan, scratch);
}

auto kernel_of(DType dtype) {
  return dtype == DType::bf16 ? fast_gru_cluster_steps<__nv_bfloat16> : fast_gru_cluster_steps<__half>;
}

}  // namespace

Error cluster_steps(const Steps& p, const PersistentPlan& plan, void* scratch, Stream stream) {
  return launch_steps<Steps>("fast_gru_cluster_steps", kernel_of(p.dtype), p, plan, scratch, stream);
}

Error resident_cluster_steps(const PersistentPlan& plan, DType dtype, int64_t& blocks) {
  return resident_blocks("fast_gru_cluster_steps", kernel_of(dtype), plan.cluster, threads,
                         static_cast<size_t>(plan.shared_bytes), blocks);
}
#else
Error cluster_steps(const Steps&, const PersistentPlan&, void*, Stream) {
  return "fast_gru_cluster_steps: the library was built without sm_90a";
}
Error resident_cluster_steps(const PersistentPlan&, DType, int64_t& blocks) {
  blocks = 0;
  return {};
}
#endif

}  // namespace rcu_ops::cuda
