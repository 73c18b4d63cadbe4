// What the linear kernels share that read weights as they lie (core/format.h): scales, elements at any alignment,
// numbers of any dtype.
#pragma once
#include "cuda/decode.cuh"

namespace nybble::cuda {

// ---- scales ---------------------------------------------------------------------------------------------------------

constexpr int kScaleMap = 256;

// A scale as it is stored, so that it can be on its way while others are used: the bits of a plain one or of a row's
// absmax, or the code and the nested scale of its block, two loads that do not depend on each other.
struct StoredScale {
  uint32_t bits;
  float nested;
};

// The scales of a weight, for elements whose row and block is known.
struct Scales {
  const Weight& weight;
  const float* map;  // [kScaleMap] in shared memory, filled by fill_scale_map where scales are nested
  bool nested;
  float offset;

  static constexpr uint32_t kNoCode = 256;

  __device__ __forceinline__ Scales(const Weight& of, const float* at) : weight(of), map(at) {
    nested = !weight.is_int8() && weight.packed4.scales.plain == nullptr;
    offset = nested ? __ldg(weight.packed4.scales.offset) : 0.0F;
  }
  // Of the row of an int8 weight, else of the block that holds element `flat`.
  __device__ __forceinline__ StoredScale load(int64_t row, int64_t flat) const {
    const BlockScales& scales = weight.packed4.scales;
    const int64_t block = flat >> weight.packed4.block_shift;
    if (weight.is_int8()) return {__float_as_uint(__ldg(weight.rows8.absmax + row)), 0.0F};
    if (!nested) return {__float_as_uint(__ldg(scales.plain + block)), 0.0F};
    return {__ldg(scales.codes + block), __ldg(scales.nested + (block >> scales.nested_shift))};
  }
  // Where there is no weight: a scale of 0.
  __device__ __forceinline__ StoredScale none() const { return {nested ? kNoCode : 0U, 0.0F}; }
  // What a code is multiplied by; nested ones as BlockScales::at computes them.
  __device__ __forceinline__ float value(const StoredScale& stored) const {
    if (weight.is_int8()) return __fdiv_rn(__uint_as_float(stored.bits), 127.0F);
    if (!nested) return __uint_as_float(stored.bits);
    return stored.bits == kNoCode ? 0.0F : __fadd_rn(__fmul_rn(map[stored.bits], stored.nested), offset);
  }
};

// By all threads of the block; a barrier comes before the first value().
__device__ __forceinline__ void fill_scale_map(float* map, const Weight& weight) {
  if (weight.is_int8() || weight.packed4.scales.plain != nullptr) return;
  for (int i = static_cast<int>(threadIdx.x); i < kScaleMap; i += static_cast<int>(blockDim.x)) {
    map[i] = __ldg(weight.packed4.scales.map + i);
  }
}

// ---- the general path: any alignment, rows that begin inside a byte or a block --------------------------------------

// The eight bytes from `at` on, the first in the lowest bits; 0 for those from `end` on. `begin` and `end` bound what
// may be read. Whole words where they lie inside.
__device__ __forceinline__ uint2 load_any_8(const uint8_t* begin, const uint8_t* end, const uint8_t* at) {
  const uint32_t inside = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(at) & 3);
  const uint8_t* word = at - inside;
  uint32_t low = 0, middle = 0, high = 0;
  if (word >= begin && end - word >= 12) {
    low = __ldg(reinterpret_cast<const uint32_t*>(word));
    middle = __ldg(reinterpret_cast<const uint32_t*>(word) + 1);
    high = __ldg(reinterpret_cast<const uint32_t*>(word) + 2);
    // Byte i of (middle : low) >> 8 inside; the selector picks bytes inside .. inside + 3.
    const uint32_t selector = 0x3210U + 0x1111U * inside;
    return make_uint2(__byte_perm(low, middle, selector), __byte_perm(middle, high, selector));
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (end - at > i) low |= static_cast<uint32_t>(__ldg(at + i)) << (8 * i);
    if (end - at > i + 4) middle |= static_cast<uint32_t>(__ldg(at + i + 4)) << (8 * i);
  }
  return make_uint2(low, middle);
}

// Four int8 numbers as floats: a byte b put into the last byte of 2^23 is 2^23 + b, and the difference is exact. A
// conversion instruction has a quarter of the rate of these.
__device__ __forceinline__ void int8_values_4(uint32_t codes, float* out) {
  const uint32_t shifted = codes ^ 0x80808080U;  // -128..127 as 0..255
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t bits = __byte_perm(shifted, 0x4B000000U, 0x7440U + static_cast<uint32_t>(i));
    out[i] = __fsub_rn(__uint_as_float(bits), 8388736.0F);
  }
}

// Elements (row, column) to (row, column + 7) of a weight; 0 where there are none.
__device__ __forceinline__ void decode_any_8(const Weight& weight, int64_t row, int64_t column, const float* table,
                                             uint32_t lane_column, float (&out)[8]) {
  const int64_t left = row < weight.rows ? weight.cols - column : 0;
  const int count = left < 8 ? static_cast<int>(left) : 8;
  if (count <= 0) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = 0.0F;
    return;
  }
  const int64_t flat = row * weight.cols + column, total = weight.rows * weight.cols;
  if (weight.is_int8()) {
    const uint8_t* q = reinterpret_cast<const uint8_t*>(weight.rows8.q);
    const uint2 bytes = load_any_8(q, q + total, q + flat);
    const float scale = __fdiv_rn(__ldg(weight.rows8.absmax + row), 127.0F);
    int8_values_4(bytes.x, out);
    int8_values_4(bytes.y, out + 4);
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = i < count ? __fmul_rn(out[i], scale) : 0.0F;
    return;
  }
  const Packed4& packed4 = weight.packed4;
  const uint8_t* packed = packed4.packed;
  uint2 bytes = load_any_8(packed, packed + (total + 1) / 2, packed + flat / 2);
  // In the order of the elements from the lowest bits on, then those from an odd element on.
  bytes.x = ((bytes.x & 0x0F0F0F0FU) << 4) | ((bytes.x >> 4) & 0x0F0F0F0FU);
  bytes.y = ((bytes.y & 0x0F0F0F0FU) << 4) | ((bytes.y >> 4) & 0x0F0F0F0FU);
  const uint32_t codes = flat % 2 == 0 ? bytes.x : (bytes.x >> 4) | (bytes.y << 28);
  // Blocks are longer than eight: at most one begins after the first of these elements.
  const int64_t block = flat >> packed4.block_shift;
  const int64_t next = (block + 1) << packed4.block_shift;
  const float first = packed4.scales.at(block);
  const float second = flat + count > next ? packed4.scales.at(block + 1) : first;
  const float bare[8] = {
      code_of<0>(table, codes, lane_column),  code_of<4>(table, codes, lane_column),
      code_of<8>(table, codes, lane_column),  code_of<12>(table, codes, lane_column),
      code_of<16>(table, codes, lane_column), code_of<20>(table, codes, lane_column),
      code_of<24>(table, codes, lane_column), code_of<28>(table, codes, lane_column),
  };
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = i < count ? __fmul_rn(bare[i], flat + i < next ? first : second) : 0.0F;
}

// ---- numbers of any dtype -------------------------------------------------------------------------------------------

__device__ __forceinline__ float element(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::f32) return __ldg(static_cast<const float*>(data) + index);
  const uint32_t bits = __ldg(static_cast<const uint16_t*>(data) + index);
  return dtype == DType::bf16 ? unpack<Bf16>(bits).x : unpack<F16>(bits).x;
}

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<Bf16> {
  static constexpr DType value = DType::bf16;
};
template <>
struct DTypeOf<F16> {
  static constexpr DType value = DType::f16;
};

template <class T>
__device__ __forceinline__ uint4 pack_8(const float (&values)[8]) {
  return make_uint4(pack<T>(values[0], values[1]), pack<T>(values[2], values[3]), pack<T>(values[4], values[5]),
                    pack<T>(values[6], values[7]));
}

// `count` numbers from `index` on rounded to T, and zeros up to eight. `aligned`: eight of them, which are T already,
// may be read at once.
template <class T>
__device__ __forceinline__ uint4 load_numbers_8(const void* data, DType dtype, int64_t index, int count, bool aligned) {
  if (aligned && count >= 8 && dtype == DTypeOf<T>::value) {
    return __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + index));
  }
  float values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = i < count ? element(data, dtype, index + i) : 0.0F;
  return pack_8<T>(values);
}

__device__ __host__ __forceinline__ bool aligned_16(const void* pointer) {
  return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0;
}

// Every 32 elements that begin at a multiple of 32 lie in one row and one block, at an address that 16 divides.
inline bool has_whole_units(const Weight& weight) {
  const void* codes = weight.is_int8() ? static_cast<const void*>(weight.rows8.q) : weight.packed4.packed;
  return weight.cols % 32 == 0 && aligned_16(codes);
}

}  // namespace nybble::cuda
