// Cycle consistency of short sequences on CUDA devices: what cycle_consistency.cu calls.
#pragma once

#include "common/cycle_consistency.h"
#include "common/gpu.h"
#include "common/text.h"
#include "cuda/scratch.h"

namespace rcu_ops::cuda {

// As align(), for problems that ShortCycle takes. `scratch`: its partial_numbers, fp32.
Text align_short(const Alignment& problem, const Gpu& gpu, void* scratch, CUstream_st* stream);

}  // namespace rcu_ops::cuda
