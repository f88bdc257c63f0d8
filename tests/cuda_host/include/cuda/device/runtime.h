// Host twin of csrc/cuda/device/runtime.h.
#pragma once

#include <vector_types.h>

#include <cmath>

#include "cuda/device/number16.h"
#include "machine.h"

// The toolkit's headers define the keywords away for host compilers, but for these.
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline
#define threadIdx (::cuda_host::thread_index())
#define blockIdx (::cuda_host::block_index())
#define blockDim (::cuda_host::block_size())
#define gridDim (::cuda_host::grid_size())

struct CUstream_st;

namespace rcu_ops::cuda {

using Stream = CUstream_st*;
using std::exp;
using std::fma;
using std::tanh;

}  // namespace rcu_ops::cuda
