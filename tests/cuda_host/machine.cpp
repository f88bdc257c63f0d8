#include "machine.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
// This file is compiled without -fsanitize=thread, so that ThreadSanitizer sees the kernels alone, and is told what
// orders memory through its fiber interface.
#if defined(CUDA_HOST_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_write_range(void* address, unsigned long size);
extern "C" void __tsan_read2(void* address);
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_host {

Options options;

#if defined(__SANITIZE_ADDRESS__)
void* allocate(size_t bytes) {
  void* memory = std::malloc(bytes);
  return memory ? std::memset(memory, 0xff, bytes) : memory;
}
void deallocate(void* memory) { std::free(memory); }
#else
namespace {
std::map<void*, std::pair<void*, size_t>> mappings;  // by what allocate() gave
}
void* allocate(size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), words = (bytes + 15) / 16 * 16;
  const size_t size = (words + page - 1) / page * page;  // and a page that nobody can access
  void* all = mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED || mprotect(static_cast<char*>(all) + size, page, PROT_NONE) != 0) {
    std::perror("device memory");
    std::abort();
  }
  void* memory = static_cast<char*>(all) + size - words;
  mappings[memory] = {all, size + page};
  return std::memset(memory, 0xff, words);
}
void deallocate(void* memory) {
  const auto found = mappings.find(memory);
  munmap(found->second.first, found->second.second);
  mappings.erase(found);
}
#endif

namespace {

// ---- context switches ----------------------------------------------------------------------------------------------

constexpr size_t stack_bytes = 256 * 1024;

#if defined(__x86_64__)
extern "C" void cuda_host_switch(void** save, void* restore);
asm(R"(
.text
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, .-cuda_host_switch
)");
#endif

struct Context {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t state;
#endif
  char* stack = nullptr;  // null: the scheduler, on the process's own stack
  size_t size = 0;
  void* fake_stack = nullptr;
  void* sanitizer = nullptr;

  void prepare(void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, size);
#endif
#if defined(__x86_64__)
    // As if a call to `entry` had been cut off at the switch: six registers, the return address, and its own (none).
    auto** top = reinterpret_cast<void**>(stack + size) - 8;
    std::fill(top, top + 8, nullptr);
    top[6] = reinterpret_cast<void*>(entry);
    stack_pointer = top;
#else
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = size;
    state.uc_link = nullptr;
    makecontext(&state, entry, 0);
#endif
  }
};

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
#endif

void announce_switch([[maybe_unused]] Context& from, [[maybe_unused]] const Context& to, [[maybe_unused]] bool dying) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(dying ? nullptr : &from.fake_stack, to.stack ? to.stack : scheduler_stack,
                                 to.stack ? to.size : scheduler_stack_size);
#endif
#if defined(CUDA_HOST_THREAD_SANITIZER)
  __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
}

// On arrival in `self`; the first arrival in a fiber also tells where the scheduler's stack is.
void arrived([[maybe_unused]] Context& self) {
#if defined(__SANITIZE_ADDRESS__)
  const void* from = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(self.fake_stack, &from, &size);
  if (self.stack) {
    scheduler_stack = from;
    scheduler_stack_size = size;
  }
#endif
}

void switch_context(Context& from, Context& to, bool dying = false) {
  announce_switch(from, to, dying);
#if defined(__x86_64__)
  cuda_host_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.state, &to.state);
#endif
  arrived(from);
}

// Memory ordering, for ThreadSanitizer: what was done before release(x) is seen after acquire(x).
void acquire([[maybe_unused]] void* token) {
#if defined(CUDA_HOST_THREAD_SANITIZER)
  __tsan_acquire(token);
#endif
}
void release([[maybe_unused]] void* token) {
#if defined(CUDA_HOST_THREAD_SANITIZER)
  __tsan_release(token);
#endif
}

// What orders memory at a barrier: for the threads themselves, and for what the matrix unit sees through them.
struct Token {
  char threads = 0, products = 0;
};

// ---- threads, warps, blocks -----------------------------------------------------------------------------------------

struct Copy {
  void* shared;
  const void* global;
  size_t bytes;
};

enum class Wait { none, block, warp, group, cluster, poll, exited };

struct Block;
struct Warp;

struct Fiber {
  Context context;
  Block* block = nullptr;
  Warp* warp = nullptr;
  uint3 index{};
  unsigned number = 0;  // within the block
  Wait wait = Wait::none;
  const char* operation = "";
  Location where;
  std::vector<Copy> open;                // not committed yet
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
  std::map<float*, Accumulators> accumulators;
  std::vector<std::function<void(const Location&)>> open_products;
  std::deque<std::vector<std::function<void(const Location&)>>> product_groups;
  bool product_fenced = false;
  uint64_t exchanges = 0, block_barriers = 0, warp_barriers = 0, cluster_barriers = 0;
  bool arrived_at_cluster = false, first_poll = false;
  int group = 0;  // the barrier at which it waits
  // To ThreadSanitizer the matrix unit is a thread beside each of ours: its reads of shared memory are in order with
  // what that one knows to have been fenced (async_proxy_fence), by itself or before a barrier that it has passed.
  void* products_sanitizer = nullptr;
  bool products_began = false;  // in this block
  char fenced = 0, read = 0;
};

// Tokens name what orders memory. Barriers take turns with two of them: a thread may leave for the next barrier before
// another has woken up from this one, and must not be ordered with it by that.
struct Warp {
  int members = 0, waiting = 0;
  alignas(64) unsigned char contributions[2][32 * contribution_bytes];
  Token barrier[2];
};

// Blocks that run together: one, where nothing was said about clusters.
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  size_t arrived = 0, exited = 0;  // threads, of `threads`
  size_t threads = 0, blocks_exited = 0;
  uint64_t barriers = 0;  // completed
  Token barrier[2];
};

struct GroupBarrier {
  int waiting = 0;
  uint64_t completed = 0;
  Token token[2];
};

struct Block {
  uint3 index{};
  Cluster* cluster = nullptr;
  int rank = 0;  // in it
  bool mapped = false;
  uint64_t mapped_after = 0;  // the cluster's barriers when another block last mapped this one's shared memory
  std::vector<Fiber*> fibers;
  std::vector<std::unique_ptr<Warp>> warps;
  unsigned char* shared = nullptr;
  size_t waiting = 0, exited = 0;
  char begin = 0, end = 0;
  Token barrier[2];
  GroupBarrier groups[16];
};

struct Launch {
  const char* name;
  Shape shape;
  const std::function<void()>* kernel;
  std::string error;
  bool fenced = false;  // some thread has made an async_proxy_fence
};

Context scheduler;
Fiber* running = nullptr;
Launch* launch = nullptr;
std::vector<Fiber*> runnable;
std::vector<Fiber*> polling;
std::vector<std::unique_ptr<Cluster>> resident;
std::vector<Fiber*> idle;  // finished fibers, with their stacks
std::mt19937_64 random_source;

// Calls function() as the matrix unit beside the running thread.
template <typename Function>
void as_products([[maybe_unused]] Function function) {
#if defined(CUDA_HOST_THREAD_SANITIZER)
  Fiber& f = *running;
  if (!f.products_sanitizer) {
    // Only where it is wanted: ThreadSanitizer has eight thousand threads. It begins with what its maker knows, which
    // of the scheduler is nothing that blocks do.
    __tsan_switch_to_fiber(scheduler.sanitizer, __tsan_switch_to_fiber_no_sync);
    f.products_sanitizer = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(f.context.sanitizer, __tsan_switch_to_fiber_no_sync);
  }
  __tsan_switch_to_fiber(f.products_sanitizer, __tsan_switch_to_fiber_no_sync);
  if (!std::exchange(f.products_began, true)) acquire(&f.block->begin);
  function();
  __tsan_switch_to_fiber(f.context.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
}
void arrive(Token& token) {
  release(&token.threads);
  if (launch->fenced) as_products([&] { release(&token.products); });
}
void leave(Token& token) {
  acquire(&token.threads);
  if (launch->fenced) as_products([&] { acquire(&token.products); });
}

size_t draw(size_t count) { return std::uniform_int_distribution<size_t>(0, count - 1)(random_source); }

std::string place(const Location& where) {
  const char* file = std::strrchr(where.file_name(), '/');
  return std::string(file ? file + 1 : where.file_name()) + ":" + std::to_string(where.line());
}

std::string name_of(const Fiber& f) {
  const auto text = [](uint3 v) {
    return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
  };
  return "block " + text(f.block->index) + " thread " + std::to_string(f.number);
}

void land(std::vector<Copy>& copies) {
  while (!copies.empty()) {
    std::swap(copies[draw(copies.size())], copies.back());
    const Copy copy = copies.back();
    copies.pop_back();
    std::memcpy(copy.shared, copy.global, copy.bytes);
  }
}

void make_runnable(Fiber* f) {
  f->wait = Wait::none;
  runnable.push_back(f);
}

void sleep(Wait wait, const char* operation, const Location& where) {
  running->wait = wait;
  running->operation = operation;
  running->where = where;
  switch_context(running->context, scheduler);
}

// A block's last thread is about to exit: the others of its cluster must be done with its shared memory.
void close_shared(Block& block) {
  if (block.cluster->blocks.size() == 1) return;
  if (block.mapped && block.mapped_after == block.cluster->barriers)
    fail("a block exits whose shared memory others have mapped since the last cluster barrier", Location::current());
  acquire(&block.end);  // what its own threads did is in order with their exit
  if (!block.shared) return;
#if defined(CUDA_HOST_THREAD_SANITIZER)
  __tsan_write_range(block.shared, launch->shape.shared_bytes);
#endif
  std::memset(block.shared, 0xff, launch->shape.shared_bytes);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(block.shared, launch->shape.shared_bytes);
#endif
}

void fiber_main() {
  arrived(running->context);
  acquire(&running->block->begin);
  (*launch->kernel)();
  const bool landed =
      std::all_of(running->groups.begin(), running->groups.end(), [](const auto& g) { return g.empty(); });
  if (!running->open.empty() || !landed) fail("a thread exits with asynchronous copies in flight", Location::current());
  if (!running->accumulators.empty()) fail("a thread exits with products in flight", Location::current());
  if (running->arrived_at_cluster)
    fail("a thread arrives at a cluster barrier and exits without waiting", Location::current());
  if (Block& mine = *running->block; mine.exited + 1 == mine.fibers.size()) close_shared(mine);
  release(&running->block->end);
  running->wait = Wait::exited;
  switch_context(running->context, scheduler, true);
  std::abort();
}

Fiber* new_fiber() {
  if (!idle.empty()) {
    Fiber* f = idle.back();
    idle.pop_back();
    return f;
  }
  auto* f = new Fiber;
  // An inaccessible page below the stack: an overflow is a fault and not somebody else's data.
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, page + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) {
    std::perror("a fiber's stack");
    std::abort();
  }
  f->context.stack = static_cast<char*>(memory) + page;
  f->context.size = stack_bytes;
#if defined(CUDA_HOST_THREAD_SANITIZER)
  f->context.sanitizer = __tsan_create_fiber(0);
#endif
  return f;
}

std::unique_ptr<Block> start_block(Cluster& cluster, uint64_t number) {
  const Shape& shape = launch->shape;
  auto block = std::make_unique<Block>();
  block->cluster = &cluster;
  block->rank = static_cast<int>(cluster.blocks.size());
  block->index = {static_cast<unsigned>(number % shape.grid.x),
                  static_cast<unsigned>(number / shape.grid.x % shape.grid.y),
                  static_cast<unsigned>(number / shape.grid.x / shape.grid.y)};
  if (shape.shared_bytes > 0) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, shape.shared_bytes) != 0) std::abort();
    block->shared = static_cast<unsigned char*>(memory);
    std::memset(block->shared, 0xff, shape.shared_bytes);
  }
  const unsigned threads = shape.block.x * shape.block.y * shape.block.z;
  for (unsigned i = 0; i < threads; ++i) {
    if (i % 32 == 0) block->warps.push_back(std::make_unique<Warp>());
    Fiber* f = new_fiber();
    f->block = block.get();
    f->warp = block->warps.back().get();
    ++f->warp->members;
    f->number = i;
    f->index = {i % shape.block.x, i / shape.block.x % shape.block.y, i / shape.block.x / shape.block.y};
    f->exchanges = f->block_barriers = f->warp_barriers = f->cluster_barriers = 0;
    f->arrived_at_cluster = f->product_fenced = f->products_began = false;
    f->accumulators.clear();
    f->open_products.clear();
    f->product_groups.clear();
    f->open.clear();
    f->groups.clear();
    f->context.prepare(fiber_main);
    block->fibers.push_back(f);
    make_runnable(f);
  }
  release(&block->begin);
  return block;
}

// Blocks number .. number + shape.cluster.
std::unique_ptr<Cluster> start_cluster(uint64_t number) {
  auto cluster = std::make_unique<Cluster>();
  for (int i = 0; i < launch->shape.cluster; ++i) {
    cluster->blocks.push_back(start_block(*cluster, number + static_cast<uint64_t>(i)));
    cluster->threads += cluster->blocks.back()->fibers.size();
  }
  return cluster;
}

void end_cluster(Cluster& cluster) {
  for (const auto& block : cluster.blocks) {
    acquire(&block->end);
    for (Fiber* f : block->fibers) idle.push_back(f);
#if defined(__SANITIZE_ADDRESS__)
    if (block->shared) __asan_unpoison_memory_region(block->shared, launch->shape.shared_bytes);
#endif
    std::free(block->shared);
  }
}

// Nobody of these can run: says who waits for what.
std::string report_deadlock(const std::vector<const Fiber*>& fibers, const char* whose) {
  struct Group {
    std::string text;
    const Fiber* first;
    unsigned count;
  };
  std::vector<Group> groups;
  for (const Fiber* f : fibers) {
    std::string text =
        f->wait == Wait::exited ? "exited" : std::string("at ") + f->operation + " (" + place(f->where) + ")";
    const auto same = std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return g.text == text; });
    if (same != groups.end())
      ++same->count;
    else
      groups.push_back({std::move(text), f, 1});
  }
  std::string text = std::string("threads of ") + whose + " wait for each other in different places:";
  const bool blocks = fibers.front()->block != fibers.back()->block;
  for (const Group& g : groups)
    text += " " + std::to_string(g.count) + " " + g.text + ", the first is " +
            (blocks ? name_of(*g.first) : "thread " + std::to_string(g.first->number)) + ";";
  return text;
}

std::string report_deadlock(const Block& block) {
  return report_deadlock({block.fibers.begin(), block.fibers.end()}, "one block");
}

// All that are in flight, or one block of them where blocks do not wait for each other.
std::string report_deadlock() {
  if (polling.empty() && launch->shape.cluster == 1)
    return report_deadlock(*resident[draw(resident.size())]->blocks.front());
  std::vector<const Fiber*> fibers;
  for (const auto& cluster : resident)
    for (const auto& block : cluster->blocks) fibers.insert(fibers.end(), block->fibers.begin(), block->fibers.end());
  return report_deadlock(fibers, "blocks in flight");
}

// The manual's rule: all threads of the cluster that have not exited.
void release_cluster_if_complete(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived + cluster.exited != cluster.threads) return;
  cluster.arrived = 0;
  ++cluster.barriers;
  for (const auto& block : cluster.blocks)
    for (Fiber* f : block->fibers)
      if (f->wait == Wait::cluster) make_runnable(f);
}

void release_block_if_complete(Block& block) {
  if (block.waiting != block.fibers.size()) return;
  block.waiting = 0;
  const Fiber& first = *block.fibers.front();
  for (const Fiber* f : block.fibers)
    if (f->where.line() != first.where.line() || std::strcmp(f->where.file_name(), first.where.file_name()) != 0) {
      launch->error = report_deadlock(block);
      return;
    }
  for (Fiber* f : block.fibers) make_runnable(f);
}

void release_warp_if_complete(Warp& warp, Block& block) {
  if (warp.waiting != 32) return;
  warp.waiting = 0;
  const Fiber* first = nullptr;
  for (Fiber* f : block.fibers) {
    if (f->warp != &warp) continue;
    if (!first) first = f;
    if (f->where.line() != first->where.line() || std::strcmp(f->operation, first->operation) != 0) {
      launch->error = report_deadlock(block);
      return;
    }
  }
  for (Fiber* f : block.fibers)
    if (f->warp == &warp) make_runnable(f);
}

void meet_warp(const char* operation, const Location& where) {
  if (running->warp->members != 32) fail(std::string(operation) + " in a warp of fewer than 32 threads", where);
  ++running->warp->waiting;
  sleep(Wait::warp, operation, where);
}

}  // namespace

int64_t resident_blocks(int64_t threads, size_t shared_bytes) {
  // Of shared memory, by the system, for every block.
  const int64_t rounded = (threads + 31) / 32 * 32, reserved = 1024;
  const int64_t by_memory = (options.shared_bytes + reserved) / (static_cast<int64_t>(shared_bytes) + reserved);
  return options.multiprocessors * std::min({2048 / rounded, by_memory, int64_t{32}});
}

std::string run(const char* name, const Shape& shape, const std::function<void()>& kernel) {
  const dim3 grid = shape.grid, block = shape.block;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z,
                 threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  const auto refuse = [&](const std::string& why) { return std::string(name) + ": invalid launch: " + why; };
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || blocks == 0)
    return refuse("the grid is empty or too large");
  if (threads == 0 || threads > 1024 || block.z > 64) return refuse(std::to_string(threads) + " threads per block");
  if (static_cast<int64_t>(shape.shared_bytes) > options.shared_bytes)
    return refuse(std::to_string(shape.shared_bytes) + " bytes of shared memory, the device has " +
                  std::to_string(options.shared_bytes));
  if (shape.cluster != 1) {
    if (options.architecture < 90) return refuse("clusters on an architecture before sm_90");
    if (shape.cluster < 1 || shape.cluster > 16)
      return refuse("clusters of " + std::to_string(shape.cluster) + " blocks");
    if (grid.x % static_cast<unsigned>(shape.cluster) != 0)
      return refuse(std::to_string(grid.x) + " blocks along x are not whole clusters of " +
                    std::to_string(shape.cluster));
  }
  if (const int64_t most = resident_blocks(static_cast<int64_t>(threads), shape.shared_bytes);
      shape.cooperative && static_cast<int64_t>(blocks) > most)
    return refuse(std::to_string(blocks) + " blocks of a cooperative launch, the device holds " + std::to_string(most));

  Launch current{name, shape, &kernel, {}, false};
  launch = &current;
  random_source.seed(options.seed);
#if defined(CUDA_HOST_THREAD_SANITIZER)
  scheduler.sanitizer = __tsan_get_current_fiber();
#endif
  std::vector<uint64_t> order(blocks / static_cast<uint64_t>(shape.cluster));
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i * static_cast<uint64_t>(shape.cluster);
  std::shuffle(order.begin(), order.end(), random_source);
  const size_t together =
      shape.cooperative ? order.size() : static_cast<size_t>(std::max(1, options.resident / shape.cluster));
  // Fibers add to the first: were it to grow there, ThreadSanitizer would see the machine's own memory move.
  for (auto* list : {&runnable, &polling}) list->reserve(together * static_cast<size_t>(shape.cluster) * threads);
  size_t started = 0, unchanged = 0;  // unchanged: threads in a row that found memory as they had left it
  while (current.error.empty() && (started < order.size() || !resident.empty())) {
    while (started < order.size() && resident.size() < together) resident.push_back(start_cluster(order[started++]));
    if (runnable.empty() && unchanged >= polling.size()) {
      current.error = report_deadlock();
      break;
    }
    // Whoever polls looks again now and then, and when nobody else is left: then all in turn, so that none is
    // forgotten.
    auto& from = polling.empty() || (!runnable.empty() && draw(8) != 0) ? runnable : polling;
    const bool in_turn = &from == &polling && runnable.empty();
    const size_t chosen = in_turn ? 0 : draw(from.size());
    running = from[chosen];
    if (in_turn) {
      from.erase(from.begin());
    } else {
      std::swap(from[chosen], from.back());
      from.pop_back();
    }
    switch_context(scheduler, running->context);
    Block& of = *running->block;
    unchanged = running->wait == Wait::poll && !running->first_poll ? unchanged + (in_turn ? 1 : 0) : 0;
    if (running->wait == Wait::block) {
      release_block_if_complete(of);
    } else if (running->wait == Wait::warp) {
      release_warp_if_complete(*running->warp, of);
    } else if (running->wait == Wait::poll) {
      polling.push_back(running);
    } else if (running->wait == Wait::cluster) {
      if (running->cluster_barriers < of.cluster->barriers) make_runnable(running);
    } else if (running->wait == Wait::exited) {
      Cluster& cluster = *of.cluster;
      ++cluster.exited;
      release_cluster_if_complete(cluster);
      if (++of.exited == of.fibers.size() && ++cluster.blocks_exited == cluster.blocks.size()) {
        end_cluster(cluster);
        resident.erase(
            std::find_if(resident.begin(), resident.end(), [&](const auto& c) { return c.get() == &cluster; }));
      }
    }
  }
  // After an error the fibers in flight are abandoned where they stand, with their stacks and what these refer to.
  runnable.clear();
  polling.clear();
  for (auto& cluster : resident) static_cast<void>(cluster.release());
  resident.clear();
  running = nullptr;
  launch = nullptr;
  return current.error.empty() ? std::string() : std::string(name) + ": " + current.error;
}

uint3 thread_index() { return running->index; }
uint3 block_index() { return running->block->index; }
dim3 block_size() { return launch->shape.block; }
dim3 grid_size() { return launch->shape.grid; }
unsigned char* dynamic_shared() { return running->block->shared; }

void fail(const std::string& what, const Location& where) {
  launch->error = name_of(*running) + ": " + what + " (" + place(where) + ")";
  switch_context(running->context, scheduler);
  std::abort();
}

void require_cooperative(const Location& where) {
  if (!launch->shape.cooperative) fail("a barrier of the whole grid in a launch that is not cooperative", where);
}

void poll(bool first, const Location& where) {
  running->first_poll = first;
  sleep(Wait::poll, "wait_until", where);
}

constexpr uint32_t system_bytes = 1024;  // of shared memory, before the block's own

uint32_t shared_address(const void* p, size_t alignment, const Location& where) {
  const auto* begin = running->block->shared;
  const auto* at = static_cast<const unsigned char*>(p);
  if (!begin || at < begin || at >= begin + launch->shape.shared_bytes)
    fail("an address outside of the block's shared memory", where);
  if (static_cast<size_t>(at - begin) % alignment != 0)
    fail("an address in shared memory is not aligned to " + std::to_string(alignment) + " bytes", where);
  return system_bytes + static_cast<uint32_t>(at - begin);
}

void* shared_at(uint32_t address, size_t bytes, const Location& where) {
  if (address < system_bytes || address + bytes > system_bytes + launch->shape.shared_bytes)
    fail("address " + std::to_string(address) + " is outside of the block's shared memory", where);
  return running->block->shared + (address - system_bytes);
}

int cluster_rank() { return running->block->rank; }
int cluster_size() { return launch->shape.cluster; }

void cluster_arrive(const Location& where) {
  if (running->arrived_at_cluster) fail("a thread arrives twice at a cluster barrier", where);
  running->arrived_at_cluster = true;
  Cluster& cluster = *running->block->cluster;
  arrive(cluster.barrier[running->cluster_barriers % 2]);
  ++cluster.arrived;
  release_cluster_if_complete(cluster);
}

void cluster_wait(const Location& where) {
  if (!running->arrived_at_cluster) fail("a thread waits at a cluster barrier without having arrived", where);
  Cluster& cluster = *running->block->cluster;
  const uint64_t mine = running->cluster_barriers;
  sleep(Wait::cluster, "cluster_wait", where);
  leave(cluster.barrier[mine % 2]);
  running->cluster_barriers = mine + 1;
  running->arrived_at_cluster = false;
}

void* map_shared(const void* own, int rank, const Location& where) {
  const auto* at = static_cast<const unsigned char*>(own);
  Block& mine = *running->block;
  if (!mine.shared || at < mine.shared || at >= mine.shared + launch->shape.shared_bytes)
    fail("mapping an address outside of the block's shared memory", where);
  if (rank < 0 || rank >= launch->shape.cluster)
    fail("mapping the shared memory of block " + std::to_string(rank) + " of a cluster of " +
             std::to_string(launch->shape.cluster),
         where);
  Block& other = *mine.cluster->blocks[static_cast<size_t>(rank)];
  if (&other != &mine) {
    if (mine.cluster->barriers == 0)
      fail("mapping another block's shared memory before the first cluster barrier", where);
    if (other.exited == other.fibers.size()) fail("mapping the shared memory of a block that has exited", where);
    other.mapped = true;
    other.mapped_after = mine.cluster->barriers;
  }
  return other.shared + (at - mine.shared);
}

void block_barrier(const Location& where) {
  Token& token = running->block->barrier[running->block_barriers++ % 2];
  arrive(token);
  ++running->block->waiting;
  sleep(Wait::block, "block_barrier", where);
  leave(token);
}

void warp_barrier(const Location& where) {
  Token& token = running->warp->barrier[running->warp_barriers++ % 2];
  arrive(token);
  meet_warp("warp_barrier", where);
  leave(token);
}

void group_barrier(int id, int threads, const Location& where) {
  if (id < 1 || id > 15 || threads <= 0 || threads % 32 != 0)
    fail("barrier " + std::to_string(id) + " of " + std::to_string(threads) + " threads", where);
  GroupBarrier& barrier = running->block->groups[id];
  Token& token = barrier.token[barrier.completed % 2];
  arrive(token);
  running->group = id;
  if (++barrier.waiting == threads) {
    for (Fiber* f : running->block->fibers)
      if (f->wait == Wait::group && f->group == id) make_runnable(f);
    barrier.waiting = 0;
    ++barrier.completed;
  } else {
    sleep(Wait::group, "group_barrier", where);
  }
  leave(token);
}

void async_proxy_fence() {
  launch->fenced = true;
  release(&running->fenced);
  as_products([&] { acquire(&running->fenced); });
}

uint16_t read_of_product(const void* from) {
#if defined(CUDA_HOST_THREAD_SANITIZER)
  as_products([&] { __tsan_read2(const_cast<void*>(from)); });
#endif
  return *static_cast<const uint16_t*>(from);
}

void product_fence() { running->product_fenced = true; }

Accumulators& begin_product(float* accumulators, size_t count, const Location& where) {
  if (!running->product_fenced) fail("wgmma without a wgmma_fence since the last wait", where);
  Accumulators& held = running->accumulators[accumulators];
  if (held.products++ == 0) {
    held.values.assign(accumulators, accumulators + count);
    std::memset(accumulators, 0xff, count * sizeof(float));
  }
  return held;
}

void issue_product(std::function<void(const Location&)> complete) {
  running->open_products.push_back(std::move(complete));
}

void end_product(float* accumulators) {
  const auto held = running->accumulators.find(accumulators);
  if (--held->second.products > 0) return;
  std::copy(held->second.values.begin(), held->second.values.end(), accumulators);
  running->accumulators.erase(held);
}

void product_commit() {
  running->product_groups.push_back(std::move(running->open_products));
  running->open_products.clear();
}

void product_wait(size_t groups, const Location& where) {
  running->product_fenced = false;
  while (running->product_groups.size() > groups) {
    const auto due = std::move(running->product_groups.front());
    running->product_groups.pop_front();
    for (const auto& complete : due) complete(where);
  }
  as_products([&] { release(&running->read); });
  acquire(&running->read);
}

void copy_quietly(void* to, const void* from, size_t size) {
  // Not memcpy, which ThreadSanitizer intercepts: what the asm hides does not become one.
  for (size_t i = 0; i < size; ++i) {
    static_cast<unsigned char*>(to)[i] = static_cast<const unsigned char*>(from)[i];
    asm volatile("" ::: "memory");
  }
}

const unsigned char* exchange(const char* operation, const void* contribution, size_t size, const Location& where) {
  // Two buffers suffice: nobody contributes to the exchange after the next before all have left this one.
  unsigned char* all = running->warp->contributions[running->exchanges++ % 2];
  copy_quietly(all + running->number % 32 * contribution_bytes, contribution, size);
  meet_warp(operation, where);
  return all;
}

void async_copy(void* shared, const void* global, size_t bytes, const Location& where) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0 || reinterpret_cast<uintptr_t>(global) % bytes != 0)
    fail("an asynchronous copy of " + std::to_string(bytes) + " bytes is not aligned to its size", where);
  const auto* begin = running->block->shared;
  const auto* at = static_cast<const unsigned char*>(shared);
  if (at < begin || at + bytes > begin + launch->shape.shared_bytes)
    fail("an asynchronous copy ends outside of shared memory", where);
  std::memset(shared, 0xff, bytes);
  running->open.push_back({shared, global, bytes});
}

void async_commit() {
  running->groups.push_back(std::move(running->open));
  running->open.clear();
}

void async_wait(size_t groups) {
  std::vector<Copy> due;
  while (running->groups.size() > groups) {
    due.insert(due.end(), running->groups.front().begin(), running->groups.front().end());
    running->groups.pop_front();
  }
  land(due);
}

}  // namespace cuda_host
