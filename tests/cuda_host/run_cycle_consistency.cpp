// Cases of cycle_consistency and srtg: op align, with the fields of Alignment, and op gate_data, with those of
// GateData.
#include "case.h"
#include "cuda/cycle_consistency.h"
#include "cuda/srtg.h"

namespace {

using cuda_host::Case;
using cuda_host::with_scratch;

rcu_ops::Sequence sequence(const Case& c, const char* key) {
  if (!c.has(key)) return {};
  return {.data = c.tensor(key), .n = c.stride(key, 0), .t = c.stride(key, 1), .c = c.stride(key, 2)};
}

rcu_ops::FrameMask mask(const Case& c, const char* key) {
  if (!c.has(key)) return {};
  return {.data = static_cast<const uint8_t*>(c.tensor(key)), .n = c.stride(key, 0), .t = c.stride(key, 1)};
}

std::string run_align(const Case& c, std::string&) {
  rcu_ops::Alignment p;
  p.kind = static_cast<rcu_ops::Align>(c.integer("kind"));
  p.N = c.integer("N"), p.T = c.integer("T"), p.S = c.integer("S"), p.C = c.integer("C");
  p.dtype = static_cast<rcu_ops::DType>(c.integer("dtype"));
  p.temperature = c.number("temperature");
  p.a = sequence(c, "a"), p.b = sequence(c, "b"), p.grad = sequence(c, "grad");
  p.mask_a = mask(c, "mask_a"), p.mask_b = mask(c, "mask_b");
  p.grad_log_probability = c.tensor("grad_log_probability");
  p.grad_mean = c.tensor("grad_mean"), p.grad_variance = c.tensor("grad_variance");
  p.log_probability = c.tensor("log_probability"), p.mean = c.tensor("mean"), p.variance = c.tensor("variance");
  p.soft = c.tensor("soft"), p.da = c.tensor("da"), p.db = c.tensor("db");
  p.index_ab = static_cast<int64_t*>(c.tensor("index_ab")), p.index_ba = static_cast<int64_t*>(c.tensor("index_ba"));
  p.gate = static_cast<uint8_t*>(c.tensor("gate"));
  p.loss = c.tensor("loss"), p.grad_loss = c.tensor("grad_loss"), p.d_soft = c.tensor("d_soft");
  if (p.grad_loss) p.grad_loss_n = c.stride("grad_loss", 0), p.grad_loss_t = c.stride("grad_loss", 1);
  if (p.kind == rcu_ops::Align::loss || p.kind == rcu_ops::Align::loss_backward)
    p.regression = c.integer("regression"), p.variance_weight = c.number("variance_weight"),
    p.min_variance = c.number("min_variance");
  if (c.has("most_by_differences")) p.most_by_differences = c.integer("most_by_differences");
  return with_scratch(rcu_ops::cuda::align_scratch(p),
                      [&](void* scratch) { return rcu_ops::cuda::align(p, scratch, nullptr); });
}

rcu_ops::View view(const Case& c, const char* key) {
  rcu_ops::View v;
  v.data = c.tensor(key);
  if (!v.data) return v;
  v.dtype = c.dtype(key);
  v.n = c.stride(key, 0), v.c = c.stride(key, 1), v.t = c.stride(key, 2), v.h = c.stride(key, 3),
  v.w = c.stride(key, 4);
  return v;
}

std::string run_gate_data(const Case& c, std::string&) {
  rcu_ops::GateData p;
  p.pass = static_cast<rcu_ops::GatePass>(c.integer("pass"));
  p.N = c.integer("N"), p.C = c.integer("C"), p.T = c.integer("T"), p.H = c.integer("H"), p.W = c.integer("W");
  p.dtype = static_cast<rcu_ops::DType>(c.integer("dtype"));
  p.x = view(c, "x"), p.y = view(c, "y"), p.grad = view(c, "grad");
  p.h = c.tensor("h"), p.sums = c.tensor("sums");
  p.gate = static_cast<const uint8_t*>(c.tensor("gate"));
  if (p.gate) p.gate_stride = c.stride("gate", 0);
  return rcu_ops::cuda::gate_data_path(p, nullptr, nullptr).c_str();
}

const cuda_host::Registration align("align", run_align), gate_data("gate_data", run_gate_data);

}  // namespace
