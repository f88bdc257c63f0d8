// What the planners know of a GPU. Plain numbers: a plan can be made, and tested, for a device that is not there.
#pragma once

#include <cstdint>

namespace rcu_ops {

struct Gpu {
  int architecture = 80;          // 10 * major + minor
  int multiprocessors = 108;
  int64_t shared_bytes = 163 * 1024;  // most that one block may ask for
};

}  // namespace rcu_ops
