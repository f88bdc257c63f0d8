// recurrent_conv one frame per launch where all tensors have contiguous channels in whole words: a stream's usual step.
//
// Such a launch is over in a few microseconds, of which fetching the machine code is a large part. So these kernels do
// what that case needs and no more (recurrent_conv_step.cu has the others): everything comes by words that are under
// way together, and nothing passes through shared memory on its way out.
#include "cuda/device/async_copy.h"
#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/matrix_copy.h"
#include "cuda/device/mma.h"
#include "cuda/device/pack.h"
#include "cuda/device/shared_memory.h"
#include "cuda/recurrent_conv_tile.h"
#include "cuda/recurrent_conv_views.h"

namespace rcu_ops::cuda {
namespace {

// What a block works on: output channels from channel0 on, columns of a sample from column0 on.
struct StepPlace {
  int channel0, column0, sample, positions;

  // Of column j of the block, or of the last one there is: what is read for a column beyond it is never stored.
  __device__ __forceinline__ int64_t offset(const View& v, int j) const {
    return step_words_offset(v, sample, column0 + j < positions ? column0 + j : positions - 1);
  }
  __device__ __forceinline__ bool exists(int j) const { return column0 + j < positions; }
};
template <int Outputs, int Columns>
__device__ __forceinline__ StepPlace step_place_of(const StepScanPlan& plan) {
  return {static_cast<int>(blockIdx.y) * Outputs, static_cast<int>(blockIdx.x) * Columns, static_cast<int>(blockIdx.z),
          plan.words.positions};
}

// Starts the copies of the block's rows of W, of its columns' state, and of its scale and shift. A row is copied by 8
// neighbouring threads. weight_row(channel): where the row of a channel of the block is laid down.
template <int Threads, int Outputs, int Columns, typename T, typename WeightRow>
__device__ __forceinline__ void fetch_step_operands(const Scan& p, const StepScanPlan& plan, const StepPlace& place,
                                                    WeightRow weight_row) {
  constexpr int rows = Threads / 8, word = 16 / sizeof(T);
  const int row = static_cast<int>(threadIdx.x / 8), column = static_cast<int>(threadIdx.x % 8);  // of words
  const int C = static_cast<int>(p.C), weight_out = static_cast<int>(p.weight_out);
  const int weight_pitch = static_cast<int>(plan.words.weight_pitch),
            state_pitch = static_cast<int>(plan.words.state_pitch);
  unsigned char *weight = dynamic_shared<unsigned char>(),
                *state = dynamic_shared<unsigned char>(plan.words.state_at) + row * state_pitch;
  const float* first[Columns / rows];
#pragma unroll
  for (int i = 0; i < Columns / rows; ++i)
    first[i] = static_cast<const float*>(p.first.data) + place.offset(p.first, row + i * rows);
#pragma unroll 1
  for (int c = column * 4; c < C; c += 32)
#pragma unroll
    for (int i = 0; i < Columns / rows; ++i) async_copy<16>(state + i * rows * state_pitch + c * 4, first[i] + c);
  const T* w = static_cast<const T*>(p.weight) + static_cast<int64_t>(place.channel0 + row) * weight_out;
#pragma unroll 1
  for (int c = column * word; c < C; c += 8 * word)
#pragma unroll
    for (int i = 0; i < Outputs / rows; ++i)
      async_copy<16>(weight + weight_row(row + i * rows) * weight_pitch + c * static_cast<int>(sizeof(T)),
                     w + static_cast<int64_t>(i * rows) * weight_out + c);
  if (p.scale && threadIdx.x < Outputs) {
    float* numbers = dynamic_shared<float>(plan.words.numbers_at) + threadIdx.x;
    async_copy<4>(numbers, static_cast<const float*>(p.scale) + place.channel0 + threadIdx.x);
    async_copy<4>(numbers + Outputs, static_cast<const float*>(p.shift) + place.channel0 + threadIdx.x);
  }
  async_commit();
}

// The epilogue of channel c of the block.
struct StepEpilogue {
  const float *scale, *shift;
  bool with_residual, relu;

  __device__ __forceinline__ float operator()(float value, int c, float added) const {
    value = fma(scale[c], value, shift[c]);
    if (with_residual) value += added;
    return relu && value < 0 ? 0.0f : value;  // NaN stays
  }
};
__device__ __forceinline__ StepEpilogue step_epilogue_of(const Scan& p, const StepScanPlan& plan) {
  const float* scale = dynamic_shared<float>(plan.words.numbers_at);
  return {scale, scale + plan.outputs, p.residual.data != nullptr, p.relu};
}

// One frame after a given state (a Scan with T = 1 and Init::state), T bf16 or half, StepWordsPlan's layout.
//
// Work.     A block of 4 warps computes 16 Warps columns x 8 Tiles (4 / Warps) output channels, a warp 16 columns x 8
//           Tiles channels. Rows of the matrix product are columns of the problem, its columns output channels, in the
//           order that gives a lane 2 Group adjacent ones (for_step_words).
// State.    As in tile_scan: v = alpha * (W round(v) + diag(W) * (v - round(v)) + x), in the same order: its bits.
// Memory.   W and the state come by cp.async, x and the residual into registers: one round trip for all of it. The
//           state is rounded where a fragment is read.
// Padding.  None in channels. Columns beyond the last read the last one's numbers and are not stored.
// Aliasing. y and last overlap no input. Every output element has one writer.
// Bound.    Latency: a launch, one round trip to memory, C / 16 dependent products. With many columns the bytes of x, y
//           and both states.
template <typename T, int Warps, int Tiles>
__global__ void __launch_bounds__(step_threads, 4) step_words(const Scan p, const StepScanPlan plan) {
  constexpr int P = 16 * Warps, O = 8 * Tiles * (4 / Warps), Group = step_group<Tiles>;
  constexpr int groups = Tiles / Group;
  using Word = Pack<uint32_t, Group>;  // 2 Group numbers
  const unsigned thread = threadIdx.x;
  const int lane = static_cast<int>(thread % 32), warp = static_cast<int>(thread / 32), C = static_cast<int>(p.C);
  const int weight_pitch = static_cast<int>(plan.words.weight_pitch),
            state_pitch = static_cast<int>(plan.words.state_pitch);
  const StepPlace place = step_place_of<O, P>(plan);
  fetch_step_operands<step_threads, O, P, T>(p, plan, place,
                                             [](int channel) { return step_weight_row<Group>(channel); });

  Word x[groups][2] = {}, residual[groups][2] = {};
  const auto load = [&](const View& v, Word(&words)[groups][2]) {
    if (!v.data) return;
    for_step_words<Warps, Tiles>(thread, [&](int tile, int half, int channel, int column) {
      const uint16_t* from = static_cast<const uint16_t*>(v.data) + place.offset(v, column) + place.channel0 + channel;
      words[tile / Group][half] = *reinterpret_cast<const Word*>(from);
    });
  };
  load(p.x, x);
  load(p.residual, residual);
  async_wait<0>();  // for W and the state, this thread's part of them
  block_barrier();  // and everybody's

  const unsigned char *weight = dynamic_shared<unsigned char>() + warp / Warps * Tiles * 8 * weight_pitch,
                      *state = dynamic_shared<unsigned char>(plan.words.state_at);
  float acc[Tiles][4];
  for_step_words<Warps, Tiles>(thread, [&](int tile, int half, int channel, int column) {
#pragma unroll
    for (int t = 0; t < Group; ++t) {
      const int c = place.channel0 + channel + 2 * t;
      const float2 h = *reinterpret_cast<const float2*>(state + column * state_pitch + c * 4);
      const unsigned char* diagonal = weight + ((tile + t) * 8 + (lane & 3) * 2) * weight_pitch + c * 2;
      const float2 rounded = unpack<T>(pack<T>(h.x, h.y)), arriving = unpack<T>(x[tile / Group][half].v[t]);
      float* to = acc[tile + t] + half * 2;
      to[0] = with_rest(arriving.x, widen(*reinterpret_cast<const T*>(diagonal)), h.x, rounded.x);
      to[1] = with_rest(arriving.y, widen(*reinterpret_cast<const T*>(diagonal + weight_pitch + 2)), h.y, rounded.y);
    }
  });
  const unsigned char *own_state = state + (warp % Warps * 16 + (lane >> 2)) * state_pitch + (lane & 3) * 8,
                      *own_weight = weight + (lane & 7) * weight_pitch + (lane >> 3 & 1) * 16 +
                                    (Tiles > 1 ? (lane >> 4) * 8 * weight_pitch : 0);
#pragma unroll 2
  for (int k = 0; k < C; k += 16) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 h = *reinterpret_cast<const float2*>(own_state + i % 2 * 8 * state_pitch + i / 2 * 32 + k * 4);
      a[i] = pack<T>(h.x, h.y);
    }
    if constexpr (Tiles == 1) {
      uint32_t b[2];
      load_matrix<2, false>(b, own_weight + k * 2);
      mma_m16n8k16<T>(acc[0], a, b);
    } else {
#pragma unroll
      for (int t = 0; t < Tiles; t += 2) {
        uint32_t b[4];
        load_matrix<4, false>(b, own_weight + t * 8 * weight_pitch + k * 2);
        const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
        mma_m16n8k16<T>(acc[t], a, low);
        mma_m16n8k16<T>(acc[t + 1], a, high);
      }
    }
  }

  const float alpha = static_cast<float>(p.alpha_final);
  const StepEpilogue epilogue = step_epilogue_of(p, plan);
  for_step_words<Warps, Tiles>(thread, [&](int tile, int half, int channel, int column) {
    if (!place.exists(column)) return;
    float v[2 * Group];
#pragma unroll
    for (int i = 0; i < 2 * Group; ++i) v[i] = alpha * acc[tile + i / 2][half * 2 + i % 2];
    if (p.last.data) {
      constexpr int word = Group == 1 ? 2 : 4;
      float* to = static_cast<float*>(p.last.data) + place.offset(p.last, column) + place.channel0 + channel;
#pragma unroll
      for (int i = 0; i < 2 * Group; i += word) {
        Pack<float, word> pack;
#pragma unroll
        for (int j = 0; j < word; ++j) pack.v[j] = v[i + j];
        store_pack(to + i, pack);
      }
    }
    if (!p.y.data) return;
    if (p.scale)
#pragma unroll
      for (int t = 0; t < Group; ++t) {
        const float2 added = unpack<T>(residual[tile / Group][half].v[t]);
        v[2 * t] = epilogue(v[2 * t], channel + 2 * t, added.x);
        v[2 * t + 1] = epilogue(v[2 * t + 1], channel + 2 * t + 1, added.y);
      }
    Word y;
#pragma unroll
    for (int t = 0; t < Group; ++t) y.v[t] = pack<T>(v[2 * t], v[2 * t + 1]);
    uint16_t* to = static_cast<uint16_t*>(p.y.data) + place.offset(p.y, column) + place.channel0 + channel;
    *reinterpret_cast<Word*>(to) = y;
  });
}

// The same in fp32.
//
// Work.     A block computes 32 output channels at 16 columns, a thread 4 adjacent channels at 2 columns.
// Memory.   As above, and W's rows lie in the order in which neighbouring lanes read neighbouring ones: 6 words of
//           shared memory for 32 multiply-adds.
// Order.    That of plain_scan, bit for bit: runs of sum_run channels, each added to x.
__global__ void __launch_bounds__(plain_step_words_threads, 8) plain_step_words(const Scan p, const StepScanPlan plan) {
  using Word = Pack<float, 4>;
  const unsigned thread = threadIdx.x;
  const int C = static_cast<int>(p.C);
  const int weight_pitch = static_cast<int>(plan.words.weight_pitch),
            state_pitch = static_cast<int>(plan.words.state_pitch);
  const StepPlace place = step_place_of<plain_step_outputs, plain_step_columns>(plan);
  fetch_step_operands<plain_step_words_threads, plain_step_outputs, plain_step_columns, float>(
      p, plan, place, [](int channel) { return channel % 4 * 8 + channel / 4; });

  Word total[2] = {}, residual[2] = {};
  const auto load = [&](const View& v, Word(&words)[2]) {
    if (!v.data) return;
    for_plain_step_words(thread, [&](int which, int channel, int column) {
      words[which] =
          load_pack<4>(static_cast<const float*>(v.data) + place.offset(v, column) + place.channel0 + channel);
    });
  };
  load(p.x, total);
  load(p.residual, residual);
  async_wait<0>();
  block_barrier();

  const unsigned char *weight = dynamic_shared<unsigned char>() + thread % 8 * weight_pitch,
                      *state = dynamic_shared<unsigned char>(plan.words.state_at) + thread / 8 * state_pitch;
#pragma unroll 1
  for (int run = 0; run < C; run += sum_run) {
    float acc[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int m = 0; m < 4; ++m) acc[n][m] = -0.0f;
    const int run_end = C - run < sum_run ? C : run + sum_run;
#pragma unroll 2
    for (int k = run; k < run_end; k += 4) {
      Word w[4], h[2];
#pragma unroll
      for (int m = 0; m < 4; ++m) w[m] = *reinterpret_cast<const Word*>(weight + m * 8 * weight_pitch + k * 4);
#pragma unroll
      for (int n = 0; n < 2; ++n) h[n] = *reinterpret_cast<const Word*>(state + n * 8 * state_pitch + k * 4);
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int m = 0; m < 4; ++m) acc[n][m] = fma(w[m].v[j], h[n].v[j], acc[n][m]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int m = 0; m < 4; ++m) total[n].v[m] += acc[n][m];
  }

  const float alpha = static_cast<float>(p.alpha_final);
  const StepEpilogue epilogue = step_epilogue_of(p, plan);
  for_plain_step_words(thread, [&](int which, int channel, int column) {
    if (!place.exists(column)) return;
    Word v = total[which];
#pragma unroll
    for (int m = 0; m < 4; ++m) v.v[m] *= alpha;
    const auto store = [&](const View& to) {
      store_pack(static_cast<float*>(to.data) + place.offset(to, column) + place.channel0 + channel, v);
    };
    if (p.last.data) store(p.last);
    if (!p.y.data) return;
    if (p.scale)
#pragma unroll
      for (int m = 0; m < 4; ++m) v.v[m] = epilogue(v.v[m], channel + m, residual[which].v[m]);
    store(p.y);
  });
}

}  // namespace

Error launch_step_words(const Scan& p, const StepScanPlan& plan, Stream stream) {
  const auto start = [&](void (*kernel)(Scan, StepScanPlan), int threads) {
    return launch("recurrent_conv step_words", kernel,
                  dim3(static_cast<unsigned>(ceil_div(plan.words.positions, plan.columns)),
                       static_cast<unsigned>(plan.channel_blocks), static_cast<unsigned>(plan.words.samples)),
                  dim3(static_cast<unsigned>(threads)), static_cast<size_t>(plan.words.shared_bytes), stream, p, plan);
  };
  const bool large = plan.outputs == 64;
  if (p.dtype == DType::f32) return start(plain_step_words, plain_step_words_threads);
  if (p.dtype == DType::bf16)
    return start(large ? step_words<__nv_bfloat16, 4, 8> : step_words<__nv_bfloat16, 1, 1>, step_threads);
  return start(large ? step_words<__half, 4, 8> : step_words<__half, 1, 1>, step_threads);
}

}  // namespace rcu_ops::cuda
