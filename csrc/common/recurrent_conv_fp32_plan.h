// recurrent_conv in exact fp32 with 8 to 128 channels on a GPU: how a scan is cut into blocks and threads. Pure
// functions of shapes, strides and the device's limits.
#pragma once

#include <cstdint>
#include <optional>
#include <type_traits>

#include "gpu.h"
#include "recurrent_conv.h"
#include "recurrent_conv_batch_norm.h"
#include "text.h"

namespace rcu_ops::cuda {

inline constexpr int fp32_least_channels = 8, fp32_most_channels = 128;
// Of a thread: 32 multiply-adds for three 16-byte words of shared memory.
inline constexpr int fp32_outputs = 8, fp32_columns = 4;
inline constexpr int fp32_most_positions = 64, fp32_balanced_positions = 48, fp32_most_threads = 256;
// Of a part of batch normalisation's statistics, at most: every thread then has one to add up, or two.
inline constexpr int fp32_norm_columns = 32;
// Numbers in a row of shared memory: of W, one row per input channel, and of the state, one per channel. Known to the
// compiler, so that the inner loop adds up no addresses.
inline constexpr int fp32_weight_pitch = fp32_most_channels + 4, fp32_state_pitch = fp32_most_positions + 4;

// What of a tensor a thread reads or writes at a time: single numbers, or words of four along columns or channels.
enum class Quad : int { none, columns, channels };

struct Fp32ScanPlan {
  int positions = 0;      // columns of a block
  int norm_columns = 0;   // that have a part of batch normalisation's statistics to themselves
  int warp_channels = 0;  // of a warp, 32 or 64, so that its threads have 32 or 16 columns
  int threads = 0;
  Quad x = Quad::none, y = Quad::none, residual = Quad::none, first = Quad::none, last = Quad::none;
  int64_t blocks = 0;
  // Shared memory: the columns' offsets in x, y, residual, first, last; W; the state; of batch normalisation, numbers
  // per channel (padded to a multiple of fp32_outputs): scale, shift, mean, slope, constant, or of each part of the
  // columns sum and squares (fp64) and center.
  int64_t weight_at = 0, state_at = 0, numbers_at = 0, shared_bytes = 0;
};

inline Quad quad_of(const Scan& p, const View& v) {
  const auto whole = [](int64_t numbers) { return numbers % 4 == 0; };
  if (!v.data || reinterpret_cast<uintptr_t>(v.data) % 16 != 0) return Quad::none;
  if (!whole(v.n) || !whole(v.t) || !whole(v.g)) return Quad::none;
  if (v.c == 1 && whole(p.C) && (p.H == 1 || whole(v.h)) && (p.W == 1 || whole(v.w))) return Quad::channels;
  const bool rows = p.W > 1 ? v.w == 1 && (p.H == 1 || v.h == p.W) : v.h == 1;  // columns follow each other in a frame
  return rows && whole(p.H * p.W) && whole(v.c) ? Quad::columns : Quad::none;
}

// The plan, or none: for other problems, and where blocks of 16 columns would leave multiprocessors without work.
inline std::optional<Fp32ScanPlan> plan_fp32_scan(const Scan& p, const Gpu& gpu) {
  if (p.dtype != DType::f32 || p.C < fp32_least_channels || p.C > fp32_most_channels) return std::nullopt;
  const int64_t columns = p.N * p.G * p.H * p.W;
  const auto blocks = [&](int positions) { return ceil_div(columns, positions); };
  // Columns of the multiprocessor that has most to do.
  const auto most = [&](int positions) { return ceil_div(blocks(positions), gpu.multiprocessors) * positions; };
  Fp32ScanPlan plan;
  plan.warp_channels = ceil_div(p.C, 32) % 2 == 0 ? 64 : 32;
  for (plan.positions = fp32_most_positions; plan.positions >= 16; plan.positions /= 2) {
    // Three warps beside each other instead of four, where that is shared out better.
    if (plan.positions == fp32_most_positions && plan.warp_channels == 64 &&
        blocks(fp32_most_positions) >= gpu.multiprocessors && most(fp32_balanced_positions) < most(fp32_most_positions))
      plan.positions = fp32_balanced_positions;
    plan.blocks = blocks(plan.positions);
    const int64_t warps = ceil_div(p.C, plan.warp_channels) * ceil_div(plan.positions, 1024 / plan.warp_channels);
    plan.threads = static_cast<int>(32 * warps);
    plan.weight_at = 5 * 8 * plan.positions;
    plan.state_at = plan.weight_at + p.C * fp32_weight_pitch * 4;
    plan.numbers_at = plan.state_at + p.C * fp32_state_pitch * 4;
    // Whether batch normalisation is asked for must not change how a scan is cut: there is room for it, or no plan.
    plan.norm_columns = plan.positions > fp32_norm_columns ? plan.positions / 2 : plan.positions;
    const int64_t parts_of_norm = plan.positions / plan.norm_columns;
    const int64_t norm_bytes = parts_of_norm * statistics_floats * round_up(p.C, fp32_outputs) * 4;
    plan.shared_bytes = plan.numbers_at + (p.norm.present() ? norm_bytes : 0);
    if (plan.blocks < gpu.multiprocessors || plan.numbers_at + norm_bytes > gpu.shared_bytes) continue;
    plan.x = quad_of(p, p.x), plan.y = quad_of(p, p.y), plan.residual = quad_of(p, p.residual);
    plan.first = quad_of(p, p.first), plan.last = quad_of(p, p.last);
    return plan;
  }
  return std::nullopt;
}

// A thread's part of a block: channels channel .. channel + 3 and as many `apart` further on, columns column ..
// column + 3. A warp has 4 x 8 or (64 channels) 8 x 4 of them. Of the words of shared memory that it reads at once, the
// lanes of a pair (0 and 1, 2 and 3, ...) share a word of the state, and lanes 0 and 2, 1 and 3, ... one of W: of 16
// lanes, 8 words of 16 bytes at most, which lie side by side and so are read in one cycle. Lanes 0 to 7 have adjacent
// words of channels and of columns, so that either way whole sectors are read and written.
struct Fp32Part {
  int channel, apart, column;
};
RCU_OPS_DEVICE Fp32Part fp32_part(const Fp32ScanPlan& plan, int thread) {
  const bool wide = plan.warp_channels == 64;
  const int lane = thread % 32, warp = thread / 32, warp_columns = wide ? 16 : 32;
  const int warps = (plan.positions + warp_columns - 1) / warp_columns;
  const int row = wide ? (lane & 1) | (lane >> 1 & 6) : (lane & 1) | (lane >> 3 & 2);
  const int column = wide ? (lane >> 1 & 1) | (lane >> 3 & 2) : lane >> 1 & 7;
  return {warp / warps * plan.warp_channels + 4 * row, plan.warp_channels / 2,
          warp % warps * warp_columns + 4 * column};
}
RCU_OPS_DEVICE int fp32_channel(const Fp32Part& part, int m) { return part.channel + m % 4 + m / 4 * part.apart; }

// Which of the part's 8 channels and 4 columns number `number` of word `word` is, of 8 words along columns (or of as
// many single numbers) or along channels.
struct Fp32Number {
  int m, n;
};
template <Quad Way>
RCU_OPS_DEVICE constexpr Fp32Number fp32_number(int word, int number) {
  if (Way == Quad::channels) return {word % 2 * 4 + number, word / 2};
  return {word, number};
}

// Calls visit(quad, word, number, element offset) for the words of a thread's part of a tensor of C channels, of which
// the block has `columns` and whose frame begins at element `frame`. quad, a std::integral_constant, says which way the
// word goes; `number` is zero where it goes one. Offsets are added up, not multiplied out for each word.
template <typename Visit>
RCU_OPS_DEVICE void for_part(Quad quad, const View& v, const int64_t* offset, int64_t frame, const Fp32Part& part,
                             int C, int columns, Visit visit) {
  const int C_left = C - part.channel;
  if (C_left <= 0) return;
  if (quad == Quad::channels) {
    RCU_OPS_UNROLL
    for (int n = 0; n < fp32_columns; ++n) {
      if (part.column + n >= columns) continue;
      const int64_t at = frame + offset[part.column + n] + part.channel;
      visit(std::integral_constant<Quad, Quad::channels>(), 2 * n, 0, at);
      if (part.apart < C_left) visit(std::integral_constant<Quad, Quad::channels>(), 2 * n + 1, 0, at + part.apart);
    }
    return;
  }
  const auto down = [&](int column, auto visit_at) {
    if (column >= columns) return;
    int64_t at = frame + offset[column] + part.channel * v.c;
    RCU_OPS_UNROLL
    for (int i = 0; i < fp32_outputs; ++i) {
      if (i % 4 + i / 4 * part.apart < C_left) visit_at(i, at);
      at += i == 3 ? (part.apart - 3) * v.c : v.c;
    }
  };
  if (quad == Quad::columns)
    down(part.column, [&](int i, int64_t at) { visit(std::integral_constant<Quad, Quad::columns>(), i, 0, at); });
  else
    RCU_OPS_UNROLL
  for (int j = 0; j < fp32_columns; ++j)
    down(part.column + j, [&](int i, int64_t at) { visit(std::integral_constant<Quad, Quad::none>(), i, j, at); });
}

inline Text describe(const Fp32ScanPlan& plan) {
  const auto words = [](Quad quad) {
    return quad == Quad::columns    ? "words along columns"
           : quad == Quad::channels ? "words along channels"
                                    : "single numbers";
  };
  return "fp32: " + to_text(plan.blocks) + " blocks of " + to_text(plan.positions) +
         " columns, 8 channels x 4 columns per thread, x by " + words(plan.x) + ", y by " + words(plan.y);
}

}  // namespace rcu_ops::cuda
