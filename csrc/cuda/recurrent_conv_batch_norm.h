// The passes of recurrent_conv_batch_norm on CUDA devices: what the bindings call. Raw pointers and streams; no torch.
#pragma once

#include "common/recurrent_conv_batch_norm.h"
#include "common/text.h"
#include "cuda/scratch.h"

namespace rcu_ops::cuda {

Scratch batch_norm_scratch(const Norm& problem);

// As scan() in recurrent_conv.h.
Text batch_norm(const Norm& problem, void* scratch, CUstream_st* stream);

}  // namespace rcu_ops::cuda
