// cycle_consistency on CUDA devices: what the bindings call. Raw pointers and streams; no torch.
#pragma once

#include "common/cycle_consistency.h"
#include "common/text.h"
#include "cuda/scratch.h"

namespace rcu_ops::cuda {

// What align() needs as `scratch` on the current device.
Scratch align_scratch(const Alignment& problem);

// Enqueue the work on `stream` of the current device and return; all pointers are the device's. The text of an error,
// or an empty one. Nothing is allocated and nothing waits, so the calls can be captured in a CUDA graph.
Text align(const Alignment& problem, void* scratch, CUstream_st* stream);

}  // namespace rcu_ops::cuda
