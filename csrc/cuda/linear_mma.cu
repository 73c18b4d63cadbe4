// Linear layers through the tensor cores of a warp (sm_80): bf16 and fp16, both directions, any sizes and alignment.
//
//   out[rows of x, columns] = x . W^T   W tile [128 columns of out][64 k]    lines of 64 elements, read as they lie
//                           = g . W     W tile [64 k][128 columns of out]    lines of 128 elements, read transposed
//
// x is the 16-row operand, so that out leaves in its own order. A block of 4 warps has 16, 64 or 128 rows of x and 128
// columns; in a step of 64 k each thread decodes two units of 32 weights into one of two tiles while the other is
// multiplied: one barrier a step. Packed bytes and x come by asynchronous copies, the bytes into a ring that each
// thread reads back itself.
//
// Counted for 128 rows, one step: 2^20 products, 1024 cycles of an A100's tensor cores; shared memory is busy for 512
// (fragments) + 256 (look-ups) + 128 (decoded tile) + 128 (x) + 64 (bytes) = 1088; 4.5 instructions a weight are 290
// issue slots of each scheduler.
#include "cuda/launch.cuh"
#include "cuda/tiles.cuh"
#include "cuda/weights.cuh"

namespace nybble::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 128;
constexpr int kDepth = 64;
constexpr int kWeightTile = kColumns * kDepth * 2;  // bytes
constexpr int kUnit = 32;                           // weights: 16 bytes, or 32 of int8
constexpr int kUnits = kColumns * kDepth / kUnit / kThreads;

// What lies where in shared memory; the ring of bytes comes last.
constexpr int kTableAt = 0;
constexpr int kMapAt = kTableAt + kCodeTable * 4;
constexpr int kBiasAt = kMapAt + kScaleMap * 4;
constexpr int kWeightAt = kBiasAt + kColumns * 4;
constexpr int kInputAt = kWeightAt + 2 * kWeightTile;

template <int Rows>
struct Shape {
  static constexpr int kWarpsDown = Rows >= 128 ? 2 : 1;
  static constexpr int kWarpsAcross = 4 / kWarpsDown;
  static constexpr int kDown = Rows / kWarpsDown / 16;         // mma tiles of a warp
  static constexpr int kAcross = kColumns / kWarpsAcross / 8;  // likewise
  static constexpr int kStages = Rows >= 128 ? 2 : 3;          // two blocks in an A100's 164 KB; three of 16 rows
  static constexpr int kBlocks = Rows >= 64 ? 2 : 3;
  static constexpr int kInputTile = Rows * kDepth * 2;
  static constexpr int kRingAt = kInputAt + kStages * kInputTile;
  static constexpr int kSums = kDown * kAcross * 4;
};

struct Plan {
  int64_t row_tiles, column_tiles;
  int parts;
  bool vector_x, vector_out;
  bool units;  // every unit lies in one row and block, at an address that 16 divides
};

// Byte of 16-byte chunk `chunk` of a line, so that neither the eight lines of an ldmatrix nor the eight lanes that
// store a decoded chunk at once meet in a bank.
__device__ __forceinline__ int short_line(int line, int chunk) { return line * 128 + ((chunk ^ (line & 7)) << 4); }
__device__ __forceinline__ int long_line(int line, int chunk) {
  return line * 256 + ((chunk ^ (line & 7) ^ ((chunk >> 3) << 1)) << 4);
}

template <bool Grad>
__device__ __forceinline__ int weight_chunk(int line, int chunk) {
  return Grad ? long_line(line, chunk) : short_line(line, chunk);
}

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

// ---- products -------------------------------------------------------------------------------------------------------

// Where a lane reads the operands of its warp's products, in a tile of x and of the weight.
template <bool Grad, int Rows>
struct Fragments {
  int a, b;

  __device__ __forceinline__ Fragments() {
    using S = Shape<Rows>;
    const int matrix = lane() / 8, line = lane() % 8;
    const int down = warp() / S::kWarpsAcross * S::kDown * 16, across = warp() % S::kWarpsAcross * S::kAcross;
    a = short_line(down + (matrix & 1) * 8 + line, matrix >> 1);
    b = Grad ? long_line((matrix & 1) * 8 + line, across + (matrix >> 1))
             : short_line((across + (matrix >> 1)) * 8 + line, matrix & 1);
  }
};

// sums += x tile . W tile over 16 k, the `quarter`th of a step. Chunks two apart, of k as of transposed columns, differ
// in bits that the swizzle leaves apart: an exclusive or with them.
template <class T, bool Grad, int Rows>
__device__ __forceinline__ void multiply_quarter(float (&sums)[Shape<Rows>::kSums], const Fragments<Grad, Rows>& at,
                                                 const unsigned char* input, const unsigned char* weight, int quarter) {
  using S = Shape<Rows>;
  uint32_t a[S::kDown][4];
#pragma unroll
  for (int i = 0; i < S::kDown; ++i) load_matrices(a[i], input + (at.a ^ (quarter << 5)) + i * 16 * 128);
#pragma unroll
  for (int j = 0; j < S::kAcross; j += 2) {
    uint32_t b[4];
    if (Grad) {
      load_matrices_transposed(b, weight + (at.b ^ (j << 4)) + quarter * 16 * 256);
    } else {
      load_matrices(b, weight + (at.b ^ (quarter << 5)) + j * 8 * 128);
    }
    const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
    for (int i = 0; i < S::kDown; ++i) {
      float (&d)[4] = *reinterpret_cast<float (*)[4]>(&sums[(i * S::kAcross + j) * 4]);
      float (&e)[4] = *reinterpret_cast<float (*)[4]>(&sums[(i * S::kAcross + j + 1) * 4]);
      multiply<T>(d, a[i], low);
      multiply<T>(e, a[i], high);
    }
  }
}

// The steps of one part of the contraction. While one is multiplied the next is decoded, the bytes of that after the
// next and the x of later ones are on their way: copies come in groups, of the x of a step and the bytes of the next.
template <class T, bool Grad, int Rows>
__device__ __forceinline__ void multiply_steps(float (&sums)[Shape<Rows>::kSums], const Fragments<Grad, Rows>& at,
                                               const Decoder<T, Grad, Rows>& decoder, const Input<T, Rows>& x,
                                               bool units) {
  constexpr int kStages = Shape<Rows>::kStages;
  unsigned char* shared = shared_memory();
  const int begin = decoder.begin, end = decoder.end;
  const bool int8 = decoder.weight.is_int8();
  const auto input = [&](int step) { return shared + kInputAt + step % kStages * Shape<Rows>::kInputTile; };
  const auto tile = [&](int step) { return shared + kWeightAt + step % 2 * kWeightTile; };
  const auto fetch = [&](int step) {
    if (step >= begin && step < end) x.fetch(step, input(step));
    if (units && step + 1 < end) decoder.fetch(step + 1);
    copy_async_commit();
  };
  StoredScale stored[kUnits] = {};
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    if (units) stored[unit] = decoder.fetch_scale(begin, unit);
  }
  // Before the first step nothing is multiplied, only decoded.
#pragma unroll 1
  for (int step = begin - kStages; step < end; ++step) {
    if (step < begin - 1) {
      fetch(step + kStages - 1);
      continue;
    }
    copy_async_wait<kStages - 2>();
    __syncthreads();
    fetch(step + kStages - 1);
    unsigned char* next = tile(step + 1);
    if (units && !int8 && step >= begin && step + 1 < end) {
      // In one run of instructions, so that tensor cores and look-ups are busy at the same time.
      uint4 codes = make_uint4(0, 0, 0, 0);
      float by = 0.0F;
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        multiply_quarter<T, Grad, Rows>(sums, at, input(step), tile(step), quarter);
        decoder.template decode<false>(step + 1, quarter, stored, codes, by, next);
      }
      continue;
    }
    if (step >= begin) {
#pragma unroll 1
      for (int quarter = 0; quarter < 4; ++quarter) {
        multiply_quarter<T, Grad, Rows>(sums, at, input(step), tile(step), quarter);
      }
    }
    if (step + 1 == end) break;
    if (!units) {
      decoder.decode_any(step + 1, next);
    } else if (int8) {
      decoder.template decode_tile<true>(step + 1, stored, next);
    } else {
      decoder.template decode_tile<false>(step + 1, stored, next);
    }
  }
  copy_async_wait<0>();
  __syncthreads();
}

// ---- the side path --------------------------------------------------------------------------------------------------

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

// ---- the output -----------------------------------------------------------------------------------------------------

// Adds the bias, rounds and stores, by way of shared memory: so that the lanes of a store lie side by side.
template <class T, int Rows>
__device__ __forceinline__ void store(const float (&sums)[Shape<Rows>::kSums], const LinearArgs& args, const Plan& plan,
                                      int64_t row, int64_t column) {
  using S = Shape<Rows>;
  constexpr int kLine = kColumns * 2 + 16;  // bytes: rows of a store are 4 banks apart
  unsigned char* shared = shared_memory();
  unsigned char* staged = shared + kWeightAt;
  const float* bias = reinterpret_cast<const float*>(shared + kBiasAt);
  const int down = warp() / S::kWarpsAcross * S::kDown * 16 + lane() / 4;
  const int across = warp() % S::kWarpsAcross * S::kAcross * 8 + lane() % 4 * 2;
#pragma unroll
  for (int j = 0; j < S::kAcross; ++j) {
    const float2 add = *reinterpret_cast<const float2*>(bias + across + j * 8);
#pragma unroll
    for (int i = 0; i < S::kDown; ++i) {
      const float* d = &sums[(i * S::kAcross + j) * 4];
      unsigned char* at = staged + (down + i * 16) * kLine + (across + j * 8) * 2;
      *reinterpret_cast<uint32_t*>(at) = pack<T>(__fadd_rn(d[0], add.x), __fadd_rn(d[1], add.y));
      *reinterpret_cast<uint32_t*>(at + 8 * kLine) = pack<T>(__fadd_rn(d[2], add.x), __fadd_rn(d[3], add.y));
    }
  }
  __syncthreads();
  const int64_t columns = args.columns();
  uint16_t* out = static_cast<uint16_t*>(args.out);
  if (plan.vector_out) {
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < Rows * kColumns / 8; i += kThreads) {
      const int line = i / (kColumns / 8), place = i % (kColumns / 8) * 8;
      if (row + line >= args.m || column + place >= columns) continue;
      *reinterpret_cast<uint4*>(out + (row + line) * columns + column + place) =
          *reinterpret_cast<const uint4*>(staged + line * kLine + place * 2);
    }
    return;
  }
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < Rows * kColumns; i += kThreads) {
    const int line = i / kColumns, place = i % kColumns;
    if (row + line >= args.m || column + place >= columns) continue;
    out[(row + line) * columns + column + place] =
        *reinterpret_cast<const uint16_t*>(staged + line * kLine + place * 2);
  }
}

template <class T, bool Grad, int Rows>
__global__ void __launch_bounds__(kThreads, Shape<Rows>::kBlocks)
    multiply_tiles(const LinearArgs args, const Plan plan, unsigned char* workspace) {
  unsigned char* shared = shared_memory();
  int64_t row_tile, column_tile;
  place_of(blockIdx.x, plan.row_tiles, plan.column_tiles, &row_tile, &column_tile);
  const int64_t row = row_tile * Rows, column = column_tile * kColumns;
  const int part = static_cast<int>(blockIdx.y);
  const int steps = static_cast<int>(divide_up(args.contraction(), kDepth));
  float* bias = reinterpret_cast<float*>(shared + kBiasAt);
  const int64_t mine = column + static_cast<int>(threadIdx.x);
  bias[threadIdx.x] = args.bias != nullptr && mine < args.columns() ? element(args.bias, args.bias_dtype, mine) : 0.0F;
  float sums[Shape<Rows>::kSums] = {};
  const Fragments<Grad, Rows> at;
  if (steps > 0) {
    if (!args.weight.is_int8()) {
      fill_code_table(reinterpret_cast<float*>(shared + kTableAt), args.weight.packed4.codebook);
      fill_scale_map(reinterpret_cast<float*>(shared + kMapAt), args.weight);
    }
    const Decoder<T, Grad, Rows> decoder(args.weight, column, first_step(steps, part, plan.parts),
                                         first_step(steps, part + 1, plan.parts));
    const Input<T, Rows> x(args, plan.vector_x, row);
    __syncthreads();
    multiply_steps<T, Grad, Rows>(sums, at, decoder, x, plan.units);
  } else {
    __syncthreads();
  }
  if (plan.parts > 1 && !sum_parts<kThreads>(sums, workspace, blockIdx.x, part, plan.parts,
                                             reinterpret_cast<uint32_t*>(shared + kTableAt))) {
    return;
  }
  if (args.side.rank > 0) {
    if constexpr (DTypeOf<T>::value == DType::bf16) {
      multiply_side<T, Grad, Rows>(sums, at, args, row, column);
    } else {
      add_side<Grad, Rows>(sums, args, row, column);
    }
  }
  store<T, Rows>(sums, args, plan, row, column);
}

template <class T, bool Grad, int Rows>
Status run(const LinearArgs& args, const Device& device, const Place& place) {
  Plan plan;
  plan.row_tiles = divide_up(args.m, Rows);
  plan.column_tiles = divide_up(args.columns(), kColumns);
  plan.vector_x = aligned_16(args.x) && args.x_stride % 8 == 0 && args.contraction() % 8 == 0;
  plan.vector_out = aligned_16(args.out) && args.columns() % 8 == 0;
  plan.units = has_whole_units(args.weight);
  const int64_t tiles = plan.row_tiles * plan.column_tiles;
  const int64_t steps = divide_up(args.contraction(), kDepth);
  if (tiles > INT32_MAX) return bad_argument("m", args.m);
  if (steps > INT32_MAX - 8) return bad_argument(args.grad_input ? "out_features" : "in_features", args.contraction());
  plan.parts = parts_of(tiles, steps, int64_t{Rows} * kColumns * 4, Shape<Rows>::kBlocks, device);
  const size_t bytes = static_cast<size_t>(Shape<Rows>::kRingAt) + static_cast<size_t>(Shape<Rows>::kStages) * kUnits *
                                                                       kThreads * (args.weight.is_int8() ? 32 : 16);
  return launch<&multiply_tiles<T, Grad, Rows>>(dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(plan.parts)),
                                                kThreads, bytes, place, args, plan,
                                                static_cast<unsigned char*>(place.workspace));
}

template <class T, bool Grad>
Status run_rows(const LinearArgs& args, const Device& device, const Place& place) {
  if (args.m <= 16) return run<T, Grad, 16>(args, device, place);
  if (args.m <= 64) return run<T, Grad, 64>(args, device, place);
  return run<T, Grad, 128>(args, device, place);
}

template <class T>
Status run_direction(const LinearArgs& args, const Device& device, const Place& place) {
  return args.grad_input ? run_rows<T, true>(args, device, place) : run_rows<T, false>(args, device, place);
}

}  // namespace

Status linear_mma(const LinearArgs& args, const Device& device, const Place& place) {
  return args.dtype == DType::bf16 ? run_direction<Bf16>(args, device, place) : run_direction<F16>(args, device, place);
}

}  // namespace nybble::cuda
