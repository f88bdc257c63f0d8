// fast_gru on a GPU: whether one launch can run all steps with the weights in shared memory, all of them in every block
// or a block's share of the features, and what memory that needs. Pure functions of sizes and the device's limits, so
// that they are tested without one.
#pragma once

#include <cstdint>

#include "gpu.h"
#include "text.h"
#include "types.h"

namespace rcu_ops::fast_gru {

inline constexpr int persistent_warps = 8;
inline constexpr int persistent_rows = 64;  // four tiles of the matrix unit
inline constexpr int persistent_units = 2;  // of 8 output features, per matrix and block, at most
// Input features of one 16-byte word per lane: sums are cut into runs of it.
inline constexpr int persistent_depth = 32;
inline constexpr int partial_pitch = 20;      // numbers in a row of partial sums: 16 outputs, shifted in the banks
inline constexpr int persistent_cluster = 8;  // blocks that every device of sm_90 has room for in a cluster

// Block b owns output features [8 units b, 8 units (b + 1)) of W_r, W_z and V_o, and as many hidden_units of the 2
// hidden halves. A half's units are padded to whole ones, so that a unit is all r' or all z'.
struct PersistentPlan {
  Text why_not;  // empty: it can run
  int64_t blocks = 0;
  int units = 0, hidden_units = 0;
  int64_t half_units = 0;               // of r', and of z'
  int64_t depth = 0, hidden_depth = 0;  // C and R, padded to runs
  int cluster = 1;                      // blocks that have a slice of the inputs of U_o and V_o each
  int64_t slice = 0;                    // inputs of one, if there are any
  // Shared memory, bytes: rows of weights and their distances; partial sums per warp. Forward: V_o [outputs][depth], at
  // gate_at W_r and W_z [outputs][hidden_depth], at hidden_at U_o [hidden outputs][depth]. Backward: V_o^T
  // [outputs][depth], at gate_at U_o^T [outputs][2 hidden_depth], at hidden_at W^T [hidden outputs][depth]. In clusters
  // V_o and U_o are [outputs of all blocks][slice]; the place of the partial sums also holds the rows of a slice; and
  // at received_at are the partial sums of every block.
  int64_t weight_pitch = 0, hidden_pitch = 0;
  int64_t gate_at = 0, hidden_at = 0, partial_at = 0, received_at = 0, shared_bytes = 0;
  // Scratch memory, bytes, zero when the launch begins: the barrier's counter, then what blocks exchange, in the data's
  // type. Forward: states and gated states [rows][depth], hidden [rows][2 hidden_depth]. Backward, in the same places:
  // dc and dz, du; and, at reset_at, dr [rows][depth].
  int64_t low_at = 0, gated_at = 0, reset_at = 0, exchange_at = 0, scratch_bytes = 0;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Rows of 16-bit words whose distance is 64 bytes from a multiple of 128: eight lanes that read 16 bytes each, four
// from each of two rows, meet every bank once.
constexpr int64_t bank_pitch(int64_t numbers) { return round_up(2 * numbers, 128) + 64; }

// cluster: 1 or persistent_cluster blocks share the inputs; 0: chosen. Clusters save 7/8 of the 4 rows C bytes per
// block and step that come through L2, at 5.5 TB/s, and cost about 3 us per step of their own: est., until both have
// run.
inline PersistentPlan plan_persistent(int64_t rows, int64_t C, int64_t R, DType dtype, const Gpu& gpu,
                                      bool backward = false, int cluster = 0) {
  const int64_t units = ceil_div(C, 8);
  if (cluster == 0) {
    const bool worth_it = units * rows * C >= int64_t{1} << 22;
    if (!backward && gpu.sm90a && worth_it) {
      const PersistentPlan plan = plan_persistent(rows, C, R, dtype, gpu, backward, persistent_cluster);
      if (plan.why_not.empty()) return plan;
    }
    cluster = 1;
  }
  PersistentPlan plan;
  plan.cluster = cluster;
  plan.slice = cluster > 1 ? round_up(ceil_div(C, cluster), persistent_depth) : 0;
  plan.depth = cluster > 1 ? cluster * plan.slice : round_up(C, persistent_depth);
  plan.hidden_depth = round_up(R, persistent_depth);
  plan.half_units = ceil_div(R, 8);
  const int64_t hidden_units = 2 * plan.half_units;
  const int64_t most = gpu.multiprocessors / cluster * cluster, room = most ? most : cluster;
  plan.units = static_cast<int>(ceil_div(units, room));
  plan.hidden_units = static_cast<int>(ceil_div(hidden_units, room));
  const int64_t of_gates = ceil_div(units, plan.units), of_hidden = ceil_div(hidden_units, plan.hidden_units);
  plan.blocks = round_up(of_gates > of_hidden ? of_gates : of_hidden, cluster);
  plan.weight_pitch = bank_pitch(cluster > 1 ? plan.slice : plan.depth);
  plan.hidden_pitch = bank_pitch((backward ? 2 : 1) * plan.hidden_depth);
  plan.gate_at = cluster * 8 * plan.units * plan.weight_pitch;
  plan.hidden_at = plan.gate_at + (backward ? 1 : 2) * 8 * plan.units * plan.hidden_pitch;
  plan.partial_at = plan.hidden_at + cluster * 8 * plan.hidden_units * plan.weight_pitch;
  const int64_t partial = persistent_warps * persistent_rows * partial_pitch * 4;
  const int64_t staged = persistent_rows * plan.weight_pitch;
  plan.received_at = plan.partial_at + (cluster > 1 && staged > partial ? staged : partial);
  plan.shared_bytes = plan.received_at + (cluster > 1 ? cluster * persistent_rows * partial_pitch * 4 : 0);
  plan.low_at = 128;
  plan.gated_at = plan.low_at + 2 * rows * plan.depth;
  plan.reset_at = plan.gated_at + 2 * rows * plan.depth;
  plan.exchange_at = plan.reset_at + (backward ? 2 * rows * plan.depth : 0);
  plan.scratch_bytes = plan.exchange_at + 2 * rows * 2 * plan.hidden_depth;
  if (dtype != DType::bf16 && dtype != DType::f16)
    plan.why_not = "the matrix unit is used for 16-bit data";
  else if (gpu.architecture < 80)
    plan.why_not = "it needs sm_80 or newer";
  else if (cluster > 1 && (!gpu.sm90a || backward))
    plan.why_not = "clusters are for forward passes on sm_90, in libraries built for it";
  else if (cluster > most)
    plan.why_not = "a cluster is more blocks than there are multiprocessors";
  else if (rows > persistent_rows)  // every block reads all rows' states: that costs more than the launches it saves
    plan.why_not = to_text(rows) + " columns per step, of at most " + to_text(persistent_rows);
  else if (plan.units > persistent_units || plan.hidden_units > persistent_units)
    plan.why_not = to_text(units) + " and " + to_text(hidden_units) + " units of 8 outputs for " +
                   to_text(gpu.multiprocessors) + " multiprocessors, of at most " + to_text(persistent_units) + " each";
  else if (plan.shared_bytes > gpu.shared_bytes)
    plan.why_not = "a block's share of the weights takes " + to_text(plan.shared_bytes) +
                   " bytes of shared memory, of " + to_text(gpu.shared_bytes);
  return plan;
}

inline Text describe(const PersistentPlan& plan) {
  if (!plan.why_not.empty()) return "not in one launch: " + plan.why_not;
  return "one launch of " + to_text(plan.blocks) + " blocks" +
         (plan.cluster > 1 ? " in clusters of " + to_text(plan.cluster) : Text()) + ", weights in " +
         to_text(plan.shared_bytes) + " bytes of shared memory each";
}

// ---- columns: every block has all weights, and a few columns for all steps ----

inline constexpr int columns_of_block = 8;
inline constexpr int column_units = 24;  // of 8 features, a warp for each, at most

// A product of a block: `halves` matrices of `outputs` x `inputs` weights with operands of their own, in shared memory
// as the data's type and in numbers of it: half h at weight_at + h half_weights, its operands at operand_at + h
// half_operands. In memory a half is [rows][length]; its element (row, i) lies at row * row_step + i * step.
//
// 16 bits: weights as they lie in memory, [output][input] forward and [input][output] backward, and operands
// [input][column]; inputs are padded by zeros to `depth`, a multiple of 32, and rows are an odd number of 16-byte words
// long, so that eight of them meet every bank once. fp32: weights [output][input], operands [column][input], depth a
// multiple of 8, and `pitch` an odd number of words for both.
struct ColumnProduct {
  int halves = 1, outputs = 0, inputs = 0, depth = 0, pitch = 0;
  int rows = 0, length = 0, row_step = 0, step = 0;
  int weight_at = 0, half_weights = 0, operand_at = 0, half_operands = 0;
};

// Shared memory, from the begin: where the block's columns are in every view (64 bits), weights, operands.
struct ColumnsPlan {
  Text why_not;  // empty: it can run
  int64_t blocks = 0;
  int units = 0, half_units = 0;  // of C; of r', and of z'
  int threads = 0;
  // Forward: U_o, W, V_o; and U_x and V_x, whose operands are the same, two steps of them, if the weights fit: makes_x.
  // Backward: V_o^T, W^T, U_o^T.
  ColumnProduct product[5];
  int products = 3;
  bool makes_x = false;
  int zeros_at = 0, numbers = 0;  // what is zero at the start, up to the end; numbers of the data's type in all
  int64_t shared_bytes = 0;
};

// Numbers of 64 bits that are kept of a column: its sample and position, and its place in up to 11 views.
inline constexpr int column_places = 13;

// How much a launch may do before the library's products, which share a weight among more columns, are faster in spite
// of seven launches per step: multiplications per step. A block makes about 25 TFLOP/s out of its multiprocessor's FMA
// units (est.), and seven launches in a graph took 20 to 30 us on an H200 (benchmarks/results/nvidia-h200/).
inline constexpr int64_t columns_work = 150'000'000;

// makes_x: as far as the weights fit.
inline ColumnsPlan plan_columns(int64_t columns, int64_t C, int64_t R, DType dtype, const Gpu& gpu,
                                bool backward = false, bool makes_x = true) {
  ColumnsPlan plan;
  plan.blocks = ceil_div(columns, columns_of_block);
  const int64_t numbers = 4 * R * C + C * C, size = element_size(dtype);
  if (dtype == DType::f64) {
    plan.why_not = "columns: fp64 is left to the library";
    return plan;
  }
  if (numbers * size > gpu.shared_bytes) {  // before anything is counted in 32 bits
    plan.why_not = "columns: " + to_text(numbers) + " weights of " + to_text(size) + " bytes, of " +
                   to_text(gpu.shared_bytes) + " bytes of shared memory";
    return plan;
  }
  const bool wide = dtype == DType::f32;
  const int64_t word = 16 / size, depth_unit = wide ? 8 : 32;
  const auto odd_words = [&](int64_t count) { return round_up(count, 2 * word) + word; };
  plan.makes_x = makes_x && !backward;
  plan.products = plan.makes_x ? 5 : 3;
  const int64_t sizes[5][3] = {{1, backward ? C : 2 * R, C},
                               {2, backward ? R : C, backward ? C : R},
                               {1, C, backward ? 2 * R : C},
                               {1, 2 * R, C},
                               {1, C, C}};
  int64_t at = column_places * columns_of_block * 8 / size;
  bool padded = false;
  const int64_t weights_at = at;
  for (int i = 0; i < plan.products; ++i) {
    const auto [halves, outputs, inputs] = sizes[i];
    const int64_t depth = round_up(inputs, depth_unit);
    // A unit of U_o's outputs is of r' or z' alone: the last of r' reaches into z', and that of z' beyond it.
    const int64_t whole = !backward && (i == 0 || i == 3) ? R + round_up(R, 8) : round_up(outputs, 8);
    const bool transposed = backward && !wide;  // in shared memory
    const int64_t pitch = odd_words(transposed ? outputs : depth);
    ColumnProduct& product = plan.product[i];
    product.halves = static_cast<int>(halves);
    product.outputs = static_cast<int>(outputs);
    product.inputs = static_cast<int>(inputs);
    product.depth = static_cast<int>(depth);
    product.pitch = static_cast<int>(pitch);
    product.rows = static_cast<int>(backward ? inputs : outputs);
    product.length = static_cast<int>(backward ? outputs : inputs);
    product.row_step = static_cast<int>(backward && wide ? 1 : pitch);
    product.step = static_cast<int>(backward && wide ? pitch : 1);
    product.weight_at = static_cast<int>(at);
    product.half_weights = static_cast<int>((transposed ? depth : whole) * pitch);
    at += halves * product.half_weights;
    padded |= depth != inputs;
  }
  plan.zeros_at = static_cast<int>(padded ? weights_at : at);
  for (int i = 0; i < plan.products; ++i) {
    ColumnProduct& product = plan.product[i];
    product.operand_at = i == 4 ? plan.product[3].operand_at : static_cast<int>(at);
    product.half_operands = columns_of_block * (wide ? product.pitch : product.depth);
    at += (i < 3 ? product.halves : i == 3 ? 2 : 0) * product.half_operands;
  }
  plan.numbers = static_cast<int>(at);
  plan.shared_bytes = at * size;
  if (plan.makes_x && plan.shared_bytes > gpu.shared_bytes)
    return plan_columns(columns, C, R, dtype, gpu, backward, false);
  plan.units = static_cast<int>(ceil_div(C, 8));
  plan.half_units = static_cast<int>(ceil_div(R, 8));
  const int units = plan.units > 2 * plan.half_units ? plan.units : 2 * plan.half_units;
  plan.threads = 32 * units;
  if (plan.shared_bytes > gpu.shared_bytes)
    plan.why_not = "columns: the weights take " + to_text(plan.shared_bytes) + " bytes of shared memory, of " +
                   to_text(gpu.shared_bytes);
  else if (units > column_units)
    plan.why_not = "columns: " + to_text(units) + " units of 8 features, of at most " + to_text(column_units);
  else if (columns * numbers > columns_work)
    plan.why_not = "columns: " + to_text(columns) + " columns of " + to_text(numbers) + " weights, of at most " +
                   to_text(columns_work) + " products";
  return plan;
}

inline Text describe(const ColumnsPlan& plan) {
  if (!plan.why_not.empty()) return "not by " + plan.why_not;
  return "one launch of " + to_text(plan.blocks) + " blocks of " + to_text(columns_of_block) + " columns, all weights" +
         (plan.makes_x ? " and those of x in " : " in ") + to_text(plan.shared_bytes) + " bytes of shared memory each";
}

}  // namespace rcu_ops::fast_gru
