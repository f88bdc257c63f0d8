// cycle_consistency and srtg for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target("avx2,fma,f16c")

namespace rcu_ops::cpu::avx2::cycle_consistency_kernels {

#include "scalar.h"

static constexpr int vector_bytes = 32;

template <class R>
static R load_half(const f16_t* p) {
  return reinterpret_cast<R>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
template <class R>
static void store_half(f16_t* p, R v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
template <int L, class Mask>
static uint32_t lanes_set(Mask v) {
  return static_cast<uint32_t>(L == 8 ? _mm256_movemask_ps(reinterpret_cast<__m256>(v))
                                      : _mm256_movemask_pd(reinterpret_cast<__m256d>(v)));
}

#include "vector_formats.h"
#include "vectors.h"
#include "cycle_consistency_core.h"
#include "srtg_core.h"

void gate_data_path(const GateData& p, const Parallel& parallel) { gate_any<F32>(p, parallel); }

}  // namespace rcu_ops::cpu::avx2::cycle_consistency_kernels
#endif
