// recurrent_conv on CUDA devices: what the bindings call. Raw pointers and streams; no torch.
#pragma once

#include "common/recurrent_conv.h"
#include "common/recurrent_conv_gpu_plan.h"
#include "common/text.h"
#include "cuda/scratch.h"

namespace rcu_ops::cuda {

// What the call of the same name needs as `scratch` on the current device.
Scratch scan_scratch(const Scan& problem, Kernel kernel = Kernel::best);
Scratch weight_grad_scratch(const WeightGrad& problem, Kernel kernel = Kernel::best);

// How the call would run the problem on the current device, in words.
Text describe_scan(const Scan& problem, Kernel kernel = Kernel::best);
Text describe_weight_grad(const WeightGrad& problem, Kernel kernel = Kernel::best);

// How many frames the chunks have of the library's products that are predicted to be faster than `scan` on the current
// device, 0 for none, or an error. powers_kept: those of W are there already.
Text planned_chunk(const Scan& problem, bool powers_kept, int64_t& frames);

// How many columns have a part of batch normalisation's statistics to themselves where the scan's kernel takes
// Scan::norm on the current device, 0 where it does not, or an error.
Text fused_norm_columns(const Scan& problem, int64_t& columns);

// Into how many parts the columns are cut where the scan's kernel is to make the sums that Scan::weight_grad holds, on
// the current device; 0 where it is not, or an error.
Text fused_weight_grad_parts(const Scan& problem, int64_t& parts);

// Enqueue the work on `stream` of the current device and return; all pointers are the device's. The text of an error,
// or an empty one. Nothing is allocated and nothing waits, so the calls can be captured in a CUDA graph.
Text scan(const Scan& problem, void* scratch, CUstream_st* stream, Kernel kernel = Kernel::best);
Text weight_grad(const WeightGrad& problem, void* scratch, CUstream_st* stream, Kernel kernel = Kernel::best);
// dW of the sums that a scan made, [parts][C][C] in fp32. Of `problem` C, dtype and dweight.
Text add_weight_grad_parts(const WeightGrad& problem, const float* partial, int64_t parts, CUstream_st* stream);

}  // namespace rcu_ops::cuda
