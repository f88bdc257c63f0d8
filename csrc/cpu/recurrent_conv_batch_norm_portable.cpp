// recurrent_conv_batch_norm for any processor.
#include <cmath>
#include <cstring>

#include "recurrent_conv_batch_norm_kernels.h"

namespace rcu_ops::cpu::portable {

#include "scalar.h"
#include "vectors_portable.h"
#include "recurrent_conv_batch_norm_core.h"

}  // namespace rcu_ops::cpu::portable
