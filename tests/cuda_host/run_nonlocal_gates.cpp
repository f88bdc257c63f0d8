// Cases of nonlocal_gates: ops attend, attend_grad, step, step_grad. Sizes B, G, N, M, D, E; plain: on the plain
// kernels whatever the planner prefers; products: by the products of a library, here the plainest; tensors by the names of common/nonlocal_gates.h, rows [B,G,rows,columns] (cell
// and what is like it [B,1,rows,columns]); mask [B,N,M].
#include <bit>
#include <type_traits>
#include <vector>

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

float read(DType dtype, const void* data, int64_t at) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[at];
  return std::bit_cast<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[at]) << 16);  // bf16
}

void write(DType dtype, void* data, int64_t at, double value) {
  const auto rounded = static_cast<float>(value);
  if (dtype == DType::f32) {
    static_cast<float*>(data)[at] = rounded;
    return;
  }
  const auto bits = std::bit_cast<uint32_t>(rounded);
  static_cast<uint16_t*>(data)[at] =
      rounded != rounded ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void multiply(void* context, const cuda::Product& p) {
  const DType dtype = *static_cast<const DType*>(context);
  for (int64_t i = 0; i < p.count; ++i)
    for (int64_t row = 0; row < p.rows; ++row)
      for (int64_t column = 0; column < p.columns; ++column) {
        double sum = 0;
        for (int64_t k = 0; k < p.inner; ++k)
          sum += static_cast<double>(read(dtype, p.a.data, i * p.a.batch + row * p.a.row + k * p.a.column)) *
                 read(dtype, p.b.data, i * p.b.batch + k * p.b.row + column * p.b.column);
        write(dtype, p.out.data, i * p.out.batch + row * p.out.row + column * p.out.column, sum);
      }
}

template <typename Problem>
std::string by_products(const Problem& p) {
  DType dtype = p.relation.dtype;
  return cuda_host::with_scratch(cuda::products_scratch_of(p), [&](void* scratch) {
    return cuda::relate_by_products(p, scratch, multiply, &dtype, nullptr);
  });
}

// A step, or the part of its backward pass that the cell takes, of relations made by products.
template <typename Problem>
std::string cells_by_products(const Problem& p) {
  const Relation& r = p.relation;
  std::vector<unsigned char> memory(static_cast<size_t>(r.B * r.G * r.N * r.E * element_size(r.dtype)) + 16, 0xff);
  auto* aligned = memory.data() + (16 - reinterpret_cast<uintptr_t>(memory.data()) % 16) % 16;
  // as PyTorch's attention lays its result out: a position's gates lie side by side
  const Rows relations{.data = aligned, .batch = r.N * r.G * r.E, .gate = r.E, .row = r.G * r.E};
  if (std::string error = by_products(Attention{r, relations}); !error.empty()) return error;
  return cuda::update_cell_from(relations, p, nullptr).c_str();
}

bool is_state(const Case& c) { return c.dtype("cell") == (c.dtype("query") == DType::f64 ? DType::f64 : DType::f32); }

const cuda_host::Registration attend("attend", [](const Case& c, std::string& plan) {
  const Attention p{relation(c), rows(c, "out")};
  if (c.integer("products") == 2) return std::string(cuda::mend(p, nullptr).c_str());
  return c.integer("products") ? by_products(p) : run(c, plan, false, p);
});

const cuda_host::Registration attend_grad("attend_grad", [](const Case& c, std::string& plan) {
  const AttentionGrad p{relation(c), rows(c, "grad"), rows(c, "dquery"), rows(c, "dkey"), rows(c, "dvalue")};
  return c.integer("products") ? by_products(p) : run(c, plan, false, p);
});

const cuda_host::Registration step("step", [](const Case& c, std::string& plan) {
  const Step p{relation(c), rows(c, "x_gates"), rows(c, "cell"), rows(c, "h"), rows(c, "c"), is_state(c)};
  return c.integer("products") ? cells_by_products(p) : run(c, plan, true, p);
});

const cuda_host::Registration step_grad("step_grad", [](const Case& c, std::string& plan) {
  const StepGrad p{relation(c),       rows(c, "x_gates"),  rows(c, "cell"),   rows(c, "grad_h"),
                   rows(c, "grad_c"), rows(c, "dx_gates"), rows(c, "dquery"), rows(c, "dkey"),
                   rows(c, "dvalue"), rows(c, "dcell"),    is_state(c)};
  if (!c.integer("products")) return run(c, plan, true, p);
  if (std::string error = cells_by_products(p); !error.empty()) return error;
  return by_products(AttentionGrad{p.relation, p.dx_gates, p.dquery, p.dkey, p.dvalue});
});

}  // namespace
