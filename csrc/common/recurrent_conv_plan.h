// recurrent_conv: how one scan is cut into tasks. Pure functions of shapes, shared by the kernels and by the tests.
#pragma once

#include <cstdint>
#include <string>

#include "cpu_isa.h"
#include "recurrent_conv.h"

namespace rcu_ops::cpu {

// Register blocking of one instruction set: `lanes` values per vector; a block is rows x (vectors * lanes) outputs.
// "planar": vectors along positions, rows are output channels. "channels": the other way round.
struct Blocking {
  int lanes, planar_rows, planar_vectors, channels_rows, channels_vectors;
};

// Whether the instruction set's kernel for this dtype is the one of recurrent_conv_bf16_core.h.
constexpr bool multiplies_pairs(Isa isa, DType dtype) { return isa >= Isa::avx512_bf16 && dtype == DType::bf16; }

// fp64 is for gradient checks and for what little of the time-parallel form is computed in it: AVX2 is the widest
// instruction set that has code for it, since each one costs the build.
constexpr Isa isa_for(Isa isa, DType dtype) { return dtype == DType::f64 && isa > Isa::avx2 ? Isa::avx2 : isa; }

constexpr Blocking blocking(Isa isa, DType dtype) {
  isa = isa_for(isa, dtype);
  if (multiplies_pairs(isa, dtype)) return {32, 32, 1, 32, 1};  // blocks of four 16 x 16 tiles
  const bool f64 = dtype == DType::f64;
  return isa >= Isa::avx512 ? Blocking{16, 8, 3, 14, 2}
         : isa == Isa::avx2 ? Blocking{f64 ? 4 : 8, 4, 3, 6, 2}
                            : Blocking{f64 ? 2 : 4, 4, 3, 6, 2};
}

// How a scan runs.
struct Plan {
  bool channels = false;  // orientation: vectors along channels, else along positions
  // One product, by panels of W that each task packs for itself (recurrent_conv_step_core.h).
  bool step = false;
  int64_t tile = 0;           // columns per task
  int64_t channel_tasks = 1;  // tasks that share a tile's columns (one product only)
  int64_t channel_tile = 0;   // output channels per such task
  int64_t k_block = 0;        // channels summed before the partial sums go back to scratch
  int64_t group = 0;          // vectors of lanes whose inputs and outputs travel together
  bool around = false;        // outputs too large for the caches are written past them,
  bool around_state = false;  // so is the last state
  int64_t chunk = 0;          // frames per chunk of the time-parallel form, 0: one frame after the other
  // Of the model below; chunked: of the best chunk length, 0 if none is possible.
  double sequential_cost = 0, chunked_cost = 0;
};

struct PlanInput {
  int64_t columns = 0, C = 0, T = 0;
  DType dtype = DType::f32;
  int threads = 1;
  bool channels_contiguous = false;  // x or y adjacent along channels rather than along positions
  bool single_product = false;       // one frame after a given state: may be split over output channels
  bool dense_channels = false;       // channels adjacent in every tensor, and the last state in the state's dtype
};

// Channels summed in one go. Part of the definition of a result: sums of this length are added to each other, which
// halves the rounding error at 512 channels, and lets the operand that blocks share stay in the first-level cache.
inline constexpr int64_t k_part = 128;

// What is written in larger pieces than this is not found in a second-level cache again; nor is, from much less on, the
// state of a stream, which is read after all other layers have had their turn.
inline constexpr int64_t around_bytes = int64_t(4) << 20, around_step_bytes = int64_t(64) << 10;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t max_of_two(int64_t a, int64_t b) { return a > b ? a : b; }

// Cost of the time-parallel form against the plain scan, in products of W with one vector of columns on one thread:
//
//   plain    T * ceil(columns / (threads * lanes))
//   chunked  with J = ceil(T / L) chunks: L frames of (J - 1) chunks without outputs, L frames of them again with
//            outputs, the last chunk; in fp64, log2(L) squarings of W (C columns each), J - 1 steps W^L e, one product
//            W e
//
// The arithmetic doubles, so it pays only where the plain scan leaves threads or lanes without a column. A region of
// parallel tasks costs about as much as 2^20 multiply-adds of one thread.
inline int64_t choose_chunk(const PlanInput& in, int64_t lanes, Plan& plan) {
  const double width = static_cast<double>(lanes);
  const auto products = [&](int64_t columns) {
    return static_cast<double>(ceil_div(ceil_div(columns, in.threads), lanes));
  };
  const double region = 1048576.0 / (static_cast<double>(in.C) * static_cast<double>(in.C) * width);
  plan.sequential_cost = static_cast<double>(in.T) * products(in.columns) + region;
  int64_t best = 0;
  for (int64_t L = 4; 2 * L <= in.T; L *= 2) {
    const int64_t J = ceil_div(in.T, L), last = in.T - (J - 1) * L;
    int squarings = 0;
    while ((int64_t(1) << squarings) < L) ++squarings;
    const double cost = 2 * static_cast<double>(L) * products((J - 1) * in.columns) +
                        static_cast<double>(last) * products(in.columns) +
                        2 * (squarings * products(in.C) + static_cast<double>(J - 1) * products(in.columns) +
                             products((J - 1) * in.columns)) +
                        (6 + squarings) * region;
    if (plan.chunked_cost == 0 || cost < plan.chunked_cost) {
      plan.chunked_cost = cost;
      best = L;
    }
  }
  // A fifth is left for the states between the passes.
  return best && 1.2 * plan.chunked_cost < plan.sequential_cost ? best : 0;
}

// A single product by panels of W. Tasks share the outputs so that W is packed once where that is the larger operand,
// and else so that one packing serves 400 rows; in both cases a task's states stay in a second-level cache.
inline void plan_step(const PlanInput& in, const Blocking& b, int64_t threads, Plan& plan) {
  const int64_t half = b.channels_rows / 2, panel = b.channels_vectors * b.lanes, panels = ceil_div(in.C, panel);
  const int64_t most = max_of_two((int64_t(1) << 20) / (4 * in.C), 2 * half);
  int64_t tiles = 1;
  if (in.C >= in.columns) {
    plan.channel_tasks = panels < threads ? panels : threads;
    tiles = ceil_div(threads, plan.channel_tasks);
  } else {
    tiles = threads * max_of_two(in.columns / (400 * threads), 1);
  }
  if (tiles < ceil_div(in.columns, most)) tiles = ceil_div(ceil_div(in.columns, most), threads) * threads;
  plan.step = true;
  plan.channel_tile = ceil_div(panels, plan.channel_tasks) * panel;
  plan.channel_tasks = ceil_div(in.C, plan.channel_tile);
  plan.tile = max_of_two(ceil_div(ceil_div(in.columns, tiles), half) * half, half);
}

inline Plan plan_scan(const PlanInput& in, Isa isa) {
  const Blocking b = blocking(isa, in.dtype);
  const bool pairs = multiplies_pairs(isa, in.dtype);
  const int64_t element = in.dtype == DType::f64 ? 8 : 4;
  Plan plan;
  // W has to be transposed for lanes along channels: not worth it for a few columns, whose x and y are transposed
  // instead.
  plan.channels = in.channels_contiguous && !(in.single_product && in.columns * 16 < in.C);
  const int64_t unit = plan.channels ? b.channels_rows : b.planar_vectors * b.lanes;
  plan.k_block = k_part;
  // A single product on pairs is computed 8 rows at a time.
  const int64_t vector = !plan.channels ? b.lanes : pairs && in.single_product ? 8 : b.channels_rows;
  // Threads are worth waking for about a million multiply-adds each.
  const double work = static_cast<double>(in.C) * static_cast<double>(in.C) * static_cast<double>(in.columns * in.T);
  const int64_t threads = work < 1048576.0 * in.threads ? static_cast<int64_t>(work / 1048576) + 1 : in.threads;
  // Two states in half of a second-level cache of 1 MiB or more, and every thread gets a share. A single product uses
  // its states once: smaller tiles stay closer.
  const int64_t budget = in.single_product ? 98304 : 524288;
  int64_t tile = budget / (2 * in.C * element) / unit * unit;
  if (tile < unit) tile = unit;
  plan.channel_tile = in.C;
  int64_t tiles = in.columns > 0 ? ceil_div(in.columns, tile) : 1;
  // Few columns: W is the traffic, so tasks share the columns and divide W.
  const bool few_pairs = plan.channels && pairs && in.columns <= 4 * b.channels_rows;
  const bool divides_w = in.single_product && (!plan.channels || few_pairs);
  if (divides_w && few_pairs && in.C > 2 * in.columns) tiles = 1;  // W is the larger operand, too
  if (in.single_product && plan.channels && in.dense_channels && !pairs && in.dtype != DType::f64 &&
      in.C % b.lanes == 0) {
    plan_step(in, b, threads, plan);
  } else if (divides_w && tiles < threads) {
    const int64_t least = plan.channels ? b.lanes : b.planar_rows;
    plan.tile = ceil_div(ceil_div(in.columns, tiles), vector) * vector;
    plan.channel_tile = ceil_div(ceil_div(in.C, ceil_div(threads, tiles)), least) * least;
    plan.channel_tasks = ceil_div(in.C, plan.channel_tile);
  } else {
    // The same number of blocks for every thread, as far as that goes: of a few numbers of tasks the one whose busiest
    // thread has the least to do, and the largest tiles. A single product's states are read once each: twice the budget
    // does no harm.
    const int64_t rounds = ceil_div(tiles, threads);
    int64_t least = 0;
    for (int64_t j = in.single_product ? ceil_div(rounds, 2) : rounds; j <= rounds + 3; ++j) {
      const int64_t even = ceil_div(ceil_div(in.columns, j * threads), vector) * vector;
      const int64_t busiest = even ? ceil_div(ceil_div(in.columns, even), threads) * even : 0;
      if (plan.tile == 0 || busiest < least) plan.tile = even, least = busiest;
    }
  }
  if (plan.tile < vector) plan.tile = vector;
  // Long runs of adjacent elements where traffic is the bound; panel by panel, W's operand in the first-level cache,
  // where the arithmetic is.
  const int64_t panel = plan.channels ? b.channels_vectors : b.planar_vectors;
  plan.group = in.C <= k_part || pairs ? 8 * panel : panel;
  const int64_t io_element = in.dtype == DType::f64 ? 8 : in.dtype == DType::f32 ? 4 : 2;
  plan.around = in.columns * in.C * in.T * io_element >= around_bytes;
  plan.around_state = in.columns * in.C * element >= (in.single_product ? around_step_bytes : around_bytes);
  if (in.columns > 0 && in.T >= 16 && in.dtype != DType::f64) plan.chunk = choose_chunk(in, vector, plan);
  return plan;
}

// What one task computes: columns [column_begin, column_end) of output channels [channel_begin, channel_end), all
// frames.
struct TaskRange {
  int64_t column_begin, column_end, channel_begin, channel_end;
};

inline int64_t task_count(const Plan& plan, int64_t columns) {
  return ceil_div(columns, plan.tile) * plan.channel_tasks;
}

inline TaskRange task_range(const Plan& plan, int64_t columns, int64_t C, int64_t index) {
  const int64_t q = index / plan.channel_tasks * plan.tile, c = index % plan.channel_tasks * plan.channel_tile;
  return {q, q + plan.tile < columns ? q + plan.tile : columns, c,
          c + plan.channel_tile < C ? c + plan.channel_tile : C};
}

// One sentence for people.
inline std::string describe(const PlanInput& in, const Plan& plan, Isa isa) {
  const auto number = [](double v) { return std::to_string(static_cast<int64_t>(v + 0.5)); };
  isa = isa_for(isa, in.dtype);
  const bool plain = isa > Isa::avx512 && !multiplies_pairs(isa, in.dtype);
  std::string text = std::string(isa_name(plain ? Isa::avx512 : isa)) + ", vectors along " +
                     (plan.channels ? "channels" : "positions") + ", " + std::to_string(task_count(plan, in.columns)) +
                     " tasks of " + std::to_string(plan.tile) + " positions";
  if (plan.channel_tasks > 1) text += " x " + std::to_string(plan.channel_tile) + " output channels";
  text += "; ";
  if (plan.step) return text + "one product, each task packs its panels of W";
  if (plan.chunk)
    return text + "chunks of " + std::to_string(plan.chunk) + " frames side by side: " + number(plan.chunked_cost) +
           " products of W per thread instead of " + number(plan.sequential_cost);
  text += "one frame after the other: ";
  if (in.dtype == DType::f64) return text + "fp64 is not cut into chunks";
  if (in.T < 16) return text + "too few frames for chunks";
  return text + number(plan.sequential_cost) + " products of W per thread, chunks would take " +
         number(plan.chunked_cost) + (plan.chunked_cost < plan.sequential_cost ? ", which is not a fifth less" : "");
}

}  // namespace rcu_ops::cpu
