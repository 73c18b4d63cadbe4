// AVX-512 with the dot products of bf16 and int8 (VNNI): Cooper Lake, Sapphire Rapids, Zen 4 and later.
#include "cpu/tables.h"

#if NYBBLE_X86
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "core/half.h"
#include "core/parallel.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                          \
    __attribute__((target("avx512vnni,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx512vnni,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#define NYBBLE_ISA_NAME "avx512bf16"
#define NYBBLE_BF16_DOT 1
#define NYBBLE_VNNI 1

namespace nybble::cpu::avx512bf16 {
#include "cpu/simd_avx512.h"
#include "cpu/simd_int8_avx512.h"
#include "cpu/bodies.inl"
}  // namespace nybble::cpu::avx512bf16

#include "cpu/target_end.h"
#endif
