// A matrix in shared memory as wgmma reads it: the descriptor of the PTX manual ("Matrix Descriptor Format").
#pragma once

#include <cstdint>

#include "cuda/device/runtime.h"
#include "cuda/device/shared_memory.h"

namespace rcu_ops::cuda {

// How the 16-byte words of a matrix in shared memory are permuted: bits 4.. of the address, as many as the period of
// `row` bytes needs, are XORed with bits 7... The value is the descriptor's.
enum class Swizzle : uint64_t { none = 0, row128 = 1, row64 = 2, row32 = 3 };

// A matrix of 16-bit numbers in shared memory, K-major: 8 rows (of a: M; of b: columns, N) follow each other, each 16
// bytes (none) or the swizzle's row of 16-bit numbers along k. `next_rows` bytes on are the next 8 rows (the manual's
// stride dimension). Without a swizzle the next 8 numbers along k are `next_k` bytes on (the leading dimension); with
// one they follow in the row, and the address of the matrix may begin at a multiple of 32 bytes within it. Rows of 8
// are aligned to the period of the swizzle: 8 times its row, which is what a base offset of 0 says. Everything is a
// multiple of 16 bytes and below 256 KiB.
class SharedMatrix {
 public:
  __device__ __forceinline__ SharedMatrix(const void* start, Swizzle swizzle, unsigned next_rows, unsigned next_k = 16)
      : bits_(static_cast<uint64_t>(shared_address<16>(start) >> 4) |
              static_cast<uint64_t>(shared_distance<16>(next_k) >> 4) << 16 |
              static_cast<uint64_t>(shared_distance<16>(next_rows) >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62) {
  }

  // The same `bytes` further on.
  __device__ __forceinline__ SharedMatrix at(unsigned bytes) const {
    return SharedMatrix(bits_ + (shared_distance<16>(bytes) >> 4));
  }

  __device__ __forceinline__ uint64_t bits() const { return bits_; }

 private:
  __device__ __forceinline__ explicit SharedMatrix(uint64_t bits) : bits_(bits) {}
  uint64_t bits_;
};

}  // namespace rcu_ops::cuda
