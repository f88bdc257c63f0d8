// Soft nearest neighbours, cycle consistency, and their gradients on CUDA devices.
#include "cuda/cycle_consistency.h"

#include "common/cycle_consistency_loss.h"
#include "cuda/cycle_consistency_products.h"
#include "cuda/cycle_consistency_short.h"
#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/launch.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shared_memory.h"
#include "cuda/device/shuffle.h"
#include "cuda/device/warp_sums.h"

namespace rcu_ops::cuda {
namespace {

constexpr int align_threads = 256, align_warps = align_threads / 32;
constexpr int at_once = 4;  // keys of a warp
// Numbers of a block's reductions, at the start of its shared memory; of align_query's, sums of its threads follow.
constexpr int64_t reduction_numbers = 2 * align_warps, static_numbers = reduction_numbers + align_threads;
constexpr int keys_at_once = 4, queries_at_once = align_threads / (2 * keys_at_once);  // of key_gradient

// Threads side by side along channels: a power of two.
__device__ __forceinline__ int threads_along(int64_t channels) {
  return channels > 128 ? align_threads : channels > 64 ? 128 : channels > 32 ? 64 : 32;
}

__device__ __forceinline__ bool there(const FrameMask& mask, int64_t n, int64_t t) {
  return !mask.data || mask.data[n * mask.n + t * mask.t];
}

// Sum over the block, in an order of its own that never changes. Every thread gets it. `memory`: align_warps numbers.
template <typename S>
__device__ S block_sum(S value, S* memory) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = value;
  block_barrier();
  value = 0;
  for (int w = 0; w < align_warps; ++w) value += memory[w];
  block_barrier();
  return value;
}

// The first of the smallest of values[0 .. count) and its place; -1 where none is less than infinity. Every thread gets
// it. `memory`: 2 * align_warps numbers. Places are exact in fp32 up to 2^24.
template <typename S>
__device__ int64_t block_first_smallest(const S* values, int64_t count, S* memory, S& least) {
  const S infinity = static_cast<S>(INFINITY);
  S best = infinity, place = -1;
  const auto take = [&](S value, S at) {
    if (at >= 0 && (value < best || (value == best && (place < 0 || at < place)))) best = value, place = at;
  };
  for (int64_t i = threadIdx.x; i < count; i += align_threads)
    if (values[i] < infinity) take(values[i], static_cast<S>(i));
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const S value = shuffle_xor(best, mask), at = shuffle_xor(place, mask);
    take(value, at);
  }
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = best, memory[align_warps + threadIdx.x / 32] = place;
  block_barrier();
  for (int w = 0; w < align_warps; ++w) take(memory[w], memory[align_warps + w]);
  block_barrier();
  least = best;
  return static_cast<int64_t>(place);
}

// ---- the scale of a sample -----------------------------------------------------------------------------------------

// largest[n][part]: the largest magnitude of every parts-th run of 256 numbers of a, then of b, that are there; not a
// number is none. Block (n, part). Bound: reading a and b once, four loads of a thread on their way at a time.
template <typename T>
__global__ void __launch_bounds__(align_threads, 4) measure(const Alignment p, int parts, Accumulator<T>* largest_of) {
  using S = Accumulator<T>;
  S* memory = dynamic_shared<S>();
  const bool bf16 = p.dtype == DType::bf16;
  const int64_t n = blockIdx.x / parts, first = blockIdx.x % parts * align_threads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(parts) * align_threads, step_t = step / p.C, step_c = step % p.C;
  S largest = 0;
  const auto look = [&](const Sequence& v, const FrameMask& mask, int64_t frames) {
    int64_t t = first / p.C, c = first % p.C;
#pragma unroll 4
    for (int64_t left = (frames * p.C - first + step - 1) / step; left > 0; --left) {
      const bool seen = there(mask, n, t);
      const S value = widen(static_cast<const T*>(v.data)[n * v.n + t * v.t + c * v.c], bf16),
              size = value < 0 ? -value : value;
      if (seen && size > largest) largest = size;
      t += step_t, c += step_c;
      if (c >= p.C) c -= p.C, ++t;
    }
  };
  look(p.a, p.mask_a, p.T);
  look(p.b, p.mask_b, p.S);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const S other = shuffle_xor(largest, mask);
    if (other > largest) largest = other;
  }
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = largest;
  block_barrier();
  if (threadIdx.x > 0) return;
#pragma unroll
  for (int w = 0; w < align_warps; ++w)
    if (memory[w] > largest) largest = memory[w];
  largest_of[blockIdx.x] = largest;
}

// The power of two by which the numbers of sample n are multiplied before they are squared; 1 unless their squares
// would leave the range of S.
template <typename S>
__device__ S scale_of(const S* largest_of, int parts, int64_t n) {
  S largest = 0;
#pragma unroll 4
  for (int i = 0; i < parts; ++i) {
    const S size = largest_of[n * parts + i];
    if (size > largest) largest = size;
  }
  const double low = sizeof(S) == 8 ? 0x1p-400 : 0x1p-30, high = sizeof(S) == 8 ? 0x1p400 : 0x1p50;
  // The factor itself stays in range, if not all that it makes large.
  const double most = sizeof(S) == 8 ? 0x1p1000 : 0x1p120;
  double factor = 1, size = largest;
  if (size > 0 && size < static_cast<double>(INFINITY) && (size < low || size > high)) {
    while (size < 1 && factor < most) size *= 2, factor *= 2;
    while (size > 1 && factor > 1 / most) size /= 2, factor /= 2;
  }
  return static_cast<S>(factor);
}

// ---- one query -----------------------------------------------------------------------------------------------------

// A query against all keys, T in {double, float, uint16_t: bf16 or fp16}, arithmetic in S = Accumulator<T>.
//
// Work.     A block owns one query: a frame of a, or, with `cycle`, also one of b (rows from N T on). Distances: a warp
//           takes every 8th key, its lanes every 32nd channel, by differences. Softmax: all threads. Sums of keys: a
//           thread owns a channel, or shares it with others where channels are few: runs of 16 keys in turn. Soft
//           neighbours are kept as the sum u as it comes out and the rest, sum_i z_i (b_i - u): right under offsets and
//           scene cuts, where rounding u loses the differences between frames (see csrc/cpu/cycle_consistency_core.h).
// Memory.   `row`: z or distances [S], weights [S], u [C], rest [C], in shared memory where they fit; for gradients z
//           and the weights stay in the scratch, [N T][2 S], for key_gradient. Sums of threads beside the reductions.
// Order.    Fixed; no atomics; equal keys have equal distances wherever they stand.
// Output.   Every element has one writer. Rows of frames that are not there: index -1, results and gradients 0.
// Code.     A warp has four keys on their way at a time, a thread 16 of those that it adds up. A thread's own keys and
//           channels are a few: those loops are not unrolled, which would be a quarter of the kernel.
// Bound.    Two to five passes over b per query, from L2: S C numbers each. T S C differences and multiply-adds per
//           pass.
template <typename T>
__global__ void __launch_bounds__(align_threads, 2)
    align_query(const Alignment p, const Accumulator<T>* largest_of, int parts, Accumulator<T>* scratch,
                int64_t row_numbers, bool in_shared) {
  using S = Accumulator<T>;
  S* memory = dynamic_shared<S>();
  const bool bf16 = p.dtype == DType::bf16;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool turned = static_cast<int64_t>(blockIdx.x) >= p.N * p.T;  // a and b change places
  const int64_t task = turned ? blockIdx.x - p.N * p.T : blockIdx.x;
  const int64_t queries = turned ? p.S : p.T, keys = turned ? p.T : p.S, n = task / queries, t = task % queries;
  const Sequence &from = turned ? p.b : p.a, &to = turned ? p.a : p.b;
  const FrameMask &mask_from = turned ? p.mask_b : p.mask_a, &mask_to = turned ? p.mask_a : p.mask_b;
  const bool back = p.kind == Align::back || p.kind == Align::back_backward;
  const bool gradients = p.kind == Align::soft_backward || p.kind == Align::back_backward;
  S* z = in_shared ? memory + static_numbers : scratch + static_cast<int64_t>(blockIdx.x) * row_numbers;
  S *w = z + keys, *centre = w + keys, *rest = centre + p.C;
  int64_t* index = turned ? p.index_ba : p.index_ab;

  const auto some = [&](const FrameMask& mask, int64_t frames) {
    if (!mask.data) return true;
    S count = 0;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < frames; i += align_threads) count += there(mask, n, i) ? S(1) : S(0);
    return block_sum(count, memory) > 0;
  };
  if (!there(mask_from, n, t) || !some(mask_to, keys) || !some(p.mask_through, p.frames_through)) {
    if (threadIdx.x == 0) {
      if (index) index[task] = -1;
      if (p.kind == Align::back && p.loss)
        static_cast<S*>(p.loss)[task] = 0;
      else if (p.kind == Align::back)
        static_cast<S*>(p.log_probability)[task] = static_cast<S*>(p.mean)[task] = static_cast<S*>(p.variance)[task] =
            0;
    }
    T* vector = static_cast<T*>(!gradients ? p.soft : p.add_to_da ? nullptr : p.da);
#pragma unroll 1
    for (int64_t c = threadIdx.x; vector && c < p.C; c += align_threads) vector[task * p.C + c] = 0;
#pragma unroll 1
    for (int64_t i = threadIdx.x; gradients && i < keys; i += align_threads) z[i] = w[i] = 0;
    return;
  }

  const S factor = scale_of(largest_of, parts, n);
  const T* query = static_cast<const T*>(from.data) + n * from.n + t * from.t;
  const T* key0 = static_cast<const T*>(to.data) + n * to.n;
  // values[i] = sum over channels of term(key i, c); infinity (or 0 for products) for keys that are not there.
  const auto for_keys = [&](S* values, S missing, auto term) {
    for (int64_t first = warp; first < keys; first += at_once * align_warps) {
      S sum[at_once] = {};
      const T* key[at_once];
#pragma unroll
      for (int j = 0; j < at_once; ++j) {  // those beyond the last are the last again, and not written
        const int64_t i = first + j * align_warps;
        key[j] = key0 + (i < keys ? i : keys - 1) * to.t + lane * to.c;
      }
#pragma unroll 4
      for (int64_t c = lane; c < p.C; c += 32)
#pragma unroll
        for (int j = 0; j < at_once; ++j) {
          sum[j] += term(widen(*key[j], bf16) * factor, c);
          key[j] += 32 * to.c;
        }
      const S all = sums_of_warp(sum);
      const int64_t i = first + lane / 8 * align_warps;
      if (lane % 8 == 0 && i < keys) values[i] = there(mask_to, n, i) ? all : missing;
    }
    block_barrier();
  };
  // values[c] = sum over keys of weights[i] (key - around[c]), around == nullptr: 0. Groups of threads take runs of 16
  // keys in turn.
  const auto for_channels = [&](S* values, const S* weights, const S* around) {
    const int along = threads_along(p.C), groups = align_threads / along, group = static_cast<int>(threadIdx.x) / along;
    S* sums = memory + reduction_numbers;
#pragma unroll 1
    for (int64_t c0 = 0; c0 < p.C; c0 += along) {
      const int64_t c = c0 + static_cast<int>(threadIdx.x) % along, read = c < p.C ? c : p.C - 1;
      S sum = 0;
      const S centre_of_key = around ? around[read] : S(0);
      const T* key = key0 + read * to.c + group * 16 * to.t;
#pragma unroll 1
      for (int64_t first = group * 16; first < keys; first += groups * 16, key += (groups - 1) * 16 * to.t) {
        S part = 0;
        if (!mask_to.data && first + 16 <= keys) {
#pragma unroll
          for (int j = 0; j < 16; ++j, key += to.t)
            part += weights[first + j] * (widen(*key, bf16) * factor - centre_of_key);
        } else {
#pragma unroll 1
          for (int j = 0; j < 16; ++j, key += to.t)
            if (first + j < keys && there(mask_to, n, first + j))
              part += weights[first + j] * (widen(*key, bf16) * factor - centre_of_key);
        }
        sum += part;
      }
      sums[threadIdx.x] = sum;
      block_barrier();
      if (group == 0 && c < p.C) {
#pragma unroll 1
        for (int other = 1; other < groups; ++other) sum += sums[threadIdx.x + other * along];
        values[c] = sum;
      }
      block_barrier();
    }
  };

  for_keys(z, static_cast<S>(INFINITY), [&](S k, int64_t c) {
    const S difference = k - widen(query[c * from.c], bf16) * factor;
    return difference * difference;
  });
  const double sharp = 1 / static_cast<double>(factor) / static_cast<double>(factor) / p.temperature;
  const double most = sizeof(S) == 8 ? 1.7e308 : 3.4e38;
  const S sharpness = static_cast<S>(sharp < most ? sharp : most);
  S least;
  const int64_t likely = block_first_smallest(z, keys, memory, least);
  const S own = back ? z[t] : S(0);
  block_barrier();
  S sum = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < keys; i += align_threads) {
    z[i] = there(mask_to, n, i) ? exp((least - z[i]) * sharpness) : S(0);
    sum += z[i];
  }
  sum = block_sum(sum, memory);
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < keys; i += align_threads) z[i] /= sum;
  block_barrier();

  if (back) {
    // Places relative to the most probable one's: the mean of numbers close to each other.
    S mean = 0, variance = 0;
    const S origin = static_cast<S>(likely < 0 ? 0 : likely);
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < keys; i += align_threads) mean += z[i] * (static_cast<S>(i) - origin);
    mean = block_sum(mean, memory);
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < keys; i += align_threads) {
      const S away = (static_cast<S>(i) - origin) - mean;
      variance += z[i] * (away * away);
    }
    variance = block_sum(variance, memory);
    if (p.kind == Align::back) {
      if (threadIdx.x > 0) return;
      const S log_probability = (least - own) * sharpness - log(sum);
      if (p.loss) {
        static_cast<S*>(p.loss)[task] = Landing<S>(p).loss(log_probability, (static_cast<S>(t) - origin) - mean,
                                                           variance, [](S x) { return log(x); });
        return;
      }
      static_cast<S*>(p.log_probability)[task] = log_probability;
      static_cast<S*>(p.mean)[task] = origin + mean;
      static_cast<S*>(p.variance)[task] = variance;
      return;
    }
    S g, g_mean, g_variance;
    if (p.grad_loss) {
      Landing<S>(p).gradients(grad_of_loss<S>(p, n, t), (static_cast<S>(t) - origin) - mean, variance, g, g_mean,
                              g_variance);
    } else {
      g = static_cast<const S*>(p.grad_log_probability)[task], g_mean = static_cast<const S*>(p.grad_mean)[task],
      g_variance = static_cast<const S*>(p.grad_variance)[task];
    }
    const S by = static_cast<S>(2 / static_cast<double>(factor) / p.temperature);
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < keys; i += align_threads) {
      const S away = (static_cast<S>(i) - origin) - mean;
      w[i] = by * (z[i] * (g_mean * away + g_variance * (away * away - variance) - g) + (i == t ? g : S(0)));
    }
    block_barrier();
  }

  for_channels(centre, z, nullptr);
  if (p.kind == Align::soft_backward) {
    const T* grad = static_cast<const T*>(p.grad.data) + n * p.grad.n + t * p.grad.t;
    for_keys(w, S(0), [&](S k, int64_t c) { return (k - centre[c]) * widen(grad[c * p.grad.c], bf16); });
    S mean = 0;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < keys; i += align_threads) mean += z[i] * w[i];
    mean = block_sum(mean, memory);
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < keys; i += align_threads) w[i] = z[i] * (w[i] - mean) * (2 * sharpness);
    block_barrier();
  }
  for_channels(rest, gradients ? w : z, centre);
  if (gradients) {
#pragma unroll 1
    for (int64_t c = threadIdx.x; c < p.C; c += align_threads) {
      T* da = static_cast<T*>(p.da) + task * p.C + c;
      *da = narrow<T>(p.add_to_da ? widen(*da, bf16) + rest[c] : rest[c], bf16);
    }
    return;
  }
  if (p.soft)
#pragma unroll 1
    for (int64_t c = threadIdx.x; c < p.C; c += align_threads)
      static_cast<T*>(p.soft)[task * p.C + c] = narrow<T>((centre[c] + rest[c]) / factor, bf16);
  if (!index) return;
  for_keys(w, static_cast<S>(INFINITY), [&](S k, int64_t c) {
    const S difference = (k - centre[c]) - rest[c];
    return difference * difference;
  });
  const int64_t nearest = block_first_smallest(w, keys, memory, least);
  if (threadIdx.x == 0) index[task] = nearest;
}

template <typename S>
struct alignas(keys_at_once * sizeof(S)) WeightsOfKeys {
  S of[keys_at_once];
};

// db of one key: sum_t (z_ti grad_t + w_ti (a_t - b_i)), with z and w as align_query left them.
//
// Work.     A block owns four keys; threads side by side own a channel each, groups of them take 32 queries' shares in
//           turn, of which eight are on their way at a time.
// Memory.   Shared: both weights of 32 queries and four keys, and sums of every thread's.
// Order.    Queries one after the other within 32, then those, then groups: fixed, no atomics.
// Bound.    Latency: reading a (and grad) from L2 once per four keys.
template <typename T>
__global__ void __launch_bounds__(align_threads, 2)
    key_gradient(const Alignment p, const Accumulator<T>* largest_of, int parts, const Accumulator<T>* rows,
                 int64_t row_numbers) {
  using S = Accumulator<T>;
  constexpr int K = keys_at_once, Q = queries_at_once, on_their_way = 8;
  S *weights = dynamic_shared<S>(), *sums = weights + align_threads;  // [query][z, w][key], [group][key][channel]
  const int64_t blocks = (p.S + K - 1) / K, n = blockIdx.x / blocks, i0 = (blockIdx.x - n * blocks) * K;
  const S factor = scale_of(largest_of, parts, n);
  const bool bf16 = p.dtype == DType::bf16, soft = p.kind == Align::soft_backward;
  const int along = threads_along(p.C), groups = align_threads / along, group = static_cast<int>(threadIdx.x) / along;
  const int share = Q / groups;  // of a group
  // Of the weight that this thread fetches.
  const int of_query = static_cast<int>(threadIdx.x) / (2 * K), of_key = static_cast<int>(threadIdx.x) % K;
  const bool fetches = i0 + of_key < p.S && (soft || threadIdx.x / K % 2 == 1);
  const S* weight = rows + n * p.T * row_numbers + threadIdx.x / K % 2 * p.S + i0 + of_key;
#pragma unroll 1
  for (int64_t c0 = 0; c0 < p.C; c0 += along) {
    const int64_t c = c0 + static_cast<int>(threadIdx.x) % along, read = c < p.C ? c : p.C - 1;
    S sum[K] = {}, own[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t i = i0 + k < p.S ? i0 + k : p.S - 1;
      own[k] = widen(static_cast<const T*>(p.b.data)[n * p.b.n + i * p.b.t + read * p.b.c], bf16) * factor;
    }
    const T* query = static_cast<const T*>(p.a.data) + n * p.a.n + read * p.a.c;
    const T* grad = static_cast<const T*>(p.grad.data) + n * p.grad.n + read * p.grad.c;
#pragma unroll 1
    for (int64_t t0 = 0; t0 < p.T; t0 += Q) {
      const int64_t t = t0 + of_query;
      const S fetched = fetches && t < p.T ? weight[t * row_numbers] : S(0);
      block_barrier();  // the weights before these have been read
      weights[threadIdx.x] = fetched;
      block_barrier();
      S part[K] = {};
      const int q0 = group * share;
      const auto add = [&](int q, S of_this, S of_grad) {
        const auto* both = reinterpret_cast<const WeightsOfKeys<S>*>(weights) + 2 * q;
        const WeightsOfKeys<S> z = both[0], w = both[1];
#pragma unroll
        for (int k = 0; k < K; ++k) {
          part[k] += w.of[k] * (of_this - own[k]);
          if (soft) part[k] += z.of[k] * of_grad;
        }
      };
      if (!p.mask_a.data && t0 + Q <= p.T && share >= on_their_way) {
        const T *from = query + (t0 + q0) * p.a.t, *of = grad + (t0 + q0) * p.grad.t;
#pragma unroll 1
        for (int q = q0; q < q0 + share; q += on_their_way) {
          T queries[on_their_way], grads[on_their_way] = {};
#pragma unroll
          for (int j = 0; j < on_their_way; ++j, from += p.a.t) queries[j] = *from;
          if (soft)
#pragma unroll
            for (int j = 0; j < on_their_way; ++j, of += p.grad.t) grads[j] = *of;
#pragma unroll
          for (int j = 0; j < on_their_way; ++j) add(q + j, widen(queries[j], bf16) * factor, widen(grads[j], bf16));
        }
      } else {
#pragma unroll 1
        for (int q = q0; q < q0 + share && t0 + q < p.T; ++q)
          if (there(p.mask_a, n, t0 + q))
            add(q, widen(query[(t0 + q) * p.a.t], bf16) * factor, soft ? widen(grad[(t0 + q) * p.grad.t], bf16) : S(0));
      }
#pragma unroll
      for (int k = 0; k < K; ++k) sum[k] += part[k];
    }
#pragma unroll
    for (int k = 0; k < K; ++k) sums[(group * K + k) * along + static_cast<int>(threadIdx.x) % along] = sum[k];
    block_barrier();
#pragma unroll 1
    for (int of = static_cast<int>(threadIdx.x); of < K * along; of += align_threads) {
      const int k = of / along;
      const int64_t i = i0 + k, channel = c0 + of % along;
      if (i >= p.S || channel >= p.C) continue;
      S all = 0;
#pragma unroll 1
      for (int other = 0; other < groups; ++other) all += sums[other * K * along + of];
      static_cast<T*>(p.db)[(n * p.S + i) * p.C + channel] = narrow<T>(there(p.mask_b, n, i) ? all : S(0), bf16);
    }
    block_barrier();
  }
}

// gate[n]: whether all frames that are there are in their place. One block per sample.
__global__ void __launch_bounds__(align_threads, 4) gate_of(const Alignment p) {
  float* memory = dynamic_shared<float>();
  const int64_t n = blockIdx.x;
  float away = 0;
  for (int64_t t = threadIdx.x; t < p.T; t += align_threads)
    away += there(p.mask_a, n, t) && p.index_ab[n * p.T + t] != t ? 1.f : 0.f;
  for (int64_t t = threadIdx.x; t < p.S; t += align_threads)
    away += there(p.mask_b, n, t) && p.index_ba[n * p.S + t] != t ? 1.f : 0.f;
  away = block_sum(away, memory);
  if (threadIdx.x == 0) p.gate[n] = p.T == p.S && away == 0;
}

Error launch_gate(const Alignment& p, Stream stream) {
  return launch("cycle_consistency gate_of", gate_of, dim3(static_cast<unsigned>(p.N)), dim3(align_threads),
                reduction_numbers * sizeof(float), stream, p);
}

// Numbers of a query's row, and whether rows lie in shared memory.
struct RowPlan {
  int64_t numbers, rows, scratch_numbers;
  bool in_shared;
  int parts;  // of a sample, that are measured by themselves: as many as fill the device, of four runs at least
  int64_t rows_at;
};

RowPlan plan_rows(const Alignment& p, const Gpu& gpu) {
  const int64_t keys = p.T > p.S ? p.T : p.S, size = state_size(p.dtype);
  const bool gradients = p.kind == Align::soft_backward || p.kind == Align::back_backward;
  RowPlan plan{2 * (p.kind == Align::cycle ? keys : p.S) + 2 * p.C,
               p.N * (p.T + (p.kind == Align::cycle ? p.S : 0)),
               0,
               false,
               1,
               0};
  plan.in_shared = !gradients && (plan.numbers + static_numbers) * size <= gpu.shared_bytes;
  const int64_t most = p.N > 0 ? gpu.multiprocessors / p.N : 1, runs = (p.T + p.S) * p.C / (4 * align_threads);
  const int64_t parts = most < runs ? most : runs;
  plan.parts = static_cast<int>(parts < 1 ? 1 : parts > 16 ? 16 : parts);
  plan.rows_at = round_up(p.N * plan.parts, 4);
  plan.scratch_numbers = plan.rows_at + (plan.in_shared ? 0 : plan.numbers * plan.rows);
  return plan;
}

template <typename T>
Error align_as(const Alignment& p, const RowPlan& plan, void* scratch, Stream stream) {
  using S = Accumulator<T>;
  S *largest_of = static_cast<S*>(scratch), *rows = largest_of + plan.rows_at;
  Error error = launch("cycle_consistency measure", measure<T>, dim3(static_cast<unsigned>(p.N * plan.parts)),
                       dim3(align_threads), reduction_numbers * sizeof(S), stream, p, plan.parts, largest_of);
  const int64_t numbers = static_numbers + (plan.in_shared ? plan.numbers : 0);
  if (error.empty())
    error = launch("cycle_consistency align_query", align_query<T>, dim3(static_cast<unsigned>(plan.rows)),
                   dim3(align_threads), static_cast<size_t>(numbers) * sizeof(S), stream, p, largest_of, plan.parts,
                   rows, plan.numbers, plan.in_shared);
  if (error.empty() && p.db)
    error =
        launch("cycle_consistency key_gradient", key_gradient<T>,
               dim3(static_cast<unsigned>(p.N * ((p.S + keys_at_once - 1) / keys_at_once))), dim3(align_threads),
               (keys_at_once + 1) * align_threads * sizeof(S), stream, p, largest_of, plan.parts, rows, plan.numbers);
  return error.empty() && p.gate ? launch_gate(p, stream) : error;
}

bool is_loss(const Alignment& p) { return p.kind == Align::loss || p.kind == Align::loss_backward; }

}  // namespace

Scratch align_scratch(const Alignment& p) {
  if (is_loss(p)) {  // of the larger of its parts, which run one after the other
    const LossParts parts = parts_of_loss(p);
    const Scratch there = align_scratch(parts.there), back = align_scratch(parts.back);
    return there.bytes < back.bytes ? back : there;
  }
  Scratch scratch;
  Gpu gpu;
  scratch.error = current_gpu(gpu);
  if (!scratch.error.empty()) return scratch;
  if (ShortCycle::takes(p)) {
    scratch.bytes = ShortCycle(p.N, p.T, p.S, p.C, gpu).partial_numbers * 4;
    return scratch;
  }
  if (ProductTiles::takes(p)) {
    scratch.bytes = ProductTiles(p.kind, p.N, p.T, p.S, p.C, gpu).scratch_bytes;
    return scratch;
  }
  scratch.bytes = plan_rows(p, gpu).scratch_numbers * state_size(p.dtype);
  return scratch;
}

Text align(const Alignment& p, void* scratch, Stream stream) {
  if (p.N == 0) return {};
  if (is_loss(p)) {
    const LossParts parts = parts_of_loss(p);
    const bool backward = p.kind == Align::loss_backward;
    Error error = align(backward ? parts.back : parts.there, scratch, stream);
    return error.empty() ? align(backward ? parts.there : parts.back, scratch, stream) : error;
  }
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  if (ShortCycle::takes(p)) return align_short(p, gpu, scratch, stream);
  if (ProductTiles::takes(p)) {
    Error error = align_products(p, ProductTiles(p.kind, p.N, p.T, p.S, p.C, gpu), scratch, stream);
    return error.empty() && p.gate ? launch_gate(p, stream) : error;
  }
  const RowPlan plan = plan_rows(p, gpu);
  if (plan.rows > INT32_MAX || p.N * p.S > INT32_MAX) return "cycle_consistency: too many frames for one launch";
  switch (p.dtype) {
    case DType::f64: return align_as<double>(p, plan, scratch, stream);
    case DType::f32: return align_as<float>(p, plan, scratch, stream);
    default: return align_as<uint16_t>(p, plan, scratch, stream);
  }
}

}  // namespace rcu_ops::cuda
