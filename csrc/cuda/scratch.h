// Memory that a launch needs beside its arguments. Host code.
#pragma once

#include "common/text.h"

#include <cstdint>

struct CUstream_st;

namespace rcu_ops::cuda {

// Bytes of uninitialised device memory, aligned to 16; error: why there is no answer, empty otherwise.
struct Scratch {
  int64_t bytes = 0;
  Text error;
};

}  // namespace rcu_ops::cuda
