// Plain C++ for the baseline of whatever architecture this is compiled for.
#include <cstring>

#include "core/half.h"
#include "core/parallel.h"
#include "cpu/tables.h"

#define NYBBLE_ISA_NAME "scalar"
#define NYBBLE_ISA_BF16_DOT false

namespace nybble::cpu::scalar {
#include "cpu/simd_scalar.h"
#include "cpu/codec.inl"
#include "cpu/linear_panel.inl"
#include "cpu/linear_small_m.inl"
#include "cpu/table.inl"
}  // namespace nybble::cpu::scalar
