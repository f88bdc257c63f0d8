// The scans that have files of their own, for the launcher in recurrent_conv.cu.
#pragma once

#include "common/recurrent_conv_gpu_plan.h"
#include "cuda/device/launch.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

Error launch_fp32_scan(const Scan& problem, const Fp32ScanPlan& plan, Stream stream);
Error launch_tile_scan(const Scan& problem, const TileScanPlan& plan, Stream stream);
// A launch per frame; scratch: plan.scratch_bytes.
Error launch_step_scan(const Scan& problem, const StepScanPlan& plan, void* scratch, Stream stream);
// One launch of it after a given state, where plan.words are possible.
Error launch_step_words(const Scan& problem, const StepScanPlan& plan, Stream stream);
Error launch_wide_scan(const Scan& problem, const WideScanPlan& plan, Stream stream);
Error launch_hopper_scan(const Scan& problem, const HopperScanPlan& plan, Stream stream);

}  // namespace rcu_ops::cuda
