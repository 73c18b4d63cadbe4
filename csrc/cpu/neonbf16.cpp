// NEON with the BF16 dot product: Neoverse V1 and N2, Cortex-X2, Apple M2 and later.
#include "cpu/tables.h"

#if NYBBLE_ARM64_BF16
#include <arm_neon.h>

#include <cstring>

#include "core/half.h"
#include "core/parallel.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("bf16"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+bf16")
#endif

#define NYBBLE_ISA_NAME "neonbf16"
#define NYBBLE_BF16_DOT 1

namespace nybble::cpu::neonbf16 {
#include "cpu/simd_neon.h"
#include "cpu/simd_int8_generic.h"
#include "cpu/bodies.inl"
}  // namespace nybble::cpu::neonbf16

#include "cpu/target_end.h"
#endif
