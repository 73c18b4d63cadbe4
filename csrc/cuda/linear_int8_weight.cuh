// Rows of W as the operand of the tensor cores that lies in registers: 4-bit codes turned into int8 by a table of their
// block, or int8 as it is.
#pragma once
#include "cuda/linear_int8.cuh"

namespace nybble::cuda {

constexpr int kTablesBytes = 2176;

template <class T>
struct Fragments {
  uint32_t a[T::kOwn / 2][4][4];
  float step[T::kOwn];
};

// Eight 4-bit codes as int8 by the table of 16: those of the low half in `first`, neighbours swapped.
__device__ __forceinline__ void look_up(const uint32_t (&table)[4], uint32_t codes, uint32_t* first, uint32_t* second) {
  const uint32_t within = codes & 0x77777777U;                       // in a half of the table
  const uint32_t half = ((codes >> 1) & 0x44444444U) | 0x32103210U;  // byte i of either
  *first = permute(permute(table[0], table[1], within), permute(table[2], table[3], within), half);
  *second = permute(permute(table[0], table[1], within >> 16), permute(table[2], table[3], within >> 16), half >> 16);
}

// Shared memory before the stages, for 4-bit weights.
struct Tables {
  float codebook[16];
  float map[256];  // of nested scales
  float offset;    // likewise
  float unit;      // the codebook's largest magnitude / 127
  // For each row the block in which it begins, less the tile's first block, times 128, plus how far into it it begins,
  // by 32. One word each, because what a thread would keep of its rows would not fit its registers.
  uint32_t rows[256];
};
// Behind them, for all weights: what is wanted again at the end, so that no register keeps it.
struct Origin {
  int x_row, w_row;
};
static_assert(sizeof(Tables) + sizeof(Origin) <= kTablesBytes);

// The scales of a thread's rows of W in its 32 columns of a step, which lie in one block; fetched a step ahead.
template <class T>
struct BlockReader {
  const uint32_t* rows;   // of Tables, this thread's first one
  uint32_t base;          // the tile's first block
  uint32_t raw[T::kOwn];  // a scale's bits, or its code

  // Rows behind the last one are read as the last; their results are not stored.
  __device__ __forceinline__ BlockReader(const Int8Job& job, Tables* tables, int w_row, int own_row)
      : rows(tables->rows + own_row) {
    const Weight& weight = job.args.weight;
    const int shift = weight.packed4.block_shift;
    const int64_t first_block = ((job.first_w + w_row) * weight.cols) >> shift;
    base = static_cast<uint32_t>(first_block);
    if (threadIdx.x < T::kRows) {
      const int row = min(w_row + static_cast<int>(threadIdx.x), job.w_rows - 1);
      const int64_t at = (job.first_w + row) * weight.cols;
      const uint32_t into = static_cast<uint32_t>(at) & ((1U << shift) - 1);
      tables->rows[threadIdx.x] = (static_cast<uint32_t>((at >> shift) - first_block) << 7) | (into >> 5);
    }
  }
  // In units of 32 columns.
  static __device__ __forceinline__ uint32_t column(int step) { return 4 * static_cast<uint32_t>(step) + lane() % 4; }
  static __device__ __forceinline__ bool inside(const Weight& weight, int step) {
    return column(step) < static_cast<uint32_t>(weight.cols) / 32;
  }
  __device__ __forceinline__ uint32_t block(const Weight& weight, int own, int step) const {
    const uint32_t row = rows[8 * own];
    const uint32_t further = ((row & 127U) + column(step)) >> (weight.packed4.block_shift - 5);
    return base + (inside(weight, step) ? (row >> 7) + further : 0U);  // a block that is there
  }
  __device__ __forceinline__ void fetch(const Weight& weight, int step) {
    const BlockScales& scales = weight.packed4.scales;
    if (scales.plain != nullptr) {
#pragma unroll
      for (int own = 0; own < T::kOwn; ++own) {
        raw[own] = __float_as_uint(__ldg(scales.plain + block(weight, own, step)));
      }
    } else {
#pragma unroll
      for (int own = 0; own < T::kOwn; ++own) raw[own] = __ldg(scales.codes + block(weight, own, step));
    }
  }
  __device__ __forceinline__ void get(const Weight& weight, const Tables* tables, float offset, int step,
                                      float (&out)[T::kOwn]) const {
    const BlockScales& scales = weight.packed4.scales;
#pragma unroll
    for (int own = 0; own < T::kOwn; ++own) out[own] = __uint_as_float(raw[own]);
    if (scales.plain == nullptr) {
#pragma unroll
      for (int own = 0; own < T::kOwn; ++own) {
        const float factor = __ldg(scales.nested + (block(weight, own, step) >> scales.nested_shift));
        out[own] = __fadd_rn(__fmul_rn(tables->map[raw[own]], factor), offset);
      }
    }
#pragma unroll
    for (int own = 0; own < T::kOwn; ++own) out[own] = inside(weight, step) ? out[own] : 0.0F;
  }
};

struct Nothing {
  template <class... Any>
  __device__ __forceinline__ explicit Nothing(const Any&...) {}
};

// The integer nearest to a product, in the lowest bits.
__device__ __forceinline__ uint32_t rounded(float a, float b) { return __float_as_uint(__fmaf_rn(a, b, kShifted)); }

template <class T>
__device__ __forceinline__ void decode_packed(const Weight& weight, const unsigned char* w, const Tables* tables,
                                              float unit, float tables_offset, const BlockReader<T>& blocks, int step,
                                              Fragments<T>& to) {
  float scales[T::kOwn];
  blocks.get(weight, tables, tables_offset, step, scales);
#pragma unroll
  for (int own = 0; own < T::kOwn; ++own) {
    __syncwarp();  // rows one after the other: all at once would not fit the registers
    uint32_t largest = __float_as_uint(scales[own]) & 0x7FFFFFFFU;
    largest = max(largest, __shfl_xor_sync(kWholeWarp, largest, 1));
    largest = max(largest, __shfl_xor_sync(kWholeWarp, largest, 2));
    bool usable;
    to.step[own] = step_of(largest, unit, &usable);
    // A lift keeps the reciprocal of a small step finite.
    const float lift = __uint_as_float(largest) < 0x1p-64F ? 0x1p64F : 1.0F;
    const float factor =
        usable ? __fmul_rn(__fmul_rn(scales[own], lift), reciprocal(__fmul_rn(to.step[own], lift))) : 0.0F;
    uint32_t table[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 four = *reinterpret_cast<const float4*>(tables->codebook + 4 * i);
      const uint32_t bits[4] = {rounded(four.x, factor), rounded(four.y, factor), rounded(four.z, factor),
                                rounded(four.w, factor)};
      table[i] = permute(permute(bits[0], bits[1], 0x0040U), permute(bits[2], bits[3], 0x0040U), 0x5410U);
    }
    const uint4 codes = *reinterpret_cast<const uint4*>(w + 8 * own * T::kRowBytes);
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      uint32_t (&a)[4] = to.a[own / 2][s];
      look_up(table, words[s], &a[own % 2], &a[own % 2 + 2]);
    }
  }
}

// A row's 32 bytes of this thread, which lie in chunks 2 t and 2 t + 1 of it: the swizzle puts the second 16 bytes
// before or after the first, which begins `at` bytes into the stages.
__device__ __forceinline__ void load_codes(const unsigned char* stages, int at, uint32_t (&words)[8]) {
  const uint4 low = *reinterpret_cast<const uint4*>(stages + at);
  const uint4 high = *reinterpret_cast<const uint4*>(stages + (at ^ 16));
  words[0] = low.x, words[1] = low.y, words[2] = low.z, words[3] = low.w;
  words[4] = high.x, words[5] = high.y, words[6] = high.z, words[7] = high.w;
}

template <class T>
__device__ __forceinline__ void read_codes(const unsigned char* stages, int at, Fragments<T>& to) {
#pragma unroll
  for (int own = 0; own < T::kOwn; ++own) {
    uint32_t words[8];
    load_codes(stages, at + 8 * own * kStep, words);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      to.a[own / 2][s][own % 2] = words[2 * s];
      to.a[own / 2][s][own % 2 + 2] = words[2 * s + 1];
    }
  }
}

}  // namespace nybble::cuda
