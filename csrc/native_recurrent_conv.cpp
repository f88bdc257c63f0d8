// recurrent_conv in rcu_ops._native: the instruction set that runs, and how a call is planned and cut into tasks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "common/cpu_isa.h"
#include "common/recurrent_conv_plan.h"

namespace py = pybind11;

namespace {

using namespace rcu_ops;

DType parse_dtype(const std::string& name) {
  if (name == "float64") return DType::f64;
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw py::value_error("dtype: expected float64, float32, bfloat16 or float16, got '" + name + "'");
}

cpu::PlanInput plan_input(int64_t n, int64_t c, int64_t t, int64_t positions, const std::string& dtype, int threads,
                          bool channels_last, bool with_state) {
  if (n < 0 || positions < 0 || c < 1 || t < 1 || threads < 0)
    throw py::value_error("expected n, positions, threads >= 0 and c, t >= 1");
  cpu::PlanInput in;
  in.columns = n * positions;
  in.C = c;
  in.T = t;
  in.dtype = parse_dtype(dtype);
  in.threads = threads ? threads : static_cast<int>(std::thread::hardware_concurrency());
  if (in.threads < 1) in.threads = 1;
  in.channels_contiguous = channels_last;
  in.single_product = t == 1 && with_state;
  return in;
}

cpu::Isa parse_isa(const std::string& name) {
  for (int i = 0; i < 4; ++i)
    if (name == cpu::isa_name(static_cast<cpu::Isa>(i))) return static_cast<cpu::Isa>(i);
  if (name.empty()) return cpu::current_isa();
  throw py::value_error("isa: expected portable, avx2, avx512 or amx, got '" + name + "'");
}

std::string plan_text(int64_t n, int64_t c, int64_t t, int64_t positions, const std::string& dtype, int threads,
                      bool channels_last, bool with_state, const std::string& isa) {
  const cpu::PlanInput in = plan_input(n, c, t, positions, dtype, threads, channels_last, with_state);
  const cpu::Isa on = parse_isa(isa);
  return cpu::describe(in, cpu::plan_scan(in, on), on);
}

py::dict plan_details(int64_t n, int64_t c, int64_t t, int64_t positions, const std::string& dtype, int threads,
                      bool channels_last, bool with_state, const std::string& isa) {
  const cpu::PlanInput in = plan_input(n, c, t, positions, dtype, threads, channels_last, with_state);
  const cpu::Plan plan = cpu::plan_scan(in, parse_isa(isa));
  std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> tasks;
  for (int64_t i = 0, count = cpu::task_count(plan, in.columns); i < count; ++i) {
    const cpu::TaskRange r = cpu::task_range(plan, in.columns, in.C, i);
    tasks.emplace_back(r.column_begin, r.column_end, r.channel_begin, r.channel_end);
  }
  py::dict d;
  d["lanes"] = plan.channels ? "channels" : "positions";
  d["tile"] = plan.tile;
  d["k_block"] = plan.k_block;
  d["chunk"] = plan.chunk;
  d["sequential_cost"] = plan.sequential_cost;
  d["chunked_cost"] = plan.chunked_cost;
  d["tasks"] = tasks;
  return d;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(cpu::best_isa()); ++i) names.emplace_back(cpu::isa_name(static_cast<cpu::Isa>(i)));
  return names;
}

}  // namespace

void bind_recurrent_conv(py::module_& m) {
  m.def("cpu_isa", [] { return std::string(cpu::isa_name(cpu::current_isa())); },
        "The instruction set the CPU kernels use: the best available, or the one that RCU_OPS_CPU_ISA names.");
  m.def("cpu_isas", &available_isas, "The instruction sets this machine can run, best last.");
  m.def("recurrent_conv_plan", &plan_text, py::arg("n"), py::arg("c"), py::arg("t"), py::arg("positions"), py::arg("dtype"),
        py::arg("threads") = 0, py::arg("channels_last") = false, py::arg("with_state") = false, py::arg("isa") = "",
        "In one sentence, how the CPU kernels run x [n, c, t, positions] of a dtype ('float32', ...), and why: instruction set, "
        "orientation, tasks, and whether time is cut into chunks. threads = 0: one per core; with_state: an h0 is given.");
  m.def("recurrent_conv_plan_details", &plan_details, py::arg("n"), py::arg("c"), py::arg("t"), py::arg("positions"),
        py::arg("dtype"), py::arg("threads") = 0, py::arg("channels_last") = false, py::arg("with_state") = false,
        py::arg("isa") = "",
        "The same as numbers: lanes, tile, k_block, chunk, the two costs compared, and tasks as (column begin, column end, "
        "channel begin, channel end).");
}
