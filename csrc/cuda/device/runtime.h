// What a kernel file needs from CUDA itself: keywords, built-in variables and the 16-bit formats.
//
// Every header of this directory that holds PTX, a warp intrinsic or a runtime call has a twin of the same name under
// tests/cuda_host/include/, so that the unchanged .cu files also compile for the host and run there thread by thread.
// Kernel files therefore include these headers (as "cuda/device/…") and nothing of CUDA directly, use no `__shared__`
// variables (see shared_memory.h) and no intrinsics.
#pragma once

#include <cuda_runtime.h>

#include "cuda/device/number16.h"

namespace rcu_ops::cuda {

using Stream = cudaStream_t;

}  // namespace rcu_ops::cuda
