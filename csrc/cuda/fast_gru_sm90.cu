// fast_gru on the matrix unit, all steps forward in one cooperative launch of blocks in clusters (sm_90).
#include "cuda/fast_gru_steps.h"

namespace rcu_ops::cuda {
#ifdef RCU_OPS_SM90A
namespace {

// See all_steps.
__global__ void __launch_bounds__(threads, 1)
    fast_gru_cluster_steps(const Steps p, const PersistentPlan plan, unsigned char* scratch) {
  all_steps<true>(p, plan, scratch);
}

}  // namespace

Error cluster_steps(const Steps& p, const PersistentPlan& plan, void* scratch, Stream stream) {
  return launch_steps<Steps>("fast_gru_cluster_steps", fast_gru_cluster_steps, p, plan, scratch, stream);
}

Error resident_cluster_steps(const PersistentPlan& plan, int64_t& blocks) {
  return resident_blocks("fast_gru_cluster_steps", fast_gru_cluster_steps, plan.cluster, threads,
                         static_cast<size_t>(plan.shared_bytes), blocks);
}
#else
Error cluster_steps(const Steps&, const PersistentPlan&, void*, Stream) {
  return "fast_gru_cluster_steps: the library was built without sm_90a";
}
Error resident_cluster_steps(const PersistentPlan&, int64_t& blocks) {
  blocks = 0;
  return {};
}
#endif

}  // namespace rcu_ops::cuda
