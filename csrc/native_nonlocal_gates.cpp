// nonlocal_gates in rcu_ops._native: for any GPU, there or not, how the CUDA kernels would run a call, and what each
// block owns.
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/nonlocal_gates_gpu_plan.h"
#include "common/nonlocal_gates_library.h"
#include "native.h"

namespace py = pybind11;

namespace {

using namespace rcu_ops;

Relation relation_of(int64_t b, int64_t g, int64_t n, int64_t m, int64_t d, int64_t e, const std::string& dtype,
                     int64_t misalignment, bool masked = false, bool count = false) {
  static const uint8_t some_mask = 1;
  Relation r;
  r.count = count;
  if (masked) r.mask = &some_mask;
  r.dtype = parse_dtype(dtype);
  r.B = b, r.G = g, r.N = n, r.M = m, r.D = d, r.E = e;
  const auto rows = [&](int64_t count, int64_t columns) {
    void* data = reinterpret_cast<void*>(static_cast<uintptr_t>(4096 + misalignment));  // never followed
    Rows rows;
    rows.data = data, rows.batch = g * count * columns, rows.gate = count * columns, rows.row = columns;
    return rows;
  };
  r.query = rows(n, d), r.key = rows(m, d), r.value = rows(m, e);
  return r;
}

AttentionGrad nonlocal_gates_gradients(const Relation& r) {  // with contiguous tensors like the relation's
  Rows grad = r.query;
  grad.batch = r.G * r.N * r.E, grad.gate = r.N * r.E, grad.row = r.E;
  return {r, grad, r.query, r.key, r.value};
}

Facts nonlocal_gates_gpu_plan(const std::string& kind, int64_t b, int64_t g, int64_t n, int64_t m, int64_t d, int64_t e,
                              const std::string& dtype, int architecture, int multiprocessors, int64_t shared_bytes,
                              int64_t misalignment, bool sm90a, int64_t begin, int64_t end, bool masked, bool count,
                              bool attention) {
  const Relation r = relation_of(b, g, n, m, d, e, dtype, misalignment, masked, count);
  const Gpu gpu = gpu_of(architecture, multiprocessors, shared_bytes, sm90a);
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
  py::list places;
  for (int64_t block = begin; block < end && block < plan.blocks; ++block) {
    const cuda::PlainRelatePlace at = cuda::place_of(plan, block, kind == "key_gradient" ? r.M : r.N);
    places.append(py::make_tuple(at.problem, at.row0, at.rows, at.split));
  }
  Facts found;
  const Text gradients = cuda::describe_gradients(nonlocal_gates_gradients(r), gpu);
  found["text"] = (forward ? std::string(cuda::describe_forward(r, step, gpu).c_str()) + "; " : "") + gradients.c_str();
  found["said"] = cuda::explain_relate(nonlocal_gates_gradients(r), step, attention, gpu).c_str();
  found["resident"] = plan.resident;
  found["chunk"] = plan.chunk;
  found["slice"] = plan.slice;
  found["splits"] = plan.splits;
  found["blocks"] = plan.blocks;
  found["shared_bytes"] = plan.shared_bytes;
  found["scratch_bytes"] = forward ? cuda::forward_scratch_bytes(r) : cuda::gradient_scratch_bytes(r);
  found["map_bytes"] = cuda::plan_products(r, !forward).map_bytes;
  found["places"] = places;
  return found;
}

Facts nonlocal_gates_gpu_tile_plan(bool step, int64_t b, int64_t g, int64_t n, int64_t m, int64_t d, int64_t e,
                                   const std::string& dtype, int architecture, int multiprocessors,
                                   int64_t shared_bytes, int64_t misalignment, bool sm90a) {
  const cuda::TileRelatePlan plan = cuda::plan_tile_relate(relation_of(b, g, n, m, d, e, dtype, misalignment), step,
                                                           gpu_of(architecture, multiprocessors, shared_bytes, sm90a));
  Facts found;
  found["why_not"] = plan.why_not;
  found["cluster"] = plan.cluster;
  found["rows"] = plan.rows;
  found["padded"] = plan.padded;
  found["shares"] = plan.shares;
  found["tiles"] = plan.tiles;
  found["blocks"] = plan.blocks;
  found["shared_bytes"] = plan.shared_bytes;
  return found;
}

Facts nonlocal_gates_gpu_gradient_plan(bool of_keys, int64_t b, int64_t g, int64_t n, int64_t m, int64_t d, int64_t e,
                                       const std::string& dtype, int architecture, int multiprocessors,
                                       int64_t shared_bytes, int64_t misalignment) {
  const Relation r = relation_of(b, g, n, m, d, e, dtype, misalignment);
  const cuda::TileGradientPlan plan = cuda::plan_tile_gradient(
      nonlocal_gates_gradients(r), of_keys, gpu_of(architecture, multiprocessors, shared_bytes, false));
  Facts found;
  found["why_not"] = plan.why_not;
  found["padded"] = plan.padded;
  found["shares"] = plan.shares;
  found["tiles"] = plan.tiles;
  found["blocks"] = plan.blocks;
  found["shared_bytes"] = plan.shared_bytes;
  return found;
}

std::optional<std::string> nonlocal_gates_why_not_library(int64_t b, int64_t n, int64_t m, int64_t d, int64_t e,
                                                          const std::string& dtype, bool masked, bool count,
                                                          std::optional<int> architecture, int64_t misalignment) {
  const Relation r = relation_of(b, 1, n, m, d, e, dtype, misalignment, masked, count);
  const char* why = architecture ? why_not_library_on_gpu(r, *architecture) : why_not_library_on_cpu(r);
  return why ? std::optional<std::string>(why) : std::nullopt;
}

}  // namespace

void bind_nonlocal_gates(py::module_& m) {
  define(m, "nonlocal_gates_why_not_library", nonlocal_gates_why_not_library,
         {"b",
          "n",
          "m",
          "d",
          "e",
          "dtype",
          {"masked", false},
          {"count", false},
          {"architecture", nullptr},
          {"misalignment", 0}},
         "Why the forward pass of nonlocal_attention with query [b, n, d], key [b, m, d], value [b, m, e] is not left "
         "to PyTorch's scaled_dot_product_attention, or None where it is faster and taken. architecture: of a GPU; "
         "None: the CPU.");
  define(
      m, "nonlocal_gates_gpu_plan", nonlocal_gates_gpu_plan,
      {"kind",
       "b",
       "g",
       "n",
       "m",
       "d",
       "e",
       "dtype",
       {"architecture", 80},
       {"multiprocessors", 108},
       {"shared_bytes", 163 * 1024},
       {"misalignment", 0},
       {"sm90a", true},
       {"begin", 0},
       {"end", 0},
       {"masked", false},
       {"count", false},
       {"attention", true}},
      "How the CUDA kernels run query [b, g, n, d], key [b, g, m, d], value [b, g, m, e] on a GPU of these limits. "
      "kind: attend, step, query_gradient or key_gradient. sm90a: the library holds code for it. text: one sentence "
      "(of a forward pass and its gradients two); said: the same with what is left to PyTorch, whose attention may be "
      "switched off; then of the plain kernel resident, chunk, slice, splits, blocks, "
      "shared_bytes, scratch_bytes (of the device's memory), and, for blocks [begin, end), what each owns: (problem, "
      "first row, rows, split). map_bytes: of the maps that products by PyTorch have at once; gradients have two such. "
      "misalignment: of the addresses, in bytes modulo 16.");
  define(
      m, "nonlocal_gates_gpu_tile_plan", nonlocal_gates_gpu_tile_plan,
      {"step",
       "b",
       "g",
       "n",
       "m",
       "d",
       "e",
       "dtype",
       {"architecture", 80},
       {"multiprocessors", 108},
       {"shared_bytes", 163 * 1024},
       {"misalignment", 0},
       {"sm90a", true}},
      "The same of the matrix-unit kernels: why_not (None: they run it), cluster, rows, padded, shares, tiles, blocks, "
      "shared_bytes.");
  define(m, "nonlocal_gates_gpu_gradient_plan", nonlocal_gates_gpu_gradient_plan,
         {"of_keys",
          "b",
          "g",
          "n",
          "m",
          "d",
          "e",
          "dtype",
          {"architecture", 80},
          {"multiprocessors", 108},
          {"shared_bytes", 163 * 1024},
          {"misalignment", 0}},
         "The same of the gradients on the matrix unit, of the queries or of_keys: why_not, padded, shares, tiles, "
         "blocks, shared_bytes.");
}
