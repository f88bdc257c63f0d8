// Cases of recurrent_conv_batch_norm: op norm, with the fields of Norm.
#include "case.h"
#include "cuda/recurrent_conv_batch_norm.h"

namespace {

using cuda_host::Case;

rcu_ops::View view(const Case& c, const char* key) {
  rcu_ops::View v;
  v.data = c.tensor(key);
  if (!v.data) return v;
  v.dtype = c.dtype(key);
  v.n = c.stride(key, 0), v.c = c.stride(key, 1), v.t = c.stride(key, 2), v.h = c.stride(key, 3),
  v.w = c.stride(key, 4);
  return v;
}

std::string run_norm(const Case& c, std::string&) {
  rcu_ops::Norm p;
  p.pass = static_cast<rcu_ops::NormPass>(c.integer("pass"));
  p.N = c.integer("N"), p.C = c.integer("C"), p.T = c.integer("T"), p.H = c.integer("H"), p.W = c.integer("W");
  p.dtype = static_cast<rcu_ops::DType>(c.integer("dtype"));
  p.h = view(c, "h"), p.other = view(c, "other"), p.y = view(c, "y"), p.out = view(c, "out");
  p.moments = c.tensor("moments"), p.gamma = c.tensor("gamma"), p.beta = c.tensor("beta"), p.sums = c.tensor("sums");
  p.result = c.tensor("result");
  p.eps = c.number("eps");
  p.relu = c.integer("relu") != 0;
  return cuda_host::with_scratch(rcu_ops::cuda::batch_norm_scratch(p),
                                 [&](void* scratch) { return rcu_ops::cuda::batch_norm(p, scratch, nullptr); });
}

// From what a scan has left of the statistics; columns: of a part.
std::string run_finish(const Case& c, std::string&) {
  rcu_ops::Norm p;
  p.N = c.integer("N"), p.C = c.integer("C"), p.T = c.integer("T"), p.H = c.integer("H"), p.W = c.integer("W");
  p.dtype = static_cast<rcu_ops::DType>(c.integer("dtype"));
  p.result = c.tensor("result");
  return rcu_ops::cuda::finish_moments(p, c.integer("columns"), static_cast<const double*>(c.tensor("partial")),
                                       nullptr)
      .c_str();
}

const cuda_host::Registration norm("norm", run_norm), finish("norm_finish", run_finish);

}  // namespace
