// Runs the kernels of one library: threadgroups one after another in a random order, their threads as fibers.
#include <sys/mman.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif
#define SHIM_EXPORT __attribute__((visibility("default")))

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "shim/fibers.h"
#include "shim/metal/threads.h"

namespace shim {

namespace {

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}
size_t whole_pages(size_t bytes) { return (bytes + page_bytes() - 1) / page_bytes() * page_bytes(); }

// Memory between two pages that must not be touched; what is asked for ends as near to the second one as its alignment
// permits, and poison (NaN of every type) is around it.
class Guarded {
 public:
  Guarded() = default;
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    if (pages_ != nullptr) munmap(pages_, size_ + 2 * page_bytes());
  }

  // `like`: an address whose last four bits the memory's address gets.
  char* reserve(size_t bytes, const void* like = nullptr) {
    const size_t skew = reinterpret_cast<uintptr_t>(like) % 16;
    const size_t wanted = whole_pages(bytes + skew + 16);
    if (wanted > size_) {
      if (pages_ != nullptr) munmap(pages_, size_ + 2 * page_bytes());
      size_ = wanted;
      void* found = mmap(nullptr, size_ + 2 * page_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      pages_ = static_cast<char*>(found);
      mprotect(pages_, page_bytes(), PROT_NONE);
      mprotect(pages_ + page_bytes() + size_, page_bytes(), PROT_NONE);
    }
    bytes_ = bytes;
    start_ = end() - (bytes + skew + 15) / 16 * 16 + skew;
    poison_from_ = std::max(begin(), start_ - 256);
    std::memset(poison_from_, 0xFF, static_cast<size_t>(end() - poison_from_));
    return start_;
  }
  void poison() { std::memset(start_, 0xFF, bytes_); }
  // False: something beside the memory has been written.
  bool sound() const {
    const auto untouched = [](char c) { return c == '\xFF'; };
    return std::all_of(poison_from_, start_, untouched) && std::all_of(start_ + bytes_, end(), untouched);
  }
  char* start() const { return start_; }
  size_t bytes() const { return bytes_; }
  bool near(const void* address) const {
    return pages_ != nullptr && address >= pages_ && address < pages_ + size_ + 2 * page_bytes();
  }

 private:
  char* begin() const { return pages_ + page_bytes(); }
  char* end() const { return pages_ + page_bytes() + size_; }
  char* pages_ = nullptr;
  char* start_ = nullptr;
  char* poison_from_ = nullptr;
  size_t size_ = 0;
  size_t bytes_ = 0;
};

constexpr int kMostThreads = 1024;  // of a threadgroup, on every GPU of Apple's
constexpr int kMostArrays = 16;

struct Meeting {
  int members = 0;
  const char* what = nullptr;
  uint64_t noted = 0;
  std::vector<int> waiting;
};

struct Simdgroup {
  Meeting meeting;
  Slot slots[2][kLanes];
};

struct Thread {
  uint64_t exchanges = 0;
  uint64_t noted = 0;
  int arrays = 0;
};

struct Grid {
  const Kernel* kernel = nullptr;
  Arguments arguments;
  Triple threads, group_size, groups;
  Triple group;       // the threadgroup that runs
  Triple group_span;  // its threads; fewer at the far end of a grid that is no multiple
  Thread thread[kMostThreads];
  Simdgroup simdgroups[kMostThreads / kLanes];
  Meeting all;
  Guarded arrays[kMostArrays];
  size_t array_bytes[kMostArrays] = {};
  int array_count = 0;
  Guarded buffers[kMostBuffers];
  uint64_t groups_run = 0;
} grid;

std::vector<Kernel>& kernels() {
  static std::vector<Kernel> all;
  return all;
}

int thread_count() { return static_cast<int>(grid.group_span.x * grid.group_span.y * grid.group_span.z); }

void describe(int fiber, char* text, size_t size) {
  snprintf(text, size, "threadgroup (%u, %u, %u), simdgroup %d, lane %d", grid.group.x, grid.group.y, grid.group.z,
           fiber / kLanes, fiber % kLanes);
}

void explain(const void* address, char* text, size_t size) {
  const char* at = static_cast<const char*>(address);
  for (int i = 0; i < kMostBuffers; ++i) {
    if (!grid.buffers[i].near(address)) continue;
    snprintf(text, size, "%td bytes from the start of buffer %d of %zu bytes", at - grid.buffers[i].start(), i,
             grid.buffers[i].bytes());
  }
  for (int i = 0; i < grid.array_count; ++i) {
    if (!grid.arrays[i].near(address)) continue;
    snprintf(text, size, "%td bytes from the start of threadgroup array %d of %zu bytes", at - grid.arrays[i].start(),
             i, grid.array_bytes[i]);
  }
}

// Waits until `members` have come; the last one calls finish.
template <class Finish>
void meet(Meeting& meeting, int members, const char* what, Finish finish) {
  if (meeting.members == 0) {
    meeting.what = what;
  } else if (std::strcmp(meeting.what, what) != 0) {
    fibers::fail("does %s where others of its group do %s", what, meeting.what);
  }
  if (++meeting.members < members) {
    meeting.waiting.push_back(fibers::current);
    fibers::block(what);
    return;
  }
  meeting.members = 0;
  finish();
  for (const int fiber : meeting.waiting) fibers::wake(fiber);
  meeting.waiting.clear();
}

void body(int) { grid.kernel->call(grid.kernel->function, grid.arguments); }

bool run_group() {
  ++grid.groups_run;
  fibers::Hooks hooks;
  hooks.body = body;
  hooks.name = describe;
  hooks.explain = explain;
  grid.all.members = 0;
  grid.all.waiting.clear();
  for (Simdgroup& simdgroup : grid.simdgroups) {
    simdgroup.meeting.members = 0;
    simdgroup.meeting.waiting.clear();
  }
  std::fill_n(grid.thread, thread_count(), Thread{});
  for (int i = 0; i < grid.array_count; ++i) grid.arrays[i].poison();
  return fibers::run(thread_count(), hooks);
}

uint32_t divide_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

bool run_grid() {
  const uint32_t total = grid.groups.x * grid.groups.y * grid.groups.z;
  std::vector<uint32_t> order(total);
  for (uint32_t i = 0; i < total; ++i) order[i] = i;
  if (fibers::order() == fibers::Order::reverse) std::reverse(order.begin(), order.end());
  if (fibers::order() == fibers::Order::random) {
    for (uint32_t i = total; i > 1; --i) std::swap(order[i - 1], order[fibers::random_below(i)]);
  }
  for (const uint32_t number : order) {
    grid.group = {number % grid.groups.x, number / grid.groups.x % grid.groups.y,
                  number / (grid.groups.x * grid.groups.y)};
    const auto span = [](uint32_t threads, uint32_t size, uint32_t group) {
      return std::min(size, threads - group * size);
    };
    grid.group_span = {span(grid.threads.x, grid.group_size.x, grid.group.x),
                       span(grid.threads.y, grid.group_size.y, grid.group.y),
                       span(grid.threads.z, grid.group_size.z, grid.group.z)};
    if (!run_group()) return false;
  }
  return true;
}

// Numbers below 2^-126 as 0, operands and results: what Apple's GPUs do with fp32.
class Flush {
 public:
  explicit Flush(bool flush) : before_(get()) {
    if (flush) set(before_ | kFlush);
  }
  Flush(const Flush&) = delete;
  Flush& operator=(const Flush&) = delete;
  ~Flush() { set(before_); }

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kFlush = 0x8040;  // FTZ and DAZ
  static uint64_t get() { return _mm_getcsr(); }
  static void set(uint64_t value) { _mm_setcsr(static_cast<unsigned>(value)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = uint64_t{1} << 24;  // FZ
  static uint64_t get() {
    uint64_t value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void set(uint64_t value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
#else
  static constexpr uint64_t kFlush = 0;
  static uint64_t get() { return 0; }
  static void set(uint64_t) {}
#endif
  uint64_t before_;
};

std::string failure;

const char* failed(std::string message) {
  failure = grid.kernel->name + (": " + std::move(message));
  return failure.c_str();
}

}  // namespace

// ---- what kernels call ----------------------------------------------------------------------------------------------

void fail(const char* message) { fibers::fail("%s", message); }
int lane() { return fibers::current % kLanes; }
int lanes_of_simdgroup() { return std::min(kLanes, thread_count() - fibers::current / kLanes * kLanes); }

void note(uint64_t what) {
  uint64_t& noted = grid.thread[fibers::current].noted;
  noted = (noted ^ what) * 0x9E3779B97F4A7C15U + 1;
}

Slot* exchange(const char* what, const Slot& mine, void (*finish)(Slot*)) {
  Thread& thread = grid.thread[fibers::current];
  Simdgroup& simdgroup = grid.simdgroups[fibers::current / kLanes];
  const int members = lanes_of_simdgroup();
  if (finish != nullptr && members != kLanes) fibers::fail("%s in a simdgroup of %d lanes", what, members);
  Slot* slots = simdgroup.slots[thread.exchanges++ % 2];
  slots[lane()] = mine;
  if (simdgroup.meeting.members == 0) {
    simdgroup.meeting.noted = thread.noted;
  } else if (simdgroup.meeting.noted != thread.noted) {
    fibers::fail("before %s: has loaded or stored other matrices than the lanes beside it", what);
  }
  meet(simdgroup.meeting, members, what, [&] {
    if (finish != nullptr) finish(slots);
  });
  return slots;
}

void barrier(const char* what) {
  meet(grid.all, thread_count(), what, [] {});
}

Place place_of(const void* address) {
  const char* at = static_cast<const char*>(address);
  const auto within = [at](const Guarded& memory) {
    return at >= memory.start() && at < memory.start() + memory.bytes();
  };
  for (int i = 0; i < grid.array_count; ++i) {
    if (within(grid.arrays[i])) {
      return {-1, i, static_cast<size_t>(at - grid.arrays[i].start()), grid.array_bytes[i]};
    }
  }
  for (int i = 0; i < kMostBuffers; ++i) {
    if (within(grid.buffers[i])) {
      return {i, -1, static_cast<size_t>(at - grid.buffers[i].start()), grid.buffers[i].bytes()};
    }
  }
  return {};
}
uint64_t groups_run() { return grid.groups_run; }

void* threadgroup_array(size_t bytes) {
  const int number = grid.thread[fibers::current].arrays++;
  if (number >= kMostArrays) fibers::fail("more than %d threadgroup arrays", kMostArrays);
  if (number == grid.array_count) {
    size_t total = bytes;
    for (int i = 0; i < number; ++i) total += grid.array_bytes[i];
    if (total > kThreadgroupBytes)
      fibers::fail("%zu bytes of threadgroup memory; a threadgroup has %zu", total, kThreadgroupBytes);
    grid.array_bytes[number] = bytes;
    grid.arrays[number].reserve(bytes);
    grid.arrays[number].poison();
    ++grid.array_count;
  }
  if (grid.array_bytes[number] != bytes) fibers::fail("threadgroup array %d differs between threads", number);
  return grid.arrays[number].start();
}

Triple builtin(const char* attribute) {
  const auto is = [&](const char* name) { return std::strcmp(attribute, name) == 0; };
  const uint32_t index = static_cast<uint32_t>(fibers::current);
  const Triple& span = grid.group_span;
  const Triple position{index % span.x, index / span.x % span.y, index / (span.x * span.y)};
  if (is("thread_position_in_grid")) {
    return {grid.group.x * grid.group_size.x + position.x, grid.group.y * grid.group_size.y + position.y,
            grid.group.z * grid.group_size.z + position.z};
  }
  if (is("thread_position_in_threadgroup")) return position;
  if (is("threadgroup_position_in_grid")) return grid.group;
  if (is("threads_per_threadgroup")) return span;
  if (is("threads_per_grid")) return grid.threads;
  if (is("threadgroups_per_grid")) return grid.groups;
  if (is("thread_index_in_threadgroup")) return {index};
  if (is("thread_index_in_simdgroup")) return {index % kLanes};
  if (is("simdgroup_index_in_threadgroup")) return {index / kLanes};
  if (is("simdgroups_per_threadgroup")) return {divide_up(static_cast<uint32_t>(thread_count()), kLanes)};
  if (is("threads_per_simdgroup")) return {kLanes};
  fibers::fail("the shim does not know [[%s]]", attribute);
}

void add(Kernel kernel) {
  kernel.index = kernels().size();
  kernels().push_back(kernel);
}

}  // namespace shim

// ---- what the compiler's checks of kernels report (-fsanitize)
// -------------------------------------------------------

extern "C" {

struct SanitizerPlace {  // where every report's data begins
  const char* file;
  uint32_t line;
  uint32_t column;
};

void __ubsan_handle_type_mismatch_v1(const SanitizerPlace* place, const void* address) {
  fibers::fail("line %u: a misaligned access at %p", place->line, address);
}
void __ubsan_handle_out_of_bounds(const SanitizerPlace* place, uint64_t index) {
  fibers::fail("line %u: index %lld is out of an array's bounds", place->line, static_cast<long long>(index));
}
void __ubsan_handle_shift_out_of_bounds(const SanitizerPlace* place, uint64_t, uint64_t by) {
  fibers::fail("line %u: a shift by %lld", place->line, static_cast<long long>(by));
}
void __ubsan_handle_divrem_overflow(const SanitizerPlace* place, uint64_t, uint64_t) {
  fibers::fail("line %u: a division by zero", place->line);
}
}

// ---- what Python calls ----------------------------------------------------------------------------------------------

extern "C" {

SHIM_EXPORT int shim_kernel_count() { return static_cast<int>(shim::kernels().size()); }
SHIM_EXPORT const char* shim_kernel_name(int kernel) { return shim::kernels()[static_cast<size_t>(kernel)].name; }

struct ShimArgument {
  const void* data;
  uint64_t bytes;
  int is_tensor;
};

// Null, or what went wrong. Tensors are copied to guarded memory, and back where the kernel may write.
SHIM_EXPORT const char* shim_launch(int number, const ShimArgument* given, int count, const uint32_t* threads,
                                    const uint32_t* group_size, uint64_t seed, int order, int flush) {
  using namespace shim;
  const Kernel& kernel = kernels()[static_cast<size_t>(number)];
  grid.kernel = &kernel;
  grid.arguments.parameters = kernel.parameters;
  fibers::seed(seed);
  fibers::set_order(static_cast<fibers::Order>(order));
  grid.threads = {threads[0], threads[1], threads[2]};
  grid.group_size = {group_size[0], group_size[1], group_size[2]};
  const Triple& size = grid.group_size;
  if (size.x == 0 || size.y == 0 || size.z == 0) return failed("a threadgroup without threads");
  if (uint64_t{size.x} * size.y * size.z > kMostThreads) return failed("a threadgroup of more than 1024 threads");
  if (threads[0] == 0 || threads[1] == 0 || threads[2] == 0) return failed("a grid without threads");
  grid.groups = {divide_up(threads[0], size.x), divide_up(threads[1], size.y), divide_up(threads[2], size.z)};
  grid.array_count = 0;

  std::vector<const Buffer*> types(kMostBuffers, nullptr);
  int buffers = 0;
  for (int i = 0; i < kernel.count; ++i) {
    const Parameter& parameter = kernel.parameters[i];
    if (std::strcmp(parameter.attribute, "buffer") != 0) continue;
    types[static_cast<size_t>(parameter.index)] = &kernel.types[i];
    ++buffers;
  }
  if (buffers != count) {
    return failed("takes " + std::to_string(buffers) + " buffers, given " + std::to_string(count));
  }
  for (int i = 0; i < count; ++i) {
    const Buffer* type = types[static_cast<size_t>(i)];
    const std::string which = "buffer " + std::to_string(i);
    if (type == nullptr) return failed(which + " has no parameter");
    if (!type->is_pointer && type->bytes != given[i].bytes) {
      return failed(which + " is " + std::to_string(type->bytes) + " bytes, given " + std::to_string(given[i].bytes));
    }
    char* to = grid.buffers[i].reserve(given[i].bytes, given[i].is_tensor != 0 ? given[i].data : nullptr);
    std::memcpy(to, given[i].data, given[i].bytes);
    grid.arguments.buffers[i] = to;
  }
  {
    const Flush flushed(flush != 0);
    if (!run_grid()) return failed(fibers::error());
  }
  for (int i = 0; i < count; ++i) {
    const std::string which = "buffer " + std::to_string(i);
    const Guarded& buffer = grid.buffers[i];
    if (!buffer.sound()) return failed("has written beside " + which);
    const bool same = std::memcmp(buffer.start(), given[i].data, given[i].bytes) == 0;
    if (types[static_cast<size_t>(i)]->is_const && !same) return failed("has written to " + which + ", which is const");
    if (!same) std::memcpy(const_cast<void*>(given[i].data), buffer.start(), given[i].bytes);
  }
  return nullptr;
}
}
