// cycle_consistency, and srtg in 16 bits, for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include "kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")

namespace rcu_ops::cpu::avx512::cycle_consistency_kernels {

#include "scalar.h"

static constexpr int vector_bytes = 64;

template <class R>
static R load_half(const f16_t* p) {
  return reinterpret_cast<R>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
template <class R>
static void store_half(f16_t* p, R v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
template <int L, class Mask>
static uint32_t lanes_set(Mask v) {
  const auto bits = reinterpret_cast<__m512i>(v);
  return L == 16 ? _mm512_movepi32_mask(bits) : _mm512_movepi64_mask(bits);
}

#include "vector_formats.h"
#include "vectors.h"
#include "cycle_consistency_core.h"
#include "srtg_core.h"

void gate_data_path_narrow(const GateData& p, const Parallel& parallel) { gate_narrow<F32>(p, parallel); }

}  // namespace rcu_ops::cpu::avx512::cycle_consistency_kernels
#endif
