// nonlocal_gates on CUDA devices: what the bindings call. Raw pointers and streams; no torch.
#pragma once

#include "common/nonlocal_gates.h"
#include "common/text.h"
#include "cuda/scratch.h"

namespace rcu_ops::cuda {

// Which kernel runs: what the planner prefers, or the one that runs everything.
enum class RelateKernel { best, plain };

// How relate() would run a forward pass, or gradients, on the current device, in words.
Text describe_relate(const Relation& relation, bool step);
Text describe_relate(const AttentionGrad& problem);

// Whether PyTorch's own attention is to be taken on the current device (common/nonlocal_gates_library.h).
bool library_is_faster(const Relation& relation);

// What the calls below need as `scratch` on the current device.
Scratch scratch_of(const Attention& problem);
Scratch scratch_of(const AttentionGrad& problem);
Scratch scratch_of(const Step& problem);
Scratch scratch_of(const StepGrad& problem);

// Enqueue the work on `stream` of the current device and return; all pointers are the device's. The text of an error,
// or an empty one. Nothing is allocated and nothing waits, so the calls can be captured in a CUDA graph. Outputs
// overlap no input.
Text relate(const Attention& problem, void* scratch, CUstream_st* stream, RelateKernel kernel = RelateKernel::best);
Text relate(const AttentionGrad& problem, void* scratch, CUstream_st* stream, RelateKernel kernel = RelateKernel::best);
Text relate(const Step& problem, void* scratch, CUstream_st* stream, RelateKernel kernel = RelateKernel::best);
Text relate(const StepGrad& problem, void* scratch, CUstream_st* stream, RelateKernel kernel = RelateKernel::best);

}  // namespace rcu_ops::cuda
