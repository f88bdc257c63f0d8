// temporal_cycle_loss: how far frames land from where they started, and both ways of computing it on the CPU. Included
// by cycle_consistency_core.h.
//
// Short     sequences (AlignForm::within): everything of a sample stays in the caches. Packed once, then blocks of M
//           frames: distances, softmax, soft neighbours, distances back, loss. The gradients need two more passes,
//           over blocks of frames of a and of b, since what a frame gets as a key comes from all queries. A task is a
//           sample, or a block where there are fewer samples than threads and enough to do. Loss and gradients in one
//           pass share distances, softmaxes and packing: two products of eleven, and more of the time.
// Long      ones are the problems `soft` and `back` one after the other, and their gradients in the opposite order.
// Saved     for the gradients: soft neighbours, and of long sequences distances, where the caller has room for them. Both
//           softmaxes are computed again. With distances or without, gradients have the same bits.
// Centres.  Weights that add up to zero over keys may be taken around any point: the soft neighbour where keys are b's,
//           the most probable frame where they are a's. What is made around one point for a block of frames is made
//           around the most probable frame of the middle one where that is near those of all, else around nothing.

struct Logarithm {
  float operator()(float x) const { return __builtin_logf(x); }
  double operator()(double x) const { return __builtin_log(x); }
};

namespace {  // of each file its own, as what it holds is
// One sample of short sequences and its blocks.
template <class V>
struct ShortLoss {
  using S = typename V::S;
  using R = typename V::R;
  static constexpr int M = V::M, L = V::L;
  const Alignment& p;
  const Sizes& s;
  const int64_t n;
  const bool forward, backward;
  Sample<S> sample;
  S *soft, *d_soft, *da;  // rows
  S* zeros;               // a row for every block
  S *z, *w, *back;        // [T][pitch]: weights of b's frames, gradients of their logits, and those of the way back
  // Squared distances of the middle one of every block to all frames of the other side, [block][frames]: of a to b and
  // of soft neighbours to a, and, of keys, of b to a and of a to soft neighbours.
  S *a_to_b, *soft_to_a, *b_to_a, *a_to_soft;
  bool nothing;

  static int64_t bytes(const Alignment& p, const Sizes& s) {
    const int64_t numbers = (s.T + s.S) * (p.C + s.C + 1) + (3 * (s.T + M) + s.T / M + 1) * s.C +
                            3 * (s.T + M) * s.pitch + 2 * (s.T / M + 1) * s.pitch + (s.T / M + s.S / M + 2) * (s.T + M);
    return round_up((p.T + p.S) * 8 + numbers * static_cast<int64_t>(sizeof(S)) + 16 * 64, 64);
  }

  ShortLoss(const Alignment& problem, const Sizes& sizes, int64_t number, char* at)
      : p(problem), s(sizes), n(number), forward(p.kind == Align::loss), backward(p.da) {
    sample = lay_out<V>(p, s, true, false, at);
    S* next = reinterpret_cast<S*>(at);
    for (S** rows : {&soft, &d_soft, &da}) *rows = next, next += (s.T + M) * s.C;
    zeros = next, next += (s.T / M + 1) * s.C;
    for (S** weights : {&z, &w, &back}) *weights = next, next += (s.T + M) * s.pitch;
    for (S** rows : {&a_to_b, &soft_to_a}) *rows = next, next += (s.T / M + 1) * s.pitch;
    a_to_soft = next, next += (s.T / M + 1) * (s.T + M), b_to_a = next;
    fill_sample<V>(p, s, n, sample);
    nothing = sample.a.count == 0 || sample.b.count == 0;
    if (forward || nothing) return;
    for (int64_t t = 0; t < sample.a.count; ++t) {
      const int64_t from = (n * p.T + sample.a.place[t]) * p.C;
      if (sample.scale == 1)
        memcpy(soft + t * s.C, static_cast<const S*>(p.soft) + from, static_cast<size_t>(p.C) * sizeof(S));
      else
        for (int64_t c = 0; c < p.C; ++c)
          soft[t * s.C + c] =
              static_cast<S>(static_cast<double>(static_cast<const S*>(p.soft)[from + c]) * sample.scale);
      for (int64_t c = p.C; c < s.C; ++c) soft[t * s.C + c] = 0;
    }
  }

  int64_t blocks() const { return nothing ? 0 : (sample.a.count + M - 1) / M; }
  int64_t key_blocks() const { return nothing ? 0 : (sample.b.count + M - 1) / M; }

  using Given = Rows<const S, M>;
  int rows_of(int64_t t0, const Frames<S>& of) const { return static_cast<int>(min_of<int64_t>(M, of.count - t0)); }

  // The distances d of a block's queries to keys that have to do with the middle frame of blocks of either.
  void keep_middles(const S* d, int64_t t0, int64_t queries, int64_t keys, S* of_queries, S* of_keys) const {
    memcpy(of_queries + t0 / M * s.pitch, d + (middle<M>(t0, queries) - t0) * s.pitch,
           static_cast<size_t>(s.pitch) * sizeof(S));
    for (int64_t i0 = 0; i0 < keys; i0 += M)
      for (int m = 0; m < M; ++m) of_keys[i0 / M * (s.T + M) + t0 + m] = d[m * s.pitch + middle<M>(i0, keys)];
  }

  // Weights of b's frames for queries from t0 on, in z. Returns a row around which a block's numbers are made.
  const S* match(int64_t t0) {
    const Frames<S>&a = sample.a, &b = sample.b;
    const Given queries(a.rows, t0, a.count, s.C);
    distances<V>(OfRows<V>{queries.at}, b.panels, b.count, p.C, z + t0 * s.pitch, s.pitch);
    if (backward) keep_middles(z + t0 * s.pitch, t0, a.count, b.count, a_to_b, b_to_a);
    S least, sum;
    const S* likely[M];
    for (int m = 0; m < M; ++m)
      likely[m] = b.rows + softmax<V>(z + (t0 + m) * s.pitch, b.count, sample.sharpness, least, sum) * s.C;
    return near_frame<V>(likely, rows_of(t0, a), s.C, zeros + t0 / M * s.C);
  }

  // Where soft neighbours land, in `back`. `finish` makes of row m its loss or the gradients of its logits; it takes m,
  // the row, the log of its own probability, how far it is away from the mean, that mean from the most probable place
  // on, the variance, and the number of that place.
  template <class Finish>
  void land(int64_t t0, const Finish& finish) {
    const Frames<S>& a = sample.a;
    const Given queries(soft, t0, a.count, s.C);
    distances<V>(OfRows<V>{queries.at}, a.panels, a.count, p.C, back + t0 * s.pitch, s.pitch);
    if (backward) keep_middles(back + t0 * s.pitch, t0, a.count, a.count, soft_to_a, a_to_soft);
    for (int m = 0; m < rows_of(t0, a); ++m) {
      S* const row = back + (t0 + m) * s.pitch;
      const S own = row[t0 + m];
      S least, sum;
      const int64_t likely = softmax<V>(row, a.count, sample.sharpness, least, sum);
      const S from = a.number[likely];
      R means{}, squares{};
      for (int64_t i = 0; i < a.count; i += L) {
        const R weight = V::load(row + i);
        means += weight == 0 ? R{} : weight * (V::load(a.number + i) - from);  // no places beyond the last frame
      }
      const S mean = V::sum(means);
      for (int64_t i = 0; i < a.count; i += L) {
        const R weight = V::load(row + i), away = (V::load(a.number + i) - from) - mean;
        squares += weight == 0 ? R{} : weight * (away * away);
      }
      const S log_p = p.regression ? S(0) : (least - own) * sample.sharpness - Logarithm()(sum);
      finish(m, row, log_p, (a.number[t0 + m] - from) - mean, mean, V::sum(squares), likely);
    }
  }

  // Soft neighbours of queries from t0 on, by their weights, around `one`.
  void find_neighbors(int64_t t0, const S* one) const {
    const Frames<S>&a = sample.a, &b = sample.b;
    const Weights<false, V> of(z + t0 * s.pitch, s.pitch);
    // Weights add up to 1, so that what b's frames have in common need not go through the sum.
    const Sum<V, false> rest(of, one, soft + t0 * s.C, s.C);
    sums_around_one<V, false>(&rest, 1, b.rows, nullptr, b.count, s.C);
    for (int m = 0; m < rows_of(t0, a); ++m) {
      S* const sum = rest.out[m];
      for (int64_t c = 0; c < s.C; c += L) V::store(sum + c, V::load(sum + c) + V::load(one + c));
      if (p.soft) write(p.soft, p.dtype, (n * p.T + a.place[t0 + m]) * p.C, sum, p.C, 1 / sample.scale);
    }
  }

  // The loss of a block, and gradients of the logits on both ways, of soft neighbours, and of a's frames as queries.
  void query_block(int64_t t0) {
    const Frames<S>&a = sample.a, &b = sample.b;
    const S* const one = match(t0);
    if (forward) find_neighbors(t0, one);
    const Landing<S> landing(p);
    const S factor = static_cast<S>(2 / sample.scale / p.temperature);
    const S* near[M];
    for (int m = 0; m < M; ++m) near[m] = a.rows;
    const int rows = rows_of(t0, a);
    land(t0, [&](int m, S* row, S log_p, S away, S mean, S variance, int64_t likely) {
      if (forward)
        static_cast<S*>(p.loss)[n * p.T + a.place[t0 + m]] = landing.loss(log_p, away, variance, Logarithm());
      if (!backward) return;
      S g, g_mean, g_variance;
      landing.gradients(grad_of_loss<S>(p, n, a.place[t0 + m]), away, variance, g, g_mean, g_variance);
      near[m] = a.rows + likely * s.C;
      const S from = a.number[likely];
      const R lanes = lane_numbers<V>();
      for (int64_t i = 0; i < a.count; i += L) {
        const R to_mean = (V::load(a.number + i) - from) - mean;
        const R value =
            factor * (V::load(row + i) * (g_mean * to_mean + g_variance * (to_mean * to_mean - variance) - g));
        V::store(row + i, lanes + static_cast<S>(i) < static_cast<S>(a.count) ? value : R{});
      }
      row[t0 + m] += factor * g;
    });
    if (!backward) return;
    for (int m = rows; m < M; ++m) memset(back + (t0 + m) * s.pitch, 0, static_cast<size_t>(s.pitch) * sizeof(S));
    const Weights<false, V> of_back(back + t0 * s.pitch, s.pitch), of(w + t0 * s.pitch, s.pitch);
    const int64_t block = t0 / M, mid = middle<M>(t0, a.count);
    Sum<V, false> landed(of_back, soft + mid * s.C, d_soft + t0 * s.C, s.C);
    landed.around(near, soft_to_a + block * s.pitch);
    sums_of_rows<V, false>(&landed, 1, a.rows, nullptr, a.count, s.C);
    // What a row's products have in common makes no difference to its gradients.
    const Given grads(d_soft, t0, t0 + M, s.C), around(soft, t0, a.count, s.C);
    products<V>(
        1, [&](int64_t) { return OfRows<V>{grads.at}; }, [&](int64_t) { return one; }, b.panels, b.count, p.C,
        [&](int64_t) { return w + t0 * s.pitch; }, s.pitch);
    for (int m = 0; m < M; ++m)
      distance_gradients<V>(z + (t0 + m) * s.pitch, w + (t0 + m) * s.pitch, b.count, sample.sharpness);
    Sum<V, false> matched(of, a.rows + mid * s.C, da + t0 * s.C, s.C);
    matched.around(around.at, a_to_b + block * s.pitch);
    sums_of_rows<V, false>(&matched, 1, b.rows, nullptr, b.count, s.C);
  }

  // What frames of a from k0 on get as the keys of the way back.
  void frame_block(int64_t k0) {
    const Frames<S>& a = sample.a;
    const Weights<true, V> of(back + k0, s.pitch);
    const Given around(a.rows, k0, a.count, s.C);
    S* const landed = static_cast<S*>(scratch(2, static_cast<size_t>(M * s.C) * sizeof(S)));
    Sum<V, true> sums(of, a.rows + middle<M>(k0, a.count) * s.C, landed, s.C);
    sums.around(around.at, a_to_soft + k0 / M * (s.T + M));
    sums_of_rows<V, false>(&sums, 1, soft, nullptr, a.count, s.C);
    for (int m = 0; m < rows_of(k0, a); ++m) {
      S *const sum = da + (k0 + m) * s.C, *const more = landed + m * s.C;
      for (int64_t c = 0; c < s.C; c += L) V::store(sum + c, V::load(sum + c) + V::load(more + c));
      write(p.da, p.dtype, (n * p.T + a.place[k0 + m]) * p.C, sum, p.C, 1);
    }
  }

  // Gradients of frames of b from i0 on.
  void key_block(int64_t i0) {
    const Frames<S>&a = sample.a, &b = sample.b;
    S* const gradients = static_cast<S*>(scratch(2, static_cast<size_t>(M * s.C) * sizeof(S)));
    Sum<V, true> sums(Weights<true, V>(w + i0, s.pitch), b.rows + middle<M>(i0, b.count) * s.C, gradients, s.C);
    sums.of_second = Weights<true, V>(z + i0, s.pitch);
    sums.around(Given(b.rows, i0, b.count, s.C).at, b_to_a + i0 / M * (s.T + M));
    sums_of_rows<V, true>(&sums, 1, a.rows, d_soft, a.count, s.C);
    for (int m = 0; m < rows_of(i0, b); ++m)
      write(p.db, p.dtype, (n * p.S + b.place[i0 + m]) * p.C, gradients + m * s.C, p.C, 1);
  }

  // All blocks, by `each(count, function)`, which returns when all are done.
  template <class Each>
  void run_blocks(const Each& each) {
    each(blocks(), [&](int64_t i) { query_block(i * M); });
    if (!backward) return;
    each(blocks() + key_blocks(), [&](int64_t i) {
      if (i < blocks())
        frame_block(i * M);
      else
        key_block((i - blocks()) * M);
    });
  }
};
}  // namespace
