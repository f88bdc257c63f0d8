// fast_gru on CUDA devices: what the bindings call. Raw pointers and streams; no torch.
#pragma once

#include "common/fast_gru.h"
#include "common/fast_gru_gpu_plan.h"
#include "common/text.h"

struct CUstream_st;

namespace rcu_ops::cuda {

// Enqueue the pass on `stream` of the current device and return. The text of an error, or an empty one. Nothing is
// allocated and nothing waits, so the call can be captured in a CUDA graph. Operands do not overlap, but for those that
// are in and out.
Text elementwise(const fast_gru::Elementwise& pass, CUstream_st* stream);

// How the current device would run the steps, or their backward pass, in one launch; plan.why_not says why it would
// not. `cluster` as in plan_persistent. The text of an error, or empty.
Text plan_steps(int64_t rows, int64_t C, int64_t R, DType dtype, bool backward, fast_gru::PersistentPlan& plan,
                int cluster = 0);

// Enqueue all steps in one cooperative launch; `scratch`: plan.scratch_bytes, aligned to 16. As elementwise otherwise.
Text steps(const fast_gru::Steps& p, const fast_gru::PersistentPlan& plan, void* scratch, CUstream_st* stream);
Text steps_backward(const fast_gru::StepsBackward& p, const fast_gru::PersistentPlan& plan, void* scratch,
                    CUstream_st* stream);

// The same by columns; makes_x as in plan_columns. The launch is an ordinary one, without scratch memory.
Text plan_columns(int64_t columns, int64_t C, int64_t R, DType dtype, bool backward, fast_gru::ColumnsPlan& plan,
                  bool makes_x = true);
Text column_steps(const fast_gru::ColumnSteps& p, const fast_gru::ColumnsPlan& plan, CUstream_st* stream);
Text column_steps_backward(const fast_gru::ColumnStepsBackward& p, const fast_gru::ColumnsPlan& plan,
                           CUstream_st* stream);

}  // namespace rcu_ops::cuda
