// cycle_consistency in rcu_ops._native: how the kernels would run a call, and why.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "common/cpu_isa.h"
#include "common/cycle_consistency.h"
#include "native.h"

namespace py = pybind11;

namespace {

using namespace rcu_ops;

Align parse_kind(const std::string& name) {
  const char* names[] = {"soft", "cycle", "back", "soft_backward", "back_backward"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i]) return static_cast<Align>(i);
  throw py::value_error("kind: expected soft, cycle, back, soft_backward or back_backward, got '" + name + "'");
}

std::string cycle_consistency_plan(const std::string& kind, int64_t t, int64_t s, int64_t c, const std::string& dtype) {
  if (t < 1 || s < 1 || c < 1) throw py::value_error("expected t, s, c >= 1");
  const DType of = parse_dtype(dtype);
  const char* isa = of == DType::f64 ? "portable" : cpu::isa_name(cpu::current_isa());
  return std::string(isa) + ": " + describe_alignment(parse_kind(kind), of, t, s, c).c_str();
}

}  // namespace

void bind_cycle_consistency(py::module_& m) {
  m.def("cycle_consistency_plan", &cycle_consistency_plan, py::arg("kind"), py::arg("t"), py::arg("s"), py::arg("c"), py::arg("dtype"),
        "In one sentence, how the CPU kernels find distances between [t, c] and [s, c] of a dtype ('float32', ...) for a kind of "
        "alignment ('soft', 'cycle', 'back', 'soft_backward', 'back_backward'), and why.");
}
