// The data path of an SRTG block on CUDA devices.
#include "cuda/srtg.h"

#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/launch.h"
#include "cuda/device/pack.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shared_memory.h"
#include "cuda/device/shuffle.h"

namespace rcu_ops::cuda {
namespace {

constexpr int gate_threads = 256, gate_warps = gate_threads / 32;

// How threads share the work. Host code makes it, and merges H and W into W where positions lie at even distances.
struct GatePlan {
  int lanes = 32;  // side by side along adjacent numbers, a power of two
  int pack = 1;    // adjacent numbers of a load
};

// Threads of a block side by side, and blocks, so that a thread has few loads after which it is done (along positions),
// and that rows of a whole cache line fill many blocks (along channels).
GatePlan gate_plan(GateData& p, bool& channels) {
  View* const views[] = {&p.x, &p.y, &p.grad};
  channels = p.x.c == 1 && p.C > 1 && !(p.x.w == 1 && p.W > 1);
  merge_dimensions(p.H, p.W, &View::h, &View::w, views);
  GatePlan plan;
  plan.pack = pack_numbers(p.dtype);
  const bool packs =
      channels
          ? can_pack(plan.pack, p.C, &View::c, {p.N, p.T, p.H, p.W}, {&View::n, &View::t, &View::h, &View::w}, views)
          : can_pack(plan.pack, p.W, &View::w, {p.N, p.C, p.T, p.H}, {&View::n, &View::c, &View::t, &View::h}, views);
  if (!packs) plan.pack = 1;
  if (channels) {
    plan.lanes = plan.pack == 1 ? 32 : static_cast<int>(128 / (plan.pack * element_size(p.dtype)));
  } else {
    const int64_t loads = p.H * p.W / plan.pack;
    while (plan.lanes > 4 && loads * 2 <= 8 * plan.lanes) plan.lanes /= 2;
  }
  return plan;
}

// One pass (common/srtg.h), any strides, T in {double, float, uint16_t: bf16 or fp16}, arithmetic in S =
// Accumulator<T>. A load moves V numbers.
//
// Work.     Along positions: plan.lanes threads side by side own a frame of one channel; each takes every lanes-th
//           load. Along channels (Channels): a block owns lanes * V channels of one frame, rows of `lanes` threads take
//           its positions in turn. Choose the one along which x's numbers are adjacent.
// Memory.   Shared, along channels: a sum of every warp's lanes. x and grad are read once, y is written once; a thread
//           has several loads on their way.
// Order.    A thread adds up its positions in order; then threads in pairs of pairs, then warps in order. No atomics.
// Aliasing. y overlaps no input. Every element has one writer.
// Bound.    Bytes.
template <typename T, bool Channels, int V>
__global__ void __launch_bounds__(gate_threads, 2) gate_pass(const GateData p, const GatePlan plan) {
  using S = Accumulator<T>;
  constexpr int sums_of_a_thread = Channels ? V : 1;
  constexpr int in_flight = V * sizeof(T) == 8 && V > 1 ? 8 : 4;
  const GatePass pass = p.pass;
  const bool has_sums = pass == GatePass::squeeze || pass == GatePass::backward, bf16 = p.dtype == DType::bf16;
  const int lane = static_cast<int>(threadIdx.x) % plan.lanes, row = static_cast<int>(threadIdx.x) / plan.lanes;
  const int rows = gate_threads / plan.lanes;
  int64_t n, c, t, first, step, loads = p.H * p.W;
  bool mine;
  if constexpr (Channels) {
    const int64_t groups = (p.C + plan.lanes * V - 1) / (plan.lanes * V), frame = quotient(blockIdx.x, groups);
    n = quotient(frame, p.T), t = frame - n * p.T;
    c = ((blockIdx.x - frame * groups) * plan.lanes + lane) * V;
    first = row, step = rows;
    mine = c < p.C;
  } else {
    const int64_t plane = static_cast<int64_t>(blockIdx.x) * rows + row, channel = quotient(plane, p.T);
    t = plane - channel * p.T, n = quotient(channel, p.C), c = channel - n * p.C;
    first = lane, step = plan.lanes;
    loads /= V;  // whole rows of packs
    mine = plane < p.N * p.C * p.T;
  }
  S total[sums_of_a_thread] = {};
  bool open = true;
  int64_t at = 0;
  if (mine) {
    open = !p.gate || p.gate[n * p.gate_stride];
    at = (n * p.T + t) * p.C + c;
    S factor[sums_of_a_thread];
#pragma unroll
    for (int k = 0; k < sums_of_a_thread; ++k) {
      factor[k] = pass == GatePass::add ? S(-0.0) : S(1);  // x + -0 is x, for every x
      if (pass != GatePass::squeeze && open) factor[k] = static_cast<const S*>(p.h)[at + k];
    }
    const auto base = [&](const View& v) { return static_cast<T*>(v.data) + (n * v.n + c * v.c + t * v.t); };
    const T *x = base(p.x), *grad = base(p.grad);
    T* y = base(p.y);
    // Of load i: along channels a position, else a pack of positions.
    const auto offset = [&](const View& v, int64_t i) {
      const int64_t position = Channels ? i : i * V;
      if (p.H == 1) return position * v.w;
      const int64_t line = quotient(position, p.W);
      return line * v.h + (position - line * p.W) * v.w;
    };
    for (int64_t i = first; i < loads; i += step * in_flight) {
      Pack<T, V> xs[in_flight], grads[in_flight];
#pragma unroll
      for (int u = 0; u < in_flight; ++u)
        if (i + u * step < loads) {
          xs[u] = load_pack<V>(x + offset(p.x, i + u * step));
          if (pass == GatePass::backward) grads[u] = load_pack<V>(grad + offset(p.grad, i + u * step));
        }
#pragma unroll
      for (int u = 0; u < in_flight; ++u)
        if (i + u * step < loads) {
          const Pack<S, V> value = widen(xs[u], bf16);
          Pack<S, V> result;
          if (pass == GatePass::squeeze) {
#pragma unroll
            for (int v = 0; v < V; ++v) total[Channels ? v : 0] += value.v[v];
            continue;
          }
          if (pass == GatePass::backward) {
            const Pack<S, V> of_grad = widen(grads[u], bf16);
#pragma unroll
            for (int v = 0; v < V; ++v) {
              total[Channels ? v : 0] += value.v[v] * of_grad.v[v];
              result.v[v] = of_grad.v[v] * factor[Channels ? v : 0];
            }
          } else if (pass == GatePass::mul) {
#pragma unroll
            for (int v = 0; v < V; ++v) result.v[v] = value.v[v] * factor[Channels ? v : 0];
          } else {
#pragma unroll
            for (int v = 0; v < V; ++v) result.v[v] = value.v[v] + factor[Channels ? v : 0];
          }
          store_pack<V>(y + offset(p.y, i + u * step), narrow<T>(result, bf16));
        }
    }
  }
  if (!has_sums) return;
#pragma unroll
  for (int k = 0; k < sums_of_a_thread; ++k)
    for (int mask = Channels ? plan.lanes : 1; mask < (Channels ? 32 : plan.lanes); mask *= 2)
      total[k] += shuffle_xor(total[k], mask);
  if constexpr (Channels) {
    S* partial = dynamic_shared<S>();  // [warp][k][lane]
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (static_cast<int>(threadIdx.x) % 32 < plan.lanes)
#pragma unroll
      for (int k = 0; k < sums_of_a_thread; ++k) partial[(warp * V + k) * plan.lanes + lane] = total[k];
    block_barrier();
    mine = mine && row == 0;
#pragma unroll
    for (int k = 0; k < sums_of_a_thread; ++k) {
      total[k] = 0;
      for (int w = 0; mine && w < gate_warps; ++w) total[k] += partial[(w * V + k) * plan.lanes + lane];
    }
  } else {
    mine = mine && lane == 0;
  }
  if (!mine) return;
#pragma unroll
  for (int k = 0; k < sums_of_a_thread; ++k)
    static_cast<S*>(p.sums)[at + k] = pass == GatePass::squeeze ? total[k] / static_cast<S>(p.H * p.W)
                                      : open                    ? total[k]
                                                                : S(0);
}

template <typename T, int V>
Error launch_packs(const GateData& p, const GatePlan& plan, bool channels, Stream stream) {
  const int rows = gate_threads / plan.lanes, group = plan.lanes * V;
  const int64_t blocks = channels ? p.N * p.T * ((p.C + group - 1) / group) : (p.N * p.C * p.T + rows - 1) / rows;
  if (blocks == 0) return {};
  if (blocks > INT32_MAX) return "srtg: too many frames for one launch";
  const size_t shared = channels ? static_cast<size_t>(gate_warps * group) * sizeof(Accumulator<T>) : 0;
  return launch("srtg gate_pass", channels ? gate_pass<T, true, V> : gate_pass<T, false, V>,
                dim3(static_cast<unsigned>(blocks)), dim3(gate_threads), shared, stream, p, plan);
}

template <typename T>
Error launch_as(GateData p, Stream stream) {
  bool channels = false;
  const GatePlan plan = gate_plan(p, channels);
  if constexpr (sizeof(T) < 8)
    if (plan.pack == 4) return launch_packs<T, 4>(p, plan, channels, stream);
  return launch_packs<T, 1>(p, plan, channels, stream);
}

}  // namespace

Scratch gate_scratch(const GateData&) { return {}; }

Text gate_data_path(const GateData& p, void*, Stream stream) {
  switch (p.dtype) {
    case DType::f64: return launch_as<double>(p, stream);
    case DType::f32: return launch_as<float>(p, stream);
    default: return launch_as<uint16_t>(p, stream);
  }
}

}  // namespace rcu_ops::cuda
