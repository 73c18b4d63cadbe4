// What the warpgroups of linear_wgmma.cu do that fill stages: copy x, copy and decode the weight.
#pragma once
#include "cuda/block_table.cuh"
#include "cuda/linear_wgmma.cuh"

namespace nybble::cuda::warpgroups {

// Eight numbers from `index` on rounded to T, zeros from the `count`-th on; `aligned`: to 16 bytes.
template <class T>
__device__ __forceinline__ uint4 load_side_8(const void* data, DType dtype, int64_t index, int64_t count,
                                             bool aligned) {
  if (count <= 0) return make_uint4(0, 0, 0, 0);
  if (aligned && count >= 8 && dtype == DType::f32) {
    const float4* four = reinterpret_cast<const float4*>(static_cast<const float*>(data) + index);
    const float4 first = __ldg(four), second = __ldg(four + 1);
    return make_uint4(pack<T>(first.x, first.y), pack<T>(first.z, first.w), pack<T>(second.x, second.y),
                      pack<T>(second.z, second.w));
  }
  return load_numbers_8<T>(data, dtype, index, count < 8 ? static_cast<int>(count) : 8, aligned);
}

// ---- tiles of x: a line is a token
// -----------------------------------------------------------------------------------

template <class T, bool Grad, int Tokens>
struct Copier {
  const Problem& problem;
  int piece, line;  // and every 16th line after it, which the swizzle treats alike
  uint32_t target;  // in a stage
  const T* source;  // of the next step
  int lines;        // that there are from `line` on
  bool side_aligned;

  __device__ __forceinline__ Copier(const Problem& from, int thread)
      : problem(from), piece(thread % 8), line(thread / 8), source(nullptr), lines(0) {
    target = kWeightBytes + swizzled(static_cast<uint32_t>(line), static_cast<uint32_t>(piece));
    side_aligned = from.side.rank % 8 == 0 && aligned_16(from.side.left);
  }

  __device__ __forceinline__ void enter(int64_t token, int step) {
    lines = static_cast<int>(smaller(Tokens, problem.m - token)) - line;
    source = static_cast<const T*>(problem.x) + (token + line) * problem.x_stride + int64_t{step} * kStep + piece * 8;
  }

  __device__ __forceinline__ void copy(int step, uint32_t stage) {
    const int count = !Grad || int64_t{step} * kStep + piece * 8 < problem.contraction ? lines : 0;
    const int64_t stride = 16 * problem.x_stride;
#pragma unroll
    for (int i = 0; i < Tokens / 16; ++i) {
      copy_async_16(shared_memory() + stage + target + i * 16 * kLine, source + i * stride, 16 * i < count);
    }
  }

  // 64 ranks of `left` instead of x.
  __device__ __forceinline__ void side(int64_t token, int step, uint32_t stage) const {
    const int64_t rank = problem.side.rank, first = int64_t{step} * kStep + piece * 8;
#pragma unroll 1
    for (int i = 0; i < Tokens / 16; ++i) {
      store_shared(stage + target + static_cast<uint32_t>(i) * 16 * kLine,
                   load_side_8<T>(problem.side.left, problem.side.left_dtype, (token + line + 16 * i) * rank + first,
                                  16 * i < lines ? rank - first : 0, side_aligned));
    }
  }
};

// ---- tiles of the weight ----------------------------------------------------------------------------------------

// A chunk of an item.
struct Position {
  int64_t index;
  int64_t row;
  int64_t token;
  int step, last;
  bool ends;
};

// The line of a tile that a thread decodes. Forward, it is a row of the weight and 64 of its columns: thread t has row
// t. For grad_input it is a row of the weight, which is one k, and 64 columns: a warp has 16 rows, its lanes from 16 on
// the second half of the columns. Either way a line of the tile, like one of a chunk, has the number of the lane in its
// last three bits, which is all that the swizzle asks of it.
//
//   line of a chunk    forward     row of the weight        4 or 2 steps beside each other
//                      grad_input  k + 64 (step / 2)        128 columns of step 0, 2, then of step 1, 3
//                            int8  k + 64 step              128 columns
template <class T, bool Grad, int Tokens>
struct Decoder {
  using Memory = Layout<Tokens>;
  const Problem& problem;
  int thread;       // among those that fill
  int row_of_tile;  // of this thread
  int half;         // of the columns, for grad_input
  bool int8;
  bool half_blocks;  // two in a line
  int chunk;         // steps
  int64_t row_bytes;
  uint32_t target[8];  // of its pieces, in a stage: kept, so that a store needs no arithmetic

  __device__ __forceinline__ Decoder(const Problem& from, int number)
      : problem(from), thread(number), int8(from.weight.is_int8()) {
    const int member = number % kWarpgroup;
    row_of_tile = Grad ? member / kWarp * 16 + member % 16 : member;
    half = Grad ? member % kWarp / 16 : 0;
    half_blocks = !int8 && from.weight.packed4.block_shift == 5;
    chunk = int8 ? 2 : 4;
    row_bytes = int8 ? from.weight.cols : from.weight.cols / 2;
#pragma unroll
    for (int i = 0; i < 8; ++i) target[i] = piece_of_tile(i);
  }

  __device__ __forceinline__ uint32_t piece_of_tile(int piece) const {
    return swizzled(static_cast<uint32_t>(row_of_tile), static_cast<uint32_t>(piece)) +
           static_cast<uint32_t>(half) * kHalfBytes;
  }

  __device__ __forceinline__ void enter(Position& at) const {
    if (at.index >= problem.items) return;
    const Item item = item_of<Tokens>(problem, at.index);
    at.row = item.row, at.token = item.token, at.step = item.first, at.last = item.last, at.ends = item.ends;
  }
  __device__ __forceinline__ void advance(Position& at) const {
    if (at.index >= problem.items) return;
    at.step += chunk;
    if (at.step < at.last) return;
    at.index += gridDim.x;
    enter(at);
  }

  // Starts the copy of a chunk's bytes; a warp's instruction takes four whole lines.
  __device__ __forceinline__ void copy(const Position& at, uint32_t slot) const {
    if (at.index < problem.items) {
      const uint8_t* packed =
          int8 ? reinterpret_cast<const uint8_t*>(problem.weight.rows8.q) : problem.weight.packed4.packed;
      const int line = thread / 8, piece = thread % 8;
      int64_t row, byte, rows = problem.weight.rows;
      bool inside;
      if constexpr (Grad) {
        row = int64_t{at.step} * kStep + line + (int8 ? 0 : piece / 4 * kStep);
        byte = int8 ? at.row + piece * 16 : at.row / 2 + piece % 4 * 16;
        rows = smaller(rows, int64_t{at.last} * kStep);
        inside = byte < row_bytes;
      } else {
        const int64_t step_bytes = int8 ? kStep : kStep / 2;
        row = at.row + line;
        byte = at.step * step_bytes + piece * 16;
        inside = byte < at.last * step_bytes;
      }
      const uint8_t* source = packed + row * row_bytes + byte;
      unsigned char* to = shared_memory() + Memory::kRing + slot * kChunkBytes +
                          swizzled(static_cast<uint32_t>(line), static_cast<uint32_t>(piece));
      constexpr int kLines = Memory::kFillers / 8;
#pragma unroll
      for (int first = 0; first < kRows; first += kLines) {
        const int down = Grad && !int8 && first >= kStep ? first + kStep : first;
        copy_async_16(to + static_cast<uint32_t>(first) * kLine, source + down * row_bytes,
                      inside && row + down < rows);
      }
    }
    copy_async_commit();
  }

  // The scales of a chunk's steps as they are stored, two a step where blocks are of 32.
  __device__ __forceinline__ void load(const Position& at, const Scales& scales, StoredScale (&first)[4],
                                       StoredScale (&second)[4]) const {
    if (at.index >= problem.items || (int8 && !Grad)) return;
    int64_t row, column, steps = at.last - at.step;  // that this thread has weights in
    if constexpr (Grad) {
      row = int64_t{at.step} * kStep + row_of_tile;
      column = at.row + half * kStep;
      steps = smaller(steps, (problem.weight.rows - row + kStep - 1) / kStep);
      if (column >= problem.weight.cols) steps = 0;
    } else {
      row = at.row + row_of_tile;
      column = int64_t{at.step} * kStep;
      if (row >= problem.weight.rows) steps = 0;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t line = Grad ? row + i * kStep : row;
      const int64_t flat = line * problem.weight.cols + column + (Grad ? 0 : i * kStep);
      first[i] = second[i] = scales.none();  // zeros, whatever their codes
      if (i >= steps) continue;
      first[i] = scales.load(line, flat);
      if (half_blocks) second[i] = scales.load(line, flat + 32);
    }
  }

  // Where 64 weights of this thread lie in a chunk: in which line, and from which piece on.
  __device__ __forceinline__ uint32_t line_of(int step) const {
    const int down = !Grad ? 0 : int8 ? step : step / 2;
    return static_cast<uint32_t>(row_of_tile + down * kStep) * kLine;
  }
  __device__ __forceinline__ uint32_t piece_of(int step) const {
    const int pieces = int8 ? 4 : 2;
    const int before = !Grad ? step * pieces : half * pieces + (int8 ? 0 : step % 2 * 4);
    return static_cast<uint32_t>(before);
  }
  __device__ __forceinline__ uint4 piece_at(uint32_t line, uint32_t piece) const {
    return load_shared(line + ((piece ^ static_cast<uint32_t>(row_of_tile % 8)) << 4));
  }

  __device__ __forceinline__ void decode_4bit(uint32_t line, uint32_t piece, const float (&codebook)[16], float first,
                                              float second, uint32_t stage) const {
    const uint4 codes[2] = {piece_at(line, piece), piece_at(line, piece + 1)};
    BlockTable table = block_table<T>(codebook, first);
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      if (i == 1 && half_blocks) table = block_table<T>(codebook, second);
      store_shared(stage + target[4 * i], decode_8(table, codes[i].x));
      store_shared(stage + target[4 * i + 1], decode_8(table, codes[i].y));
      store_shared(stage + target[4 * i + 2], decode_8(table, codes[i].z));
      store_shared(stage + target[4 * i + 3], decode_8(table, codes[i].w));
    }
  }

  // q as it is, exact in 16 bits, forward, where the scale of a row waits for the sum; else T(q * scale).
  __device__ __forceinline__ uint4 decode_int8(uint32_t low, uint32_t high, float scale) const {
    float values[8];
    int8_values_4(low, values);
    int8_values_4(high, values + 4);
    if constexpr (Grad) {
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = __fmul_rn(values[i], scale);
    }
    return pack_8<T>(values);
  }
  __device__ __forceinline__ void decode_int8(uint32_t line, uint32_t piece, float scale, uint32_t stage) const {
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint4 codes = piece_at(line, piece + i);
      store_shared(stage + target[2 * i], decode_int8(codes.x, codes.y, scale));
      store_shared(stage + target[2 * i + 1], decode_int8(codes.z, codes.w, scale));
    }
  }

  // 64 ranks of `right` instead of a weight.
  __device__ __forceinline__ void side(const Position& at, int step, bool aligned, uint32_t stage) const {
    const int64_t rank = problem.side.rank;
    int64_t index, count;
    if constexpr (Grad) {
      const int64_t row = int64_t{step} * kStep + row_of_tile;
      const int64_t column = at.row + half * kStep;
      index = row * problem.weight.cols + column;
      count = row < rank ? problem.weight.cols - column : 0;
    } else {
      const int64_t row = at.row + row_of_tile;
      index = row * rank + int64_t{step} * kStep;
      count = row < problem.weight.rows ? rank - int64_t{step} * kStep : 0;
    }
#pragma unroll 1
    for (int i = 0; i < 8; ++i) {
      store_shared(stage + piece_of_tile(i),
                   load_side_8<T>(problem.side.right, problem.side.right_dtype, index + 8 * i, count - 8 * i, aligned));
    }
  }
};

template <class T, bool Grad, int Tokens>
__device__ __forceinline__ void fill_tiles(const Problem& problem, int thread) {
  using Memory = Layout<Tokens>;
  const Decoder<T, Grad, Tokens> decoder(problem, thread);
  Copier<T, Grad, Tokens> copier(problem, thread % kWarpgroup);
  const Scales scales(problem.weight, reinterpret_cast<const float*>(shared_memory() + Memory::kMap));
  float codebook[16] = {};
  if (!decoder.int8) {
#pragma unroll
    for (int i = 0; i < 16; ++i) codebook[i] = __ldg(problem.weight.packed4.codebook + i);
  }
  constexpr int kTurns = Memory::kFillers / kWarpgroup;  // warpgroups take steps in turn
  const int mine = warp() / 4 - 2;
  const bool side_aligned = (Grad ? problem.weight.cols : problem.side.rank) % 8 == 0 && aligned_16(problem.side.right);

  // Packed bytes are copied two chunks ahead, scales loaded one ahead.
  Position here = {static_cast<int64_t>(blockIdx.x), 0, 0, 0, 0, false};
  decoder.enter(here);
  Position next = here;
  decoder.advance(next);
  Position ahead = next;
  decoder.advance(ahead);
  decoder.copy(here, 0);
  decoder.copy(next, 1);
  StoredScale first[4] = {}, second[4] = {};
  decoder.load(here, scales, first, second);
  uint32_t slot = 0;
  Turn<Tokens> turn;
#pragma unroll 1
  while (here.index < problem.items) {
    float by[4], then_by[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      by[i] = scales.value(first[i]);
      then_by[i] = decoder.half_blocks ? scales.value(second[i]) : 0.0F;
    }
    decoder.load(next, scales, first, second);
    copy_async_wait<1>();
    barrier_sync(4, Memory::kFillers);  // the other threads' copies are there, and none still reads the chunk before
    decoder.copy(ahead, slot == 0 ? kChunks - 1 : slot - 1);
    copier.enter(here.token, here.step);
    const int steps = static_cast<int>(smaller(decoder.chunk, here.last - here.step));
#pragma unroll 1
    for (int step = 0; step < steps; ++step, turn.advance()) {
      if (kTurns == 1 || step % kTurns == mine) {
        mbarrier_wait(Memory::empty(turn.stage), turn.phase ^ 1);
        const uint32_t line = Memory::kRing + slot * kChunkBytes + decoder.line_of(step);
        if (decoder.int8) {
          decoder.decode_int8(line, decoder.piece_of(step), by[0], turn.offset());
        } else {
          decoder.decode_4bit(line, decoder.piece_of(step), codebook, by[0], then_by[0], turn.offset());
        }
        fence_async_shared();
        mbarrier_arrive(Memory::full(turn.stage));
        // Not before the fence, lest it wait for them as well.
        copier.copy(here.step + step, turn.offset());
        copy_async_arrive(Memory::full(turn.stage));
      }
      copier.source += kStep;
#pragma unroll
      for (int i = 0; i < 3; ++i) by[i] = by[i + 1], then_by[i] = then_by[i + 1];
    }
    if (here.step + decoder.chunk >= here.last && here.ends) {
#pragma unroll 1
      for (int step = 0; step < problem.side_steps; ++step, turn.advance()) {
        if (kTurns != 1 && step % kTurns != mine) continue;
        mbarrier_wait(Memory::empty(turn.stage), turn.phase ^ 1);
        copier.side(here.token, step, turn.offset());
        decoder.side(here, step, side_aligned, turn.offset());
        fence_async_shared();
        mbarrier_arrive(Memory::full(turn.stage));
        mbarrier_arrive(Memory::full(turn.stage));  // instead of the copies' arrival
      }
    }
    if (++slot == kChunks) slot = 0;
    here = next;
    next = ahead;
    decoder.advance(ahead);
  }
  copy_async_wait<0>();
}

}  // namespace nybble::cuda::warpgroups
