// Host twin of csrc/cuda/device/launch.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "common/gpu.h"
#include "cuda/device/launch_forms.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

template <typename... Parameters, typename... Arguments>
Error launch_together(const char* name, void (*kernel)(Parameters...), Together together, dim3 grid, dim3 block,
                      size_t shared_bytes, Stream, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for each of the kernel's parameters");
  const std::tuple<Parameters...> copies(static_cast<Parameters>(arguments)...);
  const cuda_host::Shape shape{grid, block, shared_bytes, together.cluster, together.grid};
  return cuda_host::run(name, shape, [&] { std::apply(kernel, copies); }).c_str();
}

template <typename... Parameters>
Error resident_blocks(const char*, void (*)(Parameters...), int cluster, int threads, size_t shared_bytes,
                      int64_t& blocks) {
  blocks = cuda_host::resident_blocks(threads, shared_bytes) / cluster * cluster;
  const int64_t fitting = int64_t{cluster} * cuda_host::options.clusters;
  if (cluster > 1 && blocks > fitting) blocks = fitting;
  return {};
}

inline Error fill_zero(void* memory, size_t bytes, Stream) {
  std::memset(memory, 0, bytes);
  return {};
}

inline Error current_gpu(Gpu& gpu) {
  gpu = Gpu{cuda_host::options.architecture, cuda_host::options.multiprocessors, cuda_host::options.shared_bytes,
            built_for_sm90a && cuda_host::options.architecture == 90};
  return {};
}

}  // namespace rcu_ops::cuda
