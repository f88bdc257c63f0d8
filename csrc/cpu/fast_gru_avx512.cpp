// fast_gru for AVX-512.
#if defined(__x86_64__)
#include "kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")

namespace rcu_ops::cpu::avx512::fast_gru_kernels {

#include "scalar.h"
#include "vector_avx512.h"
#define RCU_OPS_NO_F64
#include "fast_gru_core.h"
#include "fast_gru_columns.h"
#include "fast_gru_copies.h"
#include "fast_gru_gradients.h"

#undef RCU_OPS_NO_F64

}  // namespace rcu_ops::cpu::avx512::fast_gru_kernels
#endif
