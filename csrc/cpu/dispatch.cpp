#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>

#include "cpu/tables.h"

#if defined(_MSC_VER) && NYBBLE_X86
#include <immintrin.h>
#include <intrin.h>
#endif

namespace nybble::cpu {

namespace {

bool always() { return true; }

#if NYBBLE_X86
#if defined(_MSC_VER)
struct Features {
  bool avx2 = false, avx512 = false, avx512bf16 = false;

  Features() {
    int leaf1[4], leaf7[4], leaf71[4];
    __cpuid(leaf1, 1);
    const bool saves_state = (leaf1[2] & (1 << 27)) != 0;
    const unsigned long long state = saves_state ? _xgetbv(0) : 0;
    __cpuidex(leaf7, 7, 0);
    __cpuidex(leaf71, 7, 1);
    const bool fma_f16c = (leaf1[2] & (1 << 12)) != 0 && (leaf1[2] & (1 << 29)) != 0;
    avx2 = (state & 0x6) == 0x6 && fma_f16c && (leaf7[1] & (1 << 5)) != 0;
    const unsigned needed = (1U << 16) | (1U << 17) | (1U << 30) | (1U << 31);
    avx512 = avx2 && (state & 0xE6) == 0xE6 && (static_cast<unsigned>(leaf7[1]) & needed) == needed;
    avx512bf16 = avx512 && (leaf71[0] & (1 << 5)) != 0;
  }
};
const Features& features() {
  static const Features found;
  return found;
}
bool has_avx2() { return features().avx2; }
bool has_avx512() { return features().avx512; }
bool has_avx512bf16() { return features().avx512bf16; }
#else
// The builtins look at the operating system's saved state too.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#endif

struct Row {
  const KernelTable* table;
  bool (*supported)();
};

const Row kRows[] = {
#if NYBBLE_X86
    {&avx512bf16::kTable, has_avx512bf16},
    {&avx512::kTable, has_avx512},
    {&avx2::kTable, has_avx2},
#endif
    {&scalar::kTable, always},
};

const KernelTable* find(const std::string& name) {
  for (const Row& row : kRows) {
    if (name == row.table->isa && row.supported()) return row.table;
  }
  return nullptr;
}

const KernelTable* initial() {
  const std::string forced = forced_isa();
  if (!forced.empty()) return find(forced);
  for (const Row& row : kRows) {
    if (row.supported()) return row.table;
  }
  return nullptr;
}

std::atomic<const KernelTable*> current{nullptr};

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Row& row : kRows) {
    if (row.supported()) names.emplace_back(row.table->isa);
  }
  return names;
}

std::string forced_isa() {
  const char* name = std::getenv("NYBBLE_FORCE_ISA");
  return name != nullptr ? name : "";
}

const KernelTable* active() {
  const KernelTable* table = current.load(std::memory_order_acquire);
  if (table == nullptr) {
    table = initial();
    current.store(table, std::memory_order_release);
  }
  return table;
}

bool set_active(const std::string& name) {
  const KernelTable* table = find(name);
  if (table == nullptr) return false;
  current.store(table, std::memory_order_release);
  return true;
}

}  // namespace nybble::cpu
