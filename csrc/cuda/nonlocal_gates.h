// nonlocal_gates on CUDA devices: what the bindings call. Raw pointers and streams; no torch.
#pragma once

#include "common/nonlocal_gates.h"
#include "common/text.h"
#include "cuda/scratch.h"

namespace rcu_ops::cuda {

// Which forward kernel runs: what the planner prefers, or the one that runs everything.
enum class RelateKernel { best, plain };

// How relate() would run a forward pass on the current device, in words.
Text describe_relate(const Relation& relation, bool step);

// What the calls below need as `scratch` on the current device.
Scratch scratch_of(const Attention& problem);
Scratch scratch_of(const AttentionGrad& problem);
Scratch scratch_of(const Step& problem);
Scratch scratch_of(const StepGrad& problem);

// Enqueue the work on `stream` of the current device and return; all pointers are the device's. The text of an error, or an
// empty one. Nothing is allocated and nothing waits, so the calls can be captured in a CUDA graph. Outputs overlap no input.
Text relate(const Attention& problem, void* scratch, CUstream_st* stream, RelateKernel kernel = RelateKernel::best);
Text relate(const AttentionGrad& problem, void* scratch, CUstream_st* stream, RelateKernel kernel = RelateKernel::best);
Text relate(const Step& problem, void* scratch, CUstream_st* stream, RelateKernel kernel = RelateKernel::best);
Text relate(const StepGrad& problem, void* scratch, CUstream_st* stream, RelateKernel kernel = RelateKernel::best);

}  // namespace rcu_ops::cuda
