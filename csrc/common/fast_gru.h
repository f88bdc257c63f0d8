// fast_gru: the elementwise passes between its matrix products, as the bindings describe them to the CPU and CUDA
// kernels.
//
// The products are the library's (bindings_fast_gru_step.cpp); everything between two of them is one pass over memory. A
// pass knows neither features nor positions: without a bias all elements are alike, so an operand is rows x segments x
// length elements, of which `length` are adjacent. [features][columns] has features as rows and samples as segments;
// [columns][features] has samples as segments alone; and what is contiguous in all operands is merged before a kernel
// sees it.
#pragma once

#include <cstdint>

#include "types.h"

namespace rcu_ops::fast_gru {

// Element strides from one row and one segment to the next; data null: the operand is absent.
struct Plane {
  void* data = nullptr;
  int64_t row = 0, segment = 0;
};

// T: the data's type; S: fp64 for fp64, else fp32. Arithmetic is in S.
enum class Pass : int32_t {
  // 0 h (T, in and out), 1 product (T, may be absent):  h = relu(h + product)
  hidden,
  // 0 r, 1 z (T, in and out), 2 state (S), 3 gated (T, out):  r = sigmoid(r); z = sigmoid(z); gated = r state.
  // Without `keep` gated = sigmoid(r) state alone, which may lie where r does.
  gates,
  // 0 c (T, in and out), 1 product (may be absent), 2 z (T), 3 state (S, in and out), 4 low, 5 out (T, out, may be
  //   absent): c = tanh(c + product); low = out = state = (1 - z) state + z c.
  // Without `keep` z is sigmoid(z) and c is not written.
  output,
  // 0 carry (S, in and out), 1 product, 2 grad (T, may be absent), 3 z, 4 c, 5 before (T), 6 dc, 7 dz (T, out):
  //   g = carry + product + grad; dc = g z (1 - c^2); dz = g (c - before) z (1 - z); carry = g (1 - z)
  d_output,
  // 0 carry (S, in and out), 1 q, 2 r, 3 before (T), 4 dr, 5 gated (T, out):
  //   dr = q before r (1 - r); gated = r before; carry += q r
  d_gates,
  // 0 d (T, in and out), 1 h (T):  d = h <= 0 ? 0 : d, which passes NaN
  d_hidden,
  // 0 out (T, or S if wide), 1 a (S), 2 b, 3 c (T, each may be absent):  out = a + b + c
  sum,
};
constexpr int most_planes = 8;

struct Elementwise {
  Pass pass = Pass::sum;
  DType dtype = DType::f32;
  int64_t rows = 1, segments = 1, length = 0;
  Plane plane[most_planes];
  bool wide = false;
  bool keep = true;  // gates and output: r, z and c are what a backward pass needs
};

constexpr int64_t elements(const Elementwise& p) { return p.rows * p.segments * p.length; }

// Segments that follow one another without a gap in every operand become one, and then rows likewise.
inline void merge(Elementwise& p) {
  bool segments = true, rows = true;
  for (const Plane& plane : p.plane) {
    if (!plane.data) continue;
    segments &= p.segments == 1 || plane.segment == p.length;
    rows &= p.rows == 1 || plane.row == p.segments * p.length;
  }
  if (!segments) return;
  p.length *= p.segments;
  p.segments = 1;
  if (!rows) return;
  p.length *= p.rows;
  p.rows = 1;
}

// All steps from the products of x on, in one launch. Matrices are [rows][features] without gaps; a row is a position
// of a sample, and matrices of all steps have their rows one step after the other. T: the data's type.
struct Steps {
  DType dtype = DType::bf16;
  int64_t rows = 0, C = 0, R = 0, steps = 0, positions = 0;  // positions of a sample
  const void *uo = nullptr, *w = nullptr, *vo = nullptr;     // T: [2R,C], [2,C,R], [C,C]
  // T, of all steps: [2R] U_x x and [C] V_x x; with `save` they become r' and z', and the candidates, and r and z [C]
  // are written.
  void *hidden = nullptr, *candidate = nullptr, *r = nullptr, *z = nullptr;
  bool save = false;
  float* state = nullptr;  // [C], the state before the first step and after the last
  void* out = nullptr;     // T: the state after step k of position i of sample n, at n out_sample + k out_step + i C
  int64_t out_sample = 0, out_step = 0;
};

// The gradients of all steps, from the last to the first, in one launch; what is left are products of all steps at
// once: the weights' gradients and that of x. Matrices as in Steps.
struct StepsBackward {
  DType dtype = DType::bf16;
  int64_t rows = 0, C = 0, R = 0, steps = 0, positions = 0;
  const void *uo = nullptr, *w = nullptr, *vo = nullptr;  // T: [2R,C], [2,C,R], [C,C]
  // T, of all steps: r' and z' [2R]; r, z, the candidate and the state before the step [C].
  const void *hidden = nullptr, *r = nullptr, *z = nullptr, *candidate = nullptr, *before = nullptr;
  const void* grad = nullptr;  // T: of the states, placed as Steps::out; or null
  int64_t grad_sample = 0, grad_step = 0;
  float* carry = nullptr;  // [C], the gradient of the last state, in, and of the first state, out
  // T, of all steps: the gradients before the activations of the candidate, r and z [C] and of r' and z' [2R]; r *
  // state [C].
  void *dc = nullptr, *dr = nullptr, *dz = nullptr, *du = nullptr, *gated = nullptr;
};

// A sequence [samples][steps][channels][positions] with adjacent positions (position = 1) or adjacent channels (channel
// = 1); strides in elements. data null: the operand is absent.
struct View {
  void* data = nullptr;
  int64_t sample = 0, step = 0, channel = 0, position = 0;
};

// All steps on the CPU, columns taken through all of them in one core's caches (cpu/fast_gru_columns.h). Arithmetic in
// fp32; products of bf16 where a processor multiplies pairs of them.
struct Columns {
  DType dtype = DType::f32, start_dtype = DType::f32;  // of data and weights; of the first state. Not fp64
  int64_t samples = 0, positions = 0, C = 0, R = 0, steps = 0;
  const float *ux = nullptr, *uo = nullptr, *w = nullptr, *vx = nullptr, *vo = nullptr;  // dense; if narrow, of dtype
  bool narrow = false;
  View x, start;                      // start has one step
  View out, hidden, r, z, candidate;  // what is written of each step, of dtype
  View last;                          // has one step, fp32
};

// The gradients of all steps on the CPU, by columns too, from the last step to the first (cpu/fast_gru_gradients.h).
// Arithmetic in fp32; views are of dtype but for start and d_start (start_dtype) and d_last (fp32), which have one step.
struct ColumnsGradients {
  DType dtype = DType::f32, start_dtype = DType::f32;  // not fp64
  int64_t samples = 0, positions = 0, C = 0, R = 0, steps = 0;
  const void *ux = nullptr, *uo = nullptr, *w = nullptr, *vx = nullptr, *vo = nullptr;  // of dtype, dense
  View x, hidden, r, z, candidate;
  View start, before;  // the state before the first step, and before each of the others: step k at k - 1
  View grad, d_last;   // the gradients of the states after each step, and of the last state; may be absent
  View grad_start;     // what joins the gradient of the first state, of dtype; may be absent
  View dx, d_start;    // what is written; may be absent
  void *dux = nullptr, *duo = nullptr, *dw = nullptr, *dvx = nullptr, *dvo = nullptr;  // of dtype, dense; all or none
};

// The same on a GPU in one launch: the block that has a column takes it through all steps (cuda/fast_gru_columns.cu).
// Nothing in it depends on how columns are shared out. Not fp64. Views are of `dtype` but for start (start_dtype) and
// last (fp32); these and `first` have one step.
struct ColumnSteps {
  DType dtype = DType::bf16, start_dtype = DType::f32;
  int64_t samples = 0, positions = 0, C = 0, R = 0, steps = 0;
  const void *uo = nullptr, *w = nullptr, *vo = nullptr;  // of dtype, dense: [2R,C], [2,C,R], [C,C]
  // Where the plan makes the products with x: x and its weights [2R,C] and [C,C].
  const void *ux = nullptr, *vx = nullptr;
  View x;
  // Elsewhere U_x x and V_x x. With `save` r' and z', and the candidate, are written there, and r and z.
  View hidden, candidate, r, z;
  bool save = false;
  View start, out, last;
  View first;  // where the first state is written, too; may be absent
};

// The gradients of all steps, from the last to the first; what is left of a backward pass are products of all steps at
// once. carry (fp32, one step): the gradient of the last state, in, and of the first, out. grad may be absent. gated:
// r * before. All others of dtype.
struct ColumnStepsBackward {
  DType dtype = DType::bf16;
  int64_t samples = 0, positions = 0, C = 0, R = 0, steps = 0;
  const void *uo = nullptr, *w = nullptr, *vo = nullptr;
  View hidden, r, z, candidate, before, grad;
  View carry;
  View dc, dr, dz, du, gated;
};

// Columns of a piece of a sum over `columns`, `most` (a multiple of 8) at most: as many as leave no rest, which would be
// products and an addition of its own (on an H200 6 to 10 us for a weight), if half of `most` or more do; whole 16-byte
// words of fp32.
constexpr int64_t columns_of_piece(int64_t columns, int64_t most) {
  for (int64_t piece = most; piece >= most / 2; piece -= 4)
    if (columns % piece == 0) return piece;
  return most;
}
static_assert(columns_of_piece(15 * 784, 64) == 60 && columns_of_piece(15 * 196, 64) == 60);
static_assert(columns_of_piece(97, 64) == 64 && columns_of_piece(36, 16) == 12);

// A sequence copied from one order of memory into the other: in one view positions are adjacent, in the other channels.
// fp32. Nothing overlaps.
struct Reorder {
  int64_t samples = 0, steps = 0, channels = 0, positions = 0;
  View from, to;
};

// What one task is made of: so many channels of one clip, so that what is written stays in a first-level cache until
// its lines are whole.
inline constexpr int64_t reorder_channels = 64;
constexpr int64_t reorder_units(const Reorder& r) {
  return r.samples * r.steps * ((r.channels + reorder_channels - 1) / reorder_channels);
}

inline constexpr int most_vectors = 3;  // of columns in a panel
constexpr int64_t panel_numbers(int64_t C, int64_t R, int64_t columns) { return (5 * C + 2 * R) * columns; }

// Columns beyond whole vectors that are a thin panel, at most.
constexpr int most_thin(int lanes) { return lanes / 4; }

// What is done with all columns of a step before anything of the next phase: x is read; r' and z'; r, z and r * state;
// the candidate and the new state.
enum class Phase : int32_t { read, hidden, gates, output };
inline constexpr Phase phases[] = {Phase::read, Phase::hidden, Phase::gates, Phase::output};
constexpr int64_t phase_outputs(const Columns& p, Phase phase) { return phase == Phase::hidden ? 2 * p.R : p.C; }

// Outputs whose weights are read, and if need be widened, for all panels at once.
inline constexpr int64_t panel_rows = 64;
constexpr int64_t wide_numbers(int64_t C, int64_t R) { return panel_rows * (C > R ? C : R); }

// Few enough for every task to read them all from its second-level cache, beside a panel (1 MB).
constexpr bool few_weights(int64_t C, int64_t R) { return 6 * R * C + 2 * C * C <= 1 << 18; }

// So few that columns go through all steps by themselves however many threads there are.
constexpr bool very_few_weights(int64_t C, int64_t R) { return 6 * R * C + 2 * C * C <= 1 << 16; }

// Whether columns go through all steps by themselves; else the library makes the products of all columns, step by step.
//
// Own products save the library's calls, the passes through memory between them, and, of few weights, the threads'
// meeting after each; of many weights and few columns what the library spends on laying out the weights for its own
// loops, or multiplying 16-bit numbers at half of fp32's rate where there is neither AMX nor a fast instruction for
// pairs of bf16. Columns in panels are all there is to share where every task reads all of few weights: many threads
// leave them to the library.
constexpr bool by_columns(DType dtype, int64_t columns, int64_t C, int64_t R, int threads, bool amx = false,
                          bool avx512 = true) {
  if (dtype == DType::f64) return false;
  if (few_weights(C, R)) return very_few_weights(C, R) || threads <= 2 * ((columns + 15) / 16);
  // The panels of all columns stay near a second-level cache: 12 MB.
  if (panel_numbers(C, R, columns) > 3 << 20) return false;
  // Time of the library's products over that of panels, as measured on Emerald Rapids with C = 4 R = 512 to 2048 (AVX2:
  // with a library that is held to it, too). AVX-512: 1.25 for 49 columns, 1.0 for 196, 0.93 for 448 and more. AVX2: 0.86
  // for up to 5 columns, 1.05 to 1.3 for 16 to 49, 0.97 for 98 and more. bf16 is what the library does slowly: 1.1 to 5,
  // until it is made in fp32 (in_fp32). Where pairs of bf16 take a multiply-add's time (Zen 4, one core), both multiply
  // pairs: 1.9 for 4 to 16 columns, 1.04 to 1.2 for 49, 1.05 to 1.1 for 196, 1.0 for 392.
  if (dtype == DType::f32) return avx512 ? columns <= 256 : columns >= 8 && columns <= 64;
  if (dtype == DType::bf16) return !amx && columns <= (avx512 ? 256 : 127);
  return !amx;
}

// Whether the library's products of so many columns are made in fp32 for bf16, too. With neither AMX nor, for more than
// few weights, fast `pairs` oneDNN multiplies bf16 at half of the rate of fp32 from about 128 columns on (measured at C =
// 1024 and 2048 on Emerald Rapids); below, what counts is how many bytes of weights are read, once by several steps and
// every time by one.
constexpr bool in_fp32(DType dtype, int64_t columns, int64_t C, int64_t R, int64_t steps, bool amx, bool pairs) {
  if (amx || (pairs && !few_weights(C, R))) return false;
  return dtype == DType::bf16 && (columns >= 128 || steps > 1);
}

// Gradients go by columns in units of one or more panels, each of which sums up the weights' gradients of its columns by
// itself; all are added up in the end. How many there are depends on the problem alone, and so then do the sums. Columns
// of a panel: a whole number of pairs, about 48 until 16 panels can be shared by threads, then more, up to 96 or what
// leaves a second-level cache room for weights and sums; panels of a unit: so that all units' sums are 16 MB at most.
constexpr int64_t padded_to(int64_t count, int64_t lanes) { return (count + lanes - 1) / lanes * lanes; }
struct GradientUnits {
  int64_t width, panels, count;
};
constexpr int64_t weight_numbers(int64_t C, int64_t R) {  // with rows padded to any vector's lanes
  const int64_t c = padded_to(C, 16), r = padded_to(R, 16);
  return 4 * R * c + 2 * C * r + 2 * C * c;
}
constexpr GradientUnits gradient_units(int64_t columns, int64_t C, int64_t R) {
  const int64_t room = 100000 / (12 * C + 4 * R), most_columns = room < 24 ? 24 : room < 96 ? room : 96;
  const auto even = [&](int64_t width) { return 2 * ((columns + 2 * width - 1) / (2 * width)); };
  const int64_t for_threads = even(48) < 16 ? even(48) : 16, least = even(most_columns);
  const int64_t pieces = least > for_threads ? least : for_threads;
  const int64_t width = padded_to((columns + pieces - 1) / pieces, 2);
  const int64_t panels = (columns + width - 1) / width;
  const int64_t most = (int64_t{1} << 22) / weight_numbers(C, R);
  const int64_t of_unit = most < panels ? (panels + most - 1) / most : 1;
  return {width, of_unit, (panels + of_unit - 1) / of_unit};
}

// A task's memory for a panel (cpu/fast_gru_gradients.h).
constexpr int64_t gradient_numbers(int64_t C, int64_t R, int64_t width) {
  return width * (15 * padded_to(C, 16) + 6 * padded_to(R, 16));
}

// Whether gradients do: of few weights, where there are units for at least every other thread.
constexpr bool gradients_by_columns(DType dtype, int64_t columns, int64_t C, int64_t R, int threads) {
  return dtype != DType::f64 && few_weights(C, R) && columns > 0 && threads <= 2 * gradient_units(columns, C, R).count;
}

// The width of panels, in vectors of `lanes` columns: what keeps the busiest of `threads` for the shortest time. A
// panel costs its vectors and a fifth of one; the last may have fewer.
constexpr int panel_vectors(int64_t columns, int lanes, int threads) {
  int best = 1;
  int64_t least = -1;
  for (int vectors = most_vectors; vectors >= 1; --vectors) {
    const int64_t whole = columns / (vectors * lanes), left = columns % (vectors * lanes);
    const int64_t last = left ? 5 * ((left + lanes - 1) / lanes) + 1 : 0, full = 5 * vectors + 1,
                  rounds = whole / threads;
    const int64_t cost = rounds * full + (whole % threads ? full : last);
    if (least < 0 || cost < least) least = cost, best = vectors;
  }
  return best;
}

}  // namespace rcu_ops::fast_gru

namespace rcu_ops::cpu {

// Adjacent operands do not overlap, but for those that are in and out. Waits for the result.
void elementwise(const fast_gru::Elementwise& pass, const Parallel& parallel);

void reorder(const fast_gru::Reorder& problem, const Parallel& parallel);

// Outputs do not overlap inputs. Waits for the result.
void columns(const fast_gru::Columns& problem, const Parallel& parallel);
void gradients(const fast_gru::ColumnsGradients& problem, const Parallel& parallel);

}  // namespace rcu_ops::cpu
