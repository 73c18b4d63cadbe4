// What linear_small_m does with a tile's sums: the side path, int8's scales, warps and blocks added up, bias, output.
#pragma once
#include <type_traits>

#include "cuda/small_m.cuh"

namespace nybble::cuda {

// Numbers of a matrix of any dtype, 0 where not `valid`. All loads come before the first use of one.
template <int kCount>
__device__ __forceinline__ void load_values(const void* from, DType dtype, const int64_t (&index)[kCount],
                                            const bool (&valid)[kCount], float (&out)[kCount]) {
  if (dtype == DType::f32) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = valid[i] ? __ldg(static_cast<const float*>(from) + index[i]) : 0.0F;
    return;
  }
  uint32_t bits[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) bits[i] = valid[i] ? __ldg(static_cast<const uint16_t*>(from) + index[i]) : 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = (dtype == DType::bf16 ? unpack<Bf16>(bits[i]) : unpack<F16>(bits[i])).x;
}

// Elements first + 0, 1, 8, 9 (`pairs`) or + 0, 1, 2, 3 of two rows of a matrix of `rank` columns and `rows` rows.
__device__ __forceinline__ void load_rows(const void* from, DType dtype, int64_t rank, int64_t rows, int64_t row,
                                          int64_t other, int64_t first, bool pairs, float (&out)[8]) {
  int64_t index[8];
  bool valid[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int64_t at = i < 4 ? row : other;
    const int64_t column = first + (pairs && i % 4 >= 2 ? i % 4 + 6 : i % 4);
    index[i] = at * rank + column;
    valid[i] = at < rows && column < rank;
  }
  load_values(from, dtype, index, valid, out);
}

// 16 rows of W's side: sums += right . left^T, as the product of two spans is held. bf16: as more of k. fp16: in fp32,
// since left may be beyond fp16's range.
template <class S>
__device__ __forceinline__ void add_side(const Work& work, int64_t row, float (&sums)[S::kGroups][4]) {
  const SidePath& side = work.side;
  const int64_t rows = work.weight.rows;
  const int64_t rank = side.rank;
  float right[8], left[8];
  if constexpr (std::is_same_v<typename S::T, Bf16>) {
    for (int64_t k = 2 * in_quad(); k - 2 * in_quad() < rank; k += 16) {
      load_rows(side.right, side.right_dtype, rank, rows, row + quad(), row + quad() + 8, k, true, right);
      const uint32_t a[4] = {pack<Bf16>(right[0], right[1]), pack<Bf16>(right[4], right[5]),
                             pack<Bf16>(right[2], right[3]), pack<Bf16>(right[6], right[7])};
      load_rows(side.left, side.left_dtype, rank, work.m, quad(), S::kGroups == 2 ? quad() + 8 : work.m, k, true, left);
#pragma unroll
      for (int group = 0; group < S::kGroups; ++group) {
        const uint32_t b[2] = {pack<Bf16>(left[4 * group], left[4 * group + 1]),
                               pack<Bf16>(left[4 * group + 2], left[4 * group + 3])};
        multiply<Bf16>(sums[group], a, b);
      }
    }
  } else {
    for (int64_t k = 0; k < rank; k += 4) {
      load_rows(side.right, side.right_dtype, rank, rows, row + quad(), row + quad() + 8, k, false, right);
#pragma unroll
      for (int group = 0; group < S::kGroups; ++group) {
        const int column = 8 * group + 2 * in_quad();
        load_rows(side.left, side.left_dtype, rank, work.m, column, column + 1, k, false, left);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            sums[group][i] = __fmaf_rn(right[i / 2 * 4 + j], left[i % 2 * 4 + j], sums[group][i]);
          }
        }
      }
    }
  }
}

// A warp's share of the side path of a tile: of every `warps`-th 16 rows.
template <class S>
__device__ __forceinline__ void add_side_of_tile(const Work& work, int tile, int rank, int warps,
                                                 float (&total)[S::kTiles][S::kGroups][4]) {
  for (int i = rank; i < S::kTiles; i += warps) {
    float sums[S::kGroups][4] = {};
    add_side<S>(work, static_cast<int64_t>(tile) * S::kRows + 16 * i, sums);
#pragma unroll
    for (int other = 0; other < S::kTiles; ++other) {
      if (other == i) add_scaled<S>(sums, 1.0F, 1.0F, total[other]);
    }
  }
}

template <class S>
__device__ __forceinline__ void scale_int8(const Work& work, int tile, float (&total)[S::kTiles][S::kGroups][4]) {
#pragma unroll
  for (int i = 0; i < 2 * S::kTiles; ++i) {
    const int64_t row = static_cast<int64_t>(tile) * S::kRows + 8 * i + quad();
    const float scale = row < work.weight.rows ? __fdiv_rn(__ldg(work.weight.rows8.absmax + row), 127.0F) : 0.0F;
#pragma unroll
    for (int group = 0; group < S::kGroups; ++group) {
      float (&sums)[4] = total[i / 2][group];
      sums[i % 2 * 2] = __fmul_rn(sums[i % 2 * 2], scale);
      sums[i % 2 * 2 + 1] = __fmul_rn(sums[i % 2 * 2 + 1], scale);
    }
  }
}

// A warp's sums of a tile, into a slot of its own.
template <class S>
__device__ __forceinline__ void write_sums(unsigned char* slot, float (&total)[S::kTiles][S::kGroups][4]) {
  const auto row = static_cast<uint32_t>(quad());
  const auto t = static_cast<uint32_t>(in_quad());
#pragma unroll
  for (uint32_t tile = 0; tile < S::kTiles; ++tile) {
    if constexpr (S::kSpread) {
      float (&sums)[4] = total[tile][0];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(kWholeWarp, sums[i], 1));
        sums[i] = __fadd_rn(sums[i], __shfl_xor_sync(kWholeWarp, sums[i], 2));
      }
      const float mine = t < 2 ? (t == 0 ? sums[0] : sums[1]) : (t == 2 ? sums[2] : sums[3]);
      *reinterpret_cast<float*>(slot + sum_offset<S>(16 * tile + row + t / 2 * 8, t % 2)) = mine;
    } else {
#pragma unroll
      for (uint32_t group = 0; group < S::kGroups; ++group) {
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
          *reinterpret_cast<float*>(slot + sum_offset<S>(16 * tile + row + i / 2 * 8, 8 * group + 2 * t + i % 2)) =
              total[tile][group][i];
        }
      }
    }
  }
}

template <class S>
__device__ __forceinline__ void store(const Work& work, int64_t row, int column, float sum) {
  if (row >= work.weight.rows) return;
  if (work.bias != nullptr) {
    float bias[1];
    load_values<1>(work.bias, work.bias_dtype, {row}, {true}, bias);
    sum = __fadd_rn(sum, bias[0]);
  }
  work.out[column * work.weight.rows + row] = static_cast<uint16_t>(pack<typename S::T>(sum, 0.0F));
}

// The sums of `warps` slots that lie at `offsets`, in their order, and of all blocks that have a part of the tile.
template <class S>
__device__ __forceinline__ void finish_tile(const Work& work, unsigned char* shared, const uint32_t* offsets, int warps,
                                            uint32_t* came_last, int tile) {
  const int begin = tile * work.chunks;
  const int first = begin / work.per_block;
  const int last = (begin + work.chunks - 1) / work.per_block;
  const int threads = static_cast<int>(blockDim.x);
  constexpr int kSums = S::kRows * S::kColumns;
  // A block has at most two parts of tiles: one of the tile where its units begin, one of that where they end. The
  // latter is what the first of the blocks has of this one, unless its units begin with the tile.
  float* parts = work.partials;
  const int first_part = 2 * first + (first * work.per_block < begin ? 1 : 0);
  const int count = work.m * S::kRows;
  const int block = static_cast<int>(blockIdx.x);
  float* mine = first == last ? nullptr : parts + int64_t{kSums} * (block == first ? first_part : 2 * block);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += threads) {
    const int column = i / S::kRows;
    const int row = i % S::kRows;
    const uint32_t at = sum_offset<S>(static_cast<uint32_t>(row), static_cast<uint32_t>(column));
    float sum = 0.0F;
    for (int j = 0; j < warps; ++j) sum = __fadd_rn(sum, *reinterpret_cast<const float*>(shared + offsets[j] + at));
    if (mine != nullptr) {
      mine[i] = sum;
    } else {
      store<S>(work, static_cast<int64_t>(tile) * S::kRows + row, column, sum);
    }
  }
  if (mine == nullptr) return;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *came_last = atomicAdd(work.counters + first, 1U) == static_cast<uint32_t>(last - first);
  __syncthreads();
  if (*came_last == 0) return;
  __threadfence();
  if (threadIdx.x == 0) work.counters[first] = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += threads) {
    float sum = parts[int64_t{kSums} * first_part + i];
#pragma unroll 4
    for (int other = first + 1; other <= last; ++other) sum = __fadd_rn(sum, parts[int64_t{2 * kSums} * other + i]);
    store<S>(work, static_cast<int64_t>(tile) * S::kRows + i % S::kRows, i / S::kRows, sum);
  }
}

}  // namespace nybble::cuda
