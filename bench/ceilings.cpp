// What the machine can do at most: loops that only read memory and loops that only multiply and add. Compiled by
// ceilings.py while a bench runs, never part of the package. A kernel's name says what it needs; `supports` asks the
// CPU.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <omp.h>

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// Sums `bytes` of `streams` consecutive pieces side by side; a multiple of 64 * streams is read.
uint64_t read_words(const char* from, size_t bytes, int streams) {
  uint64_t sum = 0;
  const size_t piece = bytes / streams / 64 * 64;
  for (size_t at = 0; at < piece; at += 64)
    for (int s = 0; s < streams; ++s)
      for (int w = 0; w < 8; ++w) {
        uint64_t word;
        std::memcpy(&word, from + s * piece + at + 8 * w, 8);
        sum += word;
      }
  return sum;
}

#if defined(__x86_64__)

template <int Streams>
__attribute__((target("avx2"))) uint64_t read_avx2(const char* from, size_t bytes) {
  const size_t piece = bytes / Streams / 256 * 256;
  __m256i sum[4] = {};
  for (size_t at = 0; at < piece; at += 256)
    for (int s = 0; s < Streams; ++s)
      for (int v = 0; v < 8; ++v) {
        const char* p = from + s * piece + at + 32 * v;
        sum[v % 4] = _mm256_xor_si256(sum[v % 4], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      }
  const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
  return static_cast<uint64_t>(_mm256_extract_epi64(all, 0) ^ _mm256_extract_epi64(all, 3));
}

// Twelve independent accumulators: more than latency times ports. As asm, so that nothing is folded or spilled.
#define PEAK_VECTORS(name, features, Vector, instruction)                                                            \
  __attribute__((target(features))) void name(long rounds) {                                                         \
    Vector c0{}, c1{}, c2{}, c3{}, c4{}, c5{}, c6{}, c7{}, c8{}, c9{}, c10{}, c11{};                                 \
    const Vector a{}, b{};                                                                                           \
    for (long r = 0; r < rounds; ++r)                                                                                \
      __asm__ volatile(STEP(instruction, 0) STEP(instruction, 1) STEP(instruction, 2) STEP(instruction, 3)           \
                           STEP(instruction, 4) STEP(instruction, 5) STEP(instruction, 6) STEP(instruction, 7)       \
                               STEP(instruction, 8) STEP(instruction, 9) STEP(instruction, 10) STEP(instruction, 11) \
                       : "+v"(c0), "+v"(c1), "+v"(c2), "+v"(c3), "+v"(c4), "+v"(c5), "+v"(c6), "+v"(c7), "+v"(c8),   \
                         "+v"(c9), "+v"(c10), "+v"(c11)                                                              \
                       : "v"(a), "v"(b));                                                                            \
  }
#define STEP(instruction, accumulator) instruction " %12, %13, %" #accumulator "\n"
PEAK_VECTORS(peak_fp32_avx2, "avx2,fma", __m256, "vfmadd231ps")
PEAK_VECTORS(peak_fp32_avx512, "avx512f", __m512, "vfmadd231ps")
PEAK_VECTORS(peak_bf16_avx512, "avx512f", __m512, "vdpbf16ps")
PEAK_VECTORS(peak_int8_avx512, "avx512f", __m512i, "vpdpbusd")

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Two tiles of A against two of B, four accumulators: what a real kernel does between its tile loads.
#define PEAK_TILES(name, instruction)                                                                        \
  void name(long rounds) {                                                                                   \
    const TileConfig config;                                                                                 \
    __asm__ volatile(                                                                                        \
        "ldtilecfg %0\ntilezero %%tmm4\ntilezero %%tmm5\ntilezero %%tmm6\n"                                  \
        "tilezero %%tmm7\n" ::"m"(config));                                                                  \
    for (long r = 0; r < rounds; ++r)                                                                        \
      __asm__ volatile(instruction " %tmm6, %tmm4, %tmm0\n" instruction " %tmm6, %tmm5, %tmm1\n" instruction \
                                   " %tmm7, %tmm4, %tmm2\n" instruction " %tmm7, %tmm5, %tmm3\n");           \
    __asm__ volatile("tilerelease");                                                                         \
  }
PEAK_TILES(peak_bf16_amx, "tdpbf16ps")
PEAK_TILES(peak_int8_amx, "tdpbssd")

bool amx(unsigned bit) {
  unsigned a, b, c, d;
  __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
  // The kernel hands out tile state on request only (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
  return (d >> 24 & 1) && (d >> bit & 1) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

#endif

struct Peak {
  const char* name;
  void (*run)(long);
  double operations;  // of one round: a multiply and an add count as two
  bool (*supported)();
};

const Peak peaks[] = {
#if defined(__x86_64__)
    {"fp32 avx2", peak_fp32_avx2, 12 * 8 * 2,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
    {"fp32 avx512", peak_fp32_avx512, 12 * 16 * 2, [] { return !!__builtin_cpu_supports("avx512f"); }},
    {"bf16 avx512", peak_bf16_avx512, 12 * 32 * 2, [] { return !!__builtin_cpu_supports("avx512bf16"); }},
    {"bf16 amx", peak_bf16_amx, 4 * 16 * 16 * 32 * 2, [] { return amx(22); }},
    {"int8 avx512", peak_int8_avx512, 12 * 64 * 2, [] { return !!__builtin_cpu_supports("avx512vnni"); }},
    {"int8 amx", peak_int8_amx, 4 * 16 * 16 * 64 * 2, [] { return amx(25); }},
#endif
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

extern "C" {

// Reads `bytes` once, split evenly over `threads`, each thread over `streams` pieces of its part side by side.
uint64_t read_loop(const char* from, size_t bytes, int streams, int threads) {
  uint64_t sum = 0;
#pragma omp parallel num_threads(threads) reduction(^ : sum)
  {
    const size_t part = bytes / threads / 4096 * 4096;
    const char* mine = from + omp_get_thread_num() * part;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) {
      switch (streams) {
        case 1:
          sum ^= read_avx2<1>(mine, part);
          break;
        case 2:
          sum ^= read_avx2<2>(mine, part);
          break;
        case 4:
          sum ^= read_avx2<4>(mine, part);
          break;
        case 8:
          sum ^= read_avx2<8>(mine, part);
          break;
        default:
          sum ^= read_words(mine, part, streams);
      }
    } else
#endif
      sum ^= read_words(mine, part, streams);
  }
  return sum;
}

// Name of the `index`-th loop, or null after the last.
const char* peak_name(int index) { return peaks[index].name; }

bool peak_supported(int index) { return peaks[index].supported(); }

// Operations of one call of peak_loop.
double peak_operations(int index, long rounds, int threads) { return peaks[index].operations * rounds * threads; }

void peak_loop(int index, long rounds, int threads) {
#pragma omp parallel num_threads(threads)
  peaks[index].run(rounds);
}
}
