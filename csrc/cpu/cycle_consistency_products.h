// Distances of long sequences by products, |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, where that is right, and by differences
// where it is not. Included by cycle_consistency_core.h.
//
// Products. One multiply-add per number instead of a subtraction and a multiply-add, on data centred at the mean of all
// frames.
// Settled.  So every distance comes with a bound, and those that cannot stand (common/cycle_consistency_products.h) are
//           computed again, from the frames as they were given. Where that is more than one pair in sixteen, the whole
//           block is.
// Nearest.  |soft - b_i| >= |a - b_i| - |a - soft|, and the last is one number per query: no frame is nearer to the
//           soft neighbour than the most probable one whose distance to the query exceeds |a - soft| + |soft -
//           b_likely|. What that leaves is usually one frame, even from a soft neighbour made of the largest weights
//           alone, with a bound on what the others add; then from all weights, comparing a few by differences. Where it
//           leaves many, products with the soft neighbour and their bound leave a few.
// Flat.     Where more than half of the keys have weight in a block, all are added up, around the mean of all frames:
//           one multiply-add per number, and no more rounding than around the soft neighbour unless that is far from
//           the mean for the spread of what it is made of, which is measured. The soft neighbours of a block are then
//           often so close to each other that products with the first of them will do.
// Order.    As elsewhere. Which way a pair goes depends on its query's block and on the pair's own numbers: equal keys
//           go the same way and have equal distances.

// The bounds of sums of C terms in parts.
template <class S>
static Rounding<S> rounding_of(int64_t C) {
  const int64_t part = part_of(C), steps = part + (C + part - 1) / part + 1;
  return Rounding<S>(C, steps, steps);
}

// d[m * pitch + i] = |q_m|^2 + |k_i|^2 - 2 q_m.k_i for P panels of keys; q: [channel][q_step], M numbers each.
template <class V, int P, int M>
static void multiply_panels(const typename V::S* q, int64_t q_step, const typename V::S* q_sizes,
                            const typename V::S* keys, const typename V::S* key_sizes, int64_t C, typename V::S* d,
                            int64_t pitch) {
  using S = typename V::S;
  using R = typename V::R;
  constexpr int L = V::L;
  const int64_t step = part_of(C);
  R total[P][M] = {};
  for (int64_t c0 = 0; c0 < C; c0 += step) {
    const int64_t end = min_of(c0 + step, C);
    R acc[P][M] = {};
    for (int64_t c = c0; c < end; ++c) {
      R key[P];
#pragma GCC unroll 4
      for (int k = 0; k < P; ++k) key[k] = V::load(keys + (k * C + c) * L);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const R query = q[c * q_step + m] - R{};  // to all lanes: x - 0 is x, while x + 0 would be computed
#pragma GCC unroll 4
        for (int k = 0; k < P; ++k) acc[k][m] += query * key[k];
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int k = 0; k < P; ++k) total[k][m] += acc[k][m];
  }
  for (int k = 0; k < P; ++k) {
    const R sizes = V::load(key_sizes + k * L);
    for (int m = 0; m < M; ++m) V::store(d + m * pitch + k * L, (q_sizes[m] + sizes) - S(2) * total[k][m]);
  }
}

// Beyond the last frame distances are infinite.
template <class V>
static void mark_end(typename V::S* d, int64_t count) {
  for (int64_t i = count; i < round_up(count, V::L); ++i) d[i] = static_cast<typename V::S>(__builtin_inf());
}

// M queries, q: [channel][q_step], their squared norms, and where their distances go: [M][pitch].
template <class S>
struct Queries {
  const S* q;
  int64_t q_step;
  const S* sizes;
  S* d;
};

// Distances of `count` blocks of queries, `queries(k)`, to all keys: a few panels of keys at a time, for every block.
template <class V, int M = V::M, class Of>
static void distances_by_products(const Frames<typename V::S>& keys, int64_t C, int64_t pitch, int64_t count,
                                  const Of& queries) {
  using S = typename V::S;
  // Enough chains to hide an addition's latency, and registers for them.
  constexpr int L = V::L, P = M == 1 ? 4 : vector_bytes == 64 ? 2 : 1;
  const int64_t panels = (keys.count + L - 1) / L;
  int64_t i = 0;
  for (; i + P <= panels; i += P)
    for (int64_t k = 0; k < count; ++k) {
      const Queries<S> of = queries(k);
      multiply_panels<V, P, M>(of.q, of.q_step, of.sizes, keys.centred + i * L * C, keys.sizes + i * L, C, of.d + i * L,
                               pitch);
    }
  for (; i < panels; ++i)
    for (int64_t k = 0; k < count; ++k) {
      const Queries<S> of = queries(k);
      multiply_panels<V, 1, M>(of.q, of.q_step, of.sizes, keys.centred + i * L * C, keys.sizes + i * L, C, of.d + i * L,
                               pitch);
    }
  for (int64_t k = 0; k < count; ++k)
    for (int m = 0; m < M; ++m) mark_end<V>(queries(k).d + m * pitch, keys.count);
}

template <class V>
static void mean_of_frames(const Sizes& s, const Frames<typename V::S>& a, const Frames<typename V::S>& b,
                           typename V::S* mean) {
  using S = typename V::S;
  using R = typename V::R;
  const S share = S(1) / static_cast<S>(max_of<int64_t>(a.count + b.count, 1));
  for (int64_t c = 0; c < s.C; c += V::L) {
    R sums[4] = {};  // as many chains as hide an addition's latency
    for (const Frames<S>* f : {&a, &b}) {
      const S* const row = f->rows + c;
      int64_t t = 0;
      for (; t + 4 <= f->count; t += 4)
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) sums[k] += V::load(row + (t + k) * s.C) * share;
      for (; t < f->count; ++t) sums[0] += V::load(row + t * s.C) * share;
    }
    V::store(mean + c, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

// Panels minus the mean of all frames, and the squared norms of what remains, added up in fp64.
template <class V>
static void centre_frames(int64_t C, Frames<typename V::S>& f, const typename V::S* mean) {
  using S = typename V::S;
  constexpr int L = V::L;
  for (int64_t t0 = 0; t0 < f.count; t0 += L) {
    double sizes[L] = {};
    for (int64_t c = 0; c < C; ++c) {
      const S* from = f.panels + t0 * C + c * L;
      S* to = f.centred + t0 * C + c * L;
      for (int l = 0; l < L; ++l) to[l] = from[l] - mean[c];
      for (int l = 0; l < L; ++l) sizes[l] += static_cast<double>(to[l]) * static_cast<double>(to[l]);
    }
    for (int l = 0; l < L; ++l) {
      f.sizes[t0 + l] = static_cast<S>(sizes[l]);
      if (t0 + l < f.count) f.largest_size = max_of(f.largest_size, f.sizes[t0 + l]);
    }
  }
}

// |a - b|^2 of two rows, and |(b - centre) - rest|^2.
template <class V>
static typename V::S row_distance(const typename V::S* a, const typename V::S* b, int64_t Cp) {
  using R = typename V::R;
  R acc[2] = {};
  for (int64_t c = 0; c < Cp; c += V::L) {
    const R difference = V::load(a + c) - V::load(b + c);
    acc[c / V::L % 2] += difference * difference;
  }
  return V::sum(acc[0] + acc[1]);
}
template <class V>
static typename V::S row_distance_to_soft(const typename V::S* b, const typename V::S* centre,
                                          const typename V::S* rest, int64_t Cp) {
  using R = typename V::R;
  R acc[2] = {};
  for (int64_t c = 0; c < Cp; c += V::L) {
    const R difference = (V::load(b + c) - V::load(centre + c)) - V::load(rest + c);
    acc[c / V::L % 2] += difference * difference;
  }
  return V::sum(acc[0] + acc[1]);
}

// Places i in [0, count) where `condition(R d, R bound, R& keep)` holds on any lane, at most `most` of them; -1 if
// there are more.
template <class V, class Condition>
static int64_t places_where(const typename V::S* d, typename V::S size, const typename V::S* sizes, int64_t count,
                            typename V::S bound, typename V::S least, int64_t most, int64_t* list,
                            const Condition& condition) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; i += V::L) {
    const typename V::R value = V::load(d + i);
    uint32_t lanes = V::lanes(condition(value, (size + V::load(sizes + i)) * bound + least));
    if (count - i < V::L) lanes &= (uint32_t(1) << (count - i)) - 1;
    for (; lanes; lanes &= lanes - 1) {
      if (found == most) return -1;
      list[found++] = i + __builtin_ctz(lanes);
    }
  }
  return found;
}

// The smallest upper end of the distances' bounds.
template <class V>
static typename V::S smallest_end(const typename V::S* d, typename V::S size, const typename V::S* sizes, int64_t count,
                                  const Rounding<typename V::S>& rounding) {
  using S = typename V::S;
  using R = typename V::R;
  R smallest = R{} + static_cast<S>(__builtin_inf());
  for (int64_t i = 0; i < count; i += V::L) {  // beyond the last frame distances are infinite
    const R high = V::load(d + i) + ((size + V::load(sizes + i)) * rounding.products + rounding.least);
    smallest = high < smallest ? high : smallest;
  }
  S end = smallest[0];
  for (int l = 1; l < V::L; ++l) end = min_of<S>(end, smallest[l]);
  return end;
}

// The distances of one row that need it are computed again. Returns how many, -1 if more than `most`.
template <class V>
static int64_t settle_row(typename V::S* d, const typename V::S* query, typename V::S size,
                          const Frames<typename V::S>& b, int64_t Cp, const Rounding<typename V::S>& rounding,
                          typename V::S sharpness, bool moments, int64_t most, int64_t* list) {
  using S = typename V::S;
  using R = typename V::R;
  const S largest = (size + b.largest_size) * rounding.products + rounding.least;
  const Settling<S> settling(rounding, smallest_end<V>(d, size, b.sizes, b.count, rounding), largest, sharpness,
                             b.count, moments);
  const int64_t found =
      places_where<V>(d, size, b.sizes, b.count, rounding.products, rounding.least, most, list, [&](R value, R bound) {
        return (value - bound <= settling.reach) &
               !((bound <= settling.allowed * value) | (bound * sharpness <= settling.flat));
      });
  for (int64_t i = 0; i < found; ++i) d[list[i]] = row_distance<V>(query, b.rows + list[i] * Cp, Cp);
  return found;
}

// Makes d[m * pitch + i] of M queries, which come from products, right wherever it matters; see "Settled". `moments`:
// as in Settling. `list`: room for b.count places. Returns whether they come from products still.
template <class V>
static bool settle_block(const Sizes& s, int64_t C, const Sample<typename V::S>& sample, const Frames<typename V::S>& a,
                         const Frames<typename V::S>& b, int64_t t0, bool moments, typename V::S* d, int64_t* list) {
  constexpr int M = V::M;
  const Rounding<typename V::S> rounding = rounding_of<typename V::S>(C);
  const int rows = static_cast<int>(min_of<int64_t>(M, a.count - t0));
  int64_t left = max_of<int64_t>(4 * M, M * b.count / 16);
  for (int m = 0; m < rows; ++m) {
    const int64_t found = settle_row<V>(d + m * s.pitch, a.rows + (t0 + m) * s.C, a.sizes[t0 + m], b, s.C, rounding,
                                        sample.sharpness, moments, left, list);
    if (found < 0) {
      distances<V>(OfPanel<V>(a.panels, t0, C), b.panels, b.count, C, d, s.pitch);
      return false;
    }
    left -= found;
  }
  return true;
}

// Frames that are compared by differences at once.
static constexpr int64_t most_compared = 16;

// A block of queries whose nearest frames are sought: `rows` of them from t0 on, their distances d (settled ones of
// products, or differences), the most probable frames, and the soft neighbours, as the block's centre and rest.
// found[m]: -2 while it is not known.
template <class V>
struct Nearest {
  using S = typename V::S;
  using R = typename V::R;
  static constexpr int M = V::M;
  const Sizes& s;
  const int64_t C;
  const Sample<S>& sample;
  const Frames<S>&a, &b;
  const int64_t t0;
  const int rows;
  const bool products;
  const S* const d;
  const int64_t* const likely;
  const S *const centre, *const rest;
  int64_t *const list, *const found;
  const Rounding<S> rounding = rounding_of<S>(C);

  bool settled() const {
    for (int m = 0; m < rows; ++m)
      if (found[m] < -1) return false;
    return true;
  }

  void compare(int m, int64_t count) const {
    S best = static_cast<S>(__builtin_inf());
    found[m] = -1;
    for (int64_t i = 0; i < count; ++i) {
      const S distance = row_distance_to_soft<V>(b.rows + list[i] * s.C, centre + m * s.C, rest + m * s.C, s.C);
      if (distance < best) best = distance, found[m] = list[i];
    }
  }

  // By the triangle inequality, where that leaves at most `most` frames. slack[m]: how far the soft neighbour may be
  // from where it is said to be; only a single frame is a finding then.
  void by_distances(int64_t most, const double* slack) const {
    for (int m = 0; m < rows; ++m) {
      if (found[m] >= -1) continue;
      const auto to_soft = [&](const S* row) {
        return __builtin_sqrt(static_cast<double>(row_distance_to_soft<V>(row, centre + m * s.C, rest + m * s.C, s.C)));
      };
      const double away =
          to_soft(a.rows + (t0 + m) * s.C) + to_soft(b.rows + likely[m] * s.C) + (slack ? 2 * slack[m] : 0);
      // Roots and distances are good to far more than that.
      const S reach = static_cast<S>(1.001 * away * away) + rounding.least;
      const int64_t count = places_where<V>(
          d + m * s.pitch, a.sizes[t0 + m], b.sizes, b.count, rounding.products, rounding.least, most, list,
          [&](R value, R bound) { return value - (products ? bound : value * rounding.differences) <= reach; });
      if (count > 0) compare(m, count);
    }
  }

  // Soft neighbours of flat weights lie close together, and |soft_m - b| >= |point - b| - |point - soft_m|: by distances
  // from one point near them, where that leaves few frames. `size`: of the point, centred; apart(m): |point - soft_m|^2.
  template <class Apart>
  void by_point(const S* to_point, S size, const Apart& apart) const {
    const double high = smallest_end<V>(to_point, size, b.sizes, b.count, rounding);
    for (int m = 0; m < rows; ++m) {
      if (found[m] >= -1) continue;
      const double away = __builtin_sqrt(high) + 2 * __builtin_sqrt(static_cast<double>(apart(m)));
      const S reach = static_cast<S>(1.001 * away * away) + rounding.least;
      const int64_t count = places_where<V>(to_point, size, b.sizes, b.count, rounding.products, rounding.least,
                                            most_compared, list, [&](R v, R bound) { return v - bound <= reach; });
      if (count > 0) compare(m, count);
    }
  }

  // From the mean of all frames, which is the centre: those distances are known. to_mean: [pitch].
  void by_mean(S* to_mean) const {
    memcpy(to_mean, b.sizes, static_cast<size_t>(b.count) * sizeof(S));
    mark_end<V>(to_mean, b.count);
    by_point(to_mean, 0, [&](int m) {
      R squares{};
      for (int64_t c = 0; c < s.C; c += V::L) squares += V::load(rest + m * s.C + c) * V::load(rest + m * s.C + c);
      return V::sum(squares);
    });
  }

  // From the first soft neighbour, by products. Needs one centre for all. split: room for [C]; to_first: [pitch].
  void by_first(S* split, S* to_first) const {
    double squares = 0;
    for (int64_t c = 0; c < C; ++c) {
      split[c] = (centre[c] - sample.mean[c]) + rest[c];
      squares += static_cast<double>(split[c]) * static_cast<double>(split[c]);
    }
    const S size = static_cast<S>(squares);
    distances_by_products<V, 1>(b, C, s.pitch, 1, [&](int64_t) { return Queries<S>{split, 1, &size, to_first}; });
    by_point(to_first, size, [&](int m) { return row_distance<V>(rest, rest + m * s.C, s.C); });
  }

  // By products with the soft neighbour. split: room for [C][M]; to_soft: for [M][pitch].
  void by_products(S* split, S* to_soft) const {
    S sizes[M];
    for (int m = 0; m < M; ++m) {
      const int row = m < rows ? m : 0;
      double size = 0;
      for (int64_t c = 0; c < C; ++c) {
        const S value = (centre[row * s.C + c] - sample.mean[c]) + rest[row * s.C + c];
        split[c * M + m] = value;
        size += static_cast<double>(value) * static_cast<double>(value);
      }
      sizes[m] = static_cast<S>(size);
    }
    distances_by_products<V>(b, C, s.pitch, 1, [&](int64_t) { return Queries<S>{split, M, sizes, to_soft}; });
    for (int m = 0; m < rows; ++m) {
      if (found[m] >= -1) continue;
      const S* row = to_soft + m * s.pitch;
      const S high = smallest_end<V>(row, sizes[m], b.sizes, b.count, rounding);
      compare(m, places_where<V>(row, sizes[m], b.sizes, b.count, rounding.products, rounding.least, b.count, list,
                                 [&](R value, R bound) { return value - bound <= high; }));
    }
  }
};
