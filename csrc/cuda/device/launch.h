// Launching kernels, and what a planner must know of the current device. Host code.
#pragma once

#include <cstddef>
#include <string>

#include "common/gpu.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

using Error = std::string;  // empty: success; allocates nothing then

inline Error error_text(const char* what, cudaError_t status) {
  if (status == cudaSuccess) return {};
  return std::string(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")";
}

// Enqueue `kernel` on `stream`. `shared_bytes` of dynamic shared memory, any amount the device has. The arguments are
// converted to the kernel's parameter types and copied, so they may go out of scope. An error of the launch itself comes
// back as text; one inside the kernel shows at the next synchronisation, as always with CUDA.
template <typename... Parameters, typename... Arguments>
Error launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
             Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for each of the kernel's parameters");
  if (shared_bytes > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (status != cudaSuccess) {
      cudaGetLastError();  // the error is reported here and must not surface again in somebody else's check
      return error_text(name, status) + ", asking for " + std::to_string(shared_bytes) + " bytes of shared memory";
    }
  }
  const cudaError_t status = [&](Parameters... copies) {
    void* pointers[] = {static_cast<void*>(&copies)...};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared_bytes, stream);
  }(static_cast<Parameters>(arguments)...);
  if (status == cudaSuccess) return {};
  cudaGetLastError();
  return error_text(name, status) + ", launching " + std::to_string(grid.x) + "x" + std::to_string(grid.y) + "x" +
         std::to_string(grid.z) + " blocks of " + std::to_string(block.x * block.y * block.z) + " threads";
}

// The current device's limits.
inline Error current_gpu(Gpu& gpu) {
  int device = 0, major = 0, minor = 0, multiprocessors = 0, per_block = 0;
  cudaError_t status = cudaGetDevice(&device);
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  ask(&minor, cudaDevAttrComputeCapabilityMinor);
  ask(&multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(&per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  gpu = Gpu{10 * major + minor, multiprocessors, per_block};
  return error_text("the current device's attributes", status);
}

}  // namespace rcu_ops::cuda
