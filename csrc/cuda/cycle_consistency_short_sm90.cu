// Cycle consistency of sequences of at most 32 frames, channels split over the blocks of a cluster (sm_90).
#include "cuda/cycle_consistency_short_block.h"

namespace rcu_ops::cuda {
#ifdef RCU_OPS_SM90A
namespace {

// See align_short_block.
template <typename T>
__global__ void __launch_bounds__(short_threads, 2) align_short_cluster(const Alignment p, const ShortLaunch launch) {
  align_short_block<T, true>(p, launch, false, nullptr);
}

template <typename T>
Error align_clusters_as(const Alignment& p, const ShortLaunch& how, Stream stream) {
  return launch_clusters("cycle_consistency align_short", align_short_cluster<T>, static_cast<int>(how.plan.splits),
                         how.blocks, dim3(short_threads), how.shared_bytes, stream, p, how);
}

}  // namespace

Error align_short_clusters(const Alignment& p, const ShortLaunch& how, Stream stream) {
  switch (p.dtype) {
    case DType::f32: return align_clusters_as<float>(p, how, stream);
    case DType::bf16: return align_clusters_as<__nv_bfloat16>(p, how, stream);
    default: return align_clusters_as<__half>(p, how, stream);
  }
}
#else
Error align_short_clusters(const Alignment&, const ShortLaunch&, Stream) {
  return "cycle_consistency align_short: the library was built without sm_90a";
}
#endif

}  // namespace rcu_ops::cuda
