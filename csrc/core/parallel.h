// Threads and scratch memory. The one file that touches OpenMP is parallel.cpp, outside every ISA's target region.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/status.h"

namespace nybble {

using Task = void (*)(void* context, int64_t index);

// Runs task(context, 0 .. count - 1), each index once, on at most `threads` threads. Tasks are handed out dynamically,
// so a kernel's bits must not depend on which thread runs an index: every kernel writes disjoint outputs per index.
void parallel_for(int threads, int64_t count, Task task, void* context);

// What went wrong in any of the tasks of one call: the smallest block index wins, so the report does not depend on the
// schedule. Methods are in parallel.cpp, so that no ISA's target region instantiates an atomic.
class Failure {
 public:
  void report_block(int64_t block);
  void report_memory(int64_t bytes);
  Status status() const;

 private:
  int64_t block_ = -1;
  int64_t bytes_ = 0;
};

// Grow-only scratch of the calling thread, 64-byte aligned, reused from call to call because a fresh large buffer costs
// its page faults (dequantizing 4096 x 11008: 35 ms into new memory, 3.7 ms into a reused buffer, measured on Zen 4).
// Null when memory cannot be had. Slots are independent; a slot's content is undefined after each call.
enum class Slot : int { panel, rows, accumulators, sums, inputs, side, count };
void* scratch(Slot slot, size_t bytes);

// Gives back the slots of the calling thread that have grown over 64 MiB.
void trim_scratch();

}  // namespace nybble
