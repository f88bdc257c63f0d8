// fast_gru, all steps forward or backward in one ordinary launch: few channels, every block with all weights.
#include "cuda/device/async_copy.h"
#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/launch.h"
#include "cuda/device/matrix_copy.h"
#include "cuda/device/mma.h"
#include "cuda/device/pack.h"
#include "cuda/device/shared_memory.h"
#include "cuda/device/shuffle.h"
#include "cuda/fast_gru.h"

namespace rcu_ops::cuda {
namespace {

using fast_gru::ColumnProduct;
using fast_gru::ColumnsPlan;
using fast_gru::ColumnSteps;
using fast_gru::ColumnStepsBackward;
using fast_gru::View;

constexpr int most_threads = 32 * fast_gru::column_units, width = fast_gru::columns_of_block;
// sigmoid and tanh as in fast_gru.cu's passes.
__device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + exp(-x)); }

// What the kernels are made of: a block's 8 columns, the weights in its shared memory, and their products.
//
// Owners.  Warp w owns unit w of 8 features of C for all steps, and unit w of the hidden features; lane (g, q) = (lane /
//          4, lane % 4) the unit's feature g of columns 2 q and 2 q + 1, as the matrix unit hands out its results. So
//          states and gates stay in registers, nothing is counted in a loop, and a step meets a barrier only where a
//          product's operands are complete.
// Product. A unit's sum is made by its warp alone. 16 bits: on the matrix unit, operands rounded to the data's type; the
//          halves of every 32 inputs have a sum each. fp32: a lane makes 2 features x 2 columns of every second word of
//          four inputs, and two lanes add up what they have.
// T:       float, __nv_bfloat16 or __half.
template <typename T, bool Backward>
struct Tile {
  static constexpr bool wide = sizeof(T) == 4;
  static constexpr int word = 16 / sizeof(T);

  // Two numbers as they were read: who widens them waits for them.
  struct Pair {
    T first, second;
    __device__ __forceinline__ float2 wide() const { return {widen(first), widen(second)}; }
  };

  const ColumnsPlan& plan;
  int thread, lane, group, quad, warp;
  bool has_unit, has_hidden;  // the warp
  int half;                   // of its hidden unit: 0 r', 1 z'
  int feature, hidden;        // of the lane; hidden within the half
  bool feature_there, hidden_there;
  bool first_there, second_there;  // columns
  T* shared;
  int64_t* places;  // of every column: its sample; its position; where it is in every view, in bytes

  __device__ __forceinline__ Tile(const ColumnsPlan& of, int64_t C, int64_t R, int64_t columns)
      : plan(of),
        thread(static_cast<int>(threadIdx.x)),
        lane(thread % 32),
        group(lane / 4),
        quad(lane % 4),
        warp(shuffle(thread / 32, 0)),  // the compiler knows then that it is one number
        has_unit(warp < of.units),
        has_hidden(warp < 2 * of.half_units),
        half(warp >= of.half_units ? 1 : 0),
        feature(8 * warp + group),
        hidden(8 * (warp - half * of.half_units) + group),
        feature_there(feature < C),
        hidden_there(has_hidden && hidden < R),
        shared(dynamic_shared<T>()),
        places(dynamic_shared<int64_t>()) {
    const int64_t left = columns - static_cast<int64_t>(blockIdx.x) * width;
    first_there = 2 * quad < left;
    second_there = 2 * quad + 1 < left;
  }

  // Where the block's columns are in `views` of T, in their order, and zeros where the plan wants them.
  template <typename... Views>
  __device__ __forceinline__ void place(int64_t positions, const Views&... views) const {
    static_assert(2 + sizeof...(Views) <= fast_gru::column_places);
    if (thread < width) {
      const int64_t column = static_cast<int64_t>(blockIdx.x) * width + thread, sample = quotient(column, positions);
      const int64_t position = column - sample * positions, size = sizeof(T);
      int64_t* to = places + thread;
      to[0] = sample, to[width] = position;
      to += 2 * width;
      ((*to = (sample * views.sample + position * views.position) * size, to += width), ...);
    }
    for (int i = plan.zeros_at + thread * word; i < plan.numbers; i += static_cast<int>(blockDim.x) * word)
      *reinterpret_cast<uint4*>(shared + i) = uint4{};
    block_barrier();
  }

  // Weights on their way to shared memory; who waits for the copies and meets a barrier has them.
  __device__ __forceinline__ void fetch(const ColumnProduct& p, const void* weights) const {
    const T* from = static_cast<const T*>(weights);
    const bool words = p.step == 1 && p.length % word == 0 && reinterpret_cast<uintptr_t>(weights) % 16 == 0;
    const int count = words ? p.length / word : p.length, rows = p.halves * p.rows;
    int shift = 0;
    while (1 << shift < count) ++shift;
    const int gap = p.half_weights - p.rows * p.row_step;  // of the second half
#pragma unroll 1
    for (int i = thread; i < rows << shift; i += static_cast<int>(blockDim.x)) {
      const int row = i >> shift, at = i & ((1 << shift) - 1);
      if (at >= count) continue;
      T* to = shared + p.weight_at + row * p.row_step + (row >= p.rows ? gap : 0);
      const T* given = from + static_cast<int64_t>(row) * p.length;
      if (words)
        async_copy<16>(to + at * word, given + at * word);
      else if constexpr (wide)
        async_copy<4>(to + at * p.step, given + at);
      else
        to[at] = given[at];
    }
  }
  // Of all products, in the plan's order.
  __device__ __forceinline__ void fetch(const void* first, const void* second, const void* third,
                                        const void* fourth = nullptr, const void* fifth = nullptr) const {
#pragma unroll 1
    for (int i = 0; i < plan.products; ++i)
      fetch(plan.product[i], i == 0 ? first : i == 1 ? second : i == 2 ? third : i == 3 ? fourth : fifth);
    async_commit();
  }

  __device__ __forceinline__ T* operands(const ColumnProduct& p, int of_half = 0) const {
    return shared + p.operand_at + of_half * p.half_operands;
  }
  // Input `at` of a product, of this lane's columns.
  __device__ __forceinline__ void put(const ColumnProduct& p, int of_half, int at, float2 value) const {
    T* to = operands(p, of_half);
    if constexpr (wide) {
      to += 2 * quad * p.pitch + at;
      to[0] = value.x, to[p.pitch] = value.y;
    } else {
      reinterpret_cast<uint32_t*>(to)[width / 2 * at + quad] = pack<T>(value.x, value.y);
    }
  }

  // The lane's sums of the unit of outputs from `first` on.
  __device__ __forceinline__ float2 product(const ColumnProduct& p, int of_half, int first) const {
    return product(p, shared + p.weight_at + of_half * p.half_weights, operands(p, of_half), first);
  }
  __device__ __forceinline__ float2 product(const ColumnProduct& p, const T* weights, const T* values,
                                            int first) const {
    if constexpr (wide) {
      const int slice = group % 2;
      const float* a = weights + (first + group - slice) * p.pitch + 4 * slice;
      const float* b = values + 2 * quad * p.pitch + 4 * slice;
      float sums[2][2] = {};
#pragma unroll 2
      for (int k = 0; k < p.depth; k += 8) {
        float4 weight[2], value[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          weight[i] = *reinterpret_cast<const float4*>(a + i * p.pitch);
          value[i] = *reinterpret_cast<const float4*>(b + i * p.pitch);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            sums[i][j] = fma(weight[i].x, value[j].x, sums[i][j]);
            sums[i][j] = fma(weight[i].y, value[j].y, sums[i][j]);
            sums[i][j] = fma(weight[i].z, value[j].z, sums[i][j]);
            sums[i][j] = fma(weight[i].w, value[j].w, sums[i][j]);
          }
        a += 8, b += 8;
      }
      float own[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        own[j] = slice ? sums[1][j] : sums[0][j];
        own[j] += shuffle_xor(slice ? sums[0][j] : sums[1][j], 4);
      }
      return {own[0], own[1]};
    } else {
      // Tile i of the weights, in the order of a fragment: rows 0 to 7 are the outputs with inputs 0 to 15, rows 8 to 15
      // the same outputs with inputs 16 to 31. So one fragment serves both halves of the inputs, and of each product the
      // other half's rows are left out. Lane 8 i + j passes row j of tile i: an output, or an input where the weights lie
      // transposed.
      const int tile = lane / 8, input = tile / 2 * 8 + tile % 2 * 16;
      const T* a = weights + (Backward ? (input + lane % 8) * p.pitch + first : (first + lane % 8) * p.pitch + input);
      const T* b = values + width * lane;
      float low[4] = {}, high[4] = {};
#pragma unroll 2
      for (int k = 0; k < p.depth; k += 32) {
        uint32_t weight[4], value[4];
        load_matrix<4, Backward>(weight, a);
        load_matrix<4, true>(value, b);
        mma_m16n8k16<T>(low, weight, {value[0], value[1]});
        mma_m16n8k16<T>(high, weight, {value[2], value[3]});
        a += Backward ? 32 * p.pitch : 32;
        b += width * 32;
      }
      return {low[0] + high[2], low[1] + high[3]};
    }
  }

  // A feature in the view that place() got as number `index`, at one step after the other: where it is of sample 0 and
  // position 0, and which of the lane's columns there are.
  struct Walk {
    int index;
    bool first, second;
    unsigned char* at;
  };
  __device__ __forceinline__ Walk walk(int index, const View& v, int64_t step, int of, bool there) const {
    const int64_t offset = step * v.step + of * v.channel;
    return {index, there && first_there, there && second_there,
            reinterpret_cast<unsigned char*>(static_cast<T*>(v.data) + offset)};
  }
  struct alignas(16) Both {
    int64_t first, second;
  };
  __device__ __forceinline__ Both columns(const Walk& w) const {
    return *reinterpret_cast<const Both*>(places + (2 + w.index) * width + 2 * quad);
  }
  __device__ __forceinline__ Pair load(const Walk& w, bool there = true) const {
    const Both both = columns(w);
    Pair pair{};
    if (there && w.first) pair.first = *reinterpret_cast<const T*>(w.at + both.first);
    if (there && w.second) pair.second = *reinterpret_cast<const T*>(w.at + both.second);
    return pair;
  }
  __device__ __forceinline__ void store(const Walk& w, float2 value) const {
    const Both both = columns(w);
    if (w.first) *reinterpret_cast<T*>(w.at + both.first) = narrow<T>(value.x);
    if (w.second) *reinterpret_cast<T*>(w.at + both.second) = narrow<T>(value.y);
  }
  // One step further, or back.
  __device__ __forceinline__ static void advance(Walk& w, const View& v, int by = 1) {
    w.at += by * v.step * static_cast<int64_t>(sizeof(T));
  }

  // The lane's feature of C in a view of one step and of another type.
  __device__ __forceinline__ int64_t offset_of(const View& v, int column) const {
    return places[column] * v.sample + places[width + column] * v.position + feature * v.channel;
  }
  __device__ __forceinline__ float2 load_once(const View& v, DType dtype) const {
    float2 pair{};
    if (feature_there && first_there) pair.x = load_number(v.data, dtype, offset_of(v, 2 * quad));
    if (feature_there && second_there) pair.y = load_number(v.data, dtype, offset_of(v, 2 * quad + 1));
    return pair;
  }
  template <typename S>
  __device__ __forceinline__ void store_once(const View& v, float2 value) const {
    if (feature_there && first_there) static_cast<S*>(v.data)[offset_of(v, 2 * quad)] = narrow<S>(value.x);
    if (feature_there && second_there) static_cast<S*>(v.data)[offset_of(v, 2 * quad + 1)] = narrow<S>(value.y);
  }
};

// Both columns of a lane.
template <typename Function, typename... Pairs>
__device__ __forceinline__ float2 each(Function function, Pairs... pairs) {
  return {function(pairs.x...), function(pairs.y...)};
}

// All steps of 8 columns (common/fast_gru.h: ColumnSteps).
//
// Layout.   Views: any strides. Adjacent lanes have adjacent features (8 of them) and columns (4 pairs).
// Work.     A column is a position of a sample, and independent of all others: the block that owns it takes it through
//           all steps and meets no other block. Within the block see Tile.
// Memory.   Shared memory as in ColumnsPlan: all weights, and the operands of each product. x is read two steps ahead
//           of its products, or a step ahead what the library made of it.
// Order.    Three barriers per step: state -> U_o -> | r', z' -> W -> | r * state -> V_o -> |. What is rewritten was read
//           before the barrier before. A column's sums depend on C and R alone, not on how many columns or steps there
//           are.
// Padding.  Features and columns that are not there are zero as operands, and nothing of them is stored.
// Aliasing. hidden and candidate are replaced, when saving, by the owners of their elements. No others overlap.
// Bound.    Latency, where columns are few. 16 bits, C = 64, R = 16: per step three times shared memory to matrix unit
//           to registers to shared memory and a barrier, est. 700 cycles with the exponentials, 0.4 us. fp32: 65,000
//           FMA, 512 cycles, which half of the warps wait out in the first product; with the rest est. 1500 cycles.
template <typename T>
__global__ void __launch_bounds__(most_threads, 1) fast_gru_column_steps(const ColumnSteps p, const ColumnsPlan plan) {
  using Block = Tile<T, false>;
  const Block tile(plan, p.C, p.R, p.samples * p.positions);
  const ColumnProduct &of_hidden = plan.product[0], &of_gates = plan.product[1], &of_candidate = plan.product[2];
  const ColumnProduct &x_hidden = plan.product[3], &x_candidate = plan.product[4];
  const int feature = tile.feature, hidden = tile.half * static_cast<int>(p.R) + tile.hidden;
  tile.place(p.positions, p.hidden, p.candidate, p.r, p.z, p.out, p.x);
  tile.fetch(p.uo, p.w, p.vo, p.ux, p.vx);
  auto hidden_walk = tile.walk(0, p.hidden, 0, hidden, tile.hidden_there);
  auto candidate_walk = tile.walk(1, p.candidate, 0, feature, tile.feature_there);
  auto r_walk = tile.walk(2, p.r, 0, feature, tile.feature_there);
  auto z_walk = tile.walk(3, p.z, 0, feature, tile.feature_there);
  auto out_walk = tile.walk(4, p.out, 0, feature, tile.feature_there);
  auto x_walk = tile.walk(5, p.x, 0, feature, tile.feature_there);
  // Read ahead: x of the step after the next one, or what the library made of the next one's.
  typename Block::Pair x{}, hidden_x{}, candidate_x{};
  if (plan.makes_x) {
    const typename Block::Pair now = tile.load(x_walk);
    tile.advance(x_walk, p.x);
    x = tile.load(x_walk, p.steps > 1);
    if (tile.feature_there) tile.put(x_hidden, 0, feature, now.wide());
  } else {
    hidden_x = tile.load(hidden_walk), candidate_x = tile.load(candidate_walk);
  }
  const T* inputs = tile.operands(x_hidden);  // x of this step
  const auto product_of_x = [&](const ColumnProduct& of, int first) {
    return tile.product(of, tile.shared + of.weight_at, inputs, first);
  };
  float2 state = tile.load_once(p.start, p.start_dtype);
  if (p.first.data) tile.template store_once<T>(p.first, state);
  if (tile.feature_there) tile.put(of_hidden, 0, feature, state);
  async_wait<0>();
  block_barrier();

  for (int64_t left = p.steps; left > 0; --left) {
    const bool more = left > 1;
    const int next_inputs = inputs == tile.operands(x_hidden) ? 1 : 0;
    if (tile.has_hidden) {
      const float2 sum = tile.product(of_hidden, 0, hidden - tile.group);
      const float2 value = each(
          [](float a, float b) {
            const float both = a + b;
            return both < 0 ? 0 : both;  // NaN stays
          },
          sum, plan.makes_x ? product_of_x(x_hidden, hidden - tile.group) : hidden_x.wide());
      if (tile.hidden_there) tile.put(of_gates, tile.half, tile.hidden, value);
      if (p.save) tile.store(hidden_walk, value);
      tile.advance(hidden_walk, p.hidden);
      if (!plan.makes_x) hidden_x = tile.load(hidden_walk, more);
    }
    block_barrier();

    float2 z{};
    if (tile.has_unit) {
      const float2 r = each([](float a) { return sigmoid(a); }, tile.product(of_gates, 0, feature - tile.group));
      if (tile.feature_there) tile.put(of_candidate, 0, feature, {r.x * state.x, r.y * state.y});
      z = each([](float a) { return sigmoid(a); }, tile.product(of_gates, 1, feature - tile.group));
      if (p.save) {
        tile.store(r_walk, r);
        tile.store(z_walk, z);
        tile.advance(r_walk, p.r), tile.advance(z_walk, p.z);
      }
    }
    block_barrier();

    if (tile.has_unit) {
      const float2 sum = tile.product(of_candidate, 0, feature - tile.group);
      const float2 of_x = plan.makes_x ? product_of_x(x_candidate, feature - tile.group) : candidate_x.wide();
      const float2 candidate = each([](float a, float b) { return tanh(a + b); }, sum, of_x);
      state =
          each([](float old, float gate, float found) { return (1 - gate) * old + gate * found; }, state, z, candidate);
      if (tile.feature_there) tile.put(of_hidden, 0, feature, state);
      if (p.save) tile.store(candidate_walk, candidate);
      tile.advance(candidate_walk, p.candidate);
      if (plan.makes_x) {
        if (tile.feature_there && more) tile.put(x_hidden, next_inputs, feature, x.wide());
        tile.advance(x_walk, p.x);
        x = tile.load(x_walk, left > 2);
      } else {
        candidate_x = tile.load(candidate_walk, more);
      }
      tile.store(out_walk, state);
      tile.advance(out_walk, p.out);
    }
    inputs = tile.operands(x_hidden, next_inputs);
    block_barrier();
  }
  tile.template store_once<float>(p.last, state);
}

// All steps of 8 columns from the last to the first (common/fast_gru.h: ColumnStepsBackward), as fast_gru_column_steps.
//
// Order.    Three barriers per step: dc, dz -> | q = V_o^T dc -> dr -> | W^T -> du -> | U_o^T du joins the gradient of
//           the state before, in the owner's registers. What the step before needs is read ahead as soon as this one's
//           has been used.
// Aliasing. None, but for carry, which is in and out.
// Bound.    As the forward pass, and per step 7 C + 4 R numbers per column are read and written: 1 KB at C = 64 in 16
//           bits, 0.2 us of 784 columns.
template <typename T>
__global__ void __launch_bounds__(most_threads, 1)
    fast_gru_column_steps_backward(const ColumnStepsBackward p, const ColumnsPlan plan) {
  using Block = Tile<T, true>;
  using Pair = typename Block::Pair;
  const Block tile(plan, p.C, p.R, p.samples * p.positions);
  const ColumnProduct &to_gated = plan.product[0], &to_hidden = plan.product[1], &to_state = plan.product[2];
  const int feature = tile.feature, hidden = tile.half * static_cast<int>(p.R) + tile.hidden;
  tile.place(p.positions, p.hidden, p.r, p.z, p.candidate, p.before, p.grad, p.dc, p.dr, p.dz, p.du, p.gated);
  tile.fetch(p.vo, p.w, p.uo);
  const int64_t last = p.steps - 1;
  const auto walk = [&](int index, const View& v) { return tile.walk(index, v, last, feature, tile.feature_there); };
  auto hidden_walk = tile.walk(0, p.hidden, last, hidden, tile.hidden_there);
  auto r_walk = walk(1, p.r), z_walk = walk(2, p.z), candidate_walk = walk(3, p.candidate),
       before_walk = walk(4, p.before), grad_walk = walk(5, p.grad), dc_walk = walk(6, p.dc), dr_walk = walk(7, p.dr),
       dz_walk = walk(8, p.dz), gated_walk = walk(10, p.gated);
  auto du_walk = tile.walk(9, p.du, last, hidden, tile.hidden_there);
  Pair grad_pair{}, z_pair, candidate_pair, before_pair, r_pair, hidden_pair;
  const auto read = [&](Pair& pair, auto& from, const View& v, bool there) {
    pair = tile.load(from, there);
    tile.advance(from, v, -1);
  };
  const auto write = [&](auto& to, const View& v, float2 value) {
    tile.store(to, value);
    tile.advance(to, v, -1);
  };
  const auto read_step = [&](bool there) {
    if (p.grad.data) read(grad_pair, grad_walk, p.grad, there);
    read(z_pair, z_walk, p.z, there);
    read(candidate_pair, candidate_walk, p.candidate, there);
    read(before_pair, before_walk, p.before, there);
    read(r_pair, r_walk, p.r, there);
  };
  read_step(true);
  read(hidden_pair, hidden_walk, p.hidden, true);
  float2 carry = tile.load_once(p.carry, DType::f32);
  async_wait<0>();
  block_barrier();

  for (int64_t left = p.steps; left > 0; --left) {
    const bool more = left > 1;
    if (tile.has_unit) {
      const float2 grad = grad_pair.wide(), z = z_pair.wide(), candidate = candidate_pair.wide(),
                   before = before_pair.wide();
      const float2 g = each([](float a, float b) { return a + b; }, carry, grad);
      const float2 dc =
          each([](float d, float gate, float found) { return d * gate * (1 - found * found); }, g, z, candidate);
      const float2 dz =
          each([](float d, float gate, float found, float old) { return d * (found - old) * gate * (1 - gate); }, g, z,
               candidate, before);
      carry = each([](float d, float gate) { return d * (1 - gate); }, g, z);
      if (tile.feature_there) {
        tile.put(to_gated, 0, feature, dc);
        tile.put(to_hidden, 1, feature, dz);
      }
      write(dc_walk, p.dc, dc);
      write(dz_walk, p.dz, dz);
    }
    block_barrier();

    if (tile.has_unit) {
      const float2 q = tile.product(to_gated, 0, feature - tile.group), r = r_pair.wide(), before = before_pair.wide();
      const float2 dr = each([](float d, float old, float gate) { return d * old * gate * (1 - gate); }, q, before, r);
      carry = each([](float c, float d, float gate) { return c + d * gate; }, carry, q, r);
      if (tile.feature_there) tile.put(to_hidden, 0, feature, dr);
      read_step(more);
      write(dr_walk, p.dr, dr);
      write(gated_walk, p.gated, each([](float gate, float old) { return gate * old; }, r, before));
    }
    block_barrier();

    if (tile.has_hidden) {
      const float2 sum = tile.product(to_hidden, tile.half, tile.hidden - tile.group);
      const float2 du = each([](float d, float h) { return h <= 0 ? 0.0f : d; }, sum, hidden_pair.wide());
      if (tile.hidden_there) tile.put(to_state, 0, hidden, du);
      read(hidden_pair, hidden_walk, p.hidden, more);
      write(du_walk, p.du, du);
    }
    block_barrier();

    if (tile.has_unit)
      carry = each([](float a, float b) { return a + b; }, carry, tile.product(to_state, 0, feature - tile.group));
  }
  tile.template store_once<float>(p.carry, carry);
}

template <typename Problem>
using Kernel = void (*)(Problem, ColumnsPlan);

template <typename Problem>
Error launch_columns(const char* name, Kernel<Problem> in_fp32, Kernel<Problem> in_bf16, Kernel<Problem> in_half,
                     const Problem& p, const ColumnsPlan& plan, Stream stream) {
  if (!plan.why_not.empty()) return "fast_gru by " + plan.why_not;
  if (plan.blocks > most_blocks) return "fast_gru: too many positions for one launch";
  const Kernel<Problem> kernel = p.dtype == DType::f32 ? in_fp32 : p.dtype == DType::bf16 ? in_bf16 : in_half;
  return launch(name, kernel, dim3(static_cast<unsigned>(plan.blocks)), dim3(static_cast<unsigned>(plan.threads)),
                static_cast<size_t>(plan.shared_bytes), stream, p, plan);
}

}  // namespace

Text plan_columns(int64_t columns, int64_t C, int64_t R, DType dtype, bool backward, ColumnsPlan& plan, bool makes_x) {
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  plan = fast_gru::plan_columns(columns, C, R, dtype, gpu, backward, makes_x);
  return {};
}

Text column_steps(const ColumnSteps& p, const ColumnsPlan& plan, Stream stream) {
  return launch_columns<ColumnSteps>("fast_gru_column_steps", fast_gru_column_steps<float>,
                                     fast_gru_column_steps<__nv_bfloat16>, fast_gru_column_steps<__half>, p, plan,
                                     stream);
}

Text column_steps_backward(const ColumnStepsBackward& p, const ColumnsPlan& plan, Stream stream) {
  return launch_columns<ColumnStepsBackward>("fast_gru_column_steps_backward", fast_gru_column_steps_backward<float>,
                                             fast_gru_column_steps_backward<__nv_bfloat16>,
                                             fast_gru_column_steps_backward<__half>, p, plan, stream);
}

}  // namespace rcu_ops::cuda
