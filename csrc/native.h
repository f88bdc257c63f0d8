// What the planners' Python functions share.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "common/types.h"

namespace rcu_ops {

inline DType parse_dtype(const std::string& name) {
  if (name == "float64") return DType::f64;
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw pybind11::value_error("dtype: expected float64, float32, bfloat16 or float16, got '" + name + "'");
}

}  // namespace rcu_ops
