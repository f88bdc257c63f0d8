// fast_gru on the CPU: entry points of the instruction sets.
#pragma once

#include "../common/fast_gru.h"
#include "memory.h"

namespace rcu_ops::cpu {

// elementwise_range: elements [begin, end) of the pass, in the order of rows, segments and length. The others:
// fast_gru_columns.h.
namespace portable {
void elementwise_range(const fast_gru::Elementwise&, int64_t begin, int64_t end);
void widen_range(float* to, const void* from, DType dtype, int64_t begin, int64_t end);
void reorder_range(const fast_gru::Reorder&, int64_t begin, int64_t end);
void columns_task(const fast_gru::Columns&, int64_t begin, int64_t count, float* panel);
void columns_phase(const fast_gru::Columns&, fast_gru::Phase phase, int64_t step, int64_t begin, int64_t end,
                   int64_t thin, int64_t width, float* panels, float* wide);
}  // namespace portable
namespace avx2 {
void elementwise_range(const fast_gru::Elementwise&, int64_t begin, int64_t end);
void widen_range(float* to, const void* from, DType dtype, int64_t begin, int64_t end);
void reorder_range(const fast_gru::Reorder&, int64_t begin, int64_t end);
void columns_task(const fast_gru::Columns&, int64_t begin, int64_t count, float* panel);
void columns_phase(const fast_gru::Columns&, fast_gru::Phase phase, int64_t step, int64_t begin, int64_t end,
                   int64_t thin, int64_t width, float* panels, float* wide);
}  // namespace avx2
namespace avx512 {
void elementwise_range(const fast_gru::Elementwise&, int64_t begin, int64_t end);
void widen_range(float* to, const void* from, DType dtype, int64_t begin, int64_t end);
void reorder_range(const fast_gru::Reorder&, int64_t begin, int64_t end);
void columns_task(const fast_gru::Columns&, int64_t begin, int64_t count, float* panel);
void columns_phase(const fast_gru::Columns&, fast_gru::Phase phase, int64_t step, int64_t begin, int64_t end,
                   int64_t thin, int64_t width, float* panels, float* wide);
}  // namespace avx512

}  // namespace rcu_ops::cpu
