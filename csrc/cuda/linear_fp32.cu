// Linear layers of fp32 inputs, multiplied and summed in fp32 with fused multiply-adds: both directions, any sizes and
// alignment.
//
// A block has 16 or 64 rows of x and 128 columns of the output; a step is 32 k. Both tiles lie in shared memory with k
// as their first index, so that a thread reads 4 rows or columns at once: for 64 rows, 4 reads of 16 bytes feed 64
// multiply-adds. The side path is more steps, of rank instead of k.
#include "cuda/launch.cuh"
#include "cuda/tiles.cuh"
#include "cuda/weights.cuh"

namespace nybble::cuda {

namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 128;
constexpr int kDepth = 32;
constexpr int kAcross = 8;  // columns of a thread

constexpr int kTableAt = 0;
constexpr int kMapAt = kTableAt + kCodeTable * 4;
constexpr int kWeightAt = kMapAt + kScaleMap * 4;
constexpr int kInputAt = kWeightAt + kDepth * kColumns * 4;

// Where column `column` of line k lies in the weight's tile: groups of 4 columns swizzled, so that neither lanes that
// store 4 columns, of 2 lines and 4 units of 32 columns, nor lanes that read 8 groups beside each other meet in a bank.
__device__ __forceinline__ int weight_place(int k, int column) {
  const int group = column / 4;
  return k * kColumns + (group ^ (group >> 3) ^ ((k & 1) << 2)) * 4 + column % 4;
}

// The tile of the weight: one unit of 32 weights for each thread, of a line of k in the direction of columns
// (grad_input) or of a column in that of k.
template <bool Grad>
struct Decoder {
  const Weight& weight;
  const Scales scales;
  int64_t column;  // the tile's first of out
  float* tile;
  const float* table;
  uint32_t table_column;

  __device__ __forceinline__ Decoder(const Weight& w, int64_t at)
      : weight(w), scales(w, reinterpret_cast<const float*>(shared_memory() + kMapAt)), column(at) {
    tile = reinterpret_cast<float*>(shared_memory() + kWeightAt);
    table = reinterpret_cast<const float*>(shared_memory() + kTableAt);
    table_column = __shfl_sync(kWholeWarp, code_column(), lane());  // as in linear_mma.cu
  }

  __device__ __forceinline__ int64_t row(int step) const {
    const int thread = static_cast<int>(threadIdx.x);
    return Grad ? int64_t{step} * kDepth + thread / 4 : column + thread;
  }
  __device__ __forceinline__ int64_t first(int step) const {
    return Grad ? column + static_cast<int>(threadIdx.x) % 4 * 32 : int64_t{step} * kDepth;
  }

  // Starts to load the unit of a step and its scale.
  __device__ __forceinline__ void load(int step, uint4 (&codes)[2], StoredScale* stored) const {
    *stored = scales.none();
    codes[0] = codes[1] = make_uint4(0, 0, 0, 0);
    if (row(step) >= weight.rows || first(step) >= weight.cols) return;
    const int64_t flat = row(step) * weight.cols + first(step);
    *stored = scales.load(row(step), flat);
    if (weight.is_int8()) {
      codes[0] = __ldg(reinterpret_cast<const uint4*>(weight.rows8.q + flat));
      codes[1] = __ldg(reinterpret_cast<const uint4*>(weight.rows8.q + flat + 16));
    } else {
      codes[0] = __ldg(reinterpret_cast<const uint4*>(weight.packed4.packed + flat / 2));
    }
  }

  __device__ __forceinline__ void put_8(int eighth, const float (&values)[8]) const {
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      if (Grad) {
        *reinterpret_cast<float4*>(tile + weight_place(thread / 4, thread % 4 * 32 + eighth * 8 + i)) =
            make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
      } else {
#pragma unroll
        for (int j = i; j < i + 4; ++j) tile[weight_place(eighth * 8 + j, thread)] = values[j];
      }
    }
  }

  __device__ __forceinline__ void decode(const uint4 (&codes)[2], const StoredScale& stored) const {
    const float by = scales.value(stored);
    const uint32_t words[8] = {codes[0].x, codes[0].y, codes[0].z, codes[0].w,
                               codes[1].x, codes[1].y, codes[1].z, codes[1].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float values[8];
      if (weight.is_int8()) {
        int8_values_4(words[2 * i], values);
        int8_values_4(words[2 * i + 1], values + 4);
      } else {
        decode_8(table, words[i], table_column, values);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = __fmul_rn(values[j], by);
      put_8(i, values);
    }
  }

  __device__ __forceinline__ void decode_any(int step) const {
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      float values[8];
      decode_any_8(weight, row(step), first(step) + i * 8, table, table_column, values);
      put_8(i, values);
    }
  }
};

// The tile of x: for each thread some k of one row.
template <int Rows>
struct Input {
  static constexpr int kCount = Rows * kDepth / kThreads;

  const LinearArgs& args;
  int64_t row;  // the tile's first
  bool vector;
  float* tile;

  __device__ __forceinline__ int line() const { return static_cast<int>(threadIdx.x) % Rows; }
  __device__ __forceinline__ int first() const { return static_cast<int>(threadIdx.x) / Rows * kCount; }

  __device__ __forceinline__ void load(int step, float (&values)[kCount]) const {
    const int64_t k = int64_t{step} * kDepth + first();
    const int64_t left = row + line() < args.m ? args.contraction() - k : 0;
    const float* from = static_cast<const float*>(args.x) + (row + line()) * args.x_stride + k;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      float4 four = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
      if (vector) {
        if (i < left) four = __ldg(reinterpret_cast<const float4*>(from + i));
      } else {
        if (i < left) four.x = __ldg(from + i);
        if (i + 1 < left) four.y = __ldg(from + i + 1);
        if (i + 2 < left) four.z = __ldg(from + i + 2);
        if (i + 3 < left) four.w = __ldg(from + i + 3);
      }
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    }
  }
  __device__ __forceinline__ void put(const float (&values)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) tile[(first() + i) * Rows + line()] = values[i];
  }
};

// Row and column in the tile of a thread's sums: groups of 4 rows (2, of 16 rows) and 4 columns.
template <int Rows>
struct Sums {
  static constexpr int kDown = Rows / 8;
  static constexpr int kGroup = kDown < 4 ? kDown : 4;

  float values[kDown * kAcross] = {};

  static __device__ __forceinline__ int row(int i) {
    const int strip = static_cast<int>(threadIdx.x) / 16;
    return i / kGroup * (Rows / 2) + strip * kGroup + i % kGroup;
  }
  static __device__ __forceinline__ int column(int j) {
    return j / 4 * (kColumns / 2) + static_cast<int>(threadIdx.x) % 16 * 4 + j % 4;
  }

  __device__ __forceinline__ void add_products(const float* input, const float* weight) {
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      float a[kDown], b[kAcross];
#pragma unroll
      for (int i = 0; i < kDown; i += kGroup) {
        if constexpr (kGroup == 4) {
          const float4 four = *reinterpret_cast<const float4*>(input + k * Rows + row(i));
          a[i] = four.x, a[i + 1] = four.y, a[i + 2] = four.z, a[i + 3] = four.w;
        } else {
          const float2 two = *reinterpret_cast<const float2*>(input + k * Rows + row(i));
          a[i] = two.x, a[i + 1] = two.y;
        }
      }
#pragma unroll
      for (int j = 0; j < kAcross; j += 4) {
        const float4 four = *reinterpret_cast<const float4*>(weight + weight_place(k, column(j)));
        b[j] = four.x, b[j + 1] = four.y, b[j + 2] = four.z, b[j + 3] = four.w;
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
#pragma unroll
        for (int j = 0; j < kAcross; ++j) values[i * kAcross + j] = __fmaf_rn(a[i], b[j], values[i * kAcross + j]);
      }
    }
  }
};

template <bool Grad, int Rows>
__device__ __forceinline__ void add_steps(Sums<Rows>& sums, const Decoder<Grad>& decoder, const Input<Rows>& x,
                                          bool units, int begin, int end) {
  uint4 codes[2] = {};
  StoredScale stored = decoder.scales.none();
  float values[Input<Rows>::kCount] = {};
  if (units) decoder.load(begin, codes, &stored);
  x.load(begin, values);
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    __syncthreads();
    if (units) {
      decoder.decode(codes, stored);
    } else {
      decoder.decode_any(step);
    }
    x.put(values);
    __syncthreads();
    if (step + 1 < end) {  // on their way while this step is multiplied
      if (units) decoder.load(step + 1, codes, &stored);
      x.load(step + 1, values);
    }
    sums.add_products(x.tile, decoder.tile);
  }
}

// left and right in the places of x and the weight.
template <bool Grad, int Rows>
__device__ __forceinline__ void add_side(Sums<Rows>& sums, const LinearArgs& args, int64_t row, int64_t column,
                                         float* input, float* weight) {
  const SidePath& side = args.side;
  const int64_t columns = args.columns();
#pragma unroll 1
  for (int64_t first = 0; first < side.rank; first += kDepth) {
    __syncthreads();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < Rows * kDepth; i += kThreads) {
      const int line = i % Rows, r = i / Rows;
      const bool valid = row + line < args.m && first + r < side.rank;
      input[r * Rows + line] = valid ? element(side.left, side.left_dtype, (row + line) * side.rank + first + r) : 0.0F;
    }
    const int64_t mine = column + static_cast<int>(threadIdx.x);
#pragma unroll 4
    for (int r = 0; r < kDepth; ++r) {
      const bool valid = mine < columns && first + r < side.rank;
      const int64_t at = Grad ? (first + r) * columns + mine : mine * side.rank + first + r;
      weight[weight_place(r, static_cast<int>(threadIdx.x))] = valid ? element(side.right, side.right_dtype, at) : 0.0F;
    }
    __syncthreads();
    sums.add_products(input, weight);
  }
}

template <int Rows>
__device__ __forceinline__ void store(const Sums<Rows>& sums, const LinearArgs& args, bool vector, int64_t row,
                                      int64_t column) {
  const int64_t columns = args.columns();
  float* out = static_cast<float*>(args.out);
#pragma unroll
  for (int j = 0; j < kAcross; j += 4) {
    const int64_t first = column + Sums<Rows>::column(j);
    float bias[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bias[i] = args.bias != nullptr && first + i < columns ? element(args.bias, args.bias_dtype, first + i) : 0.0F;
    }
#pragma unroll
    for (int i = 0; i < Sums<Rows>::kDown; ++i) {
      const int64_t line = row + Sums<Rows>::row(i);
      if (line >= args.m) continue;
      float* at = out + line * columns + first;
      float four[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) four[c] = __fadd_rn(sums.values[i * kAcross + j + c], bias[c]);
      if (vector) {
        if (first < columns) *reinterpret_cast<float4*>(at) = make_float4(four[0], four[1], four[2], four[3]);
        continue;
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (first + c < columns) at[c] = four[c];
      }
    }
  }
}

template <bool Grad, int Rows>
__global__ void __launch_bounds__(kThreads, Rows >= 64 ? 2 : 3)
    multiply_fp32(const LinearArgs args, const TilePlan plan, unsigned char* workspace) {
  unsigned char* shared = shared_memory();
  int64_t row_tile, column_tile;
  place_of(blockIdx.x, plan.row_tiles, plan.column_tiles, &row_tile, &column_tile);
  const int64_t row = row_tile * Rows, column = column_tile * kColumns;
  const int part = static_cast<int>(blockIdx.y);
  const int steps = static_cast<int>(divide_up(args.contraction(), kDepth));
  float* input = reinterpret_cast<float*>(shared + kInputAt);
  Sums<Rows> sums;
  if (steps > 0) {
    if (!args.weight.is_int8()) {
      fill_code_table(reinterpret_cast<float*>(shared + kTableAt), args.weight.packed4.codebook);
      fill_scale_map(reinterpret_cast<float*>(shared + kMapAt), args.weight);
    }
    const Decoder<Grad> decoder(args.weight, column);
    const Input<Rows> x{args, row, plan.vector_x, input};
    add_steps<Grad, Rows>(sums, decoder, x, plan.units, first_step(steps, part, plan.parts),
                          first_step(steps, part + 1, plan.parts));
  }
  if (plan.parts > 1) {
    __syncthreads();
    uint32_t* flag = reinterpret_cast<uint32_t*>(shared + kTableAt);
    if (!sum_parts<kThreads>(sums.values, workspace, blockIdx.x, part, plan.parts, flag)) return;
  }
  if (args.side.rank > 0) {
    add_side<Grad, Rows>(sums, args, row, column, input, reinterpret_cast<float*>(shared + kWeightAt));
  }
  store<Rows>(sums, args, plan.vector_out, row, column);
}

template <bool Grad, int Rows>
Status run(const LinearArgs& args, const Device& device, const Place& place) {
  TilePlan plan;
  const Status planned = plan_tiles(args, device, Rows, kColumns, kDepth, 4, 3, &plan);
  if (!planned.ok()) return planned;
  const size_t bytes = static_cast<size_t>(kInputAt) + size_t{Rows} * kDepth * 4;
  return launch<&multiply_fp32<Grad, Rows>>(grid_of(plan), kThreads, bytes, place, args, plan,
                                            static_cast<unsigned char*>(place.workspace));
}

template <bool Grad>
Status run_rows(const LinearArgs& args, const Device& device, const Place& place) {
  return args.m <= 16 ? run<Grad, 16>(args, device, place) : run<Grad, 64>(args, device, place);
}

}  // namespace

Status linear_fp32(const LinearArgs& args, const Device& device, const Place& place) {
  return args.grad_input ? run_rows<true>(args, device, place) : run_rows<false>(args, device, place);
}

}  // namespace nybble::cuda
