// Cases of fast_gru: op fast_gru_pass, with the fields of Elementwise; operand i is the tensor p<i>
// [rows,segments,length]. Op fast_gru_steps, with the fields of Steps as integers and tensors, and cluster as
// plan_persistent takes it.
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
  p.keep = c.integer("keep") != 0;
  for (int i = 0; i < rcu_ops::fast_gru::most_planes; ++i) {
    const std::string key = "p" + std::to_string(i);
    if (c.has(key)) p.plane[i] = {c.tensor(key), c.stride(key, 0), c.stride(key, 1)};
  }
  return rcu_ops::cuda::elementwise(p, nullptr).c_str();
}

std::string run_steps(const Case& c, std::string& plan_text) {
  rcu_ops::fast_gru::Steps p;
  p.dtype = c.dtype("hidden");
  p.rows = c.integer("rows"), p.C = c.integer("C"), p.R = c.integer("R"), p.steps = c.integer("steps");
  p.positions = c.integer("positions");
  p.uo = c.tensor("uo"), p.w = c.tensor("w"), p.vo = c.tensor("vo");
  p.hidden = c.tensor("hidden"), p.candidate = c.tensor("candidate"), p.r = c.tensor("r"), p.z = c.tensor("z");
  p.save = c.has("r");
  p.state = static_cast<float*>(c.tensor("state"));
  p.out = c.tensor("out"), p.out_sample = c.stride("out", 0), p.out_step = c.stride("out", 1);
  rcu_ops::fast_gru::PersistentPlan plan;
  const auto error =
      rcu_ops::cuda::plan_steps(p.rows, p.C, p.R, p.dtype, false, plan, static_cast<int>(c.integer("cluster")));
  if (!error.empty()) return error.c_str();
  plan_text = rcu_ops::fast_gru::describe(plan).c_str();
  return cuda_host::with_scratch({plan.scratch_bytes, {}},
                                 [&](void* scratch) { return rcu_ops::cuda::steps(p, plan, scratch, nullptr); });
}

std::string run_steps_backward(const Case& c, std::string& plan_text) {
  rcu_ops::fast_gru::StepsBackward p;
  p.dtype = c.dtype("hidden");
  p.rows = c.integer("rows"), p.C = c.integer("C"), p.R = c.integer("R"), p.steps = c.integer("steps");
  p.positions = c.integer("positions");
  p.uo = c.tensor("uo"), p.w = c.tensor("w"), p.vo = c.tensor("vo");
  p.hidden = c.tensor("hidden"), p.r = c.tensor("r"), p.z = c.tensor("z"), p.candidate = c.tensor("candidate");
  p.before = c.tensor("before");
  p.grad = c.tensor("grad");
  if (p.grad) p.grad_sample = c.stride("grad", 0), p.grad_step = c.stride("grad", 1);
  p.carry = static_cast<float*>(c.tensor("carry"));
  p.dc = c.tensor("dc"), p.dr = c.tensor("dr"), p.dz = c.tensor("dz"), p.du = c.tensor("du"),
  p.gated = c.tensor("gated");
  rcu_ops::fast_gru::PersistentPlan plan;
  if (const auto error = rcu_ops::cuda::plan_steps(p.rows, p.C, p.R, p.dtype, true, plan); !error.empty())
    return error.c_str();
  plan_text = rcu_ops::fast_gru::describe(plan).c_str();
  return cuda_host::with_scratch({plan.scratch_bytes, {}}, [&](void* scratch) {
    return rcu_ops::cuda::steps_backward(p, plan, scratch, nullptr);
  });
}

// Matrices [steps][samples][positions][features] in any order of memory.
rcu_ops::fast_gru::View view(const Case& c, const std::string& key) {
  if (!c.has(key)) return {};
  return {c.tensor(key), c.stride(key, 1), c.stride(key, 0), c.stride(key, 3), c.stride(key, 2)};
}

template <typename Problem>
void fill(Problem& p, const Case& c) {
  p.dtype = c.dtype("w");
  p.samples = c.integer("samples"), p.positions = c.integer("positions");
  p.C = c.integer("C"), p.R = c.integer("R"), p.steps = c.integer("steps");
  p.uo = c.tensor("uo"), p.w = c.tensor("w"), p.vo = c.tensor("vo");
  p.hidden = view(c, "hidden"), p.candidate = view(c, "candidate"), p.r = view(c, "r"), p.z = view(c, "z");
}

std::string run_columns(const Case& c, std::string& plan_text) {
  rcu_ops::fast_gru::ColumnSteps p;
  fill(p, c);
  p.start_dtype = c.dtype("start");
  p.save = c.has("r");
  p.start = view(c, "start"), p.out = view(c, "out"), p.last = view(c, "last"), p.first = view(c, "first");
  p.x = view(c, "x"), p.ux = c.tensor("ux"), p.vx = c.tensor("vx");
  rcu_ops::fast_gru::ColumnsPlan plan;
  const auto error = rcu_ops::cuda::plan_columns(p.samples * p.positions, p.C, p.R, p.dtype, false, plan, c.has("x"));
  if (!error.empty()) return error.c_str();
  plan_text = rcu_ops::fast_gru::describe(plan).c_str();
  if (plan.why_not.empty() && plan.makes_x != c.has("x")) return "the weights of x: no place for them in shared memory";
  return rcu_ops::cuda::column_steps(p, plan, nullptr).c_str();
}

std::string run_columns_backward(const Case& c, std::string& plan_text) {
  rcu_ops::fast_gru::ColumnStepsBackward p;
  fill(p, c);
  p.before = view(c, "before"), p.grad = view(c, "grad"), p.carry = view(c, "carry");
  p.dc = view(c, "dc"), p.dr = view(c, "dr"), p.dz = view(c, "dz"), p.du = view(c, "du"), p.gated = view(c, "gated");
  rcu_ops::fast_gru::ColumnsPlan plan;
  const auto error = rcu_ops::cuda::plan_columns(p.samples * p.positions, p.C, p.R, p.dtype, true, plan);
  if (!error.empty()) return error.c_str();
  plan_text = rcu_ops::fast_gru::describe(plan).c_str();
  return rcu_ops::cuda::column_steps_backward(p, plan, nullptr).c_str();
}

const cuda_host::Registration columns("fast_gru_columns", run_columns);
const cuda_host::Registration columns_backward("fast_gru_columns_backward", run_columns_backward);
const cuda_host::Registration pass("fast_gru_pass", run_pass);
const cuda_host::Registration steps("fast_gru_steps", run_steps);
const cuda_host::Registration steps_backward("fast_gru_steps_backward", run_steps_backward);

}  // namespace
