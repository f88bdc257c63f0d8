// fast_gru: one step, as products of the library and the passes between them.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "bindings_fast_gru.h"

namespace rcu_ops::bindings::gru {

namespace {

// mm, or bmm of as many matrices.
void multiply(const char* name, const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // releases the returned handle
}

}  // namespace

void product(const Matrix& out, const Tensor& weight, const Matrix& in) {
  if (out.by_column)
    multiply("aten::mm", in.tensor(), transposed(weight), out.tensor());
  else
    multiply("aten::mm", weight, in.tensor(), out.tensor());
}

void add_product(const Matrix& out, const Tensor& weight, const Matrix& in) {
  const Tensor to = out.tensor(), matrix = in.tensor(), across = out.by_column ? transposed(weight) : weight;
  const Tensor &a = out.by_column ? matrix : across, &b = out.by_column ? across : matrix;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(to.get(), to.get(), a.get(), b.get(), 1.0, 1.0));
}

void exact_product(const Matrix& out, const Tensor& weight, const Matrix& in, bool add) {
  constexpr int64_t piece = 128, least = 256, few = 12;
  if (out.scalar != ScalarType::Float || out.memory.is_cuda() || in.features < least || in.columns >= few)
    return add ? add_product(out, weight, in) : product(out, weight, in);
  const int64_t count = in.features / piece, rest = in.features % piece, terms = count + (rest > 0) + add;
  const Tensor to = out.tensor(), sums = empty_of(to, {terms, to.size(0), to.size(1)});
  const auto pieces = [&](const Tensor& like, char* data, std::array<int64_t, 3> shape,
                          std::array<int64_t, 3> strides) {
    return torch::stable::from_blob(data, Sizes(shape.data(), 3), Sizes(strides.data(), 3), like.device(), out.scalar);
  };
  const int64_t of_out = weight.stride(0), of_in = weight.stride(1);
  char *const numbers = static_cast<char*>(pointer(weight)), *const first = in.data;
  Tensor whole = sums;
  whole = torch::stable::narrow(whole, 0, 0, count);
  if (in.by_column)
    multiply("aten::bmm", pieces(in.memory, first, {count, in.columns, piece}, {piece, in.pitch, 1}),
             pieces(weight, numbers, {count, piece, out.features}, {piece * of_in, of_in, of_out}), whole);
  else
    multiply("aten::bmm", pieces(weight, numbers, {count, out.features, piece}, {piece * of_in, of_out, of_in}),
             pieces(in.memory, first, {count, piece, in.columns}, {piece * in.pitch, in.pitch, 1}), whole);
  if (rest > 0) {
    Tensor columns = weight;
    columns = torch::stable::narrow(columns, 1, count * piece, rest);
    const Tensor end = in.part(false, count * piece, rest).tensor(), sum = torch::stable::select(sums, 0, count);
    in.by_column ? multiply("aten::mm", end, transposed(columns), sum) : multiply("aten::mm", columns, end, sum);
  }
  if (add) {
    Tensor before = torch::stable::select(sums, 0, terms - 1);
    torch::stable::copy_(before, to);
  }
  const int64_t over_terms[] = {0};
  Tensor result = to;
  torch::stable::sum_out(result, sums, Sizes(over_terms, 1));
}

Plane add(const Problem& p, const Matrix& beside, const Matrix& to, const Tensor& weight, const Matrix& in) {
  if (!beside.data) {
    add_product(to, weight, in);
    return {};
  }
  product(beside, weight, in);
  return beside.plane(p);
}

void run(const Elementwise& pass, [[maybe_unused]] const Tensor& like) {
  if (fast_gru::elements(pass) == 0) return;
#ifdef RCU_OPS_WITH_CUDA
  if (like.is_cuda())
    return launch_on_gpu(
        pass, like, [](const Elementwise&) { return cuda::Scratch{}; },
        [](const Elementwise& p, void*, CUstream_st* stream) { return cuda::elementwise(p, stream); });
#endif
  cpu::elementwise(pass, cpu_threads());
}

Elementwise over(const Problem& p, Pass kind, int64_t features, int64_t columns, std::initializer_list<Plane> planes) {
  Elementwise pass;
  pass.pass = kind;
  pass.dtype = p.dtype;
  const int64_t segments = p.P ? columns / p.P : 0;  // of all samples, and of all steps where a plane holds them
  pass.rows = p.by_column ? 1 : features;
  pass.segments = segments;
  pass.length = p.by_column ? p.P * features : p.P;
  int i = 0;
  for (const Plane& plane : planes) pass.plane[i++] = plane;
  return pass;
}

void outer_product(const Problem& p, const Tensor& out, const Matrix& d, const Matrix& in) {
  // Columns of a piece: no more than the sums of PyTorch's gradient are long, which adds up step after step; on a GPU,
  // where a library's sum is one chain of additions. And pieces in one call.
  const int64_t piece = fast_gru::columns_of_piece(d.columns, p.step_columns() < 128 && out.is_cuda() ? 16 : 64);
  constexpr int64_t small = 1 << 16;
  const int64_t size = d.features * in.features, pieces = d.columns / piece;
  const int64_t few = (int64_t{1} << 22) / (size ? size : 1);  // 16 MB of results
  const int64_t most = !out.is_cuda() ? 64 : few < 1 << 15 ? few : 1 << 15;
  const auto whole = [&](const Tensor& to, int64_t begin, int64_t count) {
    const Tensor a = d.part(true, begin, count).tensor(), b = in.part(true, begin, count).tensor();
    d.by_column ? multiply("aten::mm", transposed(a), b, to) : multiply("aten::mm", a, transposed(b), to);
  };
  if (p.state != p.scalar || size > small || pieces < 2) return whole(out, 0, d.columns);
  const Tensor products = empty_of(out, {pieces < most ? pieces : most, d.features, in.features});
  const Tensor more = empty_of(out, {d.features, in.features});
  for (int64_t begin = 0; begin < d.columns;) {
    Tensor to = begin == 0 ? out : more;
    const int64_t left = (d.columns - begin) / piece, count = left < most ? left : most;
    if (count == 0) {
      whole(to, begin, d.columns - begin);
      begin = d.columns;
    } else {
      Tensor some = products;
      some = torch::stable::narrow(some, 0, 0, count);
      Tensor a = d.pieces(begin, piece, count), b = in.pieces(begin, piece, count);
      if (d.by_column)
        a = torch::stable::transpose(a, 1, 2);
      else
        b = torch::stable::transpose(b, 1, 2);
      multiply("aten::bmm", a, b, some);
      const int64_t over_pieces[] = {0};
      torch::stable::sum_out(to, some, Sizes(over_pieces, 1));
      begin += count * piece;
    }
    if (pointer(to) == pointer(out)) continue;
    Elementwise sum;
    sum.dtype = p.dtype;
    sum.length = size;
    sum.plane[0].data = sum.plane[1].data = pointer(out);
    sum.plane[2].data = pointer(more);
    run(sum, out);
  }
}

void step(const Problem& p, const Weights& w, const Matrix& low, const Matrix& state, const Saved& s,
          const Products& products, const Matrix& gated, bool keep, Plane low_out, Plane out) {
  const auto pass = [&](Pass kind, int64_t features, std::initializer_list<Plane> planes) {
    Elementwise all = over(p, kind, features, low.columns, planes);
    all.keep = keep;
    run(all, low.memory);
  };
  const Plane h = add(p, products.hidden, s.hidden, w.uo, low);
  pass(Pass::hidden, 2 * p.R, {s.hidden.plane(p), h});
  product(s.r, w.wr, s.hidden.part(false, 0, p.R));
  product(s.z, w.wz, s.hidden.part(false, p.R, p.R));
  pass(Pass::gates, p.C, {s.r.plane(p), s.z.plane(p), state.plane(p), gated.plane(p)});
  const Plane c = add(p, products.candidate, s.candidate, w.vo, gated);
  pass(Pass::output, p.C, {s.candidate.plane(p), c, s.z.plane(p), state.plane(p), low_out, out});
}

}  // namespace rcu_ops::bindings::gru
