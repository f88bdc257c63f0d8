// recurrent_conv in chunks of frames side by side on a GPU: whether products of the library over all chunks at once are
// predicted to be faster than the scan, and how long the chunks are. Pure functions of shapes and the device's limits.
#pragma once

#include <cstdint>

#include "gpu.h"
#include "recurrent_conv.h"
#include "recurrent_conv_gpu_plan.h"
#include "text.h"

namespace rcu_ops::cuda {

// With Q = alpha W^T, frames x channels as rows, and chunks j = 0 .. J-1 of L frames
// (rcu_ops/ops/_recurrent_conv_chunked.py):
//
//   1. v_{j,i} = v_{j,i-1} Q + alpha x_{j,i} for all chunks at once        L - 1 products of J * columns rows
//   2. e_j = e_{j-1} Q^L + v_{j,L-1}: the true ends                        J - 2 products of `columns` rows
//   3. v_{j,i} += e_{j-1} Q^(i+1) for all frames at once                   one batched product
//
// and the powers of Q, which modules for inference keep from call to call (rcu_ops/nn/fuse.py). 16-bit data are
// multiplied on the matrix unit with every factor that is not exact in bf16 as a sum of two.
struct ChunkPlan {
  int64_t frames = 0;                        // of a chunk; 0: one frame after the other
  int64_t products = 0;                      // one after the other, with `frames` or with what would be best
  double chunked_us = 0, sequential_us = 0;  // predicted
  const char* why_not = nullptr;             // where nothing was predicted
};

inline constexpr int64_t least_chunked_frames = 16;
inline constexpr int64_t most_chunk_bytes = int64_t(1) << 30;  // of states and powers

// What the predictions rest on: published rates, in units per cycle and multiprocessor, and 2 us for a launch that
// waits for the one before it. Estimates until there is a measurement.
struct GpuRates {
  double matrix = 512, fp32 = 128, fp64 = 2, memory = 16;  // multiply-adds; bytes
  double cycles_per_us = 1700, launch = 3400;
};

inline GpuRates gpu_rates(const Gpu& gpu) {
  GpuRates rates;
  const bool large = gpu.architecture == 80 || gpu.architecture == 90 || gpu.architecture == 100;
  if (large) rates.fp64 = gpu.architecture == 80 ? 64 : 128, rates.matrix = gpu.architecture == 80 ? 1024 : 2048;
  if (gpu.architecture == 80) rates.fp32 = 64;
  return rates;
}

// Cycles of one frame of the scan's kernels.
inline double cycles_per_frame(const Scan& p, const ScanPlan& plan, const Gpu& gpu) {
  const GpuRates rates = gpu_rates(gpu);
  const double C = static_cast<double>(p.C), waves = static_cast<double>(ceil_div(plan.blocks(), gpu.multiprocessors));
  const double products = C * C / (0.6 * rates.matrix);  // of one column
  if (plan.step) {
    // A block waits for its rows of W and of the state, 32 bytes per cycle from L2.
    const double tile = static_cast<double>(plan.step->outputs + plan.step->columns), size = plan.step->matrix ? 2 : 8;
    return rates.launch + waves * (1000 + tile * C * size / 32);
  }
  const auto blocks = [&](double product, double columns, double barrier) {
    const double moved = columns * C * 2 * static_cast<double>(element_size(p.dtype)) / rates.memory;
    return waves * ((product > moved ? product : moved) + barrier);
  };
  if (plan.tile) {
    const double columns = plan.tile->warps * plan.tile->positions, padded = plan.tile->padded_channels;
    // Blocks chosen to find room at once wait together.
    const double barrier = plan.tile->warps < tile_warps ? 400 / waves : 400;
    return blocks(columns * padded * padded / (0.6 * rates.matrix), columns, barrier);
  }
  if (plan.wide)
    return blocks(wide_positions * products * wide_most_channels * wide_most_channels / (C * C), wide_positions, 400);
  if (plan.hopper) {
    constexpr double columns = hopper_groups * hopper_positions;
    return blocks(columns * wide_most_channels * wide_most_channels / rates.matrix, columns, 400);
  }
  if (plan.fp32) {
    const double outputs = static_cast<double>(round_up(p.C, fp32_outputs));
    return blocks(plan.fp32->positions * C * outputs / (0.85 * rates.fp32), plan.fp32->positions, 600);
  }
  // Two words of shared memory for 16 FMAs: half of their rate.
  return blocks(plan.plain.positions * C * C / (0.5 * rates.fp32), plan.plain.positions, 1000);
}

// Of the scan's kernels until W is where they want it: every block reads all of it, 32 bytes per cycle from L2.
inline double cycles_before_frames(const Scan& p, const ScanPlan& plan, const Gpu& gpu) {
  if (plan.step || (plan.is_plain() && !plan.plain.weight_resident)) return 0;
  const double waves = static_cast<double>(ceil_div(plan.blocks(), gpu.multiprocessors));
  return waves * static_cast<double>(p.C * p.C * element_size(p.dtype)) / 32;
}

// powers_kept: of W, by somebody who runs the same W again and again.
inline double chunked_cycles(const Scan& p, int64_t L, const Gpu& gpu, bool powers_kept) {
  const GpuRates rates = gpu_rates(gpu);
  const bool split = p.dtype != DType::f32;
  const double C = static_cast<double>(p.C), columns = static_cast<double>(p.N * p.H * p.W), sm = gpu.multiprocessors;
  const int64_t J = ceil_div(p.T, L);
  int64_t doublings = 0;
  while ((int64_t(1) << doublings) < L) ++doublings;
  // 16-bit data: two passes over the states round them to two numbers, then a product of so many times C.
  const double exact = !split ? 1 : p.dtype == DType::bf16 ? 2 : 3, wide = split ? 3 : 2;
  const auto product = [&](double rows, double depth, double passes) {
    const double work = rows * C * C * depth / (0.6 * (split ? rates.matrix : rates.fp32)) / sm;
    const double moved = rows * C * (passes * 8 + 8) / rates.memory / sm;
    return (passes + 1) * rates.launch + work + moved + C;
  };
  const double passes = split ? 2 : 0, J1 = static_cast<double>(J - 1), L1 = static_cast<double>(L - 1);
  const double powers = static_cast<double>(doublings + 3) * rates.launch + L1 * C * C * C / (0.6 * rates.fp64) / sm +
                        (L1 + 1) * C * C * 24 / rates.memory / sm;
  return 6 * rates.launch + 3 * static_cast<double>(p.T) * columns * C * 8 / rates.memory / sm +  // states in and out
         L1 * product((J1 + 1) * columns, exact, passes) +                                        // 1.
         (J1 - 1) * product(columns, wide, split ? passes : 1) +                                  // 2.
         2 * rates.launch + product(static_cast<double>(p.T) * columns, split ? 3 : 1, passes) +  // 3.
         (powers_kept ? 0 : powers);
}

inline int64_t chunk_bytes(const Scan& p, int64_t L) {
  return ceil_div(p.T, L) * L * p.N * p.H * p.W * p.C * 4 + L * p.C * p.C * 14;
}

// plan: of the scan that would run otherwise.
inline ChunkPlan plan_chunks(const Scan& p, const ScanPlan& plan, const Gpu& gpu, bool powers_kept = false) {
  ChunkPlan chunks;
  if (p.dtype == DType::f64)
    chunks.why_not = "fp64 is not cut into chunks";
  else if (p.G != 1 || !p.y.data)
    chunks.why_not = "no output, or frames scanned side by side";
  else if (p.T < least_chunked_frames)
    chunks.why_not = "too few frames for chunks";
  else if (p.N * p.H * p.W == 0)
    chunks.why_not = "no positions";
  if (chunks.why_not) return chunks;
  const double us = gpu_rates(gpu).cycles_per_us;
  const double frames = static_cast<double>(p.T) * cycles_per_frame(p, plan, gpu);
  chunks.sequential_us = (frames + cycles_before_frames(p, plan, gpu)) / us + 2;
  int64_t best = 0;
  for (int64_t L = 4; 2 * L <= p.T; L *= 2) {
    if (chunk_bytes(p, L) > most_chunk_bytes) continue;
    const double cost = chunked_cycles(p, L, gpu, powers_kept) / us;
    if (best == 0 || cost < chunks.chunked_us) chunks.chunked_us = cost, best = L;
  }
  if (best == 0) {
    chunks.why_not = "states and powers of W would take more than 1 GiB";
    return chunks;
  }
  chunks.products = best - 1 + ceil_div(p.T, best) - 2 + 1;
  // A fifth is left for what the predictions do not know.
  if (1.2 * chunks.chunked_us < chunks.sequential_us) chunks.frames = best;
  return chunks;
}

inline Text describe(const Scan& p, const ScanPlan& plan, const ChunkPlan& chunks) {
  const auto us = [](double v) { return to_text(static_cast<int64_t>(v + 0.5)) + " us"; };
  if (chunks.why_not) return describe(plan) + "; one frame after the other: " + chunks.why_not;
  if (!chunks.frames)
    return describe(plan) + "; one frame after the other: predicted " + us(chunks.sequential_us) +
           ", chunks would take " + us(chunks.chunked_us) +
           (chunks.chunked_us < chunks.sequential_us ? ", which is not a fifth less" : "");
  return "chunked: " + to_text(ceil_div(p.T, chunks.frames)) + " chunks of " + to_text(chunks.frames) +
         " frames side by side by the library, " + to_text(chunks.products) +
         " products one after the other instead of " + to_text(p.T) + ": predicted " + us(chunks.chunked_us) +
         " instead of " + us(chunks.sequential_us) + " by the scan (" + describe(plan) + ")";
}

}  // namespace rcu_ops::cuda
