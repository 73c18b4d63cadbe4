// Plain C++ for the baseline of whatever architecture this is compiled for.
#include <math.h>

#include <cstring>

#include "core/half.h"
#include "core/parallel.h"
#include "cpu/tables.h"

#define NYBBLE_ISA_NAME "scalar"

namespace nybble::cpu::scalar {
#include "cpu/simd_scalar.h"
#include "cpu/simd_int8_generic.h"
#include "cpu/bodies.inl"
}  // namespace nybble::cpu::scalar
