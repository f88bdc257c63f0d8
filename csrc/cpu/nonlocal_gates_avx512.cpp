// nonlocal_gates for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include "kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")

namespace rcu_ops::cpu::avx512::nonlocal_gates_kernels {

namespace {
#include "scalar.h"
#include "vectors_avx512.h"

constexpr int score_rows = 5, score_columns = 5, sum_rows = 7, sum_vectors = 3;
}  // namespace

#include "nonlocal_gates_core.h"

}  // namespace rcu_ops::cpu::avx512::nonlocal_gates_kernels
#endif
