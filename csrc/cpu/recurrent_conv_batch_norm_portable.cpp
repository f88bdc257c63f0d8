// recurrent_conv_batch_norm for any processor.

#include "kernels.h"

namespace rcu_ops::cpu::portable::recurrent_conv_batch_norm_kernels {

#include "scalar.h"
#include "vectors_portable.h"
#include "recurrent_conv_batch_norm_core.h"

}  // namespace rcu_ops::cpu::portable::recurrent_conv_batch_norm_kernels
