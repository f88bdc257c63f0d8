// Host twin of csrc/cuda/device/matrix_store.h; see matrix_copy.h.
#pragma once

#include <cstdint>

#include "cuda/device/matrix_copy.h"
#include "cuda/device/matrix_store_plain.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

template <int Count, bool Transposed>
void store_matrix(void* row, const uint32_t (&r)[Count], cuda_host::Location where = cuda_host::Location::current()) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
  const auto all = matrix_host::rows<Count>("store_matrix", row, where);
  const int g = cuda_host::lane() / 4, q = cuda_host::lane() % 4;
  for (int i = 0; i < Count; ++i)
    for (int j = 0; j < 2; ++j) {
      const auto half = static_cast<uint16_t>(r[i] >> (16 * j));
      if (Transposed)
        reinterpret_cast<uint16_t*>(all[8 * i + 2 * q + j])[g] = half;
      else
        reinterpret_cast<uint16_t*>(all[8 * i + g])[2 * q + j] = half;
    }
}

template <int Count, bool Transposed, typename RowAt>
void store_matrix(unsigned char* base, int own_at, const RowAt& row_at, const uint32_t (&r)[Count],
                  cuda_host::Location where = cuda_host::Location::current()) {
  const auto all = matrix_host::rows<Count>("store_matrix", base + own_at, where);
  for (int n = 0; n < 8 * Count; ++n)
    if (all[n] != reinterpret_cast<uintptr_t>(base + row_at(n))) cuda_host::fail("row_at is not own_at", where);
  store_matrix<Count, Transposed>(base + own_at, r, where);
}

}  // namespace rcu_ops::cuda
