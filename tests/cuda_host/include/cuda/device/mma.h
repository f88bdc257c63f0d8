// Host twin of csrc/cuda/device/mma.h: the register layouts of the PTX manual, sums exact and then truncated to fp32,
// which is the least that the matrix unit promises.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/device/convert.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

namespace mma_host {

struct Operands {
  uint32_t a[4], b[2];
};

inline float truncated(double sum) {
  const float nearest = static_cast<float>(sum);
  return std::isfinite(nearest) && std::fabs(static_cast<double>(nearest)) > std::fabs(sum)
             ? std::nextafterf(nearest, 0.0f)
             : nearest;
}

inline float tf32(uint32_t bits) {
  bits &= 0xffffe000u;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// d[row][column] += sum over k of a(row, k) b(k, column) for this lane's four elements.
template <typename A, typename B>
void multiply(float (&d)[4], int depth, A a, B b) {
  const int g = cuda_host::lane() / 4, q = cuda_host::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * q + i % 2;
    double sum = d[i];
    for (int k = 0; k < depth; ++k) sum += static_cast<double>(a(row, k)) * static_cast<double>(b(k, column));
    d[i] = truncated(sum);
  }
}

}  // namespace mma_host

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  cuda_host::Location where = cuda_host::Location::current()) {
  const auto all =
      cuda_host::exchange("mma_m16n8k16", mma_host::Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, where);
  const auto half_of = [](uint32_t bits, int k) {
    const float2 pair = unpack<T>(bits);
    return k % 2 ? pair.y : pair.x;
  };
  mma_host::multiply(
      d, 16, [&](int row, int k) { return half_of(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)], k); },
      [&](int k, int column) { return half_of(all[column * 4 + k % 8 / 2].b[k / 8], k); });
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             cuda_host::Location where = cuda_host::Location::current()) {
  const auto all =
      cuda_host::exchange("mma_m16n8k8_tf32", mma_host::Operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, where);
  mma_host::multiply(
      d, 8, [&](int row, int k) { return mma_host::tf32(all[row % 8 * 4 + k % 4].a[row / 8 + 2 * (k / 4)]); },
      [&](int k, int column) { return mma_host::tf32(all[column * 4 + k % 4].b[k / 4]); });
}

}  // namespace rcu_ops::cuda
