// The kernel tables that the ISA files export; dispatch.cpp orders them.
#pragma once
#include "core/kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#define NYBBLE_X86 1
#else
#define NYBBLE_X86 0
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

}  // namespace nybble::cpu
