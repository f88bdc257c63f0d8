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

// A part is `size` consecutive positions, the unit of partial sums; sizes, layout and alignment decide. It lies
// within a run of `run` positions, whose last part has the rest: all positions q = ((n T + t) H + h) W + w in norm_pass,
// those of a sample in norm_packs. H and W, and then T too, are one dimension W where positions lie at even distances.
struct NormParts {
  int64_t positions = 0, run = 0, pieces = 1, parts = 0, size = 0;  // pieces: parts of a run
  int64_t step_n = 0, step_t = 0, step_h = 0, step_w = 0;           // norm_pass: from a thread's position to its next
  bool channels = false, packs = false;                             // h's channels are adjacent; norm_packs takes it
};

constexpr int norm_pack = 4, norm_lanes = 32;  // numbers of a load of norm_packs; channels side by side in norm_pass
// Channels of a block of norm_packs: 128 bytes of adjacent ones, or a warp's one each.
template <bool Channels, typename T>
constexpr int norm_group = Channels ? 128 / static_cast<int>(sizeof(T)) : norm_warps;

void cut_run(NormParts& plan, int64_t run, int64_t runs, int64_t most, int64_t multiple) {
  plan.run = run, plan.pieces = ceil_div(run, most);
  plan.size = round_up(ceil_div(run, plan.pieces), multiple);
  plan.pieces = ceil_div(run, plan.size), plan.parts = runs * plan.pieces;
}

NormParts norm_parts(Norm& p) {
  NormParts plan;
  plan.channels = p.h.c == 1 && p.C > 1 && !(p.h.w == 1 && p.W > 1);
  plan.positions = p.N * p.T * p.H * p.W;
  if (plan.positions == 0) return plan;
  View* const views[] = {&p.h, &p.other, &p.y, &p.out};
  const bool merged =
      merge_dimensions(p.H, p.W, &View::h, &View::w, views) && merge_dimensions(p.T, p.W, &View::t, &View::w, views);
  plan.packs = pack_numbers(p.dtype) == norm_pack && merged &&
               (plan.channels ? can_pack(norm_pack, p.C, &View::c, {p.N, p.W}, {&View::n, &View::w}, views)
                              : can_pack(norm_pack, p.W, &View::w, {p.N, p.C}, {&View::n, &View::c}, views));
  const int64_t most = plan.channels ? 512 : 4096;
  if (plan.packs) {
    cut_run(plan, p.W, p.N, most, plan.channels ? 1 : 32 * norm_pack);
    return plan;
  }
  cut_run(plan, plan.positions, 1, most, 1);
  // How far a thread goes from one of its loads to the next: threads divide once.
  const int64_t step = norm_threads / (plan.channels ? norm_lanes : 1);
  plan.step_w = step % p.W, plan.step_h = step / p.W % p.H, plan.step_t = step / p.W / p.H % p.T;
  plan.step_n = step / p.W / p.H / p.T;
  return plan;
}

bool reduces(const Norm& p) { return p.pass == NormPass::moments || p.pass == NormPass::sums; }

// What every number of a channel is multiplied by and added to; slope and constant are of the gradient alone: of the
// deviation and of one.
template <typename S>
struct OfChannel {
  S mean, scale, shift, slope, constant;
};
template <typename S>
__device__ __forceinline__ OfChannel<S> of_channel(const Norm& p, bool gradient, int64_t c) {
  const S* moments = static_cast<const S*>(p.moments) + c;
  const S count = moments[2 * p.C] > 1 ? moments[2 * p.C] : S(1);
  const S inverse = S(1) / sqrt(moments[p.C] / count + static_cast<S>(p.eps));
  OfChannel<S> of{moments[0], p.gamma ? inverse * static_cast<const S*>(p.gamma)[c] : inverse,
                  p.beta ? static_cast<const S*>(p.beta)[c] : S(0), S(0), S(0)};
  if (gradient && p.sums) {
    of.slope = -of.scale * inverse * static_cast<const S*>(p.sums)[p.C + c] / count;
    of.constant = -of.scale * static_cast<const S*>(p.sums)[c] / count;
  }
  return of;
}

// A part's mean and squared deviations, from `count` numbers around `center`, sum and squares of what is left of them:
// what rounding did to the center is taken out again.
template <typename S>
__device__ __forceinline__ void put_moments(double* to, S center, S rest, S squares, S count) {
  const double apart = static_cast<double>(rest) / static_cast<double>(count);
  to[0] = static_cast<double>(center) + apart;
  to[1] = static_cast<double>(squares) - static_cast<double>(rest) * apart;
}

// Blocks of norm_packs on a multiprocessor: as many as there are registers for what is on its way and, along channels,
// for the tables of four channels.
template <typename T, bool Channels, NormPass Pass>
constexpr int norm_blocks =
    (sizeof(T) == 2 || Pass == NormPass::moments || Pass == NormPass::normalize ? 4 : 3) - (Channels ? 1 : 0);

// One pass (common/recurrent_conv_batch_norm.h) where T, H and W are one dimension and four adjacent numbers lie aligned
// in all tensors: along positions, or along channels (Channels). T in {float, bf16, half}.
//
// Work.     Along positions: a warp owns a part of one channel. Along channels: a block owns a part of 128 bytes of
//           channels, a thread four of them; rows of threads take the positions in turn. groups: blocks of a part.
// Memory.   Shared, along channels: five numbers per channel, and up to three sums of every warp's channels. `moments`
//           sweeps its part twice, the second time from L1 or L2: the mean, then what deviates from it, so that a large
//           mean costs the variance nothing. A thread has 32 or 64 bytes of every tensor on their way, a multiprocessor
//           two to four blocks.
// Output.   partial[channel][part][2], fp64: the part's mean and squared deviations, or sum dz and sum dz (h - mean);
//           else y or out. Every element has one writer; y and out overlap no input.
// Order.    A thread adds up every fourth number of its positions in order; along positions those four, then threads in
//           pairs of pairs, then warps in order. No atomics.
// Bound.    Bytes: 1 (moments), 2 or 3 (normalize), 2 to 4 (sums), 3 (gradient) numbers per element.
template <typename T, bool Channels, NormPass Pass>
__global__ void __launch_bounds__(norm_threads, norm_blocks<T, Channels, Pass>)
    norm_packs(const Norm p, const NormParts plan, const unsigned groups, double* partial) {
  constexpr int V = norm_pack, lanes = Channels ? norm_group<true, T> / V : 32, rows = norm_threads / lanes;
  constexpr int step = Channels ? rows : lanes, owned = Channels ? V : 1, group_size = Channels ? lanes * V : rows;
  constexpr bool normalizes = Pass == NormPass::normalize, sums = Pass == NormPass::sums;
  constexpr int in_flight = sizeof(T) == 2 && (normalizes || Pass == NormPass::moments) ? 8 : 4;
  const unsigned part = blockIdx.x / groups, group = blockIdx.x - part * groups;
  const unsigned n = part / static_cast<unsigned>(plan.pieces), piece = part - n * static_cast<unsigned>(plan.pieces);
  const int lane = static_cast<int>(threadIdx.x) % lanes, row = static_cast<int>(threadIdx.x) / lanes;
  const int64_t c0 = static_cast<int64_t>(group) * group_size, c = c0 + (Channels ? lane * V : row);
  const int64_t begin = piece * plan.size;
  const int count = static_cast<int>(plan.run - begin < plan.size ? plan.run - begin : plan.size);
  const bool mine = c < p.C;
  const auto start = [&](const View& v) {
    return static_cast<T*>(v.data) + (n * v.n + c * v.c + (Channels ? (begin + row) * v.w : begin + lane * V));
  };
  const auto to_next = [&](const View& v) { return Channels ? step * v.w : static_cast<int64_t>(step * V); };
  float* shared = dynamic_shared<float>();  // tables, then sums
  float* sums_of_warps = shared + 5 * group_size;
  // A warp's sum of every channel to sums_of_warps[number][warp][channel].
  const auto put_sums = [&](int number, Pack<float, V> values) {
#pragma unroll
    for (int v = 0; v < V; ++v)
#pragma unroll
      for (int mask = lanes; mask < 32; mask *= 2) values.v[v] += shuffle_xor(values.v[v], mask);
    if (static_cast<int>(threadIdx.x) % 32 < lanes)
      store_pack<V>(sums_of_warps + (number * norm_warps + threadIdx.x / 32) * group_size + lane * V, values);
  };
  const auto sum_of_warps = [&](int number, int channel) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < norm_warps; ++w) sum += sums_of_warps[(number * norm_warps + w) * group_size + channel];
    return sum;
  };
  const auto sum_of_warp = [&](const Pack<float, V>& values) {
    float sum = (values.v[0] + values.v[1]) + (values.v[2] + values.v[3]);
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
    return sum;
  };
  const int channel_written = Channels ? static_cast<int>(threadIdx.x) : row;
  const bool writes_partial = Channels ? channel_written < group_size && c0 + channel_written < p.C : mine && lane == 0;
  double* put_at = partial + ((c0 + channel_written) * plan.parts + part) * 2;

  if constexpr (Pass == NormPass::moments) {
    const auto sweep = [&](auto visit) {
      if (!mine) return;
      const T* h = start(p.h);
      const int loads = (Channels ? count : count / V) - (Channels ? row : lane);
#pragma unroll 1
      for (int done = 0; done < loads; done += step * in_flight, h += in_flight * to_next(p.h)) {
        Pack<T, V> hs[in_flight];
#pragma unroll
        for (int u = 0; u < in_flight; ++u)
          if (done + u * step < loads) hs[u] = load_pack<V>(h + u * to_next(p.h));
#pragma unroll
        for (int u = 0; u < in_flight; ++u)
          if (done + u * step < loads) visit(widen(hs[u]));
      }
    };
    Pack<float, V> center = {}, rest = {}, squares = {};
    sweep([&](const Pack<float, V>& h) {
#pragma unroll
      for (int v = 0; v < V; ++v) center.v[v] += h.v[v];
    });
    const float numbers = static_cast<float>(count);
    if constexpr (Channels) {
      put_sums(0, center);
      block_barrier();
#pragma unroll
      for (int v = 0; v < V; ++v) center.v[v] = sum_of_warps(0, lane * V + v) / numbers;
    } else {
      center.v[0] = sum_of_warp(center) / numbers;
    }
    sweep([&](const Pack<float, V>& h) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float deviation = h.v[v] - center.v[Channels ? v : 0];
        rest.v[v] += deviation;
        squares.v[v] = fma(deviation, deviation, squares.v[v]);
      }
    });
    if constexpr (Channels) {
      put_sums(1, rest), put_sums(2, squares);
      block_barrier();
      if (writes_partial)
        put_moments(put_at, sum_of_warps(0, channel_written) / numbers, sum_of_warps(1, channel_written),
                    sum_of_warps(2, channel_written), numbers);
    } else {
      const float of_rest = sum_of_warp(rest), of_squares = sum_of_warp(squares);
      if (writes_partial) put_moments(put_at, center.v[0], of_rest, of_squares, numbers);
    }
  } else {
    constexpr bool gradient = Pass == NormPass::gradient;
    float mean[owned], scale[owned], shift[owned], slope[owned], constant[owned];
    if constexpr (Channels) {
      if (writes_partial) {
        const OfChannel<float> of = of_channel<float>(p, gradient, c0 + channel_written);
        const float table[5] = {of.mean, of.scale, of.shift, of.slope, of.constant};
#pragma unroll
        for (int i = 0; i < 5; ++i) shared[i * group_size + channel_written] = table[i];
      }
      block_barrier();
#pragma unroll
      for (int v = 0; v < owned; ++v) {
        const float* table = shared + lane * V + v;
        mean[v] = table[0], scale[v] = table[group_size], shift[v] = table[2 * group_size];
        slope[v] = table[3 * group_size], constant[v] = table[4 * group_size];
      }
    } else if (mine) {
      const OfChannel<float> of = of_channel<float>(p, gradient, c);
      mean[0] = of.mean, scale[0] = of.scale, shift[0] = of.shift, slope[0] = of.slope, constant[0] = of.constant;
    }
    Pack<float, V> of_one = {}, of_deviation = {};
    if (mine) {
      const bool with_other = !normalizes || p.other.data, reads_y = !normalizes && p.y.data && p.relu;
      const View &view_to = normalizes ? p.y : p.out, &view_y = p.y;
      const bool writes = view_to.data, relu = p.relu;
      const T *h = start(p.h), *other = start(p.other), *y = start(view_y);
      T* to = start(view_to);
      const int loads = (Channels ? count : count / V) - (Channels ? row : lane);
#pragma unroll 1
      for (int done = 0; done < loads; done += step * in_flight) {
        Pack<T, V> hs[in_flight], others[in_flight], ys[in_flight];
#pragma unroll
        for (int u = 0; u < in_flight; ++u)
          if (done + u * step < loads) {
            hs[u] = load_pack<V>(h + u * to_next(p.h));
            if (with_other) others[u] = load_pack<V>(other + u * to_next(p.other));
          }
        if (reads_y)
#pragma unroll
          for (int u = 0; u < in_flight; ++u)
            if (done + u * step < loads) ys[u] = load_pack<V>(y + u * to_next(view_y));
#pragma unroll
        for (int u = 0; u < in_flight; ++u)
          if (done + u * step < loads) {
            const Pack<float, V> h_wide = widen(hs[u]);
            Pack<float, V> deviation, z, result;
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const int k = Channels ? v : 0;
              deviation.v[v] = h_wide.v[v] - mean[k];
              z.v[v] = fma(deviation.v[v], scale[k], shift[k]);
            }
            if constexpr (normalizes) {
              if (with_other) {
                const Pack<float, V> wide = widen(others[u]);
#pragma unroll
                for (int v = 0; v < V; ++v) z.v[v] += wide.v[v];
              }
#pragma unroll
              for (int v = 0; v < V; ++v) result.v[v] = relu && z.v[v] < 0 ? 0.f : z.v[v];  // NaN stays
            } else {
              if (reads_y) z = widen(ys[u]);
              const Pack<float, V> wide = widen(others[u]);
#pragma unroll
              for (int v = 0; v < V; ++v) {
                const int k = Channels ? v : 0;
                const float dz = relu && z.v[v] <= 0 ? 0.f : wide.v[v];
                if constexpr (sums) {
                  of_one.v[v] += dz;
                  of_deviation.v[v] = fma(dz, deviation.v[v], of_deviation.v[v]);
                  result.v[v] = dz;
                } else {
                  result.v[v] = fma(scale[k], dz, fma(slope[k], deviation.v[v], constant[k]));
                }
              }
            }
            if (normalizes || writes) store_pack<V>(to + u * to_next(view_to), narrow<T>(result));
          }
        h += in_flight * to_next(p.h), other += in_flight * to_next(p.other), y += in_flight * to_next(view_y);
        to += in_flight * to_next(view_to);
      }
    }
    if constexpr (sums) {
      float first, second;
      if constexpr (Channels) {
        put_sums(0, of_one), put_sums(1, of_deviation);
        block_barrier();
        if (!writes_partial) return;
        first = sum_of_warps(0, channel_written), second = sum_of_warps(1, channel_written);
      } else {
        first = sum_of_warp(of_one), second = sum_of_warp(of_deviation);
        if (!writes_partial) return;
      }
      put_at[0] = static_cast<double>(first), put_at[1] = static_cast<double>(second);
    }
  }
}

// The sum over the block's threads, or over those of the same lane (Channels), the same for all of them and in a fixed
// order: lanes in pairs of pairs, then warps one after the other. All threads; `shared`: 32 numbers per warp.
template <bool Channels, typename S>
__device__ __forceinline__ S block_sum(S value, S* shared) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  constexpr int numbers = Channels ? 32 : 1;  // of a warp
  if constexpr (!Channels)
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) value += shuffle_xor(value, mask);
  if (lane < numbers) shared[warp * numbers + lane] = value;
  block_barrier();
  value = 0;
#pragma unroll
  for (int w = 0; w < norm_warps; ++w) value += shared[w * numbers + (Channels ? lane : 0)];
  block_barrier();  // everybody has read; the memory may be used again
  return value;
}

struct Place {
  int64_t n, t, h, w;
};

// One pass, any strides, number by number. T in {double, float, uint16_t: bf16 or fp16}, arithmetic in S =
// Accumulator<T>. As norm_packs, but that along positions a block owns a part of one channel, a thread every 256th of
// its positions; along channels a block owns 32 channels.
template <typename T, bool Channels>
__global__ void __launch_bounds__(norm_threads, 2) norm_pass(const Norm p, const NormParts plan, double* partial) {
  using S = Accumulator<T>;
  S* shared = dynamic_shared<S>();
  const int row = Channels ? static_cast<int>(threadIdx.x) / norm_lanes : 0;
  const int64_t groups = (p.C + norm_lanes - 1) / norm_lanes;
  const int64_t above = quotient(blockIdx.x, Channels ? groups : plan.parts);
  const int64_t rest_of_block = blockIdx.x - above * (Channels ? groups : plan.parts);
  const int64_t part = Channels ? above : rest_of_block;
  const int64_t c = Channels ? rest_of_block * norm_lanes + static_cast<int>(threadIdx.x) % norm_lanes : above;
  const int64_t begin = part * plan.size;
  const int64_t end = begin + plan.size < plan.positions ? begin + plan.size : plan.positions;
  const bool mine = c < p.C, bf16 = p.dtype == DType::bf16;
  const T *h_data = static_cast<const T*>(p.h.data), *other_data = static_cast<const T*>(p.other.data);
  T *y_data = static_cast<T*>(p.y.data), *out_data = static_cast<T*>(p.out.data);
  const bool reads_y = y_data && p.pass != NormPass::normalize;

  const auto offset = [&](const View& v, const Place& at) {
    return at.n * v.n + c * v.c + at.t * v.t + at.h * v.h + at.w * v.w;
  };
  // Calls visit(place) for the thread's positions.
  const auto sweep = [&](auto visit) {
    if (!mine) return;
    int64_t q = begin + (Channels ? row : static_cast<int>(threadIdx.x));
    const int64_t above_w = quotient(q, p.W), above_h = quotient(above_w, p.H), above_t = quotient(above_h, p.T);
    Place at{above_t, above_h - above_t * p.T, above_w - above_h * p.H, q - above_w * p.W};
#pragma unroll 2
    for (; q < end; q += Channels ? norm_threads / norm_lanes : norm_threads) {
      visit(at);
      at.w += plan.step_w, at.h += plan.step_h, at.t += plan.step_t, at.n += plan.step_n;
      if (at.w >= p.W) at.w -= p.W, ++at.h;
      if (at.h >= p.H) at.h -= p.H, ++at.t;
      if (at.t >= p.T) at.t -= p.T, ++at.n;
    }
  };

  const bool writes_partial = mine && (Channels ? row == 0 : threadIdx.x == 0);
  double* to = partial + (c * plan.parts + part) * 2;
  if (p.pass == NormPass::moments) {
    S center = 0, rest = 0, squares = 0;
    // First the mean, then what deviates from it.
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      sweep([&](const Place& at) {
        const S deviation = widen(h_data[offset(p.h, at)], bf16) - center;
        rest += deviation;
        squares = fma(deviation, deviation, squares);
      });
      rest = block_sum<Channels>(rest, shared);
      if (turn == 0) center = rest / static_cast<S>(end - begin), rest = squares = 0;
    }
    squares = block_sum<Channels>(squares, shared);
    if (writes_partial) put_moments(to, center, rest, squares, static_cast<S>(end - begin));
    return;
  }

  OfChannel<S> of = {};
  if (mine) of = of_channel<S>(p, p.pass == NormPass::gradient, c);
  S of_one = 0, of_deviation = 0;
  sweep([&](const Place& at) {
    const S deviation = widen(h_data[offset(p.h, at)], bf16) - of.mean;
    const S other = other_data ? widen(other_data[offset(p.other, at)], bf16) : S(0);
    S z = fma(deviation, of.scale, of.shift);
    if (p.pass == NormPass::normalize) {
      if (other_data) z += other;
      y_data[offset(p.y, at)] = narrow<T>(p.relu && z < 0 ? S(0) : z, bf16);  // NaN stays
      return;
    }
    if (reads_y) z = widen(y_data[offset(p.y, at)], bf16);
    const S dz = p.relu && z <= 0 ? S(0) : other;
    of_one += dz;
    of_deviation = fma(dz, deviation, of_deviation);
    const S result = p.pass == NormPass::sums ? dz : fma(of.scale, dz, fma(of.slope, deviation, of.constant));
    if (out_data) out_data[offset(p.out, at)] = narrow<T>(result, bf16);
  });
  if (p.pass != NormPass::sums) return;
  of_one = block_sum<Channels>(of_one, shared);
  of_deviation = block_sum<Channels>(of_deviation, shared);
  if (writes_partial) to[0] = static_cast<double>(of_one), to[1] = static_cast<double>(of_deviation);
}

// The parts of a channel together, in fp64. A block per channel; a thread takes every 256th part, in order, then lanes
// in pairs of pairs, then warps in order. Shared: a number per warp. Bound: latency, of reading `partial` once or twice.
template <typename S>
__global__ void __launch_bounds__(norm_threads, 4)
    norm_finish(const Norm p, const NormParts plan, const double* partial) {
  double* shared = dynamic_shared<double>();
  const int64_t c = blockIdx.x;
  const double* from = partial + c * plan.parts * 2;
  const bool sums = p.pass == NormPass::sums;
  // Calls take(part, its number of positions) for the thread's parts.
  const auto each_part = [&](auto take) {
    const bool few = plan.pieces < norm_threads;
    const unsigned pieces = static_cast<unsigned>(plan.pieces);
    int64_t piece = few ? threadIdx.x % pieces : threadIdx.x;
    const int64_t step = few ? norm_threads % pieces : norm_threads;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < plan.parts; i += norm_threads) {
      const int64_t left = plan.run - piece * plan.size;
      take(i, static_cast<double>(left < plan.size ? left : plan.size));
      piece += step;
      if (piece >= plan.pieces) piece -= plan.pieces;
    }
  };
  S* result = static_cast<S*>(p.result);
  double first = 0, second = 0;
  each_part([&](int64_t i, double count) {
    first += (sums ? 1 : count) * from[2 * i];
    if (sums) second += from[2 * i + 1];
  });
  first = block_sum<false>(first, shared);
  if (sums) {
    second = block_sum<false>(second, shared);
    if (threadIdx.x > 0) return;
    const S* moments = static_cast<const S*>(p.moments);
    const double count = moments[2 * p.C + c] > 1 ? static_cast<double>(moments[2 * p.C + c]) : 1;
    result[c] = static_cast<S>(first);
    result[p.C + c] = static_cast<S>(second / sqrt(static_cast<double>(moments[p.C + c]) / count + p.eps));
    return;
  }
  const double total = static_cast<double>(plan.positions);
  first /= total > 1 ? total : 1;
  each_part([&](int64_t i, double count) {
    const double apart = from[2 * i] - first;
    second += from[2 * i + 1] + count * apart * apart;
  });
  second = block_sum<false>(second, shared);
  if (threadIdx.x > 0) return;
  result[c] = static_cast<S>(first);
  result[p.C + c] = static_cast<S>(second);
  result[2 * p.C + c] = static_cast<S>(total);
}

template <typename S>
Error launch_finish(const Norm& p, const NormParts& plan, const double* partial, Stream stream) {
  if (p.C == 0) return {};
  if (p.C > INT32_MAX) return "recurrent_conv_batch_norm: too many channels for one launch";
  return launch("recurrent_conv_batch_norm norm_finish", norm_finish<S>, dim3(static_cast<unsigned>(p.C)),
                dim3(norm_threads), norm_warps * sizeof(double), stream, p, plan, partial);
}

template <typename T, bool Channels>
Error launch_packs(const Norm& p, const NormParts& plan, double* partial, Stream stream) {
  constexpr int group = norm_group<Channels, T>;
  const int64_t groups = ceil_div(p.C, group), blocks = plan.parts * groups;
  if (blocks > INT32_MAX) return "recurrent_conv_batch_norm: too many positions for one launch";
  if (blocks == 0) return {};
  const auto kernel = p.pass == NormPass::moments     ? norm_packs<T, Channels, NormPass::moments>
                      : p.pass == NormPass::normalize ? norm_packs<T, Channels, NormPass::normalize>
                      : p.pass == NormPass::sums      ? norm_packs<T, Channels, NormPass::sums>
                                                      : norm_packs<T, Channels, NormPass::gradient>;
  const size_t shared = Channels ? (5 + 3 * norm_warps) * group * sizeof(float) : 0;
  return launch("recurrent_conv_batch_norm norm_packs", kernel, dim3(static_cast<unsigned>(blocks)), dim3(norm_threads),
                shared, stream, p, plan, static_cast<unsigned>(groups), partial);
}

template <typename T>
Error launch_numbers(const Norm& p, const NormParts& plan, double* partial, Stream stream) {
  const int64_t blocks = plan.parts * (plan.channels ? ceil_div(p.C, norm_lanes) : p.C);
  if (blocks > INT32_MAX) return "recurrent_conv_batch_norm: too many positions for one launch";
  if (blocks == 0) return {};
  return launch("recurrent_conv_batch_norm norm_pass", plan.channels ? norm_pass<T, true> : norm_pass<T, false>,
                dim3(static_cast<unsigned>(blocks)), dim3(norm_threads), norm_threads * sizeof(Accumulator<T>), stream,
                p, plan, partial);
}

template <typename T>
Error launch_any(const Norm& p, const NormParts& plan, double* partial, Stream stream) {
  return plan.channels ? launch_packs<T, true>(p, plan, partial, stream)
                       : launch_packs<T, false>(p, plan, partial, stream);
}

Error launch_pass(const Norm& p, const NormParts& plan, double* partial, Stream stream) {
  switch (p.dtype) {
    case DType::f64: return launch_numbers<double>(p, plan, partial, stream);
    case DType::f32:
      return plan.packs ? launch_any<float>(p, plan, partial, stream) : launch_numbers<float>(p, plan, partial, stream);
    default: break;
  }
  if (!plan.packs) return launch_numbers<uint16_t>(p, plan, partial, stream);
  return p.dtype == DType::bf16 ? launch_any<__nv_bfloat16>(p, plan, partial, stream)
                                : launch_any<__half>(p, plan, partial, stream);
}

}  // namespace

Scratch batch_norm_scratch(const Norm& problem) {
  Norm p = problem;
  return {reduces(p) ? p.C * norm_parts(p).parts * 2 * static_cast<int64_t>(sizeof(double)) : 0, {}};
}

Text finish_moments(const Norm& p, int64_t columns, const double* partial, Stream stream) {
  NormParts plan;
  plan.run = plan.positions = p.N * p.T * p.H * p.W;
  plan.size = columns * p.T;  // the last part has the rest
  plan.parts = ceil_div(plan.positions, plan.size);
  if (plan.parts > 0) plan.pieces = plan.parts;
  return launch_finish<float>(p, plan, partial, stream);
}

Text batch_norm(const Norm& problem, void* scratch, Stream stream) {
  Norm p = problem;
  const NormParts plan = norm_parts(p);
  double* partial = static_cast<double*>(scratch);
  Error error = launch_pass(p, plan, partial, stream);
  if (!error.empty() || !reduces(p)) return error;
  return p.dtype == DType::f64 ? launch_finish<double>(p, plan, partial, stream)
                               : launch_finish<float>(p, plan, partial, stream);
}

}  // namespace rcu_ops::cuda
