// recurrent_conv_batch_norm on the CPU: entry points of the instruction sets.
#pragma once

#include "../common/recurrent_conv_batch_norm.h"
#include "memory.h"

namespace rcu_ops::cpu {
namespace portable::recurrent_conv_batch_norm_kernels {
void batch_norm(const Norm&, const Parallel&);
}
namespace avx2::recurrent_conv_batch_norm_kernels {
void batch_norm(const Norm&, const Parallel&);
}
namespace avx512::recurrent_conv_batch_norm_kernels {
void batch_norm(const Norm&, const Parallel&);
}

// The files of an instruction set are compiled as one: each operator has names of its own.
namespace portable {
using namespace recurrent_conv_batch_norm_kernels;
}
namespace avx2 {
using namespace recurrent_conv_batch_norm_kernels;
}
namespace avx512 {
using namespace recurrent_conv_batch_norm_kernels;
}

}  // namespace rcu_ops::cpu
