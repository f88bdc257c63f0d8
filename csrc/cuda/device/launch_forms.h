// The ways to launch a kernel, on top of launch_together and resident_blocks in launch.h. Host code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/text.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

#ifdef RCU_OPS_SM90A
inline constexpr bool built_for_sm90a = true;
#else
inline constexpr bool built_for_sm90a = false;
#endif

using Error = Text;  // empty: success

// Which blocks of a launch are certain to run at the same time.
struct Together {
  bool grid = false;  // all of them (a cooperative launch), as grid_barrier.h needs
  // This many with neighbouring blockIdx.x (sm_90), as cluster.h needs; gridDim.x is a multiple of it.
  int cluster = 1;
};

// Enqueue `kernel` on `stream`. `shared_bytes` of dynamic shared memory, any amount the device has. The arguments are
// converted to the kernel's parameter types and copied, so they may go out of scope. An error of the launch itself
// comes back as text; one inside the kernel shows at the next synchronisation, as always with CUDA.
template <typename... Parameters, typename... Arguments>
Error launch_together(const char* name, void (*kernel)(Parameters...), Together together, dim3 grid, dim3 block,
                      size_t shared_bytes, Stream stream, Arguments&&... arguments);

// How many blocks of such a launch the current device can hold at once: the most that a cooperative launch may have. An
// upper bound for clusters in a launch that is not.
template <typename... Parameters>
Error resident_blocks(const char* name, void (*kernel)(Parameters...), int cluster, int threads, size_t shared_bytes,
                      int64_t& blocks);

// Blocks run in any order.
template <typename... Parameters, typename... Arguments>
Error launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
             Arguments&&... arguments) {
  return launch_together(name, kernel, Together{}, grid, block, shared_bytes, stream,
                         static_cast<Arguments&&>(arguments)...);
}

// A launch whose blocks all run at once, as grid_barrier.h needs; with `cluster` > 1 in clusters, too. A grid that the
// device cannot hold is refused before the launch, with the numbers.
template <typename... Parameters, typename... Arguments>
Error launch_cooperative(const char* name, void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block,
                         size_t shared_bytes, Stream stream, Arguments&&... arguments) {
  int64_t most = 0;
  const int64_t wanted = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  const int threads = static_cast<int>(block.x * block.y * block.z);
  if (Error error = resident_blocks(name, kernel, cluster, threads, shared_bytes, most); !error.empty()) return error;
  if (wanted > most)
    return Text(name) + ": " + to_text(wanted) + " blocks must run at once, the device holds " + to_text(most) +
           " of " + to_text(threads) + " threads and " + to_text(shared_bytes) + " bytes of shared memory";
  return launch_together(name, kernel, Together{true, cluster}, grid, block, shared_bytes, stream,
                         static_cast<Arguments&&>(arguments)...);
}

// A launch in clusters of `cluster` blocks (sm_90).
template <typename... Parameters, typename... Arguments>
Error launch_clusters(const char* name, void (*kernel)(Parameters...), int cluster, dim3 grid, dim3 block,
                      size_t shared_bytes, Stream stream, Arguments&&... arguments) {
  return launch_together(name, kernel, Together{false, cluster}, grid, block, shared_bytes, stream,
                         static_cast<Arguments&&>(arguments)...);
}

}  // namespace rcu_ops::cuda
