// recurrent_conv on the CPU: entry points of the instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/recurrent_conv.h"
#include "../common/recurrent_conv_frame.h"
#include "../common/recurrent_conv_plan.h"
#include "memory.h"

namespace rcu_ops::cpu {

namespace portable {
void scan(const Scan&, const Plan&, const Parallel&);
void weight_grad(const WeightGrad&, const Parallel&);
void conv_frame(const ConvFrame&, const FramePlan&, const Parallel&);
}  // namespace portable
namespace avx2 {
void scan(const Scan&, const Plan&, const Parallel&);
void weight_grad(const WeightGrad&, const Parallel&);
void conv_frame(const ConvFrame&, const FramePlan&, const Parallel&);
}  // namespace avx2
namespace avx512 {
void scan(const Scan&, const Plan&, const Parallel&);
void weight_grad(const WeightGrad&, const Parallel&);
void conv_frame(const ConvFrame&, const FramePlan&, const Parallel&);
}  // namespace avx512
namespace avx512_bf16 {
void scan(const Scan&, const Plan&, const Parallel&);
void weight_grad(const WeightGrad&, const Parallel&);
void conv_frame(const ConvFrame&, const FramePlan&, const Parallel&);  // on pairs
}  // namespace avx512_bf16
namespace amx {
void scan(const Scan&, const Plan&, const Parallel&);
}  // namespace amx

}  // namespace rcu_ops::cpu
