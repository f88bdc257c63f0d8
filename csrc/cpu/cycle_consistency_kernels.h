// cycle_consistency and srtg on the CPU: entry points of the instruction sets.
#pragma once

#include "../common/cpu_isa.h"
#include "../common/cycle_consistency.h"
#include "../common/cycle_consistency_loss.h"
#include "../common/cycle_consistency_products.h"
#include "../common/srtg.h"
#include "memory.h"

namespace rcu_ops::cpu {

namespace portable::cycle_consistency_kernels {
void align(const Alignment&, const Parallel&);
void gate_data_path(const GateData&, const Parallel&);
void align_f64(const Alignment&, const Parallel&);
void gate_data_path_f64(const GateData&, const Parallel&);
}  // namespace portable::cycle_consistency_kernels
namespace avx2::cycle_consistency_kernels {
void align(const Alignment&, const Parallel&);
void gate_data_path(const GateData&, const Parallel&);
}  // namespace avx2::cycle_consistency_kernels
namespace avx512::cycle_consistency_kernels {
void align(const Alignment&, const Parallel&);
void gate_data_path_narrow(const GateData&, const Parallel&);  // of 16-bit numbers
}  // namespace avx512::cycle_consistency_kernels

// The files of an instruction set are compiled as one: each operator has names of its own.
namespace portable {
using namespace cycle_consistency_kernels;
}
namespace avx2 {
using namespace cycle_consistency_kernels;
}
namespace avx512 {
using namespace cycle_consistency_kernels;
}

}  // namespace rcu_ops::cpu
