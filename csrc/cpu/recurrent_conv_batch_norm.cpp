// recurrent_conv_batch_norm on the CPU: choice of instruction set.
#include "../common/cpu_isa.h"
#include "recurrent_conv_batch_norm_kernels.h"

namespace rcu_ops::cpu {

void batch_norm(const Norm& problem, const Parallel& parallel) {
  const Isa isa = current_isa();
#if defined(__x86_64__)
  if (problem.dtype == DType::f64) return portable::batch_norm(problem, parallel);  // for gradient checks
  if (isa >= Isa::avx512) return avx512::batch_norm(problem, parallel);
  if (isa == Isa::avx2) return avx2::batch_norm(problem, parallel);
#endif
  static_cast<void>(isa);  // an RCU_OPS_CPU_ISA that cannot run is an error on other processors too
  portable::batch_norm(problem, parallel);
}

}  // namespace rcu_ops::cpu
