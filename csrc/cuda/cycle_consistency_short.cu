// Cycle consistency of sequences of at most 32 frames on CUDA devices, T in {float, bf16, half}: a and b are read once.
//
// Maths.    d_ij = |f_i - f_j|^2 by differences for all F = T + S frames of a sample; z = softmax(-d / temperature) of
//           a query over the other sequence; nearest frame argmin_i sum_j z_j d_ji, which differs from |soft - b_i|^2
//           by the same number for every i. Differences of far-apart scenes cancel nothing.
// Work.     Block (n, s): sample n, channels of split s. A thread owns 4 x 4 pairs of frames, on or above the diagonal,
//           and every groups-th quad of channels; there are as many groups as 288 threads have room for. With one split
//           the block goes on to the softmax and the indices, a warp per query and a lane per key; otherwise its
//           distances go to the scratch, and a second launch adds them up.
// Memory.   Two stages of [F][128 channels] in T, rows 16 bytes apart from a multiple of 128: filled by asynchronous
//           copies of 16 or 4 bytes where channels are adjacent and aligned, number by number elsewhere and at the end
//           of a range; then d, [F][F + 1].
// Order.    A thread adds up a stage's channels, then stages; groups are added in order, then splits: fixed, no
//           atomics. Every pair in the same order, so that equal frames have equal distances.
// Scale.    Where the largest distance is not finite or is below 2^-60, numbers may be too large or too small to be
//           squared: the block measures them and starts again with all of them times a power of two. This reads a and b
//           twice more.
// Output.   Every element of index_ab, index_ba and gate has one writer. -1 for frames that are not there.
// Bound.    Bytes: (T + S) C numbers. F^2 / 2 C differences and multiply-adds: at F = 32, C = 2048 8 us of one
//           multiprocessor's arithmetic per sample (est.), which is why few samples are split over channels.
#include "cuda/cycle_consistency_short.h"

#include "cuda/device/async_copy.h"
#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/launch.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shared_memory.h"
#include "cuda/device/shuffle.h"

namespace rcu_ops::cuda {
namespace {

constexpr int threads = ShortCycle::threads, warps = threads / 32, side_of_tile = ShortCycle::tile;
constexpr int stage_channels = ShortCycle::channels;

template <typename T>
// Rows of one quad of channels: different banks.
constexpr int row_pitch = stage_channels + 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ bool there(const FrameMask& mask, int64_t n, int64_t t) {
  return !mask.data || mask.data[n * mask.n + t * mask.t];
}
__device__ __forceinline__ bool frame_there(const Alignment& p, int64_t n, int f) {
  return f < p.T ? there(p.mask_a, n, f) : there(p.mask_b, n, f - p.T);
}
template <typename T>
__device__ __forceinline__ const T* frame_at(const Alignment& p, int64_t n, int f) {
  return f < p.T ? static_cast<const T*>(p.a.data) + n * p.a.n + f * p.a.t
                 : static_cast<const T*>(p.b.data) + n * p.b.n + (f - p.T) * p.b.t;
}

// Channels [c, c + 128) of all frames to a stage, zero from `end` on. word: bytes of an asynchronous copy, 0: number by
// number.
template <typename T>
__device__ void fill_stage(const Alignment& p, int64_t n, int frames, int64_t c, int64_t end, int word, float factor,
                           T* stage) {
  const auto copy = [&](auto bytes) {
    constexpr int Bytes = decltype(bytes)::value, words = stage_channels * static_cast<int>(sizeof(T)) / Bytes;
    for (int i = static_cast<int>(threadIdx.x); i < frames * words; i += threads) {
      const int f = i / words, at = i % words * (Bytes / static_cast<int>(sizeof(T)));
      async_copy<Bytes>(stage + f * row_pitch<T> + at, frame_at<T>(p, n, f) + c + at);
    }
  };
  if (word && c + stage_channels <= end) {
    if (word == 16)
      copy(std::integral_constant<int, 16>());
    else
      copy(std::integral_constant<int, 4>());
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < frames * stage_channels; i += threads) {
      const int f = i / stage_channels, at = i % stage_channels;
      const int64_t stride = f < p.T ? p.a.c : p.b.c;
      const float value = c + at < end ? widen(frame_at<T>(p, n, f)[(c + at) * stride]) * factor : 0.f;
      stage[f * row_pitch<T> + at] = narrow<T>(value);
    }
  }
  async_commit();
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

// d[i][j], both triangles, over channels [begin, end). All threads return together, with d complete.
template <typename T>
__device__ void find_distances(const Alignment& p, int64_t n, int64_t begin, int64_t end, int word, float factor,
                               T* stages, float* d) {
  constexpr int M = side_of_tile;
  const int frames = static_cast<int>(p.T + p.S), side = (frames + M - 1) / M, tiles = ShortCycle::tiles(frames);
  const int groups = ShortCycle::groups(frames), group = static_cast<int>(threadIdx.x) / tiles, pitch = frames + 1;
  const int stage_numbers = frames * row_pitch<T>;
  int row, column;
  ShortCycle::place(static_cast<int>(threadIdx.x) % tiles, side, row, column);
  int left[M], right[M];  // frames; those beyond the last are the last again, and not written
#pragma unroll
  for (int m = 0; m < M; ++m) {
    left[m] = M * row + m < frames ? M * row + m : frames - 1;
    right[m] = M * column + m < frames ? M * column + m : frames - 1;
  }
  float total[M][M] = {};
  int slot = 1;
  for (int64_t c = begin - stage_channels; c < end; c += stage_channels, slot ^= 1) {
    const bool more = c + stage_channels < end;
    if (more) fill_stage(p, n, frames, c + stage_channels, end, word, factor, stages + (slot ^ 1) * stage_numbers);
    if (c < begin) continue;  // nothing but the first stage's copies
    if (more)
      async_wait<1>();
    else
      async_wait<0>();
    block_barrier();  // the stage is complete
    if (group < groups) {
      const T* stage = stages + slot * stage_numbers;
      float acc[M][M] = {};
      for (int q = group; q < stage_channels / 4; q += groups) {
        float a[M][4], b[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m)
          quad(stage + left[m] * row_pitch<T> + 4 * q, a[m]), quad(stage + right[m] * row_pitch<T> + 4 * q, b[m]);
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
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < M; ++j) total[i][j] += acc[i][j];
    }
    block_barrier();  // the stage has been read
  }
  for (int g = 0; g < groups; ++g) {
    if (group == g) {
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < M; ++j) {
          const int from = M * row + i, to = M * column + j;
          if (from >= frames || to >= frames || from > to) continue;
          const float sum = (g ? d[from * pitch + to] : 0.f) + total[i][j];
          d[from * pitch + to] = d[to * pitch + from] = sum;
        }
    }
    block_barrier();
  }
}

// The first of the smallest over the lanes; -1 where none is less than infinity.
__device__ __forceinline__ int first_smallest(float value, int lane, float& least) {
  int place = value < INFINITY ? lane : -1;
  least = place < 0 ? INFINITY : value;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = shuffle_xor(least, mask);
    const int at = shuffle_xor(place, mask);
    if (at >= 0 && (place < 0 || other < least || (other == least && at < place))) least = other, place = at;
  }
  return place;
}

__device__ __forceinline__ float largest_lane(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// The power of two by which the sample's numbers are to be multiplied; every thread gets it. `memory`: a number per
// warp.
template <typename T>
__device__ float measure(const Alignment& p, int64_t n, float* memory) {
  float largest = 0;
  for (int f = 0; f < p.T + p.S; ++f) {
    if (!frame_there(p, n, f)) continue;
    const T* at = frame_at<T>(p, n, f);
    const int64_t stride = f < p.T ? p.a.c : p.b.c;
    for (int64_t c = threadIdx.x; c < p.C; c += threads) {
      const float value = widen(at[c * stride]), size = value < 0 ? -value : value;
      if (size > largest) largest = size;
    }
  }
  largest = largest_lane(largest);
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = largest;
  block_barrier();
  for (int w = 0; w < warps; ++w)
    if (memory[w] > largest) largest = memory[w];
  block_barrier();
  double factor = 1, size = largest;
  if (size > 0 && size < static_cast<double>(INFINITY) && (size < 0x1p-30 || size > 0x1p50)) {
    while (size < 1 && factor < 0x1p120) size *= 2, factor *= 2;
    while (size > 1 && factor > 0x1p-120) size /= 2, factor /= 2;
  }
  return static_cast<float>(factor);
}

// What the sample's numbers are to be multiplied by before they are squared once more: 1, mostly. Every thread gets it.
// `memory`: a number per warp.
template <typename T>
__device__ __forceinline__ float rescale(const Alignment& p, int64_t n, const float* d, float* memory) {
  const int frames = static_cast<int>(p.T + p.S), pitch = frames + 1;
  float largest = 0;
  for (int i = static_cast<int>(threadIdx.x); i < frames * frames; i += threads)
    if (frame_there(p, n, i / frames) && frame_there(p, n, i % frames)) {
      const float value = d[i / frames * pitch + i % frames];
      if (!(value <= largest)) largest = value < INFINITY ? value : INFINITY;  // NaN too
    }
  largest = largest_lane(largest);
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = largest;
  block_barrier();
  for (int w = 0; w < warps; ++w)
    if (memory[w] > largest) largest = memory[w];
  block_barrier();
  return largest < INFINITY && largest >= 0x1p-60f ? 1.f : measure<T>(p, n, memory);
}

// From distances, of numbers times `factor`, to the sample's indices and gate. `memory`: 64 numbers.
__device__ __forceinline__ void finish(const Alignment& p, int64_t n, float factor, const float* d, float* memory) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int frames = static_cast<int>(p.T + p.S), pitch = frames + 1;
  const double sharp = 1 / static_cast<double>(factor) / static_cast<double>(factor) / p.temperature;
  const float sharpness = static_cast<float>(sharp < 3.4e38 ? sharp : 3.4e38);
  for (int query = warp; query < frames; query += warps) {
    const bool turned = query >= p.T;  // b to a
    const int t = turned ? query - static_cast<int>(p.T) : query, first = turned ? 0 : static_cast<int>(p.T);
    const int keys = static_cast<int>(turned ? p.T : p.S);
    const bool own = frame_there(p, n, query), present = lane < keys && frame_there(p, n, first + lane);
    const int key = first + (lane < keys ? lane : 0);
    float least;
    const float distance = present ? d[query * pitch + key] : INFINITY;
    first_smallest(distance, lane, least);
    float z = present ? expf((least - distance) * sharpness) : 0.f, sum = z;
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    z /= sum;
    float spread = 0;
    for (int j = 0; j < keys; ++j) {
      const float weight = shuffle(z, j);
      if (frame_there(p, n, first + j)) spread += weight * d[(first + j) * pitch + key];
    }
    int index = first_smallest(present ? spread : INFINITY, lane, least);
    if (!own) index = -1;
    if (lane == 0) {
      (turned ? p.index_ba + n * p.S : p.index_ab + n * p.T)[t] = index;
      memory[query] = !own || index == t ? 1.f : 0.f;
    }
  }
  block_barrier();
  if (threadIdx.x == 0) {
    bool all = p.T == p.S;
    for (int f = 0; f < frames; ++f) all = all && memory[f] > 0;
    p.gate[n] = all;
  }
}

// Shared memory: numbers of the warps or frames [64], d [F][F + 1], two stages.
__host__ __device__ constexpr int shared_header(int frames) { return (64 + frames * (frames + 1) + 3) / 4 * 4; }

// Block (n, s) of the first launch; or, where there are splits, block n of the second (`last`): the sum of a sample's
// splits, in order, and what follows from it.
template <typename T>
__global__ void __launch_bounds__(threads, 1)
    align_short_kernel(const Alignment p, const ShortCycle plan, int word, bool last, float* partial) {
  float *memory = dynamic_shared<float>(), *d = memory + 64;
  const int frames = static_cast<int>(p.T + p.S), pairs = frames * frames;
  T* stages = reinterpret_cast<T*>(memory + shared_header(frames));
  const int64_t n = last ? blockIdx.x : blockIdx.x / plan.splits, split = last ? 0 : blockIdx.x % plan.splits;
  int64_t begin = split * plan.channels_per_split;
  int64_t end = begin + plan.channels_per_split < p.C ? begin + plan.channels_per_split : p.C;
  if (last) {
    for (int i = static_cast<int>(threadIdx.x); i < pairs; i += threads) {
      float sum = 0;
      for (int64_t s = 0; s < plan.splits; ++s) sum += partial[(n * plan.splits + s) * pairs + i];
      d[i / frames * (frames + 1) + i % frames] = sum;
    }
    block_barrier();
  }
  // Twice at most: the second time over all channels of numbers that are scaled.
  float factor = 1;
  for (bool scaled = false, distances = !last;; distances = scaled = true, begin = 0, end = p.C, word = 0) {
    if (distances) find_distances(p, n, begin, end, word, factor, stages, d);
    if (!last && plan.splits > 1) {
      float* to = partial + static_cast<int64_t>(blockIdx.x) * pairs;
      for (int i = static_cast<int>(threadIdx.x); i < pairs; i += threads)
        to[i] = d[i / frames * (frames + 1) + i % frames];
      return;
    }
    if (scaled) break;
    factor = rescale<T>(p, n, d, memory);
    if (factor == 1) break;
  }
  finish(p, n, factor, d, memory);
}

// The widest copy that every row of both sequences is aligned for; 0: none.
int copied_word(const Alignment& p) {
  const int64_t size = element_size(p.dtype);
  for (const int word : {16, 4}) {
    bool fits = true;
    for (const Sequence* v : {&p.a, &p.b})
      fits = fits && v->c == 1 && reinterpret_cast<uintptr_t>(v->data) % word == 0 && v->n * size % word == 0 &&
             v->t * size % word == 0;
    if (fits) return word;
  }
  return 0;
}

template <typename T>
Error align_as(const Alignment& p, const ShortCycle& plan, float* partial, Stream stream) {
  const int frames = static_cast<int>(p.T + p.S), word = copied_word(p);
  const size_t bytes =
      static_cast<size_t>(shared_header(frames)) * 4 + 2 * static_cast<size_t>(frames * row_pitch<T>) * sizeof(T);
  Error error =
      launch("cycle_consistency align_short", align_short_kernel<T>, dim3(static_cast<unsigned>(p.N * plan.splits)),
             dim3(threads), bytes, stream, p, plan, word, false, partial);
  if (error.empty() && plan.splits > 1)
    error = launch("cycle_consistency align_short", align_short_kernel<T>, dim3(static_cast<unsigned>(p.N)),
                   dim3(threads), bytes, stream, p, plan, word, true, partial);
  return error;
}

}  // namespace

Text align_short(const Alignment& p, const Gpu& gpu, void* scratch, Stream stream) {
  const ShortCycle plan(p.N, p.C, gpu.multiprocessors);
  float* partial = static_cast<float*>(scratch);
  switch (p.dtype) {
    case DType::f32: return align_as<float>(p, plan, partial, stream);
    case DType::bf16: return align_as<__nv_bfloat16>(p, plan, partial, stream);
    default: return align_as<__half>(p, plan, partial, stream);
  }
}

}  // namespace rcu_ops::cuda
