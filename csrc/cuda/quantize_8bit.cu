// fp32, fp16 or bf16 to 8 bits: blocks with a 256-entry map, and rows of int8.
#include "cuda/encode.cuh"
#include "cuda/launch.cuh"

namespace nybble::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// ---- blocks with a map ----------------------------------------------------------------------------------------------

constexpr int kBlocks = 5;  // of a multiprocessor at once: 48 registers a thread

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    quantize_8bit_kernel(Quantize8Args args, Groups groups, int64_t* failed, bool aligned) {
  float* table = reinterpret_cast<float*>(shared_memory());
  fill_midpoints(table, args.map);
  __syncthreads();
  const Midpoints midpoints(table);
  const int runs = groups.runs();
  const int64_t all = groups.groups();
  for (int64_t group = int64_t{blockIdx.x} * kWarps + warp(); group < all; group += int64_t{gridDim.x} * kWarps) {
    const int64_t first = group * groups.size();
    float v[2][kEach];
    uint32_t largest[2] = {0, 0};
    const auto load = [&](int64_t start, bool whole) {
      uint4 raw[2];
      load_run(static_cast<const T*>(args.x), start, args.count, whole, raw);
#pragma unroll
      for (int step = 0; step < 2; ++step) floats_of<T>(raw[step], v[step]);
    };
    for (int i = 0; i < runs; ++i) {
      const int64_t start = first + i * kRun;
      load(start, aligned && start + kRun <= args.count);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        for (const float each : v[step]) largest[step] = max(largest[step], magnitude_of(each));
      }
    }
    largest_of_block(groups, largest);
    const float scale[2] = {absmax_of(largest[0]), absmax_of(largest[1])};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int64_t at = place_of(first, step);
      if (!groups.speaks(step, at)) continue;
      args.absmax[at >> groups.block_shift] = scale[step];
      if (largest[step] >= kInfinity) report(failed, at >> groups.block_shift);
    }
    const float by[2] = {__fdiv_rn(1.0F, scale[0]), __fdiv_rn(1.0F, scale[1])};
    for (int i = 0; i < runs; ++i) {
      const int64_t start = first + i * kRun;
      const bool whole = aligned && start + kRun <= args.count;
      if (runs > 1) load(start, whole);
      uint32_t codes[2] = {0, 0};
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          codes[step] |= midpoints.nearest(__fmul_rn(v[step][j], by[step])) << (8 * j);
        }
      }
      store_run(args.codes, start, args.count, whole, codes);
    }
  }
}

template <class T>
Status quantize_8bit_from(const Quantize8Args& args, int64_t* failed, const Place& place) {
  if (!valid_block_size(args.block_size)) return bad_argument("block_size", args.block_size);
  Device device;
  const Status status = device_properties(place.device, &device);
  if (!status.ok()) return status;
  const Groups groups{log2_of(args.block_size), args.count};
  const int64_t most = int64_t{kBlocks} * device.multiprocessors;
  const dim3 grid(static_cast<unsigned>(smaller(divide_up(groups.groups(), kWarps), most)));
  const bool aligned = aligned_for(args.x, args.dtype) && aligned_for(args.codes, kEach);
  return launch<&quantize_8bit_kernel<T>>(grid, kThreads, kMidpointTable * sizeof(float), place, args, groups, failed,
                                          aligned);
}

// ---- int8 rows ------------------------------------------------------------------------------------------------------

// The layout's first step is the cast to fp16.
template <class T>
__device__ __forceinline__ void through_f16(uint4 raw, float (&v)[kEach]) {
  floats_of<T>(raw, v);
  floats_of<F16>(raw_of<F16>(v), v);  // of fp16 itself: no change
}

__device__ __forceinline__ uint32_t int8_of(float s) {
  const int rounded = __float2int_rn(s);  // half to even
  return static_cast<uint32_t>(max(-127, min(127, rounded))) & 0xFFU;
}

// A block of up to 256 threads takes a row, first for its largest magnitude, then for its codes, when it comes from the
// caches. `whole`: rows are multiples of four elements, aligned.
template <class T>
__global__ void __launch_bounds__(kThreads) quantize_int8_kernel(QuantizeRowsArgs args, int64_t* failed, bool whole) {
  uint32_t* of_warps = reinterpret_cast<uint32_t*>(shared_memory());
  const int warps = static_cast<int>(blockDim.x) / kWarp, own = warp();
  const int64_t stride = int64_t{blockDim.x} * kEach;
  const int64_t first = int64_t{threadIdx.x} * kEach;
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(args.x) + row * args.cols;
    int8_t* q = args.q + row * args.cols;
    float v[kEach];
    uint32_t largest = 0;
#pragma unroll 4
    for (int64_t at = first; at < args.cols; at += stride) {
      through_f16<T>(whole ? load_four(x + at) : load_some(x + at, args.cols - at), v);
      for (const float each : v) largest = max(largest, magnitude_of(each));
    }
    for (int i = kWarp / 2; i > 0; i /= 2) largest = max(largest, __shfl_xor_sync(kWholeWarp, largest, i));
    __syncthreads();  // the row before has been read from
    if (lane() == 0) of_warps[own] = largest;
    __syncthreads();
    for (int i = 0; i < warps; ++i) largest = max(largest, of_warps[i]);
    if (threadIdx.x == 0) {
      args.absmax[row] = __uint_as_float(largest);
      if (largest >= kInfinity) report(failed, row);
    }
    // torch's 127 / absmax, which bitsandbytes uses, is a reciprocal and a product; the two roundings decide exact
    // ties.
    const float by = largest == 0 ? 0.0F : __fmul_rn(__fdiv_rn(1.0F, __uint_as_float(largest)), 127.0F);
#pragma unroll 4
    for (int64_t at = first; at < args.cols; at += stride) {
      through_f16<T>(whole ? load_four(x + at) : load_some(x + at, args.cols - at), v);
      uint32_t codes = 0;
#pragma unroll
      for (int j = 0; j < kEach; ++j) codes |= int8_of(__fmul_rn(v[j], by)) << (8 * j);
      uint8_t* to = reinterpret_cast<uint8_t*>(q + at);
      if (whole) {
        *reinterpret_cast<uint32_t*>(to) = codes;
      } else {
        store_bytes(to, codes, args.cols - at);
      }
    }
  }
}

template <class T>
Status quantize_int8_from(const QuantizeRowsArgs& args, int64_t* failed, const Place& place) {
  constexpr int64_t kMostBlocks = 1 << 20;
  const bool whole = args.cols % kEach == 0 && aligned_for(args.x, args.dtype) && aligned_for(args.q, kEach);
  int threads = kWarp;
  while (threads < kThreads && threads * kEach < args.cols) threads *= 2;
  const dim3 grid(static_cast<unsigned>(smaller(args.rows, kMostBlocks)));
  return launch<&quantize_int8_kernel<T>>(grid, threads, kWarps * sizeof(uint32_t), place, args, failed, whole);
}

}  // namespace

Status quantize_8bit(const Quantize8Args& args, int64_t* failed, const Place& place) {
  if (args.dtype == DType::f32) return quantize_8bit_from<float>(args, failed, place);
  return args.dtype == DType::f16 ? quantize_8bit_from<F16>(args, failed, place)
                                  : quantize_8bit_from<Bf16>(args, failed, place);
}

Status quantize_int8(const QuantizeRowsArgs& args, int64_t* failed, const Place& place) {
  if (args.dtype == DType::f32) return quantize_int8_from<float>(args, failed, place);
  return args.dtype == DType::f16 ? quantize_int8_from<F16>(args, failed, place)
                                  : quantize_int8_from<Bf16>(args, failed, place);
}

}  // namespace nybble::cuda
