// nonlocal_gates on the matrix unit, blocks alone (sm_80).
#include "cuda/nonlocal_gates_tile.h"

namespace rcu_ops::cuda {
namespace {

// See relate_by_tiles.
template <typename T, int MT>
__global__ void __launch_bounds__(tile_relate_threads, 2) tile_relate(const Forward p, const TileRelatePlan plan) {
  relate_by_tiles<T, MT, false>(p, plan);
}

}  // namespace

Error launch_tile_relate(const Forward& p, const TileRelatePlan& plan, Stream stream) {
  const bool one = plan.rows == 16, bf16 = p.relation.dtype == DType::bf16;
  const auto kernel = bf16 ? (one ? tile_relate<__nv_bfloat16, 1> : tile_relate<__nv_bfloat16, 2>)
                           : (one ? tile_relate<__half, 1> : tile_relate<__half, 2>);
  return launch("nonlocal_gates tile_relate", kernel, dim3(static_cast<unsigned>(plan.blocks)),
                dim3(tile_relate_threads), static_cast<size_t>(plan.shared_bytes), stream, p, plan);
}

}  // namespace rcu_ops::cuda
