// recurrent_conv, the gradient of its weight and recurrent_conv_frame for bf16 on the vector unit (AVX512-BF16).
#if defined(__x86_64__)
#include "kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")

namespace rcu_ops::cpu::avx512_bf16::recurrent_conv_kernels {

#include "avx512_copy.h"
#include "scalar.h"
#include "recurrent_conv_transport.h"
#include "recurrent_conv_bf16_operands.h"

struct Unit {
  static constexpr bool in_place = true;  // 8 % less time for 64 channels on Zen 4

  struct Scope {
    Scope() {}  // nothing to set up
  };

  // 8 rows x 2 vectors of lanes at a time: 16 sums hide the instruction's latency, and each pair of A's is broadcast to
  // two.
  template <class Row>
  static void product(const Operands& o, int64_t rows, Row row_done) {
    constexpr int R = 8;
    const char* const* ahead = o.ahead;
    const int64_t share = o.share((rows + R - 1) / R * o.k_tiles);
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
        for (int64_t i = 0; i < share && ahead < o.ahead_end; ++i) __builtin_prefetch(*ahead++, 0, 2);
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
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) row_done(half, r + i, sum[i][0], sum[i][1]);
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

#include "recurrent_conv_weight_grad_core.h"

// Pairs of rows: products of bf16 as they lie in memory, added in fp32. A state before the first frame in fp32 is
// rounded, as all other states have been. The instruction takes denormal numbers for zeros.
struct PairedGrad {
  using V = F32;
  using T = bf16_t;
  using E = bf16_t;
  static constexpr int MR = 8, NR = 2 * tile, A = tile, pair = 2;
  static constexpr int64_t K = grad_rows;

  template <bool Rows>
  static void multiply(const bf16_t* a, const bf16_t* b, int64_t count, float* sum, GradAhead& ahead) {
    constexpr int64_t a_m = Rows ? 2 : K, a_k = Rows ? 2 * A : 2;
    __m512 acc[MR][2];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
    const auto add_pair = [&]() __attribute__((always_inline)) {
      const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + block);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m) {
        int32_t two;
        memcpy(&two, a + m * a_m, 4);
        const __m512bh values = (__m512bh)_mm512_set1_epi32(two);
        acc[m][0] = _mm512_dpbf16_ps(acc[m][0], values, b0);
        acc[m][1] = _mm512_dpbf16_ps(acc[m][1], values, b1);
      }
      a += a_k, b += 2 * NR;
    };
    for (; count >= 4; count -= 4) {
      ahead.next();
      add_pair();
      add_pair();
    }
    for (; count > 0; count -= 2) add_pair();
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        float* const at = sum + m * NR + v * tile;
        _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), acc[m][v]));
      }
  }

  static __mmask32 first_lanes(int64_t count) { return count >= block ? ~__mmask32(0) : (__mmask32(1) << count) - 1; }

  // Numbers that follow one another, as bf16.
  static __m512i load(const bf16_t* from, __mmask32 lanes) { return _mm512_maskz_loadu_epi16(lanes, from); }
  static __m512i load(const float* from, __mmask32 lanes) {
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), from);
    const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> tile), from + tile);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }

  // `channels` of two rows, side by side, to lanes of panels [K / 2][Lanes][2]; zeros to the end of the last 16 lanes.
  template <int Lanes, class S>
  static void pack_pair(const S* even, const S* odd, int64_t channels, bf16_t* out) {
    alignas(64) static constexpr uint16_t interleave[block] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                               37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                               11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(interleave), high = _mm512_add_epi16(low, _mm512_set1_epi16(tile));
    const auto at = [&](int64_t c) { return out + c / Lanes * K * Lanes + c % Lanes * 2; };
    for (int64_t c = 0; c < channels; c += block) {
      const __mmask32 lanes = first_lanes(channels - c);
      const __m512i a = load(even + c, lanes), b = load(odd + c, lanes);
      _mm512_storeu_si512(at(c), _mm512_permutex2var_epi16(a, low, b));
      if (Lanes > tile || c + tile < channels) _mm512_storeu_si512(at(c + tile), _mm512_permutex2var_epi16(a, high, b));
    }
  }

  template <bool Rows>
  static void pack_u(const WeightGrad& p, bf16_t* u, int64_t o0, int64_t outputs, const int64_t* rows_at,
                     int64_t count) {
    const bf16_t* src = static_cast<const bf16_t*>(p.dx.data) + o0 * p.dx.c;
    if constexpr (Rows) {
      static constexpr bf16_t none[grad_slab] = {};
      for (int64_t k = 0; k < count; k += 2)
        pack_pair<A>(src + rows_at[k], k + 1 < count ? src + rows_at[k + 1] : none, outputs, u + k * A);
    } else {
      for (int64_t k = 0; k < count;) {
        const int64_t end = run_end(rows_at, k, count), length = end - k;
        for (int64_t o = 0; o < outputs; ++o) {
          const bf16_t* from = src + rows_at[k] + o * p.dx.c;
          if (length == 1)
            u[o * K + k] = *from;
          else
            copy_row(u + o * K + k, from, length * sizeof(bf16_t));
        }
        k = end;
      }
      if (count % 2)
        for (int64_t o = 0; o < outputs; ++o) u[o * K + count] = {0};
    }
  }

  // An even number of rows of one tensor.
  template <class S>
  static void pack_pairs(const View& v, int64_t channels, const int64_t* rows_at, int64_t count, int64_t panels,
                         bf16_t* h) {
    const S* const src = static_cast<const S*>(v.data);
    const bool by_row = v.c == 1 && channels > 1;
    for (int64_t k = 0; k < count;) {
      int64_t end = k;
      if (!by_row) {
        end = run_end(rows_at, k, min_of<int64_t>(count, k + block));
        end -= (end - k) % 2;
      }
      if (end == k) {
        const int64_t* const at = rows_at + k;
        if (v.c == 1)
          pack_pair<NR>(src + at[0], src + at[1], channels, h + k * NR);
        else
          pack_numbers(
              [&](int64_t i, int64_t c) {
                bf16_t number;
                from_double(to_double(src[at[i] + c * v.c]), number);
                return number;
              },
              channels, panels, h + k * NR);
        k += 2;
        continue;
      }
      // Up to 16 pairs of adjacent positions of 16 channels, turned to 16 channels of each pair.
      const __mmask32 positions = first_lanes(end - k);
      for (int64_t c = 0; c < panels * NR; c += tile) {
        __m512i pairs[tile];
        const S* const from = src + rows_at[k] + c * v.c;
        if (c + tile <= channels) {
#pragma GCC unroll 16
          for (int64_t l = 0; l < tile; ++l) pairs[l] = load(from + l * v.c, positions);
        } else {
          for (int64_t l = 0; l < tile; ++l)
            pairs[l] = c + l < channels ? load(from + l * v.c, positions) : _mm512_setzero_si512();
        }
        transpose(pairs);
        bf16_t* const to = h + c / NR * K * NR + k * NR + c % NR * 2;
        const int64_t count_of_pairs = (end - k) / 2;
#pragma GCC unroll 16
        for (int64_t l = 0; l < tile; ++l) {
          if (l == count_of_pairs) break;
          _mm512_storeu_si512(to + l * 2 * NR, pairs[l]);
        }
      }
      k = end;
    }
  }

  // One pair of rows, number(row, channel) each.
  template <class Number>
  static void pack_numbers(Number number, int64_t channels, int64_t panels, bf16_t* h) {
    for (int64_t c = 0; c < panels * NR; ++c)
      for (int64_t i = 0; i < 2; ++i) h[c / NR * K * NR + c % NR * 2 + i] = c < channels ? number(i, c) : bf16_t{0};
  }

  static void pack_h(const WeightGrad& p, bf16_t* h, const int64_t* rows_at, const bool* from_first, int64_t count,
                     int64_t panels) {
    int64_t given = 0;  // rows of the state before the first frame, which come first
    while (given < count && from_first[given]) ++given;
    int64_t k = given - given % 2;
    if (p.first.dtype == DType::f32)
      pack_pairs<float>(p.first, p.C, rows_at, k, panels, h);
    else
      pack_pairs<bf16_t>(p.first, p.C, rows_at, k, panels, h);
    // A pair whose rows are of two tensors, or whose second row is none.
    const auto mixed = [&](int64_t i, int64_t c) {
      bf16_t number = {0};
      if (k + i < given)
        from_double(load_any(p.first.data, p.first.dtype, rows_at[k + i] + c * p.first.c), number);
      else if (k + i < count)
        number = static_cast<const bf16_t*>(p.h.data)[rows_at[k + i] + c * p.h.c];
      return number;
    };
    if (k < given) {
      pack_numbers(mixed, p.C, panels, h + k * NR);
      k += 2;
    }
    if (k >= count) return;
    const int64_t rest = count - k - (count - k) % 2;
    pack_pairs<bf16_t>(p.h, p.C, rows_at + k, rest, panels, h + k * NR);
    k += rest;
    if (k < count) pack_numbers(mixed, p.C, panels, h + k * NR);
  }
};

void weight_grad(const WeightGrad& p, const Parallel& parallel) { WeightGradTasks<PairedGrad>::run(p, parallel); }

#include "recurrent_conv_frame_core.h"

void conv_frame(const ConvFrame& p, const FramePlan& plan, const Parallel& parallel) {
  FrameTask<FrameArithmetic>::run_all(p, plan, parallel);
}

}  // namespace rcu_ops::cpu::avx512_bf16::recurrent_conv_kernels
#endif
