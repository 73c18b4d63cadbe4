// NEON with the dot product of int8 quads: Neoverse N1, Cortex-A76, Apple M1 and later.
#include "cpu/tables.h"

#if NYBBLE_ARM64_EXTENSIONS
#include <arm_neon.h>

#include <cmath>
#include <cstring>

#include "core/half.h"
#include "core/parallel.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define NYBBLE_ISA_NAME "neondot"
#define NYBBLE_DOT 1

namespace nybble::cpu::neondot {
#include "cpu/simd_neon.h"
#include "cpu/simd_int8_neon.h"
#include "cpu/bodies.inl"
}  // namespace nybble::cpu::neondot

#include "cpu/target_end.h"
#endif
