// NEON with BF16 dot products and int8 matrix products (I8MM): Neoverse V1 and N2, Cortex-X2, Apple M2 and later.
#include "cpu/tables.h"

#if NYBBLE_ARM64_EXTENSIONS
#include <arm_neon.h>

#include <cmath>
#include <cstring>

#include "core/half.h"
#include "core/parallel.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("bf16,i8mm"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+bf16+i8mm")
#endif

#define NYBBLE_ISA_NAME "neonbf16"
#define NYBBLE_BF16_DOT 1
#define NYBBLE_I8MM 1

namespace nybble::cpu::neonbf16 {
#include "cpu/simd_neon.h"
#include "cpu/simd_int8_neon.h"
#include "cpu/bodies.inl"
}  // namespace nybble::cpu::neonbf16

#include "cpu/target_end.h"
#endif
