// fast_gru on CUDA devices: what the bindings call. Raw pointers and streams; no torch.
#pragma once

#include <string>

#include "common/fast_gru.h"

struct CUstream_st;

namespace rcu_ops::cuda {

// Enqueue the pass on `stream` of the current device and return. The text of an error, or an empty one. Nothing is allocated and
// nothing waits, so the call can be captured in a CUDA graph. Operands do not overlap, but for those that are in and out.
std::string elementwise(const fast_gru::Elementwise& pass, CUstream_st* stream);

}  // namespace rcu_ops::cuda
