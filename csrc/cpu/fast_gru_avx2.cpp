// fast_gru for AVX2 and FMA.
#if defined(__x86_64__)

#include "kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target("avx2,fma,f16c")

namespace rcu_ops::cpu::avx2::fast_gru_kernels {

static constexpr int vector_bytes = 32;

#include "scalar.h"
#include "vector.h"
#define RCU_OPS_NO_F64
#include "fast_gru_core.h"
#include "fast_gru_columns.h"
#include "fast_gru_copies.h"
#include "fast_gru_gradients.h"

#undef RCU_OPS_NO_F64

}  // namespace rcu_ops::cpu::avx2::fast_gru_kernels
#endif
