// fast_gru on the CPU: entry points of the instruction sets.
#pragma once

#include "../common/fast_gru.h"
#include "memory.h"

namespace rcu_ops::cpu {

// elementwise_range: elements [begin, end) of the pass, in the order of rows, segments and length. The others:
// fast_gru_columns.h and fast_gru_gradients.h.
namespace portable::fast_gru_kernels {
void elementwise_range(const fast_gru::Elementwise&, int64_t begin, int64_t end);
void widen_range(float* to, const void* from, DType dtype, int64_t begin, int64_t end);
void reorder_range(const fast_gru::Reorder&, int64_t begin, int64_t end);
void columns_task(const fast_gru::Columns&, int64_t begin, int64_t count, float* panel);
void columns_phase(const fast_gru::Columns&, fast_gru::Phase phase, int64_t step, int64_t begin, int64_t end,
                   int64_t thin, int64_t width, float* panels, float* wide);
void gradients_weights(const fast_gru::ColumnsGradients&, float* to);
void gradients_task(const fast_gru::ColumnsGradients&, int64_t begin, int64_t count, int64_t width, float* memory,
                    const float* weights, float* sums);
void gradients_sum(const fast_gru::ColumnsGradients&, float* sums, int64_t units, int64_t numbers, int64_t begin,
                   int64_t end);
}  // namespace portable::fast_gru_kernels
namespace avx2::fast_gru_kernels {
void elementwise_range(const fast_gru::Elementwise&, int64_t begin, int64_t end);
void widen_range(float* to, const void* from, DType dtype, int64_t begin, int64_t end);
void reorder_range(const fast_gru::Reorder&, int64_t begin, int64_t end);
void columns_task(const fast_gru::Columns&, int64_t begin, int64_t count, float* panel);
void columns_phase(const fast_gru::Columns&, fast_gru::Phase phase, int64_t step, int64_t begin, int64_t end,
                   int64_t thin, int64_t width, float* panels, float* wide);
void gradients_weights(const fast_gru::ColumnsGradients&, float* to);
void gradients_task(const fast_gru::ColumnsGradients&, int64_t begin, int64_t count, int64_t width, float* memory,
                    const float* weights, float* sums);
void gradients_sum(const fast_gru::ColumnsGradients&, float* sums, int64_t units, int64_t numbers, int64_t begin,
                   int64_t end);
}  // namespace avx2::fast_gru_kernels
namespace avx512::fast_gru_kernels {
void elementwise_range(const fast_gru::Elementwise&, int64_t begin, int64_t end);
void widen_range(float* to, const void* from, DType dtype, int64_t begin, int64_t end);
void reorder_range(const fast_gru::Reorder&, int64_t begin, int64_t end);
void columns_task(const fast_gru::Columns&, int64_t begin, int64_t count, float* panel);
void columns_phase(const fast_gru::Columns&, fast_gru::Phase phase, int64_t step, int64_t begin, int64_t end,
                   int64_t thin, int64_t width, float* panels, float* wide);
void gradients_weights(const fast_gru::ColumnsGradients&, float* to);
void gradients_task(const fast_gru::ColumnsGradients&, int64_t begin, int64_t count, int64_t width, float* memory,
                    const float* weights, float* sums);
void gradients_sum(const fast_gru::ColumnsGradients&, float* sums, int64_t units, int64_t numbers, int64_t begin,
                   int64_t end);
}  // namespace avx512::fast_gru_kernels
namespace avx512_bf16::fast_gru_kernels {  // for narrow weights of bf16 alone
void columns_task(const fast_gru::Columns&, int64_t begin, int64_t count, float* panel);
void columns_phase(const fast_gru::Columns&, fast_gru::Phase phase, int64_t step, int64_t begin, int64_t end,
                   int64_t thin, int64_t width, float* panels, float* wide);
void gradients_weights(const fast_gru::ColumnsGradients&, float* to);
void gradients_task(const fast_gru::ColumnsGradients&, int64_t begin, int64_t count, int64_t width, float* memory,
                    const float* weights, float* sums);
}  // namespace avx512_bf16::fast_gru_kernels

// The files of an instruction set are compiled as one: each operator has names of its own.
namespace portable {
using namespace fast_gru_kernels;
}
namespace avx2 {
using namespace fast_gru_kernels;
}
namespace avx512 {
using namespace fast_gru_kernels;
}
namespace avx512_bf16 {
using namespace fast_gru_kernels;
}

}  // namespace rcu_ops::cpu
