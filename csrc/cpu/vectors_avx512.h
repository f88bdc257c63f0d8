// Vectors of numbers for AVX-512 (F, BW, DQ, VL): what the CPU kernels are written in. Included, after scalar.h, inside
// the namespace and under the target pragma of the instruction set.
//
// R is a register of L numbers S; memory may hold a 16-bit type instead. No alignment is asked for.

struct Floats {
  using S = float;
  using R = __m512;
  static constexpr int L = 16;
  static R set1(S v) { return _mm512_set1_ps(v); }
  static R load(const float* p) { return _mm512_loadu_ps(p); }
  static R load(const bf16_t* p) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static R load(const f16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store(float* p, R v) { _mm512_storeu_ps(p, v); }
  static __m256i rounded_bf16(R v) {
    const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i r = _mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(r);
  }
  static __m256i rounded_f16(R v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static void store(bf16_t* p, R v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded_bf16(v)); }
  static void store(f16_t* p, R v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded_f16(v)); }
  // The first n numbers, n < L; loaded, the others are 0.
  static __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  static R load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static R load_first(const bf16_t* p, int64_t n) {
    const __m256i v = _mm256_maskz_loadu_epi16(first(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static R load_first(const f16_t* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
  static void store_first(float* p, R v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
  static void store_first(bf16_t* p, R v, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), rounded_bf16(v)); }
  static void store_first(f16_t* p, R v, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), rounded_f16(v)); }
  // Past the caches; p is aligned to what is written.
  static void stream(float* p, R v) { _mm512_stream_ps(p, v); }
  static void stream(bf16_t* p, R v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), rounded_bf16(v)); }
  static void stream(f16_t* p, R v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), rounded_f16(v)); }
  template <class T>
  static S scalar(T v) {
    return static_cast<S>(to_double(v));
  }
  // out[i * step + l] = src[at[l] + i] for L x L values.
  template <class T>
  static void transpose(const T* src, const int64_t* at, S* out, int64_t step) {
    R a[16];
#pragma GCC unroll 16
    for (int l = 0; l < 16; ++l) a[l] = load(src + at[l]);
    transpose(a, out, step);
  }
  static void transpose(R (&a)[16], S* out, int64_t step) {
    R b[16];
    // Pairs of rows, then fours, within 128-bit quarters; then the quarters, twice.
#pragma GCC unroll 8
    for (int l = 0; l < 16; l += 2) {
      b[l] = _mm512_unpacklo_ps(a[l], a[l + 1]);
      b[l + 1] = _mm512_unpackhi_ps(a[l], a[l + 1]);
    }
#pragma GCC unroll 4
    for (int l = 0; l < 16; l += 4) {
      a[l] = _mm512_shuffle_ps(b[l], b[l + 2], 0x44);
      a[l + 1] = _mm512_shuffle_ps(b[l], b[l + 2], 0xee);
      a[l + 2] = _mm512_shuffle_ps(b[l + 1], b[l + 3], 0x44);
      a[l + 3] = _mm512_shuffle_ps(b[l + 1], b[l + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      b[j] = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88);
      b[4 + j] = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
      b[8 + j] = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
      b[12 + j] = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      store(out + j * step, _mm512_shuffle_f32x4(b[j], b[8 + j], 0x88));
      store(out + (8 + j) * step, _mm512_shuffle_f32x4(b[j], b[8 + j], 0xdd));
      store(out + (4 + j) * step, _mm512_shuffle_f32x4(b[4 + j], b[12 + j], 0x88));
      store(out + (12 + j) * step, _mm512_shuffle_f32x4(b[4 + j], b[12 + j], 0xdd));
    }
  }
  static R fma(R a, R b, R c) { return _mm512_fmadd_ps(a, b, c); }
  static R add(R a, R b) { return _mm512_add_ps(a, b); }
  static R mul(R a, R b) { return _mm512_mul_ps(a, b); }
  static R relu(R v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }  // the second operand where either is NaN
  static R sub(R a, R b) { return _mm512_sub_ps(a, b); }
  static R div(R a, R b) { return _mm512_div_ps(a, b); }
  static R reciprocal(R d) {  // 1 / d for d of 1 to 2^125, to 1 ulp: an estimate of 14 bits and a step of Newton's
    const R estimate = _mm512_rcp14_ps(d);
    return _mm512_fmadd_ps(estimate, _mm512_fnmadd_ps(d, estimate, _mm512_set1_ps(1)), estimate);
  }
  static R min(R a, R b) { return _mm512_min_ps(a, b); }  // b where either is NaN, max too
  static R max(R a, R b) { return _mm512_max_ps(a, b); }
  static R less(R a, R b, R yes, R no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
  static R round(R v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static R times_power(R v, R n) { return _mm512_scalef_ps(v, n); }  // v 2^n, n whole and in [-126, 127]
  static S sum(R v) { return _mm512_reduce_add_ps(v); }
  static S largest(R v) { return _mm512_reduce_max_ps(v); }
  static void sums(R a, R b, R c, R d, S* out) {  // four sums, added up in one order whatever the place
    const R ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const R cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const R all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
};

struct Doubles {
  using S = double;
  using R = __m512d;
  static constexpr int L = 8;
  static R set1(S v) { return _mm512_set1_pd(v); }
  static R load(const double* p) { return _mm512_loadu_pd(p); }
  static void store(double* p, R v) { _mm512_storeu_pd(p, v); }
  static __mmask8 first(int64_t n) { return static_cast<__mmask8>((1u << n) - 1); }
  static R load_first(const double* p, int64_t n) { return _mm512_maskz_loadu_pd(first(n), p); }
  static void store_first(double* p, R v, int64_t n) { _mm512_mask_storeu_pd(p, first(n), v); }
  static void stream(double* p, R v) { _mm512_stream_pd(p, v); }
  static S scalar(double v) { return v; }
  // out[i * step + l] = src[at[l] + i] for L x L values.
  template <class T>
  static void transpose(const T* src, const int64_t* at, S* out, int64_t step) {
    for (int i = 0; i < L; ++i)
      for (int l = 0; l < L; ++l) out[i * step + l] = scalar(src[at[l] + i]);
  }
  static R fma(R a, R b, R c) { return _mm512_fmadd_pd(a, b, c); }
  static R add(R a, R b) { return _mm512_add_pd(a, b); }
  static R mul(R a, R b) { return _mm512_mul_pd(a, b); }
  static R relu(R v) { return _mm512_max_pd(_mm512_setzero_pd(), v); }
  static R sub(R a, R b) { return _mm512_sub_pd(a, b); }
  static R div(R a, R b) { return _mm512_div_pd(a, b); }
  static R reciprocal(R d) { return div(set1(1), d); }
  static R min(R a, R b) { return _mm512_min_pd(a, b); }  // b where either is NaN, max too
  static R max(R a, R b) { return _mm512_max_pd(a, b); }
  static R less(R a, R b, R yes, R no) { return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_LT_OQ), no, yes); }
  static R round(R v) { return _mm512_roundscale_pd(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static S sum(R v) { return _mm512_reduce_add_pd(v); }
  static S largest(R v) { return _mm512_reduce_max_pd(v); }
  static void sums(R a, R b, R c, R d, S* out) { out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d); }
};
