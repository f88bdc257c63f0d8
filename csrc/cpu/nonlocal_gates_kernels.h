// nonlocal_gates on the CPU: entry points of the instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/cpu_isa.h"
#include "../common/nonlocal_gates.h"
#include "memory.h"

#define RCU_OPS_NONLOCAL_GATES_ENTRY_POINTS                \
  void attend(const Attention&, const Parallel&);          \
  void attend_grad(const AttentionGrad&, const Parallel&); \
  void step(const Step&, const Parallel&);                 \
  void step_grad(const StepGrad&, const Parallel&);

namespace rcu_ops::cpu {

namespace portable::nonlocal_gates_kernels {
RCU_OPS_NONLOCAL_GATES_ENTRY_POINTS
}
namespace avx2::nonlocal_gates_kernels {
RCU_OPS_NONLOCAL_GATES_ENTRY_POINTS
}
namespace avx512::nonlocal_gates_kernels {
RCU_OPS_NONLOCAL_GATES_ENTRY_POINTS
}
namespace avx512_bf16::nonlocal_gates_kernels {  // bf16 alone
RCU_OPS_NONLOCAL_GATES_ENTRY_POINTS
}

// The files of an instruction set are compiled as one: each operator has names of its own.
namespace portable {
using namespace nonlocal_gates_kernels;
}
namespace avx2 {
using namespace nonlocal_gates_kernels;
}
namespace avx512 {
using namespace nonlocal_gates_kernels;
}
namespace avx512_bf16 {
using namespace nonlocal_gates_kernels;
}

}  // namespace rcu_ops::cpu
