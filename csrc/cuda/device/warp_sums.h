// Several sums over a warp at once, in fewer shuffles than one after the other.
#pragma once

#include "cuda/device/runtime.h"
#include "cuda/device/shuffle.h"

namespace rcu_ops::cuda {

// Sums over the warp of Count numbers of every lane, a power of two: of lanes 16 apart, then 8, and so on. Lane l gets that
// of number l / (32 / Count). Uses `values` up.
template <int Count, typename T>
__device__ __forceinline__ T sums_of_warp(T (&values)[Count]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int mask = 16, count = Count / 2; count > 0; mask /= 2, count /= 2)
#pragma unroll
    for (int j = 0; j < count; ++j) {
      const bool high = lane & mask;
      const T given = high ? values[j] : values[j + count];
      values[j] = (high ? values[j + count] : values[j]) + shuffle_xor(given, mask);
    }
#pragma unroll
  for (int mask = 16 / Count; mask > 0; mask /= 2) values[0] += shuffle_xor(values[0], mask);
  return values[0];
}

}  // namespace rcu_ops::cuda
