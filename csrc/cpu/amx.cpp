// AMX tiles on bf16 and int8, with AVX-512 for the rest: Sapphire Rapids and later.
#include "cpu/tables.h"

#if NYBBLE_X86
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "core/half.h"
#include "core/parallel.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                                          \
    __attribute__((                                                                                                    \
        target("amx-tile,amx-bf16,amx-int8,avx512vnni,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,amx-int8,avx512vnni,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#define NYBBLE_ISA_NAME "amx"
#define NYBBLE_BF16_DOT 1
#define NYBBLE_VNNI 1
#define NYBBLE_AMX 1

namespace nybble::cpu::amx {
#include "cpu/simd_avx512.h"
#include "cpu/simd_amx.h"
#include "cpu/simd_int8_avx512.h"
#include "cpu/simd_int8_amx.h"
#include "cpu/bodies.inl"
}  // namespace nybble::cpu::amx

#include "cpu/target_end.h"
#endif
