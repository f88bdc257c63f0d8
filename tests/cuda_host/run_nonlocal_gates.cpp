// Cases of nonlocal_gates: ops attend, attend_grad, step, step_grad. Sizes B, G, N, M, D, E; plain: on the plain
// kernels whatever the planner prefers; tensors by the names of common/nonlocal_gates.h, rows [B,G,rows,columns] (cell
// and what is like it [B,1,rows,columns]); mask [B,N,M].
#include <type_traits>

#include "case.h"
#include "cuda/nonlocal_gates.h"

namespace {

using cuda_host::Case;
using namespace rcu_ops;

Rows rows(const Case& c, const std::string& key) {
  if (!c.has(key)) return {};
  return {.data = c.tensor(key), .batch = c.stride(key, 0), .gate = c.stride(key, 1), .row = c.stride(key, 2)};
}

Relation relation(const Case& c) {
  Relation r;
  r.dtype = static_cast<DType>(c.integer("dtype"));
  r.B = c.integer("B"), r.G = c.integer("G"), r.N = c.integer("N"), r.M = c.integer("M");
  r.D = c.integer("D"), r.E = c.integer("E");
  r.query = rows(c, "query"), r.key = rows(c, "key"), r.value = rows(c, "value");
  if (c.has("mask")) {
    r.mask = static_cast<const uint8_t*>(c.tensor("mask"));
    r.mask_batch = c.stride("mask", 0), r.mask_row = c.stride("mask", 1), r.mask_key = c.stride("mask", 2);
  }
  r.scale = c.number("scale");
  r.count = c.integer("count") != 0;
  return r;
}

template <typename Problem>
std::string run(const Case& c, std::string& plan, bool step, const Problem& p) {
  const auto kernel = c.integer("plain") ? cuda::RelateKernel::plain : cuda::RelateKernel::best;
  if (c.integer("plain"))
    plan = "plain";
  else if constexpr (std::is_same_v<Problem, AttentionGrad>)
    plan = cuda::describe_relate(p).c_str();
  else
    plan = cuda::describe_relate(p.relation, step).c_str();
  if constexpr (std::is_same_v<Problem, StepGrad>)
    if (!c.integer("plain"))
      plan = plan + "; " +
             cuda::describe_relate(AttentionGrad{p.relation, p.dx_gates, p.dquery, p.dkey, p.dvalue}).c_str();
  return cuda_host::with_scratch(cuda::scratch_of(p),
                                 [&](void* scratch) { return cuda::relate(p, scratch, nullptr, kernel); });
}

bool is_state(const Case& c) { return c.dtype("cell") == (c.dtype("query") == DType::f64 ? DType::f64 : DType::f32); }

const cuda_host::Registration attend("attend", [](const Case& c, std::string& plan) {
  return run(c, plan, false, Attention{relation(c), rows(c, "out")});
});

const cuda_host::Registration attend_grad("attend_grad", [](const Case& c, std::string& plan) {
  return run(c, plan, false,
             AttentionGrad{relation(c), rows(c, "grad"), rows(c, "dquery"), rows(c, "dkey"), rows(c, "dvalue")});
});

const cuda_host::Registration step("step", [](const Case& c, std::string& plan) {
  return run(c, plan, true,
             Step{relation(c), rows(c, "x_gates"), rows(c, "cell"), rows(c, "h"), rows(c, "c"), is_state(c)});
});

const cuda_host::Registration step_grad("step_grad", [](const Case& c, std::string& plan) {
  return run(c, plan, true,
             StepGrad{relation(c), rows(c, "x_gates"), rows(c, "cell"), rows(c, "grad_h"), rows(c, "grad_c"),
                      rows(c, "dx_gates"), rows(c, "dquery"), rows(c, "dkey"), rows(c, "dvalue"), rows(c, "dcell"),
                      is_state(c)});
});

}  // namespace
