// The data path of an SRTG block on vector units: the body of every instruction set, included as
// cycle_consistency_core.h is.
//
// Layout.   Vectors along positions where a frame's positions are adjacent, along channels where those are, in one pass
//           over x (and grad) either way; any other strides number by number.
//           Small planes of which y alone is written, and which follow each other, are one run of numbers.
// Owner.    Of sums: the task of (sample, channel, frame), or of (sample, frame, channels). Of y: the same task.
// Order.    Sums over positions are vectors' worth of partial sums, in parts (part_of) along channels, in an order that
//           depends on the sizes and the layout alone.
// Pairs.    Numbers are taken 2 L at a time, as two vectors: of bf16 ones, those at even and those at odd places
//           (`in_turns`), so that they are widened and narrowed in place; of others, one after the other.
// Tails.    The last vector overlaps the one before it: it writes the same numbers again, and adds only what is new.
// Bound.    Bytes: x read once (and grad), y written once.

template <class T>
static constexpr bool in_turns = false;
template <>
constexpr bool in_turns<bf16_t> = true;

template <class V, class T>
struct GateTask {
  using S = typename V::S;
  using R = typename V::R;
  static constexpr int L = V::L;

  static void load_pair(const T* p, R (&v)[2]) {
    if constexpr (in_turns<T>)
      V::load_turns(p, v[0], v[1]);
    else
      v[0] = V::load(p), v[1] = V::load(p + L);
  }
  static void store_pair(T* p, const R (&v)[2]) {
    if constexpr (in_turns<T>)
      V::store_turns(p, v[0], v[1]);
    else
      V::store(p, v[0]), V::store(p + L, v[1]);
  }
  // The first of `count` channels are pairs of vectors, whose numbers h and sums are kept one vector after the other.
  static int64_t in_pairs(int64_t count) { return in_turns<T> ? count / (2 * L) * (2 * L) : 0; }

  // Numbers h of `count` channels, then those of the last L in order.
  static void take_factors(const S* h, int64_t count, S* to) {
    const int64_t whole = in_pairs(count);
    for (int64_t c = 0; c < whole; c += 2 * L)
      for (int l = 0; l < L; ++l) to[c + l] = h[c + 2 * l], to[c + L + l] = h[c + 2 * l + 1];
    memcpy(to + whole, h + whole, static_cast<size_t>(count - whole) * sizeof(S));
    V::store(to + count, V::load(h + count - L));
  }
  template <GatePass Pass>
  static void write_sums(const GateData& p, const S* sum, int64_t n, int64_t count, S* to) {
    const int64_t whole = in_pairs(count);
    for (int64_t c = 0; c < whole; c += 2 * L)
      for (int l = 0; l < L; ++l) to[c + 2 * l] = sum[c + l], to[c + 2 * l + 1] = sum[c + L + l];
    memcpy(to + whole, sum + whole, static_cast<size_t>(count - whole) * sizeof(S));
    for (int64_t c = 0; c < count; ++c) to[c] = finished<Pass>(p, to[c], n);
  }

  template <GatePass Pass>
  static R result(R x, R grad, R h) {
    if constexpr (Pass == GatePass::mul) return x * h;
    if constexpr (Pass == GatePass::add) return x + h;
    return grad * h;
  }
  template <GatePass Pass>
  static S number(S x, S grad, S h) {
    return Pass == GatePass::mul ? x * h : Pass == GatePass::add ? x + h : grad * h;
  }
  template <GatePass Pass>
  static R summand(R x, R grad) {
    return Pass == GatePass::backward ? x * grad : x;
  }
  static constexpr bool sums(GatePass pass) { return pass == GatePass::squeeze || pass == GatePass::backward; }

  // Sums of many positions are made in parts: one chain of additions would round more than a library's sum does. The
  // last one may be nearly twice as long.
  static constexpr int64_t part_size = 1024;
  static int64_t parts_before_last(int64_t count) { return count < 2 * part_size ? 0 : count / part_size - 1; }

  // Runs of `count` >= L adjacent positions of one channel: what is the same for all of them is made once.
  struct Run {
    using Mask = decltype(R{} < R{});
    int64_t count, whole;
    Mask of_first, of_second;  // the lanes of the last vector, or two, that are new

    explicit Run(int64_t positions) : count(positions), whole(count / (2 * L) * (2 * L)) {
      const bool turns = in_turns<T> && count >= 2 * L;
      const R lane = lane_numbers<V>(), seen = R{} + static_cast<S>(2 * L - (count - whole));
      of_first = (turns ? lane + lane : lane) >= seen;
      of_second = (turns ? lane + lane + S(1) : lane + S(L)) >= seen;
    }
    static R kept(R value, Mask mask) { return reinterpret_cast<R>(reinterpret_cast<Mask>(value) & mask); }

    // A vector's terms of the sum, and two vectors'.
    template <GatePass Pass>
    [[gnu::always_inline]] static inline R one(const T* x, const T* grad, T* y, R factor) {
      const R value = V::load(x);
      R of_grad{};
      if constexpr (Pass == GatePass::backward) of_grad = V::load(grad);
      if constexpr (Pass != GatePass::squeeze) V::store(y, result<Pass>(value, of_grad, factor));
      return summand<Pass>(value, of_grad);
    }
    template <GatePass Pass>
    [[gnu::always_inline]] static inline void pair(const T* x, const T* grad, T* y, R factor, R (&term)[2]) {
      R value[2], of_grad[2] = {};
      load_pair(x, value);
      if constexpr (Pass == GatePass::backward) load_pair(grad, of_grad);
      if constexpr (Pass != GatePass::squeeze)
        store_pair(y, {result<Pass>(value[0], of_grad[0], factor), result<Pass>(value[1], of_grad[1], factor)});
      for (int k = 0; k < 2; ++k) term[k] = summand<Pass>(value[k], of_grad[k]);
    }

    // Returns the sum, if there is one, spread over the lanes.
    template <GatePass Pass>
    [[gnu::always_inline]] inline R take(const T* x, const T* grad, T* y, R factor) const {
      if (count < 2 * L) {
        const R first = one<Pass>(x, grad, y, factor);
        const int64_t at_end = count - L;
        return first + kept(one<Pass>(x + at_end, grad + at_end, y + at_end, factor), of_first);
      }
      R sum[2], term[2];
      pair<Pass>(x, grad, y, factor, sum);
      int64_t i = 2 * L;
      const auto add = [&](int64_t at, R(&to)[2]) {
        pair<Pass>(x + at, grad + at, y + at, factor, term);
        to[0] += term[0], to[1] += term[1];
      };
      if (whole >= 8 * L) {  // two chains of additions would be waited for
        R more[2] = {};
        for (; i + 4 * L <= whole; i += 4 * L) add(i, more), add(i + 2 * L, sum);
        sum[0] += more[0], sum[1] += more[1];
      }
      for (; i < whole; i += 2 * L) add(i, sum);
      if (whole < count) {
        const int64_t at = count - 2 * L;
        pair<Pass>(x + at, grad + at, y + at, factor, term);
        sum[0] += kept(term[0], of_first), sum[1] += kept(term[1], of_second);
      }
      return sum[0] + sum[1];
    }
  };

  // Sums of K planes of `count` >= L adjacent positions each, side by side.
  template <int K>
  [[gnu::always_inline]] static inline void sums_of_parts(const T* const (&x)[K], int64_t count, R* sums) {
    R acc[K][2] = {};
    int64_t i = 0;
    for (; i + 2 * L <= count; i += 2 * L)
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        R value[2];
        load_pair(x[k] + i, value);
        acc[k][0] += value[0], acc[k][1] += value[1];
      }
    for (int k = 0; k < K; ++k) {
      if (i + L <= count) acc[k][0] += V::load(x[k] + i);
      if (const int64_t from = i + (i + L <= count ? L : 0); from < count) {
        const R value = V::load(x[k] + count - L);
        acc[k][1] += lane_numbers<V>() < static_cast<S>(from - (count - L)) ? R{} : value;
      }
      sums[k] = acc[k][0] + acc[k][1];
    }
  }

  // The same in parts.
  template <int K>
  [[gnu::always_inline]] static inline void sums_of_planes(const T* const (&x)[K], int64_t count, R* sums) {
    const T* rest[K];
    for (int k = 0; k < K; ++k) rest[k] = x[k];
    R more[K];
    const int64_t parts = parts_before_last(count);
    sums_of_parts<K>(x, parts > 0 ? part_size : count, sums);
    for (int64_t i = 1; i <= parts; ++i) {
      for (int k = 0; k < K; ++k) rest[k] += part_size;
      sums_of_parts<K>(rest, i < parts ? part_size : count - parts * part_size, more);
      for (int k = 0; k < K; ++k) sums[k] += more[k];
    }
  }

  // Channels [c0, c1), at least L of them, of the positions in rows [i0, i1) of one frame: along memory, position by
  // position. Sums are kept in `sum`, 2 (c1 - c0) numbers: the part that is being added up, and the parts before it.
  // They and h are of c0 on, as take_factors lays them out.
  template <GatePass Pass>
  static void channels(const GateData& p, int64_t n, int64_t t, int64_t c0, int64_t c1, int64_t i0, int64_t i1,
                       const S* h, S* sum) {
    const auto base = [&](const View& v) { return static_cast<T*>(v.data) + (v.data ? n * v.n + t * v.t + c0 : 0); };
    const T *x = base(p.x), *grad = base(p.grad);
    T* y = base(p.y);
    const int64_t count = c1 - c0, part = part_of(p.H * p.W), last = count - L;
    S* const total = sum + count;
    if constexpr (sums(Pass)) memset(sum, 0, static_cast<size_t>(2 * count) * sizeof(S));
    int64_t since = 0;
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t j = 0; j < p.W; ++j) {
        const T* from = x + i * p.x.h + j * p.x.w;
        const T* from_grad = Pass == GatePass::backward ? grad + i * p.grad.h + j * p.grad.w : nullptr;
        T* to = Pass == GatePass::squeeze ? nullptr : y + i * p.y.h + j * p.y.w;
        const auto step = [&](int64_t c, const S* factors, int64_t done) {
          const R value = V::load(from + c), of_grad = Pass == GatePass::backward ? V::load(from_grad + c) : R{};
          if constexpr (Pass != GatePass::squeeze) V::store(to + c, result<Pass>(value, of_grad, V::load(factors)));
          if constexpr (sums(Pass)) {
            const R term = summand<Pass>(value, of_grad);
            V::store(sum + c,
                     V::load(sum + c) + (done == 0 ? term : (lane_numbers<V>() < static_cast<S>(done) ? R{} : term)));
          }
        };
        int64_t c = 0;
        for (; c + 2 * L <= count; c += 2 * L) {
          R value[2], of_grad[2] = {};
          load_pair(from + c, value);
          if constexpr (Pass == GatePass::backward) load_pair(from_grad + c, of_grad);
          if constexpr (Pass != GatePass::squeeze)
            store_pair(to + c, {result<Pass>(value[0], of_grad[0], V::load(h + c)),
                                result<Pass>(value[1], of_grad[1], V::load(h + c + L))});
          if constexpr (sums(Pass)) {
            V::store(sum + c, V::load(sum + c) + summand<Pass>(value[0], of_grad[0]));
            V::store(sum + c + L, V::load(sum + c + L) + summand<Pass>(value[1], of_grad[1]));
          }
        }
        if (c + L <= count) step(c, h + c, 0), c += L;
        if (c < count) step(last, h + count, c - last);
        if (sums(Pass) && ++since == part) {
          since = 0;
          for (c = 0; c < count; ++c) total[c] += sum[c], sum[c] = 0;
        }
      }
    if constexpr (sums(Pass))
      for (int64_t c = 0; c < count; ++c) sum[c] += total[c];
  }

  // Number by number.
  template <GatePass Pass>
  static S scattered(const GateData& p, int64_t n, int64_t c, int64_t t, S h) {
    const auto at = [&](const View& v, int64_t i, int64_t j) {
      return n * v.n + c * v.c + t * v.t + i * v.h + j * v.w;
    };
    S total = 0;
    for (int64_t i = 0; i < p.H; ++i) {
      S row = 0;
      for (int64_t j = 0; j < p.W; ++j) {
        const S x = static_cast<S>(to_double(static_cast<const T*>(p.x.data)[at(p.x, i, j)]));
        S g = 0;
        if constexpr (Pass == GatePass::backward)
          g = static_cast<S>(to_double(static_cast<const T*>(p.grad.data)[at(p.grad, i, j)]));
        if constexpr (Pass != GatePass::squeeze)
          from_double(number<Pass>(x, g, h), static_cast<T*>(p.y.data)[at(p.y, i, j)]);
        if constexpr (sums(Pass)) row += Pass == GatePass::backward ? x * g : x;
      }
      total += row;
    }
    return total;
  }

  static bool open(const GateData& p, int64_t n) { return !p.gate || p.gate[n * p.gate_stride]; }
  template <GatePass Pass>
  static S neutral() {
    return Pass == GatePass::add ? S(-0.0) : S(1);  // x + -0 is x, for every x
  }
  template <GatePass Pass>
  static S finished(const GateData& p, S sum, int64_t n) {
    return Pass == GatePass::squeeze ? sum / static_cast<S>(p.H * p.W) : open(p, n) ? sum : S(0);
  }

  // Calls f(plane - begin, n, t, c) for planes [begin, end), frame by frame: what has a number for each of them,
  // [N,T,C], has neighbouring channels in a line, and frames mostly a multiple of 4 KB apart, in one set of the cache.
  template <class F>
  static void for_planes(const GateData& p, int64_t begin, int64_t end, F f) {
    for (int64_t first = begin; first < min_of(begin + p.T, end); ++first) {
      const int64_t t = first % p.T;
      int64_t c = first / p.T % p.C, n = first / p.T / p.C, i = first - begin;
      for (; i < end - begin; c = 0, ++n)
        for (; c < p.C && i < end - begin; ++c, i += p.T) f(i, n, t, c);
    }
  }

  // What h is, or does nothing, for planes [begin, end).
  template <GatePass Pass>
  static void plane_factors(const GateData& p, int64_t begin, int64_t end, S* factors) {
    const S* const h = static_cast<const S*>(p.h);
    for_planes(p, begin, end, [&](int64_t i, int64_t n, int64_t t, int64_t c) {
      factors[i] = open(p, n) ? h[(n * p.T + t) * p.C + c] : neutral<Pass>();
    });
  }

  // `found` [end - begin] to where they belong.
  template <GatePass Pass>
  static void write_found(const GateData& p, int64_t begin, int64_t end, const S* found) {
    S* const out = static_cast<S*>(p.sums);
    for_planes(p, begin, end, [&](int64_t i, int64_t n, int64_t t, int64_t c) {
      out[(n * p.T + t) * p.C + c] = Pass == GatePass::squeeze || open(p, n) ? found[i] : S(0);
    });
  }

  // Planes [begin, end) of at least L adjacent positions, one after the other.
  template <GatePass Pass>
  static void planes(const GateData& p, int64_t begin, int64_t end) {
    const int64_t positions = p.H * p.W, parts = parts_before_last(positions), before = parts * part_size;
    const Run of_part(parts > 0 ? part_size : positions), of_rest(positions - before);
    S* const found = static_cast<S*>(scratch(1, static_cast<size_t>(2 * (end - begin) + L) * sizeof(S)));
    S* const factors = found + (end - begin) + L;
    if constexpr (Pass != GatePass::squeeze) plane_factors<Pass>(p, begin, end, factors);
    const T *x, *grad;
    T* y;
    int64_t c = begin / p.T % p.C, n = begin / p.T / p.C, t = begin % p.T;
    const auto find = [&] {
      const auto at = [&](const View& v) { return static_cast<T*>(v.data) + n * v.n + c * v.c + t * v.t; };
      x = at(p.x);
      grad = at(Pass == GatePass::backward ? p.grad : p.x);  // what is not there is not looked at
      y = at(Pass == GatePass::squeeze ? p.x : p.y);
    };
    find();
    for (int64_t i = begin; i < end; i += L) {
      R sum[L];
      const int64_t count = min_of<int64_t>(L, end - i);
      for (int64_t l = count; l < L; ++l) sum[l] = R{};
      for (int64_t l = 0; l < count; ++l) {
        const R factor = Pass == GatePass::squeeze ? R{} : R{} + factors[i - begin + l];
        R all = of_rest.template take<Pass>(x + before, grad + before, y + before, factor);
        for (int64_t k = 0; k < before; k += part_size)
          all += of_part.template take<Pass>(x + k, grad + k, y + k, factor);
        sum[l] = all;
        x += p.x.t, grad += p.grad.t, y += p.y.t;
        if (++t < p.T) continue;
        t = 0;
        if (++c == p.C) c = 0, ++n;
        find();
      }
      if constexpr (sums(Pass)) {
        const R all = V::sums(sum);
        V::store(found + (i - begin), Pass == GatePass::squeeze ? all / static_cast<S>(positions) : all);
      }
    }
    if constexpr (sums(Pass)) write_found<Pass>(p, begin, end, found);
  }

  // Planes [begin, end) of at least 2 L positions that follow each other without gaps, all as one run: so short ones
  // take as many vectors as they have numbers for.
  template <GatePass Pass>
  static void planes_in_a_run(const GateData& p, int64_t begin, int64_t end) {
    const int64_t positions = p.H * p.W, all = (end - begin) * positions;
    const T* const x = static_cast<const T*>(p.x.data) + begin * positions;
    T* const y = static_cast<T*>(p.y.data) + begin * positions;
    S* factors = static_cast<S*>(scratch(1, static_cast<size_t>(end - begin + 2) * sizeof(S)));
    plane_factors<Pass>(p, begin, end, factors);
    factors[end - begin] = factors[end - begin + 1] = 0;  // of no plane, but read ahead
    const R lane = lane_numbers<V>(), first = in_turns<T> ? lane + lane : lane,
            second = in_turns<T> ? first + S(1) : lane + S(L);
    R now = R{} + factors[0], next = R{} + factors[1];
    int64_t i = 0, left = positions;  // of the plane
    for (; i + 2 * L <= all; i += 2 * L) {
      const R last = R{} + static_cast<S>(left);
      R value[2];
      load_pair(x + i, value);
      store_pair(y + i, {result<Pass>(value[0], R{}, first < last ? now : next),
                         result<Pass>(value[1], R{}, second < last ? now : next)});
      left -= 2 * L;
      if (left > 0) continue;
      left += positions, ++factors;
      now = next, next = R{} + factors[1];
    }
    for (const int64_t from = i; i < all; ++i)
      from_double(number<Pass>(static_cast<S>(to_double(x[i])), 0, factors[i - from < left ? 0 : 1]), y[i]);
  }

  // Means of the same in K ranges side by side.
  static void means_of_ranges(const GateData& p, int64_t begin, int64_t end) {
    constexpr int K = L < 4 ? L : 4;
    const int64_t positions = p.H * p.W, each = (end - begin + K - 1) / K;
    struct Place {
      int64_t plane, t, c, n;
    } at[K];
    for (int k = 0; k < K; ++k) {
      const int64_t plane = min_of(begin + k * each, end - 1);
      at[k] = {plane, plane % p.T, plane / p.T % p.C, plane / p.T / p.C};
    }
    S* const found = static_cast<S*>(scratch(1, static_cast<size_t>(end - begin) * sizeof(S)));
    R sums[L] = {};
    int64_t to[L];
    int count = 0;
    for (int64_t i = 0; i < each; ++i) {
      const T* x[K];
      for (int k = 0; k < K; ++k) {
        Place& place = at[k];
        x[k] = static_cast<const T*>(p.x.data) + place.n * p.x.n + place.c * p.x.c + place.t * p.x.t;
        to[count + k] = place.plane - begin;
        if (place.plane + 1 == end) continue;  // ranges may be a plane too long: the last is written again, the same
        ++place.plane;
        if (++place.t < p.T) continue;
        place.t = 0;
        if (++place.c == p.C) place.c = 0, ++place.n;
      }
      sums_of_planes<K>(x, positions, sums + count);
      count += K;
      if (count < L && i + 1 < each) continue;
      alignas(64) S ready[L];
      V::store(ready, V::sums(sums) / static_cast<S>(positions));
      for (int l = 0; l < count; ++l) found[to[l]] = ready[l];
      count = 0;
    }
    write_found<GatePass::squeeze>(p, begin, end, found);
  }

  // Planes [begin, end) number by number.
  template <GatePass Pass>
  static void scattered_planes(const GateData& p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i % p.T, c = i / p.T % p.C, n = i / p.T / p.C, at = (n * p.T + t) * p.C + c;
      const S factor = Pass == GatePass::squeeze || !open(p, n) ? neutral<Pass>() : static_cast<const S*>(p.h)[at];
      const S sum = scattered<Pass>(p, n, c, t, factor);
      if constexpr (sums(Pass)) static_cast<S*>(p.sums)[at] = finished<Pass>(p, sum, n);
    }
  }

  // Of x's `bytes`, a task's share: about 64 KB, and up to 256 KB where every thread has eight such (measured: squeeze
  // takes 0.955 of the time, since every task's streams have to start).
  static int64_t task_bytes(int64_t bytes, const Parallel& parallel) {
    return max_of<int64_t>(65536, min_of<int64_t>(262144, bytes / (8 * max_of(parallel.threads, 1))));
  }

  template <GatePass Pass>
  static void run_pass(const GateData& p, const Parallel& parallel) {
    const int64_t positions = p.H * p.W;
    const bool rows = planar(p, p.x) && planar(p, p.y) && planar(p, p.grad) && positions >= L;
    const bool columns = channels_adjacent(p.x) && channels_adjacent(p.y) && channels_adjacent(p.grad) && p.C >= L;
    S* const out = static_cast<S*>(p.sums);
    const S* const h = static_cast<const S*>(p.h);
    if (columns && !rows) {
      // A task: a frame, or a few rows of it; with sums a frame, or a range of its channels that has a few pages' worth
      // of sums.
      const bool by_rows = !sums(Pass);
      const int64_t row_bytes = max_of<int64_t>(1, p.W * p.C * static_cast<int64_t>(sizeof(T)));
      const int64_t at_most = max_of<int64_t>(1, task_bytes(p.N * p.T * p.H * row_bytes, parallel) / row_bytes);
      const int64_t chunks = max_of<int64_t>(1, by_rows ? (p.H + at_most - 1) / at_most : p.C / 512);
      const int64_t rows_per_task = (p.H + chunks - 1) / chunks;
      run(parallel, p.N * p.T * chunks, [&](int64_t task) {
        const int64_t n = task / chunks / p.T, t = task / chunks % p.T, chunk = task % chunks, at = (n * p.T + t) * p.C;
        const int64_t c0 = by_rows ? 0 : chunk * 512, c1 = by_rows || chunk + 1 == chunks ? p.C : c0 + 512;
        const int64_t i0 = by_rows ? chunk * rows_per_task : 0, i1 = by_rows ? min_of(i0 + rows_per_task, p.H) : p.H;
        const int64_t count = c1 - c0;
        S* const factors = static_cast<S*>(scratch(1, static_cast<size_t>(3 * count + L) * sizeof(S)));
        S* const sum = factors + count + L;
        if constexpr (Pass != GatePass::squeeze) {
          if (open(p, n))
            take_factors(h + at + c0, count, factors);
          else
            for (int64_t c = 0; c < count + L; ++c) factors[c] = neutral<Pass>();
        }
        channels<Pass>(p, n, t, c0, c1, i0, i1, factors, sum);
        if constexpr (sums(Pass)) write_sums<Pass>(p, sum, n, count, out + at + c0);
      });
      return;
    }
    // A few planes per task; all of them where they are fewer numbers than waking a thread is worth.
    const int64_t all = p.N * p.C * p.T, plane_bytes = positions * static_cast<int64_t>(sizeof(T)) + 1;
    const int64_t per_task = all * positions <= 32768
                                 ? max_of<int64_t>(1, all)
                                 : max_of<int64_t>(1, task_bytes(all * plane_bytes, parallel) / plane_bytes);
    const auto ranges = [&](const auto& function) {
      run(parallel, (all + per_task - 1) / per_task,
          [&](int64_t task) { function(p, task * per_task, min_of((task + 1) * per_task, all)); });
    };
    if (!rows) return ranges(scattered_planes<Pass>);
    if constexpr (Pass == GatePass::squeeze) {
      // What comes from memory comes from several pages at once, where one stream may wait at every page's end; but a
      // clip that the caches may hold is read up to 1.2 times as fast in one stream (Zen 4), and of small planes several
      // are in a page.
      if (positions >= 128 && all * plane_bytes > 64 << 20) return ranges(means_of_ranges);
    }
    if constexpr (!sums(Pass)) {
      const auto follow = [&](const View& v) {
        return v.t == positions && v.c == p.T * positions && (p.N == 1 || v.n == p.C * v.c);
      };
      if (positions >= 2 * L && positions < 128 && follow(p.x) && follow(p.y)) return ranges(planes_in_a_run<Pass>);
    }
    ranges(planes<Pass>);
  }

  static void run_task(const GateData& p, const Parallel& parallel) {
    switch (p.pass) {
      case GatePass::squeeze: return run_pass<GatePass::squeeze>(p, parallel);
      case GatePass::mul: return run_pass<GatePass::mul>(p, parallel);
      case GatePass::add: return run_pass<GatePass::add>(p, parallel);
      case GatePass::backward: return run_pass<GatePass::backward>(p, parallel);
    }
  }
};

// Numbers of 16 bits; any up to fp32.
template <class V>
static void gate_narrow(const GateData& p, const Parallel& parallel) {
  if (p.dtype == DType::bf16) return GateTask<V, bf16_t>::run_task(p, parallel);
  GateTask<V, f16_t>::run_task(p, parallel);
}
template <class V>
static void gate_any(const GateData& p, const Parallel& parallel) {
  if (p.dtype == DType::f32) return GateTask<V, float>::run_task(p, parallel);
  gate_narrow<V>(p, parallel);
}
