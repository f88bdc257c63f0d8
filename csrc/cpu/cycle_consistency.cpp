// cycle_consistency and srtg on the CPU: choice of the instruction set, and what needs none.
#include <cstring>

#include "cycle_consistency_kernels.h"

namespace rcu_ops::cpu {
namespace {

template <class S>
void scale(const Alignment& p, int64_t n, const void* const (&given)[2], S factor) {
  const bool way = p.mask_a.any(n, p.T) && p.mask_b.any(n, p.S);
  for (const bool of_b : {false, true}) {
    const FrameMask& mask = of_b ? p.mask_b : p.mask_a;
    const int64_t frames = of_b ? p.S : p.T;
    for (int64_t t = 0; t < frames; ++t) {
      const int64_t at = (n * frames + t) * p.C;
      const S* const from = static_cast<const S*>(given[of_b]) + at;
      S* const to = static_cast<S*>(of_b ? p.db : p.da) + at;
      if (way && mask.there(n, t))
        for (int64_t c = 0; c < p.C; ++c) to[c] = from[c] * factor;
      else
        memset(to, 0, static_cast<size_t>(p.C) * sizeof(S));
    }
  }
}

}  // namespace

void align(const Alignment& p, const Parallel& parallel) {
  if (p.dtype == DType::f64) return portable::align_f64(p, parallel);
  [[maybe_unused]] const Isa isa = current_isa();
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return avx512::align(p, parallel);
  if (isa == Isa::avx2) return avx2::align(p, parallel);
#endif
  portable::align(p, parallel);
}

void scale_gradients(const Alignment& p, const void* da, const void* db, double factor, const Parallel& parallel) {
  const void* const given[2] = {da, db};
  const auto sample = [&](int64_t n) {
    if (p.dtype == DType::f64) return scale<double>(p, n, given, factor);
    scale<float>(p, n, given, static_cast<float>(factor));
  };
  if (p.N * (p.T + p.S) * p.C < int64_t(1) << 17) {  // nothing worth waking a thread for
    for (int64_t n = 0; n < p.N; ++n) sample(n);
    return;
  }
  parallel.run(
      parallel.pool, p.N, [](void* context, int64_t n) { (*static_cast<decltype(sample)*>(context))(n); },
      const_cast<void*>(static_cast<const void*>(&sample)));
}

void gate_data_path(const GateData& p, const Parallel& parallel) {
  if (p.dtype == DType::f64) return portable::gate_data_path_f64(p, parallel);
  [[maybe_unused]] const Isa isa = current_isa();
#if defined(__x86_64__)
  // fp32 also where there is AVX-512: memory is the bound, and wider loads have been measured to stream no faster.
  if (isa >= Isa::avx512 && p.dtype != DType::f32) return avx512::gate_data_path_narrow(p, parallel);
  if (isa >= Isa::avx2) return avx2::gate_data_path(p, parallel);
#endif
  portable::gate_data_path(p, parallel);
}

}  // namespace rcu_ops::cpu
