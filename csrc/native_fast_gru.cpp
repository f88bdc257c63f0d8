// fast_gru in rcu_ops._native: for any GPU, there or not, whether one launch would run all steps, and how it would cut
// them.
#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "common/cpu_isa.h"
#include "common/fast_gru.h"
#include "common/fast_gru_gpu_plan.h"
#include "native.h"

namespace py = pybind11;

namespace {

using namespace rcu_ops;

Facts fast_gru_gpu_plan(int64_t rows, int64_t c, int64_t r, const std::string& dtype, int architecture,
                        int multiprocessors, int64_t shared_bytes, bool backward, bool sm90a, int cluster) {
  if (rows < 1 || c < 1 || r < 1 || multiprocessors < 1)
    throw py::value_error("expected rows, c, r, multiprocessors >= 1");
  if (cluster != 0 && cluster != 1 && cluster != fast_gru::persistent_cluster)
    throw py::value_error("cluster: expected 0, 1 or 8");
  const Gpu gpu = gpu_of(architecture, multiprocessors, shared_bytes, sm90a);
  const auto plan = fast_gru::plan_persistent(rows, c, r, parse_dtype(dtype), gpu, backward, cluster);
  Facts d;
  d["text"] = fast_gru::describe(plan).c_str();
  d["why_not"] = plan.why_not.empty() ? nullptr : plan.why_not.c_str();
  d["blocks"] = plan.blocks;
  d["cluster"] = plan.cluster;
  d["slice"] = plan.slice;
  d["units"] = plan.units;
  d["hidden_units"] = plan.hidden_units;
  d["half_units"] = plan.half_units;
  d["depth"] = plan.depth;
  d["hidden_depth"] = plan.hidden_depth;
  d["weight_pitch"] = plan.weight_pitch;
  d["hidden_pitch"] = plan.hidden_pitch;
  d["gate_at"] = plan.gate_at;
  d["hidden_at"] = plan.hidden_at;
  d["partial_at"] = plan.partial_at;
  d["received_at"] = plan.received_at;
  d["shared_bytes"] = plan.shared_bytes;
  d["low_at"] = plan.low_at;
  d["gated_at"] = plan.gated_at;
  d["reset_at"] = plan.reset_at;
  d["exchange_at"] = plan.exchange_at;
  d["scratch_bytes"] = plan.scratch_bytes;
  return d;
}

Facts fast_gru_gpu_columns_plan(int64_t columns, int64_t c, int64_t r, const std::string& dtype, int64_t shared_bytes,
                                bool backward) {
  if (columns < 1 || c < 1 || r < 1) throw py::value_error("expected columns, c, r >= 1");
  Gpu gpu;
  gpu.shared_bytes = shared_bytes;
  const auto plan = fast_gru::plan_columns(columns, c, r, parse_dtype(dtype), gpu, backward);
  Facts d;
  d["text"] = fast_gru::describe(plan).c_str();
  d["why_not"] = plan.why_not.empty() ? nullptr : plan.why_not.c_str();
  d["blocks"] = plan.blocks;
  d["shared_bytes"] = plan.shared_bytes;
  d["threads"] = plan.threads;
  d["units"] = plan.units;
  d["half_units"] = plan.half_units;
  d["zeros_at"] = plan.zeros_at;
  d["numbers"] = plan.numbers;
  d["makes_x"] = plan.makes_x;
  py::list products;
  for (int i = 0; i < plan.products; ++i) {
    const fast_gru::ColumnProduct& product = plan.product[i];
    Facts one;
    one["halves"] = product.halves;
    one["outputs"] = product.outputs;
    one["inputs"] = product.inputs;
    one["depth"] = product.depth;
    one["pitch"] = product.pitch;
    one["rows"] = product.rows;
    one["length"] = product.length;
    one["row_step"] = product.row_step;
    one["step"] = product.step;
    one["weight_at"] = product.weight_at;
    one["half_weights"] = product.half_weights;
    one["operand_at"] = product.operand_at;
    one["half_operands"] = product.half_operands;
    products.append(one.dict());
  }
  d["products"] = products;
  return d;
}

bool by_columns(int64_t columns, int64_t c, int64_t r, const std::string& dtype, int threads,
                std::optional<bool> avx512) {
  const cpu::Isa isa = cpu::current_isa();
  return fast_gru::by_columns(parse_dtype(dtype), columns, c, r, threads, isa == cpu::Isa::amx,
                              avx512.value_or(isa >= cpu::Isa::avx512));
}

bool gradients_by_columns(int64_t columns, int64_t c, int64_t r, const std::string& dtype, int threads) {
  return fast_gru::gradients_by_columns(parse_dtype(dtype), columns, c, r, threads);
}

}  // namespace

void bind_fast_gru(py::module_& m) {
  define(m, "fast_gru_gpu_plan", fast_gru_gpu_plan,
         {"rows",
          "c",
          "r",
          "dtype",
          keyword_only,
          {"architecture", 80},
          {"multiprocessors", 108},
          {"shared_bytes", 163 * 1024},
          {"backward", false},
          {"sm90a", true},
          {"cluster", 0}},
         "Whether one launch on such a GPU would run all steps of so many rows (columns of a step), forward or "
         "backward, why not, and its cut: features per block, and byte offsets in shared and scratch memory. sm90a: "
         "the library holds code for it. cluster: 1 or 8 blocks share the inputs; 0: chosen.");
  define(m, "fast_gru_gpu_columns_plan", fast_gru_gpu_columns_plan,
         {"columns", "c", "r", "dtype", keyword_only, {"shared_bytes", 163 * 1024}, {"backward", false}},
         "Whether one launch on such a GPU would take so many columns through all steps, 8 in a block that has all "
         "weights, why not, and its cut: the products, and numbers of the data's type in shared memory.");
  define(m, "fast_gru_by_columns", by_columns,
         {"columns", "c", "r", "dtype", keyword_only, "threads", {"avx512", nullptr}},
         "Whether the CPU takes so many columns through all steps by themselves, without a library's products. avx512: "
         "whether it has these vectors; None: as this one.");
  define(m, "fast_gru_gradients_by_columns", gradients_by_columns,
         {"columns", "c", "r", "dtype", keyword_only, "threads"}, "Whether it does so with their gradients.");
  define(
      m, "fast_gru_gradient_units",
      +[](int64_t columns, int64_t c, int64_t r) {
        const fast_gru::GradientUnits units = fast_gru::gradient_units(columns, c, r);
        Facts found;
        found["width"] = units.width;
        found["panels"] = units.panels;
        found["count"] = units.count;
        return found;
      },
      {"columns", "c", "r"},
      "How gradients by columns are cut, whatever the number of threads: the columns of a panel (width), the panels of "
      "a unit, and how many units.");
  define(m, "fast_gru_few_weights", fast_gru::few_weights, {"c", "r"},
         "Whether every task reads all weights for its own columns; else tasks share them, for all columns.");
  define(
      m, "fast_gru_in_fp32",
      +[](int64_t columns, int64_t c, int64_t r, int64_t steps, const std::string& dtype) {
        const cpu::Isa isa = cpu::current_isa();
        return fast_gru::in_fp32(parse_dtype(dtype), columns, c, r, steps, isa == cpu::Isa::amx,
                                 isa == cpu::Isa::avx512_bf16);
      },
      {"columns", "c", "r", "steps", "dtype"},
      "Whether this CPU makes the library's products of so many columns in fp32.");
  define(m, "fast_gru_panel_vectors", fast_gru::panel_vectors, {"columns", "lanes", "threads"},
         "The width of the panels that tasks take through all steps, in vectors of so many lanes.");
}
