// nonlocal_gates on the matrix unit, blocks alone (sm_80).
#include "cuda/nonlocal_gates_tile.h"

namespace rcu_ops::cuda {
namespace {

// See relate_by_tiles.
template <int MT>
__global__ void __launch_bounds__(tile_relate_threads, 2) tile_relate(const Forward p, const TileRelatePlan plan) {
  relate_by_tiles<MT, false>(p, plan);
}

}  // namespace

Error launch_tile_relate(const Forward& p, const TileRelatePlan& plan, Stream stream) {
  const auto kernel = plan.rows == 16 ? tile_relate<1> : tile_relate<2>;
  return launch("nonlocal_gates tile_relate", kernel, dim3(static_cast<unsigned>(plan.blocks)),
                dim3(tile_relate_threads), static_cast<size_t>(plan.shared_bytes), stream, p, plan);
}

}  // namespace rcu_ops::cuda
