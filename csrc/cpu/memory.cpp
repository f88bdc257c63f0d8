#include "memory.h"

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
    const size_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    arena.data[slot] = std::aligned_alloc(64, size);
    arena.size[slot] = arena.data[slot] ? size : 0;
    if (!arena.data[slot]) throw std::bad_alloc();
  }
  if (const char* poison = std::getenv("RCU_OPS_POISON_SCRATCH"); poison && *poison == '1')
    std::memset(arena.data[slot], 0xff, arena.size[slot]);  // NaN in every format
  return arena.data[slot];
}

}  // namespace rcu_ops::cpu
