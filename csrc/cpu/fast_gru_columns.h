// fast_gru with a range of columns in one core's caches for all steps. Included inside the namespace of an instruction
// set, after fast_gru_core.h.
//
// Columns (positions of samples) are independent: a task takes up to 3 vectors of them through all steps, and nobody
// waits for anybody between steps.
//
// Layout.   Panels [channels][NR columns] of fp32, NR a whole number of vectors, in the task's scratch memory: the
//           state, x, r' and z', r (then the candidate), z, r * state. Weights [outputs][inputs] of fp32 as the caller
//           has them, or widened once per call in the caller's scratch memory.
// Work.     A product's block is `block_rows` outputs by NR columns in registers; the activations are passes over a
//           panel. x is read, and o and what is saved are written, where they lie: with adjacent positions row by row,
//           with adjacent channels through a transposition of L x L numbers in registers. Lanes beyond the last column
//           hold zeros and are not written.
// Order.    A product adds one input after the other in runs of 16, and the runs one after the other (a long chain of
//           additions would round more than a library's many short ones), U_x's before U_o's and V_x's before V_o's.
//           Neither the width of a panel, nor the threads, nor the number of steps in one call changes that: results do
//           not depend on them.
// Bound.    Arithmetic: 12 R C + 4 C^2 FLOP per column and step against 3 activations per channel. Panels, 4 (5 C + 2
//           R) NR bytes, stay in the first- or second-level cache; every task reads all weights once per step, 4 (6 R C
//           + 2 C^2) bytes, so that the weights should fit the second-level cache, or the columns so few that nobody
//           reads them twice (see by_columns).

static constexpr int64_t run_inputs = 16;
static constexpr int block_rows = vector_bytes == 64 ? 8 : 4;  // with 3 vectors of columns: 24 or 12 sums in registers

// out[rows][NR] = (or +=) weight[rows][inputs] in[inputs][NR].
template <int NV>
static void panel_product(float* out, const float* weight, int64_t rows, int64_t inputs, const float* in, bool add) {
  constexpr int L = Vector<float>::L, NR = NV * L;
  for (int64_t first = 0; first < rows; first += block_rows) {
    const int64_t count = min_of<int64_t>(block_rows, rows - first);
    const float* a[block_rows];  // the last row again where there are no more
    for (int m = 0; m < block_rows; ++m) a[m] = weight + (first + min_of<int64_t>(m, count - 1)) * inputs;
    float* to = out + first * NR;
    for (int64_t k0 = 0; k0 < inputs; k0 += run_inputs) {
      Floats acc[block_rows][NV] = {};
      const float* b = in + k0 * NR;
      const int64_t end = min_of(inputs, k0 + run_inputs);
      for (int64_t k = k0; k < end; ++k, b += NR) {
        Floats bv[NV];
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) memcpy(&bv[v], b + v * L, sizeof(Floats));
#pragma GCC unroll 8
        for (int m = 0; m < block_rows; ++m) {
          const float w = a[m][k];
#pragma GCC unroll 3
          for (int v = 0; v < NV; ++v) acc[m][v] += w * bv[v];
        }
      }
      const bool more = add || k0 > 0;
#pragma GCC unroll 8
      for (int m = 0; m < block_rows; ++m)
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) {
          if (m >= count) break;
          Floats before{};
          if (more) memcpy(&before, to + m * NR + v * L, sizeof(Floats));
          acc[m][v] += before;
          memcpy(to + m * NR + v * L, &acc[m][v], sizeof(Floats));
        }
    }
  }
}

static void product_of(int vectors, float* out, const float* weight, int64_t rows, int64_t inputs, const float* in,
                       bool add) {
  switch (vectors) {
    case 1: return panel_product<1>(out, weight, rows, inputs, in, add);
    case 2: return panel_product<2>(out, weight, rows, inputs, in, add);
    default: return panel_product<3>(out, weight, rows, inputs, in, add);
  }
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

// Units [begin, end) of reorder_units, in the order of samples, steps and channels. Bound by memory.
void reorder_range(const fast_gru::Reorder& all, int64_t begin, int64_t end) {
  const int64_t blocks = (all.channels + fast_gru::reorder_channels - 1) / fast_gru::reorder_channels;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t step = unit / blocks % all.steps, sample = unit / blocks / all.steps,
                  first = unit % blocks * fast_gru::reorder_channels,
                  channels = min_of(fast_gru::reorder_channels, all.channels - first);
    const auto at = [&](const fast_gru::View& view) {
      return static_cast<float*>(view.data) + sample * view.sample + step * view.step + first * view.channel;
    };
    if (all.from.channel == 1)
      transpose(at(all.to), all.to.channel, at(all.from), all.from.position, all.positions, channels);
    else
      transpose(at(all.to), all.to.position, at(all.from), all.from.channel, channels, all.positions);
  }
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
static T* clip_of(const fast_gru::View& view, int64_t sample, int64_t step, int64_t position) {
  return static_cast<T*>(view.data) + sample * view.sample + step * view.step + position * view.position;
}

// Columns [begin, begin + count) of samples x positions, in runs of one sample: visit(sample, position, lane, columns).
template <class Visit>
static inline void for_samples(const fast_gru::Columns& p, int64_t begin, int64_t count, Visit visit) {
  for (int64_t lane = 0; lane < count;) {
    const int64_t sample = (begin + lane) / p.positions, position = (begin + lane) % p.positions;
    const int64_t columns = min_of(p.positions - position, count - lane);
    visit(sample, position, lane, columns);
    lane += columns;
  }
}

static void read_any(const fast_gru::Columns& p, float* panel, int64_t NR, const fast_gru::View& view, DType dtype,
                     int64_t step, int64_t begin, int64_t channels, int64_t count) {
  for_samples(p, begin, count, [&](int64_t sample, int64_t position, int64_t lane, int64_t columns) {
    const auto from = [&](auto type) { return clip_of<decltype(type)>(view, sample, step, position); };
    switch (dtype) {
      case DType::bf16: return read_panel(panel + lane, NR, from(bf16_t()), view, channels, columns);
      case DType::f16: return read_panel(panel + lane, NR, from(f16_t()), view, channels, columns);
      default: return read_panel(panel + lane, NR, from(float()), view, channels, columns);
    }
  });
}
static void write_any(const fast_gru::Columns& p, const float* panel, int64_t NR, const fast_gru::View& view,
                      DType dtype, int64_t step, int64_t begin, int64_t channels, int64_t count) {
  for_samples(p, begin, count, [&](int64_t sample, int64_t position, int64_t lane, int64_t columns) {
    const auto to = [&](auto type) { return clip_of<decltype(type)>(view, sample, step, position); };
    switch (dtype) {
      case DType::bf16: return write_panel(panel + lane, NR, to(bf16_t()), view, channels, columns);
      case DType::f16: return write_panel(panel + lane, NR, to(f16_t()), view, channels, columns);
      default: return write_panel(panel + lane, NR, to(float()), view, channels, columns);
    }
  });
}

void widen_range(float* to, const void* from, DType dtype, int64_t begin, int64_t end) {
  const auto all = [&](const auto* numbers) {
    for_vectors(end - begin, [&](int64_t i, auto lanes) {
      store_vector<float>(to + begin + i, load_vector<float>(numbers + begin + i, lanes), lanes);
    });
  };
  dtype == DType::bf16 ? all(static_cast<const bf16_t*>(from)) : all(static_cast<const f16_t*>(from));
}

// All steps of columns [begin, begin + count) of samples x positions. `panels`: as panel_numbers of common/fast_gru.h
// says.
void columns_task(const fast_gru::Columns& p, int64_t begin, int64_t count, float* panels) {
  constexpr int L = Vector<float>::L;
  const int vectors = static_cast<int>((count + L - 1) / L);
  const int64_t NR = vectors * L, C = p.C, R = p.R, size = C * NR;
  float *state = panels, *x = state + size, *r = x + size, *z = r + size, *gated = z + size, *hidden = gated + size;
  if (count < NR) memset(state, 0, static_cast<size_t>(2 * size) * sizeof(float));  // and x
  read_any(p, state, NR, p.start, p.start_dtype, 0, begin, C, count);
  for (int64_t step = 0; step < p.steps; ++step) {
    const auto save = [&](const fast_gru::View& view, const float* panel, int64_t channels) {
      if (view.data) write_any(p, panel, NR, view, p.dtype, step, begin, channels, count);
    };
    read_any(p, x, NR, p.x, p.dtype, step, begin, C, count);
    product_of(vectors, hidden, p.ux, 2 * R, C, x, false);
    product_of(vectors, hidden, p.uo, 2 * R, C, state, true);
    for (int64_t i = 0; i < 2 * R * NR; i += L) {
      const Floats v = load_vector<float>(hidden + i, L);
      store_vector<float>(hidden + i, v < 0 ? Floats{} : v, L);  // NaN stays
    }
    save(p.hidden, hidden, 2 * R);
    product_of(vectors, r, p.w, C, R, hidden, false);
    product_of(vectors, z, p.w + C * R, C, R, hidden + R * NR, false);
    for (int64_t i = 0; i < size; i += L) {
      const Floats reset = sigmoid_of(load_vector<float>(r + i, L));
      store_vector<float>(r + i, reset, L);
      store_vector<float>(gated + i, reset * load_vector<float>(state + i, L), L);
      store_vector<float>(z + i, sigmoid_of(load_vector<float>(z + i, L)), L);
    }
    save(p.r, r, C);
    save(p.z, z, C);
    float* candidate = r;
    product_of(vectors, candidate, p.vx, C, C, x, false);
    product_of(vectors, candidate, p.vo, C, C, gated, true);
    for (int64_t i = 0; i < size; i += L) {
      const Floats next = tanh_of(load_vector<float>(candidate + i, L)), update = load_vector<float>(z + i, L);
      store_vector<float>(candidate + i, next, L);
      store_vector<float>(state + i, (1 - update) * load_vector<float>(state + i, L) + update * next, L);
    }
    save(p.candidate, candidate, C);
    save(p.out, state, C);
  }
  if (p.last.data) write_any(p, state, NR, p.last, DType::f32, 0, begin, C, count);
}
