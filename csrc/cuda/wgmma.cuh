// The tensor cores of a warpgroup (sm_90a): 128 threads multiply two tiles that lie in shared memory.
#pragma once
#include <type_traits>

#include "cuda/device.cuh"

namespace nybble::cuda {

// A tile of 16-bit elements for wgmma lies in shared memory as atoms of 8 lines of 128 bytes, 1024-byte aligned, their
// 16-byte chunks swizzled: chunk c of line l of an atom is at l * 128 + (c ^ l) * 16. What is contiguous in a line is
// either k ("K-major": a line is a row of A or a column of B, 64 k long) or the row or column itself ("MN-major": a
// line is one k, 64 rows or columns long).
__device__ __forceinline__ uint32_t swizzled(uint32_t line, uint32_t chunk) {
  return line * 128 + ((chunk ^ (line & 7)) << 4);
}

// The matrix descriptor of a tile that begins at `shared` (PTX ISA, "Matrix Descriptor Format"; 128-byte swizzle).
//   K-major    stride: bytes from one atom of 8 rows to the next. leading: not used. The next 16 k begin 32 bytes on.
//   MN-major   leading: bytes from one atom of 64 rows to the next 64 rows. stride: bytes from one atom of 8 k to the
//              next 8 k. The next 16 k begin two atoms on.
__device__ __forceinline__ uint64_t describe(const void* shared, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((shared_address(shared) & 0x3FFFFU) >> 4) |
         (static_cast<uint64_t>((leading & 0x3FFFFU) >> 4) << 16) |
         (static_cast<uint64_t>((stride & 0x3FFFFU) >> 4) << 32) | (uint64_t{1} << 62);
}

// Makes ordinary writes of this thread to shared memory visible to wgmma; before the barrier that hands them over.
__device__ __forceinline__ void fence_async_shared() {
#if defined(NYBBLE_HOPPER)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Before the first wgmma, and wherever other code has touched its registers since the last.
__device__ __forceinline__ void wgmma_fence() {
#if defined(NYBBLE_HOPPER)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wgmma_commit() {
#if defined(NYBBLE_HOPPER)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until at most `Pending` of the latest groups are under way; their registers and shared memory are in use till then.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
#if defined(NYBBLE_HOPPER)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#endif
}
// Registers of every thread of a warpgroup from here on; the sum over the block must be what it was launched with.
template <int Registers>
__device__ __forceinline__ void more_registers() {
#if defined(NYBBLE_HOPPER)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}
template <int Registers>
__device__ __forceinline__ void fewer_registers() {
#if defined(NYBBLE_HOPPER)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

#define NYBBLE_TEN(tens)                                                                                               \
  "%" tens "0, %" tens "1, %" tens "2, %" tens "3, %" tens "4, %" tens "5, %" tens "6, %" tens "7, %" tens "8, %" tens \
  "9, "
#define NYBBLE_D2(i) "+f"(d[i]), "+f"(d[(i) + 1])
#define NYBBLE_D8(i) NYBBLE_D2(i), NYBBLE_D2((i) + 2), NYBBLE_D2((i) + 4), NYBBLE_D2((i) + 6)
#define NYBBLE_D16(i) NYBBLE_D8(i), NYBBLE_D8((i) + 8)
#define NYBBLE_D32(i) NYBBLE_D16(i), NYBBLE_D16((i) + 16)
#define NYBBLE_D64(i) NYBBLE_D32(i), NYBBLE_D32((i) + 32)
#define NYBBLE_D128(i) NYBBLE_D64(i), NYBBLE_D64((i) + 64)

// `list`: "%0, ... %{count - 1}"; a, b, accumulate, AMajor, BMajor are the operands after those.
#define NYBBLE_WGMMA(n, count, type, list, a_, b_, acc_, am_, bm_)                                       \
  asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, " acc_                                \
               ", 0;\n"                                                                                  \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" list "}, " a_ ", " b_ \
               ", accumulate, 1, 1, " am_ ", " bm_ ";\n}\n"                                              \
               : NYBBLE_D##count(0)                                                                      \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(AMajor), "n"(BMajor))

#define NYBBLE_WGMMA_TYPE(type)                                                                                     \
  if constexpr (Count == 8) {                                                                                       \
    NYBBLE_WGMMA("16", 8, type, "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", "%11", "%12");                 \
  } else if constexpr (Count == 16) {                                                                               \
    NYBBLE_WGMMA("32", 16, type, NYBBLE_TEN("") "%10, %11, %12, %13, %14, %15", "%16", "%17", "%18", "%19", "%20"); \
  } else if constexpr (Count == 32) {                                                                               \
    NYBBLE_WGMMA("64", 32, type, NYBBLE_TEN("") NYBBLE_TEN("1") NYBBLE_TEN("2") "%30, %31", "%32", "%33", "%34",    \
                 "%35", "%36");                                                                                     \
  } else if constexpr (Count == 64) {                                                                               \
    NYBBLE_WGMMA("128", 64, type,                                                                                   \
                 NYBBLE_TEN("") NYBBLE_TEN("1") NYBBLE_TEN("2") NYBBLE_TEN("3") NYBBLE_TEN("4")                     \
                     NYBBLE_TEN("5") "%60, %61, %62, %63",                                                          \
                 "%64", "%65", "%66", "%67", "%68");                                                                \
  } else {                                                                                                          \
    static_assert(Count == 128, "columns of a wgmma: 16, 32, 64, 128 or 256");                                      \
    NYBBLE_WGMMA("256", 128, type,                                                                                  \
                 NYBBLE_TEN("") NYBBLE_TEN("1") NYBBLE_TEN("2") NYBBLE_TEN("3") NYBBLE_TEN("4") NYBBLE_TEN("5")     \
                     NYBBLE_TEN("6") NYBBLE_TEN("7") NYBBLE_TEN("8") NYBBLE_TEN("9") NYBBLE_TEN("10")               \
                         NYBBLE_TEN("11") "%120, %121, %122, %123, %124, %125, %126, %127",                         \
                 "%128", "%129", "%130", "%131", "%132");                                                           \
  }

// d[64, N] = a[64, 16] b[16, N] + (accumulate ? d : 0), asynchronously, for N = 16, 32, 64, 128 or 256. AMajor and
// BMajor: 0 for a K-major tile, 1 for an MN-major one. With w = warp of the warpgroup, g = lane / 4, t = lane % 4:
// d[4 j + i] is row 16 w + g + 8 (i / 2), column 8 j + 2 t + i % 2.
template <class T, int AMajor, int BMajor, int Count>
__device__ __forceinline__ void wgmma(float (&d)[Count], uint64_t a, uint64_t b, bool accumulate) {
#if defined(NYBBLE_HOPPER)
  if constexpr (std::is_same_v<T, Bf16>) {
    NYBBLE_WGMMA_TYPE("bf16")
  } else {
    NYBBLE_WGMMA_TYPE("f16")
  }
#else
  (void)d, (void)a, (void)b, (void)accumulate;
#endif
}

}  // namespace nybble::cuda
