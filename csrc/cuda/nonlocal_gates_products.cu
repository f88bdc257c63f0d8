// nonlocal_gates by a library's products: what stands between them, one map of scores at a time in memory, and the cell
// update of a step whose relations are there. For 16-bit data and fp32.
#include "cuda/nonlocal_gates.h"

#include "common/nonlocal_gates_gpu_plan.h"
#include "cuda/device/convert.h"
#include "cuda/device/launch.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shuffle.h"
#include "cuda/nonlocal_gates_forward.h"

namespace rcu_ops::cuda {
namespace {

constexpr int map_threads = 256, map_rows = map_threads / 32;  // of a block: a warp per row
constexpr int cell_threads = 128, cell_width = 4;              // channels of a thread

// A part of the problems (sample, gate): `count` of them from the first-th on, of all gates or of one.
struct Part {
  int64_t first = 0, count = 0, gate = 0;
  bool all_gates = true;
  __device__ __forceinline__ void problem(int64_t i, int64_t gates, int64_t& b, int64_t& g) const {
    b = all_gates ? (first + i) / gates : first + i;
    g = all_gates ? (first + i) % gates : gate;
  }
};

// A warp's row of a part's maps: its query, and which keys that sees.
struct MapRow {
  int64_t query = 0;              // of all queries
  const uint8_t* mask = nullptr;  // of this query
  __device__ __forceinline__ bool sees(const Relation& r, int64_t key) const { return !mask || mask[key * r.mask_key]; }
};
__device__ __forceinline__ MapRow map_row(const Relation& r, const Part& part, int64_t row) {
  int64_t b, g;
  part.problem(row / r.N, r.G, b, g);
  const int64_t n = row % r.N;
  return {(b * r.G + g) * r.N + n, r.mask ? r.mask + b * r.mask_batch + n * r.mask_row : nullptr};
}

__device__ __forceinline__ float sum_of_warp(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += shuffle_xor(value, distance);
  return value;
}

// Products of queries and keys [count N][M], raw, to weights in their place, and, where `queries` is given, every
// query's peak and sum, [3][B G N] with a place for delta. Dead queries get NaN for weights: so does their result, and
// that is how the plain kernels find them (see mend).
//
// Work.     A warp per row, a lane for every 32nd key; three rounds over the row, the later two from the cache.
// Order.    Keys modulo 32, then the lanes by shuffles; it depends on shapes alone.
// Rounding. As eager PyTorch's: scores are what the product left, sums are fp32, weights the maps' dtype.
// Bound.    Memory or L2: a map is read and written once.
__global__ void __launch_bounds__(map_threads)
    map_weights(const Relation r, const Part part, void* maps, float* queries) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * map_rows + threadIdx.x / 32, all = r.B * r.G * r.N;
  if (row >= part.count * r.N) return;  // a whole warp
  const MapRow mine = map_row(r, part, row);
  const float scale = static_cast<float>(r.scale);
  with_numbers<float>(r.dtype, [&](auto type) {
    using T = decltype(type);
    T* map = static_cast<T*>(maps) + row * r.M;
    float peak = -INFINITY, total = 0;
    for (int64_t key = lane; key < r.M; key += 32) {
      if (!mine.sees(r, key)) continue;
      if (r.count) total += 1;
      const float score = scale * widen(map[key]);
      if (score > peak) peak = score;  // NaN does not count: it reaches the sum by itself
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const float other = shuffle_xor(peak, distance);
      if (other > peak) peak = other;
    }
    if (r.count) peak = 0;
    const float base = peak > -INFINITY ? peak : 0.0f;
    const auto power = [&](int64_t key) {
      if (!mine.sees(r, key)) return 0.0f;
      const float score = scale * widen(map[key]);
      return r.count ? score : exp(score - base);
    };
    const int64_t summed = r.count ? 0 : r.M;  // a branch around the loop keeps CUDA 12's compiler busy without end
    for (int64_t key = lane; key < summed; key += 32) total += power(key);
    total = sum_of_warp(total);
    for (int64_t key = lane; key < r.M; key += 32) map[key] = narrow<T>(total == 0 ? NAN : power(key) / total);
    if (queries && lane == 0) queries[mine.query] = peak, queries[all + mine.query] = total;
  });
}

// The weights' gradients to those of the raw products, in their place, and delta of every query, which map_weights gave
// its sum. A dead query's are NaN, as its weights are.
//
// Work.     As map_weights, two rounds over the row.
__global__ void __launch_bounds__(map_threads)
    map_gradients(const Relation r, const Part part, const void* weights, void* gradients, float* queries) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * map_rows + threadIdx.x / 32, all = r.B * r.G * r.N;
  if (row >= part.count * r.N) return;
  const MapRow mine = map_row(r, part, row);
  const float scale = static_cast<float>(r.scale), total = queries[all + mine.query], each = scale / total;
  with_numbers<float>(r.dtype, [&](auto type) {
    using T = decltype(type);
    const T* weight = static_cast<const T*>(weights) + row * r.M;
    T* gradient = static_cast<T*>(gradients) + row * r.M;
    float delta = 0;
    if (!r.count)
      for (int64_t key = lane; key < r.M; key += 32)
        if (mine.sees(r, key)) delta += widen(weight[key]) * widen(gradient[key]);
    delta = sum_of_warp(delta);
    for (int64_t key = lane; key < r.M; key += 32) {
      const float before = widen(gradient[key]);
      const float after = r.count ? before * each : scale * (widen(weight[key]) * (before - delta));
      gradient[key] = narrow<T>(total == 0 ? NAN : mine.sees(r, key) ? after : 0.0f);
    }
    if (lane == 0) queries[2 * all + mine.query] = delta;
  });
}

// `cell_width` neighbouring numbers from `at` on: as one word, or those that are there one by one.
template <typename T>
struct alignas(cell_width * sizeof(T)) Numbers {
  T v[cell_width];
};
template <typename T>
__device__ __forceinline__ Numbers<T> load_numbers(const void* data, int64_t at, bool word, int count) {
  Numbers<T> found{};
  const T* from = static_cast<const T*>(data) + at;
  if (word) return *reinterpret_cast<const Numbers<T>*>(from);
#pragma unroll
  for (int i = 0; i < cell_width; ++i)
    if (i < count) found.v[i] = from[i];
  return found;
}
template <typename T>
__device__ __forceinline__ void store_numbers(void* data, int64_t at, bool word, int count, const Numbers<T>& numbers) {
  T* to = static_cast<T*>(data) + at;
  if (word) {
    *reinterpret_cast<Numbers<T>*>(to) = numbers;
    return;
  }
#pragma unroll
  for (int i = 0; i < cell_width; ++i)
    if (i < count) to[i] = numbers.v[i];
}

// The cell update of a step, or its backward pass (see Forward), from the relations of its four gates.
//
// Work.     A thread per `cell_width` neighbouring channels of a position; it asks for all of its numbers before it
//           uses one. words: every row of every tensor allows words of that many numbers.
// Output.   Every element has one writer; outputs overlap no input.
// Bound.    Memory: at B = 24, P = 49, E = 1024 in bf16 31 MB, 7 us at 4.3 TB/s; backward 48 MB, 11 us.
__global__ void __launch_bounds__(cell_threads)
    update_cells(const Forward p, const Rows relations, int64_t slices, bool words) {
  const Relation& r = p.relation;
  const int64_t row = blockIdx.x / slices, b = row / r.N, n = row % r.N;
  const int64_t channel = (blockIdx.x % slices * cell_threads + threadIdx.x) * cell_width;
  if (channel >= r.E) return;
  const int count = r.E - channel < cell_width ? static_cast<int>(r.E - channel) : cell_width;
  const bool word = words && count == cell_width, backward = p.dx_gates.data != nullptr;
  const auto place = [&](const Rows& rows, int gate) {
    return b * rows.batch + gate * rows.gate + n * rows.row + channel;
  };
  with_numbers<float>(r.dtype, [&](auto type) {
    using T = decltype(type);
    Numbers<T> relation[4], x[4], dh{};
    Numbers<float> before, dc{};
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      relation[gate] = load_numbers<T>(relations.data, place(relations, gate), word, count);
      x[gate] = load_numbers<T>(p.x_gates.data, place(p.x_gates, gate), word, count);
    }
    if (p.cell_is_state) {
      before = load_numbers<float>(p.cell.data, place(p.cell, 0), word, count);
    } else {
      const Numbers<T> narrower = load_numbers<T>(p.cell.data, place(p.cell, 0), word, count);
#pragma unroll
      for (int i = 0; i < cell_width; ++i) before.v[i] = widen(narrower.v[i]);
    }
    if (p.grad_h.data) dh = load_numbers<T>(p.grad_h.data, place(p.grad_h, 0), word, count);
    if (p.grad_c.data) dc = load_numbers<float>(p.grad_c.data, place(p.grad_c, 0), word, count);
    Numbers<T> h, da[4];
    Numbers<float> c;
#pragma unroll
    for (int i = 0; i < cell_width; ++i) {
      const float a[4] = {widen(relation[0].v[i]) + widen(x[0].v[i]), widen(relation[1].v[i]) + widen(x[1].v[i]),
                          widen(relation[2].v[i]) + widen(x[2].v[i]), widen(relation[3].v[i]) + widen(x[3].v[i])};
      const Cell<float> cell(a, before.v[i]);
      h.v[i] = narrow<T>(cell.h()), c.v[i] = cell.after;
      if (backward) {
        float gates[4];
        c.v[i] = cell.gradients(widen(dh.v[i]), dc.v[i], gates);
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) da[gate].v[i] = narrow<T>(gates[gate]);
      }
    }
    if (!backward) {
      store_numbers(p.c.data, place(p.c, 0), word, count, c);
      store_numbers(p.h.data, place(p.h, 0), word, count, h);
      return;
    }
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) store_numbers(p.dx_gates.data, place(p.dx_gates, gate), word, count, da[gate]);
    if (p.cell_is_state) {
      store_numbers(p.dcell.data, place(p.dcell, 0), word, count, c);
      return;
    }
    Numbers<T> narrower;
#pragma unroll
    for (int i = 0; i < cell_width; ++i) narrower.v[i] = narrow<T>(c.v[i]);
    store_numbers(p.dcell.data, place(p.dcell, 0), word, count, narrower);
  });
}

// ---- launches -------------------------------------------------------------------------------------------------------

// Whether samples and gates of a tensor lie in one row, and with it whether one product takes all of them.
bool gates_in_row(const Relation& r, const Rows& rows) { return r.G == 1 || r.B == 1 || rows.batch == r.G * rows.gate; }

Factor factor(const Relation& r, const Part& part, const Rows& rows) {
  const int64_t step = r.G == 1 || !part.all_gates ? rows.batch : rows.gate,
                at = part.first * step + (part.all_gates ? 0 : part.gate * rows.gate);
  return {static_cast<char*>(rows.data) + at * element_size(r.dtype), step, rows.row, 1};
}
Factor map_factor(const Relation& r, void* map) { return {map, r.N * r.M, r.M, 1}; }
Factor transposed(const Factor& f) { return {f.data, f.batch, f.column, f.row}; }

// Calls run(part) for all problems, as many at a time as the maps have room for.
template <typename Run>
Error in_parts(const Relation& r, bool all_gates, int64_t most, Run run) {
  const int64_t problems = all_gates ? r.B * r.G : r.B;
  for (int64_t gate = 0; gate < (all_gates ? 1 : r.G); ++gate)
    for (int64_t first = 0; first < problems; first += most) {
      const int64_t left = problems - first;
      if (Error error = run(Part{first, left < most ? left : most, gate, all_gates}); !error.empty()) return error;
    }
  return {};
}

template <typename Kernel, typename... More>
Error launch_map(const char* name, Kernel kernel, const Relation& r, const Part& part, Stream stream, More... more) {
  const int64_t blocks = ceil_div(part.count * r.N, map_rows);
  if (blocks > most_blocks) return Text(name) + ": too many rows for one launch";
  return launch(name, kernel, dim3(static_cast<unsigned>(blocks)), dim3(map_threads), 0, stream, r, part, more...);
}

Error launch_cells(const Forward& p, const Rows& relations, Stream stream) {
  const Relation& r = p.relation;
  if (r.B * r.N * r.E == 0) return {};
  const int64_t slices = ceil_div(r.E, cell_threads * cell_width), blocks = r.B * r.N * slices;
  if (blocks > most_blocks) return "nonlocal_gates update_cells: too many rows for one launch";
  bool words = true;
  for (const Rows* rows : {&relations, &p.x_gates, &p.cell, &p.h, &p.c, &p.grad_h, &p.grad_c, &p.dx_gates, &p.dcell})
    words = words && reinterpret_cast<uintptr_t>(rows->data) % 16 == 0 && rows->batch % cell_width == 0 &&
            rows->gate % cell_width == 0 && rows->row % cell_width == 0;
  return launch("nonlocal_gates update_cells", update_cells, dim3(static_cast<unsigned>(blocks)), dim3(cell_threads), 0,
                stream, p, relations, slices, words);
}

}  // namespace

Scratch products_scratch_of(const Attention& p) {
  const ProductsPlan plan = plan_products(p.relation, false);
  return {plan.map_bytes, {}};
}

Scratch products_scratch_of(const AttentionGrad& p) {
  const ProductsPlan plan = plan_products(p.relation, true);
  return {round_up(gradient_scratch_bytes(p.relation), 16) + 2 * plan.map_bytes, {}};
}

Text relate_by_products(const Attention& p, void* scratch, Multiply multiply, void* context, Stream stream) {
  const Relation& r = p.relation;
  const bool all_gates =
      gates_in_row(r, r.query) && gates_in_row(r, r.key) && gates_in_row(r, r.value) && gates_in_row(r, p.out);
  const Error error = in_parts(r, all_gates, plan_products(r, false).problems, [&](const Part& part) -> Error {
    const Factor map = map_factor(r, scratch);
    multiply(context, {part.count, r.N, r.D, r.M, factor(r, part, r.query), transposed(factor(r, part, r.key)), map});
    if (Error e = launch_map("nonlocal_gates map_weights", map_weights, r, part, stream, scratch, nullptr); !e.empty())
      return e;
    multiply(context, {part.count, r.N, r.M, r.E, map, factor(r, part, r.value), factor(r, part, p.out)});
    return {};
  });
  return error.empty() ? mend(p, stream) : error;
}

Text relate_by_products(const AttentionGrad& p, void* scratch, Multiply multiply, void* context, Stream stream) {
  const Relation& r = p.relation;
  bool all_gates = true;
  for (const Rows* rows : {&r.query, &r.key, &r.value, &p.grad, &p.dquery, &p.dkey, &p.dvalue})
    all_gates = all_gates && gates_in_row(r, *rows);
  const ProductsPlan plan = plan_products(r, true);
  auto* queries = static_cast<float*>(scratch);
  char* weights = static_cast<char*>(scratch) + round_up(gradient_scratch_bytes(r), 16);
  char* gradients = weights + plan.map_bytes;
  const Error error = in_parts(r, all_gates, plan.problems, [&](const Part& part) -> Error {
    const Factor weight = map_factor(r, weights), gradient = map_factor(r, gradients);
    const Factor query = factor(r, part, r.query), key = factor(r, part, r.key), grad = factor(r, part, p.grad);
    multiply(context, {part.count, r.N, r.D, r.M, query, transposed(key), weight});
    if (Error e = launch_map("nonlocal_gates map_weights", map_weights, r, part, stream, weights, queries); !e.empty())
      return e;
    multiply(context, {part.count, r.M, r.N, r.E, transposed(weight), grad, factor(r, part, p.dvalue)});
    multiply(context, {part.count, r.N, r.E, r.M, grad, transposed(factor(r, part, r.value)), gradient});
    if (Error e =
            launch_map("nonlocal_gates map_gradients", map_gradients, r, part, stream, weights, gradients, queries);
        !e.empty())
      return e;
    multiply(context, {part.count, r.N, r.M, r.D, gradient, key, factor(r, part, p.dquery)});
    multiply(context, {part.count, r.M, r.N, r.D, transposed(gradient), query, factor(r, part, p.dkey)});
    return {};
  });
  return error.empty() ? mend(p, scratch, stream) : error;
}

Text update_cell_from(const Rows& relations, const Step& p, Stream stream) {
  return launch_cells(forward_of(p), relations, stream);
}

Text update_cell_from(const Rows& relations, const StepGrad& p, Stream stream) {
  return launch_cells(forward_of(p), relations, stream);
}

}  // namespace rcu_ops::cuda
