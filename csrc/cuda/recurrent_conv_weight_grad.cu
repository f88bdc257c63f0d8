// recurrent_conv's weight gradient on CUDA devices:
//
//     dW[o][i] = sum over rows of dx[row][o] * before[row][i]
//
// a row being a frame and a position, and `before` the output of the frame processed before it (or the state before the
// first). One kernel for 16-bit data on the matrix unit, one for everything else; both cut the rows into splits, and a
// third adds up the splits' partial sums in a fixed order.
#include "common/recurrent_conv_weight_grad_plan.h"

#include "cuda/device/async_copy.h"
#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/launch.h"
#include "cuda/device/mma.h"
#include "cuda/device/registers.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shared_memory.h"
#include "cuda/recurrent_conv.h"
#include "cuda/recurrent_conv_plain.h"
#include "cuda/recurrent_conv_views.h"
#include "cuda/recurrent_conv_weight_sums.h"

namespace rcu_ops::cuda {
namespace {

// ---- the matrix unit -----------------------------------------------------------------------------------------------

template <int Tile>
constexpr int matrix_threads = 2 * Tile;

// Partial sums of dW (above), bf16 or fp16, any C.
//
// Layout.   dx and h have contiguous channels (Channels) or contiguous columns (otherwise), any other strides; the
//           state before the first frame has any.
// Work.     Block (x, y): Tile x Tile elements (x: tile) of dW from rows_per_split rows (y: split), 32 rows, two steps
//           of the matrix unit, at a time. Rows of the matrix product are output channels, its columns input channels;
//           a warp computes Tile / 2 x 32 of them.
// Memory.   Shared: as in WeightGradPlan. Stage s + 2 is copied by cp.async while stage s is computed (2-byte words,
//           and the state before the first frame, by ordinary loads). Both factors become fragments by ldmatrix,
//           transposed where channels are contiguous. The warps take turns at finding the rows of a stage, one stage
//           before these are copied.
// Order.    One block barrier per stage: before it every thread has waited for its part of the stage, has read the
//           stage before it, whose slot is rewritten next, and has written the next stage's rows. Rows are added in
//           ascending order within a split, 16 per step of the matrix unit, in fp32; splits in sum_splits. No atomics:
//           the same bits on every run.
// Rounding. A state before the first frame in fp32 is rounded to 16 bits, as all other states have been. For what the
//           matrix unit's own additions lose see matrix_weight_grad_rows.
// Padding.  Rows beyond the last are zero in both factors. Channels beyond the last are whatever the slot held: they
//           reach only elements that are not stored.
// Output.   Split s writes its tile of partial[s][C][C], or dW itself when there is one split. One writer per element.
// Bound.    2 C^2 FLOP per row against 4 C bytes, read once while C <= Tile, C / 128 times (mostly from L2) beyond:
//           memory up to C = 256 (at 4.3 TB/s and C = 256: 550 TFLOP/s, what mma.sync may reach at best), then
//           arithmetic. Floor: 4 C bytes per row at HBM's rate, or 2 C^2 FLOP at the matrix unit's. A step of 16 rows
//           reads 6 (Tile 64: 4) fragments of 512 bytes from shared memory per warp for 16 (8) products: 24 cycles
//           where the products take 16 to 32.
template <int Tile, bool Channels>
__global__ void __launch_bounds__(2 * Tile, 256 / Tile)
    matrix_weight_grad(const WeightGrad p, const WeightGradPlan plan, float* partial) {
  using T = uint16_t;
  constexpr int R = weight_grad_depth, stages = matrix_weight_grad_stages, threads = 2 * Tile;
  constexpr int warps = threads / 32, MT = Tile / 32, NT = 4;  // tiles of 16 output and of 8 input channels of a warp
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int pitch = static_cast<int>(plan.slot_pitch), numbers = plan.vector_bytes / 2;
  const bool bf16 = p.dtype == DType::bf16;
  const int64_t per_side = (p.C + Tile - 1) / Tile, split = blockIdx.y;
  const int64_t output0 = blockIdx.x / per_side * Tile, input0 = blockIdx.x % per_side * Tile;
  const int outputs = p.C - output0 < Tile ? static_cast<int>(p.C - output0) : Tile;
  const int inputs = p.C - input0 < Tile ? static_cast<int>(p.C - input0) : Tile;
  const int64_t begin = split * plan.rows_per_split;
  const int64_t end = begin + plan.rows_per_split < plan.rows ? begin + plan.rows_per_split : plan.rows;
  const int stage_count = static_cast<int>((end - begin + R - 1) / R);

  int64_t* dx_offset = dynamic_shared<int64_t>();  // [2][R]
  int64_t* before_offset = dx_offset + 2 * R;      // [2][R]; -1 - offset: in p.first
  unsigned char* slots = dynamic_shared<unsigned char>(plan.slots_at);
  const T* dx = static_cast<const T*>(p.dx.data) + output0 * p.dx.c;
  const T* states = static_cast<const T*>(p.h.data) + input0 * p.h.c;

  const auto slot_of = [&](int s) { return slots + s % stages * 2 * plan.slot_bytes; };
  const auto find_rows = [&](int s) {
    const int64_t row = begin + s * R + lane;
    if (warp != s % warps || row >= end) return;
    const WeightGradRow at = weight_grad_row(p, row, plan.small);
    dx_offset[s % 2 * R + lane] = at.dx;
    before_offset[s % 2 * R + lane] = at.before;
  };
  const auto fetch = [&](int s) {
    if (s < stage_count) {
      const int rows = end - begin - s * R < R ? static_cast<int>(end - begin - s * R) : R;
      const int64_t *from_dx = dx_offset + s % 2 * R, *from_before = before_offset + s % 2 * R;
      unsigned char *dx_slot = slot_of(s), *before_slot = dx_slot + plan.slot_bytes;
      for_row_words<threads, Tile, R, Channels>(thread, numbers, outputs, rows, pitch, [&](int r, int c, int at) {
        const T* from = dx + from_dx[r] + (Channels ? c : c * p.dx.c);
        copy_word(numbers, dx_slot + at, from);
      });
      for_row_words<threads, Tile, R, Channels>(thread, numbers, inputs, rows, pitch, [&](int r, int c, int at) {
        if (const int64_t offset = from_before[r]; offset >= 0) {
          const T* from = states + offset + (Channels ? c : c * p.h.c);
          return copy_word(numbers, before_slot + at, from);
        }
#pragma unroll 1
        for (int j = 0; j < numbers; ++j) {
          const int64_t offset = -1 - from_before[Channels ? r : r + j], channel = input0 + (Channels ? c + j : c);
          reinterpret_cast<T*>(before_slot + at)[j] =
              narrow<T>(load_number(p.first.data, p.first.dtype, offset + channel * p.first.c), bf16);
        }
      });
#pragma unroll 1
      for (int e = thread; e < Tile * (R - rows); e += threads) {
        const int r = rows + e / Tile, c = e % Tile, at = Channels ? r * pitch + 2 * c : c * pitch + 2 * r;
        *reinterpret_cast<T*>(dx_slot + at) = *reinterpret_cast<T*>(before_slot + at) = 0;
      }
    }
    async_commit();
  };
  float acc[MT][NT][4] = {};
  const int my_output = warp % 2 * (Tile / 2), my_input = warp / 2 * 32;
  for (int s = -stages; s < stage_count; ++s) {  // before stage 0 there are rows to find and stages to copy
    if (s >= 0) async_wait<stages - 2>();
    block_barrier();  // stage s and the rows of stage s + 2 are here, stage s - 1 has been read
    if (s > -stages) fetch(s + stages - 1);
    find_rows(s + stages);
    if (s < 0) continue;
    unsigned char *dx_slot = slot_of(s), *before_slot = dx_slot + plan.slot_bytes;
    with_format(bf16, [&](auto format) {
      using F = decltype(format);
#pragma unroll 1
      for (int k = 0; k < R; k += 16)
        add_weight_sums<F, Channels>(acc, dx_slot, before_slot, pitch, k, my_output, my_input);
    });
  }
  for_weight_sums(acc, [&](float value, int o, int i) {
    const int64_t output = output0 + my_output + o, input = input0 + my_input + i;
    if (output >= p.C || input >= p.C) return;
    if (plan.splits > 1)
      partial[(split * p.C + output) * p.C + input] = value;
    else
      static_cast<T*>(p.dweight)[output * p.C + input] = narrow<T>(value, bf16);
  });
}

Error launch_matrix_weight_grad(const WeightGrad& p, const WeightGradPlan& plan, void* scratch, Stream stream) {
  const auto as = [&](auto kernel) {
    return launch("recurrent_conv matrix_weight_grad", kernel,
                  dim3(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.splits)),
                  dim3(static_cast<unsigned>(2 * plan.tile)), static_cast<size_t>(plan.shared_bytes), stream, p, plan,
                  static_cast<float*>(scratch));
  };
  if (plan.tile == 64) return as(plan.along_channels ? matrix_weight_grad<64, true> : matrix_weight_grad<64, false>);
  return as(plan.along_channels ? matrix_weight_grad<128, true> : matrix_weight_grad<128, false>);
}

// ---- any dtype and strides -----------------------------------------------------------------------------------------

// Partial sums of dW (above), any C, any strides, arithmetic in S: double for fp64, float for all
// others.
//
// Work.     Block (x, y): 64 x 64 elements (x: tile) of dW from rows_per_split rows (y: split), 32 rows at a time
//           through shared memory; a thread adds up M x M elements (WeightGradPart).
// Memory.   Shared: 2 x 2 tables of the rows' offsets, and two stages of both factors, [32][68] each. Stage s + 1 is
//           copied by cp.async while stage s is computed: by words of four channels where they are contiguous and
//           aligned in all rows (plan.dx_words, h_words), else by single numbers, which are aligned to their own size;
//           16-bit numbers and the state before the first frame by ordinary loads. A warp copies single numbers of 8
//           rows x 4 channels: whole sectors where columns are contiguous, and no two lanes in one bank.
// Order.    One block barrier per stage, met by all threads: before it every thread has waited for its part of the
//           stage, has read the stage before it, whose slot is rewritten next, and has written the next stage's rows.
//           Rows are added in ascending order within a stage, stages within a split, at most
//           most_plain_weight_grad_rows rows; splits in sum_splits. No atomics: the same bits on every run and every
//           GPU.
// Padding.  Rows beyond the last are zero in both factors. Channels beyond the last are whatever the slot held: they
//           reach only elements that are not stored.
// Output.   Split s writes its tile of partial[s][C][C], or dW itself when there is one split. One writer per element.
// Banks.    In fp32 a warp reads two words of either factor for 64 multiply-adds per thread, 16 lanes' in a cycle
//           (fp32_part says why): four warps take 32 cycles of shared memory where the multiply-adds take 64.
// Bound.    2 C^2 FLOP per row against 2 C numbers read (times C / 64: every tile row and column reads its factor
//           again, mostly from L2): arithmetic from C = 64 on. Of a row's 73 instructions 64 are multiply-adds; the
//           copies and the sums of the stages are a tenth.
template <typename S>
__global__ void __launch_bounds__(plain_weight_grad_threads<S>, sizeof(S) == 8 ? 1 : 6)
    weight_grad_partial(const WeightGrad p, const WeightGradPlan plan, S* partial) {
  using Quad = Lanes<S>;
  constexpr int L = plain_lanes, R = weight_grad_depth, B = plain_weight_grad_tile, pitch = B + L;
  constexpr int M = plain_weight_grad_outputs<S>, threads = plain_weight_grad_threads<S>;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, C = static_cast<int>(p.C);
  const int per_side = (C + B - 1) / B, split = static_cast<int>(blockIdx.y);
  const int output0 = static_cast<int>(blockIdx.x) / per_side * B, input0 = static_cast<int>(blockIdx.x) % per_side * B;
  const int64_t begin = split * plan.rows_per_split;
  const int64_t left = plan.rows - begin;
  const int split_rows = static_cast<int>(left < plan.rows_per_split ? left : plan.rows_per_split);
  const int stage_count = (split_rows + R - 1) / R;

  int64_t* dx_offset = dynamic_shared<int64_t>();  // [2][R]
  int64_t* before_offset = dx_offset + 2 * R;      // [2][R]; -1 - offset: in p.first
  S* slots = dynamic_shared<S>(plan.slots_at);

  const auto find_rows = [&](int s) {
    const int index = s * R + lane;
    if (warp != s % (threads / 32) || index >= split_rows) return;
    const WeightGradRow row = weight_grad_row(p, begin + index, plan.small);
    dx_offset[s % 2 * R + lane] = row.dx;
    before_offset[s % 2 * R + lane] = row.before;
  };
  const bool own_format = p.dtype == (sizeof(S) == 8 ? DType::f64 : DType::f32);
  const auto fetch_factor = [&](S* slot, const View& v, bool words, const int64_t* offsets, int channel0, int rows) {
    const int channels = C - channel0 < B ? C - channel0 : B;
    const S* data = static_cast<const S*>(v.data);
    if (words) {
      constexpr int per_row = B / L, step = threads / per_row;
      const int c = thread % per_row * L, r0 = thread / per_row;
      if (c >= channels) return;
      data += channel0 + c;
#pragma unroll 2
      for (int i = 0; i < R / step; ++i) {
        const int r = r0 + i * step;
        if (r >= rows) break;
        if (const int64_t offset = offsets[r]; offset >= 0) async_copy<16>(slot + r * pitch + c, data + offset);
      }
      return;
    }
    constexpr int step = threads / 8, copies = (B + step - 1) / step;  // channels
    const int c0 = thread / 8;
#pragma unroll 1
    for (int r = thread % 8; r < rows; r += 8) {
      const int64_t offset = offsets[r];
      if (offset < 0) continue;
      S* to = slot + r * pitch + c0;
      int64_t at = offset + (channel0 + c0) * v.c;
      if (own_format) {
#pragma unroll
        for (int i = 0; i < copies; ++i, at += step * v.c)
          if (c0 + i * step < channels) async_copy<sizeof(S)>(to + i * step, data + at);
      } else {
#pragma unroll 4
        for (int i = 0; i < copies; ++i, at += step * v.c)
          if (c0 + i * step < channels) to[i * step] = load_number<S>(v.data, p.dtype, at);
      }
    }
  };
  const auto slot_of = [&](int s) { return slots + s % 2 * (2 * R * pitch); };
  const auto fetch = [&](int s) {
    if (s < stage_count) {
      const int rows = split_rows - s * R < R ? split_rows - s * R : R;
      S *dx_slot = slot_of(s), *before_slot = dx_slot + R * pitch;
      fetch_factor(dx_slot, p.dx, plan.dx_words, dx_offset + s % 2 * R, output0, rows);
      fetch_factor(before_slot, p.h, plan.h_words, before_offset + s % 2 * R, input0, rows);
      // Rows of the state before the first frame, in either format: a warp takes one.
#pragma unroll 1
      for (int r = warp; p.first.data && r < rows; r += threads / 32)
        if (const int64_t offset = before_offset[s % 2 * R + r]; offset < 0)
#pragma unroll 1
          for (int c = lane; c < B && input0 + c < C; c += 32)
            before_slot[r * pitch + c] =
                load_number<S>(p.first.data, p.first.dtype, -1 - offset + (input0 + c) * p.first.c);
#pragma unroll 1
      for (int e = rows * pitch + thread; e < R * pitch; e += threads) dx_slot[e] = before_slot[e] = 0;
    }
    async_commit();
  };

  S total[M][M] = {};
  for (int s = -2; s < stage_count; ++s) {  // before stage 0 there are rows to find and a stage to copy
    async_wait<0>();
    block_barrier();  // this stage and the rows of the next are here, the one before has been read
    if (s > -2) fetch(s + 1);
    find_rows(s + 2);
    if (s < 0) continue;
    S acc[M][M] = {};
    const WeightGradPart mine = weight_grad_part<M>(recomputed(thread));
    const S *a = slot_of(s) + mine.output, *b = slot_of(s) + R * pitch + mine.input;
#pragma unroll 1
    for (int r = 0; r < R; ++r, a += pitch, b += pitch) {
      S dx[M], before[M];
#pragma unroll
      for (int m = 0; m < M; m += L) {
        const Quad dx_word = *reinterpret_cast<const Quad*>(a + m / L * weight_grad_apart);
        const Quad before_word = *reinterpret_cast<const Quad*>(b + m / L * weight_grad_apart);
#pragma unroll
        for (int j = 0; j < L; ++j) dx[m + j] = dx_word.v[j], before[m + j] = before_word.v[j];
      }
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < M; ++n) acc[m][n] = fma(dx[m], before[n], acc[m][n]);
    }
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < M; ++n) total[m][n] += acc[m][n];
  }
  // By shared memory, so that neighbours store neighbours, and once whatever the format.
  block_barrier();  // the last stage has been read
  const WeightGradPart mine = weight_grad_part<M>(recomputed(thread));
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < M; n += L) {
      Quad word;
#pragma unroll
      for (int j = 0; j < L; ++j) word.v[j] = total[m][n + j];
      const int output = mine.output + m % L + m / L * weight_grad_apart;
      *reinterpret_cast<Quad*>(slots + output * pitch + mine.input + n / L * weight_grad_apart) = word;
    }
  block_barrier();
#pragma unroll 4
  for (int e = thread; e < B * B; e += threads) {
    const int output = output0 + e / B, input = input0 + e % B;
    if (output >= C || input >= C) continue;
    const S value = slots[e / B * pitch + e % B];
    if (plan.splits > 1)
      partial[(split * p.C + output) * p.C + input] = value;
    else
      store_number<S>(p.dweight, p.dtype, output * p.C + input, value);
  }
}

// ---- the sum of the splits -----------------------------------------------------------------------------------------

// Kahan's sum: what rounding cut off is added with the next term. Nothing here is compiled with fast-math, so it stays.
// An infinite sum has no such rest.
template <typename S>
struct CompensatedSum {
  S sum = 0, carry = 0;
  __device__ __forceinline__ void add(S term) {
    const S corrected = term - carry, next = sum + corrected, rest = (next - sum) - corrected;
    carry = rest - rest == 0 ? rest : S(0);
    sum = next;
  }
};

inline constexpr int sum_elements = 32, sum_ranges = weight_grad_threads / sum_elements;

// dweight[e] = sum over s of partial[s][e]: thread (e, range) of a block adds up splits range, range + 8, ... of one
// element, and the first 32 threads add up the ranges. Neighbouring threads take neighbouring elements. Bound: reading
// `partial`, which has just been written and mostly lies in L2, once.
template <typename S>
__global__ void __launch_bounds__(weight_grad_threads, 2)
    sum_splits(const S* partial, int64_t splits, int64_t elements, DType dtype, void* dweight) {
  S* sums = dynamic_shared<S>();
  const int element = threadIdx.x % sum_elements, range = threadIdx.x / sum_elements;
  const int64_t e = static_cast<int64_t>(blockIdx.x) * sum_elements + element;
  CompensatedSum<S> total;
  if (e < elements) {
#pragma unroll 8
    for (int64_t s = range; s < splits; s += sum_ranges) total.add(partial[s * elements + e]);
  }
  sums[threadIdx.x] = total.sum;
  block_barrier();
  if (range != 0 || e >= elements) return;
  for (int r = 1; r < sum_ranges; ++r) total.add(sums[r * sum_elements + element]);
  store_number<S>(dweight, dtype, e, total.sum);
}

template <typename S>
Error launch_plain_weight_grad(const WeightGrad& p, const WeightGradPlan& plan, void* scratch, Stream stream) {
  return launch("recurrent_conv weight_grad_partial", weight_grad_partial<S>,
                dim3(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.splits)),
                dim3(plain_weight_grad_threads<S>), static_cast<size_t>(plan.shared_bytes), stream, p, plan,
                static_cast<S*>(scratch));
}

template <typename S>
Error launch_sum_splits(const WeightGrad& p, int64_t splits, const void* partial, Stream stream) {
  const int64_t elements = p.C * p.C;
  return launch("recurrent_conv sum_splits", sum_splits<S>,
                dim3(static_cast<unsigned>(ceil_div(elements, sum_elements))), dim3(weight_grad_threads),
                weight_grad_threads * sizeof(S), stream, static_cast<const S*>(partial), splits, elements, p.dtype,
                p.dweight);
}

}  // namespace

Scratch weight_grad_scratch(const WeightGrad& p, Kernel kernel) {
  Scratch scratch;
  Gpu gpu;
  scratch.error = current_gpu(gpu);
  if (scratch.error.empty()) scratch.bytes = plan_weight_grad(p, gpu, kernel).scratch_bytes;
  return scratch;
}

Text describe_weight_grad(const WeightGrad& p, Kernel kernel) {
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  return describe(plan_weight_grad(p, gpu, kernel));
}

Text weight_grad(const WeightGrad& p, void* scratch, Stream stream, Kernel kernel) {
  Gpu gpu;
  Error error = current_gpu(gpu);
  if (!error.empty()) return error;
  const WeightGradPlan plan = plan_weight_grad(p, gpu, kernel);
  if (plan.tiles > most_blocks || plan.splits > most_splits)
    return "recurrent_conv: too many channels or rows for one launch";
  const bool wide = p.dtype == DType::f64;
  if (plan.vector_bytes)
    error = launch_matrix_weight_grad(p, plan, scratch, stream);
  else
    error = wide ? launch_plain_weight_grad<double>(p, plan, scratch, stream)
                 : launch_plain_weight_grad<float>(p, plan, scratch, stream);
  if (!error.empty() || plan.splits == 1) return error;
  return wide ? launch_sum_splits<double>(p, plan.splits, scratch, stream)
              : launch_sum_splits<float>(p, plan.splits, scratch, stream);
}

Text add_weight_grad_parts(const WeightGrad& p, const float* partial, int64_t parts, Stream stream) {
  return launch_sum_splits<float>(p, parts, partial, stream);
}

}  // namespace rcu_ops::cuda
