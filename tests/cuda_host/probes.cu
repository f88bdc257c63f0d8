// Kernels that show one thing each: what a wrapper of csrc/cuda/device/ does, or a fault that the machine must report.
#include "probes.h"

#include "cuda/device/async_copy.h"
#include "cuda/device/atomic.h"
#include "cuda/device/barrier.h"
#include "cuda/device/grid_barrier.h"
#include "cuda/device/launch.h"
#include "cuda/device/matrix_copy.h"
#include "cuda/device/matrix_store.h"
#include "cuda/device/mma.h"
#include "cuda/device/runtime.h"
#include "cuda/device/shared_memory.h"
#include "cuda/device/shuffle.h"

namespace rcu_ops::cuda {
namespace {

// a [32 lanes][4], b [32][2], d [32][4], in and out.
template <typename T>
__global__ void mma_probe(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = threadIdx.x;
  uint32_t x[4], y[2];
  float z[4];
  for (int i = 0; i < 4; ++i) x[i] = a[4 * lane + i];
  for (int i = 0; i < 2; ++i) y[i] = b[2 * lane + i];
  for (int i = 0; i < 4; ++i) z[i] = d[4 * lane + i];
  if constexpr (std::is_same_v<T, float>)
    mma_m16n8k8_tf32(z, x, y);
  else
    mma_m16n8k16<T>(z, x, y);
  for (int i = 0; i < 4; ++i) d[4 * lane + i] = z[i];
}

constexpr int tile_bytes = 4096;

// shared [4096 bytes] in, rows [32] byte offsets in, r [32][Count] out.
template <int Count, bool Transposed>
__global__ void load_matrix_probe(const uint32_t* shared, const int* rows, uint32_t* r) {
  auto* memory = dynamic_shared<uint32_t>();
  for (int i = threadIdx.x; i < tile_bytes / 4; i += 32) memory[i] = shared[i];
  warp_barrier();
  uint32_t loaded[Count];
  load_matrix<Count, Transposed>(loaded, dynamic_shared<char>(rows[threadIdx.x]));
  for (int i = 0; i < Count; ++i) r[Count * threadIdx.x + i] = loaded[i];
}

// The inverse: shared is the output, of which the rest is zero.
template <int Count, bool Transposed, bool Plain>
__global__ void store_matrix_probe(uint32_t* shared, const int* rows, const uint32_t* r) {
  auto* memory = dynamic_shared<uint32_t>();
  for (int i = threadIdx.x; i < tile_bytes / 4; i += 32) memory[i] = 0;
  warp_barrier();
  uint32_t stored[Count];
  for (int i = 0; i < Count; ++i) stored[i] = r[Count * threadIdx.x + i];
  const auto row_at = [&](int row) { return rows[row]; };
  if constexpr (Plain)
    store_matrix_plain<Count, Transposed>(memory, row_at, stored);
  else
    store_matrix<Count, Transposed>(dynamic_shared<unsigned char>(), rows[threadIdx.x], row_at, stored);
  warp_barrier();
  for (int i = threadIdx.x; i < tile_bytes / 4; i += 32) shared[i] = memory[i];
}

// values [32], argument [1], out [4][32]: shuffle from lane + argument, shuffle_xor, shuffle_up, shuffle_down.
__global__ void shuffle_probe(const int64_t* values, const int* argument, int64_t* out) {
  const int lane = threadIdx.x, n = *argument;
  const auto value = static_cast<long long>(values[lane]);
  out[lane] = shuffle(value, lane + n);
  out[32 + lane] = shuffle_xor(value, n);
  out[64 + lane] = shuffle_up(value, n);
  out[96 + lane] = shuffle_down(value, n);
}

// in [3][32] words, out [3][32]: the second of three groups of copies may still be in flight when it is read.
__global__ void async_copy_probe(const uint32_t* in, uint32_t* out) {
  auto* memory = dynamic_shared<uint32_t>();
  const int lane = threadIdx.x;
  for (int group = 0; group < 3; ++group) {
    async_copy<4>(memory + 32 * group + lane, in + 32 * group + lane);
    async_commit();
  }
  async_wait<2>();
  out[lane] = memory[lane];
  out[32 + lane] = memory[32 + lane];
  async_wait<0>();
  out[64 + lane] = memory[64 + lane];
}

// Every block writes its index and size of the grid, every thread its own: out [blocks][threads][4].
__global__ void index_probe(int* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int* at = out + 4 * (block * static_cast<int>(blockDim.x * blockDim.y * blockDim.z) + thread);
  at[0] = blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z;
  at[1] = threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z;
  at[2] = gridDim.x + 10 * gridDim.y + 100 * gridDim.z;
  at[3] = blockDim.x + 10 * blockDim.y + 100 * blockDim.z;
}

// Rounds of: every block writes a number, and reads all the others' of the round. numbers [2][blocks] scratch, out
// [blocks]. Split: arrive and wait are apart. One slot for both parities would need a second barrier.
template <bool Split>
__global__ void grid_barrier_probe(GridCounter* counter, int* numbers, int* out) {
  GridBarrier barrier(counter);
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x),
            thread = static_cast<int>(threadIdx.x);
  int sum = 0;
  for (int round = 0; round < 4; ++round) {
    int* mine = numbers + round % 2 * blocks;
    if (thread == static_cast<int>(blockDim.x) - 1) mine[block] = round * 100 + block;
    if constexpr (Split) {
      barrier.arrive();
      sum += round;
      barrier.wait();
    } else {
      barrier.arrive_and_wait();
    }
    for (int i = 0; i < blocks; ++i) sum += mine[i];
  }
  if (thread == 0) out[block] = sum;
}

// A chain: block b waits for the value that block b - 1 releases. values [blocks], plain [blocks].
template <bool Ordered>
__global__ void chain_probe(uint32_t* values, int* plain) {
  const unsigned b = blockIdx.x;
  if (b > 0) wait_until([&] { return (Ordered ? load_acquire(values + b - 1) : load_relaxed(values + b - 1)) != 0; });
  plain[b] = b == 0 ? 1 : plain[b - 1] + 1;
  store_release(values + b, 1u);
}

// ticket [1], out [blocks]: the order of arrival, each number once.
__global__ void ticket_probe(uint32_t* ticket, int* out) { out[blockIdx.x] = static_cast<int>(fetch_add(ticket, 1u)); }

// ---- faults ---------------------------------------------------------------------------------------------------------

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 40)
    block_barrier();
  else
    block_barrier();
  out[threadIdx.x] = 1;
}
__global__ void barrier_after_exit(int* out) {
  if (threadIdx.x == 7) return;
  block_barrier();
  out[threadIdx.x] = 1;
}
__global__ void half_a_warp_shuffles(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = shuffle_xor(static_cast<int>(threadIdx.x), 1);
}
__global__ void different_operations(int* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? shuffle_xor(1, 2) : shuffle_up(1, 2);
}
__global__ void misaligned_copy(const uint32_t* in, uint32_t* out) {
  async_copy<8>(dynamic_shared<uint32_t>() + 1, in);
  async_commit();
  async_wait<0>();
  out[0] = *dynamic_shared<uint32_t>();
}
__global__ void copy_never_awaited(const uint32_t* in, uint32_t* out) {
  async_copy<4>(dynamic_shared<uint32_t>(), in);
  async_commit();
  out[0] = 1;
}
// Neighbours exchange through shared memory; Barrier says whether correctly.
template <bool Barrier>
__global__ void neighbours(int* out) {
  auto* memory = dynamic_shared<int>();
  memory[threadIdx.x] = static_cast<int>(threadIdx.x);
  if constexpr (Barrier) block_barrier();
  out[threadIdx.x] = memory[(threadIdx.x + 1) % blockDim.x];
}
// A shuffle between the write and the read orders nothing.
__global__ void shuffle_is_no_barrier(int* out) {
  auto* memory = dynamic_shared<int>();
  memory[threadIdx.x] = static_cast<int>(threadIdx.x);
  const int zero = shuffle_xor(0, 1);
  out[threadIdx.x] = memory[(threadIdx.x + 1) % 32] + zero;
}
__global__ void wait_for_nobody(int* out) {
  if (threadIdx.x == 5) wait_until([&] { return load_acquire(reinterpret_cast<uint32_t*>(out)) == 77; });
  block_barrier();
  out[threadIdx.x] = 1;
}
__global__ void one_past_shared_memory(int* out) {
  auto* memory = dynamic_shared<int>();
  memory[threadIdx.x + 1] = 1;
  block_barrier();
  out[threadIdx.x] = memory[threadIdx.x];
}

// A word of 16 bytes, 4 bytes on.
__global__ void misaligned_word(int* out) {
  const float4 word = *reinterpret_cast<const float4*>(out + 4 * threadIdx.x + 1);
  out[threadIdx.x] = static_cast<int>(word.x);
}
// The sixteenth number beyond the last.
__global__ void beyond_the_tensor(int* out) { out[threadIdx.x] = out[blockDim.x + 15]; }

// numbers [4][threads]: the first three in, a b + c out.
__global__ void product_and_sum_probe(float* numbers) {
  const unsigned i = threadIdx.x, n = blockDim.x;
  numbers[3 * n + i] = numbers[i] * numbers[n + i] + numbers[2 * n + i];
}
Error product_and_sum(const std::vector<void*>& s) {
  return launch("product_and_sum_probe", product_and_sum_probe, dim3(1), dim3(64), 0, Stream(),
                static_cast<float*>(s[0]));
}

// One row of 16.
__global__ void misaligned_row(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t r[2];
  load_matrix<2, false>(r, dynamic_shared<char>(16 * lane + (lane == 13 ? 8 : 0)));
  out[lane] = static_cast<int>(r[0] + r[1]);
}
__global__ void row_outside_of_shared_memory(int* out) {
  uint32_t r[1];
  load_matrix<1, true>(r, threadIdx.x == 3 ? static_cast<const void*>(out) : dynamic_shared<char>(16 * threadIdx.x));
  out[threadIdx.x] = static_cast<int>(r[0]);
}

template <int Count, bool Transposed>
Error load_probe(const std::vector<void*>& s) {
  return launch("load_matrix_probe", load_matrix_probe<Count, Transposed>, dim3(1), dim3(32), tile_bytes, Stream(),
                static_cast<const uint32_t*>(s[0]), static_cast<const int*>(s[1]), static_cast<uint32_t*>(s[2]));
}
template <int Count, bool Transposed, bool Plain>
Error store_probe(const std::vector<void*>& s) {
  return launch("store_matrix_probe", store_matrix_probe<Count, Transposed, Plain>, dim3(1), dim3(32), tile_bytes,
                Stream(), static_cast<uint32_t*>(s[0]), static_cast<const int*>(s[1]),
                static_cast<const uint32_t*>(s[2]));
}
template <typename T>
Error mma(const std::vector<void*>& s) {
  return launch("mma_probe", mma_probe<T>, dim3(1), dim3(32), 0, Stream(), static_cast<const uint32_t*>(s[0]),
                static_cast<const uint32_t*>(s[1]), static_cast<float*>(s[2]));
}
template <void (*Kernel)(int*), int Threads, size_t SharedBytes>
Error fault(const std::vector<void*>& s) {
  return launch("fault", Kernel, dim3(1), dim3(Threads), SharedBytes, Stream(), static_cast<int*>(s[0]));
}
template <void (*Kernel)(const uint32_t*, uint32_t*), int Threads, size_t SharedBytes>
Error copy(const std::vector<void*>& s) {
  return launch("copy", Kernel, dim3(1), dim3(Threads), SharedBytes, Stream(), static_cast<const uint32_t*>(s[0]),
                static_cast<uint32_t*>(s[1]));
}

// counter, numbers, out; twice, to show that the counter goes on where it was.
template <bool Split, bool Cooperative>
Error grid_barriers(const std::vector<void*>& s) {
  auto* counter = static_cast<GridCounter*>(s[0]);
  auto *numbers = static_cast<int*>(s[1]), *out = static_cast<int*>(s[2]);
  if constexpr (!Cooperative)
    return launch("grid_barrier_probe", grid_barrier_probe<Split>, dim3(3), dim3(64), 0, Stream(), counter, numbers,
                  out);
  Error error = fill_zero(counter, sizeof(GridCounter), Stream());
  for (int i = 0; i < 2 && error.empty(); ++i)
    error = launch_cooperative("grid_barrier_probe", grid_barrier_probe<Split>, 1, dim3(5), dim3(64), 0, Stream(),
                               counter, numbers, out);
  return error;
}
template <bool Ordered>
Error chain(const std::vector<void*>& s) {
  return launch_cooperative("chain_probe", chain_probe<Ordered>, 2, dim3(6), dim3(1), 0, Stream(),
                            static_cast<uint32_t*>(s[0]), static_cast<int*>(s[1]));
}
Error tickets(const std::vector<void*>& s) {
  return launch("ticket_probe", ticket_probe, dim3(7), dim3(1), 0, Stream(), static_cast<uint32_t*>(s[0]),
                static_cast<int*>(s[1]));
}
// One block more than the device holds.
Error one_block_too_many(const std::vector<void*>& s) {
  int64_t most = 0;
  const Error error = resident_blocks("index_probe", index_probe, 1, 96, 30 * 1024, most);
  if (!error.empty()) return error;
  return launch_cooperative("index_probe", index_probe, 1, dim3(static_cast<unsigned>(most + 1)), dim3(96), 30 * 1024,
                            Stream(), static_cast<int*>(s[0]));
}

const Probes& probes() {
  static const Probes own = {
      {"mma_bf16", mma<__nv_bfloat16>},
      {"mma_f16", mma<__half>},
      {"mma_tf32", mma<float>},
      {"load_1", load_probe<1, false>},
      {"load_2", load_probe<2, false>},
      {"load_4", load_probe<4, false>},
      {"load_1_transposed", load_probe<1, true>},
      {"load_2_transposed", load_probe<2, true>},
      {"load_4_transposed", load_probe<4, true>},
      {"store_1", store_probe<1, false, false>},
      {"store_2", store_probe<2, false, false>},
      {"store_4", store_probe<4, false, false>},
      {"store_1_transposed", store_probe<1, true, false>},
      {"store_2_transposed", store_probe<2, true, false>},
      {"store_4_transposed", store_probe<4, true, false>},
      {"store_1_plain", store_probe<1, false, true>},
      {"store_2_plain", store_probe<2, false, true>},
      {"store_4_plain", store_probe<4, false, true>},
      {"store_1_transposed_plain", store_probe<1, true, true>},
      {"store_2_transposed_plain", store_probe<2, true, true>},
      {"store_4_transposed_plain", store_probe<4, true, true>},
      {"shuffles",
       [](const std::vector<void*>& s) {
         return launch("shuffle_probe", shuffle_probe, dim3(1), dim3(32), 0, Stream(),
                       static_cast<const int64_t*>(s[0]), static_cast<const int*>(s[1]), static_cast<int64_t*>(s[2]));
       }},
      {"indices",
       [](const std::vector<void*>& s) {
         return launch("index_probe", index_probe, dim3(2, 3, 4), dim3(4, 3, 2), 0, Stream(), static_cast<int*>(s[0]));
       }},
      {"too_many_threads",
       [](const std::vector<void*>& s) {
         return launch("index_probe", index_probe, dim3(1), dim3(1025), 0, Stream(), static_cast<int*>(s[0]));
       }},
      {"too_much_shared_memory",
       [](const std::vector<void*>& s) {
         return launch("index_probe", index_probe, dim3(1), dim3(1), 1 << 20, Stream(), static_cast<int*>(s[0]));
       }},
      {"async_copies", copy<async_copy_probe, 32, 384>},
      {"misaligned_copy", copy<misaligned_copy, 1, 16>},
      {"copy_outside_shared_memory", copy<async_copy_probe, 32, 380>},
      {"copy_never_awaited", copy<copy_never_awaited, 1, 16>},
      {"divergent_barrier", fault<divergent_barrier, 64, 0>},
      {"barrier_after_exit", fault<barrier_after_exit, 64, 0>},
      {"half_a_warp_shuffles", fault<half_a_warp_shuffles, 64, 0>},
      {"different_operations", fault<different_operations, 32, 0>},
      {"partial_warp", fault<half_a_warp_shuffles, 48, 0>},
      {"barrier", fault<neighbours<true>, 64, 256>},
      {"no_barrier", fault<neighbours<false>, 64, 256>},
      {"shuffle_is_no_barrier", fault<shuffle_is_no_barrier, 32, 128>},
      {"grid_barrier", grid_barriers<false, true>},
      {"grid_barrier_split", grid_barriers<true, true>},
      {"grid_barrier_in_a_plain_launch", grid_barriers<false, false>},
      {"one_block_too_many", one_block_too_many},
      {"chain", chain<true>},
      {"chain_without_order", chain<false>},
      {"tickets", tickets},
      {"wait_for_nobody", fault<wait_for_nobody, 64, 0>},
      {"misaligned_word", fault<misaligned_word, 8, 0>},
      {"beyond_the_tensor", fault<beyond_the_tensor, 64, 0>},
      {"product_and_sum", product_and_sum},
      {"misaligned_row", fault<misaligned_row, 32, 512>},
      {"row_outside_of_shared_memory", fault<row_outside_of_shared_memory, 32, 512>},
      {"one_past_shared_memory", fault<one_past_shared_memory, 32, 128>},
  };
  static const Probes all = [] {
    Probes both = own;
    both.insert(probes_sm90().begin(), probes_sm90().end());
    return both;
  }();
  return all;
}

}  // namespace

std::string run_probe(const std::string& name, const std::vector<void*>& storages) {
  const auto found = probes().find(name);
  return found == probes().end() ? "no such probe" : found->second(storages).c_str();
}

}  // namespace rcu_ops::cuda
