// nonlocal_gates on the matrix unit: 16-bit data and up to 256 keys, with blocks alone or in clusters; and the launches
// of both.
#pragma once

#include "common/nonlocal_gates_gpu_plan.h"
#include "cuda/device/async_copy.h"
#include "cuda/device/barrier.h"
#include "cuda/device/cluster.h"
#include "cuda/device/convert.h"
#include "cuda/device/launch.h"
#include "cuda/device/matrix_copy.h"
#include "cuda/device/mma.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shared_memory.h"
#include "cuda/device/shuffle.h"
#include "cuda/nonlocal_gates_forward.h"

namespace rcu_ops::cuda {

Error launch_tile_relate(const Forward& problem, const TileRelatePlan& plan, Stream stream);
// nonlocal_gates_sm90.cu.
Error launch_cluster_relate(const Forward& problem, const TileRelatePlan& plan, Stream stream);

Error launch_tile_gradients(const AttentionGrad& problem, const TileGradientPlan& of_queries,
                            const TileGradientPlan& of_keys, float* queries,
                            Stream stream);  // nonlocal_gates_gradients.cu

struct alignas(16) Word {
  uint32_t v[4];
};

// 16 bytes to shared memory, or zeros where there is nothing to copy.
template <typename T>
__device__ __forceinline__ void copy_word(unsigned char* to, const T* from) {
  if (from)
    async_copy<16>(to, from);
  else
    *reinterpret_cast<Word*>(to) = Word{};
}

// Runs take(i, slot_of(i)) for every stage i, the next one on its way meanwhile, in two slots. All threads.
template <typename Slot, typename Fetch, typename Take>
__device__ __forceinline__ void staged(int stages, Slot slot_of, Fetch fetch, Take take) {
  for (int i = -1; i < stages; ++i) {  // from before the first, so that `fetch` is there once
    async_wait<0>();
    block_barrier();  // stage i is here for all threads, and stage i - 1 has been used
    if (i + 1 < stages) fetch(i + 1, slot_of(i + 1));
    async_commit();
    if (i >= 0) take(i, slot_of(i));
  }
  async_wait<0>();
}

// out = w value (common/nonlocal_gates.h), bf16 or fp16, MT in {1, 2}.
//
// Work.     A block owns 16 MT queries of four relations: the four gates of a sample, or four problems of an attention.
//           Two of its 8 warps take each. Scores: tiles of 16 MT x 64 keys, the channels staged 32 at a time by
//           cp.async while the stage before is multiplied; weights: a warp per query; results: slices of 64 channels,
//           values staged 32 keys at a time in the same way; then the cell update.
// Shares.   `shares` blocks have the same queries. Alone, each computes all scores, and every shares-th slice of
//           results. In a cluster (Clustered) each multiplies every shares-th stage of channels; the partial scores are
//           added in the order of the ranks by the block that owns the query, through distributed shared memory, and
//           its weights go to all: every query, key and value is then read once per 16 MT queries, and h and c are
//           written once.
// Memory.   Shared memory as in TileRelatePlan: scores in fp32, [4][16 MT][padded + 8], whose place the results take;
//           weights in 16 bits, the same pitch; the sums that divided them; two stages. A row of a stage is 64 or 128
//           bytes without padding, its 16-byte words exchanged by the row's number, so that eight rows of one column
//           lie in different banks.
// Order.    The matrix unit's, stages in order, ranks in order; sums over keys by shuffles. It depends on shapes and
//           the number of shares alone. No atomics.
// Rounding. Weights are rounded to 16 bits for the second product, as in eager PyTorch; scores are not.
// Padding.  Words beyond the last row, key or channel are zeros in the stage; weights of keys that are not there are
//           zero.
// Output.   Every element has one writer; dead queries get zeros whatever the values are.
// Bound.    Alone, L2: D (keys and queries) per block and share. In clusters memory: at B = 24, P = 49, D = E = 1024
//           about 45 MB for 0.9 GFLOP, 11 us at 4.3 TB/s.
template <int MT, bool Clustered>
__device__ __forceinline__ void relate_by_tiles(const Forward& p, const TileRelatePlan& plan) {
  using T = uint16_t;
  constexpr int RT = 16 * MT, threads = tile_relate_threads, warps = threads / 32, keys = tile_relate_keys;
  constexpr int width = tile_relate_slice, rows_staged = 4 * (RT + keys);
  const Relation& r = p.relation;
  const bool bf16 = r.dtype == DType::bf16;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, gate = warp / 2, half = warp % 2;
  const int tile = lane / 8, tile_row = lane % 8, fragment_row = lane / 4, fragment_pair = lane % 4 * 2;
  const int share = static_cast<int>(blockIdx.x % plan.shares), padded = plan.padded, pitch = padded + 8;
  const int64_t row0 = blockIdx.x / plan.shares % plan.tiles * RT, group = blockIdx.x / plan.shares / plan.tiles;
  float *scores = dynamic_shared<float>(), *sums = dynamic_shared<float>(plan.sums_at);
  T* weights = dynamic_shared<T>(plan.weights_at);
  const auto slot_of = [&](int stage) {
    return dynamic_shared<unsigned char>(plan.stages_at + stage % 2 * plan.stage_bytes);
  };
  const auto barrier_of_shares = [] {
    if constexpr (Clustered)
      cluster_barrier();
    else
      block_barrier();
  };

  // Relation q of the block: its sample and gate, or false where there is none.
  const auto problem_of = [&](int q, int64_t& b, int64_t& g) {
    b = group, g = q;
    if (p.gates == 4) return true;
    const int64_t index = 4 * group + q;
    b = index / r.G, g = index % r.G;
    return index < r.B * r.G;
  };
  const auto first_of = [&](const Rows& rows, int q) {
    int64_t b, g;
    return problem_of(q, b, g) ? static_cast<const T*>(rows.data) + b * rows.batch + g * rows.gate : nullptr;
  };
  float acc[MT][4][4];
  const auto clear = [&] {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[m][n][j] = 0;
  };
  // The accumulators to columns [column0, column0 + 32) of this warp's relation in `scores`.
  const auto put = [&](int column0) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float* to = scores + (gate * RT + 16 * m + fragment_row + 8 * j) * pitch + column0 + 8 * n + fragment_pair;
          to[0] = acc[m][n][2 * j], to[1] = acc[m][n][2 * j + 1];
        }
  };
  const auto multiply = [&](auto format, const uint32_t (&a)[MT][4], const uint32_t (&b)[4], int n) {
    using F = decltype(format);
    const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      mma_m16n8k16<F>(acc[m][n], a[m], first);
      mma_m16n8k16<F>(acc[m][n + 1], a[m], second);
    }
  };

  // ---- scores: a stage holds the queries of the four relations, then 64 of their keys, 32 channels of each ----
  const auto score_word = [](int row, int word) { return row * 64 + (word ^ (row / 2 % 4)) * 16; };
  const int all_stages = static_cast<int>((r.D + 31) / 32), step = Clustered ? plan.shares : 1,
            begin = Clustered ? share : 0;
  const int stages = all_stages > begin ? (all_stages - begin + step - 1) / step : 0;
  for (int key0 = 0; key0 < padded; key0 += keys) {
    clear();
    staged(
        stages, slot_of,
        [&](int i, unsigned char* slot) {
          const int word = thread % 4;
          const int64_t channel = static_cast<int64_t>(begin + i * step) * 32 + 8 * word;
#pragma unroll
          for (int row = thread / 4; row < rows_staged; row += threads / 4) {
            const bool of_query = row < 4 * RT;
            const int q = of_query ? row / RT : (row - 4 * RT) / keys;
            const int64_t n = of_query ? row0 + row % RT : key0 + (row - 4 * RT) % keys;
            const Rows& rows = of_query ? r.query : r.key;
            const T* first = first_of(rows, q);
            const bool there = first && n < (of_query ? r.N : r.M) && channel < r.D;
            copy_word(slot + score_word(row, word), there ? first + n * rows.row + channel : nullptr);
          }
        },
        [&](int, unsigned char* slot) {
          with_format(bf16, [&](auto format) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              uint32_t a[MT][4], b[4];
#pragma unroll
              for (int m = 0; m < MT; ++m)
                load_matrix<4, false>(
                    a[m], slot + score_word(gate * RT + 16 * m + tile % 2 * 8 + tile_row, 2 * k + tile / 2));
#pragma unroll
              for (int n = 0; n < 4; n += 2) {
                const int row = 4 * RT + gate * keys + half * 32 + 8 * n + tile / 2 * 8 + tile_row;
                load_matrix<4, false>(b, slot + score_word(row, 2 * k + tile % 2));
                multiply(format, a, b, n);
              }
            }
          });
        });
    put(key0 + half * 32);
  }
  barrier_of_shares();  // all scores are there

  // ---- weights: a warp per query, a lane for keys 64 t + 2 lane and + 1 ----
  for (int query = (Clustered ? share * warps : 0) + warp; query < 4 * RT;
       query += (Clustered ? plan.shares : 1) * warps) {
    constexpr int most = tile_relate_most_keys / 64;
    int64_t b, g;
    const int64_t n = row0 + query % RT;
    const bool there = problem_of(query / RT, b, g) && n < r.N;
    const uint8_t* mask = r.mask && there ? r.mask + b * r.mask_batch + n * r.mask_row : nullptr;
    float value[most][2], largest = -INFINITY, total = 0;
#pragma unroll
    for (int t = 0; t < most; ++t)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        value[t][j] = r.count ? 0.0f : -INFINITY;
        const int key = 64 * t + 2 * lane + j;
        if (!there || key >= r.M || (mask && !mask[key * r.mask_key])) continue;
        float* mine = scores + query * pitch + key;
        float score = 0;
        if constexpr (Clustered)
          for (int rank = 0; rank < plan.shares; ++rank) score += *cluster_shared(mine, rank);
        else
          score = *mine;
        value[t][j] = static_cast<float>(r.scale) * score;
        if (r.count) total += 1;
        if (value[t][j] > largest) largest = value[t][j];  // NaN does not count: it reaches the sum by itself
      }
    if (!r.count) {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        const float other = shuffle_xor(largest, distance);
        if (other > largest) largest = other;
      }
      const float base = largest > -INFINITY ? largest : 0.0f;
#pragma unroll
      for (int t = 0; t < most; ++t)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          value[t][j] = exp(value[t][j] - base);
          total += value[t][j];
        }
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) total += shuffle_xor(total, distance);
    const float divisor = total == 0 ? 1.0f : total;  // dead: zeros stay zeros
    for (int rank = 0; rank < (Clustered ? plan.shares : 1); ++rank) {
#pragma unroll
      for (int t = 0; t < most; ++t) {
        if (64 * t >= padded) continue;
        auto* to = reinterpret_cast<uint32_t*>(weights + query * pitch + 64 * t + 2 * lane);
        if constexpr (Clustered) to = cluster_shared(to, rank);
        *to = pack(value[t][0] / divisor, value[t][1] / divisor, bf16);
      }
      float* to = sums + query;
      if constexpr (Clustered) to = cluster_shared(to, rank);
      if (lane == 0) *to = total;
    }
  }
  barrier_of_shares();  // all weights are there, and nobody needs the scores, here or in another block, any more

  // ---- results: a stage holds 32 values of the four relations, 64 channels of each ----
  const auto value_word = [](int row, int word) { return row * 128 + (word ^ (row % 8)) * 16; };
  const int value_stages = static_cast<int>((r.M + 31) / 32);
  for (int64_t slice = share; slice * width < r.E; slice += plan.shares) {
    const int64_t channel0 = slice * width;
    clear();
    staged(
        value_stages, slot_of,
        [&](int i, unsigned char* slot) {
          const int word = thread % 8, key = thread / 8;
          const int64_t channel = channel0 + 8 * word;
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const T* first = first_of(r.value, q);
            const bool there = first && 32 * i + key < r.M && channel < r.E;
            copy_word(slot + value_word(32 * q + key, word),
                      there ? first + (32 * i + key) * r.value.row + channel : nullptr);
          }
        },
        [&](int i, unsigned char* slot) {
          with_format(bf16, [&](auto format) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              uint32_t a[MT][4], b[4];
#pragma unroll
              for (int m = 0; m < MT; ++m)
                load_matrix<4, false>(a[m], weights + (gate * RT + 16 * m + tile % 2 * 8 + tile_row) * pitch + 32 * i +
                                                16 * k + tile / 2 * 8);
#pragma unroll
              for (int n = 0; n < 4; n += 2) {
                load_matrix<4, true>(
                    b, slot + value_word(32 * gate + 16 * k + tile % 2 * 8 + tile_row, 4 * half + n + tile / 2));
                multiply(format, a, b, n);
              }
            }
          });
        });
    put(half * 32);
    block_barrier();  // the slice is complete
    for (int i = thread; i < RT * width; i += threads) {
      const int row = i / width, column = i % width;
      const int64_t n = row0 + row, channel = channel0 + column;
      if (n >= r.N || channel >= r.E) continue;
      float relation[4];
#pragma unroll
      for (int q = 0; q < 4; ++q)
        relation[q] = sums[q * RT + row] == 0 ? 0.0f : scores[(q * RT + row) * pitch + column];
      if (p.gates == 4) {
        update_cell<float>(p, group, n, channel, relation);
        continue;
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        int64_t b, g;
        if (problem_of(q, b, g))
          static_cast<T*>(p.out.data)[b * p.out.batch + g * p.out.gate + n * p.out.row + channel] =
              narrow<T>(relation[q], bf16);
      }
    }
  }
}

}  // namespace rcu_ops::cuda
