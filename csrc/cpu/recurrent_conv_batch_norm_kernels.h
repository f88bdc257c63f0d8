// recurrent_conv_batch_norm on the CPU: entry points of the instruction sets.
#pragma once

#include "../common/recurrent_conv_batch_norm.h"
#include "memory.h"

namespace rcu_ops::cpu {
namespace portable {
void batch_norm(const Norm&, const Parallel&);
}
namespace avx2 {
void batch_norm(const Norm&, const Parallel&);
}
namespace avx512 {
void batch_norm(const Norm&, const Parallel&);
}
}  // namespace rcu_ops::cpu
