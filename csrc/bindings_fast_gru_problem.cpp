// fast_gru: what is checked of a caller's tensors, and which way the problem they make is solved.
#include "bindings_fast_gru.h"
#include "common/cpu_isa.h"

namespace rcu_ops::bindings::gru {

#ifdef RCU_OPS_WITH_CUDA
std::optional<fast_gru::PersistentPlan> one_launch(const Problem& p, const Tensor& x, bool backward) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  fast_gru::PersistentPlan plan;
  const Text error = cuda::plan_steps(p.step_columns(), p.C, p.R, p.dtype, backward, plan);
  check(error.empty(), error.c_str());
  return plan.why_not.empty() ? std::optional(plan) : std::nullopt;
}

std::optional<fast_gru::ColumnsPlan> columns_by_blocks(const Problem& p, const Tensor& x, bool backward) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  fast_gru::ColumnsPlan plan;
  const Text error = cuda::plan_columns(p.step_columns(), p.C, p.R, p.dtype, backward, plan);
  check(error.empty(), error.c_str());
  return plan.why_not.empty() ? std::optional(plan) : std::nullopt;
}
#endif

bool in_panels(const Problem& p, const Tensor& x, int64_t columns) {
  const cpu::Isa isa = cpu::current_isa();
  return !x.is_cuda() && fast_gru::by_columns(p.dtype, columns, p.C, p.R, cpu_threads().threads, isa == cpu::Isa::amx,
                                              isa >= cpu::Isa::avx512);
}
bool gradients_in_panels(const Problem& p, const Tensor& x) {
  return !x.is_cuda() && p.steps > 0 &&
         fast_gru::gradients_by_columns(p.dtype, p.step_columns(), p.C, p.R, cpu_threads().threads);
}
bool in_fp32(const Problem& p, const Tensor& x) {
  const cpu::Isa isa = cpu::current_isa();
  return !x.is_cuda() && fast_gru::in_fp32(p.dtype, p.step_columns(), p.C, p.R, p.steps, isa == cpu::Isa::amx,
                                           isa == cpu::Isa::avx512_bf16);
}

Problem checked(const Tensor& x, const Tensor& ux, const Tensor& uo, const Tensor& w, const Tensor& vx,
                const Tensor& vo, const std::optional<Tensor>& o0) {
  check(x.dim() == 6, "x: expected [N,K,C,L,H,W], got ", x.dim(), " dimensions");
  Problem p;
  p.dtype = dtype_of("x", x);
  p.scalar = x.scalar_type();
  p.state = state_dtype(p.scalar);
  p.N = x.size(0), p.K = x.size(1), p.C = x.size(2);
  for (int i = 0; i < 3; ++i) p.sizes[i] = x.size(3 + i);
  p.P = p.sizes[0] * p.sizes[1] * p.sizes[2];
  check(p.K > 0 && p.C > 0, "x: expected at least one clip and one channel, got ", x.sizes());
  check(ux.dim() == 2 && ux.size(0) > 0 && ux.size(0) % 2 == 0, "weight_ux: expected [2R,C], got ", ux.sizes());
  p.R = ux.size(0) / 2;
  const Tensor* given[weights] = {&ux, &uo, &w, &vx, &vo};
  const char* names[weights] = {"weight_ux", "weight_uo", "weight_w", "weight_vx", "weight_vo"};
  check_shape(names[0], ux, {2 * p.R, p.C}, "[2R,C]");
  check_shape(names[1], uo, {2 * p.R, p.C}, "[2R,C]");
  check_shape(names[2], w, {2, p.C, p.R}, "[2,C,R]");
  check_shape(names[3], vx, {p.C, p.C}, "[C,C]");
  check_shape(names[4], vo, {p.C, p.C}, "[C,C]");
  for (int i = 0; i < weights; ++i) {
    check_dtype(names[i], *given[i], p.scalar);
    check_device(names[i], *given[i], x, "x");
  }
  if (o0) {
    check_shape("o0", *o0, {p.N, p.C, p.sizes[0], p.sizes[1], p.sizes[2]}, "[N,C,L,H,W]");
    check_dtype("o0", *o0, p.scalar, p.state);
    check_device("o0", *o0, x, "x");
  }
  p.first = o0 ? 0 : 1;
  p.steps = p.K - p.first;
  p.innermost = x.stride(2) == 1;
  // From many channels on, CPU libraries are 5 to 18 % faster on [columns][features] for few columns: more than it
  // costs to reorder the sequences. For more columns both orders are alike; for very many, fp32 is 2 % faster that way.
  // Of very few weights only the gradients may be the library's products (of more threads than there are units of
  // columns for): as matrices of [columns][features] they and what is saved for them are 5 to 15 % faster, and the
  // gradients by columns read such matrices where they lie. Whoever makes a forward pass saves its gates in the order of
  // the backward pass, whatever the number of threads.
  const int64_t m = p.step_columns();
  const bool as_fp32 = p.dtype == DType::f32 || in_fp32(p, x);
  const bool few = m <= (as_fp32 ? 256 : 128), very_many = as_fp32 && m >= 1000;
  const bool many_channels = p.C >= 512 && (few || very_many);
  const bool by_themselves = as_fp32 && fast_gru::very_few_weights(p.C, p.R);
  p.by_column = p.innermost || (!x.is_cuda() && (many_channels || by_themselves));
#ifdef RCU_OPS_WITH_CUDA
  if (x.is_cuda() && p.columns() > 0) {
    p.by_blocks = columns_by_blocks(p, x, false);
    if (!p.by_blocks) p.persistent = one_launch(p, x, false);
    if (p.persistent) p.by_column = true;  // for both passes: gates are saved as matrices lie
  }
#endif
  return p;
}

Problem as_fp32(const Problem& p) {
  Problem wide = p;
  wide.dtype = DType::f32, wide.scalar = ScalarType::Float;
  return wide;
}

Weights split(const Tensor& ux, const Tensor& uo, const Tensor& w, const Tensor& vx, const Tensor& vo) {
  return {ux, uo, torch::stable::select(w, 0, 0), torch::stable::select(w, 0, 1), vx, vo};
}

}  // namespace rcu_ops::bindings::gru
