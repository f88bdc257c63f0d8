// Weighted sums of frames for M results at once, with the least arithmetic that rounding allows. Included by
// cycle_consistency_core.h.
//
// Around.  sum_i w_mi (x_i - c_m) is the same for every c_m where the weights add up to zero, and what it differs by is
//          known where they do not. One centre for all results costs a multiply-add per number, a centre for each a
//          subtraction as well. Rounding is measured by sum_i w_mi^2 |x_i - c|^2, and that of one centre may be sixteen
//          times the square of what comes out: frames next to each other in time are usually close enough.
// Near.    So that sums which come to no more than the frames themselves keep their digits beside frames of another size,
//          one centre is taken only where it is near (near_frame) those that matter most to each result, else none.
// Order.   In parts (part_of), which are then added. Which blocks are taken together makes no difference to any.

// The middle one of a block of M frames, or the last one where there is none.
template <int M>
static int64_t middle(int64_t first, int64_t count) {
  return min_of<int64_t>(first + M / 2, count - 1);
}

// The middle one of `count` frames where it is no farther from any than that is from nothing: numbers made of
// differences from it round no more than those of the frames themselves would. Else `nothing`, which becomes [Cp] zeros;
// NaN is near nothing.
template <class V>
static const typename V::S* near_frame(const typename V::S* const (&frames)[V::M], int64_t count, int64_t Cp,
                                       typename V::S* nothing) {
  using R = typename V::R;
  const typename V::S* const one = frames[count / 2];
  for (int64_t m = 0; m < count; ++m) {
    if (frames[m] == one) continue;
    R apart{}, size{};
    for (int64_t c = 0; c < Cp; c += V::L) {
      const R frame = V::load(frames[m] + c), difference = frame - V::load(one + c);
      apart += difference * difference, size += frame * frame;
    }
    if (V::sum(apart) <= V::sum(size)) continue;
    memset(nothing, 0, static_cast<size_t>(Cp) * sizeof(typename V::S));
    return nothing;
  }
  return one;
}

// M rows of numbers from the first on, the last of `count` in place of those beyond it.
template <class S, int M>
struct Rows {
  S* at[M];
  Rows(S* rows, int64_t first, int64_t count, int64_t pitch) {
    for (int m = 0; m < M; ++m) at[m] = rows + min_of(first + m, count - 1) * pitch;
  }
};

// Weights of M results for frames i: w[m * pitch + i], or where results are Adjacent w[i * pitch + m].
template <bool Adjacent, class V>
struct Weights {
  using S = typename V::S;
  using R = typename V::R;
  const S* at[V::M] = {};
  int64_t pitch = 0;
  Weights() = default;
  Weights(const S* w, int64_t of_rows) : pitch(of_rows) {
    for (int m = 0; m < V::M; ++m) at[m] = w + (Adjacent ? m : m * pitch);
  }
  // That of frame i and result m, on all lanes: x - 0 is x, while x + 0 would be computed.
  R operator()(int64_t i, int m) const { return (Adjacent ? at[0][i * pitch + m] : at[m][i]) - R{}; }

  // How large sums around one frame are for what they round: sum_mi w_mi^2 x_i, x_i that frame's squared distance to
  // frame i. Of Adjacent results also `sums`, what the weights of each add up to.
  S extent(const S* x, int64_t count, S* sums) const {
    R all{};
    constexpr int chains = 4;  // that hide an addition's latency
    R parts[chains] = {};
    if constexpr (Adjacent) {
      R results[chains] = {};
      const auto add = [&](int64_t i, int chain) {
        const R w = V::load(at[0] + i * pitch);  // rows are padded
        results[chain] += w, parts[chain] += w * w * x[i];
      };
      int64_t i = 0;
      for (; i + chains <= count; i += chains)
#pragma GCC unroll 4
        for (int k = 0; k < chains; ++k) add(i + k, k);
      for (; i < count; ++i) add(i, 0);
      all = (parts[0] + parts[1]) + (parts[2] + parts[3]);
      const R of_results = (results[0] + results[1]) + (results[2] + results[3]);
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
          parts[m % chains] += w * w * distance;
        }
      }
      all = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    }
    return V::sum(all);
  }
};

// What sums of one block of results are made of: weights of frames and, with Second, of second frames; a centre of each
// result; one for all, `one`, and the squared distances of frames to it, `apart`; where they go.
template <class V, bool Adjacent>
struct Sum {
  using S = typename V::S;
  Weights<Adjacent, V> of, of_second;
  const S* centre[V::M] = {};
  const S *one = nullptr, *apart = nullptr;
  S* out[V::M] = {};
  Sum() = default;
  Sum(const Weights<Adjacent, V>& weights, const S* centre_of_all, S* to, int64_t pitch)
      : of(weights), one(centre_of_all) {
    for (int m = 0; m < V::M; ++m) out[m] = to + m * pitch;
  }
  void around(const S* const (&centres)[V::M], const S* distances_to_one) {
    for (int m = 0; m < V::M; ++m) centre[m] = centres[m];
    apart = distances_to_one;
  }
};

// out[m] += sum_i w_mi (rows_i - one) [+ sum_i w'_mi second_i] over frames [begin, end), P vectors of channels from c
// on.
template <class V, int P, bool Second, bool Adjacent>
static inline void add_frames(const Sum<V, Adjacent>& to, const typename V::S* rows, const typename V::S* second,
                              int64_t begin, int64_t end, int64_t Cp, int64_t c) {
  using R = typename V::R;
  constexpr int L = V::L, M = V::M;
  R from[P], acc[P][M] = {};
#pragma GCC unroll 4
  for (int k = 0; k < P; ++k) from[k] = V::load(to.one + c + k * L);
  for (int64_t i = begin; i < end; ++i) {
    R row[P];
#pragma GCC unroll 4
    for (int k = 0; k < P; ++k) row[k] = V::load(rows + i * Cp + c + k * L) - from[k];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const R weight = to.of(i, m);
#pragma GCC unroll 4
      for (int k = 0; k < P; ++k) acc[k][m] += weight * row[k];
    }
    if constexpr (Second) {
#pragma GCC unroll 4
      for (int k = 0; k < P; ++k) row[k] = V::load(second + i * Cp + c + k * L);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const R weight = to.of_second(i, m);
#pragma GCC unroll 4
        for (int k = 0; k < P; ++k) acc[k][m] += weight * row[k];
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int k = 0; k < P; ++k) V::store(to.out[m] + c + k * L, V::load(to.out[m] + c + k * L) + acc[k][m]);
}

// out[m] = sum_i w_mi (rows_i - one) [+ sum_i w'_mi second_i] of several blocks of results: a part of the frames at a
// time, for every block, so that it comes from far away once.
template <class V, bool Second, bool Adjacent>
static void sums_around_one(const Sum<V, Adjacent>* sums, int64_t blocks, const typename V::S* rows,
                            const typename V::S* second, int64_t count, int64_t Cp) {
  constexpr int L = V::L, P = vector_bytes == 64 ? 2 : 1;
  const int64_t step = part_of(count);
  for (int64_t k = 0; k < blocks; ++k)
    for (int m = 0; m < V::M; ++m) memset(sums[k].out[m], 0, static_cast<size_t>(Cp) * sizeof(typename V::S));
  for (int64_t begin = 0; begin < count; begin += step)
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t end = min_of(begin + step, count);
      int64_t c = 0;
      for (; c + P * L <= Cp; c += P * L) add_frames<V, P, Second>(sums[k], rows, second, begin, end, Cp, c);
      for (; c < Cp; c += L) add_frames<V, 1, Second>(sums[k], rows, second, begin, end, Cp, c);
    }
}

// The squares of what comes out; of Adjacent results after out[m] -= sums[m] (centre_m - one), since the weights of
// result m add up to sums[m], not to 0.
template <class V, bool Adjacent>
static typename V::S finish_sum(const Sum<V, Adjacent>& of, const typename V::S* sums, int64_t Cp) {
  using R = typename V::R;
  R squares[4] = {};  // as many chains as hide an addition's latency
  for (int64_t c = 0; c < Cp; c += V::L)
#pragma GCC unroll 8
    for (int m = 0; m < V::M; ++m) {
      R value = V::load(of.out[m] + c);
      if constexpr (Adjacent) {
        value -= sums[m] * (V::load(of.centre[m] + c) - V::load(of.one + c));
        V::store(of.out[m] + c, value);
      }
      squares[m % 4] += value * value;
    }
  return V::sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
}

// out[m] = sum_i w_mi (rows_i - centre_m) [+ sum_i w'_mi second_i] as it stands: a subtraction more per number.
template <class V, bool Second, bool Adjacent>
static void sum_around_each(const Sum<V, Adjacent>& to, const typename V::S* rows, const typename V::S* second,
                            int64_t count, int64_t Cp) {
  using R = typename V::R;
  constexpr int L = V::L, M = V::M;
  const int64_t step = part_of(count);
  for (int64_t c = 0; c < Cp; c += L) {
    R from[M], total[M] = {};
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) from[m] = V::load(to.centre[m] + c);
    for (int64_t begin = 0; begin < count; begin += step) {
      const int64_t end = min_of(begin + step, count);
      R acc[M] = {};
      for (int64_t i = begin; i < end; ++i) {
        const R row = V::load(rows + i * Cp + c), other = Second ? V::load(second + i * Cp + c) : R{};
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[m] += to.of(i, m) * (row - from[m]);
        if constexpr (Second)
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) acc[m] += to.of_second(i, m) * other;
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) total[m] += acc[m];
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) V::store(to.out[m] + c, total[m]);
  }
}

// Blocks of results whose sums are made at once.
static constexpr int most_blocks = 4;

// out[m] = sum_i w_mi (rows_i - centre_m) [+ sum_i w'_mi second_i] of several blocks, over `count` frames i. Around
// `one` where that rounds no more than a few times what centres of their own do, as measured by what is added up and
// what comes of it; else around those.
template <class V, bool Second, bool Adjacent>
static void sums_of_rows(const Sum<V, Adjacent>* sums, int64_t blocks, const typename V::S* rows,
                         const typename V::S* second, int64_t count, int64_t Cp) {
  sums_around_one<V, Second>(sums, blocks, rows, second, count, Cp);
  for (int64_t k = 0; k < blocks; ++k) {
    typename V::S of_weights[V::M];
    const typename V::S extent = sums[k].of.extent(sums[k].apart, count, of_weights);
    const typename V::S squares = finish_sum<V>(sums[k], of_weights, Cp);
    if (!(extent <= 16 * squares)) sum_around_each<V, Second>(sums[k], rows, second, count, Cp);
  }
}
