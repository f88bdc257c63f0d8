// A step of the weight gradient's sums on the matrix unit, for the kernels that have dx and h in slots.
#pragma once

#include <cstdint>

#include "cuda/device/matrix_copy.h"
#include "cuda/device/mma.h"
#include "cuda/device/registers.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {
namespace {

// acc += dx[rows][outputs]^T h[rows][inputs] of 16 rows from `row` on, outputs from `output` and inputs from `input`
// on, by one warp. Slots of 16-bit numbers have one row per row of the sum (Channels) or per channel, `pitch` bytes
// apart, an odd number of 16-byte words. Both factors become fragments by ldmatrix, transposed where channels are
// contiguous.
template <typename Format, bool Channels, int MT, int NT>
__device__ __forceinline__ void add_weight_sums(float (&acc)[MT][NT][4], const unsigned char* dx,
                                                const unsigned char* h, int pitch, int row, int output, int input) {
  static_assert(NT % 2 == 0);
  const int lane = recomputed(static_cast<int>(threadIdx.x)) % 32, tile = lane / 8, tile_row = lane % 8;
  // This lane's row of four 8 x 8 tiles, 16 channels from `channel` x these 16 rows: channels first (of dx, in the
  // order of a's registers) or rows first (of h, two b).
  const auto tiles_at = [&](const unsigned char* slot, int channel, bool rows_first) {
    const int second = tile % 2 * 8, third = tile / 2 * 8;
    const int at_channel = channel + (rows_first ? third : second), at_row = row + (rows_first ? second : third);
    return Channels ? slot + (at_row + tile_row) * pitch + 2 * at_channel
                    : slot + (at_channel + tile_row) * pitch + 2 * at_row;
  };
  uint32_t a[MT][4];
#pragma unroll
  for (int m = 0; m < MT; ++m) load_matrix<4, Channels>(a[m], tiles_at(dx, output + 16 * m, false));
#pragma unroll
  for (int n = 0; n < NT; n += 2) {
    uint32_t b[4];
    load_matrix<4, Channels>(b, tiles_at(h, input + 8 * n, true));
    const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      mma_m16n8k16<Format>(acc[m][n], a[m], left);
      mma_m16n8k16<Format>(acc[m][n + 1], a[m], right);
    }
  }
}

// Calls visit(element of acc, output, input) for this lane's, outputs and inputs from the warp's first ones on.
template <int MT, int NT, typename Visit>
__device__ __forceinline__ void for_weight_sums(const float (&acc)[MT][NT][4], Visit visit) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) visit(acc[m][n][j], 16 * m + j / 2 * 8 + lane / 4, 8 * n + lane % 4 * 2 + j % 2);
}

}  // namespace
}  // namespace rcu_ops::cuda
