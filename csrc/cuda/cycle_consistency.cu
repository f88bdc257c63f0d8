// Soft nearest neighbours, cycle consistency, and their gradients on CUDA devices.
#include "cuda/cycle_consistency.h"

#include <type_traits>

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
constexpr int keys_at_once = 4, queries_at_once = align_threads / (2 * keys_at_once);  // of key_gradient
constexpr int64_t reduction_numbers = 2 * align_warps;  // of a block, at the start of its shared memory

// A number of every query of a block, as one 16-byte word.
template <typename S>
struct alignas(16) PerQuery {
  static constexpr int count = 16 / static_cast<int>(sizeof(S));
  S of[count];
};
// Of align_query's shared memory: the reductions, and sums of its threads.
template <typename S>
constexpr int64_t static_numbers = reduction_numbers + align_threads * PerQuery<S>::count;
// Channels of a row, to whole steps of align_query.
constexpr int64_t step_channels = 64;

// Threads side by side along channels: a power of two.
__device__ __forceinline__ int threads_along(int64_t channels) {
  return channels > 128 ? align_threads : channels > 64 ? 128 : channels > 32 ? 64 : 32;
}

// Sum over `count` warps of the block from `first` on, in an order of its own that never changes. Each of their threads
// gets it; all threads of the block come here. `memory`: align_warps numbers.
template <typename S>
__device__ S sum_of_warps(S value, S* memory, int first = 0, int count = align_warps) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = value;
  block_barrier();
  value = 0;
#pragma unroll 1
  for (int w = first; w < first + count; ++w) value += memory[w];
  block_barrier();
  return value;
}

// The first of the smallest of a query's values[0], values[PerQuery::count], ... of `count` keys, and its place; -1 where
// none is less than infinity. The query's warps look for it, as many as any other's from `first_warp` on, and get it.
// `memory`: 2 * align_warps numbers. Places are exact in fp32 up to 2^24.
template <typename S>
__device__ int64_t first_smallest(const S* values, int64_t count, S* memory, int first_warp, S& least) {
  constexpr int Q = PerQuery<S>::count, warps = align_warps / Q;
  const S infinity = static_cast<S>(INFINITY);
  S best = infinity, place = -1;
  const auto take = [&](S value, S at) {
    if (at >= 0 && (value < best || (value == best && (place < 0 || at < place)))) best = value, place = at;
  };
#pragma unroll 1
  for (int64_t i = static_cast<int>(threadIdx.x) - 32 * first_warp; i < count; i += 32 * warps)
    if (values[i * Q] < infinity) take(values[i * Q], static_cast<S>(i));
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const S value = shuffle_xor(best, mask), at = shuffle_xor(place, mask);
    take(value, at);
  }
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = best, memory[align_warps + threadIdx.x / 32] = place;
  block_barrier();
#pragma unroll
  for (int w = 0; w < warps; ++w) take(memory[first_warp + w], memory[align_warps + first_warp + w]);
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
      const bool seen = mask.there(n, t);
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

// ---- a few queries -------------------------------------------------------------------------------------------------

// Queries against all keys, T in {double, float, uint16_t: bf16 or fp16}, arithmetic in S = Accumulator<T>.
//
// Work.     A block owns 4 neighbouring queries (2 in fp64): frames of a, or, with `cycle`, also of b (after a's), so
//           that a key is read once for all of them. Distances: a warp takes 4 keys of every 32, its lanes every 32nd
//           channel, by differences. Softmax: the block's warps in equal parts, one for each query. Sums of keys: a
//           thread owns a channel, or shares it with others where channels are few: runs of 16 keys in turn. Soft
//           neighbours are kept as the sum u as it comes out and the rest, sum_i z_i (b_i - u): right under offsets and
//           scene cuts, where rounding u loses the differences between frames (see csrc/cpu/cycle_consistency_core.h).
// Memory.   A block's row, in shared memory where it fits, of words that hold a number of every query: z or distances
//           [keys], weights [keys], u [padded], rest [padded]; before u and the rest there are the queries and their
//           gradients in their places. Channels beyond the last are zeros. For gradients z and the weights are left in
//           the scratch, [blocks][2][keys], for key_gradient. Sums of threads beside the reductions.
// Aligned.  Words are 16 bytes from a multiple of 16: the row's parts have whole words, and so has what lies before it.
// Barriers. All threads of a block return together or come to every barrier: what they branch on is the block's.
// Order.    Fixed; no atomics; equal keys have equal distances wherever they stand, and so have equal queries.
// Output.   Every element has one writer. Queries beyond the last are the last again, and not written. Rows of frames
//           that are not there: index -1, results and gradients 0.
// Code.     A warp has 8 numbers of keys on their way at a time, a thread 16 of those that it adds up. A thread's own
//           keys and channels are a few: those loops are not unrolled, which would be a quarter of the kernel.
// Bound.    Issue. Of a pair and channel four instructions find a distance, and three and a half add a key up; two to
//           five passes over b per four queries, from L2: S C numbers each.
template <typename T>
__global__ void __launch_bounds__(align_threads, 2)
    align_query(const Alignment p, const Accumulator<T>* largest_of, int parts, Accumulator<T>* scratch,
                int64_t row_numbers, bool in_shared) {
  using S = Accumulator<T>;
  using Word = PerQuery<S>;
  constexpr int Q = Word::count, K = 4, steps = static_cast<int>(step_channels) / 32;
  constexpr int warps_of_query = align_warps / Q, threads_of_query = align_threads / Q;
  S* memory = dynamic_shared<S>();
  const bool bf16 = p.dtype == DType::bf16;
  const int lane = threadIdx.x % 32;
  const int64_t blocks_a = (p.T + Q - 1) / Q, blocks_b = (p.S + Q - 1) / Q;
  const bool turned = static_cast<int64_t>(blockIdx.x) >= p.N * blocks_a;  // a and b change places
  const int64_t block = turned ? blockIdx.x - p.N * blocks_a : blockIdx.x, blocks = turned ? blocks_b : blocks_a;
  const int64_t queries = turned ? p.S : p.T, keys = turned ? p.T : p.S;
  const int64_t n = block / blocks, t0 = (block - n * blocks) * Q;
  const Sequence &from = turned ? p.b : p.a, &to = turned ? p.a : p.b;
  const FrameMask &mask_from = turned ? p.mask_b : p.mask_a, &mask_to = turned ? p.mask_a : p.mask_b;
  const bool back = p.kind == Align::back || p.kind == Align::back_backward;
  const bool gradients = p.kind == Align::soft_backward || p.kind == Align::back_backward;
  const auto in_scratch = [&] { return reinterpret_cast<Word*>(scratch + blockIdx.x * row_numbers); };
  Word* z = in_shared ? reinterpret_cast<Word*>(memory + static_numbers<S>) : in_scratch();
  const int64_t padded = (p.C + step_channels - 1) / step_channels * step_channels;
  Word *w = z + keys, *centre = w + keys, *rest = centre + padded;
  const auto index = [&] { return turned ? p.index_ba : p.index_ab; };
  const uint8_t* seen = mask_to.data ? mask_to.data + n * mask_to.n : nullptr;
  const auto key_there = [&](int64_t i) { return !seen || seen[i * mask_to.t]; };
  T* vector = static_cast<T*>(gradients ? p.da : p.soft);
  const int count = queries - t0 < Q ? static_cast<int>(queries - t0) : Q;

  const auto some = [&](const FrameMask& mask, int64_t frames) {
    if (!mask.data) return true;
    S number = 0;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < frames; i += align_threads) number += mask.there(n, i) ? S(1) : S(0);
    return sum_of_warps(number, memory) > 0;
  };
  const bool any = some(mask_to, keys) && some(p.mask_through, p.frames_through);
  const auto query_there = [&](int q) { return any && q < count && mask_from.there(n, t0 + q); };
  // This thread's query, where queries are dealt with one by one.
  const int mine = static_cast<int>(threadIdx.x) / threads_of_query, first_warp = mine * warps_of_query;
  const int start = static_cast<int>(threadIdx.x) % threads_of_query;
  const int64_t t = t0 + (mine < count ? mine : count - 1), task = n * queries + t;
  const bool here = query_there(mine);
  if (mine < count && !here && start == 0) {
    if (index()) index()[task] = -1;
    if (p.kind == Align::back && p.loss)
      static_cast<S*>(p.loss)[task] = 0;
    else if (p.kind == Align::back)
      static_cast<S*>(p.log_probability)[task] = static_cast<S*>(p.mean)[task] = static_cast<S*>(p.variance)[task] = 0;
  }
  if (mine < count && !here && vector && !(gradients && p.add_to_da))
#pragma unroll 1
    for (int64_t c = start; c < p.C; c += threads_of_query) vector[task * p.C + c] = 0;
  // z and weights as key_gradient reads them.
  const auto leave_weights = [&] {
    Word* to_scratch = in_scratch();
    bool keep[Q];
#pragma unroll
    for (int q = 0; q < Q; ++q) keep[q] = any && q < count && p.mask_a.there(n, t0 + q);  // never turned
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < 2 * keys; i += align_threads) {
      Word both{};
      if (any) both = z[i];
#pragma unroll
      for (int q = 0; q < Q; ++q) both.of[q] = keep[q] ? both.of[q] : S(0);
      to_scratch[i] = both;
    }
  };
  if (!any) {
    if (gradients) leave_weights();
    return;
  }

  const S factor = scale_of(largest_of, parts, n);
  const T* key0 = static_cast<const T*>(to.data) + n * to.n;
  // Numbers of the block's queries, times `by`, and zeros beyond the last channel.
  const auto fetch = [&](const Sequence& v, S by, Word* words) {
#pragma unroll 1
    for (int64_t c = threadIdx.x; c < padded; c += align_threads) {
      Word word{};
      const T* at = static_cast<const T*>(v.data) + n * v.n + c * v.c;
#pragma unroll
      for (int q = 0; q < Q; ++q)
        if (c < p.C) word.of[q] = widen(at[(t0 + (q < count ? q : count - 1)) * v.t], bf16) * by;
      words[c] = word;
    }
  };
  // values[i] = sum over channels of term(key i, c, query q); infinity (or 0 for products) for keys that are not there.
  const auto for_keys = [&](Word* values, S missing, auto term) {
#pragma unroll 1
    for (int64_t first = threadIdx.x / 32 * K; first < keys; first += K * align_warps) {
      S sum[K * Q] = {};
      const int there_are = keys - first < K ? static_cast<int>(keys - first) : K;
      const T* key = key0 + first * to.t + lane * to.c;
#pragma unroll 1
      for (int64_t c0 = 0; c0 < p.C; c0 += step_channels) {
        T numbers[steps][K];
#pragma unroll
        for (int u = 0; u < steps; ++u, key += 32 * to.c) {
          const bool inside = c0 + 32 * u + lane < p.C;
          const T* at = key;
#pragma unroll
          for (int j = 0; j < K; ++j, at += to.t) numbers[u][j] = inside && j < there_are ? *at : T();
        }
#pragma unroll
        for (int u = 0; u < steps; ++u)
          term(c0 + 32 * u + lane, [&](auto add) {
#pragma unroll
            for (int j = 0; j < K; ++j) {
              const S k = widen(numbers[u][j], bf16) * factor;
#pragma unroll
              for (int q = 0; q < Q; ++q) add(sum[j * Q + q], k, q);
            }
          });
      }
      const S all = sums_of_warp(sum);
      constexpr int lanes = 32 / (K * Q);  // that get the same sum
      const int64_t i = first + lane / lanes / Q;
      if (lane % lanes == 0 && i < keys) values[i].of[lane / lanes % Q] = key_there(i) ? all : missing;
    }
    block_barrier();
  };
  // values[c] = sum over keys of weights[i] (key - around[c]), around == nullptr: 0. Groups of threads take runs of 16
  // keys in turn.
  const auto for_channels = [&](Word* values, const Word* weights, auto around) {
    constexpr bool centred = std::is_pointer_v<decltype(around)>;
    const int along = threads_along(p.C), groups = align_threads / along, group = static_cast<int>(threadIdx.x) / along;
    Word* sums = reinterpret_cast<Word*>(memory + reduction_numbers);
#pragma unroll 1
    for (int64_t c0 = 0; c0 < p.C; c0 += along) {
      const int64_t c = c0 + static_cast<int>(threadIdx.x) % along, read = c < p.C ? c : p.C - 1;
      Word sum{}, centre_of_key{};
      if constexpr (centred) centre_of_key = around[read];
      const T* key = key0 + read * to.c + group * 16 * to.t;
#pragma unroll 1
      for (int64_t first = group * 16; first < keys; first += groups * 16, key += (groups - 1) * 16 * to.t) {
        Word part{};
        const auto add = [&](const Word* at, T number) {
          const Word weight = *at;  // in one read
          const S k = widen(number, bf16) * factor;
#pragma unroll
          for (int q = 0; q < Q; ++q) part.of[q] += weight.of[q] * (centred ? k - centre_of_key.of[q] : k);
        };
        if (!seen && first + 16 <= keys) {
#pragma unroll
          for (int j = 0; j < 16; ++j, key += to.t) add(weights + first + j, *key);
        } else {
#pragma unroll 1
          for (int j = 0; j < 16; ++j, key += to.t)
            if (first + j < keys && key_there(first + j)) add(weights + first + j, *key);
        }
#pragma unroll
        for (int q = 0; q < Q; ++q) sum.of[q] += part.of[q];
      }
      sums[threadIdx.x] = sum;
      block_barrier();
      if (group == 0 && c < p.C) {
#pragma unroll 1
        for (int other = 1; other < groups; ++other)
#pragma unroll
          for (int q = 0; q < Q; ++q) sum.of[q] += sums[threadIdx.x + other * along].of[q];
        values[c] = sum;
      }
      block_barrier();
    }
  };

  fetch(from, factor, centre);
  block_barrier();
  for_keys(z, static_cast<S>(INFINITY), [&](int64_t c, auto each) {
    const Word query = centre[c];
    each([&](S& sum, S k, int q) {
      const S difference = k - query.of[q];
      sum += difference * difference;
    });
  });
  const double sharp = 1 / static_cast<double>(factor) / static_cast<double>(factor) / p.temperature;
  const double most = sizeof(S) == 8 ? 1.7e308 : 3.4e38;
  const S sharpness = static_cast<S>(sharp < most ? sharp : most);
  // Of this thread's query from here on: z and weights, a word apart.
  S *z_own = &z->of[mine], *w_own = &w->of[mine];
  const auto sum_of_query = [&](S value) { return sum_of_warps(value, memory, first_warp, warps_of_query); };
  S least;
  const int64_t likely = first_smallest(z_own, keys, memory, first_warp, least);
  const S own = back ? z_own[t * Q] : S(0);
  block_barrier();
  S sum = 0;
#pragma unroll 1
  for (int64_t i = start; i < keys; i += threads_of_query) {
    const S share = key_there(i) ? exp((least - z_own[i * Q]) * sharpness) : S(0);
    z_own[i * Q] = share, sum += share;
  }
  sum = sum_of_query(sum);
#pragma unroll 1
  for (int64_t i = start; i < keys; i += threads_of_query) z_own[i * Q] /= sum;
  block_barrier();

  if (back) {
    // Places relative to the most probable one's: the mean of numbers close to each other.
    S mean = 0, variance = 0;
    const S origin = static_cast<S>(likely < 0 ? 0 : likely);
#pragma unroll 1
    for (int64_t i = start; i < keys; i += threads_of_query) mean += z_own[i * Q] * (static_cast<S>(i) - origin);
    mean = sum_of_query(mean);
#pragma unroll 1
    for (int64_t i = start; i < keys; i += threads_of_query) {
      const S away = (static_cast<S>(i) - origin) - mean;
      variance += z_own[i * Q] * (away * away);
    }
    variance = sum_of_query(variance);
    if (p.kind == Align::back) {
      if (start > 0 || !here) return;
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
    for (int64_t i = start; i < keys; i += threads_of_query) {
      const S away = (static_cast<S>(i) - origin) - mean;
      w_own[i * Q] =
          by * (z_own[i * Q] * (g_mean * away + g_variance * (away * away - variance) - g) + (i == t ? g : S(0)));
    }
    block_barrier();
  }

  for_channels(centre, z, nullptr);
  if (p.kind == Align::soft_backward) {
    fetch(p.grad, S(1), rest);
    block_barrier();
    for_keys(w, S(0), [&](int64_t c, auto each) {
      const Word around = centre[c], grad = rest[c];
      each([&](S& sum, S k, int q) { sum += (k - around.of[q]) * grad.of[q]; });
    });
    S mean = 0;
#pragma unroll 1
    for (int64_t i = start; i < keys; i += threads_of_query) mean += z_own[i * Q] * w_own[i * Q];
    mean = sum_of_query(mean);
#pragma unroll 1
    for (int64_t i = start; i < keys; i += threads_of_query)
      w_own[i * Q] = z_own[i * Q] * (w_own[i * Q] - mean) * (2 * sharpness);
    block_barrier();
  }
  for_channels(rest, gradients ? w : z, static_cast<const Word*>(centre));
  if (vector && here)
#pragma unroll 1
    for (int64_t c = start; c < p.C; c += threads_of_query) {
      T* out = vector + task * p.C + c;
      const S value = gradients ? rest[c].of[mine] : (centre[c].of[mine] + rest[c].of[mine]) / factor;
      *out = narrow<T>(p.add_to_da ? widen(*out, bf16) + value : value, bf16);
    }
  if (gradients) return leave_weights();
  if (!index()) return;
#pragma unroll 1
  for (int64_t c = p.C + threadIdx.x; c < padded; c += align_threads) rest[c] = Word{};
  block_barrier();
  for_keys(w, static_cast<S>(INFINITY), [&](int64_t c, auto each) {
    const Word around = centre[c], more = rest[c];
    each([&](S& sum, S k, int q) {
      const S difference = (k - around.of[q]) - more.of[q];
      sum += difference * difference;
    });
  });
  const int64_t nearest = first_smallest(w_own, keys, memory, first_warp, least);
  if (start == 0 && here) index()[task] = nearest;
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
  // Of the weight that this thread fetches: neighbours have a word's queries, then keys, as they lie.
  constexpr int per_word = PerQuery<S>::count;
  const int number = static_cast<int>(threadIdx.x), of_key = number / per_word % K, which = number / (Q * K);
  const int of_query = number % per_word + number / (per_word * K) % (Q / per_word) * per_word;
  const bool fetches = i0 + of_key < p.S && (soft || which == 1);
  const S* weight = rows + (n * ((p.T + per_word - 1) / per_word) + of_query / per_word) * row_numbers +
                    (which * p.S + i0 + of_key) * per_word + of_query % per_word;
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
      const S fetched = fetches && t < p.T ? weight[t0 / per_word * row_numbers] : S(0);
      block_barrier();  // the weights before these have been read
      weights[(of_query * 2 + which) * K + of_key] = fetched;
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
          if (p.mask_a.there(n, t0 + q))
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
      static_cast<T*>(p.db)[(n * p.S + i) * p.C + channel] = narrow<T>(p.mask_b.there(n, i) ? all : S(0), bf16);
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
    away += p.mask_a.there(n, t) && p.index_ab[n * p.T + t] != t ? 1.f : 0.f;
  for (int64_t t = threadIdx.x; t < p.S; t += align_threads)
    away += p.mask_b.there(n, t) && p.index_ba[n * p.S + t] != t ? 1.f : 0.f;
  away = sum_of_warps(away, memory);
  if (threadIdx.x == 0) p.gate[n] = p.T == p.S && away == 0;
}

Error launch_gate(const Alignment& p, Stream stream) {
  return launch("cycle_consistency gate_of", gate_of, dim3(static_cast<unsigned>(p.N)), dim3(align_threads),
                reduction_numbers * sizeof(float), stream, p);
}

// Numbers of a block's row, and whether rows lie in shared memory.
struct RowPlan {
  int64_t numbers, blocks, scratch_numbers, shared_numbers;
  bool in_shared;
  int parts;  // of a sample, that are measured by themselves: as many as fill the device, of four runs at least
  int64_t rows_at;
};

RowPlan plan_rows(const Alignment& p, const Gpu& gpu) {
  const int64_t keys = p.kind == Align::cycle && p.T > p.S ? p.T : p.S, size = state_size(p.dtype), Q = 16 / size;
  const bool gradients = p.kind == Align::soft_backward || p.kind == Align::back_backward;
  const int64_t fixed = size == 8 ? static_numbers<double> : static_numbers<float>;
  RowPlan plan{Q * 2 * (keys + round_up(p.C, step_channels)),
               p.N * (ceil_div(p.T, Q) + (p.kind == Align::cycle ? ceil_div(p.S, Q) : 0)),
               0,
               fixed,
               false,
               1,
               0};
  plan.in_shared = (plan.numbers + fixed) * size <= gpu.shared_bytes;
  if (plan.in_shared) plan.shared_numbers += plan.numbers;
  const int64_t most = p.N > 0 ? gpu.multiprocessors / p.N : 1, runs = (p.T + p.S) * p.C / (4 * align_threads);
  const int64_t parts = most < runs ? most : runs;
  plan.parts = static_cast<int>(parts < 1 ? 1 : parts > 16 ? 16 : parts);
  plan.rows_at = round_up(p.N * plan.parts, 4);
  plan.scratch_numbers = plan.rows_at + (plan.in_shared && !gradients ? 0 : plan.numbers * plan.blocks);
  return plan;
}

template <typename T>
Error align_as(const Alignment& p, const RowPlan& plan, void* scratch, Stream stream) {
  using S = Accumulator<T>;
  S *largest_of = static_cast<S*>(scratch), *rows = largest_of + plan.rows_at;
  Error error = launch("cycle_consistency measure", measure<T>, dim3(static_cast<unsigned>(p.N * plan.parts)),
                       dim3(align_threads), reduction_numbers * sizeof(S), stream, p, plan.parts, largest_of);
  if (error.empty())
    error = launch("cycle_consistency align_query", align_query<T>, dim3(static_cast<unsigned>(plan.blocks)),
                   dim3(align_threads), static_cast<size_t>(plan.shared_numbers) * sizeof(S), stream, p, largest_of,
                   plan.parts, rows, plan.numbers, plan.in_shared);
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
  if (ProductTiles::takes(p, gpu)) {
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
  if (ProductTiles::takes(p, gpu)) {
    Error error = align_products(p, ProductTiles(p.kind, p.N, p.T, p.S, p.C, gpu), scratch, stream);
    return error.empty() && p.gate ? launch_gate(p, stream) : error;
  }
  const RowPlan plan = plan_rows(p, gpu);
  if (plan.blocks > INT32_MAX || p.N * p.S > INT32_MAX) return "cycle_consistency: too many frames for one launch";
  switch (p.dtype) {
    case DType::f64: return align_as<double>(p, plan, scratch, stream);
    case DType::f32: return align_as<float>(p, plan, scratch, stream);
    default: return align_as<uint16_t>(p, plan, scratch, stream);
  }
}

}  // namespace rcu_ops::cuda
