// fast_gru on the CPU: entry points of the instruction sets.
#pragma once

#include "../common/fast_gru.h"
#include "memory.h"

namespace rcu_ops::cpu {

// Elements [begin, end) of the pass, in the order of rows, segments and length.
namespace portable {
void elementwise_range(const fast_gru::Elementwise&, int64_t begin, int64_t end);
}  // namespace portable
namespace avx2 {
void elementwise_range(const fast_gru::Elementwise&, int64_t begin, int64_t end);
}  // namespace avx2
namespace avx512 {
void elementwise_range(const fast_gru::Elementwise&, int64_t begin, int64_t end);
}  // namespace avx512

}  // namespace rcu_ops::cpu
