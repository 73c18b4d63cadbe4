// The side path of linear_mma.cu, added to the sums of a tile: by the tensor cores (bf16) or in fp32 (fp16).
#pragma once
#include "cuda/linear_mma.cuh"

namespace nybble::cuda::mma_tiles {

// bf16: more steps, left in the place of x and right in that of the weight, both rounded to bf16.
template <class T, bool Grad, int Rows>
__device__ __forceinline__ void multiply_side(float (&sums)[Shape<Rows>::kSums], const Fragments<Grad, Rows>& at,
                                              const LinearArgs& args, int64_t row, int64_t column) {
  unsigned char* input = shared_memory() + kInputAt;
  unsigned char* weight = shared_memory() + kWeightAt;
  const SidePath& side = args.side;
  const int64_t columns = args.columns();
  const bool left_aligned = side.rank % 8 == 0 && aligned_16(side.left);
  const bool right_aligned = (Grad ? columns : side.rank) % 8 == 0 && aligned_16(side.right);
#pragma unroll 1
  for (int64_t first = 0; first < side.rank; first += kDepth) {
    const int quarters = static_cast<int>(smaller(divide_up(side.rank - first, 16), 4));
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < Rows * quarters * 2; i += kThreads) {
      const int line = i / (quarters * 2), chunk = i % (quarters * 2);
      const int64_t r = first + chunk * 8;
      const int count = row + line < args.m ? static_cast<int>(smaller(side.rank - r, 8)) : 0;
      *reinterpret_cast<uint4*>(input + short_line(line, chunk)) =
          load_numbers_8<T>(side.left, side.left_dtype, (row + line) * side.rank + r, count, left_aligned);
    }
    constexpr int kChunks = kColumns / 8;
    const int lines = Grad ? quarters * 16 : kColumns, chunks = Grad ? kChunks : quarters * 2;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < lines * chunks; i += kThreads) {
      const int line = i / chunks, chunk = i % chunks;
      // Line and place of right, a matrix [rank, columns] or [columns, rank].
      const int64_t down = (Grad ? first : column) + line, along = (Grad ? column : first) + chunk * 8;
      const int64_t height = Grad ? side.rank : columns, width = Grad ? columns : side.rank;
      const int count = down < height ? static_cast<int>(smaller(width - along, 8)) : 0;
      *reinterpret_cast<uint4*>(weight + weight_chunk<Grad>(line, chunk)) =
          load_numbers_8<T>(side.right, side.right_dtype, down * width + along, count, right_aligned);
    }
    __syncthreads();
#pragma unroll 1
    for (int quarter = 0; quarter < quarters; ++quarter) {
      multiply_quarter<T, Grad, Rows>(sums, at, input, weight, quarter);
    }
    __syncthreads();
  }
}

// fp16: in fp32, because left may be a number beyond fp16's range.
template <bool Grad, int Rows>
__device__ __forceinline__ void add_side(float (&sums)[Shape<Rows>::kSums], const LinearArgs& args, int64_t row,
                                         int64_t column) {
  using S = Shape<Rows>;
  constexpr int kRanks = 32;
  constexpr int kLeftLine = Rows + 2, kRightLine = kColumns + 2;  // floats
  float* left = reinterpret_cast<float*>(shared_memory() + kWeightAt);
  float* right = left + kRanks * kLeftLine;
  const SidePath& side = args.side;
  const int64_t columns = args.columns();
  const int down = warp() / S::kWarpsAcross * S::kDown * 16 + lane() / 4;
  const int across = warp() % S::kWarpsAcross * S::kAcross * 8 + lane() % 4 * 2;
#pragma unroll 1
  for (int64_t first = 0; first < side.rank; first += kRanks) {
    const int ranks = static_cast<int>(smaller(side.rank - first, kRanks));
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < Rows * kRanks; i += kThreads) {
      const int line = i / kRanks, r = i % kRanks;
      const bool valid = row + line < args.m && r < ranks;
      left[r * kLeftLine + line] =
          valid ? element(side.left, side.left_dtype, (row + line) * side.rank + first + r) : 0;
    }
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kColumns * kRanks; i += kThreads) {
      const int line = Grad ? i % kColumns : i / kRanks, r = Grad ? i / kColumns : i % kRanks;
      const bool valid = column + line < columns && r < ranks;
      const int64_t at = Grad ? (first + r) * columns + column + line : (column + line) * side.rank + first + r;
      right[r * kRightLine + line] = valid ? element(side.right, side.right_dtype, at) : 0;
    }
    __syncthreads();
#pragma unroll 1
    for (int r = 0; r < ranks; ++r) {
#pragma unroll
      for (int j = 0; j < S::kAcross; ++j) {
        const float2 b = *reinterpret_cast<const float2*>(right + r * kRightLine + across + j * 8);
#pragma unroll
        for (int i = 0; i < S::kDown; ++i) {
          const float high = left[r * kLeftLine + down + i * 16], low = left[r * kLeftLine + down + i * 16 + 8];
          float* d = &sums[(i * S::kAcross + j) * 4];
          d[0] = __fmaf_rn(high, b.x, d[0]);
          d[1] = __fmaf_rn(high, b.y, d[1]);
          d[2] = __fmaf_rn(low, b.x, d[2]);
          d[3] = __fmaf_rn(low, b.y, d[3]);
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace nybble::cuda::mma_tiles
