// recurrent_conv: what the host code and every device's kernels agree on. Plain structs, no torch, no CUDA.
#pragma once

#include <cstdint>

#include "types.h"

namespace rcu_ops {

// A strided [N,C,T,H,W] tensor; strides in elements, any value including 0. data == nullptr means "absent".
// States [N,C,H,W] leave t at 0. g is the stride between groups of frames that are scanned side by side (chunks).
struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t n = 0, c = 0, t = 0, h = 0, w = 0, g = 0;
};

// How the first frame sees the state before it.
enum class Init : int32_t {
  none,   // no state: the first frame's value is alpha_first * x
  state,  // v_first = alpha_first * (W state + x)
  added,  // v_first = alpha_first * (state + x): the gradient that arrives at the last state
};

// What is written to `last` once all frames are done.
enum class Last : int32_t {
  none,
  state,      // the last value, in the state's precision
  projected,  // W times the last value: the gradient of the first state
};

// What batch normalisation (recurrent_conv_batch_norm.h) leaves to a scan on a GPU, where the scan's kernel takes it
// (fused_norm_columns in recurrent_conv_gpu_plan.h); elsewhere it makes passes of its own.
struct ScanNorm {
  // Statistics of y on the way out, [C][parts][2]: of each part, so many consecutive columns in all their frames, the
  // mean and the sum of squared deviations from it.
  double* partial = nullptr;
  // The gradient on the way in: `x` is that of the normalised output, Scan::residual holds the h that was normalised,
  // and the scan takes NormPass::gradient of both instead of x. Tables as in Norm, fp32.
  const float *moments = nullptr, *gamma = nullptr, *beta = nullptr, *sums = nullptr;
  float eps = 0;
  bool relu = false;

  bool present() const { return partial || moments; }
};

// What the weight's gradient leaves to the scan backwards in time on a GPU, where its kernel takes it
// (fused_weight_grad_parts in recurrent_conv_weight_grad_plan.h); elsewhere it reads dx and h again (WeightGrad).
struct ScanWeightGrad {
  // dW's sums over the parts of the columns, in all their frames, [part][C][C]; Scan::residual holds h.
  float* partial = nullptr;
  View first;  // the state before the frame that is processed last; may be absent
};

// One scan over time, the shape of the forward pass, of its fused inference form and of the backward pass alike:
//
//     v_i = alpha_i * (W v_{i-1} + x_{t(i)}),   t(i) = i or T-1-i,   alpha_i = alpha except at the two ends
//     y_{t(i)} = v_i,  or  act(scale * v_i + shift (+ residual_{t(i)}))
//
// The backward pass is the scan in the opposite direction with W transposed (swap weight_out and weight_in), x = grad_h
// and v = dx: with u = alpha * g the recurrence g_t = grad_t + alpha W^T g_{t+1} becomes u_t = alpha (grad_t + W^T
// u_{t+1}).
struct Scan {
  int64_t N = 0, C = 0, T = 0, H = 0, W = 0, G = 1;
  DType dtype = DType::f32;  // of x, y, residual and weight; the state is f64 for f64 and f32 otherwise
  View x;                    // may be absent: zeros
  View y;                    // may be absent: nothing but `last` is wanted
  View residual;
  View first;  // dtype may be dtype or the state's
  View last;   // dtype may be dtype or the state's
  const void* weight = nullptr;
  int64_t weight_out = 0, weight_in = 0;  // strides of W[out][in]
  const void* scale = nullptr;            // [C], contiguous, the state's dtype; absent: plain output
  const void* shift = nullptr;
  bool relu = false;
  bool reverse = false;
  Init init = Init::none;
  Last last_kind = Last::none;
  double alpha = 1, alpha_first = 1, alpha_final = 1;
  ScanNorm norm;               // with neither scale nor, for the statistics, a residual
  ScanWeightGrad weight_grad;  // with neither scale nor norm
};

// dW[o][i] = sum over frames and positions of dx_t[o] * h_{t-1}[i], where t-1 is the frame processed before t and the
// frame before the first is `first` (skipped when absent).
struct WeightGrad {
  int64_t N = 0, C = 0, T = 0, H = 0, W = 0;
  DType dtype = DType::f32;
  View dx, h, first;
  bool reverse = false;
  void* dweight = nullptr;  // [C,C] contiguous, dtype
};

namespace cpu {
void scan(const Scan& problem, const Parallel& parallel);
void weight_grad(const WeightGrad& problem, const Parallel& parallel);
}  // namespace cpu

}  // namespace rcu_ops
