// fast_gru on the matrix unit, all steps in one cooperative launch: bf16 and fp16, few columns, weights in shared
// memory. A block's share of the work, and the forward pass of blocks alone (fast_gru_persistent.cu) and in clusters
// (fast_gru_sm90.cu).
#pragma once

#include "cuda/device/async_copy.h"
#include "cuda/device/cluster.h"
#include "cuda/device/convert.h"
#include "cuda/device/grid_barrier.h"
#include "cuda/device/launch.h"
#include "cuda/device/mma.h"
#include "cuda/device/shared_memory.h"
#include "cuda/fast_gru.h"

namespace rcu_ops::cuda {

// fast_gru_sm90.cu: as steps, for a plan with clusters, and how many blocks of such a launch the current device holds
// at once.
Error cluster_steps(const fast_gru::Steps& p, const fast_gru::PersistentPlan& plan, void* scratch, Stream stream);
Error resident_cluster_steps(const fast_gru::PersistentPlan& plan, int64_t& blocks);

namespace {

using fast_gru::PersistentPlan;
using fast_gru::Steps;
using fast_gru::StepsBackward;

constexpr int warps = fast_gru::persistent_warps, threads = 32 * warps, most_rows = fast_gru::persistent_rows;
constexpr int row_tiles = most_rows / 16, most_units = fast_gru::persistent_units, width = 8 * most_units;
constexpr int pairs = most_rows * width / threads;  // (row, output) pairs of a thread

// sigmoid and tanh as in fast_gru.cu's passes.
__device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + exp(-x)); }

// What the kernels are made of: a block's share of the outputs, its weights in shared memory, and products of all rows
// with them. Every block keeps its outputs' weights for all steps, each element of a matrix in one block.
//
// Product. Warp w takes runs w, w + 8, ... of 32 inputs for all rows and all of the block's outputs; the partial sums
//          of the warps meet in shared memory and are added in the order of the warps by the threads that own the
//          results, (row, output) pairs thread, thread + 256, ... A run is read so that the 16 bytes of lane (g, q) are
//          inputs 8 q .. 8 q + 7 of row g: as fragments of two products of 16 inputs, in an order of the inputs that a
//          and b share (the sum does not care which input is called which).
struct Share {
  using T = uint16_t;  // a number, bf16 or fp16

  const PersistentPlan& plan;
  bool bf16;
  int M, C, R, thread, block;
  unsigned char* shared;
  float* partial;

  __device__ __forceinline__ Share(const PersistentPlan& of, DType dtype, int64_t rows, int64_t channels,
                                   int64_t hidden)
      : plan(of),
        bf16(dtype == DType::bf16),
        M(static_cast<int>(rows)),
        C(static_cast<int>(channels)),
        R(static_cast<int>(hidden)),
        thread(static_cast<int>(threadIdx.x)),
        block(static_cast<int>(blockIdx.x)),
        shared(dynamic_shared<unsigned char>()),
        partial(dynamic_shared<float>(static_cast<size_t>(of.partial_at))) {}

  // Output i of the features of C that belong to block `first` and those after it; -1: none.
  __device__ __forceinline__ int feature_from(int first, int i) const {
    const int feature = first * 8 * plan.units + i;
    return feature < C ? feature : -1;
  }
  // Output i of their hidden units: half R + feature; -1: none.
  __device__ __forceinline__ int hidden_from(int first, int i) const {
    const int half_units = static_cast<int>(plan.half_units);
    const int unit = first * plan.hidden_units + i / 8;
    const int half = (unit >= half_units ? 1 : 0) + (unit >= 2 * half_units ? 1 : 0);
    const int feature = (unit - half * half_units) * 8 + i % 8;
    return half < 2 && feature < R ? half * R + feature : -1;
  }
  // Of this block alone.
  __device__ __forceinline__ int feature_of(int i) const { return i < 8 * plan.units ? feature_from(block, i) : -1; }
  __device__ __forceinline__ int hidden_of(int i) const {
    return i < 8 * plan.hidden_units ? hidden_from(block, i) : -1;
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

  // Weights [outputs][inputs] at `at`: element(output, input) points at one of them, or is null: 0. In words: 8 that are
  // adjacent, from a multiple of 8 on, are 16 aligned bytes and all of them there or none. Many are on their way at
  // once, as nothing else hides the latency: rows along the inputs are copied beside the threads, which wait for
  // fetched(); for Outputs, where outputs are adjacent in memory, there are 8 or 16 of them.
  template <bool Outputs, typename Element>
  __device__ __forceinline__ void fetch(int64_t at, int64_t pitch, int outputs, int inputs, bool words,
                                        Element element) const {
    if constexpr (Outputs) {
      const int both = outputs > 8 ? 1 : 0;  // units
      const int count = words ? inputs << both : inputs << (3 + both);
      if (words) {
        constexpr int batch = 8;
#pragma unroll 1
        for (int first = thread; first < count; first += threads * batch) {
          uint4 loaded[batch];
#pragma unroll
          for (int j = 0; j < batch; ++j) {
            const int word = first + j * threads;
            loaded[j] = uint4{};
            const T* from = word < count ? element((word & both) * 8, word >> both) : nullptr;
            if (from) loaded[j] = *reinterpret_cast<const uint4*>(from);
          }
#pragma unroll
          for (int j = 0; j < batch; ++j) {
            const int word = first + j * threads;
            if (word >= count) break;
            const uint32_t pairs_of[4] = {loaded[j].x, loaded[j].y, loaded[j].z, loaded[j].w};
            unsigned char* to = shared + at + (word & both) * 8 * pitch + 2 * (word >> both);
#pragma unroll
            for (int k = 0; k < 8; ++k)
              *reinterpret_cast<T*>(to + k * pitch) = static_cast<T>(pairs_of[k / 2] >> (16 * (k % 2)));
          }
        }
        return;
      }
#pragma unroll 1
      for (int i = thread; i < count; i += threads) {
        const int output = i & (outputs - 1), input = i >> (3 + both);
        const T* from = element(output, input);
        *reinterpret_cast<T*>(shared + at + output * pitch + 2 * input) = from ? *from : T(0);
      }
    } else {
      const int step = words ? 8 : 1;
#pragma unroll 1
      for (int output = thread / 32; output < outputs; output += warps) {
        unsigned char* row = shared + at + output * pitch;
#pragma unroll 1
        for (int input = thread % 32 * step; input < inputs; input += 32 * step) {
          const T* from = element(output, input);
          if (!words)
            *reinterpret_cast<T*>(row + 2 * input) = from ? *from : T(0);
          else if (from)
            async_copy<16>(row + 2 * input, from);
          else
            *reinterpret_cast<uint4*>(row + 2 * input) = uint4{};
        }
      }
    }
  }
  // What this thread fetched has landed; others see it after a barrier.
  __device__ __forceinline__ void fetched() const {
    async_commit();
    async_wait<0>();
  }
  // Whether the weights can be fetched so.
  template <typename Problem>
  __device__ __forceinline__ bool in_words(const Problem& p) const {
    const auto start =
        reinterpret_cast<uintptr_t>(p.uo) | reinterpret_cast<uintptr_t>(p.w) | reinterpret_cast<uintptr_t>(p.vo);
    return C % 8 == 0 && R % 8 == 0 && start % 16 == 0;
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
      with_format(bf16, [&](auto format) {
        using F = decltype(format);
#pragma unroll
        for (int n = 0; n < most_units; ++n) {
          if (n >= units) break;
          const auto* of_unit = shared + at + (8 * n + group) * weight_pitch;
          const uint4 b = *reinterpret_cast<const uint4*>(of_unit + 64 * run + 16 * quad);
#pragma unroll
          for (int m = 0; m < row_tiles; ++m) {
            if (16 * m >= M) break;
            const uint4 &top = words[m][0], &bottom = words[m][1];
            mma_m16n8k16<F>(acc[m][n], {top.x, bottom.x, top.y, bottom.y}, {b.x, b.y});
            mma_m16n8k16<F>(acc[m][n], {top.z, bottom.z, top.w, bottom.w}, {b.z, b.w});
          }
        }
      });
    }
    // Between any two products the whole block meets at a grid barrier's arrival or end: the sums before these have
    // been read.
#pragma unroll
    for (int m = 0; m < row_tiles; ++m)
#pragma unroll
      for (int n = 0; n < most_units; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          partial[(warp * most_rows + 16 * m + 8 * (j / 2) + group) * fast_gru::partial_pitch + 8 * n + 2 * quad +
                  j % 2] = acc[m][n][j];
    block_barrier();
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      sums[i] = 0;
      for (int from = 0; from < warps; ++from)
        sums[i] += partial[(from * most_rows + row_of(i)) * fast_gru::partial_pitch + output_of(i)];
    }
  }

  // The same where the blocks of a cluster have a slice of the inputs each, and the weights at `at` are of this slice
  // and of all the cluster's outputs, `units` per block: every block pushes its partial sums to the outputs' owner,
  // which adds them in the order of the ranks. Warp (half, team) makes 32 rows of every fourth unit.
  __device__ __forceinline__ void sliced_product(float (&sums)[pairs], const T* a, int pitch, int64_t at,
                                                 int units) const {
    constexpr int teams = warps / 2, tiles = fast_gru::persistent_cluster * most_units / teams;
    const int lane = thread % 32, warp = thread / 32, half = warp % 2, team = warp / 2;
    const int group = lane / 4, quad = lane % 4;
    const int rank = cluster_rank(), slice = static_cast<int>(plan.slice);
    const int both = units > 1 ? 1 : 0;  // a block has one unit or two
    unsigned char* stage = shared + plan.partial_at;
    float* received = dynamic_shared<float>(static_cast<size_t>(plan.received_at));
#pragma unroll 1
    for (int row = warp; row < M; row += warps)
#pragma unroll 1
      for (int input = 8 * lane; input < slice; input += 8 * 32)
        async_copy<16>(stage + row * plan.weight_pitch + 2 * input,
                       a + static_cast<int64_t>(row) * pitch + rank * slice + input);
    fetched();
    block_barrier();
    float acc[2][tiles][4] = {};
    for (int run = 0; run < slice / fast_gru::persistent_depth; ++run) {
      uint4 rows[2][2];  // beyond the M-th they are what lay there before, and nobody reads their sums
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const auto* row = stage + (32 * half + 16 * m + 8 * j + group) * plan.weight_pitch;
          rows[m][j] = *reinterpret_cast<const uint4*>(row + 64 * run + 16 * quad);
        }
      with_format(bf16, [&](auto format) {
        using F = decltype(format);
#pragma unroll
        for (int n = 0; n < tiles; ++n) {
          const int unit = team + teams * n;
          if (unit >= plan.cluster * units) break;
          const auto* of_unit = shared + at + (8 * unit + group) * plan.weight_pitch;
          const uint4 b = *reinterpret_cast<const uint4*>(of_unit + 64 * run + 16 * quad);
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            const uint4 &top = rows[m][0], &bottom = rows[m][1];
            mma_m16n8k16<F>(acc[m][n], {top.x, bottom.x, top.y, bottom.y}, {b.x, b.y});
            mma_m16n8k16<F>(acc[m][n], {top.z, bottom.z, top.w, bottom.w}, {b.z, b.w});
          }
        }
      });
    }
    // Between any two of these products every block arrives at a grid barrier: what was received before has been read.
#pragma unroll
    for (int n = 0; n < tiles; ++n) {
      const int unit = team + teams * n;
      if (unit >= plan.cluster * units) break;
      float* to = cluster_shared(received, unit >> both) + rank * most_rows * fast_gru::partial_pitch +
                  (unit & both) * 8 + 2 * quad;
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int row = 32 * half + 16 * m + 8 * j + group;
          const float2 both{acc[m][n][2 * j], acc[m][n][2 * j + 1]};
          if (row < M) *reinterpret_cast<float2*>(to + row * fast_gru::partial_pitch) = both;
        }
    }
    cluster_barrier();
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      sums[i] = 0;
      if (row_of(i) >= M || output_of(i) >= 8 * units) continue;
#pragma unroll
      for (int from = 0; from < fast_gru::persistent_cluster; ++from)
        sums[i] += received[(from * most_rows + row_of(i)) * fast_gru::partial_pitch + output_of(i)];
    }
  }
};

// All steps (common/fast_gru.h: Steps), bf16 or fp16; M <= 64 rows, a row being a column of the problem. Clustered:
// in clusters of plan.cluster blocks.
//
// Layout.   Matrices are [rows][features]. What blocks exchange lies in scratch memory with its features padded to runs
//           of 32 by zeros, so that it is read in 16-byte words whatever C and R.
// Work.     A block keeps its outputs' weights of U_o, W_r, W_z and V_o (Share, which says how a product is made); in a
//           cluster, of U_o and V_o, the cluster's outputs' weights of its slice of the inputs. The thread that owns a
//           pair owns r, z, the candidate and the fp32 state of it, in registers for all steps.
// Order.    Three grid barriers per step: hidden -> | gates -> | candidate and state -> |. z needs nobody's r and is
//           computed after arriving at the second one; the library's products with x are read ahead of the second and
//           third. Whatever is rewritten (low, gated, hidden) was last read before the barrier before the last.
// Memory.   Shared memory and scratch as in PersistentPlan; the scratch is zero at the start.
// Aliasing. hidden and candidate hold the products with x and are replaced, when saving, by their owners. No others
//           overlap.
// Bound.    L2, with C = 2048, R = 512, 49 rows and 128 blocks, at 5.5 TB/s (all est.; a product of the matrix unit
//           takes less than its operands do, 0.8 GFLOP per step in all). Alone every block reads all states, gated
//           states and hidden halves: rows (4 C + 4 R) bytes per block and step, 64 MB: 12 us, and three barriers of
//           the grid: 3 us. Clustered, 8 blocks share the inputs of U_o and V_o: rows (4 C / 8 + 4 R) bytes per block,
//           19 MB, a third of them (z's hidden half) in the shadow of a barrier: 2.3 us. Staged inputs and weights come
//           from shared memory, 0.7 MB per block: 3 us. 32 KB of partial sums per block go to other blocks' shared
//           memory, 4 MB at 2.7 TB/s: 1.6 us, with two barriers of the cluster: 0.6 us. Three barriers of the grid: 3
//           us. Together 10 or 11 us instead of 15. Weights 142 KB, stage or partial sums 40 KB, received sums 40 KB:
//           222 of 227 KB. What clusters save grows with rows, blocks and C, what they cost is nearly fixed: see
//           plan_persistent.
template <bool Clustered>
__device__ __forceinline__ void all_steps(const Steps& p, const PersistentPlan& plan, unsigned char* scratch) {
  using T = Share::T;
  const Share share(plan, p.dtype, p.rows, p.C, p.R);
  const bool bf16 = share.bf16;
  const int M = share.M, C = share.C, R = share.R;
  const int positions = static_cast<int>(p.positions);  // no more than rows
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
  const int first_block = Clustered ? share.block - cluster_rank() : share.block;
  const int blocks = Clustered ? plan.cluster : 1, inputs = Clustered ? static_cast<int>(plan.slice) : depth;
  const int first_input = Clustered ? cluster_rank() * inputs : 0;
  const bool words = share.in_words(p);
  if constexpr (Clustered) cluster_barrier();  // the others' shared memory is there
  share.fetch<false>(0, plan.weight_pitch, blocks * 8 * plan.units, inputs, words,
                     [&](int o, int i) { return element(vo, share.feature_from(first_block, o), C, first_input + i); });
  for (int gate = 0; gate < 2; ++gate)
    share.fetch<false>(
        plan.gate_at + gate * 8 * plan.units * plan.hidden_pitch, plan.hidden_pitch, 8 * plan.units, hidden_depth,
        words, [&](int o, int i) { return element(w + static_cast<int64_t>(gate) * C * R, feature_of(o), R, i); });
  share.fetch<false>(plan.hidden_at, plan.weight_pitch, blocks * 8 * plan.hidden_units, inputs, words,
                     [&](int o, int i) { return element(uo, share.hidden_from(first_block, o), C, first_input + i); });
  const auto product_of_all = [&](float (&to)[pairs], const T* from, int64_t at, int units) {
    if constexpr (Clustered)
      share.sliced_product(to, from, depth, at, units);
    else
      share.product(to, from, depth, depth, at, plan.weight_pitch, units);
  };

  float sums[pairs], state[pairs], z[pairs], ahead[pairs];
  share.for_pairs(feature_of, [&](int i, int row, int feature) {
    state[i] = p.state[static_cast<int64_t>(row) * C + feature];
    low[row * depth + feature] = narrow<T>(state[i], bf16);
  });
  share.fetched();
  barrier.arrive();
  const auto read_hidden = [&](int64_t step) {
    const T* from = static_cast<const T*>(p.hidden) + step * M * 2 * R;
    share.for_pairs(hidden_of, [&](int i, int row, int feature) {
      ahead[i] = widen(from[static_cast<int64_t>(row) * 2 * R + feature], bf16);
    });
  };
  read_hidden(0);
  barrier.wait();

  for (int64_t step = 0; step < p.steps; ++step) {
    const int64_t first = step * M;  // row of a matrix of all steps
    product_of_all(sums, low, plan.hidden_at, plan.hidden_units);
    share.for_pairs(hidden_of, [&](int i, int row, int feature) {
      float value = sums[i] + ahead[i];
      if (value < 0) value = 0;  // NaN stays
      const int half = feature >= R ? 1 : 0;
      exchange[row * 2 * hidden_depth + half * hidden_depth + feature - half * R] = narrow<T>(value, bf16);
      if (p.save) static_cast<T*>(p.hidden)[(first + row) * 2 * R + feature] = narrow<T>(value, bf16);
    });
    barrier.arrive_and_wait();

    share.product(sums, exchange, 2 * hidden_depth, hidden_depth, plan.gate_at, plan.hidden_pitch, plan.units);
    share.for_pairs(feature_of, [&](int i, int row, int feature) {
      const float r = sigmoid(sums[i]);
      gated[row * depth + feature] = narrow<T>(r * state[i], bf16);
      if (p.save) static_cast<T*>(p.r)[(first + row) * C + feature] = narrow<T>(r, bf16);
    });
    barrier.arrive();
    share.product(sums, exchange + hidden_depth, 2 * hidden_depth, hidden_depth,
                  plan.gate_at + 8 * plan.units * plan.hidden_pitch, plan.hidden_pitch, plan.units);
    T* candidates = static_cast<T*>(p.candidate) + first * C;
    share.for_pairs(feature_of, [&](int i, int row, int feature) {
      z[i] = sigmoid(sums[i]);
      if (p.save) static_cast<T*>(p.z)[(first + row) * C + feature] = narrow<T>(z[i], bf16);
      ahead[i] = widen(candidates[static_cast<int64_t>(row) * C + feature], bf16);
    });
    barrier.wait();

    product_of_all(sums, gated, 0, plan.units);
    share.for_pairs(feature_of, [&](int i, int row, int feature) {
      const float candidate = tanh(sums[i] + ahead[i]);
      state[i] = (1 - z[i]) * state[i] + z[i] * candidate;
      low[row * depth + feature] = narrow<T>(state[i], bf16);
      if (p.save) candidates[static_cast<int64_t>(row) * C + feature] = narrow<T>(candidate, bf16);
      static_cast<T*>(p.out)[row / positions * p.out_sample + row % positions * C + step * p.out_step + feature] =
          narrow<T>(state[i], bf16);
    });
    if (step + 1 == p.steps) break;
    barrier.arrive();
    read_hidden(step + 1);
    barrier.wait();
  }
  share.for_pairs(feature_of,
                  [&](int i, int row, int feature) { p.state[static_cast<int64_t>(row) * C + feature] = state[i]; });
}

template <typename Problem>
Error launch_steps(const char* name, void (*kernel)(Problem, PersistentPlan, unsigned char*), const Problem& p,
                   const PersistentPlan& plan, void* scratch, Stream stream) {
  if (!plan.why_not.empty()) return "fast_gru in one launch: " + plan.why_not;
  if (Error error = fill_zero(scratch, static_cast<size_t>(plan.scratch_bytes), stream); !error.empty()) return error;
  return launch_cooperative(name, kernel, plan.cluster, dim3(static_cast<unsigned>(plan.blocks)), dim3(threads),
                            static_cast<size_t>(plan.shared_bytes), stream, p, plan,
                            static_cast<unsigned char*>(scratch));
}

}  // namespace
}  // namespace rcu_ops::cuda
