// out[m, rows] = x W^T + left right^T + bias for at most 16 rows of x: bound by reading W.
//
// W is the 16-row operand of the tensor cores, x the other one, so that up to 8 (16) rows of x cost what one does.
//
//   tile   64 rows of W (128 for more than 8 rows of x)
//   unit   a tile's rows times 128 (64) bytes of each: what a warp copies and multiplies at a time, 8 KB
//   span   32 bytes of each row of a unit: 64 columns of 4 bits, 32 of int8. A 4-bit span lies in one block of scales,
//   or
//          in two of 32
//   half   the first or second half of a unit's rows: waited for on its own, so that little is left when all has come
//
// All units, tile after tile, are dealt to the blocks in equal runs and inside a block to its warps in turn: every SM
// reads as much as any other, a warp's copies run ahead across tiles, and no barrier is met but where a tile ends.
// There the warps' sums are added in the order of the warps; a tile that blocks share goes through the workspace, and
// the last block to come adds all parts in the order of the blocks.
//
// A byte of 4-bit codes is a pair of neighbours along k, so one lookup in a table of 256 pairs, held 32 times, once for
// each lane's bank, gives a register of the operand; one permutation puts the byte above the lane's offset, which is
// the address. Codes stay bare, and a span's sums are multiplied by its scale in fp32. The order of k within a span is
// free as long as both operands agree: lane t of a quad has bytes 4t to 4t + 3 of each 16, so x's 8 columns from 8t on.
// For one or two rows of x each of the four spans has two columns of the product to itself: the sums of a span then lie
// in the lane that has decoded its scale, and a scale is applied once in four spans.
//
// Counted for 1024 weights (16 rows of a span), NF4 blocks of 64, nested, sm_90a, not measured:
//   rows of x                          1 to 2   to 8   to 16
//   bytes of W                            528    528     528
//   bytes of x from L2                 32, 64  32 to 256  288
//   warp instructions                      80     88      96    at 4 a clock: 43 to 51 weights a clock
//   wavefronts in shared memory and L1     28     30      31    33 to 36 weights a clock; 3 TB/s bring 25 at 1.755 GHz
//     table 16, copied in 4, read 4, x 0.5 or 2, scales 3.5 to 5
//   registers (no spills)                 164    195     255
// A block has 8 warps and an SM one block: 225 KB of shared memory, 192 KB of it slots that are being filled.
#include "cuda/launch.cuh"
#include "cuda/small_m_sums.cuh"

namespace nybble::cuda {

namespace {

// All pairs of codes, each 32 times; a thread writes pieces of a line in a turned order, against bank conflicts.
template <class T>
__device__ __forceinline__ void fill_pairs(unsigned char* table, const float* codebook) {
  for (uint32_t pair = threadIdx.x; pair < 256; pair += blockDim.x) {
    const uint32_t codes = pack<T>(__ldg(codebook + pair / 16), __ldg(codebook + pair % 16));
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      *reinterpret_cast<uint4*>(table + pair * kPair + ((i + pair) % 8) * 16) = make_uint4(codes, codes, codes, codes);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kMostWarps* kWarp, 1) small_m(const Work work) {
  unsigned char* shared = shared_memory();
  const int warps = 1 << work.log2_warps;
  const int self = warp();
  unsigned char* after = shared + slot_offset(warps * work.slots) / kArea * kArea;
  auto* map = reinterpret_cast<float*>(after);
  auto* offsets = reinterpret_cast<uint32_t*>(after + kMap);
  uint32_t* came_last = offsets + kMostWarps;

  const int begin = static_cast<int>(blockIdx.x) * work.per_block;
  const int end = min(begin + work.per_block, work.units);
  Unit ahead = {begin, begin / work.chunks, begin % work.chunks};  // the next to be copied
  ahead.advance(self, work.chunks);
  Unit unit = ahead;
  const uint64_t policy = evict_first_policy();
  const auto slot_at = [&](int slot) { return shared + slot_offset(self * work.slots + slot); };
  for (int slot = 0; slot < work.slots; ++slot) {
    start_copies<S>(work, ahead, ahead.number < end, slot_at(slot), policy);
    ahead.advance(warps, work.chunks);
  }
  Scales<S> stored;
  float offset = 0.0F;
  Operand<S> x;
  if constexpr (!S::kInt8) {
    if (!kLate<S> && unit.number < end) stored.load(work, unit);
    fill_pairs<typename S::T>(shared, work.weight.packed4.codebook);
    const BlockScales& scales = work.weight.packed4.scales;
    if (scales.plain == nullptr) {
      for (uint32_t i = threadIdx.x; i < 256; i += blockDim.x) map[i] = __ldg(scales.map + i);
      offset = __ldg(scales.offset);
    }
  }
#pragma unroll
  for (int span = 0; span < (kLate<S> ? 0 : Operand<S>::kHeld); ++span) x.load(work, unit, unit.number < end, span);
  __syncthreads();

  int slot = 0;
  int multiplied = -1;  // the slot whose unit is done with
  for (int tile = begin / work.chunks; tile * work.chunks < end; ++tile) {
    const int from = max(begin, tile * work.chunks);
    const int to = min(end, (tile + 1) * work.chunks);
    const int sharing = min(warps, to - from);               // warps that have units of this tile
    const int rank = (self - (from - begin)) & (warps - 1);  // of this one among them
    const bool has_side = work.side.rank > 0 && from == tile * work.chunks && rank < sharing;
    float total[S::kTiles][S::kGroups][4] = {};
    if (!S::kInt8 && has_side) add_side_of_tile<S>(work, tile, rank, sharing, total);
    while (unit.number < to) {
      if (multiplied >= 0) {
        __syncwarp();
        start_copies<S>(work, ahead, ahead.number < end, slot_at(multiplied), policy);
        ahead.advance(warps, work.chunks);
      }
      Unit next = unit;
      next.advance(warps, work.chunks);
      const bool exists = next.number < end;
      float scales[S::kScales];
      Operand<S> later;
      if constexpr (!S::kInt8) {
        if (kLate<S>) stored.load(work, unit);
        stored.decode(work, map, offset, scales);
        if (!kLate<S> && exists) stored.load(work, next);
      }
      if constexpr (S::kSpread) later.load(work, next, exists, 0);
      const unsigned char* at = slot_at(slot);
      if (work.slots == 3) {
        copy_async_wait<5>();
      } else {
        copy_async_wait<3>();
      }
      __syncwarp();
      multiply_half<S, 0>(work, shared, at, scales, unit, next, exists, x, total);
      if (work.slots == 3) {
        copy_async_wait<4>();
      } else {
        copy_async_wait<2>();
      }
      __syncwarp();
      multiply_half<S, 1>(work, shared, at, scales, unit, next, exists, x, total);
      if constexpr (S::kSpread) x = later;
      multiplied = slot;
      slot = slot + 1 == work.slots ? 0 : slot + 1;
      unit = next;
    }
    if (rank < sharing) {
      if constexpr (S::kInt8) {
        scale_int8<S>(work, tile, total);
        if (has_side) add_side_of_tile<S>(work, tile, rank, sharing, total);
      }
      __syncwarp();
      write_sums<S>(slot_at(multiplied), total);
      if (lane() == 0) offsets[rank] = slot_offset(self * work.slots + multiplied);
    }
    __syncthreads();
    finish_tile<S>(work, shared, offsets, sharing, came_last, tile);
    __syncthreads();
  }
}

// Warps of a block and slots of a warp that fit into shared memory: 227 KB, 163 KB, and 99 KB where not known better.
struct Depth {
  int log2_warps;
  int slots;
};
Depth depth_of(int capability) {
  if (capability == 90 || capability == 100 || capability == 103) return {3, 3};
  if (capability == 80 || capability == 87) return {3, 2};
  return {2, 2};
}

// Units that a block could multiply while the parts of a tile that two blocks share are put together.
constexpr int64_t kJoining = 4;
constexpr int64_t kMostBlocks = 512;

template <class S>
Status start(const LinearArgs& args, const Device& device, const Place& place) {
  const int64_t chunks = divide_up(args.weight.cols, S::kDepth);
  const int64_t tiles = divide_up(args.weight.rows, S::kRows);
  const int64_t units = tiles * chunks;
  if (units > INT32_MAX / 2) return bad_argument("in_features", args.weight.cols);
  const Depth depth = depth_of(device.capability);
  const int64_t warps = int64_t{1} << depth.log2_warps;
  // A multiprocessor has one block. Whole tiles, if that is hardly more for the fullest one, else equal runs of units.
  static_assert(4 * kCounters + kMostBlocks * 2 * S::kRows * S::kColumns * 4 <= kWorkspaceBytes);
  const int64_t blocks = smaller(device.multiprocessors, kMostBlocks);
  const int64_t whole = divide_up(tiles, blocks) * chunks;
  const int64_t equal = divide_up(units, blocks);
  const int64_t per_block = whole <= equal + kJoining ? whole : equal;
  Work work;
  work.weight = args.weight;
  work.x = static_cast<const uint16_t*>(args.x);
  work.x_stride = args.x_stride;
  work.m = static_cast<int>(args.m);
  work.side = args.side;
  work.bias = args.bias;
  work.bias_dtype = args.bias_dtype;
  work.out = static_cast<uint16_t*>(args.out);
  work.chunks = static_cast<int>(chunks);
  work.units = static_cast<int>(units);
  work.per_block = static_cast<int>(per_block);
  work.log2_warps = depth.log2_warps;
  work.slots = depth.slots;
  work.counters = static_cast<uint32_t*>(place.workspace);
  work.partials = static_cast<float*>(place.workspace) + kCounters;
  const int64_t slots = warps * depth.slots;
  const int64_t areas = slots <= kTableAreas ? kTableAreas : kTableAreas + divide_up(slots - kTableAreas, 2);
  return launch<&small_m<S>>(dim3(static_cast<unsigned>(divide_up(units, per_block))), static_cast<int>(warps) * kWarp,
                             static_cast<size_t>(areas * kArea + kSmall), place, work);
}

template <class T>
Status start_as(const LinearArgs& args, const Device& device, const Place& place) {
  if (args.weight.is_int8()) {
    return args.m <= 8 ? start<Shape<T, Stored::int8, 8>>(args, device, place)
                       : start<Shape<T, Stored::int8, 16>>(args, device, place);
  }
  if (args.weight.packed4.block_shift == 5) return start<Shape<T, Stored::blocks_of_32, 16>>(args, device, place);
  if (args.m <= 2) return start<Shape<T, Stored::four_bits, 2>>(args, device, place);
  return args.m <= 8 ? start<Shape<T, Stored::four_bits, 8>>(args, device, place)
                     : start<Shape<T, Stored::four_bits, 16>>(args, device, place);
}

}  // namespace

Status linear_small_m(const LinearArgs& args, const Device& device, const Place& place) {
  if (args.m <= 0 || args.weight.rows == 0) return success();
  if (args.m > 16 || args.weight.cols % 64 != 0) return bad_argument("kernel", args.m);
  return args.dtype == DType::bf16 ? start_as<Bf16>(args, device, place) : start_as<F16>(args, device, place);
}

}  // namespace nybble::cuda
