// The CPU kernels' 16-bit formats and the thread's scratch memory.
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
// same slot. Grows, and is given back when the thread ends. Slot 0: what a call's tasks share; slot 1: a task's own;
// slot 2: that of a part of a task, which needs it no longer than it runs.
void* scratch(int slot, size_t bytes);

}  // namespace rcu_ops::cpu
