// Host twin of csrc/cuda/device/shuffle.h.
#pragma once

#include <cstdint>

#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

template <typename T>
T shuffle(T value, int lane, cuda_host::Location where = cuda_host::Location::current()) {
  return cuda_host::exchange("shuffle", value, where)[lane & 31];
}
template <typename T>
T shuffle_xor(T value, int mask, cuda_host::Location where = cuda_host::Location::current()) {
  const int from = cuda_host::lane() ^ mask;
  const auto all = cuda_host::exchange("shuffle_xor", value, where);
  return from < 32 ? all[from] : value;
}
template <typename T>
T shuffle_up(T value, int delta, cuda_host::Location where = cuda_host::Location::current()) {
  const int from = cuda_host::lane() - delta;
  const auto all = cuda_host::exchange("shuffle_up", value, where);
  return from >= 0 ? all[from] : value;
}
template <typename T>
T shuffle_down(T value, int delta, cuda_host::Location where = cuda_host::Location::current()) {
  const int from = cuda_host::lane() + delta;
  const auto all = cuda_host::exchange("shuffle_down", value, where);
  return from < 32 ? all[from] : value;
}

inline uint32_t ballot(bool value, cuda_host::Location where = cuda_host::Location::current()) {
  const auto all = cuda_host::exchange("ballot", value, where);
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<uint32_t>(all[lane]) << lane;
  return bits;
}
inline int lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }

}  // namespace rcu_ops::cuda
