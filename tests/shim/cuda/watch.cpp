#include "shim/cuda/watch.h"

#include <vector>

#include "shim/cuda/block.h"

namespace nybble::cuda::shim {

namespace {

uint64_t clock_time = 0;
std::vector<Written> written[kMostResident];

}  // namespace

uint64_t now() { return ++clock_time; }

void watch_clear(int block) { written[block].assign(grid.shared_bytes / kGranule + 1, Written()); }

void watch_write_of(int fiber, const void* address, size_t bytes) {
  const Block& block = *threads[fiber].block;
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(address) - block.shared);
  if (offset >= grid.shared_bytes) return;  // also what lies before: the difference is then very large
  const uint64_t time = now();
  std::vector<Written>& all = written[block.number];
  for (size_t at = offset / kGranule; at <= (offset + bytes - 1) / kGranule && at < all.size(); ++at) {
    all[at] = {time, fiber};
  }
}

const Written& written_at(int block, size_t offset) { return written[block][offset / kGranule]; }

}  // namespace nybble::cuda::shim

// What code compiled with -fsanitize=thread calls.
namespace {

void write(const void* address, size_t bytes) {
  if (fibers::current >= 0) nybble::cuda::shim::watch_write_of(fibers::current, address, bytes);
}

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

#define NYBBLE_WATCH(bytes)                                          \
  void __tsan_read##bytes(void*) {}                                  \
  void __tsan_unaligned_read##bytes(void*) {}                        \
  void __tsan_write##bytes(void* address) { write(address, bytes); } \
  void __tsan_unaligned_write##bytes(void* address) { write(address, bytes); }
NYBBLE_WATCH(1)
NYBBLE_WATCH(2)
NYBBLE_WATCH(4)
NYBBLE_WATCH(8)
NYBBLE_WATCH(16)
void __tsan_read_range(void*, uintptr_t) {}
void __tsan_write_range(void* address, uintptr_t bytes) { write(address, bytes); }

}  // extern "C"
