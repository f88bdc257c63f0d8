// nonlocal_gates on the CPU: choice of instruction set.
#include "nonlocal_gates_kernels.h"

namespace rcu_ops::cpu {

template <class P>
using Entry = void (*)(const P&, const Parallel&);

template <class P>
static void run_as(const P& problem, const Parallel& parallel, Entry<P> portable, [[maybe_unused]] Entry<P> avx2,
                   [[maybe_unused]] Entry<P> avx512, [[maybe_unused]] Entry<P> avx512_bf16) {
  [[maybe_unused]] const Isa isa = current_isa();  // one that cannot run is an error on every processor
#if defined(__x86_64__)
  if (isa > Isa::avx512 && problem.relation.dtype == DType::bf16) return avx512_bf16(problem, parallel);
  if (isa >= Isa::avx512) return avx512(problem, parallel);
  if (isa == Isa::avx2) return avx2(problem, parallel);
#endif
  portable(problem, parallel);
}

#if defined(__x86_64__)
#define RCU_OPS_RUN(name) run_as(problem, parallel, portable::name, avx2::name, avx512::name, avx512_bf16::name)
#else
#define RCU_OPS_RUN(name) run_as(problem, parallel, portable::name, portable::name, portable::name, portable::name)
#endif

void attend(const Attention& problem, const Parallel& parallel) { RCU_OPS_RUN(attend); }
void attend_grad(const AttentionGrad& problem, const Parallel& parallel) { RCU_OPS_RUN(attend_grad); }
void step(const Step& problem, const Parallel& parallel) { RCU_OPS_RUN(step); }
void step_grad(const StepGrad& problem, const Parallel& parallel) { RCU_OPS_RUN(step_grad); }

}  // namespace rcu_ops::cpu
