// fast_gru for any processor.

#include "kernels.h"

namespace rcu_ops::cpu::portable::fast_gru_kernels {

static constexpr int vector_bytes = 16;

#include "scalar.h"
#include "vector.h"
#include "fast_gru_core.h"
#include "fast_gru_columns.h"
#include "fast_gru_copies.h"
#include "fast_gru_gradients.h"

}  // namespace rcu_ops::cpu::portable::fast_gru_kernels
