// fast_gru: all steps in one call of own kernels, where they take the problem (bindings_fast_gru_problem.cpp).
#include "bindings_fast_gru.h"

namespace rcu_ops::bindings::gru {

namespace {

// A sequence as cpu::columns takes it, or a dense copy that `memory` keeps.
fast_gru::View view_of(const Problem& p, const Tensor& sequence, std::optional<Tensor>* memory = nullptr) {
  if (const auto view = view_in_place(sequence)) return *view;
  *memory = contiguous_of(sequence);
  return *view_in_place(**memory);
}

fast_gru::View view_of(const Problem& p, const Matrix& saved) {
  if (!saved.data) return {};
  const std::array<int64_t, 6> strides = saved.sequence_strides(p);
  return {saved.data, strides[0], strides[1], strides[2], saved.by_column ? saved.pitch : 1};
}

}  // namespace

void steps_by_columns(const Problem& p, const Tensor& x, std::array<Tensor, weights> given, const Tensor& start,
                      const Saved& s, const Tensor& o, const Tensor& o_n) {
  fast_gru::Columns all;
  all.dtype = p.dtype, all.start_dtype = dtype_of("o0", start);
  all.narrow = p.state != p.scalar;
  all.samples = p.N, all.positions = p.P, all.C = p.C, all.R = p.R, all.steps = p.steps;
  const float** places[weights] = {&all.ux, &all.uo, &all.w, &all.vx, &all.vo};
  for (int i = 0; i < weights; ++i) {
    given[i] = contiguous_of(given[i]);
    *places[i] = static_cast<const float*>(pointer(given[i]));
  }
  std::optional<Tensor> copies[2];
  all.x = view_of(p, clips(x, p.first, p.steps), &copies[0]);
  all.start = view_of(p, as_sequence(start), &copies[1]);
  all.out = view_of(p, clips(o, p.first, p.steps));
  all.last = view_of(p, as_sequence(o_n));
  all.hidden = view_of(p, s.hidden), all.r = view_of(p, s.r), all.z = view_of(p, s.z),
  all.candidate = view_of(p, s.candidate);
  cpu::columns(all, cpu_threads());
}

void gradients_by_columns(const Problem& p, const Tensor& x, std::array<Tensor, weights> given,
                          const std::optional<Tensor>& o0, const Tensor& o, const Saved& s,
                          const std::optional<Tensor>& grad_o, const std::optional<Tensor>& grad_o_n, const Tensor& dx,
                          const Tensor& do0, const std::array<Tensor, weights>& d) {
  fast_gru::ColumnsGradients all;
  all.dtype = p.dtype, all.start_dtype = o0 ? dtype_of("o0", *o0) : p.dtype;
  all.samples = p.N, all.positions = p.P, all.C = p.C, all.R = p.R, all.steps = p.steps;
  const void** places[weights] = {&all.ux, &all.uo, &all.w, &all.vx, &all.vo};
  for (int i = 0; i < weights; ++i) {
    given[i] = contiguous_of(given[i]);
    *places[i] = pointer(given[i]);
  }
  std::optional<Tensor> copies[6];
  all.x = view_of(p, clips(x, p.first, p.steps), &copies[0]);
  all.hidden = view_of(p, s.hidden), all.r = view_of(p, s.r), all.z = view_of(p, s.z),
  all.candidate = view_of(p, s.candidate);
  all.start = view_of(p, o0 ? as_sequence(*o0) : clips(o, 0, 1), &copies[1]);
  all.before = view_of(p, clips(o, p.first, p.steps), &copies[2]);
  if (grad_o) all.grad = view_of(p, clips(*grad_o, p.first, p.steps), &copies[3]);
  if (grad_o_n) all.d_last = view_of(p, as_sequence(*grad_o_n), &copies[4]);
  if (o0) {
    all.d_start = view_of(p, as_sequence(do0));
  } else if (dx.numel() > 0) {
    all.d_start = view_of(p, clips(dx, 0, 1));
    if (grad_o) all.grad_start = view_of(p, clips(*grad_o, 0, 1), &copies[5]);
  }
  if (dx.numel() > 0) all.dx = view_of(p, clips(dx, p.first, p.steps));
  if (d[0].numel() > 0) {
    void** to[weights] = {&all.dux, &all.duo, &all.dw, &all.dvx, &all.dvo};
    for (int i = 0; i < weights; ++i) *to[i] = pointer(d[static_cast<size_t>(i)]);
  }
  cpu::gradients(all, cpu_threads());
}

#ifdef RCU_OPS_WITH_CUDA
void steps_in_one_launch(const Problem& p, const Weights& w, const Tensor& w_both, const Saved& s, bool save,
                         const Matrix& state, const Tensor& o, Temporaries& temporaries) {
  const Tensor uo = contiguous_of(w.uo), vo = contiguous_of(w.vo);
  const Tensor both = contiguous_of(w_both);
  fast_gru::Steps steps;
  steps.dtype = p.dtype;
  steps.rows = p.step_columns(), steps.C = p.C, steps.R = p.R, steps.steps = p.steps, steps.positions = p.P;
  steps.uo = pointer(uo), steps.w = pointer(both), steps.vo = pointer(vo);
  steps.hidden = s.hidden.data, steps.candidate = s.candidate.data, steps.r = s.r.data, steps.z = s.z.data;
  steps.save = save;
  steps.state = reinterpret_cast<float*>(state.data);
  const Tensor now = clips(o, p.first, p.steps);
  const Matrix out = p.copied() ? temporaries.take(p.C, p.columns(), p.scalar) : Matrix{};
  steps.out = p.copied() ? out.data : pointer(now);
  steps.out_sample = p.copied() ? p.P * p.C : now.stride(0);
  steps.out_step = p.copied() ? p.step_columns() * p.C : now.stride(1);
  launch_on_gpu(
      steps, o, [&](const fast_gru::Steps&) { return cuda::Scratch{p.persistent->scratch_bytes, {}}; },
      [&](const fast_gru::Steps& all, void* scratch, CUstream_st* stream) {
        return cuda::steps(all, *p.persistent, scratch, stream);
      });
  if (p.copied()) copy(now, out.sequence(p));
}

void steps_by_blocks(const Problem& p, const Tensor& x, const Weights& w, const Tensor& w_both, const Saved& s,
                     bool save, const Tensor& start, const Tensor& o, const Tensor& o_n) {
  const Tensor uo = contiguous_of(w.uo), vo = contiguous_of(w.vo);
  const Tensor ux = contiguous_of(w.ux), vx = contiguous_of(w.vx);
  const Tensor both = contiguous_of(w_both);
  std::optional<Tensor> copied, copied_x;
  fast_gru::ColumnSteps all;
  all.dtype = p.dtype, all.start_dtype = dtype_of("o0", start);
  all.samples = p.N, all.positions = p.P, all.C = p.C, all.R = p.R, all.steps = p.steps;
  all.uo = pointer(uo), all.w = pointer(both), all.vo = pointer(vo);
  all.hidden = view_of(p, s.hidden), all.candidate = view_of(p, s.candidate);
  all.r = view_of(p, s.r), all.z = view_of(p, s.z);
  all.save = save;
  if (p.by_blocks->makes_x) {
    all.ux = pointer(ux), all.vx = pointer(vx);
    all.x = view_of(p, clips(x, p.first, p.steps), &copied_x);
  }
  all.start = view_of(p, as_sequence(start), &copied);
  all.out = view_of(p, clips(o, p.first, p.steps));
  all.last = view_of(p, as_sequence(o_n));
  if (p.first > 0) all.first = view_of(p, clips(o, 0, p.first));
  launch_on_gpu(
      all, o, [](const fast_gru::ColumnSteps&) { return cuda::Scratch{}; },
      [&](const fast_gru::ColumnSteps& problem, void*, CUstream_st* stream) {
        return cuda::column_steps(problem, *p.by_blocks, stream);
      });
}

void gradients_in_one_launch(const Problem& p, const fast_gru::PersistentPlan& plan, const Weights& w,
                             const Tensor& w_both, const Saved& s, const Matrix& before,
                             const std::optional<Tensor>& grad_o, const Matrix& carry, const Gradients& d) {
  const Tensor uo = contiguous_of(w.uo), vo = contiguous_of(w.vo);
  const Tensor both = contiguous_of(w_both);
  fast_gru::StepsBackward steps;
  steps.dtype = p.dtype;
  steps.rows = p.step_columns(), steps.C = p.C, steps.R = p.R, steps.steps = p.steps, steps.positions = p.P;
  steps.uo = pointer(uo), steps.w = pointer(both), steps.vo = pointer(vo);
  steps.hidden = s.hidden.data, steps.r = s.r.data, steps.z = s.z.data, steps.candidate = s.candidate.data;
  steps.before = before.data;
  if (grad_o) {
    const Tensor grad = clips(*grad_o, p.first, p.steps);
    steps.grad = pointer(grad), steps.grad_sample = grad.stride(0), steps.grad_step = grad.stride(1);
  }
  steps.carry = reinterpret_cast<float*>(carry.data);
  steps.dc = d.dc.data, steps.dr = d.dr.data, steps.dz = d.dz.data, steps.du = d.du.data, steps.gated = d.gated.data;
  launch_on_gpu(
      steps, uo, [&](const fast_gru::StepsBackward&) { return cuda::Scratch{plan.scratch_bytes, {}}; },
      [&](const fast_gru::StepsBackward& all, void* scratch, CUstream_st* stream) {
        return cuda::steps_backward(all, plan, scratch, stream);
      });
}

void gradients_by_blocks(const Problem& p, const fast_gru::ColumnsPlan& plan, const Weights& w, const Tensor& w_both,
                         const Saved& s, const Matrix& before, const std::optional<Tensor>& grad_o, const Matrix& carry,
                         const Gradients& d) {
  const Tensor uo = contiguous_of(w.uo), vo = contiguous_of(w.vo);
  const Tensor both = contiguous_of(w_both);
  fast_gru::ColumnStepsBackward all;
  all.dtype = p.dtype;
  all.samples = p.N, all.positions = p.P, all.C = p.C, all.R = p.R, all.steps = p.steps;
  all.uo = pointer(uo), all.w = pointer(both), all.vo = pointer(vo);
  all.hidden = view_of(p, s.hidden), all.r = view_of(p, s.r), all.z = view_of(p, s.z),
  all.candidate = view_of(p, s.candidate), all.before = view_of(p, before);
  if (grad_o) all.grad = view_of(p, clips(*grad_o, p.first, p.steps));
  all.carry = view_of(p, carry);
  all.dc = view_of(p, d.dc), all.dr = view_of(p, d.dr), all.dz = view_of(p, d.dz), all.du = view_of(p, d.du),
  all.gated = view_of(p, d.gated);
  launch_on_gpu(
      all, uo, [](const fast_gru::ColumnStepsBackward&) { return cuda::Scratch{}; },
      [&](const fast_gru::ColumnStepsBackward& problem, void*, CUstream_st* stream) {
        return cuda::column_steps_backward(problem, plan, stream);
      });
}
#endif

}  // namespace rcu_ops::bindings::gru
