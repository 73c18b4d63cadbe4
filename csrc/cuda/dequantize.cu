// Stored weights to fp32, fp16 or bf16, in one launch: 4-bit codes with plain or nested scales, 8-bit codes, int8 rows.
//
// What limits them is memory. Of NF4 in blocks of 64 to bf16 a weight is 0.52 bytes in and 2 out, so an H100's 3.0 TB/s
// are 1.2 G weights a millisecond, 5.4 a clock and multiprocessor. Decoding one takes 4.5 instructions (shift and mask,
// lookup, product, half a conversion) and 1.25 / 32 of a shared-memory cycle: 28 and 25 weights a clock are possible.
#include "cuda/decode.cuh"
#include "cuda/launch.cuh"

namespace nybble::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocks = 6;  // of a multiprocessor at once: 40 registers a thread

// Elements of 16 bytes of output: what a lane stores at once, side by side with its neighbours.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ void store_vector(float* to, const float (&v)[4]) {
  store_16(to, make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])));
}
template <class T>
__device__ __forceinline__ void store_vector(T* to, const float (&v)[8]) {
  store_16(to, make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])));
}

__device__ __forceinline__ void store_one(float* to, float v) { *to = v; }
template <class T>
__device__ __forceinline__ void store_one(T* to, float v) {
  to->bits = static_cast<uint16_t>(pack<T>(v, 0.0F));
}

// Enough blocks to fill the GPU; each goes on with what lies a whole grid further. `units`: what a warp does at once.
Status fill(const Place& place, int64_t units, dim3* grid) {
  Device device;
  const Status status = device_properties(place.device, &device);
  const int64_t most = int64_t{kBlocks} * device.multiprocessors;
  *grid = dim3(static_cast<unsigned>(smaller(divide_up(units, kWarps), most)));
  return status;
}

bool aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// ---- 4 bits ---------------------------------------------------------------------------------------------------------

// A warp decodes 1024 elements at a time. Lane l fetches the 16 bytes of elements 32 l to 32 l + 31, which lie in one
// block of scales, and that block's scale. By way of shared memory the codes then reach the lanes that store their
// values: 16 bytes each, side by side, so that every sector of the output is written whole.
constexpr int kUnit = 1024;
constexpr int kNestedMap = 256;
constexpr int kShared4 = (kCodeTable + kNestedMap) * 4 + kWarps * kUnit / 2;

struct Fetched {
  uint4 codes;
  uint32_t scale_code;
  float scale;
};

__device__ __forceinline__ Fetched fetch(const Packed4& source, int64_t start) {
  const BlockScales& scales = source.scales;
  const int64_t block = (start + 32 * lane()) >> source.block_shift;
  Fetched result;
  result.codes = load_once_16(source.packed + start / 2 + 16 * lane());
  if (scales.plain != nullptr) {
    result.scale_code = 0;
    result.scale = __ldg(scales.plain + block);
  } else {
    result.scale_code = __ldg(scales.codes + block);
    result.scale = __ldg(scales.nested + (block >> scales.nested_shift));
  }
  return result;
}

template <class T>
__device__ __forceinline__ void decode_unit(const float* table, unsigned char* staged, uint4 codes, float scale,
                                            T* out) {
  constexpr int kEach = kVector<T>;
  const uint32_t column = code_column();
  __syncwarp();  // the codes of the unit before have been read
  *reinterpret_cast<uint4*>(staged + 16 * lane()) = codes;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kUnit; i += kWarp * kEach) {
    const int at = i + lane() * kEach;
    const float by = __shfl_sync(kWholeWarp, scale, at / 32);
    float v[kEach];
    if constexpr (kEach == 8) {
      decode_8(table, *reinterpret_cast<const uint32_t*>(staged + at / 2), column, v);
    } else {
      const uint32_t four = *reinterpret_cast<const uint16_t*>(staged + at / 2);
      v[0] = code_of<4>(table, four, column);
      v[1] = code_of<0>(table, four, column);
      v[2] = code_of<12>(table, four, column);
      v[3] = code_of<8>(table, four, column);
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) v[j] = __fmul_rn(v[j], by);
    store_vector(out + at, v);
  }
}

// The end of a tensor, and tensors whose addresses are not aligned: a byte a lane.
template <class T>
__device__ __forceinline__ void decode_bytes(const float* table, const Packed4& source, int64_t start, int64_t left,
                                             T* out) {
  for (int i = 2 * lane(); i < left; i += 2 * kWarp) {
    const int64_t at = start + i;
    const uint32_t codes = __ldg(source.packed + at / 2);
    const float by = source.scales.at(at >> source.block_shift);
    store_one(out + at, __fmul_rn(code_of<4>(table, codes, code_column()), by));
    if (i + 1 < left) store_one(out + at + 1, __fmul_rn(code_of<0>(table, codes, code_column()), by));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    dequantize_4bit_kernel(Packed4 source, int64_t count, T* out, bool whole) {
  float* table = reinterpret_cast<float*>(shared_memory());
  float* map = table + kCodeTable;
  unsigned char* staged = reinterpret_cast<unsigned char*>(map + kNestedMap) + warp() * (kUnit / 2);
  const bool nested = source.scales.plain == nullptr;
  const int64_t stride = int64_t{gridDim.x} * kWarps * kUnit;
  const int64_t fast = whole ? count / kUnit * kUnit : 0;  // up to here by whole units
  int64_t start = (int64_t{blockIdx.x} * kWarps + warp()) * kUnit;
  Fetched next = {};
  if (start < fast) next = fetch(source, start);  // under way while the tables are filled
  fill_code_table(table, source.codebook);
  if (nested) map[threadIdx.x] = __ldg(source.scales.map + threadIdx.x);
  const float offset = nested ? __ldg(source.scales.offset) : 0.0F;
  __syncthreads();
  for (; start < fast; start += stride) {
    const Fetched now = next;
    if (start + stride < fast) next = fetch(source, start + stride);
    const float scale = nested ? __fadd_rn(__fmul_rn(map[now.scale_code], now.scale), offset) : now.scale;
    decode_unit(table, staged, now.codes, scale, out + start);
  }
  for (; start < count; start += stride) decode_bytes(table, source, start, smaller(kUnit, count - start), out);
}

template <class T>
Status dequantize_4bit_to(const Dequantize4Args& args, const Place& place) {
  dim3 grid;
  const Status status = fill(place, divide_up(args.count, kUnit), &grid);
  if (!status.ok()) return status;
  return launch<&dequantize_4bit_kernel<T>>(grid, kThreads, kShared4, place, args.source, args.count,
                                            static_cast<T*>(args.out),
                                            aligned(args.source.packed, 16) && aligned(args.out, 16));
}

// ---- 8 bits with a map ----------------------------------------------------------------------------------------------

constexpr int kMap = 256;

struct Blocks8 {
  const uint8_t* codes;
  const float* absmax;
  const float* map;
  int64_t count;
  int block_shift;
};

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) dequantize_8bit_kernel(Blocks8 source, T* out, bool whole) {
  constexpr int kEach = kVector<T>;
  float* map = reinterpret_cast<float*>(shared_memory());
  map[threadIdx.x] = __ldg(source.map + threadIdx.x);
  __syncthreads();
  const int64_t threads = int64_t{gridDim.x} * kThreads;
  for (int64_t vector = int64_t{blockIdx.x} * kThreads + threadIdx.x; vector * kEach < source.count;
       vector += threads) {
    const int64_t at = vector * kEach;
    const uint8_t* codes = source.codes + at;
    const float by = __ldg(source.absmax + (at >> source.block_shift));
    if (whole && at + kEach <= source.count) {
      uint32_t words[kEach / 4];
      if constexpr (kEach == 8) {
        const uint2 pair = *reinterpret_cast<const uint2*>(codes);
        words[0] = pair.x;
        words[1] = pair.y;
      } else {
        words[0] = *reinterpret_cast<const uint32_t*>(codes);
      }
      float v[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) v[j] = __fmul_rn(map[words[j / 4] >> (8 * (j % 4)) & 0xFFU], by);
      store_vector(out + at, v);
    } else {
      for (int j = 0; j < kEach && at + j < source.count; ++j) store_one(out + at + j, __fmul_rn(map[codes[j]], by));
    }
  }
}

template <class T>
Status dequantize_8bit_to(const Dequantize8Args& args, const Place& place) {
  dim3 grid;
  const Status status = fill(place, divide_up(args.count, kWarp * kVector<T>), &grid);
  if (!status.ok()) return status;
  const Blocks8 source{args.codes, args.absmax, args.map, args.count, log2_of(args.block_size)};
  return launch<&dequantize_8bit_kernel<T>>(grid, kThreads, kMap * 4, place, source, static_cast<T*>(args.out),
                                            aligned(args.codes, kVector<T>) && aligned(args.out, 16));
}

// ---- int8 rows ------------------------------------------------------------------------------------------------------

// A warp decodes up to 1024 elements of one row at a time.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    dequantize_int8_kernel(Rows8 source, int64_t rows, int64_t cols, T* out, bool whole) {
  constexpr int kEach = kVector<T>;
  const int64_t parts = divide_up(cols, kUnit);  // of a row
  for (int64_t unit = int64_t{blockIdx.x} * kWarps + warp(); unit < rows * parts; unit += int64_t{gridDim.x} * kWarps) {
    const int64_t row = unit / parts;
    const int64_t first = (unit - row * parts) * kUnit;
    const int left = static_cast<int>(smaller(kUnit, cols - first));
    const int8_t* q = source.q + row * cols + first;
    T* to = out + row * cols + first;
    const float absmax = __ldg(source.absmax + row);
    const bool divides = divides_by_127(absmax);
    if (!whole) {
      for (int i = lane(); i < left; i += kWarp) {
        store_one(to + i, int8_value(static_cast<float>(q[i]), absmax, divides));
      }
      continue;
    }
#pragma unroll
    for (int i = 0; i < kUnit; i += kWarp * kEach) {
      const int at = i + lane() * kEach;
      if (at >= left) break;
      uint32_t words[kEach / 4];
      if constexpr (kEach == 8) {
        const uint2 pair = *reinterpret_cast<const uint2*>(q + at);
        words[0] = pair.x;
        words[1] = pair.y;
      } else {
        words[0] = *reinterpret_cast<const uint32_t*>(q + at);
      }
      float v[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int8_t code = static_cast<int8_t>(words[j / 4] >> (8 * (j % 4)) & 0xFFU);
        v[j] = int8_value(static_cast<float>(code), absmax, divides);
      }
      store_vector(to + at, v);
    }
  }
}

template <class T>
Status dequantize_int8_to(const DequantizeRowsArgs& args, const Place& place) {
  dim3 grid;
  const Status status = fill(place, args.rows * divide_up(args.cols, kUnit), &grid);
  if (!status.ok()) return status;
  const bool whole = args.cols % kVector<T> == 0 && aligned(args.source.q, kVector<T>) && aligned(args.out, 16);
  return launch<&dequantize_int8_kernel<T>>(grid, kThreads, 0, place, args.source, args.rows, args.cols,
                                            static_cast<T*>(args.out), whole);
}

}  // namespace

Status dequantize_4bit(const Dequantize4Args& args, const Place& place) {
  if (args.dtype == DType::f32) return dequantize_4bit_to<float>(args, place);
  return args.dtype == DType::f16 ? dequantize_4bit_to<F16>(args, place) : dequantize_4bit_to<Bf16>(args, place);
}

Status dequantize_8bit(const Dequantize8Args& args, const Place& place) {
  if (!valid_block_size(args.block_size)) return bad_argument("block_size", args.block_size);
  if (args.dtype == DType::f32) return dequantize_8bit_to<float>(args, place);
  return args.dtype == DType::f16 ? dequantize_8bit_to<F16>(args, place) : dequantize_8bit_to<Bf16>(args, place);
}

Status dequantize_int8(const DequantizeRowsArgs& args, const Place& place) {
  if (args.dtype == DType::f32) return dequantize_int8_to<float>(args, place);
  return args.dtype == DType::f16 ? dequantize_int8_to<F16>(args, place) : dequantize_int8_to<Bf16>(args, place);
}

}  // namespace nybble::cuda
