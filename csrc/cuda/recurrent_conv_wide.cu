// recurrent_conv on the matrix unit: bf16 and fp16, 129 to 256 channels, W and the state in registers.
#include <type_traits>

#include "cuda/device/async_copy.h"
#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/matrix_copy.h"
#include "cuda/device/matrix_store.h"
#include "cuda/device/mma.h"
#include "cuda/device/registers.h"
#include "cuda/device/shared_memory.h"
#include "cuda/recurrent_conv_tile.h"
#include "cuda/recurrent_conv_views.h"

namespace rcu_ops::cuda {
namespace {

constexpr int wide_threads = 32 * wide_warps;
// Of slots whose rows are columns or channels, as plan.slot_pitch has it.
constexpr int channels_pitch = static_cast<int>(odd_words(2 * wide_most_channels));
constexpr int columns_pitch = static_cast<int>(odd_words(2 * wide_positions));

// One scan over time (common/recurrent_conv.h), bf16 or fp16, C <= 256.
//
// Format.   A condition of the whole grid, asked once per frame: only products and conversions differ by it.
// Layout.   x, y and the residual have contiguous channels (plan.along_channels) or contiguous columns (otherwise), any
//           other strides; which of the two, and the width of words, are conditions on loops and on single
//           instructions.
// Work.     A block is 8 warps and owns P = wide_positions columns for all frames; warp w computes output channels 32 w
//           .. 32 w + 31. Rows of the matrix product are output channels, its columns columns of the problem: W is the
//           a operand and stays in registers (2 x 16 fragments of 4), the accumulators are the state in fp32, and b is
//           the state of all warps, rounded to T, in shared memory. No byte of W is read after the first frame, so few
//           columns per block cost little more than the barriers, and where there are few rows every multiprocessor
//           still gets some.
// State.    As in tile_scan: v' = alpha * (W round(v) + diag(W) * (v - round(v)) + x).
// Memory.   Shared memory as in WideScanPlan. Two buffers of the rounded state change places every frame; without an
//           epilogue the new one is y as well and goes out from there, else y takes over the slot of x. Frame i +
//           stages - 1 is copied by cp.async into the slot of frame i - 1 after frame i has been computed.
// Order.    One block barrier per frame, after the new state has been written: before it every thread has waited for
//           its part of the next frame's x, has read the old state and has copied out what was before; after it the new
//           state is read and copied out, the old one rewritten. The order of additions depends on nothing but C.
// Padding.  Channels from C on have zero weights and are set to zero in the state every frame (0 * inf); columns beyond
//           the last are computed on zeros and not stored.
// Norm.     As in tile_scan; a thread adds up the statistics of one channel.
// Aliasing. y and last overlap no input. Every output element has one writer.
// Bound.    4 bytes per element moved against 2 C FLOP: at C = 256 still memory (4.3 TB/s: 275 TFLOP/s on the matrix
//           unit). Reading b costs 8 warps x 512 bytes of shared memory per column and frame, 32 cycles where x and y
//           need 54 from HBM.
__global__ void __launch_bounds__(wide_threads, 1) wide_scan(const Scan p, const WideScanPlan plan) {
  using T = uint16_t;  // a number of either format
  constexpr int P = wide_positions, CP = wide_most_channels, KT = CP / 16, NT = P / 8, piece = wide_weight_piece;
  const bool bf16 = p.dtype == DType::bf16;
  const int thread = threadIdx.x, lane = thread % 32, C = static_cast<int>(p.C);
  const int tile = lane / 8, tile_row = lane % 8, first_channel = thread / 32 * 32;
  const bool along_channels = plan.along_channels;
  const int pitch = static_cast<int>(plan.slot_pitch), numbers_of_word = plan.vector_bytes / 2;
  const bool with_residual = p.residual.data != nullptr;
  const int stage_bytes = static_cast<int>(plan.slot_bytes) * (with_residual ? 2 : 1);

  Offset* x_offset = dynamic_shared<Offset>();
  Offset *y_offset = x_offset + P, *residual_offset = y_offset + P, *first_offset = residual_offset + P,
         *last_offset = first_offset + P;
  float* numbers = dynamic_shared<float>(plan.numbers_at);  // of batch normalisation
  const Statistics statistics = statistics_at(numbers, CP);
  const NormTables tables{numbers, numbers + CP, numbers + 2 * CP, numbers + 3 * CP, numbers + 4 * CP};
  unsigned char* states = dynamic_shared<unsigned char>(plan.states_at);
  unsigned char* slots = dynamic_shared<unsigned char>(plan.slots_at);

  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * P, columns_left = p.N * p.H * p.W - column0;
  const int columns = columns_left < P ? static_cast<int>(columns_left) : P;
  if (thread < columns)
    fill_offsets(p, column0 + thread, thread, x_offset, y_offset, residual_offset, first_offset, last_offset);

  if (p.norm.moments)
    fill_norm_tables(p.norm, C, thread, numbers, numbers + CP, numbers + 2 * CP, numbers + 3 * CP, numbers + 4 * CP);

  // This warp's 32 rows of W, piece by piece through shared memory, so that all of W is read once and in whole lines.
  const T* w = static_cast<const T*>(p.weight);
  const bool along_inputs = p.weight_in == 1;
  const bool whole_words =
      along_inputs && C % 8 == 0 && p.weight_out % 8 == 0 && reinterpret_cast<uintptr_t>(w) % 16 == 0;
  uint32_t weight[2][KT][4];
#pragma unroll 1  // a copy for each piece would be half of the kernel
  for (int k0 = 0; k0 < KT; k0 += piece / 16) {
    if (whole_words) {
      for (int i = thread; i < CP * piece / 8; i += wide_threads) {
        const int output = i / (piece / 8), at = i % (piece / 8) * 8, input = 16 * k0 + at;
        unsigned char* to = states + output * plan.weight_pitch + 2 * at;
        if (output < C && input < C)
          async_copy<16>(to, w + output * p.weight_out + input);
        else
          *reinterpret_cast<uint4*>(to) = uint4{};
      }
      async_commit();
      async_wait<0>();
    }
    if (!whole_words) {
      // Neighbouring threads take neighbours in memory, and each one `piece` elements a step apart.
      static_assert(CP == wide_threads);
      const int output0 = along_inputs ? thread / piece : thread, at0 = along_inputs ? thread % piece : 0;
      const int output_step = along_inputs ? wide_threads / piece : 0, at_step = along_inputs ? 0 : 1;
      for (int i0 = 0; i0 < piece; i0 += 16) {
        T loaded[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const int output = output0 + (i0 + i) * output_step, input = 16 * k0 + at0 + (i0 + i) * at_step;
          loaded[i] = output < C && input < C ? w[output * p.weight_out + input * p.weight_in] : T(0);
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const int output = output0 + (i0 + i) * output_step, at = at0 + (i0 + i) * at_step;
          *reinterpret_cast<T*>(states + output * plan.weight_pitch + 2 * at) = loaded[i];
        }
      }
    }
    block_barrier();
    // Registers have their numbers when this is compiled, pieces do not.
#pragma unroll
    for (int k = 0; k < KT; ++k)
      if (k / (piece / 16) * (piece / 16) == k0) {
#pragma unroll
        for (int m = 0; m < 2; ++m)
          load_matrix<4, false>(weight[m][k],
                                states + (first_channel + 16 * m + tile % 2 * 8 + tile_row) * plan.weight_pitch +
                                    2 * (16 * (k % (piece / 16)) + tile / 2 * 8));
      }
    block_barrier();
  }
  // Copies write what exists; the rest of a slot stays zero.
  for (int64_t i = thread; i < (plan.stages * stage_bytes) / 4; i += wide_threads)
    reinterpret_cast<uint32_t*>(slots)[i] = 0;
  block_barrier();

  const auto time_of = [&](int64_t i) { return p.reverse ? p.T - 1 - i : i; };
  const auto fetch = [&](const View& v, const Offset* offset, int64_t i, unsigned char* slot) {
    const T* from = static_cast<const T*>(v.data) + time_of(i) * v.t;
    for_words<CP, P>(along_channels, numbers_of_word, recomputed(thread), wide_threads, C, columns, pitch, v, offset,
                     [&](Offset element, int at) { copy_word(numbers_of_word, slot + at, from + element); });
  };
  const auto prefetch = [&](int64_t i, int stage) {
    unsigned char* slot = slots + stage * stage_bytes;
    if (i < p.T) {
      if (p.x.data) fetch(p.x, x_offset, i, slot);
      if (with_residual) fetch(p.residual, residual_offset, i, slot + plan.slot_bytes);
    }
    async_commit();
  };
  // This lane's row of the product's 16 input channels x 16 columns, as four tiles, two for each b.
  const int product_at = along_channels ? (tile / 2 * 8 + tile_row) * channels_pitch + tile % 2 * 16
                                        : (tile % 2 * 8 + tile_row) * columns_pitch + tile / 2 * 16;
  // Where row r % 8 of tile r / 8 lies in a slot, of the warp's 32 channels x 8 columns from 8 n: four tiles one below
  // the other. load_matrix wants the address of this lane's.
  const auto row_along_channels = [&](int r) { return r % 8 * channels_pitch + 2 * (first_channel + r / 8 * 8); };
  const auto row_along_columns = [&](int r) { return (first_channel + r) * columns_pitch; };
  const int own_at = along_channels ? tile_row * channels_pitch + 2 * (first_channel + 8 * tile)
                                    : (first_channel + 8 * tile + tile_row) * columns_pitch;
  const auto load_own = [&](uint32_t (&r)[4], const unsigned char* slot, int n) {
    if (along_channels)
      load_matrix<4, true>(r, slot + own_at + n * (8 * channels_pitch));
    else
      load_matrix<4, false>(r, slot + own_at + n * 16);
  };
  const auto store_own = [&](unsigned char* slot, int n, const uint32_t (&r)[4]) {
    if (along_channels)
      store_matrix<4, true>(slot + n * (8 * channels_pitch), own_at, row_along_channels, r);
    else
      store_matrix<4, false>(slot + n * 16, own_at, row_along_columns, r);
  };

  float state[2][NT][4], diagonal[2][2];
  // Calls visit(state element, channel, column within the block).
  const auto for_state = [&](int thread, auto visit) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          visit(state[m][n][j], thread / 32 * 32 + 16 * m + j / 2 * 8 + thread % 32 / 4,
                8 * n + thread % 4 * 2 + j % 2);
  };
  const auto store_rounded = [&](auto format, unsigned char* to) {
    using Format = decltype(format);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      uint32_t rounded[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) rounded[r] = pack<Format>(state[r / 2][n][r % 2 * 2], state[r / 2][n][r % 2 * 2 + 1]);
      store_own(to, n, rounded);
    }
  };
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int c = first_channel + 8 * r + lane / 4;
    diagonal[r / 2][r % 2] = c < C ? widen(w[c * (p.weight_out + p.weight_in)], bf16) : 0.0f;
  }
  for_state(thread, [&](float& h, int channel, int column) {
    h = 0;
    if (p.init != Init::none && channel < C && column < columns)
      h = load_number(p.first.data, p.first.dtype, first_offset[column] + channel * p.first.c);
  });
  with_format(bf16, [&](auto format) { store_rounded(format, states + plan.slot_bytes); });
  for (int i = 0; i < plan.stages - 1; ++i) prefetch(i, i);
  async_wait<1>();  // at least two groups have been closed after frame 0's, or one and that is frame 1's
  block_barrier();

  // The gradient of the first state is one more product, without an input and without y.
  const int64_t frames = p.T + (p.last_kind == Last::projected ? 1 : 0);
  int stage = 0;  // of frame i, modulo the number of them
  for (int64_t i = 0; i < frames; ++i) {
    const bool extra = i == p.T;
    const float alpha = static_cast<float>(extra ? 1 : i == p.T - 1 ? p.alpha_final : i == 0 ? p.alpha_first : p.alpha);
    const bool product = i > 0 || p.init == Init::state;  // else the state is what the first frame is added to, or zero
    unsigned char *slot = slots + stage * stage_bytes, *after = states + i % 2 * plan.slot_bytes;
    unsigned char* before = states + (i + 1) % 2 * plan.slot_bytes;

    const bool arriving = p.x.data && !extra, with_y = p.y.data && !extra;
    with_format(bf16, [&](auto format) {
      using Format = decltype(format);
      // The pair of v + diag(W) (h - round(h)), what the product leaves out; or, of a first frame, v + h.
      const auto take = [&](int n, int r, float2 v) {
        float* h = &state[r / 2][n][r % 2 * 2];
        const float2 h16 = unpack<Format>(pack<Format>(h[0], h[1]));
        const float d = diagonal[r / 2][r % 2];
        h[0] = product ? with_rest(v.x, d, h[0], h16.x) : v.x + h[0];
        h[1] = product ? with_rest(v.y, d, h[1], h16.y) : v.y + h[1];
      };
      if (p.norm.moments && !extra) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          uint32_t x[4] = {}, normalised[4];
          if (arriving) load_own(x, slot, n);
          load_own(normalised, slot + plan.slot_bytes, n);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int channel = first_channel + 8 * r + lane / 4;
            const float2 dz = unpack<Format>(x[r]), h = unpack<Format>(normalised[r]);
            take(n, r,
                 float2{norm_gradient(tables, channel, dz.x, h.x, p.norm.relu),
                        norm_gradient(tables, channel, dz.y, h.y, p.norm.relu)});
          }
        }
      } else {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          uint32_t x[4] = {};
          if (arriving) load_own(x, slot, n);
#pragma unroll
          for (int r = 0; r < 4; ++r) take(n, r, unpack<Format>(x[r]));
        }
      }
      // The product's 16 input channels from 16 k x 16 columns from 8 n, as four tiles, two for each b.
      const auto multiply = [&](auto along) {
        constexpr bool Along = decltype(along)::value;
        const unsigned char* from = before + product_at;
#pragma unroll
        for (int k = 0; k < KT; ++k)
#pragma unroll
          for (int n = 0; n < NT; n += 2) {
            const unsigned char* at =
                from + (Along ? n * (8 * channels_pitch) + k * 32 : k * (16 * columns_pitch) + n * 16);
            if (n + 1 < NT) {
              uint32_t b[4];
              load_matrix<4, !Along>(b, at);
              const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
              for (int m = 0; m < 2; ++m) {
                mma_m16n8k16<Format>(state[m][n], weight[m][k], left);
                mma_m16n8k16<Format>(state[m][n + 1 < NT ? n + 1 : n], weight[m][k], right);
              }
            } else {
              uint32_t b[2];
              load_matrix<2, !Along>(b, at);
#pragma unroll
              for (int m = 0; m < 2; ++m) mma_m16n8k16<Format>(state[m][n], weight[m][k], b);
            }
          }
      };
      if (product) along_channels ? multiply(std::true_type()) : multiply(std::false_type());
      for_state(thread, [&](float& h, int channel, int) { h = channel < C ? h * alpha : 0.0f; });
      store_rounded(format, after);

      if (with_y && p.scale) {
        warp_barrier();  // x has been read
        const float least = p.relu ? 0.0f : -INFINITY;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          uint32_t residual[4] = {}, y[4];
          if (with_residual) load_own(residual, slot + plan.slot_bytes, n);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int c = first_channel + 8 * r + lane / 4;
            const float gain = c < C ? static_cast<const float*>(p.scale)[c] : 0.0f;
            const float offset = c < C ? static_cast<const float*>(p.shift)[c] : 0.0f;
            const float* h = &state[r / 2][n][r % 2 * 2];
            const float2 added = unpack<Format>(residual[r]);
            const float first = fma(gain, h[0], offset) + added.x, second = fma(gain, h[1], offset) + added.y;
            y[r] = pack<Format>(first < least ? least : first, second < least ? least : second);  // NaN stays
          }
          store_own(slot, n, y);
        }
      }
    });
    if (plan.stages == 4)
      async_wait<1>();
    else
      async_wait<0>();
    block_barrier();  // the new state and y are complete, the next x is here
    if (with_y) {
      const unsigned char* from = p.scale ? slot : after;
      if (p.norm.partial && thread < C)
        add_statistics(statistics, bf16, from, along_channels, pitch, thread, columns, i == 0);
      T* to = static_cast<T*>(p.y.data) + time_of(i) * p.y.t;
      for_words<CP, P>(along_channels, numbers_of_word, recomputed(thread), wide_threads, C, columns, pitch, p.y,
                       y_offset, [&](Offset element, int at) { store_word(numbers_of_word, to + element, from + at); });
    }
    prefetch(i + plan.stages - 1, stage == 0 ? plan.stages - 1 : stage - 1);
    if (++stage == plan.stages) stage = 0;
  }
  if (p.norm.partial && thread < C)
    store_statistics(statistics, p.norm.partial, (p.N * p.H * p.W + P - 1) / P, blockIdx.x, thread, columns * p.T);
  if (p.last_kind != Last::none)
    for_state(recomputed(thread), [&](float& h, int channel, int column) {
      if (channel < C && column < columns)
        store_number(p.last.data, p.last.dtype, last_offset[column] + channel * p.last.c, h);
    });
}

}  // namespace

Error launch_wide_scan(const Scan& p, const WideScanPlan& plan, Stream stream) {
  return launch("recurrent_conv wide_scan", wide_scan, dim3(static_cast<unsigned>(plan.blocks)), dim3(wide_threads),
                static_cast<size_t>(plan.shared_bytes), stream, p, plan);
}

}  // namespace rcu_ops::cuda
