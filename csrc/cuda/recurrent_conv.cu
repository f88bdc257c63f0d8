// recurrent_conv on CUDA devices: the plain kernels (any C, dtype and strides) and the choice between kernels.
#include "cuda/recurrent_conv.h"

#include "common/recurrent_conv_gpu_plan.h"
#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/launch.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shared_memory.h"
#include "cuda/recurrent_conv_tile.h"
#include "cuda/recurrent_conv_views.h"

namespace rcu_ops::cuda {
namespace {

// ---- small parts -------------------------------------------------------------------------------------------------

// plain_lanes adjacent numbers, read and written as whole 16-byte words.
template <typename S>
struct alignas(16) Lanes {
  S v[plain_lanes];
};

template <typename Visit>
__device__ __forceinline__ void for_tile(bool along_channels, int64_t channels, int columns, Visit visit) {
  cuda::for_tile(threadIdx.x, blockDim.x, along_channels, channels, columns, visit);
}

// ---- the plain scan ----------------------------------------------------------------------------------------------

// W[row0 .. row0 + rows) of input channels x [column0 .. column0 + columns) of output channels, transposed and widened, to
// weight[input][output]; zeros beyond C up to the next multiple of plain_lanes. All threads of the block.
template <typename T, typename S>
__device__ void stage_weight(const Scan& p, S* weight, int64_t pitch, int64_t input0, int64_t inputs, int64_t output0,
                             int64_t outputs) {
  const T* w = static_cast<const T*>(p.weight);
  for (int64_t i = threadIdx.x; i < inputs * outputs; i += blockDim.x) {
    const bool along_inputs = p.weight_in == 1;
    const int64_t input = along_inputs ? i % inputs : i / outputs, output = along_inputs ? i / inputs : i % outputs;
    weight[input * pitch + output] = output0 + output < p.C
                                         ? widen(w[(output0 + output) * p.weight_out + (input0 + input) * p.weight_in])
                                         : S(0);
  }
}

// One scan over time (common/recurrent_conv.h), any C, any strides, T in {double, float, bf16, half}, arithmetic in
// S = Accumulator<T>.
//
// Work.     A block owns plan.positions columns for all frames. Per frame: x is copied into the new state (phase 1), every
//           thread adds W times the old state for its 4 channels x 4 columns, one range of plan.channels output channels
//           after the other (phase 2), and the new state is copied out as y (phase 3). Copies run along whichever of
//           channels and columns is contiguous in that tensor.
// Memory.   Shared: five offsets per column; two copies of the state [C][state_pitch], the old and the new one, which change
//           places every frame (in `scratch`, one pair per block, when they do not fit); W as [input][output], whole, or
//           one piece of depth x channels at a time, read again from L2 every frame.
// Order.    acc = -0; for k: acc = fma(W[c][k], v[k], acc); v' = alpha * (acc + x): the CPU kernels' order, independent of
//           tiles, so cutting a sequence in two changes no bit. (-0 + x is x for every x, -0 included.)
// Aliasing. y and last overlap no input. Every output element has one writer.
// Bound.    2 C FLOP per element against x read + y written once: at 67 TFLOP/s of fp32 and 4.3 TB/s arithmetic takes over
//           from C = 64 (fp32) or C = 32 (16 bits) on. The inner loop reads two 16-byte words of shared memory for 16 FMAs,
//           so it reaches at most about half of the FMA rate. Small blocks (many channels) read W from L2: 2 C^2 bytes
//           (16 bits) per frame and block.
template <typename T, bool StateShared>
__global__ void __launch_bounds__(plain_threads, 2)
    plain_scan(const Scan p, const PlainScanPlan plan, Accumulator<T>* scratch) {
  using S = Accumulator<T>;
  using Quad = Lanes<S>;
  constexpr int L = plain_lanes;
  const int P = plan.positions, thread = threadIdx.x;
  const int64_t C = p.C, pitch = plan.state_pitch, column0 = static_cast<int64_t>(blockIdx.x) * P;
  const int64_t columns_left = p.N * p.G * p.H * p.W - column0;
  const int columns = columns_left < P ? static_cast<int>(columns_left) : P;

  int64_t* x_offset = dynamic_shared<int64_t>();
  int64_t *y_offset = x_offset + P, *residual_offset = y_offset + P, *first_offset = residual_offset + P,
          *last_offset = first_offset + P;
  S* weight = dynamic_shared<S>(plan.weight_at);
  S* old_state = StateShared ? dynamic_shared<S>(plan.state_at) : scratch + static_cast<int64_t>(blockIdx.x) * 2 * C * pitch;
  S* new_state = old_state + C * pitch;

  for (int i = thread; i < columns; i += blockDim.x) {
    x_offset[i] = column_offset(p, p.x, column0 + i);
    y_offset[i] = column_offset(p, p.y, column0 + i);
    residual_offset[i] = column_offset(p, p.residual, column0 + i);
    first_offset[i] = column_offset(p, p.first, column0 + i);
    last_offset[i] = column_offset(p, p.last, column0 + i);
  }
  if (plan.weight_resident) stage_weight<T, S>(p, weight, plan.weight_pitch, 0, C, 0, (C + L - 1) / L * L);
  block_barrier();
  if (p.init == Init::state)
    for_tile(p.first.c == 1, C, P, [&](int64_t c, int i) {
      old_state[c * pitch + i] = i < columns ? load_state<T, S>(p.first, first_offset[i] + c * p.first.c, p.dtype) : S(0);
    });

  const int column_groups = P / L, my_column = thread % column_groups * L, my_channel = thread / column_groups * L;
  // The gradient of the first state is one more product, without an input and without y.
  const int64_t frames = p.T + (p.last_kind == Last::projected ? 1 : 0);
  for (int64_t i = 0; i < frames; ++i) {
    const bool extra = i == p.T;
    const int64_t t = p.reverse ? p.T - 1 - i : i;
    const S alpha = static_cast<S>(extra ? 1 : i == p.T - 1 ? p.alpha_final : i == 0 ? p.alpha_first : p.alpha);

    // Phase 1. The new state's memory held the state before the old one: nobody has read it since the last barrier.
    const bool add_first = i == 0 && p.init == Init::added;
    const T* x = extra ? nullptr : static_cast<const T*>(p.x.data);
    for_tile(p.x.c == 1, C, P, [&](int64_t c, int j) {
      S value = 0;
      if (j < columns) {
        if (x) value = widen(x[x_offset[j] + c * p.x.c + t * p.x.t]);
        if (add_first) value += load_state<T, S>(p.first, first_offset[j] + c * p.first.c, p.dtype);
      }
      new_state[c * pitch + j] = value;
    });
    block_barrier();

    // Phase 2. A thread reads and writes its own elements of the new state alone.
    const bool product = i > 0 || p.init == Init::state;
    for (int64_t base = 0; base < C; base += plan.channels) {
      const int64_t channel = base + my_channel;
      S acc[L][L];
      for (int m = 0; m < L; ++m)
        for (int n = 0; n < L; ++n) acc[m][n] = S(-0.0);
      const int64_t depth = plan.weight_resident ? C : plan.depth;
      for (int64_t k0 = 0; product && k0 < C; k0 += depth) {
        const int64_t count = C - k0 < depth ? C - k0 : depth;
        if (!plan.weight_resident) {
          block_barrier();  // the piece before this one has been read
          stage_weight<T, S>(p, weight, plan.weight_pitch, k0, count, base, plan.channels);
          block_barrier();
        }
        if (channel >= C) continue;
        const S* w = weight + (plan.weight_resident ? k0 * plan.weight_pitch + channel : my_channel);
        const S* v = old_state + k0 * pitch + my_column;
#pragma unroll 4
        for (int64_t k = 0; k < count; ++k, w += plan.weight_pitch, v += pitch) {
          const Quad a = *reinterpret_cast<const Quad*>(w), b = *reinterpret_cast<const Quad*>(v);
#pragma unroll
          for (int m = 0; m < L; ++m)
#pragma unroll
            for (int n = 0; n < L; ++n) acc[m][n] = fma(a.v[m], b.v[n], acc[m][n]);
        }
      }
#pragma unroll
      for (int m = 0; m < L; ++m) {
        if (channel + m >= C) break;
        Quad* at = reinterpret_cast<Quad*>(new_state + (channel + m) * pitch + my_column);
        Quad value = *at;
#pragma unroll
        for (int n = 0; n < L; ++n) value.v[n] = alpha * (acc[m][n] + value.v[n]);
        *at = value;
      }
    }
    block_barrier();

    // Phase 3.
    if (p.y.data && !extra) {
      T* y = static_cast<T*>(p.y.data);
      const T* residual = static_cast<const T*>(p.residual.data);
      const S *scale = static_cast<const S*>(p.scale), *shift = static_cast<const S*>(p.shift);
      for_tile(p.y.c == 1, C, P, [&](int64_t c, int j) {
        if (j >= columns) return;
        S value = new_state[c * pitch + j];
        if (scale) {
          value = fma(scale[c], value, shift[c]);
          if (residual) value += widen(residual[residual_offset[j] + c * p.residual.c + t * p.residual.t]);
          if (p.relu) value = value < 0 ? S(0) : value;  // NaN stays
        }
        y[y_offset[j] + c * p.y.c + t * p.y.t] = narrow<T>(value);
      });
    }
    S* swap = old_state;
    old_state = new_state;
    new_state = swap;
  }
  if (p.last_kind != Last::none)
    for_tile(p.last.c == 1, C, P, [&](int64_t c, int j) {
      if (j < columns) store_state<T, S>(p.last, last_offset[j] + c * p.last.c, p.dtype, old_state[c * pitch + j]);
    });
}

template <typename T>
Error launch_plain_scan(const Scan& p, const PlainScanPlan& plan, void* scratch, Stream stream) {
  return launch("recurrent_conv plain_scan", plan.state_shared ? plain_scan<T, true> : plain_scan<T, false>,
                dim3(static_cast<unsigned>(plan.blocks)), dim3(plain_threads), static_cast<size_t>(plan.shared_bytes), stream,
                p, plan, static_cast<Accumulator<T>*>(scratch));
}

// ---- the weight gradient -----------------------------------------------------------------------------------------

// Kahan's sum: what rounding cut off is added with the next term. Nothing here is compiled with fast-math, so it stays. An
// infinite sum has no such rest.
template <typename S>
struct CompensatedSum {
  S sum = 0, carry = 0;
  __device__ __forceinline__ void add(S term) {
    const S corrected = term - carry, next = sum + corrected, rest = (next - sum) - corrected;
    carry = rest - rest == 0 ? rest : S(0);
    sum = next;
  }
};

// Partial sums of dW[o][i] = sum over rows of dx[row][o] * before[row][i], a row being a frame and a position, and
// `before` the output of the frame processed before it (or the state before the first).
//
// Work.     Block (x, y): 64 x 64 elements (x: tile) of dW from rows_per_split rows (y: split), 32 rows at a time through
//           shared memory; a thread adds up 4 x 4 elements.
// Memory.   Shared: 2 x 2 tables of the rows' offsets (the stage in use and the next one), and both factors [32][68].
// Order.    Rows in ascending order within a stage of 32, stages within a split, splits in sum_splits, the latter two with
//           the rounding error carried along (CompensatedSum): no atomics, the same bits on every run and every GPU.
// Output.   Split s writes its tile of partial[s][C][C], or dW itself when there is one split. One writer per element.
// Bound.    2 C^2 FLOP per row against 2 C numbers read (times C / 64: every tile row and column reads its factor again,
//           mostly from L2): arithmetic from C = 64 on.
template <typename T>
__global__ void __launch_bounds__(weight_grad_threads, sizeof(T) == 8 ? 1 : 2)
    weight_grad_partial(const WeightGrad p, const WeightGradPlan plan, Accumulator<T>* partial) {
  using S = Accumulator<T>;
  using Quad = Lanes<S>;
  constexpr int L = plain_lanes, R = weight_grad_depth, B = weight_grad_tile, pitch = B + L;
  const int thread = threadIdx.x;
  const int64_t per_side = (p.C + B - 1) / B, split = blockIdx.y;
  const int64_t output0 = blockIdx.x / per_side * B, input0 = blockIdx.x % per_side * B;
  const int64_t begin = split * plan.rows_per_split;
  const int64_t end = begin + plan.rows_per_split < plan.rows ? begin + plan.rows_per_split : plan.rows;

  int64_t* dx_offset = dynamic_shared<int64_t>();  // [2][R]
  int64_t* before_offset = dx_offset + 2 * R;      // [2][R]; -1 - offset: in p.first
  S* dx_tile = dynamic_shared<S>(4 * R * sizeof(int64_t));
  S* before_tile = dx_tile + R * pitch;

  const auto find_rows = [&](int64_t row0, int stage) {
    if (thread >= R || row0 + thread >= end) return;
    const WeightGradRow row = weight_grad_row(p, row0 + thread);
    dx_offset[stage * R + thread] = row.dx;
    before_offset[stage * R + thread] = row.before;
  };
  const T* dx = static_cast<const T*>(p.dx.data);
  const T* states = static_cast<const T*>(p.h.data);
  CompensatedSum<S> total[L][L];
  const int my_output = thread / (B / L) * L, my_input = thread % (B / L) * L;
  find_rows(begin, 0);
  block_barrier();
  int stage = 0;
  for (int64_t row0 = begin; row0 < end; row0 += R, stage ^= 1) {
    const int rows = end - row0 < R ? static_cast<int>(end - row0) : R;
    const int64_t *from_dx = dx_offset + stage * R, *from_before = before_offset + stage * R;
    for_tile(p.dx.c == 1, B, R, [&](int64_t c, int r) {
      dx_tile[r * pitch + c] = r < rows && output0 + c < p.C ? widen(dx[from_dx[r] + (output0 + c) * p.dx.c]) : S(0);
    });
    for_tile(p.h.c == 1, B, R, [&](int64_t c, int r) {
      S value = 0;
      if (r < rows && input0 + c < p.C) {
        const int64_t offset = from_before[r];
        value = offset < 0 ? load_state<T, S>(p.first, -1 - offset + (input0 + c) * p.first.c, p.dtype)
                           : widen(states[offset + (input0 + c) * p.h.c]);
      }
      before_tile[r * pitch + c] = value;
    });
    find_rows(row0 + R, stage ^ 1);
    block_barrier();
    S acc[L][L] = {};
#pragma unroll 4
    for (int r = 0; r < R; ++r) {
      const Quad a = *reinterpret_cast<const Quad*>(dx_tile + r * pitch + my_output);
      const Quad b = *reinterpret_cast<const Quad*>(before_tile + r * pitch + my_input);
#pragma unroll
      for (int m = 0; m < L; ++m)
#pragma unroll
        for (int n = 0; n < L; ++n) acc[m][n] = fma(a.v[m], b.v[n], acc[m][n]);
    }
#pragma unroll
    for (int m = 0; m < L; ++m)
#pragma unroll
      for (int n = 0; n < L; ++n) total[m][n].add(acc[m][n]);
    block_barrier();
  }
#pragma unroll
  for (int m = 0; m < L; ++m)
#pragma unroll
    for (int n = 0; n < L; ++n) {
      const int64_t output = output0 + my_output + m, input = input0 + my_input + n;
      if (output >= p.C || input >= p.C) continue;
      if (plan.splits > 1)
        partial[(split * p.C + output) * p.C + input] = total[m][n].sum;
      else
        static_cast<T*>(p.dweight)[output * p.C + input] = narrow<T>(total[m][n].sum);
    }
}

// dweight[e] = sum of partial[s][e] over s in ascending order, one thread per element. Bound: reading `partial` once.
template <typename T>
__global__ void __launch_bounds__(weight_grad_threads, 2)
    sum_splits(const Accumulator<T>* partial, int64_t splits, int64_t elements, T* dweight) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e >= elements) return;
  CompensatedSum<Accumulator<T>> total;
#pragma unroll 4
  for (int64_t s = 0; s < splits; ++s) total.add(partial[s * elements + e]);
  dweight[e] = narrow<T>(total.sum);
}

template <typename T>
Error launch_weight_grad(const WeightGrad& p, const WeightGradPlan& plan, void* scratch, Stream stream) {
  auto* partial = static_cast<Accumulator<T>*>(scratch);
  Error error = launch("recurrent_conv weight_grad_partial", weight_grad_partial<T>,
                       dim3(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.splits)), dim3(weight_grad_threads),
                       static_cast<size_t>(plan.shared_bytes), stream, p, plan, partial);
  if (!error.empty() || plan.splits == 1) return error;
  const int64_t elements = p.C * p.C;
  return launch("recurrent_conv sum_splits", sum_splits<T>,
                dim3(static_cast<unsigned>(ceil_div(elements, weight_grad_threads))), dim3(weight_grad_threads), 0, stream,
                partial, plan.splits, elements, static_cast<T*>(p.dweight));
}

// Calls function(T()) with the type of `dtype`.
template <typename Function>
auto with_type(DType dtype, Function function) {
  switch (dtype) {
    case DType::f64: return function(double());
    case DType::f32: return function(float());
    case DType::bf16: return function(__nv_bfloat16());
    default: return function(__half());
  }
}

}  // namespace

Scratch scan_scratch(const Scan& p, Kernel kernel) {
  Scratch scratch;
  Gpu gpu;
  scratch.error = current_gpu(gpu);
  if (scratch.error.empty() && plan_scan(p, gpu, kernel).is_plain()) scratch.bytes = plan_plain_scan(p, gpu).scratch_bytes;
  return scratch;
}

std::string describe_scan(const Scan& p, Kernel kernel) {
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  return describe(plan_scan(p, gpu, kernel));
}

Scratch weight_grad_scratch(const WeightGrad& p) { return {plan_weight_grad(p).scratch_bytes, {}}; }

std::string scan(const Scan& p, void* scratch, Stream stream, Kernel kernel) {
  if (p.N * p.G * p.H * p.W == 0) return {};
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  const ScanPlan plan = plan_scan(p, gpu, kernel);
  if (plan.blocks() > most_blocks) return "recurrent_conv: too many positions for one launch";
  if (plan.tile) return launch_tile_scan(p, *plan.tile, stream);
  if (plan.wide) return launch_wide_scan(p, *plan.wide, stream);
  return with_type(p.dtype, [&](auto type) { return launch_plain_scan<decltype(type)>(p, plan.plain, scratch, stream); });
}

std::string weight_grad(const WeightGrad& p, void* scratch, Stream stream) {
  const WeightGradPlan plan = plan_weight_grad(p);
  if (plan.tiles > most_blocks) return "recurrent_conv: too many channels for one launch";
  return with_type(p.dtype, [&](auto type) { return launch_weight_grad<decltype(type)>(p, plan, scratch, stream); });
}

}  // namespace rcu_ops::cuda
