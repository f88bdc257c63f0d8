// fast_gru on the matrix unit, all steps forward or backward in one cooperative launch of blocks alone.
#include "cuda/fast_gru_steps.h"

namespace rcu_ops::cuda {
namespace {

// See all_steps.
__global__ void __launch_bounds__(threads, 1)
    fast_gru_steps(const Steps p, const PersistentPlan plan, unsigned char* scratch) {
  all_steps<false>(p, plan, scratch);
}

// All steps from the last to the first (common/fast_gru.h: StepsBackward), bf16 or fp16; M <= 64 rows.
//
// Layout.   As fast_gru_steps: what blocks exchange (dc, dz, dr, du of a step) lies padded in scratch memory; what the
//           weights' gradients are made of afterwards is written beside it, for all steps, by the same owner.
// Work.     A block keeps its outputs' weights of V_o^T, U_o^T and W^T (Share): features of C for q = V_o^T dc and
//           U_o^T du, and hidden units for du, those of r' from dr and those of z' from dz. The thread that owns a pair
//           keeps the gradient of its state in fp32 in registers for all steps.
// Order.    Three grid barriers per step: dc, dz -> | q and dr -> | du -> |, and U_o^T du joins the gradient of the
//           state before. z's half of du needs nobody's dr and is computed after arriving at the second one; gates and
//           states are read ahead of the first and third. dc, dz and dr of a step were read before the barrier before
//           they are rewritten, and so was du.
// Memory.   Shared memory and scratch as in PersistentPlan (backward); the scratch is zero at the start.
// Aliasing. None, but for carry, which is in and out.
// Bound.    Every block reads dc, one or both of dr and dz, and du from L2: rows (4 C + 4 R) bytes per block and step
//           where it has hidden units of one half, 64 MB for 49 rows and 128 blocks at C = 2048, R = 512, est. 12 us;
//           and per step 7 C + 4 R numbers per row of HBM, 1.6 MB. Three barriers, est. 3 us.
__global__ void __launch_bounds__(threads, 1)
    fast_gru_steps_backward(const StepsBackward p, const PersistentPlan plan, unsigned char* scratch) {
  using T = Share::T;
  const Share share(plan, p.dtype, p.rows, p.C, p.R);
  const bool bf16 = share.bf16;
  const int M = share.M, C = share.C, R = share.R, units_r = share.units_of_r(), units_z = plan.hidden_units - units_r;
  const int positions = static_cast<int>(p.positions);  // no more than rows
  const int depth = static_cast<int>(plan.depth), hidden_depth = static_cast<int>(plan.hidden_depth);
  T* exchange_c = reinterpret_cast<T*>(scratch + plan.low_at);
  T* exchange_z = reinterpret_cast<T*>(scratch + plan.gated_at);
  T* exchange_r = reinterpret_cast<T*>(scratch + plan.reset_at);
  T* exchange_u = reinterpret_cast<T*>(scratch + plan.exchange_at);
  GridBarrier barrier(reinterpret_cast<GridCounter*>(scratch));
  const auto feature_of = [&](int i) { return share.feature_of(i); };

  const T *uo = static_cast<const T*>(p.uo), *w = static_cast<const T*>(p.w), *vo = static_cast<const T*>(p.vo);
  const bool words = share.in_words(p);
  share.fetch<true>(0, plan.weight_pitch, 8 * plan.units, depth, words, [&](int o, int i) -> const T* {
    const int feature = feature_of(o);
    return feature < 0 || i >= C ? nullptr : vo + static_cast<int64_t>(i) * C + feature;
  });
  share.fetch<true>(
      plan.gate_at, plan.hidden_pitch, 8 * plan.units, 2 * hidden_depth, words, [&](int o, int i) -> const T* {
        const int feature = feature_of(o), half = i >= hidden_depth ? 1 : 0, input = i - half * hidden_depth;
        return feature < 0 || input >= R ? nullptr : uo + static_cast<int64_t>(half * R + input) * C + feature;
      });
  share.fetch<true>(
      plan.hidden_at, plan.weight_pitch, 8 * plan.hidden_units, depth, words, [&](int o, int i) -> const T* {
        const int hidden = share.hidden_of(o), half = hidden >= R ? 1 : 0;
        return hidden < 0 || i >= C ? nullptr : w + (static_cast<int64_t>(half) * C + i) * R + hidden - half * R;
      });

  float sums[pairs], carry[pairs], z[pairs], candidate[pairs], before[pairs], r[pairs];
  share.for_pairs(feature_of,
                  [&](int i, int row, int feature) { carry[i] = p.carry[static_cast<int64_t>(row) * C + feature]; });
  const auto read_step = [&](int64_t step) {
    share.for_pairs(feature_of, [&](int i, int row, int feature) {
      const int64_t at = (step * M + row) * C + feature;
      z[i] = widen(static_cast<const T*>(p.z)[at], bf16);
      candidate[i] = widen(static_cast<const T*>(p.candidate)[at], bf16);
      before[i] = widen(static_cast<const T*>(p.before)[at], bf16);
      if (p.grad)
        carry[i] +=
            widen(static_cast<const T*>(
                      p.grad)[row / positions * p.grad_sample + row % positions * C + step * p.grad_step + feature],
                  bf16);
    });
  };
  // du of `units` hidden units from the first-th on: the product with `from`, where the ReLU is open.
  const auto hidden_gradients = [&](int64_t step, const T* from, int first, int units) {
    if (units == 0) return;  // the same for the whole block
    share.product(sums, from, depth, depth, plan.hidden_at + 8 * first * plan.weight_pitch, plan.weight_pitch, units);
    const auto hidden_of = [&](int i) { return i < 8 * units ? share.hidden_of(8 * first + i) : -1; };
    share.for_pairs(hidden_of, [&](int i, int row, int feature) {
      const int64_t at = (step * M + row) * 2 * R + feature;
      const int half = feature >= R ? 1 : 0;
      const T value = narrow<T>(widen(static_cast<const T*>(p.hidden)[at], bf16) <= 0 ? 0.0f : sums[i], bf16);
      exchange_u[row * 2 * hidden_depth + half * hidden_depth + feature - half * R] = value;
      static_cast<T*>(p.du)[at] = value;
    });
  };

  read_step(p.steps - 1);
  for (int64_t step = p.steps - 1;; --step) {
    const int64_t first = step * M;
    share.for_pairs(feature_of, [&](int i, int row, int feature) {
      const float g = carry[i];
      const T dc = narrow<T>(g * z[i] * (1 - candidate[i] * candidate[i]), bf16);
      const T dz = narrow<T>(g * (candidate[i] - before[i]) * z[i] * (1 - z[i]), bf16);
      carry[i] = g * (1 - z[i]);
      exchange_c[row * depth + feature] = static_cast<T*>(p.dc)[(first + row) * C + feature] = dc;
      exchange_z[row * depth + feature] = static_cast<T*>(p.dz)[(first + row) * C + feature] = dz;
    });
    barrier.arrive();
    share.for_pairs(feature_of, [&](int i, int row, int feature) {
      r[i] = widen(static_cast<const T*>(p.r)[(first + row) * C + feature], bf16);
    });
    barrier.wait();

    share.product(sums, exchange_c, depth, depth, 0, plan.weight_pitch, plan.units);
    share.for_pairs(feature_of, [&](int i, int row, int feature) {
      const int64_t at = (first + row) * C + feature;
      carry[i] += sums[i] * r[i];
      exchange_r[row * depth + feature] = static_cast<T*>(p.dr)[at] =
          narrow<T>(sums[i] * before[i] * r[i] * (1 - r[i]), bf16);
      static_cast<T*>(p.gated)[at] = narrow<T>(r[i] * before[i], bf16);
    });
    barrier.arrive();
    hidden_gradients(step, exchange_z, units_r, units_z);
    barrier.wait();

    hidden_gradients(step, exchange_r, 0, units_r);
    barrier.arrive();
    if (step > 0) read_step(step - 1);
    barrier.wait();

    share.product(sums, exchange_u, 2 * hidden_depth, 2 * hidden_depth, plan.gate_at, plan.hidden_pitch, plan.units);
    share.for_pairs(feature_of, [&](int i, int, int) { carry[i] += sums[i]; });
    if (step == 0) break;
  }
  share.for_pairs(feature_of,
                  [&](int i, int row, int feature) { p.carry[static_cast<int64_t>(row) * C + feature] = carry[i]; });
}

}  // namespace

Text plan_steps(int64_t rows, int64_t C, int64_t R, DType dtype, bool backward, PersistentPlan& plan, int cluster) {
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  plan = fast_gru::plan_persistent(rows, C, R, dtype, gpu, backward, cluster);
  if (plan.cluster == 1 || !plan.why_not.empty()) return {};
  // Clusters lie within parts of the chip, and not all parts need be whole: then fewer blocks with more outputs each, or
  // blocks alone.
  int64_t resident = 0;
  if (Error error = resident_cluster_steps(plan, resident); !error.empty()) return error;
  if (resident >= plan.blocks) return {};
  Gpu whole_parts = gpu;
  whole_parts.multiprocessors = static_cast<int>(resident);
  if (resident > 0) plan = fast_gru::plan_persistent(rows, C, R, dtype, whole_parts, backward, plan.cluster);
  if (resident > 0 && plan.why_not.empty()) {
    if (Error error = resident_cluster_steps(plan, resident); !error.empty()) return error;
    if (resident >= plan.blocks) return {};
  }
  plan = fast_gru::plan_persistent(rows, C, R, dtype, gpu, backward, 1);
  return {};
}

Text steps(const Steps& p, const PersistentPlan& plan, void* scratch, Stream stream) {
  if (plan.cluster > 1) return cluster_steps(p, plan, scratch, stream);
  return launch_steps<Steps>("fast_gru_steps", fast_gru_steps, p, plan, scratch, stream);
}

Text steps_backward(const StepsBackward& p, const PersistentPlan& plan, void* scratch, Stream stream) {
  return launch_steps<StepsBackward>("fast_gru_steps_backward", fast_gru_steps_backward, p, plan, scratch, stream);
}

}  // namespace rcu_ops::cuda
