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

namespace portable {
RCU_OPS_NONLOCAL_GATES_ENTRY_POINTS
}
namespace avx2 {
RCU_OPS_NONLOCAL_GATES_ENTRY_POINTS
}
namespace avx512 {
RCU_OPS_NONLOCAL_GATES_ENTRY_POINTS
}
namespace avx512_bf16 {  // bf16 alone
RCU_OPS_NONLOCAL_GATES_ENTRY_POINTS
}

}  // namespace rcu_ops::cpu
