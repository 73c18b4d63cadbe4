// From stored codes to values: the table of a 4-bit format, int8's quotient.
#pragma once
#include "cuda/device.cuh"

namespace nybble::cuda {

// A codebook in shared memory, 32 times over, so that the lanes of a warp look up different codes without a conflict:
// code c of lane l is number 32 c + l.
constexpr int kCodeTable = 16 * kWarp;

// By all threads of the block; a barrier comes before its first use.
__device__ __forceinline__ void fill_code_table(float* table, const float* codebook) {
  for (int i = static_cast<int>(threadIdx.x); i < kCodeTable; i += static_cast<int>(blockDim.x)) {
    table[i] = __ldg(codebook + i / kWarp);
  }
}

// What code_of adds to the address in the table: a lane's own column.
__device__ __forceinline__ uint32_t code_column() { return static_cast<uint32_t>(lane()) * 4; }

// The code in bits Shift to Shift + 3 of `codes`: the shift leaves it at 128 times its value, the distance of two codes
// in the table, so that one more instruction makes the address.
template <int Shift>
__device__ __forceinline__ float code_of(const float* table, uint32_t codes, uint32_t column) {
  uint32_t offset;
  if constexpr (Shift >= 7) {
    offset = codes >> (Shift - 7);
  } else {
    offset = codes << (7 - Shift);
  }
  return *reinterpret_cast<const float*>(reinterpret_cast<const unsigned char*>(table) + ((offset & 0x780U) | column));
}

// The eight codes of four bytes, in the order of their elements: a byte's high half comes first.
__device__ __forceinline__ void decode_8(const float* table, uint32_t codes, uint32_t column, float (&out)[8]) {
  out[0] = code_of<4>(table, codes, column);
  out[1] = code_of<0>(table, codes, column);
  out[2] = code_of<12>(table, codes, column);
  out[3] = code_of<8>(table, codes, column);
  out[4] = code_of<20>(table, codes, column);
  out[5] = code_of<16>(table, codes, column);
  out[6] = code_of<28>(table, codes, column);
  out[7] = code_of<24>(table, codes, column);
}

// v / 127, correctly rounded, for v neither tiny nor huge, which the largest v of a row, 127 absmax, tells: the
// quotient by the reciprocal is off by at most one unit, its remainder is exact, and the reciprocal of 127 is the
// nearest float (Markstein 1990).
__device__ __forceinline__ bool divides_by_127(float absmax) { return absmax > 0x1p-100F && absmax < 0x1p100F; }
__device__ __forceinline__ float divide_by_127(float v) {
  constexpr float kReciprocal = 1.0F / 127.0F;
  const float quotient = __fmul_rn(v, kReciprocal);
  return __fmaf_rn(__fmaf_rn(-quotient, 127.0F, v), kReciprocal, quotient);
}
// q * absmax / 127, a product and a quotient, each rounded.
__device__ __forceinline__ float int8_value(float q, float absmax, bool divides) {
  const float product = __fmul_rn(q, absmax);
  return divides ? divide_by_127(product) : __fdiv_rn(product, 127.0F);
}

}  // namespace nybble::cuda
