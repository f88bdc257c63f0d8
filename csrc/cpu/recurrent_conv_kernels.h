// recurrent_conv on the CPU: entry points of the instruction sets, and the thread's scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/recurrent_conv.h"
#include "../common/recurrent_conv_plan.h"

namespace rcu_ops::cpu {

struct bf16_t {
  uint16_t bits;
};
struct f16_t {
  uint16_t bits;
};

// A 64-byte aligned block of at least `bytes` bytes that belongs to the calling thread until its next request with the
// same slot. Grows, and is given back when the thread ends. Slot 0: what a call's tasks share; slot 1: a task's own.
void* scratch(int slot, size_t bytes);

namespace portable {
void scan(const Scan&, const Plan&, const Parallel&);
void weight_grad(const WeightGrad&, const Parallel&);
}  // namespace portable
namespace avx2 {
void scan(const Scan&, const Plan&, const Parallel&);
void weight_grad(const WeightGrad&, const Parallel&);
}  // namespace avx2
namespace avx512 {
void scan(const Scan&, const Plan&, const Parallel&);
void weight_grad(const WeightGrad&, const Parallel&);
}  // namespace avx512
namespace amx {
void scan(const Scan&, const Plan&, const Parallel&);
}  // namespace amx

}  // namespace rcu_ops::cpu
