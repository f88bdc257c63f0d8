// fast_gru's columns for bf16 on AVX512-BF16.
#if defined(__x86_64__)
#include "kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")

namespace rcu_ops::cpu::avx512_bf16::fast_gru_kernels {

#include "scalar.h"
#include "vector_avx512.h"
#define RCU_OPS_PAIRS
#include "fast_gru_columns.h"
#include "fast_gru_gradients.h"

#undef RCU_OPS_PAIRS

}  // namespace rcu_ops::cpu::avx512_bf16::fast_gru_kernels
#endif
