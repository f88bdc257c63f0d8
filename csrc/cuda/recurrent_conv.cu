// recurrent_conv on CUDA devices: the plain scan (any C, dtype and strides) and the choice between kernels.
#include "cuda/recurrent_conv.h"

#include "common/recurrent_conv_chunk_plan.h"
#include "common/recurrent_conv_weight_grad_plan.h"
#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/launch.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shared_memory.h"
#include "cuda/recurrent_conv_plain.h"
#include "cuda/recurrent_conv_tile.h"
#include "cuda/recurrent_conv_views.h"

namespace rcu_ops::cuda {
namespace {

// ---- the plain scan ----------------------------------------------------------------------------------------------

inline constexpr int plain_batch = 8;  // loads of a thread under way together

// W[output0 ..][input0 .. input0 + inputs), transposed and widened, to weight[input][output]; zeros beyond the last
// output channel. place(e), e < all, says which (input, output) of the piece is element e. All threads of the block.
template <typename S, typename Place>
__device__ __forceinline__ void stage_weight(const Scan& p, S* weight, int64_t pitch, int64_t input0, int inputs,
                                             int64_t output0, int all, Place place) {
  const int left = p.C - output0 < all ? static_cast<int>(p.C - output0) : all;  // output channels
  for (int begin = threadIdx.x; begin < all; begin += plain_batch * plain_threads) {
    S loaded[plain_batch];
#pragma unroll
    for (int i = 0; i < plain_batch; ++i) {
      const auto [input, output] = place(begin + i * plain_threads);
      const int64_t o = output0 + (output < left ? output : left - 1), k = input0 + (input < inputs ? input : 0);
      loaded[i] = load_number<S>(p.weight, p.dtype, o * p.weight_out + k * p.weight_in);
    }
#pragma unroll
    for (int i = 0; i < plain_batch; ++i) {
      const auto [input, output] = place(begin + i * plain_threads);
      if (input < inputs && begin + i * plain_threads < all)
        weight[input * pitch + output] = output < left ? loaded[i] : S(0);
    }
  }
}
struct WeightElement {
  int input, output;
};
// All of W.
template <typename S>
__device__ void stage_weight(const Scan& p, S* weight, int64_t pitch) {
  const int C = static_cast<int>(p.C), outputs = (C + plain_lanes - 1) / plain_lanes * plain_lanes;
  const bool along_inputs = p.weight_in == 1;
  stage_weight<S>(p, weight, pitch, 0, C, 0, C * outputs, [&](int e) {
    return along_inputs ? WeightElement{e % C, e / C} : WeightElement{e / outputs, e % outputs};
  });
}
// A piece of plan.depth x plan.channels, powers of two whose product is plain_threads * plain_lanes^2. Where rows of W
// are contiguous a warp takes 8 inputs of 4 outputs: whole sectors of fp32, and no two lanes in one bank.
template <typename S>
__device__ void stage_weight(const Scan& p, const PlainScanPlan& plan, S* weight, int64_t input0, int inputs,
                             int64_t output0) {
  constexpr int all_shift = 12, all = 1 << all_shift;
  static_assert(all == plain_threads * plain_lanes * plain_lanes);
  const bool along_inputs = p.weight_in == 1;
  int shift = 2;
  while (1 << shift < plan.depth) ++shift;
  const int row = plan.depth - 1, column = plan.channels - 1;
  stage_weight<S>(p, weight, plan.weight_pitch, input0, inputs, output0, all, [&](int e) {
    if (!along_inputs) return WeightElement{e >> (all_shift - shift), e & column};
    if (shift < 3) return WeightElement{e & row, e >> shift};
    return WeightElement{(e & 7) | ((e >> 5 << 3) & row), (e >> 3 & 3) | (e >> (shift + 2) << 2)};
  });
}

// One scan over time (common/recurrent_conv.h), any C, any strides, arithmetic in S: double for fp64, float for all
// others, whose format is a condition on loads and stores.
//
// Work.     A block owns plan.positions columns for all frames. Per frame: x is copied into the new state (phase 1),
//           every thread adds W times the old state for its 4 channels x 4 columns, one range of plan.channels output
//           channels after the other (phase 2), and the new state is copied out as y (phase 3). Copies run along
//           whichever of channels and columns is contiguous in that tensor.
// Memory.   Shared: five offsets per column; two copies of the state [C][state_pitch], the old and the new one, which
//           change places every frame (in `scratch`, one pair per block, when they do not fit); W as [input][output],
//           whole, or one piece of depth x channels at a time, read again from L2 every frame.
// Order.    v' = x; for runs of sum_run channels: acc = -0; for k: acc = fma(W[c][k], v[k], acc); v' += acc; in the end
//           v' *= alpha. Independent of tiles, so cutting a sequence in two changes no bit. Between runs v' waits in the
//           new state's memory: 12 words of it for 64 steps that read two each.
// Aliasing. y and last overlap no input. Every output element has one writer.
// Bound.    2 C FLOP per element against x read + y written once: at 67 TFLOP/s of fp32 and 4.3 TB/s arithmetic takes
//           over from C = 64 (fp32) or C = 32 (16 bits) on. The inner loop reads two 16-byte words of shared memory for
//           16 FMAs, so it reaches at most about half of the FMA rate. Small blocks (many channels) read W from L2: 2
//           C^2 bytes (16 bits) per frame and block.
template <typename S, bool StateShared>
__global__ void __launch_bounds__(plain_threads, 2) plain_scan(const Scan p, const PlainScanPlan plan, S* scratch) {
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
  S* old_state =
      StateShared ? dynamic_shared<S>(plan.state_at) : scratch + static_cast<int64_t>(blockIdx.x) * 2 * C * pitch;
  S* new_state = old_state + C * pitch;

  for (int i = thread; i < columns; i += blockDim.x)
    fill_offsets(p, column0 + i, i, x_offset, y_offset, residual_offset, first_offset, last_offset);
  if (plan.weight_resident) stage_weight<S>(p, weight, plan.weight_pitch);
  block_barrier();
  if (p.init == Init::state)
    for_tile_loaded<plain_batch>(
        p.first.c == 1, C, P,
        [&](int64_t c, int i) {
          return load_number<S>(p.first.data, p.first.dtype,
                                first_offset[i < columns ? i : columns - 1] + c * p.first.c);
        },
        [&](int64_t c, int i, S value) { old_state[c * pitch + i] = i < columns ? value : S(0); });

  const int column_groups = P / L, my_column = thread % column_groups * L, my_channel = thread / column_groups * L;
  // The gradient of the first state is one more product, without an input and without y.
  const int64_t frames = p.T + (p.last_kind == Last::projected ? 1 : 0);
  for (int64_t i = 0; i < frames; ++i) {
    const bool extra = i == p.T;
    const int64_t t = p.reverse ? p.T - 1 - i : i;
    const S alpha = static_cast<S>(extra ? 1 : i == p.T - 1 ? p.alpha_final : i == 0 ? p.alpha_first : p.alpha);

    // Phase 1. The new state's memory held the state before the old one: nobody has read it since the last barrier.
    const bool add_first = i == 0 && p.init == Init::added;
    const auto existing = [&](int j) { return j < columns ? j : columns - 1; };
    if (const void* x = extra ? nullptr : p.x.data)
      for_tile_loaded<plain_batch>(
          p.x.c == 1, C, P,
          [&](int64_t c, int j) { return load_number<S>(x, p.dtype, x_offset[existing(j)] + c * p.x.c + t * p.x.t); },
          [&](int64_t c, int j, S value) { new_state[c * pitch + j] = j < columns ? value : S(0); });
    else
      for_tile(p.x.c == 1, C, P, [&](int64_t c, int j) { new_state[c * pitch + j] = 0; });
    if (add_first) {
      block_barrier();
      for_tile(p.first.c == 1, C, P, [&](int64_t c, int j) {
        if (j < columns)
          new_state[c * pitch + j] += load_number<S>(p.first.data, p.first.dtype, first_offset[j] + c * p.first.c);
      });
    }
    block_barrier();

    // Phase 2. A thread reads and writes its own elements of the new state alone.
    const bool product = i > 0 || p.init == Init::state;
    for (int64_t base = 0; base < C; base += plan.channels) {
      const int64_t channel = base + my_channel, depth = plan.weight_resident ? sum_run : plan.depth;
      for (int64_t run = 0; run < (product ? C : 1); run += sum_run) {
        const int64_t run_end = C - run < sum_run ? C : run + sum_run;
        S acc[L][L];
#pragma unroll
        for (int m = 0; m < L; ++m)
#pragma unroll
          for (int n = 0; n < L; ++n) acc[m][n] = S(-0.0);
        for (int64_t k0 = run; product && k0 < run_end; k0 += depth) {
          const int64_t count = run_end - k0 < depth ? run_end - k0 : depth;
          if (!plan.weight_resident) {
            block_barrier();  // the piece before this one has been read
            stage_weight<S>(p, plan, weight, k0, static_cast<int>(count), base);
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
        // -0 + x is x for every x, -0 included: a frame without a product passes here once, too.
        const S factor = product && run_end < C ? S(1) : alpha;
#pragma unroll
        for (int m = 0; m < L; ++m) {
          if (channel + m >= C) break;
          Quad* at = reinterpret_cast<Quad*>(new_state + (channel + m) * pitch + my_column);
          Quad value = *at;
#pragma unroll
          for (int n = 0; n < L; ++n) value.v[n] = factor * (value.v[n] + acc[m][n]);
          *at = value;
        }
      }
    }
    block_barrier();

    // Phase 3.
    if (p.y.data && !extra) {
      const S *scale = static_cast<const S*>(p.scale), *shift = static_cast<const S*>(p.shift);
      const auto write = [&](int64_t c, int j, S added) {
        if (j >= columns) return;
        S value = new_state[c * pitch + j];
        if (scale) {
          value = fma(scale[c], value, shift[c]);
          if (p.residual.data) value += added;
          if (p.relu) value = value < 0 ? S(0) : value;  // NaN stays
        }
        store_number<S>(p.y.data, p.dtype, y_offset[j] + c * p.y.c + t * p.y.t, value);
      };
      if (p.residual.data)
        for_tile_loaded<plain_batch>(
            p.y.c == 1, C, P,
            [&](int64_t c, int j) {
              return load_number<S>(p.residual.data, p.dtype,
                                    residual_offset[existing(j)] + c * p.residual.c + t * p.residual.t);
            },
            write);
      else
        for_tile(p.y.c == 1, C, P, [&](int64_t c, int j) { write(c, j, S(0)); });
    }
    S* swap = old_state;
    old_state = new_state;
    new_state = swap;
  }
  if (p.last_kind != Last::none)
    for_tile(p.last.c == 1, C, P, [&](int64_t c, int j) {
      if (j < columns)
        store_number<S>(p.last.data, p.last.dtype, last_offset[j] + c * p.last.c, old_state[c * pitch + j]);
    });
}

template <typename S>
Error launch_plain_scan(const Scan& p, const PlainScanPlan& plan, void* scratch, Stream stream) {
  return launch("recurrent_conv plain_scan", plan.state_shared ? plain_scan<S, true> : plain_scan<S, false>,
                dim3(static_cast<unsigned>(plan.blocks)), dim3(plain_threads), static_cast<size_t>(plan.shared_bytes),
                stream, p, plan, static_cast<S*>(scratch));
}

}  // namespace

Scratch scan_scratch(const Scan& p, Kernel kernel) {
  Scratch scratch;
  Gpu gpu;
  scratch.error = current_gpu(gpu);
  if (scratch.error.empty()) scratch.bytes = plan_scan(p, gpu, kernel).scratch_bytes();
  return scratch;
}

Text describe_scan(const Scan& p, Kernel kernel) {
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  return describe(plan_scan(p, gpu, kernel));
}

Text planned_chunk(const Scan& p, bool powers_kept, int64_t& frames) {
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  frames = plan_chunks(p, plan_scan(p, gpu, Kernel::best), gpu, powers_kept).frames;
  return {};
}

Text fused_norm_columns(const Scan& p, int64_t& columns) {
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  Scan asked = p;
  if (!p.norm.present()) asked.norm.partial = static_cast<double*>(p.y.data);  // never followed
  const ScanPlan plan = plan_scan(asked, gpu, Kernel::best);
  columns = plan_chunks(p, plan, gpu).frames ? 0 : fused_norm_columns(plan);
  return {};
}

Text fused_weight_grad_parts(const Scan& p, int64_t& parts) {
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  const ScanPlan plan = plan_scan(p, gpu, Kernel::best);
  parts = plan_chunks(p, plan, gpu).frames ? 0 : fused_weight_grad_parts(p, plan);
  return {};
}

Text scan(const Scan& p, void* scratch, Stream stream, Kernel kernel) {
  if (p.N * p.G * p.H * p.W == 0) return {};
  Gpu gpu;
  if (Error error = current_gpu(gpu); !error.empty()) return error;
  const ScanPlan plan = plan_scan(p, gpu, kernel);
  if (p.norm.present() && !fused_norm_columns(plan))
    return "recurrent_conv: this scan takes no part of batch normalisation";
  if (p.weight_grad.partial && !sums_weights(p, plan))
    return "recurrent_conv: this scan takes no part of the weight's gradient";
  if (plan.blocks() > most_blocks) return "recurrent_conv: too many positions for one launch";
  if (plan.step) return launch_step_scan(p, *plan.step, scratch, stream);
  if (plan.fp32) return launch_fp32_scan(p, *plan.fp32, stream);
  if (plan.tile) return launch_tile_scan(p, *plan.tile, stream);
  if (plan.wide) return launch_wide_scan(p, *plan.wide, stream);
  if (plan.hopper) return launch_hopper_scan(p, *plan.hopper, stream);
  return p.dtype == DType::f64 ? launch_plain_scan<double>(p, plan.plain, scratch, stream)
                               : launch_plain_scan<float>(p, plan.plain, scratch, stream);
}

}  // namespace rcu_ops::cuda
