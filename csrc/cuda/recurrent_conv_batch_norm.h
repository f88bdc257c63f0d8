// The passes of recurrent_conv_batch_norm on CUDA devices: what the bindings call. Raw pointers and streams; no torch.
#pragma once

#include "common/recurrent_conv_batch_norm.h"
#include "common/text.h"
#include "cuda/scratch.h"

namespace rcu_ops::cuda {

Scratch batch_norm_scratch(const Norm& problem);

// As scan() in recurrent_conv.h; finish_moments: NormPass::moments' result from what a scan has left
// (ScanNorm::partial), of parts of so many columns each.
Text finish_moments(const Norm& problem, int64_t columns, const double* partial, CUstream_st* stream);
Text batch_norm(const Norm& problem, void* scratch, CUstream_st* stream);

}  // namespace rcu_ops::cuda
