// recurrent_conv for bf16 on the vector unit (AVX512-BF16).
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

}  // namespace rcu_ops::cpu::avx512_bf16
#endif
