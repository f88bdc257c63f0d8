// fast_gru on the matrix unit, all steps forward or backward in one cooperative launch: bf16 and fp16, few columns, weights in
// shared memory.
#include "cuda/device/convert.h"
#include "cuda/device/grid_barrier.h"
#include "cuda/device/launch.h"
#include "cuda/device/mma.h"
#include "cuda/device/shared_memory.h"
#include "cuda/fast_gru.h"

namespace rcu_ops::cuda {
namespace {

using fast_gru::PersistentPlan;
using fast_gru::Steps;
using fast_gru::StepsBackward;

constexpr int warps = fast_gru::persistent_warps, threads = 32 * warps, most_rows = fast_gru::persistent_rows;
constexpr int row_tiles = most_rows / 16, most_units = fast_gru::persistent_units, width = 8 * most_units;
constexpr int pairs = most_rows * width / threads;  // (row, output) pairs of a thread

// sigmoid and tanh as in fast_gru.cu's passes.
__device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + exp(-x)); }

// What both kernels are made of: a block's share of the outputs, its weights in shared memory, and products of all rows with
// them. Every block keeps its outputs' weights for all steps, each element of a matrix in one block.
//
// Product. Warp w takes runs w, w + 8, ... of 32 inputs for all rows and all of the block's outputs; the partial sums of the
//          warps meet in shared memory and are added in the order of the warps by the threads that own the results, (row,
//          output) pairs thread, thread + 256, ... A run is read so that the 16 bytes of lane (g, q) are inputs 8 q .. 8 q + 7 of
//          row g: as fragments of two products of 16 inputs, in an order of the inputs that a and b share (the sum does not care
//          which input is called which).
template <typename T>
struct Share {
  const PersistentPlan& plan;
  int M, C, R, thread, block;
  unsigned char* shared;
  float* partial;

  __device__ __forceinline__ Share(const PersistentPlan& of, int64_t rows, int64_t channels, int64_t hidden)
      : plan(of),
        M(static_cast<int>(rows)),
        C(static_cast<int>(channels)),
        R(static_cast<int>(hidden)),
        thread(static_cast<int>(threadIdx.x)),
        block(static_cast<int>(blockIdx.x)),
        shared(dynamic_shared<unsigned char>()),
        partial(dynamic_shared<float>(static_cast<size_t>(of.partial_at))) {}

  // Output i of this block's features of C; -1: none.
  __device__ __forceinline__ int feature_of(int i) const {
    const int feature = block * 8 * plan.units + i;
    return i < 8 * plan.units && feature < C ? feature : -1;
  }
  // Output i of its hidden units: half R + feature; -1: none.
  __device__ __forceinline__ int hidden_of(int i) const {
    const int half_units = static_cast<int>(plan.half_units);
    const int unit = block * plan.hidden_units + i / 8, half = unit / half_units, feature = unit % half_units * 8 + i % 8;
    return i < 8 * plan.hidden_units && half < 2 && feature < R ? half * R + feature : -1;
  }
  // Its hidden units of r'; those of z' come after them.
  __device__ __forceinline__ int units_of_r() const {
    const int left = static_cast<int>(plan.half_units) - block * plan.hidden_units;
    return left < 0 ? 0 : left < plan.hidden_units ? left : plan.hidden_units;
  }

  // This thread's pairs: row and output i of the block.
  __device__ __forceinline__ int row_of(int i) const { return (thread + threads * i) / width; }
  __device__ __forceinline__ int output_of(int i) const { return (thread + threads * i) % width; }
  template <typename Of, typename Visit>
  __device__ __forceinline__ void for_pairs(Of of, Visit visit) const {
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const int row = row_of(i), feature = of(output_of(i));
      if (row < M && feature >= 0) visit(i, row, feature);
    }
  }

  // Weights [outputs][inputs] at `at`: element(output, input) points at one of them, or is null: 0. Adjacent threads take
  // adjacent inputs, or outputs where those are adjacent in memory.
  template <bool Outputs, typename Element>
  __device__ __forceinline__ void fetch(int64_t at, int64_t pitch, int outputs, int inputs, Element element) const {
    for (int i = thread; i < outputs * inputs; i += threads) {
      const int output = Outputs ? i % outputs : i / inputs, input = Outputs ? i / outputs : i % inputs;
      const T* from = element(output, input);
      *reinterpret_cast<T*>(shared + at + output * pitch + 2 * input) = from ? *from : narrow<T>(0.0f);
    }
  }

  // sums[i] of every pair: rows of a (pitch numbers apart, `inputs` of them) times the weights of `units` at `at`.
  __device__ __forceinline__ void product(float (&sums)[pairs], const T* a, int pitch, int inputs, int64_t at,
                                          int64_t weight_pitch, int units) const {
    const int lane = thread % 32, warp = thread / 32, group = lane / 4, quad = lane % 4;
    float acc[row_tiles][most_units][4] = {};
    for (int run = warp; run < inputs / fast_gru::persistent_depth; run += warps) {
      uint4 words[row_tiles][2];
#pragma unroll
      for (int m = 0; m < row_tiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 16 * m + 8 * half + group;
          const T* from = a + static_cast<int64_t>(row) * pitch + 32 * run + 8 * quad;
          words[m][half] = uint4{};
          if (row < M) words[m][half] = *reinterpret_cast<const uint4*>(from);
        }
#pragma unroll
      for (int n = 0; n < most_units; ++n) {
        if (n >= units) break;
        const uint4 b = *reinterpret_cast<const uint4*>(shared + at + (8 * n + group) * weight_pitch + 64 * run + 16 * quad);
#pragma unroll
        for (int m = 0; m < row_tiles; ++m) {
          if (16 * m >= M) break;
          const uint4 &top = words[m][0], &bottom = words[m][1];
          mma_m16n8k16<T>(acc[m][n], {top.x, bottom.x, top.y, bottom.y}, {b.x, b.y});
          mma_m16n8k16<T>(acc[m][n], {top.z, bottom.z, top.w, bottom.w}, {b.z, b.w});
        }
      }
    }
    // Between any two products the whole block meets at a grid barrier's arrival or end: the sums before these have been read.
#pragma unroll
    for (int m = 0; m < row_tiles; ++m)
#pragma unroll
      for (int n = 0; n < most_units; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          partial[(warp * most_rows + 16 * m + 8 * (j / 2) + group) * fast_gru::partial_pitch + 8 * n + 2 * quad + j % 2] =
              acc[m][n][j];
    block_barrier();
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      sums[i] = 0;
      for (int from = 0; from < warps; ++from)
        sums[i] += partial[(from * most_rows + row_of(i)) * fast_gru::partial_pitch + output_of(i)];
    }
  }
};

// All steps (common/fast_gru.h: Steps), T bf16 or half; M <= 64 rows, a row being a column of the problem.
//
// Layout.   Matrices are [rows][features]. What blocks exchange lies in scratch memory with its features padded to runs of 32 by
//           zeros, so that it is read in 16-byte words whatever C and R.
// Work.     A block keeps its outputs' weights of U_o, W_r, W_z and V_o (Share, which says how a product is made). The thread
//           that owns a pair owns r, z, the candidate and the fp32 state of it, in registers for all steps.
// Order.    Three grid barriers per step: hidden -> | gates -> | candidate and state -> |. z needs nobody's r and is computed
//           after arriving at the second one; the library's products with x are read ahead of the second and third. Whatever is
//           rewritten (low, gated, hidden) was last read before the barrier before the last.
// Memory.   Shared memory and scratch as in PersistentPlan; the scratch is zero at the start.
// Aliasing. hidden and candidate hold the products with x and are replaced, when saving, by their owners. No others overlap.
// Bound.    Every block reads all states, gated states and hidden halves from L2: rows (4 C + 4 R) bytes per block and step,
//           64 MB for 49 rows and 128 blocks at C = 2048, R = 512, est. 12 us; 0.8 GFLOP is nothing beside it. Three
//           barriers, est. 3 us.
template <typename T>
__global__ void __launch_bounds__(threads, 1) fast_gru_steps(const Steps p, const PersistentPlan plan, unsigned char* scratch) {
  const Share<T> share(plan, p.rows, p.C, p.R);
  const int M = share.M, C = share.C, R = share.R;
  const int depth = static_cast<int>(plan.depth), hidden_depth = static_cast<int>(plan.hidden_depth);
  T* low = reinterpret_cast<T*>(scratch + plan.low_at);
  T* gated = reinterpret_cast<T*>(scratch + plan.gated_at);
  T* exchange = reinterpret_cast<T*>(scratch + plan.exchange_at);
  GridBarrier barrier(reinterpret_cast<GridCounter*>(scratch));
  const auto feature_of = [&](int i) { return share.feature_of(i); };
  const auto hidden_of = [&](int i) { return share.hidden_of(i); };

  const T *uo = static_cast<const T*>(p.uo), *w = static_cast<const T*>(p.w), *vo = static_cast<const T*>(p.vo);
  const auto element = [](const T* matrix, int row, int columns, int column) -> const T* {
    return row < 0 || column >= columns ? nullptr : matrix + static_cast<int64_t>(row) * columns + column;
  };
  share.template fetch<false>(0, plan.weight_pitch, 8 * plan.units, depth,
                              [&](int o, int i) { return element(vo, feature_of(o), C, i); });
  for (int gate = 0; gate < 2; ++gate)
    share.template fetch<false>(
        plan.gate_at + gate * 8 * plan.units * plan.hidden_pitch, plan.hidden_pitch, 8 * plan.units, hidden_depth,
        [&](int o, int i) { return element(w + static_cast<int64_t>(gate) * C * R, feature_of(o), R, i); });
  share.template fetch<false>(plan.hidden_at, plan.weight_pitch, 8 * plan.hidden_units, depth,
                              [&](int o, int i) { return element(uo, hidden_of(o), C, i); });

  float sums[pairs], state[pairs], z[pairs], ahead[pairs];
  share.for_pairs(feature_of, [&](int i, int row, int feature) {
    state[i] = p.state[static_cast<int64_t>(row) * C + feature];
    low[row * depth + feature] = narrow<T>(state[i]);
  });
  barrier.arrive();
  const auto read_hidden = [&](int64_t step) {
    const T* from = static_cast<const T*>(p.hidden) + step * M * 2 * R;
    share.for_pairs(hidden_of, [&](int i, int row, int feature) {
      ahead[i] = widen(from[static_cast<int64_t>(row) * 2 * R + feature]);
    });
  };
  read_hidden(0);
  barrier.wait();

  for (int64_t step = 0; step < p.steps; ++step) {
    const int64_t first = step * M;  // row of a matrix of all steps
    share.product(sums, low, depth, depth, plan.hidden_at, plan.weight_pitch, plan.hidden_units);
    share.for_pairs(hidden_of, [&](int i, int row, int feature) {
      float value = sums[i] + ahead[i];
      if (value < 0) value = 0;  // NaN stays
      const int half = feature / R;
      exchange[row * 2 * hidden_depth + half * hidden_depth + feature - half * R] = narrow<T>(value);
      if (p.save) static_cast<T*>(p.hidden)[(first + row) * 2 * R + feature] = narrow<T>(value);
    });
    barrier.arrive_and_wait();

    share.product(sums, exchange, 2 * hidden_depth, hidden_depth, plan.gate_at, plan.hidden_pitch, plan.units);
    share.for_pairs(feature_of, [&](int i, int row, int feature) {
      const float r = sigmoid(sums[i]);
      gated[row * depth + feature] = narrow<T>(r * state[i]);
      if (p.save) static_cast<T*>(p.r)[(first + row) * C + feature] = narrow<T>(r);
    });
    barrier.arrive();
    share.product(sums, exchange + hidden_depth, 2 * hidden_depth, hidden_depth,
                  plan.gate_at + 8 * plan.units * plan.hidden_pitch, plan.hidden_pitch, plan.units);
    T* candidates = static_cast<T*>(p.candidate) + first * C;
    share.for_pairs(feature_of, [&](int i, int row, int feature) {
      z[i] = sigmoid(sums[i]);
      if (p.save) static_cast<T*>(p.z)[(first + row) * C + feature] = narrow<T>(z[i]);
      ahead[i] = widen(candidates[static_cast<int64_t>(row) * C + feature]);
    });
    barrier.wait();

    share.product(sums, gated, depth, depth, 0, plan.weight_pitch, plan.units);
    share.for_pairs(feature_of, [&](int i, int row, int feature) {
      const float candidate = tanh(sums[i] + ahead[i]);
      state[i] = (1 - z[i]) * state[i] + z[i] * candidate;
      low[row * depth + feature] = narrow<T>(state[i]);
      if (p.save) candidates[static_cast<int64_t>(row) * C + feature] = narrow<T>(candidate);
      static_cast<T*>(p.out)[row / p.positions * p.out_sample + row % p.positions * C + step * p.out_step + feature] =
          narrow<T>(state[i]);
    });
    if (step + 1 == p.steps) break;
    barrier.arrive();
    read_hidden(step + 1);
    barrier.wait();
  }
  share.for_pairs(feature_of, [&](int i, int row, int feature) { p.state[static_cast<int64_t>(row) * C + feature] = state[i]; });
}

// All steps from the last to the first (common/fast_gru.h: StepsBackward), T bf16 or half; M <= 64 rows.
//
// Layout.   As fast_gru_steps: what blocks exchange (dc, dz, dr, du of a step) lies padded in scratch memory; what the weights'
//           gradients are made of afterwards is written beside it, for all steps, by the same owner.
// Work.     A block keeps its outputs' weights of V_o^T, U_o^T and W^T (Share): features of C for q = V_o^T dc and U_o^T du, and
//           hidden units for du, those of r' from dr and those of z' from dz. The thread that owns a pair keeps the gradient of
//           its state in fp32 in registers for all steps.
// Order.    Three grid barriers per step: dc, dz -> | q and dr -> | du -> |, and U_o^T du joins the gradient of the state
//           before. z's half of du needs nobody's dr and is computed after arriving at the second one; gates and states are
//           read ahead of the first and third. dc, dz and dr of a step were read before the barrier before they are
//           rewritten, and so was du.
// Memory.   Shared memory and scratch as in PersistentPlan (backward); the scratch is zero at the start.
// Aliasing. None, but for carry, which is in and out.
// Bound.    Every block reads dc, one or both of dr and dz, and du from L2: rows (4 C + 4 R) bytes per block and step where
//           it has hidden units of one half, 64 MB for 49 rows and 128 blocks at C = 2048, R = 512, est. 12 us; and per step
//           7 C + 4 R numbers per row of HBM, 1.6 MB. Three barriers, est. 3 us.
template <typename T>
__global__ void __launch_bounds__(threads, 1)
    fast_gru_steps_backward(const StepsBackward p, const PersistentPlan plan, unsigned char* scratch) {
  const Share<T> share(plan, p.rows, p.C, p.R);
  const int M = share.M, C = share.C, R = share.R, units_r = share.units_of_r(), units_z = plan.hidden_units - units_r;
  const int depth = static_cast<int>(plan.depth), hidden_depth = static_cast<int>(plan.hidden_depth);
  T* exchange_c = reinterpret_cast<T*>(scratch + plan.low_at);
  T* exchange_z = reinterpret_cast<T*>(scratch + plan.gated_at);
  T* exchange_r = reinterpret_cast<T*>(scratch + plan.reset_at);
  T* exchange_u = reinterpret_cast<T*>(scratch + plan.exchange_at);
  GridBarrier barrier(reinterpret_cast<GridCounter*>(scratch));
  const auto feature_of = [&](int i) { return share.feature_of(i); };

  const T *uo = static_cast<const T*>(p.uo), *w = static_cast<const T*>(p.w), *vo = static_cast<const T*>(p.vo);
  share.template fetch<true>(0, plan.weight_pitch, 8 * plan.units, depth, [&](int o, int i) -> const T* {
    const int feature = feature_of(o);
    return feature < 0 || i >= C ? nullptr : vo + static_cast<int64_t>(i) * C + feature;
  });
  share.template fetch<true>(plan.gate_at, plan.hidden_pitch, 8 * plan.units, 2 * hidden_depth, [&](int o, int i) -> const T* {
    const int feature = feature_of(o), half = i / hidden_depth, input = i % hidden_depth;
    return feature < 0 || input >= R ? nullptr : uo + static_cast<int64_t>(half * R + input) * C + feature;
  });
  share.template fetch<true>(plan.hidden_at, plan.weight_pitch, 8 * plan.hidden_units, depth, [&](int o, int i) -> const T* {
    const int hidden = share.hidden_of(o), half = hidden / R;
    return hidden < 0 || i >= C ? nullptr : w + (static_cast<int64_t>(half) * C + i) * R + hidden - half * R;
  });

  float sums[pairs], carry[pairs], z[pairs], candidate[pairs], before[pairs], r[pairs];
  share.for_pairs(feature_of, [&](int i, int row, int feature) { carry[i] = p.carry[static_cast<int64_t>(row) * C + feature]; });
  const auto read_step = [&](int64_t step) {
    share.for_pairs(feature_of, [&](int i, int row, int feature) {
      const int64_t at = (step * M + row) * C + feature;
      z[i] = widen(static_cast<const T*>(p.z)[at]);
      candidate[i] = widen(static_cast<const T*>(p.candidate)[at]);
      before[i] = widen(static_cast<const T*>(p.before)[at]);
      if (p.grad)
        carry[i] += widen(static_cast<const T*>(
            p.grad)[row / p.positions * p.grad_sample + row % p.positions * C + step * p.grad_step + feature]);
    });
  };
  // du of `units` hidden units from the first-th on: the product with `from`, where the ReLU is open.
  const auto hidden_gradients = [&](int64_t step, const T* from, int first, int units) {
    if (units == 0) return;  // the same for the whole block
    share.product(sums, from, depth, depth, plan.hidden_at + 8 * first * plan.weight_pitch, plan.weight_pitch, units);
    const auto hidden_of = [&](int i) { return i < 8 * units ? share.hidden_of(8 * first + i) : -1; };
    share.for_pairs(hidden_of, [&](int i, int row, int feature) {
      const int64_t at = (step * M + row) * 2 * R + feature;
      const int half = feature / R;
      const T value = narrow<T>(widen(static_cast<const T*>(p.hidden)[at]) > 0 ? sums[i] : 0.0f);
      exchange_u[row * 2 * hidden_depth + half * hidden_depth + feature - half * R] = value;
      static_cast<T*>(p.du)[at] = value;
    });
  };

  read_step(p.steps - 1);
  for (int64_t step = p.steps - 1;; --step) {
    const int64_t first = step * M;
    share.for_pairs(feature_of, [&](int i, int row, int feature) {
      const float g = carry[i];
      const T dc = narrow<T>(g * z[i] * (1 - candidate[i] * candidate[i]));
      const T dz = narrow<T>(g * (candidate[i] - before[i]) * z[i] * (1 - z[i]));
      carry[i] = g * (1 - z[i]);
      exchange_c[row * depth + feature] = static_cast<T*>(p.dc)[(first + row) * C + feature] = dc;
      exchange_z[row * depth + feature] = static_cast<T*>(p.dz)[(first + row) * C + feature] = dz;
    });
    barrier.arrive();
    share.for_pairs(feature_of, [&](int i, int row, int feature) {
      r[i] = widen(static_cast<const T*>(p.r)[(first + row) * C + feature]);
    });
    barrier.wait();

    share.product(sums, exchange_c, depth, depth, 0, plan.weight_pitch, plan.units);
    share.for_pairs(feature_of, [&](int i, int row, int feature) {
      const int64_t at = (first + row) * C + feature;
      carry[i] += sums[i] * r[i];
      exchange_r[row * depth + feature] = static_cast<T*>(p.dr)[at] = narrow<T>(sums[i] * before[i] * r[i] * (1 - r[i]));
      static_cast<T*>(p.gated)[at] = narrow<T>(r[i] * before[i]);
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
  share.for_pairs(feature_of, [&](int i, int row, int feature) { p.carry[static_cast<int64_t>(row) * C + feature] = carry[i]; });
}

template <typename Problem>
Error launch_steps(const char* name, void (*kernel)(Problem, PersistentPlan, unsigned char*), const Problem& p,
                   const PersistentPlan& plan, void* scratch, Stream stream) {
  if (!plan.why_not.empty()) return "fast_gru in one launch: " + plan.why_not;
  if (Error error = fill_zero(scratch, static_cast<size_t>(plan.scratch_bytes), stream); !error.empty()) return error;
  return launch_cooperative(name, kernel, 1, dim3(static_cast<unsigned>(plan.blocks)), dim3(threads),
                            static_cast<size_t>(plan.shared_bytes), stream, p, plan, static_cast<unsigned char*>(scratch));
}

}  // namespace

Text plan_steps(int64_t rows, int64_t C, int64_t R, DType dtype, bool backward, PersistentPlan& plan) {
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  plan = fast_gru::plan_persistent(rows, C, R, dtype, gpu, backward);
  return {};
}

Text steps(const Steps& p, const PersistentPlan& plan, void* scratch, Stream stream) {
  const auto kernel = p.dtype == DType::bf16 ? fast_gru_steps<__nv_bfloat16> : fast_gru_steps<__half>;
  return launch_steps<Steps>("fast_gru_steps", kernel, p, plan, scratch, stream);
}

Text steps_backward(const StepsBackward& p, const PersistentPlan& plan, void* scratch, Stream stream) {
  const auto kernel = p.dtype == DType::bf16 ? fast_gru_steps_backward<__nv_bfloat16> : fast_gru_steps_backward<__half>;
  return launch_steps<StepsBackward>("fast_gru_steps_backward", kernel, p, plan, scratch, stream);
}

}  // namespace rcu_ops::cuda
