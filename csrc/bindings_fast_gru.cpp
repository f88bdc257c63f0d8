// fast_gru: its steps as PyTorch operators (see bindings.h).
//
// The products are PyTorch's own, called into memory laid out here, so that oneDNN or MKL and cuBLAS, the current
// stream and graph capture are used as everywhere in PyTorch; between two products stands one elementwise pass
// (common/fast_gru.h) of the tensors' device. There are two exceptions. Where a GPU can hold the weights in its shared
// memory (common/fast_gru_gpu_plan.h) one launch makes all steps between the products of all clips, forward or
// backward: every block with all weights, or all blocks together with a share of them each; and few weights or few
// columns on the CPU are left to kernels that multiply by themselves (fast_gru::by_columns). Nothing depends on values,
// and nothing is read back from a device.
#include <vector>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "bindings.h"
#include "common/cpu_isa.h"
#include "common/fast_gru.h"
#include "cpu/memory.h"
#ifdef RCU_OPS_WITH_CUDA
#include "cuda/fast_gru.h"
#endif

namespace rcu_ops::bindings {
namespace {

using fast_gru::Elementwise;
using fast_gru::Pass;
using fast_gru::Plane;

constexpr int weights = 5;
struct Weights {  // U_x, U_o [2R,C], W_r, W_z [C,R], V_x, V_o [C,C]
  Tensor ux, uo, wr, wz, vx, vo;
};

Tensor transposed(const Tensor& matrix) {
  Tensor copy = matrix;
  return torch::stable::transpose(copy, 0, 1);
}

// mm, or bmm of as many matrices.
void multiply(const char* name, const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // releases the returned handle
}

void copy(Tensor to, const Tensor& from) { torch::stable::copy_(to, from); }

struct Problem {
  DType dtype{};
  ScalarType scalar{}, state{};
  int64_t N = 0, K = 0, C = 0, R = 0, P = 0;  // P: positions of a clip
  int64_t sizes[3] = {};                      // L, H, W
  int64_t first = 0, steps = 0;               // the first clip that is a step, and how many are
  bool innermost = false;                     // channels are innermost in x, and in what is returned
  bool by_column = false;                     // matrices lie [columns][features]
#ifdef RCU_OPS_WITH_CUDA
  // One launch makes all steps of a forward pass: by columns, or with a share of the weights in every block.
  std::optional<fast_gru::ColumnsPlan> by_blocks;
  std::optional<fast_gru::PersistentPlan> persistent;
#endif
  bool copied() const { return innermost != by_column; }  // sequences lie in another order than matrices
  int64_t step_columns() const { return N * P; }
  int64_t columns() const { return steps * N * P; }
};

// Features by columns, a column being a position: (step, sample, position).
struct Matrix {
  Tensor memory;  // keeps it alive
  char* data = nullptr;
  ScalarType scalar{};
  int64_t features = 0, columns = 0, pitch = 0;
  bool by_column = false;

  Tensor tensor() const {
    const int64_t shape[2] = {by_column ? columns : features, by_column ? features : columns}, strides[2] = {pitch, 1};
    return torch::stable::from_blob(data, Sizes(shape, 2), Sizes(strides, 2), memory.device(), scalar);
  }
  // `count` pieces of `width` columns from the begin-th on: [piece][features][width], or [piece][width][features].
  Tensor pieces(int64_t begin, int64_t width, int64_t count) const {
    const int64_t shape[3] = {count, by_column ? width : features, by_column ? features : width};
    const int64_t strides[3] = {width * (by_column ? pitch : 1), pitch, 1};
    char* first = part(true, begin, width).data;
    return torch::stable::from_blob(first, Sizes(shape, 3), Sizes(strides, 3), memory.device(), scalar);
  }
  Matrix part(bool of_columns, int64_t begin, int64_t count) const {
    Matrix m = *this;
    m.data += begin * (of_columns == by_column ? pitch : 1) * element();
    (of_columns ? m.columns : m.features) = count;
    return m;
  }
  Matrix step(const Problem& p, int64_t k) const { return part(true, k * p.step_columns(), p.step_columns()); }
  int64_t element() const { return scalar == ScalarType::Double ? 8 : scalar == ScalarType::Float ? 4 : 2; }
  // As a tensor [N,steps,C,L,H,W] of the sequence.
  std::array<int64_t, 6> sequence_strides(const Problem& p) const {
    const int64_t place = by_column ? pitch : 1, width = p.sizes[2], height = p.sizes[1];
    return {p.P * place, p.step_columns() * place, by_column ? 1 : pitch, height * width * place, width * place, place};
  }
  Tensor sequence(const Problem& p) const {
    const int64_t steps = columns / (p.step_columns() ? p.step_columns() : 1);
    const int64_t shape[6] = {p.N, steps, features, p.sizes[0], p.sizes[1], p.sizes[2]};
    const std::array<int64_t, 6> strides = sequence_strides(p);
    return torch::stable::from_blob(data, Sizes(shape, 6), Sizes(strides.data(), 6), memory.device(), scalar);
  }
  Plane plane(const Problem& p) const {
    return {.data = data, .row = pitch, .segment = by_column ? p.P * features : p.P};
  }
};

Matrix matrix_in(const Problem& p, const Tensor& memory, int64_t features, int64_t columns, int64_t offset = 0) {
  Matrix m;
  m.memory = memory;
  m.scalar = memory.scalar_type();
  m.data = static_cast<char*>(pointer(memory)) + offset * m.element();
  m.features = features, m.columns = columns;
  m.by_column = p.by_column;
  m.pitch = p.by_column ? features : columns;
  return m;
}

// Matrices that live as long as one call. Memory fresh from the system costs a page fault per 4 KB, as much as a pass
// over it, so on the CPU they lie in the thread's scratch memory, up to what a thread may keep; beyond, and on a GPU,
// in tensors of their own.
class Temporaries {
 public:
  Temporaries(const Problem& p, const Tensor& like, int64_t bytes) : problem_(p), like_(like) {
    constexpr int64_t most = 16 << 20;
    if (like.is_cuda() || bytes == 0) return;
    left_ = bytes < most ? bytes : most;
    next_ = static_cast<char*>(cpu::scratch(0, static_cast<size_t>(left_)));
  }
  // Of every matrix, with what aligning it takes.
  static int64_t bytes_of(int64_t features, int64_t columns, ScalarType scalar) {
    const int64_t element = scalar == ScalarType::Double ? 8 : scalar == ScalarType::Float ? 4 : 2;
    return (features * columns * element + 63) / 64 * 64;
  }
  Matrix take(int64_t features, int64_t columns, ScalarType scalar) {
    const int64_t size = features * columns, bytes = bytes_of(features, columns, scalar);
    if (bytes > left_)
      return matrix_in(problem_, torch::stable::new_empty(like_, Sizes(&size, 1), scalar), features, columns);
    Matrix m = matrix_in(problem_, like_, features, columns);
    m.scalar = scalar;
    m.data = next_;
    next_ += bytes;
    left_ -= bytes;
    return m;
  }

 private:
  const Problem& problem_;
  const Tensor& like_;
  char* next_ = nullptr;
  int64_t left_ = 0;
};

// out = weight in, over features.
void product(const Matrix& out, const Tensor& weight, const Matrix& in) {
  if (out.by_column)
    multiply("aten::mm", in.tensor(), transposed(weight), out.tensor());
  else
    multiply("aten::mm", weight, in.tensor(), out.tensor());
}

// out += weight in, on the CPU, where the library adds while it has the product in registers.
void add_product(const Matrix& out, const Tensor& weight, const Matrix& in) {
  const Tensor to = out.tensor(), matrix = in.tensor(), across = out.by_column ? transposed(weight) : weight;
  const Tensor &a = out.by_column ? matrix : across, &b = out.by_column ? across : matrix;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(to.get(), to.get(), a.get(), b.get(), 1.0, 1.0));
}

// ---- passes ----------------------------------------------------------------------------------------------------

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

// Over all columns of matrices with these features.
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

// out [features of d, features of in] = sum over columns of d in^T. Sums of small results are made in pieces, so that
// their rounding error does not grow with the number of columns; for large ones adding the pieces would cost as much as
// the product, and 16-bit pieces would each be rounded.
void outer_product(const Problem& p, const Tensor& out, const Matrix& d, const Matrix& in) {
  // Columns of a piece: no more than the sums of PyTorch's gradient are long, which adds up step after step; on a GPU,
  // where a library's sum is one chain of additions. And pieces in one call.
  const int64_t piece = p.step_columns() < 128 && out.is_cuda() ? 16 : 64;
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

// ---- tensors of the caller -------------------------------------------------------------------------------------

bool same_strides(const Tensor& tensor, const std::array<int64_t, 6>& wanted) {
  for (int i = 0; i < 6; ++i)
    if (tensor.size(i) > 1 && tensor.stride(i) != wanted[i]) return false;
  return true;
}

// Clips [from, from + count) of a sequence [N,K,C,L,H,W].
Tensor clips(const Tensor& sequence, int64_t from, int64_t count) {
  Tensor copy = sequence;
  return torch::stable::narrow(copy, 1, from, count);
}
Tensor clip(const Tensor& sequence, int64_t k) { return torch::stable::select(sequence, 1, k); }

// The memory of a sequence [N,K,C,L,H,W] as kernels of the CPU walk it: channels or positions adjacent, and positions
// at one distance from each other.
std::optional<fast_gru::View> view_in_place(const Tensor& sequence) {
  const int64_t channels = sequence.size(2), channel = sequence.stride(2);
  // Strides of the first dimension with more than one position, and of the one around it.
  int64_t position = 0, next = 0;
  bool adjacent = true;
  for (int i = 5; i > 2; --i) {
    if (sequence.size(i) == 1) continue;
    if (position == 0) position = next = sequence.stride(i);
    adjacent &= sequence.stride(i) == next;
    next *= sequence.size(i);
  }
  if (position == 0) position = channel == 1 ? channels : 1;
  if (channels > 1 && channel != 1) adjacent &= position == 1;
  if (!adjacent) return std::nullopt;
  return fast_gru::View{pointer(sequence), sequence.stride(0), sequence.stride(1), channel, position};
}

// Sequences of one shape, that of x in sizes but for the clips. PyTorch's copy would take numbers one by one where the
// order of channels and positions changes.
void copy_sequence(const Tensor& to, const Tensor& from) {
  const auto is_fp32 = [](const Tensor& t) { return !t.is_cuda() && t.scalar_type() == ScalarType::Float; };
  if (is_fp32(to) && is_fp32(from)) {
    const auto a = view_in_place(to), b = view_in_place(from);
    const auto across = [](const fast_gru::View& rows, const fast_gru::View& columns) {
      return rows.position == 1 && columns.channel == 1 && columns.position > 1;
    };
    if (a && b && (across(*a, *b) || across(*b, *a))) {
      const int64_t positions = to.size(3) * to.size(4) * to.size(5);
      return cpu::reorder({to.size(0), to.size(1), to.size(2), positions, *b, *a}, cpu_threads());
    }
  }
  copy(to, from);
}

// Clips as a matrix in their own memory; without data where they are none.
Matrix matrix_of(const Problem& p, const Tensor& sequence) {
  Matrix m;
  m.memory = sequence;
  m.scalar = sequence.scalar_type();
  m.features = p.C, m.columns = sequence.size(1) * p.step_columns(), m.by_column = p.by_column;
  m.pitch = p.by_column ? p.C : m.columns;
  if (same_strides(sequence, m.sequence_strides(p))) m.data = static_cast<char*>(pointer(sequence));
  return m;
}

// The same, copied where they are none.
Matrix as_matrix(const Problem& p, const Tensor& sequence, Temporaries& temporaries) {
  Matrix m = matrix_of(p, sequence);
  if (m.data) return m;
  m = temporaries.take(p.C, sequence.size(1) * p.step_columns(), sequence.scalar_type());
  copy_sequence(m.sequence(p), sequence);
  return m;
}

// A state [N,C,L,H,W] or a clip: as the output sequence lies, positions (and features) of a sample without a gap.
Plane plane_of(const Tensor& state) {
  return {.data = pointer(state), .row = state.stride(1), .segment = state.stride(0)};
}

bool adjacent(const Problem& p, const Tensor& sequence) {
  std::array<int64_t, 6> wanted{sequence.stride(0), sequence.stride(1), p.by_column ? 1 : sequence.stride(2), 0, 0, 0};
  wanted[5] = p.by_column ? p.C : 1;
  wanted[4] = p.sizes[2] * wanted[5];
  wanted[3] = p.sizes[1] * wanted[4];
  return same_strides(sequence, wanted);
}

Tensor permuted(const Tensor& tensor, std::vector<int64_t> order) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(tensor), from(order)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::permute", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor empty_sequence(const Problem& p, const Tensor& x, bool innermost) {
  if (!innermost) return empty_of(x, {p.N, p.K, p.C, p.sizes[0], p.sizes[1], p.sizes[2]});
  return permuted(empty_of(x, {p.N, p.K, p.sizes[0], p.sizes[1], p.sizes[2], p.C}), {0, 1, 5, 2, 3, 4});
}

Tensor empty_state(const Problem& p, const Tensor& x, ScalarType scalar, bool innermost) {
  const auto [L, H, W] = p.sizes;
  const int64_t last[5] = {p.N, L, H, W, p.C}, second[5] = {p.N, p.C, L, H, W};
  Tensor state = torch::stable::new_empty(x, Sizes(innermost ? last : second, 5), scalar);
  return innermost ? permuted(state, {0, 4, 1, 2, 3}) : state;
}

Tensor as_sequence(const Tensor& state) { return torch::stable::unsqueeze(state, 1); }

// ---- checks ----------------------------------------------------------------------------------------------------

#ifdef RCU_OPS_WITH_CUDA
std::optional<fast_gru::PersistentPlan> one_launch(const Problem& p, const Tensor& x, bool backward) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  fast_gru::PersistentPlan plan;
  const Text error = cuda::plan_steps(p.step_columns(), p.C, p.R, p.dtype, backward, plan);
  check(error.empty(), error.c_str());
  return plan.why_not.empty() ? std::optional(plan) : std::nullopt;
}

std::optional<fast_gru::ColumnsPlan> columns_by_blocks(const Problem& p, const Tensor& x, bool backward) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  fast_gru::ColumnsPlan plan;
  const Text error = cuda::plan_columns(p.step_columns(), p.C, p.R, p.dtype, backward, plan);
  check(error.empty(), error.c_str());
  return plan.why_not.empty() ? std::optional(plan) : std::nullopt;
}
#endif

Problem checked(const Tensor& x, const Tensor& ux, const Tensor& uo, const Tensor& w, const Tensor& vx,
                const Tensor& vo, const std::optional<Tensor>& o0) {
  check(x.dim() == 6, "x: expected [N,K,C,L,H,W], got ", x.dim(), " dimensions");
  Problem p;
  p.dtype = dtype_of("x", x);
  p.scalar = x.scalar_type();
  p.state = state_dtype(p.scalar);
  p.N = x.size(0), p.K = x.size(1), p.C = x.size(2);
  for (int i = 0; i < 3; ++i) p.sizes[i] = x.size(3 + i);
  p.P = p.sizes[0] * p.sizes[1] * p.sizes[2];
  check(p.K > 0 && p.C > 0, "x: expected at least one clip and one channel, got ", shape_text(x.sizes()));
  check(ux.dim() == 2 && ux.size(0) > 0 && ux.size(0) % 2 == 0, "weight_ux: expected [2R,C], got ",
        shape_text(ux.sizes()));
  p.R = ux.size(0) / 2;
  const Tensor* given[weights] = {&ux, &uo, &w, &vx, &vo};
  const char* names[weights] = {"weight_ux", "weight_uo", "weight_w", "weight_vx", "weight_vo"};
  check_shape(names[0], ux, {2 * p.R, p.C}, "[2R,C]");
  check_shape(names[1], uo, {2 * p.R, p.C}, "[2R,C]");
  check_shape(names[2], w, {2, p.C, p.R}, "[2,C,R]");
  check_shape(names[3], vx, {p.C, p.C}, "[C,C]");
  check_shape(names[4], vo, {p.C, p.C}, "[C,C]");
  for (int i = 0; i < weights; ++i) {
    check_dtype(names[i], *given[i], p.scalar);
    check_device(names[i], *given[i], x, "x");
  }
  if (o0) {
    check_shape("o0", *o0, {p.N, p.C, p.sizes[0], p.sizes[1], p.sizes[2]}, "[N,C,L,H,W]");
    check_dtype("o0", *o0, p.scalar, p.state);
    check_device("o0", *o0, x, "x");
  }
  p.first = o0 ? 0 : 1;
  p.steps = p.K - p.first;
  p.innermost = x.stride(2) == 1;
  // From many channels on, CPU libraries are 5 to 18 % faster on [columns][features] for few columns: more than it
  // costs to reorder the sequences. For more columns both orders are alike; for very many, fp32 is 2 % faster that way.
  const int64_t m = p.step_columns();
  const bool few = m <= (p.dtype == DType::f32 ? 256 : 128), very_many = p.dtype == DType::f32 && m >= 1000;
  p.by_column = p.innermost || (!x.is_cuda() && p.C >= 512 && (few || very_many));
#ifdef RCU_OPS_WITH_CUDA
  if (x.is_cuda() && p.columns() > 0) {
    p.by_blocks = columns_by_blocks(p, x, false);
    if (!p.by_blocks) p.persistent = one_launch(p, x, false);
    if (p.persistent) p.by_column = true;  // for both passes: gates are saved as matrices lie
  }
#endif
  return p;
}

Weights split(const Tensor& ux, const Tensor& uo, const Tensor& w, const Tensor& vx, const Tensor& vo) {
  return {ux, uo, torch::stable::select(w, 0, 0), torch::stable::select(w, 0, 1), vx, vo};
}

// What a forward pass leaves for the backward one: h [2R, columns]; r, z, c [C, columns].
struct Saved {
  Matrix hidden, r, z, candidate;
};

Saved saved_in(const Problem& p, const Tensor& hidden, const Tensor& gates) {
  const int64_t size = p.C * p.columns();
  return {matrix_in(p, hidden, 2 * p.R, p.columns()), matrix_in(p, gates, p.C, p.columns()),
          matrix_in(p, gates, p.C, p.columns(), size), matrix_in(p, gates, p.C, p.columns(), 2 * size)};
}

// What U_o and V_o make on a GPU, where the pass that follows adds it; on the CPU the products add by themselves.
struct Products {
  Matrix hidden, candidate;

  Products(const Problem& p, Temporaries& temporaries, bool cuda, int64_t columns) {
    if (!cuda) return;
    hidden = temporaries.take(2 * p.R, columns, p.scalar);
    candidate = temporaries.take(p.C, columns, p.scalar);
  }
};

// to += weight in; or the product `beside` it, if there is such a place, returned for a pass to add.
Plane add(const Problem& p, const Matrix& beside, const Matrix& to, const Tensor& weight, const Matrix& in) {
  if (!beside.data) {
    add_product(to, weight, in);
    return {};
  }
  product(beside, weight, in);
  return beside.plane(p);
}

// One step, or any number of them whose states are known: from h = U_x x and c = V_x x in place to the gates, which
// without `keep` need not be left there. low is the state in the data's type, state in the arithmetic's; without
// `advance` there is no new state.
void step(const Problem& p, const Weights& w, const Matrix& low, const Matrix& state, const Saved& s,
          const Products& products, const Matrix& gated, bool keep, bool advance = false, Plane low_out = {},
          Plane out = {}) {
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
  pass(Pass::output, p.C, {s.candidate.plane(p), c, s.z.plane(p), advance ? state.plane(p) : Plane{}, low_out, out});
}

#ifdef RCU_OPS_WITH_CUDA
// All steps in one launch: hidden and candidate hold the products of x, state (fp32) the first state and then the last.
void steps_in_one_launch(const Problem& p, const Weights& w, const Tensor& w_both, const Saved& s, bool save,
                         const Matrix& state, const Tensor& o, Temporaries& temporaries) {
  const Tensor uo = torch::stable::contiguous(w.uo), vo = torch::stable::contiguous(w.vo);
  const Tensor both = torch::stable::contiguous(w_both);
  fast_gru::Steps steps;
  steps.dtype = p.dtype;
  steps.rows = p.step_columns(), steps.C = p.C, steps.R = p.R, steps.steps = p.steps, steps.positions = p.P;
  steps.uo = pointer(uo), steps.w = pointer(both), steps.vo = pointer(vo);
  steps.hidden = s.hidden.data, steps.candidate = s.candidate.data, steps.r = s.r.data, steps.z = s.z.data;
  steps.save = save;
  steps.state = reinterpret_cast<float*>(state.data);
  const Tensor now = clips(o, p.first, p.steps);
  const Matrix out = p.copied() ? temporaries.take(p.C, p.columns(), p.scalar) : Matrix{};
  steps.out = p.copied() ? out.data : pointer(now);
  steps.out_sample = p.copied() ? p.P * p.C : now.stride(0);
  steps.out_step = p.copied() ? p.step_columns() * p.C : now.stride(1);
  launch_on_gpu(
      steps, o, [&](const fast_gru::Steps&) { return cuda::Scratch{p.persistent->scratch_bytes, {}}; },
      [&](const fast_gru::Steps& all, void* scratch, CUstream_st* stream) {
        return cuda::steps(all, *p.persistent, scratch, stream);
      });
  if (p.copied()) copy(now, out.sequence(p));
}
#endif

// A sequence as cpu::columns takes it, or a dense copy that `memory` keeps.
fast_gru::View view_of(const Problem& p, const Tensor& sequence, std::optional<Tensor>* memory = nullptr) {
  if (const auto view = view_in_place(sequence)) return *view;
  *memory = torch::stable::contiguous(sequence);
  return *view_in_place(**memory);
}

fast_gru::View view_of(const Problem& p, const Matrix& saved) {
  if (!saved.data) return {};
  const std::array<int64_t, 6> strides = saved.sequence_strides(p);
  return {saved.data, strides[0], strides[1], strides[2], saved.by_column ? saved.pitch : 1};
}

// As cpu::columns takes the problem, but for the sequences. `dense` keeps the weights.
fast_gru::Columns columns_of(const Problem& p, std::array<Tensor, weights>& dense) {
  fast_gru::Columns all;
  all.dtype = all.start_dtype = p.dtype;
  all.narrow = p.state != p.scalar;
  all.samples = p.N, all.positions = p.P, all.C = p.C, all.R = p.R, all.steps = p.steps;
  const float** places[weights] = {&all.ux, &all.uo, &all.w, &all.vx, &all.vo};
  for (int i = 0; i < weights; ++i) {
    dense[i] = torch::stable::contiguous(dense[i]);
    *places[i] = static_cast<const float*>(pointer(dense[i]));
  }
  return all;
}

// All steps on the CPU by columns: s is what to save, if anything.
void steps_by_columns(const Problem& p, const Tensor& x, std::array<Tensor, weights> given, const Tensor& start,
                      const Saved& s, const Tensor& o, const Tensor& o_n) {
  fast_gru::Columns all = columns_of(p, given);
  all.start_dtype = dtype_of("o0", start);
  std::optional<Tensor> copies[2];
  all.x = view_of(p, clips(x, p.first, p.steps), &copies[0]);
  all.start = view_of(p, as_sequence(start), &copies[1]);
  all.out = view_of(p, clips(o, p.first, p.steps));
  all.last = view_of(p, as_sequence(o_n));
  all.hidden = view_of(p, s.hidden), all.r = view_of(p, s.r), all.z = view_of(p, s.z),
  all.candidate = view_of(p, s.candidate);
  cpu::columns(all, cpu_threads());
}

#ifdef RCU_OPS_WITH_CUDA
// All steps on a GPU by columns: hidden and candidate hold the products of x.
void steps_by_blocks(const Problem& p, const Weights& w, const Tensor& w_both, const Saved& s, bool save,
                     const Tensor& start, const Tensor& o, const Tensor& o_n) {
  const Tensor uo = torch::stable::contiguous(w.uo), vo = torch::stable::contiguous(w.vo);
  const Tensor both = torch::stable::contiguous(w_both);
  std::optional<Tensor> copied;
  fast_gru::ColumnSteps all;
  all.dtype = p.dtype, all.start_dtype = dtype_of("o0", start);
  all.samples = p.N, all.positions = p.P, all.C = p.C, all.R = p.R, all.steps = p.steps;
  all.uo = pointer(uo), all.w = pointer(both), all.vo = pointer(vo);
  all.hidden = view_of(p, s.hidden), all.candidate = view_of(p, s.candidate);
  all.r = view_of(p, s.r), all.z = view_of(p, s.z);
  all.save = save;
  all.start = view_of(p, as_sequence(start), &copied);
  all.out = view_of(p, clips(o, p.first, p.steps));
  all.last = view_of(p, as_sequence(o_n));
  launch_on_gpu(
      all, o, [](const fast_gru::ColumnSteps&) { return cuda::Scratch{}; },
      [&](const fast_gru::ColumnSteps& problem, void*, CUstream_st* stream) {
        return cuda::column_steps(problem, *p.by_blocks, stream);
      });
}
#endif

// The gates of steps whose states are known, as if every column were a problem of one step: the numbers that the
// forward pass found.
void gates_by_columns(const Problem& p, std::array<Tensor, weights> given, const Matrix& inputs, const Matrix& before,
                      const Saved& s) {
  fast_gru::Columns all = columns_of(p, given);
  all.samples = all.steps = 1;
  all.positions = inputs.columns;
  const auto view = [](const Matrix& m) {
    return fast_gru::View{m.data, 0, 0, m.by_column ? 1 : m.pitch, m.by_column ? m.pitch : 1};
  };
  all.x = view(inputs), all.start = view(before);
  all.hidden = view(s.hidden), all.r = view(s.r), all.z = view(s.z), all.candidate = view(s.candidate);
  cpu::columns(all, cpu_threads());
}

bool in_panels(const Problem& p, const Tensor& x, int64_t columns) {
  return !x.is_cuda() &&
         fast_gru::by_columns(p.dtype, columns, p.C, p.R, cpu_threads().threads, cpu::current_isa() == cpu::Isa::amx);
}
bool in_fp32(const Problem& p, const Tensor& x) {
  return !x.is_cuda() && fast_gru::in_fp32(p.dtype, p.step_columns(), p.steps, cpu::current_isa() == cpu::Isa::amx);
}
Tensor in_type(const Tensor& tensor, ScalarType scalar) { return torch::stable::to(tensor, scalar); }
std::optional<Tensor> in_type(const std::optional<Tensor>& tensor, ScalarType scalar) {
  return tensor ? std::optional(in_type(*tensor, scalar)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor x, Tensor ux, Tensor uo, Tensor w, Tensor vx, Tensor vo,
                                                   std::optional<Tensor> o0, bool save) {
  const Problem p = checked(x, ux, uo, w, vx, vo, o0);
  const Weights weight = split(ux, uo, w, vx, vo);
  Tensor o = empty_sequence(p, x, p.innermost), o_n = empty_state(p, x, p.state, p.innermost);
  Tensor hidden = empty_of(x, {0}), gates = empty_of(x, {0});
  if (save) hidden = empty_of(x, {2 * p.R * p.columns()}), gates = empty_of(x, {3 * p.C * p.columns()});
  const int64_t M = p.step_columns();
  if (M == 0) return {o, o_n, hidden, gates};
  const Tensor start = o0 ? *o0 : clip(x, 0);
  if (!o0) copy(clip(o, 0), start);
  if (p.steps == 0) {
    copy(o_n, start);
    return {o, o_n, hidden, gates};
  }
  if (in_panels(p, x, M)) {
    steps_by_columns(p, x, {ux, uo, w, vx, vo}, start, save ? saved_in(p, hidden, gates) : Saved{}, o, o_n);
    return {o, o_n, hidden, gates};
  }
  if (in_fp32(p, x)) {
    const auto wide = [](const auto& tensor) { return in_type(tensor, ScalarType::Float); };
    const auto narrow = [&](const Tensor& tensor) { return in_type(tensor, p.scalar); };
    const auto found = forward(wide(x), wide(ux), wide(uo), wide(w), wide(vx), wide(vo), wide(o0), save);
    return {narrow(std::get<0>(found)), std::get<1>(found), narrow(std::get<2>(found)), narrow(std::get<3>(found))};
  }

#ifdef RCU_OPS_WITH_CUDA
  if (p.by_blocks) {
    Temporaries temporaries(p, x, 0);
    const auto all = [&](int64_t features) { return temporaries.take(features, p.columns(), p.scalar); };
    const Saved s = save ? saved_in(p, hidden, gates) : Saved{all(2 * p.R), {}, {}, all(p.C)};
    const Matrix inputs = as_matrix(p, clips(x, p.first, p.steps), temporaries);
    product(s.hidden, ux, inputs);
    product(s.candidate, vx, inputs);
    steps_by_blocks(p, weight, w, s, save, start, o, o_n);
    return {o, o_n, hidden, gates};
  }
#endif
  const int64_t per_step = 3 * Temporaries::bytes_of(p.C, M, p.scalar) + Temporaries::bytes_of(p.C, M, p.state);
  const int64_t of_all =
      2 * Temporaries::bytes_of(p.C, p.columns(), p.scalar) + Temporaries::bytes_of(2 * p.R, p.columns(), p.scalar);
  Temporaries temporaries(p, x, per_step + of_all);
  const bool in_place = !p.copied() && (p.by_column || p.N == 1);  // the last state's memory is a matrix
  const Matrix state = in_place ? matrix_in(p, o_n, p.C, M) : temporaries.take(p.C, M, p.state);
  copy_sequence(state.sequence(p), as_sequence(start));
#ifdef RCU_OPS_WITH_CUDA
  if (p.persistent) {
    const auto all = [&](int64_t features) { return temporaries.take(features, p.columns(), p.scalar); };
    const Saved s = save ? saved_in(p, hidden, gates) : Saved{all(2 * p.R), {}, {}, all(p.C)};
    const Matrix inputs = as_matrix(p, clips(x, p.first, p.steps), temporaries);
    product(s.hidden, ux, inputs);
    product(s.candidate, vx, inputs);
    steps_in_one_launch(p, weight, w, s, save, state, o, temporaries);
    if (!in_place) copy_sequence(as_sequence(o_n), state.sequence(p));
    return {o, o_n, hidden, gates};
  }
#endif
  const bool one_type = p.state == p.scalar;
  const Matrix low = one_type ? state : temporaries.take(p.C, M, p.scalar);
  if (!one_type) copy_sequence(low.sequence(p), as_sequence(start));

  // A copy that the products of all clips have read is not read again: its memory serves the steps.
  const Tensor clips_in = clips(x, p.first, p.steps);
  const Matrix inputs = as_matrix(p, clips_in, temporaries);
  const int64_t spare = inputs.data == pointer(clips_in) ? 0 : p.steps;  // matrices of one step
  const auto of_step = [&](int64_t i) {
    if (i >= spare) return temporaries.take(p.C, M, p.scalar);
    Matrix m = inputs;
    m.data += i * p.C * M * m.element();
    m.columns = M;
    if (!m.by_column) m.pitch = M;
    return m;
  };
  const Matrix gated = of_step(0);
  const Products products(p, temporaries, x.is_cuda(), M);
  Saved s;
  if (save) {
    s = saved_in(p, hidden, gates);
  } else {  // r and z of one step at a time, r where its product with the state will be
    s.r = gated;
    s.z = of_step(1);
    s.hidden = temporaries.take(2 * p.R, p.columns(), p.scalar);
    s.candidate = temporaries.take(p.C, p.columns(), p.scalar);
  }
  product(s.hidden, ux, inputs);
  product(s.candidate, vx, inputs);
  for (int64_t k = 0; k < p.steps; ++k) {
    const Saved now{s.hidden.step(p, k), save ? s.r.step(p, k) : s.r, save ? s.z.step(p, k) : s.z,
                    s.candidate.step(p, k)};
    step(p, weight, low, state, now, products, gated, save, true, one_type ? Plane{} : low.plane(p),
         p.copied() ? Plane{} : plane_of(clip(o, p.first + k)));
    if (p.copied()) copy_sequence(clips(o, p.first + k, 1), low.sequence(p));
  }
  if (!in_place) copy_sequence(as_sequence(o_n), state.sequence(p));
  return {o, o_n, hidden, gates};
}

#ifdef RCU_OPS_WITH_CUDA
struct Gradients {  // as d_output, d_gates and d_hidden write them
  const Matrix &du, &dc, &dr, &dz, &gated;
};

// All steps' gradients in one launch; carry (fp32) holds that of the last state and then that of the first.
void gradients_in_one_launch(const Problem& p, const fast_gru::PersistentPlan& plan, const Weights& w,
                             const Tensor& w_both, const Saved& s, const Matrix& before,
                             const std::optional<Tensor>& grad_o, const Matrix& carry, const Gradients& d) {
  const Tensor uo = torch::stable::contiguous(w.uo), vo = torch::stable::contiguous(w.vo);
  const Tensor both = torch::stable::contiguous(w_both);
  fast_gru::StepsBackward steps;
  steps.dtype = p.dtype;
  steps.rows = p.step_columns(), steps.C = p.C, steps.R = p.R, steps.steps = p.steps, steps.positions = p.P;
  steps.uo = pointer(uo), steps.w = pointer(both), steps.vo = pointer(vo);
  steps.hidden = s.hidden.data, steps.r = s.r.data, steps.z = s.z.data, steps.candidate = s.candidate.data;
  steps.before = before.data;
  if (grad_o) {
    const Tensor grad = clips(*grad_o, p.first, p.steps);
    steps.grad = pointer(grad), steps.grad_sample = grad.stride(0), steps.grad_step = grad.stride(1);
  }
  steps.carry = reinterpret_cast<float*>(carry.data);
  steps.dc = d.dc.data, steps.dr = d.dr.data, steps.dz = d.dz.data, steps.du = d.du.data, steps.gated = d.gated.data;
  launch_on_gpu(
      steps, uo, [&](const fast_gru::StepsBackward&) { return cuda::Scratch{plan.scratch_bytes, {}}; },
      [&](const fast_gru::StepsBackward& all, void* scratch, CUstream_st* stream) {
        return cuda::steps_backward(all, plan, scratch, stream);
      });
}
#endif

#ifdef RCU_OPS_WITH_CUDA
// The same by columns.
void gradients_by_blocks(const Problem& p, const fast_gru::ColumnsPlan& plan, const Weights& w, const Tensor& w_both,
                         const Saved& s, const Matrix& before, const std::optional<Tensor>& grad_o, const Matrix& carry,
                         const Gradients& d) {
  const Tensor uo = torch::stable::contiguous(w.uo), vo = torch::stable::contiguous(w.vo);
  const Tensor both = torch::stable::contiguous(w_both);
  fast_gru::ColumnStepsBackward all;
  all.dtype = p.dtype;
  all.samples = p.N, all.positions = p.P, all.C = p.C, all.R = p.R, all.steps = p.steps;
  all.uo = pointer(uo), all.w = pointer(both), all.vo = pointer(vo);
  all.hidden = view_of(p, s.hidden), all.r = view_of(p, s.r), all.z = view_of(p, s.z),
  all.candidate = view_of(p, s.candidate), all.before = view_of(p, before);
  if (grad_o) all.grad = view_of(p, clips(*grad_o, p.first, p.steps));
  all.carry = view_of(p, carry);
  all.dc = view_of(p, d.dc), all.dr = view_of(p, d.dr), all.dz = view_of(p, d.dz), all.du = view_of(p, d.du),
  all.gated = view_of(p, d.gated);
  launch_on_gpu(
      all, uo, [](const fast_gru::ColumnStepsBackward&) { return cuda::Scratch{}; },
      [&](const fast_gru::ColumnStepsBackward& problem, void*, CUstream_st* stream) {
        return cuda::column_steps_backward(problem, plan, stream);
      });
}
#endif

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    std::optional<Tensor> grad_o, std::optional<Tensor> grad_o_n, Tensor x, Tensor ux, Tensor uo, Tensor w, Tensor vx,
    Tensor vo, std::optional<Tensor> o0, Tensor o, Tensor hidden, Tensor gates, bool need_x, bool need_weights) {
  const Problem p = checked(x, ux, uo, w, vx, vo, o0);
  const Weights weight = split(ux, uo, w, vx, vo);
  const auto [N, K, C, L, H, W] = std::array{p.N, p.K, p.C, p.sizes[0], p.sizes[1], p.sizes[2]};
  check_shape("o", o, {N, K, C, L, H, W}, "of x");
  check_dtype("o", o, p.scalar);
  check_device("o", o, x, "x");
  check(grad_o || grad_o_n, "grad_o, grad_o_n: expected at least one of them, got none");
  if (grad_o) {
    check_shape("grad_o", *grad_o, {N, K, C, L, H, W}, "of x");
    check_dtype("grad_o", *grad_o, p.scalar);
    check_device("grad_o", *grad_o, x, "x");
    if (!adjacent(p, *grad_o)) {
      Tensor laid_out = empty_sequence(p, x, p.by_column);
      copy_sequence(laid_out, *grad_o);
      grad_o = laid_out;
    }
  }
  if (grad_o_n) {
    check_shape("grad_o_n", *grad_o_n, {N, C, L, H, W}, "[N,C,L,H,W]");
    check_dtype("grad_o_n", *grad_o_n, p.state);
    check_device("grad_o_n", *grad_o_n, x, "x");
  }
  const bool saved = hidden.numel() > 0;
  if (saved) {
    check_shape("hidden", hidden, {2 * p.R * p.columns()}, "as the forward pass returns it");
    check_shape("gates", gates, {3 * C * p.columns()}, "as the forward pass returns it");
    for (const Tensor* tensor : {&hidden, &gates}) {
      check_dtype("hidden, gates", *tensor, p.scalar);
      check_device("hidden, gates", *tensor, x, "x");
    }
    hidden = torch::stable::contiguous(hidden);
    gates = torch::stable::contiguous(gates);
  }
  if (in_fp32(p, x)) {
    const auto wide = [](const auto& tensor) { return in_type(tensor, ScalarType::Float); };
    const auto narrow = [&](const Tensor& tensor) { return in_type(tensor, p.scalar); };
    const auto [dx, dux, duo, dw, dvx, dvo, do0] =
        backward(wide(grad_o), grad_o_n, wide(x), wide(ux), wide(uo), wide(w), wide(vx), wide(vo), wide(o0), wide(o),
                 wide(hidden), wide(gates), need_x, need_weights);
    return {narrow(dx),
            narrow(dux),
            narrow(duo),
            narrow(dw),
            narrow(dvx),
            narrow(dvo),
            in_type(do0, o0 ? o0->scalar_type() : p.scalar)};
  }

  // As matrices lie; copied at the end where the caller's lie differently.
  Tensor dx = need_x ? empty_sequence(p, x, p.by_column) : empty_of(x, {0});
  Tensor do0 = o0 ? empty_state(p, x, o0->scalar_type(), p.by_column) : empty_of(x, {0});
  const auto gradient = [&](std::initializer_list<int64_t> shape) {
    return need_weights ? empty_of(x, shape) : empty_of(x, {0});
  };
  Tensor dux = gradient({2 * p.R, C}), duo = gradient({2 * p.R, C}), dw = gradient({2, C, p.R}), dvx = gradient({C, C}),
         dvo = gradient({C, C});
  const int64_t M = p.step_columns(), S = p.columns();
  if (S == 0)
    for (Tensor* t : {&dux, &duo, &dw, &dvx, &dvo}) torch::stable::zero_(*t);
  const auto result = [&] {
    if (p.copied() && need_x) {
      const Tensor inner = dx;
      copy_sequence(dx = empty_sequence(p, x, p.innermost), inner);
    }
    if (p.copied() && o0) {
      const Tensor inner = do0;
      copy_sequence(as_sequence(do0 = empty_state(p, x, o0->scalar_type(), p.innermost)), as_sequence(inner));
    }
    return std::tuple{dx, dux, duo, dw, dvx, dvo, do0};
  };
  if (M == 0) return result();

  Temporaries temporaries(p, x,
                          Temporaries::bytes_of(C, M, p.state) + 2 * Temporaries::bytes_of(C, M, p.scalar) +
                              6 * Temporaries::bytes_of(C, S, p.scalar) + Temporaries::bytes_of(2 * p.R, S, p.scalar));
  const Matrix carry = temporaries.take(C, M, p.state);
  if (grad_o_n) {
    copy_sequence(carry.sequence(p), as_sequence(*grad_o_n));
  } else {
    Tensor memory = carry.tensor();
    torch::stable::zero_(memory);
  }
  const Plane none{};
  const auto grad_plane = [&](int64_t k) { return grad_o ? plane_of(clip(*grad_o, k)) : none; };
  Matrix state_product;  // U_o^T du of the step after

  if (S > 0) {
    Matrix before;  // the state before each step
    if (!o0) {
      before = as_matrix(p, clips(o, 0, p.steps), temporaries);
    } else {
      before = temporaries.take(C, S, p.scalar);
      copy_sequence(before.step(p, 0).sequence(p), as_sequence(*o0));
      if (p.steps > 1) copy_sequence(before.part(true, M, S - M).sequence(p), clips(o, 0, p.steps - 1));
    }
    const Tensor steps = clips(x, p.first, p.steps);
    const Matrix inputs = need_weights || !saved ? as_matrix(p, steps, temporaries) : Matrix{};
    Saved s;
    const Matrix gated = temporaries.take(C, S, p.scalar);
    if (saved) {
      s = saved_in(p, hidden, gates);
    } else {  // all states are known, so all steps at once
      s = {temporaries.take(2 * p.R, S, p.scalar), temporaries.take(C, S, p.scalar), temporaries.take(C, S, p.scalar),
           temporaries.take(C, S, p.scalar)};
      // Few weights of fp32: others would be widened, or panels of all columns lie, where the temporaries are.
      if (p.dtype == DType::f32 && fast_gru::few_weights(p.C, p.R) && in_panels(p, x, S)) {
        gates_by_columns(p, {ux, uo, w, vx, vo}, inputs, before, s);
      } else {
        product(s.hidden, ux, inputs);
        product(s.candidate, vx, inputs);
        Matrix state = before;
        if (p.state != p.scalar) {
          state = temporaries.take(C, S, p.state);
          copy(state.tensor(), before.tensor());
        }
        step(p, weight, before, state, s, Products(p, temporaries, x.is_cuda(), S), gated, true);
      }
    }
    const Matrix du = temporaries.take(2 * p.R, S, p.scalar), dc = temporaries.take(C, S, p.scalar),
                 dr = temporaries.take(C, S, p.scalar), dz = temporaries.take(C, S, p.scalar);
    const auto one_by_one = [&] {
      const Matrix q = temporaries.take(C, M, p.scalar);
      // U_o^T du joins the gradient of the state before: at once, or by the next pass.
      const bool at_once = !x.is_cuda() && p.state == p.scalar;
      const Matrix from_later = at_once ? Matrix{} : temporaries.take(C, M, p.scalar);
      const Tensor uo_t = transposed(uo), vo_t = transposed(vo), wr_t = transposed(weight.wr),
                   wz_t = transposed(weight.wz);
      for (int64_t k = p.steps - 1; k >= 0; --k) {
        const auto at = [&](const Matrix& m) { return m.step(p, k).plane(p); };
        run(over(p, Pass::d_output, C, M,
                 {carry.plane(p), state_product.data ? state_product.plane(p) : none, grad_plane(p.first + k), at(s.z),
                  at(s.candidate), at(before), at(dc), at(dz)}),
            x);
        product(q, vo_t, dc.step(p, k));
        run(over(p, Pass::d_gates, C, M, {carry.plane(p), q.plane(p), at(s.r), at(before), at(dr), at(gated)}), x);
        const Matrix now = du.step(p, k);
        product(now.part(false, 0, p.R), wr_t, dr.step(p, k));
        product(now.part(false, p.R, p.R), wz_t, dz.step(p, k));
        run(over(p, Pass::d_hidden, 2 * p.R, M, {now.plane(p), at(s.hidden)}), x);
        if (at_once) {
          add_product(carry, uo_t, now);
        } else {
          product(from_later, uo_t, now);
          state_product = from_later;
        }
      }
    };
#ifdef RCU_OPS_WITH_CUDA
    // Without the forward pass's plan matrices may lie in the other order.
    const auto plan = p.persistent ? one_launch(p, x, true) : std::nullopt;
    const auto by_blocks = p.by_blocks ? columns_by_blocks(p, x, true) : std::nullopt;
    if (by_blocks)
      gradients_by_blocks(p, *by_blocks, weight, w, s, before, grad_o, carry, {du, dc, dr, dz, gated});
    else if (plan)
      gradients_in_one_launch(p, *plan, weight, w, s, before, grad_o, carry, {du, dc, dr, dz, gated});
    else
#endif
      one_by_one();
    if (need_weights) {
      outer_product(p, dux, du, inputs);
      outer_product(p, duo, du, before);
      outer_product(p, torch::stable::select(dw, 0, 0), dr, s.hidden.part(false, 0, p.R));
      outer_product(p, torch::stable::select(dw, 0, 1), dz, s.hidden.part(false, p.R, p.R));
      outer_product(p, dvx, dc, inputs);
      outer_product(p, dvo, dc, gated);
    }
    if (need_x) {  // dr and dz are free now
      const Matrix beside = x.is_cuda() ? dz : Matrix{};
      product(dr, transposed(ux), du);
      add(p, beside, dr, transposed(vx), dc);
      if (p.N < p.steps) {  // all steps of a sample, or all samples of a step
        for (int64_t n = 0; n < p.N; ++n) {
          const Tensor some = torch::stable::select(dx, 0, n);
          const auto of_sample = [&](const Matrix& m) {
            Plane plane = m.plane(p);
            plane.data = static_cast<char*>(plane.data) + n * plane.segment * m.element();
            plane.segment *= p.N;
            return plane;
          };
          const Plane to{static_cast<char*>(pointer(some)) + p.first * some.stride(0) * dr.element(), some.stride(1),
                         some.stride(0)};
          run(over(p, Pass::sum, C, p.steps * p.P, {to, none, of_sample(dr), beside.data ? of_sample(beside) : none}),
              x);
        }
      } else {
        for (int64_t k = 0; k < p.steps; ++k)
          run(over(p, Pass::sum, C, M,
                   {plane_of(clip(dx, p.first + k)), none, dr.step(p, k).plane(p),
                    beside.data ? beside.step(p, k).plane(p) : none}),
              x);
      }
    }
  }
  const Plane last_product = state_product.data ? state_product.plane(p) : none;
  if (o0) {
    Elementwise sum = over(p, Pass::sum, C, M, {plane_of(do0), carry.plane(p), last_product});
    sum.wide = o0->scalar_type() == p.state;
    run(sum, x);
  } else if (need_x) {
    run(over(p, Pass::sum, C, M, {plane_of(clip(dx, 0)), carry.plane(p), last_product, grad_plane(0)}), x);
  }
  return result();
}

}  // namespace
}  // namespace rcu_ops::bindings

STABLE_TORCH_LIBRARY_IMPL(rcu_ops, CPU, m) {
  m.impl("fast_gru", TORCH_BOX(&rcu_ops::bindings::forward));
  m.impl("fast_gru_backward", TORCH_BOX(&rcu_ops::bindings::backward));
}

#ifdef RCU_OPS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(rcu_ops, CUDA, m) {
  m.impl("fast_gru", TORCH_BOX(&rcu_ops::bindings::forward));
  m.impl("fast_gru_backward", TORCH_BOX(&rcu_ops::bindings::backward));
}
#endif
