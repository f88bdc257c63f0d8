// nonlocal_gates on vector units: the body of every instruction set.
//
// Included once per instruction set, inside a namespace of its own and under that file's target pragma, so that no
// inline function compiled for one processor can be linked into the code of another. For the same reason nothing here
// instantiates a template of the standard library.
//
// Layout.   Operands are read where they lie, rows of unit stride. Scores: panels of keys are transposed, 128 channels
//           (or pairs of them) at a time, and the queries' numbers broadcast; few rows are dot products. Products with
//           the weights: sums of rows by panels of channels, the weights broadcast.
// Tasks.    Forward: (sample, gate, block of queries), a step takes all four gates of its block so that the cell update
//           follows while the gates are in the cache. Backward: (sample, gate) where they keep all threads busy, block
//           of queries by block, else blocks of queries (dquery, and three numbers per query), then blocks of keys
//           (dkey, dvalue, maps recomputed). A step's goes in rounds of a few samples and a block of queries: gates by
//           blocks, then gradients by (sample, gate) from the weights that the gates left.
// Scratch.  Per task the weights of its block, a panel of results and 24 KB of a packed factor, per round the weights of
//           its queries; never a map of the batch, never the gates. Blocks are as small as
//           scratch_room asks for. What a step leaves to its backward pass, if asked to, are tensors of its
//           caller's.
// Aliasing. Outputs must not overlap inputs or each other.
// Order.    A score sums over the channels in order, 128 (pairs) at a time (a dot product: V::L sums, one per lane,
//           added at the end), a result over the keys in the same way. Neither depends on the blocks, so results do not
//           depend on the number of threads.
// Bound.    Arithmetic: 2 N M (D + E) FLOP per sample and gate against (N + 2 M) D.. numbers read; the exponentials,
//           about 20 operations for a vector of numbers, are N M + 5 N E / 4 per gate. Products of N M D or N M E:
//           forward 2, backward 5 (7 where keys have blocks of their own), a step's 6 (9), and 4 to 5 where the
//           forward pass left its weights and gates.
//           What that leaves to be won from eager PyTorch, whose step takes 2 and 4, depends on how near its products
//           come to a loop of multiplications (180 GFLOP/s, one thread of Emerald Rapids, fp32). GFLOP/s of its scores
//           and sums, in brackets of those here: 196 positions and heads of 512 137 and 163 (154 and 159), 49 and 1024
//           66 and 164 (143 and 151). So attention over 196 positions would take 0.79 of eager's time at that rate.
//
// The including file defines, in the namespace: Floats and Doubles (vectors_<isa>.h) and the blocks' sizes
// score_rows x score_columns and sum_rows x sum_vectors.

namespace {

using Byte = uint8_t;

constexpr int64_t sum_terms = 128;  // added up one after the other

// Rows lie a page or so apart, and only a panel of each is used at a time: too little for the processor to guess what
// comes next. So whoever reads a panel asks for the next one, which comes to the second cache while this one is worked
// on.
template <class T>
static inline void soon(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// The same for many rows of `bytes` bytes: a line per multiplication of vectors while something else is computed. Asked for
// at once they would wait for each other, and all that comes after for them.
struct Ahead {
  const char* at = nullptr;
  int64_t row = 0, lines = 0, rows = 0;  // bytes from row to row, lines of 64 bytes in each, rows to come
  int64_t line = 0;
  Ahead() = default;
  Ahead(const void* base, int64_t row, int64_t bytes, int64_t rows)
      : at(static_cast<const char*>(base)), row(row), lines((bytes + 63) / 64), rows(bytes > 0 ? rows : 0) {}
  inline void next() {
    if (rows == 0) return;
    soon(at + 64 * line);
    if (++line == lines) line = 0, at += row, --rows;
  }
};

// ---- the two products -------------------------------------------------------------------------------------------

// Ends of rows: the first n numbers, fewer than V::L. Where an instruction set does not do it in one, calls: unrolled
// into every block they would be most of the library.
template <class V, class T>
[[gnu::noinline]] static typename V::R copied_part_of(const T* p, int64_t n) {
  typename V::S part[V::L];
  for (int i = 0; i < V::L; ++i) part[i] = i < n ? V::scalar(p[i]) : 0;
  return V::load(part);
}
template <class V, class T>
[[gnu::noinline]] static void copy_part(T* p, typename V::R v, int64_t n) {
  T part[V::L];
  V::store(part, v);
  memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
}
template <class V, class T>
static inline typename V::R part_of(const T* p, int64_t n) {
  if constexpr (requires { V::load_first(p, n); })
    return V::load_first(p, n);
  else
    return copied_part_of<V>(p, n);
}
template <class V, class T>
static inline void store_part(T* p, typename V::R v, int64_t n) {
  if constexpr (requires { V::store_first(p, v, n); })
    V::store_first(p, v, n);
  else
    copy_part<V>(p, v, n);
}

// How numbers are multiplied and added up in V's precision once they have been packed for it. The left factor, rows of
// whole lines, is used where it lies, or packed to the numbers that the instruction takes: by rows or by columns, where
// it lies or elsewhere, and by columns from what was packed by rows in its place. The right one is packed to
// [k][width] by panels.
template <class V>
struct Widened {
  using Operand = typename V::R;
  static typename V::R add(Operand a, Operand b, typename V::R sum) { return V::fma(a, b, sum); }

  using S = typename V::S;
  using Left = S;
  struct Factor {  // the left one: element (i, k) at data[i * row + k * step]
    const Left* data;
    int64_t row, step;
  };
  using Right = S;
  static constexpr int64_t left_size(int64_t, int64_t) { return 0; }  // of rows packed elsewhere
  static constexpr int64_t right_size(int64_t K, int64_t width) { return K * width; }
  static constexpr int64_t steps(int64_t K) { return K; }
  static constexpr int64_t vector = V::L;  // of Right, for V::L results
  static Factor by_rows(const S* a, int64_t ld, int64_t, int64_t, Left*, int64_t) { return {a, ld, 1}; }
  static Factor by_columns(const S* a, int64_t ld, int64_t, int64_t, S*, bool) { return {a, 1, ld}; }
  static typename V::R broadcast(Left a) { return V::set1(a); }
  static typename V::R right(const Right* b) { return V::load(b); }
  static constexpr int64_t numbers = 1;  // of a row of scores, in a step of the sums

  // Sums to where they are wanted, as they are or rounded to a 16-bit format.
  template <class Store>
  [[gnu::always_inline]] static void store_as(DType dtype, Store store) {
    if (sizeof(S) == 8 || dtype == DType::f32)
      store(S());
    else if constexpr (sizeof(S) == 4) {
      if (dtype == DType::bf16)
        store(bf16_t());
      else
        store(f16_t());
    }
  }
};

// The same with numbers of type T as they lie in memory; a file may specialise it for an instruction that takes them as
// they are. Scores: operands are loaded along the rows, `step` numbers at a time. Products: what its sums are made by.
template <class V, class T>
struct Arithmetic : Widened<V> {
  using Products = Widened<V>;
  using typename Products::Factor;
  using typename Products::Left;
  using typename Products::Operand;
  using typename Products::Right;
  static constexpr int step = V::L;
  static Operand load(const T* p) { return V::load(p); }
  static Operand load(const T* p, int64_t n) { return part_of<V>(p, n); }

  static void pack(const T* b, int64_t row, int64_t K, const Byte* dead, int64_t n, int64_t width, Right* out) {
    for (int64_t k = 0; k < K; ++k, b += row, out += width) {
      int64_t j = 0;
      if (!dead || !dead[k]) {
        for (; j + V::L <= n; j += V::L) V::store(out + j, V::load(b + j));
        if (j < n) V::store(out + j, part_of<V>(b + j, n - j)), j += V::L;
      }
      for (; j < width; j += V::L) V::store(out + j, V::set1(0));
    }
  }

  // Of scores: n numbers of a row as a left factor, and n of each of V::L rows (`at` says where they are) as a right
  // one, its k in order.
  static void take(const T* a, int64_t n, Left* out) {
    for (int64_t k = 0; k < n; k += V::L) V::store(out + k, n - k >= V::L ? V::load(a + k) : part_of<V>(a + k, n - k));
  }
  static void turn(const T* b, const int64_t* at, int64_t n, int64_t width, Right* out) {
    int64_t k = 0;
    for (; k + V::L <= n; k += V::L) V::transpose(b + k, at, out + k * width, width);
    for (; k < n; ++k)
      for (int64_t l = 0; l < V::L; ++l) out[k * width + l] = V::scalar(b[at[l] + k]);
  }
};

// out[i][j] = a_i . b_j, rows of d numbers, NC columns at a time.
template <class V, class T, int NC = score_columns>
[[gnu::noinline]] static void dots(const T* a, int64_t a_row, int64_t rows, const T* b, int64_t b_row, int64_t columns,
                                   int64_t d, typename V::S* out, int64_t out_row) {
  using P = Arithmetic<V, T>;
  constexpr int MR = score_rows;
  for (int64_t i0 = 0; i0 < rows; i0 += MR)
    for (int64_t j0 = 0; j0 < columns; j0 += NC) {
      const int64_t mr = min_of<int64_t>(MR, rows - i0), nc = min_of<int64_t>(NC, columns - j0);
      const T *ar[MR], *br[NC];  // the last row stands in for those that are not there
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) ar[i] = a + (i0 + min_of<int64_t>(i, mr - 1)) * a_row;
#pragma GCC unroll 8
      for (int j = 0; j < NC; ++j) br[j] = b + (j0 + min_of<int64_t>(j, nc - 1)) * b_row;
      typename V::R acc[MR][NC];
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < NC; ++j) acc[i][j] = V::set1(0);
      int64_t k = 0;
      for (; k + P::step <= d; k += P::step) {
        typename P::Operand bv[NC];
#pragma GCC unroll 8
        for (int j = 0; j < NC; ++j) bv[j] = P::load(br[j] + k);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
          const typename P::Operand av = P::load(ar[i] + k);
#pragma GCC unroll 8
          for (int j = 0; j < NC; ++j) acc[i][j] = P::add(av, bv[j], acc[i][j]);
        }
      }
      if (k < d) {
        typename P::Operand bv[NC];
#pragma GCC unroll 8
        for (int j = 0; j < NC; ++j) bv[j] = P::load(br[j] + k, d - k);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
          const typename P::Operand av = P::load(ar[i] + k, d - k);
#pragma GCC unroll 8
          for (int j = 0; j < NC; ++j) acc[i][j] = P::add(av, bv[j], acc[i][j]);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        typename V::S sum[8];
        const typename V::R* const last = acc[i] + NC - 1;
        V::sums(acc[i][0], NC > 1 ? acc[i][1] : *last, NC > 2 ? acc[i][2] : *last, NC > 3 ? acc[i][3] : *last, sum);
        if constexpr (NC > 4) V::sums(*last, *last, *last, *last, sum + 4);
        typename V::S* const to = out + (i0 + i) * out_row + j0;
        if (i < mr && nc == NC)
          memcpy(to, sum, NC * sizeof(typename V::S));
        else if (i < mr)
          memcpy(to, sum, static_cast<size_t>(nc) * sizeof(typename V::S));
      }
    }
}

// Where sums go: rows `row` numbers of a type apart.
struct Sums {
  void* data;
  int64_t row;
  DType dtype;
};
template <class T>
static constexpr DType dtype_of = sizeof(T) == 8   ? DType::f64
                                  : sizeof(T) == 4 ? DType::f32
                                                   : DType::bf16;
template <>
constexpr DType dtype_of<f16_t> = DType::f16;

// out[i][0 .. NV L) = sum over up to sum_terms steps k of a(i, k) b_k, b packed: more at once would round more than a
// library's product does, and so much of b stays in the first cache for all rows. With `more` added to what is there.
// out may be of a 16-bit type where there is nothing to add to. Where out is far from the cores it is asked for before
// it is written, which happens in order: each line would wait for the one before.
template <class V, class P, int NV>
[[gnu::noinline]] static void sums(const typename P::Left* a, int64_t a_row, int64_t a_k, int64_t rows,
                                   const typename P::Right* b, int64_t steps, const Sums& out, bool more, bool far,
                                   Ahead& what_follows) {
  constexpr int MR = sum_rows;
  const int64_t out_row = out.row, bytes = NV * V::L * element_size(out.dtype);
  Ahead ahead = what_follows;
  for (int64_t i0 = 0; i0 < rows; i0 += MR) {
    const int64_t mr = min_of<int64_t>(MR, rows - i0);
    const typename P::Left* ar[MR];  // the last row stands in for those that are not there
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) ar[i] = a + (i0 + min_of<int64_t>(i, mr - 1)) * a_row;
    const typename P::Right* bk = b;
    if (far) {
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const char* const to =
            static_cast<const char*>(out.data) + (i0 + min_of<int64_t>(i, mr - 1)) * out_row * element_size(out.dtype);
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(to + byte, 1);
        __builtin_prefetch(to + bytes - 1, 1);
      }
    }
    typename V::R acc[MR][NV];
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = V::set1(0);
    for (int64_t k = 0; k < steps; ++k, bk += NV * P::vector) {
      typename P::Operand bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) bv[v] = P::right(bk + v * P::vector);
      ahead.next();
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const typename P::Operand av = P::broadcast(ar[i][k * a_k]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[i][v] = P::add(av, bv[v], acc[i][v]);
      }
    }
    P::store_as(out.dtype, [&](auto number) __attribute__((always_inline)) {
      using O = decltype(number);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i)
        if (i < mr)
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) {
            O* const to = static_cast<O*>(out.data) + (i0 + i) * out_row + v * V::L;
            if constexpr (sizeof(O) == sizeof(typename V::S))
              V::store(to, more ? V::add(V::load(to), acc[i][v]) : acc[i][v]);
            else
              V::store(to, acc[i][v]);
          }
    });
  }
  what_follows = ahead;
}

template <class V>
constexpr int64_t panel = sum_vectors * V::L;

// Memory of one task, taken piece by piece from the thread's scratch; a first pass with base = nullptr counts the
// bytes.
struct Pieces {
  char* base = nullptr;
  size_t used = 0;
  template <class A>
  A* take(int64_t count) {
    char* at = base + used;
    used += (static_cast<size_t>(count) * sizeof(A) + 63) / 64 * 64;
    return base ? reinterpret_cast<A*>(at) : nullptr;
  }
};

// Transposing a key costs as much as a fifth of its products with 49 queries. Dot products read it from the second
// cache instead, once per score_rows: more is lost to that with more rows, or where the numbers are converted or (as
// pairs) multiplied in half of the time, of which adding up lanes takes more.
template <class V, class T>
static bool scores_go_by_panels(int64_t queries, int64_t keys) {
  return min_of(queries, keys) >= (sizeof(T) < sizeof(typename V::S) ? 1 : 2) * panel<V>;
}

// What the products of a task need besides their operands: a part of a panel of the right factor; for scores (of
// queries and keys, over up to `depth` channels) by panels numbers of `at_once` rows of the left one; and for sums (of
// up to K terms), in the place of these, `tile` rows of a panel of results.
template <class V, class T>
struct Workspace {
  using P = Arithmetic<V, T>;
  static constexpr int64_t most = sum_terms * P::numbers;  // of a row's numbers
  typename P::Right* right = nullptr;
  typename P::Left* left = nullptr;
  int64_t at_once, left_row;
  typename V::S* tile = nullptr;
  Workspace(Pieces& m, int64_t queries, int64_t keys, int64_t depth, int64_t at_once, int64_t K, int64_t tile_rows)
      : at_once(at_once), left_row(round_up(P::steps(min_of(depth, most)), V::L)) {
    const bool by_panels = scores_go_by_panels<V, T>(queries, keys);
    right = m.take<typename P::Right>(P::right_size(min_of(by_panels ? max_of(K, depth) : K, most), panel<V>));
    Pieces results = m;
    left = m.take<typename P::Left>(by_panels ? at_once * left_row : 0);
    tile = results.take<typename V::S>(tile_rows * panel<V>);
    m.used = max_of(m.used, results.used);
  }
};

// The same from panels of b^T, for `columns` of b's b_rows rows, rounded up to whole vectors (what lies beyond the last
// row is garbage): no sums of lanes, and b comes from the second cache once per block of rows instead of once per
// score_rows.
template <class V, class T>
[[gnu::noinline]] static void scores_by_panels(const T* a, int64_t a_row, int64_t rows, const T* b, int64_t b_row,
                                               int64_t columns, int64_t b_rows, int64_t d, typename V::S* out,
                                               int64_t out_row, const Workspace<V, T>& w) {
  using P = Arithmetic<V, T>;
  using Products = typename P::Products;
  constexpr int64_t most = w.most;
  const auto left = w.left;
  const auto right = w.right;
  const int64_t left_row = w.left_row;
  int64_t k0 = 0;
  do {
    const int64_t terms = min_of(most, d - k0), steps = P::steps(terms);
    // Numbers of their own type, too: rows a page apart would fall into one set of the first cache.
    for (int64_t i = 0; i < rows; ++i) P::take(a + i * a_row + k0, terms, left + i * left_row);
    // The next terms: of all of a, and of every panel of b when it was used.
    const int64_t following = min_of(most, d - k0 - terms) * int64_t{sizeof(T)};
    Ahead next_a(a + k0 + terms, a_row * int64_t{sizeof(T)}, following, rows);
    for (int64_t j0 = 0; j0 < columns;) {
      const bool whole = columns - j0 >= panel<V>;
      const int64_t width = whole ? panel<V> : V::L;
      for (int64_t v = 0; v < width; v += V::L) {
        int64_t at[V::L];
        for (int64_t l = 0; l < V::L; ++l) at[l] = min_of(j0 + v + l, b_rows - 1) * b_row;
        P::turn(b + k0, at, terms, width, right + v / V::L * P::vector);
      }
      Ahead next_b(b + j0 * b_row + k0 + terms, b_row * int64_t{sizeof(T)}, following, min_of(width, b_rows - j0));
      for (int64_t i0 = 0; i0 < rows;) {  // half of the rows for each
        const int64_t some = i0 == 0 ? max_of<int64_t>(min_of(rows, round_up(rows / 2, sum_rows)), 1) : rows - i0;
        Ahead& next = i0 == 0 ? next_b : next_a;
        const Sums to{out + i0 * out_row + j0, out_row, dtype_of<typename V::S>};
        if (whole)
          sums<V, Products, sum_vectors>(left + i0 * left_row, left_row, 1, some, right, steps, to, k0 > 0, false,
                                         next);
        else
          sums<V, Products, 1>(left + i0 * left_row, left_row, 1, some, right, steps, to, k0 > 0, false, next);
        i0 += some;
      }
      j0 += width;
    }
    k0 += terms;
  } while (k0 < d);
}

// Keys beyond the last whole panel whose scores are dot products: a vector of them would be nearly empty.
template <class V>
static int64_t single_keys(int64_t keys) {
  return keys % panel<V> <= score_columns ? keys % panel<V> : 0;
}

// Scores of `rows` queries (a) and all keys (b), or, turned, of `rows` keys from key `first` on (a) and all queries (b):
// out[i][j] = a_i . b_j, of a_rows and b_rows in all. `out_row` holds whole vectors. How a score is added up depends on its
// key alone: blocks of queries and blocks of keys find the same scores.
template <class V, class T>
static void scores(const T* a, int64_t a_row, int64_t rows, int64_t a_rows, const T* b, int64_t b_row, int64_t b_rows,
                   int64_t d, typename V::S* out, int64_t out_row, const Workspace<V, T>& w, bool turned = false,
                   int64_t first = 0) {
  int64_t single_rows = rows, single_columns = b_rows;
  if (scores_go_by_panels<V, T>(a_rows, b_rows)) {
    single_rows = turned ? max_of<int64_t>(0, first + rows - max_of(first, a_rows - single_keys<V>(a_rows))) : 0;
    single_columns = turned ? 0 : single_keys<V>(b_rows);
  }
  const int64_t by_panels = rows - single_rows, columns = b_rows - single_columns;
  if (columns > 0)
    for (int64_t i = 0; i < by_panels; i += w.at_once)
      scores_by_panels<V>(a + i * a_row, a_row, min_of(w.at_once, by_panels - i), b, b_row, columns, b_rows, d,
                          out + i * out_row, out_row, w);
  const auto singly = single_columns == 1 ? dots<V, T, 1> : dots<V, T>;
  if (single_rows > 0)
    dots<V, T>(a + by_panels * a_row, a_row, single_rows, b, b_row, b_rows, d, out + by_panels * out_row, out_row);
  else if (single_columns > 0)
    singly(a, a_row, rows, b + columns * b_row, b_row, single_columns, d, out + columns, out_row);
}

constexpr int two_vectors = sum_vectors > 2 ? 2 : 1;
// Columns that are summed up for n of them, n up to a panel.
template <class V>
static int64_t summed(int64_t n) {
  return n <= V::L ? V::L : n <= two_vectors * V::L ? two_vectors * V::L : panel<V>;
}

// Columns [from, from + n) of the product, n up to a panel; out's columns up to summed(n) are zero.
template <class V, class T>
static void sums_of_panel(const typename Arithmetic<V, T>::Factor& a, int64_t rows, const T* b, int64_t b_row,
                          int64_t K, const Byte* dead, int64_t from, int64_t n, const Sums& out,
                          typename Arithmetic<V, T>::Right* packed, Ahead ahead, bool more = false, bool far = false) {
  using P = Arithmetic<V, T>;
  using Products = typename P::Products;
  constexpr int64_t most = Workspace<V, T>::most;
  const int64_t width = summed<V>(n);
  int64_t k = 0;
  do {
    const int64_t terms = min_of(most, K - k), steps = P::steps(terms);
    const typename P::Left* const left = a.data + P::steps(k) * a.step;
    P::pack(b + k * b_row + from, b_row, terms, dead ? dead + k : nullptr, n, width, packed);
    if (width == V::L)
      sums<V, Products, 1>(left, a.row, a.step, rows, packed, steps, out, more, far, ahead);
    else if (width == two_vectors * V::L)
      sums<V, Products, two_vectors>(left, a.row, a.step, rows, packed, steps, out, more, far, ahead);
    else
      sums<V, Products, sum_vectors>(left, a.row, a.step, rows, packed, steps, out, more, far, ahead);
    more = true;
    k += terms;
  } while (k < K);
}

// Columns [from, from + a panel) of `rows` rows of n numbers, as far as they are there.
template <class V, class T>
static Ahead panel_ahead(const T* base, int64_t row, int64_t rows, int64_t from, int64_t n) {
  const int64_t size = sizeof(T), width = min_of(panel<V>, n - from);
  return width > 0 ? Ahead(base + from, row * size, width * size, rows) : Ahead();
}

// Whether a product's results go where they are wanted as they are summed up: whole vectors, and narrow ones only if
// nothing is added to them.
template <class V, class T>
static bool sums_in_place(int64_t K, bool more) {
  return sizeof(T) == sizeof(typename V::S) || (!more && K <= Workspace<V, T>::most);
}
// Rows of a tile for a product of `rows` rows of K terms and n columns: none where it goes by without.
template <class V, class T>
static int64_t tile_rows(int64_t rows, int64_t K, int64_t n) {
  const int64_t last = n % panel<V>;
  return sums_in_place<V, T>(K, false) && (last == 0 || last == summed<V>(last)) ? 0 : rows;
}

// out = a b for all n columns, leaving out the k of `dead_k`; rows of out of `dead_row` are zero. With `more`, added to
// what is there, which the caller keeps to numbers as wide as the sums.
template <class V, class T>
static void product(const typename Arithmetic<V, T>::Factor& left, int64_t rows, const T* b, int64_t b_row, int64_t K,
                    const Byte* dead_k, const Byte* dead_row, int64_t n, T* out, int64_t out_row,
                    const Workspace<V, T>& w, bool more = false) {
  const bool in_place = sums_in_place<V, T>(K, more);
  for (int64_t from = 0; from < n; from += panel<V>) {
    const int64_t width = min_of(panel<V>, n - from);
    const Ahead ahead = panel_ahead<V>(b, b_row, K, from + panel<V>, n);
    if (width == summed<V>(width) && in_place) {
      sums_of_panel<V>(left, rows, b, b_row, K, dead_k, from, width, {out + from, out_row, dtype_of<T>}, w.right, ahead,
                       more, true);
      continue;
    }
    if (more)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < width; j += V::L) {
          const T* there = out + i * out_row + from + j;
          V::store(w.tile + i * panel<V> + j, j + V::L <= width ? V::load(there) : part_of<V>(there, width - j));
        }
    sums_of_panel<V>(left, rows, b, b_row, K, dead_k, from, width, {w.tile, panel<V>, dtype_of<typename V::S>}, w.right,
                     ahead, more);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < width; j += V::L) {
        const typename V::R v = V::load(w.tile + i * panel<V> + j);
        T* to = out + i * out_row + from + j;
        j + V::L <= width ? V::store(to, v) : store_part<V>(to, v, width - j);
      }
  }
  if (dead_row)
    for (int64_t i = 0; i < rows; ++i)
      if (dead_row[i]) memset(static_cast<void*>(out + i * out_row), 0, static_cast<size_t>(n) * sizeof(T));
}

// The left factor from a map in scratch, packed where it lies: nobody reads the map afterwards.
template <class V, class T>
static auto rows_in_place(typename V::S* map, int64_t ld, int64_t rows, int64_t K) {
  using P = Arithmetic<V, T>;
  return P::by_rows(map, ld, rows, K, reinterpret_cast<typename P::Left*>(map), ld);
}

// ---- functions of vectors ---------------------------------------------------------------------------------------

// e^x = 2^n (1 + part), |x| < 88: part = e^r - 1 with r from -0.35 to 0.35, to its own last bits.
static inline Floats::R part_of_power(Floats::R x, Floats::R& n) {
  using V = Floats;
  n = V::round(V::mul(x, V::set1(1.44269504f)));
  V::R r = V::fma(n, V::set1(-0.693359375f), x);
  r = V::fma(n, V::set1(2.12194440e-4f), r);
  V::R p = V::set1(1.9875691500e-4f);
  p = V::fma(p, r, V::set1(1.3981999507e-3f));
  p = V::fma(p, r, V::set1(8.3334519073e-3f));
  p = V::fma(p, r, V::set1(4.1665795894e-2f));
  p = V::fma(p, r, V::set1(1.6666665459e-1f));
  p = V::fma(p, r, V::set1(5.0000001201e-1f));
  return V::fma(p, V::mul(r, r), r);
}

// exp(v) for v <= 0: NaN for NaN, 0 for -inf and everything below the smallest normal number.
static inline Floats::R exp_of(Floats::R v) {
  using V = Floats;
  const V::R low = V::set1(-87.336544f);
  V::R n;
  const V::R part = part_of_power(V::max(low, v), n);
  return V::less(v, low, V::set1(0), V::times_power(V::add(part, V::set1(1)), n));
}
static inline Doubles::R exp_of(Doubles::R v) {
  double lane[Doubles::L];
  Doubles::store(lane, v);
  for (double& x : lane) x = __builtin_exp(x);
  return Doubles::load(lane);
}

// (e^2x - 1) / (e^2x + 1) of x = |v|, where their errors cancel, and a step of division for the inverse's; NaN stays.
static inline Floats::R tanh_of(Floats::R v) {
  using V = Floats;
  const V::R zero = V::set1(0), one = V::set1(1), sign = V::less(v, zero, V::set1(-1), one), size = V::mul(v, sign);
  V::R n;
  const V::R part = part_of_power(V::min(V::set1(32), V::add(size, size)), n), power = V::times_power(one, n);
  const V::R less_one = V::fma(power, part, V::sub(power, one)), and_one = V::add(less_one, V::set1(2));
  const V::R inverse = V::reciprocal(and_one), ratio = V::mul(less_one, inverse);
  return V::mul(sign, V::fma(V::fma(V::sub(zero, ratio), and_one, less_one), inverse, ratio));
}
static inline Doubles::R tanh_of(Doubles::R v) {
  double lane[Doubles::L];
  Doubles::store(lane, v);
  for (double& x : lane) x = __builtin_tanh(x);
  return Doubles::load(lane);
}
static inline Floats::R sigmoid_of(Floats::R v) {  // 1 / (1 + e^-v); NaN stays
  using V = Floats;
  const V::R one = V::set1(1);
  V::R n;
  const V::R part = part_of_power(V::max(V::set1(-86), V::min(V::set1(86), V::sub(V::set1(0), v))), n);
  const V::R power = V::times_power(one, n);
  return V::reciprocal(V::fma(power, part, V::add(power, one)));
}
static inline Doubles::R sigmoid_of(Doubles::R v) {
  using V = Doubles;
  const V::R zero = V::set1(0), one = V::set1(1);
  const V::R e = exp_of(V::min(V::sub(zero, v), v));  // e^-|v|; NaN stays
  const V::R positive = V::reciprocal(V::add(one, e));
  return V::less(v, zero, V::mul(e, positive), positive);
}

// ---- the weights of one query -----------------------------------------------------------------------------------

// What the backward pass needs again of a query: exp(s - peak) / sum are its weights (s / sum under count), and
// delta = sum_k p_k dp_k. Dead: sum = 0.
template <class S>
struct Query {
  S peak, sum, delta;
};

template <class S>
static constexpr int64_t padded(int64_t m) {
  return padded_row(m, sizeof(S));
}

// s[m .. padded m) = value. Whole vectors, which the loops after this one load again.
template <class V>
static inline void pad(typename V::S* s, int64_t m, typename V::S value) {
  using S = typename V::S;
  alignas(64) static const S places[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int64_t j = m / V::L * V::L; j < padded<S>(m); j += V::L)
    V::store(s + j, V::less(V::load(places), V::set1(static_cast<S>(m - j)), V::load(s + j), V::set1(value)));
}

// s[0 .. m) *= scale; what is not seen, and the padding, becomes -inf (softmax) or 0 (count). Returns how many are
// seen.
template <class V>
static int64_t scaled(const Relation& r, typename V::S* s, int64_t m, const Byte* mask, int64_t mask_step) {
  using S = typename V::S;
  const S hidden = r.count ? S(0) : -S(__builtin_inff());
  const typename V::R scale = V::set1(static_cast<S>(r.scale));
  if (r.scale != 1)
    for (int64_t j = 0; j < m; j += V::L) V::store(s + j, V::mul(V::load(s + j), scale));
  pad<V>(s, m, hidden);
  if (!mask) return m;
  int64_t seen = 0;
  for (int64_t j = 0; j < m; ++j) {
    seen += mask[j * mask_step] != 0;
    if (!mask[j * mask_step]) s[j] = hidden;
  }
  return seen;
}

// Scores to weights, in place. Returns whether the query is dead.
template <class V>
static bool weigh(const Relation& r, typename V::S* s, int64_t m, const Byte* mask, int64_t mask_step,
                  Query<typename V::S>& q) {
  using S = typename V::S;
  using R = typename V::R;
  const int64_t seen = scaled<V>(r, s, m, mask, mask_step);
  q = {0, 0, 0};
  if (r.count) {
    q.sum = static_cast<S>(seen);
  } else {
    R top = V::set1(-S(__builtin_inff()));
    for (int64_t j = 0; j < m; j += V::L) top = V::max(V::load(s + j), top);
    const S peak = V::largest(top);
    q.peak = peak == -S(__builtin_inff()) ? S(0) : peak;
    const R base = V::set1(q.peak);
    R total = V::set1(0);
    for (int64_t j = 0; j < m; j += V::L) {
      const R e = exp_of(V::sub(V::load(s + j), base));
      V::store(s + j, e);
      total = V::add(total, e);
    }
    q.sum = V::sum(total);
  }
  const R sum = V::set1(q.sum != 0 ? q.sum : S(1));
  for (int64_t j = 0; j < m; j += V::L) V::store(s + j, V::div(V::load(s + j), sum));
  return q.sum == 0;
}

template <class T>
static T* at(const Rows& rows, int64_t b, int64_t g, int64_t n) {
  return static_cast<T*>(rows.data) + b * rows.batch + g * rows.gate + n * rows.row;
}
static const Byte* mask_of(const Relation& r, int64_t b, int64_t n) {
  return r.mask ? r.mask + b * r.mask_batch + n * r.mask_row : nullptr;
}

// The weights of queries [n, n + rows) of one sample and gate into s [rows][padded M].
template <class V, class T>
static bool weights(const Relation& r, int64_t b, int64_t g, int64_t n, int64_t rows, typename V::S* s, Byte* dead,
                    Query<typename V::S>* queries, const Workspace<V, T>& w) {
  const int64_t ld = padded<typename V::S>(r.M);
  scores<V, T>(at<const T>(r.query, b, g, n), r.query.row, rows, r.N, at<const T>(r.key, b, g, 0), r.key.row, r.M, r.D,
               s, ld, w);
  bool any = false;
  for (int64_t i = 0; i < rows; ++i) {
    Query<typename V::S> q;
    any |= dead[i] = weigh<V>(r, s + i * ld, r.M, mask_of(r, b, n + i), r.mask_key, q);
    if (queries) queries[i] = q;
  }
  return any;
}

// ---- memory -----------------------------------------------------------------------------------------------------
//
// What a call takes beyond its tensors, on all threads together, is with those that it keeps for its backward pass at
// most half of what eager PyTorch has at once; or 64 KB for each thread where that is more, as it is of single samples
// of a few dozen positions, or on many threads. (The weights of four queries, if those take more: of over a thousand
// keys.) Blocks of queries and keys are made as small as that asks for.
constexpr int64_t least_scratch = 64 << 10;

// A thread's part of it, of `tasks` that the threads divide between them; half: less what is kept; shared: what they
// have in common.
static int64_t scratch_room(int64_t half, int64_t shared, int64_t tasks, int64_t threads) {
  const int64_t busy = max_of<int64_t>(1, min_of(tasks, threads));
  return (max_of(half, busy * least_scratch) - shared) / busy;
}

// Half of the memory of `maps` maps of all samples and gates: eager PyTorch has two (scores and weights), three with
// gradients.
static int64_t half_of_eagers_maps(const Relation& r, int64_t maps) {
  return r.B * r.G * r.N * r.M * maps * element_size(r.dtype) / 2;
}
// Of a step: its maps, or ten numbers per position and channel, and the weights that it keeps for gradients.
static int64_t half_of_eagers_step(const Relation& r, bool gradients) {
  const int64_t maps = half_of_eagers_maps(r, 2 + gradients),
                gates = 5 * r.B * r.N * r.E * element_size(r.dtype) + half_of_eagers_maps(r, gradients);
  return max_of(maps, gates);
}

// What the threads share of all queries where keys have blocks of their own. Of the forward pass too: its memory stays.
template <class S>
static int64_t bytes_of_queries(const Relation& r) {
  return r.B * r.G * r.N * static_cast<int64_t>(sizeof(Query<S>));
}

// ---- forward ----------------------------------------------------------------------------------------------------

// Queries per task: as few tasks as keep all threads busy, because each packs keys and values again, and a block of
// weights that stays in the cache. others: samples (and gates, where a task takes one).
static int64_t block_of(int64_t queries, int64_t keys, int64_t others, int threads) {
  int64_t block = max_of<int64_t>(1, min_of<int64_t>(140, (1 << 18) / max_of<int64_t>(1, keys)));
  if (others % threads != 0 && others < 3 * threads) {
    int64_t shared = others, pieces = threads;  // a sample's tasks, so that the threads share all of them equally
    for (int64_t rest; (rest = pieces % shared) != 0; shared = rest) pieces = shared;
    pieces = threads / shared;
    block = min_of(block, max_of<int64_t>(14, (queries + pieces - 1) / pieces));
  }
  if (queries <= block + block / 2 && (block >= queries || others % threads == 0 || others >= 3 * threads))
    return max_of<int64_t>(1, queries);
  return block;
}

// The largest block, up to the given one, of which each thread's memory is within its room; never under four queries.
// A block made smaller is one that the threads share equally.
template <class Bytes>
static int64_t block_within(int64_t room, int64_t block, int64_t queries, int64_t others, int threads, Bytes bytes) {
  const auto fits = [&](int64_t rows) { return static_cast<int64_t>(bytes(rows)) <= room; };
  if (fits(block)) return block;
  int64_t most = min_of<int64_t>(block, 4), over = block;
  while (over - most > 1) {
    const int64_t middle = (most + over) / 2;
    (fits(middle) ? most : over) = middle;
  }
  int64_t blocks = (queries + most - 1) / most;
  if (others * blocks < 3 * threads)
    while (others * blocks % threads != 0) ++blocks;
  return (queries + blocks - 1) / blocks;
}

template <class P>
struct Job {
  const P& problem;
  int64_t block, blocks;
  void* shared = nullptr;
  int64_t sample = 0, query = 0, samples = 0, queries = 0;  // where a step's round begins, and how many
  int64_t at_once = 0;                                      // rows of scores by panels that a step's gradients take
};

template <class J>
static void run(const Parallel& parallel, const J& job, int64_t tasks, void (*task)(void*, int64_t)) {
  if (tasks > 0) parallel.run(parallel.pool, tasks, task, const_cast<void*>(static_cast<const void*>(&job)));
}

template <class V, class T>
struct AttendMemory {
  typename V::S* s;
  Byte* dead;
  Workspace<V, T> work;
  size_t bytes;
  AttendMemory(Pieces m, const Relation& r, int64_t rows)
      : s(m.take<typename V::S>(rows * padded<typename V::S>(r.M))),
        dead(m.take<Byte>(rows)),
        work(m, r.N, r.M, r.D, rows, r.M, tile_rows<V, T>(rows, r.M, r.E)),
        bytes(m.used) {}
};

template <class V, class T>
static void attend_task(void* context, int64_t index) {
  const Job<Attention>& job = *static_cast<const Job<Attention>*>(context);
  const Relation& r = job.problem.relation;
  const int64_t block = index % job.blocks, bg = index / job.blocks, b = bg / r.G, g = bg % r.G;
  const int64_t n = block * job.block, rows = min_of(job.block, r.N - n), ld = padded<typename V::S>(r.M);
  const AttendMemory<V, T> m({static_cast<char*>(scratch(1, AttendMemory<V, T>({}, r, rows).bytes)), 0}, r, rows);
  const bool any = weights<V, T>(r, b, g, n, rows, m.s, m.dead, nullptr, m.work);
  product<V, T>(rows_in_place<V, T>(m.s, ld, rows, r.M), rows, at<const T>(r.value, b, g, 0), r.value.row, r.M, nullptr,
                any ? m.dead : nullptr, r.E, at<T>(job.problem.out, b, g, n), job.problem.out.row, m.work);
}

template <class V, class T>
static void attend_as(const Attention& p, const Parallel& parallel) {
  const Relation& r = p.relation;
  const int64_t others = r.B * r.G;
  const int64_t room =
      scratch_room(half_of_eagers_maps(r, 2), bytes_of_queries<typename V::S>(r), others * r.N, parallel.threads);
  const int64_t block = block_within(room, block_of(r.N, r.M, others, parallel.threads), r.N, others, parallel.threads,
                                     [&](int64_t rows) { return AttendMemory<V, T>({}, r, rows).bytes; });
  const int64_t blocks = (r.N + block - 1) / block;
  run(parallel, Job<Attention>{p, block, blocks}, others * blocks, attend_task<V, T>);
}

// ---- the step ---------------------------------------------------------------------------------------------------

template <class V, class T>
static inline typename V::R load_state(const Rows& rows, bool is_state, int64_t b, int64_t n, int64_t j,
                                       int64_t width) {
  using S = typename V::S;
  if (is_state) {
    const S* p = at<const S>(rows, b, 0, n) + j;
    soon(p + panel<V>);
    return width >= V::L ? V::load(p) : part_of<V>(p, width);
  }
  const T* p = at<const T>(rows, b, 0, n) + j;
  soon(p + panel<V>);
  return width >= V::L ? V::load(p) : part_of<V>(p, width);
}
template <class V, class T>
static inline void store_state(const Rows& rows, bool is_state, int64_t b, int64_t n, int64_t j, int64_t width,
                               typename V::R v) {
  using S = typename V::S;
  if (is_state) {
    S* p = at<S>(rows, b, 0, n) + j;
    soon(p + panel<V>);
    width >= V::L ? V::store(p, v) : store_part<V>(p, v, width);
  } else {
    T* p = at<T>(rows, b, 0, n) + j;
    soon(p + panel<V>);
    width >= V::L ? V::store(p, v) : store_part<V>(p, v, width);
  }
}

// The weights of some queries of a sample's gates: query i of gate g at s + (g * gate + i) * padded M.
template <class S>
struct Maps {
  S* s = nullptr;
  int64_t gate = 0;
};

// Which queries are dead, by their weights: of a softmax no other row is all zeros. Returns whether any is.
template <class V>
static bool dead_of(const typename V::S* s, int64_t m, int64_t rows, Byte* dead) {
  using S = typename V::S;
  bool any = false;
  for (int64_t i = 0; i < rows; ++i, s += padded<S>(m)) {
    typename V::R total = V::set1(0);
    for (int64_t j = 0; j < m; j += V::L) total = V::add(total, V::load(s + j));
    any |= dead[i] = V::sum(total) == 0;
  }
  return any;
}

template <class V, class T>
struct GateMemory {
  using P = Arithmetic<V, T>;
  Maps<typename V::S> maps;  // others', if they keep them
  Byte* dead;                // [4][rows]
  int64_t known;             // gates of which only the pre-activations are needed, and known: the first of the four
  typename P::Left* packed;  // [4 - known], if the maps must stay as they are
  Workspace<V, T> work;      // tile [4 - known][rows][panel]
  size_t bytes;
  GateMemory(Pieces m, const Relation& r, int64_t rows, const Maps<typename V::S>& kept = {}, int64_t known = 0)
      : maps(kept.s ? kept : Maps<typename V::S>{m.take<typename V::S>(4 * rows * padded<typename V::S>(r.M)), rows}),
        dead(m.take<Byte>(4 * rows)),
        known(known),
        packed(m.take<typename P::Left>(kept.s ? (4 - known) * P::left_size(rows, r.M) : 0)),
        work(m, r.N, r.M, r.D, rows, r.M, (4 - known) * rows),
        bytes(m.used) {}
};

// The gates of positions [n, n + rows), panel by panel of channels: finish(row, channel, width, a) gets a[NV][4], the
// pre-activations of NV vectors of channels: of a panel's, so that long chains of operations run side by side, or of
// one, of which `width` channels are there. The first m.known gates' are in `before`. kept: the maps are read
// later, too; weighed: they hold the weights already.
template <class V, class T, class Finish>
static void gates(const Relation& r, const Rows& x_gates, int64_t b, int64_t n, int64_t rows, const GateMemory<V, T>& m,
                  bool kept, bool weighed, const Rows& before, Finish finish) {
  using S = typename V::S;
  const int64_t ld = padded<S>(r.M), map = m.maps.gate * ld, area = rows * panel<V>;
  using P = Arithmetic<V, T>;
  typename P::Factor left[4] = {};
  for (int64_t g = m.known; g < 4; ++g) {
    S* const s = m.maps.s + g * map;
    weighed ? dead_of<V>(s, r.M, rows, m.dead + g * rows)
            : weights<V, T>(r, b, g, n, rows, s, m.dead + g * rows, nullptr, m.work);
    const int64_t size = P::left_size(rows, r.M);
    left[g] = kept ? P::by_rows(s, ld, rows, r.M, m.packed + (g - m.known) * size, size / rows)
                   : rows_in_place<V, T>(s, ld, rows, r.M);
  }
  for (int64_t from = 0; from < r.E; from += panel<V>) {
    const int64_t width = min_of(panel<V>, r.E - from);
    for (int64_t g = m.known; g < 4; ++g) {
      const T* const value = at<const T>(r.value, b, g, 0);
      sums_of_panel<V>(left[g], rows, value, r.value.row, r.M, nullptr, from, width,
                       {m.work.tile + (g - m.known) * area, panel<V>, dtype_of<S>}, m.work.right,
                       panel_ahead<V>(value, r.value.row, r.M, from + panel<V>, r.E));
    }
    const auto add_up = [&]<int NV>(int64_t i, int64_t column, typename V::R(&a)[NV][4]) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v)
#pragma GCC unroll 4
        for (int64_t g = 0; g < 4; ++g) {
          const int64_t j = column + v * V::L;
          const bool all = NV > 1 || width - j >= V::L;
          typename V::R& sum = a[v][g];
          if (g < m.known) {
            const S* const known = at<const S>(before, b, g, n + i) + from + j;
            soon(known + panel<V>);
            sum = all ? V::load(known) : part_of<V>(known, width - j);
            continue;
          }
          const T* x = at<const T>(x_gates, b, g, n + i) + from + j;
          soon(x + panel<V>);
          sum = all ? V::load(x) : part_of<V>(x, width - j);
          if (!m.dead[g * rows + i]) sum = V::add(sum, V::load(m.work.tile + (g - m.known) * area + i * panel<V> + j));
        }
      finish(n + i, from + column, NV > 1 ? panel<V> : width - column, a);
    };
    for (int64_t i = 0; i < rows; ++i) {
      if (width == panel<V>) {
        typename V::R a[sum_vectors][4];
        add_up(i, 0, a);
      } else {
        for (int64_t j = 0; j < width; j += V::L) {
          typename V::R a[1][4];
          add_up(i, j, a);
        }
      }
    }
  }
}

// The weights of a sample's queries from n on, of N in all, in a tensor that outlives the call, if there is one.
template <class S>
static Maps<S> kept_weights(const Rows& weights, int64_t b, int64_t n, int64_t N) {
  return weights.data ? Maps<S>{at<S>(weights, b, 0, n), N} : Maps<S>{};
}

// The cell update, of NV vectors side by side.
template <class V, int NV>
[[gnu::always_inline]] static inline void update_cell(const typename V::R (&a)[NV][4],
                                                      const typename V::R (&before)[NV], typename V::R (&c)[NV],
                                                      typename V::R (&h)[NV]) {
  using R = typename V::R;
  R o[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const R i = sigmoid_of(a[v][0]), f = sigmoid_of(a[v][1]), g = tanh_of(a[v][3]);
    o[v] = sigmoid_of(a[v][2]);
    c[v] = V::fma(f, before[v], V::mul(i, g));
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) h[v] = V::mul(o[v], tanh_of(c[v]));
}
// A call in fp64, whose exponentials take so long that the way of the operands through memory does not show.
template <class V, int NV>
[[gnu::noinline]] static void call_update_cell(const typename V::R (&a)[NV][4], const typename V::R (&before)[NV],
                                               typename V::R (&c)[NV], typename V::R (&h)[NV]) {
  update_cell<V>(a, before, c, h);
}

template <class V, class T>
static void step_task(void* context, int64_t index) {
  using R = typename V::R;
  const Job<Step>& job = *static_cast<const Job<Step>*>(context);
  const Step& p = job.problem;
  const Relation& r = p.relation;
  const int64_t b = index / job.blocks, n = index % job.blocks * job.block, rows = min_of(job.block, r.N - n);
  using S = typename V::S;
  const Maps<S> kept = kept_weights<S>(p.weights, b, n, r.N);
  const size_t bytes = GateMemory<V, T>({}, r, rows, kept).bytes;
  const GateMemory<V, T> memory({static_cast<char*>(scratch(1, bytes)), 0}, r, rows, kept);
  const auto finish = [&]<int NV>(int64_t row, int64_t column, int64_t width, const R(&a)[NV][4]) {
    R before[NV], c[NV], h[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const int64_t j = column + v * V::L;
      for (int64_t g = 0; g < p.kept_gates; ++g) {
        S* const to = at<S>(p.gates, b, g, row) + j;
        width >= V::L ? V::store(to, a[v][g]) : store_part<V>(to, a[v][g], width);
      }
      before[v] = load_state<V, T>(p.cell, p.cell_is_state, b, row, j, width);
    }
    if constexpr (sizeof(S) == 4)
      update_cell<V>(a, before, c, h);
    else
      call_update_cell<V>(a, before, c, h);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const int64_t j = column + v * V::L;
      store_state<V, T>(p.c, true, b, row, j, width, c[v]);
      store_state<V, T>(p.h, false, b, row, j, width, h[v]);
    }
  };
  gates<V, T>(r, p.x_gates, b, n, rows, memory, kept.s, false, {}, finish);
}

// Bytes that a step keeps for its backward pass, of B samples.
template <class S>
static int64_t kept_for_gradients(const Relation& r, bool weights, int64_t gates) {
  return r.B * r.N * (weights ? 4 * padded<S>(r.M) + gates * r.E : 0) * static_cast<int64_t>(sizeof(S));
}

// Queries per task of a step that keeps nothing, or weights and gates.
template <class V, class T>
static int64_t block_of_step(const Relation& r, const Rows& weights, int64_t gates, int threads) {
  using S = typename V::S;
  const bool keeps = weights.data;
  const Maps<S> maps = kept_weights<S>(weights, 0, 0, r.N);
  const int64_t room = scratch_room(half_of_eagers_step(r, keeps) - kept_for_gradients<S>(r, keeps, gates),
                                    keeps ? 0 : bytes_of_queries<S>(r), r.B * r.N, threads);
  return block_within(room, block_of(r.N, r.M, r.B, threads), r.N, r.B, threads,
                      [&](int64_t rows) { return GateMemory<V, T>({}, r, rows, maps).bytes; });
}

template <class V, class T>
static void step_as(const Step& p, const Parallel& parallel) {
  const Relation& r = p.relation;
  const int64_t block = block_of_step<V, T>(r, p.weights, p.kept_gates, parallel.threads);
  const int64_t blocks = (r.N + block - 1) / block;
  run(parallel, Job<Step>{p, block, blocks}, r.B * blocks, step_task<V, T>);
}

// ---- backward ---------------------------------------------------------------------------------------------------

// One sample and gate, queries [n, n + rows), its weights p and dp = g value^T in scratch: dp becomes ds. Returns
// delta.
template <class V>
static typename V::S score_gradient(const Relation& r, const typename V::S* p, typename V::S* dp, const Byte* mask,
                                    typename V::S count) {
  using S = typename V::S;
  using R = typename V::R;
  const int64_t m = r.M;
  pad<V>(dp, m, 0);
  const R scale = V::set1(static_cast<S>(r.scale));
  if (r.count) {
    const R seen = V::set1(count);
    for (int64_t j = 0; j < m; j += V::L) V::store(dp + j, V::div(V::mul(V::load(dp + j), scale), seen));
    if (mask)
      for (int64_t j = 0; j < m; ++j)
        if (!mask[j * r.mask_key]) dp[j] = 0;
    return 0;
  }
  R total = V::set1(0);
  for (int64_t j = 0; j < m; j += V::L) total = V::fma(V::load(p + j), V::load(dp + j), total);
  const S delta = V::sum(total);
  for (int64_t j = 0; j < m; j += V::L)
    V::store(dp + j, V::mul(scale, V::mul(V::load(p + j), V::sub(V::load(dp + j), V::set1(delta)))));
  return delta;
}

// For maps of rows x columns: of blocks of queries, with their part of the keys' gradients if they are `whole`, or of
// keys.
enum class Of { queries, whole, kept, keys };
template <class V, class T>
struct GradMemory {
  using S = typename V::S;
  S *p, *ds;
  Byte* dead;
  Query<S>* queries;      // of queries: what the keys' pass needs of them, where nobody else keeps it
  S *peak, *sum, *delta;  // of keys
  Workspace<V, T> work;
  size_t bytes;
  GradMemory(Pieces m, const Relation& r, Of of, int64_t rows, int64_t columns, int64_t at_once)
      : p(of == Of::kept ? nullptr : m.take<S>(rows * padded<S>(columns))),
        ds(m.take<S>(rows * padded<S>(columns))),
        dead(m.take<Byte>(of == Of::keys ? columns : rows)),
        queries(m.take<Query<S>>(of == Of::whole ? rows : 0)),
        peak(m.take<S>(of == Of::keys ? padded<S>(columns) : 0)),
        sum(m.take<S>(of == Of::keys ? padded<S>(columns) : 0)),
        delta(m.take<S>(of == Of::keys ? padded<S>(columns) : 0)),
        work(m, r.N, r.M, max_of(r.D, r.E), at_once, both(of) ? max_of(rows, columns) : columns,
             tile(r, of, rows, columns)),
        bytes(m.used) {}
  static bool both(Of of) { return of == Of::whole || of == Of::kept; }
  static int64_t tile(const Relation& r, Of of, int64_t rows, int64_t columns) {
    const int64_t query = tile_rows<V, T>(rows, columns, r.D), value = tile_rows<V, T>(rows, columns, r.E);
    if (of == Of::queries) return query;
    if (of == Of::keys) return max_of(query, value);
    return max_of(query, max_of(tile_rows<V, T>(columns, rows, r.D), tile_rows<V, T>(columns, rows, r.E)));
  }
};

// Queries [n, n + rows): dquery, and of whole samples their part of dkey and dvalue, else what the keys' pass needs, in
// `queries`. n a multiple of sum_terms then: dkey and dvalue are added up as if all queries were in the block. kept:
// the weights, where they were found before.
template <class V, class T>
static void query_gradients(const AttentionGrad& q, int64_t b, int64_t g, int64_t n, int64_t rows,
                            const GradMemory<V, T>& m, Query<typename V::S>* queries,
                            const Maps<typename V::S>& kept = {}) {
  using S = typename V::S;
  using P = Arithmetic<V, T>;
  const Relation& r = q.relation;
  const int64_t ld = padded<S>(r.M);
  S* const p = kept.s ? kept.s : m.p;
  Query<S>* const own = queries ? queries : m.queries;
  const bool any =
      kept.s ? dead_of<V>(p, r.M, rows, m.dead) : weights<V, T>(r, b, g, n, rows, m.p, m.dead, own, m.work);
  const T* const grad = at<const T>(q.grad, b, g, n);
  scores<V, T>(grad, q.grad.row, rows, r.N, at<const T>(r.value, b, g, 0), r.value.row, r.M, r.E, m.ds, ld, m.work);
  for (int64_t i = 0; i < rows; ++i) {
    const S count = r.count ? own[i].sum : S(0);
    const S delta = score_gradient<V>(r, p + i * ld, m.ds + i * ld, mask_of(r, b, n + i), count);
    if (queries) queries[i].delta = delta;
    if (m.dead[i]) memset(m.ds + i * ld, 0, static_cast<size_t>(ld) * sizeof(S));  // its gradient may be anything
  }
  const Byte* const dead = any ? m.dead : nullptr;
  product<V, T>(rows_in_place<V, T>(m.ds, ld, rows, r.M), rows, at<const T>(r.key, b, g, 0), r.key.row, r.M, nullptr,
                dead, r.D, at<T>(q.dquery, b, g, n), q.dquery.row, m.work);
  if (queries) return;
  // The gradients of the scores are not needed once they have been multiplied: the weights are packed in their place.
  auto* const place = reinterpret_cast<typename P::Left*>(m.ds);
  product<V, T>(P::by_columns(m.ds, ld, r.M, rows, place, true), r.M, at<const T>(r.query, b, g, n), r.query.row, rows,
                dead, nullptr, r.D, at<T>(q.dkey, b, g, 0), q.dkey.row, m.work, n > 0);
  product<V, T>(P::by_columns(p, ld, r.M, rows, place, false), r.M, grad, q.grad.row, rows, dead, nullptr, r.E,
                at<T>(q.dvalue, b, g, 0), q.dvalue.row, m.work, n > 0);
}

// Keys [j, j + rows): dkey and dvalue, from the transposed maps, recomputed.
template <class V, class T>
static void key_gradients(const AttentionGrad& q, int64_t b, int64_t g, int64_t j, int64_t rows,
                          const GradMemory<V, T>& m, const Query<typename V::S>* queries) {
  using S = typename V::S;
  using R = typename V::R;
  const Relation& r = q.relation;
  const int64_t ld = padded<S>(r.N);
  bool any = false;
  for (int64_t n = 0; n < ld; ++n) {
    const Query<S> one = n < r.N ? queries[n] : Query<S>{0, 0, 0};
    m.peak[n] = one.peak, m.sum[n] = one.sum != 0 ? one.sum : S(1), m.delta[n] = one.delta;
    if (n < r.N) any |= m.dead[n] = one.sum == 0;
  }
  const T* const grad = at<const T>(q.grad, b, g, 0);
  scores<V, T>(at<const T>(r.key, b, g, j), r.key.row, rows, r.M, at<const T>(r.query, b, g, 0), r.query.row, r.N, r.D,
               m.p, ld, m.work, true, j);
  scores<V, T>(at<const T>(r.value, b, g, j), r.value.row, rows, r.M, grad, q.grad.row, r.N, r.E, m.ds, ld, m.work,
               true, j);
  const R scale = V::set1(static_cast<S>(r.scale));
  for (int64_t i = 0; i < rows; ++i) {
    S *const p = m.p + i * ld, *const ds = m.ds + i * ld;
    const Byte* const mask = r.mask ? r.mask + b * r.mask_batch + (j + i) * r.mask_key : nullptr;
    scaled<V>(r, p, r.N, mask, r.mask_row);
    pad<V>(ds, r.N, 0);
    for (int64_t n = 0; n < r.N; n += V::L) {
      const R sum = V::load(m.sum + n), d = V::load(ds + n);
      if (r.count) {
        V::store(p + n, V::div(V::load(p + n), sum));
        V::store(ds + n, V::div(V::mul(d, scale), sum));
      } else {
        const R w = V::div(exp_of(V::sub(V::load(p + n), V::load(m.peak + n))), sum);
        V::store(p + n, w);
        V::store(ds + n, V::mul(scale, V::mul(w, V::sub(d, V::load(m.delta + n)))));
      }
    }
    if (r.count && mask)
      for (int64_t n = 0; n < r.N; ++n)
        if (!mask[n * r.mask_row]) ds[n] = 0;
    if (any)
      for (int64_t n = 0; n < r.N; ++n)
        if (m.dead[n]) p[n] = ds[n] = 0;
  }
  const Byte* const dead = any ? m.dead : nullptr;
  product<V, T>(rows_in_place<V, T>(m.ds, ld, rows, r.N), rows, at<const T>(r.query, b, g, 0), r.query.row, r.N, dead,
                nullptr, r.D, at<T>(q.dkey, b, g, j), q.dkey.row, m.work);
  product<V, T>(rows_in_place<V, T>(m.p, ld, rows, r.N), rows, grad, q.grad.row, r.N, dead, nullptr, r.E,
                at<T>(q.dvalue, b, g, j), q.dvalue.row, m.work);
}

// The calling thread's memory for a block of `rows`.
template <class V, class T>
static size_t gradient_bytes(const Relation& r, Of of, int64_t rows, int64_t at_once) {
  return GradMemory<V, T>({}, r, of, rows, of == Of::keys ? r.N : r.M, at_once).bytes;
}
template <class V, class T>
static GradMemory<V, T> gradient_memory(const Relation& r, Of of, int64_t rows, int64_t at_once) {
  const Pieces pieces{static_cast<char*>(scratch(1, gradient_bytes<V, T>(r, of, rows, at_once))), 0};
  return GradMemory<V, T>(pieces, r, of, rows, of == Of::keys ? r.N : r.M, at_once);
}

template <class V, class T>
static void query_gradients_task(void* context, int64_t index) {
  const Job<AttentionGrad>& job = *static_cast<const Job<AttentionGrad>*>(context);
  const Relation& r = job.problem.relation;
  const int64_t bg = index / job.blocks, n = index % job.blocks * job.block, rows = min_of(job.block, r.N - n);
  auto* const queries = static_cast<Query<typename V::S>*>(job.shared);
  query_gradients<V, T>(job.problem, bg / r.G, bg % r.G, n, rows, gradient_memory<V, T>(r, Of::queries, rows, rows),
                        queries + bg * r.N + n);
}

// A sample and gate, block of queries by block.
template <class V, class T>
static void gradients_task(void* context, int64_t bg) {
  const Job<AttentionGrad>& job = *static_cast<const Job<AttentionGrad>*>(context);
  const Relation& r = job.problem.relation;
  const GradMemory<V, T> memory = gradient_memory<V, T>(r, Of::whole, job.block, job.block);
  for (int64_t n = 0; n < r.N; n += job.block)
    query_gradients<V, T>(job.problem, bg / r.G, bg % r.G, n, min_of(job.block, r.N - n), memory, nullptr);
}

template <class V, class T>
static void key_gradients_task(void* context, int64_t index) {
  const Job<AttentionGrad>& job = *static_cast<const Job<AttentionGrad>*>(context);
  const Relation& r = job.problem.relation;
  const int64_t bg = index / job.blocks, j = index % job.blocks * job.block, rows = min_of(job.block, r.M - j);
  key_gradients<V, T>(job.problem, bg / r.G, bg % r.G, j, rows, gradient_memory<V, T>(r, Of::keys, rows, rows),
                      static_cast<const Query<typename V::S>*>(job.shared) + bg * r.N);
}

// Queries at a time where a task takes all queries of a sample and gate, 0 if it may not: a block whose `maps` stay in
// the cache. dkey and dvalue add up over the blocks where they lie, so that 16-bit ones allow one block alone.
static int64_t whole_block(const Relation& r, int64_t maps, bool narrow) {
  if (r.N * r.M * maps <= 1 << 18) return r.N;
  if (r.M * maps > 1 << 13) return 0;
  const int64_t block = min_of(r.N, r.M * maps > 1 << 11 ? sum_terms : 2 * sum_terms);
  return narrow && block < r.N ? 0 : block;
}
// Whether whole samples pay, `tasks` for the threads to share: 5 products each, blocks 7 that can be shared evenly.
static bool shared_evenly(int64_t tasks, int threads) {
  return (tasks + threads - 1) / threads * threads * 5 <= tasks * 7;
}

// half: of eager PyTorch's memory, less what is kept.
template <class V, class T>
static void attention_gradients(const AttentionGrad& p, const Parallel& parallel, int64_t half) {
  using S = typename V::S;
  const Relation& r = p.relation;
  const int64_t samples = r.B * r.G;
  if (r.N == 0 || r.M == 0) {  // no scores: whatever gradient there is, is zero
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t b = i / r.G, g = i % r.G;
      for (int64_t n = 0; n < r.N; ++n)
        memset(static_cast<void*>(at<T>(p.dquery, b, g, n)), 0, static_cast<size_t>(r.D) * sizeof(T));
      for (int64_t j = 0; j < r.M; ++j) {
        memset(static_cast<void*>(at<T>(p.dkey, b, g, j)), 0, static_cast<size_t>(r.D) * sizeof(T));
        memset(static_cast<void*>(at<T>(p.dvalue, b, g, j)), 0, static_cast<size_t>(r.E) * sizeof(T));
      }
    }
    return;
  }
  const int threads = parallel.threads;
  const int64_t whole = whole_block(r, 2, sizeof(T) < sizeof(S));
  if (whole && shared_evenly(samples, threads) &&
      static_cast<int64_t>(gradient_bytes<V, T>(r, Of::whole, whole, whole)) <=
          scratch_room(half, 0, samples, threads)) {
    run(parallel, Job<AttentionGrad>{p, whole, 1}, samples, gradients_task<V, T>);
    return;
  }
  const int64_t of_queries = bytes_of_queries<S>(r);
  void* const shared = scratch(0, static_cast<size_t>(of_queries));
  const auto block = [&](Of of, int64_t rows, int64_t columns) {
    return block_within(scratch_room(half, of_queries, samples * rows, threads),
                        block_of(rows, columns, samples, threads), rows, samples, threads,
                        [&](int64_t some) { return gradient_bytes<V, T>(r, of, some, some); });
  };
  const int64_t queries = block(Of::queries, r.N, r.M), keys = block(Of::keys, r.M, r.N);
  const int64_t query_blocks = (r.N + queries - 1) / queries, key_blocks = (r.M + keys - 1) / keys;
  run(parallel, Job<AttentionGrad>{p, queries, query_blocks, shared}, samples * query_blocks,
      query_gradients_task<V, T>);
  run(parallel, Job<AttentionGrad>{p, keys, key_blocks, shared}, samples * key_blocks, key_gradients_task<V, T>);
}

template <class V, class T>
static void attend_grad_as(const AttentionGrad& p, const Parallel& parallel) {
  attention_gradients<V, T>(p, parallel, half_of_eagers_maps(p.relation, 3));
}

// The weights of a step's round, kept from the gates for the gradients: [samples][4][queries][padded M].
template <class S>
static size_t kept_bytes(const Relation& r, int64_t samples, int64_t queries) {
  return static_cast<size_t>(samples * 4 * queries * padded<S>(r.M)) * sizeof(S);
}
// Gate g's weights from query n of the round on: those of the forward pass, or the round's.
template <class V>
static Maps<typename V::S> kept_maps(const Job<StepGrad>& job, int64_t sample, int64_t g, int64_t n) {
  using S = typename V::S;
  const Relation& r = job.problem.relation;
  const int64_t ld = padded<S>(r.M);
  Maps<S> kept = kept_weights<S>(job.problem.weights, job.sample + sample, job.query + n, r.N);
  if (!kept.s && job.shared) kept = {static_cast<S*>(job.shared) + (sample * 4 * job.queries + n) * ld, job.queries};
  if (kept.s) kept.s += g * kept.gate * ld;
  return kept;
}

// From the pre-activations, the cell before, and the gradients of h and c: those of the pre-activations and of the cell.
template <class V, int NV>
[[gnu::always_inline]] static inline void gate_gradients(const typename V::R (&a)[NV][4],
                                                         const typename V::R (&before)[NV],
                                                         const typename V::R (&dh)[NV],
                                                         const typename V::R (&grad_c)[NV], typename V::R (&da)[NV][4],
                                                         typename V::R (&dcell)[NV]) {
  using R = typename V::R;
  const R one = V::set1(1);
  R i[NV], f[NV], o[NV], g[NV], c[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    i[v] = sigmoid_of(a[v][0]), f[v] = sigmoid_of(a[v][1]), o[v] = sigmoid_of(a[v][2]), g[v] = tanh_of(a[v][3]);
    c[v] = V::fma(f[v], before[v], V::mul(i[v], g[v]));
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const R t = tanh_of(c[v]);
    const R dc = V::add(V::mul(V::mul(dh[v], o[v]), V::sub(one, V::mul(t, t))), grad_c[v]);
    da[v][0] = V::mul(V::mul(dc, g[v]), V::mul(i[v], V::sub(one, i[v])));
    da[v][1] = V::mul(V::mul(dc, before[v]), V::mul(f[v], V::sub(one, f[v])));
    da[v][2] = V::mul(V::mul(dh[v], t), V::mul(o[v], V::sub(one, o[v])));
    da[v][3] = V::mul(V::mul(dc, i[v]), V::sub(one, V::mul(g[v], g[v])));
    dcell[v] = V::mul(dc, f[v]);
  }
}
template <class V, int NV>
[[gnu::noinline]] static void call_gate_gradients(const typename V::R (&a)[NV][4], const typename V::R (&before)[NV],
                                                  const typename V::R (&dh)[NV], const typename V::R (&grad_c)[NV],
                                                  typename V::R (&da)[NV][4], typename V::R (&dcell)[NV]) {
  gate_gradients<V>(a, before, dh, grad_c, da, dcell);
}

// The gates' part of the step's backward pass: dx_gates and dcell.
template <class V, class T>
static void gate_gradients_task(void* context, int64_t index) {
  using S = typename V::S;
  using R = typename V::R;
  const Job<StepGrad>& job = *static_cast<const Job<StepGrad>*>(context);
  const StepGrad& p = job.problem;
  const Relation& r = p.relation;
  const int64_t b = job.sample + index / job.blocks, from = index % job.blocks * job.block, n = job.query + from;
  const int64_t rows = min_of(job.block, job.queries - from);
  const Maps<typename V::S> kept = kept_maps<V>(job, index / job.blocks, 0, from);
  const auto finish = [&]<int NV>(int64_t row, int64_t column, int64_t width, const R(&a)[NV][4]) {
    R before[NV], dh[NV], dc[NV], da[NV][4], dcell[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const int64_t j = column + v * V::L;
      before[v] = load_state<V, T>(p.cell, p.cell_is_state, b, row, j, width);
      dh[v] = p.grad_h.data ? load_state<V, T>(p.grad_h, false, b, row, j, width) : V::set1(0);
      dc[v] = p.grad_c.data ? load_state<V, T>(p.grad_c, true, b, row, j, width) : V::set1(S(-0.0));  // changes nothing
    }
    if constexpr (sizeof(S) == 4)
      gate_gradients<V>(a, before, dh, dc, da, dcell);
    else
      call_gate_gradients<V>(a, before, dh, dc, da, dcell);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const int64_t j = column + v * V::L;
#pragma GCC unroll 4
      for (int64_t gate = 0; gate < 4; ++gate) {
        T* to = at<T>(p.dx_gates, b, gate, row) + j;
        soon(to + panel<V>);
        width >= V::L ? V::store(to, da[v][gate]) : store_part<V>(to, da[v][gate], width);
      }
      store_state<V, T>(p.dcell, p.cell_is_state, b, row, j, width, dcell[v]);
    }
  };
  const size_t bytes = GateMemory<V, T>({}, r, rows, kept, p.kept_gates).bytes;
  const Pieces pieces{static_cast<char*>(scratch(1, bytes)), 0};
  const GateMemory<V, T> memory(pieces, r, rows, kept, p.kept_gates);
  gates<V, T>(r, p.x_gates, b, n, rows, memory, kept.s, p.weights.data != nullptr, p.gates, finish);
}

// The gradients of a gate from the round's queries, whose weights were kept.
template <class V, class T>
static void kept_gradients_task(void* context, int64_t index) {
  const Job<StepGrad>& job = *static_cast<const Job<StepGrad>*>(context);
  const StepGrad& p = job.problem;
  const Relation& r = p.relation;
  const int64_t sample = index / 4, g = index % 4;
  query_gradients<V, T>({r, p.dx_gates, p.dquery, p.dkey, p.dvalue}, job.sample + sample, g, job.query, job.queries,
                        gradient_memory<V, T>(r, Of::kept, job.queries, job.at_once), nullptr,
                        kept_maps<V>(job, sample, g, 0));
}

template <class V, class T>
static void step_grad_as(const StepGrad& p, const Parallel& parallel) {
  using S = typename V::S;
  const Relation& r = p.relation;
  const int threads = parallel.threads;
  const bool weights = p.weights.data;
  const int64_t half = half_of_eagers_step(r, true) - kept_for_gradients<S>(r, weights, p.kept_gates);
  // Rounds of a sample per thread (more, if they are small) and a block of its queries: weights and dx_gates wait in
  // the cache for the gradients.
  int64_t queries = whole_block(r, 4, sizeof(T) < sizeof(S));
  bool rounds = queries > 0 && r.M > 0 && shared_evenly(4 * r.B, threads);
  const int64_t share = max_of<int64_t>(1, (1 << 18) / (4 * max_of<int64_t>(1, queries) * (r.M + r.D + r.E + 1)));
  int64_t samples = r.B, at_once = queries, maps = 0;
  if (rounds) {
    samples = min_of(r.B, threads * share);
    // The step's memory stays, too.
    const int64_t before = block_of_step<V, T>(r, p.weights, p.kept_gates, threads);
    const int64_t there =
        static_cast<int64_t>(GateMemory<V, T>({}, r, before, kept_weights<S>(p.weights, 0, 0, r.N)).bytes);
    const auto fits = [&] {
      maps = weights ? 0 : static_cast<int64_t>(kept_bytes<S>(r, samples, queries));
      const auto own = static_cast<int64_t>(gradient_bytes<V, T>(r, Of::kept, queries, at_once));
      return max_of(own, there) <= scratch_room(half, maps, 4 * r.B, threads);
    };
    while (!fits() && samples > threads) samples = max_of<int64_t>(threads, samples / 2);
    if (!fits()) at_once = round_up((queries + 1) / 2, sum_rows);  // keys are packed twice
    rounds = fits();
  }
  if (!rounds) queries = r.N, samples = r.B, maps = 0;
  void* const shared = maps > 0 ? scratch(0, static_cast<size_t>(maps)) : nullptr;
  for (int64_t b = 0; b < r.B; b += samples)
    for (int64_t n = 0; n < r.N; n += queries) {
      const int64_t some = min_of(samples, r.B - b), rows = min_of(queries, r.N - n);
      Job<StepGrad> job{p, 0, 0, shared, b, n, some, rows, at_once};
      const Maps<S> found = kept_maps<V>(job, 0, 0, 0);
      job.block = block_within(scratch_room(half, rounds ? maps : bytes_of_queries<S>(r), some * rows, threads),
                               block_of(rows, r.M, some, threads), rows, some, threads, [&](int64_t block) {
                                 return GateMemory<V, T>({}, r, block, found, p.kept_gates).bytes;
                               });
      job.blocks = (rows + job.block - 1) / job.block;
      run(parallel, job, some * job.blocks, gate_gradients_task<V, T>);
      if (rounds) run(parallel, job, some * 4, kept_gradients_task<V, T>);
    }
  if (!rounds) attention_gradients<V, T>({r, p.dx_gates, p.dquery, p.dkey, p.dvalue}, parallel, half);
}

}  // namespace

// ---- entry points -----------------------------------------------------------------------------------------------

#ifdef RCU_OPS_BF16_ONLY
#define RCU_OPS_ENTRY_POINT(name, Problem) \
  void name(const Problem& p, const Parallel& parallel) { name##_as<RCU_OPS_BF16_ONLY, bf16_t>(p, parallel); }
#else
#define RCU_OPS_ENTRY_POINT(name, Problem)                             \
  void name(const Problem& p, const Parallel& parallel) {              \
    switch (p.relation.dtype) {                                        \
      case DType::f64: return name##_as<Doubles, double>(p, parallel); \
      case DType::f32: return name##_as<Floats, float>(p, parallel);   \
      case DType::bf16: return name##_as<Floats, bf16_t>(p, parallel); \
      default: return name##_as<Floats, f16_t>(p, parallel);           \
    }                                                                  \
  }
#endif
RCU_OPS_ENTRY_POINT(attend, Attention)
RCU_OPS_ENTRY_POINT(attend_grad, AttentionGrad)
RCU_OPS_ENTRY_POINT(step, Step)
RCU_OPS_ENTRY_POINT(step_grad, StepGrad)
