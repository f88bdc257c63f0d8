// fast_gru's gradients by columns, of few weights. Included inside the namespace of an instruction set, after
// fast_gru_columns.h.
//
// Columns are independent but for the weights' gradients, which are sums over them. A task takes a unit of columns, one
// panel after the other, through all steps from the last to the first; what a step leaves for the products that PyTorch
// would make of all steps at once (the gradients of x and of the weights) is used while it is in cache, and nothing of
// it is written to memory.
//
// Layout.   Matrices [columns of a panel][features] of fp32 in the task's scratch memory, and weights [outputs][inputs]
//           copied once per call, both with rows padded to whole vectors; what is such a matrix in the caller's memory
//           is read there. Lanes are features: a gradient's product with a transposed weight reads the weight as it
//           lies, and sums over columns read both factors as they lie. With RCU_OPS_PAIRS factors are packed to pairs of
//           bf16, neighbouring features or neighbouring rows, in the place of numbers of fp32.
// Work.     One block for all products: `rows` x NV vectors of sums in registers. The activations' derivatives are
//           passes over a panel.
// Order.    A product adds one term after the other in runs of most_terms; a unit adds its panels' sums over columns
//           step by step, and the units' sums are added up in their order. All of that depends on the problem alone.
// Bound.    Arithmetic: 24 R C + 8 C^2 FLOP per column and step. A panel takes up to 4 (12 C + 4 R) bytes per column (15 C
//           and 6 R with pairs), and the weights and their gradients 8 (6 R C + 2 C^2), in the second-level cache.

static constexpr int64_t most_terms = 64;
static constexpr int wide_vectors = vector_bytes == 64 ? 4 : 3;
constexpr int rows_of(int vectors) { return vector_bytes == 64 ? (vectors == 4 ? 6 : 8) : 4; }

// out[rows][NV vectors] = (or +=) the sum over `terms` of a[row][term `step`] b[term `pitch`][NV vectors]; here and below
// a term is a number of a factor, or a pair.
template <int rows, int NV>
static inline void sum_block(float* out, int64_t out_pitch, const float* const* a, int64_t step, int64_t terms,
                             const float* b, int64_t pitch, bool add) {
  constexpr int L = Vector<float>::L;
  Floats acc[rows][NV] = {};
  for (int64_t t = 0; t < terms; ++t, b += pitch) {
    Floats bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) memcpy(&bv[v], b + v * L, sizeof(Floats));
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
      const float w = a[m][t * step];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[m][v] = add_product(acc[m][v], w, bv[v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* to = out + m * out_pitch + v * L;
      Floats before{};
      if (add) memcpy(&before, to, sizeof(Floats));
      acc[m][v] += before;
      memcpy(to, &acc[m][v], sizeof(Floats));
    }
}

// A matrix with rows of `pitch` numbers, whose element (i, t) may stand at i row + t term, too.
struct Factor {
  const float* data;
  int64_t row, term;
};
struct Rows {
  float* data;
  int64_t pitch;
};

template <int NV>
static void sum_rows(Rows out, int64_t count, Factor a, int64_t terms, FactorMatrix b, bool add) {
  constexpr int most = rows_of(NV);
  for (int64_t i = 0; i < count;) {
    const float* at[most];
    float* const to = out.data + i * out.pitch;
    const int64_t left = count - i;
    for (int m = 0; m < most; ++m) at[m] = a.data + (i + min_of<int64_t>(m, left - 1)) * a.row;
    if (left >= most) {
      sum_block<most, NV>(to, out.pitch, at, a.term, terms, b.data, b.pitch, add);
      i += most;
    } else if (left >= 2) {
      sum_block<2, NV>(to, out.pitch, at, a.term, terms, b.data, b.pitch, add);
      i += 2;
    } else {
      sum_block<1, NV>(to, out.pitch, at, a.term, terms, b.data, b.pitch, add);
      i += 1;
    }
  }
}

// out[count][features] = (or +=) the sum over terms of a(i, t) b[t][features].
static void sum_products(Rows out, int64_t count, int64_t features, Factor a, int64_t terms, FactorMatrix b, bool add) {
  constexpr int64_t L = Vector<float>::L;
  for (int64_t t = 0; t < terms; t += most_terms) {
    const int64_t some = min_of(most_terms, terms - t);
    const Factor from{a.data + t * a.term, a.row, a.term};
    for (int64_t j = 0; j < features;) {
      const int64_t vectors = min_of<int64_t>(wide_vectors, (features - j + L - 1) / L);
      const Rows to{out.data + j, out.pitch};
      const FactorMatrix with{b.data + t * b.pitch + j, b.pitch};
      const bool more = add || t > 0;
      switch (vectors) {
        case 1: sum_rows<1>(to, count, from, some, with, more); break;
        case 2: sum_rows<2>(to, count, from, some, with, more); break;
        case 3: sum_rows<3>(to, count, from, some, with, more); break;
        default: sum_rows<wide_vectors>(to, count, from, some, with, more);
      }
      j += vectors * L;
    }
  }
}

// The weights, or their gradients, one after the other: for r', z' (or r, z), then for the candidate.
struct WeightRows {
  Rows ux[2], uo[2], w[2], vx, vo;
};
static WeightRows weight_rows(const fast_gru::ColumnsGradients& p, float* memory) {
  constexpr int64_t L = Vector<float>::L;
  const int64_t c = fast_gru::padded_to(p.C, L), r = fast_gru::padded_to(p.R, L);
  const auto next = [&](int64_t rows, int64_t pitch) {
    const Rows found{memory, pitch};
    memory += rows * pitch;
    return found;
  };
  // In the order of their mention, which braces keep.
  return {{next(p.R, c), next(p.R, c)},
          {next(p.R, c), next(p.R, c)},
          {next(p.C, r), next(p.C, r)},
          next(p.C, c),
          next(p.C, c)};
}

// visit(rows, dense weight, first row in it, rows, inputs) for all of a call's weights.
template <class Pointer, class Visit>
static void each_weight(const fast_gru::ColumnsGradients& p, const WeightRows& rows, Pointer ux, Pointer uo, Pointer w,
                        Pointer vx, Pointer vo, Visit visit) {
  for (const int64_t i : {0, 1}) visit(rows.ux[i], ux, i * p.R, p.R, p.C);
  for (const int64_t i : {0, 1}) visit(rows.uo[i], uo, i * p.R, p.R, p.C);
  for (const int64_t i : {0, 1}) visit(rows.w[i], w, i * p.C, p.C, p.R);
  visit(rows.vx, vx, int64_t{0}, p.C, p.C);
  visit(rows.vo, vo, int64_t{0}, p.C, p.C);
}

template <class Visit>
static void with_type(DType dtype, Visit visit) {
#ifdef RCU_OPS_PAIRS
  return visit(bf16_t());
#else
  switch (dtype) {
    case DType::bf16: return visit(bf16_t());
    case DType::f16: return visit(f16_t());
    default: return visit(float());
  }
#endif
}

// The call's weights as factors, rows padded with zeros.
void gradients_weights(const fast_gru::ColumnsGradients& p, float* to) {
  constexpr int64_t L = Vector<float>::L;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    each_weight(p, weight_rows(p, to), p.ux, p.uo, p.w, p.vx, p.vo,
                [&](Rows out, const void* from, int64_t first, int64_t rows, int64_t inputs) {
                  for (int64_t i = 0; i < rows; ++i) {
                    const T* row = static_cast<const T*>(from) + (first + i) * inputs;
                    for (int64_t k = 0; k < inputs; k += L) {
                      const int n = static_cast<int>(min_of(L, inputs - k));
                      store_vector<float>(out.data + i * out.pitch + k, load_vector<float>(row + k, n), L);
                    }
                  }
                  pairs_of_rows(out.data, out.pitch, rows, fast_gru::padded_to(inputs, L), out.data);
                });
  });
}

#ifndef RCU_OPS_PAIRS
// Rows [begin, end) of all the weights' gradients, which are the sums of all units' `sums`, of `numbers` numbers each.
void gradients_sum(const fast_gru::ColumnsGradients& p, float* sums, int64_t units, int64_t numbers, int64_t begin,
                   int64_t end) {
  constexpr int64_t L = Vector<float>::L;
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    int64_t place = 0;  // of a weight's first row
    each_weight(p, weight_rows(p, sums), p.dux, p.duo, p.dw, p.dvx, p.dvo,
                [&](Rows of_first, void* out, int64_t first, int64_t rows, int64_t inputs) {
                  const int64_t from = begin > place ? begin - place : 0, to = min_of(rows, end - place);
                  place += rows;
                  for (int64_t i = from; i < to; ++i)
                    for (int64_t k = 0; k < inputs; k += L) {
                      const float* at = of_first.data + i * of_first.pitch + k;
                      Floats total{};
                      for (int64_t unit = 0; unit < units; ++unit)
                        total += load_vector<float>(at + unit * numbers, static_cast<int>(L));
                      const int n = static_cast<int>(min_of(L, inputs - k));
                      store_vector<float>(static_cast<T*>(out) + (first + i) * inputs + k, total, n);
                    }
                });
  });
}
#endif

// Asks for what a panel will read of a view's step, into the second-level cache: many short pieces of memory, which no
// processor would foresee.
static void fetch(int64_t positions, const Panel& panel, const fast_gru::View& view, DType dtype, int64_t step,
                  int64_t channels) {
  const int64_t size = element_size(dtype);
  for_samples(positions, panel.begin, panel.count, [&](int64_t sample, int64_t position, int64_t, int64_t columns) {
    const char* from = static_cast<const char*>(view.data) +
                       (sample * view.sample + step * view.step + position * view.position) * size;
    const bool across = view.position == 1;
    const int64_t rows = across ? channels : columns, row = (across ? view.channel : view.position) * size,
                  bytes = (across ? columns : channels) * size;
    for (int64_t i = 0; i < rows; ++i, from += row)
      for (const char* at = from - reinterpret_cast<uintptr_t>(from) % 64; at < from + bytes; at += 64) {
        __builtin_prefetch(at, 0, 2);
        asm volatile("");  // GCC takes a function that does nothing else for one without effect, and leaves it out
      }
  });
}

// A vector of a matrix: at column `row`, from feature i on.
static inline Floats get(const Panel::Matrix& m, int64_t row, int64_t i) {
  return load_vector<float>(m.data + row * m.features + i, Vector<float>::L);
}
static inline void put(const Panel::Matrix& m, int64_t row, int64_t i, Floats v) {
  store_vector<float>(m.data + row * m.features + i, v, Vector<float>::L);
}

// The gradients of columns [begin, begin + count), a panel of at most `width` after the other. `memory`: gradient_numbers;
// `weights`: as gradients_weights writes them; `sums`: the same of the weights' gradients.
void gradients_task(const fast_gru::ColumnsGradients& p, int64_t begin, int64_t count, int64_t width, float* memory,
                    const float* weights, float* sums) {
  constexpr int64_t L = Vector<float>::L;
  const int64_t c = fast_gru::padded_to(p.C, L), r = fast_gru::padded_to(p.R, L);
  const auto clear = [](float* at, int64_t numbers) { memset(at, 0, static_cast<size_t>(numbers) * sizeof(float)); };
  if (c > p.C || r > p.R) clear(memory, fast_gru::gradient_numbers(p.C, p.R, width));  // what is padding stays so
  const auto matrix = [&](int64_t pitch) {
    const Panel::Matrix found{memory, pitch};
    memory += width * pitch;
    return found;
  };
  const Panel::Matrix carry = matrix(c), dz = matrix(c), dc = matrix(c), dr = matrix(c), gated = matrix(c),
                      dx = matrix(c), du[2] = {matrix(r), matrix(r)};
  // Where what is read is not a matrix in fp32 already.
  const Panel::Matrix copy_of_state = matrix(c), copy_of_z = matrix(c), copy_of_c = matrix(c), copy_of_r = matrix(c),
                      copy_of_grad = matrix(c), copy_of_x = matrix(c), copy_of_hidden[2] = {matrix(r), matrix(r)};
  const Panel::Matrix pairs_of_dc = matrix(c), pairs_of_dr = matrix(c), pairs_of_dz = matrix(c),
                      pairs_of_du[2] = {matrix(r), matrix(r)};
  const WeightRows w = weight_rows(p, const_cast<float*>(weights)), d = weight_rows(p, sums);
  const bool need_weights = sums != nullptr;

  for (int64_t first = begin; first < begin + count; first += width) {
    Panel panel{};  // a thin one: [columns][features]
    panel.begin = first, panel.count = min_of(width, begin + count - first);
    const int64_t columns = panel.count;
    const auto read = [&](const Panel::Matrix& copy, const fast_gru::View& view, DType dtype, int64_t step,
                          int64_t channels) {
      const int64_t sample = first / p.positions, position = first % p.positions;
      const bool in_line = view.sample == p.positions * view.position || position + columns <= p.positions;
      if (dtype == DType::f32 && view.channel == 1 && channels % L == 0 && in_line)
        return Panel::Matrix{clip_of<float>(view, sample, step, 0, position), view.position};
      read_any(p.positions, panel, copy, view, dtype, step, 0, channels);
      return copy;
    };
    const auto fetch_next = [&](const fast_gru::View& view, int64_t step, int64_t channels) {
      if (step >= 0 && view.data) fetch(p.positions, panel, view, p.dtype, step, channels);
    };
    const auto half_of_hidden = [&](int64_t half) {
      fast_gru::View view = p.hidden;
      view.data = static_cast<char*>(view.data) + half * p.R * view.channel * element_size(p.dtype);
      return view;
    };
    const auto each = [&](int64_t features, auto visit) {
      for (int64_t row = 0; row < columns; ++row)
        for (int64_t i = 0; i < features; i += L) visit(row, i);
    };
    // A matrix as a factor of `multiply`, and, in the place of `out`, of `add_outer`.
    const auto by_features = [&](const Panel::Matrix& m, const Panel::Matrix& out) {
      return pairs_of_features(m.data, m.features, columns, out.features, out.data);
    };
    const auto by_columns = [&](const Panel::Matrix& m, const Panel::Matrix& out) {
      return pairs_of_rows(m.data, m.features, columns, out.features, out.data);
    };
    // out [columns][features] (or +=) a [columns][inputs] times a weight [inputs][features].
    const auto multiply = [&](const Panel::Matrix& out, FactorMatrix a, int64_t inputs, Rows weight, bool add) {
      sum_products({out.data, out.features}, columns, out.features, {a.data, a.pitch, 1},
                   (inputs + terms_at_once - 1) / terms_at_once, {weight.data, weight.pitch}, add);
    };
    // A weight's gradient [outputs][inputs] (or +=) the sum over columns of da[outputs] in[inputs].
    const auto add_outer = [&](Rows out, FactorMatrix da, int64_t outputs, FactorMatrix in, bool add) {
      sum_products(out, outputs, out.pitch, {da.data, 1, da.pitch}, (columns + terms_at_once - 1) / terms_at_once,
                   {in.data, in.pitch}, add);
    };

    if (p.d_last.data)
      read_any(p.positions, panel, carry, p.d_last, DType::f32, 0, 0, p.C);
    else
      clear(carry.data, columns * c);
    for (int64_t k = p.steps - 1; k >= 0; --k) {
      const Panel::Matrix state = k > 0 ? read(copy_of_state, p.before, p.dtype, k - 1, p.C)
                                        : read(copy_of_state, p.start, p.start_dtype, 0, p.C);
      const Panel::Matrix z = read(copy_of_z, p.z, p.dtype, k, p.C),
                          cand = read(copy_of_c, p.candidate, p.dtype, k, p.C),
                          r_gate = read(copy_of_r, p.r, p.dtype, k, p.C);
      const Panel::Matrix hidden[2] = {read(copy_of_hidden[0], half_of_hidden(0), p.dtype, k, p.R),
                                       read(copy_of_hidden[1], half_of_hidden(1), p.dtype, k, p.R)};
      const Panel::Matrix grad = p.grad.data ? read(copy_of_grad, p.grad, p.dtype, k, p.C) : Panel::Matrix{};
      each(c, [&](int64_t row, int64_t i) {
        const Floats update = get(z, row, i), next = get(cand, row, i);
        Floats g = get(carry, row, i);
        if (grad.data) g += get(grad, row, i);
        put(dc, row, i, g * update * (1 - next * next));
        put(dz, row, i, g * (next - get(state, row, i)) * update * (1 - update));
        put(carry, row, i, g * (1 - update));
      });
      fetch_next(p.z, k - 1, p.C);
      const FactorMatrix dc_rows = by_features(dc, pairs_of_dc);
      multiply(dr, dc_rows, p.C, w.vo, false);
      each(c, [&](int64_t row, int64_t i) {
        const Floats through = get(dr, row, i), reset = get(r_gate, row, i), before = get(state, row, i);
        put(dr, row, i, through * before * reset * (1 - reset));
        put(gated, row, i, reset * before);
        put(carry, row, i, get(carry, row, i) + through * reset);
      });
      fetch_next(p.candidate, k - 1, p.C);
      multiply(du[0], by_features(dr, pairs_of_dr), p.C, w.w[0], false);
      multiply(du[1], by_features(dz, pairs_of_dz), p.C, w.w[1], false);
      for (const int half : {0, 1})
        each(r, [&](int64_t row, int64_t i) {
          put(du[half], row, i, get(hidden[half], row, i) <= 0 ? Floats{} : get(du[half], row, i));
        });
      fetch_next(p.r, k - 1, p.C);
      const FactorMatrix du_rows[2] = {by_features(du[0], pairs_of_du[0]), by_features(du[1], pairs_of_du[1])};
      for (const int half : {0, 1}) multiply(carry, du_rows[half], p.R, w.uo[half], true);
      fetch_next(p.grad, k - 1, p.C);
      if (p.dx.data) {
        multiply(dx, dc_rows, p.C, w.vx, false);
        for (const int half : {0, 1}) multiply(dx, du_rows[half], p.R, w.ux[half], true);
        write_any(p.positions, panel, dx, p.dx, p.dtype, k, 0, p.C);
      }
      fetch_next(p.before, k - 2, p.C);
      fetch_next(p.hidden, k - 1, 2 * p.R);
      if (!need_weights) continue;
      const FactorMatrix x = by_columns(read(copy_of_x, p.x, p.dtype, k, p.C), copy_of_x),
                         before = by_columns(state, copy_of_state), dc_columns = by_columns(dc, dc),
                         du_columns[2] = {by_columns(du[0], du[0]), by_columns(du[1], du[1])};
      const bool add = first > begin || k < p.steps - 1;
      for (const int half : {0, 1}) {
        add_outer(d.ux[half], du_columns[half], p.R, x, add);
        add_outer(d.uo[half], du_columns[half], p.R, before, add);
      }
      fetch_next(p.x, k - 1, p.C);
      add_outer(d.w[0], by_columns(dr, dr), p.C, by_columns(hidden[0], copy_of_hidden[0]), add);
      add_outer(d.w[1], by_columns(dz, dz), p.C, by_columns(hidden[1], copy_of_hidden[1]), add);
      add_outer(d.vx, dc_columns, p.C, x, add);
      add_outer(d.vo, dc_columns, p.C, by_columns(gated, gated), add);
    }
    if (!p.d_start.data) continue;
    if (p.grad_start.data) {
      const Panel::Matrix grad = read(copy_of_grad, p.grad_start, p.dtype, 0, p.C);
      each(c, [&](int64_t row, int64_t i) { put(carry, row, i, get(carry, row, i) + get(grad, row, i)); });
    }
    write_any(p.positions, panel, carry, p.d_start, p.start_dtype, 0, 0, p.C);
  }
}
