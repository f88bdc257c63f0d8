// nonlocal_gates for bf16 on AVX512-BF16: both products by the instruction that adds pairs of bf16 products in fp32.
// Scores take pairs of neighbouring channels; for the sums the weights (and their gradients) are rounded to bf16, as
// eager PyTorch does, and packed in pairs of neighbouring keys, like the rows of values.
#if defined(__x86_64__)
#include "kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,prefer-vector-width=512")

namespace rcu_ops::cpu::avx512_bf16::nonlocal_gates_kernels {

namespace {
#include "scalar.h"
#include "vectors_avx512.h"

// The instruction rounds as Floats::store does, but for numbers below the smallest normal one, which become zero, as
// they do in the sums.
struct Pairs : Floats {
  using Floats::store;
  using Floats::store_first;
  static void store(bf16_t* p, R v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
  static void store_first(bf16_t* p, R v, int64_t n) {
    _mm256_mask_storeu_epi16(p, first(n), (__m256i)_mm512_cvtneps_pbh(v));
  }
};

constexpr int score_rows = 5, score_columns = 5, sum_rows = 7, sum_vectors = 3;

template <class V, class T>
struct Arithmetic;

template <>
struct Arithmetic<Pairs, bf16_t> {
  using Products = Arithmetic;
  static constexpr int step = 32;
  using Operand = __m512bh;
  static Operand load(const bf16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Operand load(const bf16_t* p, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16((uint64_t(1) << n) - 1, p);
  }
  static __m512 add(Operand a, Operand b, __m512 sum) { return _mm512_dpbf16_ps(sum, a, b); }

  using S = float;
  using Left = uint32_t;  // two weights
  struct Factor {
    const Left* data;
    int64_t row, step;
  };
  using Right = bf16_t;  // [pair of k][width][2]
  static constexpr int64_t vector = 32;
  static constexpr int64_t steps(int64_t K) { return (K + 1) / 2; }
  static constexpr int64_t left_size(int64_t rows, int64_t K) { return rows * ((K + 15) / 16 * 8); }
  static constexpr int64_t right_size(int64_t K, int64_t width) { return 2 * steps(K) * width; }

  static __m512i wide(__m256bh v) { return _mm512_cvtepu16_epi32((__m256i)v); }
  static __m512i pairs(__m512i even, __m512i odd) { return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)); }

  // Rows of `a` are padded to 16 numbers, so whole vectors may be read. What is written never lies beyond what has been
  // read, so that `out` may be `a`. [row][pair of k], rows `width` pairs apart:
  static Factor by_rows(const float* a, int64_t ld, int64_t rows, int64_t K, Left* out, int64_t width) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < K; k += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * width + k / 2),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(a + i * ld + k)));
    return {out, width, 1};
  }
  // [pair of k][row], of a's columns, K in each. packed: a was packed by rows where it lies.
  static Factor by_columns(const float* a, int64_t ld, int64_t rows, int64_t K, Left* out, bool packed) {
    const auto sixteen = [&](int64_t k, int64_t i) {
      const float* const p = a + k * ld;
      return wide(packed ? (__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i / 2))
                         : _mm512_cvtneps_pbh(_mm512_loadu_ps(p + i)));
    };
    for (int64_t k = 0; k < K; k += 2)
      for (int64_t i = round_up(rows, 16) - 16; i >= 0;
           i -= 16)  // from the end: pairs take twice a packed row's memory
        _mm512_storeu_si512(out + k / 2 * ld + i,
                            pairs(sixteen(k, i), k + 1 < K ? sixteen(k + 1, i) : _mm512_setzero_si512()));
    return {out, 1, ld};
  }
  static void pack(const bf16_t* b, int64_t row, int64_t K, const uint8_t* dead, int64_t n, int64_t width, Right* out) {
    alignas(64) static constexpr auto order = [] {  // of two rows' numbers, those of the second from 32 on
      struct {
        uint16_t of[64];
      } order{};
      for (int i = 0; i < 64; ++i) order.of[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
      return order;
    }();
    const __m512i first = _mm512_load_si512(order.of), second = _mm512_load_si512(order.of + 32);
    for (int64_t k = 0; k < K; k += 2, out += 2 * width) {
      const bool even = !dead || !dead[k], odd = k + 1 < K && (!dead || !dead[k + 1]);
      const bf16_t* const p = b + k * row;
      int64_t j = 0;
      if (even && odd)
        for (; j + 32 <= n; j += 32) {
          const __m512i low = _mm512_loadu_si512(p + j), high = _mm512_loadu_si512(p + row + j);
          _mm512_storeu_si512(out + 2 * j, _mm512_permutex2var_epi16(low, first, high));
          _mm512_storeu_si512(out + 2 * j + 32, _mm512_permutex2var_epi16(low, second, high));
        }
      for (; j < width; j += 16) {
        const __mmask16 there = j + 16 <= n ? 0xffff : j < n ? (1u << (n - j)) - 1 : 0;
        const __m256i low = _mm256_maskz_loadu_epi16(even ? there : 0, p + j);
        const __m256i high = _mm256_maskz_loadu_epi16(odd ? there : 0, p + row + j);
        _mm512_storeu_si512(out + 2 * j, pairs(_mm512_cvtepu16_epi32(low), _mm512_cvtepu16_epi32(high)));
      }
    }
  }
  static Operand broadcast(Left two) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(two)); }
  static Operand right(const Right* b) { return load(b); }

  template <class Store>
  [[gnu::always_inline]] static void store_as(DType dtype, Store store) {
    if (dtype == DType::f32)
      store(float());
    else
      store(bf16_t());
  }

  static constexpr int64_t numbers = 2;
  static void take(const bf16_t* a, int64_t n, Left* out) {
    if (n % 2) out[n / 2] = a[n - 1].bits;
    memcpy(out, a, static_cast<size_t>(n / 2) * sizeof(Left));
  }
  static void turn(const bf16_t* b, const int64_t* at, int64_t n, int64_t width, Right* out) {
    int64_t k = 0;
    for (; k + step <= n; k += step) {
      __m512 row[16];
#pragma GCC unroll 16
      for (int l = 0; l < 16; ++l) row[l] = _mm512_castsi512_ps(_mm512_loadu_si512(b + at[l] + k));
      Floats::transpose(row, reinterpret_cast<float*>(out + k * width), width);
    }
    for (; k < n; k += 2)
      for (int l = 0; l < 16; ++l) {
        Right* const pair = out + k * width + 2 * l;
        pair[0] = b[at[l] + k], pair[1] = k + 1 < n ? b[at[l] + k + 1] : bf16_t{0};
      }
  }
};
}  // namespace

#define RCU_OPS_BF16_ONLY Pairs
#include "nonlocal_gates_core.h"

#undef RCU_OPS_BF16_ONLY

}  // namespace rcu_ops::cpu::avx512_bf16::nonlocal_gates_kernels
#endif
