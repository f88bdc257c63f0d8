// Vectors of numbers for AVX2, FMA and F16C: what the CPU kernels are written in. Included, after scalar.h, inside
// the namespace and under the target pragma of the instruction set.
//
// R is a register of L numbers S; memory may hold a 16-bit type instead. No alignment is asked for.

struct Floats {
  using S = float;
  using R = __m256;
  static constexpr int L = 8;
  static R set1(S v) { return _mm256_set1_ps(v); }
  static R load(const float* p) { return _mm256_loadu_ps(p); }
  static R load(const bf16_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static R load(const f16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store(float* p, R v) { _mm256_storeu_ps(p, v); }
  static void store(bf16_t* p, R v) {
    const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i r = _mm256_blendv_epi8(rounded, quiet, nan);
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(both));
  }
  static void store(f16_t* p, R v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <class T>
  static S scalar(T v) {
    return static_cast<S>(to_double(v));
  }
  // out[i * step + l] = src[at[l] + i] for L x L values.
  template <class T>
  static void transpose(const T* src, const int64_t* at, S* out, int64_t step) {
    for (int i = 0; i < L; ++i)
      for (int l = 0; l < L; ++l) out[i * step + l] = scalar(src[at[l] + i]);
  }
  static R fma(R a, R b, R c) { return _mm256_fmadd_ps(a, b, c); }
  static R add(R a, R b) { return _mm256_add_ps(a, b); }
  static R mul(R a, R b) { return _mm256_mul_ps(a, b); }
  static R relu(R v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }  // the second operand where either is NaN
  static R sub(R a, R b) { return _mm256_sub_ps(a, b); }
  static R div(R a, R b) { return _mm256_div_ps(a, b); }
  static R reciprocal(R d) { return div(set1(1), d); }
  static R min(R a, R b) { return _mm256_min_ps(a, b); }  // b where either is NaN, max too
  static R max(R a, R b) { return _mm256_max_ps(a, b); }
  static R less(R a, R b, R yes, R no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static R round(R v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static R times_power(R v, R n) {  // v 2^n, n whole and in [-126, 127]
    const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(v, _mm256_castsi256_ps(bits));
  }
  static S sum(R v) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
  }
  static S largest(R v) {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
  }
  static void sums(R a, R b, R c, R d, S* out) {  // four sums, added up in one order whatever the place
    const R all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
  }
};

struct Doubles {
  using S = double;
  using R = __m256d;
  static constexpr int L = 4;
  static R set1(S v) { return _mm256_set1_pd(v); }
  static R load(const double* p) { return _mm256_loadu_pd(p); }
  static void store(double* p, R v) { _mm256_storeu_pd(p, v); }
  static S scalar(double v) { return v; }
  // out[i * step + l] = src[at[l] + i] for L x L values.
  template <class T>
  static void transpose(const T* src, const int64_t* at, S* out, int64_t step) {
    for (int i = 0; i < L; ++i)
      for (int l = 0; l < L; ++l) out[i * step + l] = scalar(src[at[l] + i]);
  }
  static R fma(R a, R b, R c) { return _mm256_fmadd_pd(a, b, c); }
  static R add(R a, R b) { return _mm256_add_pd(a, b); }
  static R mul(R a, R b) { return _mm256_mul_pd(a, b); }
  static R relu(R v) { return _mm256_max_pd(_mm256_setzero_pd(), v); }
  static R sub(R a, R b) { return _mm256_sub_pd(a, b); }
  static R div(R a, R b) { return _mm256_div_pd(a, b); }
  static R reciprocal(R d) { return div(set1(1), d); }
  static R min(R a, R b) { return _mm256_min_pd(a, b); }  // b where either is NaN, max too
  static R max(R a, R b) { return _mm256_max_pd(a, b); }
  static R less(R a, R b, R yes, R no) { return _mm256_blendv_pd(no, yes, _mm256_cmp_pd(a, b, _CMP_LT_OQ)); }
  static R round(R v) { return _mm256_round_pd(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static S sum(R v) {
    const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
  }
  static S largest(R v) {
    const __m128d half = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(half, _mm_unpackhi_pd(half, half)));
  }
  static void sums(R a, R b, R c, R d, S* out) { out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d); }
};
