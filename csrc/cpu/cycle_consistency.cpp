// cycle_consistency and srtg on the CPU: choice of the instruction set.
#include "cycle_consistency_kernels.h"

namespace rcu_ops::cpu {

void align(const Alignment& p, const Parallel& parallel) {
  if (p.dtype == DType::f64) return portable::align_f64(p, parallel);
#if defined(__x86_64__)
  const Isa isa = current_isa();
  if (isa >= Isa::avx512) return avx512::align(p, parallel);
  if (isa == Isa::avx2) return avx2::align(p, parallel);
#endif
  portable::align(p, parallel);
}

void gate_data_path(const GateData& p, const Parallel& parallel) {
  if (p.dtype == DType::f64) return portable::gate_data_path_f64(p, parallel);
#if defined(__x86_64__)
  // fp32 also where there is AVX-512: memory is the bound, and wider loads have been measured to stream no faster.
  if (current_isa() >= Isa::avx512 && p.dtype != DType::f32) return avx512::gate_data_path(p, parallel);
  if (current_isa() >= Isa::avx2) return avx2::gate_data_path(p, parallel);
#endif
  portable::gate_data_path(p, parallel);
}

}  // namespace rcu_ops::cpu
