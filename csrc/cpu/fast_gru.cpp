// fast_gru on the CPU: choice of instruction set, and the pass cut into tasks.
#include "../common/cpu_isa.h"
#include "fast_gru_kernels.h"

namespace rcu_ops::cpu {
namespace {

using Range = void (*)(const fast_gru::Elementwise&, int64_t, int64_t);

Range best_range() {
#if defined(__x86_64__)
  const Isa isa = current_isa();
  if (isa >= Isa::avx512) return avx512::elementwise_range;
  if (isa == Isa::avx2) return avx2::elementwise_range;
#else
  current_isa();  // an RCU_OPS_CPU_ISA that cannot run is an error here too
#endif
  return portable::elementwise_range;
}

// Smaller ranges are not worth waking a thread for: about 10 us of work.
constexpr int64_t task_elements = 16384;

struct Tasks {
  fast_gru::Elementwise pass;
  Range range;
  int64_t count, total;
};

}  // namespace

void elementwise(const fast_gru::Elementwise& pass, const Parallel& parallel) {
  Tasks tasks{pass, best_range(), 1, fast_gru::elements(pass)};
  if (tasks.total == 0) return;
  fast_gru::merge(tasks.pass);
  tasks.count = tasks.total / task_elements;
  if (tasks.count > parallel.threads) tasks.count = parallel.threads;
  if (tasks.count < 1) tasks.count = 1;
  parallel.run(
      parallel.pool, tasks.count,
      [](void* context, int64_t i) {
        const Tasks& t = *static_cast<const Tasks*>(context);
        // Whole cache lines, so that no two tasks write one.
        const auto bound = [&](int64_t task) { return task == t.count ? t.total : t.total * task / t.count / 64 * 64; };
        t.range(t.pass, bound(i), bound(i + 1));
      },
      &tasks);
}

}  // namespace rcu_ops::cpu
