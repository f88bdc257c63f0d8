// What the files of fast_gru's bindings share: a problem, its matrices, and what each file does with them.
//
// bindings_fast_gru.cpp           the whole sequence, and the operators' registration
// bindings_fast_gru_backward.cpp  its gradients
// bindings_fast_gru_step.cpp      one step: products, and the passes between them
// bindings_fast_gru_launch.cpp    all steps in one call, where own kernels of the CPU or of a GPU make them
// bindings_fast_gru_problem.cpp   what is checked, and which way a problem is solved
// bindings_fast_gru_memory.cpp    tensors of the caller as matrices, and new ones
#pragma once

#include "bindings.h"
#include "common/fast_gru.h"
#include "cpu/memory.h"
#ifdef RCU_OPS_WITH_CUDA
#include "cuda/fast_gru.h"
#endif

namespace rcu_ops::bindings::gru {

using fast_gru::Elementwise;
using fast_gru::Pass;
using fast_gru::Plane;

constexpr int weights = 5;
struct Weights {  // U_x, U_o [2R,C], W_r, W_z [C,R], V_x, V_o [C,C]
  Tensor ux, uo, wr, wz, vx, vo;
};

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

// In memory of its own from element `offset` on.
Matrix matrix_in(const Problem& p, const Tensor& memory, int64_t features, int64_t columns, int64_t offset = 0);

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
    if (bytes > left_) return matrix_in(problem_, empty_of(like_, {size}, scalar), features, columns);
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

// What a forward pass leaves for the backward one: h [2R, columns]; r, z, c [C, columns].
struct Saved {
  Matrix hidden, r, z, candidate;
};

// ---- bindings_fast_gru_problem.cpp -----------------------------------------------------------------------------

Problem checked(const Tensor& x, const Tensor& ux, const Tensor& uo, const Tensor& w, const Tensor& vx,
                const Tensor& vo, const std::optional<Tensor>& o0);
Weights split(const Tensor& ux, const Tensor& uo, const Tensor& w, const Tensor& vx, const Tensor& vo);
// Whether the CPU's own kernels make all steps of so many columns; whether the library's products are made in fp32.
bool in_panels(const Problem& p, const Tensor& x, int64_t columns);
bool in_fp32(const Problem& p, const Tensor& x);
// Whether they make all steps' gradients.
bool gradients_in_panels(const Problem& p, const Tensor& x);
// The same problem in fp32: its matrices, those that are saved among them, lie as they would.
Problem as_fp32(const Problem& p);
#ifdef RCU_OPS_WITH_CUDA
// How one launch would make all steps; nothing where none can.
std::optional<fast_gru::PersistentPlan> one_launch(const Problem& p, const Tensor& x, bool backward);
std::optional<fast_gru::ColumnsPlan> columns_by_blocks(const Problem& p, const Tensor& x, bool backward);
#endif

// ---- bindings_fast_gru_memory.cpp ------------------------------------------------------------------------------

Tensor transposed(const Tensor& matrix);
void copy(Tensor to, const Tensor& from);
Tensor in_type(const Tensor& tensor, ScalarType scalar);
std::optional<Tensor> in_type(const std::optional<Tensor>& tensor, ScalarType scalar);
// Clips [from, from + count) of a sequence [N,K,C,L,H,W]; one of them; a state or clip as a sequence of one.
Tensor clips(const Tensor& sequence, int64_t from, int64_t count);
Tensor clip(const Tensor& sequence, int64_t k);
Tensor as_sequence(const Tensor& state);
// The memory of a sequence [N,K,C,L,H,W] as kernels of the CPU walk it: channels or positions adjacent, and positions
// at one distance from each other.
std::optional<fast_gru::View> view_in_place(const Tensor& sequence);
// Sequences of one shape, that of x in sizes but for the clips. PyTorch's copy would take numbers one by one where the
// order of channels and positions changes.
void copy_sequence(const Tensor& to, const Tensor& from);
// Clips as a matrix in their own memory, without data where they are none; the same, copied where they are none.
Matrix matrix_of(const Problem& p, const Tensor& sequence);
Matrix as_matrix(const Problem& p, const Tensor& sequence, Temporaries& temporaries);
Saved saved_in(const Problem& p, const Tensor& hidden, const Tensor& gates);
// A state [N,C,L,H,W] or a clip: as the output sequence lies, positions (and features) of a sample without a gap.
Plane plane_of(const Tensor& state);
// Whether every clip of the sequence lies like that.
bool adjacent(const Problem& p, const Tensor& sequence);
Tensor empty_sequence(const Problem& p, const Tensor& x, bool innermost);
Tensor empty_state(const Problem& p, const Tensor& x, ScalarType scalar, bool innermost);

// ---- bindings_fast_gru_step.cpp --------------------------------------------------------------------------------

// out = weight in, over features.
void product(const Matrix& out, const Tensor& weight, const Matrix& in);
// out += weight in, on the CPU, where the library adds while it has the product in registers.
void add_product(const Matrix& out, const Tensor& weight, const Matrix& in);
// The same, as exact as PyTorch's gradient of a convolution: for less than 12 columns MKL may add up all features of a
// number in one chain (measured on Zen 4: 3 to 4 times the error), so they are added up in pieces.
void exact_product(const Matrix& out, const Tensor& weight, const Matrix& in, bool add = false);
// to += weight in; or the product `beside` it, if there is such a place, returned for a pass to add.
Plane add(const Problem& p, const Matrix& beside, const Matrix& to, const Tensor& weight, const Matrix& in);
// out [features of d, features of in] = sum over columns of d in^T. Sums of small results are made in pieces, so that
// their rounding error does not grow with the number of columns; for large ones adding the pieces would cost as much as
// the product, and 16-bit pieces would each be rounded.
void outer_product(const Problem& p, const Tensor& out, const Matrix& d, const Matrix& in);
// A pass over all columns of matrices with these features; and what runs it.
Elementwise over(const Problem& p, Pass kind, int64_t features, int64_t columns, std::initializer_list<Plane> planes);
void run(const Elementwise& pass, const Tensor& like);

// What U_o and V_o make on a GPU, where the pass that follows adds it; on the CPU the products add by themselves.
struct Products {
  Matrix hidden, candidate;

  Products(const Problem& p, Temporaries& temporaries, bool cuda, int64_t columns) {
    if (!cuda) return;
    hidden = temporaries.take(2 * p.R, columns, p.scalar);
    candidate = temporaries.take(p.C, columns, p.scalar);
  }
};

// One step: from h = U_x x and c = V_x x in place to the gates, which without `keep` need not be left there, and the
// next state. low is the state in the data's type, state in the arithmetic's.
void step(const Problem& p, const Weights& w, const Matrix& low, const Matrix& state, const Saved& s,
          const Products& products, const Matrix& gated, bool keep, Plane low_out, Plane out);

// ---- bindings_fast_gru_launch.cpp ------------------------------------------------------------------------------

// All steps on the CPU by columns: s is what to save, if anything.
void steps_by_columns(const Problem& p, const Tensor& x, std::array<Tensor, weights> given, const Tensor& start,
                      const Saved& s, const Tensor& o, const Tensor& o_n);
// Their gradients on the CPU by columns, of tensors of the caller: into dx, do0 and the weights' gradients, those that
// have elements.
void gradients_by_columns(const Problem& p, const Tensor& x, std::array<Tensor, weights> given,
                          const std::optional<Tensor>& o0, const Tensor& o, const Saved& s,
                          const std::optional<Tensor>& grad_o, const std::optional<Tensor>& grad_o_n, const Tensor& dx,
                          const Tensor& do0, const std::array<Tensor, weights>& d);
#ifdef RCU_OPS_WITH_CUDA
// All steps in one launch: hidden and candidate hold the products of x, state (fp32) the first state and then the last.
void steps_in_one_launch(const Problem& p, const Weights& w, const Tensor& w_both, const Saved& s, bool save,
                         const Matrix& state, const Tensor& o, Temporaries& temporaries);
// All steps on a GPU by columns, and the first state as clip 0 where that is no step: hidden and candidate hold the
// products of x where the plan does not make them.
void steps_by_blocks(const Problem& p, const Tensor& x, const Weights& w, const Tensor& w_both, const Saved& s,
                     bool save, const Tensor& start, const Tensor& o, const Tensor& o_n);

struct Gradients {  // as d_output, d_gates and d_hidden write them
  const Matrix &du, &dc, &dr, &dz, &gated;
};

// All steps' gradients in one launch; carry (fp32) holds that of the last state and then that of the first. The same by
// columns.
void gradients_in_one_launch(const Problem& p, const fast_gru::PersistentPlan& plan, const Weights& w,
                             const Tensor& w_both, const Saved& s, const Matrix& before,
                             const std::optional<Tensor>& grad_o, const Matrix& carry, const Gradients& d);
void gradients_by_blocks(const Problem& p, const fast_gru::ColumnsPlan& plan, const Weights& w, const Tensor& w_both,
                         const Saved& s, const Matrix& before, const std::optional<Tensor>& grad_o, const Matrix& carry,
                         const Gradients& d);
#endif

// ---- the operators ---------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor x, Tensor ux, Tensor uo, Tensor w, Tensor vx, Tensor vo,
                                                   std::optional<Tensor> o0, bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    std::optional<Tensor> grad_o, std::optional<Tensor> grad_o_n, Tensor x, Tensor ux, Tensor uo, Tensor w, Tensor vx,
    Tensor vo, std::optional<Tensor> o0, Tensor o, Tensor hidden, Tensor gates, bool need_x, bool need_weights);

}  // namespace rcu_ops::bindings::gru
