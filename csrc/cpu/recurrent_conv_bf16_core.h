// recurrent_conv for bf16 on units that multiply pairs of bf16 and add in fp32: the body of each of them.
//
// The unit reads bf16, the state is fp32. So W is split into diag(s) + E with s_c = 1 where W_cc lies in [1/2, 2]
// and 0 elsewhere (W_cc - 1 is then exact in bf16), and
//
//     v_i = alpha_i * (s . v_{i-1} + E bf16(v_{i-1}) + x)
//
// carries the identity part of the recurrence, where rounding would pile up over time, in fp32.
//
// Layout.   Blocks of 32 x 32 outputs are 2 x 2 tiles of 16 x 16. Matrix operands are stored as whole 1 KiB tiles:
//             A tile  [16 rows][32 k]               B tile  [16 pairs of k][16 lanes][2]
//           planar:   rows are output channels (A = E), lanes are columns (B = state)
//           channels: rows are columns (A = state), lanes are output channels (B = E transposed)
//           The state is kept twice: fp32, updated in place, one 4 KiB block per block of outputs; and bf16 as operand
//           tiles, an old and a new copy. k is padded to 32 with zeros on both sides.
// Aliasing. As in recurrent_conv_core.h. Scratch: 8 bytes * channels * columns per task, and E once per call, unless a
//           single product is wanted: then E's tiles are read where W lies, except for those on the diagonal.
// Order.    k in steps of 32 whatever the blocking; (products + s . v) + x, times alpha. Same results for any tiling.
// Non-finite states. 0 * inf in E bf16(v) and s . v would give NaN where W v is infinite: columns that hold an infinity
//           are recomputed from W itself; columns that hold a NaN are NaN throughout.
// Bound.    4 bytes per element of x and y against 2 C FLOP. On the matrix unit: memory for every C at which W's tiles
//           stay in the second level cache; from C = 256 on their 2 KiB per 4 matrix instructions come from there. On
//           vector units: memory at C = 64, arithmetic beyond.
//
// Included once per unit, inside a namespace of its own, after scalar.h, recurrent_conv_transport.h and
// recurrent_conv_bf16_operands.h, and a struct Unit with
//
//   Scope                             what must be set up on the thread before products, and put back after them
//   product(Operands, rows, row)      calls row(half, r, low, high) with the 32 sums of row 16 half + r of the product
//                                     below, one row after another, for at least the first `rows` rows
//   in_place                          whether small clips whose positions are adjacent do without stages

// 32 numbers to bf16, to nearest even. NaN stays NaN; `special`, that is with a denormal number, which the instruction
// takes for zero, or a result that is not finite, wants exactly_bf16 instead.
static inline __m512i to_bf16(const __m512 (&numbers)[2], bool& special) {
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(numbers[1], numbers[0]);
  const __mmask32 denormal =
      _mm512_kunpackw(_mm512_fpclass_ps_mask(numbers[1], 0x20), _mm512_fpclass_ps_mask(numbers[0], 0x20));
  const __mmask32 not_finite =
      _mm512_cmpge_epu16_mask(_mm512_and_si512(rounded, _mm512_set1_epi16(0x7fff)), _mm512_set1_epi16(0x7f80));
  special = !_kortestz_mask32_u8(not_finite, denormal);
  return rounded;
}
// Inline: a call would have all sums spilled, which live in registers that no function keeps.
__attribute__((always_inline)) static inline __m512i exactly_bf16(__m512 low, __m512 high) {
  alignas(64) float values[32];
  alignas(64) bf16_t bits[32];
  _mm512_store_ps(values, low);
  _mm512_store_ps(values + 16, high);
  for (int i = 0; i < 32; ++i) from_double(values[i], bits[i]);
  return _mm512_load_si512(bits);
}

// Of 32 numbers in bf16: 1 if there are infinities, plus 2 if there are NaN.
static inline uint8_t kind_of(__m512i numbers) {
  alignas(64) uint16_t bits[32];
  _mm512_store_si512(bits, numbers);
  uint8_t kind = 0;
  for (int j = 0; j < 32; ++j)
    if ((bits[j] & 0x7fff) >= 0x7f80) kind |= (bits[j] & 0x7f) ? 2 : 1;
  return kind;
}

// 16 numbers in bf16, the second 16 for half = 1.
static inline __m512 widened(const void* from, int half) {
  const __m256i bits = _mm256_loadu_si256(static_cast<const __m256i*>(from) + half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// What follows the product for 32 lanes: plus the old state where `add` says, plus x if there is one, times alpha.
__attribute__((always_inline)) static inline void advance(__m512 (&value)[2], const __mmask16 (&add)[2],
                                                          const float* old, int64_t old_step, bool with_x,
                                                          const void* x, __m512 alpha) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    value[h] = _mm512_mask_add_ps(value[h], add[h], value[h], _mm512_load_ps(old + h * old_step));
    if (with_x) value[h] = _mm512_add_ps(value[h], widened(x, h));
    value[h] = _mm512_mul_ps(value[h], alpha);
  }
}

// scale * value + shift, plus the residual if there is one, at least `least`; NaN stays NaN.
__attribute__((always_inline)) static inline __m512i affine(__m512 (&value)[2], const __m512 (&scale)[2],
                                                            const __m512 (&shift)[2], bool with_residual,
                                                            const void* residual, __m512 least) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    value[h] = _mm512_fmadd_ps(scale[h], value[h], shift[h]);
    if (with_residual) value[h] = _mm512_add_ps(value[h], widened(residual, h));
    value[h] = _mm512_max_ps(least, value[h]);  // the second operand where either is NaN
  }
  bool special;
  const __m512i rounded = to_bf16(value, special);
  return __builtin_expect(special, 0) ? exactly_bf16(value[0], value[1]) : rounded;
}

struct Weights {
  const bf16_t* tiles = nullptr;      // packed operand tiles [tile of outputs][tile of k]
  const bf16_t* direct = nullptr;     // or W's own rows, and
  const bf16_t* diagonal = nullptr;   // the one tile per 16 outputs that E changes
  int64_t stride = 0;                 // of W's rows
  const uint8_t* identity = nullptr;  // s, padded with zeros
};

template <bool Channels>
struct Task {
  const Scan& p;
  const Weights& w;
  const float *scale, *shift;  // padded
  int64_t padded;              // channels, a multiple of 32
  int64_t k_tiles;

  int64_t plan_group;              // blocks of lanes per stage
  bool around_clip, around_state;  // y and the last state go past the caches

  void make_stream(const View& view, Stream<bf16_t>& s, int64_t q0, int64_t columns, int64_t* table) const {
    if (!view.data) return;
    s.base = static_cast<bf16_t*>(view.data) + (p.reverse ? (p.T - 1) * view.t : 0);
    s.t = p.reverse ? -view.t : view.t;
    int64_t* channels = table + columns;
    column_offsets(p, view, q0, columns, table);
    for (int64_t c = 0; c < p.C; ++c) channels[c] = c * view.c;
    s.rows = Channels ? table : channels;
    s.lanes = Channels ? channels : table;
  }

  // Rows [2 tiles] x lanes [2 tiles] over all of k: calls row(half, r, low, high) for row number r of that half, for at
  // least the first `rows` rows. Where what follows a product stands in such a call, its sums stay in registers, and
  // the next products begin before it has ended: a tenth less time for 64 channels on Zen 4.
  template <class Row>
  __attribute__((always_inline)) void product(const bf16_t* state, int64_t row_block, int64_t lane_block, int64_t rows,
                                              Row row, const char* const* ahead = nullptr,
                                              const char* const* ahead_end = nullptr) const {
    const int64_t step = k_tiles * tile_values;
    Operands o;
    o.k_tiles = k_tiles;
    if (!Channels && w.direct) {
      o.a = w.direct + row_block * block * w.stride;
      o.a_k = block, o.a_tile = tile * w.stride, o.a_row = w.stride;
      o.other = w.diagonal + row_block * 2 * tile_values;
      o.other_k = row_block;
    } else {
      o.a = (Channels ? state : w.tiles) + row_block * 2 * step;
      o.a_tile = step;
    }
    o.b = (Channels ? w.tiles : state) + lane_block * 2 * step;
    o.b_tile = step;
    o.ahead = ahead, o.ahead_end = ahead_end;
    Unit::product(o, rows, row);
  }

  // The same, to c[2][2] tiles.
  void product_to(float* c, const bf16_t* state, int64_t row_block, int64_t lane_block, int64_t rows,
                  const char* const* ahead = nullptr, const char* const* ahead_end = nullptr) const {
    const auto store = [c](int64_t half, int64_t r, __m512 low, __m512 high) __attribute__((always_inline)) {
      float* const to = c + half * 512 + r * tile;
      _mm512_store_ps(to, low);
      _mm512_store_ps(to + 256, high);
    };
    product(state, row_block, lane_block, rows, store, ahead, ahead_end);
  }

  // bf16(v)[channel][column] of an operand copy of the state.
  bf16_t operand(const bf16_t* state, int64_t c, int64_t column) const {
    const bf16_t* t = state + (column / tile * k_tiles + c / block) * tile_values;
    return Channels ? t[column % tile * block + c % block] : t[c % block / 2 * block + column % tile * 2 + c % 2];
  }

  // What a block's values are made of besides the product, and from one row to the next.
  struct Frame {
    const bf16_t *x = nullptr, *residual = nullptr;
    bf16_t* y = nullptr;
    const float* state = nullptr;  // a given state instead: [32][32]
    int64_t x_step = 0, residual_step = 0, y_step = 0;
    float alpha = 1;
    bool product = false, add_state = false;
    const bf16_t* operands = nullptr;  // of the product: the state's
    const uint8_t* unusual = nullptr;  // which columns of it are not finite, if any is
    const char* const* ahead = nullptr;
    const char* const* ahead_end = nullptr;
  };

  // Columns whose old state is not finite: c becomes W v, and the state that would be added to it (v, where given)
  // zero.
  void repair(const bf16_t* state, const uint8_t* unusual, int64_t row_block, int64_t lane_block, float* c,
              float* v) const {
    const int64_t column0 = (Channels ? row_block : lane_block) * block,
                  c0 = (Channels ? lane_block : row_block) * block;
    const bf16_t* weight = static_cast<const bf16_t*>(p.weight);
    for (int64_t j = 0; j < block; ++j) {
      const uint8_t kind = unusual[column0 + j];
      if (!kind) continue;
      for (int64_t i = 0; i < block && c0 + i < p.C; ++i) {
        const int64_t row = Channels ? j : i, lane = Channels ? i : j;
        const int64_t at = (row / tile * 2 + lane / tile) * 256 + row % tile * tile + lane % tile;
        float sum = as_float(0x7fc00000);
        if (!(kind & 2)) {
          sum = 0;
          for (int64_t k = 0; k < p.C; ++k)
            sum += static_cast<float>(to_double(weight[(c0 + i) * p.weight_out + k * p.weight_in]) *
                                      to_double(operand(state, k, column0 + j)));
        }
        c[at] = sum;
        if (v) v[at] = 0;
      }
    }
  }

  // The product of a block, and what follows it: the next state (both copies) and the output. c: scratch.
  template <bool Affine>
  void finish(const Frame& f, int64_t rb, int64_t lb, int64_t columns, float* c, float* v, bf16_t* operand_tiles,
              uint8_t* unusual) const {
    const int64_t rows = min_of<int64_t>(block, (Channels ? columns : p.C) - rb * block);
    const int64_t lanes = min_of<int64_t>(block, (Channels ? p.C : columns) - lb * block);
    const int64_t row0 = rb * block, channel0 = (Channels ? lb : rb) * block;
    const uint8_t* const identity = w.identity + channel0;
    const float *const scale_of = scale + channel0, *const shift_of = shift + channel0;
    const __m512 alpha = _mm512_set1_ps(f.alpha), zero = _mm512_setzero_ps(), none = _mm512_set1_ps(-0.0f);
    const __m512 least = p.relu ? zero : _mm512_set1_ps(-INFINITY);
    const __mmask32 present = lanes >= block ? ~__mmask32(0) : (__mmask32(1) << lanes) - 1;
    const __mmask16 valid[2] = {static_cast<__mmask16>(present), static_cast<__mmask16>(present >> tile)};
    __mmask16 add_lanes[2] = {0, 0};
    __m512 scale_lanes[2] = {zero, zero}, shift_lanes[2] = {zero, zero};
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      if (f.add_state) add_lanes[h] = 0xffff;
      if (Channels && f.product) add_lanes[h] = identity_lanes(channel0 + 16 * h);
      if (Channels && Affine)
        scale_lanes[h] = _mm512_loadu_ps(scale_of + 16 * h), shift_lanes[h] = _mm512_loadu_ps(shift_of + 16 * h);
    }
    // Interleaves a pair of rows: [row 0 lane 0, row 1 lane 0, row 0 lane 1, ...], lanes 0 to 15 and 16 to 31.
    alignas(64) static constexpr uint16_t interleave[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                            37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                            11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i pick_low = _mm512_load_si512(interleave);
    const __m512i pick_high = _mm512_add_epi16(pick_low, _mm512_set1_epi16(16));
    bf16_t* const operands = !operand_tiles ? nullptr
                             : Channels     ? operand_tiles + (rb * 2 * k_tiles + lb) * tile_values
                                            : operand_tiles + (lb * 2 * k_tiles + rb) * tile_values;
    const int64_t operand_step = k_tiles * tile_values;
    bool any_special = false;
    // Row number r of that half. Plain: all rows and lanes are there, with a product, x and y. What it needs is copied:
    // variables behind references would be fetched again after every store.
    const auto finish_row = [=, frame = f, any_special = &any_special, relu_least = least](
                                auto plain, int64_t half, int64_t r, __m512 low, __m512 high,
                                __m512i& previous) __attribute__((always_inline)) {
      constexpr bool P = decltype(plain)::value;
      const int64_t row = half * tile + r, at = half * 512 + r * tile;
      __m512 value[2] = {low, high};
      if (!P && frame.state) {
        value[0] = _mm512_loadu_ps(frame.state + row * block);
        value[1] = _mm512_loadu_ps(frame.state + row * block + 16);
      } else if (P || row < rows) {
        const __mmask16 own = static_cast<__mmask16>(-static_cast<int>(identity[row]));
        const bool by_row = !Channels && (P || frame.product);
        const __mmask16 add[2] = {by_row ? own : add_lanes[0], by_row ? own : add_lanes[1]};
        advance(value, add, v + at, 256, P || frame.x, frame.x + row * frame.x_step, alpha);
      } else {
        value[0] = value[1] = zero;
      }
      if (!P) value[0] = _mm512_maskz_mov_ps(valid[0], value[0]), value[1] = _mm512_maskz_mov_ps(valid[1], value[1]);
      _mm512_store_ps(v + at, value[0]);
      _mm512_store_ps(v + at + 256, value[1]);
      bool special;
      __m512i out = to_bf16(value, special);
      if (__builtin_expect(special, 0)) {
        out = exactly_bf16(value[0], value[1]);
        if (Channels && operands) unusual[row0 + row] |= kind_of(out);
        *any_special = true;
      }
      if (!operands) {
        // The last frame: nobody multiplies it.
      } else if (Channels) {
        _mm512_store_si512(operands + half * operand_step + r * block, out);
      } else {
        if (r & 1) {
          bf16_t* const to = operands + (row >> 1) * block;
          _mm512_store_si512(to, _mm512_permutex2var_epi16(previous, pick_low, out));
          _mm512_store_si512(to + operand_step, _mm512_permutex2var_epi16(previous, pick_high, out));
        }
        previous = out;
      }
      if (!P && !frame.y) return;
      if constexpr (Affine) {
        const __m512 scale_row = _mm512_set1_ps(scale_of[row]), shift_row = _mm512_set1_ps(shift_of[row]);
        const __m512 gain[2] = {Channels ? scale_lanes[0] : scale_row, Channels ? scale_lanes[1] : scale_row};
        const __m512 offset[2] = {Channels ? shift_lanes[0] : shift_row, Channels ? shift_lanes[1] : shift_row};
        out = affine(value, gain, offset, frame.residual, frame.residual + row * frame.residual_step, relu_least);
      }
      _mm512_storeu_si512(frame.y + row * frame.y_step, out);
    };
    __m512i previous = _mm512_setzero_si512();
    if (f.product && !f.unusual && f.x && f.y && rows == block && lanes == block) {
      const auto row = [finish_row, previous](int64_t half, int64_t r, __m512 low, __m512 high) mutable
          __attribute__((always_inline)) { finish_row(std::true_type(), half, r, low, high, previous); };
      product(f.operands, rb, lb, block, row, f.ahead, f.ahead_end);
    } else {
      if (f.product) {
        product_to(c, f.operands, rb, lb, rows, f.ahead, f.ahead_end);
        if (f.unusual) repair(f.operands, f.unusual, rb, lb, c, v);
      }
      for (int64_t r = 0; r < block; ++r) {
        const float* const sums = c + r / tile * 512 + r % tile * tile;
        finish_row(std::false_type(), r / tile, r % tile, f.product ? _mm512_load_ps(sums) : none,
                   f.product ? _mm512_load_ps(sums + 256) : none, previous);
      }
    }
    if (!Channels && operands && __builtin_expect(any_special, 0))
      for (int64_t r = 0; r < block; ++r)
        for (int j = 0; j < block; ++j) {
          const float value = v[(r & 16) * 32 + (r & 15) * 16 + (j >= 16 ? 256 + j - 16 : j)];
          bf16_t rounded;
          from_double(value, rounded);
          if ((rounded.bits & 0x7fff) >= 0x7f80) unusual[lb * block + j] |= (rounded.bits & 0x7f) ? 2 : 1;
        }
  }

  // Of 16 channels those in whose lanes the state is carried in fp32.
  __mmask16 identity_lanes(int64_t channel) const {
    return _mm_test_epi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.identity + channel)),
                              _mm_set1_epi8(1));
  }

  // Everything adjacent along channels: nothing is staged. A block of columns goes through all frames by itself, its
  // fp32 state [C / 32][32][32] and the two copies of operands in the nearest cache that holds them; each product meets
  // x and the old state where they lie.
  bool direct_rows() const {
    const auto adjacent = [](const View& v) { return !v.data || v.c == 1; };
    return Channels && p.C % block == 0 && adjacent(p.x) && adjacent(p.y) && adjacent(p.residual) &&
           adjacent(p.first) && adjacent(p.last);
  }

  // Where a view's column lies, and the step from one frame to the next in the order of processing.
  struct Rows {
    char* data = nullptr;
    int64_t frame = 0;
    int64_t* at = nullptr;
    char* row(int64_t column, int64_t i = 0) const { return data + at[column] + i * frame; }
    // The columns from `column` on, frame i, from so many bytes on.
    Rows frame_of(int64_t column, int64_t i, int64_t bytes) const {
      return data ? Rows{data + i * frame + bytes, 0, at + column} : Rows{};
    }
  };
  Rows make_rows(const View& view, int64_t q0, int64_t columns, int64_t* table, bool sequence) const {
    Rows rows;
    if (!view.data) return rows;
    const int64_t size = element_size(view.dtype);
    rows.at = table;
    column_offsets(p, view, q0, columns, table);
    for (int64_t i = 0; i < columns; ++i) table[i] *= size;
    rows.data = static_cast<char*>(view.data) + (sequence && p.reverse ? (p.T - 1) * view.t * size : 0);
    rows.frame = sequence ? (p.reverse ? -view.t : view.t) * size : 0;
    return rows;
  }

  template <bool Affine>
  void run_rows(int64_t q0, int64_t q1, int64_t channel_begin, int64_t channel_end) const {
    const int64_t columns = q1 - q0, C = p.C;
    size_t bytes = 0;
    const auto reserve = [&](size_t size) {
      const size_t at = bytes;
      bytes += (size + 63) / 64 * 64;
      return at;
    };
    const int64_t operand_values = 2 * k_tiles * tile_values;
    const size_t at_operands = reserve(2 * operand_values * sizeof(bf16_t)), at_v = reserve(block * C * sizeof(float));
    const size_t at_c = reserve(4096), at_unusual = reserve(4 * block),
                 at_tables = reserve(5 * columns * sizeof(int64_t));
    char* memory = static_cast<char*>(scratch(1, bytes));
    bf16_t* operands = reinterpret_cast<bf16_t*>(memory + at_operands);
    bf16_t* next_operands = operands + operand_values;
    float* const v = reinterpret_cast<float*>(memory + at_v);
    float* const c = reinterpret_cast<float*>(memory + at_c);
    // Of each column, and, after them, of any.
    uint8_t* unusual = reinterpret_cast<uint8_t*>(memory + at_unusual);
    uint8_t* next_unusual = unusual + 2 * block;
    int64_t* const tables = reinterpret_cast<int64_t*>(memory + at_tables);
    memset(static_cast<void*>(operands), 0, 2 * operand_values * sizeof(bf16_t));  // rows past the last column

    const Rows first = make_rows(p.first, q0, columns, tables, false);
    const Rows last = make_rows(p.last, q0, columns, tables + columns, false);
    const Rows x = make_rows(p.x, q0, columns, tables + 2 * columns, true);
    const Rows y = make_rows(p.y, q0, columns, tables + 3 * columns, true);
    const Rows residual = make_rows(p.residual, q0, columns, tables + 4 * columns, true);
    const bool last_here = p.last_kind != Last::none && p.last.dtype == DType::f32;  // the last frame writes it
    const auto whole_lines_of = [](const View& view, int64_t line) {
      return reinterpret_cast<uintptr_t>(view.data) % 64 == 0 &&
             (view.t % line | view.n % line | view.g % line | view.h % line | view.w % line) == 0;
    };
    const bool last_past_caches = last_here && around_state && whole_lines_of(p.last, 16);
    const bool y_past_caches = around_clip && whole_lines_of(p.y, block);
    const int64_t frames = p.T + (p.last_kind == Last::projected ? 1 : 0);
    const __m512 zero = _mm512_setzero_ps(), none = _mm512_set1_ps(-0.0f);
    const __m512 least = p.relu ? zero : _mm512_set1_ps(-INFINITY);

    const Unit::Scope scope;
    for (int64_t m0 = 0; m0 < columns; m0 += block) {
      const int64_t rows = min_of<int64_t>(block, columns - m0),
                    next_rows = min_of<int64_t>(block, columns - m0 - block);
      memset(next_unusual, 0, block + 1);
      if (p.init != Init::none) load_rows(first, m0, rows, v);
      if (p.init == Init::state)
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c0 = 0; c0 < C; c0 += block) {
            const float* const state = v + (c0 + r) * block;
            bool special;
            __m512i rounded = to_bf16({_mm512_load_ps(state), _mm512_load_ps(state + tile)}, special);
            if (special) {
              rounded = exactly_bf16(_mm512_load_ps(state), _mm512_load_ps(state + tile));
              next_unusual[r] |= kind_of(rounded), next_unusual[block] = 1;
            }
            _mm512_store_si512(next_operands + (r / tile * k_tiles + c0 / block) * tile_values + r % tile * block,
                               rounded);
          }
      for (int64_t i = 0; i < frames; ++i) {
        std::swap(operands, next_operands);
        std::swap(unusual, next_unusual);
        memset(next_unusual, 0, block + 1);
        const bool transport = i < p.T, final = i + 1 == frames, product_here = i > 0 || p.init == Init::state;
        const bool with_x = transport && x.data, with_y = transport && y.data,
                   with_residual = Affine && transport && residual.data;
        const bool to_last = final && last_here, any_unusual = product_here && unusual[block];
        const __m512 alpha = _mm512_set1_ps(static_cast<float>(i == p.T       ? 1
                                                               : i == p.T - 1 ? p.alpha_final
                                                               : i == 0       ? p.alpha_first
                                                                              : p.alpha));
        for (int64_t c0 = channel_begin; c0 < channel_end; c0 += block) {
          // What comes next: the same columns' next frame, or the next columns, whose state was last touched a frame
          // ago.
          const int64_t ahead = i + 1 < p.T ? m0 : m0 + block, ahead_frame = i + 1 < p.T ? i + 1 : 0;
          const int64_t ahead_rows = i + 1 < p.T ? rows : final ? next_rows : 0;
          for (int64_t r = 0; r < ahead_rows; ++r) {
            if (x.data) __builtin_prefetch(x.row(ahead + r, ahead_frame) + c0 * 2, 0, 2);
            if (y.data) __builtin_prefetch(y.row(ahead + r, ahead_frame) + c0 * 2, 1, 2);
            if (Affine && residual.data) __builtin_prefetch(residual.row(ahead + r, ahead_frame) + c0 * 2, 0, 2);
            if (final && first.data) {
              __builtin_prefetch(first.row(ahead + r, 0) + c0 * 4, 0, 2);
              __builtin_prefetch(first.row(ahead + r, 0) + c0 * 4 + 64, 0, 2);
            }
          }
          __mmask16 add[2] = {0, 0};
          __m512 scale_lanes[2] = {zero, zero}, shift_lanes[2] = {zero, zero};
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            if (p.init == Init::added && !product_here) add[h] = 0xffff;
            if (product_here) add[h] = identity_lanes(c0 + 16 * h);
            if (Affine)
              scale_lanes[h] = _mm512_loadu_ps(scale + c0 + 16 * h),
              shift_lanes[h] = _mm512_loadu_ps(shift + c0 + 16 * h);
          }
          float* const state = v + c0 * block;
          bf16_t* const next = final ? nullptr : next_operands + c0 / block * tile_values;
          const int64_t next_half = k_tiles * tile_values;
          const Rows x_frame = x.frame_of(m0, i, c0 * 2), y_frame = y.frame_of(m0, i, c0 * 2),
                     residual_frame = residual.frame_of(m0, i, c0 * 2), last_frame = last.frame_of(m0, 0, c0 * 4);
          // As in finish; all lanes are there.
          const auto finish_row = [=](auto plain, int64_t half, int64_t r, __m512 low,
                                      __m512 high) __attribute__((always_inline)) {
            constexpr bool P = decltype(plain)::value;
            const int64_t row = half * tile + r;
            float* const old = state + row * block;
            const __mmask16 keep = P || !any_unusual || !unusual[row] ? 0xffff : 0;
            const __mmask16 added[2] = {P ? add[0] : static_cast<__mmask16>(add[0] & keep),
                                        P ? add[1] : static_cast<__mmask16>(add[1] & keep)};
            __m512 value[2] = {low, high};
            advance(value, added, old, tile, P || with_x, P || with_x ? x_frame.row(row) : nullptr, alpha);
            if (!to_last) {
              _mm512_store_ps(old, value[0]);
              _mm512_store_ps(old + tile, value[1]);
            } else {
              float* const to = reinterpret_cast<float*>(last_frame.row(row));
              if (last_past_caches) {
                _mm512_stream_ps(to, value[0]);
                _mm512_stream_ps(to + tile, value[1]);
              } else {
                _mm512_storeu_ps(to, value[0]);
                _mm512_storeu_ps(to + tile, value[1]);
              }
            }
            bool special;
            __m512i out = to_bf16(value, special);
            if (__builtin_expect(special, 0)) {
              out = exactly_bf16(value[0], value[1]);
              next_unusual[row] |= kind_of(out), next_unusual[block] = 1;
            }
            if (next) _mm512_store_si512(next + half * next_half + r * block, out);
            if (!P && !with_y) return;
            if constexpr (Affine)
              out = affine(value, scale_lanes, shift_lanes, with_residual,
                           with_residual ? residual_frame.row(row) : nullptr, least);
            if (y_past_caches)
              _mm512_stream_si512(reinterpret_cast<__m512i*>(y_frame.row(row)), out);
            else
              _mm512_storeu_si512(y_frame.row(row), out);
          };
          const auto plain_row =
              [finish_row](int64_t half, int64_t r, __m512 low, __m512 high)
                  __attribute__((always_inline)) { finish_row(std::true_type(), half, r, low, high); };
          const bool plain = with_x && with_y && !any_unusual && rows == block;
          if (plain && product_here) {
            product(operands, 0, c0 / block, block, plain_row);
          } else if (plain) {
            for (int64_t r = 0; r < block; ++r) plain_row(r / tile, r % tile, none, none);
          } else {
            if (product_here) product_to(c, operands, 0, c0 / block, rows);
            if (any_unusual) repair(operands, unusual, 0, c0 / block, c, nullptr);
            for (int64_t r = 0; r < rows; ++r) {
              const float* const sums = c + r / tile * 512 + r % tile * tile;
              finish_row(std::false_type(), r / tile, r % tile, product_here ? _mm512_load_ps(sums) : none,
                         product_here ? _mm512_load_ps(sums + 256) : none);
            }
          }
        }
      }
      if (p.last_kind != Last::none && !last_here)
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t k = channel_begin; k < channel_end; ++k)
            store_any(last.row(m0 + r, 0), p.last.dtype, k, v[k / block * block * block + r * block + k % block]);
    }
    if (last_past_caches || y_past_caches) end_around();
  }

  // The state before the first frame, [channels / 32][32 columns][32].
  void load_rows(const Rows& first, int64_t m0, int64_t rows, float* v) const {
    for (int64_t r = 0; r < rows; ++r) {
      const char* from = first.row(m0 + r, 0);
      for (int64_t c0 = 0; c0 < p.C; c0 += block) {
        float* const to = v + (c0 + r) * block;
        if (p.first.dtype == DType::f32)
          memcpy(to, from + c0 * sizeof(float), block * sizeof(float));
        else
          for (int64_t k = 0; k < block; ++k) to[k] = static_cast<float>(load_any(from, p.first.dtype, c0 + k));
      }
    }
  }

  void run(int64_t q0, int64_t q1, int64_t c0, int64_t c1) const {
    if constexpr (Channels)
      if (direct_rows()) return p.scale ? run_rows<true>(q0, q1, c0, c1) : run_rows<false>(q0, q1, c0, c1);
    const int64_t columns = q1 - q0, padded_columns = round_up(columns, block);
    const int64_t row_blocks = (Channels ? padded_columns : padded) / block;
    const int64_t lane_blocks = (Channels ? padded : padded_columns) / block;
    const int64_t rows = Channels ? columns : p.C, lanes = Channels ? p.C : columns;
    const int64_t table = columns + p.C;
    const int64_t stage_width = min_of(plan_group, lane_blocks) * block, stage_size = block * stage_width;
    size_t bytes = 0;
    const auto reserve = [&](size_t size) {
      const size_t at = bytes;
      bytes += (size + 63) / 64 * 64;
      return at;
    };
    const size_t state_size = padded_columns * padded;
    const size_t at_v = reserve(state_size * 4), at_operands = reserve(state_size * 4),
                 at_tables = reserve((3 * table + 2 * columns) * 8);
    const size_t at_stage = reserve(3 * stage_size * 2), at_c = reserve(4096), at_unusual = reserve(2 * padded_columns);
    const size_t at_direct = reserve(lane_blocks);
    const size_t at_lines = reserve(3 * block * (stage_width / 32 + 2) * sizeof(char*));
    char* memory = static_cast<char*>(scratch(1, bytes));
    float* v = reinterpret_cast<float*>(memory + at_v);
    bf16_t* old_state = reinterpret_cast<bf16_t*>(memory + at_operands);
    bf16_t* new_state = old_state + state_size;
    int64_t* tables = reinterpret_cast<int64_t*>(memory + at_tables);
    bf16_t* stage = reinterpret_cast<bf16_t*>(memory + at_stage);
    float* c = reinterpret_cast<float*>(memory + at_c);
    uint8_t* old_unusual = reinterpret_cast<uint8_t*>(memory + at_unusual);
    uint8_t* new_unusual = old_unusual + padded_columns;
    uint8_t* const direct = reinterpret_cast<uint8_t*>(memory + at_direct);
    const char** const lines = reinterpret_cast<const char**>(memory + at_lines);
    memset(old_unusual, 0, 2 * padded_columns);
    memset(static_cast<void*>(stage), 0, 3 * stage_size * 2);

    Stream<bf16_t> x, y, residual;
    make_stream(p.x, x, q0, columns, tables);
    make_stream(p.y, y, q0, columns, tables + table);
    make_stream(p.residual, residual, q0, columns, tables + 2 * table);
    // As in recurrent_conv_core.h: rows that cut lines go the usual way where the arithmetic is the bound, block by
    // block.
    const bool in_place = Unit::in_place && !Channels && p.C > k_part && !whole_lines(p.y);
    const bool around = around_clip && !in_place;
    int64_t staged_blocks = 0;
    for (int64_t lb = 0; lb < lane_blocks; ++lb) {
      direct[lb] = !around && stays_in_place(x, y, residual, lb, columns);
      staged_blocks += !direct[lb];
    }
    const int64_t group = in_place && 2 * staged_blocks < lane_blocks ? 1 : plan_group;
    if (p.init != Init::none)
      load_state(v, old_state, old_unusual, q0, columns, row_blocks, lane_blocks, c, tables + 3 * table);

    const Unit::Scope scope;
    const int64_t frames = p.T + (p.last_kind == Last::projected ? 1 : 0);
    const int64_t row_begin = Channels ? 0 : c0, row_end = Channels ? rows : min_of(c1, rows);
    const int64_t lane_begin = Channels ? c0 / block : 0, lane_end = Channels ? (c1 + block - 1) / block : lane_blocks;
    for (int64_t i = 0; i < frames; ++i) {
      const bool transport = i < p.T;
      Frame f;
      f.product = i > 0 || p.init == Init::state;
      f.add_state = i == 0 && p.init == Init::added;
      f.alpha = static_cast<float>(i == p.T ? 1 : i == p.T - 1 ? p.alpha_final : i == 0 ? p.alpha_first : p.alpha);
      bool any_unusual = false;
      for (int64_t q = 0; q < padded_columns; ++q) any_unusual |= old_unusual[q] != 0;
      memset(new_unusual, 0, padded_columns);
      for (int64_t g0 = lane_begin; g0 < lane_end; g0 += group) {
        const int64_t g1 = min_of(g0 + group, lane_end), group_lanes = min_of(g1 * block, lanes) - g0 * block;
        for (int64_t m0 = row_begin; m0 < row_end; m0 += block) {
          const int64_t rb = m0 / block, group_rows = min_of<int64_t>(block, row_end - m0);
          bool staged = group_rows < block;
          for (int64_t lb = g0; lb < g1; ++lb) staged |= !direct[lb];
          if (transport && x.base && staged)
            copy_in<bf16_t>(x.base + i * x.t, x.rows + m0, group_rows, x.lanes + g0 * block, group_lanes, stage,
                            stage_width);
          if (transport && residual.base && staged)
            copy_in<bf16_t>(residual.base + i * residual.t, residual.rows + m0, group_rows, residual.lanes + g0 * block,
                            group_lanes, stage + stage_size, stage_width);
          // The lines of the next piece, so that they have come by when it is computed.
          const char** asked = lines;
          const bool same_group = m0 + block < row_end, same_frame = same_group || g1 < lane_end;
          const int64_t next_m = same_group ? m0 + block : row_begin;
          const int64_t next_g = same_group ? g0 : same_frame ? g1 : lane_begin, next_i = same_frame ? i : i + 1;
          if (next_i < p.T) {
            const auto add = [&](const Stream<bf16_t>& s) {
              each_line(sizeof(bf16_t), s.base + next_i * s.t, s.rows + next_m,
                        min_of<int64_t>(block, row_end - next_m), s.lanes[next_g * block],
                        min_of(group_lanes, lanes - next_g * block), [&](const char* line) { *asked++ = line; });
            };
            if (x.base) add(x);
            if (residual.base) add(residual);
            if (y.base && !around) add(y);
          }
          const char* const* ahead = lines;
          const int64_t share = ceil_div(asked - lines, g1 - g0);
          for (int64_t lb = g0; lb < g1; ++lb) {
            const char* const* const ahead_end = ahead + min_of<int64_t>(share, asked - ahead);
            if (!f.product)  // nothing is multiplied meanwhile
              for (const char* const* line = ahead; line < ahead_end; ++line) __builtin_prefetch(*line, 0, 2);
            float* state = v + (rb * lane_blocks + lb) * 1024;
            f.operands = old_state;
            f.unusual = any_unusual ? old_unusual : nullptr;
            f.ahead = ahead, f.ahead_end = ahead_end;
            ahead = ahead_end;
            if (transport) {
              bf16_t* at = stage + (lb - g0) * block;
              f.x = x.base ? at : nullptr;
              f.residual = residual.base ? at + stage_size : nullptr;
              f.y = y.base ? at + 2 * stage_size : nullptr;
              f.x_step = f.residual_step = f.y_step = stage_width;
              if (!staged) {
                const auto place = [&](const Stream<bf16_t>& s) {
                  return s.base ? s.base + i * s.t + s.rows[m0] + s.lanes[lb * block] : nullptr;
                };
                f.x = place(x), f.residual = place(residual), f.y = place(y);
                f.x_step = p.x.c, f.residual_step = p.residual.c, f.y_step = p.y.c;
              }
            }
            bf16_t* const next_state = i + 1 < frames ? new_state : nullptr;
            if (p.scale && transport)
              finish<true>(f, rb, lb, columns, c, state, next_state, new_unusual);
            else
              finish<false>(f, rb, lb, columns, c, state, next_state, new_unusual);
          }
          if (transport && y.base && staged)
            copy_out<bf16_t>(y.base + i * y.t, y.rows + m0, group_rows, y.lanes + g0 * block, group_lanes,
                             stage + 2 * stage_size, stage_width, around);
        }
      }
      bf16_t* swap = old_state;
      old_state = new_state;
      new_state = swap;
      uint8_t* swap_flags = old_unusual;
      old_unusual = new_unusual;
      new_unusual = swap_flags;
    }
    if (p.last_kind != Last::none) store_state(v, q0, columns, lane_blocks, c0, c1, tables + 3 * table);
    if (around || around_state) end_around();
  }

  // Past the caches only whole lines are worth writing: rows that all begin one.
  static bool whole_lines(const View& v) {
    return reinterpret_cast<uintptr_t>(v.data) % 64 == 0 && (v.t | v.n | v.g | v.c) % block == 0;
  }

  // Whether a block of 32 lanes can be read and written where it lies: they are adjacent in every tensor. Clips that go
  // past the caches want long sequential accesses (one of 26 MB and 64 channels took 5 % longer without stages).
  bool stays_in_place(const Stream<bf16_t>& x, const Stream<bf16_t>& y, const Stream<bf16_t>& residual, int64_t lb,
                      int64_t columns) const {
    const int64_t begin = lb * block, end = begin + block;
    if (!Unit::in_place || Channels || end > columns) return false;
    const auto adjacent = [&](const Stream<bf16_t>& s) { return !s.base || run_end(s.lanes, begin, end) == end; };
    return adjacent(x) && adjacent(y) && adjacent(residual);
  }

  void load_state(float* v, bf16_t* operands, uint8_t* unusual, int64_t q0, int64_t columns, int64_t row_blocks,
                  int64_t lane_blocks, float* given, int64_t* column_at) const {
    column_offsets(p, p.first, q0, columns, column_at);
    const int64_t rows = Channels ? columns : p.C, lanes = Channels ? p.C : columns;
    // Row by row of blocks, as the state lies in memory, and the next block's lines asked for ahead: the state of a
    // stream was last touched a frame ago and comes from far away.
    const auto row_at = [&](int64_t r) { return Channels ? column_at[r] : r * p.first.c; };
    const auto lane_at = [&](int64_t l) { return Channels ? l * p.first.c : column_at[l]; };
    const int64_t element = p.first.dtype == DType::f32 ? 4 : 2;
    const auto prefetch = [&](int64_t r0, int64_t l0) {
      for (int64_t r = r0; r < min_of(r0 + block, rows); ++r) {
        const char* at = static_cast<const char*>(p.first.data) + (row_at(r) + lane_at(l0)) * element;
        __builtin_prefetch(at);
        __builtin_prefetch(at + 64);
      }
    };
    for (int64_t rb = 0; rb < row_blocks; ++rb) {
      const int64_t present = min_of<int64_t>(block, rows - rb * block);
      for (int64_t lb = 0; lb < lane_blocks; ++lb) {
        const bool last = lb + 1 == lane_blocks;
        prefetch((last ? rb + 1 : rb) * block, (last ? 0 : lb + 1) * block);
        int64_t lane_offsets[block];
        const int64_t count = min_of<int64_t>(block, lanes - lb * block);
        for (int64_t l = 0; l < count; ++l) lane_offsets[l] = lane_at(lb * block + l);
        const bool adjacent = p.first.dtype == DType::f32 && run_end(lane_offsets, 0, count) == count;
        if (count < block || present < block) memset(given, 0, 4096);
        for (int64_t r = 0; r < present; ++r) {
          const int64_t row = row_at(rb * block + r);
          if (adjacent)
            copy_row(given + r * block, static_cast<const float*>(p.first.data) + row + lane_offsets[0], count * 4);
          else
            for (int64_t l = 0; l < count; ++l)
              given[r * block + l] = static_cast<float>(load_any(p.first.data, p.first.dtype, row + lane_offsets[l]));
        }
        Frame f;
        f.state = given;
        finish<false>(f, rb, lb, columns, given, v + (rb * lane_blocks + lb) * 1024, operands, unusual);
      }
    }
  }

  void store_state(const float* v, int64_t q0, int64_t columns, int64_t lane_blocks, int64_t c0, int64_t c1,
                   int64_t* column_at) const {
    int64_t* const run_ends = column_at + columns;
    column_offsets(p, p.last, q0, columns, column_at);
    for (int64_t q = 0; q < columns;) {
      const int64_t end = run_end(column_at, q, columns);
      while (q < end) run_ends[q++] = end;
    }
    const int64_t begin = Channels ? 0 : c0, end = Channels ? columns : min_of(c1, p.C),
                  lanes = Channels ? c1 : columns;
    const int64_t lane_begin = Channels ? c0 / block : 0;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t row = Channels ? column_at[r] : r * p.last.c;
      for (int64_t lb = lane_begin; lb * block < lanes; ++lb) {
        const float* from = v + (r / block * lane_blocks + lb) * 1024 + (r & 16) * 32 + (r & 15) * 16;
        const int64_t l0 = lb * block, count = min_of<int64_t>(block, lanes - l0);
        const bool adjacent = Channels ? p.last.c == 1 : run_ends[l0] >= l0 + count;
        if (p.last.dtype == DType::f32 && adjacent) {
          float* to = static_cast<float*>(p.last.data) + row + (Channels ? l0 : column_at[l0]);
          const bool aligned = around_state && count == block && reinterpret_cast<uintptr_t>(to) % 64 == 0;
          if (aligned) {
            _mm512_stream_ps(to, _mm512_load_ps(from));
            _mm512_stream_ps(to + 16, _mm512_load_ps(from + 256));
          } else {
            copy_row(to, from, min_of<int64_t>(count, 16) * 4);
            if (count > 16) copy_row(to + 16, from + 256, (count - 16) * 4);
          }
        } else {
          for (int64_t l = 0; l < count; ++l)
            store_any(p.last.data, p.last.dtype, row + (Channels ? (l0 + l) * p.last.c : column_at[l0 + l]),
                      from[l < 16 ? l : 240 + l]);
        }
      }
    }
  }
};

// 16 x 16 values of 32 bits.
__attribute__((always_inline)) static inline void transpose(__m512i (&a)[16]) {
  __m512i b[16];
#pragma GCC unroll 8
  for (int l = 0; l < 16; l += 2) {
    b[l] = _mm512_unpacklo_epi32(a[l], a[l + 1]);
    b[l + 1] = _mm512_unpackhi_epi32(a[l], a[l + 1]);
  }
#pragma GCC unroll 4
  for (int l = 0; l < 16; l += 4) {
    a[l] = _mm512_unpacklo_epi64(b[l], b[l + 2]);
    a[l + 1] = _mm512_unpackhi_epi64(b[l], b[l + 2]);
    a[l + 2] = _mm512_unpacklo_epi64(b[l + 1], b[l + 3]);
    a[l + 3] = _mm512_unpackhi_epi64(b[l + 1], b[l + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    b[j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
    b[4 + j] = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    b[8 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    b[12 + j] = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    a[j] = _mm512_shuffle_i32x4(b[j], b[8 + j], 0x88);
    a[8 + j] = _mm512_shuffle_i32x4(b[j], b[8 + j], 0xdd);
    a[4 + j] = _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0x88);
    a[12 + j] = _mm512_shuffle_i32x4(b[4 + j], b[12 + j], 0xdd);
  }
}

template <bool Channels>
struct Call {
  const Scan& p;
  const Plan& plan;
  int64_t padded, k_tiles;
  bf16_t* tiles;  // packed, or the diagonal only
  bool direct;
  uint8_t* identity;
  Weights weights;
  const float *scale = nullptr, *shift = nullptr;

  bf16_t entry(int64_t o, int64_t k) const {
    if (o >= p.C || k >= p.C) return {0};
    bf16_t w = static_cast<const bf16_t*>(p.weight)[o * p.weight_out + k * p.weight_in];
    if (o == k && identity[o]) from_double(to_double(w) - 1.0, w);
    return w;
  }

  static void pack(void* self, int64_t index) {  // one tile of outputs
    auto& t = *static_cast<Call*>(self);
    const int64_t o0 = index * tile;
    const int64_t k_begin = t.direct ? index / 2 : 0, k_end = t.direct ? k_begin + 1 : t.k_tiles;
    for (int64_t kt = k_begin; kt < k_end; ++kt) {
      bf16_t* out = t.tiles + (t.direct ? index : index * t.k_tiles + kt) * tile_values;
      const bool plain = o0 + tile <= t.p.C && (kt + 1) * block <= t.p.C && o0 / block != kt && t.p.weight_in == 1;
      if (plain) {
        const bf16_t* rows = static_cast<const bf16_t*>(t.p.weight) + o0 * t.p.weight_out + kt * block;
        __m512i pairs[tile];
#pragma GCC unroll 16
        for (int64_t o = 0; o < tile; ++o) pairs[o] = _mm512_loadu_si512(rows + o * t.p.weight_out);
        if (Channels) transpose(pairs);
#pragma GCC unroll 16
        for (int64_t o = 0; o < tile; ++o) _mm512_store_si512(out + o * block, pairs[o]);
        continue;
      }
      for (int64_t o = 0; o < tile; ++o) {
        for (int64_t k = 0; k < block; ++k) {
          const bf16_t value = t.entry(o0 + o, kt * block + k);
          (Channels ? out[k / 2 * block + o * 2 + k % 2] : out[o * block + k]) = value;
        }
      }
    }
  }

  static void task(void* self, int64_t index) {
    const auto& t = *static_cast<const Call*>(self);
    const TaskRange r = task_range(t.plan, t.p.N * t.p.G * t.p.H * t.p.W, t.p.C, index);
    Task<Channels>{t.p,           t.weights,          t.scale, t.shift, t.padded, t.k_tiles, t.plan.group,
                   t.plan.around, t.plan.around_state}
        .run(r.column_begin, r.column_end, r.channel_begin, r.channel_end);
  }

  static void run(const Scan& p, const Plan& plan, const Parallel& parallel) {
    const int64_t C = p.C, padded = round_up(C, block), columns = p.N * p.G * p.H * p.W;
    const bool direct = !Channels && p.T == 1 && C % block == 0 && p.weight_in == 1;
    const int64_t tile_count = direct ? padded / tile : padded / tile * (padded / block);
    char* memory = static_cast<char*>(scratch(0, tile_count * tile_values * 2 + padded * 9 + 64));
    Call t{p, plan, padded, padded / block, reinterpret_cast<bf16_t*>(memory), direct, nullptr, {}};
    float* affine = reinterpret_cast<float*>(memory + tile_count * tile_values * 2);
    t.identity = reinterpret_cast<uint8_t*>(affine + 2 * padded);
    for (int64_t c = 0; c < padded; ++c) {
      const double d = c < C ? to_double(static_cast<const bf16_t*>(p.weight)[c * (p.weight_out + p.weight_in)]) : 0;
      t.identity[c] = d >= 0.5 && d <= 2.0;
      if (p.scale) {
        affine[c] = c < C ? static_cast<const float*>(p.scale)[c] : 0;
        affine[padded + c] = c < C ? static_cast<const float*>(p.shift)[c] : 0;
      }
    }
    t.scale = affine;
    t.shift = affine + padded;
    if (C <= 128)
      for (int64_t i = 0; i < padded / tile; ++i) pack(&t, i);
    else
      parallel.run(parallel.pool, padded / tile, pack, &t);
    t.weights.identity = t.identity;
    if (direct) {
      t.weights.direct = static_cast<const bf16_t*>(p.weight);
      t.weights.stride = p.weight_out;
      t.weights.diagonal = t.tiles;
    } else {
      t.weights.tiles = t.tiles;
    }
    parallel.run(parallel.pool, task_count(plan, columns), task, &t);
  }
};

void scan(const Scan& p, const Plan& plan, const Parallel& parallel) {
  if (plan.channels)
    Call<true>::run(p, plan, parallel);
  else
    Call<false>::run(p, plan, parallel);
}
