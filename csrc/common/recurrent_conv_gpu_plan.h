// recurrent_conv on a GPU: which kernel runs a scan, how it is cut into blocks, and what memory it needs. Pure
// functions of shapes, strides and the device's limits, so that they are tested without one.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>

#include "gpu.h"
#include "recurrent_conv.h"
#include "recurrent_conv_fp32_plan.h"
#include "recurrent_conv_step_plan.h"
#include "text.h"

namespace rcu_ops::cuda {

// ---- the plain scan ----------------------------------------------------------------------------------------------

inline constexpr int plain_threads = 256;
inline constexpr int plain_lanes = 4;  // a thread computes plain_lanes channels at plain_lanes positions

// A block owns `positions` columns for all frames; it computes `channels` output channels at a time, and reads W in
// pieces of `depth` input channels unless all of W stays in shared memory.
struct PlainScanPlan {
  int positions = 0;
  int channels = 0;
  int depth = 0;
  bool weight_resident = false;
  bool state_shared = true;  // else both copies of the state live in the caller's scratch
  int64_t blocks = 0;
  // Byte offsets into shared memory. Rows of the state hold state_pitch columns, rows of W (one per input channel)
  // weight_pitch output channels: multiples of plain_lanes, shifted against each other in the banks.
  int64_t state_at = 0, weight_at = 0, shared_bytes = 0;
  int64_t state_pitch = 0, weight_pitch = 0;
  int64_t scratch_bytes = 0;
};

inline PlainScanPlan plain_scan_plan_for(const Scan& p, int positions, bool weight_resident, bool state_shared) {
  const int64_t size = state_size(p.dtype), columns = p.N * p.G * p.H * p.W;
  PlainScanPlan plan;
  plan.positions = positions;
  plan.channels = plain_threads * plain_lanes * plain_lanes / positions;
  plan.depth = positions;  // a piece of W is then 4096 numbers
  plan.weight_resident = weight_resident;
  plan.state_shared = state_shared;
  plan.blocks = ceil_div(columns, positions);
  plan.state_pitch = positions + plain_lanes;
  plan.weight_pitch = (weight_resident ? round_up(p.C, plain_lanes) : plan.channels) + plain_lanes;
  const int64_t state_bytes = 2 * p.C * plan.state_pitch * size;
  plan.state_at = round_up(5 * positions * 8, 16);  // before it: the columns' offsets in x, y, residual, first, last
  plan.weight_at = plan.state_at + (state_shared ? state_bytes : 0);
  plan.shared_bytes = plan.weight_at + (weight_resident ? p.C : plan.depth) * plan.weight_pitch * size;
  plan.scratch_bytes = state_shared ? 0 : plan.blocks * state_bytes;
  return plan;
}

// The widest tile that still gives every multiprocessor a block and whose state fits beside W, or beside a piece of it.
inline PlainScanPlan plan_plain_scan(const Scan& p, const Gpu& gpu) {
  const int64_t columns = p.N * p.G * p.H * p.W;
  int widest = 64;
  while (widest > 8 && ceil_div(columns, widest) < gpu.multiprocessors) widest /= 2;
  for (const bool resident : {true, false})
    for (int positions = widest; positions >= (resident ? 8 : 4); positions /= 2) {
      const PlainScanPlan plan = plain_scan_plan_for(p, positions, resident, true);
      if (plan.shared_bytes <= gpu.shared_bytes) return plan;
    }
  return plain_scan_plan_for(p, widest > 32 ? 32 : widest, false, false);
}

inline Text describe(const PlainScanPlan& plan) {
  return "plain: " + to_text(plan.blocks) + " blocks of " + to_text(plan.positions) + " columns, " +
         (plan.weight_resident ? Text("W resident")
                               : "W in pieces of " + to_text(plan.depth) + " x " + to_text(plan.channels)) +
         ", state in " + (plan.state_shared ? "shared memory" : "scratch memory");
}

// ---- the matrix-unit scan: 16-bit data, up to 128 channels ---------------------------------------------------------

inline constexpr int tile_warps = 4;  // of a block, at most
// Of a multiprocessor, for which the kernel's registers are sure to suffice.
inline constexpr int tile_resident_warps = 8;
inline constexpr int tile_most_channels = 128;

// A warp owns `positions` columns for all frames, independently of the other warps of its block.
struct TileScanPlan {
  int padded_channels = 0;      // 64 or 128
  int positions = 0;            // of a warp
  int warps = tile_warps;       // of a block; fewer, to spread few positions over all multiprocessors
  bool along_channels = false;  // which way memory is contiguous in x, y and the residual alike; else along columns
  int vector_bytes = 0;         // 16, 8, 4 or 2: the widest word that every row of those tensors is aligned to
  int stages = 0;               // frames in flight or in use: 3, or 2 where shared memory is short
  int residual_slots = 0;       // 1, or for batch normalisation's gradient one per stage
  int64_t blocks = 0;
  // Shared memory: W [padded][padded + 8] of 16 bits; numbers per channel (fp32): diagonal, scale, shift, and of batch
  // normalisation mean, slope and constant or each warp's sum and squares (fp64) and center; the columns' offsets; the
  // slots of each warp, one per stage for x, which y then takes over, and those of the residual. A slot's rows are
  // columns or channels; 16 bytes more than they need spread eight of them over all banks.
  int64_t numbers_at = 0, offsets_at = 0, slots_at = 0, shared_bytes = 0;
  int64_t slot_pitch = 0, slot_bytes = 0;  // in bytes
};

// Which way memory is contiguous in all tensors alike, and the widest word that all their rows are aligned to; or why
// the kernels for 16-bit data cannot copy them.
struct Words {
  bool along_channels = false;
  int bytes = 0;
  const char* why_not = nullptr;
};

// `views`: tensors [N,C,T,H,W] of the problem's sizes.
template <typename Problem>
Words plan_words(const Problem& p, std::initializer_list<const View*> views) {
  Words words;
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return {false, 0, "the matrix unit is used for 16-bit data"};
  bool channels = true, columns = true;
  for (const View* v : views) {
    if (!v->data) continue;
    channels = channels && (v->c == 1 || p.C == 1);
    columns = columns && (v->w == 1 || p.W == 1) && (v->h == p.W * (p.W == 1 ? v->h : v->w) || p.H == 1) &&
              (p.W > 1 || p.H == 1 || v->h == 1);
  }
  if (!channels && !columns) return {false, 0, "neither channels nor positions are contiguous in all tensors"};
  words.along_channels = channels;
  words.bytes = 16;
  const auto align = [&](int64_t bytes) {
    while (bytes % words.bytes != 0) words.bytes /= 2;
  };
  align(2 * (channels ? p.C : p.H * p.W));  // bytes that are contiguous
  for (const View* v : views) {
    if (!v->data) continue;
    align(static_cast<int64_t>(reinterpret_cast<uintptr_t>(v->data) % 16));
    if (p.N > 1) align(2 * v->n);
    if (p.T > 1) align(2 * v->t);
    if (channels && p.H > 1) align(2 * v->h);
    if (channels && p.W > 1) align(2 * v->w);
    if (!channels && p.C > 1) align(2 * v->c);
  }
  return words;
}

inline constexpr int64_t offset_bytes = sizeof(Offset);

// Whether all elements of a frame, whichever it is, are within `most` elements of its start.
inline bool fit_offsets(const Scan& p, int64_t most) {
  for (const View* v : {&p.x, &p.y, &p.residual, &p.first, &p.last, &p.weight_grad.first}) {
    if (!v->data) continue;
    int64_t left = most;
    const int64_t sizes[] = {p.N, p.C, p.H, p.W}, strides[] = {v->n, v->c, v->h, v->w};
    for (int i = 0; i < 4; ++i) {
      const int64_t steps = sizes[i] - 1, stride = strides[i] < 0 ? -strides[i] : strides[i];
      if (steps <= 0) continue;
      if (stride > left / steps) return false;
      left -= steps * stride;
    }
  }
  return true;
}

inline Words plan_words(const Scan& p) {
  if (p.G != 1) return {false, 0, "frames scanned side by side"};
  if (!fit_offsets(p, std::numeric_limits<Offset>::max()))
    return {false, 0, "a frame reaches further than the offsets of this build, 32 bits"};
  return plan_words(p, {&p.x, &p.y, &p.residual});
}

// Padded channels up to which a block of all warps can add up the weight's gradient beside the scan (Scan::weight_grad).
// Of 128 its sums would take 128 registers a thread.
inline constexpr int most_summed_channels = 64;

constexpr int tile_positions(int padded_channels) { return padded_channels > 64 ? 16 : 32; }

// The plan, or none and `why_not`.
inline std::optional<TileScanPlan> plan_tile_scan(const Scan& p, const Gpu& gpu, Text& why_not) {
  const auto refuse = [&](const char* reason) {
    why_not = reason;
    return std::nullopt;
  };
  if (p.C > tile_most_channels) return refuse("more than 128 channels");
  const Words words = plan_words(p);
  if (words.why_not) return refuse(words.why_not);
  TileScanPlan plan;
  plan.along_channels = words.along_channels;
  plan.vector_bytes = words.bytes;
  // 21 channels and more are as fast padded to 64, as memory bounds both: 19 bytes per cycle against 3.3 cycles for a
  // column's 64 x 64 products and a barrier's 1. Of 16 channels the products take 1.3 times as long as memory, of 8 2.6
  // times; for those two more kernels would have to be compiled, and networks begin with 64.
  plan.padded_channels = p.C <= 64 ? 64 : 128;
  plan.positions = tile_positions(plan.padded_channels);
  plan.slot_pitch = 2 * (plan.along_channels ? plan.padded_channels : plan.positions) + 16;
  plan.slot_bytes = plan.slot_pitch * (plan.along_channels ? plan.positions : plan.padded_channels);
  plan.numbers_at = 2 * plan.padded_channels * (plan.padded_channels + 8);
  // Warps share nothing but W, so that blocks of fewer are as good, but for more copies of W. The waves decide: the
  // fewest columns on the multiprocessor that has most of them, where all its blocks find room at once (each takes 1
  // KiB more than it asks for); of equals, the most warps. Blocks that add up the weight's gradient have all.
  const int64_t columns = p.N * p.H * p.W;
  std::optional<TileScanPlan> best;
  int64_t least = 0;
  const int fewest = p.weight_grad.partial ? tile_warps : 1;
  for (plan.warps = tile_warps; plan.warps >= fewest; plan.warps /= 2) {
    const int64_t tables = 3 + (p.norm.moments ? 3 : p.norm.partial ? statistics_floats * plan.warps : 0);
    plan.offsets_at = plan.numbers_at + tables * 4 * plan.padded_channels;
    plan.slots_at = plan.offsets_at + 5 * offset_bytes * plan.warps * plan.positions;
    plan.blocks = ceil_div(columns, plan.warps * plan.positions);
    const int64_t together = ceil_div(plan.blocks, gpu.multiprocessors);
    const auto take = [&](int stages) {
      plan.stages = stages;
      plan.residual_slots = !p.residual.data ? 0 : p.norm.moments ? stages : 1;
      plan.shared_bytes = plan.slots_at + plan.warps * (stages + plan.residual_slots) * plan.slot_bytes;
      const int64_t fit = (gpu.shared_bytes + 1024) / (plan.shared_bytes + 1024), most = together < 3 ? together : 3;
      return fit < most ? fit : most;  // blocks at once, of which the registers allow three
    };
    // Beside a residual another block hides more latency than another frame in flight.
    const int64_t blocks_at_once = take(2);
    if (blocks_at_once == 0) continue;
    if (const int64_t with_three = take(3); with_three == 0 || (p.residual.data && with_three < blocks_at_once))
      take(2);
    int64_t most = together * plan.warps * plan.positions;
    if (most > round_up(columns, plan.positions)) most = round_up(columns, plan.positions);
    const bool room = together * plan.warps <= tile_resident_warps &&
                      together * (plan.shared_bytes + 1024) <= gpu.shared_bytes + 1024;
    if (best && (most >= least || !room)) continue;
    best = plan, least = most;
  }
  if (!best) return refuse("too little shared memory");
  return best;
}

inline Text describe(const TileScanPlan& plan) {
  return "tile: " + to_text(plan.blocks) + " blocks of " + to_text(plan.warps) + " x " + to_text(plan.positions) +
         " columns, channels padded to " + to_text(plan.padded_channels) +
         (plan.along_channels ? ", along channels" : ", along columns") + " by " + to_text(plan.vector_bytes) +
         " bytes, " + to_text(plan.stages) + " stages";
}

// ---- the wide matrix-unit scan: 16-bit data, 129 to 256 channels ----------------------------------------------------

inline constexpr int wide_warps = 8;
inline constexpr int wide_most_channels = 256;
// 16 samples of 14 x 14 are then one block for each multiprocessor of a large GPU.
inline constexpr int wide_positions = 24;
inline constexpr int wide_weight_piece = 64;  // input channels of W in shared memory at a time, while it is loaded

// A block owns wide_positions columns for all frames; each of its warps has 32 rows of W in registers.
struct WideScanPlan {
  bool along_channels = false;
  int vector_bytes = 0;
  int stages = 0;  // slots for x: 4, or 3 where shared memory is short
  int64_t blocks = 0;
  // Shared memory: the columns' offsets; of batch normalisation, numbers per channel (fp32): scale, shift, mean, slope,
  // constant, or sum and squares (fp64) and center; the state before and after, rounded, laid out as slots are; the
  // slots. A slot's rows are columns or channels, an odd number of 16-byte words apart: eight of them are spread over
  // all banks. Before the first frame W passes through what the states and slots take later.
  int64_t numbers_at = 0, states_at = 0, slots_at = 0, shared_bytes = 0;
  int64_t slot_pitch = 0, slot_bytes = 0, weight_pitch = 0;  // in bytes
};

constexpr int64_t odd_words(int64_t bytes) { return 16 * (ceil_div(bytes, 16) | 1); }

// The plan, or none and `why_not`.
inline std::optional<WideScanPlan> plan_wide_scan(const Scan& p, const Gpu& gpu, Text& why_not) {
  const Words words = plan_words(p);
  if (words.why_not || p.C > wide_most_channels) {
    why_not = words.why_not ? words.why_not : "more than 256 channels";
    return std::nullopt;
  }
  WideScanPlan plan;
  const int64_t columns = p.N * p.H * p.W, residual = p.residual.data ? 2 : 1;
  plan.along_channels = words.along_channels;
  plan.vector_bytes = words.bytes;
  plan.blocks = ceil_div(columns, wide_positions);
  plan.slot_pitch = odd_words(2 * (plan.along_channels ? wide_most_channels : wide_positions));
  plan.slot_bytes = plan.slot_pitch * (plan.along_channels ? wide_positions : wide_most_channels);
  plan.weight_pitch = odd_words(2 * wide_weight_piece);
  plan.numbers_at = 5 * offset_bytes * wide_positions;
  const int64_t tables = p.norm.moments ? 5 : p.norm.partial ? statistics_floats : 0;
  plan.states_at = round_up(plan.numbers_at + tables * 4 * wide_most_channels, 16);
  plan.slots_at = plan.states_at + 2 * plan.slot_bytes;
  for (plan.stages = 4; plan.stages >= 3; --plan.stages) {
    const int64_t weight = plan.states_at + wide_most_channels * plan.weight_pitch;
    plan.shared_bytes = plan.slots_at + plan.stages * plan.slot_bytes * residual;
    if (plan.shared_bytes < weight) plan.shared_bytes = weight;
    if (plan.shared_bytes <= gpu.shared_bytes) return plan;
  }
  why_not = "too little shared memory";
  return std::nullopt;
}

inline Text describe(const WideScanPlan& plan) {
  return "wide: " + to_text(plan.blocks) + " blocks of " + to_text(wide_positions) + " columns, W in registers" +
         (plan.along_channels ? ", along channels" : ", along columns") + " by " + to_text(plan.vector_bytes) +
         " bytes, " + to_text(plan.stages) + " stages";
}

// ---- the sm_90a scan: 16-bit data, 129 to 256 channels, by warpgroups -----------------------------------------------

inline constexpr int hopper_groups = 2;      // warpgroups of a block
inline constexpr int hopper_positions = 64;  // columns of a warpgroup, the rows of its product
inline constexpr int hopper_half = 128;      // channels of a unit of memory in flight
inline constexpr int hopper_units = 3;       // of each warpgroup: one frame and a half
inline constexpr int hopper_unit_bytes = 2 * hopper_half * hopper_positions;
// Shared memory: W; the units of the warpgroups; the columns' offsets in x, y and the residual. It is all that an sm_90
// has.
inline constexpr int64_t hopper_units_at = 2 * wide_most_channels * wide_most_channels;
inline constexpr int64_t hopper_offsets_at = hopper_units_at + hopper_groups * hopper_units * hopper_unit_bytes;
inline constexpr int64_t hopper_shared_bytes = hopper_offsets_at + 3 * offset_bytes * hopper_groups * hopper_positions;

struct HopperScanPlan {
  bool along_channels = false;
  int vector_bytes = 0;
  int64_t blocks = 0;
  int64_t shared_bytes = hopper_shared_bytes;
};

// The plan, or none and `why_not`.
inline std::optional<HopperScanPlan> plan_hopper_scan(const Scan& p, const Gpu& gpu, Text& why_not) {
  const auto refuse = [&](const char* reason) {
    why_not = reason;
    return std::nullopt;
  };
  const Words words = plan_words(p);
  if (words.why_not) return refuse(words.why_not);
  if (p.C > wide_most_channels) return refuse("more than 256 channels");
  HopperScanPlan plan;
  plan.along_channels = words.along_channels;
  plan.vector_bytes = words.bytes;
  plan.blocks = ceil_div(p.N * p.H * p.W, hopper_groups * hopper_positions);
  if (plan.shared_bytes > gpu.shared_bytes) return refuse("too little shared memory");
  return plan;
}

// Which of the two needs fewer cycles per frame; estimates until there is a measurement. Warpgroups multiply at the
// full rate of the matrix unit, 2048 per cycle and multiprocessor, mma.sync at about 0.6 of it and with a barrier of
// 400 cycles; neither is faster than memory, 19 bytes per cycle and multiprocessor. That is 6898 cycles for 128 columns
// against 1680 for 24: warpgroups are predicted to win by up to 1.3 where every multiprocessor has several times 128
// columns, and to lose where there are fewer.
// Before its first frame every block reads all of W, 32 bytes per cycle from L2: more blocks, more of that.
inline bool hopper_is_faster(const HopperScanPlan& hopper, const WideScanPlan& wide, int64_t frames, const Gpu& gpu) {
  constexpr int64_t area = wide_most_channels * wide_most_channels, memory = 4 * wide_most_channels;
  const auto cycles = [&](int64_t blocks, int64_t product, int64_t columns) {
    const int64_t moved = columns * memory / 19;
    return ceil_div(blocks, gpu.multiprocessors) * (frames * (product > moved ? product : moved) + 2 * area / 32);
  };
  constexpr int64_t hopper_columns = hopper_groups * hopper_positions;
  return cycles(hopper.blocks, hopper_columns * area / 2048, hopper_columns) <
         cycles(wide.blocks, wide_positions * area * 10 / (2048 * 6) + 400, wide_positions);
}

inline Text describe(const HopperScanPlan& plan) {
  return "hopper: " + to_text(plan.blocks) + " blocks of " + to_text(hopper_groups) + " x " +
         to_text(hopper_positions) + " columns, W in shared memory" +
         (plan.along_channels ? ", along channels" : ", along columns") + " by " + to_text(plan.vector_bytes) +
         " bytes";
}

// ---- the choice ----------------------------------------------------------------------------------------------------

enum class Kernel : int { best, plain, hopper };  // hopper: wherever it can run, predicted to win or not (for scans)

struct ScanPlan {
  std::optional<StepScanPlan> step;
  std::optional<Fp32ScanPlan> fp32;
  std::optional<TileScanPlan> tile;
  std::optional<WideScanPlan> wide;
  std::optional<HopperScanPlan> hopper;
  Text why_not_matrix, why_not_hopper;
  PlainScanPlan plain;  // when there is none of them

  bool is_plain() const { return !step && !fp32 && !tile && !wide && !hopper; }
  int64_t blocks() const {
    return step     ? blocks_of(*step)
           : fp32   ? fp32->blocks
           : tile   ? tile->blocks
           : wide   ? wide->blocks
           : hopper ? hopper->blocks
                    : plain.blocks;
  }
  int64_t shared_bytes() const {
    return step     ? step->shared_bytes
           : fp32   ? fp32->shared_bytes
           : tile   ? tile->shared_bytes
           : wide   ? wide->shared_bytes
           : hopper ? hopper->shared_bytes
                    : plain.shared_bytes;
  }
  int64_t scratch_bytes() const { return step ? step->scratch_bytes : is_plain() ? plain.scratch_bytes : 0; }
};

inline ScanPlan plan_scan(const Scan& p, const Gpu& gpu, Kernel kernel) {
  ScanPlan plan;
  const bool many_channels = p.C > wide_most_channels;
  if (kernel == Kernel::plain)
    plan.why_not_matrix = "the plain kernel was asked for";
  else if (p.C <= tile_most_channels)
    plan.tile = plan_tile_scan(p, gpu, plan.why_not_matrix);
  else {
    plan.wide = plan_wide_scan(p, gpu, plan.why_not_matrix);
    // A pass over the sequence takes half of the time that memory leaves the scan at best, which warpgroups shorten by
    // less than a quarter: forward batch normalisation makes one such pass where the scan takes no part of it, and
    // backward two.
    if (gpu.sm90a && p.norm.present() && kernel != Kernel::hopper)
      plan.why_not_hopper = "they take no part of batch normalisation";
    else if (gpu.sm90a)
      plan.hopper = plan_hopper_scan(p, gpu, plan.why_not_hopper);
    else if (gpu.architecture == 90)
      plan.why_not_hopper = "the library has no code for sm_90a";
    if (plan.hopper && plan.wide && kernel != Kernel::hopper && !hopper_is_faster(*plan.hopper, *plan.wide, p.T, gpu)) {
      plan.hopper.reset();
      plan.why_not_hopper = "smaller blocks are predicted to be faster";
    }
    if (plan.hopper) plan.wide.reset();
  }
  if (kernel != Kernel::plain) plan.fp32 = plan_fp32_scan(p, gpu);
  if (plan.is_plain()) plan.plain = plan_plain_scan(p, gpu);
  if (kernel == Kernel::plain || (kernel == Kernel::hopper && plan.hopper)) return plan;
  // One frame after a given state needs no block to own all channels, nor anything that a scan prepares for the frames
  // that follow. It is launched alone where words of contiguous channels make that shortest, where the scan's blocks
  // would leave multiprocessors idle, or in fp32 would have to be small and stage all of W for few columns each, and
  // where the plain scan would read W in pieces; frame after frame where only the plain scan, which knows no matrix
  // unit, can hold the channels.
  const StepScanPlan step = plan_step_scan(p, gpu);
  const bool small_blocks = plan.fp32 && plan.fp32->positions < fp32_balanced_positions;
  const bool in_pieces = plan.is_plain() && !plan.plain.weight_resident;
  const bool single = p.T == 1 && p.init == Init::state && p.last_kind != Last::projected;
  if (step.shared_bytes <= gpu.shared_bytes && step.blocks <= most_blocks &&
      ((single && (step.words.possible || plan.blocks() < gpu.multiprocessors || small_blocks || in_pieces)) ||
       (step.matrix && many_channels)))
    plan.step = step, plan.fp32.reset(), plan.tile.reset(), plan.wide.reset(), plan.hopper.reset();
  return plan;
}

// How many columns have a part of batch normalisation's statistics to themselves in the kernel of this plan; 0 where it
// takes nothing of batch normalisation (Scan::norm). That is where its passes are a small part: of the plain scan in
// fp32 and the step, both of many channels, 4 % and 2 % at 256 channels of 14 x 14 and 512 of 7 x 7 (predicted).
inline int64_t fused_norm_columns(const ScanPlan& plan) {
  return plan.step   ? 0
         : plan.fp32 ? plan.fp32->norm_columns
         : plan.tile ? plan.tile->positions
         : plan.wide ? wide_positions
                     : 0;
}

inline Text describe(const ScanPlan& plan) {
  if (plan.step) return describe(*plan.step);
  if (plan.fp32) return describe(*plan.fp32);
  if (plan.tile) return describe(*plan.tile);
  if (plan.hopper) return describe(*plan.hopper);
  if (plan.wide)
    return describe(*plan.wide) +
           (plan.why_not_hopper.empty() ? Text() : " (not by warpgroups: " + plan.why_not_hopper + ")");
  return describe(plan.plain) + " (not the matrix unit: " + plan.why_not_matrix + ")";
}

}  // namespace rcu_ops::cuda
