// recurrent_conv_batch_norm on vector units: the passes around the scans, the body of every instruction set. Included
// as recurrent_conv_core.h is, after scalar.h and the vector types.
//
// Layout.   Three forms, chosen by the strides of all tensors of the pass together:
//             planes    positions adjacent: a part is up to 4096 positions of one (sample, channel), of all frames
//                       where those follow each other, else of one frame; vectors along positions
//             channels  channels adjacent: a part is as many rows [W][C] as fill 128 KB (at least one); vectors along
//             channels numbers   anything else: a part is a frame of one (sample, channel), number by number
// Owner.    One task per part, or per run of small ones. A part's sums go to partial[part][2] (planes, numbers: parts
//           of a channel adjacent) or partial[part][C][2], in fp64; each channel's are added up by one task.
// Order.    Within a part by lanes, then lanes, then parts in ascending order: the sizes and the layout alone decide
//           it, not the number of threads. A part's moments are its mean first and deviations from that mean after it,
//           from the nearest cache, and combine as such: a large mean costs the variance nothing.
// Scratch.  Slot 0: the partial sums and five numbers per channel; slot 1: a part's sums along channels.
// Bound.    Bytes: moments reads h; normalize reads h (and the residual), writes y; sums reads h and grad (and y, and
//           writes dz); gradient reads h and grad, writes one. A handful of FLOP per number.

template <class V, class T>
struct NormTask {
  using S = typename V::S;
  using R = typename V::R;
  static constexpr int L = V::L;
  static constexpr int64_t plane_part = 4096, channels_part = 128 * 1024, run_elements = 16384, together = 16;
  enum class Form { planes, channels, numbers };

  const Norm& p;
  Form form;
  int64_t positions = 0, frames = 0;  // of one plane; planes per (sample, channel)
  int64_t parts = 0, part_size = 0;   // per channel (or of all); positions (or rows) of one
  int64_t per_plane = 1, padded = 0;  // parts per plane; channels rounded up to whole vectors
  S *mean = nullptr, *scale = nullptr, *shift = nullptr, *slope = nullptr, *offset = nullptr;  // [padded]
  double* partial = nullptr;

  explicit NormTask(const Norm& problem) : p(problem) {
    bool planar = true, merged = true, by_channel = true;
    const View* const views[] = {&p.h, &p.other, &p.y, &p.out};
    for (const View* v : views) {
      if (!v->data) continue;
      planar &= (v->w == 1 || p.W == 1) && (v->h == p.W || p.H == 1);
      merged &= v->t == p.H * p.W || p.T == 1;
      by_channel &= v->c == 1;
    }
    // A tensor may be both, with one channel or one position: then the longer runs.
    form = by_channel && (!planar || p.C > p.H * p.W) ? Form::channels : planar ? Form::planes : Form::numbers;
    padded = round_up(p.C, L);
    if (form == Form::channels) {
      const int64_t row = p.W * p.C * static_cast<int64_t>(sizeof(T));
      part_size = max_of<int64_t>(channels_part / row, 1);
      parts = (p.N * p.T * p.H + part_size - 1) / part_size;
    } else {
      const bool whole = form == Form::planes && merged;
      frames = whole ? 1 : p.T;
      positions = (whole ? p.T : 1) * p.H * p.W;
      part_size = form == Form::planes ? plane_part : positions;
      per_plane = (positions + part_size - 1) / part_size;
      parts = p.N * frames * per_plane;
    }
  }

  bool reduces() const { return p.pass == NormPass::moments || p.pass == NormPass::sums; }

  // ---- what is computed of one number, or of L of them

  struct Channel {
    R mean, scale, shift, slope, offset;
  };
  Channel broadcast(int64_t c) const {
    return {V::set1(mean[c]), V::set1(scale[c]), V::set1(shift[c]), V::set1(slope[c]), V::set1(offset[c])};
  }
  Channel of_lanes(int64_t c) const {
    return {V::load(mean + c), V::load(scale + c), V::load(shift + c), V::load(slope + c), V::load(offset + c)};
  }

  // dz: `grad` where ReLU let it through. What is not a number passes, as in ReLU's own gradient.
  R through_relu(R grad, R deviation, const T* y, const Channel& k) const {
    if (!p.relu) return grad;
    const R z = y ? V::load(y) : V::fma(deviation, k.scale, k.shift);
    const R zero = V::set1(0);
    return V::less(zero, z, grad, V::less(z, V::set1(1), zero, grad));
  }

  // L numbers at h (and other, y, out); adds to a and b what the pass sums up.
  void numbers_at(const T* h, const T* other, T* y, T* out, const Channel& k, R& a, R& b) const {
    const R deviation = V::load(h) - k.mean;
    if (p.pass == NormPass::normalize) {
      R z = V::fma(deviation, k.scale, k.shift);
      if (other) z = z + V::load(other);
      V::store(y, p.relu ? V::relu(z) : z);
      return;
    }
    const R dz = through_relu(V::load(other), deviation, y, k);
    if (p.pass == NormPass::sums) {
      a = a + dz;
      b = V::fma(dz, deviation, b);
      if (out) V::store(out, dz);
    } else {
      V::store(out, V::fma(k.scale, dz, V::fma(k.slope, deviation, k.offset)));
    }
  }

  // The same for fewer than L: through copies. What is beyond them is zero, and adds nothing to the sums.
  void few_at(int64_t count, const T* h, const T* other, T* y, T* out, const Channel& k, R& a, R& b) const {
    T copies[4][L] = {};
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    memcpy(copies[0], h, bytes);
    if (other) memcpy(copies[1], other, bytes);
    const bool reads_y = y && p.pass != NormPass::normalize;
    if (reads_y) memcpy(copies[2], y, bytes);
    numbers_at(copies[0], other ? copies[1] : nullptr, y ? copies[2] : nullptr, out ? copies[3] : nullptr, k, a, b);
    if (y && !reads_y) memcpy(y, copies[2], bytes);
    if (out) memcpy(out, copies[3], bytes);
  }

  template <class Element>
  static Element* at(const View& v, int64_t offset) {
    return v.data ? static_cast<Element*>(v.data) + offset : nullptr;
  }

  // ---- planes

  void plane_moments(const T* h, int64_t count, double* to) const {
    R acc[4] = {};
    int64_t i = 0;
    for (; i + 4 * L <= count; i += 4 * L)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) acc[k] = acc[k] + V::load(h + i + k * L);
    for (; i + L <= count; i += L) acc[0] = acc[0] + V::load(h + i);
    double sum = V::sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
    const int64_t vectors = i;
    for (; i < count; ++i) sum += to_double(h[i]);
    const S center = static_cast<S>(sum / static_cast<double>(count));
    const R centers = V::set1(center);
    R first[4] = {}, second[4] = {};
    const auto step = [&](int64_t from, int k) {
      const R deviation = V::load(h + from) - centers;
      first[k] = first[k] + deviation;
      second[k] = V::fma(deviation, deviation, second[k]);
    };
    for (i = 0; i + 4 * L <= count; i += 4 * L)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) step(i + k * L, k);
    for (; i < vectors; i += L) step(i, 0);
    double rest = V::sum((first[0] + first[1]) + (first[2] + first[3]));
    double squares = V::sum((second[0] + second[1]) + (second[2] + second[3]));
    for (; i < count; ++i) {
      const double deviation = to_double(h[i]) - static_cast<double>(center);
      rest += deviation, squares += deviation * deviation;
    }
    corrected(static_cast<double>(center), rest, squares, static_cast<double>(count), to);
  }

  // Moments of a part from the deviations from a center near its mean: what rounding did to the center is taken out
  // again.
  static void corrected(double center, double deviations, double squares, double count, double* to) {
    to[0] = center + deviations / count;
    to[1] = squares - deviations * (deviations / count);
  }

  void plane(int64_t c, int64_t part) const {
    const int64_t piece = part % per_plane, frame = part / per_plane % frames, n = part / per_plane / frames;
    const int64_t begin = piece * part_size, count = min_of(part_size, positions - begin);
    const auto offset_of = [&](const View& v) { return n * v.n + c * v.c + frame * v.t + begin; };
    double* to = partial + (c * parts + part) * 2;
    const T* h = at<const T>(p.h, offset_of(p.h));
    if (p.pass == NormPass::moments) return plane_moments(h, count, to);
    const T* other = at<const T>(p.other, offset_of(p.other));
    T *y = at<T>(p.y, offset_of(p.y)), *out = at<T>(p.out, offset_of(p.out));
    const Channel k = broadcast(c);
    const auto beyond = [](auto* base, int64_t i) { return base ? base + i : nullptr; };
    R a[4] = {}, b[4] = {};
    int64_t i = 0;
    for (; i + 4 * L <= count; i += 4 * L)
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        const int64_t from = i + u * L;
        numbers_at(h + from, beyond(other, from), beyond(y, from), beyond(out, from), k, a[u], b[u]);
      }
    for (; i + L <= count; i += L) numbers_at(h + i, beyond(other, i), beyond(y, i), beyond(out, i), k, a[0], b[0]);
    if (i < count) few_at(count - i, h + i, beyond(other, i), beyond(y, i), beyond(out, i), k, a[1], b[1]);
    if (p.pass != NormPass::sums) return;
    to[0] = V::sum((a[0] + a[1]) + (a[2] + a[3]));
    to[1] = V::sum((b[0] + b[1]) + (b[2] + b[3]));
  }

  // ---- channels

  // Calls visit(offset of the position in h, in other, in y, in out) for every position of a part.
  template <class Visit>
  void for_positions(int64_t part, Visit visit) const {
    const int64_t begin = part * part_size, end = min_of(begin + part_size, p.N * p.T * p.H);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t y = row % p.H, t = row / p.H % p.T, n = row / p.H / p.T;
      const auto offset_of = [&](const View& v) { return n * v.n + t * v.t + y * v.h; };
      int64_t h = offset_of(p.h), other = offset_of(p.other), of_y = offset_of(p.y), out = offset_of(p.out);
      for (int64_t w = 0; w < p.W; ++w, h += p.h.w, other += p.other.w, of_y += p.y.w, out += p.out.w)
        visit(h, other, of_y, out);
    }
  }
  int64_t positions_of(int64_t part) const { return (min_of(part_size, p.N * p.T * p.H - part * part_size)) * p.W; }

  static R load_lanes(const T* from, int64_t few) {
    if (!few) return V::load(from);
    T copy[L] = {};
    memcpy(copy, from, static_cast<size_t>(few) * sizeof(T));
    return V::load(copy);
  }

  // Where a few positions are, in h, other, y and out.
  struct Rows {
    int64_t count = 0, h[together], other[together], y[together], out[together];
  };
  // Calls visit(Rows) for a part's positions, some at a time: their channels are read as they follow one another, and what
  // is summed up comes and goes once for all of them.
  template <class Visit>
  void for_rows(int64_t part, Visit visit) const {
    Rows rows;
    for_positions(part, [&](int64_t h, int64_t other, int64_t y, int64_t out) {
      const int64_t i = rows.count++;
      rows.h[i] = h, rows.other[i] = other, rows.y[i] = y, rows.out[i] = out;
      if (rows.count == together) visit(rows), rows.count = 0;
    });
    if (rows.count) visit(rows);
  }

  // Calls visit(vectors, c, few) for all channels: `vectors`, a constant, from channel c on; few: only so many numbers
  // of the one vector exist.
  template <class Visit>
  void for_channels(Visit visit) const {
    constexpr int M = 4;
    int64_t c = 0;
    for (; c + M * L <= p.C; c += M * L) visit(std::integral_constant<int, M>(), c, int64_t(0));
    for (; c + L <= p.C; c += L) visit(std::integral_constant<int, 1>(), c, int64_t(0));
    if (c < p.C) visit(std::integral_constant<int, 1>(), c, p.C - c);
  }
  template <int M>
  static void load_all(R (&to)[M], const S* from) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) to[m] = V::load(from + m * L);
  }
  template <int M>
  static void store_all(S* to, const R (&from)[M]) {
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) V::store(to + m * L, from[m]);
  }

  // center, rest, squares: [padded] each.
  void channel_moments(int64_t part, S* center, S* rest, S* squares) const {
    const T* const base = static_cast<const T*>(p.h.data);
    const double count = static_cast<double>(positions_of(part));
    for_rows(part, [=, this](const Rows& rows) {
      for_channels([&](auto vectors, int64_t c, int64_t few) {
        constexpr int M = decltype(vectors)::value;
        R sum[M];
        load_all(sum, center + c);
        for (int64_t i = 0; i < rows.count; ++i)
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) sum[m] = sum[m] + load_lanes(base + rows.h[i] + c + m * L, few);
        store_all(center + c, sum);
      });
    });
    for (int64_t c = 0; c < p.C; c += L) V::store(center + c, V::load(center + c) * V::set1(static_cast<S>(1 / count)));
    for_rows(part, [=, this](const Rows& rows) {
      for_channels([&](auto vectors, int64_t c, int64_t few) {
        constexpr int M = decltype(vectors)::value;
        R from[M], a[M], b[M];
        load_all(from, center + c), load_all(a, rest + c), load_all(b, squares + c);
        for (int64_t i = 0; i < rows.count; ++i)
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m) {
            const R deviation = load_lanes(base + rows.h[i] + c + m * L, few) - from[m];
            a[m] = a[m] + deviation;
            b[m] = V::fma(deviation, deviation, b[m]);
          }
        store_all(rest + c, a), store_all(squares + c, b);
      });
    });
    double* const to = partial + part * p.C * 2;
    for (int64_t c = 0; c < p.C; ++c) corrected(center[c], rest[c], squares[c], count, to + 2 * c);
  }

  // first, second: [padded] each.
  void channel_sums(int64_t part, S* first, S* second) const {
    const T *h0 = at<const T>(p.h, 0), *other0 = at<const T>(p.other, 0);
    T *y0 = at<T>(p.y, 0), *out0 = at<T>(p.out, 0);
    for_rows(part, [=, this](const Rows& rows) {
      for_channels([&](auto vectors, int64_t c, int64_t few) {
        constexpr int M = decltype(vectors)::value;
        const auto from = [](auto* base, int64_t i) { return base ? base + i : nullptr; };
        Channel k[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) k[m] = of_lanes(c + m * L);
        R a[M], b[M];
        load_all(a, first + c), load_all(b, second + c);
        for (int64_t i = 0; i < rows.count; ++i) {
          const T *h = h0 + rows.h[i] + c, *other = other0 + rows.other[i] + c;
          T *y = from(y0, rows.y[i] + c), *out = from(out0, rows.out[i] + c);
#pragma GCC unroll 4
          for (int m = 0; m < M; ++m)
            few ? few_at(few, h, other, y, out, k[m], a[m], b[m])
                : numbers_at(h + m * L, other + m * L, from(y, m * L), from(out, m * L), k[m], a[m], b[m]);
        }
        store_all(first + c, a), store_all(second + c, b);
      });
    });
    double* const to = partial + part * p.C * 2;
    for (int64_t c = 0; c < p.C; ++c) to[2 * c] = first[c], to[2 * c + 1] = second[c];
  }

  void channels(int64_t part) const {
    if (reduces()) {
      S* const sums = static_cast<S*>(scratch(1, static_cast<size_t>(3 * padded) * sizeof(S)));
      memset(static_cast<void*>(sums), 0, static_cast<size_t>(3 * padded) * sizeof(S));
      p.pass == NormPass::moments ? channel_moments(part, sums, sums + padded, sums + 2 * padded)
                                  : channel_sums(part, sums, sums + padded);
      return;
    }
    const T *h0 = at<const T>(p.h, 0), *other0 = at<const T>(p.other, 0);
    T *y0 = at<T>(p.y, 0), *out0 = at<T>(p.out, 0);
    // By value and inline: behind references all would be fetched again for every position.
    for_positions(part, [=, this](int64_t h, int64_t other, int64_t y, int64_t out) __attribute__((always_inline)) {
      const auto from = [](auto* base, int64_t i) { return base ? base + i : nullptr; };
      R none{};
      int64_t c = 0;
      for (; c + L <= p.C; c += L)
        numbers_at(h0 + h + c, from(other0, other + c), from(y0, y + c), from(out0, out + c), of_lanes(c), none, none);
      if (c < p.C)
        few_at(p.C - c, h0 + h + c, from(other0, other + c), from(y0, y + c), from(out0, out + c), of_lanes(c), none,
               none);
    });
  }

  // ---- numbers

  void numbers(int64_t c, int64_t part) const {
    const int64_t t = part % p.T, n = part / p.T;
    double* to = partial + (c * parts + part) * 2;
    const auto offset_of = [&](const View& v, int64_t i, int64_t j) {
      return n * v.n + c * v.c + t * v.t + i * v.h + j * v.w;
    };
    const auto for_all = [&](auto visit) {
      for (int64_t i = 0; i < p.H; ++i)
        for (int64_t j = 0; j < p.W; ++j) visit(i, j);
    };
    const T* h = static_cast<const T*>(p.h.data);
    if (p.pass == NormPass::moments) {
      double sum = 0, squares = 0;
      for_all([&](int64_t i, int64_t j) { sum += to_double(h[offset_of(p.h, i, j)]); });
      const double center = sum / static_cast<double>(p.H * p.W);
      for_all([&](int64_t i, int64_t j) {
        const double deviation = to_double(h[offset_of(p.h, i, j)]) - center;
        squares += deviation * deviation;
      });
      to[0] = center, to[1] = squares;
      return;
    }
    const Channel k = broadcast(c);
    R a{}, b{};
    for_all([&](int64_t i, int64_t j) {
      few_at(1, h + offset_of(p.h, i, j), at<const T>(p.other, offset_of(p.other, i, j)),
             at<T>(p.y, offset_of(p.y, i, j)), at<T>(p.out, offset_of(p.out, i, j)), k, a, b);
    });
    if (p.pass == NormPass::sums) to[0] = V::sum(a), to[1] = V::sum(b);
  }

  // ---- all

  void find_constants() {
    const S *given = static_cast<const S*>(p.moments), *gamma = static_cast<const S*>(p.gamma),
            *beta = static_cast<const S*>(p.beta), *sums = static_cast<const S*>(p.sums);
    for (int64_t c = 0; c < p.C; ++c) {
      const double count = max_of<double>(given[2 * p.C + c], 1);
      const double inverse = 1 / sqrt(static_cast<double>(given[p.C + c]) / count + p.eps);
      const double by = gamma ? inverse * static_cast<double>(gamma[c]) : inverse;
      mean[c] = given[c];
      scale[c] = static_cast<S>(by);
      shift[c] = beta ? beta[c] : S(0);
      if (!sums) continue;
      slope[c] = static_cast<S>(-by * inverse * static_cast<double>(sums[p.C + c]) / count);
      offset[c] = static_cast<S>(-by * static_cast<double>(sums[c]) / count);
    }
  }

  // The number of values in a part.
  double count_of(int64_t part) const {
    if (form == Form::channels) return static_cast<double>(positions_of(part));
    return static_cast<double>(min_of(part_size, positions - part % per_plane * part_size));
  }

  void finish(int64_t c) const {
    const bool by_part = form == Form::channels;
    const double* from = partial + (by_part ? c : c * parts) * 2;
    const int64_t step = by_part ? 2 * p.C : 2;
    S* result = static_cast<S*>(p.result);
    if (p.pass == NormPass::sums) {
      double a = 0, b = 0;
      for (int64_t i = 0; i < parts; ++i) a += from[i * step], b += from[i * step + 1];
      const S* given = static_cast<const S*>(p.moments);
      const double variance = static_cast<double>(given[p.C + c]) / max_of<double>(given[2 * p.C + c], 1);
      result[c] = static_cast<S>(a);
      result[p.C + c] = static_cast<S>(b / sqrt(variance + p.eps));
      return;
    }
    const double total = static_cast<double>(p.N * p.T * p.H * p.W);
    double center = 0, squares = 0;
    for (int64_t i = 0; i < parts; ++i) center += count_of(i) * from[i * step];
    center /= max_of<double>(total, 1);
    for (int64_t i = 0; i < parts; ++i) {
      const double apart = from[i * step] - center;
      squares += from[i * step + 1] + count_of(i) * apart * apart;
    }
    result[c] = static_cast<S>(center);
    result[p.C + c] = static_cast<S>(squares);
    result[2 * p.C + c] = static_cast<S>(total);
  }

  template <class Function>
  static void run(const Parallel& parallel, int64_t count, const Function& function) {
    if (count == 0) return;
    parallel.run(
        parallel.pool, count, [](void* context, int64_t i) { (*static_cast<const Function*>(context))(i); },
        const_cast<void*>(static_cast<const void*>(&function)));
  }

  static void run_task(const Norm& problem, const Parallel& parallel) {
    NormTask task(problem);
    const Norm& p = problem;
    if (p.N * p.T * p.H * p.W == 0) task.parts = 0;
    const int64_t sums = task.reduces() ? 2 * p.C * task.parts : 0;
    char* memory = static_cast<char*>(
        scratch(0, static_cast<size_t>(sums) * sizeof(double) + static_cast<size_t>(5 * task.padded) * sizeof(S)));
    task.partial = reinterpret_cast<double*>(memory);
    S* constants = reinterpret_cast<S*>(task.partial + sums);
    memset(static_cast<void*>(constants), 0, static_cast<size_t>(5 * task.padded) * sizeof(S));
    S** const tables[] = {&task.mean, &task.scale, &task.shift, &task.slope, &task.offset};
    for (S** table : tables) *table = constants, constants += task.padded;
    if (p.pass != NormPass::moments) task.find_constants();
    if (task.form == Form::channels) {
      run(parallel, task.parts, [&](int64_t part) { task.channels(part); });
    } else {
      const int64_t all = p.C * task.parts, size = min_of(task.part_size, max_of<int64_t>(task.positions, 1));
      const int64_t together = max_of<int64_t>(run_elements / size, 1);
      run(parallel, (all + together - 1) / together, [&](int64_t index) {
        for (int64_t i = index * together; i < min_of(all, (index + 1) * together); ++i)
          task.form == Form::planes ? task.plane(i / task.parts, i % task.parts)
                                    : task.numbers(i / task.parts, i % task.parts);
      });
    }
    if (!task.reduces()) return;
    constexpr int64_t channels_together = 16;
    run(parallel, (p.C + channels_together - 1) / channels_together, [&](int64_t index) {
      for (int64_t c = index * channels_together; c < min_of(p.C, (index + 1) * channels_together); ++c) task.finish(c);
    });
  }
};

void batch_norm(const Norm& p, const Parallel& parallel) {
  switch (p.dtype) {
#ifndef RCU_OPS_NO_F64
    case DType::f64: return NormTask<Doubles, double>::run_task(p, parallel);
#endif
    case DType::f32: return NormTask<Floats, float>::run_task(p, parallel);
    case DType::bf16: return NormTask<Floats, bf16_t>::run_task(p, parallel);
    default: return NormTask<Floats, f16_t>::run_task(p, parallel);
  }
}
