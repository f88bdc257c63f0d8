// What the native_<op>.cpp files share: names from Python to what the planners take.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "common/gpu.h"
#include "common/types.h"

namespace rcu_ops {

inline DType parse_dtype(const std::string& name) {
  if (name == "float64") return DType::f64;
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw pybind11::value_error("dtype: expected float64, float32, bfloat16 or float16, got '" + name + "'");
}

// sm90a: the library has code for sm_90a; whoever asks about the library at hand reads that off its build's record.
inline Gpu gpu_of(int architecture, int multiprocessors, int64_t shared_bytes, bool sm90a) {
  Gpu gpu;
  gpu.architecture = architecture, gpu.multiprocessors = multiprocessors, gpu.shared_bytes = shared_bytes;
  gpu.sm90a = sm90a && architecture == 90;
  return gpu;
}

}  // namespace rcu_ops
