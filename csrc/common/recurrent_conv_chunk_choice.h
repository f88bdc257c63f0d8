// recurrent_conv in chunks of frames side by side: what the user may say about it, on every device.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>

#include "recurrent_conv.h"

namespace rcu_ops {

// RCU_OPS_CHUNK: 0 never chunks, L > 0 always with chunks of L frames; unset: as planned. Beside it
// RCU_OPS_CHUNK_LIBRARY makes CPU tensors take the library form, which CUDA tensors take.
inline std::optional<int64_t> forced_chunk() {
  const char* forced = std::getenv("RCU_OPS_CHUNK");
  if (!forced || !*forced) return std::nullopt;
  char* end;
  const long long value = std::strtoll(forced, &end, 10);
  if (*end || value < 0)
    throw std::runtime_error(std::string("RCU_OPS_CHUNK: expected a number of frames, 0 for none, got '") + forced +
                             "'");
  return value;
}

// Never in fp64, for which nothing more precise is at hand to keep powers of W in, nor with parts of other operators.
inline bool can_be_chunked(const Scan& p) {
  return p.T >= 2 && p.dtype != DType::f64 && p.N * p.H * p.W > 0 && !p.norm.present();
}

}  // namespace rcu_ops
