// fast_gru, all steps forward or backward in one ordinary launch: few channels, every block with all weights.
#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/launch.h"
#include "cuda/device/shared_memory.h"
#include "cuda/fast_gru.h"

namespace rcu_ops::cuda {
namespace {

using fast_gru::ColumnProduct;
using fast_gru::ColumnsPlan;
using fast_gru::ColumnSteps;
using fast_gru::ColumnStepsBackward;
using fast_gru::View;

constexpr int threads = fast_gru::column_threads, warps = threads / 32, width = fast_gru::columns_of_block;
// sigmoid and tanh as in fast_gru.cu's passes.
__device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + exp(-x)); }

// What the kernels are made of: a block's columns, the weights in its shared memory, and their products.
//
// Product. A thread makes one slice of the sum of one output for all 8 columns, so that a weight read from shared
//          memory serves 8 products, and 4 inputs of a column come in one word that the whole warp reads. The slices
//          meet in shared memory and are added in their order by the threads that own the results.
// Pairs.   Thread i owns pairs i, i + 256, ... of output and column, in the order in which they lie in memory.
// ahead:   how many of them are read ahead of their use: forward all up to 128 features, backward, where six numbers are
//          read of each, up to 64.
template <int ahead>
struct Tile {
  const ColumnsPlan& plan;
  DType dtype;
  int thread, count;       // columns that there are
  bool features_adjacent;  // in the matrices, and not columns
  float* shared;
  float* partial;
  int64_t* place;  // of every column: its sample, its position

  __device__ __forceinline__ Tile(const ColumnsPlan& of, DType type, int64_t samples, int64_t positions, bool adjacent)
      : plan(of),
        dtype(type),
        thread(static_cast<int>(threadIdx.x)),
        features_adjacent(adjacent),
        shared(dynamic_shared<float>()),
        partial(shared + of.partial_at),
        place(dynamic_shared<int64_t>()) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * width, left = samples * positions - first;
    count = left < width ? static_cast<int>(left) : width;
    if (thread < width) {
      place[2 * thread] = (first + thread) / positions;
      place[2 * thread + 1] = (first + thread) % positions;
    }
    // Weights and operands are padded by zeros.
    for (int i = 4 * width + thread; i < plan.partial_at; i += threads) shared[i] = 0;
    block_barrier();
  }

  // Array i of those with C features.
  __device__ __forceinline__ float* array(int i) const {
    return shared + plan.arrays_at + i * width * plan.features_pitch;
  }

  __device__ __forceinline__ float load(const View& v, int64_t step, int feature, int column) const {
    return load_as(v, dtype, step, feature, column);
  }
  __device__ __forceinline__ float load_as(const View& v, DType type, int64_t step, int feature, int column) const {
    return column < count ? load_number(v.data, type, offset(v, step, feature, column)) : 0.0f;
  }
  __device__ __forceinline__ void store(const View& v, int64_t step, int feature, int column, float value) const {
    if (column < count) store_number(v.data, dtype, offset(v, step, feature, column), value);
  }
  __device__ __forceinline__ int64_t offset(const View& v, int64_t step, int feature, int column) const {
    return place[2 * column] * v.sample + place[2 * column + 1] * v.position + step * v.step + feature * v.channel;
  }

  // Weights as they lie in memory: [half][output][input], or [half][input][output].
  __device__ __forceinline__ void fetch(const ColumnProduct& p, const void* weights, bool inputs_last) const {
    constexpr int batch = 8;
    const int lane = thread % 32, warp = thread / 32;
    const int rows = inputs_last ? p.outputs : p.inputs, length = inputs_last ? p.inputs : p.outputs;
    const int row_step = inputs_last ? 1 : p.pitch, step = inputs_last ? p.pitch : 1;
    for (int at = lane; at < length; at += 32)
      for (int first = warp; first < p.halves * rows; first += warps * batch) {
        float loaded[batch];
#pragma unroll
        for (int i = 0; i < batch; ++i) {
          const int row = first + i * warps;
          loaded[i] = row < p.halves * rows ? load_number(weights, dtype, static_cast<int64_t>(row) * length + at) : 0;
        }
#pragma unroll
        for (int i = 0; i < batch; ++i) {
          const int row = first + i * warps, half = row >= rows ? 1 : 0;
          if (row < p.halves * rows)
            shared[p.weight_at + half * p.half_weights + (row - half * rows) * row_step + at * step] = loaded[i];
        }
      }
  }

  // The partial sums of all outputs and columns: weights times an array of operands, or one of two arrays.
  __device__ __forceinline__ void product(const ColumnProduct& p, const float* operands, int pitch,
                                          int half_distance) const {
    const int outputs = p.halves * p.outputs, sums_pitch = pitch_of(p);
    const int padded = (p.inputs + 3) / 4 * 4;
    for (int i = thread; i < outputs * p.slices; i += threads) {
      const int output = i % outputs, slice = i / outputs, half = output >= p.outputs ? 1 : 0;
      const float* from = operands + half * half_distance;
      const float* weights = shared + p.weight_at + half * p.half_weights + output - half * p.outputs;
      const int begin = slice * p.run, end = begin + p.run < padded ? begin + p.run : padded;
      float sums[width] = {};
      for (int k = begin; k < end; k += 4) {
        float weight[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) weight[j] = weights[(k + j) * p.pitch];
#pragma unroll
        for (int column = 0; column < width; ++column) {
          const float4 v = *reinterpret_cast<const float4*>(from + column * pitch + k);
          sums[column] = fma(weight[0], v.x, sums[column]);
          sums[column] = fma(weight[1], v.y, sums[column]);
          sums[column] = fma(weight[2], v.z, sums[column]);
          sums[column] = fma(weight[3], v.w, sums[column]);
        }
      }
#pragma unroll
      for (int column = 0; column < width; ++column)
        partial[(slice * width + column) * sums_pitch + output] = sums[column];
    }
    block_barrier();
  }
  __device__ __forceinline__ float sum_of(const ColumnProduct& p, int output, int column) const {
    const int pitch = pitch_of(p);
    float sum = 0;
    for (int slice = 0; slice < p.slices; ++slice) sum += partial[(slice * width + column) * pitch + output];
    return sum;
  }
  static __device__ __forceinline__ int pitch_of(const ColumnProduct& p) {
    return (p.halves * p.outputs + 31) / 32 * 32 + 4;  // column_pitch
  }

  // Visits this thread's pairs: which of them it is, `ahead` and more being one; feature; column.
  template <typename Visit>
  __device__ __forceinline__ void for_pairs(int features, Visit visit) const {
    const int pairs = features * width;
    const auto one = [&](int i, int pair) {
      if (features_adjacent)
        visit(i, pair % features, pair / features);
      else
        visit(i, pair / width, pair % width);
    };
#pragma unroll
    for (int i = 0; i < ahead; ++i)
      if (thread + i * threads < pairs) one(i, thread + i * threads);
    for (int pair = thread + ahead * threads; pair < pairs; pair += threads) one(ahead, pair);
  }
  __device__ __forceinline__ void read_ahead(float (&values)[ahead], const View& v, int64_t step, int features) const {
    for_pairs(features, [&](int i, int feature, int column) {
#pragma unroll
      for (int j = 0; j < ahead; ++j)
        if (i == j) values[j] = load(v, step, feature, column);
    });
  }
  // Pair i of a view: as it was read ahead, or now.
  __device__ __forceinline__ float value_of(const float (&values)[ahead], int i, const View& v, int64_t step,
                                            int feature, int column) const {
    float value = 0;
    if (i == ahead) value = load(v, step, feature, column);
#pragma unroll
    for (int j = 0; j < ahead; ++j)
      if (i == j) value = values[j];
    return value;
  }
};

// All steps of 8 columns (common/fast_gru.h: ColumnSteps).
//
// Layout.   Views: any strides, matrices with adjacent features or adjacent columns; what is adjacent in `candidate` is
//           read by adjacent threads.
// Work.     A column is a position of a sample, and independent of all others: the block that owns it takes it through
//           all steps and meets no other block. Within the block see Tile; the thread that owns a pair writes it.
// Memory.   Shared memory as in ColumnsPlan: all weights, widened to fp32, so that one loop serves all formats, and the
//           operands of the next product, fp32, [columns][features]. Every product is between two barriers: operands ->
//           | partial sums -> | operands.
// Padding.  Columns beyond the last have zero operands in every step, and nothing of them is stored. Padded inputs have
//           zero weights and zero operands.
// Aliasing. hidden and candidate are replaced, when saving, by the owners of their elements. No others overlap.
// Order.    A column's sums depend on C and R alone, not on how many columns or steps there are.
// Bound.    Latency, where columns are few: a step is three products that wait for one another, six barriers, an
//           exponential and a tanh. With C = 64, R = 16: 65,000 FMA per block and step, 512 cycles; three words of
//           shared memory for 8 of them, 900 cycles; est. 1 us with all that, and the weights' 33 KB once.
__global__ void __launch_bounds__(threads, 2) fast_gru_column_steps(const ColumnSteps p, const ColumnsPlan plan) {
  constexpr int ahead = 4;
  const Tile<ahead> tile(plan, p.dtype, p.samples, p.positions, p.candidate.channel == 1);
  const int C = static_cast<int>(p.C), R = static_cast<int>(p.R);
  const int pitch = plan.features_pitch, hidden_pitch = plan.hidden_pitch, half = width * hidden_pitch;
  const ColumnProduct &of_hidden = plan.product[0], &of_gates = plan.product[1], &of_candidate = plan.product[2];
  float *state = tile.array(0), *gated = tile.array(1), *z = tile.array(2), *hidden = tile.array(3);
  tile.fetch(of_hidden, p.uo, true);
  tile.fetch(of_gates, p.w, true);
  tile.fetch(of_candidate, p.vo, true);
  tile.for_pairs(C, [&](int, int feature, int column) {
    state[column * pitch + feature] = tile.load_as(p.start, p.start_dtype, 0, feature, column);
  });
  block_barrier();

  float products_x[ahead] = {}, candidates_x[ahead] = {};
  for (int64_t step = 0; step < p.steps; ++step) {
    tile.read_ahead(products_x, p.hidden, step, 2 * R);
    tile.product(of_hidden, state, pitch, 0);
    tile.read_ahead(candidates_x, p.candidate, step, C);
    tile.for_pairs(2 * R, [&](int i, int feature, int column) {
      float value =
          tile.sum_of(of_hidden, feature, column) + tile.value_of(products_x, i, p.hidden, step, feature, column);
      if (value < 0) value = 0;  // NaN stays
      const int which = feature >= R ? 1 : 0;
      hidden[which * half + column * hidden_pitch + feature - which * R] = value;
      if (p.save) tile.store(p.hidden, step, feature, column, value);
    });
    block_barrier();

    tile.product(of_gates, hidden, hidden_pitch, half);
    tile.for_pairs(C, [&](int, int feature, int column) {
      const int at = column * pitch + feature;
      const float r = sigmoid(tile.sum_of(of_gates, feature, column));
      z[at] = sigmoid(tile.sum_of(of_gates, C + feature, column));
      gated[at] = r * state[at];
      if (!p.save) return;
      tile.store(p.r, step, feature, column, r);
      tile.store(p.z, step, feature, column, z[at]);
    });
    block_barrier();

    tile.product(of_candidate, gated, pitch, 0);
    tile.for_pairs(C, [&](int i, int feature, int column) {
      const int at = column * pitch + feature;
      const float candidate = tanh(tile.sum_of(of_candidate, feature, column) +
                                   tile.value_of(candidates_x, i, p.candidate, step, feature, column));
      state[at] = (1 - z[at]) * state[at] + z[at] * candidate;
      if (p.save) tile.store(p.candidate, step, feature, column, candidate);
      tile.store(p.out, step, feature, column, state[at]);
    });
    block_barrier();
  }
  tile.for_pairs(C, [&](int, int feature, int column) {
    if (column < tile.count)
      static_cast<float*>(p.last.data)[tile.offset(p.last, 0, feature, column)] = state[column * pitch + feature];
  });
}

// All steps of 8 columns from the last to the first (common/fast_gru.h: ColumnStepsBackward), as fast_gru_column_steps;
// what is adjacent in `dc` is read by adjacent threads.
//
// Order.    Per step dc, dz -> | q = V_o^T dc -> | dr -> | W^T -> | du -> | U_o^T du -> |, which joins the gradient of
//           the state before. What the step before needs of gates and states is read ahead of the last product.
// Aliasing. None, but for carry, which is in and out.
// Bound.    As the forward pass, and per step 7 C + 4 R numbers per column are read and written: 1 KB at C = 64 in 16
//           bits, 0.2 us of 784 columns.
__global__ void __launch_bounds__(threads, 2)
    fast_gru_column_steps_backward(const ColumnStepsBackward p, const ColumnsPlan plan) {
  constexpr int ahead = 2;
  const Tile<ahead> tile(plan, p.dtype, p.samples, p.positions, p.dc.channel == 1);
  const int C = static_cast<int>(p.C), R = static_cast<int>(p.R);
  const int pitch = plan.features_pitch, hidden_pitch = plan.hidden_pitch;
  const ColumnProduct &to_gated = plan.product[0], &to_hidden = plan.product[1], &to_state = plan.product[2];
  float *carry = tile.array(0), *dc = tile.array(1), *dr = tile.array(2), *dz = tile.array(3), *du = tile.array(4);
  tile.fetch(to_gated, p.vo, false);
  tile.fetch(to_hidden, p.w, false);
  tile.fetch(to_state, p.uo, false);
  tile.for_pairs(C, [&](int, int feature, int column) {
    carry[column * pitch + feature] = tile.load_as(p.carry, DType::f32, 0, feature, column);
  });
  // No barrier: the first step begins with pairs of the same owners.

  float grads[ahead] = {}, zs[ahead] = {}, candidates[ahead] = {}, befores[ahead] = {}, rs[ahead] = {},
        hiddens[ahead] = {};
  const auto read_step = [&](int64_t step) {
    if (p.grad.data) tile.read_ahead(grads, p.grad, step, C);
    tile.read_ahead(zs, p.z, step, C);
    tile.read_ahead(candidates, p.candidate, step, C);
    tile.read_ahead(befores, p.before, step, C);
  };
  read_step(p.steps - 1);
  for (int64_t step = p.steps - 1; step >= 0; --step) {
    tile.for_pairs(C, [&](int i, int feature, int column) {
      const int at = column * pitch + feature;
      float g = carry[at];
      if (step + 1 < p.steps) g += tile.sum_of(to_state, feature, column);
      if (p.grad.data) g += tile.value_of(grads, i, p.grad, step, feature, column);
      const float z = tile.value_of(zs, i, p.z, step, feature, column);
      const float candidate = tile.value_of(candidates, i, p.candidate, step, feature, column);
      const float before = tile.value_of(befores, i, p.before, step, feature, column);
      dc[at] = g * z * (1 - candidate * candidate);
      dz[at] = g * (candidate - before) * z * (1 - z);
      carry[at] = g * (1 - z);
      tile.store(p.dc, step, feature, column, dc[at]);
      tile.store(p.dz, step, feature, column, dz[at]);
    });
    tile.read_ahead(rs, p.r, step, C);
    block_barrier();

    tile.product(to_gated, dc, pitch, 0);
    tile.read_ahead(hiddens, p.hidden, step, 2 * R);
    tile.for_pairs(C, [&](int i, int feature, int column) {
      const int at = column * pitch + feature;
      const float q = tile.sum_of(to_gated, feature, column);
      const float r = tile.value_of(rs, i, p.r, step, feature, column);
      const float before = tile.value_of(befores, i, p.before, step, feature, column);
      dr[at] = q * before * r * (1 - r);
      carry[at] += q * r;
      tile.store(p.dr, step, feature, column, dr[at]);
      tile.store(p.gated, step, feature, column, r * before);
    });
    block_barrier();

    tile.product(to_hidden, dr, pitch, width * pitch);  // dz lies after dr
    tile.for_pairs(2 * R, [&](int i, int feature, int column) {
      const bool open = tile.value_of(hiddens, i, p.hidden, step, feature, column) > 0;
      const float value = open ? tile.sum_of(to_hidden, feature, column) : 0.0f;
      du[column * hidden_pitch + feature] = value;
      tile.store(p.du, step, feature, column, value);
    });
    block_barrier();

    if (step > 0) read_step(step - 1);
    tile.product(to_state, du, hidden_pitch, 0);
  }
  tile.for_pairs(C, [&](int, int feature, int column) {
    if (column < tile.count)
      static_cast<float*>(p.carry.data)[tile.offset(p.carry, 0, feature, column)] =
          carry[column * pitch + feature] + tile.sum_of(to_state, feature, column);
  });
}

template <typename Problem>
Error launch_columns(const char* name, void (*kernel)(Problem, ColumnsPlan), const Problem& p, const ColumnsPlan& plan,
                     Stream stream) {
  if (!plan.why_not.empty()) return "fast_gru by " + plan.why_not;
  if (plan.blocks > most_blocks) return "fast_gru: too many positions for one launch";
  return launch(name, kernel, dim3(static_cast<unsigned>(plan.blocks)), dim3(threads),
                static_cast<size_t>(plan.shared_bytes), stream, p, plan);
}

}  // namespace

Text plan_columns(int64_t columns, int64_t C, int64_t R, DType dtype, bool backward, ColumnsPlan& plan) {
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  plan = fast_gru::plan_columns(columns, C, R, dtype, gpu, backward);
  return {};
}

Text column_steps(const ColumnSteps& p, const ColumnsPlan& plan, Stream stream) {
  return launch_columns<ColumnSteps>("fast_gru_column_steps", fast_gru_column_steps, p, plan, stream);
}

Text column_steps_backward(const ColumnStepsBackward& p, const ColumnsPlan& plan, Stream stream) {
  return launch_columns<ColumnStepsBackward>("fast_gru_column_steps_backward", fast_gru_column_steps_backward, p, plan,
                                             stream);
}

}  // namespace rcu_ops::cuda
