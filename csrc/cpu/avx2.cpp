// AVX2 with FMA and F16C: Haswell (2013), Zen and later.
#include "cpu/tables.h"

#if NYBBLE_X86
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "core/half.h"
#include "core/parallel.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define NYBBLE_ISA_NAME "avx2"

namespace nybble::cpu::avx2 {
#include "cpu/simd_avx2.h"
#include "cpu/simd_int8_avx2.h"
#include "cpu/bodies.inl"
}  // namespace nybble::cpu::avx2

#include "cpu/target_end.h"
#endif
