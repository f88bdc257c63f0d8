// cycle_consistency and srtg for any processor: vectors of the compiler's own.

#include "kernels.h"

namespace rcu_ops::cpu::portable::cycle_consistency_kernels {

#include "scalar.h"

static constexpr int vector_bytes = 16;

#include "vector_formats.h"

template <class R>
static R load_half(const f16_t* p) {
  return load_vector<float>(p, 4);
}
template <class R>
static void store_half(f16_t* p, R v) {
  store_vector<float>(p, v, 4);
}
template <int L, class Mask>
static uint32_t lanes_set(Mask v) {
  uint32_t bits = 0;
  for (int l = 0; l < L; ++l) bits |= static_cast<uint32_t>(v[l] != 0) << l;
  return bits;
}

#include "vectors.h"
#include "cycle_consistency_core.h"
#include "srtg_core.h"

void gate_data_path(const GateData& p, const Parallel& parallel) { gate_any<F32>(p, parallel); }

// fp64 is for checking gradients: one instruction set is enough, and the others' compile time is saved.
void align_f64(const Alignment& p, const Parallel& parallel) { align_any<F64>(p, parallel); }
void gate_data_path_f64(const GateData& p, const Parallel& parallel) { GateTask<F64, double>::run_task(p, parallel); }

}  // namespace rcu_ops::cpu::portable::cycle_consistency_kernels
