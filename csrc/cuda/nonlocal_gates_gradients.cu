// Gradients of nonlocal_gates on the matrix unit (sm_80): 16-bit data, up to 256 queries and keys.
#include "cuda/nonlocal_gates_tile.h"

namespace rcu_ops::cuda {
namespace {

// dquery and the queries' statistics (OfKeys false), or dkey and dvalue (true), bf16 or fp16; see
// AttentionGrad.
//
// Work.     A block owns 32 rows of one sample and gate: queries and their gradients, or keys and their values. First
//           two maps of its rows against all rows on the other side, in tiles of 32 x 64: the scores, and the products
//           of gradients and values; 64 channels at a time are staged by cp.async while the stage before is multiplied.
//           Then a warp per row makes weights and the scores' gradients of them. Then slices of 128 channels of the
//           results, 32 rows of the other side staged at a time. Of the 8 warps, four by four take 16 rows, each its
//           quarter of the columns.
// Shares.   `shares` blocks have the same rows: each makes the maps, and every shares-th slice of the results.
// Scratch.  queries [3][B G N] fp32: of every query the peak, the sum and delta. Written by the queries' kernel, read
//           by the keys', which computes the weights from them again. No map leaves a block.
// Memory.   Shared memory as in TileGradientPlan. A row of a map is read whole by its warp and overwritten by half as
//           many bytes; rows are 16 bytes more than a multiple of 128, and words of a stage exchanged by the row's
//           number, so that eight rows of one column lie in different banks.
// Order.    The matrix unit's, stages in order; sums over keys by shuffles. It depends on shapes alone. No atomics.
// Rounding. Weights and the scores' gradients are rounded to 16 bits for the second products, as in eager PyTorch.
// Padding.  Words beyond the last row or channel are zeros in the stage; what is not seen has weight and gradient zero.
//           Rows of dead queries are zeros in the keys' stages, so nothing in them reaches a key.
// Output.   Every element has one writer. dquery, dkey and dvalue overlap no input.
// Bound.    L2: a block reads its rows and all rows of the other side once for the maps, and the latter again for the
//           results. At B = 24, four gates, P = 49, D = E = 1024 the queries' kernel reads 82 MB for 2.5 GFLOP, the
//           keys' 101 MB for 3.2, from L2; memory moves 67 MB, 16 us at 4.3 TB/s (arithmetic).
template <bool OfKeys>
__global__ void __launch_bounds__(tile_relate_threads, 2)
    tile_gradient(const AttentionGrad p, const TileGradientPlan plan, float* queries) {
  using T = uint16_t;
  constexpr int R = tile_gradient_rows, threads = tile_relate_threads, warps = threads / 32,
                others = tile_gradient_others;
  constexpr int depth = tile_gradient_depth, width = tile_gradient_slice, most = tile_relate_most_keys / 64;
  const Relation& r = p.relation;
  const bool bf16 = r.dtype == DType::bf16;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, row16 = warp / 4 * 16, quarter = warp % 4;
  const int tile = lane / 8, tile_row = lane % 8, fragment_row = lane / 4, fragment_pair = lane % 4 * 2;
  const int share = static_cast<int>(blockIdx.x % plan.shares), padded = plan.padded, pitch = padded + 4;
  const int64_t row0 = blockIdx.x / plan.shares % plan.tiles * R, problem = blockIdx.x / plan.shares / plan.tiles;
  const int64_t b = problem / r.G, g = problem % r.G, own_rows = OfKeys ? r.M : r.N, other_rows = OfKeys ? r.N : r.M;
  const int64_t all = r.B * r.G * r.N;
  float *maps = dynamic_shared<float>(), *totals = dynamic_shared<float>(plan.totals_at);
  float *peaks_of = queries + problem * r.N, *totals_of = peaks_of + all, *deltas_of = totals_of + all;
  const auto row_of = [&](int map, int row) { return maps + (map * R + row) * pitch; };
  const auto slot_of = [&](int stage) {
    return dynamic_shared<unsigned char>(plan.stages_at + stage % 2 * plan.stage_bytes);
  };
  const auto first_of = [&](const Rows& rows) {
    return static_cast<const T*>(rows.data) + b * rows.batch + g * rows.gate;
  };

  // ---- the maps: 0 the scores, 1 the products of gradients and values ----
  const auto product_word = [](int row, int word) { return row * (2 * depth) + (word ^ (row % 8)) * 16; };
  for (int map = 0; map < 2; ++map) {
    const Rows& own = map == 0 ? (OfKeys ? r.key : r.query) : (OfKeys ? r.value : p.grad);
    const Rows& other = map == 0 ? (OfKeys ? r.query : r.key) : (OfKeys ? p.grad : r.value);
    const T *from_own = first_of(own), *from_other = first_of(other);
    const int64_t channels = map == 0 ? r.D : r.E;
    for (int other0 = 0; other0 < padded; other0 += others) {
      float acc[2][4] = {};
      staged(
          static_cast<int>((channels + depth - 1) / depth), slot_of,
          [&](int stage, unsigned char* slot) {
            const int word = thread % 8;
            const int64_t channel = static_cast<int64_t>(stage) * depth + 8 * word;
#pragma unroll
            for (int row = thread / 8; row < R + others; row += threads / 8) {
              const bool mine = row < R;
              const int64_t n = mine ? row0 + row : other0 + row - R;
              const bool there = n < (mine ? own_rows : other_rows) && channel < channels;
              const T* from = mine ? from_own + n * own.row : from_other + n * other.row;
              copy_word(slot + product_word(row, word), there ? from + channel : nullptr);
            }
          },
          [&](int, unsigned char* slot) {
            with_format(bf16, [&](auto format) {
              using F = decltype(format);
#pragma unroll
              for (int k = 0; k < depth / 16; ++k) {
                uint32_t a[4], c[4];
                load_matrix<4, false>(a, slot + product_word(row16 + tile % 2 * 8 + tile_row, 2 * k + tile / 2));
                load_matrix<4, false>(
                    c, slot + product_word(R + 16 * quarter + tile / 2 * 8 + tile_row, 2 * k + tile % 2));
                const uint32_t first[2] = {c[0], c[1]}, second[2] = {c[2], c[3]};
                mma_m16n8k16<F>(acc[0], a, first);
                mma_m16n8k16<F>(acc[1], a, second);
              }
            });
          });
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float* to = row_of(map, row16 + fragment_row + 8 * j) + other0 + 16 * quarter + 8 * n + fragment_pair;
          to[0] = acc[n][2 * j], to[1] = acc[n][2 * j + 1];
        }
    }
  }
  block_barrier();  // the maps are complete

  // ---- weights and the scores' gradients: a warp per row, a lane for columns 64 t + 2 lane and + 1 ----
  const float scale = static_cast<float>(r.scale);
  for (int row = warp; row < R; row += warps) {
    float *scores = row_of(0, row), *products = row_of(1, row), weight[most][2], gradient[most][2];
    float largest = -INFINITY, total = 0, delta = 0;
    bool sees[most][2];
#pragma unroll
    for (int t = 0; t < most; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = 64 * t + 2 * lane + j;
        const int64_t n = OfKeys ? column : row0 + row, m = OfKeys ? row0 + row : column;
        sees[t][j] = n < r.N && m < r.M && (!r.mask || r.mask[b * r.mask_batch + n * r.mask_row + m * r.mask_key]);
        weight[t][j] = sees[t][j] ? scale * scores[column] : r.count ? 0.0f : -INFINITY;
        gradient[t][j] = sees[t][j] ? products[column] : 0.0f;
        if (sees[t][j] && r.count) total += 1;
        if (weight[t][j] > largest) largest = weight[t][j];  // NaN does not count: it reaches the sum by itself
      }
    if constexpr (!OfKeys) {
      if (!r.count) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
          const float other = shuffle_xor(largest, distance);
          if (other > largest) largest = other;
        }
      } else {
        largest = 0;
      }
      const float base = largest > -INFINITY ? largest : 0.0f;
#pragma unroll
      for (int t = 0; t < most; ++t)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (!r.count) weight[t][j] = exp(weight[t][j] - base), total += weight[t][j];
          if (sees[t][j]) delta += weight[t][j] * gradient[t][j];
        }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2)
        total += shuffle_xor(total, distance), delta += shuffle_xor(delta, distance);
      const float divisor = total == 0 ? 1.0f : total;  // dead: zeros stay zeros
      delta = r.count ? 0.0f : delta / divisor;
#pragma unroll
      for (int t = 0; t < most; ++t)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          gradient[t][j] = total == 0 || !sees[t][j] ? 0.0f
                           : r.count                 ? scale * gradient[t][j] / divisor
                                                     : scale * (weight[t][j] / divisor * (gradient[t][j] - delta));
      if (lane == 0) {
        totals[row] = total;
        if (share == 0 && row0 + row < r.N)
          peaks_of[row0 + row] = largest, totals_of[row0 + row] = total, deltas_of[row0 + row] = delta;
      }
    } else {
#pragma unroll
      for (int t = 0; t < most; ++t)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (!sees[t][j]) {
            weight[t][j] = gradient[t][j] = 0;
            continue;
          }
          const int query = 64 * t + 2 * lane + j;
          const float peak = peaks_of[query], sum = totals_of[query];
          if (sum == 0) {
            weight[t][j] = gradient[t][j] = 0;
          } else if (r.count) {
            weight[t][j] /= sum, gradient[t][j] = scale * gradient[t][j] / sum;
          } else {
            weight[t][j] = exp(weight[t][j] - (peak > -INFINITY ? peak : 0.0f)) / sum;
            gradient[t][j] = scale * (weight[t][j] * (gradient[t][j] - deltas_of[query]));
          }
        }
    }
    warp_barrier();  // all lanes have read the row
#pragma unroll
    for (int t = 0; t < most; ++t) {
      if (64 * t >= padded) continue;
      reinterpret_cast<uint32_t*>(scores)[32 * t + lane] = pack(gradient[t][0], gradient[t][1], bf16);
      if constexpr (OfKeys)
        reinterpret_cast<uint32_t*>(products)[32 * t + lane] = pack(weight[t][0], weight[t][1], bf16);
    }
  }
  block_barrier();  // all weights are there

  // ---- results: a stage holds 32 rows of the other side, 128 channels of each ----
  const auto result_word = [](int row, int word) { return row * (2 * width) + (word ^ (row % 8)) * 16; };
  const int64_t of_d = (r.D + width - 1) / width, slices = of_d + (OfKeys ? (r.E + width - 1) / width : 0);
  for (int64_t slice = share; slice < slices; slice += plan.shares) {
    const bool of_value = OfKeys && slice >= of_d;
    const Rows &right = of_value ? p.grad : (OfKeys ? r.query : r.key),
               &out = of_value ? p.dvalue : (OfKeys ? p.dkey : p.dquery);
    const int64_t channel0 = (of_value ? slice - of_d : slice) * width, channels = of_value ? r.E : r.D;
    const T* from = first_of(right);
    float acc[4][4] = {};
    staged(
        static_cast<int>((other_rows + 31) / 32), slot_of,
        [&](int stage, unsigned char* slot) {
          const int word = thread % 16;
          const int64_t channel = channel0 + 8 * word;
#pragma unroll
          for (int row = thread / 16; row < 32; row += threads / 16) {
            const int64_t n = 32 * stage + row;
            bool there = n < other_rows && channel < channels;
            if constexpr (OfKeys) there = there && totals_of[n] != 0;
            copy_word(slot + result_word(row, word), there ? from + n * right.row + channel : nullptr);
          }
        },
        [&](int stage, unsigned char* slot) {
          with_format(bf16, [&](auto format) {
            using F = decltype(format);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              uint32_t a[4], c[4];
              const auto* weights =
                  reinterpret_cast<const T*>(row_of(of_value ? 1 : 0, row16 + tile % 2 * 8 + tile_row));
              load_matrix<4, false>(a, weights + 32 * stage + 16 * k + tile / 2 * 8);
#pragma unroll
              for (int n = 0; n < 4; n += 2) {
                load_matrix<4, true>(c,
                                     slot + result_word(16 * k + tile % 2 * 8 + tile_row, 4 * quarter + n + tile / 2));
                const uint32_t first[2] = {c[0], c[1]}, second[2] = {c[2], c[3]};
                mma_m16n8k16<F>(acc[n], a, first);
                mma_m16n8k16<F>(acc[n + 1], a, second);
              }
            }
          });
        });
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = row16 + fragment_row + 8 * j;
        const int64_t channel = channel0 + 32 * quarter + 8 * n + fragment_pair;
        if (row0 + row >= own_rows || channel >= channels) continue;
        const bool dead = !OfKeys && totals[row] == 0;  // whatever the keys hold
        T* to = static_cast<T*>(out.data) + b * out.batch + g * out.gate + (row0 + row) * out.row + channel;
        *reinterpret_cast<uint32_t*>(to) = pack(dead ? 0.0f : acc[n][2 * j], dead ? 0.0f : acc[n][2 * j + 1], bf16);
      }
  }
}

}  // namespace

Error launch_tile_gradients(const AttentionGrad& p, const TileGradientPlan& of_queries, const TileGradientPlan& of_keys,
                            float* queries, Stream stream) {
  if (of_queries.blocks > most_blocks || of_keys.blocks > most_blocks)
    return "nonlocal_gates: too many rows for one launch";
  const auto go = [&](auto kernel, const TileGradientPlan& plan) {
    return launch("nonlocal_gates tile_gradient", kernel, dim3(static_cast<unsigned>(plan.blocks)),
                  dim3(tile_relate_threads), static_cast<size_t>(plan.shared_bytes), stream, p, plan, queries);
  };
  if (Error error = go(tile_gradient<false>, of_queries); !error.empty()) return error;
  return go(tile_gradient<true>, of_keys);
}

}  // namespace rcu_ops::cuda
