// recurrent_conv_frame: its kernel as a PyTorch operator (see bindings.h).
#include "bindings.h"

#include <vector>

#include "common/cpu_isa.h"
#include "common/recurrent_conv_frame.h"

namespace rcu_ops::bindings {
namespace {

ConvFrame::View frame_view(const char* name, const Tensor& tensor) {  // [N,C,H,W]
  const Sizes s = tensor.strides();
  check(s[1] == 1, name, ": expected adjacent channels, got strides ", s);
  return {.data = pointer(tensor), .n = s[0], .h = s[2], .w = s[3]};
}

// A new [N,O,OH,OW], channels last.
Tensor empty_frame(const ConvFrame& p, ScalarType dtype) {
  const std::array<int64_t, 4> sizes{p.N, p.O, p.OH, p.OW};
  return as_new(torch::stable::empty(Sizes(sizes.data(), 4), dtype, std::nullopt, std::nullopt, std::nullopt,
                                     torch::headeronly::MemoryFormat::ChannelsLast));
}

std::tuple<Tensor, Tensor> recurrent_conv_frame(Tensor frame, Tensor panels, std::optional<Tensor> bias,
                                                std::optional<Tensor> state, std::optional<Tensor> scale,
                                                std::optional<Tensor> shift, std::optional<Tensor> residual,
                                                int64_t channels, std::vector<int64_t> geometry, bool mean, bool relu) {
  check(frame.dim() == 4, "frame: expected [N,C,H,W], got ", frame.dim(), " dimensions");
  check(geometry.size() == 6, "geometry: expected 6 numbers, got ", geometry.size());
  ConvFrame p;
  p.dtype = dtype_of("frame", frame);
  check(p.dtype != DType::f64, "frame: expected dtype Float, BFloat16 or Half, got Double");
  p.N = frame.size(0), p.C = frame.size(1), p.H = frame.size(2), p.W = frame.size(3), p.O = channels;
  p.kernel_h = geometry[0], p.kernel_w = geometry[1], p.stride_h = geometry[2], p.stride_w = geometry[3];
  p.padding_h = geometry[4], p.padding_w = geometry[5];
  check(p.kernel_h > 0 && p.kernel_w > 0 && p.stride_h > 0 && p.stride_w > 0 && p.padding_h >= 0 && p.padding_w >= 0 &&
            p.H + 2 * p.padding_h >= p.kernel_h && p.W + 2 * p.padding_w >= p.kernel_w,
        "geometry: a kernel of ", p.kernel_h, "x", p.kernel_w, " does not fit into ", frame.sizes());
  p.OH = (p.H + 2 * p.padding_h - p.kernel_h) / p.stride_h + 1;
  p.OW = (p.W + 2 * p.padding_w - p.kernel_w) / p.stride_w + 1;
  check(p.C > 0 && p.O > 0 && p.O % frame_channels == 0, "channels: expected a multiple of ", frame_channels, ", got ",
        p.O);
  p.frame = frame_view("frame", frame);
  const auto numbers = [&](const char* name, const std::optional<Tensor>& given) -> const float* {
    if (!given) return nullptr;
    check_shape(name, *given, {p.O}, "[O]");
    check_dtype(name, *given, ScalarType::Float);
    check(p.O == 1 || given->stride(0) == 1, name, ": expected adjacent numbers");
    return static_cast<const float*>(pointer(*given));
  };
  p.bias = numbers("bias", bias), p.scale = numbers("scale", scale), p.shift = numbers("shift", shift);
  check((p.scale == nullptr) == (p.shift == nullptr), "scale, shift: expected both or neither");
  p.recurrent = state.has_value();
  if (state) {
    check_shape("state", *state, {p.N, p.O, p.OH, p.OW}, "[N,O,H',W']");
    check_dtype("state", *state, ScalarType::Float);
    p.state = frame_view("state", *state);
  }
  if (residual) {
    check_shape("residual", *residual, {p.N, p.O, p.OH, p.OW}, "[N,O,H',W']");
    check_dtype("residual", *residual, frame.scalar_type());
    p.residual = frame_view("residual", *residual);
  }
  p.pairs = panels.dim() == 4;
  const int64_t panel_count = (p.O + frame_panel - 1) / frame_panel;
  if (p.pairs) {
    check_shape("panels", panels, {panel_count, p.panel_rows() / 2, frame_panel, 2}, "[ceil(O/32),K/2,32,2]");
    check_dtype("panels", panels, ScalarType::BFloat16);
    check_dtype("frame", frame, ScalarType::BFloat16);
    check(cpu::current_isa() >= cpu::Isa::avx512_bf16, "panels: expected fp32 for instruction set ",
          cpu::isa_name(cpu::current_isa()), ", got pairs of bf16, which it does not multiply");
  } else {
    check_shape("panels", panels, {panel_count, p.panel_rows(), frame_panel}, "[ceil(O/32),K,32]");
    check_dtype("panels", panels, ScalarType::Float);
  }
  check(panels.is_contiguous(), "panels: expected a contiguous tensor, got strides ", panels.strides());
  p.panels = pointer(panels);
  p.alpha = mean ? 0.5f : 1.0f;
  p.relu = relu;
  Tensor y = empty_frame(p, frame.scalar_type());
  Tensor last = state ? empty_frame(p, ScalarType::Float) : empty_of(frame, {0});
  p.y = pointer(y);
  p.last = state ? static_cast<float*>(pointer(last)) : nullptr;
  cpu::conv_frame(p, cpu_threads());
  return {y, last};
}

}  // namespace
}  // namespace rcu_ops::bindings

STABLE_TORCH_LIBRARY_IMPL(rcu_ops, CPU, m) {
  m.impl("recurrent_conv_frame", TORCH_BOX(&rcu_ops::bindings::recurrent_conv_frame));
}
