// A grid's blocks, one or a few at a time in any order, the threads of a block, and their barriers.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <numeric>
#include <string>

#include "shim/cuda/control.h"
#include "shim/cuda/warpgroup.h"
#include "shim/cuda/watch.h"

namespace nybble::cuda::shim {

Thread threads[fibers::kMostFibers];
Grid grid;

namespace {

constexpr size_t kMostShared = 228 * 1024;
constexpr unsigned char kPoison = 0xFF;  // a NaN in every floating format

Device device;
uint64_t base_seed = 0;
int64_t launch_count = 0;
std::vector<std::unique_ptr<Block>> blocks;
void (*call_kernel)(void*) = nullptr;
void* kernel_closure = nullptr;
char status_text[8192];

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

// Memory of a block: pages that must not be touched on both sides, the data as far to the right as 1024-byte alignment
// lets them be; what is left on the right must stay as it was.
struct SharedRegion {
  unsigned char* begin = nullptr;
  unsigned char* end = nullptr;

  bool make() {
    if (begin != nullptr) return true;
    const size_t page = page_bytes();
    const size_t bytes = (kMostShared + page - 1) / page * page;
    void* memory = mmap(nullptr, bytes + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return false;
    begin = static_cast<unsigned char*>(memory) + page;
    end = begin + bytes;
    mprotect(memory, page, PROT_NONE);
    mprotect(end, page, PROT_NONE);
    return true;
  }
  unsigned char* data() const { return end - (grid.shared_bytes + 1023) / 1024 * 1024; }
};
SharedRegion regions[kMostResident];

void name_thread(int fiber, char* text, size_t size) {
  const Thread& thread = threads[fiber];
  const uint3& index = thread.block->index;
  snprintf(text, size, "block (%u, %u, %u) thread %d", index.x, index.y, index.z, thread.number);
}

void explain_address(const void* address, char* text, size_t size) {
  const auto* at = static_cast<const unsigned char*>(address);
  for (const SharedRegion& region : regions) {
    if (region.begin == nullptr || at < region.begin - page_bytes() || at >= region.end + page_bytes()) continue;
    const unsigned char* data = region.data();
    if (at >= data) {
      snprintf(text, size, "%zu bytes into the %zu of shared memory", static_cast<size_t>(at - data),
               grid.shared_bytes);
    } else {
      snprintf(text, size, "%zu bytes before shared memory", static_cast<size_t>(data - at));
    }
    return;
  }
  explain_global(address, text, size);
}

void start_block(Block& block, int number, int64_t linear, int block_threads) {
  block.index = {static_cast<unsigned>(linear % grid.grid.x), static_cast<unsigned>(linear / grid.grid.x % grid.grid.y),
                 static_cast<unsigned>(linear / grid.grid.x / grid.grid.y)};
  block.number = number;
  block.first_fiber = number * block_threads;
  block.shared = regions[number].data();
  std::memset(block.shared, kPoison, static_cast<size_t>(regions[number].end - block.shared));
  block.warps.assign(static_cast<size_t>(block_threads / kWarp), Warp());
  block.warpgroups.clear();
  for (int i = 0; i < block_threads / kWarpgroup; ++i) block.warpgroups.push_back(std::make_shared<Warpgroup>());
  for (Barrier& barrier : block.barriers) barrier = Barrier();
  block.memory_barriers.clear();
  watch_clear(number);
  for (int i = 0; i < block_threads; ++i) {
    Thread& thread = threads[block.first_fiber + i];
    thread.copies.clear();
    std::vector<Copy> copies = std::move(thread.copies);
    thread = Thread();
    thread.copies = std::move(copies);
    thread.block = &block;
    thread.index = {static_cast<unsigned>(i), 0, 0};
    thread.number = i;
    thread.lane = i % kWarp;
    thread.warp = i / kWarp;
  }
}

// After its threads have returned; an empty text if all is well.
std::string look_at_finished(const Block& block) {
  const unsigned char* end = block.shared + grid.shared_bytes;
  for (const unsigned char* at = end; at < regions[block.number].end; ++at) {
    if (*at != kPoison) {
      return "shared memory was written " + std::to_string(at - end) + " bytes past its end (" +
             std::to_string(grid.shared_bytes) + " bytes)";
    }
  }
  for (int id = 0; id < 16; ++id) {
    if (block.barriers[id].arrived != 0) {
      return "threads arrived at barrier " + std::to_string(id) + " and nobody came to wait";
    }
  }
  return registers_problem(block);
}

bool idle() { return perform_some_copy(); }

void run_thread(int) {
  call_kernel(kernel_closure);
  thread_exits();
}

Status failed(const std::string& why) {
  static const char* const kOrders[] = {"random", "in order", "reverse"};
  snprintf(status_text, sizeof status_text, "%s: %s [seed %llu, %s]", grid.kernel, why.c_str(),
           static_cast<unsigned long long>(base_seed), kOrders[static_cast<int>(fibers::order())]);
  return device_failed(status_text, 700);
}

// "... [with auto Kernel = nybble::cuda::kernel; P = ...]"
std::string kernel_name(const std::string& signature) {
  const size_t begin = signature.find("Kernel = ");
  if (begin == std::string::npos) return "kernel";
  const size_t end = signature.find("; P", begin);
  return signature.substr(begin + 9, end == std::string::npos ? end : end - begin - 9);
}

int64_t most_shared() { return device.capability >= 90 ? 227 * 1024 : 163 * 1024; }

std::string problem_of_launch(const dim3& blocks_wanted, int block_threads, size_t shared_bytes) {
  if (block_threads <= 0 || block_threads > kMostThreads || block_threads % kWarp != 0) {
    return "a block of " + std::to_string(block_threads) + " threads";
  }
  if (blocks_wanted.x > 0x7FFFFFFFU || blocks_wanted.y > 65535 || blocks_wanted.z > 65535) {
    return "a grid of " + std::to_string(blocks_wanted.x) + " x " + std::to_string(blocks_wanted.y) + " x " +
           std::to_string(blocks_wanted.z) + " blocks";
  }
  if (shared_bytes > static_cast<size_t>(most_shared())) {
    return std::to_string(shared_bytes) + " bytes of shared memory, where a block can have " +
           std::to_string(most_shared());
  }
  return "";
}

}  // namespace

void set_device(const Device& value) { device = value; }
Device get_device() { return device; }
void set_seed(uint64_t seed) { base_seed = seed; }
int64_t launches() { return launch_count; }

bool chance(uint32_t one_in) {
  switch (fibers::order()) {
    case fibers::Order::random:
      return fibers::random_below(one_in) == 0;
    case fibers::Order::in_order:
      return false;
    case fibers::Order::reverse:
      return true;
  }
  return false;
}

void fail(const char* format, ...) {
  char message[4096];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  fibers::fail("%s", message);
}

const uint3& thread_index() { return self().index; }
const uint3& block_index() { return self().block->index; }
const dim3& block_dim() { return grid.block; }
const dim3& grid_dim() { return grid.grid; }

void check_aligned(const void* address, uintptr_t bytes, const char* operation) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail("%s: address %p is not aligned to %d bytes", operation, address, static_cast<int>(bytes));
  }
}

void check_shared(const void* address, size_t bytes, const char* operation) {
  const unsigned char* begin = self().block->shared;
  const auto* at = static_cast<const unsigned char*>(address);
  if (at < begin || at + bytes > begin + grid.shared_bytes) {
    fail("%s: address %p is %lld bytes from the beginning of shared memory, which has %zu", operation, address,
         static_cast<long long>(at - begin), grid.shared_bytes);
  }
}

void check_hopper(const char* operation) {
  if (device.capability != 90) fail("%s: only sm_90a has it, and this is sm_%d", operation, device.capability);
}

void publish() { self().published = true; }
void check_published() {
  if (!self().published)
    fail("atomicAdd: no __threadfence before it, without which others may not see what was written");
}

void atomic_point() {
  constexpr uint32_t kEndless = 1U << 20;
  if (++self().atomics > kEndless) fail("no end: %u atomic operations of one thread", kEndless);
  if (fibers::order() == fibers::Order::random && chance(4)) fibers::yield();
}

// `threads`: how many make the barrier; 0: all of the block.
void barrier(int id, int barrier_threads, bool waits) {
  Thread& thread = self();
  Block& block = *thread.block;
  const bool all = id == 0 && barrier_threads == 0;
  const int wanted = all ? static_cast<int>(grid.block.x) : barrier_threads;
  const char* operation = all ? "__syncthreads" : waits ? "barrier_sync" : "barrier_arrive";
  if (!all && (id < 1 || id > 15)) fail("%s: barrier %d; allowed are 1 to 15", operation, id);
  if (wanted <= 0 || wanted % kWarp != 0 || wanted > static_cast<int>(grid.block.x)) {
    fail("%s: %d threads in a block of %u", operation, wanted, grid.block.x);
  }
  perform_own_copies();
  Barrier& at = block.barriers[id];
  Collective& warp = join(operation, kWholeWarp, id * 65536 + wanted, nullptr);
  if (warp.arrived != kWholeWarp) {
    fibers::block(operation);
    return;
  }
  // The whole warp has come.
  warp.arrived = 0;
  if (at.threads != 0 && at.threads != wanted) {
    fail("%s: barrier %d is for %d threads here and for %d elsewhere", operation, id, wanted, at.threads);
  }
  at.threads = wanted;
  at.arrived += kWarp;
  const int first = block.first_fiber + thread.warp * kWarp;
  const bool complete = at.arrived == wanted;
  if (complete) {
    for (const int fiber : at.waiting) fibers::wake(fiber);
    at.waiting.clear();
    at.arrived = at.threads = 0;
  }
  for (int i = first; i < first + kWarp; ++i) {
    if (complete || !waits) {
      if (i != fibers::current) fibers::wake(i);
    } else {
      at.waiting.push_back(i);
    }
  }
  if (!complete && waits) fibers::block(operation);
}

Status run_grid(const char* signature, dim3 blocks_wanted, int block_threads, size_t shared_bytes, void (*call)(void*),
                void* closure) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (blocks_wanted.x == 0 || blocks_wanted.y == 0 || blocks_wanted.z == 0) return success();
  static std::string name;
  name = kernel_name(signature);
  grid = {blocks_wanted, dim3(static_cast<unsigned>(block_threads)), shared_bytes, name.c_str()};
  ++launch_count;
  uint64_t seed = base_seed;
  for (const uint64_t part : {uint64_t{blocks_wanted.x}, uint64_t{blocks_wanted.y}, uint64_t{blocks_wanted.z},
                              static_cast<uint64_t>(block_threads), uint64_t{shared_bytes}, uint64_t{name.size()}}) {
    seed = (seed ^ part) * 0x9E3779B97F4A7C15U;
    seed ^= seed >> 29;
  }
  fibers::seed(seed);
  const std::string problem = problem_of_launch(blocks_wanted, block_threads, shared_bytes);
  if (!problem.empty()) return failed(problem);
  call_kernel = call;
  kernel_closure = closure;
  const int64_t count = int64_t{1} * blocks_wanted.x * blocks_wanted.y * blocks_wanted.z;
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  if (fibers::order() == fibers::Order::reverse) std::reverse(order.begin(), order.end());
  if (fibers::order() == fibers::Order::random) {
    // Neighbours, which often work on the same output, run at the same time only if they stay neighbours.
    std::rotate(order.begin(), order.begin() + fibers::random_below(static_cast<uint32_t>(count)), order.end());
    if (fibers::random_below(2) == 0) {
      for (size_t i = order.size(); i > 1; --i) {
        std::swap(order[i - 1], order[fibers::random_below(static_cast<uint32_t>(i))]);
      }
    }
  }
  const int fit = std::min(kMostResident, fibers::kMostFibers / block_threads);
  while (static_cast<int>(blocks.size()) < kMostResident) blocks.push_back(std::make_unique<Block>());
  for (size_t at = 0; at < order.size();) {
    int resident = 1;  // several at once: their accesses to global memory then come in any order
    if (fibers::order() == fibers::Order::random) {
      constexpr int kTogether[] = {1, 2, 3, kMostResident};
      resident = std::min(fit, kTogether[fibers::random_below(4)]);
    }
    resident = static_cast<int>(std::min(order.size() - at, static_cast<size_t>(resident)));
    for (int i = 0; i < resident; ++i) {
      if (!regions[i].make()) return failed("no memory for shared memory");
      start_block(*blocks[i], i, order[at + i], block_threads);
    }
    reset_copies();
    if (!fibers::run(resident * block_threads, {run_thread, idle, name_thread, explain_address})) {
      return failed(fibers::error());
    }
    for (int i = 0; i < resident; ++i) {
      const std::string after = look_at_finished(*blocks[i]);
      if (!after.empty()) return failed(after);
    }
    at += resident;
  }
  return success();
}

}  // namespace nybble::cuda::shim

namespace nybble::cuda {

unsigned char* shared_memory() { return shim::self().block->shared; }
uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - shim::self().block->shared;
  return static_cast<uint32_t>(offset) + shim::kSystemShared;
}

Device shim_device() { return shim::get_device(); }

}  // namespace nybble::cuda
