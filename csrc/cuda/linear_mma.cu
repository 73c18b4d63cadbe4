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
#include "cuda/linear_mma_fill.cuh"
#include "cuda/linear_mma_side.cuh"

namespace nybble::cuda {

namespace {

using namespace mma_tiles;

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

// ---- the output -----------------------------------------------------------------------------------------------------

// Adds the bias, rounds and stores, by way of shared memory: so that the lanes of a store lie side by side.
template <class T, int Rows>
__device__ __forceinline__ void store(const float (&sums)[Shape<Rows>::kSums], const LinearArgs& args,
                                      const TilePlan& plan, int64_t row, int64_t column) {
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
    multiply_tiles(const LinearArgs args, const TilePlan plan, unsigned char* workspace) {
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
  TilePlan plan;
  const Status planned = plan_tiles(args, device, Rows, kColumns, kDepth, 8, Shape<Rows>::kBlocks, &plan);
  if (!planned.ok()) return planned;
  const size_t bytes = static_cast<size_t>(Shape<Rows>::kRingAt) + static_cast<size_t>(Shape<Rows>::kStages) * kUnits *
                                                                       kThreads * (args.weight.is_int8() ? 32 : 16);
  return launch<&multiply_tiles<T, Grad, Rows>>(grid_of(plan), kThreads, bytes, place, args, plan,
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
