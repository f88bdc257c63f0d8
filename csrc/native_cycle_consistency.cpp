// cycle_consistency in rcu_ops._native: how the kernels would run a call, and why.
#include <pybind11/pybind11.h>

#include <string>

#include "common/cpu_isa.h"
#include "common/cycle_consistency.h"
#include "common/cycle_consistency_gpu_plan.h"
#include "common/cycle_consistency_products.h"
#include "native.h"

namespace py = pybind11;

namespace {

using namespace rcu_ops;

Align parse_kind(const std::string& name) {
  const char* names[] = {"soft", "cycle", "back", "soft_backward", "back_backward", "loss", "loss_backward"};
  for (int i = 0; i < 7; ++i)
    if (name == names[i]) return static_cast<Align>(i);
  throw py::value_error("kind: expected soft, cycle, back, soft_backward, back_backward, loss or loss_backward, got '" +
                        name + "'");
}

std::string cycle_consistency_plan(const std::string& kind, int64_t t, int64_t s, int64_t c, const std::string& dtype) {
  if (t < 1 || s < 1 || c < 1) throw py::value_error("expected t, s, c >= 1");
  const DType of = parse_dtype(dtype);
  const char* isa = of == DType::f64 ? "portable" : cpu::isa_name(cpu::current_isa());
  return std::string(isa) + ": " + describe_alignment(parse_kind(kind), of, t, s, c).c_str();
}

// The same for any GPU, there or not.
Facts cycle_consistency_gpu_plan(const std::string& kind, int64_t n, int64_t t, int64_t s, int64_t c,
                                 const std::string& dtype, int architecture, int multiprocessors, int64_t shared_bytes,
                                 bool sm90a) {
  if (n < 1 || t < 1 || s < 1 || c < 1 || multiprocessors < 1)
    throw py::value_error("expected n, t, s, c, multiprocessors >= 1");
  const Gpu gpu = gpu_of(architecture, multiprocessors, shared_bytes, sm90a);
  Alignment p;
  p.kind = parse_kind(kind), p.dtype = parse_dtype(dtype), p.N = n, p.T = t, p.S = s, p.C = c;
  const auto blocks = [](int64_t count) { return std::to_string(count) + (count == 1 ? " block" : " blocks"); };
  Facts d;
  if (ShortCycle::takes(p)) {
    const ShortCycle plan(n, t, s, c, gpu);
    d["form"] = "short cycle";
    d["splits"] = plan.splits, d["channels_per_split"] = plan.channels_per_split, d["blocks"] = n * plan.splits;
    d["text"] = "short cycle: at most " + std::to_string(ShortCycle::most_frames) + " frames each, read once; " +
                (plan.splits == 1 ? "a block per sample"
                                  : (plan.cluster ? "a cluster of " : "") + blocks(plan.splits) + " per sample, " +
                                        std::to_string(plan.channels_per_split) + " channels each" +
                                        (plan.cluster ? "" : ", and a second launch that adds them up"));
  } else if (const char* why_not = ProductTiles::why_not(p, gpu)) {
    d["form"] = "query rows";
    d["text"] = std::string("query rows: distances by differences, a block per 4 queries (2 of float64): ") + why_not;
  } else {
    const ProductTiles plan(p.kind, n, t, s, c, gpu);
    d["form"] = "product tiles";
    d["tasks"] = plan.tasks, d["blocks"] = plan.blocks, d["pitch"] = plan.pitch, d["padded"] = plan.padded;
    d["row_bytes"] = plan.row_bytes, d["shared_bytes"] = plan.shared_bytes, d["in_shared"] = plan.in_shared;
    d["mean_at"] = plan.mean_at, d["largest_at"] = plan.largest_at, d["size_at"] = plan.size_at,
    d["factor_at"] = plan.factor_at;
    d["parts_at"] = plan.parts_at, d["rows_at"] = plan.rows_at, d["scratch_bytes"] = plan.scratch_bytes;
    d["text"] =
        "product tiles: distances by products of centred frames in two fp16 parts, by differences within the bound of "
        "their rounding; " +
        std::to_string(plan.tasks) + " times " + std::to_string(ProductTiles::queries) + " queries in " +
        blocks(plan.blocks) + ", rows in " +
        (plan.in_shared ? "shared memory" : "the scratch: they are too long for shared memory");
  }
  return d;
}

// Bounds of a kernel that adds up so many operations, and what they make of one query (cycle_consistency_products.h).
Facts cycle_consistency_bounds(int64_t c, int64_t product_steps, int64_t difference_steps, float end, float largest,
                               float sharpness, int64_t keys, bool moments) {
  const Rounding<float> rounding(c, product_steps, difference_steps);
  const Settling<float> settling(rounding, end, largest, sharpness, keys, moments);
  Facts d;
  d["products"] = rounding.products, d["differences"] = rounding.differences, d["least"] = rounding.least;
  d["reach"] = settling.reach, d["allowed"] = settling.allowed, d["flat"] = settling.flat;
  return d;
}

}  // namespace

void bind_cycle_consistency(py::module_& m) {
  define(
      m, "cycle_consistency_plan", cycle_consistency_plan, {"kind", "t", "s", "c", "dtype"},
      "In one sentence, how the CPU kernels find distances between [t, c] and [s, c] of a dtype ('float32', ...) for "
      "a kind of alignment ('soft', 'cycle', 'back', 'soft_backward', 'back_backward'), and why.");
  define(m, "cycle_consistency_gpu_plan", cycle_consistency_gpu_plan,
         {"kind",
          "n",
          "t",
          "s",
          "c",
          "dtype",
          keyword_only,
          {"architecture", 80},
          {"multiprocessors", 108},
          {"shared_bytes", 163 * 1024},
          {"sm90a", true}},
         "How such a GPU would run an alignment: its 'form' ('short cycle', 'product tiles' or 'query rows'), the same "
         "in a sentence ('text'), the numbers of its blocks, and byte offsets in the scratch. sm90a: the library holds "
         "code for it.");
  define(m, "cycle_consistency_bounds", cycle_consistency_bounds,
         {"c", "product_steps", "difference_steps", "end", "largest", "sharpness", "keys", "moments"},
         "The bounds on the rounding of fp32 distances of c channels ('products', 'differences', 'least'), and for a "
         "query whose smallest upper end and largest error these are, which distances must be found again ('reach', "
         "'allowed', 'flat').");
}
