// Host twin of csrc/cuda/device/matrix_copy.h. Every lane reads and writes its own elements itself, so that the
// sanitizers see who touches what; and since nothing says which lane of the warp fetches a row, the one that names it
// reads it too.
#pragma once

#include <cstdint>

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

namespace matrix_host {

// The rows' addresses of Count tiles: each in the block's shared memory and aligned to 16 bytes.
template <int Count>
auto rows(const char* operation, const void* row, const cuda_host::Location& where) {
  if (cuda_host::lane() < 8 * Count) cuda_host::shared_address(row, 16, where);
  return cuda_host::exchange(operation, reinterpret_cast<uintptr_t>(row), where);
}

}  // namespace matrix_host

template <int Count, bool Transposed>
void load_matrix(uint32_t (&r)[Count], const void* row, cuda_host::Location where = cuda_host::Location::current()) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
  const auto all = matrix_host::rows<Count>("load_matrix", row, where);
  const int g = cuda_host::lane() / 4, q = cuda_host::lane() % 4;
  if (cuda_host::lane() < 8 * Count)
    for (int i = 0; i < 8; ++i) static_cast<void>(static_cast<const volatile uint16_t*>(row)[i]);
  for (int i = 0; i < Count; ++i) {
    uint32_t halves[2];
    for (int j = 0; j < 2; ++j)
      halves[j] = Transposed ? reinterpret_cast<const uint16_t*>(all[8 * i + 2 * q + j])[g]
                             : reinterpret_cast<const uint16_t*>(all[8 * i + g])[2 * q + j];
    r[i] = halves[0] | halves[1] << 16;
  }
}

}  // namespace rcu_ops::cuda
