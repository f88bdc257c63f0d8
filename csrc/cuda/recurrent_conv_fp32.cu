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
//           columns (fp32_part), in registers: x is read into them before the product, which hides its latency, and y
//           is written from them. x stays as its words came until the product is there: a register moved before would
//           wait for the load.
// Memory.   Shared: five offsets per column; W as [input][output]; one copy of the state [channel][column]. Per frame
//           two barriers: the state has been read, the new one is there.
// Order.    Runs of sum_run channels, each added to x: plain_scan's, and so its bits.
// Norm.     Batch normalisation (ScanNorm). Its statistics of y, which is the state, are added up from the state in
//           shared memory, up to 32 columns of a channel by one thread, frame after frame, about the first frame's
//           mean: about 110 instructions of a thread beside 35 C of its product. Its gradient is taken of x and of h
//           before the product, in the registers that the product needs afterwards.
// Padding.  Threads beyond the last channel or column of the block only meet the others. Columns beyond the last start from zero, read zeros
//           and are not stored; what a thread computes for a channel beyond the last it neither reads nor stores.
// Aliasing. y and last overlap no input. Every output element has one writer.
// Banks.    For 32 multiply-adds a warp reads a word of the state and two of W, each in two cycles of shared memory, one
//           per 16 lanes (fp32_part): four warps take 24 cycles of it where the multiply-adds take 32. Global words are
//           aligned to 16 bytes where they are words at all (quad_of), and 8 lanes' make whole sectors.
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
  const Fp32Part mine = fp32_part(plan, thread);
  const bool active = mine.channel < C && mine.column < P;

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
  int outputs = fp32_least_channels;
  while (outputs < C) outputs *= 2;
  for_tile_loaded<8>(
      thread, threads, p.weight_in == 1, C, outputs,
      [&](int input, int output) { return w[(output < C ? output : C - 1) * p.weight_out + input * p.weight_in]; },
      [&](int input, int output, float value) {
        if (output < C) weight[input * fp32_weight_pitch + output] = value;
      });

  // The words of this thread's part of a tensor, zero where there is nothing. Addresses are cheaper than registers to
  // keep them.
  const auto here = [&] { return Fp32Part{recomputed(mine.channel), mine.apart, recomputed(mine.column)}; };
  const auto read = [&](const View& v, const void* data, Quad quad, const int64_t* offset, int64_t frame,
                        float (&words)[M][L]) {
#pragma unroll
    for (int i = 0; i < M; ++i)
#pragma unroll
      for (int j = 0; j < L; ++j) words[i][j] = 0;
    if (!data) return;
    const float* from = static_cast<const float*>(data);
    for_part(quad, v, offset, recomputed(frame * v.t), here(), C, columns, [&](auto way, int i, int j, int64_t at) {
      if constexpr (decltype(way)::value == Quad::none) {
        words[i][j] = from[at];
      } else {
        const Word word = *reinterpret_cast<const Word*>(from + at);
#pragma unroll
        for (int k = 0; k < L; ++k) words[i][k] = word.v[k];
      }
    });
  };
  // Calls visit(number of the words, channel and column of the part) for all of them.
  const auto for_words_of = [&](Quad quad, float (&words)[M][L], auto visit) {
    const auto all = [&](auto way) {
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j < L; ++j) {
          const Fp32Number at = fp32_number<decltype(way)::value>(i, j);
          visit(words[i][j], at.m, at.n);
        }
    };
    if (quad == Quad::channels)
      all(std::integral_constant<Quad, Quad::channels>());
    else
      all(std::integral_constant<Quad, Quad::columns>());
  };
  const auto arrange = [&](Quad quad, float (&words)[M][L]) {  // from words to [channel][column]
    if (quad != Quad::channels) return;
    float part[M][L];
    for_words_of(Quad::channels, words, [&](float number, int m, int n) { part[m][n] = number; });
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < L; ++n) words[m][n] = part[m][n];
  };
  const auto write = [&](const View& v, Quad quad, const int64_t* offset, int64_t frame, const float (&part)[M][L]) {
    float* to = static_cast<float*>(v.data);
    for_part(quad, v, offset, recomputed(frame * v.t), here(), C, columns, [&](auto way, int i, int j, int64_t at) {
      if constexpr (decltype(way)::value == Quad::none) {
        to[at] = part[i][j];
      } else {
        Word word;
#pragma unroll
        for (int k = 0; k < L; ++k) {
          const Fp32Number number = fp32_number<decltype(way)::value>(i, k);
          word.v[k] = part[number.m][number.n];
        }
        *reinterpret_cast<Word*>(to + at) = word;
      }
    });
  };
  const auto keep_state = [&](const float (&part)[M][L]) {
    const Fp32Part at = here();
#pragma unroll
    for (int m = 0; m < M; ++m)
      if (const int c = fp32_channel(at, m); c < C)
        *reinterpret_cast<Word*>(state + c * fp32_state_pitch + at.column) =
            Word{part[m][0], part[m][1], part[m][2], part[m][3]};
  };

  float v[M][L], x[M][L];
  block_barrier();  // offsets and W are here
  if (p.init != Init::none && active) {
    read(p.first, p.first.data, plan.first, first_offset, 0, v);
    arrange(plan.first, v);
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
        arrange(plan.residual, v);
        for_words_of(plan.x, x, [&](float& number, int m, int n) {
          number = norm_gradient(norm, fp32_channel(mine, m), number, v[m][n], p.norm.relu);
        });
      }
      const Fp32Part at = here();
      const float *low_at = weight + at.channel, *high_at = low_at + at.apart, *state_at = state + at.column;
#pragma unroll 1
      for (int run = 0; product && run < C; run += sum_run) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int n = 0; n < L; ++n) v[m][n] = -0.0f;
        const int run_end = C - run < sum_run ? C : run + sum_run;
#pragma unroll 4
        for (int k = run; k < run_end; ++k) {
          const Word low = *reinterpret_cast<const Word*>(low_at), high = *reinterpret_cast<const Word*>(high_at);
          const Word h = *reinterpret_cast<const Word*>(state_at);
          low_at += fp32_weight_pitch, high_at += fp32_weight_pitch, state_at += fp32_state_pitch;
#pragma unroll
          for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < L; ++n) v[m][n] = fma(m < 4 ? low.v[m % 4] : high.v[m % 4], h.v[n], v[m][n]);
        }
        for_words_of(plan.x, x, [&](float& number, int m, int n) { number += v[m][n]; });
      }
      if (i == 0 && p.init == Init::added)
        for_words_of(plan.x, x, [&](float& number, int m, int n) {
          const int c = fp32_channel(mine, m);
          if (c < C) number += state[c * fp32_state_pitch + mine.column + n];
        });
      for_words_of(plan.x, x, [&](float number, int m, int n) { v[m][n] = alpha * number; });
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
    arrange(plan.residual, x);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const int c = fp32_channel(mine, m) < C ? fp32_channel(mine, m) : C - 1;
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
