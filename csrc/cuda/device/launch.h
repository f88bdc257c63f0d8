// Launching kernels, and what a planner must know of the current device. Host code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/gpu.h"
#include "common/text.h"
#include "cuda/device/launch_forms.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

inline Error error_text(const char* what, cudaError_t status) {
  if (status == cudaSuccess) return {};
  return Text(what) + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) + ")";
}

// Lets `kernel` have `shared_bytes` of dynamic shared memory and clusters of that size.
inline Error prepare_kernel(const char* name, const void* kernel, size_t shared_bytes, int cluster) {
  cudaError_t status = cudaSuccess;
  if (shared_bytes > 48 * 1024)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (status == cudaSuccess && cluster > 8)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (status == cudaSuccess) return {};
  cudaGetLastError();  // the error is reported here and must not surface again in somebody else's check
  return error_text(name, status) + ", asking for " + to_text(shared_bytes) + " bytes of shared memory" +
         (cluster > 1 ? " and clusters of " + to_text(cluster) + " blocks" : "");
}

// launch_together and resident_blocks below of a kernel whose parameters are no longer known: compiled once for all.
inline Error launch_function(const char* name, const void* function, Together together, dim3 grid, dim3 block,
                             size_t shared_bytes, Stream stream, void** arguments) {
  if (Error error = prepare_kernel(name, function, shared_bytes, together.cluster); !error.empty()) return error;
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (together.grid) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  if (together.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(together.cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  const cudaError_t status = cudaLaunchKernelExC(&config, function, arguments);
  if (status == cudaSuccess) return {};
  cudaGetLastError();
  return error_text(name, status) + ", launching " + to_text(grid.x) + "x" + to_text(grid.y) + "x" + to_text(grid.z) +
         " blocks of " + to_text(block.x * block.y * block.z) + " threads" + (together.grid ? ", all at once" : "") +
         (together.cluster > 1 ? ", in clusters of " + to_text(together.cluster) : "");
}

inline Error resident_blocks_of(const char* name, const void* function, int cluster, int threads, size_t shared_bytes,
                                int64_t& blocks) {
  if (Error error = prepare_kernel(name, function, shared_bytes, cluster); !error.empty()) return error;
  int count = 0, device = 0, multiprocessors = 0;
  cudaError_t status = cudaSuccess;
  if (cluster > 1) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(cluster));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    status = cudaOccupancyMaxActiveClusters(&count, function, &config);
    blocks = static_cast<int64_t>(count) * cluster;
  } else {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, function, threads, shared_bytes);
    if (status == cudaSuccess) status = cudaGetDevice(&device);
    if (status == cudaSuccess)
      status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    blocks = static_cast<int64_t>(count) * multiprocessors;
  }
  if (status != cudaSuccess) cudaGetLastError();
  return status == cudaSuccess ? Error() : error_text(name, status) + ", asking how many blocks are resident";
}

template <typename... Parameters, typename... Arguments>
Error launch_together(const char* name, void (*kernel)(Parameters...), Together together, dim3 grid, dim3 block,
                      size_t shared_bytes, Stream stream, Arguments&&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for each of the kernel's parameters");
  return [&](Parameters... copies) {
    void* pointers[] = {static_cast<void*>(&copies)...};
    return launch_function(name, reinterpret_cast<const void*>(kernel), together, grid, block, shared_bytes, stream,
                           pointers);
  }(static_cast<Parameters>(arguments)...);
}

template <typename... Parameters>
Error resident_blocks(const char* name, void (*kernel)(Parameters...), int cluster, int threads, size_t shared_bytes,
                      int64_t& blocks) {
  return resident_blocks_of(name, reinterpret_cast<const void*>(kernel), cluster, threads, shared_bytes, blocks);
}

// Zeros `bytes` of device memory, in the stream's order.
inline Error fill_zero(void* memory, size_t bytes, Stream stream) {
  const cudaError_t status = cudaMemsetAsync(memory, 0, bytes, stream);
  if (status != cudaSuccess) cudaGetLastError();
  return error_text("zeroing memory", status);
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
  gpu = Gpu{10 * major + minor, multiprocessors, per_block, built_for_sm90a && major == 9 && minor == 0};
  return error_text("the current device's attributes", status);
}

}  // namespace rcu_ops::cuda
