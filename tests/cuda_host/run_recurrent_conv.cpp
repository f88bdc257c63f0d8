// Cases of recurrent_conv: op scan and op weight_grad (both: kernel, a number of Kernel), with the fields of Scan and
// WeightGrad, and op weight_grad_parts, of as many `parts` of sums.
#include "case.h"
#include "cuda/recurrent_conv.h"

namespace {

using cuda_host::Case;
using cuda_host::with_scratch;
using rcu_ops::View;

View view(const Case& c, const char* key) {
  View v;
  v.data = c.tensor(key);
  if (!v.data) return v;
  v.dtype = c.dtype(key);
  v.n = c.stride(key, 0);
  v.c = c.stride(key, 1);
  v.t = c.stride(key, 2);
  v.h = c.stride(key, 3);
  v.w = c.stride(key, 4);
  return v;
}

template <typename Problem>
void shape(const Case& c, Problem& p) {
  p.N = c.integer("N");
  p.C = c.integer("C");
  p.T = c.integer("T");
  p.H = c.integer("H");
  p.W = c.integer("W");
  p.dtype = static_cast<rcu_ops::DType>(c.integer("dtype"));
  p.reverse = c.integer("reverse") != 0;
}

std::string run_scan(const Case& c, std::string& plan) {
  rcu_ops::Scan p;
  shape(c, p);
  p.x = view(c, "x");
  p.y = view(c, "y");
  p.residual = view(c, "residual");
  p.first = view(c, "first");
  p.last = view(c, "last");
  p.weight = c.tensor("weight");
  p.weight_out = c.stride("weight", 0);
  p.weight_in = c.stride("weight", 1);
  p.scale = c.tensor("scale");
  p.shift = c.tensor("shift");
  p.relu = c.integer("relu") != 0;
  p.init = static_cast<rcu_ops::Init>(c.integer("init"));
  p.last_kind = static_cast<rcu_ops::Last>(c.integer("last_kind"));
  p.alpha = c.number("alpha");
  p.alpha_first = c.number("alpha_first");
  p.alpha_final = c.number("alpha_final");
  p.norm.partial = static_cast<double*>(c.tensor("partial"));
  const auto table = [&](const char* key) { return static_cast<const float*>(c.tensor(key)); };
  p.norm.moments = table("moments"), p.norm.gamma = table("gamma"), p.norm.beta = table("beta"),
  p.norm.sums = table("sums");
  if (p.norm.moments) p.norm.eps = static_cast<float>(c.number("eps")), p.norm.relu = p.relu;
  p.weight_grad.partial = static_cast<float*>(c.tensor("weight_partial"));
  p.weight_grad.first = view(c, "weight_first");
  const auto kernel = static_cast<rcu_ops::cuda::Kernel>(c.integer("kernel"));
  plan = rcu_ops::cuda::describe_scan(p, kernel).c_str();
  return with_scratch(rcu_ops::cuda::scan_scratch(p, kernel),
                      [&](void* scratch) { return rcu_ops::cuda::scan(p, scratch, nullptr, kernel); });
}

std::string run_weight_grad(const Case& c, std::string& plan) {
  rcu_ops::WeightGrad p;
  shape(c, p);
  p.dx = view(c, "dx");
  p.h = view(c, "h");
  p.first = view(c, "first");
  p.dweight = c.tensor("dweight");
  const auto kernel = static_cast<rcu_ops::cuda::Kernel>(c.integer("kernel"));
  plan = rcu_ops::cuda::describe_weight_grad(p, kernel).c_str();
  return with_scratch(rcu_ops::cuda::weight_grad_scratch(p, kernel),
                      [&](void* scratch) { return rcu_ops::cuda::weight_grad(p, scratch, nullptr, kernel); });
}

std::string run_weight_grad_parts(const Case& c, std::string&) {
  rcu_ops::WeightGrad p;
  shape(c, p);
  p.dweight = c.tensor("dweight");
  const auto* partial = static_cast<const float*>(c.tensor("weight_partial"));
  return rcu_ops::cuda::add_weight_grad_parts(p, partial, c.integer("parts"), nullptr).c_str();
}

const cuda_host::Registration scan("scan", run_scan), weight_grad("weight_grad", run_weight_grad),
    weight_grad_parts("weight_grad_parts", run_weight_grad_parts);

}  // namespace
