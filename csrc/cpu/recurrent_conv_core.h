// recurrent_conv on vector units: the body of every instruction set but the matrix one.
//
// Included once per instruction set, inside a namespace of its own and under that file's target pragma, so that no
// inline function compiled for one processor can be linked into the code of another. For the same reason nothing here
// instantiates a template of the standard library.
//
// Layout.   Columns q = (n, g, h, w) are independent. A task owns a range of columns for all frames. Its state lives in
//           two scratch copies (old and new), in the precision of the arithmetic (fp32, or fp64), cut into panels:
//             planar    [panel][channel][NV * L columns]            vectors along columns, W[out][k] broadcast
//             channels  [panel of MR columns][channel / L][MR][L]   vectors along channels, the state broadcast,
//                                                                   W packed to [panel][k][NV * L output channels]
//           so both read their operands with unit stride and write the next state where the next frame reads it. x, y
//           and the residual are read and written where they lie if their lanes are adjacent there; else, and at the
//           edges, they pass through stages of [MR rows][a group of panels], see recurrent_conv_transport.h.
// Aliasing. y may be x itself, whose every element is read before it is written, by the task that writes it; it must not
//           overlap any other input. The caller owns every tensor; scratch belongs to the thread.
// Scratch.  2 * C * columns of state per task, and W once per call in the form above (none for fp32 rows as they are).
// Order.    For every 128 k: acc = -0, acc = fma(W[o][k], v[k], acc) one k after the other; then the sum of these
//           parts, in order; v' = alpha * (sum + x). Neither the blocking nor a tail nor the orientation changes that,
//           so results do not depend on tiling, number of threads, or on how many frames one call is given. (-0 + x is
//           x for every x.)
// Bound.    Per element 2 C FLOP and, beyond the caches, x read + y written once (+ the read that a write of a line
//           costs): memory below C of about bytes_per_element * FLOP_rate / (2 * bandwidth), arithmetic above it.
//
// The including file defines, in the namespace: the vector types F32 and F64, after scalar.h; or F32 and
// RCU_OPS_NO_F64, if it has no fp64.

// ---- the block: C[MR][NV vectors] += A(m, k) B(k, n), and what follows the last k ---------------------------------

template <class S>
struct Block {
  const S* a = nullptr;  // planar: W rows, lda apart; channels: the state panel
  int64_t lda = 0;
  const S* b = nullptr;  // [k][NV * L]
  int64_t k = 0;
  S* c = nullptr;       // the block of the new state; holds partial sums between two ranges of k
  bool resume = false;  // add what is in c
  bool last = false;    // nothing of k is left: finish
  bool relu = false;
  S alpha = 1;
  DType dtype = DType::f32;                      // of x, residual and y
  bool wide = true;                              // which is the state's
  const void *x = nullptr, *residual = nullptr;  // [MR] rows, where they lie in the tensor or in a stage; absent: zero
  void* y = nullptr;
  const int64_t *x_at = nullptr, *residual_at = nullptr, *y_at = nullptr;  // of each row
  S* state = nullptr;                                                      // where the last state belongs in its tensor
  const int64_t* state_at = nullptr;
  bool around = false, around_state = false;  // y, or the state, goes past the caches; its rows are aligned to lines
  const char* const* ahead = nullptr;         // lines to ask for meanwhile, `share` after every ahead_step of k
  const char* const* ahead_end = nullptr;
  int64_t share = 0;
  const S *scale = nullptr, *shift = nullptr;  // of this block's channels
};

// Whether the instruction set writes past the caches from a register.
template <class V>
constexpr bool streams = requires(typename V::S* p, typename V::R v) { V::stream(p, v); };

template <class V, int NV, class T>
[[gnu::always_inline]] static inline void store_row(T* to, const typename V::R* row, bool around) {
  if constexpr (streams<V>) {
    if (around) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) V::stream(to + v * V::L, row[v]);
      return;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) V::store(to + v * V::L, row[v]);
}

// Lines are asked for one by one between the products: in one go, more than a core can wait for would hold it up.
static constexpr int ahead_step = 4;

// The new state, and y where memory's numbers are as wide as the state; else finish_block makes y of the new state, so
// that there is one product for all formats. What follows the product takes the new state from memory, too: for sums
// that live on in registers the compiler keeps some in memory in the product's loop, which takes a twentieth longer.
template <class V, int MR, int NV, bool Channels>
[[gnu::noinline]] static void run_block(const Block<typename V::S>& p) {
  using S = typename V::S;
  using R = typename V::R;
  constexpr int L = V::L, NR = NV * L;
  constexpr int c_row = Channels ? L : NR, c_vector = Channels ? MR * L : L;
  R acc[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[m][v] = V::set1(S(-0.0));
  const S* b = p.b;
  const char* const* ahead = p.ahead;
  const auto ask = [&]() __attribute__((always_inline)) {
    for (int64_t i = 0; i < p.share && ahead < p.ahead_end; ++i) __builtin_prefetch(*ahead++, 0, 2);
  };
  const auto add = [&](const S* a, int64_t a_row) __attribute__((always_inline)) {
    R bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) bv[v] = V::load(b + v * L);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const R av = V::set1(a[m * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[m][v] = V::fma(av, bv[v], acc[m][v]);
    }
    b += NR;
  };
  if constexpr (Channels) {
    for (int64_t k0 = 0; k0 < p.k; k0 += L) {
      const S* a = p.a + k0 * MR;
      const int64_t count = min_of<int64_t>(L, p.k - k0);
      int64_t k = 0;
      for (; k + ahead_step <= count; k += ahead_step) {
        ask();
#pragma GCC unroll 4
        for (int i = 0; i < ahead_step; ++i) add(a + k + i, L);
      }
      for (; k < count; ++k) add(a + k, L);
    }
  } else {
    int64_t k = 0;
    for (; k + ahead_step <= p.k; k += ahead_step) {
      ask();
#pragma GCC unroll 4
      for (int i = 0; i < ahead_step; ++i) add(p.a + k + i, p.lda);
    }
    for (; k < p.k; ++k) add(p.a + k, p.lda);
  }
  if (p.resume) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[m][v] = V::add(V::load(p.c + m * c_row + v * c_vector), acc[m][v]);
  }
  if (p.last) {
    if (p.x)
      as_numbers<S>(p.dtype, [&](auto number) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
          const auto* x = static_cast<const decltype(number)*>(p.x) + p.x_at[m];
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) acc[m][v] = V::add(acc[m][v], V::load(x + v * L));
        }
      });
    const R alpha = V::set1(p.alpha);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[m][v] = V::mul(acc[m][v], alpha);
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) V::store(p.c + m * c_row + v * c_vector, acc[m][v]);
  if (!p.last || !(p.state || (p.y && p.wide))) return;
  __asm__ volatile("" ::: "memory");
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[m][v] = V::load(p.c + m * c_row + v * c_vector);
  if (p.state) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) store_row<V, NV>(p.state + p.state_at[m], acc[m], p.around_state);
  }
  if (!p.y || !p.wide) return;
  S* const y = static_cast<S*>(p.y);
  if (p.scale) {
    const S* const residual = static_cast<const S*>(p.residual);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const R scale = Channels ? V::load(p.scale + v * L) : V::set1(p.scale[m]);
        const R shift = Channels ? V::load(p.shift + v * L) : V::set1(p.shift[m]);
        R value = V::fma(scale, acc[m][v], shift);
        if (residual) value = V::add(value, V::load(residual + p.residual_at[m] + v * L));
        if (p.relu) value = V::relu(value);
        acc[m][v] = value;
      }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) store_row<V, NV>(y + p.y_at[m], acc[m], p.around);
}

// y from the new state, row by row.
template <class V, class T, int MR, int NV, bool Channels>
static void finish_block(const Block<typename V::S>& p) {
  using R = typename V::R;
  constexpr int L = V::L, c_row = Channels ? L : NV * L, c_vector = Channels ? MR * L : L;
  // Copies, which the stores below cannot change.
  const auto *const c = p.c, *const scale = p.scale, *const shift = p.shift;
  const T* const residual = static_cast<const T*>(p.residual);
  T* const y = static_cast<T*>(p.y);
  const int64_t *const residual_at = p.residual_at, *const y_at = p.y_at;
  const bool relu = p.relu, around = p.around;
  for (int m = 0; m < MR; ++m) {
    R value[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) value[v] = V::load(c + m * c_row + v * c_vector);
    if (scale) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const R factor = Channels ? V::load(scale + v * L) : V::set1(scale[m]);
        const R offset = Channels ? V::load(shift + v * L) : V::set1(shift[m]);
        value[v] = V::fma(factor, value[v], offset);
        if (residual) value[v] = V::add(value[v], V::load(residual + residual_at[m] + v * L));
        if (relu) value[v] = V::relu(value[v]);
      }
    }
    store_row<V, NV>(y + y_at[m], value, around);
  }
}

// Elements of `size` bytes between tensors and stages, whatever they mean.
struct [[gnu::may_alias]] Half {
  uint16_t bits;
};
template <class S, class Call>
static inline void as_units(int64_t size, Call call) {
  if (size == sizeof(S))
    call(S());
  else
    call(Half());
}
template <class S>
static void copy_in(int64_t size, const void* frame, const int64_t* rows, int64_t row_count, const int64_t* lanes,
                    int64_t lane_count, void* stage, int64_t width) {
  as_units<S>(size, [&](auto unit) {
    using U = decltype(unit);
    copy_in(static_cast<const U*>(frame), rows, row_count, lanes, lane_count, static_cast<U*>(stage), width);
  });
}
template <class S>
static void copy_out(int64_t size, void* frame, const int64_t* rows, int64_t row_count, const int64_t* lanes,
                     int64_t lane_count, const void* stage, int64_t width, bool around) {
  as_units<S>(size, [&](auto unit) {
    using U = decltype(unit);
    copy_out(static_cast<U*>(frame), rows, row_count, lanes, lane_count, static_cast<const U*>(stage), width, around);
  });
}

// ---- a task: one tile of columns, all frames -------------------------------------------------------------------

template <class V, bool Channels>
struct Tile {
  using S = typename V::S;
  static constexpr int L = V::L;
  static constexpr int MR = Channels ? V::channels_rows : V::planar_rows;
  static constexpr int NV = Channels ? V::channels_vectors : V::planar_vectors;

  const Scan& p;
  const S* weight;  // planar: rows `ldw` apart, padded to a multiple of MR; channels: panels
  int64_t ldw;
  const S *scale, *shift;  // padded to a multiple of lanes and rows
  int64_t k_block;
  int64_t plan_group;              // vectors per stage
  bool around_clip, around_state;  // y and the last state go past the caches

  // Lanes are cut into panels of NV vectors; the rest goes to narrower ones.
  static int vectors_at(int64_t done, int64_t total) {
    const int64_t left = total - done;
    if (left > NV + 1 || left == NV) return NV;
    if (left > NV) return static_cast<int>((left + 1) / 2);  // NV + 1: two halves rather than NV and 1
    return static_cast<int>(left);
  }

  static void dispatch(const Block<S>& b, int vectors) {
    if (vectors == 1)
      compute<1>(b);
    else if (vectors == 2)
      compute<2>(b);
    else if constexpr (NV >= 3)
      compute<3>(b);
  }
  template <int Vectors>
  static void compute(const Block<S>& b) {
    run_block<V, MR, Vectors, Channels>(b);
    if constexpr (sizeof(S) == 4)
      if (!b.wide && b.last && b.y)
        as_narrow(b.dtype, [&](auto number) { finish_block<V, decltype(number), MR, Vectors, Channels>(b); });
  }

  // Of elements of `size` bytes, of which base and t count in bytes.
  void make_stream(const View& view, int64_t size, Stream<char>& s, int64_t q0, int64_t columns, int64_t* table) const {
    if (!view.data) return;
    s.base = static_cast<char*>(view.data) + (p.reverse ? (p.T - 1) * view.t : 0) * size;
    s.t = (p.reverse ? -view.t : view.t) * size;
    int64_t* channels = table + columns;
    column_offsets(p, view, q0, columns, table);
    for (int64_t c = 0; c < p.C; ++c) channels[c] = c * view.c;
    s.rows = Channels ? table : channels;
    s.lanes = Channels ? channels : table;
    int64_t* ends = channels + p.C;
    for (int64_t l = 0, lanes = Channels ? p.C : columns; l < lanes;) {
      const int64_t end = run_end(s.lanes, l, lanes);
      while (l < end) ends[l++] = end;
    }
    s.ends = ends;
  }

  // Whether a stream's tensor holds vectors [v0, v1) as the block does: nothing is missing and all lanes are adjacent.
  static bool dense(const Stream<char>& s, int64_t v0, int64_t v1, int64_t lanes) {
    return v1 * L <= lanes && s.ends[v0 * L] >= v1 * L;
  }

  // Past the caches only whole lines are worth writing: panels of them, and rows that all begin one.
  static bool whole_lines(const View& v, int64_t size) {
    const int64_t line = 64 / size;
    return streams<V> && NV * L % line == 0 && reinterpret_cast<uintptr_t>(v.data) % 64 == 0 &&
           (v.t | v.n | v.g | (Channels ? v.h | v.w : v.c)) % line == 0;
  }
  static bool starts_line(const Stream<char>& s, int64_t v, int64_t size) { return s.lanes[v * L] * size % 64 == 0; }

  // Columns [q0, q1), all frames. Output channels [c0, c1) (multiples of the block) only when there is a single product
  // to compute: several tasks then share the columns.
  void run(int64_t q0, int64_t q1, int64_t c0, int64_t c1) const {
    const int64_t columns = q1 - q0, C = p.C, element = element_size(p.dtype);
    const int64_t padded_columns = round_up(columns, Channels ? MR : L);
    const int64_t padded_channels = round_up(C, Channels ? L : MR);
    const int64_t lanes = Channels ? C : columns, rows = Channels ? columns : C;
    const int64_t lane_vectors = (Channels ? padded_channels : padded_columns) / L;
    const int64_t state_size = padded_columns * (Channels ? padded_channels : C + MR);  // planar: a row tail may spill
    const int64_t table = columns + C + lanes;
    const int64_t stage_width = min_of<int64_t>(plan_group, lane_vectors) * L, stage_size = MR * stage_width;

    size_t bytes = 0;
    const auto reserve = [&](size_t size) {
      const size_t at = bytes;
      bytes += (size + 63) / 64 * 64;
      return at;
    };
    const size_t at_state = reserve(2 * state_size * sizeof(S)),
                 at_table = reserve((4 * table + 2 * columns) * sizeof(int64_t));
    const size_t at_stage = reserve(3 * stage_size * element);
    const size_t at_lines = reserve(3 * MR * (stage_width * element / 64 + 2) * sizeof(char*));
    char* memory = static_cast<char*>(scratch(1, bytes));
    S* old_state = reinterpret_cast<S*>(memory + at_state);
    S* new_state = old_state + state_size;
    int64_t* tables = reinterpret_cast<int64_t*>(memory + at_table);
    int64_t* const state_table = tables + 3 * table;
    char* const stage = memory + at_stage;
    const char** const lines = reinterpret_cast<const char**>(memory + at_lines);
    // Rows and lanes that do not exist compute on zeros.
    memset(stage, 0, 3 * stage_size * element);

    Stream<char> x, y, residual;
    make_stream(p.x, element, x, q0, columns, tables);
    make_stream(p.y, element, y, q0, columns, tables + table);
    make_stream(p.residual, element, residual, q0, columns, tables + 2 * table);
    int64_t stage_rows[MR];
    for (int m = 0; m < MR; ++m) stage_rows[m] = m * stage_width;
    const bool y_lines = whole_lines(p.y, element);
    // Where lines begin and end within a row and the arithmetic is the bound, rows go the usual way, and what it takes
    // to fetch their lines is hidden: the stage and what copies leave of lines at both ends cost more.
    const bool around = around_clip && (y_lines || plan_group > NV);
    int64_t group = plan_group;
    if (!Channels && group > NV && x.base && y.base) {
      // Long rows are for stages. What is read and written where it lies goes panel by panel, its states in the nearest
      // cache.
      int64_t staged = 0;
      for (int64_t v = 0; v < lane_vectors;) {
        const int64_t end = v + vectors_at(v, lane_vectors);
        if (!dense(x, v, end, lanes) || !dense(y, v, end, lanes) ||
            (around && !(y_lines && starts_line(y, v, element))))
          staged += end - v;
        v = end;
      }
      if (2 * staged < lane_vectors) group = NV;
    }

    if (p.init != Init::none)
      load_state(p.init == Init::state ? old_state : new_state, q0, columns, state_size, state_table);

    const int64_t frames = p.T + (p.last_kind == Last::projected ? 1 : 0);
    const int64_t row_begin = Channels ? 0 : c0, row_end = Channels ? rows : min_of(c1, rows);
    // The last frame writes whole blocks of the last state where it belongs; what is left over is copied at the end.
    Stream<char> last_state;
    if (p.last_kind != Last::none && p.last.dtype == (sizeof(S) == 8 ? DType::f64 : DType::f32)) {
      make_stream(p.last, sizeof(S), last_state, q0, columns, state_table + 2 * columns);
      for (int64_t v = 0; v < lane_vectors && last_state.base; v += vectors_at(v, lane_vectors))
        if (!dense(last_state, v, v + vectors_at(v, lane_vectors), lanes)) last_state.base = nullptr;
    }
    const bool state_lines = around_state && last_state.base && whole_lines(p.last, sizeof(S));
    for (int64_t i = 0; i < frames; ++i) {
      const bool to_last = i + 1 == frames && last_state.base;
      const bool extra = i == p.T, resume_first = i == 0 && p.init == Init::added;
      const int64_t K = i > 0 || p.init == Init::state ? C : 0;
      const double alpha = extra ? 1 : i == p.T - 1 ? p.alpha_final : i == 0 ? p.alpha_first : p.alpha;
      for (int64_t k0 = 0; k0 == 0 || k0 < K; k0 += k_block) {
        const bool last = k0 + k_block >= K, transport = last && !extra;
        for (int64_t g0 = 0; g0 < lane_vectors;) {
          int64_t g1 = g0;
          while (g1 < lane_vectors && g1 + vectors_at(g1, lane_vectors) - g0 <= group)
            g1 += vectors_at(g1, lane_vectors);
          const int64_t group_lanes = min_of(g1 * L, lanes) - g0 * L;
          for (int64_t m0 = row_begin; m0 < row_end; m0 += MR) {
            const int64_t group_rows = min_of<int64_t>(MR, row_end - m0);
            const bool whole = group_rows == MR;
            const bool x_here = x.base && whole && dense(x, g0, g1, lanes);
            const bool residual_here = residual.base && whole && dense(residual, g0, g1, lanes);
            const bool y_here =
                y.base && whole && dense(y, g0, g1, lanes) && (!around || (y_lines && starts_line(y, g0, element)));
            if (transport && x.base && !x_here)
              copy_in<S>(element, x.base + i * x.t, x.rows + m0, group_rows, x.lanes + g0 * L, group_lanes, stage,
                         stage_width);
            if (transport && residual.base && !residual_here)
              copy_in<S>(element, residual.base + i * residual.t, residual.rows + m0, group_rows,
                         residual.lanes + g0 * L, group_lanes, stage + stage_size * element, stage_width);
            // The lines of the next piece, so that they have come by when it is computed.
            const char** asked = lines;
            if (transport) {
              const bool same_group = m0 + MR < row_end, same_frame = same_group || g1 < lane_vectors;
              const int64_t m = same_group ? m0 + MR : row_begin;
              const int64_t g = same_group ? g0 : same_frame ? g1 : 0, f = same_frame ? i : i + 1;
              if (f < p.T) {
                const int64_t next_rows = min_of<int64_t>(MR, row_end - m),
                              next_lanes = min_of(group_lanes, lanes - g * L);
                const auto add = [&](const Stream<char>& s) {
                  each_line(element, s.base + f * s.t, s.rows + m, next_rows, s.lanes[g * L], next_lanes,
                            [&](const char* line) { *asked++ = line; });
                };
                if (x.base) add(x);
                if (residual.base) add(residual);
                if (y.base && !around) add(y);
              }
            }
            const char* const* ahead = lines;
            const int64_t steps = min_of(k_block, K - k0) / ahead_step;
            const int64_t share = steps ? ceil_div(asked - lines, steps * ceil_div(g1 - g0, NV)) : 0;
            if (!steps)  // nothing is multiplied meanwhile
              while (ahead < asked) __builtin_prefetch(*ahead++, 0, 2);
            for (int64_t v = g0; v < g1;) {
              const int nv = vectors_at(v, lane_vectors), NR = nv * L;
              const int64_t l0 = v * L;
              v += nv;
              Block<S> b;
              b.dtype = p.dtype;
              b.wide = element == sizeof(S);
              b.k = min_of(k_block, K - k0);
              b.ahead = ahead, b.ahead_end = asked, b.share = share;
              ahead += min_of<int64_t>(steps * share, asked - ahead);
              if (Channels) {
                b.a = old_state + m0 * padded_channels + k0 * MR;
                b.b = weight + l0 * C + k0 * NR;
                b.c = new_state + m0 * padded_channels + l0 * MR;
              } else {
                b.a = weight + m0 * ldw + k0;
                b.lda = ldw;
                b.b = old_state + l0 * (C + MR) + k0 * NR;
                b.c = new_state + l0 * (C + MR) + m0 * NR;
              }
              b.resume = k0 > 0 || resume_first;
              b.last = last;
              b.alpha = static_cast<S>(alpha);
              b.relu = p.relu;
              if (to_last && last && whole) {
                b.state = reinterpret_cast<S*>(last_state.base) + last_state.lanes[l0];
                b.state_at = last_state.rows + m0;
                b.around_state = state_lines && starts_line(last_state, l0 / L, sizeof(S));
              }
              if (transport) {
                char* const at = stage + (l0 - g0 * L) * element;
                const auto place = [&](const Stream<char>& s) { return s.base + i * s.t + s.lanes[l0] * element; };
                b.x_at = x_here ? x.rows + m0 : stage_rows;
                b.residual_at = residual_here ? residual.rows + m0 : stage_rows;
                b.y_at = y_here ? y.rows + m0 : stage_rows;
                if (x.base) b.x = x_here ? place(x) : at;
                if (residual.base) b.residual = residual_here ? place(residual) : at + stage_size * element;
                if (y.base) b.y = y_here ? place(y) : at + 2 * stage_size * element;
                b.around = y_here && around;
              }
              if (p.scale) {
                b.scale = scale + (Channels ? l0 : m0);
                b.shift = shift + (Channels ? l0 : m0);
              }
              dispatch(b, nv);
            }
            if (transport && y.base && !y_here)
              copy_out<S>(element, y.base + i * y.t, y.rows + m0, group_rows, y.lanes + g0 * L, group_lanes,
                          stage + 2 * stage_size * element, stage_width, around);
          }
          g0 = g1;
        }
      }
      S* swap = old_state;
      old_state = new_state;
      new_state = swap;
    }
    if (p.last_kind != Last::none) {
      const int64_t stored = last_state.base ? row_begin + (row_end - row_begin) / MR * MR : row_begin;
      if (Channels)
        store_state(old_state, q0, columns, stored, c0, c1, state_table);
      else
        store_state(old_state, q0, columns, 0, stored, c1, state_table);
    }
    if (around || around_state) end_around();
  }

  // Calls visit(state index, offset in v, offsets, count, adjacent) for every piece of a state that is adjacent in
  // scratch: columns of one channel (planar, all of them; unless adjacent in v too, column i lies offsets[i] further)
  // or channels of one column.
  template <class Visit>
  void for_each_piece(const View& v, int64_t q0, int64_t columns, int64_t first_column, int64_t c0, int64_t c1,
                      int64_t* column_at, Visit&& visit) const {
    if (first_column >= columns || c0 >= c1) return;
    column_offsets(p, v, q0, columns, column_at);
    if (Channels) {
      const int64_t padded_channels = round_up(p.C, L);
      for (int64_t q = first_column; q < columns; ++q) {
        const int64_t offset = column_at[q], at = q / MR * MR * padded_channels + q % MR * L;
        for (int64_t c = c0; c < c1; c += L)
          visit(at + c * MR, offset + c * v.c, nullptr, min_of<int64_t>(L, c1 - c), v.c == 1);
      }
    } else {
      const int64_t lane_vectors = round_up(columns, L) / L;
      int64_t* const run_ends = column_at + columns;
      for (int64_t q = 0; q < columns;) {
        const int64_t end = run_end(column_at, q, columns);
        while (q < end) run_ends[q++] = end;
      }
      for (int64_t c = c0; c < c1; ++c)
        for (int64_t first = 0; first < lane_vectors;) {
          const int64_t NR = vectors_at(first, lane_vectors) * L, l0 = first * L, count = min_of(NR, columns - l0);
          const bool adjacent = run_ends[l0] >= l0 + count;
          visit(l0 * (p.C + MR) + c * NR, (adjacent ? column_at[l0] : 0) + c * v.c, column_at + l0, count, adjacent);
          first += NR / L;
        }
    }
  }

  void load_state(S* state, int64_t q0, int64_t columns, int64_t state_size, int64_t* column_at) const {
    if (columns % (Channels ? MR : L)) memset(static_cast<void*>(state), 0, sizeof(S) * state_size);
    const View& v = p.first;
    const bool same = v.dtype == (sizeof(S) == 8 ? DType::f64 : DType::f32);
    for_each_piece(v, q0, columns, 0, 0, p.C, column_at,
                   [&](int64_t at, int64_t offset, const int64_t* offsets, int64_t count, bool adjacent) {
                     if (same && adjacent)
                       copy_row(state + at, static_cast<const S*>(v.data) + offset, count * sizeof(S));
                     else
                       for (int64_t i = 0; i < count; ++i)
                         state[at + i] = static_cast<S>(load_any(v.data, v.dtype,
                                                                 offset + (adjacent   ? i
                                                                           : Channels ? i * v.c
                                                                                      : offsets[i])));
                   });
  }

  void store_state(const S* state, int64_t q0, int64_t columns, int64_t first_column, int64_t c0, int64_t c1,
                   int64_t* column_at) const {
    const View& v = p.last;
    const bool same = v.dtype == (sizeof(S) == 8 ? DType::f64 : DType::f32);
    for_each_piece(
        v, q0, columns, first_column, c0, min_of(c1, p.C), column_at,
        [&](int64_t at, int64_t offset, const int64_t* offsets, int64_t count, bool adjacent) {
          if (same && adjacent && around_state)
            copy_around(static_cast<S*>(v.data) + offset, state + at, count * sizeof(S));
          else if (same && adjacent)
            copy_row(static_cast<S*>(v.data) + offset, state + at, count * sizeof(S));
          else
            for (int64_t i = 0; i < count; ++i)
              store_any(v.data, v.dtype, offset + (adjacent ? i : Channels ? i * v.c : offsets[i]), state[at + i]);
        });
  }
};

// Output channels [o0, o0 + valid) of W for inputs [k0, k0 + count): out[k][NR], zeros beyond `valid`.
template <class V, class T>
static void pack_panel_of(const Scan& p, int64_t o0, int64_t valid, int64_t NR, int64_t k0, int64_t count,
                          typename V::S* out) {
  using S = typename V::S;
  constexpr int L = V::L;
  const T* src = static_cast<const T*>(p.weight) + o0 * p.weight_out + k0 * p.weight_in;
  int64_t n0 = 0;
  if (p.weight_in == 1) {
    int64_t rows[L];
    for (; n0 + L <= valid; n0 += L) {
      for (int64_t l = 0; l < L; ++l) rows[l] = (n0 + l) * p.weight_out;
      int64_t k = 0;
      for (; k + L <= count; k += L) V::template transpose<T>(src + k, rows, out + k * NR + n0, NR);
      for (; k < count; ++k)
        for (int64_t l = 0; l < L; ++l) out[k * NR + n0 + l] = V::scalar(src[rows[l] + k]);
    }
  } else if (p.weight_out == 1) {  // backwards
    for (; n0 + L <= valid; n0 += L)
      for (int64_t k = 0; k < count; ++k) V::store(out + k * NR + n0, V::load(src + k * p.weight_in + n0));
  }
  for (int64_t k = 0; k < count; ++k)
    for (int64_t n = n0; n < NR; ++n)
      out[k * NR + n] = n < valid ? V::scalar(src[n * p.weight_out + k * p.weight_in]) : S(0);
}

template <class V>
static void pack_panel(const Scan& p, int64_t o0, int64_t valid, int64_t NR, int64_t k0, int64_t count,
                       typename V::S* out) {
  as_numbers<typename V::S>(p.dtype,
                            [&](auto number) { pack_panel_of<V, decltype(number)>(p, o0, valid, NR, k0, count, out); });
}

// ---- a scan ----------------------------------------------------------------------------------------------------

template <class V, bool Channels>
struct ScanTasks {
  using S = typename V::S;
  using TileType = Tile<V, Channels>;
  static constexpr int L = V::L, MR = TileType::MR;

  const Scan& p;
  const Plan& plan;
  S* packed = nullptr;
  TileType tile;

  static void pack(void* self, int64_t index) {
    auto& t = *static_cast<ScanTasks*>(self);
    const Scan& p = t.p;
    if (Channels) {  // one panel: [k][NR], columns past C zero
      const int64_t vectors = round_up(p.C, L) / L;
      int64_t v = 0;
      for (int64_t i = 0; i < index; ++i) v += TileType::vectors_at(v, vectors);
      const int64_t NR = TileType::vectors_at(v, vectors) * L;
      pack_panel<V>(p, v * L, min_of(NR, p.C - v * L), NR, 0, p.C, t.packed + v * L * p.C);
    } else {  // MR rows, rows past C zero
      as_numbers<S>(p.dtype, [&](auto number) {
        const auto* const w = static_cast<const decltype(number)*>(p.weight);
        for (int64_t k = 0; k < p.C; ++k)
          for (int64_t m = index * MR; m < (index + 1) * MR; ++m)
            t.packed[m * p.C + k] = m < p.C ? V::scalar(w[m * p.weight_out + k * p.weight_in]) : S(0);
      });
    }
  }

  static void task(void* self, int64_t index) {
    const auto& t = *static_cast<const ScanTasks*>(self);
    const TaskRange r = task_range(t.plan, t.p.N * t.p.G * t.p.H * t.p.W, t.p.C, index);
    t.tile.run(r.column_begin, r.column_end, r.channel_begin, r.channel_end);
  }

  static void run(const Scan& p, const Plan& plan, const Parallel& parallel) {
    const int64_t C = p.C, columns = p.N * p.G * p.H * p.W;
    ScanTasks t{p, plan, nullptr,
                TileType{p, nullptr, C, nullptr, nullptr, plan.k_block, plan.group, plan.around, plan.around_state}};
    const bool as_is = !Channels && element_size(p.dtype) == sizeof(S) && p.weight_in == 1 && C % MR == 0;
    const int64_t weight_size = Channels ? round_up(C, L) * C : round_up(C, MR) * C;
    const int64_t affine_size = round_up(C, MR * L);
    S* memory = static_cast<S*>(scratch(0, ((as_is ? 0 : weight_size) + 2 * affine_size) * sizeof(S)));
    if (p.scale) {
      S* scale = memory;
      S* shift = memory + affine_size;
      for (int64_t c = 0; c < affine_size; ++c) {
        scale[c] = c < C ? static_cast<const S*>(p.scale)[c] : S(0);
        shift[c] = c < C ? static_cast<const S*>(p.shift)[c] : S(0);
      }
      t.tile.scale = scale;
      t.tile.shift = shift;
    }
    if (as_is) {
      t.tile.weight = static_cast<const S*>(p.weight);
      t.tile.ldw = p.weight_out;
    } else {
      t.packed = memory + 2 * affine_size;
      t.tile.weight = t.packed;
      int64_t tasks = 0;
      if (Channels)
        for (int64_t v = 0, n = round_up(C, L) / L; v < n; ++tasks) v += TileType::vectors_at(v, n);
      else
        tasks = round_up(C, MR) / MR;
      if (C * C < 16384)
        for (int64_t i = 0; i < tasks; ++i) pack(&t, i);
      else
        parallel.run(parallel.pool, tasks, pack, &t);
    }
    parallel.run(parallel.pool, task_count(plan, columns), task, &t);
  }
};

#include "recurrent_conv_step_core.h"

template <class V>
static void scan_of(const Scan& p, const Plan& plan, const Parallel& parallel) {
  if constexpr (sizeof(typename V::S) == 4)
    if (plan.step) return Step<V>::run_all(p, plan, parallel);
  if (plan.channels)
    ScanTasks<V, true>::run(p, plan, parallel);
  else
    ScanTasks<V, false>::run(p, plan, parallel);
}

void scan(const Scan& p, const Plan& plan, const Parallel& parallel) {
#ifndef RCU_OPS_NO_F64
  if (p.dtype == DType::f64) return scan_of<F64>(p, plan, parallel);
#endif
  scan_of<F32>(p, plan, parallel);
}

// ---- gradient of the weight --------------------------------------------------------------------------------------

#include "recurrent_conv_weight_grad_core.h"

// Numbers widened to fp32 (or fp64), one multiply-add after the other.
template <class Vectors>
struct WidenedGrad {
  using V = Vectors;
  using S = typename V::S;
  using E = S;
  static constexpr int L = V::L, MR = V::planar_rows, NR = 2 * L, A = L > MR ? L : MR, pair = 1;
  static constexpr int64_t K = grad_rows;

  template <bool Rows>
  static void multiply(const S* a, const S* b, int64_t count, S* sum, GradAhead& ahead) {
    using R = typename V::R;
    constexpr int NV = 2;
    constexpr int64_t a_m = Rows ? 1 : K, a_k = Rows ? A : 1;
    R acc[MR][NV];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[m][v] = V::set1(0);
    const auto add_row = [&]() __attribute__((always_inline)) {
      R bv[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) bv[v] = V::load(b + v * L);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        const R av = V::set1(a[m * a_m]);
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) acc[m][v] = V::fma(av, bv[v], acc[m][v]);
      }
      a += a_k, b += NV * L;
    };
    for (; count >= 4; count -= 4) {
      ahead.next();
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) add_row();
    }
    for (; count > 0; --count) add_row();
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) V::store(sum + (m * NV + v) * L, V::add(V::load(sum + (m * NV + v) * L), acc[m][v]));
  }

  template <bool Rows>
  static void pack_u(const WeightGrad& p, S* u, int64_t o0, int64_t outputs, const int64_t* rows_at, int64_t count) {
    as_numbers<S>(p.dtype, [&](auto number) { pack_u_of<Rows, decltype(number)>(p, u, o0, outputs, rows_at, count); });
  }
  template <bool Rows, class T>
  static void pack_u_of(const WeightGrad& p, S* u, int64_t o0, int64_t outputs, const int64_t* rows_at, int64_t count) {
    const T* src = static_cast<const T*>(p.dx.data) + o0 * p.dx.c;
    if constexpr (Rows) {
      const int64_t wide = outputs / A * A;
      for (int64_t k = 0; k < count; ++k) {
        const T* row = src + rows_at[k];
        for (int64_t o = 0; o < wide; o += A)
          for (int v = 0; v < A; v += L) V::store(u + o * K + k * A + v, V::load(row + o + v));
        for (int64_t o = wide; o < outputs; ++o) u[wide * K + k * A + o - wide] = V::scalar(row[o]);
      }
    } else {
      for (int64_t k = 0; k < count;) {
        const int64_t end = run_end(rows_at, k, count);
        for (int64_t o = 0; o < outputs; ++o) copy_run(src + rows_at[k] + o * p.dx.c, u + o * K + k, end - k);
        k = end;
      }
    }
  }

  template <class T>
  static void copy_run(const T* from, S* to, int64_t count) {
    if constexpr (sizeof(T) == sizeof(S)) {
      if (count >= 4) return copy_row(to, from, count * sizeof(S));
      for (int64_t i = 0; i < count; ++i) to[i] = V::scalar(from[i]);
    } else {
      int64_t i = 0;
      for (; i + L <= count; i += L) V::store(to + i, V::load(from + i));
      for (; i < count; ++i) to[i] = V::scalar(from[i]);
    }
  }

  static void pack_h(const WeightGrad& p, S* h, const int64_t* rows_at, const bool* from_first, int64_t count,
                     int64_t panels) {
    as_numbers<S>(p.dtype, [&](auto number) { pack_h_of<decltype(number)>(p, h, rows_at, from_first, count, panels); });
  }
  template <class T>
  static void pack_h_of(const WeightGrad& p, S* h, const int64_t* rows_at, const bool* from_first, int64_t count,
                        int64_t panels) {
    const T* src = static_cast<const T*>(p.h.data);
    const int64_t wide = p.C / L * L;
    const bool by_row = p.h.c == 1 && p.C > 1;
    int64_t k = 0;
    while (k < count) {
      if (from_first[k]) {
        for (int64_t c = 0; c < panels * NR; ++c)
          h[c / NR * K * NR + k * NR + c % NR] =
              c < p.C ? static_cast<S>(load_any(p.first.data, p.first.dtype, rows_at[k] + c * p.first.c)) : S(0);
        ++k;
        continue;
      }
      const bool group = !by_row && k + L <= count && !from_first[k + L - 1];
      const int64_t step = group ? L : 1;
      int64_t c = 0;
      if (group) {
        // L positions of L channels, turned to L channels of each position. Where they are not adjacent, as at the end
        // of a frame, they are brought together first.
        const bool together = run_end(rows_at, k, k + L) == k + L;
        int64_t channels[L], staged[L];
        T stage[L * L];
        for (int l = 0; l < L; ++l) channels[l] = l * p.h.c, staged[l] = l * L;
        for (; c < wide; c += L) {
          S* const out = h + c / NR * K * NR + k * NR + c % NR;
          if (together) {
            V::template transpose<T>(src + rows_at[k] + c * p.h.c, channels, out, NR);
            continue;
          }
          for (int64_t i = 0; i < L;) {
            const int64_t end = run_end(rows_at, k + i, k + L) - k;
            const T* const from = src + rows_at[k + i] + c * p.h.c;
            for (int l = 0; l < L; ++l) {
              if (end - i == 1)
                stage[l * L + i] = from[l * p.h.c];
              else
                copy_row(stage + l * L + i, from + l * p.h.c, (end - i) * sizeof(T));
            }
            i = end;
          }
          V::template transpose<T>(stage, staged, out, NR);
        }
      } else if (p.h.c == 1) {
        for (; c < wide; c += L) V::store(h + c / NR * K * NR + k * NR + c % NR, V::load(src + rows_at[k] + c));
      }
      for (; c < panels * NR; ++c)
        for (int64_t s = 0; s < step; ++s)
          h[c / NR * K * NR + (k + s) * NR + c % NR] = c < p.C ? V::scalar(src[rows_at[k + s] + c * p.h.c]) : S(0);
      k += step;
    }
  }
};

void weight_grad(const WeightGrad& p, const Parallel& parallel) {
#ifndef RCU_OPS_NO_F64
  if (p.dtype == DType::f64) return WeightGradTasks<WidenedGrad<F64>>::run(p, parallel);
#endif
  WeightGradTasks<WidenedGrad<F32>>::run(p, parallel);
}

struct FrameArithmetic {
  using E = float;
  static constexpr bool pairs = false;
  static constexpr int64_t piece = 192;

  template <int MR>
  static void multiply(const float* a, int64_t lda, const float* b, int64_t count, float* sums, bool resume) {
    constexpr int width = 2 * F32::L;
#pragma GCC unroll 4
    for (int64_t v = 0; v < frame_panel; v += width)
      step_block<F32, MR, 2, frame_panel>(a, lda, b + v, count, sums + v, resume);
  }
};

#include "recurrent_conv_frame_core.h"

void conv_frame(const ConvFrame& p, const FramePlan& plan, const Parallel& parallel) {
  FrameTask<FrameArithmetic>::run_all(p, plan, parallel);
}
