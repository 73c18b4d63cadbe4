// What linear_int8.cu's kernels share: where the codes of x and of W lie, and how a weight is read.
//
// Codes are int8. A row of x has one scale s = absmax / 127, its codes are round(x / s); rows are filled up with zeros
// to whole steps of kStep columns. A row of a 4-bit weight has one scale for each kStep columns, the largest magnitude
// that their blocks allow / 127, so sums of a step are integers below 127 * 127 * 128 < 2^22.
#pragma once
#include "cuda/device.cuh"

namespace nybble::cuda {

constexpr int kStep = 128;

// Adding an integer n, |n| < 2^22, to the bits of 1.5 * 2^23 gives those of the float 1.5 * 2^23 + n: conversions
// either way cost one addition, where the conversion units take a quarter of its rate or less.
constexpr float kShifted = 12582912.0F;
constexpr uint32_t kShiftedBits = 0x4B400000U;

struct Int8Scale {
  float by;    // out = sum * by * lift
  float lift;  // 1, but for rows so small that 127 / absmax would overflow
};

// Columns of x that are not rounded; how many is known on the device alone.
struct Outliers {
  const uint8_t* is = nullptr;     // [padded] 1 or 0; null: there are none
  const int32_t* list = nullptr;   // [count] ascending
  const int32_t* count = nullptr;  // [1]
};

// The scale of 4-bit codes whose blocks' largest scale has these bits; `unit`: the codebook's largest magnitude / 127.
// 0 for nothing but zeros (or what is below 1e-40), NaN for a damaged scale.
__device__ __forceinline__ float step_of(uint32_t largest, float unit, bool* usable) {
  const float by = __fmul_rn(__uint_as_float(largest), unit);
  *usable = by >= 0x1p-140F && by < __uint_as_float(0x7F800000U);
  return *usable ? by : __fmul_rn(by, 0.0F);
}

__device__ __forceinline__ float largest_magnitude(const float* codebook) {
  float largest = 0.0F;
#pragma unroll
  for (int i = 0; i < 16; ++i) largest = fmaxf(largest, fabsf(codebook[i]));
  return largest;
}

__device__ __forceinline__ float element(const void* data, DType dtype, int64_t at) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[at];
  const uint32_t bits = static_cast<const uint16_t*>(data)[at];
  return dtype == DType::bf16 ? unpack<Bf16>(bits).x : unpack<F16>(bits).x;
}

// One weight as `dequantize` gives it.
__device__ __forceinline__ float weight_at(const Weight& weight, int64_t row, int64_t column) {
  const int64_t at = row * weight.cols + column;
  if (weight.is_int8()) {
    return __fdiv_rn(__fmul_rn(static_cast<float>(weight.rows8.q[at]), weight.rows8.absmax[row]), 127.0F);
  }
  const Packed4& from = weight.packed4;
  const int code = (from.packed[at >> 1] >> ((at & 1) != 0 ? 0 : 4)) & 15;
  return __fmul_rn(from.codebook[code], from.scales.at(at >> from.block_shift));
}

// ---- the multiplication: how it is cut up
// ----------------------------------------------------------------------------

enum class Source { packed, codes, groups };

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kExtra = 32;        // columns of the side path and outliers at a time
constexpr int kExtraStride = 36;  // of floats: rows 4 banks apart

template <Source kSource, int kRowTiles, int kXTiles>
struct Tile {
  static constexpr int kOwn = 2 * kRowTiles;  // rows of W in a thread's fragments, 8 apart
  static constexpr int kWarpRows = 8 * kOwn;
  static constexpr int kRows = kWarps * kWarpRows;  // of W
  static constexpr int kXRows = 8 * kXTiles;
  static constexpr int kRowBytes = kSource == Source::packed ? kStep / 2 : kStep;
  static constexpr int kWBytes = kRows * kRowBytes;
  static constexpr int kStageBytes = kWBytes + kXRows * kStep;
  static constexpr int kExtraBytes = (kRows + kXRows) * kExtraStride * 4;
};

// Codes of rows of x, codes of rows of W that are not read in place, and which rows these are.
struct Int8Job {
  LinearArgs args;
  const uint8_t* x = nullptr;  // [x_rows][padded]
  const Int8Scale* x_scale = nullptr;
  int64_t first_x = 0;
  int x_rows = 0;
  int64_t padded = 0;
  const uint8_t* w = nullptr;  // [w_rows][w_stride]
  uint32_t w_stride = 0;       // bytes of a row
  uint32_t x_stride = 0;
  const float* w_scale = nullptr;  // [w_rows][padded / kStep]
  int64_t first_w = 0;
  int w_rows = 0;
  Outliers outliers;
  int stages = 0;
  bool wide_stores = false;
};

}  // namespace nybble::cuda
