// nonlocal_gates: what the host code and every device's kernels agree on. Plain structs, no torch, no CUDA.
#pragma once

#include <cstdint>

#include "types.h"

namespace rcu_ops {

// Rows of numbers that lie one after the other: element (batch, gate, row, column) is at
// data[batch * this->batch + gate * this->gate + row * this->row + column]. Strides are in elements, any value
// including 0.
struct Rows {
  void* data = nullptr;  // absent: nullptr
  int64_t batch = 0, gate = 0, row = 0;
};

// A row of `count` numbers of `bytes` each, padded to whole lines of 64 bytes.
constexpr int64_t padded_row(int64_t count, int64_t bytes) {
  const int64_t line = 64 / bytes;
  return (count + line - 1) / line * line;
}

// out = w value for each of B samples and G gates, with w_ij from s_ij = scale query_i . key_j over the keys j that
// query i sees: softmax_j(s_ij), or s_ij / (number of those keys). A query that sees no key, or whose scores are all
// -inf under the softmax, is dead: its row of out is zero, and it takes no part in any gradient.
struct Relation {
  DType dtype = DType::f32;  // of query, key, value and out; sums are f64 for f64 and f32 otherwise
  int64_t B = 0, G = 1, N = 0, M = 0, D = 0, E = 0;
  Rows query, key, value;         // N, M, M rows of D, D, E numbers
  const uint8_t* mask = nullptr;  // nonzero: seen. Shared by the gates
  int64_t mask_batch = 0, mask_row = 0, mask_key = 0;
  double scale = 1;
  bool count = false;
};

struct Attention {
  Relation relation;
  Rows out;
};

// With g the gradient of out and p the weights: dp = g value^T, ds_ij = scale p_ij (dp_ij - sum_k p_ik dp_ik), or under
// count scale dp_ij / (number of keys seen); dquery = ds key, dkey = ds^T query, dvalue = p^T g. Outputs have the
// tensors' dtype.
struct AttentionGrad {
  Relation relation;
  Rows grad, dquery, dkey, dvalue;
};

// One step of the Relational LSTM: G = 4 gates i, f, o, g, N = M positions, a = x_gates + w value, then
//
//     i, f, o = sigmoid(a), g = tanh(a), c = f cell + i g, h = o tanh(c)
//
// h has the tensors' dtype, c the state's (f64 for f64, else f32), cell either.
//
// What its backward pass may have of it, in the state's dtype, on the CPU: the weights, and the pre-activations of the
// first kept_gates gates. weights is contiguous, its rows of N numbers padded with anything to whole lines of 64
// bytes; a dead query's are zeros.
struct Step {
  Relation relation;
  Rows x_gates, cell, h, c;
  bool cell_is_state = false;
  Rows weights = {}, gates = {};  // written; N rows of N (padded) and E numbers
  int64_t kept_gates = 0;
};

// Its backward pass: the gates again, all from the inputs or from what was left, dx_gates = da and dcell, then
// AttentionGrad with g = da.
struct StepGrad {
  Relation relation;
  // grad_h in the tensors' dtype, grad_c in the state's; at most one of them absent.
  Rows x_gates, cell, grad_h, grad_c;
  Rows dx_gates, dquery, dkey, dvalue, dcell;  // dcell in cell's dtype
  bool cell_is_state = false;
  Rows weights = {}, gates = {};  // as Step left them; gates not without weights
  int64_t kept_gates = 0;
};

namespace cpu {
void attend(const Attention& problem, const Parallel& parallel);
void attend_grad(const AttentionGrad& problem, const Parallel& parallel);
void step(const Step& problem, const Parallel& parallel);
void step_grad(const StepGrad& problem, const Parallel& parallel);
}  // namespace cpu

}  // namespace rcu_ops
