// fast_gru for AVX-512.
#if defined(__x86_64__)
#include "kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")

namespace rcu_ops::cpu::avx512::fast_gru_kernels {

static constexpr int vector_bytes = 64;

// For vector.h. A division of 16 numbers takes as long as a dozen other operations; an approximation to 14 bits and one
// step of Newton's are within 1 ulp.
typedef float Lanes __attribute__((vector_size(vector_bytes)));
static inline Lanes times_power_of_two(Lanes p, Lanes n) { return _mm512_scalef_ps(p, n); }
static inline Lanes reciprocal_of(Lanes d) {
  const Lanes near = _mm512_rcp14_ps(d);
  return near + near * (1 - d * near);
}

#include "scalar.h"
#include "vector.h"
#define RCU_OPS_NO_F64
#include "fast_gru_core.h"
#include "fast_gru_columns.h"

#undef RCU_OPS_NO_F64

}  // namespace rcu_ops::cpu::avx512::fast_gru_kernels
#endif
