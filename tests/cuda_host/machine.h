// A CUDA device on a CPU: runs the unchanged kernels thread by thread. The headers under include/cuda/device/ stand in
// for those of csrc/cuda/device/ and call this.
//
// Threads.     Every CUDA thread is a fiber of one CPU thread; nothing runs in parallel. Whenever a fiber must wait,
//              the next one is drawn at random from all that can run (Options::seed), across the `resident` blocks that
//              are in flight at once, which start in random order. A missing barrier therefore shows as a wrong result
//              under most seeds, and, in the build with ThreadSanitizer, as a data race under all of them: each fiber
//              is a thread to it, and only what orders memory in CUDA (block_barrier, warp_barrier, the ends of a
//              launch) orders it here.
// Shared       Dynamic shared memory is a heap block of exactly the launch's size, so that AddressSanitizer sees the
// first memory.      byte beyond it, and starts as 0xff bytes: NaN in every format, -1 as an index.
// Waiting.     Threads that wait for each other in different places, for threads that have exited, or for a value in
//              memory that nobody is left to write, end the launch with a report instead of a hang.
// Together.    All blocks of a cooperative launch are in flight at once, and all blocks of a cluster. A block's shared
//              memory can be mapped by the others of its cluster after the cluster's first barrier; a block that exits
//              without a barrier after such a mapping is reported, and what is read from its memory later is 0xff
//              bytes, a race to ThreadSanitizer and poisoned to AddressSanitizer.
// Warps.       Warp-wide operations meet at exchange(): all 32 lanes, the same operation, the same source line.
// Products.    wgmma computes when its thread waits for it and not before, from what its operands hold then; until then
//              the accumulators hold NaN. One that is issued without a fence after the last wait, or that is still in
//              flight when its thread exits, is reported. To ThreadSanitizer it is a thread of its own that knows only
//              what an async_proxy_fence came after.
// Copies.      An asynchronous copy lands when its thread waits for it and not before, in random order within what the
//              wait covers; until then its destination holds 0xff bytes. Copies still in flight when a thread exits are
//              reported.
//
// What this does not show: timing, bank conflicts, coalescing, registers, the rounding of the matrix unit (a product
// sum is computed exactly and truncated to fp32), and races between blocks that were not in flight together.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

namespace cuda_host {

using Location = std::source_location;

struct Options {
  uint64_t seed = 0;
  int resident = 2;  // blocks in flight at once
  // The device that launches see; an sm_80 unless a test says otherwise.
  int architecture = 80;
  int multiprocessors = 4;
  int clusters = 1 << 20;  // that fit its parts at once, whatever their size
  int64_t shared_bytes = 163 * 1024;
};
extern Options options;

struct Shape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  int cluster = 1;  // neighbouring blocks along x
  bool cooperative = false;
};

// Runs every block of the grid. Returns what went wrong, or an empty string.
std::string run(const char* name, const Shape& shape, const std::function<void()>& kernel);

// Device memory of exactly so many bytes, aligned to 16, with 0xff in each. AddressSanitizer sees the first byte beyond;
// without it an access beyond the last 16 is a fault.
void* allocate(size_t bytes);
void deallocate(void* memory);

// How many blocks the device can hold at once; it is short of threads and shared memory alone, and never of registers.
int64_t resident_blocks(int64_t threads, size_t shared_bytes);

// ---- from inside a kernel ----------------------------------------------------------------------------------------

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
unsigned char* dynamic_shared();

// Ends the launch with a report; does not return.
[[noreturn]] void fail(const std::string& what, const Location& where);

// Fails unless the launch is cooperative.
void require_cooperative(const Location& where);

// Lets others run until memory may have changed. `first`: this wait has just begun.
void poll(bool first, const Location& where);

int cluster_rank();
int cluster_size();
void cluster_arrive(const Location& where);
void cluster_wait(const Location& where);
// The place in the shared memory of block `rank` of the cluster that `own` is in this block's.
void* map_shared(const void* own, int rank, const Location& where);

void block_barrier(const Location& where);
void warp_barrier(const Location& where);
// Of `threads` threads of the block that name the same barrier, 1 to 15.
void group_barrier(int id, int threads, const Location& where);
void async_proxy_fence();

// The most that one lane contributes to an exchange.
inline constexpr size_t contribution_bytes = 64;

// Every lane of the warp contributes `size` bytes and gets those of all lanes, `contribution_bytes` apart and in lane
// order, valid until its next exchange. Orders no memory.
const unsigned char* exchange(const char* operation, const void* contribution, size_t size, const Location& where);

// Copies without a sanitizer's knowledge: what lanes exchange is registers, not memory.
void copy_quietly(void* to, const void* from, size_t size);

// The exchange of one value of type T.
template <typename T>
struct Lanes {
  T values[32];
  const T& operator[](int lane) const { return values[lane]; }
};
template <typename T>
Lanes<T> exchange(const char* operation, const T& mine, const Location& where) {
  static_assert(sizeof(T) <= contribution_bytes);
  const unsigned char* all = exchange(operation, &mine, sizeof(T), where);
  Lanes<T> lanes;
  for (int lane = 0; lane < 32; ++lane) copy_quietly(&lanes.values[lane], all + lane * contribution_bytes, sizeof(T));
  return lanes;
}
inline int lane() { return static_cast<int>(thread_index().x % 32); }

// A byte of the block's shared memory by its address as instructions have it (the first KB is the system's), and back.
uint32_t shared_address(const void* p, size_t alignment, const Location& where);
void* shared_at(uint32_t address, size_t bytes, const Location& where);

void async_copy(void* shared, const void* global, size_t bytes, const Location& where);
void async_commit();
void async_wait(size_t groups);

// Work of the matrix unit that runs beside the thread which issues it. It is done when the thread waits and not before:
// then `complete` is called, with the place of the wait. Until then the accumulators, at `accumulators`, hold NaN;
// begin_product() says what they held before.
struct Accumulators {
  std::vector<float> values;
  int products = 0;  // in flight
};
void product_fence();
Accumulators& begin_product(float* accumulators, size_t count, const Location& where);
void issue_product(std::function<void(const Location&)> complete);
void end_product(float* accumulators);
// A number of an operand in shared memory, read as the matrix unit reads it: to ThreadSanitizer out of order with what
// has been written there without an async_proxy_fence.
uint16_t read_of_product(const void* from);
void product_commit();
void product_wait(size_t groups, const Location& where);

}  // namespace cuda_host
