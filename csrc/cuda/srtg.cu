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
  bool channels = false, packs = false;  // x's channels are adjacent; gate_packs takes it
  int lanes = 32;                        // gate_pass: side by side along adjacent numbers, a power of two
  int64_t step_h = 0, step_w = 0;        // gate_pass: from one position of a thread to its next
};

// Threads of a block side by side, and blocks, so that a thread has few loads after which it is done (along positions),
// and that rows of a whole cache line fill many blocks (along channels).
GatePlan gate_plan(GateData& p) {
  View* const views[] = {&p.x, &p.y, &p.grad};
  GatePlan plan;
  plan.channels = p.x.c == 1 && p.C > 1 && !(p.x.w == 1 && p.W > 1);
  const bool merged = merge_dimensions(p.H, p.W, &View::h, &View::w, views);
  const int pack = pack_numbers(p.dtype);
  plan.packs = pack > 1 && merged &&
               (plan.channels ? can_pack(pack, p.C, &View::c, {p.N, p.T, p.W}, {&View::n, &View::t, &View::w}, views)
                              : can_pack(pack, p.W, &View::w, {p.N, p.C, p.T}, {&View::n, &View::c, &View::t}, views));
  const int64_t positions = p.H * p.W;
  while (!plan.channels && plan.lanes > 4 && positions * 2 <= 8 * plan.lanes) plan.lanes /= 2;
  if (positions > 0) {
    const int64_t step = plan.channels ? gate_threads / plan.lanes : plan.lanes;
    plan.step_h = step / p.W, plan.step_w = step % p.W;
  }
  return plan;
}

// y = x factor + shift, x + -0 being x for every x: of mul, of add, and of both where the gate is closed.
template <typename S>
__device__ __forceinline__ void gate_factors(GatePass pass, bool open, S h, S& factor, S& shift) {
  factor = pass != GatePass::add && open ? h : S(1);
  shift = pass == GatePass::add && open ? h : S(-0.0);
}

// One pass (common/srtg.h) where H and W are one dimension and four adjacent numbers lie aligned in all tensors: along
// positions, or along channels (Channels). T in {float, bf16, half}. Pass: squeeze, mul (and add), or backward.
//
// Work.     Along positions: a warp owns a frame of one channel. Along channels: a block owns 128 bytes of channels of
//           one frame, a thread four of them; rows of threads take its positions in turn. groups: blocks of a frame.
// Memory.   Shared, along channels: a sum of every warp's channels. x and grad are read once, y is written once; a
//           thread has up to 128 bytes on their way, a multiprocessor with four blocks up to 128 KB.
// Order.    A thread adds up every fourth number of its positions in order; then those four, then threads in pairs of
//           pairs, then warps in order. No atomics.
// Aliasing. y overlaps no input. Every element has one writer.
// Bound.    Bytes.
template <typename T, bool Channels, GatePass Pass>
__global__ void __launch_bounds__(gate_threads, Channels&& Pass == GatePass::backward ? 3 : 4)
    gate_packs(const GateData p, const unsigned groups) {
  constexpr int V = 4, lanes = Channels ? 128 / (V * static_cast<int>(sizeof(T))) : 32, rows = gate_threads / lanes;
  constexpr int step = Channels ? rows : lanes, owned = Channels ? V : 1;
  constexpr int in_flight = (Channels && sizeof(T) == 4) || Pass == GatePass::backward ? 4 : 8;
  constexpr int64_t loads_at_once = step * in_flight;
  const unsigned frame = blockIdx.x / groups, group = blockIdx.x - frame * groups;
  const unsigned n = frame / static_cast<unsigned>(p.T), t = frame - n * static_cast<unsigned>(p.T);
  const int lane = static_cast<int>(threadIdx.x) % lanes, row = static_cast<int>(threadIdx.x) / lanes;
  const int64_t c =
      Channels ? (static_cast<int64_t>(group) * lanes + lane) * V : static_cast<int64_t>(group) * rows + row;
  const int64_t of_frame = frame * p.C;
  const bool open = !p.gate || p.gate[n * p.gate_stride];
  float total[V] = {};
  if (c < p.C) {
    float factor[owned], shift[owned];
#pragma unroll
    for (int k = 0; k < owned; ++k) {
      const float h = Pass == GatePass::squeeze ? 1.f : static_cast<const float*>(p.h)[of_frame + c + k];
      gate_factors(Pass == GatePass::mul ? p.pass : Pass, open, h, factor[k], shift[k]);
    }
    const int first = Channels ? row : lane;
    const auto start = [&](const View& v) {
      return static_cast<T*>(v.data) + (n * v.n + c * v.c + t * v.t + first * (Channels ? v.w : V));
    };
    const auto to_next = [&](const View& v) { return Channels ? step * v.w : static_cast<int64_t>(step * V); };
    const T *x = start(p.x), *grad = start(p.grad);
    T* y = start(p.y);
    const int64_t loads = Channels ? p.W : p.W / V;
#pragma unroll 1
    for (int64_t done = 0; done < loads; done += loads_at_once) {
      const int left = static_cast<int>(loads - done < loads_at_once ? loads - done : loads_at_once);
      Pack<T, V> xs[in_flight], grads[in_flight];
#pragma unroll
      for (int u = 0; u < in_flight; ++u)
        if (first + u * step < left) {
          xs[u] = load_pack<V>(x + u * to_next(p.x));
          if constexpr (Pass == GatePass::backward) grads[u] = load_pack<V>(grad + u * to_next(p.grad));
        }
#pragma unroll
      for (int u = 0; u < in_flight; ++u)
        if (first + u * step < left) {
          const Pack<float, V> value = widen(xs[u]);
          Pack<float, V> result;
          if constexpr (Pass == GatePass::backward) {
            const Pack<float, V> of_grad = widen(grads[u]);
#pragma unroll
            for (int v = 0; v < V; ++v) {
              total[v] += value.v[v] * of_grad.v[v];
              result.v[v] = of_grad.v[v] * factor[Channels ? v : 0];
            }
          } else {
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const int k = Channels ? v : 0;
              if constexpr (Pass == GatePass::squeeze)
                total[v] += value.v[v];
              else
                result.v[v] = fma(value.v[v], factor[k], shift[k]);
            }
          }
          if constexpr (Pass != GatePass::squeeze) store_pack<V>(y + u * to_next(p.y), narrow<T>(result));
        }
      x += in_flight * to_next(p.x), grad += in_flight * to_next(p.grad), y += in_flight * to_next(p.y);
    }
  }
  if constexpr (Pass != GatePass::mul) {
    const auto put = [&](int64_t channel, float sum) {
      static_cast<float*>(p.sums)[of_frame + channel] = Pass == GatePass::squeeze ? sum / static_cast<float>(p.W)
                                                        : open                    ? sum
                                                                                  : 0.f;
    };
    if constexpr (Channels) {
      float* partial = dynamic_shared<float>();  // [warp][lane][v]
#pragma unroll
      for (int v = 0; v < V; ++v) {
#pragma unroll
        for (int mask = lanes; mask < 32; mask *= 2) total[v] += shuffle_xor(total[v], mask);
        if (threadIdx.x % 32 < lanes) partial[(threadIdx.x / 32 * lanes + lane) * V + v] = total[v];
      }
      block_barrier();
      const int64_t channel = static_cast<int64_t>(group) * lanes * V + threadIdx.x;
      if (threadIdx.x >= lanes * V || channel >= p.C) return;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < gate_warps; ++w) sum += partial[w * lanes * V + threadIdx.x];
      put(channel, sum);
    } else {
      float sum = (total[0] + total[1]) + (total[2] + total[3]);
#pragma unroll
      for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
      if (c < p.C && lane == 0) put(c, sum);
    }
  }
}

// One pass, any strides, T in {double, float, uint16_t: bf16 or fp16}, arithmetic in S = Accumulator<T>. As gate_packs,
// number by number; plan.lanes threads own a frame of one channel, or a block that many channels of one frame. A thread
// has four loads on their way, and walks from one to the next without dividing.
template <typename T>
__global__ void __launch_bounds__(gate_threads, 2) gate_pass(const GateData p, const GatePlan plan) {
  using S = Accumulator<T>;
  constexpr int in_flight = 4;
  const GatePass pass = p.pass;
  const bool bf16 = p.dtype == DType::bf16, backward = pass == GatePass::backward;
  const int lane = static_cast<int>(threadIdx.x) % plan.lanes, row = static_cast<int>(threadIdx.x) / plan.lanes;
  const int rows = gate_threads / plan.lanes;
  int64_t n, c, t;
  bool mine;
  if (plan.channels) {
    const int64_t groups = (p.C + plan.lanes - 1) / plan.lanes, frame = quotient(blockIdx.x, groups);
    n = quotient(frame, p.T), t = frame - n * p.T;
    c = (blockIdx.x - frame * groups) * plan.lanes + lane;
    mine = c < p.C;
  } else {
    const int64_t plane = static_cast<int64_t>(blockIdx.x) * rows + row, channel = quotient(plane, p.T);
    t = plane - channel * p.T, n = quotient(channel, p.C), c = channel - n * p.C;
    mine = plane < p.N * p.C * p.T;
  }
  const int64_t at = (n * p.T + t) * p.C + c, positions = p.H * p.W;
  S total = 0;
  bool open = true;
  if (mine) {
    open = !p.gate || p.gate[n * p.gate_stride];
    S factor, shift;
    gate_factors(pass, open, pass == GatePass::squeeze ? S(1) : static_cast<const S*>(p.h)[at], factor, shift);
    const auto start = [&](const View& v) { return static_cast<T*>(v.data) + (n * v.n + c * v.c + t * v.t); };
    const T *x = start(p.x), *grad = start(p.grad);
    T* y = start(p.y);
    const int step = plan.channels ? rows : plan.lanes;
    int64_t i = plan.channels ? row : lane, h = quotient(i, p.W), w = i - h * p.W;
    const auto walk = [&] {
      h += plan.step_h, w += plan.step_w;
      if (w >= p.W) w -= p.W, ++h;
    };
    for (; i < positions; i += step * in_flight) {
      T xs[in_flight], grads[in_flight];
      const int64_t first_h = h, first_w = w;
#pragma unroll
      for (int u = 0; u < in_flight; ++u, walk()) {
        xs[u] = grads[u] = T();
        if (i + u * step >= positions) continue;
        xs[u] = x[h * p.x.h + w * p.x.w];
        if (backward) grads[u] = grad[h * p.grad.h + w * p.grad.w];
      }
      h = first_h, w = first_w;
#pragma unroll
      for (int u = 0; u < in_flight; ++u, walk()) {
        if (i + u * step >= positions) continue;
        const S value = widen(xs[u], bf16), of_grad = widen(grads[u], bf16);
        if (pass == GatePass::squeeze)
          total += value;
        else
          y[h * p.y.h + w * p.y.w] = narrow<T>(fma(backward ? of_grad : value, factor, shift), bf16);
        if (backward) total += value * of_grad;
      }
    }
  }
  if (pass != GatePass::squeeze && !backward) return;
#pragma unroll 1
  for (int mask = plan.channels ? plan.lanes : 1; mask < (plan.channels ? 32 : plan.lanes); mask *= 2)
    total += shuffle_xor(total, mask);
  if (plan.channels) {  // 32 lanes: a warp is a row
    S* partial = dynamic_shared<S>();
    partial[threadIdx.x] = total;
    block_barrier();
    total = 0;
#pragma unroll
    for (int other = 0; other < gate_warps; ++other) total += partial[other * 32 + lane];
  }
  if (!mine || (plan.channels ? row : lane) > 0) return;
  static_cast<S*>(p.sums)[at] = pass == GatePass::squeeze ? total / static_cast<S>(positions) : open ? total : S(0);
}

template <typename T, bool Channels>
Error launch_packs(const GateData& p, Stream stream) {
  const int64_t group = Channels ? 128 / static_cast<int64_t>(sizeof(T)) : gate_warps;
  const int64_t groups = (p.C + group - 1) / group, blocks = p.N * p.T * groups;
  if (blocks == 0) return {};
  if (blocks > INT32_MAX) return "srtg: too many frames for one launch";
  const auto kernel = p.pass == GatePass::squeeze    ? gate_packs<T, Channels, GatePass::squeeze>
                      : p.pass == GatePass::backward ? gate_packs<T, Channels, GatePass::backward>
                                                     : gate_packs<T, Channels, GatePass::mul>;
  const size_t shared = Channels ? static_cast<size_t>(gate_warps * group) * sizeof(float) : 0;
  return launch("srtg gate_packs", kernel, dim3(static_cast<unsigned>(blocks)), dim3(gate_threads), shared, stream, p,
                static_cast<unsigned>(groups));
}

template <typename T>
Error launch_as(const GateData& p, const GatePlan& plan, Stream stream) {
  const int64_t rows = gate_threads / plan.lanes;
  const int64_t blocks =
      plan.channels ? p.N * p.T * ((p.C + plan.lanes - 1) / plan.lanes) : (p.N * p.C * p.T + rows - 1) / rows;
  if (blocks == 0) return {};
  if (blocks > INT32_MAX) return "srtg: too many frames for one launch";
  const size_t shared = plan.channels ? gate_threads * sizeof(Accumulator<T>) : 0;
  return launch("srtg gate_pass", gate_pass<T>, dim3(static_cast<unsigned>(blocks)), dim3(gate_threads), shared, stream,
                p, plan);
}

}  // namespace

Scratch gate_scratch(const GateData&) { return {}; }

Text gate_data_path(const GateData& problem, void*, Stream stream) {
  GateData p = problem;
  const GatePlan plan = gate_plan(p);
  if (plan.packs) switch (p.dtype) {
      case DType::f32:
        return plan.channels ? launch_packs<float, true>(p, stream) : launch_packs<float, false>(p, stream);
      case DType::bf16:
        return plan.channels ? launch_packs<__nv_bfloat16, true>(p, stream)
                             : launch_packs<__nv_bfloat16, false>(p, stream);
      default: return plan.channels ? launch_packs<__half, true>(p, stream) : launch_packs<__half, false>(p, stream);
    }
  switch (p.dtype) {
    case DType::f64: return launch_as<double>(p, plan, stream);
    case DType::f32: return launch_as<float>(p, plan, stream);
    default: return launch_as<uint16_t>(p, plan, stream);
  }
}

}  // namespace rcu_ops::cuda
