// What the planners know of a GPU. Plain numbers: a plan can be made, and tested, for a device that is not there.
#pragma once

#include <cstdint>

// Code of a kernel that also compiles without CUDA, for tests on the host.
#ifdef __CUDACC__
#define RCU_OPS_DEVICE __device__ __forceinline__
#define RCU_OPS_UNROLL _Pragma("unroll")
#define RCU_OPS_UNROLL_2 _Pragma("unroll 2")
#define RCU_OPS_UNROLL_4 _Pragma("unroll 4")
#else
#define RCU_OPS_DEVICE inline
#define RCU_OPS_UNROLL
#define RCU_OPS_UNROLL_2
#define RCU_OPS_UNROLL_4
#endif

namespace rcu_ops {

// The offset of an element from the start of its frame, as kernels keep it for each column and add it up for each word.
// Wide enough for any tensor, and it costs nothing: multiply-and-add takes two factors of 32 bits and a sum of 64 in
// one instruction, and 32 bits save the kernels 0 to 2 registers. The frame itself is found by 64 bits always. A build
// with RCU_OPS_OFFSETS_32 counts in 32, and its planner leaves a tensor that reaches further (fit_offsets in
// recurrent_conv_gpu_plan.h) to the kernel for any strides, which has no other offsets than of 64.
#ifdef RCU_OPS_OFFSETS_32
using Offset = int32_t;
#else
using Offset = int64_t;
#endif

struct Gpu {
  int architecture = 80;  // 10 * major + minor
  int multiprocessors = 108;
  int64_t shared_bytes = 163 * 1024;  // most that one block may ask for
  bool sm90a = false;                 // it runs code for sm_90a, and the build has some
};

namespace cuda {

inline constexpr int64_t most_blocks = 0x7fffffff;  // along x of a grid

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace cuda
}  // namespace rcu_ops
