// nonlocal_gates for any processor.

#include "kernels.h"

namespace rcu_ops::cpu::portable::nonlocal_gates_kernels {

namespace {
#include "scalar.h"
#include "vectors_portable.h"

constexpr int score_rows = 3, score_columns = 3, sum_rows = 4, sum_vectors = 2;
}  // namespace

#include "nonlocal_gates_core.h"

}  // namespace rcu_ops::cpu::portable::nonlocal_gates_kernels
