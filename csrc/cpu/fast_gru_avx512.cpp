// fast_gru for AVX-512.
#if defined(__x86_64__)
#include <cmath>
#include <cstring>
#include <type_traits>

#include "fast_gru_kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512cd,fma,prefer-vector-width=512")

namespace rcu_ops::cpu::avx512 {

static constexpr int vector_bytes = 64;

#include "scalar.h"
#include "vector.h"
#include "fast_gru_core.h"
#include "fast_gru_columns.h"

}  // namespace rcu_ops::cpu::avx512
#endif
