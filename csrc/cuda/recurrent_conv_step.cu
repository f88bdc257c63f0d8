// recurrent_conv one frame per launch: the step of a stream, and scans of 16-bit data with more than 256 channels.
//
// A scan's kernel gives a block all output channels of its columns, because the next frame needs them all. A single
// frame does not, so here output channels are split as well: 49 positions of 512 channels are 64 blocks instead of one
// or two.
#include "cuda/device/async_copy.h"
#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/matrix_copy.h"
#include "cuda/device/mma.h"
#include "cuda/device/shared_memory.h"
#include "cuda/recurrent_conv_tile.h"
#include "cuda/recurrent_conv_views.h"

namespace rcu_ops::cuda {
namespace {

// What a block works on: `outputs` channels from channel0 on, `columns` columns, and their offsets in the tensors.
struct Block {
  int64_t channel0, column0;
  int outputs, columns;
  int64_t *x, *y, *residual, *first, *last;
};

template <int O, int P>
__device__ __forceinline__ Block block_of(const Scan& p, const StepScanPlan& plan) {
  Block b;
  b.channel0 = blockIdx.x % plan.channel_blocks * O;
  b.column0 = blockIdx.x / plan.channel_blocks * P;
  const int64_t channels_left = p.C - b.channel0, columns_left = p.N * p.G * p.H * p.W - b.column0;
  b.outputs = channels_left < O ? static_cast<int>(channels_left) : O;
  b.columns = columns_left < P ? static_cast<int>(columns_left) : P;
  b.x = dynamic_shared<int64_t>();
  b.y = b.x + P, b.residual = b.y + P, b.first = b.residual + P, b.last = b.first + P;
  for (int i = threadIdx.x; i < b.columns; i += step_threads)
    fill_offsets(p, b.column0 + i, i, b.x, b.y, b.residual, b.first, b.last);
  return b;
}

// Calls visit(channel, column, the block's value there), within the block's part of the tensors, once for each.
template <int O, int P, typename S, typename Visit>
__device__ __forceinline__ void for_values(const Block& b, const View& v, S* values, Visit visit) {
  for_elements<O, P>(threadIdx.x, step_threads, v.c == 1, b.outputs, b.columns,
                     [&](int c, int j) { visit(b.channel0 + c, j, values[c * (P + 1) + j]); });
}

// The same with what load(channel, column) returned, four loads under way together: visit(channel, column, value,
// loaded).
template <int O, int P, typename S, typename Load, typename Visit>
__device__ __forceinline__ void for_values_loaded(const Block& b, const View& v, S* values, Load load, Visit visit) {
  for_elements_loaded<O, P, 4>(
      threadIdx.x, step_threads, v.c == 1, b.outputs, b.columns, [&](int c, int j) { return load(b.channel0 + c, j); },
      [&](int c, int j, const auto& loaded) { visit(b.channel0 + c, j, values[c * (P + 1) + j], loaded); });
}

// The block's new state, in `values`, to y and last.
template <typename S, int O, int P>
__device__ __forceinline__ void write_values(const Scan& p, const Block& b, S* values) {
  if (p.y.data) {
    struct Epilogue {
      S scale, shift, added;
    };
    const S *scale = static_cast<const S*>(p.scale), *shift = static_cast<const S*>(p.shift);
    const auto load = [&](int64_t c, int j) {
      return Epilogue{
          scale[c], shift[c],
          p.residual.data ? load_number<S>(p.residual.data, p.dtype, b.residual[j] + c * p.residual.c) : S(0)};
    };
    if (scale)
      for_values_loaded<O, P>(b, p.y, values, load, [&](int64_t c, int j, S value, const Epilogue& e) {
        value = fma(e.scale, value, e.shift);
        if (p.residual.data) value += e.added;
        if (p.relu) value = value < 0 ? S(0) : value;  // NaN stays
        store_number<S>(p.y.data, p.dtype, b.y[j] + c * p.y.c, value);
      });
    else
      for_values<O, P>(b, p.y, values, [&](int64_t c, int j, S value) {
        store_number<S>(p.y.data, p.dtype, b.y[j] + c * p.y.c, value);
      });
  }
  if (p.last_kind != Last::none)
    for_values<O, P>(b, p.last, values, [&](int64_t c, int j, S value) {
      store_number<S>(p.last.data, p.last.dtype, b.last[j] + c * p.last.c, value);
    });
}

// ---- the matrix unit ------------------------------------------------------------------------------------------------

// The least s for which 1 << s is no less than `count`.
__device__ __forceinline__ int shift_to(int count) {
  int shift = 0;
  while (1 << shift < count) ++shift;
  return shift;
}

// One frame (a Scan with T = 1), bf16 or fp16, any C, any strides.
//
// Work.     A block of 4 warps computes O = 32 M output channels at P = 16 N columns; a warp 16 M x 8 N of them. Rows
//           of the matrix product are output channels, its columns columns of the problem.
// State.    As in tile_scan: v = alpha * (W round(v) + diag(W) * (v - round(v)) + x), added up in the order of
//           tile_scan and wide_scan, 16 input channels per step: the bits are those of the sequence.
// Memory.   Shared memory as in StepScanPlan. W comes by cp.async where its rows allow, the state through registers,
//           where it is rounded; depth input channels of both at a time. x and the state's share are laid down as
//           `values`, from where they become accumulators, and the new state goes back there, so that every tensor is
//           read and written along its own contiguous dimension.
// Padding.  Input channels beyond the last are zero in both factors, columns and output channels beyond the last are
//           not stored.
// Aliasing. y and last overlap no input. Every output element has one writer.
// Bound.    A few hundred positions: latency, of one round trip to L2 (W has been there since the last frame, or comes
//           from HBM: 2 C^2 bytes), C / 16 dependent products, and the launch. Floor: bytes of W, x, y and both states
//           at HBM's rate, plus a launch. With many positions the blocks read 0.25 bytes per multiply-add from L2, 0.09
//           with the larger tile.
template <int M, int N>
__global__ void __launch_bounds__(step_threads, 4) step_scan(const Scan p, const StepScanPlan plan) {
  using T = uint16_t;
  constexpr int O = 32 * M, P = 16 * N;
  const bool bf16 = p.dtype == DType::bf16;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, tile = lane / 8, tile_row = lane % 8;
  const int pitch = static_cast<int>(plan.pitch);
  unsigned char *weight = dynamic_shared<unsigned char>(plan.weight_at),
                *state = dynamic_shared<unsigned char>(plan.state_at);
  float* values = dynamic_shared<float>(plan.values_at);
  const Block b = block_of<O, P>(p, plan);

  const T* w = static_cast<const T*>(p.weight);
  const bool product = p.init == Init::state, keep = p.init == Init::added;
  // Elements are counted in rows of a power of two, of which those beyond the last are left out: nothing is divided.
  const auto stage_weight = [&](int64_t k0, int depth) {  // depth: a multiple of 16
    const T* from = w + b.channel0 * p.weight_out + k0 * p.weight_in;
    const int inputs = p.C - k0 < depth ? static_cast<int>(p.C - k0) : depth;
    if (plan.weight_vectors) {
      const int shift = shift_to(depth / 8);
      for (int e = thread; e < O << shift; e += step_threads) {
        const int o = e >> shift, k = (e & ((1 << shift) - 1)) * 8;
        if (k >= depth) continue;
        unsigned char* to = weight + o * pitch + 2 * k;
        if (o < b.outputs && k < inputs)
          async_copy<16>(to, from + o * p.weight_out + k);
        else
          *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
      }
      async_commit();
    } else {
      const bool along_inputs = p.weight_in == 1;
      const int shift = shift_to(depth);
      for (int e = thread; e < O << shift; e += step_threads) {
        const int o = along_inputs ? e >> shift : e % O, k = along_inputs ? e & ((1 << shift) - 1) : e / O;
        if (k < depth)
          *reinterpret_cast<T*>(weight + o * pitch + 2 * k) =
              o < b.outputs && k < inputs ? from[o * p.weight_out + k * p.weight_in] : T(0);
      }
    }
  };
  const auto stage_state = [&](int64_t k0, int depth) {
    constexpr int batch = 8;
    const int inputs = p.C - k0 < depth ? static_cast<int>(p.C - k0) : depth, shift = shift_to(depth / 2);
    const bool along_channels = p.first.c == 1;
    const auto column_of = [&](int e) { return along_channels ? e >> shift : e % P; };
    const auto input_of = [&](int e) { return 2 * (along_channels ? e & ((1 << shift) - 1) : e / P); };
    const int all = along_channels ? P << shift : P * (depth / 2);
    for (int begin = thread; begin < all; begin += batch * step_threads) {
      float pairs[batch][2];
#pragma unroll
      for (int i = 0; i < batch; ++i)
#pragma unroll
        for (int n = 0; n < 2; ++n) {  // within bounds even where there is nothing
          const int e = begin + i * step_threads, j = column_of(e), k = input_of(e) + n;
          pairs[i][n] = load_number(p.first.data, p.first.dtype,
                                    b.first[j < b.columns ? j : 0] + (k0 + (k < inputs ? k : 0)) * p.first.c);
        }
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        const int e = begin + i * step_threads, j = column_of(e), k = input_of(e);
        const bool first = j < b.columns && k < inputs, second = first && k + 1 < inputs;
        if (e < all && k < depth)
          *reinterpret_cast<uint32_t*>(state + j * pitch + 2 * k) =
              pack(first ? pairs[i][0] : 0.0f, second ? pairs[i][1] : 0.0f, bf16);
      }
    }
    if (plan.weight_vectors) async_wait<0>();
  };

  const T* x = static_cast<const T*>(p.x.data);
  struct Arriving {
    float h;
    T x, diagonal;
  };
  const auto load_values = [&] {
    for_values_loaded<O, P>(
        b, x ? p.x : p.y, values,
        [&](int64_t c, int j) {
          Arriving a{0.0f, 0, w[c * (p.weight_out + p.weight_in)]};
          if (p.init != Init::none) a.h = load_number(p.first.data, p.first.dtype, b.first[j] + c * p.first.c);
          if (x) a.x = x[b.x[j] + c * p.x.c];
          return a;
        },
        [&](int64_t, int, float& value, const Arriving& a) {
          const float arriving = x ? widen(a.x, bf16) : 0.0f;
          value = product ? with_rest(arriving, widen(a.diagonal, bf16), a.h, widen(narrow<T>(a.h, bf16), bf16))
                          : arriving + (keep ? a.h : 0.0f);
        });
  };
  float acc[M][N][4];
  const int my_channel = warp % 2 * 16 * M, my_column = warp / 2 * 8 * N;
  // Calls visit(accumulator, the value it stands for).
  const auto for_accumulators = [&](auto visit) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          visit(acc[m][n][i], values[(my_channel + 16 * m + i / 2 * 8 + lane / 4) * (P + 1) + my_column + 8 * n +
                                     lane % 4 * 2 + i % 2]);
  };
  for (int64_t k0 = 0; k0 < p.C; k0 += plan.depth) {
    const int depth = p.C - k0 < plan.depth ? static_cast<int>((p.C - k0 + 15) / 16 * 16) : plan.depth;
    if (k0 > 0) block_barrier();  // the piece before this one has been read
    if (product) stage_weight(k0, depth);
    if (k0 == 0) {
      block_barrier();  // the offsets are here
      load_values();
    }
    if (product) stage_state(k0, depth);
    block_barrier();
    if (k0 == 0) for_accumulators([](float& a, float value) { a = value; });
    if (!product) break;
    with_format(bf16, [&](auto format) {
      using F = decltype(format);
#pragma unroll 2
      for (int k = 0; k < depth; k += 16) {
        uint32_t a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m)
          load_matrix<4, false>(
              a[m], weight + (my_channel + 16 * m + tile % 2 * 8 + tile_row) * pitch + 2 * (k + tile / 2 * 8));
#pragma unroll
        for (int n = 0; n < N; ++n) {
          uint32_t h[2];
          load_matrix<2, false>(h, state + (my_column + 8 * n + tile_row) * pitch + 2 * (k + tile % 2 * 8));
#pragma unroll
          for (int m = 0; m < M; ++m) mma_m16n8k16<F>(acc[m][n], a[m], h);
        }
      }
    });
  }
  const float alpha = static_cast<float>(p.alpha_final);
  for_accumulators([&](float a, float& value) { value = alpha * a; });
  block_barrier();
  write_values<float, O, P>(p, b, values);
}

// ---- FMAs -----------------------------------------------------------------------------------------------------------

// One frame (a Scan with T = 1), T float or double, any C, any strides.
//
// Work.     A block computes 32 output channels at 16 columns, a thread 2 x 2 of them.
// Memory.   Shared memory as in StepScanPlan: W and the state come by cp.async, number by number, W transposed on its
//           way; one piece of 128 input channels is computed while the next one comes.
// Order.    That of plain_scan, bit for bit: runs of sum_run channels, each added to x.
// Padding.  What lies in shared memory beyond the last output channel or column reaches only values that are not
//           stored.
// Bound.    As step_scan: latency, here of C dependent FMAs (4 cycles each) and a round trip to L2; each FMA needs two
//           numbers of shared memory per thread, so many positions are better off with the scans.
template <typename T>
__global__ void __launch_bounds__(step_threads, 4) plain_step_scan(const Scan p, const StepScanPlan plan) {
  constexpr int O = plain_step_outputs, P = plain_step_columns, D = plain_step_depth, pitch = O + 2;
  struct alignas(2 * sizeof(T)) Pair {
    T v[2];
  };
  const int thread = threadIdx.x;
  T *weight = dynamic_shared<T>(plan.weight_at), *state = dynamic_shared<T>(plan.state_at);
  T* values = dynamic_shared<T>(plan.values_at);
  const Block b = block_of<O, P>(p, plan);
  block_barrier();

  const T *w = static_cast<const T*>(p.weight) + b.channel0 * p.weight_out,
          *first = static_cast<const T*>(p.first.data);
  const bool product = p.init == Init::state;
  const auto fetch = [&](int64_t k0) {
    if (product && k0 < p.C) {
      const int inputs = p.C - k0 < D ? static_cast<int>(p.C - k0) : D, half = static_cast<int>(k0 / D % 2);
      for_elements<O, D>(thread, step_threads, p.weight_out == 1, b.outputs, inputs, [&](int o, int k) {
        async_copy<sizeof(T)>(weight + (half * D + k) * pitch + o, w + o * p.weight_out + (k0 + k) * p.weight_in);
      });
      for_elements<D, P>(thread, step_threads, p.first.c == 1, inputs, b.columns, [&](int k, int j) {
        async_copy<sizeof(T)>(state + (half * D + k) * P + j, first + b.first[j] + (k0 + k) * p.first.c);
      });
    }
    async_commit();
  };
  const T alpha = static_cast<T>(p.alpha_final), *x = static_cast<const T*>(p.x.data);
  const int my_channel = thread / (P / 2) * 2, my_column = thread % (P / 2) * 2;
  T* own = values + my_channel * (P + 1) + my_column;
  T total[2][2] = {};
  for (int64_t k0 = -D; k0 < (product ? p.C : 0); k0 += D) {
    fetch(k0 + D);
    if (k0 < 0) {  // while the first piece comes
      for_values_loaded<O, P>(
          b, x ? p.x : p.y, values,
          [&](int64_t c, int j) {
            T arriving = x ? x[b.x[j] + c * p.x.c] : T(0);
            if (p.init == Init::added) arriving += first[b.first[j] + c * p.first.c];
            return arriving;
          },
          [&](int64_t, int, T& value, T arriving) { value = product ? arriving : alpha * arriving; });
      continue;
    }
    async_wait<1>();
    block_barrier();  // this piece is here, and x
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n)
        if (k0 == 0) total[m][n] = own[m * (P + 1) + n];
    const int inputs = p.C - k0 < D ? static_cast<int>(p.C - k0) : D, half = static_cast<int>(k0 / D % 2);
    const T *a = weight + half * D * pitch + my_channel, *v = state + half * D * P + my_column;
#pragma unroll 1
    for (int run = 0; run < inputs; run += sum_run) {
      T acc[2][2] = {{T(-0.0), T(-0.0)}, {T(-0.0), T(-0.0)}};
      const int run_end = inputs - run < sum_run ? inputs : run + sum_run;
#pragma unroll 8
      for (int k = run; k < run_end; ++k, a += pitch, v += P) {
        const Pair row = *reinterpret_cast<const Pair*>(a), column = *reinterpret_cast<const Pair*>(v);
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
          for (int n = 0; n < 2; ++n) acc[m][n] = fma(row.v[m], column.v[n], acc[m][n]);
      }
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 2; ++n) total[m][n] += acc[m][n];
    }
    block_barrier();  // and may be overwritten
  }
  async_wait<0>();
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < 2; ++n)
      if (product) own[m * (P + 1) + n] = alpha * total[m][n];
  block_barrier();
  write_values<T, O, P>(p, b, values);
}

Error launch_matrix_step(const Scan& p, const StepScanPlan& plan, Stream stream) {
  return launch("recurrent_conv step_scan", plan.outputs == 64 ? step_scan<2, 4> : step_scan<1, 1>,
                dim3(static_cast<unsigned>(plan.blocks)), dim3(step_threads), static_cast<size_t>(plan.shared_bytes),
                stream, p, plan);
}

template <typename T>
Error launch_plain_step(const Scan& p, const StepScanPlan& plan, Stream stream) {
  return launch("recurrent_conv plain_step_scan", plain_step_scan<T>, dim3(static_cast<unsigned>(plan.blocks)),
                dim3(step_threads), static_cast<size_t>(plan.shared_bytes), stream, p, plan);
}

}  // namespace

Error launch_step_scan(const Scan& p, const StepScanPlan& plan, void* scratch, Stream stream) {
  Error error;
  for (int64_t i = 0; error.empty() && i < plan.launches; ++i) {
    const Scan step = step_of(p, i, scratch);
    if (plan.words.possible && step.init == Init::state) {
      error = launch_step_words(step, plan, stream);
      continue;
    }
    switch (p.dtype) {
      case DType::f32: error = launch_plain_step<float>(step, plan, stream); break;
      case DType::f64: error = launch_plain_step<double>(step, plan, stream); break;
      default: error = launch_matrix_step(step, plan, stream);
    }
  }
  return error;
}

}  // namespace rcu_ops::cuda
