// The data path of an SRTG block on CUDA devices.
#include "cuda/srtg.h"

#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/launch.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shared_memory.h"
#include "cuda/device/shuffle.h"

namespace rcu_ops::cuda {
namespace {

constexpr int gate_threads = 256, gate_warps = gate_threads / 32;

// One pass (common/srtg.h), any strides, T in {double, float, bf16, half}, arithmetic in S = Accumulator<T>.
//
// Work.     Along positions: a warp owns a frame of one channel, its lanes take every 32nd position. Along channels
//           (Channels): a block owns 32 channels of one frame, a lane is a channel, its 8 warps take every 8th
//           position. Choose the one along which x's numbers are adjacent.
// Memory.   Shared, along channels: [8][32] partial sums. x and grad are read once, y is written once.
// Order.    A lane adds up its positions in order; then lanes in pairs of pairs, or warps in order. No atomics.
// Aliasing. y overlaps no input. Every element has one writer.
// Bound.    Bytes.
template <typename T, bool Channels>
__global__ void __launch_bounds__(gate_threads, 4) gate_pass(const GateData p) {
  using S = Accumulator<T>;
  const GatePass pass = p.pass;
  const bool sums = pass == GatePass::squeeze || pass == GatePass::backward;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t positions = p.H * p.W, groups = (p.C + 31) / 32;
  int64_t n, c, t, first, step;
  bool mine;
  if constexpr (Channels) {
    const int64_t frame = blockIdx.x / groups;
    n = frame / p.T, t = frame % p.T, c = blockIdx.x % groups * 32 + lane;
    first = warp, step = gate_warps;
    mine = c < p.C;
  } else {
    const int64_t plane = static_cast<int64_t>(blockIdx.x) * gate_warps + warp;
    t = plane % p.T, c = plane / p.T % p.C, n = plane / p.T / p.C;
    first = lane, step = 32;
    mine = plane < p.N * p.C * p.T;
  }
  S total = 0;
  bool open = true;
  int64_t at = 0;
  if (mine) {
    open = !p.gate || p.gate[n * p.gate_stride];
    at = (n * p.T + t) * p.C + c;
    S factor = pass == GatePass::add ? S(-0.0) : S(1);  // x + -0 is x, for every x
    if (pass != GatePass::squeeze && open) factor = static_cast<const S*>(p.h)[at];
    const auto base = [&](const View& v) { return n * v.n + c * v.c + t * v.t; };
    const int64_t x0 = base(p.x), y0 = base(p.y), grad0 = base(p.grad);
    const T *x = static_cast<const T*>(p.x.data), *grad = static_cast<const T*>(p.grad.data);
    T* y = static_cast<T*>(p.y.data);
    for (int64_t i = first; i < positions; i += step) {
      const int64_t row = i / p.W, column = i % p.W;
      const S value = widen(x[x0 + row * p.x.h + column * p.x.w]);
      S of_grad = 0;
      if (pass == GatePass::backward) of_grad = widen(grad[grad0 + row * p.grad.h + column * p.grad.w]);
      if (pass != GatePass::squeeze)
        y[y0 + row * p.y.h + column * p.y.w] = narrow<T>(pass == GatePass::mul   ? value * factor
                                                         : pass == GatePass::add ? value + factor
                                                                                 : of_grad * factor);
      if (sums) total += pass == GatePass::squeeze ? value : value * of_grad;
    }
  }
  if (!sums) return;
  if constexpr (Channels) {
    S* partial = dynamic_shared<S>();
    partial[threadIdx.x] = total;
    block_barrier();
    if (warp > 0) return;
    total = 0;
    for (int w = 0; w < gate_warps; ++w) total += partial[w * 32 + lane];
  } else {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
    mine = mine && lane == 0;
  }
  if (mine)
    static_cast<S*>(p.sums)[at] = pass == GatePass::squeeze ? total / static_cast<S>(positions) : open ? total : S(0);
}

template <typename T>
Error launch_as(const GateData& p, Stream stream) {
  const bool channels = p.x.c == 1 && p.C > 1 && !(p.x.w == 1 && p.W > 1);
  const int64_t blocks = channels ? p.N * p.T * ((p.C + 31) / 32) : (p.N * p.C * p.T + gate_warps - 1) / gate_warps;
  if (blocks == 0) return {};
  if (blocks > INT32_MAX) return "srtg: too many frames for one launch";
  const size_t shared = channels ? gate_threads * sizeof(Accumulator<T>) : 0;
  return launch("srtg gate_pass", channels ? gate_pass<T, true> : gate_pass<T, false>,
                dim3(static_cast<unsigned>(blocks)), dim3(gate_threads), shared, stream, p);
}

}  // namespace

Scratch gate_scratch(const GateData&) { return {}; }

Text gate_data_path(const GateData& p, void*, Stream stream) {
  switch (p.dtype) {
    case DType::f64: return launch_as<double>(p, stream);
    case DType::f32: return launch_as<float>(p, stream);
    case DType::bf16: return launch_as<__nv_bfloat16>(p, stream);
    default: return launch_as<__half>(p, stream);
  }
}

}  // namespace rcu_ops::cuda
