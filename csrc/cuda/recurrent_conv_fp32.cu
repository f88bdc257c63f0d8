// recurrent_conv in exact fp32, 8 to 128 channels: W and the state in shared memory, the multiply-adds from registers.
#include "common/recurrent_conv_index.h"
#include "cuda/device/barrier.h"
#include "cuda/device/registers.h"
#include "cuda/device/shared_memory.h"
#include "cuda/recurrent_conv_tile.h"
#include "cuda/recurrent_conv_views.h"

namespace rcu_ops::cuda {
namespace {

// One scan over time (common/recurrent_conv.h), fp32, 8 to 128 channels, any strides.
//
// Work.     A block owns plan.positions columns for all frames and all channels of them; a thread 8 channels x 4
//           columns, in registers: x is read into them before the product, which hides its latency, and y is written
//           from them.
// Memory.   Shared: five offsets per column; W as [input][output]; one copy of the state [channel][column]. Per frame
//           two barriers: the state has been read, the new one is there.
// Order.    Runs of sum_run channels, each added to x: plain_scan's, and so its bits.
// Norm.     Batch normalisation (ScanNorm). Its statistics of y, which is the state, are added up from the state in
//           shared memory, up to 32 columns of a channel by one thread, frame after frame, about the first frame's
//           mean: about 110 instructions of a thread beside 35 C of its product. Its gradient is taken of x and of h
//           before the product, in the registers that the product needs afterwards.
// Padding.  Threads beyond the last channel only meet the others. Columns beyond the last start from zero, read zeros
//           and are not stored; what a thread computes for a channel beyond the last it neither reads nor stores.
// Aliasing. y and last overlap no input. Every output element has one writer.
// Banks.    A warp reads 256 neighbouring bytes of the state and two rows of 8 outputs of W: 4 cycles of shared memory
//           for 32 multiply-adds, which take the multiprocessor 8.
// Bound.    2 C FLOP per element against 8 bytes: arithmetic from C = 62 on (67 TFLOP/s of fp32, 4.3 TB/s). Of 4 steps
//           of the inner loop 128 instructions are multiply-adds and 12 loads: at most 0.9 of the FMA rate.
__global__ void __launch_bounds__(fp32_most_threads, 2) fp32_scan(const Scan p, const Fp32ScanPlan plan) {
  constexpr int M = fp32_outputs, L = fp32_columns;
  struct alignas(16) Word {
    float v[4];
  };
  const int P = plan.positions, C = static_cast<int>(p.C), thread = threadIdx.x, threads = static_cast<int>(blockDim.x);
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * P, columns_left = p.N * p.G * p.H * p.W - column0;
  const int columns = columns_left < P ? static_cast<int>(columns_left) : P;
  const int my_column = thread % (P / L) * L, my_channel = thread / (P / L) * M;
  const bool active = my_channel < C;

  int64_t* x_offset = dynamic_shared<int64_t>();
  int64_t *y_offset = x_offset + P, *residual_offset = y_offset + P, *first_offset = residual_offset + P,
          *last_offset = first_offset + P;
  float *weight = dynamic_shared<float>(plan.weight_at), *state = dynamic_shared<float>(plan.state_at);
  for (int i = thread; i < columns; i += threads)
    fill_offsets(p, column0 + i, i, x_offset, y_offset, residual_offset, first_offset, last_offset);
  float* numbers = dynamic_shared<float>(plan.numbers_at);
  const int table = (C + M - 1) / M * M;  // numbers of one
  const NormTables norm{numbers, numbers + table, numbers + 2 * table, numbers + 3 * table, numbers + 4 * table};
  if (p.norm.moments)
    for (int c = thread; c < table; c += threads)
      fill_norm_tables(p.norm, C, c, numbers, numbers + table, numbers + 2 * table, numbers + 3 * table,
                       numbers + 4 * table);
  // Calls visit(statistics, part of the columns, channel, columns in it) for what this thread adds up.
  const auto for_statistics = [&](auto visit) {
    const int size = plan.norm_columns;
    for (int i = thread; i < C * (P / size); i += threads) {
      const int part = i / C, left = columns - part * size;
      if (left > 0)
        visit(statistics_at(numbers + part * statistics_floats * table, table), part, i % C, left < size ? left : size);
    }
  };
  const float* w = static_cast<const float*>(p.weight);
#pragma unroll 8
  for (int i = thread; i < C * C; i += threads) {
    const int slow = i / C, fast = i % C;
    const int input = p.weight_in == 1 ? fast : slow, output = p.weight_in == 1 ? slow : fast;
    weight[input * fp32_weight_pitch + output] = w[output * p.weight_out + input * p.weight_in];
  }

  // This thread's part of a tensor, zero where there is nothing. Addresses are cheaper than registers to keep them.
  const auto read = [&](const View& v, const void* data, Quad quad, const int64_t* offset, int64_t frame,
                        float (&part)[M][L]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < L; ++n) part[m][n] = 0;
    if (!data) return;
    const float* from = static_cast<const float*>(data) + frame * v.t;
    const int channel = recomputed(my_channel), column = recomputed(my_column);
    for_part(quad, v, offset, channel, column, C, columns, [&](auto word_along, int m, int n, int64_t at) {
      constexpr Quad way = decltype(word_along)::value;
      if constexpr (way == Quad::none) {
        part[m][n] = from[at];
      } else {
        const Word word = *reinterpret_cast<const Word*>(from + at);
#pragma unroll
        for (int j = 0; j < 4; ++j) part[way == Quad::channels ? m + j : m][way == Quad::channels ? n : j] = word.v[j];
      }
    });
  };
  const auto write = [&](const View& v, Quad quad, const int64_t* offset, int64_t frame, const float (&part)[M][L]) {
    float* to = static_cast<float*>(v.data) + frame * v.t;
    const int channel = recomputed(my_channel), column = recomputed(my_column);
    for_part(quad, v, offset, channel, column, C, columns, [&](auto word_along, int m, int n, int64_t at) {
      constexpr Quad way = decltype(word_along)::value;
      if constexpr (way == Quad::none) {
        to[at] = part[m][n];
      } else {
        Word word;
#pragma unroll
        for (int j = 0; j < 4; ++j) word.v[j] = part[way == Quad::channels ? m + j : m][way == Quad::channels ? n : j];
        *reinterpret_cast<Word*>(to + at) = word;
      }
    });
  };
  float* own = state + my_channel * fp32_state_pitch + my_column;
  const auto keep_state = [&](const float (&part)[M][L]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
      if (my_channel + m < C)
        *reinterpret_cast<Word*>(own + m * fp32_state_pitch) = Word{part[m][0], part[m][1], part[m][2], part[m][3]};
  };

  float v[M][L], x[M][L];
  block_barrier();  // offsets and W are here
  if (p.init != Init::none && active) {
    read(p.first, p.first.data, plan.first, first_offset, 0, v);
    keep_state(v);
  }
  block_barrier();

  // The gradient of the first state is one more product, without an input and without y.
  const int64_t frames = p.T + (p.last_kind == Last::projected ? 1 : 0);
#pragma unroll 1
  for (int64_t i = 0; i < frames; ++i) {
    const bool extra = i == p.T, product = i > 0 || p.init == Init::state;
    const int64_t t = p.reverse ? p.T - 1 - i : i;
    const float alpha = static_cast<float>(extra ? 1 : i == p.T - 1 ? p.alpha_final : i == 0 ? p.alpha_first : p.alpha);
    if (active) {
      read(p.x, extra ? nullptr : p.x.data, plan.x, x_offset, t, x);
      if (p.norm.moments && !extra) {
        read(p.residual, p.residual.data, plan.residual, residual_offset, t, v);
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int n = 0; n < L; ++n) x[m][n] = norm_gradient(norm, my_channel + m, x[m][n], v[m][n], p.norm.relu);
      }
      const float *a = weight + my_channel, *b = state + my_column;
#pragma unroll 1
      for (int run = 0; product && run < C; run += sum_run) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int n = 0; n < L; ++n) v[m][n] = -0.0f;
        const int run_end = C - run < sum_run ? C : run + sum_run;
#pragma unroll 4
        for (int k = run; k < run_end; ++k, a += fp32_weight_pitch, b += fp32_state_pitch) {
          const Word low = *reinterpret_cast<const Word*>(a), high = *reinterpret_cast<const Word*>(a + 4);
          const Word h = *reinterpret_cast<const Word*>(b);
#pragma unroll
          for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < L; ++n) v[m][n] = fma(m < 4 ? low.v[m % 4] : high.v[m % 4], h.v[n], v[m][n]);
        }
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int n = 0; n < L; ++n) x[m][n] += v[m][n];
      }
      if (i == 0 && p.init == Init::added)
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int n = 0; n < L; ++n)
            if (my_channel + m < C) x[m][n] += own[m * fp32_state_pitch + n];
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < L; ++n) v[m][n] = alpha * x[m][n];
    }
    block_barrier();  // the state has been read
    if (active) keep_state(v);
    block_barrier();
    if (p.norm.partial && !extra)
      for_statistics([&](const Statistics& to, int part, int c, int count) {
        add_statistics(to, c, count, i == 0, [&](auto take) {
          const float* from = state + c * fp32_state_pitch + part * plan.norm_columns;
#pragma unroll 1
          for (int j = 0; j < count; j += 4) {
            const Word word = *reinterpret_cast<const Word*>(from + j);
#pragma unroll
            for (int k = 0; k < 4; ++k)
              if (j + k < count) take(word.v[k]);
          }
        });
      });
    if (!active || !p.y.data || extra) continue;
    const float *scale = static_cast<const float*>(p.scale), *shift = static_cast<const float*>(p.shift);
    read(p.residual, scale ? p.residual.data : nullptr, plan.residual, residual_offset, t, x);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const int c = my_channel + m < C ? my_channel + m : C - 1;
      const float gain = scale ? scale[c] : 0.0f, offset = scale ? shift[c] : 0.0f;
#pragma unroll
      for (int n = 0; n < L; ++n) {
        float value = v[m][n];
        if (scale) {
          value = fma(gain, value, offset);
          if (p.residual.data) value += x[m][n];
          if (p.relu) value = value < 0 ? 0.0f : value;  // NaN stays
        }
        x[m][n] = value;
      }
    }
    write(p.y, plan.y, y_offset, t, x);
  }
  if (p.norm.partial)
    for_statistics([&](const Statistics& from, int part, int c, int count) {
      const int64_t size = plan.norm_columns, parts = (p.N * p.H * p.W + size - 1) / size;
      store_statistics(from, p.norm.partial, parts, column0 / size + part, c, count * p.T);
    });
  if (active && p.last_kind != Last::none) write(p.last, plan.last, last_offset, 0, v);
}

}  // namespace

Error launch_fp32_scan(const Scan& p, const Fp32ScanPlan& plan, Stream stream) {
  return launch("recurrent_conv fp32_scan", fp32_scan, dim3(static_cast<unsigned>(plan.blocks)),
                dim3(static_cast<unsigned>(plan.threads)), static_cast<size_t>(plan.shared_bytes), stream, p, plan);
}

}  // namespace rcu_ops::cuda
