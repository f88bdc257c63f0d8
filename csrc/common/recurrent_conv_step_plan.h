// recurrent_conv one frame at a time on a GPU: a single frame after a given state, and scans of 16-bit data with more
// channels than the other kernels hold. Pure functions of shapes, strides and the device's limits.
#pragma once

#include <cstdint>

#include "gpu.h"
#include "recurrent_conv.h"
#include "text.h"

namespace rcu_ops::cuda {

inline constexpr int step_threads = 128;
inline constexpr int plain_step_words_threads = 64;

// The same by the kernels that move words of contiguous channels alone, for launches after a given state. A block's
// columns are of one sample; where columns lie at even distances across samples, too, all of them count as one.
// Shared memory: all input channels of W, one row per output channel, and of the state in the arithmetic's type, one row
// per column, in rows of so many bytes; the block's scale and shift.
struct StepWordsPlan {
  bool possible = false;
  int samples = 0, positions = 0;
  int64_t blocks = 0;
  int64_t weight_pitch = 0, state_pitch = 0, state_at = 0, numbers_at = 0, shared_bytes = 0;
};

// A launch per frame; a block owns `outputs` output channels at `columns` columns.
struct StepScanPlan {
  bool matrix = false;  // 16-bit data on the matrix unit, else FMAs
  int outputs = 0, columns = 0;
  int depth = 0;  // input channels in shared memory at a time
  int64_t channel_blocks = 0, column_blocks = 0, blocks = 0;
  int64_t launches = 0;
  bool weight_vectors = false;  // rows of W can be copied in words of 16 bytes
  // Shared memory: the columns' offsets in x, y, residual, first, last; W and the state, of 16-bit numbers one row per
  // output channel and per column, pitch bytes apart, else two pieces of each with one row per input channel; the
  // block's values.
  int64_t weight_at = 0, state_at = 0, values_at = 0, shared_bytes = 0;
  int64_t pitch = 0;
  int64_t scratch_bytes = 0;  // states between launches
  StepWordsPlan words;
};

inline constexpr int plain_step_depth = 128;  // of one piece
inline constexpr int plain_step_outputs = 32, plain_step_columns = 16;

// The launches of a scan: the gradient of the first state is one more product.
inline int64_t step_launches(const Scan& p) { return p.T + (p.last_kind == Last::projected ? 1 : 0); }

// Whether all tensors have contiguous channels in rows that words of 16 bytes divide, and columns at even distances
// within a sample, of 31 bits. even: and across samples.
inline bool in_step_words(const Scan& p, bool& even) {
  constexpr int64_t most = 0x7fffffff;
  const int64_t positions = p.H * p.W;
  even = true;
  if (p.G != 1 || (p.W == 1 && p.H > 1) || (!p.x.data && !p.y.data) || p.N * positions > most - 64) return false;
  for (const View* v : {&p.x, &p.y, &p.residual, &p.first, &p.last}) {
    if (!v->data) continue;
    const int64_t numbers = 16 / element_size(v->dtype);
    const auto whole = [&](int64_t size, int64_t stride) { return size == 1 || stride % numbers == 0; };
    if (v->c != 1 || reinterpret_cast<uintptr_t>(v->data) % 16 != 0 || v->w < 0 || v->w > most) return false;
    if (!whole(p.N, v->n) || !whole(p.T, v->t) || !whole(p.H, v->h) || !whole(p.W, v->w)) return false;
    if (p.H > 1 && v->h != p.W * v->w) return false;
    even = even && (p.N == 1 || v->n == positions * v->w);
  }
  for (const View* v : {&p.first, &p.last})
    if (v->data && element_size(v->dtype) != state_size(p.dtype)) return false;
  return even || p.N <= 0xffff;
}

inline StepScanPlan plan_step_scan(const Scan& p, const Gpu& gpu) {
  const auto blocks_of = [](int64_t size, int64_t block) { return (size + block - 1) / block; };
  const int64_t columns = p.N * p.G * p.H * p.W, size = state_size(p.dtype);
  StepScanPlan plan;
  plan.matrix = p.dtype == DType::bf16 || p.dtype == DType::f16;
  // The larger tile reads a third of the bytes per product from L2, once it fills the GPU.
  const bool large = plan.matrix && blocks_of(columns, 64) * blocks_of(p.C, 64) >= gpu.multiprocessors;
  plan.outputs = large ? 64 : plain_step_outputs;
  plan.columns = large ? 64 : plain_step_columns;
  plan.channel_blocks = blocks_of(p.C, plan.outputs);
  plan.column_blocks = blocks_of(columns, plan.columns);
  plan.blocks = plan.channel_blocks * plan.column_blocks;
  plan.launches = step_launches(p);
  plan.weight_at = 5 * plan.columns * 8;
  if (plan.matrix) {
    const int most = large ? 256 : 512;
    plan.depth = p.C < most ? static_cast<int>((p.C + 15) / 16 * 16) : most;
    plan.pitch = 2 * plan.depth + 16;  // an odd number of 16-byte words: eight rows are spread over all banks
    plan.weight_vectors =
        p.weight_in == 1 && p.weight_out % 8 == 0 && p.C % 8 == 0 && reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
    plan.state_at = plan.weight_at + plan.outputs * plan.pitch;
    plan.values_at = plan.state_at + plan.columns * plan.pitch;
  } else {
    plan.depth = plain_step_depth;
    plan.state_at = plan.weight_at + 2 * plan.depth * (plan.outputs + 2) * size;
    plan.values_at = plan.state_at + 2 * plan.depth * plan.columns * size;
  }
  plan.shared_bytes = plan.values_at + plan.outputs * (plan.columns + 1) * size;
  StepWordsPlan& words = plan.words;
  bool even = false;
  words.possible = p.dtype != DType::f64 && p.weight_out >= 0 && p.weight_out <= 0x7fffffff &&
                   p.C % plan.outputs == 0 && plan.channel_blocks <= 0xffff && p.weight_in == 1 &&
                   p.weight_out * element_size(p.dtype) % 16 == 0 && reinterpret_cast<uintptr_t>(p.weight) % 16 == 0 &&
                   in_step_words(p, even);
  words.samples = static_cast<int>(even ? 1 : p.N);
  words.positions = static_cast<int>(even ? columns : p.H * p.W);
  words.blocks = words.samples * blocks_of(words.positions, plan.columns) * plan.channel_blocks;
  // Rows of W are an odd number of 16-byte words apart, and those of a state that is read by pairs 8 words of 4.
  words.weight_pitch = p.C * element_size(p.dtype) + 16;
  words.state_pitch = p.C * size + (plan.matrix ? 32 : 16);
  words.state_at = plan.outputs * words.weight_pitch;
  words.numbers_at = words.state_at + plan.columns * words.state_pitch;
  words.shared_bytes = words.numbers_at + 2 * plan.outputs * size;
  words.possible = words.possible && words.shared_bytes <= gpu.shared_bytes;
  plan.scratch_bytes = (plan.launches < 3 ? plan.launches - 1 : 2) * columns * p.C * size;
  return plan;
}

// Launch i of a scan, in the order of processing, as a scan of one frame. Its Last is state or none.
inline Scan step_of(const Scan& p, int64_t i, void* scratch) {
  const int64_t frames = step_launches(p), t = p.reverse ? p.T - 1 - i : i, states = p.N * p.G * p.C * p.H * p.W;
  const bool extra = i == p.T;
  Scan s = p;
  s.T = 1;
  const auto frame_of = [&](View& v) {
    v.data = !v.data || extra ? nullptr : static_cast<char*>(v.data) + t * v.t * element_size(v.dtype);
  };
  frame_of(s.x), frame_of(s.y), frame_of(s.residual);
  s.alpha = s.alpha_first = s.alpha_final = extra ? 1 : i == p.T - 1 ? p.alpha_final : i == 0 ? p.alpha_first : p.alpha;
  // States between launches lie as x does.
  const auto between = [&](int64_t index) {
    View v;
    v.dtype = p.dtype == DType::f64 ? DType::f64 : DType::f32;
    v.data = static_cast<char*>(scratch) + index % 2 * states * state_size(p.dtype);
    const bool channels = (p.x.data ? p.x : p.y).c == 1;
    v.c = channels ? 1 : p.H * p.W, v.w = channels ? p.C : 1, v.h = p.W * v.w, v.g = p.C * p.H * p.W, v.n = p.G * v.g;
    return v;
  };
  if (i > 0) {
    s.init = Init::state;
    s.first = between(i - 1);
  }
  s.last_kind = i < frames - 1 || p.last_kind != Last::none ? Last::state : Last::none;
  if (i < frames - 1) s.last = between(i);
  return s;
}

inline int64_t blocks_of(const StepScanPlan& plan) { return plan.words.possible ? plan.words.blocks : plan.blocks; }

inline Text describe(const StepScanPlan& plan) {
  return "step: " + (plan.launches > 1 ? to_text(plan.launches) + " launches of " : Text()) + to_text(blocks_of(plan)) +
         " blocks of " + to_text(plan.outputs) + " channels x " + to_text(plan.columns) + " columns" +
         (plan.matrix ? " on the matrix unit" : "") +
         (plan.words.possible ? ", by words of contiguous channels"
                              : ", " + to_text(plan.depth) + " input channels at a time");
}

}  // namespace rcu_ops::cuda
