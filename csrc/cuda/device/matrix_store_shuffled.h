// stmatrix for devices without it: every lane fetches the row addresses it needs from the lanes that hold them.
#pragma once

#include <cstdint>

#include "cuda/device/runtime.h"
#include "cuda/device/shuffle.h"

namespace rcu_ops::cuda {

// As store_matrix in matrix_store.h.
template <int Count, bool Transposed>
__device__ __forceinline__ void store_matrix_shuffled(void* row, const uint32_t (&r)[Count]) {
  const int lane = threadIdx.x % 32;
  const auto mine = reinterpret_cast<unsigned long long>(row);
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    if constexpr (!Transposed) {
      const auto at = shuffle(mine, 8 * i + lane / 4);
      reinterpret_cast<uint32_t*>(at)[lane % 4] = r[i];
    } else {
      const auto even = shuffle(mine, 8 * i + 2 * (lane % 4)), odd = shuffle(mine, 8 * i + 2 * (lane % 4) + 1);
      reinterpret_cast<uint16_t*>(even)[lane / 4] = static_cast<uint16_t>(r[i]);
      reinterpret_cast<uint16_t*>(odd)[lane / 4] = static_cast<uint16_t>(r[i] >> 16);
    }
  }
}

}  // namespace rcu_ops::cuda
