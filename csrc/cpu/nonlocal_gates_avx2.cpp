// nonlocal_gates for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target("avx2,fma,f16c")

namespace rcu_ops::cpu::avx2::nonlocal_gates_kernels {

namespace {
#include "scalar.h"
#include "vectors_avx2.h"

constexpr int score_rows = 3, score_columns = 3, sum_rows = 4, sum_vectors = 2;
}  // namespace

#include "nonlocal_gates_core.h"

}  // namespace rcu_ops::cpu::avx2::nonlocal_gates_kernels
#endif
