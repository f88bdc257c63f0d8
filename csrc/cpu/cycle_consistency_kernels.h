// cycle_consistency and srtg on the CPU: entry points of the instruction sets.
#pragma once

#include "../common/cpu_isa.h"
#include "../common/cycle_consistency.h"
#include "../common/cycle_consistency_loss.h"
#include "../common/cycle_consistency_products.h"
#include "../common/srtg.h"
#include "memory.h"

namespace rcu_ops::cpu {

namespace portable {
void align(const Alignment&, const Parallel&);
void gate_data_path(const GateData&, const Parallel&);
void align_f64(const Alignment&, const Parallel&);
void gate_data_path_f64(const GateData&, const Parallel&);
}  // namespace portable
namespace avx2 {
void align(const Alignment&, const Parallel&);
void gate_data_path(const GateData&, const Parallel&);
}  // namespace avx2
namespace avx512 {
void align(const Alignment&, const Parallel&);
void gate_data_path_narrow(const GateData&, const Parallel&);  // of 16-bit numbers
}  // namespace avx512

}  // namespace rcu_ops::cpu
