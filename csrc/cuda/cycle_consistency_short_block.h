// Cycle consistency of sequences of at most 32 frames on CUDA devices: what a block does, alone or in a cluster.
#pragma once

#include <type_traits>

#include "cuda/cycle_consistency_short.h"
#include "cuda/device/async_copy.h"
#include "cuda/device/barrier.h"
#include "cuda/device/cluster.h"
#include "cuda/device/convert.h"
#include "cuda/device/launch.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shared_memory.h"
#include "cuda/device/shuffle.h"

namespace rcu_ops::cuda {

// What a launch has beside the problem. word: bytes of an asynchronous copy, 0: number by number. sharpness: 1 /
// temperature.
struct ShortLaunch {
  ShortCycle plan;
  int word = 0, stages = 2;
  float sharpness = 1;
  size_t shared_bytes = 0;
  dim3 blocks;
};

// cycle_consistency_short_sm90.cu: for a plan with clusters.
Error align_short_clusters(const Alignment& problem, const ShortLaunch& launch, Stream stream);

namespace {

constexpr int short_threads = ShortCycle::threads, short_warps = short_threads / 32;
constexpr int stage_channels = ShortCycle::channels;

template <typename T>
// Rows of one quad of channels: eight neighbours in different banks.
constexpr int row_pitch = stage_channels + 16 / static_cast<int>(sizeof(T));

// Shared memory: numbers of the warps [64], d [F][F + 1], a run of keys that its last row lacks, stages or sums.
__host__ __device__ constexpr int shared_header(int frames) {
  return (64 + frames * (frames + 1) + ShortCycle::most_frames + 3) / 4 * 4;
}

__device__ __forceinline__ bool frame_seen(const FrameMask& mask, int64_t n, int64_t t) {
  return !mask.data || mask.data[n * mask.n + t * mask.t];
}
template <typename T>
__device__ __forceinline__ const T* frame_at(const Alignment& p, int64_t n, int f) {
  return f < p.T ? static_cast<const T*>(p.a.data) + n * p.a.n + f * p.a.t
                 : static_cast<const T*>(p.b.data) + n * p.b.n + (f - p.T) * p.b.t;
}

// Channels [c, c + 128) of all frames to a stage, as far as there are some before `end`, and zeros to a whole quad.
template <typename T>
__device__ __forceinline__ void fill_stage(const Alignment& p, int64_t n, int frames, int64_t c, int64_t end, int word,
                                           float factor, T* stage) {
  const int count = end - c < stage_channels ? static_cast<int>(end - c) : stage_channels;
  const auto copy = [&](auto bytes) {
    constexpr int Bytes = decltype(bytes)::value, per = Bytes / static_cast<int>(sizeof(T)),
                  words = stage_channels / per;
#pragma unroll(Bytes == 16 ? 2 : 1)
    for (int i = static_cast<int>(threadIdx.x); i < frames * words; i += short_threads) {
      const int f = i / words, at = i % words * per;
      const T* from = frame_at<T>(p, n, f) + c + at;
      T* to = stage + f * row_pitch<T> + at;
      if (at + per <= count) {
        async_copy<Bytes>(to, from);
      } else if (at < (count + 3) / 4 * 4) {
        for (int k = 0; k < per; ++k) to[k] = at + k < count ? from[k] : narrow<T>(0.f);
      }
    }
  };
  if (word == 16) {
    copy(std::integral_constant<int, 16>());
  } else if (word == 4) {
    copy(std::integral_constant<int, 4>());
  } else {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < frames * stage_channels; i += short_threads) {
      const int f = i / stage_channels, at = i % stage_channels;
      const int64_t stride = f < p.T ? p.a.c : p.b.c;
      const float value = at < count ? widen(frame_at<T>(p, n, f)[(c + at) * stride]) * factor : 0.f;
      stage[f * row_pitch<T> + at] = narrow<T>(value);
    }
  }
}

template <typename T>
__device__ __forceinline__ void quad(const T* from, float (&to)[4]) {
  if constexpr (sizeof(T) == 4) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    const float2 low = unpack<T>(v.x), high = unpack<T>(v.y);
    to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
  }
}

// A thread's tile of pairs, and its group. Threads beyond the last group have no channels.
struct Tile {
  int number, group, row = 0, column = 0;

  __device__ __forceinline__ explicit Tile(const ShortCycle& plan)
      : number(static_cast<int>(threadIdx.x) % plan.tiles), group(static_cast<int>(threadIdx.x) / plan.tiles) {
    ShortCycle::place(number, plan.side, row, column);
  }
};

// The groups' sums over channels [begin, end), [groups][entries][tiles], in place of the stages. All threads return
// together.
template <typename T>
__device__ __forceinline__ void find_sums(const Alignment& p, const ShortCycle& plan, int64_t n, const Tile& tile,
                                          int64_t begin, int64_t end, int word, float factor, int slots, T* stages) {
  constexpr int M = ShortCycle::tile;
  const int frames = plan.frames, stage_numbers = frames * row_pitch<T>;
  const int count = static_cast<int>((end - begin + stage_channels - 1) / stage_channels), ahead = slots - 1;
  int left[M], right[M];  // rows; those beyond the last are the last again, and not written
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const int from = tile.row + m * plan.side, to = tile.column + m * plan.side;
    left[m] = (from < frames ? from : frames - 1) * row_pitch<T>;
    right[m] = (to < frames ? to : frames - 1) * row_pitch<T>;
  }
  float total[M][M] = {}, acc[M][M] = {};
  for (int i = -ahead; i < count; ++i) {  // from before the first, so that the copies are there once
    if (i >= 0) {
      if (ahead == 2)
        async_wait<1>();
      else
        async_wait<0>();
      block_barrier();  // stage i is complete, and stage i - 1 has been read
    }
    const int next = i + ahead;
    if (next < count)
      fill_stage(p, n, frames, begin + static_cast<int64_t>(next) * stage_channels, end, word, factor,
                 stages + next % slots * stage_numbers);
    async_commit();
    if (i < 0) continue;
    if (tile.group < plan.groups) {
      const T* stage = stages + i % slots * stage_numbers;
      const int64_t left_over = end - begin - static_cast<int64_t>(i) * stage_channels;
      const int channels = left_over < stage_channels ? static_cast<int>(left_over) : stage_channels;
      for (int q = 4 * tile.group; q < channels; q += 4 * plan.groups) {
        float a[M][4], b[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) quad(stage + left[m] + q, a[m]), quad(stage + right[m] + q, b[m]);
#pragma unroll
        for (int i = 0; i < M; ++i)
#pragma unroll
          for (int j = 0; j < M; ++j)
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const float difference = a[i][k] - b[j][k];
              acc[i][j] += difference * difference;
            }
      }
    }
    if (i % 2 == 1 || i == count - 1) {
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < M; ++j) total[i][j] += acc[i][j], acc[i][j] = 0;
    }
  }
  block_barrier();  // the stages have been read
  if (tile.group < plan.groups) {
    float* sums = reinterpret_cast<float*>(stages) + tile.group * plan.numbers + tile.number;
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int j = 0; j < M; ++j) sums[(M * i + j) * plan.tiles] = total[i][j];
  }
  block_barrier();  // the sums are there
}

__device__ __forceinline__ float largest_lane(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// The power of two by which the sample's numbers are to be multiplied; every thread gets it. here: bit f for frame f.
// `memory`: a number per warp.
template <typename T>
__device__ float measure_sample(const Alignment& p, int64_t n, uint64_t here, float* memory) {
  float largest = 0;
  for (int f = 0; f < p.T + p.S; ++f) {
    if (!(here >> f & 1)) continue;
    const T* at = frame_at<T>(p, n, f);
    const int64_t stride = f < p.T ? p.a.c : p.b.c;
#pragma unroll 1
    for (int64_t c = threadIdx.x; c < p.C; c += short_threads) {
      const float value = widen(at[c * stride]), size = value < 0 ? -value : value;
      if (size > largest) largest = size;
    }
  }
  largest = largest_lane(largest);
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = largest;
  block_barrier();
  for (int w = 0; w < short_warps; ++w)
    if (memory[w] > largest) largest = memory[w];
  block_barrier();
  double factor = 1, size = largest;
  if (size > 0 && size < static_cast<double>(INFINITY) && (size < 0x1p-30 || size > 0x1p50)) {
    while (size < 1 && factor < 0x1p120) size *= 2, factor *= 2;
    while (size > 1 && factor > 0x1p-120) size /= 2, factor /= 2;
  }
  return static_cast<float>(factor);
}

// From distances to the sample's indices and gate: eight lanes per query, up to four keys each. `memory`: a number per
// warp; `weights`: 33 per query.
__device__ __forceinline__ void find_indices(const Alignment& p, int64_t n, float sharpness, uint64_t here,
                                             const float* d, float* memory, float* weights) {
  constexpr int lanes = 8, held = ShortCycle::most_frames / lanes;
  const int T = static_cast<int>(p.T), S = static_cast<int>(p.S), frames = T + S, pitch = frames + 1;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  bool in_place = T == S;
  for (int first = 0; first < frames; first += short_threads / lanes) {  // all threads together
    const int place = first + static_cast<int>(threadIdx.x) / lanes;
    const bool mine = place < frames;
    const int query = mine ? place : frames - 1;
    const bool turned = query >= T;  // b to a
    const int t = turned ? query - T : query, start = turned ? 0 : T, keys = turned ? T : S;
    const uint32_t there = static_cast<uint32_t>(here >> start) & (0xffffffffu >> (32 - keys));
    const auto present = [&](int key) { return key < keys && (there >> key & 1); };
    float z[held], least = INFINITY;
#pragma unroll
    for (int k = 0; k < held; ++k) {
      z[k] = present(lane + lanes * k) ? d[query * pitch + start + lane + lanes * k] : INFINITY;
      if (z[k] < least) least = z[k];
    }
#pragma unroll
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      const float other = shuffle_xor(least, mask);
      if (other < least) least = other;
    }
    float sum = 0;
#pragma unroll
    for (int k = 0; k < held; ++k) {
      z[k] = present(lane + lanes * k) ? expf((least - z[k]) * sharpness) : 0.f;
      sum += z[k];
    }
#pragma unroll
    for (int mask = lanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    float *of_query = weights + place * (ShortCycle::most_frames + 1), spread[held] = {};
#pragma unroll
    for (int k = 0; k < held; ++k)
      if (mine) of_query[lane + lanes * k] = z[k] / sum;
    warp_barrier();
    const float* row = d + start * pitch + start + lane;  // numbers beyond the last key's are read, and not looked at
    if (mine)
#pragma unroll 4
      for (int i = 0; i < keys; ++i, row += pitch)
#pragma unroll
        for (int k = 0; k < held; ++k) spread[k] += of_query[i] * row[lanes * k];
    int at = -1;
    least = INFINITY;
#pragma unroll
    for (int k = 0; k < held; ++k)
      if (present(lane + lanes * k) && spread[k] < least) least = spread[k], at = lane + lanes * k;
#pragma unroll
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      const float other = shuffle_xor(least, mask);
      const int other_at = shuffle_xor(at, mask);
      if (other_at >= 0 && (at < 0 || other < least || (other == least && other_at < at))) least = other, at = other_at;
    }
    const bool own = here >> query & 1;
    if (!own) at = -1;
    if (mine && lane == 0) (turned ? p.index_ba + n * p.S : p.index_ab + n * p.T)[t] = at;
    in_place = in_place && (!mine || !own || at == t);
  }
  const uint32_t away = ballot(!in_place);
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = away ? 0.f : 1.f;
  block_barrier();
  if (threadIdx.x == 0) {
    bool all = true;
#pragma unroll
    for (int w = 0; w < short_warps; ++w) all = all && memory[w] > 0;
    p.gate[n] = all;
  }
}

// Both index maps and the gate of sequences of at most 32 frames, T in {float, bf16, half}: a and b are read once.
//
// Maths.    d_ij = |f_i - f_j|^2 by differences for all F = T + S frames of a sample; z = softmax(-d / temperature) of
//           a query over the other sequence; nearest frame argmin_i sum_j z_j d_ji, which differs from |soft - b_i|^2
//           by the same number for every i. Differences of far-apart scenes cancel nothing.
// Work.     Block (n, s): sample n, channels of split s. A thread owns 4 x 4 pairs of frames and every groups-th quad
//           of channels; there are as many groups as 256 threads have room for. Then eight lanes per query find its
//           softmax and its index. Splits: in a cluster (Clustered) its first block adds up the others' distances,
//           through distributed shared memory, and goes on; otherwise they go to `partial`, and a second launch
//           (`last`) goes on, a block per sample.
// Memory.   Two or three stages of [F][128 channels] in T, rows 16 bytes apart from a multiple of 128, filled by
//           asynchronous copies of 16 or 4 bytes where channels are adjacent and aligned, number by number elsewhere
//           and at the end of a range. The groups' sums take their place. d, [F][F + 1], beside them.
// Order.    A thread adds up two stages' channels, then stages; groups are added in order, then splits: fixed, no
//           atomics. Every pair in the same order, so that equal frames have equal distances.
// Scale.    Where the largest distance is not finite or is below 2^-60, numbers may be too large or too small to be
//           squared: the block measures them and starts again with all of them times a power of two. This reads a and b
//           twice more.
// Output.   Every element of index_ab, index_ba and gate has one writer. -1 for frames that are not there.
// Bound.    Latency where channels are few: a launch, one read, four barriers and a dozen shuffles, 4 to 5 us (est.).
//           Beyond, issue: F^2 / 2 C differences and multiply-adds, at F = 32 3.7 us per 512 channels and
//           multiprocessor (est.), which is why few samples are split over channels. Shared memory is read at 1/4 of
//           an instruction per pair, as fast as the arithmetic.
template <typename T, bool Clustered>
__device__ __forceinline__ void align_short_block(const Alignment& p, const ShortLaunch& launch, bool last,
                                                  float* partial) {
  const ShortCycle& plan = launch.plan;
  const Tile tile(plan);
  const int frames = plan.frames, numbers = plan.numbers, pitch = frames + 1, splits = static_cast<int>(plan.splits);
  float *memory = dynamic_shared<float>(), *d = memory + 64, *sums = memory + shared_header(frames);
  T* stages = reinterpret_cast<T*>(sums);
  const int64_t n = last ? blockIdx.x : blockIdx.x / splits, split = last ? 0 : blockIdx.x % splits;
  int64_t begin = split * plan.channels_per_split;
  int64_t end = begin + plan.channels_per_split < p.C ? begin + plan.channels_per_split : p.C;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint64_t here_a = ballot(lane < p.T && frame_seen(p.mask_a, n, lane)),
                 here_b = ballot(lane < p.S && frame_seen(p.mask_b, n, lane)), here = here_a | here_b << p.T;
  // Calls take(place in a block's numbers, the two frames) for every pair of which this thread finishes the sum.
  const auto each_pair = [&](auto take) {
    if (tile.group < plan.groups)
#pragma unroll 1
      for (int k = tile.group; k < ShortCycle::entries; k += plan.groups)
        take(k * plan.tiles + tile.number, tile.row + k / ShortCycle::tile * plan.side,
             tile.column + k % ShortCycle::tile * plan.side);
  };
  // The sum of `count` blocks' or groups' numbers in this place.
  const auto sum_of = [&](const float* from, int count, int at) {
    float sum = 0;
#pragma unroll 4
    for (int i = 0; i < count; ++i) sum += from[i * numbers + at];
    return sum;
  };
  const auto of_groups = [&](int at) { return sum_of(sums, plan.groups, at); };
  bool wild = false, large = false;  // a distance is no finite number; one is large enough
  const auto put = [&](float sum, int from, int to) {
    if (from >= frames || to >= frames || (tile.row == tile.column && from > to)) return;  // there, both are the tile's
    const bool both = here >> from & here >> to & 1;
    d[from * pitch + to] = d[to * pitch + from] = both ? sum : 0.f;  // without weight, and so it has to be a number
    if (!both) return;
    wild = wild || !(sum < INFINITY), large = large || sum >= 0x1p-60f;
  };
  float factor = 1, sharpness = launch.sharpness;
  int word = launch.word;
  // Twice at most: the second time over all channels of numbers that are scaled.
  for (bool summing = !last, scaled = false;; summing = scaled = true, begin = 0, end = p.C, word = 0) {
    if (summing) find_sums(p, plan, n, tile, begin, end, word, factor, launch.stages, stages);
    if (Clustered && !scaled) {
      if constexpr (Clustered) {
        each_pair([&](int at, int, int) { sums[at] = of_groups(at); });
        cluster_barrier();  // the sums of all blocks are there
        if (split == 0)
          each_pair([&](int at, int from, int to) {
            float sum = 0;
#pragma unroll 4
            for (int s = 0; s < splits; ++s) sum += cluster_shared(sums, s)[at];
            put(sum, from, to);
          });
        cluster_barrier();  // and have been read
        if (split > 0) return;
      }
    } else if (!Clustered && !last && splits > 1) {
      float* of_block = partial + static_cast<int64_t>(blockIdx.x) * numbers;
      each_pair([&](int at, int, int) { of_block[at] = of_groups(at); });
      return;
    } else {
      const float* from_there = summing ? sums : partial + n * splits * numbers;
      const int count = summing ? plan.groups : splits;
      each_pair([&](int at, int from, int to) { put(sum_of(from_there, count, at), from, to); });
    }
    const uint32_t any_wild = ballot(wild), any_large = ballot(large);
    if (lane == 0) memory[threadIdx.x / 32] = any_wild ? 2.f : any_large ? 1.f : 0.f;
    block_barrier();  // d is complete
    float most = 0;
#pragma unroll
    for (int w = 0; w < short_warps; ++w) most = memory[w] > most ? memory[w] : most;
    if (most == 1 || scaled) break;
    factor = measure_sample<T>(p, n, here, memory + 16);
    if (factor == 1) break;
    const double sharp = 1 / static_cast<double>(factor) / static_cast<double>(factor) / p.temperature;
    sharpness = static_cast<float>(sharp < 3.4e38 ? sharp : 3.4e38);
  }
  find_indices(p, n, sharpness, here, d, memory + 32, sums);
}

}  // namespace
}  // namespace rcu_ops::cuda
