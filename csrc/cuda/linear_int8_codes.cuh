// Kernels that write the int8 codes which linear_int8.cu multiplies: rows of x, and, where they cannot be read in
// place, rows of W; and those that find x's outlier columns.
#pragma once
#include "cuda/linear_int8.cuh"

namespace nybble::cuda {

constexpr int kCodesThreads = 256;
constexpr int kCodesWarps = kCodesThreads / kWarp;
constexpr int kRun = 8;  // columns that a thread takes at a time

// Columns [at, at + kRun) of a row, zeros from `cols` on. `aligned`: the row begins at a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ void load_run(const T* row, int64_t at, int64_t cols, bool aligned, float (&out)[kRun]) {
  if (aligned && at + kRun <= cols) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 four = *reinterpret_cast<const float4*>(row + at + 4 * half);
        out[4 * half] = four.x, out[4 * half + 1] = four.y, out[4 * half + 2] = four.z, out[4 * half + 3] = four.w;
      }
    } else {
      const uint4 eight = *reinterpret_cast<const uint4*>(row + at);
      const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<T>(pairs[i]);
        out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) out[i] = at + i < cols ? to_float(row[at + i]) : 0.0F;
}

template <class T>
__device__ __forceinline__ bool is_aligned(const T* row) {
  return (reinterpret_cast<uintptr_t>(row) & 15) == 0;
}

// ---- outlier columns ------------------------------------------------------------------------------------------------

constexpr int kFindColumns = kWarp * kRun;  // of a block

// found[slice][column] = whether a row of the slice reaches the threshold there. Blocks: (columns, slices).
template <class T>
__global__ void __launch_bounds__(kCodesThreads)
    find_outliers(const T* x, int64_t stride, int64_t rows, int64_t rows_of_slice, int64_t cols, int64_t padded,
                  float threshold, uint8_t* found) {
  uint32_t* masks = reinterpret_cast<uint32_t*>(shared_memory());  // [kCodesWarps][kWarp]
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kFindColumns + lane() * kRun;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * rows_of_slice;
  const int64_t end = smaller(first + rows_of_slice, rows);
  uint32_t mask = 0;
  for (int64_t row = first + warp(); row < end; row += kCodesWarps) {
    float values[kRun];
    load_run(x + row * stride, at, cols, is_aligned(x + row * stride), values);
#pragma unroll
    for (int i = 0; i < kRun; ++i) mask |= fabsf(values[i]) >= threshold ? 1U << i : 0U;
  }
  masks[warp() * kWarp + lane()] = mask;
  __syncthreads();
  if (warp() != 0 || at >= padded) return;
  for (int other = 1; other < kCodesWarps; ++other) mask |= masks[other * kWarp + lane()];
  uint32_t bytes[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kRun; ++i) bytes[i / 4] |= ((mask >> i) & 1U) << (8 * (i % 4));
  *reinterpret_cast<uint2*>(found + blockIdx.y * padded + at) = make_uint2(bytes[0], bytes[1]);
}

constexpr int kListThreads = 1024;

// is[padded] = any slice's; list[count] = those columns in ascending order. One block.
__global__ void __launch_bounds__(kListThreads)
    list_outliers(const uint8_t* found, int64_t slices, int64_t padded, uint8_t* is, int32_t* list, int32_t* count) {
  int* sums = reinterpret_cast<int*>(shared_memory());  // [warps]
  const int own_warp = warp();
  int listed = 0;
  for (int64_t first = 0; first < padded; first += kListThreads * kRun) {
    const int64_t at = first + static_cast<int64_t>(threadIdx.x) * kRun;
    uint2 any = make_uint2(0, 0);
    if (at < padded) {
      for (int64_t slice = 0; slice < slices; ++slice) {
        const uint2 more = *reinterpret_cast<const uint2*>(found + slice * padded + at);
        any.x |= more.x, any.y |= more.y;
      }
      *reinterpret_cast<uint2*>(is + at) = any;
    }
    const int mine = __popc(any.x) + __popc(any.y);
    int before = mine;  // of the warp's lanes up to this one
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int other = __shfl_sync(kWholeWarp, before, (lane() - distance) & (kWarp - 1));
      before += lane() >= distance ? other : 0;
    }
    if (lane() == kWarp - 1) sums[own_warp] = before;
    __syncthreads();
    int place = listed + before - mine;
    for (int other = 0; other < kListThreads / kWarp; ++other) {
      place += other < own_warp ? sums[other] : 0;
      listed += sums[other];
    }
    __syncthreads();
    for (int i = 0; i < kRun; ++i) {
      if ((((i < 4 ? any.x : any.y) >> (8 * (i % 4))) & 1U) != 0) list[place++] = static_cast<int32_t>(at + i);
    }
  }
  if (threadIdx.x == 0) *count = listed;
}

// ---- rows of x ------------------------------------------------------------------------------------------------------

// Where they are outliers, 0.
__device__ __forceinline__ void drop_outliers(const Outliers& outliers, int64_t at, float (&values)[kRun]) {
  if (outliers.is == nullptr) return;
  const uint2 is = *reinterpret_cast<const uint2*>(outliers.is + at);
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if ((((i < 4 ? is.x : is.y) >> (8 * (i % 4))) & 1U) != 0) values[i] = 0.0F;
  }
}

// A row a block. `swapped`: neighbours change places, as the decoding of 4-bit weights leaves them.
template <class T>
__global__ void __launch_bounds__(kCodesThreads)
    round_rows(const T* x, int64_t stride, int64_t cols, int64_t padded, bool swapped, Outliers outliers,
               uint8_t* codes, Int8Scale* scale) {
  uint32_t* largest_of = reinterpret_cast<uint32_t*>(shared_memory());  // [kCodesWarps]
  const int64_t index = blockIdx.x;
  const T* row = x + index * stride;
  const bool aligned = is_aligned(row);
  const int64_t begin = static_cast<int64_t>(threadIdx.x) * kRun;
  uint32_t largest = 0;
  for (int64_t at = begin; at < cols; at += kCodesThreads * kRun) {
    float values[kRun];
    load_run(row, at, cols, aligned, values);
    drop_outliers(outliers, at, values);
#pragma unroll
    for (int i = 0; i < kRun; ++i) largest = max(largest, __float_as_uint(values[i]) & 0x7FFFFFFFU);
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    largest = max(largest, __shfl_xor_sync(kWholeWarp, largest, distance));
  }
  const int own_warp = warp();
  if (lane() == 0) largest_of[own_warp] = largest;
  __syncthreads();
  for (int other = 0; other < kCodesWarps; ++other) largest = max(largest, largest_of[other]);

  constexpr float kLift = 0x1p100F;
  const float absmax = __uint_as_float(largest);
  const float lift = absmax < 1.0F / kLift ? kLift : 1.0F;
  const bool usable = largest != 0 && largest < 0x7F800000U;
  const float by = usable ? __fdiv_rn(127.0F, __fmul_rn(absmax, lift)) : 0.0F;
  if (threadIdx.x == 0) {
    const float step = usable ? __fdiv_rn(__fmul_rn(absmax, lift), 127.0F) : 0.0F;
    scale[index] = {largest < 0x7F800000U ? step : __uint_as_float(0x7FC00000U), lift == 1.0F ? 1.0F : 1.0F / kLift};
  }
  for (int64_t at = begin; at < padded; at += kCodesThreads * kRun) {
    float values[kRun];
    load_run(row, at, cols, aligned, values);
    drop_outliers(outliers, at, values);
    uint32_t bytes[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const uint32_t code = usable ? __float_as_uint(__fmaf_rn(__fmul_rn(values[i], lift), by, kShifted)) & 0xFFU : 0U;
      bytes[i / 4] |= code << (8 * (i % 4));
    }
    if (swapped) {
#pragma unroll
      for (int half = 0; half < 2; ++half) bytes[half] = __byte_perm(bytes[half], 0, 0x2301);
    }
    *reinterpret_cast<uint2*>(codes + index * padded + at) = make_uint2(bytes[0], bytes[1]);
  }
}

// ---- rows of W ------------------------------------------------------------------------------------------------------

// Codes [rows][padded] and scales [rows][padded / kStep] of rows of W from `first` on; a step a warp, blocks: (rows,
// steps / kCodesWarps). For weights whose rows do not begin at a multiple of 16 bytes: as they come, an element a time.
__global__ void __launch_bounds__(kCodesThreads)
    code_weight(Weight weight, int64_t first, int64_t padded, uint8_t* codes, float* scale) {
  const int64_t row = first + blockIdx.x;
  const int64_t step = static_cast<int64_t>(blockIdx.y) * kCodesWarps + warp();
  const int64_t steps = padded / kStep;
  if (step >= steps) return;
  const int64_t at = step * kStep + lane() * 4;
  const int64_t flat = row * weight.cols + at;
  uint32_t bytes = 0;
  float by;
  if (weight.is_int8()) {
    by = __fdiv_rn(weight.rows8.absmax[row], 127.0F);
    for (int i = 0; i < 4; ++i) {
      if (at + i < weight.cols) bytes |= (static_cast<uint32_t>(weight.rows8.q[flat + i]) & 0xFFU) << (8 * i);
    }
  } else {
    const Packed4& from = weight.packed4;
    float scales[4];
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scales[i] = at + i < weight.cols ? from.scales.at((flat + i) >> from.block_shift) : 0.0F;
      largest = max(largest, __float_as_uint(scales[i]) & 0x7FFFFFFFU);
    }
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      largest = max(largest, __shfl_xor_sync(kWholeWarp, largest, distance));
    }
    bool usable;
    by = step_of(largest, __fdiv_rn(largest_magnitude(from.codebook), 127.0F), &usable);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!usable || at + i >= weight.cols) continue;
      const int code = (from.packed[(flat + i) >> 1] >> (((flat + i) & 1) != 0 ? 0 : 4)) & 15;
      const float rounded = __fmaf_rn(from.codebook[code], __fdiv_rn(scales[i], by), kShifted);
      bytes |= (__float_as_uint(rounded) & 0xFFU) << (8 * i);
    }
  }
  *reinterpret_cast<uint32_t*>(codes + static_cast<int64_t>(blockIdx.x) * padded + at) = bytes;
  if (lane() == 0) scale[static_cast<int64_t>(blockIdx.x) * steps + step] = by;
}

}  // namespace nybble::cuda
