// Cases of fast_gru: op fast_gru_pass, with the fields of Elementwise; operand i is the tensor p<i> [rows,segments,length].
#include "case.h"
#include "cuda/fast_gru.h"

namespace {

using cuda_host::Case;

std::string run_pass(const Case& c, std::string&) {
  rcu_ops::fast_gru::Elementwise p;
  p.pass = static_cast<rcu_ops::fast_gru::Pass>(c.integer("pass"));
  p.dtype = static_cast<rcu_ops::DType>(c.integer("dtype"));
  p.rows = c.integer("rows");
  p.segments = c.integer("segments");
  p.length = c.integer("length");
  p.wide = c.integer("wide") != 0;
  for (int i = 0; i < rcu_ops::fast_gru::most_planes; ++i) {
    const std::string key = "p" + std::to_string(i);
    if (c.has(key)) p.plane[i] = {c.tensor(key), c.stride(key, 0), c.stride(key, 1)};
  }
  return rcu_ops::cuda::elementwise(p, nullptr);
}

const cuda_host::Registration pass("fast_gru_pass", run_pass);

}  // namespace
