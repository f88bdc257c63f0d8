// Host twin of csrc/cuda/device/wgmma.h. Every thread computes its own elements when it waits, and reads what they need
// of the operands in shared memory, so that the sanitizers see it.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/device/convert.h"
#include "cuda/device/mma.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shared_matrix.h"

namespace rcu_ops::cuda {

namespace wgmma_host {

// What a descriptor says, read as the PTX manual prints it: the kernels' own code has put it together.
class Reader {
 public:
  Reader(SharedMatrix matrix, const cuda_host::Location& where) : bits_(matrix.bits()), where_(where) {
    constexpr uint64_t meant = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 3ull << 62;
    if (bits_ & ~meant) cuda_host::fail("a matrix descriptor with bits that mean nothing, or a base offset", where);
    const uint32_t row_bytes = 256u >> (bits_ >> 62), period = 8 * row_bytes;
    if (bits_ >> 62 != 0 && (field(0) % period >= row_bytes || field(32) % period != 0))
      cuda_host::fail("a swizzled matrix whose rows of 8 are not aligned to " + std::to_string(period) + " bytes",
                      where);
  }
  // The bits of number (row, k).
  uint16_t read(unsigned row, unsigned k) const {
    const unsigned mode = static_cast<unsigned>(bits_ >> 62), row_bytes = mode == 0 ? 16 : 256u >> mode;
    uint32_t at = field(0) + row / 8 * field(32) + row % 8 * row_bytes;
    at += mode == 0 ? k / 8 * field(16) + k % 8 * 2 : 2 * k;
    at ^= (at >> 7 & (row_bytes / 16 - 1)) << 4;
    return cuda_host::read_of_product(cuda_host::shared_at(at, 2, where_));
  }

 private:
  uint32_t field(int from) const { return static_cast<uint32_t>(bits_ >> from & 0x3fff) << 4; }
  uint64_t bits_;
  cuda_host::Location where_;
};

template <typename T>
double value(uint16_t bits) {
  return unpack<T>(bits).x;
}

// a(row of this warp's 16, k), called while the product completes.
template <typename T, int Count, typename A>
void multiply(float* d, std::vector<float>& sums, const Reader& b, A a) {
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
cuda_host::Accumulators& begin(float (&d)[Count], const cuda_host::Location& where) {
  static_assert(Count == 32 || Count == 64 || Count == 128, "N = 64, 128 or 256");
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
  auto& sums = wgmma_host::begin(d, where).values;
  const wgmma_host::Reader right(b, where);
  cuda_host::issue_product([to = &d[0], from = &a[0], &sums, right](const cuda_host::Location& wait) {
    const auto all = cuda_host::exchange("wgmma_wait", Registers{{from[0], from[1], from[2], from[3]}}, wait);
    wgmma_host::multiply<T, Count>(to, sums, right, [&](unsigned row, unsigned k) {
      const uint32_t pair = all[static_cast<int>(row % 8 * 4 + k % 8 / 2)].a[row / 8 + 2 * (k / 8)];
      return wgmma_host::value<T>(static_cast<uint16_t>(k % 2 ? pair >> 16 : pair));
    });
  });
}

template <typename T, int Count>
void wgmma(float (&d)[Count], SharedMatrix a, SharedMatrix b,
           cuda_host::Location where = cuda_host::Location::current()) {
  auto& sums = wgmma_host::begin(d, where).values;
  const wgmma_host::Reader left(a, where), right(b, where);
  cuda_host::issue_product([to = &d[0], &sums, left, right](const cuda_host::Location&) {
    const unsigned first = static_cast<unsigned>(threadIdx.x) / 32 % 4 * 16;
    const auto a_of = [&](unsigned row, unsigned k) { return wgmma_host::value<T>(left.read(first + row, k)); };
    wgmma_host::multiply<T, Count>(to, sums, right, a_of);
  });
}

}  // namespace rcu_ops::cuda
