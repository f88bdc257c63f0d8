// Weighted sums of frames for M results at once, with the least arithmetic that rounding allows. Included by
// cycle_consistency_core.h.
//
// Around.  sum_i w_mi (x_i - c_m) is the same for every c_m where the weights add up to zero, and what it differs by is
//          known where they do not. One centre for all results costs a multiply-add per number, a centre for each a
//          subtraction as well. Rounding is measured by sum_i w_mi^2 |x_i - c|^2, and that of one centre may be sixteen
//          times the square of what comes out: frames next to each other in time are usually close enough.
// Order.   In parts (part_of), which are then added.

// The middle one of a block of M frames, or the last one where there is none.
template <int M>
static int64_t middle(int64_t first, int64_t count) {
  return min_of<int64_t>(first + M / 2, count - 1);
}

// M rows of numbers from the first on; given a count, the last one in place of those beyond it.
template <class S, int M>
struct Rows {
  S* at[M];
  Rows(S* rows, int64_t first, int64_t count, int64_t pitch) {
    for (int m = 0; m < M; ++m) at[m] = rows + min_of(first + m, count - 1) * pitch;
  }
  Rows(S* rows, int64_t pitch) : Rows(rows, 0, M, pitch) {}
};

// Weights of M results for frames i: w[m * pitch + i], or where results are Adjacent w[i * pitch + m].
template <bool Adjacent, class V>
struct Weights {
  using S = typename V::S;
  using R = typename V::R;
  const S* at[V::M];
  const int64_t pitch;
  Weights(const S* w, int64_t of_rows) : pitch(of_rows) {
    for (int m = 0; m < V::M; ++m) at[m] = w + (Adjacent ? m : m * pitch);
  }
  // That of frame i and result m, on all lanes: x - 0 is x, while x + 0 would be computed.
  R operator()(int64_t i, int m) const { return (Adjacent ? at[0][i * pitch + m] : at[m][i]) - R{}; }

  // How large sums around one frame are for what they round: sum_mi w_mi^2 x_i, x_i that frame's squared distance to
  // frame i. Of Adjacent results also `sums`, what the weights of each add up to.
  S extent(const S* x, int64_t count, S* sums) const {
    R all{}, of_results{};
    if constexpr (Adjacent) {
      for (int64_t i = 0; i < count; ++i) {
        const R w = V::load(at[0] + i * pitch);  // rows are padded
        of_results += w, all += w * w * x[i];
      }
      const R lanes = lane_numbers<V>();
      all = lanes < static_cast<S>(V::M) ? all : R{};
      alignas(64) S lane[V::L];
      V::store(lane, of_results);
      for (int m = 0; m < V::M; ++m) sums[m] = lane[m];
    } else {
      for (int64_t i = 0; i < count; i += V::L) {  // weights are zero beyond the last frame
        const R distance = V::load(x + i);
#pragma GCC unroll 8
        for (int m = 0; m < V::M; ++m) {
          const R w = V::load(at[m] + i);
          all += w * w * distance;
        }
      }
    }
    return V::sum(all);
  }
};

// out[m] = sum_i w_mi (rows_i - one) [+ sum_i w'_mi second_i], P vectors of channels from c on; where results are
// Adjacent, - sums[m] (centre_m - one). Returns the squares.
template <class V, int P, bool Second, bool Adjacent>
static typename V::R sum_around_one(const Weights<Adjacent, V>& of, const typename V::S* rows,
                                    const typename V::S* const (&centre)[V::M], const typename V::S* one,
                                    const typename V::S* sums, const Weights<Adjacent, V>& of_second,
                                    const typename V::S* second, int64_t count, int64_t Cp, int64_t c,
                                    typename V::S* const (&out)[V::M]) {
  using R = typename V::R;
  constexpr int L = V::L, M = V::M;
  R from[P], acc[P][M], squares[4] = {};  // as many chains as hide an addition's latency
#pragma GCC unroll 4
  for (int k = 0; k < P; ++k) from[k] = V::load(one + c + k * L);
  const int64_t step = part_of(count);
  for (int64_t begin = 0; begin < count; begin += step) {
    const int64_t end = min_of(begin + step, count);
#pragma GCC unroll 4
    for (int k = 0; k < P; ++k)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[k][m] = R{};
    for (int64_t i = begin; i < end; ++i) {
      R row[P];
#pragma GCC unroll 4
      for (int k = 0; k < P; ++k) row[k] = V::load(rows + i * Cp + c + k * L) - from[k];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const R weight = of(i, m);
#pragma GCC unroll 4
        for (int k = 0; k < P; ++k) acc[k][m] += weight * row[k];
      }
      if constexpr (Second) {
#pragma GCC unroll 4
        for (int k = 0; k < P; ++k) row[k] = V::load(second + i * Cp + c + k * L);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const R weight = of_second(i, m);
#pragma GCC unroll 4
          for (int k = 0; k < P; ++k) acc[k][m] += weight * row[k];
        }
      }
    }
    if (begin > 0)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int k = 0; k < P; ++k) acc[k][m] += V::load(out[m] + c + k * L);
    if (end < count)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int k = 0; k < P; ++k) V::store(out[m] + c + k * L, acc[k][m]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int k = 0; k < P; ++k) {
      if constexpr (Adjacent) acc[k][m] -= sums[m] * (V::load(centre[m] + c + k * L) - from[k]);
      squares[m % 4] += acc[k][m] * acc[k][m];
      V::store(out[m] + c + k * L, acc[k][m]);
    }
  return (squares[0] + squares[1]) + (squares[2] + squares[3]);
}

// The same for all channels: sum_i w_mi (rows_i - centre_m) [+ sum_i w'_mi second_i] over `count` frames i, since the
// weights of result m add up to 0, or of Adjacent ones to sums[m]. Returns the sum of squares.
template <class V, bool Second, bool Adjacent>
static typename V::S sum_around_one(const Weights<Adjacent, V>& of, const typename V::S* rows,
                                    const typename V::S* const (&centre)[V::M], const typename V::S* one,
                                    const typename V::S* sums, const Weights<Adjacent, V>& of_second,
                                    const typename V::S* second, int64_t count, int64_t Cp,
                                    typename V::S* const (&out)[V::M]) {
  constexpr int L = V::L, P = vector_bytes == 64 ? 2 : 1;
  typename V::R squares{};
  int64_t c = 0;
  for (; c + P * L <= Cp; c += P * L)
    squares += sum_around_one<V, P, Second>(of, rows, centre, one, sums, of_second, second, count, Cp, c, out);
  for (; c < Cp; c += L)
    squares += sum_around_one<V, 1, Second>(of, rows, centre, one, sums, of_second, second, count, Cp, c, out);
  return V::sum(squares);
}

// out[m] = sum_i w_mi (rows_i - centre_m) [+ sum_i w'_mi second_i] as it stands: a subtraction more per number.
template <class V, bool Second, bool Adjacent>
static void sum_around_each(const Weights<Adjacent, V>& of, const typename V::S* rows,
                            const typename V::S* const (&centre)[V::M], const Weights<Adjacent, V>& of_second,
                            const typename V::S* second, int64_t count, int64_t Cp, typename V::S* const (&out)[V::M]) {
  using R = typename V::R;
  constexpr int L = V::L, M = V::M;
  const int64_t step = part_of(count);
  for (int64_t c = 0; c < Cp; c += L) {
    R from[M], total[M] = {};
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) from[m] = V::load(centre[m] + c);
    for (int64_t begin = 0; begin < count; begin += step) {
      const int64_t end = min_of(begin + step, count);
      R acc[M] = {};
      for (int64_t i = begin; i < end; ++i) {
        const R row = V::load(rows + i * Cp + c), other = Second ? V::load(second + i * Cp + c) : R{};
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[m] += of(i, m) * (row - from[m]);
        if constexpr (Second)
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) acc[m] += of_second(i, m) * other;
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) total[m] += acc[m];
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) V::store(out[m] + c, total[m]);
  }
}

// Those sums around `one` where that rounds no more than a few times what centres of their own do, as measured by what
// is added up and what comes of it; else around those. `apart`: squared distances of frames to `one`.
template <class V, bool Second, bool Adjacent>
static void sum_of_rows(const Weights<Adjacent, V>& of, const typename V::S* rows,
                        const typename V::S* const (&centre)[V::M], const typename V::S* one,
                        const typename V::S* apart, const Weights<Adjacent, V>& of_second, const typename V::S* second,
                        int64_t count, int64_t Cp, typename V::S* const (&out)[V::M]) {
  typename V::S sums[V::M];
  const typename V::S extent = of.extent(apart, count, sums);
  const typename V::S squares =
      sum_around_one<V, Second>(of, rows, centre, one, sums, of_second, second, count, Cp, out);
  if (!(extent <= 16 * squares)) sum_around_each<V, Second>(of, rows, centre, of_second, second, count, Cp, out);
}
