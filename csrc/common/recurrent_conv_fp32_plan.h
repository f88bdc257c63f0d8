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
inline constexpr int fp32_most_positions = 64, fp32_most_threads = 256;
// Of a part of batch normalisation's statistics, at most: every thread then has one to add up, or two.
inline constexpr int fp32_norm_columns = 32;
// Numbers in a row of shared memory: of W, one row per input channel, and of the state, one per channel. Known to the
// compiler, so that the inner loop adds up no addresses.
inline constexpr int fp32_weight_pitch = fp32_most_channels + 4, fp32_state_pitch = fp32_most_positions + 4;

// What of a tensor a thread reads or writes at a time: single numbers, or words of four along columns or channels.
enum class Quad : int { none, columns, channels };

struct Fp32ScanPlan {
  int positions = 0;     // columns of a block
  int norm_columns = 0;  // that have a part of batch normalisation's statistics to themselves
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
  Fp32ScanPlan plan;
  for (plan.positions = fp32_most_positions; plan.positions >= 16; plan.positions /= 2) {
    plan.blocks = ceil_div(columns, plan.positions);
    const int64_t parts = plan.positions / fp32_columns * ceil_div(p.C, fp32_outputs);
    plan.threads = static_cast<int>(round_up(parts, 32));
    plan.weight_at = 5 * 8 * plan.positions;
    plan.state_at = plan.weight_at + p.C * fp32_weight_pitch * 4;
    plan.numbers_at = plan.state_at + p.C * fp32_state_pitch * 4;
    // Whether batch normalisation is asked for must not change how a scan is cut: there is room for it, or no plan.
    plan.norm_columns = plan.positions < fp32_norm_columns ? plan.positions : fp32_norm_columns;
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

// Calls visit(quad, m, n, element offset in the frame) for the words of a thread's part of a tensor: 8 channels from
// `channel` on, of C, 4 columns from `column` on, of `columns`. (m, n) is the word's first number in the part; quad, a
// std::integral_constant, says which way the word goes.
template <typename Visit>
RCU_OPS_DEVICE void for_part(Quad quad, const View& v, const int64_t* offset, int channel, int column, int C,
                             int columns, Visit visit) {
  if (quad == Quad::columns) {
    if (column >= columns) return;
    RCU_OPS_UNROLL
    for (int m = 0; m < fp32_outputs; ++m)
      if (channel + m < C)
        visit(std::integral_constant<Quad, Quad::columns>(), m, 0, offset[column] + (channel + m) * v.c);
  } else if (quad == Quad::channels) {
    RCU_OPS_UNROLL
    for (int n = 0; n < fp32_columns; ++n) RCU_OPS_UNROLL
    for (int m = 0; m < fp32_outputs; m += 4)
      if (column + n < columns && channel + m < C)
        visit(std::integral_constant<Quad, Quad::channels>(), m, n, offset[column + n] + channel + m);
  } else {
    RCU_OPS_UNROLL
    for (int n = 0; n < fp32_columns; ++n) RCU_OPS_UNROLL
    for (int m = 0; m < fp32_outputs; ++m)
      if (column + n < columns && channel + m < C)
        visit(std::integral_constant<Quad, Quad::none>(), m, n, offset[column + n] + (channel + m) * v.c);
  }
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
