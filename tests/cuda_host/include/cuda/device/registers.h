// Host twin of csrc/cuda/device/registers.h.
#pragma once

#include <cstdint>

namespace rcu_ops::cuda {

inline int recomputed(int value) { return value; }
inline int64_t recomputed(int64_t value) { return value; }

}  // namespace rcu_ops::cuda
