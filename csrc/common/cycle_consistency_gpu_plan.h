// How CUDA devices run an alignment: short cycles in one read, long sequences by products on the matrix unit, or query
// by query. Numbers alone: a plan can be made, and tested, for a device that is not there.
#pragma once

#include <cstdint>

#include "cycle_consistency.h"
#include "cycle_consistency_products.h"
#include "gpu.h"

namespace rcu_ops {

// Long sequences: a block finds the distances of 16 queries to all keys by products of frames in two fp16 parts.
//
// Scratch, in bytes from its start: mean [N][padded] fp32, largest magnitude [N][chunks] fp32, and of every frame (a's
// of a sample, then b's) its size and the power of two by which its parts were multiplied [N][T + S] fp32 and the parts
// [N][T + S][2][padded] fp16; then a block's rows, where they do not fit its shared memory.
struct ProductTiles {
  static constexpr int queries = 16, keys = 32, threads = 256, survey_threads = 512;  // of a block; of a warp at a time
  static constexpr int least_keys = 33, least_channels = 16;
  // Frames that may be nearest, before products with the soft neighbour thin them out.
  static constexpr int most_compared = 16;

  int64_t padded = 0, chunks = 0;  // channels, to whole steps of 32; blocks of 32 of them
  int64_t pitch = 0;               // of a row of distances: 8 from a multiple of 32, for different banks
  int64_t tasks = 0, blocks = 0;   // blocks of queries; thread blocks, which take them in turn
  // Distances [queries][pitch], centres and rests [queries][padded], soft neighbours' parts.
  int64_t row_bytes = 0;
  int64_t shared_bytes = 0;  // of a block
  bool in_shared = false;
  int64_t mean_at = 0, largest_at = 0, size_at = 0, factor_at = 0, parts_at = 0, rows_at = 0, scratch_bytes = 0;

  // Soft neighbours and landings of few pairs are found by differences all the same: a block of 4 queries spends about 15
  // instructions on a pair and channel, est. 16 us for 2^18 of them per multiprocessor, where tiles of 16 queries leave
  // half of the multiprocessors idle and find most distances twice (N = 4, T = 256, C = 128: 127 and 286 us on an H200,
  // benchmarks/results/nvidia-h200/). For cycles, which look for two nearest frames, nothing was measured.
  static constexpr const char* why_not(const Alignment& p, const Gpu& gpu) {
    const Align kind = p.kind;
    const DType dtype = p.dtype;
    const int64_t T = p.T, S = p.S, C = p.C;
    if (kind == Align::soft_backward || kind == Align::back_backward)
      return "gradients take every pair's difference as it is";
    if (dtype == DType::f64) return "float64";
    if ((kind == Align::cycle && T < S ? T : S) < least_keys) return "fewer than 33 frames";
    if (C < least_channels) return "fewer than 16 channels";
    const double multiplications = static_cast<double>(p.N * T) * static_cast<double>(S * C);
    const bool few = multiplications <= static_cast<double>(p.most_by_differences) * gpu.multiprocessors;
    return kind != Align::cycle && few ? "few enough for differences" : nullptr;
  }
  static constexpr bool takes(const Alignment& p, const Gpu& gpu) { return !why_not(p, gpu); }

  // Numbers of a block beside its rows: weights of 32 keys, the keys that have some, six numbers per query, one per
  // warp.
  static constexpr int64_t fixed_bytes() {
    return 4 * (keys * (queries + 4) + threads / 32 + 6 * queries + threads / 32);
  }

  ProductTiles(Align kind, int64_t N, int64_t T, int64_t S, int64_t C, const Gpu& gpu) {
    const int64_t longest = kind == Align::cycle && T > S ? T : S, frames = N * (T + S);
    padded = cuda::round_up(C, 32), chunks = padded / 32;
    pitch = cuda::round_up(longest, 32) + 8;
    tasks = N * (cuda::ceil_div(T, queries) + (kind == Align::cycle ? cuda::ceil_div(S, queries) : 0));
    row_bytes = 4 * queries * (pitch + 3 * padded);
    in_shared = fixed_bytes() + row_bytes <= gpu.shared_bytes;
    shared_bytes = fixed_bytes() + (in_shared ? row_bytes : 0);
    const int64_t resident = 2 * static_cast<int64_t>(gpu.multiprocessors);
    blocks = in_shared || tasks < resident ? tasks : resident;
    if (blocks > cuda::most_blocks) blocks = cuda::most_blocks;
    largest_at = mean_at + 4 * N * padded;
    size_at = largest_at + cuda::round_up(4 * N * chunks, 16);
    factor_at = size_at + cuda::round_up(4 * frames, 16);
    parts_at = factor_at + cuda::round_up(4 * frames, 16);
    rows_at = parts_at + 4 * frames * padded;
    scratch_bytes = rows_at + (in_shared ? 0 : blocks * row_bytes);
  }

  // Bounds of a product and of a sum of squares, as the kernel adds them up. Product: a 16-channel step of the matrix
  // unit from zero, 17 numbers of which each may be cut off below two units of the largest; the steps; what two fp16
  // parts leave of a number, and the product of the lower ones, 3. Squares: a lane's channels, then the lanes.
  static RCU_OPS_DEVICE constexpr Rounding<float> rounding(int64_t C) {
    return {C, 2 * 17 + (C + 15) / 16 + 3, (C + 31) / 32 + 6};
  }
};

}  // namespace rcu_ops
