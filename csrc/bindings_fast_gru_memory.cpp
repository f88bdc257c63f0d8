// fast_gru: tensors of the caller as matrices and views, and new ones.
#include <vector>

#include "bindings_fast_gru.h"

namespace rcu_ops::bindings::gru {

namespace {

bool same_strides(const Tensor& tensor, const std::array<int64_t, 6>& wanted) {
  for (int i = 0; i < 6; ++i)
    if (tensor.size(i) > 1 && tensor.stride(i) != wanted[i]) return false;
  return true;
}

Tensor permuted(const Tensor& tensor, std::vector<int64_t> order) {
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(tensor), from(order)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::permute", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

Tensor transposed(const Tensor& matrix) {
  Tensor copy = matrix;
  return torch::stable::transpose(copy, 0, 1);
}

void copy(Tensor to, const Tensor& from) { torch::stable::copy_(to, from); }

Tensor in_type(const Tensor& tensor, ScalarType scalar) { return torch::stable::to(tensor, scalar); }
std::optional<Tensor> in_type(const std::optional<Tensor>& tensor, ScalarType scalar) {
  return tensor ? std::optional(in_type(*tensor, scalar)) : std::nullopt;
}

Tensor clips(const Tensor& sequence, int64_t from, int64_t count) {
  Tensor copy = sequence;
  return torch::stable::narrow(copy, 1, from, count);
}
Tensor clip(const Tensor& sequence, int64_t k) { return torch::stable::select(sequence, 1, k); }

Tensor as_sequence(const Tensor& state) { return torch::stable::unsqueeze(state, 1); }

std::optional<fast_gru::View> view_in_place(const Tensor& sequence) {
  const int64_t channels = sequence.size(2), channel = sequence.stride(2);
  // Strides of the last dimension with more than one position (0 where it is expanded), and of the one around it.
  int64_t position = -1, next = 0;
  bool adjacent = true;
  for (int i = 5; i > 2; --i) {
    if (sequence.size(i) == 1) continue;
    if (position < 0) position = next = sequence.stride(i);
    adjacent &= sequence.stride(i) == next;
    next *= sequence.size(i);
  }
  if (position < 0) position = channel == 1 ? channels : 1;
  if (channels > 1 && channel != 1) adjacent &= position == 1;
  if (!adjacent) return std::nullopt;
  return fast_gru::View{pointer(sequence), sequence.stride(0), sequence.stride(1), channel, position};
}

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

Matrix matrix_in(const Problem& p, const Tensor& memory, int64_t features, int64_t columns, int64_t offset) {
  Matrix m;
  m.memory = memory;
  m.scalar = memory.scalar_type();
  m.data = static_cast<char*>(pointer(memory)) + offset * m.element();
  m.features = features, m.columns = columns;
  m.by_column = p.by_column;
  m.pitch = p.by_column ? features : columns;
  return m;
}

Matrix matrix_of(const Problem& p, const Tensor& sequence) {
  Matrix m;
  m.memory = sequence;
  m.scalar = sequence.scalar_type();
  m.features = p.C, m.columns = sequence.size(1) * p.step_columns(), m.by_column = p.by_column;
  m.pitch = p.by_column ? p.C : m.columns;
  if (same_strides(sequence, m.sequence_strides(p))) m.data = static_cast<char*>(pointer(sequence));
  return m;
}

Matrix as_matrix(const Problem& p, const Tensor& sequence, Temporaries& temporaries) {
  Matrix m = matrix_of(p, sequence);
  if (m.data) return m;
  m = temporaries.take(p.C, sequence.size(1) * p.step_columns(), sequence.scalar_type());
  copy_sequence(m.sequence(p), sequence);
  return m;
}

Saved saved_in(const Problem& p, const Tensor& hidden, const Tensor& gates) {
  const int64_t size = p.C * p.columns();
  return {matrix_in(p, hidden, 2 * p.R, p.columns()), matrix_in(p, gates, p.C, p.columns()),
          matrix_in(p, gates, p.C, p.columns(), size), matrix_in(p, gates, p.C, p.columns(), 2 * size)};
}

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

Tensor empty_sequence(const Problem& p, const Tensor& x, bool innermost) {
  if (!innermost) return empty_of(x, {p.N, p.K, p.C, p.sizes[0], p.sizes[1], p.sizes[2]});
  return permuted(empty_of(x, {p.N, p.K, p.sizes[0], p.sizes[1], p.sizes[2], p.C}), {0, 1, 5, 2, 3, 4});
}

Tensor empty_state(const Problem& p, const Tensor& x, ScalarType scalar, bool innermost) {
  const auto [L, H, W] = p.sizes;
  const int64_t last[5] = {p.N, L, H, W, p.C}, second[5] = {p.N, p.C, L, H, W};
  Tensor state = empty_of(x, Sizes(innermost ? last : second, 5), scalar);
  return innermost ? permuted(state, {0, 4, 1, 2, 3}) : state;
}

}  // namespace rcu_ops::bindings::gru
