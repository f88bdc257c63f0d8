// recurrent_conv_batch_norm: what the host code and every device's kernels agree on. Plain structs, no torch, no CUDA.
#pragma once

#include <cstdint>

#include "recurrent_conv.h"

namespace rcu_ops {

// Passes over a sequence h [N,C,T,H,W]. With the moments (mean_c, sum of squared deviations, number of values) of
// channel c, r_c = 1 / sqrt(deviations / count + eps) and s_c = gamma_c r_c:
enum class NormPass : int32_t {
  moments,    // result [3,C] = mean, deviations, count
  normalize,  // y = act(s (h - mean) + beta (+ other)), other the residual
  sums,       // result [2,C] = sum dz, r sum dz (h - mean), dz = other where ReLU let it through; with y also out = dz
  gradient,   // out = s dz - s r sums_1 / count (h - mean) - s sums_0 / count
};

// ReLU let through what is not <= 0 in y, where y is given, else in what `normalize` computes from h.
struct Norm {
  NormPass pass = NormPass::moments;
  int64_t N = 0, C = 0, T = 0, H = 0, W = 0;
  DType dtype = DType::f32;  // of h, other, y and out; arithmetic is fp64 for fp64, fp32 otherwise
  View h, other, y, out;     // absent where the pass does not use them; y and out overlap no input
  // Contiguous, the arithmetic's type.
  const void *moments = nullptr, *gamma = nullptr, *beta = nullptr, *sums = nullptr;
  void* result = nullptr;
  double eps = 0;
  bool relu = false;
};

namespace cuda {
// Statistics on the way out of a scan, in shared memory per channel: sum and squares in fp64, center.
inline constexpr int statistics_floats = 5;
}  // namespace cuda

namespace cpu {
void batch_norm(const Norm& problem, const Parallel& parallel);
}  // namespace cpu

}  // namespace rcu_ops
