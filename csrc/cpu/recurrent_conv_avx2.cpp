// recurrent_conv for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "recurrent_conv_kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target("avx2,fma,f16c")

namespace rcu_ops::cpu::avx2 {

static inline void copy_row(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }

// Whole lines past the caches, the ends of the run as usual.
static void copy_around(void* to, const void* from, size_t bytes) {
  char* dst = static_cast<char*>(to);
  const char* src = static_cast<const char*>(from);
  const size_t head = -reinterpret_cast<uintptr_t>(dst) & 63;
  if (head >= bytes) {
    copy_row(dst, src, bytes);
    return;
  }
  copy_row(dst, src, head);
  size_t i = head;
  for (; i + 64 <= bytes; i += 64)
    for (int half = 0; half < 64; half += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i + half),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i + half)));
  copy_row(dst + i, src + i, bytes - i);
}
static void end_around() { _mm_sfence(); }

#include "scalar.h"
#include "recurrent_conv_transport.h"

struct F32 {
  using S = float;
  using R = __m256;
  static constexpr int L = 8, planar_rows = 4, planar_vectors = 3, channels_rows = 6, channels_vectors = 2;
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
};

struct F64 {
  using S = double;
  using R = __m256d;
  static constexpr int L = 4, planar_rows = 4, planar_vectors = 3, channels_rows = 6, channels_vectors = 2;
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
};

#include "recurrent_conv_core.h"

}  // namespace rcu_ops::cpu::avx2
#endif
