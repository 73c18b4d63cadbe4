// How linear_wgmma.cu cuts a problem and what lies where, and what the warpgroups do that multiply.
#pragma once
#include "cuda/weights.cuh"

namespace nybble::cuda::warpgroups {

constexpr int kWarpgroup = 128;
constexpr int kMultipliers = 2 * kWarpgroup;

constexpr int kRows = 128;  // of a tile of out^T: rows of the weight; its columns for grad_input
constexpr int kStep = 64;   // of the contraction: a line of 128 bytes
constexpr uint32_t kLine = 128;
constexpr uint32_t kWeightBytes = kRows * kStep * 2;
constexpr uint32_t kHalfBytes = kWeightBytes / 2;  // what one warpgroup multiplies

// Packed bytes on their way: 128 lines a chunk, each of which is four steps of 4-bit codes or two of int8.
constexpr int kChunks = 3;
constexpr uint32_t kChunkBytes = kRows * kLine;

constexpr int kSpan = 64;              // tokens that are put in order at once before they are stored
constexpr uint32_t kPitch = 128 + 16;  // bytes from token to token there: 4-byte writes of a warp meet in no bank
constexpr int kRanks = 16;             // of a side path added in fp32 at once
constexpr int kSidePitch = 66;         // floats from rank to rank
constexpr uint32_t kStagingBytes = kSpan * kPitch;
static_assert(2 * kRanks * kSidePitch * 4 <= static_cast<int>(kStagingBytes), "both factors of a side path");

// Threads, and shared memory in bytes from its beginning. One warpgroup fills 256 tokens' tiles in the time that they
// take to multiply, and 128 sums a thread leave no registers for another; fewer tokens need two.
template <int Tokens>
struct Layout {
  static constexpr int kFillers = Tokens == 256 ? kWarpgroup : 2 * kWarpgroup;
  static constexpr int kThreads = kMultipliers + kFillers;
  static constexpr int kStages = Tokens == 256 ? 3 : Tokens == 128 ? 4 : 6;
  static constexpr uint32_t kStageBytes = kWeightBytes + Tokens * kLine;
  static constexpr uint32_t kRing = kStages * kStageBytes;
  static constexpr uint32_t kStaging = kRing + kChunks * kChunkBytes;
  static constexpr uint32_t kMap = kStaging + 2 * kStagingBytes;
  static constexpr uint32_t kFull = kMap + kScaleMap * 4;
  static constexpr uint32_t kEmpty = kFull + kStages * 8;
  static constexpr uint32_t kLast = kEmpty + kStages * 8;
  static constexpr uint32_t kBytes = kLast + 16;
  static_assert(kBytes <= 227 * 1024, "what a block may have");

  static __device__ __forceinline__ uint64_t* full(int stage) {
    return reinterpret_cast<uint64_t*>(shared_memory() + kFull) + stage;
  }
  static __device__ __forceinline__ uint64_t* empty(int stage) {
    return reinterpret_cast<uint64_t*>(shared_memory() + kEmpty) + stage;
  }
};

struct Problem {
  Weight weight;
  SidePath side;
  const void* x;
  int64_t x_stride;
  int64_t m;
  int64_t contraction;
  int64_t columns;  // of out
  const void* bias;
  DType bias_dtype;
  void* out;
  int steps;
  int side_steps;  // of the side path, where the tensor cores multiply it
  int splits;      // of the steps, each an item of its own
  int64_t row_tiles;
  int64_t token_tiles;
  int64_t items;
  float* partials;
  uint32_t* counters;
};

// A tile of out, or a part of its contraction.
struct Item {
  int64_t tile;
  int64_t row;
  int64_t token;
  int split;
  int first, last;  // steps
  bool ends;        // the last part, which has the side path as well
};

// Blocks that run at the same time take neighbouring tiles: up to kGroup tiles of tokens share the bytes of a weight's
// tile while they are in L2, and the rows of x of a group, 32 MB for 2048 tokens of 8192, stay there for all the
// weight.
template <int Tokens>
__device__ __forceinline__ Item item_of(const Problem& problem, int64_t index) {
  constexpr int64_t kGroup = 2048 / Tokens;
  const int64_t tiles = problem.row_tiles * problem.token_tiles;
  const int64_t split = index / tiles;
  Item item;
  item.tile = index - split * tiles;
  const int64_t group = item.tile / (kGroup * problem.row_tiles);
  const int64_t inside = item.tile - group * kGroup * problem.row_tiles;
  const int64_t width = smaller(kGroup, problem.token_tiles - group * kGroup);
  item.row = inside / width * kRows;
  item.token = (group * kGroup + inside % width) * Tokens;
  item.split = static_cast<int>(split);
  item.first = static_cast<int>(split * problem.steps / problem.splits);
  item.last = static_cast<int>((split + 1) * problem.steps / problem.splits);
  item.ends = item.split + 1 == problem.splits;
  return item;
}

// Whose turn it is among the stages. Phase 0 is filled first; whoever fills waits for the phase before it to be empty.
template <int Tokens>
struct Turn {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ uint32_t offset() const {
    return static_cast<uint32_t>(stage) * Layout<Tokens>::kStageBytes;
  }
  __device__ __forceinline__ void advance() {
    if (++stage == Layout<Tokens>::kStages) stage = 0, phase ^= 1;
  }
};

__device__ __forceinline__ void store_shared(uint32_t offset, const uint4& value) {
  *reinterpret_cast<uint4*>(shared_memory() + offset) = value;
}
__device__ __forceinline__ uint4 load_shared(uint32_t offset) {
  return *reinterpret_cast<const uint4*>(shared_memory() + offset);
}

// ---- the warpgroups that multiply
// ------------------------------------------------------------------------------------

// d += the tiles of the next `count` stages.
template <class T, bool Grad, int Tokens>
__device__ __forceinline__ void multiply_steps(float (&d)[Tokens / 2], Turn<Tokens>& turn, int count, int group) {
  using Memory = Layout<Tokens>;
  // From one k of 16 to the next, in the descriptor's units of 16 bytes: along a line, or two atoms of eight lines.
  constexpr uint64_t kNextA = Grad ? 2 * 8 * kLine / 16 : 2;
  int before = -1;
#pragma unroll 1
  for (int i = 0; i < count; ++i, turn.advance()) {
    mbarrier_wait(Memory::full(turn.stage), turn.phase);
    // The tile of x came by copies, which, like stores, are no business of the tensor cores' proxy; who started them
    // did not wait for them, so the fence is here, between their arrival and the product.
    fence_async_shared();
    const unsigned char* tile = shared_memory() + turn.offset();
    const uint64_t a = describe(tile + static_cast<uint32_t>(group) * kHalfBytes, kHalfBytes, 8 * kLine);
    const uint64_t b = describe(tile + kWeightBytes, 16, 8 * kLine);
    wgmma_fence();
#pragma unroll
    for (uint64_t k = 0; k < 4; ++k) wgmma<T, Grad ? 1 : 0, 0>(d, a + k * kNextA, b + k * 2, true);
    wgmma_commit();
    wgmma_wait<1>();
    if (before >= 0 && lane() == 0) mbarrier_arrive(Memory::empty(before));
    before = turn.stage;
  }
  wgmma_wait<0>();
  if (before >= 0 && lane() == 0) mbarrier_arrive(Memory::empty(before));
}

// Parts of a contraction: every block leaves its sums, the last one to come adds them in the order of the parts,
// whatever the order in which they came. True for that one.
template <int Tokens>
__device__ __forceinline__ bool add_parts(const Problem& problem, const Item& item, float (&d)[Tokens / 2],
                                          int thread) {
  volatile uint32_t* last = reinterpret_cast<volatile uint32_t*>(shared_memory() + Layout<Tokens>::kLast);
  constexpr int64_t kFours = Tokens / 8;  // of a thread
  float4* parts =
      reinterpret_cast<float4*>(problem.partials) + item.tile * problem.splits * kFours * kMultipliers + thread;
  float4* mine = parts + item.split * kFours * kMultipliers;
#pragma unroll
  for (int j = 0; j < kFours; ++j) {
    mine[j * kMultipliers] = make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
  }
  __threadfence();
  barrier_sync(1, kMultipliers);
  if (thread == 0) {
    const uint32_t came = atomicAdd(problem.counters + item.tile, 1U);
    const bool all = came + 1 == static_cast<uint32_t>(problem.splits);
    if (all) problem.counters[item.tile] = 0;
    *last = all ? 1 : 0;
  }
  barrier_sync(1, kMultipliers);
  if (*last == 0) return false;
  __threadfence();
  const bool two = problem.splits == 2;  // whose order counts for nothing: a block adds what it has not
  if (!two) {
#pragma unroll
    for (int j = 0; j < Tokens / 2; ++j) d[j] = 0.0F;
  }
#pragma unroll 1
  for (int split = 0; split < problem.splits; ++split, parts += kFours * kMultipliers) {
    if (two && split == item.split) continue;
#pragma unroll
    for (int j = 0; j < kFours; ++j) {
      const float4 part = parts[j * kMultipliers];
      d[4 * j] = __fadd_rn(d[4 * j], part.x);
      d[4 * j + 1] = __fadd_rn(d[4 * j + 1], part.y);
      d[4 * j + 2] = __fadd_rn(d[4 * j + 2], part.z);
      d[4 * j + 3] = __fadd_rn(d[4 * j + 3], part.w);
    }
  }
  return true;
}

// Rounds the sums of one warpgroup, 64 rows of the tile, and stores them; out has a row for a token, so they are turned
// around in shared memory first, kSpan tokens at a time.
template <class T, bool Grad, int Tokens>
struct Storer {
  static constexpr int kTokens = Tokens < kSpan ? Tokens : kSpan;
  const Problem& problem;
  int64_t row, token;  // the first ones
  int group;

  __device__ __forceinline__ uint32_t staging() const {
    return Layout<Tokens>::kStaging + static_cast<uint32_t>(group) * kStagingBytes;
  }
  __device__ __forceinline__ void meet() const {
    if (group == 0) {
      barrier_sync(2, kWarpgroup);
    } else {
      barrier_sync(3, kWarpgroup);
    }
  }

  // left . right^T in fp32: fp16 cannot hold every factor.
  __device__ __forceinline__ void add_side(float* d, int64_t from, int thread, int mine, int t) const {
    const SidePath& side = problem.side;
    float* right = reinterpret_cast<float*>(shared_memory() + staging());
    float* left = right + kRanks * kSidePitch;
#pragma unroll 1
    for (int64_t rank = 0; rank < side.rank; rank += kRanks) {
#pragma unroll 1
      for (int i = thread; i < kRanks * 64; i += kWarpgroup) {
        const int r = Grad ? i / 64 : i % kRanks, c = Grad ? i % 64 : i / kRanks;
        const bool there = rank + r < side.rank && row + c < problem.columns;
        const int64_t at = Grad ? (rank + r) * problem.columns + row + c : (row + c) * side.rank + rank + r;
        right[r * kSidePitch + c] = there ? element(side.right, side.right_dtype, at) : 0.0F;
      }
#pragma unroll 1
      for (int i = thread; i < kRanks * kTokens; i += kWarpgroup) {
        const int r = i % kRanks, c = i / kRanks;
        const bool there = rank + r < side.rank && from + c < problem.m;
        left[r * kSidePitch + c] =
            there ? element(side.left, side.left_dtype, (from + c) * side.rank + rank + r) : 0.0F;
      }
      meet();
#pragma unroll 1
      for (int r = 0; r < kRanks; ++r) {
        const float a = right[r * kSidePitch + mine], below = right[r * kSidePitch + mine + 8];
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
          const float2 b = *reinterpret_cast<const float2*>(left + r * kSidePitch + 8 * j + 2 * t);
          d[4 * j] = __fmaf_rn(a, b.x, d[4 * j]);
          d[4 * j + 1] = __fmaf_rn(a, b.y, d[4 * j + 1]);
          d[4 * j + 2] = __fmaf_rn(below, b.x, d[4 * j + 2]);
          d[4 * j + 3] = __fmaf_rn(below, b.y, d[4 * j + 3]);
        }
      }
      meet();
    }
  }

  __device__ __forceinline__ void store(float (&d)[Tokens / 2], int thread) const {
    const int g = lane() / 4, t = lane() % 4;
    const int mine = thread / kWarp * 16 + g;  // and 8 below
    float bias[2] = {0.0F, 0.0F};
    if (problem.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t at = row + mine + 8 * i;
        if (at < problem.columns) bias[i] = element(problem.bias, problem.bias_dtype, at);
      }
    }
    const bool vectors = problem.columns % 8 == 0 && aligned_16(problem.out);
#pragma unroll
    for (int span = 0; span < Tokens / kTokens; ++span) {
      float* sums = d + span * kTokens / 2;
      const int64_t from = token + span * kTokens;
      if (from >= problem.m) break;
      if constexpr (!std::is_same_v<T, Bf16>) {
        if (problem.side.rank > 0) add_side(sums, from, thread, mine, t);
      }
      // Lanes 4 apart have neighbouring rows of two tokens each: the even one takes the first token, the odd the
      // second.
      const bool odd = g % 2 != 0;
      const uint32_t to = staging() + static_cast<uint32_t>(2 * t + (odd ? 1 : 0)) * kPitch +
                          static_cast<uint32_t>(mine - (odd ? 1 : 0)) * 2;
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t own =
              pack<T>(__fadd_rn(sums[4 * j + 2 * i], bias[i]), __fadd_rn(sums[4 * j + 2 * i + 1], bias[i]));
          const uint32_t other = __shfl_xor_sync(kWholeWarp, own, 4);
          const uint32_t pair = permute(own, other, odd ? 0x3276U : 0x5410U);
          *reinterpret_cast<uint32_t*>(shared_memory() + to + 8 * j * kPitch + 16 * i) = pair;
        }
      }
      meet();
      const int piece = thread % 8;
      const int64_t column = row + 8 * piece;
#pragma unroll 1
      for (int line = thread / 8; line < kTokens && from + line < problem.m; line += kWarpgroup / 8) {
        const uint4 eight = load_shared(staging() + static_cast<uint32_t>(line) * kPitch + piece * 16);
        T* out = static_cast<T*>(problem.out) + (from + line) * problem.columns + column;
        if (vectors) {
          if (column < problem.columns) *reinterpret_cast<uint4*>(out) = eight;
        } else {
          const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if (column + i < problem.columns) out[i].bits = static_cast<uint16_t>(pairs[i / 2] >> (16 * (i % 2)));
          }
        }
      }
      meet();
    }
  }
};

template <class T, bool Grad, int Tokens>
__device__ __forceinline__ void multiply_tiles(const Problem& problem, int group) {
  const int thread = static_cast<int>(threadIdx.x);
  float d[Tokens / 2];
  Turn<Tokens> turn;
#pragma unroll 1
  for (int64_t index = blockIdx.x; index < problem.items; index += gridDim.x) {
    const Item item = item_of<Tokens>(problem, index);
    const int64_t row = item.row + 64 * group;
#pragma unroll
    for (int i = 0; i < Tokens / 2; ++i) d[i] = 0.0F;
    multiply_steps<T, Grad, Tokens>(d, turn, item.last - item.first, group);
    if (!Grad && problem.weight.is_int8()) {
      const int64_t mine = row + thread % kWarpgroup / kWarp * 16 + lane() / 4;
      float scale[2] = {0.0F, 0.0F};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (mine + 8 * i >= problem.columns) continue;
        scale[i] = __fdiv_rn(__ldg(problem.weight.rows8.absmax + mine + 8 * i), 127.0F);
      }
#pragma unroll
      for (int i = 0; i < Tokens / 2; ++i) d[i] = __fmul_rn(d[i], scale[i / 2 % 2]);
    }
    if (item.ends && problem.side_steps > 0) multiply_steps<T, Grad, Tokens>(d, turn, problem.side_steps, group);
    if (problem.splits > 1 && !add_parts<Tokens>(problem, item, d, thread)) continue;
    const Storer<T, Grad, Tokens> storer{problem, row, item.token, group};
    storer.store(d, thread % kWarpgroup);
  }
}

}  // namespace nybble::cuda::warpgroups
