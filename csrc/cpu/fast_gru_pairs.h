// fast_gru's products of panels for bf16 by the instruction that adds pairs of products in fp32 (fast_gru_columns.h).
// Weights are read as they lie, [outputs][inputs] in bf16: a pair is two neighbouring inputs. Factors are rounded to
// bf16, as eager PyTorch has them, the state among them, which itself is carried on in fp32; denormal numbers count as
// zeros. Each product adds its pairs one after the other (`run` is for sums whose terms are not rounded).

static inline __m512i two_vectors(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// Two neighbouring inputs, both of which exist, for all lanes.
static inline __m512bh pair_at(const bf16_t* weight) {
  int32_t two;
  memcpy(&two, weight, 4);
  return (__m512bh)_mm512_set1_epi32(two);
}

// out[rows][NR] = (or +=) weight[rows][inputs] in[inputs][NR], rows of the weight `pitch` apart; up to `deep` inputs.
template <int NV>
static void panel_product(float* out, const bf16_t* weight, int64_t pitch, int64_t rows, int64_t inputs, int64_t,
                          const float* in, bool add) {
  constexpr int L = Vector<float>::L, NR = NV * L;
  // [inputs / 2][NR][2]: what 64 outputs want is rounded once.
  alignas(64) bf16_t pairs[deep * NR];
  alignas(64) static constexpr uint16_t interleave[2 * L] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                             21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                             11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(interleave);
  for (int64_t k = 0; k < inputs; k += 2)
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) {
      const float* const first = in + k * NR + v * L;
      const __m512 second = k + 1 < inputs ? _mm512_loadu_ps(first + NR) : _mm512_setzero_ps();
      _mm512_store_si512(pairs + k * NR + 2 * v * L,
                         _mm512_permutexvar_epi16(order, two_vectors(_mm512_loadu_ps(first), second)));
    }
  for (int64_t first = 0; first < rows; first += block_rows) {
    const int64_t count = min_of<int64_t>(block_rows, rows - first);
    const bf16_t* a[block_rows];  // the last row again where there are no more
    for (int m = 0; m < block_rows; ++m) a[m] = weight + (first + min_of<int64_t>(m, count - 1)) * pitch;
    __m512 acc[block_rows][NV];
#pragma GCC unroll 8
    for (int m = 0; m < block_rows; ++m)
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) acc[m][v] = _mm512_setzero_ps();
    const auto add_pair = [&](int64_t k, auto whole) __attribute__((always_inline)) {
      __m512bh b[NV];
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) b[v] = (__m512bh)_mm512_load_si512(pairs + k * NR + 2 * v * L);
#pragma GCC unroll 8
      for (int m = 0; m < block_rows; ++m) {
        const __m512bh w = decltype(whole)::value ? pair_at(a[m] + k) : (__m512bh)_mm512_set1_epi32(a[m][k].bits);
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) acc[m][v] = _mm512_dpbf16_ps(acc[m][v], w, b[v]);
      }
    };
    int64_t k = 0;
    for (; k + 2 <= inputs; k += 2) add_pair(k, std::true_type());
    if (k < inputs) add_pair(k, std::false_type());  // the number that follows is another row's
    float* const to = out + first * NR;
#pragma GCC unroll 8
    for (int m = 0; m < block_rows; ++m)
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) {
        if (m >= count) break;
        float* const at = to + m * NR + v * L;
        _mm512_storeu_ps(at, add ? _mm512_add_ps(acc[m][v], _mm512_loadu_ps(at)) : acc[m][v]);
      }
  }
}

// out[N columns][rows] = (or +=) weight[rows][inputs] in[N][inputs]: for few columns, lanes are pairs of inputs.
template <int N>
static void thin_product(float* out, int64_t out_pitch, const bf16_t* weight, int64_t rows, int64_t inputs,
                         const float* in, int64_t in_pitch, bool add) {
  constexpr int L = Vector<float>::L, M = L / fast_gru::most_thin(L);
  constexpr int64_t piece = 1024;  // inputs that are rounded once for all rows
  alignas(64) bf16_t factors[N][piece];
  for (int64_t k0 = 0; k0 < inputs; k0 += piece) {
    const int64_t some = min_of(piece, inputs - k0);
    for (int n = 0; n < N; ++n)
      for (int64_t k = 0; k < some; k += 2 * L) {
        const float* const from = in + n * in_pitch + k0 + k;
        const __mmask32 lanes = some - k >= 2 * L ? ~__mmask32(0) : (__mmask32(1) << (some - k)) - 1;
        _mm512_store_si512(factors[n] + k,
                           two_vectors(_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), from),
                                       _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> L), from + L)));
      }
    for (int64_t first = 0; first < rows; first += M) {
      const int64_t count = min_of<int64_t>(M, rows - first);
      const bf16_t* a[M];
      for (int m = 0; m < M; ++m) a[m] = weight + (first + min_of<int64_t>(m, count - 1)) * inputs + k0;
      Floats sums[L] = {};  // row by row
      for (int64_t k = 0; k < some; k += 2 * L) {
        const __mmask32 lanes = some - k >= 2 * L ? ~__mmask32(0) : (__mmask32(1) << (some - k)) - 1;
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const __m512bh w = (__m512bh)_mm512_maskz_loadu_epi16(lanes, a[m] + k);
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n)
            sums[m * N + n] =
                (Floats)_mm512_dpbf16_ps((__m512)sums[m * N + n], w, (__m512bh)_mm512_load_si512(factors[n] + k));
        }
      }
      add_lanes<N>(out + first, out_pitch, sums, count, add || k0 > 0);
    }
  }
}

// What fast_gru_gradients.h is made of: a number of a factor holds the bits of two terms in bf16.
static constexpr int64_t terms_at_once = 2;
static inline Floats add_product(Floats sum, float w, Floats b) {
  int32_t two;
  memcpy(&two, &w, 4);
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(two), (__m512bh)b);
}
struct FactorMatrix {
  const float* data;
  int64_t pitch;
};
// Of a matrix [rows][features], whole vectors of them: neighbouring features, [rows][features / 2].
static FactorMatrix pairs_of_features(const float* m, int64_t pitch, int64_t rows, int64_t features, float* out) {
  constexpr int64_t L = Vector<float>::L;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < features; k += 2 * L) {
      const float* const from = m + i * pitch + k;
      const __m512 second = k + L < features ? _mm512_loadu_ps(from + L) : _mm512_setzero_ps();
      _mm512_storeu_si512(out + i * pitch + k / 2, two_vectors(_mm512_loadu_ps(from), second));
    }
  return {out, pitch};
}
static inline __m512i rounded(__m512 v) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v)); }
// Neighbouring rows, [rows / 2][features]; after the last row of an odd number come zeros. `out` may be the matrix.
static FactorMatrix pairs_of_rows(const float* m, int64_t pitch, int64_t rows, int64_t features, float* out) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t k = 0; k < features; k += Vector<float>::L) {
      const float* const from = m + i * pitch + k;
      const __m512i low = rounded(_mm512_loadu_ps(from)),
                    high = i + 1 < rows ? rounded(_mm512_loadu_ps(from + pitch)) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + i / 2 * pitch + k, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  return {out, pitch};
}
