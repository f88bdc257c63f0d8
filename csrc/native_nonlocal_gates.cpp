// nonlocal_gates in rcu_ops._native: for any GPU, there or not, how the CUDA kernels would run a call, and what each block owns.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "common/nonlocal_gates_gpu_plan.h"
#include "native.h"

namespace py = pybind11;

namespace {

using namespace rcu_ops;

py::dict gpu_plan(const std::string& kind, int64_t b, int64_t g, int64_t n, int64_t m, int64_t d, int64_t e, const std::string& dtype,
                  int architecture, int multiprocessors, int64_t shared_bytes, int64_t begin, int64_t end) {
  Relation r;
  r.dtype = parse_dtype(dtype);
  r.B = b, r.G = g, r.N = n, r.M = m, r.D = d, r.E = e;
  const Gpu gpu = gpu_of(architecture, multiprocessors, shared_bytes);
  cuda::PlainRelatePlan plan;
  if (kind == "attend")
    plan = cuda::plan_plain_attend(r, gpu);
  else if (kind == "step")
    plan = cuda::plan_plain_step(r, gpu);
  else if (kind == "query_gradient")
    plan = cuda::plan_plain_query_gradient(r, gpu);
  else if (kind == "key_gradient")
    plan = cuda::plan_plain_key_gradient(r, gpu);
  else
    throw py::value_error("kind: expected attend, step, query_gradient or key_gradient, got '" + kind + "'");
  std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> places;
  for (int64_t block = begin; block < end && block < plan.blocks; ++block) {
    const cuda::PlainRelatePlace at = cuda::place_of(plan, block, kind == "key_gradient" ? r.M : r.N);
    places.emplace_back(at.problem, at.row0, at.rows, at.split);
  }
  py::dict found;
  found["text"] = cuda::describe(plan);
  found["resident"] = plan.resident;
  found["chunk"] = plan.chunk;
  found["slice"] = plan.slice;
  found["splits"] = plan.splits;
  found["blocks"] = plan.blocks;
  found["shared_bytes"] = plan.shared_bytes;
  found["places"] = places;
  return found;
}

}  // namespace

void bind_nonlocal_gates(py::module_& m) {
  m.def("nonlocal_gates_gpu_plan", &gpu_plan, py::arg("kind"), py::arg("b"), py::arg("g"), py::arg("n"), py::arg("m"), py::arg("d"),
        py::arg("e"), py::arg("dtype"), py::arg("architecture") = 80, py::arg("multiprocessors") = 108,
        py::arg("shared_bytes") = 163 * 1024, py::arg("begin") = 0, py::arg("end") = 0,
        "How a CUDA kernel of nonlocal_gates (attend, step, query_gradient, key_gradient) runs query [b, g, n, d], key [b, g, m, d], "
        "value [b, g, m, e] on a GPU of these limits: text (one sentence), resident, chunk, slice, splits, blocks, shared_bytes, and, "
        "for blocks [begin, end), what each owns: (problem, first row, rows, split).");
}
