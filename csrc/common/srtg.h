// The data path of an SRTG block: what the host code and every device's kernels agree on. No torch, no CUDA.
#pragma once

#include "recurrent_conv.h"

namespace rcu_ops {

enum class GatePass : int32_t {
  squeeze,   // sums[n][t][c] = mean over H, W of x
  mul,       // y = x h where the gate is open, x where it is closed
  add,       // y = x + h where the gate is open, x where it is closed
  backward,  // of mul: y = grad h, sums = sum over H, W of grad x; closed: y = grad, sums = 0
};

struct GateData {
  GatePass pass = GatePass::squeeze;
  int64_t N = 0, C = 0, T = 0, H = 0, W = 0;
  DType dtype = DType::f32;
  View x, y, grad;                // [N,C,T,H,W]; y overlaps nothing
  const void* h = nullptr;        // [N,T,C] contiguous, in the precision of sums (state_size)
  const uint8_t* gate = nullptr;  // [N], gate_stride apart; nullptr: open
  int64_t gate_stride = 0;
  void* sums = nullptr;  // [N,T,C] contiguous, in the precision of sums
};

// A frame's positions follow each other without gaps: [H,W] is a run of H W numbers.
inline bool planar(const GateData& p, const View& v) {
  return !v.data || ((p.W == 1 || v.w == 1) && (p.H == 1 || v.h == p.W));
}

// A position's channels follow each other.
inline bool channels_adjacent(const View& v) { return !v.data || v.c == 1; }

namespace cpu {
void gate_data_path(const GateData& problem, const Parallel& parallel);
}  // namespace cpu

}  // namespace rcu_ops
