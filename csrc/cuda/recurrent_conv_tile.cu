// recurrent_conv on the matrix unit: bf16 and fp16, up to 128 channels, state in registers.
#include "cuda/recurrent_conv_tile.h"

#include <type_traits>

#include "cuda/device/async_copy.h"
#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/matrix_copy.h"
#include "cuda/device/matrix_store.h"
#include "cuda/device/mma.h"
#include "cuda/device/registers.h"
#include "cuda/device/shared_memory.h"
#include "cuda/recurrent_conv_views.h"
#include "cuda/recurrent_conv_weight_sums.h"

namespace rcu_ops::cuda {
namespace {

constexpr int tile_threads = 32 * tile_warps;  // at most; the planner may take blocks of fewer
constexpr int tile_blocks = 3;                 // of a multiprocessor, where shared memory has room: 168 registers
template <int PaddedChannels>
constexpr int rows_of_warp = tile_positions(PaddedChannels);

// One scan over time (common/recurrent_conv.h), bf16 or fp16, C <= 16 * KT, KT in {4, 8}.
//
// Format.   A condition of the whole grid, asked once per frame around all that differs by it: a frame takes as many
//           instructions as it would in a kernel for one format.
// Layout.   x, y and the residual have contiguous channels (AlongChannels) or contiguous columns (otherwise), any other
//           strides. A frame's instructions bound the kernel next to memory: the two layouts are two kernels, and words
//           of 16 bytes have a loop of their own.
// Work.     A block is plan.warps warps: 4, or 2 or 1 where that leaves less to the busiest multiprocessor. A warp owns
//           M = 32 columns (16 for KT = 8) for all frames and meets the others only after W has been staged, so that no
//           bit depends on how many there are. Rows of the matrix product are columns of the problem, its columns
//           output channels: the accumulator fragments d[M][16 KT] (mma.h) are the state in fp32, and rounded to T they
//           are, register by register, the a fragments of the next frame's product. W[out][in] in shared memory is b as
//           it stands.
// State.    v' = alpha * (W round(v) + diag(W) * (v - round(v)) + x): the matrix unit sees the state rounded to T, and
//           the diagonal, which carries the state from frame to frame, makes good for that in fp32. With W = I this is
//           the fp32 recurrence. Of the rounding error only what the off-diagonal elements multiply is left.
// Memory.   Shared memory as in TileScanPlan. Frame i + stages - 1 is copied by cp.async while frame i is computed
//           (2-byte words by ordinary loads), the residual of frame i, which only the epilogue wants, at its beginning:
//           one slot for it leaves room for more blocks at once. A slot's x becomes fragments by ldmatrix (.trans when columns are
//           contiguous); the same slot then takes y by stmatrix, and goes out in words of vector_bytes. A slot is
//           rewritten only after the warp barrier of the next frame, so one barrier per frame orders loads, one more
//           x's readers against y's writers, and one y's writers against those who copy it out.
//           W is staged by 16-byte asynchronous copies where its rows allow, else by batches of loads: a block of one
//           warp has no others to hide behind the latency of one load after another.
// Padding.  Channels from C on have zero weights and are set to zero in the state every frame: an infinite state in
//           another channel must not reach them as 0 * inf. Columns beyond the last are computed on zeros and not
//           stored.
// Norm.     Batch normalisation (ScanNorm): its statistics of y are added up where y lies in the slot, a lane per
//           channel, column after column and frame after frame, about the first frame's mean; its gradient is taken of
//           x and of h, which comes through the residual's slots, on the way to the state.
// Weights.  The scan backwards in time may add up the weight's gradient (ScanWeightGrad): y is dx, and h of the frame
//           before comes through the residual's slot. Once both slots of all warps are complete a warp adds dx^T h of
//           the block's 128 columns to its quarter of the sums, 32 x 32 of them in 32 registers: two barriers a frame
//           are the block's then, and a warp without columns stays, on zeros. Each block leaves its sums in `partial`,
//           to be added up in order. For KT = 4: four times the sums would not fit into registers.
// Aliasing. y and last overlap no input. Every output element has one writer.
// Order.    The matrix unit's order of additions depends on nothing but C: cutting a sequence in two changes no bit, as
//           the state handed on is fp32 (h0 in T loses what rounding to T loses).
// Bound.    4 bytes per element moved against 2 C FLOP: memory, up to C = 128 (C = 128 at 4.3 TB/s: 138 TFLOP/s).
//           Reading b from shared memory costs 16 KT^2 * 32 bytes per frame and warp: at KT = 8 as many cycles as x and
//           y need from HBM, the reason why more channels want another kernel. With the weight's gradient 6 bytes
//           against 4 C FLOP; what reads dx and h for it in a kernel of its own moves 8.
template <int KT, bool AlongChannels>
__global__ void __launch_bounds__(tile_threads, tile_blocks) tile_scan(const Scan p, const TileScanPlan plan) {
  using T = uint16_t;  // a number of either format
  constexpr int CP = 16 * KT, M = rows_of_warp<CP>, MT = M / 16, NT = 2 * KT, weight_pitch = CP + 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, C = static_cast<int>(p.C);
  const int fragment_row = lane / 4, fragment_pair = lane % 4 * 2;
  const bool bf16 = p.dtype == DType::bf16;

  T* weight = dynamic_shared<T>();
  float* diagonal = dynamic_shared<float>(plan.numbers_at);
  float *scale = diagonal + CP, *shift = scale + CP;
  // Of batch normalisation: three tables more of the block, or, per channel, the statistics of this warp's columns.
  float* const mean = shift + CP;
  const Statistics statistics = statistics_at(mean + warp * statistics_floats * CP, CP);
  const NormTables tables{scale, shift, mean, mean + CP, mean + 2 * CP};
  Offset* x_offset = dynamic_shared<Offset>(plan.offsets_at) + warp * 5 * M;
  Offset *y_offset = x_offset + M, *residual_offset = y_offset + M, *first_offset = residual_offset + M,
         *last_offset = first_offset + M;
  constexpr bool can_sum = CP <= most_summed_channels;
  const bool with_residual = p.residual.data != nullptr, sums_weights = can_sum && p.weight_grad.partial != nullptr;
  // Of slots whose rows are columns or channels, as plan.slot_pitch has it.
  constexpr int channels_pitch = 2 * CP + 16, columns_pitch = 2 * M + 16;
  constexpr int pitch = AlongChannels ? channels_pitch : columns_pitch;
  const int all_slots = plan.stages + plan.residual_slots;
  unsigned char* slots = dynamic_shared<unsigned char>(plan.slots_at + warp * all_slots * plan.slot_bytes);
  // Number `stage` of the slots of the residual. Cheaper to find than to keep.
  const auto residual_slot = [&](int stage) {
    return slots + (plan.stages + stage) * static_cast<int>(plan.slot_bytes);
  };
  // Before the first frame and after the last one, two slots hold the state of the tile, [columns][channels] in fp32.
  constexpr int wide_pitch = CP + 4;
  float* wide = reinterpret_cast<float*>(slots);

  const T* w = static_cast<const T*>(p.weight);
  const int threads = static_cast<int>(blockDim.x);
  if (p.weight_in == 1 && C % 8 == 0 && p.weight_out % 8 == 0 && reinterpret_cast<uintptr_t>(w) % 16 == 0) {
    for (int i = threadIdx.x; i < CP * CP / 8; i += threads) {
      const int output = i / (CP / 8), input = i % (CP / 8) * 8;
      T* to = weight + output * weight_pitch + input;
      if (output < C && input < C)
        async_copy<16>(to, w + output * p.weight_out + input);
      else
        *reinterpret_cast<uint4*>(to) = uint4{};
    }
    async_commit();
  } else {
    // A warp takes rows of W as they lie in memory, inputs or outputs, so many together.
    constexpr int pieces = CP / 32, rows = 32 / pieces;
    static_assert(CP % (tile_warps * rows) == 0);
    const bool along_inputs = p.weight_in == 1;
    const int64_t row_step = along_inputs ? p.weight_out : p.weight_in, step = along_inputs ? 1 : p.weight_out;
    const int row_pitch = along_inputs ? weight_pitch : 1, along = along_inputs ? 1 : weight_pitch;
    for (int row0 = warp; row0 < CP; row0 += rows * plan.warps) {
      T loaded[rows][pieces];
#pragma unroll
      for (int j = 0; j < rows; ++j)
#pragma unroll
        for (int k = 0; k < pieces; ++k) {
          const int row = row0 + j * plan.warps, at = lane + 32 * k;
          loaded[j][k] = row < C && at < C ? w[row * row_step + at * step] : T(0);
        }
#pragma unroll
      for (int j = 0; j < rows; ++j)
#pragma unroll
        for (int k = 0; k < pieces; ++k)
          weight[(row0 + j * plan.warps) * row_pitch + (lane + 32 * k) * along] = loaded[j][k];
    }
  }
  for (int c = threadIdx.x; c < CP; c += threads) {
    diagonal[c] = c < C ? widen(w[c * (p.weight_out + p.weight_in)], bf16) : 0.0f;
    scale[c] = p.scale && c < C ? static_cast<const float*>(p.scale)[c] : 0.0f;
    shift[c] = p.scale && c < C ? static_cast<const float*>(p.shift)[c] : 0.0f;
    if (p.norm.moments) fill_norm_tables(p.norm, C, c, scale, shift, mean, mean + CP, mean + 2 * CP);
  }
  const auto column0 = [&] {  // of this warp
    return (static_cast<int64_t>(blockIdx.x) * plan.warps + recomputed(static_cast<int>(threadIdx.x)) / 32) * M;
  };
  const int64_t columns_left = p.N * p.H * p.W - column0();
  const int columns = columns_left <= 0 ? 0 : columns_left < M ? static_cast<int>(columns_left) : M;
  if (lane < columns)
    fill_offsets(p, column0() + lane, lane, x_offset, y_offset, residual_offset, first_offset, last_offset);
  async_wait<0>();
  block_barrier();
  if (columns == 0 && !sums_weights) return;
  // Of warps that read each other's slots.
  const auto meet = [&] { sums_weights ? block_barrier() : warp_barrier(); };

  const auto time_of = [&](int64_t i) { return p.reverse ? p.T - 1 - i : i; };
  const int numbers = plan.vector_bytes / 2;  // of a word
  // Calls visit(whether words are whole, element offset in a frame, byte offset in a slot) for this lane's words.
  const auto for_own_words = [&](const View& v, const Offset* offset, auto visit) {
    const auto whole = [&](Offset element, int at) { visit(std::true_type(), element, at); };
    if (numbers < 8)
      for_words<CP, M>(AlongChannels, numbers, recomputed(lane), 32, C, columns, pitch, v, offset,
                       [&](Offset element, int at) { visit(std::false_type(), element, at); });
    else
      for_whole_words<CP, M, AlongChannels>(recomputed(lane), C, columns, pitch, v, offset, whole);
  };
  const auto fetch = [&](const View& v, const Offset* offset, int64_t i, unsigned char* slot) {
    const T* from = static_cast<const T*>(v.data) + time_of(i) * v.t;
    for_own_words(v, offset, [&](auto whole, Offset element, int at) {
      copy_word(decltype(whole)::value ? 8 : numbers, slot + at, from + element);
    });
  };
  // The state before all frames as the weight's gradient wants it, where h of the frame before would be: rounded as all
  // others have been. The offsets in h have had their last use.
  const auto fetch_first_state = [&] {
    const View& first = p.weight_grad.first;
    if (lane < columns)
      residual_offset[lane] = static_cast<Offset>(column_offset(column_of(p, column0() + lane), first));
    warp_barrier();
    unsigned char* const slot = residual_slot(0);
    for_elements<CP, M>(lane, 32, first.c == 1, C, columns, [&](int channel, int column) {
      const float value = load_number(first.data, first.dtype, residual_offset[column] + channel * first.c);
      const int at = AlongChannels ? column * pitch + 2 * channel : channel * pitch + 2 * column;
      *reinterpret_cast<T*>(slot + at) = narrow<T>(value, bf16);
    });
  };
  // Two groups: the residual of frame i, which only the epilogue wants, and x of the frame that takes `stage`, stages -
  // 1 frames later. For batch normalisation h is wanted with x.
  const auto prefetch = [&](int64_t i, int stage) {
    const bool early = p.norm.moments != nullptr;
    const int64_t ahead = i + plan.stages - 1, wanted = early ? ahead : sums_weights && i >= 0 ? i + 1 : i;
    if (with_residual && wanted >= 0 && wanted < p.T)
      fetch(p.residual, residual_offset, wanted, residual_slot(early ? stage : 0));
    else if (sums_weights && wanted == p.T && p.weight_grad.first.data)
      fetch_first_state();
    if (!early) async_commit();
    if (p.x.data && ahead < p.T) fetch(p.x, x_offset, ahead, slots + stage * plan.slot_bytes);
    async_commit();
  };

  // Where row r % 8 of tile r / 8 lies in a slot, of the 16 x 16 tile (columns from 16 m, channels from 16 k); the four 8
  // x 8 tiles come in the order of a's registers. load_matrix wants the address of this lane's.
  const int tile = lane / 8, tile_row = lane % 8;
  const auto row_at = [](int r) {
    return AlongChannels ? (r / 8 % 2 * 8 + r % 8) * channels_pitch + r / 16 * 16
                         : (r / 16 * 8 + r % 8) * columns_pitch + r / 8 % 2 * 16;
  };
  const int tile_at = row_at(lane);
  const auto load_tiles = [&](uint32_t (&r)[4], const unsigned char* slot, int m, int k) {
    if (AlongChannels)
      load_matrix<4, false>(r, slot + tile_at + m * (16 * channels_pitch) + k * 32);
    else
      load_matrix<4, true>(r, slot + tile_at + m * 32 + k * (16 * columns_pitch));
  };
  const auto store_tiles = [&](unsigned char* slot, int m, int k, const uint32_t (&r)[4]) {
    if (AlongChannels)
      store_matrix<4, false>(slot + m * (16 * channels_pitch) + k * 32, tile_at, row_at, r);
    else
      store_matrix<4, true>(slot + m * 32 + k * (16 * columns_pitch), tile_at, row_at, r);
  };

  float state[MT][NT][4];
  uint32_t rounded[MT][KT][4];
  // Calls visit(state element, channel, column within the warp's tile).
  const auto for_state = [&](auto visit) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          visit(state[m][n][j], 8 * n + fragment_pair + j % 2, 16 * m + fragment_row + j / 2 * 8);
  };
  const auto round_state = [&](auto format) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int k = 0; k < KT; ++k)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float* pair = &state[m][2 * k + r / 2][r % 2 * 2];
          rounded[m][k][r] = pack<decltype(format)>(pair[0], pair[1]);
        }
  };
  for_state([&](float& h, int, int) { h = 0; });
  if (p.init != Init::none) {
    for (int i = lane; i < M * wide_pitch; i += 32) wide[i] = 0;
    warp_barrier();
    for_elements_loaded<CP, M, 16>(
        lane, 32, p.first.c == 1, C, columns,
        [&](int channel, int column) {
          if (columns == 0) return 0.0f;
          return load_number(p.first.data, p.first.dtype, first_offset[column] + channel * p.first.c);
        },
        [&](int channel, int column, float value) { wide[column * wide_pitch + channel] = value; });
    warp_barrier();
    for_state([&](float& h, int channel, int column) { h = wide[column * wide_pitch + channel]; });
    warp_barrier();
  }
  // Copies write what exists; the rest of a slot stays zero.
  for (int64_t i = lane; i < all_slots * plan.slot_bytes / 4; i += 32) reinterpret_cast<uint32_t*>(slots)[i] = 0;
  warp_barrier();
  with_format(bf16, round_state);

  // 32 x 32 elements of this block's part of the weight's gradient are this warp's, of four.
  float weight_sums[can_sum ? 2 : 1][can_sum ? 4 : 2][4] = {};
  const auto my_output = [] { return recomputed(static_cast<int>(threadIdx.x)) / 32 % 2 * 32; };
  const auto my_input = [] { return recomputed(static_cast<int>(threadIdx.x)) / 64 * 32; };

  // The gradient of the first state is one more product, without an input and without y.
  const int64_t frames = p.T + (p.last_kind == Last::projected ? 1 : 0);
  int stage = 0;  // of frame i, modulo the number of them
  for (int64_t i = 1 - plan.stages; i < frames; ++i) {
    const int before = stage;  // the slot of frames i - 1 and i + stages - 1
    if (++stage == plan.stages) stage = 0;
    const bool extra = i == p.T;
    if (i >= 0 && !extra) {
      if (plan.stages == 3)
        async_wait<1>();
      else
        async_wait<0>();
      meet();  // frame i is here for all lanes, and frame i - 1 has left its slot
    }
    if (!extra) prefetch(i, before);
    if (i < 0) continue;
    const float alpha = static_cast<float>(extra ? 1 : i == p.T - 1 ? p.alpha_final : i == 0 ? p.alpha_first : p.alpha);
    const bool product = i > 0 || p.init == Init::state;  // else the state is what the first frame is added to, or zero
    unsigned char* const slot = slots + stage * plan.slot_bytes;

    if (!p.x.data || extra) {  // no input: y was here
      for (int64_t at = 16 * lane; at < plan.slot_bytes; at += 16 * 32) *reinterpret_cast<uint4*>(slot + at) = uint4{};
      warp_barrier();
    }
    // Calls visit(two elements of the state, m, k, r, the pair of x).
    const auto for_arriving = [&](auto visit) {
#pragma unroll
      for (int k = 0; k < KT; ++k)
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          uint32_t x[4];
          load_tiles(x, slot, m, k);
          visit(m, k, x);
        }
    };
    const auto pair_of = [&](int m, int k, int r) { return &state[m][2 * k + r / 2][r % 2 * 2]; };
    with_format(bf16, [&](auto format) {
      using Format = decltype(format);
      // v + diag(W) (h - round(h)), what the product leaves out; or, of a first frame, v + h.
      const auto take = [&](float* h, int m, int k, int r, float2 v, bool rest) {
        const float2 d = *reinterpret_cast<const float2*>(diagonal + 16 * k + r / 2 * 8 + fragment_pair);
        const float2 h16 = unpack<Format>(rounded[m][k][r]);
        h[0] = rest ? with_rest(v.x, d.x, h[0], h16.x) : v.x + h[0];
        h[1] = rest ? with_rest(v.y, d.y, h[1], h16.y) : v.y + h[1];
      };
      if (p.norm.moments && !extra) {
        for_arriving([&](int m, int k, const uint32_t (&x)[4]) {
          uint32_t normalised[4];
          load_tiles(normalised, residual_slot(stage), m, k);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int channel = 16 * k + r / 2 * 8 + fragment_pair;
            const float2 added =
                norm_gradient(tables, channel, unpack<Format>(x[r]), unpack<Format>(normalised[r]), p.norm.relu);
            take(pair_of(m, k, r), m, k, r, added, product);
          }
          warp_barrier();  // orders nothing, but the next tile's numbers would be fetched before, and spill
        });
      } else if (product) {
        for_arriving([&](int m, int k, const uint32_t (&x)[4]) {
#pragma unroll
          for (int r = 0; r < 4; ++r) take(pair_of(m, k, r), m, k, r, unpack<Format>(x[r]), true);
        });
      } else {
        for_arriving([&](int m, int k, const uint32_t (&x)[4]) {
#pragma unroll
          for (int r = 0; r < 4; ++r) take(pair_of(m, k, r), m, k, r, unpack<Format>(x[r]), false);
        });
      }
      if (product) {
#pragma unroll
        for (int k = 0; k < KT; ++k)
#pragma unroll
          for (int n = 0; n < KT; ++n) {
            uint32_t b[4];
            load_matrix<4, false>(b,
                                  weight + (16 * n + tile / 2 * 8 + tile_row) * weight_pitch + 16 * k + tile % 2 * 8);
            const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
            for (int m = 0; m < MT; ++m) {
              mma_m16n8k16<Format>(state[m][2 * n], rounded[m][k], first);
              mma_m16n8k16<Format>(state[m][2 * n + 1], rounded[m][k], second);
            }
          }
      }
      if (alpha != 1) for_state([&](float& h, int, int) { h *= alpha; });
      if (C < CP || (sums_weights && columns < M))
        for_state([&](float& h, int channel, int column) {
          if (channel >= C || (sums_weights && column >= columns)) h = 0;
        });
      round_state(format);

      if (p.y.data && !extra) {
        if (with_residual) async_wait<1>();  // for all but the next x
        warp_barrier();                      // x has been read
        if (!p.scale) {
#pragma unroll
          for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int k = 0; k < KT; ++k) store_tiles(slot, m, k, rounded[m][k]);
        } else {
          const float least = p.relu ? 0.0f : -INFINITY;
#pragma unroll
          for (int k = 0; k < KT; ++k)
#pragma unroll
            for (int m = 0; m < MT; ++m) {
              uint32_t residual[4] = {}, y[4];
              if (with_residual) load_tiles(residual, residual_slot(0), m, k);
#pragma unroll
              for (int r = 0; r < 4; ++r) {
                const int channel = 16 * k + r / 2 * 8 + fragment_pair;
                const float* h = pair_of(m, k, r);
                const float2 gain = *reinterpret_cast<const float2*>(scale + channel);
                const float2 offset = *reinterpret_cast<const float2*>(shift + channel),
                             added = unpack<Format>(residual[r]);
                const float first = fma(gain.x, h[0], offset.x) + added.x,
                            second = fma(gain.y, h[1], offset.y) + added.y;
                y[r] = pack<Format>(first < least ? least : first, second < least ? least : second);  // NaN stays
              }
              store_tiles(slot, m, k, y);
            }
        }
      }
    });
    if (p.y.data && !extra) {
      meet();  // y is complete
      if constexpr (can_sum)
        if (sums_weights && (i + 1 < p.T || p.weight_grad.first.data))
          with_format(bf16, [&](auto format) {
            const int64_t warp_bytes = all_slots * plan.slot_bytes;
            const unsigned char *dx = dynamic_shared<unsigned char>(plan.slots_at) + stage * plan.slot_bytes,
                                *h = dx + (plan.stages - stage) * plan.slot_bytes;
#pragma unroll 1
            for (int j = 0; j < tile_warps; ++j, dx += warp_bytes, h += warp_bytes)
#pragma unroll
              for (int k = 0; k < M; k += 16)
                add_weight_sums<decltype(format), AlongChannels>(weight_sums, dx, h, pitch, k, my_output(), my_input());
          });
      if (p.norm.partial)
        for (int c = lane; c < C; c += 32)
          add_statistics(statistics, bf16, slot, AlongChannels, pitch, c, columns, i == 0);
      T* to = static_cast<T*>(p.y.data) + time_of(i) * p.y.t;
      for_own_words(p.y, y_offset, [&](auto whole, Offset element, int at) {
        store_word(decltype(whole)::value ? 8 : numbers, to + element, slot + at);
      });
    }
  }
  if (p.norm.partial) {
    const int64_t parts = (p.N * p.H * p.W + M - 1) / M;
    for (int c = lane; c < C; c += 32)
      store_statistics(statistics, p.norm.partial, parts, column0() / M, c, columns * p.T);
  }
  if constexpr (can_sum)
    if (sums_weights)
      for_weight_sums(weight_sums, [&](float value, int o, int i) {
        const int output = my_output() + o, input = my_input() + i;
        if (output < C && input < C)
          p.weight_grad.partial[(static_cast<int64_t>(blockIdx.x) * C + output) * C + input] = value;
      });
  if (p.last_kind == Last::none) return;
  meet();  // y has left the slots
  for_state([&](float& h, int channel, int column) { wide[column * wide_pitch + channel] = h; });
  warp_barrier();
  for_elements<CP, M>(lane, 32, p.last.c == 1, C, columns, [&](int channel, int column) {
    store_number(p.last.data, p.last.dtype, last_offset[column] + channel * p.last.c,
                 wide[column * wide_pitch + channel]);
  });
}

template <int KT>
Error launch_padded(const Scan& p, const TileScanPlan& plan, Stream stream) {
  return launch("recurrent_conv tile_scan", plan.along_channels ? tile_scan<KT, true> : tile_scan<KT, false>,
                dim3(static_cast<unsigned>(plan.blocks)), dim3(static_cast<unsigned>(32 * plan.warps)),
                static_cast<size_t>(plan.shared_bytes), stream, p, plan);
}

}  // namespace

Error launch_tile_scan(const Scan& p, const TileScanPlan& plan, Stream stream) {
  return plan.padded_channels == 64 ? launch_padded<4>(p, plan, stream) : launch_padded<8>(p, plan, stream);
}

}  // namespace rcu_ops::cuda
