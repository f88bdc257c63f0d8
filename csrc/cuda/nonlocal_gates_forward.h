// What the forward kernels of nonlocal_gates share: the problem as they get it, numbers of any dtype, and the cell
// update.
#pragma once

#include "common/nonlocal_gates.h"
#include "cuda/device/convert.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

// Whose results a kernel writes: of Attention (gates = 1: out), of Step (gates = 4: h and c), or, with dx_gates, the
// first part of StepGrad: dx_gates and dcell.
struct Forward {
  Relation relation;
  int gates = 1;
  Rows out, x_gates, cell, h, c, grad_h, grad_c, dx_gates, dcell;
  bool cell_is_state = false;
};

inline Forward forward_of(const Attention& p) {
  Forward f;
  f.relation = p.relation, f.out = p.out;
  return f;
}
inline Forward forward_of(const Step& p) {
  Forward f;
  f.relation = p.relation, f.gates = 4;
  f.x_gates = p.x_gates, f.cell = p.cell, f.cell_is_state = p.cell_is_state, f.h = p.h, f.c = p.c;
  return f;
}
inline Forward forward_of(const StepGrad& p) {
  Forward f;
  f.relation = p.relation, f.gates = 4;
  f.x_gates = p.x_gates, f.cell = p.cell, f.cell_is_state = p.cell_is_state;
  f.grad_h = p.grad_h, f.grad_c = p.grad_c, f.dx_gates = p.dx_gates, f.dcell = p.dcell;
  return f;
}

// Calls function(T()) with the type of `dtype`, which is double where S is, and float, bf16 or half where S is float.
template <typename S, typename Function>
__device__ __forceinline__ void with_numbers(DType dtype, Function function) {
  if constexpr (sizeof(S) == 8)
    function(double());
  else if (dtype == DType::f32)
    function(float());
  else if (dtype == DType::bf16)
    function(__nv_bfloat16());
  else
    function(__half());
}

template <typename S>
__device__ __forceinline__ S sigmoid(S x) {
  return 1 / (1 + exp(-x));
}

// One element of a step: a, its gates before their nonlinearities, and the cell before it.
template <typename S>
struct Cell {
  S gate[4], before, after, squashed;
  __device__ __forceinline__ Cell(const S (&a)[4], S cell) : before(cell) {
#pragma unroll
    for (int i = 0; i < 4; ++i) gate[i] = i < 3 ? sigmoid(a[i]) : tanh(a[i]);
    after = gate[1] * before + gate[0] * gate[3];
    squashed = tanh(after);
  }
  __device__ __forceinline__ S h() const { return gate[2] * squashed; }
  // da, and returns the gradient of `before`; from those of h and `after`.
  __device__ __forceinline__ S gradients(S dh, S dafter, S (&da)[4]) const {
    const S dc = dh * gate[2] * (1 - squashed * squashed) + dafter;
    da[0] = dc * gate[3] * gate[0] * (1 - gate[0]);
    da[1] = dc * before * gate[1] * (1 - gate[1]);
    da[2] = dh * squashed * gate[2] * (1 - gate[2]);
    da[3] = dc * gate[0] * (1 - gate[3] * gate[3]);
    return dc * gate[1];
  }
};

// The same in memory, from the relations of its four gates: a step, or its backward pass.
template <typename S>
__device__ __forceinline__ void update_cell(const Forward& p, int64_t b, int64_t n, int64_t channel,
                                            const S (&relation)[4]) {
  const DType dtype = p.relation.dtype, state = sizeof(S) == 8 ? DType::f64 : DType::f32,
              cell = p.cell_is_state ? state : dtype;
  const auto place = [&](const Rows& rows) { return b * rows.batch + n * rows.row + channel; };
  S a[4];
#pragma unroll
  for (int gate = 0; gate < 4; ++gate)
    a[gate] = relation[gate] + load_number<S>(p.x_gates.data, dtype, place(p.x_gates) + gate * p.x_gates.gate);
  const Cell<S> at(a, load_number<S>(p.cell.data, cell, place(p.cell)));
  if (!p.dx_gates.data) {
    store_number<S>(p.c.data, state, place(p.c), at.after);
    store_number<S>(p.h.data, dtype, place(p.h), at.h());
    return;
  }
  S da[4];
  const S dcell = at.gradients(p.grad_h.data ? load_number<S>(p.grad_h.data, dtype, place(p.grad_h)) : S(0),
                               p.grad_c.data ? load_number<S>(p.grad_c.data, state, place(p.grad_c)) : S(0), da);
#pragma unroll
  for (int gate = 0; gate < 4; ++gate)
    store_number<S>(p.dx_gates.data, dtype, place(p.dx_gates) + gate * p.dx_gates.gate, da[gate]);
  store_number<S>(p.dcell.data, cell, place(p.dcell), dcell);
}

}  // namespace rcu_ops::cuda
