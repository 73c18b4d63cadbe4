#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <utility>

#include "cpu/tables.h"

#if NYBBLE_X86
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#if NYBBLE_ARM64_EXTENSIONS
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
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
    const bool vnni = (leaf7[2] & (1 << 11)) != 0;
    avx512bf16 = avx512 && vnni && (leaf71[0] & (1 << 5)) != 0;
  }
};
const Features& features() {
  static const Features found;
  return found;
}
bool has_avx2() { return features().avx2; }
bool has_avx512() { return features().avx512; }
bool has_avx512bf16() { return features().avx512bf16; }
bool vendor(unsigned* eax, unsigned* ebx, unsigned* ecx, unsigned* edx) {
  int leaf[4];
  __cpuid(leaf, 0);
  *eax = leaf[0], *ebx = leaf[1], *ecx = leaf[2], *edx = leaf[3];
  return true;
}
#else
// The builtins look at the operating system's saved state too.
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}
bool vendor(unsigned* eax, unsigned* ebx, unsigned* ecx, unsigned* edx) {
  return __get_cpuid(0, eax, ebx, ecx, edx) != 0;
}
#endif
#endif

#if NYBBLE_X86 && defined(__linux__)
// Tile registers are large, so Linux hands them out on request, once for the whole process.
bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!has_avx512bf16() || __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kTiles = 1U << 22 | 1U << 24 | 1U << 25;  // AMX-BF16, AMX-TILE, AMX-INT8
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return (edx & kTiles) == kTiles && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#elif NYBBLE_X86
bool has_amx() { return false; }
#endif

#if NYBBLE_X86
bool is_intel() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return vendor(&eax, &ebx, &ecx, &edx) && ebx == 0x756E6547U;  // "Genu"
}
#endif

#if NYBBLE_ARM64_EXTENSIONS
// Older system headers do not name all of the bits.
#if defined(__linux__)
bool has_neondot() { return (getauxval(AT_HWCAP) & 1UL << 20) != 0; }  // HWCAP_ASIMDDP
bool has_neonbf16() {
  constexpr unsigned long kNeeded = 1UL << 13 | 1UL << 14;  // HWCAP2_I8MM, HWCAP2_BF16
  return (getauxval(AT_HWCAP2) & kNeeded) == kNeeded;
}
#elif defined(__APPLE__)
bool has(const char* feature) {
  int present = 0;
  size_t size = sizeof present;
  return sysctlbyname(feature, &present, &size, nullptr, 0) == 0 && present != 0;
}
bool has_neondot() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_neonbf16() { return has("hw.optional.arm.FEAT_I8MM") && has("hw.optional.arm.FEAT_BF16"); }
#else
bool has_neondot() { return false; }
bool has_neonbf16() { return false; }
#endif
#endif

struct Row {
  const KernelTable* table;
  bool (*supported)();
};

const Row kRows[] = {
#if NYBBLE_X86
    {&amx::kTable, has_amx},           {&avx512bf16::kTable, has_avx512bf16},
    {&avx512::kTable, has_avx512},     {&avx2::kTable, has_avx2},
#endif
#if NYBBLE_ARM64_EXTENSIONS
    {&neonbf16::kTable, has_neonbf16}, {&neondot::kTable, has_neondot},
#endif
#if NYBBLE_ARM64
    {&neon::kTable, always},
#endif
    {&scalar::kTable, always},
};

// What this machine can run, best first.
std::vector<const KernelTable*> ordered() {
  std::vector<const KernelTable*> tables;
  for (const Row& row : kRows) {
    if (row.supported()) tables.push_back(row.table);
  }
#if NYBBLE_X86
  // On Intel vdpbf16ps runs at half the rate of fp32 multiply-adds (105 against 215 GFLOP/s a core, Sapphire Rapids
  // class, measured), on AMD at twice (461 against 233, two Zen 4 cores).
  for (size_t i = 0; i + 1 < tables.size(); ++i) {
    if (tables[i] == &avx512bf16::kTable && is_intel()) {
      std::swap(tables[i], tables[i + 1]);
      break;
    }
  }
#endif
  return tables;
}

const KernelTable* find(const std::string& name) {
  for (const KernelTable* table : ordered()) {
    if (name == table->isa) return table;
  }
  return nullptr;
}

const KernelTable* initial() {
  const std::string forced = forced_isa();
  return forced.empty() ? ordered().front() : find(forced);
}

std::atomic<const KernelTable*> current{nullptr};

}  // namespace

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : ordered()) names.emplace_back(table->isa);
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
