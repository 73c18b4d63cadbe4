// Asynchronous copies, and the barriers in shared memory that they and threads arrive at. A copy takes what its source
// holds when it is issued; when it is written lies anywhere between that and the wait: at once in order, as late as
// possible in reverse order, and else at random.
#include <algorithm>

#include "shim/cuda/block.h"
#include "shim/cuda/watch.h"

namespace nybble::cuda::shim {

namespace {

std::vector<int> busy;  // fibers that have copies under way; some of them may have none any more

// What lies at an mbarrier, so that overwriting or forgetting to initialize it is seen.
uint64_t signature_of(const MemoryBarrier& barrier) {
  return 0x4D62000000000000U ^ (reinterpret_cast<uintptr_t>(barrier.address) << 8) ^ barrier.count;
}

MemoryBarrier& barrier_at(uint64_t* address, const char* operation) {
  check_shared(address, 8, operation);
  check_aligned(address, 8, operation);
  for (MemoryBarrier& barrier : self().block->memory_barriers) {
    if (barrier.address != address) continue;
    if (*address != signature_of(barrier)) fail("%s: the mbarrier was overwritten", operation);
    return barrier;
  }
  fail("%s: the mbarrier is not initialized", operation);
}

void arrive_at(MemoryBarrier& barrier) {
  if (--barrier.pending != 0) return;
  barrier.pending = barrier.count;
  ++barrier.phase;
  for (const int fiber : barrier.waiting) fibers::wake(fiber);
  barrier.waiting.clear();
}

// The block's table, without the checks that need a running fiber.
void arrive(Block& block, uint64_t* address) {
  for (MemoryBarrier& barrier : block.memory_barriers) {
    if (barrier.address == address) arrive_at(barrier);
  }
}

// Arrivals whose copies are all there.
void arrive_where_due(Thread& thread) {
  while (!thread.copies.empty() && thread.copies.front().barrier != nullptr) {
    uint64_t* barrier = thread.copies.front().barrier;
    thread.copies.erase(thread.copies.begin());
    arrive(*thread.block, barrier);
  }
}

void perform(Thread& thread, size_t at) {
  const Copy& copy = thread.copies[at];
  std::memcpy(copy.shared, copy.data, 16);
  watch_write_of(static_cast<int>(&thread - threads), copy.shared, 16);  // an ordinary one, for wgmma
  thread.copies.erase(thread.copies.begin() + static_cast<std::ptrdiff_t>(at));
  arrive_where_due(thread);
}

// A random one; an arrival never is at the front of the list, so there is one.
void perform_one(Thread& thread) {
  const size_t start = fibers::random_below(static_cast<uint32_t>(thread.copies.size()));
  for (size_t i = 0; i < thread.copies.size(); ++i) {
    const size_t at = (start + i) % thread.copies.size();
    if (thread.copies[at].barrier != nullptr) continue;
    perform(thread, at);
    return;
  }
}

}  // namespace

void reset_copies() { busy.clear(); }

void perform_own_copies() {
  Thread& thread = self();
  if (fibers::order() != fibers::Order::random) return;
  while (!thread.copies.empty() && chance(4)) perform_one(thread);
}

bool perform_some_copy() {
  while (!busy.empty()) {
    const size_t at = fibers::random_below(static_cast<uint32_t>(busy.size()));
    Thread& thread = threads[busy[at]];
    if (!thread.copies.empty()) {
      perform_one(thread);
      return true;  // nobody need be awake yet: the scheduler asks again
    }
    thread.listed = false;
    busy[at] = busy.back();
    busy.pop_back();
  }
  return false;
}

void copies_at_exit(Thread& thread) {
  if (thread.copies.empty()) return;
  // What an arrival follows is waited for by whoever waits at the barrier.
  if (thread.copies.back().barrier == nullptr)
    fail("returns while %zu of its copies are under way", thread.copies.size());
}

void copy_async(void* shared, const void* global, bool valid) {
  check_aligned(shared, 16, "copy_async_16 to shared memory");
  check_shared(shared, 16, "copy_async_16");
  check_aligned(global, 16, "copy_async_16 from global memory");
  Thread& thread = self();
  Copy copy;
  copy.shared = static_cast<unsigned char*>(shared);
  copy.group = thread.copy_group;
  if (valid) std::memcpy(copy.data, global, 16);
  thread.copies.push_back(copy);
  if (!thread.listed) {
    thread.listed = true;
    busy.push_back(fibers::current);
  }
  if (fibers::order() == fibers::Order::in_order || (fibers::order() == fibers::Order::random && chance(4))) {
    perform(thread, thread.copies.size() - 1);
  }
}

void copy_async_wait(int pending) {
  Thread& thread = self();
  const int complete = thread.copy_group - pending;  // groups below this one
  while (true) {
    const auto first = std::find_if(thread.copies.begin(), thread.copies.end(), [complete](const Copy& copy) {
      return copy.barrier == nullptr && copy.group < complete;
    });
    if (first == thread.copies.end()) return;
    perform(thread, static_cast<size_t>(first - thread.copies.begin()));
  }
}

}  // namespace nybble::cuda::shim

namespace nybble::cuda {

using namespace shim;

void copy_async_commit() { ++self().copy_group; }

void copy_async_arrive(uint64_t* barrier) {
  barrier_at(barrier, "copy_async_arrive");
  Thread& thread = self();
  Copy arrival;
  arrival.barrier = barrier;
  arrival.group = thread.copy_group;
  thread.copies.push_back(arrival);
  arrive_where_due(thread);
}

void mbarrier_init(uint64_t* address, uint32_t count) {
  check_shared(address, 8, "mbarrier_init");
  check_aligned(address, 8, "mbarrier_init");
  if (count == 0 || count >= (1U << 20)) fail("mbarrier_init: a count of %u", count);
  auto& all = self().block->memory_barriers;
  MemoryBarrier barrier;
  barrier.address = address;
  barrier.count = barrier.pending = count;
  *address = signature_of(barrier);
  const auto old = std::find_if(all.begin(), all.end(), [&](const MemoryBarrier& b) { return b.address == address; });
  if (old == all.end()) {
    all.reserve(64);  // others hold references
    all.push_back(barrier);
  } else if (!old->waiting.empty()) {
    fail("mbarrier_init: threads wait at it");
  } else {
    *old = barrier;
  }
}

void mbarrier_arrive(uint64_t* address) {
  if (chance(4) && fibers::order() == fibers::Order::random) fibers::yield();
  arrive_at(barrier_at(address, "mbarrier_arrive"));
}

void mbarrier_wait(uint64_t* address, uint32_t parity) {
  check_hopper("mbarrier_wait");
  if (parity > 1) fail("mbarrier_wait: parity %u", parity);
  perform_own_copies();
  while (true) {
    MemoryBarrier& barrier = barrier_at(address, "mbarrier_wait");
    if ((barrier.phase & 1) != parity) return;  // the phase of this parity has ended
    barrier.waiting.push_back(fibers::current);
    fibers::block(parity == 0 ? "mbarrier_wait, parity 0" : "mbarrier_wait, parity 1");
  }
}

}  // namespace nybble::cuda
