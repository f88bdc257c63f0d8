// What the host code and the kernels of every op agree on. Plain types, no torch, no CUDA.
#pragma once

#include <cstdint>

namespace rcu_ops {

enum class DType : int32_t { f64, f32, bf16, f16 };

constexpr int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
// Of the type in which numbers of `dtype` are added up: fp64 for fp64, fp32 for all others.
constexpr int64_t state_size(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// The caller's thread pool: runs task(context, 0..count-1), each exactly once, in any order and on any thread.
struct Parallel {
  int threads = 1;
  void (*run)(void* pool, int64_t count, void (*task)(void* context, int64_t index), void* context) = nullptr;
  void* pool = nullptr;
};

}  // namespace rcu_ops
