// A barrier of all threads of a cooperative launch (launch_cooperative), as often as wanted.
//
// The counter, in global memory, counts blocks that have arrived, ever: it needs no reset between barriers, nor between
// launches of equally many blocks on one stream. It must be a multiple of the number of blocks when a launch begins:
// zero it once (fill_zero, which a CUDA graph captures) before the first launch, and again when the number of blocks
// changes or a launch has failed. One counter per launch in flight.
//
// Cost: an addition in L2 that nobody waits for, and one read of L2 after the last block's has got there (about 1 us in
// all).
#pragma once

#include <cstdint>

#include "cuda/device/atomic.h"
#include "cuda/device/barrier.h"
#include "cuda/device/runtime.h"

namespace rcu_ops::cuda {

using GridCounter = unsigned long long;

class GridBarrier {
 public:
  // All threads of every block make one, before any arrives.
  __device__ __forceinline__ explicit GridBarrier(GridCounter* counter)
      : counter_(counter), blocks_(gridDim.x * gridDim.y * gridDim.z) {
    require_resident_grid();
    // Until this block arrives the counter cannot pass the next multiple, however many others have arrived already.
    if (threadIdx.x + threadIdx.y + threadIdx.z == 0) target_ = load_relaxed(counter) / blocks_ * blocks_;
  }

  // The block's work so far is done. All its threads; between this and wait() is time for work that needs no other
  // block.
  __device__ __forceinline__ void arrive() {
    block_barrier();
    if (threadIdx.x + threadIdx.y + threadIdx.z == 0) add_release(counter_, GridCounter{1});
  }

  // What all blocks did before they arrived can be read. All threads of the block.
  __device__ __forceinline__ void wait() {
    if (threadIdx.x + threadIdx.y + threadIdx.z == 0) {
      target_ += blocks_;
      wait_until([&] { return load_acquire(counter_) >= target_; });
    }
    block_barrier();
  }

  __device__ __forceinline__ void arrive_and_wait() {
    arrive();
    wait();
  }

 private:
  GridCounter* counter_;
  GridCounter target_ = 0;  // thread 0's: when all have arrived at the barrier before the next one
  unsigned blocks_;
};

}  // namespace rcu_ops::cuda
