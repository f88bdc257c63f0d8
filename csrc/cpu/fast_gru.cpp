// fast_gru on the CPU: choice of instruction set, and the pass cut into tasks.
#include "../common/cpu_isa.h"
#include "fast_gru_kernels.h"

namespace rcu_ops::cpu {
namespace {

using Range = void (*)(const fast_gru::Elementwise&, int64_t, int64_t);

struct Kernels {
  Range range;
  void (*widen)(float*, const void*, DType, int64_t, int64_t);
  void (*reorder)(const fast_gru::Reorder&, int64_t, int64_t);
  void (*columns)(const fast_gru::Columns&, int64_t, int64_t, float*);
  void (*phase)(const fast_gru::Columns&, fast_gru::Phase, int64_t, int64_t, int64_t, int64_t, int64_t, float*, float*);
  void (*gradients_weights)(const fast_gru::ColumnsGradients&, float*);
  void (*gradients)(const fast_gru::ColumnsGradients&, int64_t, int64_t, int64_t, float*, const float*, float*);
  void (*gradients_sum)(const fast_gru::ColumnsGradients&, float*, int64_t, int64_t, int64_t, int64_t);
  int lanes;           // of a vector of fp32
  bool pairs = false;  // columns and phase take weights of bf16 as they lie
};

Kernels best_kernels() {
#if defined(__x86_64__)
  const Isa isa = current_isa();
  if (isa >= Isa::avx512)
    return {avx512::elementwise_range, avx512::widen_range,   avx512::reorder_range,
            avx512::columns_task,      avx512::columns_phase, avx512::gradients_weights,
            avx512::gradients_task,    avx512::gradients_sum, 16};
  if (isa == Isa::avx2)
    return {avx2::elementwise_range, avx2::widen_range,   avx2::reorder_range,
            avx2::columns_task,      avx2::columns_phase, avx2::gradients_weights,
            avx2::gradients_task,    avx2::gradients_sum, 8};
#else
  current_isa();  // an RCU_OPS_CPU_ISA that cannot run is an error here too
#endif
  return {portable::elementwise_range, portable::widen_range,   portable::reorder_range,
          portable::columns_task,      portable::columns_phase, portable::gradients_weights,
          portable::gradients_task,    portable::gradients_sum, 4};
}

// Smaller ranges are not worth waking a thread for: about 10 us of work.
constexpr int64_t task_elements = 16384;
// Tasks that share `elements`, `most` at most.
int64_t tasks_of(int64_t elements, int64_t most) {
  const int64_t count = elements / task_elements < most ? elements / task_elements : most;
  return count < 1 ? 1 : count;
}

struct Tasks {
  fast_gru::Elementwise pass;
  Range range;
  int64_t count, total;
};

Kernels column_kernels([[maybe_unused]] DType weights) {
  Kernels kernels = best_kernels();
#if defined(__x86_64__)
  if (weights == DType::bf16 && current_isa() == Isa::avx512_bf16) {
    kernels.columns = avx512_bf16::columns_task, kernels.phase = avx512_bf16::columns_phase, kernels.pairs = true;
    kernels.gradients_weights = avx512_bf16::gradients_weights, kernels.gradients = avx512_bf16::gradients_task;
  }
#endif
  return kernels;
}

}  // namespace

void elementwise(const fast_gru::Elementwise& pass, const Parallel& parallel) {
  Tasks tasks{pass, best_kernels().range, 1, fast_gru::elements(pass)};
  if (pass.dtype == DType::f64) tasks.range = portable::elementwise_range;  // for gradient checks: no other has it
  if (tasks.total == 0) return;
  fast_gru::merge(tasks.pass);
  tasks.count = tasks_of(tasks.total, parallel.threads);
  parallel.run(
      parallel.pool, tasks.count,
      [](void* context, int64_t i) {
        const Tasks& t = *static_cast<const Tasks*>(context);
        // Whole cache lines, so that no two tasks write one.
        const auto bound = [&](int64_t task) { return task == t.count ? t.total : t.total * task / t.count / 64 * 64; };
        t.range(t.pass, bound(i), bound(i + 1));
      },
      &tasks);
}

void reorder(const fast_gru::Reorder& problem, const Parallel& parallel) {
  struct Tasks {
    const fast_gru::Reorder& problem;
    const Kernels kernels;
    int64_t units, count;
  } tasks{problem, best_kernels(), fast_gru::reorder_units(problem), 1};
  if (tasks.units == 0 || problem.positions == 0) return;
  tasks.count = tasks_of(problem.samples * problem.steps * problem.channels * problem.positions,
                         tasks.units < parallel.threads ? tasks.units : parallel.threads);
  parallel.run(
      parallel.pool, tasks.count,
      [](void* context, int64_t i) {
        const Tasks& t = *static_cast<const Tasks*>(context);
        t.kernels.reorder(t.problem, t.units * i / t.count, t.units * (i + 1) / t.count);
      },
      &tasks);
}

// ---- columns through all steps -----------------------------------------------------------------------------------

namespace {

constexpr int64_t unit_rows = 16;  // outputs that tasks share by: whole blocks of every instruction set

// A weight of `size` numbers as fp32: as it is, or in `to`, which moves on.
const float* widened(const float* weight, DType dtype, int64_t size, float*& to, const Kernels& kernels,
                     const Parallel& parallel) {
  struct Widening {
    float* to;
    const void* from;
    DType dtype;
    int64_t size, count;
    const Kernels& kernels;
  } all{to, weight, dtype, size, (size + 8 * task_elements - 1) / (8 * task_elements), kernels};
  parallel.run(
      parallel.pool, all.count,
      [](void* context, int64_t i) {
        const Widening& w = *static_cast<const Widening*>(context);
        const int64_t end = (i + 1) * 8 * task_elements;
        w.kernels.widen(w.to, w.from, w.dtype, i * 8 * task_elements, end < w.size ? end : w.size);
      },
      &all);
  to += (size + 15) / 16 * 16;
  return all.to;
}

}  // namespace

// Many weights: tasks share a phase's outputs, for all columns.
static void columns_together(const fast_gru::Columns& problem, const Parallel& parallel) {
  struct All {
    const fast_gru::Columns& p;
    const Kernels kernels;
    fast_gru::Phase phase;
    int64_t step, thin, width, count;
    float* panels;
  } all{problem, column_kernels(problem.narrow ? problem.dtype : DType::f32), {}, 0, 0, 0, 0, nullptr};
  const int64_t columns = problem.samples * problem.positions;
  const int lanes = all.kernels.lanes;
  const int64_t rest = columns % lanes;
  if (rest <= fast_gru::most_thin(lanes)) all.thin = rest;
  const int64_t whole = columns - all.thin;
  all.width = lanes * fast_gru::panel_vectors(whole, lanes, 1);
  const int64_t padded = (whole + all.width - 1) / all.width * all.width + all.thin;
  const int64_t numbers = fast_gru::panel_numbers(problem.C, problem.R, padded);
  all.panels = static_cast<float*>(scratch(0, static_cast<size_t>(numbers) * sizeof(float)));
  for (all.step = 0; all.step < problem.steps; ++all.step)
    for (const fast_gru::Phase phase : fast_gru::phases) {
      all.phase = phase;
      const int64_t units = (fast_gru::phase_outputs(problem, phase) + unit_rows - 1) / unit_rows;
      all.count = units < parallel.threads ? units : parallel.threads;
      parallel.run(
          parallel.pool, all.count,
          [](void* context, int64_t i) {
            const All& a = *static_cast<const All*>(context);
            const int64_t outputs = fast_gru::phase_outputs(a.p, a.phase),
                          pieces = (outputs + unit_rows - 1) / unit_rows;
            const auto bound = [&](int64_t task) {
              return task == a.count ? outputs : pieces * task / a.count * unit_rows;
            };
            const int64_t wide = a.p.narrow && !a.kernels.pairs ? fast_gru::wide_numbers(a.p.C, a.p.R) : 0;
            a.kernels.phase(a.p, a.phase, a.step, bound(i), bound(i + 1), a.thin, a.width, a.panels,
                            static_cast<float*>(scratch(1, static_cast<size_t>(wide) * sizeof(float))));
          },
          &all);
    }
}

void columns(const fast_gru::Columns& problem, const Parallel& parallel) {
  struct All {
    fast_gru::Columns p;
    Kernels kernels;
    int64_t columns, width;  // of all samples, and of a panel
  } all{problem, column_kernels(problem.narrow ? problem.dtype : DType::f32), 0, 0};
  fast_gru::Columns& p = all.p;
  if (p.samples == 0 || p.positions == 0) return;
  if (!fast_gru::few_weights(p.C, p.R)) return columns_together(p, parallel);
  if (p.narrow && !all.kernels.pairs) {
    const int64_t sizes[] = {2 * p.R * p.C, 2 * p.R * p.C, 2 * p.C * p.R, p.C * p.C, p.C * p.C};
    const float** weights[] = {&p.ux, &p.uo, &p.w, &p.vx, &p.vo};
    int64_t numbers = 0;
    for (const int64_t size : sizes) numbers += (size + 15) / 16 * 16;
    float* to = static_cast<float*>(scratch(0, static_cast<size_t>(numbers) * sizeof(float)));
    for (int i = 0; i < 5; ++i) *weights[i] = widened(*weights[i], p.dtype, sizes[i], to, all.kernels, parallel);
    p.narrow = false;
  }
  all.columns = p.samples * p.positions;
  all.width = all.kernels.lanes * fast_gru::panel_vectors(all.columns, all.kernels.lanes, parallel.threads);
  parallel.run(
      parallel.pool, (all.columns + all.width - 1) / all.width,
      [](void* context, int64_t i) {
        const All& a = *static_cast<const All*>(context);
        const int64_t first = i * a.width, left = a.columns - first,
                      numbers = fast_gru::panel_numbers(a.p.C, a.p.R, a.width);
        a.kernels.columns(a.p, first, left < a.width ? left : a.width,
                          static_cast<float*>(scratch(1, static_cast<size_t>(numbers) * sizeof(float))));
      },
      &all);
}

// ---- gradients by columns ----------------------------------------------------------------------------------------

void gradients(const fast_gru::ColumnsGradients& problem, const Parallel& parallel) {
  struct All {
    const fast_gru::ColumnsGradients& p;
    const Kernels kernels;
    int64_t columns, numbers;  // of all samples; of all weights
    fast_gru::GradientUnits units;
    float *weights, *sums;
    int64_t rows, count;  // of all weights, and tasks that share them
  } all{problem,
        column_kernels(problem.dtype),
        problem.samples * problem.positions,
        fast_gru::weight_numbers(problem.C, problem.R),
        {},
        nullptr,
        nullptr,
        4 * problem.R + 4 * problem.C,
        0};
  all.units = fast_gru::gradient_units(all.columns, problem.C, problem.R);
  const bool need_weights = problem.dux != nullptr;
  const int64_t numbers = all.numbers * (1 + (need_weights ? all.units.count : 0));
  all.weights = static_cast<float*>(scratch(0, static_cast<size_t>(numbers) * sizeof(float)));
  if (need_weights) all.sums = all.weights + all.numbers;
  all.kernels.gradients_weights(problem, all.weights);
  parallel.run(
      parallel.pool, all.units.count,
      [](void* context, int64_t i) {
        const All& a = *static_cast<const All*>(context);
        const int64_t of_unit = a.units.panels * a.units.width, first = i * of_unit, left = a.columns - first;
        const int64_t own = fast_gru::gradient_numbers(a.p.C, a.p.R, a.units.width);
        a.kernels.gradients(a.p, first, left < of_unit ? left : of_unit, a.units.width,
                            static_cast<float*>(scratch(1, static_cast<size_t>(own) * sizeof(float))), a.weights,
                            a.sums ? a.sums + i * a.numbers : nullptr);
      },
      &all);
  if (!need_weights) return;
  all.count = tasks_of(all.numbers * all.units.count, parallel.threads);
  parallel.run(
      parallel.pool, all.count,
      [](void* context, int64_t i) {
        const All& a = *static_cast<const All*>(context);
        a.kernels.gradients_sum(a.p, a.sums, a.units.count, a.numbers, a.rows * i / a.count,
                                a.rows * (i + 1) / a.count);
      },
      &all);
}

}  // namespace rcu_ops::cpu
