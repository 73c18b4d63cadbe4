// An output in tiles, one a block; where those are too few to fill the GPU, the contraction in parts as well, which
// become blocks of their own.
#pragma once
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/weights.cuh"

namespace nybble::cuda {

// Tiles in the order of their blocks: 16 tiles of rows of x beside each other share a tile of the weight while it is in
// L2, then the next columns.
__device__ __forceinline__ void place_of(int64_t tile, int64_t row_tiles, int64_t column_tiles, int64_t* row_tile,
                                         int64_t* column_tile) {
  constexpr int64_t kGroup = 16;
  const int64_t first = tile / (kGroup * column_tiles) * kGroup;
  const int64_t height = smaller(row_tiles - first, kGroup);
  const int64_t inside = tile - first * column_tiles;
  *row_tile = first + inside % height;
  *column_tile = inside / height;
}

// Parts of about the same number of steps: as many as fill the GPU `blocks` deep, but each of at least `least` steps,
// and no more than there is room for: `tile_bytes` of sums for each part of each tile.
inline int parts_of(int64_t tiles, int64_t steps, int64_t tile_bytes, int blocks, const Device& device) {
  constexpr int64_t kLeastSteps = 8;
  if (tiles == 0 || tiles > kCounters) return 1;
  const int64_t room = (kWorkspaceBytes - kCounters * 4) / (tiles * tile_bytes);
  const int64_t wanted = int64_t{device.multiprocessors} * blocks / tiles;
  const int64_t parts = smaller(smaller(wanted, steps / kLeastSteps), room);
  return parts < 1 ? 1 : static_cast<int>(smaller(parts, 64));
}

struct TilePlan {
  int64_t row_tiles, column_tiles;
  int parts;
  bool vector_x, vector_out;  // rows begin, and end, at whole 16 bytes
  bool units;                 // see has_whole_units
};

// For tiles of `rows` x `columns` fp32 sums and steps of `depth`, `blocks` of them on a multiprocessor at once;
// `numbers`: how many of x are 16 bytes.
inline Status plan_tiles(const LinearArgs& args, const Device& device, int rows, int columns, int depth, int numbers,
                         int blocks, TilePlan* plan) {
  plan->row_tiles = divide_up(args.m, rows);
  plan->column_tiles = divide_up(args.columns(), columns);
  plan->vector_x = aligned_16(args.x) && args.x_stride % numbers == 0 && args.contraction() % numbers == 0;
  plan->vector_out = aligned_16(args.out) && args.columns() % numbers == 0;
  plan->units = has_whole_units(args.weight);
  const int64_t tiles = plan->row_tiles * plan->column_tiles;
  const int64_t steps = divide_up(args.contraction(), depth);
  if (tiles > INT32_MAX) return bad_argument("m", args.m);
  if (steps > INT32_MAX - 8) return bad_argument(args.grad_input ? "out_features" : "in_features", args.contraction());
  plan->parts = parts_of(tiles, steps, int64_t{rows} * columns * 4, blocks, device);
  return success();
}

inline dim3 grid_of(const TilePlan& plan) {
  return dim3(static_cast<unsigned>(plan.row_tiles * plan.column_tiles), static_cast<unsigned>(plan.parts));
}

// Adds up what the blocks of all parts of a tile have in `sums`, in the order of the parts: the same bits whichever
// comes last. True for that one, which then has the total. `flag`: a word of shared memory that nothing else uses.
template <int Threads, int Count>
__device__ __forceinline__ bool sum_parts(float (&sums)[Count], unsigned char* workspace, int64_t tile, int part,
                                          int parts, uint32_t* flag) {
  static_assert(Count % 4 == 0, "sums are stored 16 bytes at a time");
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t* counter = reinterpret_cast<uint32_t*>(workspace) + tile;
  float4* stored = reinterpret_cast<float4*>(workspace + kCounters * 4) + tile * parts * (Count / 4) * Threads + thread;
  float4* mine = stored + int64_t{part} * (Count / 4) * Threads;
#pragma unroll
  for (int i = 0; i < Count; i += 4) {
    mine[i / 4 * Threads] = make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) *flag = atomicAdd(counter, 1U);
  __syncthreads();
  if (*flag != static_cast<uint32_t>(parts - 1)) return false;
  if (thread == 0) *counter = 0;
  __threadfence();
#pragma unroll
  for (int i = 0; i < Count; ++i) sums[i] = 0.0F;
  constexpr int kAtOnce = Count < 64 ? Count : 64;  // or more loads are started than there are registers
#pragma unroll
  for (int first = 0; first < Count; first += kAtOnce) {
#pragma unroll 1
    for (int other = 0; other < parts; ++other) {
      const float4* theirs = stored + int64_t{other} * (Count / 4) * Threads;
#pragma unroll
      for (int i = first; i < first + kAtOnce; i += 4) {
        const float4 four = theirs[i / 4 * Threads];
        sums[i] = __fadd_rn(sums[i], four.x);
        sums[i + 1] = __fadd_rn(sums[i + 1], four.y);
        sums[i + 2] = __fadd_rn(sums[i + 2], four.z);
        sums[i + 3] = __fadd_rn(sums[i + 3], four.w);
      }
    }
  }
  return true;
}

// Part `part` of `steps` steps: the first of it; that of part + 1 is its end.
__device__ __forceinline__ int first_step(int steps, int part, int parts) {
  return static_cast<int>(int64_t{steps} * part / parts);
}

}  // namespace nybble::cuda
