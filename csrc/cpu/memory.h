// The CPU kernels' 16-bit formats, the thread's scratch memory, and large pages.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rcu_ops::cpu {

struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

// A 64-byte aligned block of at least `bytes` bytes that belongs to the calling thread until its next request with the
// same slot. Grows to what is asked for and no more, and is given back when the thread ends. Slot 0: what a call's tasks
// share; slot 1: a task's own; slot 2: that of a part of a task, which needs it no longer than it runs.
void* scratch(int slot, size_t bytes);

// For the memory of a new tensor. The system gives new memory page by page, each with a fault: by pages of 4 KiB that
// can take longer than writing the output does. Where it has larger pages for those who ask (Linux), a block of 4 MiB
// or more asks for them, whole ones inside the block alone, as NumPy does; the answer changes no result and is not
// looked at. RCU_OPS_LARGE_PAGES=0 in the environment: never.
void ask_for_large_pages(void* data, size_t bytes);

}  // namespace rcu_ops::cpu
