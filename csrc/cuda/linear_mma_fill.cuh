// What fills the tiles of linear_mma.cu: a thread's share of the weight, decoded, and of x, copied.
#pragma once
#include "cuda/linear_mma.cuh"

namespace nybble::cuda::mma_tiles {

// ---- the weight -----------------------------------------------------------------------------------------------------

// What a thread decodes of the tile of every step: units of 32 weights at a line and a place in it that stay the same.
template <class T, bool Grad, int Rows>
struct Decoder {
  static constexpr int kUnitsOfLine = (Grad ? kColumns : kDepth) / kUnit;
  static constexpr int kLines = kThreads / kUnitsOfLine;  // from one unit of a thread to the next

  const Weight& weight;
  const Scales scales;
  int64_t column;      // the tile's first of out
  int begin, end;      // of the steps
  int64_t first;       // the element that unit 0 of step 0 begins with
  int inside[kUnits];  // in how many steps, from step 0 on, a unit lies in the weight
  int stored_at;       // in the tile, of unit 0
  const float* table;
  uint32_t table_column;

  __device__ __forceinline__ Decoder(const Weight& w, int64_t at, int from, int to)
      : weight(w),
        scales(w, reinterpret_cast<const float*>(shared_memory() + kMapAt)),
        column(at),
        begin(from),
        end(to) {
    table = reinterpret_cast<const float*>(shared_memory() + kTableAt);
    // By a shuffle with itself, which hides where it comes from: the compiler would mask the thread's number anew in
    // every look-up, a fifth of its instructions.
    table_column = __shfl_sync(kWholeWarp, code_column(), lane());
    const int line = static_cast<int>(threadIdx.x) / kUnitsOfLine, place = static_cast<int>(threadIdx.x) % kUnitsOfLine;
    first = Grad ? line * weight.cols + column + place * kUnit : (column + line) * weight.cols + place * kUnit;
    stored_at = weight_chunk<Grad>(line, place * 4);
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const int64_t row = line + unit * kLines;
      const bool there = Grad ? column + place * kUnit < weight.cols : column + row < weight.rows;
      const int64_t left = Grad ? weight.rows - row : weight.cols - place * kUnit;
      inside[unit] = there && left > 0 ? static_cast<int>(divide_up(left, kDepth)) : 0;
    }
  }

  // The element that a unit begins with.
  __device__ __forceinline__ int64_t flat(int step, int unit) const {
    const int64_t of_step = Grad ? step * (kDepth * weight.cols) : int64_t{step} * kDepth;
    return first + of_step + unit * (kLines * weight.cols);
  }
  template <bool Int8>
  __device__ __forceinline__ unsigned char* ring_place(int step, int unit, int part) const {
    constexpr int kParts = Int8 ? 2 : 1;
    const int slot = step % Shape<Rows>::kStages * (kUnits * kThreads * kParts * 16);
    return shared_memory() + Shape<Rows>::kRingAt + slot +
           ((unit * kParts + part) * kThreads + static_cast<int>(threadIdx.x)) * 16;
  }

  // Starts to copy the bytes of a step to the ring, zeros for a unit outside.
  __device__ __forceinline__ void fetch(int step) const {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const bool valid = step < inside[unit];
      const int64_t from = flat(step, unit);
      if (weight.is_int8()) {
        copy_async_16(ring_place<true>(step, unit, 0), weight.rows8.q + from, valid);
        copy_async_16(ring_place<true>(step, unit, 1), weight.rows8.q + from + 16, valid);
      } else {
        copy_async_16(ring_place<false>(step, unit, 0), weight.packed4.packed + from / 2, valid);
      }
    }
  }

  // Starts to load the scale of a unit; 0 for one outside, whose codes are 0, which are codes like others.
  __device__ __forceinline__ StoredScale fetch_scale(int step, int unit) const {
    if (step >= inside[unit]) return scales.none();
    const int64_t line = static_cast<int>(threadIdx.x) / kUnitsOfLine + unit * kLines;
    return scales.load((Grad ? int64_t{step} * kDepth : column) + line, flat(step, unit));
  }

  // Quarter `quarter` of a thread's weights of a step, half a unit, into `tile`. A scale that is used up makes place
  // for that of the next step, which so has a whole step's time to come.
  template <bool Int8>
  __device__ __forceinline__ void decode(int step, int quarter, StoredScale (&stored)[kUnits], uint4& codes, float& by,
                                         unsigned char* tile) const {
    const int unit = quarter / 2, half = quarter % 2;
    if (half == 0) {
      by = scales.value(stored[unit]);
      if (step + 1 < end) stored[unit] = fetch_scale(step + 1, unit);
    }
    if (half == 0 || Int8) codes = *reinterpret_cast<const uint4*>(ring_place<Int8>(step, unit, Int8 ? half : 0));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float values[8];
      if (Int8) {
        int8_values_4(i == 0 ? codes.x : codes.z, values);
        int8_values_4(i == 0 ? codes.y : codes.w, values + 4);
      } else {
        const uint32_t word = half == 0 ? (i == 0 ? codes.x : codes.y) : (i == 0 ? codes.z : codes.w);
        decode_8(table, word, table_column, values);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = __fmul_rn(values[j], by);
      // Chunks of a unit differ in two bits, which the swizzle of its line leaves apart: an exclusive or with them.
      *reinterpret_cast<uint4*>(tile + (stored_at ^ ((half * 2 + i) << 4)) + unit * kLines * (Grad ? 256 : 128)) =
          pack_8<T>(values);
    }
  }
  template <bool Int8>
  __device__ __forceinline__ void decode_tile(int step, StoredScale (&stored)[kUnits], unsigned char* tile) const {
    uint4 codes = make_uint4(0, 0, 0, 0);
    float by = 0.0F;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) decode<Int8>(step, quarter, stored, codes, by, tile);
  }

  // All of a tile, of a weight that has no whole units.
  __device__ __forceinline__ void decode_any(int step, unsigned char* tile) const {
    constexpr int kChunks = (Grad ? kColumns : kDepth) / 8;
    const int64_t along = int64_t{step} * kDepth;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kWeightTile / 16; i += kThreads) {
      const int line = i / kChunks, chunk = i % kChunks;
      float values[8];
      decode_any_8(weight, (Grad ? along : column) + line, (Grad ? column : along) + chunk * 8, table, table_column,
                   values);
      *reinterpret_cast<uint4*>(tile + weight_chunk<Grad>(line, chunk)) = pack_8<T>(values);
    }
  }
};

// ---- x --------------------------------------------------------------------------------------------------------------

// What a thread copies of the tile of every step: a chunk of eight numbers of every 16th line.
template <class T, int Rows>
struct Input {
  static constexpr int kLines = kThreads / 8;
  static constexpr int kChunks = Rows / kLines;

  const uint16_t* first;  // of line 0 of step 0
  int64_t stride;
  int64_t contraction;
  bool vector;
  int lines;   // how many of its lines, from this one on, lie in x
  int inside;  // in how many steps, from step 0 on, the chunk does
  int stored_at;

  __device__ __forceinline__ Input(const LinearArgs& args, bool aligned, int64_t row)
      : stride(args.x_stride), contraction(args.contraction()), vector(aligned) {
    const int line = static_cast<int>(threadIdx.x) / 8, chunk = static_cast<int>(threadIdx.x) % 8;
    first = static_cast<const uint16_t*>(args.x) + (row + line) * stride + chunk * 8;
    lines = static_cast<int>(smaller(args.m - row, Rows)) - line;
    const int64_t left = contraction - chunk * 8;
    inside = left > 0 ? static_cast<int>(divide_up(left, kDepth)) : 0;
    stored_at = short_line(line, chunk);
  }

  __device__ __forceinline__ void fetch(int step, unsigned char* tile) const {
    const uint16_t* from = first + int64_t{step} * kDepth;
    if (vector) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        copy_async_16(tile + stored_at + i * kLines * 128, from + i * kLines * stride,
                      step < inside && i * kLines < lines);
      }
      return;
    }
    const int64_t left = contraction - int64_t{step} * kDepth - static_cast<int>(threadIdx.x) % 8 * 8;
#pragma unroll 1
    for (int i = 0; i < kChunks; ++i) {
      const int count = i * kLines < lines ? static_cast<int>(larger(smaller(left, 8), 0)) : 0;
      *reinterpret_cast<uint4*>(tile + stored_at + i * kLines * 128) =
          load_numbers_8<T>(from, DTypeOf<T>::value, i * kLines * stride, count, false);
    }
  }
};

}  // namespace nybble::cuda::mma_tiles
