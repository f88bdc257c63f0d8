// recurrent_conv on an sm_90a: bf16 and fp16, 129 to 256 channels, the state as wgmma's operand in registers.
#include "cuda/device/async_copy.h"
#include "cuda/device/barrier.h"
#include "cuda/device/convert.h"
#include "cuda/device/matrix_copy.h"
#include "cuda/device/matrix_store.h"
#include "cuda/device/registers.h"
#include "cuda/device/shared_memory.h"
#include "cuda/device/wgmma.h"
#include "cuda/recurrent_conv_tile.h"
#include "cuda/recurrent_conv_views.h"

namespace rcu_ops::cuda {

#ifdef RCU_OPS_SM90A

namespace {

constexpr int group_threads = 128, hopper_threads = hopper_groups * group_threads;

// One scan over time (common/recurrent_conv.h), T bf16 or half, 128 < C <= 256.
//
// Layout.   x, y and the residual have contiguous channels (plan.along_channels) or contiguous columns, any other
//           strides. Which of them is a branch and no instance: it changes addresses and the transposition of tiles
//           alone.
// Work.     A block is two warpgroups that share W and nothing else; each owns P = 64 columns for all frames. Rows of
//           the matrix product are columns of the problem, its columns output channels: the accumulators are the state
//           in fp32 (128 registers), and rounded to T and packed where they are they are the product's a operand (64
//           registers); b is W. What else a thread needs is computed again where it is used, from shared memory and a
//           handful of registers. While one warpgroup's product runs, the other one reads x and writes y.
// State.    As in tile_scan: v' = alpha * (W round(v) + diag(W) * (v - round(v)) + x).
// Memory.   Shared memory (recurrent_conv_gpu_plan.h): W [4][256 outputs][64 inputs], swizzled
//           (recurrent_conv_index.h), written once; for each warpgroup three units of 64 columns x 128 channels that
//           are used in turn by the halves of the frames of x, by cp.async, and with a residual by those of x and then
//           of the residual, frame after frame. y takes over the units of what came last, x or the residual, goes out
//           from there in whole words, and then the copies that are three halves ahead go in.
// Copies.   By cp.async, 16 of a thread for a frame, and not in bulk (cp.async.bulk), which cannot swizzle: rows of 256
//           bytes, a column's, would come rotated, in two pieces, and each piece takes the warp 9 instructions of its
//           own, with addresses in uniform registers: 270 for half a frame, where cp.async takes 130. Rows with gaps
//           between them find no room beside W. And a tensor map's box, which could swizzle, cannot express 64
//           consecutive positions that go on in the next sample (a frame has 49 or 196).
// Order.    The warpgroups meet once, after W is there. In a frame the threads of one meet when x is there, when y is
//           complete and when it has been copied out; with a residual also when x has been read, before the residual's
//           second half goes in, and when that is there. A warp reads and writes fragments of its own 16 columns alone.
//           The order of additions depends on nothing but C.
// Padding.  Channels from C on have zero weights and are set to zero in the state every frame; what lies in the units
//           beyond the last channel or column is computed on and not stored: a column's numbers go into that column's
//           alone.
// Aliasing. y and last overlap no input. Every output element has one writer.
// Bound.    4 bytes per element moved against 2 * 256 FLOP: 32 KB + 32 KB in 2048 cycles of the matrix unit for each
//           warpgroup's frame, 32 bytes per cycle where HBM gives 19 (4.3 TB/s, 132 multiprocessors, 1.7 GHz): memory,
//           once there are two blocks' worth of columns for every multiprocessor; the matrix unit otherwise, for
//           columns are in tiles of 128. hopper_is_faster (recurrent_conv_gpu_plan.h) compares with wide_scan.
template <typename T>
__global__ void __launch_bounds__(hopper_threads, 1) hopper_scan(const Scan p, const HopperScanPlan plan) {
  constexpr int P = hopper_positions, CP = wide_most_channels, H = hopper_half, KT = CP / 16;
  const int group = threadIdx.x / group_threads, thread = threadIdx.x % group_threads, C = static_cast<int>(p.C);
  const int lane = thread % 32, tile = lane / 8, tile_row = lane % 8, first_column = thread / 32 * 16;
  const bool with_residual = p.residual.data != nullptr, along = plan.along_channels;

  unsigned char* weight = dynamic_shared<unsigned char>();
  unsigned char* units = dynamic_shared<unsigned char>(hopper_units_at) + group * hopper_units * hopper_unit_bytes;
  // Of the columns in x, in y, in the residual.
  Offset* offsets = dynamic_shared<Offset>(hopper_offsets_at) + group * 3 * P;

  const int64_t column0 = (static_cast<int64_t>(blockIdx.x) * hopper_groups + group) * P, all = p.N * p.H * p.W;
  const int columns = all - column0 < P ? static_cast<int>(all - column0) : P;
  const auto locate = [&](const View& v, Offset* to) {
    if (thread < columns) to[thread] = static_cast<Offset>(column_offset(p, v, column0 + thread));
  };
  locate(p.x, offsets);
  locate(p.y, offsets + P);
  const T* w = static_cast<const T*>(p.weight);
  const bool along_inputs = p.weight_in == 1;
  if (along_inputs && C % 8 == 0 && p.weight_out % 8 == 0 && reinterpret_cast<uintptr_t>(w) % 16 == 0) {
    for (int i = threadIdx.x; i < CP * CP / 8; i += hopper_threads) {
      const int output = i / (CP / 8), input = i % (CP / 8) * 8;
      unsigned char* to = weight + hopper_weight_at(output, input);
      if (output < C && input < C)
        async_copy<16>(to, w + output * p.weight_out + input);
      else
        *reinterpret_cast<uint4*>(to) = uint4{};
    }
    async_commit();
    async_wait<0>();
  } else {
#pragma unroll 16
    for (int i = threadIdx.x; i < CP * CP; i += hopper_threads) {
      const int output = along_inputs ? i / CP : i % CP, input = along_inputs ? i % CP : i / CP;
      *reinterpret_cast<T*>(weight + hopper_weight_at(output, input)) =
          output < C && input < C ? w[output * p.weight_out + input * p.weight_in] : narrow<T>(0.0f);
    }
  }
  async_proxy_fence();
  block_barrier();
  if (columns <= 0) return;

  const auto meet = [&] { group_barrier(1 + group, group_threads); };
  const auto time_of = [&](int64_t i) { return p.reverse ? p.T - 1 - i : i; };
  // Calls visit(element offset in the frame, byte offset in a unit) for the words of the group's columns, channels 128
  // half ...
  const auto for_half = [&](const View& v, const Offset* offset, int half, auto visit) {
    const int channels = C - half * H < H ? C - half * H : H;
    for_unit_words(thread, along, plan.vector_bytes / 2, channels, columns, [&](int channel, int column, int at) {
      visit(offset[column] + (half * H + channel) * static_cast<Offset>(v.c), at);
    });
  };
  // A frame's units follow each other: the halves of x, then those of the residual. `unit`: the current frame's first
  // one.
  int unit = 0;
  const auto unit_of = [&](int part) { return units + (unit + part) % hopper_units * hopper_unit_bytes; };
  // Parts `begin` .. `end` of frame i, counted on into the next frame.
  const auto fetch = [&](int64_t i, int begin, int end) {
    const int parts = with_residual ? 4 : 2;
#pragma unroll 1
    for (int part = begin; part <= end; ++part) {
      const int64_t frame = part < parts ? i : i + 1;
      const bool of_x = part % parts < 2;
      const View& v = of_x ? p.x : p.residual;
      if (frame < p.T && v.data) {
        const T* from = static_cast<const T*>(v.data) + time_of(frame) * v.t;
        unsigned char* to = unit_of(part);
        for_half(v, offsets + (of_x ? 0 : 2 * P), part % 2,
                 [&](Offset element, int at) { copy_word(plan.vector_bytes / 2, to + at, from + element); });
      }
      async_commit();
    }
  };
  // This lane's row of the warp's 16 columns x the first 16 channels of a unit, as four tiles in the order of a
  // product's a.
  const int tiles = hopper_unit_at(along, tile / 2 * 8 + (along ? 0 : tile_row),
                                   first_column + tile % 2 * 8 + (along ? tile_row : 0));
  // And its diagonal element of W for the first 8 channels, with the one after it 130 bytes on in other words of the
  // swizzle.
  const int diagonal = hopper_weight_at(lane % 4 * 2, lane % 4 * 2);

  float state[CP / 2];
  // States pass through the units in fp32, 128 channels at a time, so that they are read and written along what is
  // contiguous.
  float* wide = reinterpret_cast<float*>(units);
  constexpr int wide_pitch = H + 1;
  float* own = wide + (first_column + lane / 4) * wide_pitch + lane % 4 * 2;
  // Calls visit(state element, its place in `wide`) for channels 128 half ...
  const auto for_state = [&](int half, auto visit) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (half == h)
#pragma unroll
        for (int j = 0; j < CP / 4; ++j)
          visit(state[h * CP / 4 + j], own[j / 2 % 2 * 8 * wide_pitch + j / 4 * 8 + j % 2]);
  };
#pragma unroll
  for (int j = 0; j < CP / 2; ++j) state[j] = 0;
  if (p.init != Init::none) {
    locate(p.first, offsets + 2 * P);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      meet();
      for (int i = thread; i < P * wide_pitch; i += group_threads) wide[i] = 0;
      meet();
      for_tile(thread, group_threads, p.first.c == 1, C - half * H < H ? C - half * H : H, P,
               [&](int64_t channel, int column) {
                 if (column < columns)
                   wide[column * wide_pitch + channel] = load_state<T, float>(
                       p.first, offsets[2 * P + column] + (half * H + channel) * p.first.c, p.dtype);
               });
      meet();
      for_state(half, [](float& h, float& at) { h = at; });
    }
    meet();
  }
  locate(p.residual, offsets + 2 * P);
  meet();
  const SharedMatrix matrix(weight, Swizzle::row128, 1024);

  // The gradient of the first state is one more product, without an input and without y.
  const int64_t frames = p.T + (p.last_kind == Last::projected ? 1 : 0);
#pragma unroll 1
  for (int64_t i = 0; i < frames; ++i) {
    const bool extra = i == p.T, with_x = p.x.data && !extra, with_y = p.y.data && !extra;
    const bool product = i > 0 || p.init == Init::state;  // else the state is what the first frame is added to, or zero

    fetch(i, i == 0 ? 0 : 1, 2);
    if (with_x) {
      async_wait<1>();
      meet();  // x is there
    }
    {
      uint32_t rounded[KT][4];
#pragma unroll
      for (int k = 0; k < KT; ++k) {
        // Addresses are cheaper than registers to keep them.
        const int d_at = recomputed(diagonal), x_at = recomputed(tiles);
        uint32_t x[4] = {};
        if (with_x) {
          unsigned char* from = unit_of(k / (KT / 2));
          if (along)
            load_matrix<4, false>(x, from + (x_at ^ k % (KT / 2) * 32));
          else
            load_matrix<4, true>(x, from + x_at + k % (KT / 2) * 2048);
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float* h = &state[8 * k + r / 2 * 4 + r % 2 * 2];
          const int eight = 2 * k + r / 2, d = eight / 8 * 128 * CP + eight * 1024 + (d_at ^ eight % 8 * 16);
          rounded[k][r] = pack<T>(h[0], h[1]);
          const float2 added = unpack<T>(x[r]), h16 = unpack<T>(rounded[k][r]);
          const float d0 = widen(*reinterpret_cast<const T*>(weight + d));
          const float d1 = widen(*reinterpret_cast<const T*>(weight + ((d ^ 16) + 130)));
          h[0] = product ? with_rest(added.x, d0, h[0], h16.x) : added.x + h[0];
          h[1] = product ? with_rest(added.y, d1, h[1], h16.y) : added.y + h[1];
        }
      }
      if (product) {
        wgmma_fence(state);
#pragma unroll
        for (int k = 0; k < KT; ++k) wgmma<T>(state, rounded[k], matrix.at(k / 4 * (2 * 64 * CP) + k % 4 * 32));
        wgmma_commit();
        wgmma_wait<0>(state);
      }
    }
    const float alpha = static_cast<float>(extra ? 1 : i == p.T - 1 ? p.alpha_final : i == 0 ? p.alpha_first : p.alpha);
#pragma unroll
    for (int j = 0; j < CP / 2; ++j) state[j] *= alpha;
    if (C < CP) {
      const int left = C - H - lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < CP / 4; ++j)
        if (j / 4 * 8 + j % 2 >= left) state[CP / 4 + j] = 0;
    }

    if (with_y) {
      int part = 0;  // whose units y takes over
      if (with_residual) {
        meet();  // x has been read
        fetch(i, 3, 4);
        part = 2;
        async_wait<1>();
        meet();  // the residual is there
      } else {
        warp_barrier();  // x has been read
      }
#pragma unroll
      for (int k = 0; k < KT; ++k) {
        const int y_at = recomputed(tiles);
        unsigned char* at =
            unit_of(part + k / (KT / 2)) + (along ? y_at ^ k % (KT / 2) * 32 : y_at + k % (KT / 2) * 2048);
        uint32_t residual[4] = {}, y[4];
        if (with_residual) {
          if (along)
            load_matrix<4, false>(residual, at);
          else
            load_matrix<4, true>(residual, at);
          warp_barrier();  // and has been read
        }
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float* h = &state[8 * k + r / 2 * 4 + r % 2 * 2];
          float v[2] = {h[0], h[1]};
          if (p.scale) {
            const float2 added = unpack<T>(residual[r]);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int c = 16 * k + r / 2 * 8 + lane % 4 * 2 + j, channel = c < C ? c : C - 1;
              v[j] =
                  fma(static_cast<const float*>(p.scale)[channel], v[j], static_cast<const float*>(p.shift)[channel]) +
                  (j == 0 ? added.x : added.y);
              if (p.relu) v[j] = v[j] < 0 ? 0.0f : v[j];  // NaN stays
            }
          }
          y[r] = pack<T>(v[0], v[1]);
        }
        if (along)
          store_matrix<4, false>(at, y);
        else
          store_matrix<4, true>(at, y);
      }
      meet();  // y is complete
      T* to = static_cast<T*>(p.y.data) + time_of(i) * p.y.t;
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        const unsigned char* from = unit_of(part + half);
        for_half(p.y, offsets + P, half,
                 [&](Offset element, int at) { store_word(plan.vector_bytes / 2, to + element, from + at); });
      }
    }
    meet();  // the units are free
    unit = (unit + (with_residual ? 4 : 2)) % hopper_units;
  }
  if (p.last_kind == Last::none) return;
  locate(p.last, offsets + 2 * P);
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    for_state(half, [](float& h, float& at) { at = h; });
    meet();
    for_tile(thread, group_threads, p.last.c == 1, C - half * H < H ? C - half * H : H, P,
             [&](int64_t channel, int column) {
               if (column < columns)
                 store_state<T, float>(p.last, offsets[2 * P + column] + (half * H + channel) * p.last.c, p.dtype,
                                       wide[column * wide_pitch + channel]);
             });
    meet();
  }
}

template <typename T>
Error launch_as(const Scan& p, const HopperScanPlan& plan, Stream stream) {
  return launch("recurrent_conv hopper_scan", hopper_scan<T>, dim3(static_cast<unsigned>(plan.blocks)),
                dim3(hopper_threads), static_cast<size_t>(plan.shared_bytes), stream, p, plan);
}

}  // namespace

Error launch_hopper_scan(const Scan& p, const HopperScanPlan& plan, Stream stream) {
  return p.dtype == DType::bf16 ? launch_as<__nv_bfloat16>(p, plan, stream) : launch_as<__half>(p, plan, stream);
}

#else

Error launch_hopper_scan(const Scan&, const HopperScanPlan&, Stream) {
  return "recurrent_conv hopper_scan: this build holds no code for sm_90a";
}

#endif

}  // namespace rcu_ops::cuda
