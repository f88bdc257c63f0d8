// The matrix-unit scans, for the launcher in recurrent_conv.cu.
#pragma once

#include "common/recurrent_conv_gpu_plan.h"
#include "cuda/device/launch.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

Error launch_tile_scan(const Scan& problem, const TileScanPlan& plan, Stream stream);
Error launch_wide_scan(const Scan& problem, const WideScanPlan& plan, Stream stream);

}  // namespace rcu_ops::cuda
