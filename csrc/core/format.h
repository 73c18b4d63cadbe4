// The only place that defines a layout: bitsandbytes' bytes, which are also the checkpoint's.
//
// A 4-bit tensor is flattened row-major and cut into blocks of `block_size` elements (a power of two, 32 to 4096); a
// block may straddle two rows and the last one may be partial.
//   byte i holds elements 2i (HIGH nibble) and 2i + 1 (LOW nibble); value = codebook[nibble] * scale[block]
//   scale[block] is fp32, or (double quantization) map[code[block]] * nested[block >> nested_shift] + offset
// An int8 tensor is [rows, cols] with one fp32 absmax a row: value = q * absmax[row] / 127.
#pragma once
#include <cstdint>

#include "core/half.h"

namespace nybble {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2 };

NYBBLE_ANYWHERE inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

constexpr int64_t kMinBlock = 32;
constexpr int64_t kMaxBlock = 4096;

NYBBLE_ANYWHERE inline bool valid_block_size(int64_t block_size) {
  return block_size >= kMinBlock && block_size <= kMaxBlock && (block_size & (block_size - 1)) == 0;
}

// Both block sizes are powers of two, kept as shifts: a division a block would cost as much as decoding the block.
NYBBLE_ANYWHERE inline int log2_of(int64_t power_of_two) {
  int shift = 0;
  while ((int64_t{1} << shift) < power_of_two) ++shift;
  return shift;
}

NYBBLE_ANYWHERE inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
NYBBLE_ANYWHERE inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
NYBBLE_ANYWHERE inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Decoded where it is used: a full fp32 array of the nested scales never exists.
struct BlockScales {
  const float* plain = nullptr;    // [blocks], or null when nested
  const uint8_t* codes = nullptr;  // [blocks]
  const float* nested = nullptr;   // [ceil(blocks / nested_block)]
  const float* map = nullptr;      // [256]
  const float* offset = nullptr;   // [1], read where it lies: no value crosses from Python per call
  int nested_shift = 8;            // log2 of the scales that share a nested scale

  NYBBLE_ANYWHERE float at(int64_t block) const {
    return plain != nullptr ? plain[block] : map[codes[block]] * nested[block >> nested_shift] + *offset;
  }

  // Where the stored scale of a block lies, for prefetching.
  const void* address(int64_t block) const {
    return plain != nullptr ? static_cast<const void*>(plain + block) : static_cast<const void*>(codes + block);
  }
};

struct Packed4 {
  const uint8_t* packed = nullptr;  // [ceil(count / 2)]
  const float* codebook = nullptr;  // [16]
  int block_shift = 6;              // log2 of the block size
  BlockScales scales;

  NYBBLE_ANYWHERE int64_t block_size() const { return int64_t{1} << block_shift; }
};

struct Rows8 {
  const int8_t* q = nullptr;      // [rows, cols]
  const float* absmax = nullptr;  // [rows]
};

// The weight of a linear layer, [rows = out_features, cols = in_features].
struct Weight {
  int64_t rows = 0;
  int64_t cols = 0;
  Packed4 packed4;
  Rows8 rows8;
  bool int8 = false;  // rows8 counts, else packed4; not told by the pointers: those of an empty weight are null

  NYBBLE_ANYWHERE bool is_int8() const { return int8; }
};

}  // namespace nybble
