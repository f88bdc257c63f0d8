// recurrent_conv for bf16 on the matrix unit (AMX-BF16).
#if defined(__x86_64__) && defined(__linux__)
#include "kernels.h"

// To the end of the file: templates are instantiated there.
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16,prefer-vector-width=512")

namespace rcu_ops::cpu::amx::recurrent_conv_kernels {

#include "avx512_copy.h"
#include "scalar.h"
#include "recurrent_conv_transport.h"
#include "recurrent_conv_bf16_operands.h"

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

struct Unit {
  static constexpr bool in_place = false;  // not measured

  // The tile registers belong to whoever runs on the thread: put back what was configured before.
  class Scope {
   public:
    Scope() {
      _tile_storeconfig(&before_);
      TileConfig config;
      for (int i = 0; i < 8; ++i) config.bytes_per_row[i] = 64, config.rows[i] = 16;
      _tile_loadconfig(&config);
    }
    ~Scope() {
      if (before_.palette)
        _tile_loadconfig(&before_);
      else
        _tile_release();
    }

   private:
    TileConfig before_;
  };

  template <class Row>
  static void product(const Operands& o, int64_t rows, Row row_done) {
    alignas(64) float c[4 * tile * tile];
    multiply(o, c);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t half = row / tile, r = row % tile;
      const float* const sums = c + half * 512 + r * tile;
      row_done(half, r, _mm512_load_ps(sums), _mm512_load_ps(sums + 256));
    }
  }

  static void multiply(const Operands& o, float* c) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const char* const* ahead = o.ahead;
    const int64_t share = o.share(o.k_tiles);
    for (int64_t k = 0; k < o.k_tiles; ++k) {
      const bool other = k == o.other_k;
      const bf16_t* const a = other ? o.other : o.a + k * o.a_k;
      const bf16_t* const b = o.b + k * tile_values;
      const int64_t row_bytes = other ? 64 : o.a_row * 2;
      for (int64_t i = 0; i < share && ahead < o.ahead_end; ++i) __builtin_prefetch(*ahead++, 0, 2);
      _tile_loadd(4, a, row_bytes);
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + o.b_tile, 64);
      _tile_loadd(5, a + (other ? tile_values : o.a_tile), row_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 256, 64);
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
  }
};

#include "recurrent_conv_bf16_core.h"

}  // namespace rcu_ops::cpu::amx::recurrent_conv_kernels
#endif
