// The passes of recurrent_conv_batch_norm on CUDA devices: statistics, normalisation, and its gradient.
#include "cuda/recurrent_conv_batch_norm.h"

#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/launch.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shared_memory.h"
#include "cuda/device/shuffle.h"

namespace rcu_ops::cuda {
namespace {

constexpr int norm_threads = 256, norm_warps = norm_threads / 32;

// A part is `size` consecutive positions q = ((n T + t) H + h) W + w, the unit of partial sums; the sizes alone decide.
struct NormParts {
  int64_t positions = 0, parts = 0, size = 0, step_n = 0, step_t = 0, step_h = 0, step_w = 0;
  bool channels = false;
};

NormParts norm_parts(const Norm& p) {
  NormParts plan;
  plan.channels = p.h.c == 1 && p.C > 1 && !(p.h.w == 1 && p.W > 1);
  plan.positions = p.N * p.T * p.H * p.W;
  plan.size = plan.channels ? 512 : 4096;
  plan.parts = (plan.positions + plan.size - 1) / plan.size;
  if (plan.positions == 0) return plan;
  // How far a thread goes from one of its positions to the next: threads divide once.
  const int64_t step = plan.channels ? norm_warps : norm_threads;
  plan.step_w = step % p.W, plan.step_h = step / p.W % p.H, plan.step_t = step / p.W / p.H % p.T;
  plan.step_n = step / p.W / p.H / p.T;
  return plan;
}

bool reduces(const Norm& p) { return p.pass == NormPass::moments || p.pass == NormPass::sums; }

// The sum over the block's threads, or over those of the same lane (Channels), the same for all of them and in a fixed
// order: lanes in pairs of pairs, then warps one after the other. All threads; `shared`: norm_threads numbers.
template <bool Channels, typename S>
__device__ __forceinline__ S block_sum(S value, S* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  S total = 0;
  if constexpr (Channels) {
    shared[threadIdx.x] = value;
    block_barrier();
    for (int w = 0; w < norm_warps; ++w) total += shared[w * 32 + lane];
  } else {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    if (lane == 0) shared[warp] = value;
    block_barrier();
    for (int w = 0; w < norm_warps; ++w) total += shared[w];
  }
  block_barrier();  // everybody has read; the memory may be used again
  return total;
}

// One pass (common/recurrent_conv_batch_norm.h), any strides, T in {double, float, uint16_t: bf16 or fp16},
// arithmetic in S = Accumulator<T>.
//
// Work.     Along positions: a block owns one part of one channel, a thread every 256th of its positions. Along
//           channels (Channels): a block owns one part of 32 channels, a lane is a channel, a warp takes every 8th
//           position. Choose the one along which h's numbers are adjacent.
// Memory.   Shared: one number per thread, for sums over the block. `moments` sweeps its part twice, the second time
//           from L2: the mean, then what deviates from it, so that a large mean costs the variance nothing.
// Output.   partial[channel][part][2], fp64: the part's mean and squared deviations, or sum dz and sum dz (h - mean);
//           else y or out. Every element has one writer; y and out overlap no input.
// Order.    A thread's positions in ascending order, then block_sum: no atomics.
// Bound.    Bytes: 1 (moments), 2 or 3 (normalize), 2 to 4 (sums), 3 (gradient) numbers per element. Loads are one
//           number per lane: 64 bytes per warp and instruction in 16 bits, so that the issue rate may bound it before
//           HBM does.
template <typename T, bool Channels>
__global__ void __launch_bounds__(norm_threads, 4) norm_pass(const Norm p, const NormParts plan, double* partial) {
  using S = Accumulator<T>;
  S* shared = dynamic_shared<S>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t groups = (p.C + 31) / 32, block = blockIdx.x;
  const int64_t part = Channels ? block / groups : block % plan.parts;
  const int64_t c = Channels ? block % groups * 32 + lane : block / plan.parts;
  const int64_t begin = part * plan.size, step = Channels ? norm_warps : norm_threads;
  const int64_t end = begin + plan.size < plan.positions ? begin + plan.size : plan.positions;
  const bool mine = c < p.C, bf16 = p.dtype == DType::bf16;
  const T *h_data = static_cast<const T*>(p.h.data), *other_data = static_cast<const T*>(p.other.data);
  T *y_data = static_cast<T*>(p.y.data), *out_data = static_cast<T*>(p.out.data);

  // Calls visit(n, t, h, w) for the thread's positions.
  const auto for_positions = [&](auto visit) {
    if (!mine) return;
    int64_t q = begin + (Channels ? warp : static_cast<int>(threadIdx.x));
    int64_t w = q % p.W, h = q / p.W % p.H, t = q / p.W / p.H % p.T, n = q / p.W / p.H / p.T;
    for (; q < end; q += step) {
      visit(n, t, h, w);
      w += plan.step_w, h += plan.step_h, t += plan.step_t, n += plan.step_n;
      if (w >= p.W) w -= p.W, ++h;
      if (h >= p.H) h -= p.H, ++t;
      if (t >= p.T) t -= p.T, ++n;
    }
  };
  const auto offset = [&](const View& v, int64_t n, int64_t t, int64_t h, int64_t w) {
    return n * v.n + c * v.c + t * v.t + h * v.h + w * v.w;
  };

  const bool writes_partial = mine && (Channels ? warp == 0 : threadIdx.x == 0);
  double* to = partial + (c * plan.parts + part) * 2;
  if (p.pass == NormPass::moments) {
    S sum = 0, rest = 0, squares = 0;
    for_positions(
        [&](int64_t n, int64_t t, int64_t h, int64_t w) { sum += widen(h_data[offset(p.h, n, t, h, w)], bf16); });
    const S count = static_cast<S>(end - begin), center = block_sum<Channels>(sum, shared) / count;
    for_positions([&](int64_t n, int64_t t, int64_t h, int64_t w) {
      const S deviation = widen(h_data[offset(p.h, n, t, h, w)], bf16) - center;
      rest += deviation;
      squares = fma(deviation, deviation, squares);
    });
    rest = block_sum<Channels>(rest, shared);
    squares = block_sum<Channels>(squares, shared);
    if (writes_partial) {  // what rounding did to the center is taken out again
      const double apart = static_cast<double>(rest) / static_cast<double>(count);
      to[0] = static_cast<double>(center) + apart;
      to[1] = static_cast<double>(squares) - static_cast<double>(rest) * apart;
    }
    return;
  }

  S mean = 0, scale = 0, shift = 0, slope = 0, constant = 0;
  if (mine) {
    const S* moments = static_cast<const S*>(p.moments);
    const S count = moments[2 * p.C + c] > 1 ? moments[2 * p.C + c] : S(1);
    const S inverse = S(1) / sqrt(moments[p.C + c] / count + static_cast<S>(p.eps));
    mean = moments[c];
    scale = p.gamma ? inverse * static_cast<const S*>(p.gamma)[c] : inverse;
    shift = p.beta ? static_cast<const S*>(p.beta)[c] : S(0);
    if (p.sums) {
      slope = -scale * inverse * static_cast<const S*>(p.sums)[p.C + c] / count;
      constant = -scale * static_cast<const S*>(p.sums)[c] / count;
    }
  }
  S sum = 0, product = 0;
  for_positions([&](int64_t n, int64_t t, int64_t h, int64_t w) {
    const S deviation = widen(h_data[offset(p.h, n, t, h, w)], bf16) - mean;
    const S other = other_data ? static_cast<S>(widen(other_data[offset(p.other, n, t, h, w)], bf16)) : S(0);
    const S z = fma(deviation, scale, shift);
    if (p.pass == NormPass::normalize) {
      const S y = other_data ? z + other : z;
      y_data[offset(p.y, n, t, h, w)] = narrow<T>(p.relu && y < 0 ? S(0) : y, bf16);  // NaN stays
      return;
    }
    const bool blocked = p.relu && (y_data ? static_cast<S>(widen(y_data[offset(p.y, n, t, h, w)], bf16)) : z) <= 0;
    const S dz = blocked ? S(0) : other;
    if (p.pass == NormPass::sums) {
      sum += dz;
      product = fma(dz, deviation, product);
      if (out_data) out_data[offset(p.out, n, t, h, w)] = narrow<T>(dz, bf16);
    } else {
      out_data[offset(p.out, n, t, h, w)] = narrow<T>(fma(scale, dz, fma(slope, deviation, constant)), bf16);
    }
  });
  if (p.pass != NormPass::sums) return;
  sum = block_sum<Channels>(sum, shared);
  product = block_sum<Channels>(product, shared);
  if (writes_partial) to[0] = static_cast<double>(sum), to[1] = static_cast<double>(product);
}

// The parts of a channel together, in fp64. A warp per channel; a lane takes every 32nd part, in order, then lanes in
// pairs of pairs. Bound: reading `partial`.
template <typename S>
__global__ void __launch_bounds__(norm_threads, 4)
    norm_finish(const Norm p, const NormParts plan, const double* partial) {
  const int lane = threadIdx.x % 32;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * norm_warps + threadIdx.x / 32;
  if (c >= p.C) return;  // the whole warp
  const double* from = partial + c * plan.parts * 2;
  const auto all_lanes = [](double value) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
  };
  const auto count_of = [&](int64_t part) {
    const int64_t left = plan.positions - part * plan.size;
    return static_cast<double>(left < plan.size ? left : plan.size);
  };
  S* result = static_cast<S*>(p.result);
  double first = 0, second = 0;
  if (p.pass == NormPass::sums) {
    for (int64_t i = lane; i < plan.parts; i += 32) first += from[2 * i], second += from[2 * i + 1];
    first = all_lanes(first), second = all_lanes(second);
    if (lane > 0) return;
    const S* moments = static_cast<const S*>(p.moments);
    const double count = moments[2 * p.C + c] > 1 ? static_cast<double>(moments[2 * p.C + c]) : 1;
    result[c] = static_cast<S>(first);
    result[p.C + c] = static_cast<S>(second / sqrt(static_cast<double>(moments[p.C + c]) / count + p.eps));
    return;
  }
  for (int64_t i = lane; i < plan.parts; i += 32) first += count_of(i) * from[2 * i];
  const double total = static_cast<double>(plan.positions);
  first = all_lanes(first) / (total > 1 ? total : 1);
  for (int64_t i = lane; i < plan.parts; i += 32) {
    const double apart = from[2 * i] - first;
    second += from[2 * i + 1] + count_of(i) * apart * apart;
  }
  second = all_lanes(second);
  if (lane > 0) return;
  result[c] = static_cast<S>(first);
  result[p.C + c] = static_cast<S>(second);
  result[2 * p.C + c] = static_cast<S>(total);
}

template <typename T>
Error launch_as(const Norm& p, const NormParts& plan, double* partial, Stream stream) {
  using S = Accumulator<T>;
  const int64_t blocks = plan.parts * (plan.channels ? (p.C + 31) / 32 : p.C);
  if (blocks > INT32_MAX) return "recurrent_conv_batch_norm: too many positions for one launch";
  if (blocks > 0) {
    Error error = launch("recurrent_conv_batch_norm norm_pass",
                         plan.channels ? norm_pass<T, true> : norm_pass<T, false>, dim3(static_cast<unsigned>(blocks)),
                         dim3(norm_threads), norm_threads * sizeof(S), stream, p, plan, partial);
    if (!error.empty()) return error;
  }
  if (!reduces(p)) return {};
  return launch("recurrent_conv_batch_norm norm_finish", norm_finish<S>,
                dim3(static_cast<unsigned>((p.C + norm_warps - 1) / norm_warps)), dim3(norm_threads), 0, stream, p,
                plan, partial);
}

}  // namespace

Scratch batch_norm_scratch(const Norm& p) {
  return {reduces(p) ? p.C * norm_parts(p).parts * 2 * static_cast<int64_t>(sizeof(double)) : 0, {}};
}

Text finish_moments(const Norm& p, int64_t columns, const double* partial, Stream stream) {
  NormParts plan;
  plan.positions = p.N * p.T * p.H * p.W;
  plan.size = columns * p.T;  // the last part has the rest
  plan.parts = (plan.positions + plan.size - 1) / plan.size;
  return launch("recurrent_conv_batch_norm norm_finish", norm_finish<float>,
                dim3(static_cast<unsigned>((p.C + norm_warps - 1) / norm_warps)), dim3(norm_threads), 0, stream, p,
                plan, partial);
}

Text batch_norm(const Norm& p, void* scratch, Stream stream) {
  const NormParts plan = norm_parts(p);
  double* partial = static_cast<double*>(scratch);
  switch (p.dtype) {
    case DType::f64: return launch_as<double>(p, plan, partial, stream);
    case DType::f32: return launch_as<float>(p, plan, partial, stream);
    default: return launch_as<uint16_t>(p, plan, partial, stream);
  }
}

}  // namespace rcu_ops::cuda
