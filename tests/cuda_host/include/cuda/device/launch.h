// Host twin of csrc/cuda/device/launch.h.
#pragma once

#include <cstddef>
#include <string>
#include <tuple>

#include "common/gpu.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

using Error = std::string;

template <typename... Parameters, typename... Arguments>
Error launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream,
             Arguments&&... arguments) {
  const std::tuple<Parameters...> copies(static_cast<Parameters>(arguments)...);
  return cuda_host::run(name, grid, block, shared_bytes, [&] { std::apply(kernel, copies); });
}

inline Error current_gpu(Gpu& gpu) {
  gpu = Gpu{cuda_host::options.architecture, cuda_host::options.multiprocessors, cuda_host::options.shared_bytes};
  return {};
}

}  // namespace rcu_ops::cuda
