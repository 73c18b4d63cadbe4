// What the shim knows of the blocks that run: threads, warps, warpgroups, barriers, operations under way.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "shim/cuda/device.h"
#include "shim/fibers.h"

namespace nybble::cuda::shim {

constexpr int kMostThreads = 1024;
constexpr int kWarpgroup = 128;
constexpr uint32_t kSystemShared = 1024;  // bytes of the shared window before a block's own
constexpr int kMostResident = 6;          // blocks that run at once

struct Block;

// One copy of 16 bytes under way, or (`barrier` set) an arrival that waits for the copies before it.
struct Copy {
  unsigned char* shared = nullptr;
  uint64_t* barrier = nullptr;
  unsigned char data[16] = {};
  int group = 0;
};

struct Thread {
  Block* block = nullptr;
  uint3 index = {};
  int number = 0;  // within the block
  int lane = 0;
  int warp = 0;
  uint32_t atomics = 0;
  bool published = false;  // has called __threadfence
  // cp.async
  std::vector<Copy> copies;  // in the order of their issue
  int copy_group = 0;        // groups committed so far
  bool listed = false;       // in the list of threads with operations under way
  // wgmma
  uint64_t proxy_fence = 0;          // when it fenced last
  bool fenced = false;               // since other code may have touched its accumulators
  int multiplications = 0;           // issued
  std::vector<int> multiply_groups;  // for each: multiplications issued when it was committed
};

// The lanes of a warp come together: each brings an operand, the last one does the work for all.
struct Collective {
  const char* operation = nullptr;
  uint32_t mask = 0;
  uint32_t arrived = 0;
  int64_t detail = 0;  // what all must agree on
  void* operands[kWarp] = {};
};

struct Warp {
  Collective whole;
  std::vector<Collective> parts;  // of masks that are not the whole warp
  uint32_t exited = 0;
};

struct Barrier {
  int threads = 0;  // that it is for; 0: nobody has come
  int arrived = 0;
  std::vector<int> waiting;  // fibers
};

struct MemoryBarrier {
  uint64_t* address = nullptr;
  uint32_t count = 0;
  uint32_t pending = 0;
  uint32_t phase = 0;
  std::vector<int> waiting;
};

struct Warpgroup;

struct Block {
  uint3 index = {};
  int number = 0;       // of those that run at once
  int first_fiber = 0;  // its threads' are this and the next ones
  unsigned char* shared = nullptr;
  std::vector<Warp> warps;
  std::vector<std::shared_ptr<Warpgroup>> warpgroups;
  Barrier barriers[16];
  std::vector<MemoryBarrier> memory_barriers;
};

struct Grid {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  const char* kernel = "";
};

extern Thread threads[fibers::kMostFibers];  // by fiber
extern Grid grid;

inline Thread& self() { return threads[fibers::current]; }

// ---- warp.cpp
Collective& join(const char* operation, uint32_t mask, int64_t detail, void* operand);
void leave(Collective& all);  // by the last one: the others go on
void thread_exits();

template <class F>
void collective(const char* operation, uint32_t mask, int64_t detail, void* operand, F perform) {
  Collective& all = join(operation, mask, detail, operand);
  if (all.arrived != mask) {
    fibers::block(operation);
    return;
  }
  perform(all.operands);
  leave(all);
}

// ---- grid.cpp
void check_shared(const void* address, size_t bytes, const char* operation);
void check_hopper(const char* operation);
// 1 in `one_in`, in the random schedule; never in order; always in the reverse one.
bool chance(uint32_t one_in);

// ---- copies.cpp
bool perform_some_copy();   // of any thread; false: none is under way
void perform_own_copies();  // perhaps, at a point where others may run
void reset_copies();
void copies_at_exit(Thread& thread);

// ---- wgmma.cpp
void multiplications_at_exit(const Thread& thread);

}  // namespace nybble::cuda::shim
