// nonlocal_gates: its kernels as PyTorch operators (see bindings.h).
#include <cmath>

#include "bindings.h"
#include "common/nonlocal_gates.h"
#include "common/nonlocal_gates_library.h"
#ifdef RCU_OPS_WITH_CUDA
#include "cuda/nonlocal_gates.h"
#endif

namespace rcu_ops::bindings {
namespace {

// The kernels read rows of unit stride. A tensor whose last dimension is strided is copied; all others lie where they
// are.
Tensor with_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) < 2 || tensor.stride(last) == 1 ? tensor : contiguous_of(tensor);
}

Rows rows_of(const Tensor& tensor) {  // [B,rows,columns] or [B,gates,rows,columns]
  const Sizes s = tensor.strides();
  if (s.size() == 3) return {.data = pointer(tensor), .batch = s[0], .gate = 0, .row = s[1]};
  return {.data = pointer(tensor), .batch = s[0], .gate = s[1], .row = s[2]};
}

void run_on_cpu(const Attention& problem) { cpu::attend(problem, cpu_threads()); }
void run_on_cpu(const AttentionGrad& problem) { cpu::attend_grad(problem, cpu_threads()); }
void run_on_cpu(const Step& problem) { cpu::step(problem, cpu_threads()); }
void run_on_cpu(const StepGrad& problem) { cpu::step_grad(problem, cpu_threads()); }

// On the device of `like`.
template <class Problem>
void launch(const Problem& problem, const Tensor& like) {
#ifdef RCU_OPS_WITH_CUDA
  if (like.is_cuda())
    return launch_on_gpu(
        problem, like, [](const Problem& p) { return cuda::scratch_of(p); },
        [](const Problem& p, void* scratch, CUstream_st* stream) { return cuda::relate(p, scratch, stream); });
#endif
  run_on_cpu(problem);
}

void check_like(const char* name, const Tensor& tensor, const Tensor& like, const char* like_name) {
  check_dtype(name, tensor, like.scalar_type());
  check_device(name, tensor, like, like_name);
}

Relation relation_of(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                     double scale, bool count) {
  check(query.dim() == 3, "query: expected [B,N,D], got ", query.dim(), " dimensions");
  check(key.dim() == 3, "key: expected [B,M,D], got ", key.dim(), " dimensions");
  check(value.dim() == 3, "value: expected [B,M,Dv], got ", value.dim(), " dimensions");
  Relation r;
  r.dtype = dtype_of("query", query);
  r.B = query.size(0), r.N = query.size(1), r.D = query.size(2), r.M = key.size(1), r.E = value.size(2);
  check_shape("key", key, {r.B, r.M, r.D}, "[B,M,D]");
  check_shape("value", value, {r.B, r.M, r.E}, "[B,M,Dv]");
  check_like("key", key, query, "query");
  check_like("value", value, query, "query");
  r.query = rows_of(query), r.key = rows_of(key), r.value = rows_of(value);
  if (mask) {
    check_shape("mask", *mask, {r.B, r.N, r.M}, "[B,N,M]");
    check_dtype("mask", *mask, ScalarType::Bool);
    check_device("mask", *mask, query, "query");
    r.mask = static_cast<const uint8_t*>(pointer(*mask));
    r.mask_batch = mask->stride(0), r.mask_row = mask->stride(1), r.mask_key = mask->stride(2);
  }
  r.scale = scale, r.count = count;
  return r;
}

constexpr int64_t flash_attention = 1, memory_efficient_attention = 2;  // of torch.nn.attention.SDPBackend

Way forward_way(const Relation& r, bool step, const Tensor& like) {
#ifdef RCU_OPS_WITH_CUDA
  if (like.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
    return cuda::forward_way(r, step);
  }
#endif
  return !step && why_not_library_on_cpu(r) == nullptr ? Way::attention : Way::kernels;
}

// PyTorch's scaled_dot_product_attention of [B,heads,rows,columns]; no mask. Nothing unless the kernel of its would run
// that alone is faster than those here: the user may have switched it off (torch.nn.attention.sdpa_kernel).
std::optional<Tensor> library_attention(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
  using torch::stable::detail::from;
  const auto call = [&](const char* name) {  // both take the same arguments
    std::array<StableIValue, 8> stack{from(query),
                                      from(key),
                                      from(value),
                                      from(std::nullopt),
                                      from(0.0),
                                      from(false),
                                      from(std::optional<double>(scale)),
                                      from(false)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
    return stack[0];
  };
  const int64_t wanted = query.is_cuda() && query.size(3) > narrow_head ? memory_efficient_attention : flash_attention;
  if (torch::stable::detail::to<int64_t>(call("aten::_fused_sdp_choice")) != wanted) return std::nullopt;
  return torch::stable::detail::to<Tensor>(call("aten::scaled_dot_product_attention"));
}

#ifdef RCU_OPS_WITH_CUDA
// aten::bmm into the product's result; context: a tensor of its device and dtype.
void multiply_by_library(void* context, const cuda::Product& p) {
  using torch::stable::detail::from;
  const Tensor& like = *static_cast<const Tensor*>(context);
  const auto matrices = [&](const cuda::Factor& f, int64_t rows, int64_t columns) {
    const int64_t shape[3] = {p.count, rows, columns}, strides[3] = {f.batch, f.row, f.column};
    return torch::stable::from_blob(f.data, Sizes(shape, 3), Sizes(strides, 3), like.device(), like.scalar_type());
  };
  std::array<StableIValue, 3> stack{from(matrices(p.a, p.rows, p.inner)), from(matrices(p.b, p.inner, p.columns)),
                                    from(matrices(p.out, p.rows, p.columns))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // releases the returned handle
}

template <class Problem>
void by_products(const Problem& problem, const Tensor& like) {
  launch_on_gpu(
      problem, like, [](const Problem& p) { return cuda::products_scratch_of(p); },
      [&](const Problem& p, void* scratch, CUstream_st* stream) {
        return cuda::relate_by_products(p, scratch, multiply_by_library, const_cast<Tensor*>(&like), stream);
      });
}

template <class Problem, class Run>
void run_without_scratch(const Problem& problem, const Tensor& like, Run run) {
  launch_on_gpu(
      problem, like, [](const Problem&) { return cuda::Scratch{}; },
      [&](const Problem& p, void*, CUstream_st* stream) { return run(p, stream); });
}

// The relations [B,4,P,E] of a step's gates by the library, where it is faster; nothing else.
std::optional<Tensor> library_relations(const Relation& r, const Tensor& query, const Tensor& key,
                                        const Tensor& value) {
  const Way way = query.is_cuda() && r.B * r.N * r.E > 0 ? forward_way(r, true, query) : Way::kernels;
  if (way == Way::kernels) return std::nullopt;
  Attention p{r, {}};
  if (way == Way::attention) {
    const std::optional<Tensor> found = library_attention(query, key, value, 1.0);
    if (!found || found->scalar_type() != query.scalar_type() || found->stride(3) != 1) return std::nullopt;
    p.out = rows_of(*found);
    run_without_scratch(p, query, [](const Attention& a, CUstream_st* stream) { return cuda::mend(a, stream); });
    return found;
  }
  Tensor out = empty_of(query, {r.B, r.G, r.N, r.E});
  p.out = rows_of(out);
  by_products(p, query);
  return out;
}

template <class Problem>
void update_cell_from(const Problem& problem, const Tensor& relations) {
  run_without_scratch(problem, relations, [&](const Problem& p, CUstream_st* stream) {
    return cuda::update_cell_from(rows_of(relations), p, stream);
  });
}
#endif

// Attention's gradients, on the device of `like`.
void launch_gradients(const AttentionGrad& p, const Tensor& like) {
#ifdef RCU_OPS_WITH_CUDA
  if (like.is_cuda() && !why_not_gradient_products_on_gpu(p.relation)) return by_products(p, like);
#endif
  launch(p, like);
}

// Whether every row of a CPU tensor of fp32 begins with a number. Where the library gives NaN for a query whose scores
// are all -inf, and zeros are asked for, all of its row is NaN.
bool rows_are_numbers(const Tensor& out, const Relation& r) {
  const auto* first = static_cast<const float*>(pointer(out));
  bool numbers = true;
  for (int64_t row = 0; row < r.B * r.N; ++row) numbers &= !std::isnan(first[row * r.E]);
  return numbers;
}

Tensor nonlocal_attention(Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask, double scale,
                          bool count) {
  query = with_rows(query), key = with_rows(key), value = with_rows(value);
  Attention p{relation_of(query, key, value, mask, scale, count), {}};
  const Way way = forward_way(p.relation, false, query);
  if (way == Way::attention) {
    const auto head = [](const Tensor& t) { return torch::stable::unsqueeze(t, 1); };
    std::optional<Tensor> found = library_attention(head(query), head(key), head(value), scale);
    if (found) found = contiguous_of(torch::stable::squeeze(*found, 1));
    // Not where autocast made another dtype of it, nor, on the CPU, where a query may be dead.
    if (found && found->scalar_type() == query.scalar_type() &&
        (query.is_cuda() || rows_are_numbers(*found, p.relation))) {
#ifdef RCU_OPS_WITH_CUDA
      p.out = rows_of(*found);
      if (query.is_cuda() && p.relation.D > narrow_head)  // flash attention on a GPU gives dead queries zeros by itself
        run_without_scratch(p, query, [](const Attention& a, CUstream_st* stream) { return cuda::mend(a, stream); });
#endif
      return *found;
    }
  }
  Tensor out = empty_of(query, {p.relation.B, p.relation.N, p.relation.E});
  p.out = rows_of(out);
#ifdef RCU_OPS_WITH_CUDA
  if (way == Way::products) {
    by_products(p, query);
    return out;
  }
#endif
  launch(p, query);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> nonlocal_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value,
                                                               std::optional<Tensor> mask, double scale, bool count) {
  grad = with_rows(grad), query = with_rows(query), key = with_rows(key), value = with_rows(value);
  AttentionGrad p{relation_of(query, key, value, mask, scale, count), {}, {}, {}, {}};
  const Relation& r = p.relation;
  check_shape("grad", grad, {r.B, r.N, r.E}, "[B,N,Dv]");
  check_like("grad", grad, query, "query");
  Tensor dquery = empty_of(query, {r.B, r.N, r.D}), dkey = empty_of(key, {r.B, r.M, r.D}),
         dvalue = empty_of(value, {r.B, r.M, r.E});
  p.grad = rows_of(grad), p.dquery = rows_of(dquery), p.dkey = rows_of(dkey), p.dvalue = rows_of(dvalue);
  launch_gradients(p, query);
  return {dquery, dkey, dvalue};
}

// What the step and its backward pass have in common.
template <class P>
P step_of(const Tensor& x_gates, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cell) {
  check(x_gates.dim() == 4 && x_gates.size(1) == 4, "x_gates: expected [B,4,P,Dv], got ", x_gates.sizes());
  check(query.dim() == 4, "query: expected [B,4,P,D], got ", query.dim(), " dimensions");
  P p{};
  Relation& r = p.relation;
  r.dtype = dtype_of("x_gates", x_gates);
  r.B = x_gates.size(0), r.G = 4, r.N = r.M = x_gates.size(2), r.E = x_gates.size(3), r.D = query.size(3);
  check_shape("query", query, {r.B, 4, r.N, r.D}, "[B,4,P,D]");
  check_shape("key", key, {r.B, 4, r.N, r.D}, "[B,4,P,D]");
  check_shape("value", value, {r.B, 4, r.N, r.E}, "[B,4,P,Dv]");
  check_shape("cell", cell, {r.B, r.N, r.E}, "[B,P,Dv]");
  check_like("query", query, x_gates, "x_gates");
  check_like("key", key, x_gates, "x_gates");
  check_like("value", value, x_gates, "x_gates");
  check_dtype("cell", cell, x_gates.scalar_type(), state_dtype(x_gates.scalar_type()));
  check_device("cell", cell, x_gates, "x_gates");
  r.query = rows_of(query), r.key = rows_of(key), r.value = rows_of(value);
  p.x_gates = rows_of(x_gates), p.cell = rows_of(cell);
  p.cell_is_state = cell.scalar_type() == state_dtype(x_gates.scalar_type());
  return p;
}

// What a step on the CPU leaves to its backward pass (see Step in common/nonlocal_gates.h): [B,4,P,padded P], and
// [B,kept,P,Dv] of the first 0 to 4 gates.
struct Kept {
  Tensor weights, gates;
};

Tensor empty_state_of(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty_of(like, sizes, state_dtype(like.scalar_type()));
}

int64_t padded_keys(const Tensor& x_gates) {
  return padded_row(x_gates.size(2), x_gates.scalar_type() == ScalarType::Double ? 8 : 4);
}

template <class P>
void set_kept(P& p, const Kept* kept) {
  if (!kept) return;
  if (kept->weights.numel() > 0) p.weights = rows_of(kept->weights);
  p.gates = rows_of(kept->gates), p.kept_gates = kept->gates.size(1);
}

std::tuple<Tensor, Tensor> run_step(Tensor x_gates, Tensor query, Tensor key, Tensor value, Tensor cell,
                                    const Kept* kept) {
  x_gates = with_rows(x_gates), query = with_rows(query), key = with_rows(key), value = with_rows(value),
  cell = with_rows(cell);
  Step p = step_of<Step>(x_gates, query, key, value, cell);
  const Relation& r = p.relation;
  Tensor h = empty_of(x_gates, {r.B, r.N, r.E});
  Tensor c = empty_state_of(x_gates, {r.B, r.N, r.E});
  p.h = rows_of(h), p.c = rows_of(c);
  set_kept(p, kept);
#ifdef RCU_OPS_WITH_CUDA
  if (const std::optional<Tensor> relations = library_relations(r, query, key, value)) {
    update_cell_from(p, *relations);
    return {h, c};
  }
#endif
  launch(p, x_gates);
  return {h, c};
}

using StepGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

StepGradients run_step_backward(std::optional<Tensor> grad_h, std::optional<Tensor> grad_c, Tensor x_gates,
                                Tensor query, Tensor key, Tensor value, Tensor cell, const Kept* kept) {
  x_gates = with_rows(x_gates), query = with_rows(query), key = with_rows(key), value = with_rows(value),
  cell = with_rows(cell);
  StepGrad p = step_of<StepGrad>(x_gates, query, key, value, cell);
  const Relation& r = p.relation;
  check(grad_h || grad_c, "grad_h, grad_c: expected at least one of them, got none");
  if (grad_h) {
    check_shape("grad_h", *grad_h, {r.B, r.N, r.E}, "[B,P,Dv]");
    check_like("grad_h", *grad_h, x_gates, "x_gates");
    grad_h = with_rows(*grad_h);
    p.grad_h = rows_of(*grad_h);
  }
  if (grad_c) {
    check_shape("grad_c", *grad_c, {r.B, r.N, r.E}, "[B,P,Dv]");
    check_dtype("grad_c", *grad_c, state_dtype(x_gates.scalar_type()));
    check_device("grad_c", *grad_c, x_gates, "x_gates");
    grad_c = with_rows(*grad_c);
    p.grad_c = rows_of(*grad_c);
  }
  Tensor dx = empty_of(x_gates, {r.B, 4, r.N, r.E}), dquery = empty_of(query, {r.B, 4, r.N, r.D});
  Tensor dkey = empty_of(key, {r.B, 4, r.N, r.D}), dvalue = empty_of(value, {r.B, 4, r.N, r.E});
  Tensor dcell = empty_of(cell, {r.B, r.N, r.E});
  p.dx_gates = rows_of(dx), p.dquery = rows_of(dquery), p.dkey = rows_of(dkey), p.dvalue = rows_of(dvalue);
  p.dcell = rows_of(dcell);
  set_kept(p, kept);
#ifdef RCU_OPS_WITH_CUDA
  if (const std::optional<Tensor> relations = library_relations(r, query, key, value)) {
    update_cell_from(p, *relations);
    launch_gradients({r, p.dx_gates, p.dquery, p.dkey, p.dvalue}, x_gates);
    return {dx, dquery, dkey, dvalue, dcell};
  }
#endif
  launch(p, x_gates);
  return {dx, dquery, dkey, dvalue, dcell};
}

std::tuple<Tensor, Tensor> relational_lstm_step(Tensor x_gates, Tensor query, Tensor key, Tensor value, Tensor cell) {
  return run_step(x_gates, query, key, value, cell, nullptr);
}

StepGradients relational_lstm_step_backward(std::optional<Tensor> grad_h, std::optional<Tensor> grad_c, Tensor x_gates,
                                            Tensor query, Tensor key, Tensor value, Tensor cell) {
  return run_step_backward(grad_h, grad_c, x_gates, query, key, value, cell, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> relational_lstm_step_kept(Tensor x_gates, Tensor query, Tensor key,
                                                                     Tensor value, Tensor cell, int64_t gates) {
  check(gates >= 0 && gates <= 4, "gates: expected 0 to 4, got ", gates);
  check(x_gates.dim() == 4, "x_gates: expected [B,4,P,Dv], got ", x_gates.sizes());
  const Sizes s = x_gates.sizes();
  const Kept kept{empty_state_of(x_gates, {s[0], s[1], s[2], padded_keys(x_gates)}),
                  empty_state_of(x_gates, {s[0], gates, s[2], s[3]})};
  auto [h, c] = run_step(x_gates, query, key, value, cell, &kept);
  return {h, c, kept.weights, kept.gates};
}

StepGradients relational_lstm_step_kept_backward(std::optional<Tensor> grad_h, std::optional<Tensor> grad_c,
                                                 Tensor x_gates, Tensor query, Tensor key, Tensor value, Tensor cell,
                                                 Tensor weights, Tensor gates) {
  check(x_gates.dim() == 4, "x_gates: expected [B,4,P,Dv], got ", x_gates.sizes());
  const Sizes s = x_gates.sizes();
  check_shape("weights", weights, {s[0], s[1], s[2], padded_keys(x_gates)}, "[B,4,P,padded P]");
  check(gates.dim() == 4 && gates.size(1) <= 4, "gates: expected [B,0 to 4,P,Dv], got ", gates.sizes());
  check_shape("gates", gates, {s[0], gates.size(1), s[2], s[3]}, "[B,0 to 4,P,Dv]");
  for (const auto& [name, tensor] : {std::pair{"weights", weights}, std::pair{"gates", gates}}) {
    check_dtype(name, tensor, state_dtype(x_gates.scalar_type()));
    check_device(name, tensor, x_gates, "x_gates");
  }
  const Kept kept{contiguous_of(weights), contiguous_of(gates)};
  return run_step_backward(grad_h, grad_c, x_gates, query, key, value, cell, &kept);
}

}  // namespace
}  // namespace rcu_ops::bindings

#define RCU_OPS_REGISTER(key)                                                                              \
  STABLE_TORCH_LIBRARY_IMPL(rcu_ops, key, m) {                                                             \
    m.impl("nonlocal_attention", TORCH_BOX(&rcu_ops::bindings::nonlocal_attention));                       \
    m.impl("nonlocal_attention_backward", TORCH_BOX(&rcu_ops::bindings::nonlocal_attention_backward));     \
    m.impl("relational_lstm_step", TORCH_BOX(&rcu_ops::bindings::relational_lstm_step));                   \
    m.impl("relational_lstm_step_backward", TORCH_BOX(&rcu_ops::bindings::relational_lstm_step_backward)); \
  }
RCU_OPS_REGISTER(CPU)
STABLE_TORCH_LIBRARY_IMPL(rcu_ops, CPU, m) {
  m.impl("relational_lstm_step_kept", TORCH_BOX(&rcu_ops::bindings::relational_lstm_step_kept));
  m.impl("relational_lstm_step_kept_backward", TORCH_BOX(&rcu_ops::bindings::relational_lstm_step_kept_backward));
}
#ifdef RCU_OPS_WITH_CUDA
RCU_OPS_REGISTER(CUDA)
#endif
