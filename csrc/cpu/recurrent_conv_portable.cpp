// recurrent_conv for any processor: four-lane vectors of the compiler's own, products and sums rounded as it sees fit
// (once, where the processor multiplies and adds in one instruction).

#include "kernels.h"

namespace rcu_ops::cpu::portable::recurrent_conv_kernels {

static inline void copy_row(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
static void copy_around(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
static void end_around() {}

#include "scalar.h"
#include "recurrent_conv_transport.h"

#include "vectors_portable.h"

struct F32 : Floats {
  static constexpr int planar_rows = 4, planar_vectors = 3, channels_rows = 6, channels_vectors = 2;
};
struct F64 : Doubles {
  static constexpr int planar_rows = 4, planar_vectors = 3, channels_rows = 6, channels_vectors = 2;
};

#include "recurrent_conv_core.h"

}  // namespace rcu_ops::cpu::portable::recurrent_conv_kernels
