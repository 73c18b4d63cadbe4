// One step of AdamW over a flat parameter, its gradient, both moments and the parameter itself through the registers
// once; and what a gradient's norm is made of. The rule is core/kernels.h's and reference_optim.py's; every operation
// is rounded by itself, so a step has the CPU's bits. Dtypes are told at run time: nine kernels would differ in a load.
#include "cuda/encode.cuh"
#include "cuda/launch.cuh"

namespace nybble::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// ---- dtypes told at run time ----------------------------------------------------------------------------------------

__device__ __forceinline__ void load_any(const void* from, DType dtype, int64_t start, int64_t count, bool whole,
                                         uint4 (&raw)[2]) {
  if (dtype == DType::f32) {
    load_run(static_cast<const float*>(from), start, count, whole, raw);
  } else {  // as they are in memory
    load_run(static_cast<const Bf16*>(from), start, count, whole, raw);
  }
}

__device__ __forceinline__ void floats_of_any(uint4 raw, DType dtype, float (&v)[kEach]) {
  if (dtype == DType::f32) {
    floats_of<float>(raw, v);
  } else if (dtype == DType::bf16) {
    floats_of<Bf16>(raw, v);
  } else {
    floats_of<F16>(raw, v);
  }
}

// ---- the rule -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void update_moments(const AdamWRule& rule, float grad, float* m, float* v) {
  const float g = __fmul_rn(grad, rule.grad_scale);
  *m = __fadd_rn(__fmul_rn(rule.beta1, *m), __fmul_rn(rule.rest1, g));
  *v = __fadd_rn(__fmul_rn(rule.beta2, *v), __fmul_rn(__fmul_rn(rule.rest2, g), g));
}

__device__ __forceinline__ float updated(const AdamWRule& rule, float param, float m, float v) {
  const float denominator = __fadd_rn(__fmul_rn(__fsqrt_rn(v), rule.root_scale), rule.eps);
  return __fsub_rn(__fmul_rn(param, rule.decay), __fdiv_rn(__fmul_rn(rule.step_size, m), denominator));
}

// A number next to v that bf16 holds: adding 16 random bits carries into the half that is kept as often as the other
// half says. What is not finite stays as it is. The bits are a hash of the key and of the element's number.
__device__ __forceinline__ float to_bf16_stochastically(float v, uint64_t key, int64_t index) {
  const uint32_t key_high = static_cast<uint32_t>(key >> 32) + static_cast<uint32_t>(index >> 32);
  uint32_t x = static_cast<uint32_t>(index) ^ static_cast<uint32_t>(key);
  x = (x ^ (x >> 16)) * 0x7FEB352DU + key_high;
  x = (x ^ (x >> 15)) * 0x846CA68BU;
  const uint32_t random = ((x ^ (x >> 16)) * 0x7FEB352DU) >> 16;
  const uint32_t bits = __float_as_uint(v);
  return (bits & kInfinity) != kInfinity ? __uint_as_float((bits + random) & 0xFFFF0000U) : v;
}

// The new parameters of a run, where they go. `kept`: a step's elements stay as they are.
__device__ __forceinline__ void update_params(const AdamWArgs& args, int64_t start, bool whole, const uint4 (&raw)[2],
                                              const float (&m)[2][kEach], const float (&v)[2][kEach],
                                              const bool (&kept)[2]) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    if (kept[step]) continue;
    const int64_t at = place_of(start, step);
    const int64_t left = whole ? kEach : args.count - at;
    float p[kEach];
    floats_of_any(raw[step], args.dtype, p);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      p[i] = updated(args.rule, p[i], m[step][i], v[step][i]);
      if (args.stochastic) p[i] = to_bf16_stochastically(p[i], args.key, at + i);
    }
    if (args.dtype == DType::f32) {
      store_step(static_cast<float*>(args.param) + at, raw_of<float>(p), left, whole);
    } else {
      const uint4 pairs = args.dtype == DType::bf16 ? raw_of<Bf16>(p) : raw_of<F16>(p);
      store_step(static_cast<Bf16*>(args.param) + at, pairs, left, whole);
    }
  }
}

// ---- moments in fp32 ------------------------------------------------------------------------------------------------

constexpr int kBlocks32 = 4;  // of a multiprocessor at once: 64 registers a thread

__global__ void __launch_bounds__(kThreads, kBlocks32) adamw_32bit_kernel(AdamW32Args args, bool aligned) {
  const AdamWArgs& common = args.common;
  const int64_t stride = int64_t{gridDim.x} * kWarps * kRun;
  for (int64_t start = (int64_t{blockIdx.x} * kWarps + warp()) * kRun; start < common.count; start += stride) {
    const bool whole = aligned && start + kRun <= common.count;
    uint4 raw_m[2], raw_v[2], grad[2], param[2];
    load_run(args.m, start, common.count, whole, raw_m);
    load_run(args.v, start, common.count, whole, raw_v);
    load_any(common.grad, common.grad_dtype, start, common.count, whole, grad);
    load_any(common.param, common.dtype, start, common.count, whole, param);
    float m[2][kEach], v[2][kEach];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      float g[kEach];
      floats_of<float>(raw_m[step], m[step]);
      floats_of<float>(raw_v[step], v[step]);
      floats_of_any(grad[step], common.grad_dtype, g);
#pragma unroll
      for (int i = 0; i < kEach; ++i) update_moments(common.rule, g[i], &m[step][i], &v[step][i]);
      raw_m[step] = raw_of<float>(m[step]);
      raw_v[step] = raw_of<float>(v[step]);
    }
    store_run(args.m, start, common.count, whole, raw_m);
    store_run(args.v, start, common.count, whole, raw_v);
    update_params(common, start, whole, param, m, v, {false, false});
  }
}

// ---- moments in 8 bits ----------------------------------------------------------------------------------------------

// Shared memory: both maps, then where their codes end.
constexpr int kMap = 256;
constexpr int kMidpointsOfM = 2 * kMap;
constexpr int kMidpointsOfV = kMidpointsOfM + kMidpointTable;
constexpr int kShared8 = (kMidpointsOfV + kMidpointTable) * 4;
constexpr int kBlocks8 = 3;  // of a multiprocessor at once: 80 registers a thread

struct Moments {
  float m[2][kEach], v[2][kEach];
};

// The new moments of a run, 0 beyond the tensor's end.
__device__ __forceinline__ void load_moments(const AdamW8Args& args, const float* maps, int64_t start, bool whole,
                                             const float (&m_scale)[2], const float (&v_scale)[2], Moments* moments) {
  const AdamWArgs& common = args.common;
  uint32_t m_codes[2], v_codes[2];
  uint4 grad[2];
  load_run(args.m, start, common.count, whole, m_codes);
  load_run(args.v, start, common.count, whole, v_codes);
  load_any(common.grad, common.grad_dtype, start, common.count, whole, grad);
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const int64_t at = place_of(start, step);
    float g[kEach];
    floats_of_any(grad[step], common.grad_dtype, g);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      float m = __fmul_rn(maps[m_codes[step] >> (8 * i) & 0xFFU], m_scale[step]);
      float v = __fmul_rn(maps[kMap + (v_codes[step] >> (8 * i) & 0xFFU)], v_scale[step]);
      update_moments(common.rule, g[i], &m, &v);
      const bool there = whole || at + i < common.count;
      moments->m[step][i] = there ? m : 0.0F;
      moments->v[step][i] = there ? v : 0.0F;
    }
  }
}

__global__ void __launch_bounds__(kThreads, kBlocks8)
    adamw_8bit_kernel(AdamW8Args args, Groups groups, int64_t* failed, bool aligned) {
  const AdamWArgs& common = args.common;
  float* shared = reinterpret_cast<float*>(shared_memory());
  shared[threadIdx.x] = __ldg(args.m_map + threadIdx.x);
  shared[kMap + threadIdx.x] = __ldg(args.v_map + threadIdx.x);
  fill_midpoints(shared + kMidpointsOfM, args.m_map);
  fill_midpoints(shared + kMidpointsOfV, args.v_map);
  __syncthreads();
  const Midpoints m_midpoints(shared + kMidpointsOfM), v_midpoints(shared + kMidpointsOfV);
  const int runs = groups.runs();
  const int64_t all = groups.groups();
  for (int64_t group = int64_t{blockIdx.x} * kWarps + warp(); group < all; group += int64_t{gridDim.x} * kWarps) {
    const int64_t first = group * groups.size();
    float m_scale[2] = {0.0F, 0.0F}, v_scale[2] = {0.0F, 0.0F};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int64_t at = place_of(first, step);
      if (at < common.count) {
        m_scale[step] = args.m_absmax[at >> groups.block_shift];
        v_scale[step] = args.v_absmax[at >> groups.block_shift];
      }
    }
    Moments moments;
    uint32_t m_largest[2] = {0, 0}, v_largest[2] = {0, 0};
    for (int i = 0; i < runs; ++i) {
      const int64_t start = first + i * kRun;
      load_moments(args, shared, start, aligned && start + kRun <= common.count, m_scale, v_scale, &moments);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          m_largest[step] = max(m_largest[step], magnitude_of(moments.m[step][j]));
          v_largest[step] = max(v_largest[step], magnitude_of(moments.v[step][j]));
        }
      }
    }
    uint4 param[2];  // those of the first run, which are under way meanwhile
    load_any(common.param, common.dtype, first, common.count, aligned && first + kRun <= common.count, param);
    largest_of_block(groups, m_largest);
    largest_of_block(groups, v_largest);
    float m_by[2], v_by[2];
    bool kept[2];
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int64_t at = place_of(first, step);
      const float m_absmax = absmax_of(m_largest[step]), v_absmax = absmax_of(v_largest[step]);
      kept[step] = m_largest[step] >= kInfinity || v_largest[step] >= kInfinity;
      m_by[step] = __fdiv_rn(1.0F, m_absmax);
      v_by[step] = __fdiv_rn(1.0F, v_absmax);
      if (!groups.speaks(step, at)) continue;
      if (kept[step]) {
        report(failed, at >> groups.block_shift);
      } else {
        args.m_absmax[at >> groups.block_shift] = m_absmax;
        args.v_absmax[at >> groups.block_shift] = v_absmax;
      }
    }
    for (int i = 0; i < runs; ++i) {
      const int64_t start = first + i * kRun;
      const bool whole = aligned && start + kRun <= common.count;
      if (i > 0) load_any(common.param, common.dtype, start, common.count, whole, param);
      if (runs > 1) load_moments(args, shared, start, whole, m_scale, v_scale, &moments);
      update_params(common, start, whole, param, moments.m, moments.v, kept);
      uint32_t m_codes[2] = {0, 0}, v_codes[2] = {0, 0};
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          m_codes[step] |= m_midpoints.nearest(__fmul_rn(moments.m[step][j], m_by[step])) << (8 * j);
          const float unit = __fmul_rn(moments.v[step][j], v_by[step]);
          v_codes[step] |= max(v_midpoints.nearest(unit), unit > 0.0F ? 1U : 0U) << (8 * j);
        }
      }
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int64_t at = place_of(start, step);
        if (kept[step]) continue;
        if (whole) {
          *reinterpret_cast<uint32_t*>(args.m + at) = m_codes[step];
          *reinterpret_cast<uint32_t*>(args.v + at) = v_codes[step];
        } else {
          store_bytes(args.m + at, m_codes[step], common.count - at);
          store_bytes(args.v + at, v_codes[step], common.count - at);
        }
      }
    }
  }
}

// ---- the norm of a gradient -----------------------------------------------------------------------------------------

// Element i is squared and summed in fp32 in column i % 16 of its part of 4096; columns and parts are summed in double,
// in order. So a run of 65536 is 256 sums, one a thread, of 256 squares each.
constexpr int kColumns = 16;
constexpr int kPart = 4096;

__device__ __forceinline__ float float_of_one(float value) { return value; }
template <class T>
__device__ __forceinline__ float float_of_one(T value) {
  return unpack<T>(value.bits).x;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) sum_of_squares_kernel(const T* x, int64_t count, double* sums) {
  static_assert(kSquaresRun == int64_t{kThreads} * kPart / kColumns);
  constexpr int kTogether = 32;  // loads under way: a thread's chain of sums waits for the memory 8 times
  float* of_threads = reinterpret_cast<float*>(shared_memory());
  const int part = static_cast<int>(threadIdx.x) / kColumns;
  const int first = part * kPart + static_cast<int>(threadIdx.x) % kColumns;
  for (int64_t run = blockIdx.x; run * kSquaresRun < count; run += gridDim.x) {
    const T* from = x + run * kSquaresRun;
    const int here = static_cast<int>(smaller(kSquaresRun, count - run * kSquaresRun));
    const int end = min(here, (part + 1) * kPart);
    float sum = 0.0F;
    int at = first;
    for (; at + (kTogether - 1) * kColumns < end; at += kTogether * kColumns) {
      T values[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) values[i] = from[at + i * kColumns];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const float value = float_of_one(values[i]);
        sum = __fadd_rn(sum, __fmul_rn(value, value));
      }
    }
    for (; at < end; at += kColumns) {
      const float value = float_of_one(from[at]);
      sum = __fadd_rn(sum, __fmul_rn(value, value));
    }
    of_threads[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      const int used = static_cast<int>(divide_up(here, kPart)) * kColumns;
      double total = 0.0;
      for (int i = 0; i < used; ++i) total += static_cast<double>(of_threads[i]);
      sums[run] = total;
    }
    __syncthreads();
  }
}

template <class T>
Status sum_of_squares_of(const SquaresArgs& args, const Place& place) {
  constexpr int64_t kMostBlocks = 1 << 20;
  const dim3 grid(static_cast<unsigned>(smaller(divide_up(args.count, kSquaresRun), kMostBlocks)));
  return launch<&sum_of_squares_kernel<T>>(grid, kThreads, kThreads * sizeof(float), place,
                                           static_cast<const T*>(args.x), args.count, args.sums);
}

bool aligned(const AdamWArgs& args) {
  return aligned_for(args.param, args.dtype) && aligned_for(args.grad, args.grad_dtype);
}

Status fill(const Place& place, int64_t units, int blocks, dim3* grid) {
  Device device;
  const Status status = device_properties(place.device, &device);
  *grid = dim3(static_cast<unsigned>(smaller(divide_up(units, kWarps), int64_t{blocks} * device.multiprocessors)));
  return status;
}

}  // namespace

Status adamw_32bit(const AdamW32Args& args, const Place& place) {
  dim3 grid;
  const Status status = fill(place, divide_up(args.common.count, kRun), kBlocks32, &grid);
  if (!status.ok()) return status;
  return launch<&adamw_32bit_kernel>(
      grid, kThreads, 0, place, args,
      aligned(args.common) && aligned_for(args.m, DType::f32) && aligned_for(args.v, DType::f32));
}

Status adamw_8bit(const AdamW8Args& args, int64_t* failed, const Place& place) {
  const Groups groups{log2_of(args.block_size), args.common.count};
  dim3 grid;
  const Status status = fill(place, groups.groups(), kBlocks8, &grid);
  if (!status.ok()) return status;
  return launch<&adamw_8bit_kernel>(grid, kThreads, kShared8, place, args, groups, failed,
                                    aligned(args.common) && aligned_for(args.m, kEach) && aligned_for(args.v, kEach));
}

Status sum_of_squares(const SquaresArgs& args, const Place& place) {
  if (args.dtype == DType::f32) return sum_of_squares_of<float>(args, place);
  return args.dtype == DType::f16 ? sum_of_squares_of<F16>(args, place) : sum_of_squares_of<Bf16>(args, place);
}

}  // namespace nybble::cuda
