// stmatrix for devices without it: every lane stores what it holds by ordinary instructions.
#pragma once

#include <cstdint>

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

// As store_matrix in matrix_store.h.
template <int Count, bool Transposed, typename RowAt>
__device__ __forceinline__ void store_matrix_plain(void* base, const RowAt& row_at, const uint32_t (&r)[Count]) {
  const int lane = threadIdx.x % 32;
  const auto row = [&](int number) { return static_cast<unsigned char*>(base) + row_at(number); };
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    if constexpr (!Transposed) {
      reinterpret_cast<uint32_t*>(row(8 * i + lane / 4))[lane % 4] = r[i];
    } else {
      const int even = 8 * i + 2 * (lane % 4);
      reinterpret_cast<uint16_t*>(row(even))[lane / 4] = static_cast<uint16_t>(r[i]);
      reinterpret_cast<uint16_t*>(row(even + 1))[lane / 4] = static_cast<uint16_t>(r[i] >> 16);
    }
  }
}

}  // namespace rcu_ops::cuda
