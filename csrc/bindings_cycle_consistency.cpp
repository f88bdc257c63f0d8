// cycle_consistency: its kernels as PyTorch operators (see bindings.h).
#include "bindings.h"
#include "common/cycle_consistency.h"
#ifdef RCU_OPS_WITH_CUDA
#include "cuda/cycle_consistency.h"
#endif

namespace rcu_ops::bindings {
namespace {

Sequence sequence_of(const Tensor& tensor) {
  const Sizes s = tensor.strides();
  return {.data = pointer(tensor), .n = s[0], .t = s[1], .c = s[2]};
}

FrameMask mask_of(const char* name, const std::optional<Tensor>& mask, const Tensor& like, int64_t frames) {
  if (!mask) return {};
  check_shape(name, *mask, {like.size(0), frames}, "[N, frames]");
  check_dtype(name, *mask, ScalarType::Bool);
  check_device(name, *mask, like, "a");
  return {.data = static_cast<const uint8_t*>(pointer(*mask)), .n = mask->stride(0), .t = mask->stride(1)};
}

Alignment problem_of(Align kind, const Tensor& a, const Tensor& b, const std::optional<Tensor>& mask_a,
                     const std::optional<Tensor>& mask_b, double temperature) {
  check(a.dim() == 3, "a: expected [N,T,C], got ", a.dim(), " dimensions");
  Alignment p;
  p.kind = kind;
  p.dtype = dtype_of("a", a);
  p.N = a.size(0), p.T = a.size(1), p.C = a.size(2);
  check(b.dim() == 3, "b: expected [N,S,C], got ", b.dim(), " dimensions");
  p.S = b.size(1);
  check(p.T > 0 && p.S > 0 && p.C > 0, "a, b: expected at least one frame and one channel, got ", a.sizes(), " and ",
        b.sizes());
  check_shape("b", b, {p.N, p.S, p.C}, "[N,S,C]");
  check_dtype("b", b, a.scalar_type());
  check_device("b", b, a, "a");
  check(temperature > 0, "temperature: expected a number > 0, got ", temperature);
  p.temperature = temperature;
  p.a = sequence_of(a), p.b = sequence_of(b);
  p.mask_a = mask_of("mask_a", mask_a, a, p.T);
  p.mask_b = mask_of("mask_b", mask_b, a, p.S);
  return p;
}

void launch(const Alignment& problem, [[maybe_unused]] const Tensor& like) {
#ifdef RCU_OPS_WITH_CUDA
  if (like.is_cuda()) return launch_on_gpu(problem, like, cuda::align_scratch, cuda::align);
#endif
  cpu::align(problem, cpu_threads());
}

std::tuple<Tensor, Tensor> soft_nearest_neighbor(Tensor a, Tensor b, std::optional<Tensor> mask_b, double temperature,
                                                 bool need_index) {
  Alignment p = problem_of(Align::soft, a, b, std::nullopt, mask_b, temperature);
  Tensor soft = empty_of(a, {p.N, p.T, p.C}), index = empty_of(a, {p.N, need_index ? p.T : 0}, ScalarType::Long);
  p.soft = pointer(soft);
  p.index_ab = need_index ? static_cast<int64_t*>(pointer(index)) : nullptr;
  launch(p, a);
  return {soft, index};
}

std::tuple<Tensor, Tensor> soft_nearest_neighbor_backward(Tensor grad_soft, Tensor a, Tensor b,
                                                          std::optional<Tensor> mask_b, double temperature) {
  Alignment p = problem_of(Align::soft_backward, a, b, std::nullopt, mask_b, temperature);
  check_shape("grad_soft", grad_soft, {p.N, p.T, p.C}, "[N,T,C]");
  check_dtype("grad_soft", grad_soft, a.scalar_type());
  check_device("grad_soft", grad_soft, a, "a");
  p.grad = sequence_of(grad_soft);
  Tensor da = empty_of(a, {p.N, p.T, p.C}), db = empty_of(b, {p.N, p.S, p.C});
  p.da = pointer(da), p.db = pointer(db);
  launch(p, a);
  return {da, db};
}

std::tuple<Tensor, Tensor, Tensor> cycle_consistency(Tensor a, Tensor b, std::optional<Tensor> mask_a,
                                                     std::optional<Tensor> mask_b, double temperature) {
  Alignment p = problem_of(Align::cycle, a, b, mask_a, mask_b, temperature);
  Tensor gate = empty_of(a, {p.N}, ScalarType::Bool);
  Tensor index_ab = empty_of(a, {p.N, p.T}, ScalarType::Long), index_ba = empty_of(a, {p.N, p.S}, ScalarType::Long);
  p.gate = static_cast<uint8_t*>(pointer(gate));
  p.index_ab = static_cast<int64_t*>(pointer(index_ab)), p.index_ba = static_cast<int64_t*>(pointer(index_ba));
  launch(p, a);
  return {gate, index_ab, index_ba};
}

std::tuple<Tensor, Tensor, Tensor> cycle_back(Tensor soft, Tensor a, std::optional<Tensor> mask_a, double temperature) {
  Alignment p = problem_of(Align::back, soft, a, mask_a, mask_a, temperature);
  check(p.T == p.S, "a: expected as many frames as soft, got ", p.S, " and ", p.T);
  const ScalarType state = state_dtype(a.scalar_type());
  Tensor log_probability = empty_of(a, {p.N, p.T}, state), mean = empty_of(a, {p.N, p.T}, state),
         variance = empty_of(a, {p.N, p.T}, state);
  p.log_probability = pointer(log_probability), p.mean = pointer(mean), p.variance = pointer(variance);
  launch(p, a);
  return {log_probability, mean, variance};
}

std::tuple<Tensor, Tensor> cycle_back_backward(Tensor grad_log_probability, Tensor grad_mean, Tensor grad_variance,
                                               Tensor soft, Tensor a, std::optional<Tensor> mask_a,
                                               double temperature) {
  Alignment p = problem_of(Align::back_backward, soft, a, mask_a, mask_a, temperature);
  check(p.T == p.S, "a: expected as many frames as soft, got ", p.S, " and ", p.T);
  const Tensor* given[3] = {&grad_log_probability, &grad_mean, &grad_variance};
  const char* names[3] = {"grad_log_probability", "grad_mean", "grad_variance"};
  const void** taken[3] = {&p.grad_log_probability, &p.grad_mean, &p.grad_variance};
  Tensor contiguous[3];
  for (int i = 0; i < 3; ++i) {
    check_shape(names[i], *given[i], {p.N, p.T}, "[N,T]");
    check_dtype(names[i], *given[i], state_dtype(a.scalar_type()));
    check_device(names[i], *given[i], a, "a");
    contiguous[i] = contiguous_of(*given[i]);
    *taken[i] = pointer(contiguous[i]);
  }
  Tensor d_soft = empty_of(soft, {p.N, p.T, p.C}), da = empty_of(a, {p.N, p.S, p.C});
  p.da = pointer(d_soft), p.db = pointer(da);
  launch(p, a);
  return {d_soft, da};
}

Alignment loss_problem(Align kind, const Tensor& a, const Tensor& b, const std::optional<Tensor>& mask_a,
                       const std::optional<Tensor>& mask_b, double temperature, bool regression, double variance_weight,
                       double min_variance) {
  Alignment p = problem_of(kind, a, b, mask_a, mask_b, temperature);
  check_dtype("a", a, ScalarType::Float, ScalarType::Double);
  p.regression = regression, p.variance_weight = variance_weight, p.min_variance = min_variance;
  return p;
}

std::tuple<Tensor, Tensor> temporal_cycle_loss(Tensor a, Tensor b, std::optional<Tensor> mask_a,
                                               std::optional<Tensor> mask_b, double temperature, bool regression,
                                               double variance_weight, double min_variance) {
  Alignment p = loss_problem(Align::loss, a, b, mask_a, mask_b, temperature, regression, variance_weight, min_variance);
  Tensor loss = empty_of(a, {p.N, p.T}), soft = empty_of(a, {p.N, p.T, p.C});
  p.loss = pointer(loss), p.soft = pointer(soft);
  launch(p, a);
  return {loss, soft};
}

std::tuple<Tensor, Tensor, Tensor> temporal_cycle_loss_kept(Tensor a, Tensor b, std::optional<Tensor> mask_a,
                                                            std::optional<Tensor> mask_b, double temperature,
                                                            bool regression, double variance_weight,
                                                            double min_variance) {
  Alignment p = loss_problem(Align::loss, a, b, mask_a, mask_b, temperature, regression, variance_weight, min_variance);
  Tensor loss = empty_of(a, {p.N, p.T}), soft = empty_of(a, {p.N, p.T, p.C});
  Tensor distances = empty_of(a, {p.N, p.T, p.S + p.T});
  p.loss = pointer(loss), p.soft = pointer(soft);
  p.distances = pointer(distances), p.distances_pitch = p.S + p.T;
  launch(p, a);
  return {loss, soft, distances};
}

// From p, which has its gradients.
std::tuple<Tensor, Tensor> loss_gradients(Alignment p, const Tensor& a, const Tensor& b, const Tensor& soft,
                                          const std::optional<Tensor>& distances) {
  check_shape("soft", soft, {p.N, p.T, p.C}, "[N,T,C]");
  check_dtype("soft", soft, a.scalar_type());
  check_device("soft", soft, a, "a");
  const Tensor neighbors = contiguous_of(soft);
  p.soft = pointer(neighbors);
  Tensor da = empty_of(a, {p.N, p.T, p.C}), db = empty_of(b, {p.N, p.S, p.C});
  p.da = pointer(da), p.db = pointer(db);
  std::optional<Tensor> d_soft;
  if (a.is_cuda() || distances || plan_alignment(p) != AlignForm::within)
    p.d_soft = pointer(d_soft.emplace(empty_of(a, {p.N, p.T, p.C})));
  std::optional<Tensor> kept;
  if (distances) {
    check_shape("distances", *distances, {p.N, p.T, p.S + p.T}, "[N,T,S+T]");
    check_dtype("distances", *distances, a.scalar_type());
    check_device("distances", *distances, a, "a");
    p.distances = pointer(kept.emplace(contiguous_of(*distances))), p.distances_pitch = p.S + p.T;
  }
  launch(p, a);
  return {da, db};
}

void take_gradients(Alignment& p, const Tensor& a, const Tensor& grad_loss) {
  check_shape("grad_loss", grad_loss, {p.N, p.T}, "[N,T]");
  check_dtype("grad_loss", grad_loss, a.scalar_type());
  check_device("grad_loss", grad_loss, a, "a");
  p.grad_loss = pointer(grad_loss), p.grad_loss_n = grad_loss.stride(0), p.grad_loss_t = grad_loss.stride(1);
}

std::tuple<Tensor, Tensor> temporal_cycle_loss_backward(Tensor grad_loss, Tensor a, Tensor b, Tensor soft,
                                                        std::optional<Tensor> mask_a, std::optional<Tensor> mask_b,
                                                        double temperature, bool regression, double variance_weight,
                                                        double min_variance) {
  Alignment p =
      loss_problem(Align::loss_backward, a, b, mask_a, mask_b, temperature, regression, variance_weight, min_variance);
  take_gradients(p, a, grad_loss);
  return loss_gradients(p, a, b, soft, std::nullopt);
}

// Of frames that are there, and have frames of b to go through.
int64_t frames_with_loss(const Alignment& p) {
  if (!p.mask_a.data && !p.mask_b.data) return p.N * p.T;
  int64_t all = 0;
  for (int64_t n = 0; n < p.N; ++n)
    if (p.mask_b.any(n, p.S))
      for (int64_t t = 0; t < p.T; ++t) all += p.mask_a.there(n, t);
  return all;
}

// On the CPU, with its gradients for a gradient of 1.
std::tuple<Tensor, Tensor, Tensor> temporal_cycle_loss_mean(Tensor a, Tensor b, std::optional<Tensor> mask_a,
                                                            std::optional<Tensor> mask_b, double temperature,
                                                            bool regression, double variance_weight,
                                                            double min_variance) {
  Alignment p = loss_problem(Align::loss, a, b, mask_a, mask_b, temperature, regression, variance_weight, min_variance);
  const auto frames = static_cast<double>(frames_with_loss(p));
  Tensor loss = empty_of(a, {p.N, p.T}), mean = empty_of(a, {}), da, db;
  p.loss = pointer(loss);
  // Every frame's gradient: one number, at strides of 0.
  const double wide = 1 / frames;
  const auto narrow = static_cast<float>(wide);
  p.grad_loss = p.dtype == DType::f64 ? static_cast<const void*>(&wide) : &narrow;
  if (plan_alignment(p) == AlignForm::within) {
    da = empty_of(a, {p.N, p.T, p.C}), db = empty_of(b, {p.N, p.S, p.C});
    p.da = pointer(da), p.db = pointer(db);
    launch(p, a);
  } else {
    const Tensor soft = empty_of(a, {p.N, p.T, p.C});
    p.soft = pointer(soft);
    launch(p, a);
    p.kind = Align::loss_backward;
    std::tie(da, db) = loss_gradients(p, a, b, soft, std::nullopt);
  }
  const auto add_up = [&]<class S>(S* to) {
    double sum = 0;
    for (int64_t i = 0; i < p.N * p.T; ++i) sum += static_cast<const S*>(p.loss)[i];
    *to = static_cast<S>(sum / frames);
  };
  p.dtype == DType::f64 ? add_up(static_cast<double*>(pointer(mean))) : add_up(static_cast<float*>(pointer(mean)));
  return {mean, da, db};
}

std::tuple<Tensor, Tensor> temporal_cycle_loss_mean_backward(Tensor grad_mean, Tensor a, Tensor b, Tensor da, Tensor db,
                                                             std::optional<Tensor> mask_a, std::optional<Tensor> mask_b,
                                                             double temperature, bool regression,
                                                             double variance_weight, double min_variance) {
  Alignment p =
      loss_problem(Align::loss_backward, a, b, mask_a, mask_b, temperature, regression, variance_weight, min_variance);
  check_shape("grad_mean", grad_mean, {}, "[]");
  check_shape("da", da, {p.N, p.T, p.C}, "[N,T,C]");
  check_shape("db", db, {p.N, p.S, p.C}, "[N,S,C]");
  const Tensor* given[3] = {&grad_mean, &da, &db};
  const char* names[3] = {"grad_mean", "da", "db"};
  for (int i = 0; i < 3; ++i)
    check_dtype(names[i], *given[i], a.scalar_type()), check_device(names[i], *given[i], a, "a");
  const double factor = p.dtype == DType::f64 ? *static_cast<const double*>(pointer(grad_mean))
                                              : *static_cast<const float*>(pointer(grad_mean));
  const Tensor of_a = contiguous_of(da), of_b = contiguous_of(db);
  Tensor to_a = empty_of(a, {p.N, p.T, p.C}), to_b = empty_of(b, {p.N, p.S, p.C});
  p.da = pointer(to_a), p.db = pointer(to_b);
  cpu::scale_gradients(p, pointer(of_a), pointer(of_b), factor, cpu_threads());
  return {to_a, to_b};
}

std::tuple<Tensor, Tensor> temporal_cycle_loss_kept_backward(Tensor grad_loss, Tensor a, Tensor b, Tensor soft,
                                                             Tensor distances, std::optional<Tensor> mask_a,
                                                             std::optional<Tensor> mask_b, double temperature,
                                                             bool regression, double variance_weight,
                                                             double min_variance) {
  Alignment p =
      loss_problem(Align::loss_backward, a, b, mask_a, mask_b, temperature, regression, variance_weight, min_variance);
  take_gradients(p, a, grad_loss);
  return loss_gradients(p, a, b, soft, distances);
}

}  // namespace
}  // namespace rcu_ops::bindings

#define RCU_OPS_CYCLE_CONSISTENCY_KERNELS(m)                                                               \
  m.impl("soft_nearest_neighbor", TORCH_BOX(&rcu_ops::bindings::soft_nearest_neighbor));                   \
  m.impl("soft_nearest_neighbor_backward", TORCH_BOX(&rcu_ops::bindings::soft_nearest_neighbor_backward)); \
  m.impl("cycle_consistency", TORCH_BOX(&rcu_ops::bindings::cycle_consistency));                           \
  m.impl("cycle_back", TORCH_BOX(&rcu_ops::bindings::cycle_back));                                         \
  m.impl("cycle_back_backward", TORCH_BOX(&rcu_ops::bindings::cycle_back_backward));                       \
  m.impl("temporal_cycle_loss", TORCH_BOX(&rcu_ops::bindings::temporal_cycle_loss));                       \
  m.impl("temporal_cycle_loss_backward", TORCH_BOX(&rcu_ops::bindings::temporal_cycle_loss_backward))

STABLE_TORCH_LIBRARY_IMPL(rcu_ops, CPU, m) {
  RCU_OPS_CYCLE_CONSISTENCY_KERNELS(m);
  m.impl("temporal_cycle_loss_mean", TORCH_BOX(&rcu_ops::bindings::temporal_cycle_loss_mean));
  m.impl("temporal_cycle_loss_mean_backward", TORCH_BOX(&rcu_ops::bindings::temporal_cycle_loss_mean_backward));
  m.impl("temporal_cycle_loss_kept", TORCH_BOX(&rcu_ops::bindings::temporal_cycle_loss_kept));
  m.impl("temporal_cycle_loss_kept_backward", TORCH_BOX(&rcu_ops::bindings::temporal_cycle_loss_kept_backward));
}

#ifdef RCU_OPS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(rcu_ops, CUDA, m) { RCU_OPS_CYCLE_CONSISTENCY_KERNELS(m); }
#endif
