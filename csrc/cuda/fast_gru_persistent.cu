// fast_gru on the matrix unit, all steps in one cooperative launch: bf16 and fp16, few columns, weights in shared memory.
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

constexpr int warps = fast_gru::persistent_warps, threads = 32 * warps, most_rows = fast_gru::persistent_rows;
constexpr int row_tiles = most_rows / 16, most_units = fast_gru::persistent_units, width = 8 * most_units;
constexpr int pairs = most_rows * width / threads;  // (row, output) pairs of a thread

// sigmoid and tanh as in fast_gru.cu's passes.
__device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + exp(-x)); }

// All steps (common/fast_gru.h: Steps), T bf16 or half; M <= 64 rows, a row being a column of the problem.
//
// Layout.   Matrices are [rows][features]. What blocks exchange lies in scratch memory with its features padded to runs of 32 by
//           zeros, so that it is read in 16-byte words whatever C and R.
// Work.     A block keeps its output features' weights of U_o, W_r, W_z and V_o in shared memory for all steps, each matrix
//           element in one block. A product: warp w takes runs w, w + 8, ... of 32 input features for all rows and all of the
//           block's outputs; the partial sums of the warps meet in shared memory and are added in the order of the warps by the
//           threads that own the results, (row, output) pairs thread, thread + 256, ... The same thread owns r, z, the candidate
//           and the fp32 state of a pair, in registers for all steps.
//           A run is read so that the 16 bytes of lane (g, q) are inputs 8 q .. 8 q + 7 of row g: as fragments of two products of
//           16 inputs, in an order of the inputs that a and b share (the sum does not care which input is called which).
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
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, group = lane / 4, quad = lane % 4;
  const int M = static_cast<int>(p.rows), C = static_cast<int>(p.C), R = static_cast<int>(p.R);
  const int depth = static_cast<int>(plan.depth), hidden_depth = static_cast<int>(plan.hidden_depth);
  const int half_units = static_cast<int>(plan.half_units), block = static_cast<int>(blockIdx.x);
  unsigned char* shared = dynamic_shared<unsigned char>();
  float* partial = dynamic_shared<float>(static_cast<size_t>(plan.partial_at));
  T* low = reinterpret_cast<T*>(scratch + plan.low_at);
  T* gated = reinterpret_cast<T*>(scratch + plan.gated_at);
  T* exchange = reinterpret_cast<T*>(scratch + plan.exchange_at);
  GridBarrier barrier(reinterpret_cast<GridCounter*>(scratch));

  // Output i of this block's features of r, z and the candidate; -1: none.
  const auto feature_of = [&](int i) {
    const int feature = block * 8 * plan.units + i;
    return i < 8 * plan.units && feature < C ? feature : -1;
  };
  // Output i of its hidden units: half R + feature; -1: none.
  const auto hidden_of = [&](int i) {
    const int unit = block * plan.hidden_units + i / 8, half = unit / half_units, feature = unit % half_units * 8 + i % 8;
    return i < 8 * plan.hidden_units && half < 2 && feature < R ? half * R + feature : -1;
  };

  const auto fetch = [&](int64_t at, int64_t pitch, int outputs, int inputs, int padded, auto row_of) {
    for (int i = thread; i < outputs * padded; i += threads) {
      const int output = i / padded, input = i % padded;
      const T* row = row_of(output);
      *reinterpret_cast<T*>(shared + at + output * pitch + 2 * input) = row && input < inputs ? row[input] : narrow<T>(0.0f);
    }
  };
  const T *uo = static_cast<const T*>(p.uo), *w = static_cast<const T*>(p.w), *vo = static_cast<const T*>(p.vo);
  const auto row_at = [](const T* matrix, int64_t row, int64_t pitch) { return row < 0 ? nullptr : matrix + row * pitch; };
  fetch(0, plan.weight_pitch, 8 * plan.units, C, depth, [&](int i) { return row_at(vo, feature_of(i), C); });
  for (int gate = 0; gate < 2; ++gate)
    fetch(plan.gate_at + gate * 8 * plan.units * plan.hidden_pitch, plan.hidden_pitch, 8 * plan.units, R, hidden_depth,
          [&](int i) { return row_at(w + static_cast<int64_t>(gate) * C * R, feature_of(i), R); });
  fetch(plan.hidden_at, plan.weight_pitch, 8 * plan.hidden_units, C, depth, [&](int i) { return row_at(uo, hidden_of(i), C); });

  // This thread's pairs: row and output i of the block.
  const auto row_of = [&](int i) { return (thread + threads * i) / width; };
  const auto output_of = [&](int i) { return (thread + threads * i) % width; };
  const auto for_pairs = [&](auto of, auto visit) {
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const int row = row_of(i), feature = of(output_of(i));
      if (row < M && feature >= 0) visit(i, row, feature);
    }
  };
  // sums[i] of every pair: rows of a (pitch numbers apart, `inputs` of them) times the weights at `at`.
  float sums[pairs];
  const auto product = [&](const T* a, int pitch, int inputs, int64_t at, int64_t weight_pitch, int units) {
    float acc[row_tiles][most_units][4] = {};
    for (int run = warp; run < inputs / fast_gru::persistent_depth; run += warps) {
      uint4 words[row_tiles][2];
#pragma unroll
      for (int m = 0; m < row_tiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = 16 * m + 8 * half + group;
          words[m][half] = uint4{};
          if (row < M) words[m][half] = *reinterpret_cast<const uint4*>(a + static_cast<int64_t>(row) * pitch + 32 * run + 8 * quad);
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
  };

  float state[pairs], z[pairs], ahead[pairs];
  for_pairs(feature_of, [&](int i, int row, int feature) {
    state[i] = p.state[static_cast<int64_t>(row) * C + feature];
    low[row * depth + feature] = narrow<T>(state[i]);
  });
  barrier.arrive();
  const auto read_hidden = [&](int64_t step) {
    const T* from = static_cast<const T*>(p.hidden) + step * M * 2 * R;
    for_pairs(hidden_of, [&](int i, int row, int feature) { ahead[i] = widen(from[static_cast<int64_t>(row) * 2 * R + feature]); });
  };
  read_hidden(0);
  barrier.wait();

  for (int64_t step = 0; step < p.steps; ++step) {
    const int64_t first = step * M;  // row of a matrix of all steps
    product(low, depth, depth, plan.hidden_at, plan.weight_pitch, plan.hidden_units);
    for_pairs(hidden_of, [&](int i, int row, int feature) {
      float value = sums[i] + ahead[i];
      if (value < 0) value = 0;  // NaN stays
      const int half = feature / R;
      exchange[row * 2 * hidden_depth + half * hidden_depth + feature - half * R] = narrow<T>(value);
      if (p.save) static_cast<T*>(p.hidden)[(first + row) * 2 * R + feature] = narrow<T>(value);
    });
    barrier.arrive_and_wait();

    product(exchange, 2 * hidden_depth, hidden_depth, plan.gate_at, plan.hidden_pitch, plan.units);
    for_pairs(feature_of, [&](int i, int row, int feature) {
      const float r = sigmoid(sums[i]);
      gated[row * depth + feature] = narrow<T>(r * state[i]);
      if (p.save) static_cast<T*>(p.r)[(first + row) * C + feature] = narrow<T>(r);
    });
    barrier.arrive();
    product(exchange + hidden_depth, 2 * hidden_depth, hidden_depth, plan.gate_at + 8 * plan.units * plan.hidden_pitch,
            plan.hidden_pitch, plan.units);
    T* candidates = static_cast<T*>(p.candidate) + first * C;
    for_pairs(feature_of, [&](int i, int row, int feature) {
      z[i] = sigmoid(sums[i]);
      if (p.save) static_cast<T*>(p.z)[(first + row) * C + feature] = narrow<T>(z[i]);
      ahead[i] = widen(candidates[static_cast<int64_t>(row) * C + feature]);
    });
    barrier.wait();

    product(gated, depth, depth, 0, plan.weight_pitch, plan.units);
    for_pairs(feature_of, [&](int i, int row, int feature) {
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
  for_pairs(feature_of, [&](int i, int row, int feature) { p.state[static_cast<int64_t>(row) * C + feature] = state[i]; });
}

template <typename T>
Error launch_steps(const Steps& p, const PersistentPlan& plan, void* scratch, Stream stream) {
  if (Error error = fill_zero(scratch, static_cast<size_t>(plan.scratch_bytes), stream); !error.empty()) return error;
  return launch_cooperative("fast_gru_steps", fast_gru_steps<T>, 1, dim3(static_cast<unsigned>(plan.blocks)), dim3(threads),
                            static_cast<size_t>(plan.shared_bytes), stream, p, plan, static_cast<unsigned char*>(scratch));
}

}  // namespace

Text plan_steps(int64_t rows, int64_t C, int64_t R, DType dtype, PersistentPlan& plan) {
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  plan = fast_gru::plan_persistent(rows, C, R, dtype, gpu);
  return {};
}

Text steps(const Steps& p, const PersistentPlan& plan, void* scratch, Stream stream) {
  if (!plan.why_not.empty()) return "fast_gru in one launch: " + plan.why_not;
  return p.dtype == DType::bf16 ? launch_steps<__nv_bfloat16>(p, plan, scratch, stream) : launch_steps<__half>(p, plan, scratch, stream);
}

}  // namespace rcu_ops::cuda
