// recurrent_conv_frame: one frame of a recurrent layer, or of a plain convolution, with everything around it. Plain
// structs, no torch.
#pragma once

#include <cstdint>

#include "types.h"

namespace rcu_ops {

// With v = alpha (conv(frame) + bias + W state), of which a plain convolution has no W, and alpha = 1:
//
//     last = v,   y = act(scale * v + shift + residual)
//
// Everything lies channels last. frame, residual and state have strides for sample, row and column; y and last are
// dense.
struct ConvFrame {
  struct View {
    const void* data = nullptr;
    int64_t n = 0, h = 0, w = 0;
  };
  DType dtype = DType::f32;  // of frame, residual and y: fp32 or 16 bits; all else is fp32
  int64_t N = 0, C = 0, H = 0, W = 0, O = 0, OH = 0, OW = 0;
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, padding_h = 0, padding_w = 0;
  View frame, residual, state;  // a residual may be absent
  bool recurrent = false;       // there are W, state and last
  // [ceil(O / 32)][kernel_h * kernel_w * C (+ O)][32] fp32: rows by kernel_h, kernel_w and C; then those of W.
  // Pairs: bf16, C rounded up to even, two rows interleaved, [rows / 2][32][2]; W without the ones of its diagonal s,
  // which are the first halves of one more pair of rows (as in cpu/recurrent_conv_bf16_core.h).
  const void* panels = nullptr;
  bool pairs = false;
  const float *bias = nullptr, *scale = nullptr, *shift = nullptr;  // [O], or absent
  void* y = nullptr;
  float* last = nullptr;
  float alpha = 1;
  bool relu = false;

  int64_t channels() const { return pairs ? (C + 1) / 2 * 2 : C; }  // of the frame as it is multiplied
  int64_t depth() const { return kernel_h * kernel_w * channels() + (recurrent ? O : 0); }
  int64_t panel_rows() const { return depth() + (pairs && recurrent ? 2 : 0); }
};

inline constexpr int64_t frame_panel = 32;     // output channels of a panel
inline constexpr int64_t frame_channels = 16;  // O is a multiple of it

namespace cpu {
void conv_frame(const ConvFrame& problem, const Parallel& parallel);

// Tasks: bands of output rows times ranges of panels. Weights that would not stay in a core's second-level cache are
// split, so that each is read by one thread, and those of fewer rows than threads; else the rows, so that each thread
// copies its own part of the frame.
struct FramePlan {
  int64_t rows = 0, bands = 0, panels = 0, ranges = 0;  // rows of a band; panels of a range
};
inline FramePlan plan_frame(const ConvFrame& p, int threads) {
  constexpr int64_t resident = int64_t(1) << 20, band_bytes = int64_t(5) << 17;
  const auto parts = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
  const int64_t element = p.pairs ? 2 : 4, panels = parts(p.O, frame_panel);
  const int64_t row = ((p.OW - 1) * p.stride_w + p.kernel_w) * p.channels() * element * p.stride_h;
  FramePlan plan;
  const bool large = panels * frame_panel * p.depth() * element > resident;
  const bool split = (large || p.OH < threads) && panels >= threads && p.N < threads;
  plan.ranges = split ? threads : 1;
  plan.panels = parts(panels, plan.ranges);
  plan.ranges = parts(panels, plan.panels);
  // As many bands as make a multiple of the threads, none of them beyond what the cache keeps beside a panel.
  const int64_t fits = row < band_bytes ? band_bytes / row : 1, step = split || p.N % threads == 0 ? 1 : threads;
  plan.bands = (parts(p.OH, fits) + step - 1) / step * step;
  plan.rows = parts(p.OH, plan.bands < p.OH ? plan.bands : p.OH);
  plan.bands = parts(p.OH, plan.rows);
  return plan;
}
}  // namespace cpu

}  // namespace rcu_ops
