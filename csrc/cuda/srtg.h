// The data path of an SRTG block on CUDA devices: what the bindings call. Raw pointers and streams; no torch.
#pragma once

#include "common/srtg.h"
#include "common/text.h"
#include "cuda/scratch.h"

namespace rcu_ops::cuda {

Scratch gate_scratch(const GateData& problem);  // none

// As align() in cycle_consistency.h.
Text gate_data_path(const GateData& problem, void* scratch, CUstream_st* stream);

}  // namespace rcu_ops::cuda
