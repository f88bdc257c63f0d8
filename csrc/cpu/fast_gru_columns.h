// fast_gru with columns in panels. Included inside the namespace of an instruction set, after vector.h. With
// RCU_OPS_PAIRS, for bf16 alone, products are those of fast_gru_pairs.h.
//
// Columns (positions of samples) are independent. Where a core's caches hold all weights, a task takes a panel of them,
// up to 3 vectors wide, through all steps, and nobody waits for anybody between steps (columns_task). More weights are
// read once for all panels: a task has a share of a product's outputs, and all tasks meet before the next product
// (columns_phase).
//
// Layout.   Panels [channels][NR columns] of fp32, NR a whole number of vectors, in scratch memory: the state, x, r'
//           and z', r (then the candidate), z, r * state. Weights [outputs][inputs] of fp32 as the caller has them, or
//           widened: once per call, or a block of outputs at a time in the task's scratch memory. Where tasks share
//           the weights, columns beyond whole vectors are a thin panel if they are few: [columns][channels]. Pairs of
//           bf16 are multiplied with the weights as they lie, and with a panel's factors rounded, `deep` inputs at a
//           time for a block of outputs: 3 instructions for what 64 products want.
// Work.     A product's block is `block_rows` outputs by NR columns in registers; the activations are passes over what
//           a block of `most_rows` outputs has left in cache. x is read, and o and what is saved are written, where
//           they lie: with adjacent positions row by row, with adjacent channels through a transposition of L x L
//           numbers in registers. Lanes beyond the last column hold zeros and are not written.
// Order.    A product adds one input after the other in runs of about the root of their number (run_of), and the runs
//           one after the other (a long chain of additions would round more than a library's many short ones), U_x's
//           before U_o's and V_x's before V_o's; a thin panel's lanes are inputs. Neither the width of a panel, nor the
//           threads, nor the number of steps in one call changes that: results do not depend on them.
// Bound.    Arithmetic: 12 R C + 4 C^2 FLOP per column and step against 3 activations per channel. A task's panels, 4
//           (5 C + 2 R) NR bytes, stay in the first- or second-level cache, and so do the weights, 4 (6 R C + 2 C^2)
//           bytes, that it reads once per step. Tasks that share the weights read each once per step; `deep` inputs of
//           a panel stay in the first-level cache for a block of outputs, and the block in the second-level cache for
//           all panels.

static constexpr int block_rows = vector_bytes == 64 ? 8 : 4;  // with 3 vectors of columns: 24 or 12 sums in registers
static constexpr int64_t most_rows = fast_gru::panel_rows, deep = 192;  // a whole number of every run

// The error of a sum of `inputs` random terms in runs grows with inputs run + inputs^2 / run under the root.
constexpr int64_t run_of(int64_t inputs) {
  int64_t run = 16;
  while (4 * run * run <= 2 * inputs && run < 64) run *= 2;
  return run;
}

// One round of transpose_lanes: lanes whose number has `bit` change places with those of the row whose number has it.
template <int bit, int... lane>
static inline void exchange_lanes(Floats* rows, std::integer_sequence<int, lane...>) {
  constexpr int L = sizeof...(lane);
  constexpr Ints low{(lane & bit ? (lane ^ bit) + L : lane)...}, high{(lane & bit ? lane + L : lane ^ bit)...};
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (i & bit) continue;
    const Floats x = rows[i], y = rows[i | bit];
    rows[i] = __builtin_shuffle(x, y, low);
    rows[i | bit] = __builtin_shuffle(x, y, high);
  }
}

// L vectors of L numbers: rows become columns.
static inline void transpose_lanes(Floats* rows) {
  constexpr int L = Vector<float>::L;
  constexpr auto lanes = std::make_integer_sequence<int, L>();
  exchange_lanes<1>(rows, lanes);
  exchange_lanes<2>(rows, lanes);
  if constexpr (L > 4) exchange_lanes<4>(rows, lanes);
  if constexpr (L > 8) exchange_lanes<8>(rows, lanes);
}

// Calls visit(i, lanes) for all of `count` numbers, a vector at a time; the last one overlaps the one before where
// there is one.
template <class Visit>
static inline void for_vectors(int64_t count, Visit visit) {
  constexpr int64_t L = Vector<float>::L;
  if (count < L) return visit(int64_t{0}, static_cast<int>(count));
  for (int64_t i = 0; i < count; i += L) visit(min_of(i, count - L), std::integral_constant<int, L>{});
}

// out[n][m] = (or +=) the sum of the lanes of sums[m N + n], for N columns and `rows` outputs: how a thin product ends.
template <int N>
static inline void add_lanes(float* out, int64_t out_pitch, Floats* sums, int64_t rows, bool add) {
  constexpr int L = Vector<float>::L;
  transpose_lanes(sums);
  Floats total = sums[0];
#pragma GCC unroll 16
  for (int i = 1; i < L; ++i) total += sums[i];
  for (int64_t m = 0; m < rows; ++m)
    for (int n = 0; n < N; ++n) {
      float& to = out[n * out_pitch + m];
      to = (add ? to : 0) + total[m * N + n];
    }
}

#ifdef RCU_OPS_PAIRS
#include "fast_gru_pairs.h"
#else
#include "fast_gru_products.h"
#endif

// to[column][row] = from[row][column] for up to L rows and columns, in registers.
template <class To, class From, class Count>
static inline void transpose_block(To* to, int64_t to_pitch, const From* from, int64_t from_pitch, Count rows,
                                   Count columns) {
  constexpr int L = Vector<float>::L;
  Floats block[L];
#pragma GCC unroll 16
  for (int j = 0; j < L; ++j) block[j] = j < rows ? load_vector<float>(from + j * from_pitch, columns) : Floats{};
  transpose_lanes(block);
#pragma GCC unroll 16
  for (int j = 0; j < L; ++j) {
    if (j == columns) break;
    store_vector<float>(to + j * to_pitch, block[j], rows);
  }
}
// One that is whole in both directions, and one that is not: its own function, for it is long and seldom run.
template <class To, class From, int L>
static inline void transpose_some(To* to, int64_t to_pitch, const From* from, int64_t from_pitch,
                                  std::integral_constant<int, L> rows, std::integral_constant<int, L> columns) {
  transpose_block(to, to_pitch, from, from_pitch, rows, columns);
}
template <class To, class From>
[[gnu::noinline]] static void transpose_some(To* to, int64_t to_pitch, const From* from, int64_t from_pitch, int rows,
                                             int columns) {
  transpose_block(to, to_pitch, from, from_pitch, rows, columns);
}
template <class To, class From>
static void transpose(To* to, int64_t to_pitch, const From* from, int64_t from_pitch, int64_t rows, int64_t columns) {
  for_vectors(rows, [&](int64_t i, auto some_rows) {
    for_vectors(columns, [&](int64_t j, auto some_columns) {
      transpose_some(to + j * to_pitch + i, to_pitch, from + i * from_pitch + j, from_pitch, some_rows, some_columns);
    });
  });
}

// panel [channels][NR] from `count` adjacent columns of a view's clip, or to them.
template <class T>
static void read_panel(float* panel, int64_t NR, const T* from, const fast_gru::View& view, int64_t channels,
                       int64_t count) {
  if (view.position != 1) return transpose(panel, NR, from, view.position, count, channels);
  for (int64_t c = 0; c < channels; ++c)
    for_vectors(count, [&](int64_t i, auto lanes) {
      store_vector<float>(panel + c * NR + i, load_vector<float>(from + c * view.channel + i, lanes), lanes);
    });
}
template <class T>
static void write_panel(const float* panel, int64_t NR, T* to, const fast_gru::View& view, int64_t channels,
                        int64_t count) {
  if (view.position != 1) return transpose(to, view.position, panel, NR, channels, count);
  for (int64_t c = 0; c < channels; ++c)
    for_vectors(count, [&](int64_t i, auto lanes) {
      store_vector<float>(to + c * view.channel + i, load_vector<float>(panel + c * NR + i, lanes), lanes);
    });
}

template <class T>
static T* clip_of(const fast_gru::View& view, int64_t sample, int64_t step, int64_t channel, int64_t position) {
  return static_cast<T*>(view.data) + sample * view.sample + step * view.step + channel * view.channel +
         position * view.position;
}

// Columns [begin, begin + count) of samples x positions, in runs of one sample: visit(sample, position, lane, columns).
template <class Visit>
static inline void for_samples(int64_t positions, int64_t begin, int64_t count, Visit visit) {
  for (int64_t lane = 0; lane < count;) {
    const int64_t sample = (begin + lane) / positions, position = (begin + lane) % positions;
    const int64_t columns = min_of(positions - position, count - lane);
    visit(sample, position, lane, columns);
    lane += columns;
  }
}

// A panel's columns and its matrices of `features` channels.
struct Panel {
  struct Matrix {
    float* data;
    int64_t features;
  };
  int64_t begin, count, NR;
  int vectors;  // 0: thin
  Matrix state, x, r, z, gated, hidden;

  float* at(const Matrix& m, int64_t channel) const { return m.data + channel * (vectors ? NR : 1); }
};

static Panel panel_at(const fast_gru::Columns& p, int64_t begin, int64_t count, bool thin, float* memory) {
  constexpr int L = Vector<float>::L;
  Panel panel{};
  panel.begin = begin, panel.count = panel.NR = count;
  if (!thin) panel.vectors = static_cast<int>((count + L - 1) / L), panel.NR = panel.vectors * L;
  for (Panel::Matrix* m : {&panel.state, &panel.x, &panel.r, &panel.z, &panel.gated}) {
    *m = {memory, p.C};
    memory += p.C * panel.NR;
  }
  panel.hidden = {memory, 2 * p.R};
  return panel;
}

// Channels [first, first + channels) of a panel's columns, from a view's clip or to it.
static void read_any(int64_t positions, const Panel& panel, const Panel::Matrix& matrix, const fast_gru::View& view,
                     DType dtype, int64_t step, int64_t first, int64_t channels) {
  for_samples(positions, panel.begin, panel.count,
              [&](int64_t sample, int64_t position, int64_t lane, int64_t columns) {
                const auto read = [&](auto type) {
                  const auto* from = clip_of<decltype(type)>(view, sample, step, first, position);
                  if (panel.vectors)
                    return read_panel(panel.at(matrix, first) + lane, panel.NR, from, view, channels, columns);
                  const fast_gru::View across{.channel = view.position, .position = view.channel};
                  read_panel(panel.at(matrix, first) + lane * matrix.features, matrix.features, from, across, columns,
                             channels);
                };
                switch (dtype) {
                  case DType::bf16: return read(bf16_t());
                  case DType::f16: return read(f16_t());
                  default: return read(float());
                }
              });
}
static void write_any(int64_t positions, const Panel& panel, const Panel::Matrix& matrix, const fast_gru::View& view,
                      DType dtype, int64_t step, int64_t first, int64_t channels) {
  for_samples(
      positions, panel.begin, panel.count, [&](int64_t sample, int64_t position, int64_t lane, int64_t columns) {
        const auto write = [&](auto type) {
          auto* to = clip_of<decltype(type)>(view, sample, step, first, position);
          if (panel.vectors) return write_panel(panel.at(matrix, first) + lane, panel.NR, to, view, channels, columns);
          const fast_gru::View across{.channel = view.position, .position = view.channel};
          write_panel(panel.at(matrix, first) + lane * matrix.features, matrix.features, to, across, columns, channels);
        };
        switch (dtype) {
          case DType::bf16: return write(bf16_t());
          case DType::f16: return write(f16_t());
          default: return write(float());
        }
      });
}

// Panels side by side, the last `thin` columns in one of their own; and where a block of weights is widened.
struct Panels {
  const fast_gru::Columns& p;
  int64_t begin, count, thin, width;  // columns of all, of the thin panel, and of another
  float *memory, *wide;

  template <class Visit>
  void each(Visit visit) const {
    const int64_t numbers = fast_gru::panel_numbers(p.C, p.R, width), whole = count - thin;
    int64_t i = 0;
    for (; i * width < whole; ++i)
      visit(panel_at(p, begin + i * width, min_of(width, whole - i * width), false, memory + i * numbers));
    if (thin) visit(panel_at(p, begin + whole, thin, true, memory + i * numbers));
  }
};

// Channels [to, to + rows) of a matrix of all panels = (or +=) a weight's `rows` rows [inputs] times channels [from, from
// + inputs) of another.
using Place = Panel::Matrix Panel::*;
template <class W>
static void multiply_block(const Panels& panels, Place out, int64_t to, const W* block, int64_t rows, int64_t inputs,
                           Place in, int64_t from, bool add) {
  const int64_t run = run_of(inputs);
  for (int64_t k = 0; k < inputs; k += deep)
    panels.each([&](const Panel& panel) {
      float* sums = panel.at(panel.*out, to);
      const float* factors = panel.at(panel.*in, from + k);
      const int64_t some = min_of(deep, inputs - k);
      const bool more = add || k > 0;
      switch (panel.vectors) {
        case 0: return;
        case 1: return panel_product<1>(sums, block + k, inputs, rows, some, run, factors, more);
        case 2: return panel_product<2>(sums, block + k, inputs, rows, some, run, factors, more);
        default: return panel_product<3>(sums, block + k, inputs, rows, some, run, factors, more);
      }
    });
  if (panels.thin == 0) return;
  panels.each([&](const Panel& panel) {
    if (panel.vectors) return;
    const int64_t out_pitch = (panel.*out).features, in_pitch = (panel.*in).features;
    const auto product = [&](auto columns) {
      thin_product<columns>(panel.at(panel.*out, to), out_pitch, block, rows, inputs, panel.at(panel.*in, from),
                            in_pitch, add);
    };
    constexpr int most = fast_gru::most_thin(Vector<float>::L);
    switch (panel.count) {
      case 1: return product(std::integral_constant<int, 1>());
      case 2: return product(std::integral_constant<int, (most < 2 ? most : 2)>());
      case 3: return product(std::integral_constant<int, (most < 3 ? most : 3)>());
      default: return product(std::integral_constant<int, most>());
    }
  });
}

// The same with rows [first, first + rows) of a weight [][inputs].
static void multiply(const Panels& panels, Place out, int64_t to, const float* weight, int64_t first, int64_t rows,
                     int64_t inputs, Place in, int64_t from, bool add) {
#ifdef RCU_OPS_PAIRS
  const bf16_t* const block = reinterpret_cast<const bf16_t*>(weight) + first * inputs;
#else
  const fast_gru::Columns& p = panels.p;
  const float* block = weight + first * inputs;
  if (p.narrow) {
    widen(panels.wide, reinterpret_cast<const uint16_t*>(weight) + first * inputs, p.dtype, rows * inputs);
    block = panels.wide;
  }
#endif
  multiply_block(panels, out, to, block, rows, inputs, in, from, add);
}

// Channels [first, first + rows) of what a phase of one step makes, at most most_rows but for `read`.
static void phase_rows(const Panels& panels, fast_gru::Phase phase, int64_t step, int64_t first, int64_t rows) {
  using fast_gru::Phase;
  constexpr int L = Vector<float>::L;
  const fast_gru::Columns& p = panels.p;
  const auto save = [&](const fast_gru::View& view, Place matrix) {
    if (!view.data) return;
    panels.each(
        [&](const Panel& panel) { write_any(p.positions, panel, panel.*matrix, view, p.dtype, step, first, rows); });
  };
  // visit(panel, offset in a matrix of `features`, numbers): all of these channels, a vector at a time.
  const auto each = [&](int64_t features, auto visit) {
    panels.each([&](const Panel& panel) {
      if (panel.vectors)
        for (int64_t i = first * panel.NR; i < (first + rows) * panel.NR; i += L)
          visit(panel, i, std::integral_constant<int, L>{});
      else
        for (int64_t column = 0; column < panel.count; ++column)
          for (int64_t i = 0; i < rows; i += L)
            visit(panel, column * features + first + i, static_cast<int>(min_of<int64_t>(L, rows - i)));
    });
  };
  const auto get = [](const Panel::Matrix& m, int64_t i, auto n) { return load_vector<float>(m.data + i, n); };
  const auto put = [](const Panel::Matrix& m, int64_t i, auto v, auto n) { store_vector<float>(m.data + i, v, n); };
  switch (phase) {
    case Phase::read:
      panels.each([&](const Panel& panel) {
        const auto clear = [&](const Panel::Matrix& m) {
          if (panel.count < panel.NR)
            memset(panel.at(m, first), 0, static_cast<size_t>(rows * panel.NR) * sizeof(float));
        };
        if (step == 0) {
          clear(panel.state);
          clear(panel.x);
          read_any(p.positions, panel, panel.state, p.start, p.start_dtype, 0, first, rows);
        }
        read_any(p.positions, panel, panel.x, p.x, p.dtype, step, first, rows);
      });
      return;
    case Phase::hidden:
      multiply(panels, &Panel::hidden, first, p.ux, first, rows, p.C, &Panel::x, 0, false);
      multiply(panels, &Panel::hidden, first, p.uo, first, rows, p.C, &Panel::state, 0, true);
      each(2 * p.R, [=](const Panel& panel, int64_t i, auto n) {
        const Floats v = get(panel.hidden, i, n);
        put(panel.hidden, i, v < 0 ? Floats{} : v, n);  // NaN stays
      });
      return save(p.hidden, &Panel::hidden);
    case Phase::gates:
      multiply(panels, &Panel::r, first, p.w, first, rows, p.R, &Panel::hidden, 0, false);
      multiply(panels, &Panel::z, first, p.w, p.C + first, rows, p.R, &Panel::hidden, p.R, false);
      each(p.C, [=](const Panel& panel, int64_t i, auto n) {
        const Floats reset = sigmoid_of(get(panel.r, i, n));
        put(panel.r, i, reset, n);
        put(panel.gated, i, reset * get(panel.state, i, n), n);
        put(panel.z, i, sigmoid_of(get(panel.z, i, n)), n);
      });
      save(p.r, &Panel::r);
      return save(p.z, &Panel::z);
    case Phase::output:  // r is free: the candidate's place
      multiply(panels, &Panel::r, first, p.vx, first, rows, p.C, &Panel::x, 0, false);
      multiply(panels, &Panel::r, first, p.vo, first, rows, p.C, &Panel::gated, 0, true);
      each(p.C, [=](const Panel& panel, int64_t i, auto n) {
        const Floats next = tanh_of(get(panel.r, i, n)), update = get(panel.z, i, n);
        put(panel.r, i, next, n);
        put(panel.state, i, (1 - update) * get(panel.state, i, n) + update * next, n);
      });
      save(p.candidate, &Panel::r);
      save(p.out, &Panel::state);
      if (step == p.steps - 1)
        panels.each([&](const Panel& panel) {
          write_any(p.positions, panel, panel.state, p.last, DType::f32, 0, first, rows);
        });
      return;
  }
}

// Outputs [begin, end) of a phase (phase_outputs), for all columns: the last `thin` in a thin panel, those before in
// panels of `width`. `panels`: one after the other, as panel_numbers of common/fast_gru.h says; `wide`: wide_numbers,
// the task's own.
void columns_phase(const fast_gru::Columns& p, fast_gru::Phase phase, int64_t step, int64_t begin, int64_t end,
                   int64_t thin, int64_t width, float* panels, float* wide) {
  const Panels all{p, 0, p.samples * p.positions, thin, width, panels, wide};
  for (int64_t first = begin; first < end; first += most_rows)
    phase_rows(all, phase, step, first, min_of(most_rows, end - first));
}

// All steps of columns [begin, begin + count) of samples x positions, at most a panel. The weights are fp32.
void columns_task(const fast_gru::Columns& p, int64_t begin, int64_t count, float* panel) {
  using fast_gru::Phase;
  const Panels one{p, begin, count, 0, count, panel, nullptr};
  for (int64_t step = 0; step < p.steps; ++step)
    for (const Phase phase : fast_gru::phases)
      for (int64_t first = 0, all = fast_gru::phase_outputs(p, phase); first < all; first += most_rows)
        phase_rows(one, phase, step, first, min_of(most_rows, all - first));
}
