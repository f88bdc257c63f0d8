// recurrent_conv and recurrent_conv_frame for bf16 on the vector unit (AVX512-BF16).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "recurrent_conv_kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")

namespace rcu_ops::cpu::avx512_bf16 {

#include "avx512_copy.h"
#include "scalar.h"
#include "recurrent_conv_transport.h"
#include "recurrent_conv_bf16_operands.h"

struct Unit {
  struct Scope {
    Scope() {}  // nothing to set up
  };

  // 8 rows x 2 vectors of lanes at a time: 16 sums hide the instruction's latency, and each pair of A's is broadcast to
  // two.
  static void product(const Operands& o, int64_t rows, float* c) {
    constexpr int R = 8;
    for (int64_t r0 = 0; r0 < rows; r0 += R) {
      const int64_t half = r0 / tile, r = r0 % tile;
      __m512 sum[R][2];
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
      for (int64_t k = 0; k < o.k_tiles; ++k) {
        const bool other = k == o.other_k;
        const int64_t row = other ? block : o.a_row;
        const bf16_t* const a = (other ? o.other + half * tile_values : o.a + k * o.a_k + half * o.a_tile) + r * row;
        const bf16_t* const b = o.b + k * tile_values;
#pragma GCC unroll 4
        for (int pair = 0; pair < tile; ++pair) {
          const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + pair * block);
          const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + o.b_tile + pair * block);
#pragma GCC unroll 8
          for (int i = 0; i < R; ++i) {
            int32_t two;
            memcpy(&two, a + i * row + 2 * pair, 4);
            const __m512bh values = (__m512bh)_mm512_set1_epi32(two);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], values, b0);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], values, b1);
          }
        }
      }
      float* const out = c + half * 512 + r * tile;
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        _mm512_storeu_ps(out + i * tile, sum[i][0]);
        _mm512_storeu_ps(out + 256 + i * tile, sum[i][1]);
      }
    }
  }
};

#include "recurrent_conv_bf16_core.h"

#include "vectors_avx512.h"

struct F32 : Floats {
  static constexpr int channels_rows = 14;
};

struct FrameArithmetic {
  using E = bf16_t;
  static constexpr bool pairs = true;
  static constexpr int64_t piece = 384;

  // The rows after these are asked for meanwhile, as in recurrent_conv_step_core.h.
  template <int MR>
  static void multiply(const bf16_t* a, int64_t lda, const bf16_t* b, int64_t count, float* sums, bool resume) {
    __m512 sum[MR][2];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_ps();
    const bf16_t* ahead = a + MR * lda;
#pragma GCC unroll 2
    for (int64_t k = 0; k < count; k += 2, b += 2 * frame_panel) {
      __builtin_prefetch(ahead);
      ahead += k % block == block - 2 ? block - (tile - 1) * lda : lda;
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 32);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        int32_t two;
        memcpy(&two, a + m * lda + k, 4);
        const __m512bh values = (__m512bh)_mm512_set1_epi32(two);
        sum[m][0] = _mm512_dpbf16_ps(sum[m][0], values, b0);
        sum[m][1] = _mm512_dpbf16_ps(sum[m][1], values, b1);
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        float* const at = sums + m * frame_panel + v * tile;
        _mm512_storeu_ps(at, resume ? _mm512_add_ps(_mm512_loadu_ps(at), sum[m][v]) : sum[m][v]);
      }
  }

  // Whether all of them, rounded, are finite. count: a multiple of 16.
  static bool round(const float* from, bf16_t* to, int64_t count) {
    const __m256i exponent = _mm256_set1_epi16(0x7f80);
    __mmask16 not_finite = 0;
    for (int64_t i = 0; i < count; i += tile) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
      not_finite |= _mm256_cmpeq_epi16_mask(_mm256_and_si256(rounded, exponent), exponent);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), rounded);
    }
    return not_finite == 0;
  }

  // value, plus `added` where the first of two numbers is not zero.
  static __m512 add_where(const bf16_t* twos, __m512 value, __m512 added) {
    const __mmask16 lanes = _mm512_test_epi32_mask(_mm512_loadu_si512(twos), _mm512_set1_epi32(0xffff));
    return _mm512_mask_add_ps(value, lanes, value, added);
  }
};

#include "recurrent_conv_frame_core.h"

void conv_frame(const ConvFrame& p, const FramePlan& plan, const Parallel& parallel) {
  FrameTask<bf16_t, FrameArithmetic>::run_all(p, plan, parallel);
}

}  // namespace rcu_ops::cpu::avx512_bf16
#endif
