// The kernel tables that the ISA files export; dispatch.cpp orders them.
#pragma once
#include "core/kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#define NYBBLE_X86 1
#else
#define NYBBLE_X86 0
#endif

#if (defined(__aarch64__) && !defined(__AARCH64EB__)) || defined(_M_ARM64)
#define NYBBLE_ARM64 1
#else
#define NYBBLE_ARM64 0
#endif

// Compilers before these do not declare what extensions add outside a build that is wholly for machines that have them.
#if NYBBLE_ARM64 && ((defined(__clang__) && __clang_major__ >= 16) || (!defined(__clang__) && __GNUC__ >= 10))
#define NYBBLE_ARM64_EXTENSIONS 1
#else
#define NYBBLE_ARM64_EXTENSIONS 0
#endif

// For what must not become a call: a call passes registers of sums through memory, and GCC drops calls of functions
// that do nothing but prefetch.
#if defined(_MSC_VER)
#define NYBBLE_INLINE __forceinline
#else
#define NYBBLE_INLINE inline __attribute__((always_inline))
#endif

namespace nybble::cpu {

namespace scalar {
extern const KernelTable kTable;
}
#if NYBBLE_X86
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
namespace amx {
extern const KernelTable kTable;
}
namespace avx512bf16 {
extern const KernelTable kTable;
}
#endif
#if NYBBLE_ARM64
namespace neon {
extern const KernelTable kTable;
}
namespace neondot {
extern const KernelTable kTable;
}
namespace neonbf16 {
extern const KernelTable kTable;
}
#endif

}  // namespace nybble::cpu
