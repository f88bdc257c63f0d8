// wgmma: d += a b on the matrix unit of an sm_90a, by a warpgroup: 4 warps, the first one's index a multiple of 4,
// together.
//
// Shapes. d [64][N] in fp32, a [64][16], b [16][N], T bf16 or half. Warp w of the group holds rows 16 w .. 16 w + 15 of
// d and of an a in registers. With g = lane / 4 and q = lane % 4 (PTX manual, "Register Fragments and Shared Memory
// Matrix Layouts"):
//     d   d[4 n + j]: row 16 w + g + 8 (j / 2), column 8 n + 2 q + j % 2
//     a   as mma_m16n8k16's: a0: row g, k 2q..;  a1: row g+8, k 2q..;  a2: row g, k 2q+8..;  a3: row g+8, k 2q+8..
// so that d rounded and packed is the a of a product over its columns. Other operands: shared_matrix.h.
//
// Order. The products run beside the threads: wgmma_fence(d) after the last ordinary access to d (and to an a in
// registers), then the products, which may accumulate into the same d, then wgmma_commit(); wgmma_wait<N>(d) returns
// when all but the newest N committed groups are done. Until then d is not touched, nor an a in registers, nor what
// lies in shared memory. Shared memory that ordinary stores wrote needs an async_proxy_fence before the barrier
// (barrier.h).
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device/runtime.h"
#include "cuda/device/shared_matrix.h"

namespace rcu_ops::cuda {

// The compiler must not move what it knows of d across the instruction.
template <int Count>
__device__ __forceinline__ void pin(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int Count>
__device__ __forceinline__ void wgmma_fence(float (&d)[Count]) {
  pin(d);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Groups, int Count>
__device__ __forceinline__ void wgmma_wait(float (&d)[Count]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Groups) : "memory");
  pin(d);
}

#define RCU_OPS_D8(i)                                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define RCU_OPS_D32(i) RCU_OPS_D8(i), RCU_OPS_D8(i + 8), RCU_OPS_D8(i + 16), RCU_OPS_D8(i + 24)
#define RCU_OPS_WGMMA_REGISTERS_32                                         \
  "{"                                                                      \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19," \
  "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"                        \
  "}, "
#define RCU_OPS_WGMMA_D_32 RCU_OPS_D32(0)
#define RCU_OPS_WGMMA_REGISTERS_64                                                   \
  "{"                                                                                \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,"           \
  "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39," \
  "%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59," \
  "%60,%61,%62,%63"                                                                  \
  "}, "
#define RCU_OPS_WGMMA_D_64 RCU_OPS_D32(0), RCU_OPS_D32(32)
#define RCU_OPS_WGMMA_REGISTERS_128                                                                      \
  "{"                                                                                                    \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,"                               \
  "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,"                     \
  "%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,"                     \
  "%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"                     \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,"                     \
  "%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119," \
  "%120,%121,%122,%123,%124,%125,%126,%127"                                                              \
  "}, "
#define RCU_OPS_WGMMA_D_128 RCU_OPS_D32(0), RCU_OPS_D32(32), RCU_OPS_D32(64), RCU_OPS_D32(96)

// d, then a in four registers or in shared memory, b; accumulating, no negation, b (and a) K-major.
#define RCU_OPS_WGMMA_REGISTERS_A(N, COUNT, TYPE, A0, A1, A2, A3, B)                                               \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " RCU_OPS_WGMMA_REGISTERS_##COUNT \
               "{%" #A0 ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", 1, 1, 1, 0;"                                       \
               : RCU_OPS_WGMMA_D_##COUNT                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()))
#define RCU_OPS_WGMMA_SHARED_A(N, COUNT, TYPE, A, B)                                                               \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " RCU_OPS_WGMMA_REGISTERS_##COUNT \
               "%" #A ", %" #B ", 1, 1, 1, 0, 0;"                                                                  \
               : RCU_OPS_WGMMA_D_##COUNT                                                                           \
               : "l"(a.bits()), "l"(b.bits()))

template <typename T, int Count>
__device__ __forceinline__ void wgmma(float (&d)[Count], const uint32_t (&a)[4], SharedMatrix b) {
  constexpr bool bf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(bf16 || std::is_same_v<T, __half>);
  static_assert(Count == 32 || Count == 64 || Count == 128, "N = 64, 128 or 256");
  if constexpr (bf16 && Count == 32)
    RCU_OPS_WGMMA_REGISTERS_A(64, 32, "bf16", 32, 33, 34, 35, 36);
  else if constexpr (!bf16 && Count == 32)
    RCU_OPS_WGMMA_REGISTERS_A(64, 32, "f16", 32, 33, 34, 35, 36);
  else if constexpr (bf16 && Count == 64)
    RCU_OPS_WGMMA_REGISTERS_A(128, 64, "bf16", 64, 65, 66, 67, 68);
  else if constexpr (!bf16 && Count == 64)
    RCU_OPS_WGMMA_REGISTERS_A(128, 64, "f16", 64, 65, 66, 67, 68);
  else if constexpr (bf16 && Count == 128)
    RCU_OPS_WGMMA_REGISTERS_A(256, 128, "bf16", 128, 129, 130, 131, 132);
  else if constexpr (!bf16 && Count == 128)
    RCU_OPS_WGMMA_REGISTERS_A(256, 128, "f16", 128, 129, 130, 131, 132);
}

template <typename T, int Count>
__device__ __forceinline__ void wgmma(float (&d)[Count], SharedMatrix a, SharedMatrix b) {
  constexpr bool bf16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(bf16 || std::is_same_v<T, __half>);
  static_assert(Count == 32 || Count == 64 || Count == 128, "N = 64, 128 or 256");
  if constexpr (bf16 && Count == 32)
    RCU_OPS_WGMMA_SHARED_A(64, 32, "bf16", 32, 33);
  else if constexpr (!bf16 && Count == 32)
    RCU_OPS_WGMMA_SHARED_A(64, 32, "f16", 32, 33);
  else if constexpr (bf16 && Count == 64)
    RCU_OPS_WGMMA_SHARED_A(128, 64, "bf16", 64, 65);
  else if constexpr (!bf16 && Count == 64)
    RCU_OPS_WGMMA_SHARED_A(128, 64, "f16", 64, 65);
  else if constexpr (bf16 && Count == 128)
    RCU_OPS_WGMMA_SHARED_A(256, 128, "bf16", 128, 129);
  else if constexpr (!bf16 && Count == 128)
    RCU_OPS_WGMMA_SHARED_A(256, 128, "f16", 128, 129);
}

#undef RCU_OPS_WGMMA_REGISTERS_A
#undef RCU_OPS_WGMMA_SHARED_A
#undef RCU_OPS_D8
#undef RCU_OPS_D32
#undef RCU_OPS_WGMMA_REGISTERS_32
#undef RCU_OPS_WGMMA_D_32
#undef RCU_OPS_WGMMA_REGISTERS_64
#undef RCU_OPS_WGMMA_D_64
#undef RCU_OPS_WGMMA_REGISTERS_128
#undef RCU_OPS_WGMMA_D_128

}  // namespace rcu_ops::cuda
