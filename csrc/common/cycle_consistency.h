// Soft nearest neighbours and cycle consistency: what the host code and every device's kernels agree on. No torch, no
// CUDA.
#pragma once

#include <cstdint>

#include "gpu.h"
#include "text.h"
#include "types.h"

namespace rcu_ops {

// A strided [N, frames, C] tensor of the problem's dtype; strides in elements.
struct Sequence {
  const void* data = nullptr;
  int64_t n = 0, t = 0, c = 0;
};

// A strided [N, frames] mask of bytes, 1 where there is a frame; data == nullptr: everywhere.
struct FrameMask {
  const uint8_t* data = nullptr;
  int64_t n = 0, t = 0;
  RCU_OPS_DEVICE bool there(int64_t sample, int64_t frame) const { return !data || data[sample * n + frame * t]; }
  RCU_OPS_DEVICE bool any(int64_t sample, int64_t frames) const {
    bool found = !data;
    for (int64_t i = 0; !found && i < frames; ++i) found = there(sample, i);
    return found;
  }
};

// With d_ti = |a_t - b_i|^2 and z_t = softmax_i(-d_ti / temperature) over the frames that mask_b lets through:
enum class Align : int32_t {
  soft,           // soft_t = sum_i z_ti b_i, index_ab_t = argmin_i |soft_t - b_i|^2 (unless null)
  cycle,          // index_ab and, with a and b exchanged, index_ba; gate: all of both in place
  back,           // b has T frames and a's mask: log z_tt, mean and variance of i under z_t
  soft_backward,  // gradients da, db of soft for grad
  back_backward,  // gradients da, db of back for its three gradients
  // fp32 and fp64:
  loss,  // soft of a's frames (zeros for those that are not there), and the loss of its way back to a; of the
         // CPU's short sequences (AlignForm::within) also the gradients, where da is given, and no soft need be
  loss_backward,  // gradients da, db of loss for grad_loss, from soft
};

struct Alignment {
  Align kind = Align::soft;
  int64_t N = 0, T = 0, S = 0, C = 0;
  DType dtype = DType::f32;
  double temperature = 1;
  Sequence a, b, grad;  // [N,T,C], [N,S,C], [N,T,C]
  FrameMask mask_a, mask_b;
  // Contiguous [N,T] in the precision of sums (state_size): gradients of `back`, and its results.
  const void *grad_log_probability = nullptr, *grad_mean = nullptr, *grad_variance = nullptr;
  void *log_probability = nullptr, *mean = nullptr, *variance = nullptr;
  // Contiguous, in dtype: [N,T,C], [N,T,C], [N,S,C].
  void *soft = nullptr, *da = nullptr, *db = nullptr;
  int64_t *index_ab = nullptr, *index_ba = nullptr;  // contiguous [N,T], [N,S]
  uint8_t* gate = nullptr;                           // [N]

  // loss: [N,T] contiguous in the precision of sums; zero for frames that are not there, and for samples without frames
  // of b. back and back_backward have it in place of their three results where it is given.
  bool regression = true;  // or classification
  double variance_weight = 0, min_variance = 0;
  void* loss = nullptr;
  const void* grad_loss = nullptr;  // [N,T], strides in numbers
  int64_t grad_loss_n = 0, grad_loss_t = 0;
  void* d_soft = nullptr;  // loss_backward, but for the CPU's short sequences: room for [N,T,C]
  FrameMask mask_through;  // back: frames of the sequence between; a sample without any has no way back
  int64_t frames_through = 0;
  bool add_to_da = false;  // soft_backward: da is added to what is there
  // On CUDA devices: multiplications of a multiprocessor up to which soft and back take distances by differences however
  // long sequences are (ProductTiles in cycle_consistency_gpu_plan.h).
  int64_t most_by_differences = 1 << 18;
  // On the CPU: squared distances, times the square of the scale at which the kernel takes frames, in the precision of
  // sums. loss leaves and loss_backward takes rows [N,T][S + T]: of a's frames to b's, and of soft neighbours to a's.
  // soft and back leave, and their gradients take, rows of as many, the first S of which are theirs.
  void* distances = nullptr;
  int64_t distances_pitch = 0;
};

// How the CPU kernels find distances. By shape and dtype alone: what a result is does not depend on the data's size or
// threads.
enum class AlignForm : int32_t {
  // By differences, and nearest frames through the distances within a sequence, sum_j z_tj |b_j - b_i|^2, which differ
  // from |soft_t - b_i|^2 by the same number for every i.
  within,
  differences,  // by differences, nearest frames by those to the soft neighbour
  products,     // by products, those within the bound of their rounding by differences
};

inline constexpr int64_t most_frames_within = 64, least_channels_for_products = 16;

// Measured on two cores with AVX-512, fp32, 65 to 512 frames: products take 0.4 to 0.7 of the time of differences from
// 64 channels on where the weights are sharp, and 0.7 to 1.05 where they are broad; with 16 channels 0.9 to 1.1, and
// 1.2 to 1.5.
inline constexpr int64_t least_keys_for_products(int64_t C) { return C >= 64 ? most_frames_within + 1 : 96; }

inline AlignForm plan_alignment(Align kind, DType dtype, int64_t T, int64_t S, int64_t C) {
  const bool whole = kind == Align::cycle || kind == Align::loss || kind == Align::loss_backward;
  if (whole && T <= most_frames_within && S <= most_frames_within) return AlignForm::within;
  const int64_t keys = kind == Align::cycle ? (T < S ? T : S) : S;
  const bool products = dtype != DType::f64 && keys >= least_keys_for_products(C) && C >= least_channels_for_products;
  return products ? AlignForm::products : AlignForm::differences;
}
inline AlignForm plan_alignment(const Alignment& p) { return plan_alignment(p.kind, p.dtype, p.T, p.S, p.C); }

// The plan and its reason, in one sentence.
inline Text describe_alignment(Align kind, DType dtype, int64_t T, int64_t S, int64_t C) {
  if (kind == Align::loss || kind == Align::loss_backward) {
    if (plan_alignment(kind, dtype, T, S, C) == AlignForm::within)
      return "one pass over a sample, distances by differences: at most " + to_text(most_frames_within) + " frames";
    return "soft: " + describe_alignment(Align::soft, dtype, T, S, C) +
           "; back: " + describe_alignment(Align::back, dtype, T, T, C);
  }
  switch (plan_alignment(kind, dtype, T, S, C)) {
    case AlignForm::within:
      return "distances by differences, nearest frames through the distances within each sequence: at most " +
             to_text(most_frames_within) + " frames";
    case AlignForm::products:
      return "distances by products on centred frames, by differences within the bound of their rounding: at least " +
             to_text(least_keys_for_products(C)) + " frames of at least " + to_text(least_channels_for_products) +
             " channels";
    default: break;
  }
  return Text("distances by differences: ") +
         (dtype == DType::f64 ? "float64"
                              : "fewer than " + to_text(least_keys_for_products(C)) + " frames or " +
                                    to_text(least_channels_for_products) + " channels");
}

// ---- cycles of short sequences on CUDA devices ----------------------------------------------------------------------

// Frames of a, then of b, are one list; a block finds the distances between all of them over a range of channels.
struct ShortCycle {
  static constexpr int most_frames = 32, threads = 256;  // of each sequence; of a block
  static constexpr int channels = 128, most_stages = 3;  // of a stage; in shared memory at once
  static constexpr int tile = 4, entries = tile * tile;  // a thread owns tile x tile pairs
  static constexpr int64_t most_splits = 8;              // what a cluster may have on every device that has them
  static constexpr int64_t least_channels = 128;         // of a split
  // Channels from which on samples are split: what a cluster's barriers (est. 0.8 us) and a second launch (est. 3 us)
  // cost is less than what the splits save, at 3.5 us per 512 channels of 32 frames (est.).
  static constexpr int64_t worth_a_cluster = 512, worth_a_launch = 1024;

  int frames = 0, side = 0;   // of both sequences; tiles along the matrix of all pairs
  int tiles = 0, groups = 0;  // on or above the diagonal; of threads that share a stage's channels
  int numbers = 0;            // distances that a block has a place for, of pairs beyond the last frame too
  int64_t splits = 1, channels_per_split = 0;  // whole stages, but for the last split; the last ones may have none
  bool cluster = false;                        // splits are blocks of a cluster; otherwise a second launch adds them up
  int64_t partial_numbers = 0;                 // fp32, in memory between two launches

  static constexpr bool takes(const Alignment& p) {
    return p.kind == Align::cycle && p.dtype != DType::f64 && p.T <= most_frames && p.S <= most_frames;
  }

  // Blocks for every multiprocessor where samples are few, if there are channels enough to pay for adding them up.
  ShortCycle(int64_t N, int64_t T, int64_t S, int64_t C, const Gpu& gpu) : frames(static_cast<int>(T + S)) {
    side = (frames + tile - 1) / tile;
    tiles = side * (side + 1) / 2, groups = threads / tiles, numbers = entries * tiles;
    const int64_t wanted = N > 0 ? gpu.multiprocessors / N : 1, most = C / least_channels;
    if (C >= (gpu.sm90a ? worth_a_cluster : worth_a_launch))
      while (2 * splits <= wanted && 2 * splits <= most && splits < most_splits) splits *= 2;
    cluster = gpu.sm90a && splits > 1;
    channels_per_split = cuda::round_up(cuda::ceil_div(C, splits), channels);
    partial_numbers = splits > 1 && !cluster ? N * splits * numbers : 0;
  }

  // Row and column of a tile: row by row, from the diagonal on. Its pairs are of frames `row`, side + row, ... and
  // `column`, side + column, ..., so that threads with neighbouring tiles read neighbouring frames.
  static RCU_OPS_DEVICE constexpr void place(int number, int side, int& row, int& column) {
    row = 0;
    while (number >= side - row) number -= side - row, ++row;
    column = row + number;
  }
};

namespace cpu {
void align(const Alignment& problem, const Parallel& parallel);
// The da and db of `problem`, whose samples, frames and masks count: those given, contiguous, times `factor`, which is
// rounded to their dtype, fp32 or fp64. Zeros for frames without a gradient, whatever the factor.
void scale_gradients(const Alignment& problem, const void* da, const void* db, double factor, const Parallel& parallel);
}  // namespace cpu

}  // namespace rcu_ops
