// fast_gru: its steps as PyTorch operators (see bindings.h, and bindings_fast_gru.h for the other files).
//
// The products are PyTorch's own, called into memory laid out here, so that oneDNN or MKL and cuBLAS, the current
// stream and graph capture are used as everywhere in PyTorch; between two products stands one elementwise pass
// (common/fast_gru.h) of the tensors' device. There are two exceptions. Where a GPU can hold the weights in its shared
// memory (common/fast_gru_gpu_plan.h) one launch makes all steps between the products of all clips, forward or
// backward: every block with all weights, which then may make the products of x, too, or all blocks together with a
// share of them each; and few weights or few columns on the CPU are left to kernels that multiply by themselves
// (fast_gru::by_columns). Nothing depends on values, and nothing is read back from a device.
#include "bindings_fast_gru.h"

namespace rcu_ops::bindings::gru {

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> steps(const Problem& p, const Tensor& x, const Tensor& ux, const Tensor& uo,
                                                 const Tensor& w, const Tensor& vx, const Tensor& vo,
                                                 const std::optional<Tensor>& o0, bool save) {
  const Weights weight = split(ux, uo, w, vx, vo);
  Tensor o = empty_sequence(p, x, p.innermost), o_n = empty_state(p, x, p.state, p.innermost);
  Tensor hidden = empty_of(x, {0}), gates = empty_of(x, {0});
  if (save) hidden = empty_of(x, {2 * p.R * p.columns()}), gates = empty_of(x, {3 * p.C * p.columns()});
  const int64_t M = p.step_columns();
  if (M == 0) return {o, o_n, hidden, gates};
  const Tensor start = o0 ? *o0 : clip(x, 0);
#ifdef RCU_OPS_WITH_CUDA
  const bool in_kernel = p.by_blocks && p.steps > 0;
#else
  const bool in_kernel = false;
#endif
  if (!o0 && !in_kernel) copy(clip(o, 0), start);
  if (p.steps == 0) {
    copy(o_n, start);
    return {o, o_n, hidden, gates};
  }
  if (in_panels(p, x, M)) {
    steps_by_columns(p, x, {ux, uo, w, vx, vo}, start, save ? saved_in(p, hidden, gates) : Saved{}, o, o_n);
    return {o, o_n, hidden, gates};
  }
  if (in_fp32(p, x)) {
    const auto wide = [](const auto& tensor) { return in_type(tensor, ScalarType::Float); };
    const auto narrow = [&](const Tensor& tensor) { return in_type(tensor, p.scalar); };
    const auto found = steps(as_fp32(p), wide(x), wide(ux), wide(uo), wide(w), wide(vx), wide(vo), wide(o0), save);
    return {narrow(std::get<0>(found)), std::get<1>(found), narrow(std::get<2>(found)), narrow(std::get<3>(found))};
  }

#ifdef RCU_OPS_WITH_CUDA
  if (p.by_blocks) {
    Temporaries temporaries(p, x, 0);
    const auto all = [&](int64_t features) { return temporaries.take(features, p.columns(), p.scalar); };
    Saved s;
    if (save)
      s = saved_in(p, hidden, gates);
    else if (!p.by_blocks->makes_x)
      s = {all(2 * p.R), {}, {}, all(p.C)};
    if (!p.by_blocks->makes_x) {
      const Matrix inputs = as_matrix(p, clips(x, p.first, p.steps), temporaries);
      product(s.hidden, ux, inputs);
      product(s.candidate, vx, inputs);
    }
    steps_by_blocks(p, x, weight, w, s, save, start, o, o_n);
    return {o, o_n, hidden, gates};
  }
#endif
  const int64_t per_step = 3 * Temporaries::bytes_of(p.C, M, p.scalar) + Temporaries::bytes_of(p.C, M, p.state);
  const int64_t of_all =
      2 * Temporaries::bytes_of(p.C, p.columns(), p.scalar) + Temporaries::bytes_of(2 * p.R, p.columns(), p.scalar);
  Temporaries temporaries(p, x, per_step + of_all);
  const bool in_place = !p.copied() && (p.by_column || p.N == 1);  // the last state's memory is a matrix
  const Matrix state = in_place ? matrix_in(p, o_n, p.C, M) : temporaries.take(p.C, M, p.state);
  copy_sequence(state.sequence(p), as_sequence(start));
#ifdef RCU_OPS_WITH_CUDA
  if (p.persistent) {
    const auto all = [&](int64_t features) { return temporaries.take(features, p.columns(), p.scalar); };
    const Saved s = save ? saved_in(p, hidden, gates) : Saved{all(2 * p.R), {}, {}, all(p.C)};
    const Matrix inputs = as_matrix(p, clips(x, p.first, p.steps), temporaries);
    product(s.hidden, ux, inputs);
    product(s.candidate, vx, inputs);
    steps_in_one_launch(p, weight, w, s, save, state, o, temporaries);
    if (!in_place) copy_sequence(as_sequence(o_n), state.sequence(p));
    return {o, o_n, hidden, gates};
  }
#endif
  const bool one_type = p.state == p.scalar;
  const Matrix low = one_type ? state : temporaries.take(p.C, M, p.scalar);
  if (!one_type) copy_sequence(low.sequence(p), as_sequence(start));

  // A copy that the products of all clips have read is not read again: its memory serves the steps.
  const Tensor clips_in = clips(x, p.first, p.steps);
  const Matrix inputs = as_matrix(p, clips_in, temporaries);
  const int64_t spare = inputs.data == pointer(clips_in) ? 0 : p.steps;  // matrices of one step
  const auto of_step = [&](int64_t i) {
    if (i >= spare) return temporaries.take(p.C, M, p.scalar);
    Matrix m = inputs;
    m.data += i * p.C * M * m.element();
    m.columns = M;
    if (!m.by_column) m.pitch = M;
    return m;
  };
  const Matrix gated = of_step(0);
  const Products products(p, temporaries, x.is_cuda(), M);
  Saved s;
  if (save) {
    s = saved_in(p, hidden, gates);
  } else {  // r and z of one step at a time, r where its product with the state will be
    s.r = gated;
    s.z = of_step(1);
    s.hidden = temporaries.take(2 * p.R, p.columns(), p.scalar);
    s.candidate = temporaries.take(p.C, p.columns(), p.scalar);
  }
  product(s.hidden, ux, inputs);
  product(s.candidate, vx, inputs);
  for (int64_t k = 0; k < p.steps; ++k) {
    const Saved now{s.hidden.step(p, k), save ? s.r.step(p, k) : s.r, save ? s.z.step(p, k) : s.z,
                    s.candidate.step(p, k)};
    step(p, weight, low, state, now, products, gated, save, one_type ? Plane{} : low.plane(p),
         p.copied() ? Plane{} : plane_of(clip(o, p.first + k)));
    if (p.copied()) copy_sequence(clips(o, p.first + k, 1), low.sequence(p));
  }
  if (!in_place) copy_sequence(as_sequence(o_n), state.sequence(p));
  return {o, o_n, hidden, gates};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor x, Tensor ux, Tensor uo, Tensor w, Tensor vx, Tensor vo,
                                                   std::optional<Tensor> o0, bool save) {
  return steps(checked(x, ux, uo, w, vx, vo, o0), x, ux, uo, w, vx, vo, o0, save);
}

}  // namespace rcu_ops::bindings::gru

STABLE_TORCH_LIBRARY_IMPL(rcu_ops, CPU, m) {
  m.impl("fast_gru", TORCH_BOX(&rcu_ops::bindings::gru::forward));
  m.impl("fast_gru_backward", TORCH_BOX(&rcu_ops::bindings::gru::backward));
}

#ifdef RCU_OPS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(rcu_ops, CUDA, m) {
  m.impl("fast_gru", TORCH_BOX(&rcu_ops::bindings::gru::forward));
  m.impl("fast_gru_backward", TORCH_BOX(&rcu_ops::bindings::gru::backward));
}
#endif
