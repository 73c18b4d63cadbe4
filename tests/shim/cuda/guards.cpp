// Global memory that ends (or begins) where a page begins that must not be touched; and what the compiler's checks of
// kernels report: misaligned addresses, indices beyond an array, shifts by too much.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <map>
#include <string>

#include "shim/cuda/control.h"

namespace nybble::cuda::shim {

namespace {

struct Guarded {
  unsigned char* memory;  // with the pages around it
  size_t mapped;
  size_t bytes;
  std::string name;
  bool read_only = false;
};
std::map<unsigned char*, Guarded> all;  // by where the data begin

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

void* new_guarded(size_t bytes, size_t alignment, bool at_end, const char* name) {
  const size_t page = page_bytes();
  const size_t inner = (bytes + page - 1) / page * page;
  void* mapping = mmap(nullptr, inner + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  auto* memory = static_cast<unsigned char*>(mapping);
  mprotect(memory, page, PROT_NONE);
  mprotect(memory + page + inner, page, PROT_NONE);
  unsigned char* data = memory + page;
  if (at_end) data += (inner - bytes) / alignment * alignment;
  if (bytes == 0 && at_end) data = memory + page + inner;
  all[data] = {memory, inner + 2 * page, bytes, name};
  return data;
}

bool protect_guarded(void* data, bool read_only) {
  const auto found = all.find(static_cast<unsigned char*>(data));
  if (found == all.end()) return false;
  Guarded& guarded = found->second;
  guarded.read_only = read_only;
  const size_t page = page_bytes();
  return mprotect(guarded.memory + page, guarded.mapped - 2 * page, read_only ? PROT_READ : PROT_READ | PROT_WRITE) ==
         0;
}

bool delete_guarded(void* data) {
  const auto found = all.find(static_cast<unsigned char*>(data));
  if (found == all.end()) return false;
  munmap(found->second.memory, found->second.mapped);
  all.erase(found);
  return true;
}

void explain_global(const void* address, char* text, size_t size) {
  const auto* at = static_cast<const unsigned char*>(address);
  for (const auto& [data, guarded] : all) {
    if (at < guarded.memory || at >= guarded.memory + guarded.mapped) continue;
    const char* name = guarded.name.c_str();
    if (at < data) {
      snprintf(text, size, "%zu bytes before %s", static_cast<size_t>(data - at), name);
    } else if (at >= data + guarded.bytes) {
      snprintf(text, size, "%zu bytes past the end of %s", static_cast<size_t>(at - data) - guarded.bytes, name);
    } else {
      snprintf(text, size, "byte %zu of %s%s", static_cast<size_t>(at - data), name,
               guarded.read_only ? ", which is only to be read" : "");
    }
    return;
  }
  snprintf(text, size, "no memory of a block or a guarded tensor");
}

}  // namespace nybble::cuda::shim

// ---- the compiler's checks (-fsanitize=...): it calls these, and no library that has them is linked
// -------------------

namespace {

struct Location {
  const char* file;
  uint32_t line;
  uint32_t column;
};
struct Type {
  uint16_t kind;
  uint16_t info;
  char name[1];
};

[[noreturn]] void report(const Location& location, const char* what) {
  if (fibers::current >= 0) fibers::fail("%s:%u: %s", location.file, location.line, what);
  fprintf(stderr, "%s:%u: %s\n", location.file, location.line, what);
  __builtin_trap();
}

}  // namespace

extern "C" {

struct MismatchData {
  Location location;
  const Type* type;
  unsigned char log_alignment;
  unsigned char kind;
};
void __ubsan_handle_type_mismatch_v1(MismatchData* data, uintptr_t pointer) {
  char text[256];
  snprintf(text, sizeof text, "address 0x%zx is not aligned to %u bytes, as %s must be", static_cast<size_t>(pointer),
           1U << data->log_alignment, data->type->name);
  report(data->location, text);
}
struct BoundsData {
  Location location;
  const Type* array;
  const Type* index;
};
void __ubsan_handle_out_of_bounds(BoundsData* data, uintptr_t index) {
  char text[256];
  snprintf(text, sizeof text, "index %lld of %s", static_cast<long long>(index), data->array->name);
  report(data->location, text);
}
struct ShiftData {
  Location location;
  const Type* left;
  const Type* right;
};
void __ubsan_handle_shift_out_of_bounds(ShiftData* data, uintptr_t, uintptr_t right) {
  char text[256];
  snprintf(text, sizeof text, "%s is shifted by %lld", data->left->name, static_cast<long long>(right));
  report(data->location, text);
}
struct OverflowData {
  Location location;
  const Type* type;
};
void __ubsan_handle_divrem_overflow(OverflowData* data, uintptr_t, uintptr_t) {
  report(data->location, "division by zero");
}

}  // extern "C"
