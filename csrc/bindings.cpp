// The operators' kernels, registered with PyTorch through LibTorch's stable ABI: the only file that sees torch.
//
// Schemas are defined in Python (rcu_ops/ops); this file checks arguments cheaply for direct torch.ops callers, allocates
// outputs and hands raw pointers to the kernels of the tensor's device. One binary serves every torch from 2.11 on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <atomic>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/recurrent_conv.h"
#ifdef RCU_OPS_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda/recurrent_conv.h"

// Weak: a CPU-only torch does not have it, and the library must load there all the same.
extern "C" [[gnu::weak]] AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// ---- checks ----------------------------------------------------------------------------------------------------

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) [[likely]]
    return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string shape_text(Sizes sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

const char* dtype_text(ScalarType dtype) { return torch::headeronly::toString(dtype); }

void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected, const char* what) {
  const Sizes sizes = tensor.sizes();
  bool same = sizes.size() == expected.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] == expected.begin()[i];
  check(same, name, ": expected shape ", what, " = ", shape_text(Sizes(expected.begin(), expected.size())), ", got ",
        shape_text(sizes));
}

void check_dtype(const char* name, const Tensor& tensor, ScalarType expected) {
  check(tensor.scalar_type() == expected, name, ": expected dtype ", dtype_text(expected), ", got ",
        dtype_text(tensor.scalar_type()));
}

void check_dtype(const char* name, const Tensor& tensor, ScalarType one, ScalarType other) {
  check(tensor.scalar_type() == one || tensor.scalar_type() == other, name, ": expected dtype ", dtype_text(one), " or ",
        dtype_text(other), ", got ", dtype_text(tensor.scalar_type()));
}

void check_device(const char* name, const Tensor& tensor, const Tensor& like, const char* like_name) {
  check(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
        ": expected the device of ", like_name, ", got another one");
}

rcu_ops::DType dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return rcu_ops::DType::f64;
    case ScalarType::Float: return rcu_ops::DType::f32;
    case ScalarType::BFloat16: return rcu_ops::DType::bf16;
    case ScalarType::Half: return rcu_ops::DType::f16;
    default: break;
  }
  check(false, name, ": expected dtype Double, Float, BFloat16 or Half, got ", dtype_text(tensor.scalar_type()));
  return {};
}

ScalarType state_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// ---- views and allocation --------------------------------------------------------------------------------------

void* pointer(const Tensor& tensor) { return tensor.data_ptr(); }

rcu_ops::View sequence_view(const Tensor& tensor) {  // [N,C,T,H,W]
  const Sizes s = tensor.strides();
  return {.data = pointer(tensor), .dtype = dtype_of("tensor", tensor), .n = s[0], .c = s[1], .t = s[2], .h = s[3], .w = s[4]};
}

rcu_ops::View state_view(const Tensor& tensor) {  // [N,C,H,W]
  const Sizes s = tensor.strides();
  return {.data = pointer(tensor), .dtype = dtype_of("tensor", tensor), .n = s[0], .c = s[1], .t = 0, .h = s[2], .w = s[3]};
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
  return to<Tensor>(like[0]);
}

Tensor empty_of(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, Sizes(sizes.begin(), sizes.size()));
}

// ---- launching -------------------------------------------------------------------------------------------------

struct Tasks {
  void (*task)(void*, int64_t);
  void* context;
  int64_t count;
  std::atomic<int64_t> next{0};
};

// Threads take tasks one by one, so that one slow core does not hold up the rest.
void run_tasks(void*, int64_t count, void (*task)(void*, int64_t), void* context) {
  if (count == 1) return task(context, 0);
  Tasks tasks{task, context, count};
  const auto worker = [](int64_t, int64_t, void* self) {
    auto& tasks = *static_cast<Tasks*>(self);
    for (int64_t i; (i = tasks.next.fetch_add(1, std::memory_order_relaxed)) < tasks.count;) tasks.task(tasks.context, i);
  };
  const int64_t threads = torch::stable::get_num_threads();
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, threads < count ? threads : count, 1, worker, &tasks));
}

rcu_ops::Parallel cpu_threads() {
  return {.threads = static_cast<int>(torch::stable::get_num_threads()), .run = run_tasks, .pool = nullptr};
}

#ifdef RCU_OPS_WITH_CUDA
// On the current stream of `like`'s device. The scratch goes back to the caching allocator, which hands it out again in the
// order of that stream.
template <class Problem, class ScratchOf, class Run>
void launch_on_gpu(const Problem& problem, const Tensor& like, ScratchOf scratch_of, Run run) {
  const int32_t device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const rcu_ops::cuda::Scratch wanted = scratch_of(problem);
  check(wanted.error.empty(), wanted.error);
  std::optional<Tensor> scratch;
  if (wanted.bytes > 0) scratch = torch::stable::new_empty(like, Sizes(&wanted.bytes, 1), ScalarType::Byte);
  const std::string error = run(problem, scratch ? pointer(*scratch) : nullptr, static_cast<CUstream_st*>(stream));
  check(error.empty(), error);
}
#endif

void launch(const rcu_ops::Scan& problem, [[maybe_unused]] const Tensor& like) {
#ifdef RCU_OPS_WITH_CUDA
  if (like.is_cuda())
    return launch_on_gpu(
        problem, like, [](const auto& p) { return rcu_ops::cuda::scan_scratch(p); },
        [](const auto& p, void* scratch, CUstream_st* stream) { return rcu_ops::cuda::scan(p, scratch, stream); });
#endif
  rcu_ops::cpu::scan(problem, cpu_threads());
}

void launch(const rcu_ops::WeightGrad& problem, [[maybe_unused]] const Tensor& like) {
#ifdef RCU_OPS_WITH_CUDA
  if (like.is_cuda())
    return launch_on_gpu(problem, like, rcu_ops::cuda::weight_grad_scratch, rcu_ops::cuda::weight_grad);
#endif
  rcu_ops::cpu::weight_grad(problem, cpu_threads());
}

// ---- recurrent_conv --------------------------------------------------------------------------------------------

rcu_ops::Scan forward_problem(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& h0, bool mean) {
  check(x.dim() == 5, "x: expected [N,C,T,H,W], got ", x.dim(), " dimensions");
  rcu_ops::Scan p;
  p.dtype = dtype_of("x", x);
  p.N = x.size(0), p.C = x.size(1), p.T = x.size(2), p.H = x.size(3), p.W = x.size(4);
  check(p.T > 0 && p.C > 0, "x: expected at least one frame and one channel, got ", shape_text(x.sizes()));
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
    p.init = rcu_ops::Init::state;
  }
  p.alpha = mean ? 0.5 : 1;
  p.alpha_first = h0 ? p.alpha : 1;
  p.alpha_final = p.T > 1 ? p.alpha : p.alpha_first;
  p.last_kind = rcu_ops::Last::state;
  return p;
}

std::tuple<Tensor, Tensor> recurrent_conv(Tensor x, Tensor weight, std::optional<Tensor> h0, bool mean, bool reverse) {
  rcu_ops::Scan p = forward_problem(x, weight, h0, mean);
  Tensor h = torch::stable::empty_like(x), h_n = empty_state(x);
  p.reverse = reverse;
  p.y = sequence_view(h);
  p.last = state_view(h_n);
  launch(p, x);
  return {h, h_n};
}

std::tuple<Tensor, Tensor> recurrent_conv_affine_act(Tensor x, Tensor weight, Tensor scale, Tensor shift,
                                                     std::optional<Tensor> h0, std::optional<Tensor> residual, bool mean,
                                                     bool relu) {
  rcu_ops::Scan p = forward_problem(x, weight, h0, mean);
  Tensor contiguous[2];
  const Tensor* given[2] = {&scale, &shift};
  const char* names[2] = {"scale", "shift"};
  for (int i = 0; i < 2; ++i) {
    check_shape(names[i], *given[i], {p.C}, "[C]");
    check_dtype(names[i], *given[i], state_dtype(x.scalar_type()));
    check_device(names[i], *given[i], x, "x");
    contiguous[i] = torch::stable::contiguous(*given[i]);
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
  Tensor y = torch::stable::empty_like(x), h_n = empty_state(x);
  p.y = sequence_view(y);
  p.last = state_view(h_n);
  launch(p, x);
  return {y, h_n};
}

std::tuple<Tensor, Tensor, Tensor> recurrent_conv_backward(std::optional<Tensor> grad_h, std::optional<Tensor> grad_h_n,
                                                           Tensor h, Tensor weight, std::optional<Tensor> h0, bool mean,
                                                           bool reverse, bool need_weight_grad) {
  rcu_ops::Scan p = forward_problem(h, weight, h0, mean);
  check(grad_h || grad_h_n, "grad_h, grad_h_n: expected at least one of them, got none");
  p.x = {};
  if (grad_h) {
    check_shape("grad_h", *grad_h, {p.N, p.C, p.T, p.H, p.W}, "of h");
    check_dtype("grad_h", *grad_h, h.scalar_type());
    check_device("grad_h", *grad_h, h, "h");
    p.x = sequence_view(*grad_h);
  }
  p.first = {};
  p.init = rcu_ops::Init::none;
  if (grad_h_n) {
    check_shape("grad_h_n", *grad_h_n, {p.N, p.C, p.H, p.W}, "[N,C,H,W]");
    check_dtype("grad_h_n", *grad_h_n, state_dtype(h.scalar_type()));
    check_device("grad_h_n", *grad_h_n, h, "h");
    p.first = state_view(*grad_h_n);
    p.init = rcu_ops::Init::added;
  }
  // dx runs against time with W transposed; without h0 the first frame's dx is g itself, and g = dx / alpha elsewhere.
  p.reverse = !reverse;
  std::swap(p.weight_out, p.weight_in);
  p.alpha_final = h0 ? p.alpha : 1;
  p.alpha_first = p.T > 1 ? p.alpha : p.alpha_final;

  Tensor dx = torch::stable::empty_like(h);
  Tensor dh0 = h0 ? torch::stable::empty_like(*h0) : empty_of(h, {0});
  Tensor dweight = need_weight_grad ? empty_of(weight, {p.C, p.C}) : empty_of(weight, {0});
  p.y = sequence_view(dx);
  p.last_kind = rcu_ops::Last::none;
  if (h0) {
    p.last = state_view(dh0);
    p.last_kind = rcu_ops::Last::projected;
  }
  launch(p, h);
  if (need_weight_grad) {
    rcu_ops::WeightGrad g;
    g.dtype = p.dtype;
    g.N = p.N, g.C = p.C, g.T = p.T, g.H = p.H, g.W = p.W;
    g.dx = sequence_view(dx);
    g.h = sequence_view(h);
    if (h0) g.first = state_view(*h0);
    g.reverse = reverse;
    g.dweight = pointer(dweight);
    launch(g, h);
  }
  return {dx, dweight, dh0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rcu_ops, CPU, m) {
  m.impl("recurrent_conv", TORCH_BOX(&recurrent_conv));
  m.impl("recurrent_conv_backward", TORCH_BOX(&recurrent_conv_backward));
  m.impl("recurrent_conv_affine_act", TORCH_BOX(&recurrent_conv_affine_act));
}

#ifdef RCU_OPS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(rcu_ops, CUDA, m) {
  m.impl("recurrent_conv", TORCH_BOX(&recurrent_conv));
  m.impl("recurrent_conv_backward", TORCH_BOX(&recurrent_conv_backward));
  m.impl("recurrent_conv_affine_act", TORCH_BOX(&recurrent_conv_affine_act));
}
#endif
