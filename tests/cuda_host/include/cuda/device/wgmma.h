// Host twin of csrc/cuda/device/wgmma.h. Every thread computes its own elements when it waits, and reads what they need of the
// operands in shared memory, so that the sanitizers see it.
#pragma once

#include <cstdint>

#include "cuda/device/convert.h"
#include "cuda/device/mma.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

enum class Swizzle : uint64_t { none = 0, row128 = 1, row64 = 2, row32 = 3 };

class SharedMatrix {
 public:
  SharedMatrix(const void* start, Swizzle swizzle, unsigned next_rows, unsigned next_k = 16)
      : start_(reinterpret_cast<uintptr_t>(start)), swizzle_(swizzle), next_rows_(next_rows), next_k_(next_k) {}
  SharedMatrix at(unsigned bytes) const {
    SharedMatrix further = *this;
    further.start_ += bytes;
    return further;
  }
  bool aligned() const { return start_ % 16 == 0 && next_rows_ % 16 == 0 && next_k_ % 16 == 0; }

  // The bits of number (row, k).
  uint16_t read(unsigned row, unsigned k) const {
    const unsigned words = swizzle_ == Swizzle::none ? 1 : 16u >> static_cast<unsigned>(swizzle_);  // of 16 bytes in a row
    uintptr_t at = start_ + row / 8 * next_rows_ + row % 8 * (16 * words);
    at += swizzle_ == Swizzle::none ? k / 8 * next_k_ + k % 8 * 2 : 2 * k;
    at ^= (at >> 7 & (words - 1)) << 4;
    return *reinterpret_cast<const uint16_t*>(at);
  }

 private:
  uintptr_t start_;
  Swizzle swizzle_;
  unsigned next_rows_, next_k_;
};

namespace wgmma_host {

template <typename T>
double value(uint16_t bits) {
  return unpack<T>(bits).x;
}

// a(row of this warp's 16, k), called while the product completes.
template <typename T, int Count, typename A>
void multiply(float* d, std::vector<float>& sums, const SharedMatrix& b, A a) {
  const unsigned g = static_cast<unsigned>(cuda_host::lane()) / 4, q = static_cast<unsigned>(cuda_host::lane()) % 4;
  double rows[2][16];
  for (unsigned half = 0; half < 2; ++half)
    for (unsigned k = 0; k < 16; ++k) rows[half][k] = a(g + 8 * half, k);
  for (unsigned n = 0; n < Count / 4; ++n)
    for (unsigned column = 0; column < 2; ++column) {
      double upper = sums[4 * n + column], lower = sums[4 * n + 2 + column];
      for (unsigned k = 0; k < 16; ++k) {
        const double factor = value<T>(b.read(8 * n + 2 * q + column, k));
        upper += rows[0][k] * factor;
        lower += rows[1][k] * factor;
      }
      sums[4 * n + column] = mma_host::truncated(upper);
      sums[4 * n + 2 + column] = mma_host::truncated(lower);
    }
  cuda_host::end_product(d);
}

template <int Count>
cuda_host::Accumulators& begin(float (&d)[Count], const SharedMatrix& b, const cuda_host::Location& where) {
  static_assert(Count == 32 || Count == 64 || Count == 128, "N = 64, 128 or 256");
  if (!b.aligned()) cuda_host::fail("a matrix in shared memory is not aligned to 16 bytes", where);
  cuda_host::exchange("wgmma", 0, where);
  return cuda_host::begin_product(d, Count, where);
}

}  // namespace wgmma_host

template <int Count>
void wgmma_fence(float (&)[Count]) {
  cuda_host::product_fence();
}
inline void wgmma_commit() { cuda_host::product_commit(); }
template <int Groups, int Count>
void wgmma_wait(float (&)[Count], cuda_host::Location where = cuda_host::Location::current()) {
  cuda_host::product_wait(Groups, where);
}

template <typename T, int Count>
void wgmma(float (&d)[Count], const uint32_t (&a)[4], SharedMatrix b,
           cuda_host::Location where = cuda_host::Location::current()) {
  struct Registers {
    uint32_t a[4];
  };
  auto& sums = wgmma_host::begin(d, b, where).values;
  cuda_host::issue_product([to = &d[0], from = &a[0], &sums, b](const cuda_host::Location& wait) {
    const auto all = cuda_host::exchange("wgmma_wait", Registers{{from[0], from[1], from[2], from[3]}}, wait);
    wgmma_host::multiply<T, Count>(to, sums, b, [&](unsigned row, unsigned k) {
      const uint32_t pair = all[static_cast<int>(row % 8 * 4 + k % 8 / 2)].a[row / 8 + 2 * (k / 8)];
      return wgmma_host::value<T>(static_cast<uint16_t>(k % 2 ? pair >> 16 : pair));
    });
  });
}

template <typename T, int Count>
void wgmma(float (&d)[Count], SharedMatrix a, SharedMatrix b, cuda_host::Location where = cuda_host::Location::current()) {
  if (!a.aligned()) cuda_host::fail("a matrix in shared memory is not aligned to 16 bytes", where);
  auto& sums = wgmma_host::begin(d, b, where).values;
  cuda_host::issue_product([to = &d[0], &sums, a, b](const cuda_host::Location&) {
    const unsigned first = static_cast<unsigned>(threadIdx.x) / 32 % 4 * 16;
    wgmma_host::multiply<T, Count>(to, sums, b,
                                   [&](unsigned row, unsigned k) { return wgmma_host::value<T>(a.read(first + row, k)); });
  });
}

}  // namespace rcu_ops::cuda
