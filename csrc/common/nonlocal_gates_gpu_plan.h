// nonlocal_gates on a GPU: how the kernels cut their work into blocks, and what memory they need. Pure functions of
// shapes and the device's limits, so that they are tested without one.
#pragma once

#include <cstdint>

#include "gpu.h"
#include "nonlocal_gates.h"
#include "nonlocal_gates_library.h"
#include "text.h"

namespace rcu_ops::cuda {

// ---- the plain kernels: any sizes, dtype, strides and masks ---------------------------------------------------------

inline constexpr int plain_relate_threads = 256;
inline constexpr int plain_relate_warps = plain_relate_threads / 32;
inline constexpr int plain_relate_rows = 32;          // that a block owns: one per lane
inline constexpr int plain_relate_columns = 64;       // of a tile of scores
inline constexpr int plain_relate_depth = 32;         // channels of a stage of scores, columns of a stage of results
inline constexpr int plain_gradient_slice = 128;      // channels of a slice of results
inline constexpr int plain_relate_slice_bytes = 256;  // the same, in bytes of sums, where gates share a block
inline constexpr int plain_relate_pad = 4;            // numbers between the rows of a stage

// A block owns `plain_relate_rows` rows (queries, or keys) of one sample and every splits-th slice of the results'
// channels. Maps of its rows against all others stay in shared memory while it walks over the slices, or are made
// again, `chunk` columns at a time, for every slice.
struct PlainRelatePlan {
  bool mends = false;  // results are there: only rows that begin with NaN are made again
  bool resident = true;
  int64_t chunk = 0;
  int64_t slice = 0;
  int64_t tiles = 0, splits = 1, blocks = 0;
  // Byte offsets into shared memory: the stages begin at 0; then the rows' statistics, results, and the maps, map_bytes
  // each.
  int64_t numbers_at = 0, results_at = 0, maps_at = 0, map_bytes = 0, shared_bytes = 0;
};

// What one block owns: rows [row0, row0 + rows) of a problem, and slices split, split + splits, ...
struct PlainRelatePlace {
  int64_t problem, row0, split;
  int rows;
};
RCU_OPS_DEVICE PlainRelatePlace place_of(const PlainRelatePlan& plan, int64_t block, int64_t own) {
  PlainRelatePlace at;
  at.split = block % plan.splits;
  at.row0 = block / plan.splits % plan.tiles * plain_relate_rows;
  at.problem = block / plan.splits / plan.tiles;
  at.rows = own - at.row0 < plain_relate_rows ? static_cast<int>(own - at.row0) : plain_relate_rows;
  return at;
}

struct PlainRelateSizes {
  int64_t problems;                  // samples (and gates, where a block does not take them all)
  int64_t own, others;               // rows on either side
  int64_t maps, most_maps;           // needed at once, and wanted
  int64_t channels, slice, results;  // results: tiles of rows x slice kept in shared memory
};

inline PlainRelatePlan plan_plain_relate(const PlainRelateSizes& s, DType dtype, const Gpu& gpu) {
  const int64_t size = state_size(dtype), rows = plain_relate_rows, depth = plain_relate_depth;
  const int64_t scores_stage = depth * (rows + plain_relate_columns + 2 * plain_relate_pad),
                sums_stage = depth * s.slice;
  PlainRelatePlan plan;
  plan.slice = s.slice;
  plan.numbers_at = (scores_stage > sums_stage ? scores_stage : sums_stage) * size;
  plan.results_at = plan.numbers_at + (plain_relate_warps + 2 * 4) * rows * size;
  plan.maps_at = plan.results_at + s.results * rows * s.slice * size;
  const int64_t room = (gpu.shared_bytes - plan.maps_at) / (rows * size);  // columns of all maps together
  plan.resident = s.others * s.most_maps <= room;
  plan.chunk = plan.resident ? s.others : plain_relate_columns;
  plan.map_bytes = plan.chunk * rows * size;
  plan.shared_bytes = plan.maps_at + (plan.resident ? s.most_maps : s.maps) * plan.map_bytes;
  plan.tiles = ceil_div(s.own, rows);
  // Blocks that share rows make the same maps: worth it only where multiprocessors would have nothing to do.
  const int64_t slices = ceil_div(s.channels, s.slice);
  while (plan.splits < slices && s.problems * plan.tiles * plan.splits < gpu.multiprocessors) plan.splits *= 2;
  plan.blocks = s.problems * plan.tiles * plan.splits;
  return plan;
}

inline PlainRelatePlan plan_plain_attend(const Relation& r, const Gpu& gpu) {
  return plan_plain_relate({r.B * r.G, r.N, r.M, 1, 1, r.E, plain_relate_slice_bytes / state_size(r.dtype), 1}, r.dtype,
                           gpu);
}
// The four gates of a block's rows at once, so that the cell update follows.
inline PlainRelatePlan plan_plain_step(const Relation& r, const Gpu& gpu) {
  return plan_plain_relate({r.B, r.N, r.M, 1, r.G, r.E, plain_relate_slice_bytes / state_size(r.dtype), r.G}, r.dtype,
                           gpu);
}
inline PlainRelatePlan plan_plain_query_gradient(const Relation& r, const Gpu& gpu) {
  return plan_plain_relate({r.B * r.G, r.N, r.M, 2, 2, r.D, plain_gradient_slice, 0}, r.dtype, gpu);
}
inline PlainRelatePlan plan_plain_key_gradient(const Relation& r, const Gpu& gpu) {
  return plan_plain_relate({r.B * r.G, r.M, r.N, 2, 2, r.D + r.E, plain_gradient_slice, 0}, r.dtype, gpu);
}

// Memory on the device beyond inputs and outputs. Forward, a step too: none, maps and gates live on chip. Of the
// gradients, a step's too: peak, sum and delta of every query (see Relation), in the state's dtype.
inline int64_t forward_scratch_bytes(const Relation&) { return 0; }
inline int64_t gradient_scratch_bytes(const Relation& r) { return 3 * r.B * r.G * r.N * state_size(r.dtype); }

inline Text describe(const PlainRelatePlan& plan) {
  return "plain: " + to_text(plan.blocks) + " blocks of " + to_text(plain_relate_rows) + " rows, " +
         (plan.resident ? Text("weights in shared memory for all channels")
                        : "weights made again for every " + to_text(plan.slice) + " channels") +
         (plan.splits > 1 ? ", channels shared by " + to_text(plan.splits) + " blocks" : "");
}

// ---- the matrix-unit kernels: 16-bit data, up to 256 keys -----------------------------------------------------------

inline constexpr int tile_relate_threads = 256;
inline constexpr int tile_relate_keys = 64;   // of a tile of scores
inline constexpr int tile_relate_slice = 64;  // channels of a slice of results
inline constexpr int tile_relate_most_keys = 256;

// A block owns `rows` queries of four relations: the gates of a sample, or four problems of an attention. `shares`
// blocks have the same queries: in a cluster they share the channels of the scores, too.
struct TileRelatePlan {
  const char* why_not = nullptr;  // nullptr: the kernel can run
  bool cluster = false;
  int rows = 0, padded = 0;  // 16 or 32; keys in whole tiles
  int shares = 1;
  int64_t tiles = 0, blocks = 0;
  // Byte offsets into shared memory: scores and later results in fp32 [4][rows][padded + 8] begin at 0; weights of 16
  // bits, the same pitch; one number per query; two stages.
  int64_t weights_at = 0, sums_at = 0, stages_at = 0, stage_bytes = 0, shared_bytes = 0;
};

// step: the four gates of a sample are the block's relations.
inline TileRelatePlan plan_tile_relate(const Relation& r, bool step, const Gpu& gpu) {
  TileRelatePlan plan;
  const auto refuse = [&](const char* why) {
    plan.why_not = why;
    return plan;
  };
  if (r.dtype != DType::bf16 && r.dtype != DType::f16) return refuse("the matrix unit is used for 16-bit data");
  if (r.N == 0 || r.M == 0 || r.B * r.G == 0 || r.E == 0) return refuse("there is nothing to multiply");
  if (r.M > tile_relate_most_keys) return refuse("more than 256 keys");
  if (r.D % 8 || r.E % 8) return refuse("channels are no multiple of 8");
  if (!in_words(r.query, r, r.N) || !in_words(r.key, r, r.M) || !in_words(r.value, r, r.M))
    return refuse("rows are not aligned to 16 bytes");
  plan.padded = static_cast<int>(round_up(r.M, tile_relate_keys));
  plan.rows = plan.padded == tile_relate_keys && r.N > 16 ? 32 : 16;
  const int64_t pitch = plan.padded + 8, rows = 4 * plan.rows;
  plan.weights_at = rows * pitch * 4;
  plan.sums_at = plan.weights_at + rows * pitch * 2;
  plan.stages_at = plan.sums_at + rows * 4;
  plan.stage_bytes = (rows + 4 * tile_relate_keys) * 64;  // 32 channels; more than 4 x 32 values of 64 channels
  plan.shared_bytes = plan.stages_at + 2 * plan.stage_bytes;
  if (plan.shared_bytes > gpu.shared_bytes) return refuse("shared memory is too small for so many keys");
  plan.tiles = ceil_div(r.N, plan.rows);
  const int64_t groups = step ? r.B : ceil_div(r.B * r.G, 4), slices = ceil_div(r.E, tile_relate_slice);
  const int most = gpu.sm90a ? 8 : 1 << 20;  // blocks that every device has room for in a cluster
  while (plan.shares < slices && plan.shares < most && groups * plan.tiles * plan.shares < gpu.multiprocessors)
    plan.shares *= 2;
  plan.cluster = gpu.sm90a && plan.shares > 1;
  plan.blocks = groups * plan.tiles * plan.shares;
  return plan;
}

inline Text describe(const TileRelatePlan& plan) {
  return (plan.cluster ? "clusters of " + to_text(plan.shares) : Text("tiles")) + ": " + to_text(plan.blocks) +
         " blocks of " + to_text(plan.rows) + " rows of four relations on the matrix unit" +
         (plan.cluster      ? ", scores and channels shared in a cluster"
          : plan.shares > 1 ? ", channels shared by " + to_text(plan.shares) + " blocks"
                            : "");
}

// ---- gradients on the matrix unit: 16-bit data, up to 256 queries and keys ------------------------------------------

inline constexpr int tile_gradient_rows = 32;    // that a block owns
inline constexpr int tile_gradient_others = 64;  // rows on the other side: of a tile of products
inline constexpr int tile_gradient_depth = 64;   // channels of a stage of products
inline constexpr int tile_gradient_slice = 128;  // channels of a slice of results

// A block owns 32 queries (dquery) or 32 keys (dkey and dvalue) of one sample and gate, and every shares-th slice of
// the results' channels; blocks that share rows make the same maps.
struct TileGradientPlan {
  const char* why_not = nullptr;  // nullptr: the kernel can run
  int padded = 0;                 // rows on the other side, in whole tiles
  int shares = 1;
  int64_t tiles = 0, blocks = 0;
  // Byte offsets into shared memory: two maps of 32 x (padded + 4) in fp32 begin at 0, their rows become 16-bit numbers
  // in place; then a number per row of the block, then two stages.
  int64_t totals_at = 0, stages_at = 0, stage_bytes = 0, shared_bytes = 0;
};

inline TileGradientPlan plan_tile_gradient(const AttentionGrad& p, bool of_keys, const Gpu& gpu) {
  const Relation& r = p.relation;
  TileGradientPlan plan;
  const auto refuse = [&](const char* why) {
    plan.why_not = why;
    return plan;
  };
  if (r.dtype != DType::bf16 && r.dtype != DType::f16) return refuse("the matrix unit is used for 16-bit data");
  if (r.N == 0 || r.M == 0 || r.B * r.G == 0) return refuse("there is nothing to multiply");
  if (r.M > tile_relate_most_keys || r.N > tile_relate_most_keys) return refuse("more than 256 queries or keys");
  if (r.D % 8 || r.E % 8) return refuse("channels are no multiple of 8");
  if (!in_words(r.query, r, r.N) || !in_words(r.key, r, r.M) || !in_words(r.value, r, r.M) ||
      !in_words(p.grad, r, r.N) || !in_words(p.dquery, r, r.N) || !in_words(p.dkey, r, r.M) ||
      !in_words(p.dvalue, r, r.M))
    return refuse("rows are not aligned to 16 bytes");
  const int64_t rows = tile_gradient_rows, longest = r.M > r.N ? r.M : r.N;  // either both sides' kernels run or none
  const auto bytes_of = [&](int64_t padded) { return 2 * rows * (padded + 4) * 4 + rows * 4 + 2 * plan.stage_bytes; };
  plan.stage_bytes = (rows + tile_gradient_others) * tile_gradient_depth * 2;  // more than 32 rows of a slice
  if (bytes_of(round_up(longest, tile_gradient_others)) > gpu.shared_bytes)
    return refuse("shared memory is too small for so many rows");
  plan.padded = static_cast<int>(round_up(of_keys ? r.N : r.M, tile_gradient_others));
  plan.totals_at = 2 * rows * (plan.padded + 4) * 4;
  plan.stages_at = plan.totals_at + rows * 4;
  plan.shared_bytes = bytes_of(plan.padded);
  plan.tiles = ceil_div(of_keys ? r.M : r.N, rows);
  const int64_t of_d = ceil_div(r.D, tile_gradient_slice), of_e = ceil_div(r.E, tile_gradient_slice);
  const int64_t slices = of_keys ? of_d + of_e : of_d, alone = r.B * r.G * plan.tiles;
  while (plan.shares < slices && alone * plan.shares < gpu.multiprocessors) plan.shares *= 2;
  plan.blocks = alone * plan.shares;
  return plan;
}

// ---- by a library's products ----------------------------------------------------------------------------------------

// How many problems (samples and gates) are on their way at once, and the bytes of one of their maps: scores, then
// weights, and of a backward pass a second one of the weights' gradients.
struct ProductsPlan {
  int64_t problems = 1, map_bytes = 0;
};

// Maps of a few tens of megabytes stay in the second-level cache. Eager PyTorch has two maps of all problems at once,
// and three in its backward pass; half of these are here, where they are large enough to matter.
inline ProductsPlan plan_products(const Relation& r, bool gradients) {
  constexpr int64_t most = 16 << 20, small = 256 << 10;
  const int64_t problems = r.B * r.G, one = r.N * r.M * element_size(r.dtype);
  ProductsPlan plan;
  plan.problems = one > 0 && most / one < problems ? (most > one ? most / one : 1) : problems;
  const int64_t half = ceil_div(problems, 2);
  if (gradients && problems * one > small && plan.problems > half) plan.problems = half;
  if (plan.problems < 1) plan.problems = 1;
  plan.map_bytes = round_up(plan.problems * one, 16);
  return plan;
}

// The kernels of the backward pass of Attention, and of that of Step after its gates, in words.
inline Text describe_gradients(const AttentionGrad& p, const Gpu& gpu) {
  const TileGradientPlan of_queries = plan_tile_gradient(p, false, gpu), of_keys = plan_tile_gradient(p, true, gpu);
  if (of_queries.why_not)
    return "gradients " + describe(plan_plain_query_gradient(p.relation, gpu)) + ", then of the keys " +
           to_text(plan_plain_key_gradient(p.relation, gpu).blocks) + " (" + of_queries.why_not + ")";
  return "gradients " + to_text(of_queries.blocks) + " blocks of " + to_text(tile_gradient_rows) + " queries, then " +
         to_text(of_keys.blocks) + " of " + to_text(tile_gradient_rows) +
         " keys, on the matrix unit, weights computed again";
}

// The kernels here of the forward pass of Attention or Step, in words: the one that runs it and, where that is the plain one, why.
inline Text describe_forward(const Relation& r, bool step, const Gpu& gpu) {
  const TileRelatePlan tile = plan_tile_relate(r, step, gpu);
  if (!tile.why_not) return describe(tile);
  return describe(step ? plan_plain_step(r, gpu) : plan_plain_attend(r, gpu)) + " (" + tile.why_not + ")";
}

// The same with what is left to PyTorch. attention: whether its attention that would be taken is switched on.
inline Text explain_relate(const AttentionGrad& p, bool step, bool attention, const Gpu& gpu) {
  const Relation& r = p.relation;
  const Way way = forward_way_on_gpu(r, step, gpu.architecture);
  const auto maps = [&](bool gradients) {
    return Text("PyTorch's batched products, which are faster here, ") + to_text(plan_products(r, gradients).problems) +
           " maps of weights at a time";
  };
  Text said = describe_forward(r, step, gpu);
  if (way == Way::products) said = maps(false);
  if (way == Way::attention && attention) said = "PyTorch's scaled_dot_product_attention, which is faster here";
  if (step && (way == Way::products || (way == Way::attention && attention))) said = said + ", then the cell update";
  return said + "; " +
         (why_not_gradient_products_on_gpu(r) ? describe_gradients(p, gpu) : "gradients by " + maps(true));
}

}  // namespace rcu_ops::cuda
