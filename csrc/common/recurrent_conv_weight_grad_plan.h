// recurrent_conv's weight gradient on a GPU: which kernel runs it and how its sum over rows is cut. Pure functions of
// shapes and strides.
#pragma once

#include <cstdint>
#include <optional>

#include "recurrent_conv_gpu_plan.h"
#include "text.h"

namespace rcu_ops::cuda {

// How the sum over rows (frames that have a state before them x positions) is cut, of any kernel. Where the chosen
// kernel's shared memory is to be had, a function of the shape alone: the order of the additions does not depend on the
// GPU.
struct WeightGradPlan {
  int64_t rows = 0;
  int tile = 0;  // output and input channels of a block
  int64_t tiles = 0;
  int64_t splits = 0;
  int64_t rows_per_split = 0;  // a multiple of weight_grad_depth
  int64_t scratch_bytes = 0;   // [splits][C][C] partial sums; none for a single split
  bool small = false;          // rows can be counted in 32 bits
  // The plain kernel: whether it reads dx and h by words of four channels.
  bool dx_words = false, h_words = false;
  // Shared memory: two tables of rows' offsets in dx and in h, one for the stage in use and one for the next; then the
  // stages.
  int64_t slots_at = 0, shared_bytes = 0;
  // The matrix unit's kernel (vector_bytes != 0): slots of 16-bit numbers, one for dx and one for the states of each
  // stage, with one row per row of the sum (along_channels) or per channel, slot_pitch bytes apart.
  bool along_channels = false;
  int vector_bytes = 0;
  int64_t slot_pitch = 0, slot_bytes = 0;
  const char* why_not_matrix = nullptr;
};

inline constexpr int weight_grad_depth = 32;  // rows staged at a time
inline constexpr int weight_grad_threads = 256;
inline constexpr int plain_weight_grad_tile = 64;
// The plain kernel's arithmetic is in S: a side of a thread's square of dW, and threads.
template <typename S>
inline constexpr int plain_weight_grad_outputs = sizeof(S) == 8 ? 4 : 8;
template <typename S>
inline constexpr int plain_weight_grad_threads =
    plain_weight_grad_tile / plain_weight_grad_outputs<S> * (plain_weight_grad_tile / plain_weight_grad_outputs<S>);
// Rows of a split at most: 256 stages, whose sums are added one by one.
inline constexpr int64_t most_plain_weight_grad_rows = 8192;
inline constexpr int matrix_weight_grad_stages = 3;
// The matrix unit truncates when it adds: after so many rows, 1024 additions, a sum may have lost 2^-13 of its largest
// value, an eighth of what rounding to fp16 loses.
inline constexpr int64_t matrix_weight_grad_rows = 16384;

inline constexpr int64_t most_splits = 65535;  // along y of a grid

// Sums of the weight's gradient beside the scan backwards in time (Scan::weight_grad): dx and h are read once less.
// Whether the kernel of this plan makes them: of the tile, whose block adds up its columns in all frames.
inline bool sums_weights(const Scan& p, const ScanPlan& plan) {
  return plan.tile && plan.tile->padded_channels <= most_summed_channels && plan.tile->warps == tile_warps &&
         p.y.data && !p.scale && !p.norm.present() &&
         p.T * tile_warps * plan.tile->positions <= matrix_weight_grad_rows;
}

// Into how many parts the columns are cut by the kernel of this plan where it is to make them, else 0: fewer columns
// than for one block of every multiprocessor of a large GPU are spread over more of them without, and of few frames the
// parts' sums weigh as much as what they save. A function of shape and strides, so that the order of additions is, too.
inline int64_t fused_weight_grad_parts(const Scan& p, const ScanPlan& plan) {
  const bool enough = p.T >= 4 && plan.tile && plan.tile->blocks >= 128;
  return enough && sums_weights(p, plan) ? plan.tile->blocks : 0;
}

// Whether four channels from a multiple of four on are one aligned word, in every row.
inline bool weight_grad_words(const WeightGrad& p, const View& v) {
  const auto whole = [](int64_t size, int64_t stride) { return size == 1 || stride % 4 == 0; };
  return p.dtype == DType::f32 && v.c == 1 && p.C % 4 == 0 && reinterpret_cast<uintptr_t>(v.data) % 16 == 0 &&
         whole(p.N, v.n) && whole(p.T, v.t) && whole(p.H, v.h) && whole(p.W, v.w);
}

inline WeightGradPlan plan_weight_grad(const WeightGrad& p, const Gpu& gpu, Kernel kernel = Kernel::best) {
  WeightGradPlan plan;
  plan.rows = p.N * (p.first.data ? p.T : p.T - 1) * p.H * p.W;
  plan.small = plan.rows <= 0x7fffffff;
  plan.slots_at = 4 * weight_grad_depth * 8;
  const Words words = plan_words(p, {&p.dx, &p.h});
  plan.why_not_matrix = kernel == Kernel::plain ? "the plain kernel was asked for" : words.why_not;
  if (!plan.why_not_matrix) {
    plan.tile = p.C > 64 ? 128 : 64;
    plan.along_channels = words.along_channels;
    plan.slot_pitch = 2 * (plan.along_channels ? plan.tile : weight_grad_depth) + 16;  // an odd number of 16-byte words
    plan.slot_bytes = plan.slot_pitch * (plan.along_channels ? weight_grad_depth : plan.tile);
    plan.shared_bytes = plan.slots_at + 2 * matrix_weight_grad_stages * plan.slot_bytes;
    if (plan.shared_bytes > gpu.shared_bytes) plan.why_not_matrix = "too little shared memory";
  }
  const bool matrix = !plan.why_not_matrix;
  if (matrix) {
    plan.vector_bytes = words.bytes;
  } else {
    plan.tile = plain_weight_grad_tile;
    plan.shared_bytes = plan.slots_at + 4 * weight_grad_depth * (plan.tile + plain_lanes) * state_size(p.dtype);
    plan.dx_words = weight_grad_words(p, p.dx), plan.h_words = weight_grad_words(p, p.h);
  }
  const int64_t per_side = ceil_div(p.C, plan.tile);
  plan.tiles = per_side * per_side;
  // As many blocks as a large GPU holds at once, but none with less than eight stages of rows.
  int64_t splits = ceil_div(!matrix ? 792 : plan.tile == 128 ? 264 : 528, plan.tiles);
  const int64_t most = ceil_div(plan.rows, 8 * weight_grad_depth);
  if (splits > most) splits = most;
  const int64_t least = ceil_div(plan.rows, matrix ? matrix_weight_grad_rows : most_plain_weight_grad_rows);
  if (splits < least) splits = least;
  if (splits < 1) splits = 1;
  plan.rows_per_split = round_up(ceil_div(plan.rows, splits), weight_grad_depth);
  plan.splits = plan.rows == 0 ? 1 : ceil_div(plan.rows, plan.rows_per_split);
  plan.scratch_bytes = plan.splits > 1 ? plan.splits * p.C * p.C * state_size(p.dtype) : 0;
  return plan;
}

inline Text describe(const WeightGradPlan& plan) {
  const Text cut = to_text(plan.tiles) + " tiles of " + to_text(plan.tile) + " x " + to_text(plan.tile) + " x " +
                   to_text(plan.splits) + " splits of " + to_text(plan.rows_per_split) + " rows";
  if (plan.vector_bytes)
    return "matrix: " + cut + (plan.along_channels ? ", along channels by " : ", along columns by ") +
           to_text(plan.vector_bytes) + " bytes";
  return "plain: " + cut + (plan.dx_words && plan.h_words ? ", by words of channels" : "") +
         " (not the matrix unit: " + plan.why_not_matrix + ")";
}

}  // namespace rcu_ops::cuda
