// recurrent_conv_batch_norm for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include "kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")

namespace rcu_ops::cpu::avx512::recurrent_conv_batch_norm_kernels {

#include "scalar.h"
#include "vectors_avx512.h"
#define RCU_OPS_NO_F64
#include "recurrent_conv_batch_norm_core.h"

#undef RCU_OPS_NO_F64

}  // namespace rcu_ops::cpu::avx512::recurrent_conv_batch_norm_kernels
#endif
