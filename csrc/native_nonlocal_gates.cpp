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

Relation relation_of(int64_t b, int64_t g, int64_t n, int64_t m, int64_t d, int64_t e, const std::string& dtype,
                     int64_t misalignment) {
  Relation r;
  r.dtype = parse_dtype(dtype);
  r.B = b, r.G = g, r.N = n, r.M = m, r.D = d, r.E = e;
  const auto rows = [&](int64_t count, int64_t columns) {
    void* data = reinterpret_cast<void*>(static_cast<uintptr_t>(4096 + misalignment));  // never followed
    return Rows{.data = data, .batch = g * count * columns, .gate = count * columns, .row = columns};
  };
  r.query = rows(n, d), r.key = rows(m, d), r.value = rows(m, e);
  return r;
}

py::dict nonlocal_gates_gpu_plan(const std::string& kind, int64_t b, int64_t g, int64_t n, int64_t m, int64_t d, int64_t e,
                  const std::string& dtype, int architecture, int multiprocessors, int64_t shared_bytes, int64_t misalignment,
                  int64_t begin, int64_t end) {
  const Relation r = relation_of(b, g, n, m, d, e, dtype, misalignment);
  const Gpu gpu = gpu_of(architecture, multiprocessors, shared_bytes);
  cuda::PlainRelatePlan plan;
  const bool step = kind == "step", forward = step || kind == "attend";
  if (forward)
    plan = step ? cuda::plan_plain_step(r, gpu) : cuda::plan_plain_attend(r, gpu);
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
  found["text"] = (forward ? cuda::describe_forward(r, step, gpu) : cuda::describe(plan)).c_str();
  found["resident"] = plan.resident;
  found["chunk"] = plan.chunk;
  found["slice"] = plan.slice;
  found["splits"] = plan.splits;
  found["blocks"] = plan.blocks;
  found["shared_bytes"] = plan.shared_bytes;
  found["places"] = places;
  return found;
}

py::dict nonlocal_gates_gpu_tile_plan(bool step, int64_t b, int64_t g, int64_t n, int64_t m, int64_t d, int64_t e, const std::string& dtype,
                       int architecture, int multiprocessors, int64_t shared_bytes, int64_t misalignment) {
  const cuda::TileRelatePlan plan = cuda::plan_tile_relate(relation_of(b, g, n, m, d, e, dtype, misalignment), step,
                                                           gpu_of(architecture, multiprocessors, shared_bytes));
  py::dict found;
  found["why_not"] = plan.why_not ? py::object(py::str(plan.why_not)) : py::object(py::none());
  found["cluster"] = plan.cluster;
  found["rows"] = plan.rows;
  found["padded"] = plan.padded;
  found["shares"] = plan.shares;
  found["tiles"] = plan.tiles;
  found["blocks"] = plan.blocks;
  found["shared_bytes"] = plan.shared_bytes;
  return found;
}

}  // namespace

void bind_nonlocal_gates(py::module_& m) {
  m.def("nonlocal_gates_gpu_plan", &nonlocal_gates_gpu_plan, py::arg("kind"), py::arg("b"), py::arg("g"), py::arg("n"), py::arg("m"),
        py::arg("d"), py::arg("e"), py::arg("dtype"), py::arg("architecture") = 80, py::arg("multiprocessors") = 108,
        py::arg("shared_bytes") = 163 * 1024, py::arg("misalignment") = 0, py::arg("begin") = 0, py::arg("end") = 0,
        "How the CUDA kernels run query [b, g, n, d], key [b, g, m, d], value [b, g, m, e] on a GPU of these limits. kind: "
        "attend, step, query_gradient or key_gradient. text: one sentence; then of the plain kernel resident, chunk, slice, splits, "
        "blocks, shared_bytes, and, for blocks [begin, end), what each owns: (problem, first row, rows, split). misalignment: of "
        "the addresses, in bytes modulo 16.");
  m.def("nonlocal_gates_gpu_tile_plan", &nonlocal_gates_gpu_tile_plan, py::arg("step"), py::arg("b"), py::arg("g"), py::arg("n"), py::arg("m"),
        py::arg("d"), py::arg("e"), py::arg("dtype"), py::arg("architecture") = 80, py::arg("multiprocessors") = 108,
        py::arg("shared_bytes") = 163 * 1024, py::arg("misalignment") = 0,
        "The same of the matrix-unit kernels: why_not (None: they run it), cluster, rows, padded, shares, tiles, blocks, "
        "shared_bytes.");
}
