// fast_gru on a GPU: whether one cooperative launch can run all steps with the weights in shared memory, how features are cut
// into blocks, and what memory that needs. Pure functions of sizes and the device's limits, so that they are tested without
// one.
#pragma once

#include <cstdint>

#include "gpu.h"
#include "text.h"
#include "types.h"

namespace rcu_ops::fast_gru {

inline constexpr int persistent_warps = 8;
inline constexpr int persistent_rows = 64;   // four tiles of the matrix unit
inline constexpr int persistent_units = 2;   // of 8 output features, per matrix and block, at most
inline constexpr int persistent_depth = 32;  // input features of one 16-byte word per lane: sums are cut into runs of it
inline constexpr int partial_pitch = 20;     // numbers in a row of partial sums: 16 outputs, shifted in the banks

// Block b owns output features [8 units b, 8 units (b + 1)) of W_r, W_z and V_o, and as many hidden_units of the 2 hidden halves.
// A half's units are padded to whole ones, so that a unit is all r' or all z'.
struct PersistentPlan {
  Text why_not;  // empty: it can run
  int64_t blocks = 0;
  int units = 0, hidden_units = 0;
  int64_t half_units = 0;               // of r', and of z'
  int64_t depth = 0, hidden_depth = 0;  // C and R, padded to runs
  // Shared memory, bytes: rows of weights and their distances; partial sums per warp. Forward: V_o [outputs][depth], at gate_at
  // W_r and W_z [outputs][hidden_depth], at hidden_at U_o [hidden outputs][depth]. Backward: V_o^T [outputs][depth], at gate_at
  // U_o^T [outputs][2 hidden_depth], at hidden_at W^T [hidden outputs][depth].
  int64_t weight_pitch = 0, hidden_pitch = 0;
  int64_t gate_at = 0, hidden_at = 0, partial_at = 0, shared_bytes = 0;
  // Scratch memory, bytes, zero when the launch begins: the barrier's counter, then what blocks exchange, in the data's type.
  // Forward: states and gated states [rows][depth], hidden [rows][2 hidden_depth]. Backward, in the same places: dc and dz, du;
  // and, at reset_at, dr [rows][depth].
  int64_t low_at = 0, gated_at = 0, reset_at = 0, exchange_at = 0, scratch_bytes = 0;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Rows of 16-bit words whose distance is 64 bytes from a multiple of 128: eight lanes that read 16 bytes each, four from each
// of two rows, meet every bank once.
constexpr int64_t bank_pitch(int64_t numbers) { return round_up(2 * numbers, 128) + 64; }

inline PersistentPlan plan_persistent(int64_t rows, int64_t C, int64_t R, DType dtype, const Gpu& gpu, bool backward = false) {
  PersistentPlan plan;
  plan.depth = round_up(C, persistent_depth);
  plan.hidden_depth = round_up(R, persistent_depth);
  plan.half_units = ceil_div(R, 8);
  const int64_t units = ceil_div(C, 8), hidden_units = 2 * plan.half_units;
  plan.units = static_cast<int>(ceil_div(units, gpu.multiprocessors));
  plan.hidden_units = static_cast<int>(ceil_div(hidden_units, gpu.multiprocessors));
  const int64_t of_gates = ceil_div(units, plan.units), of_hidden = ceil_div(hidden_units, plan.hidden_units);
  plan.blocks = of_gates > of_hidden ? of_gates : of_hidden;
  plan.weight_pitch = bank_pitch(plan.depth);
  plan.hidden_pitch = bank_pitch((backward ? 2 : 1) * plan.hidden_depth);
  plan.gate_at = 8 * plan.units * plan.weight_pitch;
  plan.hidden_at = plan.gate_at + (backward ? 1 : 2) * 8 * plan.units * plan.hidden_pitch;
  plan.partial_at = plan.hidden_at + 8 * plan.hidden_units * plan.weight_pitch;
  plan.shared_bytes = plan.partial_at + persistent_warps * persistent_rows * partial_pitch * 4;
  plan.low_at = 128;
  plan.gated_at = plan.low_at + 2 * rows * plan.depth;
  plan.reset_at = plan.gated_at + 2 * rows * plan.depth;
  plan.exchange_at = plan.reset_at + (backward ? 2 * rows * plan.depth : 0);
  plan.scratch_bytes = plan.exchange_at + 2 * rows * 2 * plan.hidden_depth;
  if (dtype != DType::bf16 && dtype != DType::f16)
    plan.why_not = "the matrix unit is used for 16-bit data";
  else if (gpu.architecture < 80)
    plan.why_not = "it needs sm_80 or newer";
  else if (rows > persistent_rows)  // every block reads all rows' states: beyond, that costs more than the launches it saves
    plan.why_not = to_text(rows) + " columns per step, of at most " + to_text(persistent_rows);
  else if (plan.units > persistent_units || plan.hidden_units > persistent_units)
    plan.why_not = to_text(units) + " and " + to_text(hidden_units) + " units of 8 outputs for " + to_text(gpu.multiprocessors) +
                   " multiprocessors, of at most " + to_text(persistent_units) + " each";
  else if (plan.shared_bytes > gpu.shared_bytes)
    plan.why_not = "a block's share of the weights takes " + to_text(plan.shared_bytes) + " bytes of shared memory, of " +
                   to_text(gpu.shared_bytes);
  return plan;
}

inline Text describe(const PersistentPlan& plan) {
  if (!plan.why_not.empty()) return "not in one launch: " + plan.why_not;
  return "one launch of " + to_text(plan.blocks) + " blocks, weights in " + to_text(plan.shared_bytes) +
         " bytes of shared memory each";
}

}  // namespace rcu_ops::fast_gru
