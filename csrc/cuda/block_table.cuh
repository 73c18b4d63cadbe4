// The values of one block of a 4-bit format, decoded in registers. A block has 16 values at most, so they are scaled
// and rounded once for a block and looked up by byte permutation: no shared memory, which tensor cores keep busy.
//
// Counted for 64 weights of one scale in a thread: 16 products, 8 conversions, 8 permutations for the table; 21
// instructions for 8 weights (5 for the selectors, 12 to look up, 4 to put the halves together): 200 in all, 176 of
// them at half the rate of the others. The same weights by a table in shared memory take 8 wavefronts more for a warp.
#pragma once
#include "cuda/device.cuh"

namespace nybble::cuda {

// Byte i % 4 of number i / 4: the low and the high byte of value i.
struct BlockTable {
  uint32_t low[4];
  uint32_t high[4];
};

// T(code * scale), rounded as dequantize does.
template <class T>
__device__ __forceinline__ BlockTable block_table(const float (&codebook)[16], float scale) {
  BlockTable table;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t first = pack<T>(__fmul_rn(codebook[4 * i], scale), __fmul_rn(codebook[4 * i + 1], scale));
    const uint32_t second = pack<T>(__fmul_rn(codebook[4 * i + 2], scale), __fmul_rn(codebook[4 * i + 3], scale));
    table.low[i] = permute(first, second, 0x6420U);
    table.high[i] = permute(first, second, 0x7531U);
  }
  return table;
}

// Four codes, each in three bits of `selector`, their fourth bits in bits 2, 6, 10 and 14 of `upper`, which else is
// 0x3210: one byte of each value.
__device__ __forceinline__ uint32_t look_up_4(const uint32_t (&bytes)[4], uint32_t selector, uint32_t upper) {
  return permute(permute(bytes[0], bytes[1], selector), permute(bytes[2], bytes[3], selector), upper);
}

// The values of the eight codes of four bytes, in the order of the elements: a byte's high half comes first.
__device__ __forceinline__ uint4 decode_8(const BlockTable& table, uint32_t codes) {
  const uint32_t selector = codes & 0x77777777U;
  const uint32_t upper = ((codes >> 1) & 0x44444444U) | 0x32103210U;
  uint32_t low = look_up_4(table.low, selector, upper);
  uint32_t high = look_up_4(table.high, selector, upper);
  uint4 values;
  values.x = permute(low, high, 0x4051U);
  values.y = permute(low, high, 0x6273U);
  low = look_up_4(table.low, selector >> 16, upper >> 16);
  high = look_up_4(table.high, selector >> 16, upper >> 16);
  values.z = permute(low, high, 0x4051U);
  values.w = permute(low, high, 0x6273U);
  return values;
}

}  // namespace nybble::cuda
