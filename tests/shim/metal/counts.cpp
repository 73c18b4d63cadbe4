// Counts what kernels read, write and compute. They are compiled with -fsanitize=thread, which makes the compiler call
// one of the functions below at every access to memory; ThreadSanitizer itself is not linked.
#include <cstdint>
#include <cstring>
#include <vector>

#include "shim/metal/threads.h"

#define SHIM_EXPORT __attribute__((visibility("default")))

namespace shim {

enum class Counter { scalar, matrix };

namespace {

constexpr size_t kTableBytes = 64;  // the codebook of 16 numbers, whose reads are decoded weights

// Of one buffer: bytes that lanes ask for, different bytes of a threadgroup, different bytes of all.
struct Traffic {
  uint64_t asked = 0, by_group = 0, once = 0;
  std::vector<uint64_t> seen;  // by byte: the last threadgroup that touched it

  void add(const Place& place, size_t bytes) {
    if (seen.size() != place.extent) seen.assign(place.extent, 0);
    asked += bytes;
    for (size_t i = place.offset; i < place.offset + bytes && i < seen.size(); ++i) {
      if (seen[i] == 0) ++once;
      if (seen[i] != groups_run()) ++by_group;
      seen[i] = groups_run();
    }
  }
};

Traffic traffic[2][kMostBuffers];  // reads, writes
uint64_t shared_bytes[2], lookups, operations[2];

void access(const void* address, size_t bytes, int write) {
  const Place place = place_of(address);
  if (place.buffer >= 0) traffic[write][place.buffer].add(place, bytes);
  if (place.array < 0) return;
  shared_bytes[write] += bytes;
  if (write == 0 && place.extent == kTableBytes) ++lookups;
}

}  // namespace

void count(Counter counter, uint64_t by) { operations[static_cast<int>(counter)] += by; }

}  // namespace shim

extern "C" {

#define SHIM_ACCESS(bytes)                                                              \
  void __tsan_read##bytes(void* address) { shim::access(address, bytes, 0); }           \
  void __tsan_write##bytes(void* address) { shim::access(address, bytes, 1); }          \
  void __tsan_unaligned_read##bytes(void* address) { shim::access(address, bytes, 0); } \
  void __tsan_unaligned_write##bytes(void* address) { shim::access(address, bytes, 1); }
SHIM_ACCESS(1)
SHIM_ACCESS(2)
SHIM_ACCESS(4)
SHIM_ACCESS(8)
SHIM_ACCESS(16)
void __tsan_read_range(void* address, unsigned long bytes) { shim::access(address, bytes, 0); }
void __tsan_write_range(void* address, unsigned long bytes) { shim::access(address, bytes, 1); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

SHIM_EXPORT void shim_counts_reset() {
  for (auto& direction : shim::traffic) {
    for (shim::Traffic& buffer : direction) buffer = {};
  }
  std::memset(shim::shared_bytes, 0, sizeof shim::shared_bytes);
  std::memset(shim::operations, 0, sizeof shim::operations);
  shim::lookups = 0;
}

// asked, by_group and once of a buffer's reads, then of its writes.
SHIM_EXPORT void shim_counts_of(int buffer, uint64_t* out) {
  for (const auto& direction : shim::traffic) {
    const shim::Traffic& found = direction[buffer];
    for (const uint64_t value : {found.asked, found.by_group, found.once}) *out++ = value;
  }
}

// Threadgroup memory read and written, reads of the codebook there, scalar operations, multiply-adds of matrices.
SHIM_EXPORT void shim_counts_all(uint64_t* out) {
  for (const uint64_t value :
       {shim::shared_bytes[0], shim::shared_bytes[1], shim::lookups, shim::operations[0], shim::operations[1]}) {
    *out++ = value;
  }
}
}
