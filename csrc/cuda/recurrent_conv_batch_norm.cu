// The passes of recurrent_conv_batch_norm on CUDA devices: statistics, normalisation, and its gradient.
#include "cuda/recurrent_conv_batch_norm.h"

#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/launch.h"
#include "cuda/device/pack.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shared_memory.h"
#include "cuda/device/shuffle.h"

namespace rcu_ops::cuda {
namespace {

constexpr int norm_threads = 256, norm_warps = norm_threads / 32;

// A part is `size` consecutive positions q = ((n T + t) H + h) W + w, the unit of partial sums; the sizes alone decide.
// H and W, and then T too, are one dimension W where positions lie at even distances.
struct NormParts {
  int64_t positions = 0, parts = 0, size = 0;
  int64_t step_n = 0, step_t = 0, step_h = 0, step_w = 0;
  bool channels = false;
  int pack = 1;              // adjacent numbers of a load
  int lanes = norm_threads;  // threads side by side along adjacent numbers
};

NormParts norm_parts(Norm& p) {
  NormParts plan;
  plan.channels = p.h.c == 1 && p.C > 1 && !(p.h.w == 1 && p.W > 1);
  plan.positions = p.N * p.T * p.H * p.W;
  plan.size = plan.channels ? 512 : 4096;
  plan.parts = (plan.positions + plan.size - 1) / plan.size;
  if (plan.positions == 0) return plan;
  View* const views[] = {&p.h, &p.other, &p.y, &p.out};
  if (merge_dimensions(p.H, p.W, &View::h, &View::w, views)) merge_dimensions(p.T, p.W, &View::t, &View::w, views);
  const int pack = pack_numbers(p.dtype);
  const bool merged = p.T == 1 && p.H == 1;
  if (plan.channels) {
    if (merged && can_pack(pack, p.C, &View::c, {p.N, p.T, p.H, p.W}, {&View::n, &View::t, &View::h, &View::w}, views))
      plan.pack = pack;
    // a whole cache line, and no more, so that there are many blocks
    plan.lanes = plan.pack == 1 ? 32 : static_cast<int>(128 / (pack * element_size(p.dtype)));
  } else if (merged &&
             can_pack(pack, p.W, &View::w, {p.N, p.C, p.T, p.H}, {&View::n, &View::c, &View::t, &View::h}, views)) {
    plan.pack = pack;
    p.W /= pack;  // from here on a dimension of packs
    for (View* view : views) view->w *= pack;
  }
  // How far a thread goes from one of its loads to the next: threads divide once.
  const int64_t step = norm_threads / (plan.channels ? plan.lanes : 1);
  plan.step_w = step % p.W, plan.step_h = step / p.W % p.H, plan.step_t = step / p.W / p.H % p.T;
  plan.step_n = step / p.W / p.H / p.T;
  return plan;
}

bool reduces(const Norm& p) { return p.pass == NormPass::moments || p.pass == NormPass::sums; }

// The sums over the block's threads, or over those of the same lane (Channels), the same for all of them and in a fixed
// order: lanes in pairs of pairs, then warps one after the other. All threads; `shared`: 32 V numbers per warp.
template <bool Channels, int V, typename S>
__device__ __forceinline__ void block_sum(S (&values)[V], S* shared, int lanes) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % lanes;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    for (int mask = Channels ? lanes : 1; mask < 32; mask *= 2) values[v] += shuffle_xor(values[v], mask);
    if (threadIdx.x % 32 < static_cast<unsigned>(Channels ? lanes : 1))
      shared[(warp * V + v) * (Channels ? lanes : 1) + (Channels ? lane : 0)] = values[v];
  }
  block_barrier();
#pragma unroll
  for (int v = 0; v < V; ++v) {
    values[v] = 0;
    for (int w = 0; w < norm_warps; ++w)
      values[v] += shared[(w * V + v) * (Channels ? lanes : 1) + (Channels ? lane : 0)];
  }
  block_barrier();  // everybody has read; the memory may be used again
}

// A position, or a pack of them.
struct Place {
  int64_t n, t, h, w;
};

// One pass (common/recurrent_conv_batch_norm.h), any strides, T in {double, float, uint16_t: bf16 or fp16},
// arithmetic in S = Accumulator<T>. A load moves V numbers; with V > 1, T and H are merged into W.
//
// Work.     Along positions: a block owns one part of one channel, a thread every 256th of its loads. Along channels
//           (Channels): a block owns one part of lanes * V channels, a thread is V channels, rows of `lanes` threads
//           take the positions in turn. Choose the one along which h's numbers are adjacent.
// Memory.   Shared: V numbers per thread at most, for sums over the block. `moments` sweeps its part twice, the second
//           time from L2: the mean, then what deviates from it, so that a large mean costs the variance nothing. A
//           thread has several loads on their way where they are packs.
// Output.   partial[channel][part][2], fp64: the part's mean and squared deviations, or sum dz and sum dz (h - mean);
//           else y or out. Every element has one writer; y and out overlap no input.
// Order.    A thread's positions in ascending order, then block_sum: no atomics.
// Bound.    Bytes: 1 (moments), 2 or 3 (normalize), 2 to 4 (sums), 3 (gradient) numbers per element.
template <typename T, bool Channels, int V>
__global__ void __launch_bounds__(norm_threads, V > 1 ? 2 : 3)
    norm_pass(const Norm p, const NormParts plan, double* partial) {
  using S = Accumulator<T>;
  constexpr int owned = Channels ? V : 1;  // channels of a thread
  constexpr bool merged = V > 1;
  constexpr int in_flight = !merged ? 1 : Channels && sizeof(T) == 4 ? 3 : 4;
  S* shared = dynamic_shared<S>();
  const int lanes = plan.lanes, row = Channels ? static_cast<int>(threadIdx.x) / lanes : 0;
  const int64_t groups = Channels ? (p.C + lanes * V - 1) / (lanes * V) : 0;
  const int64_t above = quotient(blockIdx.x, Channels ? groups : plan.parts);
  const int64_t rest_of_block = blockIdx.x - above * (Channels ? groups : plan.parts);
  const int64_t part = Channels ? above : rest_of_block;
  const int64_t c = Channels ? (rest_of_block * lanes + static_cast<int>(threadIdx.x) % lanes) * V : above;
  const int64_t begin = part * plan.size;
  const int64_t end = begin + plan.size < plan.positions ? begin + plan.size : plan.positions;
  const bool mine = c < p.C, bf16 = p.dtype == DType::bf16;
  const T *h_data = static_cast<const T*>(p.h.data), *other_data = static_cast<const T*>(p.other.data);
  T *y_data = static_cast<T*>(p.y.data), *out_data = static_cast<T*>(p.out.data);
  const bool reads_y = y_data && p.pass != NormPass::normalize;

  const auto offset = [&](const View& v, const Place& at) {
    return at.n * v.n + c * v.c + (merged ? 0 : at.t * v.t + at.h * v.h) + at.w * v.w;
  };
  // Calls visit(place, pack of h, of other, of y) for the thread's loads.
  const auto sweep = [&](bool with_others, auto visit) {
    if (!mine) return;
    constexpr int64_t positions_of_a_load = Channels ? 1 : V;
    const int64_t loads_end = end / positions_of_a_load;
    int64_t q = begin / positions_of_a_load + (Channels ? row : static_cast<int>(threadIdx.x));
    const int64_t above_w = quotient(q, p.W);
    Place at{above_w, 0, 0, q - above_w * p.W};
    if constexpr (!merged) {
      const int64_t above_h = quotient(above_w, p.H);
      at.n = quotient(above_h, p.T);
      at.h = above_w - above_h * p.H, at.t = above_h - at.n * p.T;
    }
    const int64_t step = Channels ? norm_threads / lanes : norm_threads;
    while (q < loads_end) {
      Place places[in_flight];
      Pack<T, V> from_h[in_flight], from_other[in_flight], from_y[in_flight];
      if constexpr (!merged) from_h[0] = from_other[0] = from_y[0] = {};  // for compilers who cannot see that they are
#pragma unroll
      for (int u = 0; u < in_flight; ++u) {
        places[u] = at;
        if (q + u * step < loads_end) {
          from_h[u] = load_pack<V>(h_data + offset(p.h, at));
          if (with_others && other_data) from_other[u] = load_pack<V>(other_data + offset(p.other, at));
          if (with_others && reads_y) from_y[u] = load_pack<V>(y_data + offset(p.y, at));
        }
        at.w += plan.step_w, at.n += plan.step_n;
        if constexpr (!merged) at.h += plan.step_h, at.t += plan.step_t;
        if (at.w >= p.W) at.w -= p.W, ++(merged ? at.n : at.h);
        if constexpr (!merged) {
          if (at.h >= p.H) at.h -= p.H, ++at.t;
          if (at.t >= p.T) at.t -= p.T, ++at.n;
        }
      }
#pragma unroll
      for (int u = 0; u < in_flight; ++u)
        if (q + u * step < loads_end) visit(places[u], from_h[u], from_other[u], from_y[u]);
      q += in_flight * step;
    }
  };

  const bool writes_partial = mine && (Channels ? row == 0 : threadIdx.x == 0);
  double* to = partial + (c * plan.parts + part) * 2;
  if (p.pass == NormPass::moments) {
    S center[owned] = {}, rest[owned] = {}, squares[owned] = {};
    sweep(false, [&](const Place&, const Pack<T, V>& from_h, const Pack<T, V>&, const Pack<T, V>&) {
      const Pack<S, V> wide_h = widen(from_h, bf16);
#pragma unroll
      for (int v = 0; v < V; ++v) center[Channels ? v : 0] += wide_h.v[v];
    });
    const S count = static_cast<S>(end - begin);
    block_sum<Channels, owned>(center, shared, lanes);
#pragma unroll
    for (int k = 0; k < owned; ++k) center[k] /= count;
    sweep(false, [&](const Place&, const Pack<T, V>& from_h, const Pack<T, V>&, const Pack<T, V>&) {
      const Pack<S, V> wide_h = widen(from_h, bf16);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int k = Channels ? v : 0;
        const S deviation = wide_h.v[v] - center[k];
        rest[k] += deviation;
        squares[k] = fma(deviation, deviation, squares[k]);
      }
    });
    block_sum<Channels, owned>(rest, shared, lanes);
    block_sum<Channels, owned>(squares, shared, lanes);
    if (!writes_partial) return;
#pragma unroll
    for (int k = 0; k < owned; ++k) {  // what rounding did to the center is taken out again
      const double apart = static_cast<double>(rest[k]) / static_cast<double>(count);
      to[k * plan.parts * 2] = static_cast<double>(center[k]) + apart;
      to[k * plan.parts * 2 + 1] = static_cast<double>(squares[k]) - static_cast<double>(rest[k]) * apart;
    }
    return;
  }

  // Of the deviations and of one: what `gradient` multiplies, and what `sums` adds up; registers are scarce.
  S slope[owned] = {}, constant[owned] = {};
  S mean[owned] = {}, scale[owned] = {}, shift[owned] = {};
  if (mine) {
#pragma unroll
    for (int k = 0; k < owned; ++k) {
      const S* moments = static_cast<const S*>(p.moments) + c + k;
      const S count = moments[2 * p.C] > 1 ? moments[2 * p.C] : S(1);
      const S inverse = S(1) / sqrt(moments[p.C] / count + static_cast<S>(p.eps));
      mean[k] = moments[0];
      scale[k] = p.gamma ? inverse * static_cast<const S*>(p.gamma)[c + k] : inverse;
      shift[k] = p.beta ? static_cast<const S*>(p.beta)[c + k] : S(0);
      if (p.pass == NormPass::gradient && p.sums) {
        slope[k] = -scale[k] * inverse * static_cast<const S*>(p.sums)[p.C + c + k] / count;
        constant[k] = -scale[k] * static_cast<const S*>(p.sums)[c + k] / count;
      }
    }
  }
  sweep(true, [&](const Place& at, const Pack<T, V>& from_h, const Pack<T, V>& from_other, const Pack<T, V>& from_y) {
    const Pack<S, V> wide_h = widen(from_h, bf16);
    Pack<S, V> deviation, z, other = {}, result;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int k = Channels ? v : 0;
      deviation.v[v] = wide_h.v[v] - mean[k];
      z.v[v] = fma(deviation.v[v], scale[k], shift[k]);
    }
    if (other_data) other = widen(from_other, bf16);
    if (p.pass == NormPass::normalize) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const S y = other_data ? z.v[v] + other.v[v] : z.v[v];
        result.v[v] = p.relu && y < 0 ? S(0) : y;  // NaN stays
      }
      store_pack<V>(y_data + offset(p.y, at), narrow<T>(result, bf16));
      return;
    }
    if (reads_y) z = widen(from_y, bf16);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int k = Channels ? v : 0;
      const S dz = p.relu && z.v[v] <= 0 ? S(0) : other.v[v];
      if (p.pass == NormPass::sums) {
        constant[k] += dz;
        slope[k] = fma(dz, deviation.v[v], slope[k]);
        result.v[v] = dz;
      } else {
        result.v[v] = fma(scale[k], dz, fma(slope[k], deviation.v[v], constant[k]));
      }
    }
    if (out_data) store_pack<V>(out_data + offset(p.out, at), narrow<T>(result, bf16));
  });
  if (p.pass != NormPass::sums) return;
  block_sum<Channels, owned>(constant, shared, lanes);
  block_sum<Channels, owned>(slope, shared, lanes);
  if (!writes_partial) return;
#pragma unroll
  for (int k = 0; k < owned; ++k) {
    to[k * plan.parts * 2] = static_cast<double>(constant[k]);
    to[k * plan.parts * 2 + 1] = static_cast<double>(slope[k]);
  }
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

template <typename T, int V>
Error launch_packs(const Norm& p, const NormParts& plan, double* partial, Stream stream) {
  const int group = plan.lanes * V;
  const int64_t blocks = plan.parts * (plan.channels ? (p.C + group - 1) / group : p.C);
  if (blocks > INT32_MAX) return "recurrent_conv_batch_norm: too many positions for one launch";
  if (blocks == 0) return {};
  return launch("recurrent_conv_batch_norm norm_pass", plan.channels ? norm_pass<T, true, V> : norm_pass<T, false, V>,
                dim3(static_cast<unsigned>(blocks)), dim3(norm_threads), norm_threads * V * sizeof(Accumulator<T>),
                stream, p, plan, partial);
}

template <typename T>
Error launch_as(const Norm& p, const NormParts& plan, double* partial, Stream stream) {
  Error error;
  if constexpr (sizeof(T) < 8) {
    error =
        plan.pack == 4 ? launch_packs<T, 4>(p, plan, partial, stream) : launch_packs<T, 1>(p, plan, partial, stream);
  } else {
    error = launch_packs<T, 1>(p, plan, partial, stream);
  }
  if (!error.empty() || !reduces(p)) return error;
  return launch("recurrent_conv_batch_norm norm_finish", norm_finish<Accumulator<T>>,
                dim3(static_cast<unsigned>((p.C + norm_warps - 1) / norm_warps)), dim3(norm_threads), 0, stream, p,
                plan, partial);
}

}  // namespace

Scratch batch_norm_scratch(const Norm& problem) {
  Norm p = problem;
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

Text batch_norm(const Norm& problem, void* scratch, Stream stream) {
  Norm p = problem;
  const NormParts plan = norm_parts(p);
  double* partial = static_cast<double*>(scratch);
  switch (p.dtype) {
    case DType::f64: return launch_as<double>(p, plan, partial, stream);
    case DType::f32: return launch_as<float>(p, plan, partial, stream);
    default: return launch_as<uint16_t>(p, plan, partial, stream);
  }
}

}  // namespace rcu_ops::cuda
