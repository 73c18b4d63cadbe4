// From values to codes, in blocks that share a scale: how a warp walks over the blocks, and the search for a code. The
// rule is format.h's and reference.py's, bit for bit.
#pragma once
#include "cuda/elements.cuh"

namespace nybble::cuda {

constexpr uint32_t kInfinity = 0x7F800000U;

__device__ __forceinline__ uint32_t magnitude_of(float v) { return __float_as_uint(v) & 0x7FFFFFFFU; }
__device__ __forceinline__ float absmax_of(uint32_t magnitude) {
  constexpr float kSmallestAbsmax = 1e-38F;  // what an all-zero block stores
  return fmaxf(__uint_as_float(magnitude), kSmallestAbsmax);
}

// ---- blocks ---------------------------------------------------------------------------------------------------------

// A warp takes a group of elements: one block, or a run of 256 elements that holds several. Of a run a lane has
// elements 4 lane to 4 lane + 3 of both steps. A block is 8, 16 or 32 lanes of one step (32, 64 or 128 elements), a
// whole run (256) or several.
struct Groups {
  int block_shift = 6;
  int64_t count = 0;  // elements

  NYBBLE_ANYWHERE int shift() const { return block_shift > 8 ? block_shift : 8; }
  NYBBLE_ANYWHERE int64_t size() const { return int64_t{1} << shift(); }
  NYBBLE_ANYWHERE int64_t groups() const { return (count + size() - 1) >> shift(); }
  __device__ __forceinline__ int runs() const { return 1 << (shift() - 8); }
  __device__ __forceinline__ bool steps_share_block() const { return block_shift >= 8; }
  __device__ __forceinline__ int lanes() const { return block_shift >= 7 ? kWarp : 1 << (block_shift - 2); }

  // Whether this lane speaks for the block of its element `at` in step `step` of a run.
  __device__ __forceinline__ bool speaks(int step, int64_t at) const {
    return (lane() & (lanes() - 1)) == 0 && (step == 0 || !steps_share_block()) && at < count;
  }
};

// The largest of all that a block's lanes have, or the sum, in the same order for every lane; per step.
__device__ __forceinline__ void largest_of_block(const Groups& groups, uint32_t (&largest)[2]) {
  if (groups.steps_share_block()) largest[0] = largest[1] = max(largest[0], largest[1]);
  for (int i = groups.lanes() / 2; i > 0; i /= 2) {
    for (uint32_t& each : largest) each = max(each, __shfl_xor_sync(kWholeWarp, each, i));
  }
}
__device__ __forceinline__ void sum_over_block(const Groups& groups, float (&sums)[2]) {
  if (groups.steps_share_block()) sums[0] = sums[1] = __fadd_rn(sums[0], sums[1]);
  for (int i = groups.lanes() / 2; i > 0; i /= 2) {
    for (float& each : sums) each = __fadd_rn(each, __shfl_xor_sync(kWholeWarp, each, i));
  }
}

__device__ __forceinline__ void report(int64_t* failed, int64_t block) {
  atomicMin(reinterpret_cast<long long*>(failed), static_cast<long long>(block));
}

// ---- ranks among thresholds -----------------------------------------------------------------------------------------

// A table in shared memory with a column for every lane, so that lanes look up different rows without a conflict: row i
// of lane l is number 32 i + l. A place in it is a byte offset, 128 i + 4 l, because then a step of a search is a
// comparison, an addition and a lookup.
constexpr uint32_t kRow = 4 * kWarp;

__device__ __forceinline__ float look_up(const float* table, uint32_t place) {
  return *reinterpret_cast<const float*>(reinterpret_cast<const unsigned char*>(table) + place);
}

// 16 ascending thresholds, the last one infinite; three of them in registers too.
constexpr int kThresholdTable = 16 * kWarp;

struct Thresholds {
  const float* table;
  uint32_t column;
  float t3, t7, t11;

  __device__ __forceinline__ explicit Thresholds(const float* from)
      : table(from),
        column(static_cast<uint32_t>(lane()) * 4),
        t3(look_up(table, column + 3 * kRow)),
        t7(look_up(table, column + 7 * kRow)),
        t11(look_up(table, column + 11 * kRow)) {}

  // The place of the row of s: as many rows down as thresholds are below s.
  __device__ __forceinline__ uint32_t row_of(float s) const {
    const bool upper = s > t7;
    uint32_t place = upper ? column + 8 * kRow : column;
    if (s > (upper ? t11 : t3)) place += 4 * kRow;
    if (s > look_up(table, place + kRow)) place += 2 * kRow;
    if (s > look_up(table, place)) place += kRow;
    return place;
  }
};

// Where one of 256 ascending codes ends and the next begins: every 16th midpoint as above; those between, twice, so
// that lanes in different sixteenths of the map never meet in a bank: midpoint 16 g + j is number 32 j + 2 g (+ 1 for
// odd lanes).
constexpr int kBetween = 15 * kWarp;
constexpr int kMidpointTable = kThresholdTable + kBetween;

// So no kernel has to clamp s to [-1, 1]: nothing clamped exceeds 1, everything exceeds what lies below -1.
__device__ __forceinline__ float within_reach(float middle) {
  const float infinity = __uint_as_float(kInfinity);
  return middle >= 1.0F ? infinity : middle < -1.0F ? -infinity : middle;
}
__device__ __forceinline__ float midpoint(const float* map, int i) {
  return within_reach((__ldg(map + i) + __ldg(map + i + 1)) / 2.0F);
}

// By all threads of the block; a barrier comes before its first use.
__device__ __forceinline__ void fill_midpoints(float* table, const float* map) {
  for (int i = static_cast<int>(threadIdx.x); i < kMidpointTable; i += static_cast<int>(blockDim.x)) {
    if (i < kThresholdTable) {
      const int coarse = 16 * (i / kWarp) + 15;
      table[i] = coarse < 255 ? midpoint(map, coarse) : __uint_as_float(kInfinity);
    } else {
      const int number = i - kThresholdTable;
      table[i] = midpoint(map, 16 * (number % kWarp / 2) + number / kWarp);
    }
  }
}

struct Midpoints {
  Thresholds coarse;
  const float* between;
  uint32_t column;  // that of even or of odd lanes

  __device__ __forceinline__ explicit Midpoints(const float* table)
      : coarse(table), between(table + kThresholdTable), column(static_cast<uint32_t>(lane() & 1) * 4) {}

  // The nearest code, ties to the lower one.
  __device__ __forceinline__ uint32_t nearest(float s) const {
    const uint32_t sixteenth = coarse.row_of(s) / kRow;
    uint32_t place = 8 * sixteenth + column;  // below kRow
    if (s > look_up(between, place + 7 * kRow)) place += 8 * kRow;
    if (s > look_up(between, place + 3 * kRow)) place += 4 * kRow;
    if (s > look_up(between, place + kRow)) place += 2 * kRow;
    if (s > look_up(between, place)) place += kRow;
    return 16 * sixteenth + place / kRow;
  }
};

}  // namespace nybble::cuda
