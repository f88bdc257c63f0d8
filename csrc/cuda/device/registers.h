// What the compiler keeps in registers.
#pragma once

#include <cstdint>

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

// `value`, of which the compiler knows nothing any more: what follows from it is computed where it is used, and not
// kept from one iteration of a loop to the next.
__device__ __forceinline__ int recomputed(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ __forceinline__ int64_t recomputed(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}

}  // namespace rcu_ops::cuda
