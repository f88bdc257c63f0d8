// recurrent_conv: the gradient of the weight, for every instruction set that includes this in its namespace, with its
// vectors, after scalar.h and recurrent_conv_transport.h.
//
// dW = U H^T over rows r = (frame, column), U = dx at that frame and H = the state before it.
//
// Layout.   Rows are cut into `parts` ranges and the output channels into slabs, both by shape alone. A task packs K
//           rows of H to panels [K][NR] and of its slab of U to [o / A][K][A], or, where positions are adjacent, to
//           [o][K]: either way both are read in the order in which they lie, and brought once to the numbers that all
//           blocks multiply.
// Order.    Chains of K rows (of a quarter where a frame has few columns: sums frame by frame would be as exact as
//           that), one row or pair after the other, are added up to sums of `flush` rows, those within a range with their
//           rounding errors kept beside them, and the ranges in fp64: independent of the number of threads, and as
//           exact as short sums however many rows.
// Scratch.  2 * parts * C * C shared; per task K * (slab + C) and slab * C.
// Bound.    2 C^2 FLOP per row, one load for 1.6 multiply-adds (of one row, or of a pair); packing moves
//           2 * C (1 + C / slab) elements per row, which the blocks before have asked for.
//
// Arithmetic G: V, vectors of the sums; E, what is multiplied; MR rows by NR lanes at a
// time of slabs padded to A; `pair`, consecutive rows that it takes side by side, 1 or 2; and
//
//   multiply<Rows>(a, b, count, sum, ahead)   sum[MR][NR] += a b over `count` rows, of a[k / pair][A][pair] (Rows) or
//                                             a[m][K]; where pairs are wanted and count is odd, one more row of zeros
//   pack_u<Rows>(p, u, o0, outputs, rows_at, count), pack_h(p, h, rows_at, from_first, count, panels)

static constexpr int64_t grad_rows = 128, grad_slab = 128;

// The lines that the next rows hold of a tensor, asked for one by one between the products: in one go, more than a core
// can wait for would hold it up. Into the nearest cache, though they are more than it keeps: asked for into the next one
// only, lines came late (the gradient of 64 channels in bf16, positions adjacent, took a quarter longer on Zen 4).
struct GradLines {
  const char* base = nullptr;
  const int64_t* at = nullptr;  // where each piece begins; absent: `stride` apart
  int64_t element = 0, stride = 0, pieces = 0, bytes = 0;
  int64_t piece = 0;
  const char *line = nullptr, *end = nullptr;  // of the piece that was begun

  int64_t count() const { return pieces * (bytes / 64 + 1); }
  bool next() {
    if (line >= end) {
      if (piece >= pieces) return false;
      const char* const from = base + (at ? at[piece] : piece * stride) * element;
      line = from - reinterpret_cast<uintptr_t>(from) % 64, end = from + bytes;
      ++piece;
    }
    __builtin_prefetch(line);
    line += 64;
    return true;
  }
};

struct GradAhead {
  GradLines u, h;
  int64_t share = 0;  // lines per call
  void next() {
    for (int64_t i = 0; i < share; ++i)
      if (!u.next() && !h.next()) return;
  }
};

template <class G>
struct WeightGradTasks {
  using V = typename G::V;
  using E = typename G::E;
  using S = typename V::S;
  static constexpr int L = V::L, MR = G::MR, NR = G::NR, A = G::A;
  static constexpr int64_t K = grad_rows, slab = grad_slab, flush = 4 * K;

  const WeightGrad& p;
  int64_t columns, first_frame, rows, chain, parts, panels, slabs, slab_size;
  S* partial;  // [part][slab of outputs][sum, its rounding errors][panel of inputs][padded slab][NR]

  explicit WeightGradTasks(const WeightGrad& problem) : p(problem) {
    columns = p.N * p.H * p.W;
    first_frame = p.first.data ? 0 : 1;
    rows = (p.T - first_frame) * columns;
    chain = columns < 4 * K ? K / 4 : K;
    panels = (p.C + NR - 1) / NR;
    slabs = (p.C + slab - 1) / slab;
    slab_size = panels * padded_slab() * NR;
    const int64_t most = max_of<int64_t>((int64_t(32) << 20) / int64_t(slabs * slab_size * sizeof(S)), 1);
    parts = max_of<int64_t>(min_of(min_of<int64_t>(rows / 2048, 16), most), 1);
    partial = nullptr;
  }
  int64_t padded_slab() const { return round_up(min_of(slab, p.C), A); }

  // Up to K rows and where they lie: U's frame, and H's frame before it (rows of the first frame: `first`).
  struct Chunk {
    int64_t count = 0;
    int64_t u[K], h[K];
    bool from_first[K];
  };
  void locate(int64_t r0, int64_t end, Chunk& chunk) const {
    Scan shape;  // for column_offsets
    shape.N = p.N, shape.H = p.H, shape.W = p.W;
    const int64_t count = chunk.count = max_of<int64_t>(min_of(K, end - r0), 0);
    for (int64_t k = 0; k < count;) {
      const int64_t i = (r0 + k) / columns + first_frame, q = (r0 + k) % columns,
                    piece = min_of(count - k, columns - q);
      const int64_t t = p.reverse ? p.T - 1 - i : i, before = i == 0 ? 0 : p.reverse ? t + 1 : t - 1;
      column_offsets(shape, p.dx, q, piece, chunk.u + k);
      column_offsets(shape, i == 0 ? p.first : p.h, q, piece, chunk.h + k);
      for (int64_t end = k + piece; k < end; ++k) {
        chunk.u[k] += t * p.dx.t;
        chunk.h[k] += i == 0 ? 0 : before * p.h.t;
        chunk.from_first[k] = i == 0;
      }
    }
  }

  // Of channels [begin, end) of `count` rows: rows of channels, or channels of rows that follow the first one.
  GradLines lines(const View& v, const int64_t* rows_at, int64_t count, int64_t begin, int64_t end) const {
    GradLines found;
    if (count == 0) return found;
    const bool by_row = v.c == 1;
    found.element = element_size(p.dtype);
    found.base = static_cast<const char*>(v.data) + (begin * v.c + (by_row ? 0 : rows_at[0])) * found.element;
    found.at = by_row ? rows_at : nullptr;
    found.stride = v.c;
    found.pieces = by_row ? count : end - begin;
    found.bytes = (by_row ? end - begin : count) * found.element;
    return found;
  }

  static void task(void* self, int64_t index) {
    const auto& t = *static_cast<const WeightGradTasks*>(self);
    if (t.p.dx.c == 1)
      t.template run_task<true>(index);
    else
      t.template run_task<false>(index);
  }

  template <bool Rows>
  void run_task(int64_t index) const {
    const int64_t part = index / slabs, o0 = index % slabs * slab, outputs = min_of(slab, p.C - o0);
    const int64_t padded = round_up(outputs, A), c_panel = padded_slab() * NR;
    S* const sum = partial + 2 * index * slab_size;
    S* const lost = sum + slab_size;
    memset(static_cast<void*>(sum), 0, 2 * slab_size * sizeof(S));

    const size_t packed = (padded + panels * NR) * K * sizeof(E);
    char* memory = static_cast<char*>(scratch(1, packed + slab_size * sizeof(S) + 2 * sizeof(Chunk)));
    E* const u = reinterpret_cast<E*>(memory);
    E* const h = u + padded * K;
    S* const block = reinterpret_cast<S*>(memory + packed);
    Chunk* now = reinterpret_cast<Chunk*>(block + slab_size);
    Chunk* next = now + 1;
    memset(static_cast<void*>(u), 0, padded * K * sizeof(E));
    memset(static_cast<void*>(block), 0, slab_size * sizeof(S));

    const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts, blocks = panels * (padded / MR);
    locate(begin, end, *now);
    for (int64_t r = begin; r < end; r += K) {
      G::template pack_u<Rows>(p, u, o0, outputs, now->u, now->count);
      G::pack_h(p, h, now->h, now->from_first, now->count, panels);
      locate(r + K, end, *next);
      GradAhead ahead;
      ahead.u = lines(p.dx, next->u, next->count, o0, o0 + outputs);
      ahead.h = lines(p.h, next->h, next->from_first[0] ? 0 : next->count, 0, p.C);
      ahead.share = (ahead.u.count() + ahead.h.count() + blocks * K / 4 - 1) / (blocks * K / 4);
      for (int64_t panel = 0; panel < panels; ++panel)
        for (int64_t m = 0; m < padded; m += MR) {
          const E* const a = Rows ? u + m / A * A * K + m % A * G::pair : u + m * K;
          const E* const b = h + panel * K * NR;
          for (int64_t k = 0; k < now->count; k += chain)
            G::template multiply<Rows>(a + k * (Rows ? A : 1), b + k * NR, min_of(chain, now->count - k),
                                       block + panel * c_panel + m * NR, ahead);
        }
      Chunk* const swap = now;
      now = next;
      next = swap;
      if ((r - begin) % flush == flush - K || r + K >= end) {
        for (int64_t panel = 0; panel < panels; ++panel) add_exactly(panel * c_panel, padded * NR, block, sum, lost);
      }
    }
  }

  // sum += block, and what the addition rounds away to `lost`; the block starts anew.
  static void add_exactly(int64_t from, int64_t count, S* block, S* sum, S* lost) {
    for (int64_t i = from; i < from + count; i += L) {
      const auto a = V::load(sum + i), b = V::load(block + i), s = V::add(a, b), part = V::sub(s, a);
      V::store(lost + i, V::add(V::load(lost + i), V::add(V::sub(a, V::sub(s, part)), V::sub(b, part))));
      V::store(sum + i, s);
      V::store(block + i, V::set1(0));
    }
  }

  static void reduce(void* self, int64_t o) {
    const auto& t = *static_cast<const WeightGradTasks*>(self);
    const int64_t C = t.p.C, c_panel = t.padded_slab() * NR;
    for (int64_t panel = 0; panel < t.panels; ++panel) {
      const S* at = t.partial + 2 * (o / slab) * t.slab_size + panel * c_panel + o % slab * NR;
      double sum[NR] = {};
      for (int64_t part = 0; part < t.parts; ++part, at += 2 * t.slabs * t.slab_size)
        for (int i = 0; i < NR; ++i) {
          const double lost = at[t.slab_size + i];  // NaN of an infinite sum, which stays infinite
          sum[i] += static_cast<double>(at[i]) + (lost == lost ? lost : 0.0);
        }
      for (int i = 0; i < min_of<int64_t>(NR, C - panel * NR); ++i)
        store_any(t.p.dweight, t.p.dtype, o * C + panel * NR + i, sum[i]);
    }
  }

  static void run(const WeightGrad& p, const Parallel& parallel) {
    WeightGradTasks t(p);
    t.partial = static_cast<S*>(scratch(0, 2 * t.parts * t.slabs * t.slab_size * sizeof(S)));
    parallel.run(parallel.pool, t.parts * t.slabs, task, &t);
    parallel.run(parallel.pool, p.C, reduce, &t);
  }
};
