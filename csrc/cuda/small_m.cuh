// The units of linear_small_m: their shape, copies, scales and products. linear_small_m.cu has the plan.
#pragma once
#include "cuda/decode.cuh"
#include "cuda/kernels.h"

namespace nybble::cuda {

// How columns are stored: blocks of 64 or more, blocks of 32, int8.
enum class Stored { four_bits, blocks_of_32, int8 };

constexpr int kMostWarps = 8;
constexpr int kUnitBytes = 8192;
constexpr int kCopies = kUnitBytes / 16 / kWarp;  // 16-byte copies of a lane for a unit
// Shared memory is seen as pairs of 128-byte lines. The table has the first line of each of its 256 pairs; a slot,
// which holds a unit, has one of both lines in 64 consecutive pairs.
constexpr int kPair = 256;
constexpr int kArea = 64 * kPair;  // two slots, or one beside 64 entries of the table
constexpr int kTableAreas = 4;
constexpr int kMap = 256 * 4;  // the table of nested scales
constexpr int kSmall = kMap + (kMostWarps + 1) * 4;

// `Columns`: rows of x that a unit serves. 2: the spans of a unit are spread over the 8 columns of one product.
template <class Element, Stored kStored_, int kColumns_>
struct Shape {
  using T = Element;
  static constexpr Stored kStored = kStored_;
  static constexpr bool kInt8 = kStored == Stored::int8;
  static constexpr int kColumns = kColumns_;
  static constexpr bool kSpread = kColumns == 2;
  static constexpr int kGroups = kColumns == 16 ? 2 : 1;  // of 8 columns
  static constexpr int kTiles = kColumns == 16 ? 8 : 4;   // of 16 rows
  static constexpr int kRows = 16 * kTiles;
  static constexpr int kPiece = kUnitBytes / kRows;  // bytes of a row
  static constexpr int kSpans = kPiece / 32;
  static constexpr int kSteps = kInt8 ? 2 : 4;  // products of depth 16 in a span
  static constexpr int kSpanDepth = 16 * kSteps;
  static constexpr int kDepth = kSpans * kSpanDepth;                                 // columns of W in a unit
  static constexpr int kParts = kSpans * (kStored == Stored::blocks_of_32 ? 2 : 1);  // of a row, each with its scale
  static constexpr int kScales = kInt8 ? 1 : kRows * kParts / kWarp;                 // that a lane decodes
  static constexpr bool kLate =
      kStored == Stored::blocks_of_32;  // its scales are not loaded ahead: no registers for them
  static_assert(kParts == 4 || kParts == 2 || kInt8);
};

// Whether a unit's scales and x are loaded when they are needed: no registers are left to hold the next one's.
template <class S>
constexpr bool kLate = S::kStored == Stored::blocks_of_32;

struct Work {
  Weight weight;
  const uint16_t* x;
  int64_t x_stride;
  int m;
  SidePath side;
  const void* bias;
  DType bias_dtype;
  uint16_t* out;
  int chunks;      // units of a tile
  int units;       // of all tiles
  int per_block;   // units of a block
  int log2_warps;  // of a block
  int slots;       // of a warp, 2 or 3
  uint32_t* counters;
  float* partials;
};

struct Unit {
  int number;
  int tile;
  int chunk;

  __device__ __forceinline__ void advance(int by, int chunks) {
    number += by;
    chunk += by;
    for (; chunk >= chunks; chunk -= chunks) ++tile;
  }
};

// The units of one tile that a block has.
struct Segment {
  int begin;
  int end;
};

__device__ __forceinline__ int quad() { return lane() / 4; }
__device__ __forceinline__ int in_quad() { return lane() % 4; }

__device__ __forceinline__ uint32_t slot_offset(int slot) {
  const int area = slot < kTableAreas ? slot : slot / 2 + kTableAreas / 2;
  return static_cast<uint32_t>(area * kArea + (slot < kTableAreas || slot % 2 == 1 ? kPair / 2 : 0));
}

// Where 16 bytes of a row lie in a slot: rotated so that 8 neighbouring rows have theirs in different banks.
template <class S>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  if constexpr (S::kPiece == 128) {
    return row * kPair + ((chunk ^ (row & 7)) * 16);
  } else {
    const int line = row / 2;
    return line * kPair + ((row & 1) * 4 + (chunk ^ (line & 3))) * 16;
  }
}

// Where the sum of a row and column lies in a slot: rows and columns of a quad in different banks.
template <class S>
__device__ __forceinline__ uint32_t sum_offset(uint32_t row, uint32_t column) {
  const uint32_t number = column * S::kRows + (row ^ (((column / 2) & 3) * 8));
  return number / 32 * kPair + number % 32 * 4;
}

template <class S>
__device__ __forceinline__ int last_row(const Work& work, int tile) {
  const int64_t rest = work.weight.rows - static_cast<int64_t>(tile) * S::kRows;
  return static_cast<int>(rest < S::kRows ? rest : S::kRows) - 1;
}

// In two groups, one for each half of the rows. Rows past the last one repeat an earlier one, columns past the last one
// are zeros.
template <class S>
__device__ __forceinline__ void start_copies(const Work& work, const Unit& unit, bool exists, unsigned char* slot,
                                             uint64_t policy) {
  constexpr int kLanes = S::kPiece / 16;  // to a row
  constexpr int kAtOnce = kWarp / kLanes;
  const Weight& weight = work.weight;
  const int64_t row_bytes = S::kInt8 ? weight.cols : weight.cols / 2;
  const auto* from = S::kInt8 ? reinterpret_cast<const unsigned char*>(weight.rows8.q) : weight.packed4.packed;
  const int last = last_row<S>(work, unit.tile);
  const int chunk = lane() % kLanes;
  int row = lane() / kLanes;
  const int64_t column = static_cast<int64_t>(unit.chunk) * S::kPiece + chunk * 16;
  const bool valid = column < row_bytes;
  from += (static_cast<int64_t>(unit.tile) * S::kRows + min(row, last)) * row_bytes + (valid ? column : 0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (exists) {
#pragma unroll
      for (int i = half * kCopies / 2; i < (half + 1) * kCopies / 2; ++i) {
        copy_async_16_once(slot + chunk_offset<S>(i * kAtOnce + lane() / kLanes, chunk), from, policy, valid);
        row += kAtOnce;
        if (row <= last) from += kAtOnce * row_bytes;
      }
    }
    copy_async_commit();
  }
}

// A lane's part of a unit's scales as they are stored. Number f = 4 i + t, of lane t of the quad: of row 8 (f / kParts)
// + quad() and part f % kParts.
template <class S>
struct Scales {
  uint32_t stored[S::kScales];
  float nested[S::kScales];

  __device__ __forceinline__ void load(const Work& work, const Unit& unit) {
    const Packed4& packed = work.weight.packed4;
    const BlockScales& scales = packed.scales;
    constexpr int kPartDepth = S::kDepth / S::kParts;
    constexpr int kStep = 32 / S::kParts;  // rows from one number of a lane to the next
    const int last = last_row<S>(work, unit.tile);
    const int part = in_quad() % S::kParts;
    int row = 8 * (in_quad() / S::kParts) + quad();
    const int64_t column =
        smaller(static_cast<int64_t>(unit.chunk) * S::kDepth + part * kPartDepth, work.weight.cols - kPartDepth);
    int64_t element = (static_cast<int64_t>(unit.tile) * S::kRows + min(row, last)) * work.weight.cols + column;
    const bool plain = scales.plain != nullptr;
#pragma unroll
    for (int i = 0; i < S::kScales; ++i) {
      const int64_t block = element >> packed.block_shift;
      if (plain) {
        stored[i] = __float_as_uint(__ldg(scales.plain + block));
        nested[i] = 0.0F;  // or its register would be kept for the value before
      } else {
        stored[i] = __ldg(scales.codes + block);
        nested[i] = __ldg(scales.nested + (block >> scales.nested_shift));
      }
      row += kStep;
      if (row <= last) element += kStep * work.weight.cols;
    }
  }

  __device__ __forceinline__ void decode(const Work& work, const float* map, float offset,
                                         float (&out)[S::kScales]) const {
    const bool plain = work.weight.packed4.scales.plain != nullptr;
#pragma unroll
    for (int i = 0; i < S::kScales; ++i) {
      out[i] = plain ? __uint_as_float(stored[i]) : __fadd_rn(__fmul_rn(map[stored[i]], nested[i]), offset);
    }
  }
};

// The scale of row quad() (+ 8: `lower`) of 16-row tile `tile` and a part.
template <class S>
__device__ __forceinline__ float scale_of(const float (&scales)[S::kScales], int tile, int lower, int part) {
  const int number = (2 * tile + lower) * S::kParts + part;
  return __shfl_sync(kWholeWarp, scales[number / 4], (lane() & 28) | (number % 4));
}

// x as the other operand: of a span, the registers of each product. Spread: of all spans, for columns 2 span and 2 span
// + 1; a lane has those of one span. What is past the rows or columns of x is 0.
template <class S>
struct Operand {
  static constexpr int kHeld = S::kSpread ? 1 : S::kSpans;
  uint32_t pairs[kHeld][S::kGroups][S::kSteps][2];

  __device__ __forceinline__ void load(const Work& work, const Unit& unit, bool exists, int span) {
    int64_t k = static_cast<int64_t>(unit.chunk) * S::kDepth;
    k += (S::kSpread ? quad() / 2 : span) * S::kSpanDepth;
    const bool within = exists && k < work.weight.cols;
#pragma unroll
    for (int group = 0; group < S::kGroups; ++group) {
      const int row = S::kSpread ? quad() % 2 : group * 8 + quad();
      auto& to = pairs[S::kSpread ? 0 : span][group];
      const uint16_t* from = work.x + row * work.x_stride + k;
      const bool valid = within && row < work.m;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (S::kInt8) {
          const uint2 four =
              valid ? __ldg(reinterpret_cast<const uint2*>(from + 16 * half + 4 * in_quad())) : make_uint2(0, 0);
          to[half][0] = four.x, to[half][1] = four.y;
        } else {
          const uint4 eight =
              valid ? __ldg(reinterpret_cast<const uint4*>(from + 32 * half + 8 * in_quad())) : make_uint4(0, 0, 0, 0);
          to[2 * half][0] = eight.x, to[2 * half][1] = eight.y;
          to[2 * half + 1][0] = eight.z, to[2 * half + 1][1] = eight.w;
        }
      }
    }
  }

  __device__ __forceinline__ void take(int span, int group, int step, uint32_t (&out)[2]) const {
    if constexpr (S::kSpread) {
      const uint32_t mask = quad() / 2 == span ? ~0U : 0U;
      out[0] = pairs[0][group][step][0] & mask, out[1] = pairs[0][group][step][1] & mask;
    } else {
      out[0] = pairs[span][group][step][0], out[1] = pairs[span][group][step][1];
    }
  }
};

// A register of the operand: byte `byte` of a word of 4-bit codes, bytes 2 `pair` and 2 `pair` + 1 of one of int8.
__device__ __forceinline__ uint32_t look_up(const unsigned char* table, uint32_t word, int byte) {
  const uint32_t offset = __byte_perm(word, code_column(), 0x5504U | static_cast<uint32_t>(byte) << 4);
  return *reinterpret_cast<const uint32_t*>(table + offset);
}
template <class T>
__device__ __forceinline__ uint32_t pair_of_int8(uint32_t word, int pair) {
  // The last byte of the float 2^23 + 128 + q is q + 128.
  const uint32_t biased = word ^ 0x80808080U;
  const float low = __uint_as_float(__byte_perm(biased, 0x4B000000U, 0x7440U | static_cast<uint32_t>(2 * pair)));
  const float high = __uint_as_float(__byte_perm(biased, 0x4B000000U, 0x7440U | static_cast<uint32_t>(2 * pair + 1)));
  return pack<T>(__fsub_rn(low, 8388736.0F), __fsub_rn(high, 8388736.0F));
}

// 16 rows of a span: sums += codes . x.
template <class S, int kFirst, int kLast>
__device__ __forceinline__ void multiply_span(const unsigned char* table, const unsigned char* upper,
                                              const unsigned char* lower, const Operand<S>& x, int span,
                                              float (&sums)[S::kGroups][4]) {
#pragma unroll
  for (int half = kFirst; half < kLast; ++half) {
    const int chunk = 2 * span + half;
    const int turned = S::kPiece == 128 ? chunk ^ quad() : (quad() & 1) * 4 + (chunk ^ (quad() / 2));
    const uint32_t words[2] = {*reinterpret_cast<const uint32_t*>(upper + turned * 16),
                               *reinterpret_cast<const uint32_t*>(lower + turned * 16)};
    constexpr int kSteps = S::kSteps / 2;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (S::kInt8) {
          a[i] = pair_of_int8<typename S::T>(words[i % 2], i / 2);
        } else {
          a[i] = look_up(table, words[i % 2], 2 * step + i / 2);
        }
      }
#pragma unroll
      for (int group = 0; group < S::kGroups; ++group) {
        uint32_t b[2];
        x.take(span, group, half * kSteps + step, b);
        multiply<typename S::T>(sums[group], a, b);
      }
    }
  }
}

template <class S>
__device__ __forceinline__ void add_scaled(const float (&sums)[S::kGroups][4], float upper, float lower,
                                           float (&total)[S::kGroups][4]) {
#pragma unroll
  for (int group = 0; group < S::kGroups; ++group) {
#pragma unroll
    for (int i = 0; i < 4; ++i) total[group][i] = __fmaf_rn(sums[group][i], i < 2 ? upper : lower, total[group][i]);
  }
}

// Half the rows of a unit: total += W . x. After a span's last use its registers get the next unit's x.
template <class S, int kHalf>
__device__ __forceinline__ void multiply_half(const Work& work, const unsigned char* table, const unsigned char* slot,
                                              const float (&scales)[S::kScales], const Unit& unit, const Unit& next,
                                              bool exists, Operand<S>& x, float (&total)[S::kTiles][S::kGroups][4]) {
  constexpr int kTiles = S::kTiles / 2;
  constexpr int kTileBytes = 16 * kPair * S::kPiece / 128;
  const unsigned char* row =
      slot + kHalf * kTiles * kTileBytes + (S::kPiece == 128 ? quad() : quad() / 2) * kPair + 4 * in_quad();
  float spread[kTiles][1][4] = {};
#pragma unroll
  for (int span = 0; span < S::kSpans; ++span) {
    if constexpr (kLate<S>) x.load(work, unit, true, span);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int tile = kHalf * kTiles + i;
      const unsigned char* upper = row + i * kTileBytes;
      const unsigned char* lower = upper + kTileBytes / 2;
      if constexpr (S::kInt8) {
        multiply_span<S, 0, 2>(table, upper, lower, x, span, total[tile]);
      } else if constexpr (S::kSpread) {
        multiply_span<S, 0, 2>(table, upper, lower, x, span, spread[i]);
      } else if constexpr (S::kStored == Stored::blocks_of_32) {
        float first[S::kGroups][4] = {}, second[S::kGroups][4] = {};
        multiply_span<S, 0, 1>(table, upper, lower, x, span, first);
        add_scaled<S>(first, scale_of<S>(scales, tile, 0, 2 * span), scale_of<S>(scales, tile, 1, 2 * span),
                      total[tile]);
        multiply_span<S, 1, 2>(table, upper, lower, x, span, second);
        add_scaled<S>(second, scale_of<S>(scales, tile, 0, 2 * span + 1), scale_of<S>(scales, tile, 1, 2 * span + 1),
                      total[tile]);
      } else {
        float sums[S::kGroups][4] = {};
        multiply_span<S, 0, 2>(table, upper, lower, x, span, sums);
        add_scaled<S>(sums, scale_of<S>(scales, tile, 0, span), scale_of<S>(scales, tile, 1, span), total[tile]);
      }
    }
    if constexpr (kHalf == 1 && !S::kSpread && !kLate<S>) x.load(work, next, exists, span);
  }
  if constexpr (S::kSpread) {
    // Lane t of a quad has the sums of span t and decoded its scales.
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int tile = kHalf * kTiles + i;
      add_scaled<S>(spread[i], scales[2 * tile], scales[2 * tile + 1], total[tile]);
    }
  }
}

}  // namespace nybble::cuda
