// NEON: every AArch64 machine. It is that architecture's baseline, so there is no target region to open.
#include "cpu/tables.h"

#if NYBBLE_ARM64
#include <arm_neon.h>

#include <cmath>
#include <cstring>

#include "core/half.h"
#include "core/parallel.h"

#define NYBBLE_ISA_NAME "neon"

namespace nybble::cpu::neon {
#include "cpu/simd_neon.h"
#include "cpu/simd_int8_neon.h"
#include "cpu/bodies.inl"
}  // namespace nybble::cpu::neon
#endif
