// Alignment of long sequences on CUDA devices: what cycle_consistency.cu calls.
#pragma once

#include "common/cycle_consistency_gpu_plan.h"
#include "common/text.h"
#include "cuda/scratch.h"

namespace rcu_ops::cuda {

// As align(), but for the gate, for problems that ProductTiles takes. `scratch`: plan.scratch_bytes.
Text align_products(const Alignment& problem, const ProductTiles& plan, void* scratch, CUstream_st* stream);

}  // namespace rcu_ops::cuda
