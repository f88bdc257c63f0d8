// Alignment of long sequences on CUDA devices, fp32, bf16 and fp16: distances by products on the matrix unit, by
// differences where their rounding could be seen.
//
// Maths.    |a - b|^2 = |a|^2 + |b|^2 - 2 a.b of frames centred at the mean of both sequences. A centred frame is
//           multiplied by a power of two of its own and cut in two fp16 parts, 22 bits together; hi hi + hi lo + lo hi
//           is their product but for 2^-22. Every distance has a bound, and those that cannot stand are found again in
//           the same block, by differences of the frames as they were given (common/cycle_consistency_products.h).
// Nearest.  |soft - b_i| >= |a - b_i| - |a - soft|, and the last is one number per query: what may be nearest is
//           usually one frame, for cycles even from a soft neighbour of the largest weights alone, with a bound on what
//           the others add. Then a few are compared by differences; where many are left (flat weights), products with
//           the soft neighbour leave a few. So no pass over the distances within a sequence is needed, whatever T and
//           C.
// Work.     survey: mean and largest magnitude, a block per 32 channels of a sample. split_frames: parts and sizes, a
//           warp per frame. align_tile: a block per 16 queries and all keys. Products: a warp takes every 8th 32 keys,
//           from global memory to fragments (16 bytes per lane; channels in any order, the same for both). Rows of
//           distances: two per warp. Sums over keys: a thread owns a channel of 128 and every other 16 keys; keys
//           without weight for any query are passed over.
// Memory.   Shared, or the scratch where they do not fit: distances [16][keys + 8], centres and rests [16][C], parts of
//           soft neighbours [16][2][C] fp16. No operand is staged: a key is used by one warp of a block, and of keys to
//           be added up a block reads each number once, by the one thread that multiplies it by 16 weights.
// Order.    Fixed, no atomics. Equal keys go the same way (a pair's own numbers and its query's decide) and have equal
//           distances.
// Output.   Every element has one writer. Rows of frames that are not there: index -1, results 0.
// Bound.    3 x 2 T S C FLOPs on the matrix unit per direction, and 4 S C bytes from L2 per 16 queries; weighted sums
//           as far as weights are not negligible, 32 T S C FLOPs / 16 on the FP32 units. N = 1, T = 512, C = 128, a
//           cycle: 1 us of each on an H200 (est.), and 4 launches; N = 8, T = 2048: 52 GFLOP of fp16, 0.1 ms, and 2.1
//           GB from L2, 0.4 ms (est.): L2 is the bound. fp32 multiply-adds instead: 0.3 ms and the same L2; TF32 in
//           three parts: half the rate and twice the bytes.
#include "cuda/cycle_consistency_products.h"

#include "common/cycle_consistency_loss.h"
#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/launch.h"
#include "cuda/device/mma.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shared_memory.h"
#include "cuda/device/shuffle.h"
#include "cuda/device/warp_sums.h"

namespace rcu_ops::cuda {
namespace {

constexpr int tile_queries = ProductTiles::queries, tile_keys = ProductTiles::keys;
constexpr int tile_threads = ProductTiles::threads, tile_warps = tile_threads / 32,
              rows_per_warp = tile_queries / tile_warps;
constexpr int survey_threads = ProductTiles::survey_threads, survey_warps = survey_threads / 32;
constexpr int weight_pitch = tile_queries + 4;
constexpr int unknown = -2, settled_at_once = 8;

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
__device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }
__device__ __forceinline__ float smaller(float a, float b) { return a < b ? a : b; }
template <typename F>
__device__ __forceinline__ float over_lanes(float value, F function) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value = function(value, shuffle_xor(value, mask));
  return value;
}

// A sequence and its mask.
struct Side {
  Sequence frames;
  FrameMask mask;
  int64_t count;
};
__device__ __forceinline__ Side side_of(const Alignment& p, bool second) {
  return second ? Side{p.b, p.mask_b, p.S} : Side{p.a, p.mask_a, p.T};
}
// Channel c of a frame; numbers are of the format that the problem says.
__device__ __forceinline__ float number_of(const Alignment& p, const Side& side, int64_t n, int64_t t, int64_t c) {
  return load_number(side.frames.data, p.dtype, n * side.frames.n + t * side.frames.t + c * side.frames.c);
}

// Mean and largest magnitude (infinite where a number is not finite) of 32 channels, over all frames of a sample that
// are there.
__global__ void __launch_bounds__(survey_threads, 2) survey(const Alignment p, const ProductTiles plan, char* scratch) {
  float* memory = dynamic_shared<float>();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t n = blockIdx.x / plan.chunks, chunk = blockIdx.x % plan.chunks, c = 32 * chunk + lane;
  const float share = 1.f / static_cast<float>(p.T + p.S);
  float sum = 0, most = 0, zero = 0;
  for (int second = 0; second < 2; ++second) {
    const Side side = side_of(p, second);
    for (int64_t t = warp; t < side.count; t += survey_warps) {
      if (c >= p.C || !side.mask.there(n, t)) continue;
      const float value = number_of(p, side, n, t, c);
      sum += value * share, most = larger(value < 0 ? -value : value, most), zero += value * 0;
    }
  }
  memory[threadIdx.x] = sum;
  most = over_lanes(zero == 0 ? most : INFINITY, larger);
  if (lane == 0) memory[survey_threads + warp] = most;
  block_barrier();
  if (warp > 0) return;
  for (int w = 1; w < survey_warps; ++w) sum += memory[32 * w + lane], most = larger(memory[survey_threads + w], most);
  reinterpret_cast<float*>(scratch + plan.mean_at)[n * plan.padded + c] = sum;
  if (lane == 0) reinterpret_cast<float*>(scratch + plan.largest_at)[n * plan.chunks + chunk] = most;
}

// The power of two by which a sample's numbers are multiplied before they are squared; 0 where not all of them are
// finite.
__device__ float sample_factor(const ProductTiles& plan, const char* scratch, int64_t n) {
  const float* largest = reinterpret_cast<const float*>(scratch + plan.largest_at) + n * plan.chunks;
  float most = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x % 32; i < plan.chunks; i += 32) most = larger(largest[i], most);
  most = over_lanes(most, larger);
  if (!(most < INFINITY)) return 0;
  double factor = 1, size = most;
  if (size > 0 && (size < 0x1p-30 || size > 0x1p50)) {
    while (size < 1 && factor < 0x1p120) size *= 2, factor *= 2;
    while (size > 1 && factor > 0x1p-120) size /= 2, factor /= 2;
  }
  return static_cast<float>(factor);
}

// A centred frame, value(c) of channel c, to its two parts, its size and the inverse of the parts' factor. One warp;
// the size is the same whatever the lanes: it is added up in fp64.
template <typename Value>
__device__ void split_frame(const ProductTiles& plan, int64_t C, __half* parts, float& size, float& inverse,
                            Value value) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float most = 0;
  double squares = 0;
  for (int64_t c = lane; c < C; c += 32) {
    const float v = value(c);
    most = larger(v < 0 ? -v : v, most);
    squares += static_cast<double>(v) * static_cast<double>(v);
  }
  most = over_lanes(most, larger);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) squares += shuffle_xor(squares, mask);
  // Of the largest number 2^14 <= factor |v| < 2^15: inside fp16, and its lower part's last bit far above the smallest
  // of fp16.
  uint32_t bits;
  memcpy(&bits, &most, 4);
  int exponent = 14 + 127 - static_cast<int>(bits >> 23);
  exponent = most > 0 ? (exponent < 120 ? exponent : 120) : 0;
  const uint32_t of_factor = static_cast<uint32_t>(127 + exponent) << 23,
                 of_inverse = static_cast<uint32_t>(127 - exponent) << 23;
  float factor;
  memcpy(&factor, &of_factor, 4), memcpy(&inverse, &of_inverse, 4);
  size = static_cast<float>(squares);
  for (int64_t c = lane; c < plan.padded; c += 32) {
    const float v = c < C ? value(c) * factor : 0.f;
    const __half high = narrow<__half>(v);
    parts[c] = high, parts[plan.padded + c] = narrow<__half>(v - widen(high));
  }
}

// Parts and sizes of every frame, a warp each. Frames that are not there: zeros of infinite size.
__global__ void __launch_bounds__(tile_threads, 4)
    split_frames(const Alignment p, const ProductTiles plan, char* scratch) {
  const int64_t frame = static_cast<int64_t>(blockIdx.x) * tile_warps + threadIdx.x / 32;
  if (frame >= p.N * (p.T + p.S)) return;
  const int64_t n = frame / (p.T + p.S), f = frame % (p.T + p.S), t = f < p.T ? f : f - p.T;
  const Side side = side_of(p, f >= p.T);
  const bool present = side.mask.there(n, t);
  const float factor = sample_factor(plan, scratch, n);
  const float* mean = reinterpret_cast<const float*>(scratch + plan.mean_at) + n * plan.padded;
  float size, inverse;
  split_frame(
      plan, p.C, reinterpret_cast<__half*>(scratch + plan.parts_at) + frame * 2 * plan.padded, size, inverse,
      [&](int64_t c) { return present && factor > 0 ? number_of(p, side, n, t, c) * factor - mean[c] * factor : 0.f; });
  if (threadIdx.x % 32 > 0) return;
  reinterpret_cast<float*>(scratch + plan.size_at)[frame] = present ? size : INFINITY;
  reinterpret_cast<float*>(scratch + plan.factor_at)[frame] = inverse;
}

// What a block works on, and its rows.
struct Tile {
  const Alignment& p;
  const ProductTiles& plan;
  const int64_t n, t0;
  const bool turned;
  const Side from, to;
  const int rows, keys;
  const float factor, sharpness;  // 0: not all numbers are finite, and everything is found by differences
  const float* mean;
  const float *key_sizes, *key_factors, *query_sizes, *query_factors;
  const __half *key_parts, *query_parts;
  const Rounding<float> rounding;
  // In shared memory: weights [32][20], keys with weight [8], six numbers per query, one per warp. Then, or in the
  // scratch: rows.
  float* weights;
  uint32_t* used;
  float *least, *total, *size, *inverse;
  int *likely, *found;  // of a query: its most probable key and its nearest
  float* of_warp;
  float *d, *centre, *rest;
  __half* parts;
  int lane, warp;

  __device__ float key(int64_t i, int64_t c) const { return number_of(p, to, n, i, c) * factor_or_one(); }
  __device__ float query(int r, int64_t c) const { return number_of(p, from, n, t0 + r, c) * factor_or_one(); }
  __device__ float factor_or_one() const { return factor > 0 ? factor : 1.f; }
  __device__ bool finite() const { return factor > 0; }
  __device__ bool query_there(int r) const { return r < rows && from.mask.there(n, t0 + r); }
  __device__ bool key_there(int64_t i) const { return to.mask.there(n, i); }
  __device__ float bound(float of_query, int64_t i) const {
    return (of_query + key_sizes[i]) * rounding.products + rounding.least;
  }
  __device__ float weight(int r, int64_t i) const {
    return key_there(i) ? exp((least[r] - d[r * plan.pitch + i]) * sharpness) / total[r] : 0.f;
  }

  // |query r - key i|^2; |(key i - centre r) - rest r|^2, and the same of the query itself. A warp each; every lane
  // gets it.
  __device__ float difference(int r, int64_t i) const {
    float sum = 0;
    for (int64_t c = lane; c < p.C; c += 32) {
      const float difference = key(i, c) - query(r, c);
      sum += difference * difference;
    }
    return warp_sum(sum);
  }
  template <typename Value>
  __device__ float to_soft(int r, Value value) const {
    float sum = 0;
    for (int64_t c = lane; c < p.C; c += 32) {
      const float difference = (value(c) - centre[r * plan.padded + c]) - rest[r * plan.padded + c];
      sum += difference * difference;
    }
    return warp_sum(sum);
  }
  __device__ float key_to_soft(int r, int64_t i) const {
    return to_soft(r, [&](int64_t c) { return key(i, c); });
  }

  // d[r][i] of 16 queries, whose parts begin at `of_queries`, those beyond `last` being the last again; size[] and
  // inverse[] are theirs.
  __device__ void products(const __half* of_queries, int last) const {
    const int g = lane / 4, q = lane % 4;
    const __half *low_row = of_queries + (g < last ? g : last) * 2 * plan.padded,
                 *high_row = of_queries + (g + 8 < last ? g + 8 : last) * 2 * plan.padded;
    for (int64_t key0 = warp * tile_keys; key0 < keys; key0 += tile_warps * tile_keys) {
      float sum[4][4] = {}, low[4][4] = {};
      const __half* key_row[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t i = key0 + 8 * j + g;
        key_row[j] = key_parts + (i < keys ? i : keys - 1) * 2 * plan.padded;
      }
      for (int64_t c = 8 * q; c < plan.padded; c += 32) {
        uint4 a[2][2];  // part, rows
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          a[part][0] = *reinterpret_cast<const uint4*>(low_row + part * plan.padded + c);
          a[part][1] = *reinterpret_cast<const uint4*>(high_row + part * plan.padded + c);
        }
        uint4 b[2][4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int part = 0; part < 2; ++part)
            b[part][j] = *reinterpret_cast<const uint4*>(key_row[j] + part * plan.padded + c);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t x[2][4];
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            const uint4 &first = a[part][0], &second = a[part][1];
            x[part][0] = half ? first.z : first.x, x[part][1] = half ? second.z : second.x;
            x[part][2] = half ? first.w : first.y, x[part][3] = half ? second.w : second.y;
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            uint32_t y[2][2];
#pragma unroll
            for (int part = 0; part < 2; ++part)
              y[part][0] = half ? b[part][j].z : b[part][j].x, y[part][1] = half ? b[part][j].w : b[part][j].y;
            float step[4] = {};  // from zero: what the unit cuts off is measured by these 16 channels' products
            mma_m16n8k16<__half>(step, x[0], y[0]);
            mma_m16n8k16<__half>(low[j], x[0], y[1]);
            mma_m16n8k16<__half>(low[j], x[1], y[0]);
#pragma unroll
            for (int k = 0; k < 4; ++k) sum[j][k] += step[k];
          }
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int r = g + 8 * (k / 2);
          const int64_t i = key0 + 8 * j + 2 * q + k % 2;
          if (i >= keys) continue;
          const float product = (sum[j][k] + low[j][k]) * inverse[r] * key_factors[i];
          d[r * plan.pitch + i] = (size[r] + key_sizes[i]) - 2 * product;
        }
    }
  }

  // A lane's part of |query row0 + m - key first + j|^2, whose sum over the warp is difference()'s. All loads of 128
  // channels are on their way together. T: of the numbers in memory. Keys beyond the last are the last again.
  template <typename T>
  __device__ void part_of_differences(int row0, int64_t first, float (&sum)[rows_per_warp][settled_at_once]) const {
    constexpr int steps = 4;
    const bool bf16 = p.dtype == DType::bf16;
    const float by = factor_or_one();
    const T *of_key[settled_at_once], *of_query[rows_per_warp];
#pragma unroll
    for (int j = 0; j < settled_at_once; ++j)
      of_key[j] = static_cast<const T*>(to.frames.data) + n * to.frames.n + lane * to.frames.c +
                  (first + j < keys ? first + j : keys - 1) * to.frames.t;
#pragma unroll
    for (int m = 0; m < rows_per_warp; ++m)
      of_query[m] = static_cast<const T*>(from.frames.data) + n * from.frames.n + lane * from.frames.c +
                    (t0 + (row0 + m < rows ? row0 + m : rows - 1)) * from.frames.t;
#pragma unroll 1
    for (int64_t c = 0; c + lane < p.C; c += 32 * steps) {
      T a[steps][rows_per_warp], b[steps][settled_at_once];
#pragma unroll
      for (int u = 0; u < steps; ++u) {
        const bool inside = c + 32 * u + lane < p.C;
#pragma unroll
        for (int m = 0; m < rows_per_warp; ++m) a[u][m] = inside ? of_query[m][(c + 32 * u) * from.frames.c] : T();
#pragma unroll
        for (int j = 0; j < settled_at_once; ++j) b[u][j] = inside ? of_key[j][(c + 32 * u) * to.frames.c] : T();
      }
#pragma unroll
      for (int u = 0; u < steps; ++u)
#pragma unroll
        for (int j = 0; j < settled_at_once; ++j) {
          const float of_this = widen(b[u][j], bf16) * by;
#pragma unroll
          for (int m = 0; m < rows_per_warp; ++m) {
            const float difference = of_this - widen(a[u][m], bf16) * by;
            sum[m][j] += difference * difference;
          }
        }
    }
  }

  // The distances of the warp's rows, from row0 on, that cannot stand, by differences; all of them where not all numbers
  // are finite.
  __device__ void settle(int row0) const {
    constexpr int M = rows_per_warp;
    float reach[M], allowed = 0, flat = 0;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const int r = row0 + m;
      float end = INFINITY, most = 0;
      for (int64_t i = lane; i < keys && query_there(r); i += 32) {
        const float error = bound(size[r], i);
        end = smaller(d[r * plan.pitch + i] + error, end);
        if (error < INFINITY) most = larger(error, most);
      }
      const Settling<float> settling(rounding, over_lanes(end, smaller), over_lanes(most, larger), sharpness, keys,
                                     p.kind == Align::back);
      reach[m] = settling.reach, allowed = settling.allowed, flat = settling.flat;
    }
#pragma unroll 1
    for (int64_t i0 = 0; i0 < keys; i0 += 32) {
      const int64_t i = i0 + lane;
      const bool seen = i < keys && key_there(i);
      uint32_t wanted[M], any = 0;
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const int r = row0 + m;
        float* row = d + r * plan.pitch;
        bool again = seen && query_there(r);
        if (again && finite()) {
          const float value = row[i], error = bound(size[r], i);
          again = value - error <= reach[m] && !(error <= allowed * value || error * sharpness <= flat);
        } else if (i < keys && !seen) {
          row[i] = INFINITY;
        }
        wanted[m] = ballot(again), any |= wanted[m];
      }
      warp_barrier();  // the rows have been read, which other lanes write now
                       // Eight keys at a time, if one of them is wanted.
#pragma unroll 1
      for (int j0 = 0; j0 < 32; j0 += settled_at_once) {
        if (!(any >> j0 & ((1u << settled_at_once) - 1))) continue;
        float sum[M][settled_at_once] = {};
        if (p.dtype == DType::f32)
          part_of_differences<float>(row0, i0 + j0, sum);
        else
          part_of_differences<uint16_t>(row0, i0 + j0, sum);
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const int j = j0 + lane / 4;
          const float value = sums_of_warp(sum[m]);
          if (lane % 4 == 0 && wanted[m] >> j & 1) d[(row0 + m) * plan.pitch + i0 + j] = value;
        }
      }
    }
  }

  // The first of the smallest of a row, -1 where none is less than infinity; every lane gets it.
  __device__ int64_t first_smallest(const float* row, float& smallest) const {
    float best = INFINITY;
    int64_t place = -1;
    const auto take = [&](float value, int64_t at) {
      if (at >= 0 && (value < best || (value == best && (place < 0 || at < place)))) best = value, place = at;
    };
    for (int64_t i = lane; i < keys; i += 32)
      if (row[i] < INFINITY) take(row[i], i);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
      const float value = shuffle_xor(best, mask);
      const int64_t at = shuffle_xor(place, mask);
      take(value, at);
    }
    smallest = best;
    return place;
  }

  // Of row r: least[] and total[] of the softmax. Returns the most probable key, -1 where distances are not numbers.
  __device__ int64_t softmax(int r) const {
    const float* row = d + r * plan.pitch;
    float smallest, sum = 0;
    const int64_t likely = first_smallest(row, smallest);
    for (int64_t i = lane; i < keys; i += 32) sum += key_there(i) ? exp((smallest - row[i]) * sharpness) : 0.f;
    sum = warp_sum(sum);
    if (lane == 0) least[r] = smallest, total[r] = sum;
    warp_barrier();
    return likely;
  }

  // out[r][c] = sum of weights (key - centre) over the keys to which any query gives more than `negligible`; not
  // centred: without centre. The whole block.
  __device__ void weighted_sums(bool centred, float negligible, float* out) const {
    constexpr int channels = 128, M = tile_queries;
    const int group = static_cast<int>(threadIdx.x) / channels;
    for (int64_t c0 = 0; c0 < p.C; c0 += channels) {
      const int64_t c = c0 + threadIdx.x % channels, read = c < p.C ? c : p.C - 1;
      float sum[M] = {}, around[M];
#pragma unroll
      for (int m = 0; m < M; ++m) around[m] = centred ? centre[m * plan.padded + read] : 0.f;
      for (int64_t i0 = 0; i0 < keys; i0 += tile_keys) {
        bool any = false;
        const int64_t mine = i0 + lane;
#pragma unroll 1
        for (int r = rows_per_warp * warp; r < rows_per_warp * (warp + 1); ++r) {
          const float w = mine < keys && query_there(r) ? weight(r, mine) : 0.f;
          weights[lane * weight_pitch + r] = w;
          any = any || (mine < keys && key_there(mine) && !(w <= negligible && w >= -negligible));
        }
        const uint32_t of_warp_keys = ballot(any);
        if (lane == 0) used[warp] = of_warp_keys;
        block_barrier();
        uint32_t left = 0;
#pragma unroll
        for (int w = 0; w < tile_warps; ++w) left |= used[w];
        left &= group ? 0xffff0000u : 0xffffu;
        float part[M] = {};
        while (left) {
          // Up to eight at once, for as many loads on their way. Those beyond the last are the last again, without
          // weight.
          constexpr int K = 8;
          int at[K];
          float value[K];
          int count = 0;
#pragma unroll
          for (int k = 0; k < K; ++k) {
            at[k] = left ? lowest_bit(left) : at[k > 0 ? k - 1 : 0];
            count += left != 0;
            left &= left - 1;
            value[k] = key(i0 + at[k], read);
          }
#pragma unroll
          for (int k = 0; k < K; ++k) {
            if (k >= count) break;
            const float* w = weights + at[k] * weight_pitch;
#pragma unroll
            for (int m = 0; m < M; m += 4) {
              const float4 four = *reinterpret_cast<const float4*>(w + m);
              part[m] += four.x * (value[k] - around[m]);
              part[m + 1] += four.y * (value[k] - around[m + 1]);
              part[m + 2] += four.z * (value[k] - around[m + 2]);
              part[m + 3] += four.w * (value[k] - around[m + 3]);
            }
          }
        }
#pragma unroll
        for (int m = 0; m < M; ++m) sum[m] += part[m];
        block_barrier();
      }
#pragma unroll
      for (int m = 0; m < M; ++m)
        if (group == 1 && c < p.C) out[m * plan.padded + c] = sum[m];
      block_barrier();
#pragma unroll
      for (int m = 0; m < M; ++m)
        if (group == 0 && c < p.C) out[m * plan.padded + c] += sum[m];
      block_barrier();
    }
  }

  // How far the weights up to `negligible` can move the soft neighbour of row r from the most probable key (see the
  // CPU's left_out).
  __device__ float left_out(int r, int64_t likely, float negligible) const {
    const float* row = d + r * plan.pitch;
    float weights_out = 0, moment = 0;
    for (int64_t i = lane; i < keys; i += 32) {
      const float w = weight(r, i);
      if (w > negligible || w == 0) continue;
      weights_out += w, moment += w * (row[i] + bound(size[r], i));
    }
    weights_out = warp_sum(weights_out), moment = larger(warp_sum(moment), 0.f);
    const float farthest = larger(row[likely] + bound(size[r], likely), 0.f);
    return 1.001f * (sqrtf(weights_out * moment) + weights_out * sqrtf(farthest));
  }

  // The first of the nearest to the soft neighbour among the keys with d - bound <= reach, or, where numbers are not
  // finite, among all; `unknown` if they are more than `most`. If that is one, it is the answer, wherever the soft
  // neighbour is said to be.
  __device__ int nearest_of(int r, int most, float reach) const {
    const float* row = d + r * plan.pitch;
    const auto candidates = [&](int i0) {
      const int i = i0 + lane;
      return ballot(i < keys && key_there(i) && (!finite() || row[i] - bound(size[r], i) <= reach));
    };
    int count = 0, only = -1;
    for (int i0 = 0; i0 < keys && count <= most; i0 += 32)
      for (uint32_t left = candidates(i0); left && count <= most; left &= left - 1)
        ++count, only = i0 + lowest_bit(left);
    if (count == 0 || count > most) return unknown;
    if (most == 1) return only;
    float best = INFINITY;
    int nearest = -1;
    for (int i0 = 0; i0 < keys; i0 += 32)
      for (uint32_t left = candidates(i0); left; left &= left - 1) {
        const int i = i0 + lowest_bit(left);
        const float distance = key_to_soft(r, i);
        if (distance < best) best = distance, nearest = i;
      }
    return nearest;
  }

  // No key whose distance to query r is beyond this is nearer to the soft neighbour than the most probable one: the
  // triangle inequality, with a soft neighbour up to `slack` from where it is said to be.
  __device__ float reach_of_triangle(int r, float slack) const {
    const float of_query = to_soft(r, [&](int64_t c) { return query(r, c); });
    const float away = sqrtf(of_query) + sqrtf(key_to_soft(r, likely[r])) + 2 * slack;
    return 1.001f * away * away + rounding.least;  // roots and distances are good to far more than that
  }

  // What all kinds give where there is nothing to map to, or no query.
  __device__ void write_nothing(int64_t at, int64_t* index) const {
    if (lane == 0 && index) index[at] = -1;
    if (lane == 0 && p.kind == Align::back && p.loss)
      static_cast<float*>(p.loss)[at] = 0;
    else if (lane == 0 && p.kind == Align::back)
      static_cast<float*>(p.log_probability)[at] = static_cast<float*>(p.mean)[at] =
          static_cast<float*>(p.variance)[at] = 0;
#pragma unroll 1
    for (int64_t c = lane; p.soft && c < p.C; c += 32) store_number(p.soft, p.dtype, at * p.C + c, 0.f);
  }

  // Where row r lands.
  __device__ void land(int r, int64_t at, float own) const {
    // Places relative to the most probable one's: the mean of numbers close to each other.
    const float origin = static_cast<float>(likely[r] < 0 ? 0 : likely[r]);
    float mean_place = 0, variance = 0;
    for (int i = lane; i < keys; i += 32) mean_place += weight(r, i) * (static_cast<float>(i) - origin);
    mean_place = warp_sum(mean_place);
    for (int i = lane; i < keys; i += 32) {
      const float away = (static_cast<float>(i) - origin) - mean_place;
      variance += weight(r, i) * (away * away);
    }
    variance = warp_sum(variance);
    if (lane > 0) return;
    const float log_probability = (least[r] - own) * sharpness - log(total[r]);
    if (p.loss) {
      static_cast<float*>(p.loss)[at] =
          Landing<float>(p).loss(log_probability, (static_cast<float>(t0 + r) - origin) - mean_place, variance,
                                 [](float x) { return log(x); });
      return;
    }
    static_cast<float*>(p.log_probability)[at] = log_probability;
    static_cast<float*>(p.mean)[at] = origin + mean_place;
    static_cast<float*>(p.variance)[at] = variance;
  }

  // Parts, size and factor of row r's soft neighbour, centred.
  __device__ void split_soft(int r) const {
    const float *u = centre + r * plan.padded, *more = rest + r * plan.padded;
    float of_size, of_inverse;
    split_frame(plan, p.C, parts + r * 2 * plan.padded, of_size, of_inverse,
                [&](int64_t c) { return query_there(r) ? (u[c] - mean[c] * factor) + more[c] : 0.f; });
    if (lane == 0) size[r] = of_size, inverse[r] = of_inverse;
  }

  __device__ float smallest_end(int r) const {
    float end = INFINITY;
#pragma unroll 1
    for (int i = lane; i < keys; i += 32) end = smaller(d[r * plan.pitch + i] + bound(size[r], i), end);
    return over_lanes(end, smaller);
  }

  // Sum over the warps of a number that all lanes of a warp agree on.
  __device__ float over_warps(float value) const {
    if (lane == 0) of_warp[warp] = value;
    block_barrier();
    value = 0;
    for (int w = 0; w < tile_warps; ++w) value += of_warp[w];
    block_barrier();
    return value;
  }
};

// A block's queries [t0, t0 + 16): soft neighbours, nearest keys, or where they land. In stages, so that each piece of
// code is there once; a stage that is not needed is passed over, and the last ends when every row is known.
__device__ void align_queries(const Tile& tile) {
  enum Stage { distances, largest_weights, centres, rests, products_with_soft, stages };
  const Alignment& p = tile.p;
  const int row0 = rows_per_warp * tile.warp, row_end = row0 + rows_per_warp;
  const bool finite = tile.finite(), centre_is_sum = p.soft || !finite;
  const int64_t out0 = tile.n * tile.from.count + tile.t0;
  int64_t* index = tile.turned ? p.index_ba : p.index_ab;
  float any = 0;
#pragma unroll 1
  for (int i = tile.lane + 32 * tile.warp; i < tile.keys; i += tile_threads) any += tile.key_there(i) ? 1.f : 0.f;
  if (threadIdx.x < tile_queries) {
    const int r = static_cast<int>(threadIdx.x) < tile.rows ? static_cast<int>(threadIdx.x) : tile.rows - 1;
    tile.size[threadIdx.x] = tile.query_sizes[r], tile.inverse[threadIdx.x] = tile.query_factors[r];
    tile.found[threadIdx.x] = tile.likely[threadIdx.x] = -1;
  }
  any = tile.over_warps(warp_sum(any));
  if (p.mask_through.data) {
    float ways = 0;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < p.frames_through; i += tile_threads)
      ways += p.mask_through.there(tile.n, i) ? 1.f : 0.f;
    if (tile.over_warps(warp_sum(ways)) == 0) any = 0;
  }
#pragma unroll 1
  for (int r = row0; r < row_end && r < tile.rows; ++r)
    if (any == 0 || !tile.query_there(r)) tile.write_nothing(out0 + r, index);
  if (any == 0) return;

  const float few = 0x1p-10f / static_cast<float>(tile.keys);
#pragma unroll 1
  for (int stage = distances; stage < stages; ++stage) {
    if (stage == largest_weights && centre_is_sum) continue;
    if (stage == centres && !centre_is_sum) continue;
    if (stage == products_with_soft && !finite) break;

    if (stage == distances || stage == products_with_soft) {
      const bool first = stage == distances;
      if (!first) {
#pragma unroll 1
        for (int r = row0; r < row_end; ++r) tile.split_soft(r);
        block_barrier();
      }
      if (finite) tile.products(first ? tile.query_parts : tile.parts, first ? tile.rows - 1 : tile_queries - 1);
      block_barrier();
    } else {
      // Without finite rows every weight counts, 0 too: 0 * inf has to be seen.
      tile.weighted_sums(stage != centres,
                         stage == largest_weights ? few
                         : finite                 ? 0.f
                                                  : -1.f,
                         stage == centres ? tile.centre : tile.rest);
    }
    if (stage == centres) continue;

    if (stage == distances) {
      tile.settle(row0);
      warp_barrier();
    }
#pragma unroll 1
    for (int r = row0; r < row_end; ++r) {
      if (stage == distances) {
        if (!tile.query_there(r)) continue;
        float own = 0;
        if (p.kind == Align::back) {  // far or near, the loss is of this one
          own = tile.difference(r, tile.t0 + r);
          if (tile.lane == 0 && tile.key_there(tile.t0 + r)) tile.d[r * tile.plan.pitch + tile.t0 + r] = own;
          warp_barrier();
        }
        const int64_t likely = tile.softmax(r);
        if (tile.lane == 0) {
          tile.likely[r] = static_cast<int>(likely);
          tile.found[r] = index && (likely >= 0 || !finite) ? unknown : -1;
        }
        warp_barrier();
        if (p.kind == Align::back) tile.land(r, out0 + r, own);
        if (!centre_is_sum)
#pragma unroll 1
          for (int64_t c = tile.lane; c < p.C; c += 32)
            tile.centre[r * tile.plan.padded + c] = likely < 0 ? 0.f : tile.key(likely, c);
        continue;
      }
      if (tile.found[r] != unknown) continue;
      const bool last = stage == products_with_soft || !finite;
      float reach = 0;
      if (finite)
        reach = stage == products_with_soft
                    ? tile.smallest_end(r)
                    : tile.reach_of_triangle(r, stage == largest_weights ? tile.left_out(r, tile.likely[r], few) : 0.f);
      int nearest = tile.nearest_of(r,
                                    last                       ? tile.keys
                                    : stage == largest_weights ? 1
                                                               : ProductTiles::most_compared,
                                    reach);
      if (last && nearest == unknown) nearest = -1;
      warp_barrier();
      if (tile.lane == 0) tile.found[r] = nearest;
      warp_barrier();
    }
    if (stage == distances) {
      if (p.kind == Align::back) return;
      block_barrier();
      continue;
    }
    float open = 0;
    for (int r = row0; r < row_end; ++r) open += tile.found[r] == unknown ? 1.f : 0.f;
    if (tile.over_warps(open) == 0) break;
  }

#pragma unroll 1
  for (int r = row0; r < row_end; ++r) {
    if (!tile.query_there(r)) continue;
    if (index && tile.lane == 0) index[out0 + r] = tile.found[r];
#pragma unroll 1
    for (int64_t c = tile.lane; p.soft && c < p.C; c += 32) {
      const float value = tile.centre[r * tile.plan.padded + c] + tile.rest[r * tile.plan.padded + c];
      store_number(p.soft, p.dtype, (out0 + r) * p.C + c, value / tile.factor_or_one());
    }
  }
}

__global__ void __launch_bounds__(tile_threads, 1)
    align_tile(const Alignment p, const ProductTiles plan, char* scratch) {
  float* memory = dynamic_shared<float>();
  const int64_t blocks_a = (p.T + tile_queries - 1) / tile_queries, blocks_b = (p.S + tile_queries - 1) / tile_queries;
  for (int64_t task = blockIdx.x; task < plan.tasks; task += gridDim.x) {
    const bool turned = task >= p.N * blocks_a;  // a and b change places
    const int64_t blocks = turned ? blocks_b : blocks_a, of_side = turned ? task - p.N * blocks_a : task;
    const int64_t n = of_side / blocks, t0 = of_side % blocks * tile_queries;
    const Side from = side_of(p, turned), to = side_of(p, !turned);
    const int64_t left = from.count - t0, query0 = n * (p.T + p.S) + (turned ? p.T : 0) + t0,
                  key0 = n * (p.T + p.S) + (turned ? 0 : p.T);
    const float factor = sample_factor(plan, scratch, n);
    const double scale = factor > 0 ? factor : 1, sharp = 1 / scale / scale / p.temperature;
    const float *sizes = reinterpret_cast<const float*>(scratch + plan.size_at),
                *factors = reinterpret_cast<const float*>(scratch + plan.factor_at);
    const __half* parts = reinterpret_cast<const __half*>(scratch + plan.parts_at);
    float* numbers = memory + tile_keys * weight_pitch;
    float* fixed = numbers + tile_warps;
    float* rows =
        plan.in_shared
            ? fixed + 6 * tile_queries + tile_warps
            : reinterpret_cast<float*>(scratch + plan.rows_at + static_cast<int64_t>(blockIdx.x) * plan.row_bytes);
    float *centre = rows + tile_queries * plan.pitch, *rest = centre + tile_queries * plan.padded;
    align_queries(Tile{p,
                       plan,
                       n,
                       t0,
                       turned,
                       from,
                       to,
                       static_cast<int>(left < tile_queries ? left : tile_queries),
                       static_cast<int>(to.count),
                       factor,
                       static_cast<float>(sharp < 3.4e38 ? sharp : 3.4e38),
                       reinterpret_cast<const float*>(scratch + plan.mean_at) + n * plan.padded,
                       sizes + key0,
                       factors + key0,
                       sizes + query0,
                       factors + query0,
                       parts + key0 * 2 * plan.padded,
                       parts + query0 * 2 * plan.padded,
                       ProductTiles::rounding(p.C),
                       memory,
                       reinterpret_cast<uint32_t*>(numbers),
                       fixed,
                       fixed + tile_queries,
                       fixed + 2 * tile_queries,
                       fixed + 3 * tile_queries,
                       reinterpret_cast<int*>(fixed + 4 * tile_queries),
                       reinterpret_cast<int*>(fixed + 5 * tile_queries),
                       fixed + 6 * tile_queries,
                       rows,
                       centre,
                       rest,
                       reinterpret_cast<__half*>(rest + tile_queries * plan.padded),
                       static_cast<int>(threadIdx.x) % 32,
                       static_cast<int>(threadIdx.x) / 32});
    block_barrier();
  }
}

}  // namespace

Text align_products(const Alignment& p, const ProductTiles& plan, void* scratch, Stream stream) {
  const int64_t frames = p.N * (p.T + p.S);
  if (frames > most_blocks || p.N * plan.chunks > most_blocks)
    return "cycle_consistency: too many frames for one launch";
  char* bytes = static_cast<char*>(scratch);
  Error error = launch("cycle_consistency survey", survey, dim3(static_cast<unsigned>(p.N * plan.chunks)),
                       dim3(survey_threads), (survey_threads + survey_warps) * sizeof(float), stream, p, plan, bytes);
  if (error.empty())
    error = launch("cycle_consistency split_frames", split_frames,
                   dim3(static_cast<unsigned>((frames + tile_warps - 1) / tile_warps)), dim3(tile_threads), 0, stream,
                   p, plan, bytes);
  if (error.empty())
    error = launch("cycle_consistency align_tile", align_tile, dim3(static_cast<unsigned>(plan.blocks)),
                   dim3(tile_threads), static_cast<size_t>(plan.shared_bytes), stream, p, plan, bytes);
  return error;
}

}  // namespace rcu_ops::cuda
