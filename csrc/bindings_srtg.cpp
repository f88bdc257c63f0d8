// The data path of an SRTG block: its kernels as PyTorch operators (see bindings.h).
#include "bindings.h"
#include "common/srtg.h"
#ifdef RCU_OPS_WITH_CUDA
#include "cuda/srtg.h"
#endif

namespace rcu_ops::bindings {
namespace {

View view_of(const Tensor& tensor) {
  const Sizes s = tensor.strides();
  const DType dtype = dtype_of("tensor", tensor);
  return {.data = pointer(tensor), .dtype = dtype, .n = s[0], .c = s[1], .t = s[2], .h = s[3], .w = s[4]};
}

GateData problem_of(GatePass pass, const Tensor& x) {
  check(x.dim() == 5, "x: expected [N,C,T,H,W], got ", x.dim(), " dimensions");
  GateData p;
  p.pass = pass;
  p.dtype = dtype_of("x", x);
  p.N = x.size(0), p.C = x.size(1), p.T = x.size(2), p.H = x.size(3), p.W = x.size(4);
  p.x = view_of(x);
  return p;
}

// The contiguous h that the problem points to.
Tensor take_h(GateData& p, const Tensor& x, const Tensor& h, const std::optional<Tensor>& gate) {
  check_shape("h", h, {p.N, p.T, p.C}, "[N,T,C]");
  check_dtype("h", h, state_dtype(x.scalar_type()));
  check_device("h", h, x, "x");
  if (gate) {
    check_shape("gate", *gate, {p.N}, "[N]");
    check_dtype("gate", *gate, ScalarType::Bool);
    check_device("gate", *gate, x, "x");
    p.gate = static_cast<const uint8_t*>(pointer(*gate));
    p.gate_stride = gate->stride(0);
  }
  Tensor contiguous = contiguous_of(h);
  p.h = pointer(contiguous);
  return contiguous;
}

void launch(const GateData& problem, [[maybe_unused]] const Tensor& like) {
#ifdef RCU_OPS_WITH_CUDA
  if (like.is_cuda()) return launch_on_gpu(problem, like, cuda::gate_scratch, cuda::gate_data_path);
#endif
  cpu::gate_data_path(problem, cpu_threads());
}

Tensor srtg_squeeze(Tensor x) {
  GateData p = problem_of(GatePass::squeeze, x);
  check(p.C > 0 && p.H * p.W > 0, "x: expected at least one channel and one position, got ", x.sizes());
  const std::array<int64_t, 3> sizes{p.N, p.T, p.C};
  Tensor mean = empty_of(x, Sizes(sizes.data(), 3), state_dtype(x.scalar_type()));
  p.sums = pointer(mean);
  launch(p, x);
  return mean;
}

Tensor srtg_fuse(Tensor x, Tensor h, std::optional<Tensor> gate, bool add) {
  GateData p = problem_of(add ? GatePass::add : GatePass::mul, x);
  const Tensor kept = take_h(p, x, h, gate);
  Tensor y = empty_as(x);
  p.y = view_of(y);
  launch(p, x);
  return y;
}

std::tuple<Tensor, Tensor> srtg_fuse_backward(Tensor grad, Tensor x, Tensor h, std::optional<Tensor> gate) {
  GateData p = problem_of(GatePass::backward, x);
  check_shape("grad", grad, {p.N, p.C, p.T, p.H, p.W}, "of x");
  check_dtype("grad", grad, x.scalar_type());
  check_device("grad", grad, x, "x");
  const Tensor kept = take_h(p, x, h, gate);
  p.grad = view_of(grad);
  Tensor dx = empty_as(x), dh = empty_of(h, {p.N, p.T, p.C});
  p.y = view_of(dx);
  p.sums = pointer(dh);
  launch(p, x);
  return {dx, dh};
}

}  // namespace
}  // namespace rcu_ops::bindings

#define RCU_OPS_SRTG_KERNELS(m)                                        \
  m.impl("srtg_squeeze", TORCH_BOX(&rcu_ops::bindings::srtg_squeeze)); \
  m.impl("srtg_fuse", TORCH_BOX(&rcu_ops::bindings::srtg_fuse));       \
  m.impl("srtg_fuse_backward", TORCH_BOX(&rcu_ops::bindings::srtg_fuse_backward))

STABLE_TORCH_LIBRARY_IMPL(rcu_ops, CPU, m) { RCU_OPS_SRTG_KERNELS(m); }

#ifdef RCU_OPS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(rcu_ops, CUDA, m) { RCU_OPS_SRTG_KERNELS(m); }
#endif
