// recurrent_conv for AVX-512 (F, BW, DQ, VL), all but fp64.
#if defined(__x86_64__)
#include "kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")

namespace rcu_ops::cpu::avx512::recurrent_conv_kernels {

#include "avx512_copy.h"
#include "scalar.h"
#include "recurrent_conv_transport.h"

#include "vectors_avx512.h"

struct F32 : Floats {
  static constexpr int planar_rows = 8, planar_vectors = 3, channels_rows = 14, channels_vectors = 2;
};

#define RCU_OPS_NO_F64
#include "recurrent_conv_core.h"

#undef RCU_OPS_NO_F64

}  // namespace rcu_ops::cpu::avx512::recurrent_conv_kernels
#endif
