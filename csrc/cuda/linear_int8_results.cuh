// What comes after the integers: the side path and outlier columns, multiplied in fp32, and the way to `out`.
#pragma once
#include "cuda/linear_int8.cuh"

namespace nybble::cuda {

constexpr int kOutStride = 36;
constexpr int kBatch = 4;  // times 8 rows of x that are turned at a time

// ---- what is not rounded --------------------------------------------------------------------------------------------

// sums += left . right^T, `count` columns of which lie in shared memory: [kXRows] and [kRows][kExtraStride].
template <class T>
__device__ __forceinline__ void add_products(const float* left, const float* right, int count,
                                             float (&sums)[T::kXRows / 8][T::kOwn / 2][4]) {
  const int g = lane() / 4, t = lane() % 4;
  left += 2 * t * kExtraStride;
  right += (warp() * T::kWarpRows + g) * kExtraStride;
#pragma unroll 1
  for (int at = 0; at < count; at += 4) {
    float4 w[T::kOwn];
#pragma unroll
    for (int own = 0; own < T::kOwn; ++own) {
      w[own] = *reinterpret_cast<const float4*>(right + 8 * own * kExtraStride + at);
    }
#pragma unroll
    for (int j = 0; j < T::kXRows / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float4 x = *reinterpret_cast<const float4*>(left + (8 * j + e) * kExtraStride + at);
#pragma unroll
        for (int own = 0; own < T::kOwn; ++own) {
          float& sum = sums[j][own / 2][own % 2 * 2 + e];
          sum = __fmaf_rn(x.x, w[own].x, sum);
          sum = __fmaf_rn(x.y, w[own].y, sum);
          sum = __fmaf_rn(x.z, w[own].z, sum);
          sum = __fmaf_rn(x.w, w[own].w, sum);
        }
      }
    }
  }
}

// The side path (`outliers` false), or the outlier columns of x and W.
template <class T>
__device__ __forceinline__ void add_extra(const Int8Job& job, bool outliers, int x_row, int w_row, float* shared,
                                          float (&sums)[T::kXRows / 8][T::kOwn / 2][4]) {
  const LinearArgs& args = job.args;
  const SidePath& side = args.side;
  const int64_t columns = outliers ? *job.outliers.count : side.rank;
  float* left = shared;
  float* right = shared + T::kXRows * kExtraStride;
#pragma unroll 1
  for (int64_t at = 0; at < columns; at += kExtra) {
    const int count = static_cast<int>(smaller(kExtra, columns - at));
    __syncthreads();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < (T::kXRows + T::kRows) * kExtra; i += kThreads) {
      const int row = i / kExtra, column = i % kExtra;
      const bool is_x = row < T::kXRows;
      const int from = is_x ? x_row + row : w_row + row - T::kXRows;
      float value = 0.0F;
      if (column < count && from < (is_x ? job.x_rows : job.w_rows)) {
        const int64_t which = outliers ? job.outliers.list[at + column] : at + column;
        if (is_x) {
          const int64_t m = job.first_x + from;
          value = outliers ? element(args.x, args.dtype, m * args.x_stride + which)
                           : element(side.left, side.left_dtype, m * side.rank + which);
        } else {
          const int64_t n = job.first_w + from;
          value = outliers ? weight_at(args.weight, n, which)
                           : element(side.right, side.right_dtype, n * side.rank + which);
        }
      }
      (is_x ? left + row * kExtraStride : right + (row - T::kXRows) * kExtraStride)[column] = value;
    }
    __syncthreads();
    add_products<T>(left, right, (count + 3) / 4 * 4, sums);
  }
}

// ---- results --------------------------------------------------------------------------------------------------------

template <int kCount>
__device__ __forceinline__ void store_wide(void* out, DType dtype, int64_t at, const float (&values)[kCount]) {
  if (dtype == DType::f32) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      *reinterpret_cast<float4*>(static_cast<float*>(out) + at + i) =
          make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
    }
    return;
  }
  uint32_t pairs[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    pairs[i] = dtype == DType::bf16 ? pack<Bf16>(values[2 * i], values[2 * i + 1])
                                    : pack<F16>(values[2 * i], values[2 * i + 1]);
  }
  void* to = static_cast<uint16_t*>(out) + at;
  if constexpr (kCount == 8) {
    *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  } else {
    *reinterpret_cast<uint2*>(to) = make_uint2(pairs[0], pairs[1]);
  }
}

__device__ __forceinline__ void store_one(void* out, DType dtype, int64_t at, float value) {
  if (dtype == DType::f32) {
    static_cast<float*>(out)[at] = value;
  } else {
    static_cast<uint16_t*>(out)[at] =
        static_cast<uint16_t>(dtype == DType::bf16 ? pack<Bf16>(value, 0.0F) : pack<F16>(value, 0.0F));
  }
}

// Some rows of x at a time through a warp's own shared memory, so that a lane has neighbours of a row of `out`.
template <class T>
__device__ __forceinline__ void store_sums(const Int8Job& job, int x_row, int w_row, float* shared,
                                           const float (&sums)[T::kXRows / 8][T::kOwn / 2][4]) {
  constexpr int kPer = T::kWarpRows / 4;  // of a lane
  const LinearArgs& args = job.args;
  const int g = lane() / 4, t = lane() % 4;
  const int column = w_row + warp() * T::kWarpRows + t * kPer;  // of this launch
  float* mine = shared + warp() * 8 * kBatch * kOutStride;
  float bias[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    bias[i] = args.bias != nullptr && column + i < job.w_rows
                  ? element(args.bias, args.bias_dtype, job.first_w + column + i)
                  : 0.0F;
  }
#pragma unroll
  for (int first = 0; first < T::kXRows / 8; first += kBatch) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
#pragma unroll
      for (int i = 0; i < T::kOwn / 2; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          mine[(8 * j + 2 * t + e % 2) * kOutStride + 16 * i + g + e / 2 * 8] = sums[first + j][i][e];
        }
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int j = 0; j < kBatch; ++j) {
      const int row = x_row + 8 * (first + j) + g;
      if (row >= job.x_rows || column >= job.w_rows) break;
      float values[kPer];
#pragma unroll
      for (int i = 0; i < kPer; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(mine + (8 * j + g) * kOutStride + t * kPer + i);
        values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
      }
#pragma unroll
      for (int i = 0; i < kPer; ++i) values[i] = __fadd_rn(values[i], bias[i]);
      const int64_t at = (job.first_x + row) * args.weight.rows + job.first_w + column;
      if (job.wide_stores && column + kPer <= job.w_rows) {
        store_wide(args.out, args.dtype, at, values);
      } else {
#pragma unroll
        for (int i = 0; i < kPer; ++i) {
          if (column + i < job.w_rows) store_one(args.out, args.dtype, at + i, values[i]);
        }
      }
    }
  }
}

}  // namespace nybble::cuda
