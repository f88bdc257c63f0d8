// recurrent_conv_batch_norm: its kernels as PyTorch operators (see bindings.h).
#include "bindings_recurrent_conv.h"
#include "common/recurrent_conv_batch_norm.h"
#ifdef RCU_OPS_WITH_CUDA
#include "cuda/recurrent_conv_batch_norm.h"
#endif

namespace rcu_ops::bindings {
namespace {

void launch(const Norm& problem, [[maybe_unused]] const Tensor& like) {
#ifdef RCU_OPS_WITH_CUDA
  if (like.is_cuda()) return launch_on_gpu(problem, like, cuda::batch_norm_scratch, cuda::batch_norm);
#endif
  cpu::batch_norm(problem, cpu_threads());
}

Norm problem_of(NormPass pass, const Tensor& h) {
  check(h.dim() == 5, "h: expected [N,C,T,H,W], got ", h.dim(), " dimensions");
  Norm p;
  p.pass = pass;
  p.dtype = dtype_of("h", h);
  p.N = h.size(0), p.C = h.size(1), p.T = h.size(2), p.H = h.size(3), p.W = h.size(4);
  p.h = sequence_view(h);
  return p;
}

View view_like(const char* name, const Tensor& tensor, const Tensor& h) {
  const Sizes s = h.sizes();
  check_shape(name, tensor, {s[0], s[1], s[2], s[3], s[4]}, "of h");
  check_dtype(name, tensor, h.scalar_type());
  check_device(name, tensor, h, "h");
  return sequence_view(tensor);
}

// A table of numbers per channel in the arithmetic's type, contiguous; keeps what it points to.
class Table {
 public:
  Table(const char* name, const Tensor& given, std::initializer_list<int64_t> sizes, const Tensor& h) {
    check_shape(name, given, sizes, "of the channels");
    check_dtype(name, given, state_dtype(h.scalar_type()));
    check_device(name, given, h, "h");
    tensor_ = contiguous_of(given);
  }
  const void* data() const { return pointer(tensor_); }

 private:
  Tensor tensor_;
};

struct Parameters {
  std::optional<Table> moments, gamma, beta;
};

Parameters set_parameters(Norm& p, const Tensor& h, const Tensor& moments, const std::optional<Tensor>& gamma,
                          const std::optional<Tensor>& beta, double eps, bool relu) {
  Parameters kept;
  kept.moments.emplace("moments", moments, std::initializer_list<int64_t>{3, p.C}, h);
  p.moments = kept.moments->data();
  if (gamma) kept.gamma.emplace("gamma", *gamma, std::initializer_list<int64_t>{p.C}, h), p.gamma = kept.gamma->data();
  if (beta) kept.beta.emplace("beta", *beta, std::initializer_list<int64_t>{p.C}, h), p.beta = kept.beta->data();
  p.eps = eps;
  p.relu = relu;
  return kept;
}

Tensor table_of(const Tensor& h, int64_t rows) { return empty_of(h, {rows, h.size(1)}, state_dtype(h.scalar_type())); }

std::tuple<Tensor, Tensor, Tensor> moments(Tensor x, Tensor weight, std::optional<Tensor> h0, bool mean) {
  std::optional<Tensor> partial;
  int64_t columns = 0;
  auto [h, h_n] = recurrent_conv_with_statistics(x, weight, h0, mean, partial, columns);
  Norm p = problem_of(NormPass::moments, h);
  Tensor result = table_of(h, 3);
  p.result = pointer(result);
#ifdef RCU_OPS_WITH_CUDA
  if (columns) {
    launch_on_gpu(
        p, h, [](const Norm&) { return cuda::Scratch{}; },
        [&](const Norm& q, void*, CUstream_st* stream) {
          return cuda::finish_moments(q, columns, static_cast<const double*>(pointer(*partial)), stream);
        });
    return {h, h_n, result};
  }
#endif
  launch(p, h);
  return {h, h_n, result};
}

Tensor normalize(Tensor h, Tensor moments, std::optional<Tensor> gamma, std::optional<Tensor> beta,
                 std::optional<Tensor> residual, double eps, bool relu) {
  Norm p = problem_of(NormPass::normalize, h);
  const Parameters kept = set_parameters(p, h, moments, gamma, beta, eps, relu);
  if (residual) p.other = view_like("residual", *residual, h);
  Tensor y = empty_as(h);
  p.y = sequence_view(y);
  launch(p, h);
  return y;
}

std::tuple<Tensor, Tensor> normalize_sums(Tensor grad_y, Tensor h, std::optional<Tensor> y, Tensor moments,
                                          std::optional<Tensor> gamma, std::optional<Tensor> beta, double eps,
                                          bool relu) {
  Norm p = problem_of(NormPass::sums, h);
  const Parameters kept = set_parameters(p, h, moments, gamma, beta, eps, relu);
  p.other = view_like("grad_y", grad_y, h);
  Tensor sums = table_of(h, 2), dz = y ? empty_as(h) : empty_of(h, {0});
  if (y) p.y = view_like("y", *y, h), p.out = sequence_view(dz);
  p.result = pointer(sums);
  launch(p, h);
  return {sums, dz};
}

std::tuple<Tensor, Tensor, Tensor> normalize_backward(Tensor dz, std::optional<Tensor> grad_h_n, Tensor h,
                                                      Tensor weight, std::optional<Tensor> h0, Tensor moments,
                                                      Tensor sums, std::optional<Tensor> gamma,
                                                      std::optional<Tensor> beta, double eps, bool relu, bool mean,
                                                      bool need_weight_grad) {
  Norm p = problem_of(NormPass::gradient, h);
  const Parameters kept = set_parameters(p, h, moments, gamma, beta, eps, relu);
  const Table given("sums", sums, {2, p.C}, h);
  p.sums = given.data();
  p.other = view_like("dz", dz, h);
#ifdef RCU_OPS_WITH_CUDA
  if (dz.is_cuda() && p.dtype != DType::f64) {  // the scan may take the gradient of h on its way in
    const auto table = [](const void* data) { return static_cast<const float*>(data); };
    const ScanNorm norm{.moments = table(p.moments),
                        .gamma = table(p.gamma),
                        .beta = table(p.beta),
                        .sums = table(p.sums),
                        .eps = static_cast<float>(eps),
                        .relu = relu};
    if (auto found = recurrent_conv_backward_of_norm(dz, grad_h_n, h, weight, h0, mean, need_weight_grad, norm))
      return *found;
  }
#endif
  Tensor grad_h = empty_as(h);
  p.out = sequence_view(grad_h);
  launch(p, h);
  return recurrent_conv_backward_over(grad_h, grad_h_n, h, weight, h0, mean, need_weight_grad);
}

}  // namespace
}  // namespace rcu_ops::bindings

STABLE_TORCH_LIBRARY_IMPL(rcu_ops, CPU, m) {
  m.impl("recurrent_conv_moments", TORCH_BOX(&rcu_ops::bindings::moments));
  m.impl("recurrent_conv_normalize", TORCH_BOX(&rcu_ops::bindings::normalize));
  m.impl("recurrent_conv_normalize_sums", TORCH_BOX(&rcu_ops::bindings::normalize_sums));
  m.impl("recurrent_conv_normalize_backward", TORCH_BOX(&rcu_ops::bindings::normalize_backward));
}

#ifdef RCU_OPS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(rcu_ops, CUDA, m) {
  m.impl("recurrent_conv_moments", TORCH_BOX(&rcu_ops::bindings::moments));
  m.impl("recurrent_conv_normalize", TORCH_BOX(&rcu_ops::bindings::normalize));
  m.impl("recurrent_conv_normalize_sums", TORCH_BOX(&rcu_ops::bindings::normalize_sums));
  m.impl("recurrent_conv_normalize_backward", TORCH_BOX(&rcu_ops::bindings::normalize_backward));
}
#endif
