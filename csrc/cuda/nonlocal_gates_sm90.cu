// nonlocal_gates on the matrix unit, the blocks that share queries in a cluster (sm_90).
#include "cuda/nonlocal_gates_tile.h"

namespace rcu_ops::cuda {
#ifdef RCU_OPS_SM90A
namespace {

// See relate_by_tiles.
template <int MT>
__global__ void __launch_bounds__(tile_relate_threads, 2) cluster_relate(const Forward p, const TileRelatePlan plan) {
  relate_by_tiles<MT, true>(p, plan);
}

}  // namespace

Error launch_cluster_relate(const Forward& p, const TileRelatePlan& plan, Stream stream) {
  const auto kernel = plan.rows == 16 ? cluster_relate<1> : cluster_relate<2>;
  return launch_clusters("nonlocal_gates cluster_relate", kernel, static_cast<int>(plan.shares),
                         dim3(static_cast<unsigned>(plan.blocks)), dim3(tile_relate_threads),
                         static_cast<size_t>(plan.shared_bytes), stream, p, plan);
}
#else
Error launch_cluster_relate(const Forward&, const TileRelatePlan&, Stream) {
  return "nonlocal_gates cluster_relate: the library was built without sm_90a";
}
#endif

}  // namespace rcu_ops::cuda
