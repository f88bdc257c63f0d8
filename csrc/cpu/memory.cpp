#include "memory.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>
#include <new>

namespace rcu_ops::cpu {

namespace {

struct Arena {
  void* data[3] = {nullptr, nullptr, nullptr};
  size_t size[3] = {0, 0, 0};
  ~Arena() {
    for (void* block : data) std::free(block);
  }
};
thread_local Arena arena;

}  // namespace

void* scratch(int slot, size_t bytes) {
  if (arena.size[slot] < bytes) {
    std::free(arena.data[slot]);
    const size_t size = (bytes + 63) / 64 * 64;
    constexpr size_t vectors = 256;  // that may be read beyond the end, whose page may be the last
    arena.data[slot] = std::aligned_alloc(64, size + vectors);
    arena.size[slot] = arena.data[slot] ? size : 0;
    if (!arena.data[slot]) throw std::bad_alloc();
    ask_for_large_pages(arena.data[slot], size);
  }
  if (const char* poison = std::getenv("RCU_OPS_POISON_SCRATCH"); poison && *poison == '1')
    std::memset(arena.data[slot], 0xff, arena.size[slot]);  // NaN in every format
  return arena.data[slot];
}

// Bytes of the calling thread's scratch: for tests, which find it in the library by its name.
extern "C" [[gnu::visibility("default")]] int64_t rcu_ops_scratch_bytes() {
  return static_cast<int64_t>(arena.size[0] + arena.size[1] + arena.size[2]);
}

void ask_for_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 2 << 20;
  constexpr size_t large = 4 << 20;
  static const bool wanted = [] {
    const char* given = std::getenv("RCU_OPS_LARGE_PAGES");
    return !given || *given != '0';
  }();
  if (bytes < large || !wanted) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace rcu_ops::cpu
