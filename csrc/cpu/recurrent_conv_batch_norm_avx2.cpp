// recurrent_conv_batch_norm for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target("avx2,fma,f16c")

namespace rcu_ops::cpu::avx2::recurrent_conv_batch_norm_kernels {

#include "scalar.h"
#include "vectors_avx2.h"
#define RCU_OPS_NO_F64
#include "recurrent_conv_batch_norm_core.h"

#undef RCU_OPS_NO_F64

}  // namespace rcu_ops::cpu::avx2::recurrent_conv_batch_norm_kernels
#endif
