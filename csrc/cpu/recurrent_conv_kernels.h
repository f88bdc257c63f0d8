// recurrent_conv on the CPU: entry points of the instruction sets.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/recurrent_conv.h"
#include "../common/recurrent_conv_frame.h"
#include "../common/recurrent_conv_plan.h"
#include "memory.h"

namespace rcu_ops::cpu {

namespace portable::recurrent_conv_kernels {
void scan(const Scan&, const Plan&, const Parallel&);
void weight_grad(const WeightGrad&, const Parallel&);
void conv_frame(const ConvFrame&, const FramePlan&, const Parallel&);
}  // namespace portable::recurrent_conv_kernels
namespace avx2::recurrent_conv_kernels {
void scan(const Scan&, const Plan&, const Parallel&);
void weight_grad(const WeightGrad&, const Parallel&);
void conv_frame(const ConvFrame&, const FramePlan&, const Parallel&);
}  // namespace avx2::recurrent_conv_kernels
namespace avx512::recurrent_conv_kernels {
void scan(const Scan&, const Plan&, const Parallel&);
void weight_grad(const WeightGrad&, const Parallel&);
void conv_frame(const ConvFrame&, const FramePlan&, const Parallel&);
}  // namespace avx512::recurrent_conv_kernels
namespace avx512_bf16::recurrent_conv_kernels {
void scan(const Scan&, const Plan&, const Parallel&);
void weight_grad(const WeightGrad&, const Parallel&);
void conv_frame(const ConvFrame&, const FramePlan&, const Parallel&);  // on pairs
}  // namespace avx512_bf16::recurrent_conv_kernels
namespace amx::recurrent_conv_kernels {
void scan(const Scan&, const Plan&, const Parallel&);
}  // namespace amx::recurrent_conv_kernels

// The files of an instruction set are compiled as one: each operator has names of its own.
namespace portable {
using namespace recurrent_conv_kernels;
}
namespace avx2 {
using namespace recurrent_conv_kernels;
}
namespace avx512 {
using namespace recurrent_conv_kernels;
}
namespace avx512_bf16 {
using namespace recurrent_conv_kernels;
}
namespace amx {
using namespace recurrent_conv_kernels;
}

}  // namespace rcu_ops::cpu
