// The data path of an SRTG block on CUDA devices: what the bindings call. Raw pointers and streams; no torch.
#pragma once

#include <string>

#include "common/srtg.h"
#include "cuda/scratch.h"

namespace rcu_ops::cuda {

Scratch gate_scratch(const GateData& problem);  // none

// As align() in cycle_consistency.h.
std::string gate_data_path(const GateData& problem, void* scratch, CUstream_st* stream);

}  // namespace rcu_ops::cuda
