// Which ordinary writes to shared memory wgmma may not see yet. It reads by another path ("proxy") than threads write:
// a fence.proxy.async must come between, of the thread that wrote, or of the threads that multiply, once they know that
// it was written. Files with wgmma are compiled with hooks at every write (-fsanitize=thread, without its library).
#pragma once
#include <cstddef>
#include <cstdint>

namespace nybble::cuda::shim {

constexpr size_t kGranule = 4;  // bytes that one writer and one time are kept of

struct Written {
  uint64_t time = 0;  // 0: not written
  int fiber = 0;
};

uint64_t now();  // of writes and fences, ascending
void watch_clear(int block);
void watch_write_of(int fiber, const void* address, size_t bytes);
// The latest write to these bytes of shared memory, `offset` from the beginning of the block's.
const Written& written_at(int block, size_t offset);

}  // namespace nybble::cuda::shim
