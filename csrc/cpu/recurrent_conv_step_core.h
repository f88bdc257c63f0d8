// recurrent_conv: a single product, v' = alpha (W v + x), of tensors whose channels are adjacent. Included at the end
// of recurrent_conv_core.h, for every instruction set that includes it.
//
// A scan packs W once for many frames; one frame has to pay for W as for its operands. So a task takes panels of W of
// its own, turns 128 inputs x 32 outputs of one at a time into the first-level cache, and takes all its rows
// (positions) through them.
//
// Layout.   A task owns a range of rows and of output channels. The state is read where it lies, MR rows at a time;
//           rows beyond the last whole block, and all of them where they are not evenly spaced, of another dtype, or a
//           multiple of a page apart (they would fall on one another in the cache), are copied first, [row][C + L].
// Aliasing. As for scans.
// Scratch.  A piece of a panel, one panel's sums of all rows, the copied rows, tables of offsets.
// Order.    That of scans: results are the same bit by bit.
// Bound.    2 C FLOP per element; W comes by once per task and is asked for one piece ahead, the state once per panel,
//           from the second-level cache: 4 C bytes for 32 * 2 C FLOP.

// sums[m][n] (+)= sum over k of a[m][k] b[k][n] for MR rows and NV vectors of columns; rows of b and of sums are Pitch
// numbers apart. The MR rows after these are asked for line by line between the products: in one go, more lines than a
// core can wait for would hold it up. (Asking for what lies beyond the last row does no harm.)
template <class V, int MR, int NV, int Pitch = NV * V::L>
static void step_block(const typename V::S* a, int64_t lda, const typename V::S* b, int64_t count, typename V::S* sums,
                       bool resume) {
  using R = typename V::R;
  constexpr int L = V::L;
  R acc[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[m][v] = V::set1(typename V::S(-0.0));
  constexpr int line = 64 / sizeof(typename V::S);
  const typename V::S* ahead = a + MR * lda;
#pragma GCC unroll 2
  for (int64_t k = 0; k < count; ++k, b += Pitch) {
    __builtin_prefetch(ahead);
    ahead += k % line == line - 1 ? line - (line - 1) * lda : lda;
    R bv[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) bv[v] = V::load(b + v * L);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const R av = V::set1(a[m * lda + k]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[m][v] = V::fma(av, bv[v], acc[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      typename V::S* const at = sums + m * Pitch + v * L;
      V::store(at, resume ? V::add(V::load(at), acc[m][v]) : acc[m][v]);
    }
}

template <class V>
struct Step {
  using S = typename V::S;
  static_assert(sizeof(S) == 4, "fp64 is left to scans");
  using R = typename V::R;
  static constexpr int L = V::L, MR = V::channels_rows, HALF = MR / 2, NV = 2, NR = NV * L;

  const Scan& p;
  const Plan& plan;

  static void block(bool half, int vectors, const S* a, int64_t lda, const S* b, int64_t count, S* sums, bool resume) {
    if (vectors == NV)
      half ? step_block<V, HALF, NV>(a, lda, b, count, sums, resume)
           : step_block<V, MR, NV>(a, lda, b, count, sums, resume);
    else
      half ? step_block<V, HALF, 1>(a, lda, b, count, sums, resume)
           : step_block<V, MR, 1>(a, lda, b, count, sums, resume);
  }

  void run(int64_t q0, int64_t q1, int64_t c0, int64_t c1) const {
    const int64_t rows = q1 - q0, C = p.C, copied_row = C + L;
    size_t bytes = 0;
    const auto reserve = [&](int64_t size) {
      const size_t at = bytes;
      bytes += (static_cast<size_t>(size) + 63) / 64 * 64;
      return at;
    };
    const size_t at_tables = reserve(5 * rows * static_cast<int64_t>(sizeof(int64_t)));
    const size_t at_panel = reserve(k_part * NR * static_cast<int64_t>(sizeof(S)));
    const size_t at_sums = reserve(round_up(rows, HALF) * NR * static_cast<int64_t>(sizeof(S)));
    const size_t at_copies = reserve(round_up(rows, HALF) * copied_row * static_cast<int64_t>(sizeof(S)));
    char* const memory = static_cast<char*>(scratch(1, bytes));
    int64_t* const tables = reinterpret_cast<int64_t*>(memory + at_tables);
    S* const panel = reinterpret_cast<S*>(memory + at_panel);
    S* const sums = reinterpret_cast<S*>(memory + at_sums);
    S* const copies = reinterpret_cast<S*>(memory + at_copies);

    // Views with the same strides share a table; a tensor that is absent has one, too, which nothing is read from.
    const View* const views[] = {&p.first, &p.last, &p.x, &p.residual, &p.y};
    const int64_t* at[5];
    for (int i = 0; i < 5; ++i) {
      const View& v = *views[i];
      int same = 0;
      while (same < i &&
             (views[same]->n != v.n || views[same]->g != v.g || views[same]->h != v.h || views[same]->w != v.w))
        ++same;
      at[i] = same < i ? at[same] : tables + i * rows;
      if (same == i) column_offsets(p, v, q0, rows, tables + i * rows);
    }
    const int64_t *const first_at = at[0], *const last_at = at[1], *const x_at = at[2];
    const int64_t *const residual_at = at[3], *const y_at = at[4];

    const S* const first = static_cast<const S*>(p.first.data);
    const int64_t spacing = rows > 1 ? first_at[1] - first_at[0] : C;
    const bool same = p.first.dtype == DType::f32;
    bool here = same && spacing * static_cast<int64_t>(sizeof(S)) % 4096 != 0;
    for (int64_t m = 1; here && m < rows; ++m) here = first_at[m] - first_at[m - 1] == spacing;
    const int64_t read_here = here ? rows / MR * MR : 0;
    for (int64_t m = read_here; m < round_up(rows - read_here, HALF) + read_here; ++m) {
      S* const to = copies + (m - read_here) * copied_row;
      if (m >= rows)
        memset(static_cast<void*>(to), 0, C * sizeof(S));
      else if (same)
        copy_row(to, first + first_at[m], C * sizeof(S));
      else
        for (int64_t c = 0; c < C; ++c) to[c] = static_cast<S>(load_any(p.first.data, p.first.dtype, first_at[m] + c));
    }

    const bool around_state = plan.around_state && whole_lines(p.last, sizeof(S)),
               around = plan.around && whole_lines(p.y, element_size(p.dtype));
    for (int64_t l0 = c0; l0 < c1; l0 += NR) {
      const int64_t vectors = min_of<int64_t>(NV, (c1 - l0) / L), width = vectors * L;
      for (int64_t k0 = 0; k0 < C; k0 += k_part) {
        const int64_t count = min_of(k_part, C - k0);
        const bool last = k0 + count == C;
        pack_panel<V>(p, l0, width, width, k0, count, panel);
        // The next piece of W is asked for block by block.
        const int64_t next_l = last ? l0 + NR : l0, next_k = last ? 0 : k0 + count;
        const int64_t next_rows = next_l < c1 ? min_of<int64_t>(NR, c1 - next_l) : 0;
        const int64_t share = ceil_div(next_rows * MR, rows);
        int64_t next_row = 0;
        for (int64_t m0 = 0; m0 < rows; m0 += MR) {
          const int64_t present = min_of<int64_t>(MR, rows - m0);
          for (int64_t i = 0; i < share && next_row < next_rows; ++i, ++next_row)
            prefetch_piece(next_l + next_row, next_k, min_of(k_part, C - next_k));
          const bool at_home = m0 < read_here;
          const S* const a = at_home ? first + first_at[m0] + k0 : copies + (m0 - read_here) * copied_row + k0;
          S* const sum = sums + (C > k_part ? m0 * NR : 0);
          block(present <= HALF, static_cast<int>(vectors), a, at_home ? spacing : copied_row, panel, count, sum,
                k0 > 0);
          if (!last) continue;
          const Rows at_rows{x_at + m0, residual_at + m0, y_at + m0, last_at + m0};
          const int64_t next = max_of<int64_t>(min_of<int64_t>(MR, rows - m0 - MR), 0);
          as_numbers<S>(p.dtype, [&](auto number) {
            if (vectors == NV)
              finish<decltype(number), NV>(sum, present, next, l0, at_rows, around, around_state);
            else
              finish<decltype(number), 1>(sum, present, next, l0, at_rows, around, around_state);
          });
        }
      }
    }
    if (around || around_state) end_around();
  }

  struct Rows {
    const int64_t *x, *residual, *y, *last;  // where each row lies in each tensor
  };
  // What follows the products of `count` rows. x and the residual of the `next` ones after the block are asked for.
  template <class T, int Vectors>
  void finish(const S* sums, int64_t count, int64_t next, int64_t l0, const Rows& at, bool around,
              bool around_state) const {
    const R alpha = V::set1(static_cast<S>(p.alpha_final));
    // Copies, which the stores below cannot change.
    const auto lanes_of = [&](auto* data) { return data ? data + l0 : nullptr; };
    const T* const x = lanes_of(static_cast<const T*>(p.x.data));
    const T* const residual = lanes_of(static_cast<const T*>(p.scale ? p.residual.data : nullptr));
    const S* const scale = lanes_of(static_cast<const S*>(p.scale));
    const S* const shift = lanes_of(static_cast<const S*>(p.shift));
    T* const y = lanes_of(static_cast<T*>(p.y.data));
    S* const last = lanes_of(static_cast<S*>(p.last_kind != Last::none ? p.last.data : nullptr));
    const bool relu = p.relu;
    for (int64_t m = 0; m < count; ++m, sums += Vectors * L) {
      if (m < next) {
        if (x) prefetch_row(x + at.x[m + MR], Vectors * L);
        if (residual) prefetch_row(residual + at.residual[m + MR], Vectors * L);
      }
      R value[Vectors];
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) {
        value[v] = V::load(sums + v * L);
        if (x) value[v] = V::add(value[v], V::load(x + at.x[m] + v * L));
        value[v] = V::mul(value[v], alpha);
      }
      if (last) store_row<V, Vectors>(last + at.last[m], value, around_state);
      if (!y) continue;
      if (scale) {
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) {
          value[v] = V::fma(V::load(scale + v * L), value[v], V::load(shift + v * L));
          if (residual) value[v] = V::add(value[v], V::load(residual + at.residual[m] + v * L));
          if (relu) value[v] = V::relu(value[v]);
        }
      }
      store_row<V, Vectors>(y + at.y[m], value, around);
    }
  }

  static bool whole_lines(const View& v, int64_t size) {
    const int64_t line = 64 / size;
    return streams<V> && v.data && reinterpret_cast<uintptr_t>(v.data) % 64 == 0 && (v.n | v.g | v.h | v.w) % line == 0;
  }
  template <class T>
  static void prefetch_row(const T* row, int64_t count) {
    const char* from = reinterpret_cast<const char*>(row);
    for (int64_t b = 0; b < count * static_cast<int64_t>(sizeof(T)); b += 64) __builtin_prefetch(from + b);
  }
  void prefetch_piece(int64_t o, int64_t k0, int64_t count) const {
    if (p.weight_in != 1) return;
    const int64_t size = element_size(p.dtype);
    const char* from = static_cast<const char*>(p.weight) + (o * p.weight_out + k0) * size;
    for (int64_t b = 0; b < count * size; b += 64) __builtin_prefetch(from + b, 0, 2);
  }

  static void task(void* self, int64_t index) {
    const auto& t = *static_cast<const Step*>(self);
    const TaskRange r = task_range(t.plan, t.p.N * t.p.G * t.p.H * t.p.W, t.p.C, index);
    t.run(r.column_begin, r.column_end, r.channel_begin, r.channel_end);
  }

  static void run_all(const Scan& p, const Plan& plan, const Parallel& parallel) {
    Step t{p, plan};
    parallel.run(parallel.pool, task_count(plan, p.N * p.G * p.H * p.W), task, &t);
  }
};
