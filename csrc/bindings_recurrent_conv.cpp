// recurrent_conv: its kernels as PyTorch operators (see bindings.h).
#include "bindings_recurrent_conv.h"

#include "bindings.h"
#include "common/recurrent_conv_chunk_choice.h"
#ifdef RCU_OPS_WITH_CUDA
#include "cuda/recurrent_conv.h"
#endif

namespace rcu_ops::bindings {

View sequence_view(const Tensor& tensor) {  // [N,C,T,H,W]
  const Sizes s = tensor.strides();
  const DType dtype = dtype_of("tensor", tensor);
  return {.data = pointer(tensor), .dtype = dtype, .n = s[0], .c = s[1], .t = s[2], .h = s[3], .w = s[4]};
}

namespace {

View state_view(const Tensor& tensor) {  // [N,C,H,W]
  const Sizes s = tensor.strides();
  const DType dtype = dtype_of("tensor", tensor);
  return {.data = pointer(tensor), .dtype = dtype, .n = s[0], .c = s[1], .t = 0, .h = s[2], .w = s[3]};
}

// torch.empty_like(x.select(2, 0), dtype=state dtype): the state in x's memory format.
Tensor empty_state(const Tensor& x) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 3> select{from(x), from(int64_t{2}), from(int64_t{0})};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::select", "int", select.data(), TORCH_ABI_VERSION));
  const Tensor frame = to<Tensor>(select[0]);
  std::array<StableIValue, 6> like{from(frame),        from(std::optional<ScalarType>(state_dtype(x.scalar_type()))),
                                   from(std::nullopt), from(std::nullopt),
                                   from(std::nullopt), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", like.data(), TORCH_ABI_VERSION));
  return as_new(to<Tensor>(like[0]));
}

ScalarType scalar_of(DType dtype) {
  switch (dtype) {
    case DType::f64: return ScalarType::Double;
    case DType::f32: return ScalarType::Float;
    case DType::bf16: return ScalarType::BFloat16;
    default: return ScalarType::Half;
  }
}

// The library form in chunks of frames side by side is an operator made of PyTorch's,
// rcu_ops/ops/_recurrent_conv_chunked.py.
void run_chunked(const Scan& p, int64_t frames, const Tensor& like) {
  using torch::stable::detail::from;
  const auto blob = [&](const void* data, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                        DType dtype) {
    return torch::stable::from_blob(const_cast<void*>(data), Sizes(sizes.begin(), sizes.size()),
                                    Sizes(strides.begin(), strides.size()), like.device(), scalar_of(dtype));
  };
  using Given = std::optional<Tensor>;
  const auto sequence = [&](const View& v) -> Given {
    if (!v.data) return std::nullopt;
    return blob(v.data, {p.N, p.C, p.T, p.H, p.W}, {v.n, v.c, v.t, v.h, v.w}, v.dtype);
  };
  const auto state = [&](const View& v, bool present) -> Given {
    if (!present) return std::nullopt;
    return blob(v.data, {p.N, p.C, p.H, p.W}, {v.n, v.c, v.h, v.w}, v.dtype);
  };
  const auto numbers = [&](const void* data) -> Given {
    if (!data) return std::nullopt;
    return blob(data, {p.C}, {1}, DType::f32);
  };
  std::array<StableIValue, 16> stack{
      from(sequence(p.x)),
      from(blob(p.weight, {p.C, p.C}, {p.weight_out, p.weight_in}, p.dtype)),
      from(state(p.first, p.init != Init::none)),
      from(*sequence(p.y)),
      from(state(p.last, p.last_kind != Last::none)),
      from(numbers(p.scale)),
      from(numbers(p.shift)),
      from(sequence(p.residual)),
      from(frames),
      from(static_cast<int64_t>(p.init)),
      from(p.last_kind == Last::projected),
      from(p.alpha),
      from(p.alpha_first),
      from(p.alpha_final),
      from(p.relu),
      from(p.reverse),
  };
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("rcu_ops::recurrent_conv_chunked_", "", stack.data(), TORCH_ABI_VERSION));
}

#ifdef RCU_OPS_WITH_CUDA
// Whether a module keeps the powers of this W.
bool powers_are_kept(const Scan& p) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(reinterpret_cast<int64_t>(p.weight))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("rcu_ops::recurrent_conv_powers_are_kept", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}
#endif

// Frames of the library form's chunks, 0 where it is not taken. Kernels of the CPU have chunks of their own; there it
// is for proofs.
int64_t library_chunk(const Scan& p, const Tensor& like) {
  if (!can_be_chunked(p) || (p.x.data && p.x.data == p.y.data)) return 0;  // it reads x again after it wrote y
  const auto forced = forced_chunk();
  if (!like.is_cuda() && !(forced && std::getenv("RCU_OPS_CHUNK_LIBRARY"))) return 0;
  if (forced) return *forced < p.T ? *forced : 0;
  int64_t frames = 0;
#ifdef RCU_OPS_WITH_CUDA
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const auto plan = [&](bool powers_kept) {
    const Text error = cuda::planned_chunk(p, powers_kept, frames);
    check(error.empty(), error.c_str());
    return frames;
  };
  const int64_t kept = plan(true);
  if (plan(false) != kept && powers_are_kept(p)) frames = kept;  // asking takes longer than planning
#endif
  return frames;
}

void launch(const Scan& problem, const Tensor& like) {
  if (const int64_t frames = library_chunk(problem, like)) return run_chunked(problem, frames, like);
#ifdef RCU_OPS_WITH_CUDA
  if (like.is_cuda())
    return launch_on_gpu(
        problem, like, [](const auto& p) { return cuda::scan_scratch(p); },
        [](const auto& p, void* scratch, CUstream_st* stream) { return cuda::scan(p, scratch, stream); });
#endif
  cpu::scan(problem, cpu_threads());
}

void launch(const WeightGrad& problem, [[maybe_unused]] const Tensor& like) {
#ifdef RCU_OPS_WITH_CUDA
  if (like.is_cuda())
    return launch_on_gpu(
        problem, like, [](const auto& p) { return cuda::weight_grad_scratch(p); },
        [](const auto& p, void* scratch, CUstream_st* stream) { return cuda::weight_grad(p, scratch, stream); });
#endif
  cpu::weight_grad(problem, cpu_threads());
}

// dW of sums that a scan made.
void launch_parts([[maybe_unused]] const WeightGrad& problem, [[maybe_unused]] const Tensor& partial) {
#ifdef RCU_OPS_WITH_CUDA
  launch_on_gpu(
      problem, partial, [](const auto&) { return cuda::Scratch{}; },
      [&](const auto& p, void*, CUstream_st* stream) {
        return cuda::add_weight_grad_parts(p, static_cast<const float*>(pointer(partial)), partial.size(0), stream);
      });
#endif
}

// ---- recurrent_conv --------------------------------------------------------------------------------------------

Scan forward_problem(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& h0, bool mean) {
  check(x.dim() == 5, "x: expected [N,C,T,H,W], got ", x.dim(), " dimensions");
  Scan p;
  p.dtype = dtype_of("x", x);
  p.N = x.size(0), p.C = x.size(1), p.T = x.size(2), p.H = x.size(3), p.W = x.size(4);
  check(p.T > 0 && p.C > 0, "x: expected at least one frame and one channel, got ", x.sizes());
  check_shape("weight", weight, {p.C, p.C}, "[C,C]");
  check_dtype("weight", weight, x.scalar_type());
  check_device("weight", weight, x, "x");
  p.x = sequence_view(x);
  p.weight = pointer(weight);
  p.weight_out = weight.stride(0), p.weight_in = weight.stride(1);
  if (h0) {
    check_shape("h0", *h0, {p.N, p.C, p.H, p.W}, "[N,C,H,W]");
    check_dtype("h0", *h0, x.scalar_type(), state_dtype(x.scalar_type()));
    check_device("h0", *h0, x, "x");
    p.first = state_view(*h0);
    p.init = Init::state;
  }
  p.alpha = mean ? 0.5 : 1;
  p.alpha_first = h0 ? p.alpha : 1;
  p.alpha_final = p.T > 1 ? p.alpha : p.alpha_first;
  p.last_kind = Last::state;
  return p;
}

#ifdef RCU_OPS_WITH_CUDA
// What the scan's kernel takes of the work around it, as the kernels answer; 0: nothing.
int64_t taken_by_scan(const Scan& p, const Tensor& like, Text (*question)(const Scan&, int64_t&)) {
  if (!like.is_cuda() || p.dtype == DType::f64 || p.N * p.H * p.W == 0 || forced_chunk().value_or(0) > 0) return 0;
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  int64_t found = 0;
  const Text error = question(p, found);
  check(error.empty(), error.c_str());
  return found;
}
#endif

// 0 where the scan's kernel takes no part of batch normalisation.
int64_t norm_columns([[maybe_unused]] const Scan& p, [[maybe_unused]] const Tensor& like) {
#ifdef RCU_OPS_WITH_CUDA
  return taken_by_scan(p, like, cuda::fused_norm_columns);
#else
  return 0;
#endif
}

// The partial sums that a scan backwards in time makes of the weight's gradient, [parts,C,C], where its kernel takes
// that: then p says so.
std::optional<Tensor> weight_grad_parts([[maybe_unused]] Scan& p, [[maybe_unused]] const Tensor& h,
                                        [[maybe_unused]] const std::optional<Tensor>& h0) {
  std::optional<Tensor> partial;
#ifdef RCU_OPS_WITH_CUDA
  Scan with_sums = p;
  with_sums.residual = sequence_view(h);
  if (h0) with_sums.weight_grad.first = state_view(*h0);
  with_sums.weight_grad.partial = static_cast<float*>(p.y.data);  // never followed
  if (const int64_t parts = taken_by_scan(with_sums, h, cuda::fused_weight_grad_parts)) {
    partial = empty_of(h, {parts, p.C, p.C}, ScalarType::Float);
    p = with_sums;
    p.weight_grad.partial = static_cast<float*>(pointer(*partial));
  }
#endif
  return partial;
}

}  // namespace

std::tuple<Tensor, Tensor> recurrent_conv(Tensor x, Tensor weight, std::optional<Tensor> h0, bool mean, bool reverse) {
  Scan p = forward_problem(x, weight, h0, mean);
  Tensor h = empty_as(x), h_n = empty_state(x);
  p.reverse = reverse;
  p.y = sequence_view(h);
  p.last = state_view(h_n);
  launch(p, x);
  return {h, h_n};
}

std::tuple<Tensor, Tensor> recurrent_conv_with_statistics(const Tensor& x, const Tensor& weight,
                                                          const std::optional<Tensor>& h0, bool mean,
                                                          std::optional<Tensor>& partial, int64_t& columns) {
  Scan p = forward_problem(x, weight, h0, mean);
  Tensor h = empty_as(x), h_n = empty_state(x);
  p.y = sequence_view(h);
  p.last = state_view(h_n);
  columns = norm_columns(p, x);
  if (columns) {
    const int64_t numbers = p.C * ((p.N * p.H * p.W + columns - 1) / columns) * 2;
    partial = empty_of(x, {numbers}, ScalarType::Double);
    p.norm.partial = static_cast<double*>(pointer(*partial));
  }
  launch(p, x);
  return {h, h_n};
}

namespace {

std::tuple<Tensor, Tensor> recurrent_conv_affine_act(Tensor x, Tensor weight, Tensor scale, Tensor shift,
                                                     std::optional<Tensor> h0, std::optional<Tensor> residual,
                                                     bool mean, bool relu) {
  Scan p = forward_problem(x, weight, h0, mean);
  Tensor contiguous[2];
  const Tensor* given[2] = {&scale, &shift};
  const char* names[2] = {"scale", "shift"};
  for (int i = 0; i < 2; ++i) {
    check_shape(names[i], *given[i], {p.C}, "[C]");
    check_dtype(names[i], *given[i], state_dtype(x.scalar_type()));
    check_device(names[i], *given[i], x, "x");
    contiguous[i] = contiguous_of(*given[i]);
  }
  p.scale = pointer(contiguous[0]);
  p.shift = pointer(contiguous[1]);
  p.relu = relu;
  if (residual) {
    const Sizes s = x.sizes();
    check_shape("residual", *residual, {s[0], s[1], s[2], s[3], s[4]}, "of x");
    check_dtype("residual", *residual, x.scalar_type());
    check_device("residual", *residual, x, "x");
    p.residual = sequence_view(*residual);
  }
  Tensor y = empty_as(x), h_n = empty_state(x);
  p.y = sequence_view(y);
  p.last = state_view(h_n);
  launch(p, x);
  return {y, h_n};
}

}  // namespace

namespace {

// norm: of batch normalisation after the scan, whose h is `h` and whose gradient is grad_h; nothing where the kernel
// does not take it. in_place: dx is written over grad_h, which is as empty_like(h); on the CPU.
std::optional<std::tuple<Tensor, Tensor, Tensor>> backward(const std::optional<Tensor>& grad_h,
                                                           const std::optional<Tensor>& grad_h_n, const Tensor& h,
                                                           const Tensor& weight, const std::optional<Tensor>& h0,
                                                           bool mean, bool reverse, bool need_weight_grad,
                                                           const ScanNorm* norm, bool in_place = false) {
  Scan p = forward_problem(h, weight, h0, mean);
  check(grad_h || grad_h_n, "grad_h, grad_h_n: expected at least one of them, got none");
  p.x = {};
  if (grad_h) {
    check_shape("grad_h", *grad_h, {p.N, p.C, p.T, p.H, p.W}, "of h");
    check_dtype("grad_h", *grad_h, h.scalar_type());
    check_device("grad_h", *grad_h, h, "h");
    p.x = sequence_view(*grad_h);
  }
  p.first = {};
  p.init = Init::none;
  if (grad_h_n) {
    check_shape("grad_h_n", *grad_h_n, {p.N, p.C, p.H, p.W}, "[N,C,H,W]");
    check_dtype("grad_h_n", *grad_h_n, state_dtype(h.scalar_type()));
    check_device("grad_h_n", *grad_h_n, h, "h");
    p.first = state_view(*grad_h_n);
    p.init = Init::added;
  }
  // dx runs against time with W transposed; without h0 the first frame's dx is g itself, and g = dx / alpha elsewhere.
  p.reverse = !reverse;
  std::swap(p.weight_out, p.weight_in);
  p.alpha_final = h0 ? p.alpha : 1;
  p.alpha_first = p.T > 1 ? p.alpha : p.alpha_final;

  Tensor dx = in_place ? *grad_h : empty_as(h);
  Tensor dh0 = h0 ? empty_as(*h0) : empty_of(h, {0});
  Tensor dweight = need_weight_grad ? empty_of(weight, {p.C, p.C}) : empty_of(weight, {0});
  p.y = sequence_view(dx);
  p.last_kind = Last::none;
  if (h0) {
    p.last = state_view(dh0);
    p.last_kind = Last::projected;
  }
  if (norm) {
    p.residual = sequence_view(h);
    p.norm = *norm;
    if (!norm_columns(p, h)) return std::nullopt;
  }
  const std::optional<Tensor> partial = need_weight_grad && !norm ? weight_grad_parts(p, h, h0) : std::nullopt;
  launch(p, h);
  if (need_weight_grad) {
    WeightGrad g;
    g.dtype = p.dtype;
    g.N = p.N, g.C = p.C, g.T = p.T, g.H = p.H, g.W = p.W;
    g.dx = sequence_view(dx);
    g.h = sequence_view(h);
    if (h0) g.first = state_view(*h0);
    g.reverse = reverse;
    g.dweight = pointer(dweight);
    partial ? launch_parts(g, *partial) : launch(g, h);
  }
  return std::tuple<Tensor, Tensor, Tensor>{dx, dweight, dh0};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> recurrent_conv_backward(std::optional<Tensor> grad_h, std::optional<Tensor> grad_h_n,
                                                           Tensor h, Tensor weight, std::optional<Tensor> h0, bool mean,
                                                           bool reverse, bool need_weight_grad) {
  return *backward(grad_h, grad_h_n, h, weight, h0, mean, reverse, need_weight_grad, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> recurrent_conv_backward_over(const Tensor& grad_h,
                                                                const std::optional<Tensor>& grad_h_n, const Tensor& h,
                                                                const Tensor& weight, const std::optional<Tensor>& h0,
                                                                bool mean, bool need_weight_grad) {
  return *backward(grad_h, grad_h_n, h, weight, h0, mean, false, need_weight_grad, nullptr, !h.is_cuda());
}

std::optional<std::tuple<Tensor, Tensor, Tensor>> recurrent_conv_backward_of_norm(
    const Tensor& dz, const std::optional<Tensor>& grad_h_n, const Tensor& h, const Tensor& weight,
    const std::optional<Tensor>& h0, bool mean, bool need_weight_grad, const ScanNorm& norm) {
  return backward(dz, grad_h_n, h, weight, h0, mean, false, need_weight_grad, &norm);
}

}  // namespace rcu_ops::bindings

STABLE_TORCH_LIBRARY_IMPL(rcu_ops, CPU, m) {
  m.impl("recurrent_conv", TORCH_BOX(&rcu_ops::bindings::recurrent_conv));
  m.impl("recurrent_conv_backward", TORCH_BOX(&rcu_ops::bindings::recurrent_conv_backward));
  m.impl("recurrent_conv_affine_act", TORCH_BOX(&rcu_ops::bindings::recurrent_conv_affine_act));
}

#ifdef RCU_OPS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(rcu_ops, CUDA, m) {
  m.impl("recurrent_conv", TORCH_BOX(&rcu_ops::bindings::recurrent_conv));
  m.impl("recurrent_conv_backward", TORCH_BOX(&rcu_ops::bindings::recurrent_conv_backward));
  m.impl("recurrent_conv_affine_act", TORCH_BOX(&rcu_ops::bindings::recurrent_conv_affine_act));
}
#endif
