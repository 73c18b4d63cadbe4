// The four warps that multiply together with wgmma, and what they have under way.
#pragma once
#include <list>
#include <string>

#include "shim/cuda/block.h"

namespace nybble::cuda::shim {

// Accumulators of the 128 threads while multiplications use them: the registers hold a NaN, the values are here.
struct Accumulators {
  int count = 0;                      // of a thread
  float* registers[kWarpgroup] = {};  // null: has none in use
  int last_use[kWarpgroup] = {};      // the thread's last multiplication with them
  std::vector<float> values;          // [64, 2 count]
};

struct Multiplication {
  uint64_t a = 0, b = 0;
  bool accumulate = false, a_major = false, b_major = false;
  bool bf16 = false;
  int arrived = 0;                    // threads
  uint64_t issued = 0;                // when the first of them came
  uint64_t proxy_fence = UINT64_MAX;  // the earliest of the threads' latest fences
  bool performed = false;
  Accumulators* accumulators = nullptr;
};

struct Warpgroup {
  std::vector<Multiplication> multiplications;  // all since the block began, in order
  int performed = 0;
  std::list<Accumulators> accumulators;
  std::vector<int> waiting;  // fibers
  int registers = 0;         // of a thread; 0: as launched
  int registers_set = 0;     // how many threads have set the latest
};

// Of what setmaxnreg has left to the block's warpgroups; empty if there is none.
std::string registers_problem(const Block& block);

}  // namespace nybble::cuda::shim
