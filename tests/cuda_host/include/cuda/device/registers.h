// Host twin of csrc/cuda/device/registers.h.
#pragma once

namespace rcu_ops::cuda {

inline int recomputed(int value) { return value; }

}  // namespace rcu_ops::cuda
