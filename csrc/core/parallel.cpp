#include "core/parallel.h"

#include <cstdlib>
#include <mutex>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef _WIN32
#include <malloc.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace nybble {

void parallel_for(int threads, int64_t count, Task task, void* context) {
#ifdef _OPENMP
  if (threads > 1 && count > 1) {
    const int team = threads < count ? threads : static_cast<int>(count);
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
    for (int64_t index = 0; index < count; ++index) task(context, index);
    return;
  }
#else
  (void)threads;
#endif
  for (int64_t index = 0; index < count; ++index) task(context, index);
}

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kKeep = size_t{64} << 20;

void* allocate(size_t bytes) {
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
#ifdef _WIN32
  return _aligned_malloc(rounded, kAlignment);
#else
  return std::aligned_alloc(kAlignment, rounded);
#endif
}

void release(void* pointer) {
#ifdef _WIN32
  _aligned_free(pointer);
#else
  std::free(pointer);
#endif
}

struct Arena {
  void* memory[static_cast<int>(Slot::count)] = {};
  size_t size[static_cast<int>(Slot::count)] = {};

  ~Arena() {
    for (void* pointer : memory) release(pointer);
  }

  void drop(int slot) {
    release(memory[slot]);
    memory[slot] = nullptr;
    size[slot] = 0;
  }
};

thread_local Arena arena;
std::mutex failure_mutex;

}  // namespace

void Failure::report_block(int64_t block) {
  const std::lock_guard<std::mutex> guard(failure_mutex);
  if (block_ < 0 || block < block_) block_ = block;
}

void Failure::report_memory(int64_t bytes) {
  const std::lock_guard<std::mutex> guard(failure_mutex);
  bytes_ = bytes;
}

Status Failure::status() const {
  if (bytes_ > 0) return out_of_memory(bytes_);
  return block_ >= 0 ? non_finite(block_) : success();
}

void* scratch(Slot slot, size_t bytes) {
  const int index = static_cast<int>(slot);
  if (bytes == 0) bytes = kAlignment;
  if (arena.size[index] < bytes) {
    arena.drop(index);
    arena.memory[index] = allocate(bytes);
    if (arena.memory[index] == nullptr) return nullptr;
    arena.size[index] = bytes;
  }
#ifdef __SANITIZE_ADDRESS__
  // What an earlier call left behind this one's bytes is as much outside as any other memory.
  ASAN_UNPOISON_MEMORY_REGION(arena.memory[index], bytes);
  ASAN_POISON_MEMORY_REGION(static_cast<char*>(arena.memory[index]) + bytes, arena.size[index] - bytes);
#endif
  return arena.memory[index];
}

void trim_scratch() {
  for (int slot = 0; slot < static_cast<int>(Slot::count); ++slot) {
    if (arena.size[slot] > kKeep) arena.drop(slot);
  }
}

}  // namespace nybble
