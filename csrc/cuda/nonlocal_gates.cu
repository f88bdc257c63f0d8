// nonlocal_gates on CUDA devices: the plain kernels (any sizes, dtype, strides and masks) and the choice of kernel.
#include "cuda/nonlocal_gates.h"

#include "common/nonlocal_gates_gpu_plan.h"
#include "common/nonlocal_gates_library.h"
#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/launch.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shared_memory.h"
#include "cuda/device/shuffle.h"
#include "cuda/nonlocal_gates_forward.h"
#include "cuda/nonlocal_gates_tile.h"

namespace rcu_ops::cuda {
namespace {

// ---- parts of the plain kernels -------------------------------------------------------------------------------------
//
// A map holds what a block's R rows have to do with other rows: map[column][row], a lane of every warp per row. All
// arithmetic is in S: double for fp64, else float.

constexpr int R = plain_relate_rows, threads = plain_relate_threads, warps = plain_relate_warps;
constexpr int tile_columns = plain_relate_columns, depth = plain_relate_depth;
constexpr int terms = 8;  // that are added up one after the other before their sum is added to others
constexpr int L = 4;      // a thread adds up L rows x 2 columns of scores, or L rows x J channels of results

template <typename S>
struct alignas(16) Lanes {
  S v[L];
};

// Rows of `dtype`, which is double where S is, and float, bf16 or half where S is float. The kernels know S alone: a
// branch that all threads take alike around a loop that copies costs nothing, a kernel per dtype costs the build.
struct Matrix {
  const void* data;
  int64_t first, row;  // element (i, k) is data[first + i * row + k]
  __device__ __forceinline__ Matrix from(int64_t i) const { return {data, first + i * row, row}; }
};

__device__ __forceinline__ Matrix rows_at(const Rows& rows, int64_t b, int64_t g) {
  return {rows.data, b * rows.batch + g * rows.gate, rows.row};
}

// map[column][row] = left_row . right_column over `channels` numbers; rows beyond the last are zero. All threads;
// begins and ends with a barrier. Sums of `terms` terms, then of these within a stage, then of stages: one long sum, or
// one of a whole stage, would round more than a library's product does.
template <typename S>
__device__ void products(DType dtype, Matrix left, int rows, Matrix right, int64_t columns, int64_t channels, S* stage,
                         S* map) {
  constexpr int left_pitch = R + plain_relate_pad, right_pitch = tile_columns + plain_relate_pad;
  S *a = stage, *b = stage + depth * left_pitch;
  const int my_row = threadIdx.x % (R / L) * L, my_column = threadIdx.x / (R / L) * 2;
  for (int64_t column0 = 0; column0 < columns; column0 += tile_columns) {
    const int here = columns - column0 < tile_columns ? static_cast<int>(columns - column0) : tile_columns;
    S total[2][L] = {};
    for (int64_t k0 = 0; k0 < channels; k0 += depth) {
      block_barrier();  // the stage before this one has been read
      const int k = threadIdx.x % depth;
      const bool there = k0 + k < channels;
      with_numbers<S>(dtype, [&](auto type) {
        const auto* from_left = static_cast<const decltype(type)*>(left.data) + left.first + k0 + k;
        const auto* from_right =
            static_cast<const decltype(type)*>(right.data) + right.first + column0 * right.row + k0 + k;
#pragma unroll
        for (int r = threadIdx.x / depth; r < R; r += threads / depth)
          a[k * left_pitch + r] = there && r < rows ? widen(from_left[r * left.row]) : S(0);
#pragma unroll
        for (int c = threadIdx.x / depth; c < tile_columns; c += threads / depth)
          b[k * right_pitch + c] = there && c < here ? widen(from_right[c * right.row]) : S(0);
      });
      block_barrier();
      S sum[2][L] = {};
#pragma unroll 2
      for (int i0 = 0; i0 < depth; i0 += terms) {
        S part[2][L] = {};
#pragma unroll
        for (int i = i0; i < i0 + terms; ++i) {
          const Lanes<S> x = *reinterpret_cast<const Lanes<S>*>(a + i * left_pitch + my_row);
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            const S y = b[i * right_pitch + my_column + n];
#pragma unroll
            for (int m = 0; m < L; ++m) part[n][m] = fma(x.v[m], y, part[n][m]);
          }
        }
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int m = 0; m < L; ++m) sum[n][m] += part[n][m];
      }
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int m = 0; m < L; ++m) total[n][m] += sum[n][m];
    }
    if (column0 == 0) block_barrier();  // whoever reads the map from before has done so
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if (my_column + n >= here) break;
      Lanes<S> out;
#pragma unroll
      for (int m = 0; m < L; ++m) out.v[m] = total[n][m];
      *reinterpret_cast<Lanes<S>*>(map + (column0 + my_column + n) * R + my_row) = out;
    }
  }
  block_barrier();
}

// total[i][j] += sum over c of map[c][L warp + i] * right_c[channel0 + lane + 32 j] for a slice of 32 J channels,
// leaving out the c that are not alive: what stands in their rows is not even multiplied by zero. All threads; begins
// with a barrier, after which `map` may be read.
template <typename S, int J, typename Alive>
__device__ void sums(DType dtype, const S* map, int64_t columns, Matrix right, int64_t channel0, int64_t channels,
                     Alive alive, S* stage, S (&total)[L][J]) {
  constexpr int slice_width = 32 * J;
  const int lane = threadIdx.x % 32, my_row = threadIdx.x / 32 * L;
  const int width = channels - channel0 < slice_width ? static_cast<int>(channels - channel0) : slice_width;
  for (int64_t c0 = 0; c0 < columns; c0 += depth) {
    block_barrier();  // the stage before this one has been read
    const int count = columns - c0 < depth ? static_cast<int>(columns - c0) : depth;
    with_numbers<S>(dtype, [&](auto type) {
      const int j = threadIdx.x % slice_width;
      const auto* from = static_cast<const decltype(type)*>(right.data) + right.first + c0 * right.row + channel0 + j;
#pragma unroll 4
      for (int c = threadIdx.x / slice_width; c < count; c += threads / slice_width)
        stage[c * slice_width + j] = j < width && alive(c0 + c) ? widen(from[c * right.row]) : S(0);
    });
    block_barrier();
    S sum[L][J] = {};
    for (int begin = 0; begin < count; begin += terms) {
      const int end = begin + terms < count ? begin + terms : count;
      S part[L][J] = {};
#pragma unroll 1
      for (int c = begin; c < end; ++c) {
        const Lanes<S> w = *reinterpret_cast<const Lanes<S>*>(map + (c0 + c) * R + my_row);
#pragma unroll
        for (int j = 0; j < J; ++j) {
          const S x = stage[c * slice_width + lane + 32 * j];
#pragma unroll
          for (int i = 0; i < L; ++i) part[i][j] = fma(w.v[i], x, part[i][j]);
        }
      }
#pragma unroll
      for (int i = 0; i < L; ++i)
#pragma unroll
        for (int j = 0; j < J; ++j) sum[i][j] += part[i][j];
    }
#pragma unroll
    for (int i = 0; i < L; ++i)
#pragma unroll
      for (int j = 0; j < J; ++j) total[i][j] += sum[i][j];
  }
}

// Calls visit(total[i][j], row, channel within the slice) for the results of this thread.
template <typename S, int J, typename Visit>
__device__ __forceinline__ void for_results(const S (&total)[L][J], Visit visit) {
#pragma unroll
  for (int i = 0; i < L; ++i)
#pragma unroll
    for (int j = 0; j < J; ++j)
      visit(total[i][j], threadIdx.x / 32 * L + i, static_cast<int>(threadIdx.x % 32) + 32 * j);
}

// Of one query, a lane's: over the keys seen so far the largest score, the sum of exp(score - peak) (under count: their
// number), and the sum of those powers times the products of the gradient. Every warp holds the same.
template <typename S>
struct Query {
  S peak = -static_cast<S>(INFINITY), sum = 0, delta = 0;
  __device__ __forceinline__ S base() const { return peak > -static_cast<S>(INFINITY) ? peak : S(0); }
  __device__ __forceinline__ S divisor() const { return sum == 0 ? S(1) : sum; }  // dead: zeros stay zeros
};

// Whether this lane's query sees a key: it exists and is not masked.
struct Visible {
  const uint8_t* mask = nullptr;  // of this lane's query
  int64_t step = 0;
  bool exists = false;
  __device__ __forceinline__ bool operator()(int64_t key) const { return exists && (!mask || mask[key * step]); }
};

__device__ __forceinline__ Visible visible_from(const Relation& r, int64_t b, int64_t query) {
  Visible v;
  v.exists = query < r.N;
  v.step = r.mask_key;
  if (r.mask && v.exists) v.mask = r.mask + b * r.mask_batch + query * r.mask_row;
  return v;
}

// The block's value of this lane's row: of all warps', in their order. `memory`: [warps][R]. All threads.
template <typename S, typename Combine>
__device__ S across_warps(S value, S* memory, Combine combine) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  block_barrier();
  memory[warp * R + lane] = value;
  block_barrier();
  value = memory[lane];
#pragma unroll
  for (int w = 1; w < warps; ++w) value = combine(value, memory[w * R + lane]);
  return value;
}

// A raw product, scaled; -inf (under count zero) where the key is not seen.
template <typename S>
__device__ __forceinline__ S score_of(const Relation& r, bool sees, S product) {
  return sees ? static_cast<S>(r.scale) * product : r.count ? S(0) : -static_cast<S>(INFINITY);
}

// Takes a chunk of raw products into the statistics of this lane's query, and leaves the scores in the map. gradients:
// the products of the gradient with the values, or nullptr.
template <typename S>
__device__ void look_at(const Relation& r, const Visible& visible, int64_t key0, int64_t columns, S* map,
                        const S* gradients, S* memory, Query<S>& query) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto add = [](S x, S y) { return x + y; };
  S largest = -static_cast<S>(INFINITY), seen = 0;
  for (int64_t c = warp; c < columns; c += warps) {
    const bool sees = visible(key0 + c);
    const S score = score_of(r, sees, map[c * R + lane]);
    map[c * R + lane] = score;
    if (sees) seen += 1;
    if (score > largest) largest = score;  // NaN does not count: it reaches the sum by itself
  }
  if (r.count) {
    query.peak = 0;
    query.sum += across_warps(seen, memory, add);
    return;
  }
  largest = across_warps(largest, memory, [](S x, S y) { return y > x ? y : x; });
  Query<S> next = query;
  if (largest > next.peak) next.peak = largest;
  const S shrink = exp(query.peak - next.base());
  S sum = 0, delta = 0;
  for (int64_t c = warp; c < columns; c += warps) {
    const S power = exp(map[c * R + lane] - next.base());
    sum += power;
    if (gradients) delta += power * gradients[c * R + lane];
  }
  next.sum = query.sum * shrink + across_warps(sum, memory, add);
  if (gradients) next.delta = query.delta * shrink + across_warps(delta, memory, add);
  query = next;
}

// Scores of look_at to weights; each thread changes what it alone read there.
template <typename S>
__device__ __forceinline__ S weight_of(const Relation& r, const Query<S>& query, S score) {
  return (r.count ? score : exp(score - query.base())) / query.divisor();
}

// The gradient of a score from that of its weight; dead queries have none, whatever `product` is.
template <typename S>
__device__ __forceinline__ S score_gradient(const Relation& r, const Query<S>& query, bool sees, S weight, S product) {
  if (query.sum == 0) return 0;
  const S scale = static_cast<S>(r.scale);
  return r.count ? (sees ? scale * product / query.sum : S(0)) : scale * (weight * (product - query.delta));
}

// Whether a block may leave its rows as they are: where a plan mends, results are there, and only those of dead queries,
// or that a dead query reached, have to be made again. They are NaN from the first number of a block's first slice on,
// which no other block writes. All threads get the same answer, before the block's first barrier, whose writes come
// after it.
__device__ __forceinline__ bool is_sound(const PlainRelatePlan& plan, DType dtype, const Rows& result, int64_t b,
                                         int64_t g, const PlainRelatePlace& at, int64_t channel, int64_t channels) {
  if (!plan.mends) return false;
  const int lane = threadIdx.x % 32;
  float first = 0;
  if (lane < at.rows && channel < channels)
    first = load_number(result.data, dtype, rows_at(result, b, g).from(at.row0 + lane).first + channel);
  return ballot(first != first) == 0;
}

// ---- forward, and the gates' part of the step's backward pass -------------------------------------------------------

// out = w value (common/nonlocal_gates.h), any dtype.
//
// Work.     A block owns R queries of a sample (and gate, or all four gates) and every splits-th slice of channels.
//           Scores: tiles of R x 64, channels staged 32 at a time; weights: lane = query, a warp takes every 8th key;
//           results: R x 64 (fp64: 32), keys staged 32 at a time, gate by gate into shared memory, where the cell
//           update takes them.
// Memory.   Shared memory as in PlainRelatePlan: a stage, the statistics of the rows, the results of a slice, and a map
//           per gate (resident) or one for `chunk` keys, made again for every slice. No map ever leaves the block.
// Order.    Scores: 8 terms, then sums of 32, then of these; statistics: keys modulo 8, then the warps, then chunks;
//           results: 8 keys, then sums of 32, then of these. No atomics. All of it depends on shapes (and, beyond what fits, the size of
//           shared memory) alone.
// Output.   Every element has one writer; dead queries get zeros whatever the values are.
// Bound.    Arithmetic: 2 M (D splits + E) FLOP per query and gate on the FMA units, from shared memory: 3 reads for 8
//           FMAs, so half of the FMA rate at best. Bytes: a sample's rows once per 32 queries.
template <typename S>
__global__ void __launch_bounds__(threads, sizeof(S) == 8 ? 1 : 2)
    plain_relate(const Forward p, const PlainRelatePlan plan) {
  constexpr int width = plain_relate_slice_bytes / static_cast<int>(sizeof(S)), J = width / 32;
  const Relation& r = p.relation;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const PlainRelatePlace at = place_of(plan, blockIdx.x, r.N);
  const int64_t problem_gates = p.gates == 1 ? r.G : 1, b = at.problem / problem_gates,
                gate0 = at.problem % problem_gates;
  if (is_sound(plan, r.dtype, p.out, b, gate0, at, at.split * width, r.E)) return;
  S *stage = dynamic_shared<S>(), *memory = dynamic_shared<S>(plan.numbers_at), *peaks = memory + warps * R;
  S *totals = peaks + 4 * R, *results = dynamic_shared<S>(plan.results_at);  // [gate][row][channel]
  const Visible visible = visible_from(r, b, at.row0 + lane);

  // The first round over the keys is for the statistics alone, every other one for a slice.
  for (int64_t channel0 = -width; channel0 < r.E;
       channel0 += channel0 < 0 ? (at.split + 1) * width : plan.splits * width) {
    const bool first = channel0 < 0;
    for (int gate = 0; gate < p.gates; ++gate) {
      S* map = dynamic_shared<S>(plan.maps_at + (plan.resident ? gate * plan.map_bytes : 0));
      block_barrier();  // the statistics are there, and the results have been taken
      Query<S> query;
      if (!first) query.peak = peaks[gate * R + lane], query.sum = totals[gate * R + lane];
      S total[L][J] = {};
      for (int64_t key0 = 0; key0 < r.M; key0 += plan.chunk) {
        const int64_t columns = r.M - key0 < plan.chunk ? r.M - key0 : plan.chunk;
        const bool made_here = first || !plan.resident;
        if (made_here)
          products<S>(r.dtype, rows_at(r.query, b, gate0 + gate).from(at.row0), at.rows,
                      rows_at(r.key, b, gate0 + gate).from(key0), columns, r.D, stage, map);
        if (first) look_at<S>(r, visible, key0, columns, map, nullptr, memory, query);
        if (made_here && first == plan.resident)
          for (int64_t c = warp; c < columns; c += warps) {
            const S made = map[c * R + lane];
            map[c * R + lane] = weight_of(r, query, first ? made : score_of(r, visible(key0 + c), made));
          }
        if (!first)
          sums<S, J>(
              r.dtype, map, columns, rows_at(r.value, b, gate0 + gate).from(key0), channel0, r.E,
              [](int64_t) { return true; }, stage, total);
      }
      if (first) {
        if (warp == 0) peaks[gate * R + lane] = query.peak, totals[gate * R + lane] = query.sum;
      } else {
        for_results(total, [&](S value, int row, int channel) {
          results[(gate * R + row) * width + channel] = totals[gate * R + row] == 0 ? S(0) : value;
        });
      }
    }
    if (first) continue;
    block_barrier();  // all results of the slice are there
    for (int i = threadIdx.x; i < R * width; i += threads) {
      const int64_t n = at.row0 + i / width, channel = channel0 + i % width;
      if (i / width >= at.rows || channel >= r.E) continue;
      if (p.gates == 1) {
        store_number<S>(p.out.data, r.dtype, rows_at(p.out, b, gate0).from(n).first + channel, results[i]);
        continue;
      }
      const S relation[4] = {results[i], results[R * width + i], results[2 * R * width + i],
                             results[3 * R * width + i]};
      update_cell(p, b, n, channel, relation);
    }
  }
}

// ---- gradients ------------------------------------------------------------------------------------------------------

constexpr int gradient_width = plain_gradient_slice, gradient_lanes = gradient_width / 32;

// dquery, and peak, sum and delta [3][B G N] of every query for the keys' kernel.
//
// Work.     As plain_relate, with a second map for the products of the gradient with the values, which becomes that of
//           the scores' gradients; slices are of dquery's channels, results stay in registers.
// Output.   dquery by whoever owns the rows and the slice, the numbers by the first of the blocks that share the rows.
// Bound.    2 M ((D + E) splits + D) FLOP per query.
template <typename S>
__global__ void __launch_bounds__(threads, sizeof(S) == 8 ? 1 : 2)
    plain_query_gradient(const AttentionGrad p, const PlainRelatePlan plan, S* queries) {
  const Relation& r = p.relation;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const PlainRelatePlace at = place_of(plan, blockIdx.x, r.N);
  const int64_t b = at.problem / r.G, g = at.problem % r.G;
  if (is_sound(plan, r.dtype, p.dquery, b, g, at, at.split * gradient_width, r.D)) return;
  S *stage = dynamic_shared<S>(), *memory = dynamic_shared<S>(plan.numbers_at), *totals = memory + warps * R;
  S *weights = dynamic_shared<S>(plan.maps_at), *gradients = dynamic_shared<S>(plan.maps_at + plan.map_bytes);
  const Visible visible = visible_from(r, b, at.row0 + lane);
  Query<S> query;
  for (int64_t channel0 = -gradient_width; channel0 < r.D;
       channel0 += channel0 < 0 ? (at.split + 1) * gradient_width : plan.splits * gradient_width) {
    const bool first = channel0 < 0;
    S total[L][gradient_lanes] = {};
    for (int64_t key0 = 0; key0 < r.M; key0 += plan.chunk) {
      const int64_t columns = r.M - key0 < plan.chunk ? r.M - key0 : plan.chunk;
      if (first || !plan.resident) {
        products<S>(r.dtype, rows_at(r.query, b, g).from(at.row0), at.rows, rows_at(r.key, b, g).from(key0), columns,
                    r.D, stage, weights);
        products<S>(r.dtype, rows_at(p.grad, b, g).from(at.row0), at.rows, rows_at(r.value, b, g).from(key0), columns,
                    r.E, stage, gradients);
        if (first) {
          look_at<S>(r, visible, key0, columns, weights, gradients, memory, query);
          if (key0 + columns == r.M) query.delta /= query.divisor();
        }
        if (first == plan.resident)
          for (int64_t c = warp; c < columns; c += warps) {
            const bool sees = visible(key0 + c);
            const S score = first ? weights[c * R + lane] : score_of(r, sees, weights[c * R + lane]);
            gradients[c * R + lane] =
                score_gradient(r, query, sees, weight_of(r, query, score), gradients[c * R + lane]);
          }
      }
      if (!first)
        sums<S, gradient_lanes>(
            r.dtype, gradients, columns, rows_at(r.key, b, g).from(key0), channel0, r.D, [](int64_t) { return true; },
            stage, total);
    }
    if (first) {
      if (warp == 0) totals[lane] = query.sum;
      if (warp == 0 && lane < at.rows && at.split == 0) {
        const int64_t all = r.B * r.G * r.N, mine = at.problem * r.N + at.row0 + lane;
        queries[mine] = query.peak, queries[all + mine] = query.sum, queries[2 * all + mine] = query.delta;
      }
      block_barrier();
      continue;
    }
    for_results(total, [&](S value, int row, int channel) {
      if (row < at.rows && channel0 + channel < r.D)
        store_number<S>(p.dquery.data, r.dtype, rows_at(p.dquery, b, g).from(at.row0 + row).first + channel0 + channel,
                        totals[row] == 0 ? S(0) : value);
    });
  }
}

// dkey and dvalue, from the numbers that plain_query_gradient left.
//
// Work.     A block owns R keys of a sample and gate and every splits-th slice of the channels of key and then of
//           value; maps are its keys against the queries, made again from the inputs.
// Output.   Every element has one writer. Rows of dead queries are left out of the sums, so nothing in them reaches a
//           key.
// Bound.    2 N (D + E) (1 + splits) FLOP per key.
template <typename S>
__global__ void __launch_bounds__(threads, sizeof(S) == 8 ? 1 : 2)
    plain_key_gradient(const AttentionGrad p, const PlainRelatePlan plan, const S* queries) {
  const Relation& r = p.relation;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const PlainRelatePlace at = place_of(plan, blockIdx.x, r.M);
  const int64_t b = at.problem / r.G, g = at.problem % r.G, all = r.B * r.G * r.N;
  S* stage = dynamic_shared<S>();
  S *weights = dynamic_shared<S>(plan.maps_at), *gradients = dynamic_shared<S>(plan.maps_at + plan.map_bytes);
  const S *peaks = queries + at.problem * r.N, *totals = peaks + all, *deltas = totals + all;
  const int64_t key_slices = (r.D + gradient_width - 1) / gradient_width;
  const int64_t slices = key_slices + (r.E + gradient_width - 1) / gradient_width;
  const bool key_first = at.split < key_slices;
  if (is_sound(plan, r.dtype, key_first ? p.dkey : p.dvalue, b, g, at,
               (key_first ? at.split : at.split - key_slices) * gradient_width, key_first ? r.D : r.E))
    return;
  for (int64_t slice = at.split; slice < slices; slice += plan.splits) {
    const bool of_key = slice < key_slices;
    const int64_t channel0 = (of_key ? slice : slice - key_slices) * gradient_width, channels = of_key ? r.D : r.E;
    const Rows &right = of_key ? r.query : p.grad, &result = of_key ? p.dkey : p.dvalue;
    S total[L][gradient_lanes] = {};
    for (int64_t query0 = 0; query0 < r.N; query0 += plan.chunk) {
      const int64_t columns = r.N - query0 < plan.chunk ? r.N - query0 : plan.chunk;
      if (slice == at.split || !plan.resident) {
        products<S>(r.dtype, rows_at(r.key, b, g).from(at.row0), at.rows, rows_at(r.query, b, g).from(query0), columns,
                    r.D, stage, weights);
        products<S>(r.dtype, rows_at(r.value, b, g).from(at.row0), at.rows, rows_at(p.grad, b, g).from(query0), columns,
                    r.E, stage, gradients);
        for (int64_t c = warp; c < columns; c += warps) {
          Query<S> query;
          query.peak = peaks[query0 + c], query.sum = totals[query0 + c], query.delta = deltas[query0 + c];
          const bool sees = lane < at.rows && visible_from(r, b, query0 + c)(at.row0 + lane);
          const S weight = query.sum == 0 ? S(0) : weight_of(r, query, score_of(r, sees, weights[c * R + lane]));
          gradients[c * R + lane] = score_gradient(r, query, sees, weight, gradients[c * R + lane]);
          weights[c * R + lane] = weight;
        }
      }
      sums<S, gradient_lanes>(
          r.dtype, of_key ? gradients : weights, columns, rows_at(right, b, g).from(query0), channel0, channels,
          [&](int64_t c) { return totals[query0 + c] != 0; }, stage, total);
    }
    for_results(total, [&](S value, int row, int channel) {
      if (row < at.rows && channel0 + channel < channels)
        store_number<S>(result.data, r.dtype, rows_at(result, b, g).from(at.row0 + row).first + channel0 + channel,
                        value);
    });
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------

template <typename Kernel, typename Problem, typename... More>
Error launch_plain(const char* name, Kernel kernel, const Problem& p, const PlainRelatePlan& plan, Stream stream,
                   More... more) {
  if (plan.blocks == 0) return {};
  if (plan.blocks > most_blocks) return Text(name) + ": too many rows for one launch";
  return launch(name, kernel, dim3(static_cast<unsigned>(plan.blocks)), dim3(threads),
                static_cast<size_t>(plan.shared_bytes), stream, p, plan, more...);
}

Error launch_forward(const Forward& p, Stream stream, RelateKernel kernel) {
  const Relation& r = p.relation;
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  if (kernel == RelateKernel::best) {
    const TileRelatePlan tile = plan_tile_relate(r, p.gates == 4, gpu);
    if (!tile.why_not) {
      if (tile.blocks > most_blocks) return "nonlocal_gates: too many rows for one launch";
      return tile.cluster ? launch_cluster_relate(p, tile, stream) : launch_tile_relate(p, tile, stream);
    }
  }
  const PlainRelatePlan plan = p.gates == 1 ? plan_plain_attend(r, gpu) : plan_plain_step(r, gpu);
  return launch_plain("nonlocal_gates plain_relate", r.dtype == DType::f64 ? plain_relate<double> : plain_relate<float>,
                      p, plan, stream);
}

template <typename S>
Error launch_plain_gradients(const AttentionGrad& p, S* queries, bool mends, const Gpu& gpu, Stream stream) {
  PlainRelatePlan of_queries = plan_plain_query_gradient(p.relation, gpu),
                  of_keys = plan_plain_key_gradient(p.relation, gpu);
  of_queries.mends = of_keys.mends = mends;
  if (Error error =
          launch_plain("nonlocal_gates plain_query_gradient", plain_query_gradient<S>, p, of_queries, stream, queries);
      !error.empty())
    return error;
  return launch_plain("nonlocal_gates plain_key_gradient", plain_key_gradient<S>, p, of_keys, stream, queries);
}

template <typename S>
Error launch_gradients(const AttentionGrad& p, S* queries, Stream stream, RelateKernel kernel) {
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  if constexpr (sizeof(S) == 4)
    if (kernel == RelateKernel::best) {
      const TileGradientPlan of_queries = plan_tile_gradient(p, false, gpu), of_keys = plan_tile_gradient(p, true, gpu);
      if (!of_queries.why_not) return launch_tile_gradients(p, of_queries, of_keys, queries, stream);
    }
  return launch_plain_gradients(p, queries, false, gpu, stream);
}

}  // namespace

Text describe_relate(const Relation& r, bool step) {
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  return describe_forward(r, step, gpu);
}

Text describe_relate(const AttentionGrad& p) {
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  return describe_gradients(p, gpu);
}

Way forward_way(const Relation& r, bool step) {
  Gpu gpu;
  return current_gpu(gpu).empty() ? forward_way_on_gpu(r, step, gpu.architecture) : Way::kernels;
}

Text mend(const Attention& p, Stream stream) {
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  PlainRelatePlan plan = plan_plain_attend(p.relation, gpu);
  plan.mends = true;
  return launch_plain("nonlocal_gates plain_relate", plain_relate<float>, forward_of(p), plan, stream);
}

Text mend(const AttentionGrad& p, void* scratch, Stream stream) {
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  return launch_plain_gradients(p, static_cast<float*>(scratch), true, gpu, stream);
}

Scratch scratch_of(const Attention& p) { return {forward_scratch_bytes(p.relation), {}}; }
Scratch scratch_of(const Step& p) { return {forward_scratch_bytes(p.relation), {}}; }
Scratch scratch_of(const AttentionGrad& p) { return {gradient_scratch_bytes(p.relation), {}}; }
Scratch scratch_of(const StepGrad& p) { return {gradient_scratch_bytes(p.relation), {}}; }

Text relate(const Attention& p, void*, Stream stream, RelateKernel kernel) {
  return launch_forward(forward_of(p), stream, kernel);
}

Text relate(const Step& p, void*, Stream stream, RelateKernel kernel) {
  return launch_forward(forward_of(p), stream, kernel);
}

Text relate(const AttentionGrad& p, void* scratch, Stream stream, RelateKernel kernel) {
  return p.relation.dtype == DType::f64 ? launch_gradients(p, static_cast<double*>(scratch), stream, kernel)
                                        : launch_gradients(p, static_cast<float*>(scratch), stream, kernel);
}

Text relate(const StepGrad& p, void* scratch, Stream stream, RelateKernel kernel) {
  if (Error error = launch_forward(forward_of(p), stream, kernel); !error.empty()) return error;
  return relate(AttentionGrad{p.relation, p.dx_gates, p.dquery, p.dkey, p.dvalue}, scratch, stream, kernel);
}

}  // namespace rcu_ops::cuda
