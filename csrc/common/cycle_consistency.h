// Soft nearest neighbours and cycle consistency: what the host code and every device's kernels agree on. No torch, no CUDA.
#pragma once

#include <cstdint>

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
};

// With d_ti = |a_t - b_i|^2 and z_t = softmax_i(-d_ti / temperature) over the frames that mask_b lets through:
enum class Align : int32_t {
  soft,           // soft_t = sum_i z_ti b_i, index_ab_t = argmin_i |soft_t - b_i|^2 (unless null)
  cycle,          // index_ab and, with a and b exchanged, index_ba; gate: all of both in place
  back,           // b has T frames and a's mask: log z_tt, mean and variance of i under z_t
  soft_backward,  // gradients da, db of soft for grad
  back_backward,  // gradients da, db of back for its three gradients
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
};

// Sequences of at most this many frames map to each other through the distances within them, sum_j z_tj |b_j - b_i|^2, which
// differ from |soft_t - b_i|^2 by the same number for every i; longer ones through the soft neighbour itself.
inline constexpr int64_t most_frames_through_distances = 64;

namespace cpu {
void align(const Alignment& problem, const Parallel& parallel);
}  // namespace cpu

}  // namespace rcu_ops
