// cycle_consistency on vector units: the body of every instruction set. Included once per instruction set, inside a
// namespace of its own and under that file's target pragma, after scalar.h and vectors.h; it instantiates nothing of
// the standard library.
//
// Distances of short sequences are sums of squared differences; those of long ones come from products, with a bound on
// their rounding, and by differences within the bound (cycle_consistency_products.h; the plan is plan_alignment's).
//
// Layout.   Frames that are there are packed, in the precision of sums, to panels [frame / L][channel][L]: a vector
//           holds one channel of L frames, so that a block of M queries against a panel of keys is M accumulators of L
//           keys, queries being broadcast from their own panel, and nothing has to be added up across lanes. Where
//           channels are added up by weights (soft neighbours, gradients) frames are also packed to rows
//           [frame][channel].
// Scale.    Values are multiplied by a power of two where their squares would leave the range of fp32 (or fp64). It
//           comes back in `sharpness`, scale^-2 / temperature, and in what is written.
// Centre.   A soft neighbour is kept as the sum u = sum_j z_j b_j as it comes out, and the rest, sum_j z_j (b_j - u):
//           right under offsets and scene cuts, where rounding u loses the differences between frames. Gradients are
//           taken around u, too. Where only its place is asked for, u is the most probable frame, which saves a sum.
// Order.    Channels and frames are added up in order, in parts which are then added: no result depends on threads, and
//           equal frames have equal distances wherever they stand.
// Threads.  Short sequences: a task per sample. Others: packing, then blocks of queries, then (gradients of keys)
//           blocks of keys.
// Bound.    T S C multiply-adds with as many subtractions per matrix of distances, against (T + S) C numbers read:
//           arithmetic for more than a few frames.

// Sums of `count` numbers are cut into parts of this length: about the root of their number, for the least rounding.
static inline int64_t part_of(int64_t count) { return count <= 1024 ? 16 : 32; }

template <class S>
struct Frames {
  int64_t count = 0;         // of frames that are there
  int64_t* place = nullptr;  // their places in the sequence
  S* number = nullptr;       // the same as numbers
  S *panels = nullptr, *rows = nullptr;
  S *centred = nullptr, *sizes = nullptr;  // for products: panels minus the mean, and the squared norms of what remains
  S largest_size = 0;
  S largest = 0, zero = 0;  // the largest magnitude; NaN if any number is not finite
};

// What a sample is packed to, and how its numbers are to be read.
template <class S>
struct Sample {
  Frames<S> a, b;
  Frames<S> grad;     // rows and panels as those of a, where the problem has them
  S* mean = nullptr;  // of all frames, where there are products
  double scale = 1;   // what was packed is scale times what was given
  S sharpness = 1;
  bool finite = true;
  bool products() const { return mean && finite; }  // infinity minus infinity would be no distance
};

struct Sizes {
  int64_t T, S, C, pitch;  // rounded up to whole vectors; of a row of distances
};

template <class V>
static Sizes sizes_of(const Alignment& p) {
  const int64_t L = V::L;
  return {round_up(p.T, L), round_up(p.S, L), round_up(p.C, L), round_up(max_of(p.T, p.S), L) + L};
}

// Packs the frames of one sequence, and finds `largest` and `zero`.
template <class V, class T>
static void pack_as(const Sequence& from, int64_t n, int64_t C, int64_t row_pitch, Frames<typename V::S>& to) {
  using S = typename V::S;
  using R = typename V::R;
  constexpr int L = V::L;
  const T* base = static_cast<const T*>(from.data) + n * from.n;
  R most{}, zeros{};
  const auto see = [&](R value) {
    const R size = value < 0 ? -value : value;
    most = size > most ? size : most;
    zeros += value * S(0);
  };
  alignas(64) S line[L];
  for (int64_t t0 = 0; t0 < to.count; t0 += L) {
    S* panel = to.panels + t0 * C;
    const T* row[L];
    for (int l = 0; l < L; ++l) row[l] = base + to.place[min_of(t0 + l, to.count - 1)] * from.t;
    const bool whole = from.c == 1 && t0 + L <= to.count && to.rows && to.panels;
    for (int64_t c0 = 0; c0 < C; c0 += L) {
      const int64_t channels = min_of<int64_t>(L, C - c0);
      if (whole && channels == L) {  // nothing depends on the row's number: all of the block in registers
        R block[L];
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) {
          block[l] = V::load(row[l] + c0);
          see(block[l]);
          V::store(to.rows + (t0 + l) * row_pitch + c0, block[l]);
        }
        V::transpose(block);
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) V::store(panel + (c0 + l) * L, block[l]);
        continue;
      }
      R block[L];
      for (int l = 0; l < L; ++l) {
        block[l] = R{};
        if (t0 + l >= to.count) continue;
        const T* at = row[l] + c0 * from.c;
        if (from.c == 1 && channels == L) {
          block[l] = V::load(at);
        } else {
          for (int i = 0; i < L; ++i) line[i] = i < channels ? static_cast<S>(to_double(at[i * from.c])) : S(0);
          block[l] = V::load(line);
        }
        see(block[l]);
        if (to.rows) V::store(to.rows + (t0 + l) * row_pitch + c0, block[l]);
      }
      if (!to.panels) continue;
      V::transpose(block);
      for (int64_t i = 0; i < channels; ++i) V::store(panel + (c0 + i) * L, block[i]);
    }
  }
  for (int l = 0; l < L; ++l) to.largest = max_of(to.largest, static_cast<S>(most[l])), to.zero += zeros[l];
}

template <class V>
static void pack(DType dtype, const Sequence& from, int64_t n, int64_t C, int64_t row_pitch,
                 Frames<typename V::S>& to) {
  if constexpr (sizeof(typename V::S) == 8)
    return pack_as<V, double>(from, n, C, row_pitch, to);
  else if (dtype == DType::f32)
    return pack_as<V, float>(from, n, C, row_pitch, to);
  else if (dtype == DType::bf16)
    return pack_as<V, bf16_t>(from, n, C, row_pitch, to);
  else
    return pack_as<V, f16_t>(from, n, C, row_pitch, to);
}

static int64_t find_frames(const FrameMask& mask, int64_t n, int64_t frames, int64_t* place) {
  int64_t count = 0;
  for (int64_t t = 0; t < frames; ++t)
    if (mask.there(n, t)) place[count++] = t;
  return count;
}

template <class S>
static void multiply(S* data, int64_t count, S factor) {
  for (int64_t i = 0; i < count; ++i) data[i] *= factor;
}

// Memory for one packed sample, taken from `at`, which moves on.
template <class V>
static Sample<typename V::S> lay_out(const Alignment& p, const Sizes& z, bool rows, bool products, char*& at) {
  using S = typename V::S;
  Sample<S> sample;
  const auto take = [&](int64_t bytes) {
    char* result = at;
    at += round_up(bytes, 64);
    return result;
  };
  const auto floats = [&](int64_t count) { return reinterpret_cast<S*>(take(count * sizeof(S))); };
  sample.a.place = reinterpret_cast<int64_t*>(take(p.T * 8));
  sample.b.place = reinterpret_cast<int64_t*>(take(p.S * 8));
  sample.a.number = floats(z.T);
  sample.b.number = floats(z.S);
  sample.a.panels = floats(z.T * p.C);
  sample.b.panels = floats(z.S * p.C);
  if (rows) sample.a.rows = floats(z.T * z.C), sample.b.rows = floats(z.S * z.C);
  if (p.grad.data) sample.grad.rows = floats(z.T * z.C), sample.grad.panels = floats(z.T * p.C);
  if (products) {
    sample.mean = floats(z.C);
    sample.a.centred = floats(z.T * p.C), sample.a.sizes = floats(z.T);
    sample.b.centred = floats(z.S * p.C), sample.b.sizes = floats(z.S);
  }
  return sample;
}

// Packing, in steps whose parts may run side by side: frames of a sample are found; those of a, b and grad, `side` 0, 1
// and 2, are packed; then how their numbers are to be read is known.
template <class V>
static void find_sample(const Alignment& p, int64_t n, Sample<typename V::S>& sample) {
  using S = typename V::S;
  sample.a.count = find_frames(p.mask_a, n, p.T, sample.a.place);
  sample.b.count = find_frames(p.mask_b, n, p.S, sample.b.place);
  for (Frames<S>* f : {&sample.a, &sample.b})
    for (int64_t t = 0; t < f->count; ++t) f->number[t] = static_cast<S>(f->place[t]);
  sample.grad.count = sample.a.count, sample.grad.place = sample.a.place;
}
static inline int sides_of(const Alignment& p) { return p.grad.data ? 3 : 2; }
template <class V>
static void pack_side(const Alignment& p, const Sizes& z, int64_t n, int64_t side, Sample<typename V::S>& sample) {
  pack<V>(p.dtype,
          side == 0   ? p.a
          : side == 1 ? p.b
                      : p.grad,
          n, p.C, z.C,
          side == 0   ? sample.a
          : side == 1 ? sample.b
                      : sample.grad);
}
template <class V>
static void finish_sample(const Alignment& p, const Sizes& z, Sample<typename V::S>& sample) {
  using S = typename V::S;
  const S largest = max_of(sample.a.largest, sample.b.largest);
  sample.finite = sample.a.zero + sample.b.zero == 0;
  const double low = sizeof(S) == 8 ? 0x1p-400 : 0x1p-30, high = sizeof(S) == 8 ? 0x1p400 : 0x1p50;
  if (sample.finite && largest > 0 && (largest < low || largest > high)) {
    sample.scale = 1;
    double size = largest;
    while (size < 1) size *= 2, sample.scale *= 2;
    while (size > 1) size /= 2, sample.scale /= 2;
    const int64_t L = V::L;
    for (Frames<S>* f : {&sample.a, &sample.b}) {
      // In two steps: from the least denormal of fp32 the factor is 2^149.
      const double most = sizeof(S) == 4 ? 0x1p100 : 0x1p1000, first = max_of(min_of(sample.scale, most), 1 / most);
      for (const double factor : {first, sample.scale / first}) {
        multiply(f->panels, round_up(f->count, L) * p.C, static_cast<S>(factor));
        if (f->rows) multiply(f->rows, f->count * z.C, static_cast<S>(factor));
      }
    }
  }
  const double sharpness = 1 / sample.scale / sample.scale / p.temperature, most = sizeof(S) == 8 ? 1.7e308 : 3.4e38;
  sample.sharpness = static_cast<S>(min_of(sharpness, most));
  sample.finite &= sample.grad.zero == 0;
}

// All of it, one after the other.
template <class V>
static void fill_sample(const Alignment& p, const Sizes& z, int64_t n, Sample<typename V::S>& sample) {
  find_sample<V>(p, n, sample);
  for (int side = 0; side < sides_of(p); ++side) pack_side<V>(p, z, n, side, sample);
  finish_sample<V>(p, z, sample);
}

// ---- blocks of V::M queries -----------------------------------------------------------------------------------------

// Number (m, c) of a block of queries: from a panel from t0 on, a multiple of M, or from rows.
template <class V>
struct OfPanel {
  const typename V::S* at;
  OfPanel(const typename V::S* panels, int64_t t0, int64_t C) : at(panels + t0 / V::L * V::L * C + t0 % V::L) {}
  typename V::S operator()(int m, int64_t c) const { return at[c * V::L + m]; }
};
template <class V>
struct OfRows {
  const typename V::S* const (&at)[V::M];
  typename V::S operator()(int m, int64_t c) const { return at[m][c]; }
};

// d[m * pitch + i] = |query_m - key_i|^2. A panel's queries beyond the last frame are zeros.
template <class V, class Queries>
static void distances(const Queries& query, const typename V::S* keys, int64_t key_count, int64_t C, typename V::S* d,
                      int64_t pitch) {
  using R = typename V::R;
  constexpr int L = V::L, M = V::M;
  const int64_t step = part_of(C);
  for (int64_t i0 = 0; i0 < key_count; i0 += L) {
    const typename V::S* k = keys + i0 * C;
    R total[M] = {};
    for (int64_t c0 = 0; c0 < C; c0 += step) {
      const int64_t end = min_of(c0 + step, C);
      R acc[M] = {};
      for (int64_t c = c0; c < end; ++c) {
        const R key = V::load(k + c * L);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const R difference = key - query(m, c);
          acc[m] += difference * difference;
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) total[m] += acc[m];
    }
    for (int m = 0; m < M; ++m) V::store(d + m * pitch + i0, total[m]);
  }
}

// Distances to soft neighbours: d[m * pitch + i] = |(key_i - centre_m) - rest_m|^2, with both as [channel][M] in
// `split`.
template <class V>
static void distances_to_soft(const typename V::S* split, const typename V::S* keys, int64_t key_count, int64_t C,
                              typename V::S* d, int64_t pitch) {
  using S = typename V::S;
  using R = typename V::R;
  constexpr int L = V::L, M = V::M;
  const int64_t step = part_of(C);
  for (int64_t i0 = 0; i0 < key_count; i0 += L) {
    const S* k = keys + i0 * C;
    R total[M] = {};
    for (int64_t c0 = 0; c0 < C; c0 += step) {
      const int64_t end = min_of(c0 + step, C);
      R acc[M] = {};
      for (int64_t c = c0; c < end; ++c) {
        const R key = V::load(k + c * L);
        const S* both = split + c * 2 * M;
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const R difference = (key - both[m]) - both[M + m];
          acc[m] += difference * difference;
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) total[m] += acc[m];
    }
    for (int m = 0; m < M; ++m) V::store(d + m * pitch + i0, total[m]);
  }
}

// r[m * pitch + i] = grad_m . (key_i - centre) for P panels of keys, a number per row away from those with any other
// centre.
template <class V, int P, class Queries>
static void products_of_panels(const Queries& grad, const typename V::S* centre, const typename V::S* keys, int64_t C,
                               typename V::S* r, int64_t pitch) {
  using R = typename V::R;
  constexpr int L = V::L, M = V::M;
  const int64_t step = part_of(C);
  R total[P][M] = {};
  for (int64_t c0 = 0; c0 < C; c0 += step) {
    const int64_t end = min_of(c0 + step, C);
    R acc[P][M] = {};
    for (int64_t c = c0; c < end; ++c) {
      R key[P];
#pragma GCC unroll 4
      for (int k = 0; k < P; ++k) key[k] = V::load(keys + (k * C + c) * L) - centre[c];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const R query = grad(m, c) - R{};  // as in multiply_panels
#pragma GCC unroll 4
        for (int k = 0; k < P; ++k) acc[k][m] += key[k] * query;
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int k = 0; k < P; ++k) total[k][m] += acc[k][m];
  }
  for (int k = 0; k < P; ++k)
    for (int m = 0; m < M; ++m) V::store(r + m * pitch + k * L, total[k][m]);
}

// The same for all keys and `count` blocks of queries, a few panels of keys at a time: `grad(k)`, `centre(k)` and where
// their products go, `r(k)`.
template <class V, class Grad, class Centre, class Place>
static void products(int64_t count, const Grad& grad, const Centre& centre, const typename V::S* keys,
                     int64_t key_count, int64_t C, const Place& r, int64_t pitch) {
  constexpr int L = V::L, P = vector_bytes == 64 ? 2 : 1;
  int64_t i = 0;
  for (; i + P * L <= round_up(key_count, L); i += P * L)
    for (int64_t k = 0; k < count; ++k) products_of_panels<V, P>(grad(k), centre(k), keys + i * C, C, r(k) + i, pitch);
  for (; i < key_count; i += L)
    for (int64_t k = 0; k < count; ++k) products_of_panels<V, 1>(grad(k), centre(k), keys + i * C, C, r(k) + i, pitch);
}

template <class V>
static typename V::R lane_numbers() {
  typename V::R r{};
  for (int l = 0; l < V::L; ++l) r[l] = static_cast<typename V::S>(l);
  return r;
}

// The place of the smallest on any lane, the lowest of them where there are several.
template <class V, int H>
static typename V::S first_of_lanes(typename V::R best, typename V::R at) {
  if constexpr (H == 0) {
    return at[0];
  } else {
    const typename V::R other = V::template swapped<H>(best), place = V::template swapped<H>(at);
    const auto take = (other < best) | ((other == best) & (place < at));
    return first_of_lanes<V, H / 2>(take ? other : best, take ? place : at);
  }
}

// The first of the smallest of v[0 .. count), -1 where there is none: NaN and infinity are not smaller than anything.
template <class V>
static int64_t first_smallest(const typename V::S* v, int64_t count) {
  using S = typename V::S;
  using R = typename V::R;
  constexpr int L = V::L;
  const R lanes = lane_numbers<V>();
  R best = R{} + static_cast<S>(__builtin_inf()), at = R{} - 1;  // places are exact in fp32 up to 2^24 frames
  for (int64_t i = 0; i < count; i += L) {
    const R value = V::load(v + i), place = lanes + static_cast<S>(i);
    const auto smaller = (value < best) & (place < static_cast<S>(count));
    best = smaller ? value : best;
    at = smaller ? place : at;
  }
  return static_cast<int64_t>(first_of_lanes<V, L / 2>(best, at));
}

// d becomes z = softmax(-sharpness d), zero from `count` to the end of its last vector. Returns the first of the most
// probable frames (0 if there is none: z is NaN then), in `least` its distance, in `sum` what exp(sharpness (least -
// d)) adds up to.
template <class V>
static int64_t softmax(typename V::S* d, int64_t count, typename V::S sharpness, typename V::S& least,
                       typename V::S& sum) {
  using S = typename V::S;
  using R = typename V::R;
  constexpr int L = V::L;
  const int64_t anchor = max_of<int64_t>(first_smallest<V>(d, count), 0);
  const R lanes = lane_numbers<V>();
  R sums{};
  least = d[anchor];
  for (int64_t i = 0; i < count; i += L) {
    const R place = lanes + static_cast<S>(i);
    const R x = (least - V::load(d + i)) * sharpness;
    if (V::exp_is_zero(x)) {
      V::store(d + i, R{});
      continue;
    }
    const R value = place < static_cast<S>(count) ? V::exp(x) : R{};
    sums += value;
    V::store(d + i, value);
  }
  sum = V::sum(sums);
  // Quotients in a few operations, where a division would take as long as all that went before: what an inverse leaves
  // over is divided by it once more.
  const S inverse = 1 / sum;
  for (int64_t i = 0; i < count; i += L) {
    const R value = V::load(d + i), share = value * inverse;
    V::store(d + i, share + (value - share * sum) * inverse);
  }
  return anchor;
}

// The frames to which any of M rows of weights gives more than `least` in magnitude, in `list`. All, where those are
// more than half, and where not all numbers are finite: 0 * inf has to be seen.
template <class V>
static int64_t frames_with_weight(const typename V::S* w, int64_t pitch, int64_t count, bool finite,
                                  typename V::S least, int64_t* list) {
  using R = typename V::R;
  int64_t used = 0, most = finite ? count / 2 : -1;
  for (int64_t i = 0; i < count && used <= most; i += V::L) {
    R largest{}, odd{};  // no weight is beyond the last frame; NaN, which compares with nothing, has weight
#pragma GCC unroll 8
    for (int m = 0; m < V::M; ++m) {
      const R weight = V::load(w + m * pitch + i), size = weight < 0 ? -weight : weight;
      largest = size > largest ? size : largest;
      odd += weight - weight;
    }
    for (uint32_t lanes = V::lanes((largest > least) | (odd != odd)); lanes; lanes &= lanes - 1)
      list[used++] = i + __builtin_ctz(lanes);
  }
  if (used <= most) return used;
  for (int64_t i = 0; i < count; ++i) list[i] = i;
  return count;
}

// out[m][c] = sum_i w[m * pitch + i] (rows_i[c] - centre[m][c]) over the `used` frames i in `list`; Centred false:
// without centre.
template <class V, bool Centred>
static void weighted_sum(const typename V::S* w, int64_t pitch, const typename V::S* rows, const int64_t* list,
                         int64_t used, int64_t Cp, const typename V::S* centre, typename V::S* out) {
  using R = typename V::R;
  constexpr int L = V::L, M = V::M;
  const int64_t step = part_of(used);
  for (int64_t c = 0; c < Cp; c += L) {
    R from[M], total[M] = {};
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) from[m] = Centred ? V::load(centre + m * Cp + c) : R{};
    for (int64_t begin = 0; begin < used; begin += step) {
      const int64_t end = min_of(begin + step, used);
      R acc[M] = {};
      for (int64_t at = begin; at < end; ++at) {
        const int64_t i = list[at];
        const R row = V::load(rows + i * Cp + c);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[m] += w[m * pitch + i] * (Centred ? row - from[m] : row);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) total[m] += acc[m];
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) V::store(out + m * Cp + c, total[m]);
  }
}

// Rows m of `first` and `second`, of M queries, side by side: out[c][2][M].
template <class V>
static void interleave(const typename V::S* first, const typename V::S* second, int64_t Cp, int64_t C,
                       typename V::S* out) {
  constexpr int M = V::M;
  for (int64_t c = 0; c < C; ++c)
    for (int m = 0; m < M; ++m) out[c * 2 * M + m] = first[m * Cp + c], out[c * 2 * M + M + m] = second[m * Cp + c];
}

template <class S>
static void write(void* to, DType dtype, int64_t at, const S* from, int64_t count, double factor) {
  if (dtype == DType::f32 && factor == 1)
    memcpy(static_cast<float*>(to) + at, from, count * sizeof(float));
  else
    for (int64_t i = 0; i < count; ++i) store_any(to, dtype, at + i, static_cast<double>(from[i]) * factor);
}

#include "cycle_consistency_products.h"
#include "cycle_consistency_sums.h"

// ---- tasks ----------------------------------------------------------------------------------------------------------

// A block's scratch: distances or weights [M][pitch], products [M][pitch], centres and rests [M][Cp], interleaved
// [C][2][M], squared distances of one of its frames [pitch].
template <class V>
struct Block {
  using S = typename V::S;
  S *z, *r, *centre, *rest, *split, *apart;
  int64_t* list;

  // The scratch of `count` blocks.
  static char* memory(const Sizes& s, int64_t count) {
    return static_cast<char*>(scratch(1, static_cast<size_t>(count * bytes(s))));
  }
  // Block `number` in it.
  Block(const Sizes& s, char* memory, int64_t number) {
    char* at = memory + number * bytes(s);
    const auto take = [&](int64_t count) {
      S* result = reinterpret_cast<S*>(at);
      at += round_up(count * static_cast<int64_t>(sizeof(S)), 64);
      return result;
    };
    list = reinterpret_cast<int64_t*>(take(s.pitch * 8 / static_cast<int64_t>(sizeof(S))));
    z = take(V::M * s.pitch), r = take(V::M * s.pitch);
    centre = take(V::M * s.C), rest = take(V::M * s.C), split = take(2 * V::M * s.C);
    apart = take(s.pitch);
  }
  static int64_t bytes(const Sizes& s) {
    return round_up((V::M * (2 * s.pitch + 4 * s.C) + s.pitch) * static_cast<int64_t>(sizeof(S)) + s.pitch * 8 + 7 * 64,
                    64);
  }
};

// d[m * pitch + i] of `count` blocks of queries from t0 on, as planned; those of products are not settled yet.
template <class V, class Of>
static void distances_of_blocks(const Sizes& s, int64_t C, const Sample<typename V::S>& sample,
                                const Frames<typename V::S>& a, const Frames<typename V::S>& b, int64_t t0,
                                int64_t count, const Of& block) {
  constexpr int L = V::L, M = V::M;
  const auto queries = [&](int64_t k) {
    const int64_t t = t0 + k * M;
    return Queries<typename V::S>{a.centred + t / L * L * C + t % L, L, a.sizes + t, block(k).z};
  };
  if (sample.products()) return distances_by_products<V>(b, C, s.pitch, count, queries);
  for (int64_t k = 0; k < count; ++k)
    distances<V>(OfPanel<V>(a.panels, t0 + k * M, C), b.panels, b.count, C, block(k).z, s.pitch);
}

// Gradients from distances that the forward pass left.
static bool distances_are_given(const Alignment& p) {
  return p.distances && (p.kind == Align::soft_backward || p.kind == Align::back_backward);
}

// The kept distances of frame t of a, which is there.
template <class S>
static S* kept_distances(const Alignment& p, const Frames<S>& a, int64_t n, int64_t t) {
  return static_cast<S*>(p.distances) + (n * p.T + a.place[t]) * p.distances_pitch;
}
template <class S>
static void keep_distances(const Alignment& p, const Frames<S>& a, const Frames<S>& b, int64_t n, int64_t t,
                           const S* d) {
  S* const to = kept_distances(p, a, n, t);
  if (b.count == p.S) return static_cast<void>(memcpy(to, d, static_cast<size_t>(b.count) * sizeof(S)));
  for (int64_t i = 0; i < b.count; ++i) to[b.place[i]] = d[i];
}
// Those of a block of queries, with zeros for queries beyond the last frame.
template <class V>
static void take_distances(const Alignment& p, const Frames<typename V::S>& a, const Frames<typename V::S>& b,
                           int64_t n, int64_t t0, int64_t pitch, typename V::S* d) {
  using S = typename V::S;
  for (int m = 0; m < V::M; ++m) {
    S* const row = d + m * pitch;
    if (t0 + m >= a.count) {
      memset(row, 0, static_cast<size_t>(round_up(b.count, V::L)) * sizeof(S));
      continue;
    }
    const S* const kept = kept_distances(p, a, n, t0 + m);
    if (b.count == p.S)
      memcpy(row, kept, static_cast<size_t>(b.count) * sizeof(S));
    else
      for (int64_t i = 0; i < b.count; ++i) row[i] = kept[b.place[i]];
    mark_end<V>(row, b.count);
  }
}

// How far the weights up to `weight` can move a soft neighbour: sum_j z_j |b_j - b_likely| <= sum_j z_j (|a - b_j| + |a
// - b_likely|), from the upper ends of the distances' bounds. `size`, `sizes`: of the query and the keys, centred.
template <class V>
static double left_out(const typename V::S* z, const typename V::S* d, typename V::S size, const typename V::S* sizes,
                       int64_t likely, int64_t count, const Rounding<typename V::S>& rounding, typename V::S weight) {
  using R = typename V::R;
  const auto end = [&](R value, R of_key) { return value + ((size + of_key) * rounding.products + rounding.least); };
  R weights{}, moments{};
  for (int64_t i = 0; i < count; i += V::L) {
    const R here = V::load(z + i), small = here > weight ? R{} : here;
    weights += small;
    moments += small * (small == 0 ? R{} : end(V::load(d + i), V::load(sizes + i)));  // infinite beyond the last frame
  }
  const double sum = static_cast<double>(V::sum(weights)), moment = static_cast<double>(V::sum(moments));
  const typename V::S farthest = end(R{} + d[likely], R{} + sizes[likely])[0];
  return 1.001 * (__builtin_sqrt(sum * static_cast<double>(max_of<double>(moment, 0))) +
                  sum * __builtin_sqrt(static_cast<double>(max_of<typename V::S>(farthest, 0))));
}

// Whether a block's soft neighbours around the mean of all frames, of which `rest` holds the rest, are as good as
// around themselves: rounding is measured by what is added up,
// sum_i z_i |b_i - mean|^2 = |soft - mean|^2 + sum_i z_i |b_i - soft|^2, and the first part may be three times the
// second.
template <class V>
static bool dense_soft_neighbors(const Sizes& s, const Sample<typename V::S>& sample, const Frames<typename V::S>& b,
                                 int rows, const Block<V>& block) {
  using R = typename V::R;
  for (int m = 0; m < rows; ++m) {
    R whole{}, squares{};
    for (int64_t i = 0; i < b.count; i += V::L) whole += V::load(block.z + m * s.pitch + i) * V::load(b.sizes + i);
    for (int64_t c = 0; c < s.C; c += V::L) {
      const R value = V::load(block.rest + m * s.C + c);
      squares += value * value;
    }
    if (!(4 * V::sum(squares) <= 3 * V::sum(whole))) return false;
  }
  return true;
}

// A weight of no matter beside others: all such together are less than 2^-10.
template <class S>
static S small_weight(int64_t keys) {
  return S(0x1p-10) / static_cast<S>(keys);
}

// One block of queries of a against b, from the weights z and, where nearest frames are asked for and distances were
// products or would have been, the distances r. `around`: unless null, rest has the sums of all keys around it. See
// map_blocks.
template <class V>
static void map_block(const Alignment& p, const Sizes& s, const Sample<typename V::S>& sample,
                      const Frames<typename V::S>& a, const Frames<typename V::S>& b, const Block<V>& block, int64_t t0,
                      bool products, const typename V::S* around, const int64_t* likely, void* soft, int64_t row0,
                      int64_t* index) {
  using S = typename V::S;
  constexpr int M = V::M;
  const int rows = static_cast<int>(min_of<int64_t>(M, a.count - t0));
  const bool pruned = index && sample.products();
  const auto soft_neighbors = [&](S weight) {
    const int64_t used = frames_with_weight<V>(block.z, s.pitch, b.count, sample.finite, weight, block.list);
    if (soft || !pruned) weighted_sum<V, false>(block.z, s.pitch, b.rows, block.list, used, s.C, nullptr, block.centre);
    weighted_sum<V, true>(block.z, s.pitch, b.rows, block.list, used, s.C, block.centre, block.rest);
  };
  int64_t nearest[M];
  const Nearest<V> search{s,       p.C,    sample,       a,          b,          t0,     rows, products,
                          block.r, likely, block.centre, block.rest, block.list, nearest};
  for (int64_t& found : nearest) found = -2;
  bool done = false;
  if (around)
    for (int m = 0; m < M; ++m) memcpy(block.centre + m * s.C, around, static_cast<size_t>(s.C) * sizeof(S));
  // Where only what is written is asked for, one frame's numbers are as good as a centre.
  const bool flat = around && (!index || dense_soft_neighbors<V>(s, sample, b, rows, block));
  if (pruned && !soft && !flat) {
    const S small = small_weight<S>(b.count);
    for (int m = 0; m < M; ++m)
      memcpy(block.centre + m * s.C, b.rows + likely[m] * s.C, static_cast<size_t>(s.C) * sizeof(S));
    double slack[M];
    for (int m = 0; m < rows; ++m)
      slack[m] = left_out<V>(block.z + m * s.pitch, block.r + m * s.pitch, a.sizes[t0 + m], b.sizes, likely[m], b.count,
                             search.rounding, small);
    soft_neighbors(small);
    search.by_distances(1, slack);
    done = search.settled();
  }
  if (!done && !flat) soft_neighbors(0);
  if (pruned && !done) {
    if (flat) search.by_mean(block.z);
    if (flat && products && !search.settled()) search.by_first(block.split, block.z);
    if (!search.settled()) search.by_distances(most_compared, nullptr);
    done = search.settled();
    if (!done && products) search.by_products(block.split, block.z), done = true;
  }
  if (index && !done) {
    interleave<V>(block.centre, block.rest, s.C, p.C, block.split);
    distances_to_soft<V>(block.split, b.panels, b.count, p.C, block.r, s.pitch);
    for (int m = 0; m < rows; ++m) nearest[m] = first_smallest<V>(block.r + m * s.pitch, b.count);
  }
  for (int m = 0; index && m < rows; ++m) index[row0 + a.place[t0 + m]] = nearest[m] < 0 ? -1 : b.place[nearest[m]];
  if (!soft) return;
  for (int m = 0; m < rows; ++m) {
    S* sum = block.rest + m * s.C;
    for (int64_t c = 0; c < p.C; ++c) sum[c] += block.centre[m * s.C + c];
    write(soft, p.dtype, (row0 + a.place[t0 + m]) * p.C, sum, p.C, 1 / sample.scale);
  }
}

// Queries of `count` blocks from t0 on against b: soft neighbours and nearest frames. `index` null: soft alone; `soft`
// null: index alone.
template <class V>
static void map_blocks(const Alignment& p, const Sizes& s, const Sample<typename V::S>& sample,
                       const Frames<typename V::S>& a, const Frames<typename V::S>& b, int64_t t0, int64_t count,
                       void* soft, int64_t n, int64_t* index) {
  using S = typename V::S;
  constexpr int M = V::M;
  const int64_t row0 = n * (&a == &sample.a ? p.T : p.S);
  char* const memory = Block<V>::memory(s, count);
  const auto block_at = [&](int64_t k) { return Block<V>(s, memory, k); };
  distances_of_blocks<V>(s, p.C, sample, a, b, t0, count, block_at);
  const bool pruned = index && sample.products();
  const S small = small_weight<S>(b.count);
  bool products[most_blocks];
  int64_t likely[most_blocks][M];
  const S* around[most_blocks] = {};
  Sum<V, false> sums[most_blocks];
  int64_t dense = 0;
  for (int64_t k = 0; k < count; ++k) {
    const Block<V> block = block_at(k);
    products[k] = sample.products() && settle_block<V>(s, p.C, sample, a, b, t0 + k * M, false, block.z, block.list);
    for (int64_t t = t0 + k * M; p.distances && t < min_of(t0 + (k + 1) * M, a.count); ++t)
      keep_distances(p, a, b, n, t, block.z + (t - t0 - k * M) * s.pitch);
    if (pruned) memcpy(block.r, block.z, static_cast<size_t>(M * s.pitch) * sizeof(S));
    S least, sum_of_exp;
    for (int m = 0; m < M; ++m)
      likely[k][m] = softmax<V>(block.z + m * s.pitch, b.count, sample.sharpness, least, sum_of_exp);
    if (index && !pruned) continue;
    // Most weights matter: they are added up at once, around the mean, or a probable frame.
    const int64_t used = frames_with_weight<V>(block.z, s.pitch, b.count, sample.finite, index ? small : 0, block.list);
    if (2 * used <= b.count) continue;
    around[k] = sample.mean;
    if (!index) {
      const int64_t rows = min_of<int64_t>(M, a.count - t0 - k * M);
      const S* near[M];
      for (int m = 0; m < M; ++m) near[m] = b.rows + likely[k][m] * s.C;
      around[k] = near_frame<V>(near, rows, s.C, block.split);
    }
    sums[dense++] = {Weights<false, V>(block.z, s.pitch), around[k], block.rest, s.C};
  }
  sums_around_one<V, false>(sums, dense, b.rows, nullptr, b.count, s.C);
  for (int64_t k = 0; k < count; ++k)
    map_block<V>(p, s, sample, a, b, block_at(k), t0 + k * M, products[k], around[k], likely[k], soft, row0, index);
}

// index[t] of a in b through the distances `between` the frames of b: argmin_i sum_j z_tj between[j][i].
template <class V>
static void map_through_distances(const Sizes& s, const Sample<typename V::S>& sample, typename V::S* d,
                                  const typename V::S* between, const Frames<typename V::S>& a,
                                  const Frames<typename V::S>& b, int64_t* index, typename V::S* spread) {
  using S = typename V::S;
  using R = typename V::R;
  constexpr int L = V::L;
  for (int64_t t = 0; t < a.count; ++t) {
    S* z = d + t * s.pitch;
    S least, sum;
    softmax<V>(z, b.count, sample.sharpness, least, sum);
    for (int64_t i = 0; i < b.count; i += L) {
      R acc{};
      for (int64_t j = 0; j < b.count; ++j) acc += z[j] * V::load(between + j * s.pitch + i);
      V::store(spread + i, acc);
    }
    const int64_t found = first_smallest<V>(spread, b.count);
    index[a.place[t]] = found < 0 ? -1 : b.place[found];
  }
}

// One sample of short sequences, all matrices of distances on the way.
template <class V>
static void cycle_of_short(const Alignment& p, const Sizes& s, int64_t n) {
  using S = typename V::S;
  constexpr int M = V::M;
  const int64_t frames = max_of(s.T, s.S), matrix = frames * s.pitch;
  const int64_t packed = (p.T + p.S) * 8 + (s.T + s.S) * (p.C + 1) * static_cast<int64_t>(sizeof(S)) + 8 * 64;
  char* at = static_cast<char*>(
      scratch(1, static_cast<size_t>(packed + (3 * matrix + frames) * static_cast<int64_t>(sizeof(S)))));
  S* d = reinterpret_cast<S*>(at);
  S *back = d + matrix, *between = back + matrix, *spread = between + matrix;
  at = reinterpret_cast<char*>(spread + frames);
  Sample<S> sample = lay_out<V>(p, s, false, false, at);
  fill_sample<V>(p, s, n, sample);
  for (int64_t t = 0; t < sample.a.count; t += M)
    distances<V>(OfPanel<V>(sample.a.panels, t, p.C), sample.b.panels, sample.b.count, p.C, d + t * s.pitch, s.pitch);
  for (int64_t t = 0; t < sample.a.count; ++t)
    for (int64_t i = 0; i < sample.b.count; ++i) back[i * s.pitch + t] = d[t * s.pitch + i];
  for (int64_t t = 0; t < sample.b.count; t += M)
    distances<V>(OfPanel<V>(sample.b.panels, t, p.C), sample.b.panels, sample.b.count, p.C, between + t * s.pitch,
                 s.pitch);
  map_through_distances<V>(s, sample, d, between, sample.a, sample.b, p.index_ab + n * p.T, spread);
  for (int64_t t = 0; t < sample.a.count; t += M)
    distances<V>(OfPanel<V>(sample.a.panels, t, p.C), sample.a.panels, sample.a.count, p.C, between + t * s.pitch,
                 s.pitch);
  map_through_distances<V>(s, sample, back, between, sample.b, sample.a, p.index_ba + n * p.S, spread);
}

static bool in_place(const FrameMask& mask, int64_t n, int64_t frames, const int64_t* index) {
  for (int64_t t = 0; t < frames; ++t)
    if (index[t] != t && mask.there(n, t)) return false;
  return true;
}

// A row w that should add up to zero does so but for rounding of its own size: what it adds up to goes off in proportion
// to z, as an error in a mean under z came in. Both are zero beyond the last frame.
template <class V>
static void balance(const typename V::S* z, typename V::S* w, int64_t count) {
  typename V::R sums{};
  for (int64_t i = 0; i < count; i += V::L) sums += V::load(w + i);
  const typename V::S sum = V::sum(sums);
  for (int64_t i = 0; i < count; i += V::L) V::store(w + i, V::load(w + i) - V::load(z + i) * sum);
}

// A row of w, the gradients of weights z = softmax(-sharpness d^2), becomes z (w - sum z w) 2 sharpness: what the
// differences of frames are multiplied by. Places from `count` on become 0.
template <class V>
static void distance_gradients(const typename V::S* z, typename V::S* w, int64_t count, typename V::S sharpness) {
  using S = typename V::S;
  using R = typename V::R;
  constexpr int L = V::L;
  const R lanes = lane_numbers<V>();
  R sums{};
  for (int64_t i = 0; i < count; i += L) {
    const R there = lanes + static_cast<S>(i) < static_cast<S>(count) ? V::load(w + i) : R{};
    V::store(w + i, there);
    sums += V::load(z + i) * there;
  }
  const S sum = V::sum(sums);
  for (int64_t i = 0; i < count; i += L) V::store(w + i, V::load(z + i) * (V::load(w + i) - sum) * (2 * sharpness));
  balance<V>(z, w, count);
}

#include "cycle_consistency_loss.h"

// What gradients are made of, both [T][pitch], and `apart`:
//   z the softmax (soft_backward only), and w_ti = factor * dL / d(logit_ti), so that
//   da_t = sum_i w_ti (b_i - u_t)        db_i = sum_t (z_ti grad_t + w_ti (a_t - b_i))
// The rows of w add up to zero, so that any centre u_t would do; the most probable frame is near.
// apart: for every block of keys, the squared distances of its middle one to the queries.
template <class S>
struct GradientWeights {
  S *z, *w, *apart;
};

// Queries [t0, t0 + M), whose distances are in block.z: where they land, or with gradients what those of their logits
// are made of, in block.z and block.r, and the frames near[m].
template <class V>
static void land_block(const Alignment& p, const Sizes& s, const Sample<typename V::S>& sample, int64_t n, int64_t t0,
                       const Block<V>& block, const GradientWeights<typename V::S>& to,
                       const typename V::S* (&near)[V::M]) {
  using S = typename V::S;
  using R = typename V::R;
  constexpr int M = V::M, L = V::L;
  const Frames<S>&a = sample.a, &b = sample.b;
  const int rows = static_cast<int>(min_of<int64_t>(M, a.count - t0));
  const int64_t mid = middle<M>(t0, a.count), end = round_up(b.count, L);
  const bool back = p.kind == Align::back || p.kind == Align::back_backward;
  if (sample.products()) settle_block<V>(s, p.C, sample, a, b, t0, back, block.z, block.list);
  if (p.kind != Align::back) {
    memcpy(block.apart, block.z + (mid - t0) * s.pitch, static_cast<size_t>(end) * sizeof(S));
    for (int64_t i = b.count; i < end; ++i) block.apart[i] = 0;
    for (int64_t i0 = 0; i0 < b.count; i0 += M)
      for (int m = 0; m < M; ++m) to.apart[i0 / M * (s.T + M) + t0 + m] = block.z[m * s.pitch + middle<M>(i0, b.count)];
  }
  for (int m = 0; m < M; ++m) {
    S *z = block.z + m * s.pitch, *w = block.r + m * s.pitch;
    if (back && m < rows && sample.products())  // far or near, the loss is of this one
      z[t0 + m] = row_distance<V>(a.rows + (t0 + m) * s.C, b.rows + (t0 + m) * s.C, s.C);
    const S own = back && m < rows ? z[t0 + m] : S(0);
    if (p.kind == Align::back && p.distances && m < rows) keep_distances(p, a, b, n, t0 + m, z);
    S least, sum;
    const int64_t likely = softmax<V>(z, b.count, sample.sharpness, least, sum);
    near[m] = b.rows + likely * s.C;
    if (!back || m >= rows) continue;
    // Places relative to the most probable one's: the mean of numbers close to each other.
    const S from = b.number[likely];
    const auto moment = [&](S mean, bool squared) {
      R acc{};
      for (int64_t i = 0; i < b.count; i += L) {
        const R away = (V::load(b.number + i) - from) - mean, z_there = V::load(z + i);
        const R term = z_there * (squared ? away * away : away);
        acc += z_there == 0 ? R{} : term;  // beyond the last frame there are no places
      }
      return V::sum(acc);
    };
    const S mean = moment(0, false), variance = moment(mean, true);
    const int64_t row = n * p.T + a.place[t0 + m];
    const S away = (a.number[t0 + m] - from) - mean;
    if (p.kind == Align::back) {
      const S log_probability =
          (least - own) * sample.sharpness - static_cast<S>(__builtin_log(static_cast<double>(sum)));
      if (p.loss) {
        static_cast<S*>(p.loss)[row] = Landing<S>(p).loss(log_probability, away, variance, Logarithm());
        continue;
      }
      static_cast<S*>(p.log_probability)[row] = log_probability;
      static_cast<S*>(p.mean)[row] = from + mean;
      static_cast<S*>(p.variance)[row] = variance;
      continue;
    }
    S g, g_mean, g_variance;
    if (p.grad_loss) {
      Landing<S>(p).gradients(grad_of_loss<S>(p, n, a.place[t0 + m]), away, variance, g, g_mean, g_variance);
    } else {
      g = static_cast<const S*>(p.grad_log_probability)[row], g_mean = static_cast<const S*>(p.grad_mean)[row],
      g_variance = static_cast<const S*>(p.grad_variance)[row];
    }
    const S factor = static_cast<S>(2 / sample.scale / p.temperature);
    for (int64_t i = 0; i < b.count; i += L) {
      const R to_mean = (V::load(b.number + i) - from) - mean;
      const R value = factor * (V::load(z + i) * (g_mean * to_mean + g_variance * (to_mean * to_mean - variance) - g));
      V::store(w + i, lane_numbers<V>() + static_cast<S>(i) < static_cast<S>(b.count) ? value : R{});
    }
    w[t0 + m] += factor * g;
    balance<V>(z, w, b.count);
  }
  if (back) memset(block.r + rows * s.pitch, 0, static_cast<size_t>((M - rows) * s.pitch) * sizeof(S));
}

// `count` blocks of queries from t0 on: where they land, or their gradients, and in `to` what those of keys are made
// of.
template <class V>
static void landing_blocks(const Alignment& p, const Sizes& s, const Sample<typename V::S>& sample, int64_t n,
                           int64_t t0, int64_t count, const GradientWeights<typename V::S>& to) {
  using S = typename V::S;
  constexpr int M = V::M;
  char* const memory = Block<V>::memory(s, count);
  const auto block_at = [&](int64_t k) {
    Block<V> block(s, memory, k);
    if (p.kind == Align::soft_backward) block.z = to.z + (t0 + k * M) * s.pitch;
    if (p.kind != Align::back) block.r = to.w + (t0 + k * M) * s.pitch;
    return block;
  };
  const Frames<S>&a = sample.a, &b = sample.b;
  const S* near[most_blocks][M];
  if (distances_are_given(p))
    for (int64_t k = 0; k < count; ++k) take_distances<V>(p, a, b, n, t0 + k * M, s.pitch, block_at(k).z);
  else
    distances_of_blocks<V>(s, p.C, sample, a, b, t0, count, block_at);
  for (int64_t k = 0; k < count; ++k) land_block<V>(p, s, sample, n, t0 + k * M, block_at(k), to, near[k]);
  if (p.kind == Align::back) return;
  if (p.kind == Align::soft_backward) {
    const S* one[most_blocks];  // around which keys are taken
    for (int64_t k = 0; k < count; ++k)
      one[k] = near_frame<V>(near[k], min_of<int64_t>(M, a.count - t0 - k * M), s.C, block_at(k).centre);
    products<V>(
        count, [&](int64_t k) { return OfPanel<V>(sample.grad.panels, t0 + k * M, p.C); },
        [&](int64_t k) { return one[k]; }, b.panels, b.count, p.C, [&](int64_t k) { return block_at(k).r; }, s.pitch);
    for (int64_t k = 0; k < count; ++k)
      for (int m = 0; m < M; ++m)
        distance_gradients<V>(block_at(k).z + m * s.pitch, block_at(k).r + m * s.pitch, b.count, sample.sharpness);
  }
  Sum<V, false> sums[most_blocks];
  int64_t dense = 0;
  for (int64_t k = 0; k < count; ++k) {
    const Block<V> block = block_at(k);
    const int64_t used = frames_with_weight<V>(block.r, s.pitch, b.count, sample.finite, 0, block.list);
    if (2 * used > b.count) {
      const S* const one = a.rows + middle<M>(t0 + k * M, a.count) * s.C;
      sums[dense] = {Weights<false, V>(block.r, s.pitch), one, block.rest, s.C};
      sums[dense++].around(near[k], block.apart);
    } else {
      for (int m = 0; m < M; ++m) memcpy(block.centre + m * s.C, near[k][m], static_cast<size_t>(s.C) * sizeof(S));
      weighted_sum<V, true>(block.r, s.pitch, b.rows, block.list, used, s.C, block.centre, block.rest);
    }
  }
  sums_of_rows<V, false>(sums, dense, b.rows, nullptr, b.count, s.C);
  for (int64_t t = t0; t < min_of(t0 + count * M, a.count); ++t) {
    const int64_t at = (n * p.T + a.place[t]) * p.C;
    S* const sum = block_at((t - t0) / M).rest + (t - t0) % M * s.C;
    if (p.add_to_da) {  // a loss, in the precision of sums
      const S* const there = static_cast<const S*>(p.da) + at;
      for (int64_t c = 0; c < p.C; ++c) sum[c] += there[c];
    }
    write(p.da, p.dtype, at, sum, p.C, 1);
  }
}

// db of `count` blocks of keys from i0 on: sum_t (z_ti grad_t + w_ti (a_t - b_i)).
template <class V>
static void key_gradients(const Alignment& p, const Sizes& s, const Sample<typename V::S>& sample, int64_t n,
                          int64_t i0, int64_t count, const GradientWeights<typename V::S>& from) {
  using S = typename V::S;
  constexpr int M = V::M;
  char* const memory = Block<V>::memory(s, count);
  const Frames<S>&a = sample.a, &b = sample.b;
  Sum<V, true> sums[most_blocks];
  for (int64_t k = 0; k < count; ++k) {
    const int64_t i = i0 + k * M;
    sums[k] = {Weights<true, V>(from.w + i, s.pitch), b.rows + middle<M>(i, b.count) * s.C, Block<V>(s, memory, k).rest,
               s.C};
    sums[k].of_second = Weights<true, V>(from.z + i, s.pitch);
    sums[k].around(Rows<const S, M>(b.rows, i, b.count, s.C).at, from.apart + i / M * (s.T + M));
  }
  if (p.kind == Align::soft_backward)
    sums_of_rows<V, true>(sums, count, a.rows, sample.grad.rows, a.count, s.C);
  else
    sums_of_rows<V, false>(sums, count, a.rows, nullptr, a.count, s.C);
  for (int64_t i = i0; i < min_of(i0 + count * M, b.count); ++i)
    write(p.db, p.dtype, (n * p.S + b.place[i]) * p.C, sums[(i - i0) / M].out[(i - i0) % M], p.C, 1);
}

// ---- the whole problem ----------------------------------------------------------------------------------------------

template <class Function>
static void run(const Parallel& parallel, int64_t count, const Function& function) {
  if (count == 0) return;
  parallel.run(
      parallel.pool, count, [](void* context, int64_t i) { (*static_cast<const Function*>(context))(i); },
      const_cast<void*>(static_cast<const void*>(&function)));
}

static void fill_indices(int64_t* index, int64_t count) {
  for (int64_t i = 0; index && i < count; ++i) index[i] = -1;
}

template <class V>
static void align_as(const Alignment& p, const Parallel& parallel) {
  using S = typename V::S;
  constexpr int M = V::M;
  const Sizes s = sizes_of<V>(p);
  const int64_t element = element_size(p.dtype), sum = sizeof(S);
  // What nothing is written for: frames that are not there, and samples without any frame to map to.
  fill_indices(p.index_ab, p.N * p.T);
  fill_indices(p.index_ba, p.N * p.S);
  if (p.soft && (p.mask_a.data || p.mask_b.data)) memset(p.soft, 0, static_cast<size_t>(p.N * p.T * p.C * element));
  const bool masked = p.mask_a.data || p.mask_b.data || p.mask_through.data;
  if (p.da && !p.add_to_da && masked) memset(p.da, 0, static_cast<size_t>(p.N * p.T * p.C * element));
  if (p.db && (p.mask_b.data || p.mask_through.data)) memset(p.db, 0, static_cast<size_t>(p.N * p.S * p.C * element));
  if (p.kind == Align::back && p.mask_a.data)
    for (void* result : {p.log_probability, p.mean, p.variance, p.loss})
      if (result) memset(result, 0, static_cast<size_t>(p.N * p.T * sum));

  const AlignForm form = distances_are_given(p) ? AlignForm::differences : plan_alignment(p);
  if (form == AlignForm::within) {
    run(parallel, p.N, [&](int64_t n) { cycle_of_short<V>(p, s, n); });
  } else {
    const bool gradients = p.kind == Align::soft_backward || p.kind == Align::back_backward;
    const int64_t weights = gradients ? (2 * s.T * s.pitch + (s.S / M + 1) * (s.T + M)) * sum : 0;
    const bool products = form == AlignForm::products;
    const int64_t packed = (p.T + p.S) * 8 + 17 * 64 +
                           ((s.T + s.S) * (p.C + s.C + 1) + (p.grad.data ? s.T * (p.C + s.C) : 0) +
                            (products ? (s.T + s.S) * (p.C + 1) + s.C : 0)) *
                               sum;
    const int64_t per_sample = round_up(packed + weights + static_cast<int64_t>(sizeof(Sample<S>)), 64);
    // As many samples at once as every thread has in its caches, about, and at least one per thread.
    const int64_t threads = max_of(parallel.threads, 1);
    const int64_t group = min_of(p.N, max_of(threads, (threads << 20) / per_sample));
    char* const memory = static_cast<char*>(scratch(0, static_cast<size_t>(group * per_sample)));
    for (int64_t first = 0; first < p.N; first += group) {
      const int64_t samples = min_of(group, p.N - first);
      const auto sample_at = [&](int64_t i) { return reinterpret_cast<Sample<S>*>(memory + i * per_sample); };
      const auto weights_at = [&](int64_t i) {
        S* const z = reinterpret_cast<S*>(memory + (i + 1) * per_sample - weights);
        return GradientWeights<S>{z, z + s.T * s.pitch, z + 2 * s.T * s.pitch};
      };
      // A task packs a sample or, where they are few, a part of one.
      const int64_t sides = sides_of(p), parts = samples < threads ? sides : 1;
      const auto centre = [&](Sample<S>& sample, int64_t side) {
        if (side < 2 && sample.products()) centre_frames<V>(p.C, side == 0 ? sample.a : sample.b, sample.mean);
      };
      const auto finish = [&](int64_t i) {
        Sample<S>& sample = *sample_at(i);
        finish_sample<V>(p, s, sample);
        if (!p.mask_through.any(first + i, p.frames_through)) sample.b.count = 0;  // no way, so no cycle and no loss
        if (sample.products()) mean_of_frames<V>(s, sample.a, sample.b, sample.mean);
      };
      for (int64_t i = 0; i < samples; ++i) {
        char* at = memory + i * per_sample + round_up(sizeof(Sample<S>), 64);
        const Sample<S> sample = lay_out<V>(p, s, true, products, at);
        memcpy(static_cast<void*>(sample_at(i)), &sample, sizeof sample);
        if (parts > 1) find_sample<V>(p, first + i, *sample_at(i));
      }
      run(parallel, samples * parts, [&](int64_t task) {
        const int64_t i = task / parts;
        if (parts > 1) return pack_side<V>(p, s, first + i, task % parts, *sample_at(i));
        find_sample<V>(p, first + i, *sample_at(i));
        for (int64_t side = 0; side < sides; ++side) pack_side<V>(p, s, first + i, side, *sample_at(i));
        finish(i);
        for (int64_t side = 0; side < sides; ++side) centre(*sample_at(i), side);
      });
      if (parts > 1) {
        for (int64_t i = 0; i < samples; ++i) finish(i);
        run(parallel, samples * 2, [&](int64_t task) { centre(*sample_at(task / 2), task % 2); });
      }
      const int64_t blocks = (p.T + M - 1) / M, key_blocks = (p.S + M - 1) / M;
      const int64_t backward_blocks = p.kind == Align::cycle ? key_blocks : 0;
      const bool maps = p.kind == Align::soft || p.kind == Align::cycle;
      // Several blocks at once where every thread still has four tasks.
      const int64_t enough = samples * (blocks + backward_blocks) / (4 * max_of(parallel.threads, 1));
      const int64_t together = products || gradients ? max_of<int64_t>(1, min_of<int64_t>(most_blocks, enough)) : 1;
      const int64_t tasks = (blocks + together - 1) / together, backward = (backward_blocks + together - 1) / together;
      // Sample by sample: a thread's share has the keys of one, or a few, in its caches.
      run(parallel, samples * (tasks + backward), [&](int64_t task) {
        const int64_t at = task / (tasks + backward), number = task % (tasks + backward), n = first + at;
        const Sample<S>& sample = *sample_at(at);
        const bool from_b = number >= tasks;
        const Frames<S>&a = from_b ? sample.b : sample.a, &b = from_b ? sample.a : sample.b;
        const int64_t t = (from_b ? number - tasks : number) * together * M;
        if (t >= a.count || b.count == 0) return;
        const int64_t count = min_of(together, (a.count - t + M - 1) / M);
        if (maps)
          map_blocks<V>(p, s, sample, a, b, t, count, p.soft, n, from_b ? p.index_ba : p.index_ab);
        else
          landing_blocks<V>(p, s, sample, n, t, count, weights_at(at));
      });
      if (!gradients) continue;
      const int64_t key_tasks = (key_blocks + together - 1) / together;
      run(parallel, samples * key_tasks, [&](int64_t task) {
        const int64_t at = task / key_tasks, i = task % key_tasks * together * M;
        const Sample<S>& sample = *sample_at(at);
        if (i >= sample.b.count) return;
        const int64_t count = min_of(together, (sample.b.count - i + M - 1) / M);
        key_gradients<V>(p, s, sample, first + at, i, count, weights_at(at));
      });
    }
  }
  if (p.kind != Align::cycle) return;
  for (int64_t n = 0; n < p.N; ++n)
    p.gate[n] = p.T == p.S && in_place(p.mask_a, n, p.T, p.index_ab + n * p.T) &&
                in_place(p.mask_b, n, p.S, p.index_ba + n * p.S);
}

// Short sequences, a sample or a block of one at a time. Results do not depend on which.
template <class V>
static void short_losses(const Alignment& p, const Parallel& parallel) {
  const Sizes s = sizes_of<V>(p);
  const auto alone = [](int64_t count, const auto& function) {
    for (int64_t i = 0; i < count; ++i) function(i);
  };
  // Multiply-adds of a product, about; a thread is worth waking for a few microseconds' work.
  const int64_t sample = p.T * (p.T + p.S) * p.C;
  const size_t bytes = static_cast<size_t>(ShortLoss<V>::bytes(p, s));
  const int64_t at_once = min_of<int64_t>(parallel.threads, (p.T + V::M - 1) / V::M);  // of one sample
  if (p.N >= at_once || sample < (int64_t(1) << 18)) {
    const auto whole = [&](int64_t n) {
      ShortLoss<V>(p, s, n, static_cast<char*>(scratch(1, bytes))).run_blocks(alone);
    };
    if (p.N * sample < (int64_t(1) << 18)) return alone(p.N, whole);
    return run(parallel, p.N, whole);
  }
  for (int64_t n = 0; n < p.N; ++n)
    ShortLoss<V>(p, s, n, static_cast<char*>(scratch(0, bytes))).run_blocks([&](int64_t count, const auto& function) {
      run(parallel, count, function);
    });
}

template <class V>
static void losses(const Alignment& p, const Parallel& parallel) {
  const bool backward = p.kind == Align::loss_backward, masked = p.mask_a.data || p.mask_b.data;
  const auto clear = [](void* numbers, int64_t count) {
    memset(numbers, 0, static_cast<size_t>(count) * sizeof(typename V::S));
  };
  if (!backward && masked) clear(p.loss, p.N * p.T);
  if (!backward && masked && p.distances) clear(p.distances, p.N * p.T * p.distances_pitch);
  if (!p.distances && plan_alignment(p) == AlignForm::within) {
    if (masked && !backward && p.soft) clear(p.soft, p.N * p.T * p.C);
    if (masked && p.da) clear(p.da, p.N * p.T * p.C), clear(p.db, p.N * p.S * p.C);
    return short_losses<V>(p, parallel);
  }
  const LossParts parts = parts_of_loss(p);
  align_as<V>(backward ? parts.back : parts.there, parallel);
  align_as<V>(backward ? parts.there : parts.back, parallel);
}

template <class V>
static void align_any(const Alignment& p, const Parallel& parallel) {
  return p.kind == Align::loss || p.kind == Align::loss_backward ? losses<V>(p, parallel) : align_as<V>(p, parallel);
}

void align(const Alignment& p, const Parallel& parallel) { align_any<F32>(p, parallel); }
