// Several sums over a warp at once, in fewer shuffles than one after the other.
#pragma once

#include "cuda/device/runtime.h"
#include "cuda/device/shuffle.h"

namespace rcu_ops::cuda {

// Sums over the warp of Count numbers of every lane, a power of two up to 32: of lanes 16 apart, then 8, and so on. Lane l
// gets that of number l / (32 / Count). Uses `values` up. Each halving is a function of its own: in a loop whose bounds
// change from turn to turn 32 values would not stay in registers.
template <int Mask = 16, int Count, typename T>
__device__ __forceinline__ T sums_of_warp(T (&values)[Count]) {
  if constexpr (Count == 1) {
#pragma unroll
    for (int mask = Mask; mask > 0; mask /= 2) values[0] += shuffle_xor(values[0], mask);
    return values[0];
  } else {
    const bool high = static_cast<int>(threadIdx.x) & Mask;
    T half[Count / 2];
#pragma unroll
    for (int j = 0; j < Count / 2; ++j) {
      const T given = high ? values[j] : values[j + Count / 2];
      half[j] = (high ? values[j + Count / 2] : values[j]) + shuffle_xor(given, Mask);
    }
    return sums_of_warp<Mask / 2>(half);
  }
}

}  // namespace rcu_ops::cuda
