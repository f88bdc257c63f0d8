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

// One element of a step, or of its backward pass, from the relations of its four gates.
template <typename S>
__device__ __forceinline__ void update_cell(const Forward& p, int64_t b, int64_t n, int64_t channel,
                                            const S (&relation)[4]) {
  const DType dtype = p.relation.dtype, state = sizeof(S) == 8 ? DType::f64 : DType::f32,
              cell = p.cell_is_state ? state : dtype;
  const auto place = [&](const Rows& rows) { return b * rows.batch + n * rows.row + channel; };
  S a[4];
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) {
    a[gate] = relation[gate] + load_number<S>(p.x_gates.data, dtype, place(p.x_gates) + gate * p.x_gates.gate);
    a[gate] = gate < 3 ? sigmoid(a[gate]) : tanh(a[gate]);
  }
  const S before = load_number<S>(p.cell.data, cell, place(p.cell)), after = a[1] * before + a[0] * a[3],
          squashed = tanh(after);
  if (!p.dx_gates.data) {
    store_number<S>(p.c.data, state, place(p.c), after);
    store_number<S>(p.h.data, dtype, place(p.h), a[2] * squashed);
    return;
  }
  const S dh = p.grad_h.data ? load_number<S>(p.grad_h.data, dtype, place(p.grad_h)) : S(0);
  S dc = dh * a[2] * (1 - squashed * squashed);
  if (p.grad_c.data) dc += load_number<S>(p.grad_c.data, state, place(p.grad_c));
  const S da[4] = {dc * a[3] * a[0] * (1 - a[0]), dc * before * a[1] * (1 - a[1]), dh * squashed * a[2] * (1 - a[2]),
                   dc * a[0] * (1 - a[3] * a[3])};
#pragma unroll
  for (int gate = 0; gate < 4; ++gate)
    store_number<S>(p.dx_gates.data, dtype, place(p.dx_gates) + gate * p.dx_gates.gate, da[gate]);
  store_number<S>(p.dcell.data, cell, place(p.dcell), dc * a[1]);
}

}  // namespace rcu_ops::cuda
