// stmatrix: matrix_copy.h's tiles back from fragments to shared memory.
//
// The code differs between architectures, so that files which include this are compiled once for each: the build reads
// that off their include of it, and defines RCU_OPS_EACH_ARCHITECTURE. All others share one front end.
#pragma once

#include <cstdint>

#include "cuda/device/matrix_store_plain.h"
#include "cuda/device/runtime.h"

#ifndef RCU_OPS_EACH_ARCHITECTURE
#error "a .cu file must include cuda/device/matrix_store.h itself, so that it is compiled for each architecture"
#endif

namespace rcu_ops::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// `row`: the address of row lane % 8 of tile lane / 8.
template <int Count, bool Transposed>
__device__ __forceinline__ void store_matrix(void* row, const uint32_t (&r)[Count]) {
  static_assert(Count == 1 || Count == 2 || Count == 4);
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (Count == 1 && !Transposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(to), "r"(r[0]) : "memory");
  else if constexpr (Count == 1)
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(to), "r"(r[0]) : "memory");
  else if constexpr (Count == 2 && !Transposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};" ::"r"(to), "r"(r[0]), "r"(r[1]) : "memory");
  else if constexpr (Count == 2)
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(to), "r"(r[0]), "r"(r[1])
                 : "memory");
  else if constexpr (!Transposed)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(to), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}
#endif

// Row n % 8 of tile n / 8 lies row_at(n) bytes from `base`, and `own_at` is row_at(lane). One instruction on sm_90 and
// later, which takes own_at; before, ordinary stores, for which a lane finds the rows that it has numbers of.
template <int Count, bool Transposed, typename RowAt>
__device__ __forceinline__ void store_matrix(unsigned char* base, int own_at, const RowAt& row_at,
                                             const uint32_t (&r)[Count]) {
#if __CUDA_ARCH__ >= 900
  store_matrix<Count, Transposed>(base + own_at, r);
#else
  store_matrix_plain<Count, Transposed>(base, row_at, r);
#endif
}

}  // namespace rcu_ops::cuda
