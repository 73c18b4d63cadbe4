// fp32, fp16 or bf16 to 4-bit codes: one pass over the memory with the largest magnitudes as scales; 33 candidates a
// block in registers where the scale of least squared error is searched.
#include "cuda/encode.cuh"
#include "cuda/launch.cuh"

namespace nybble::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Of a multiprocessor at once: 64 or 40 registers a thread.
template <bool Searching>
constexpr int kBlocks = Searching ? 4 : 6;

// Shared memory: thresholds, codes and places in the codebook by rank, each once for every lane, and the sorted codes.
constexpr int kCodes = kThresholdTable;
constexpr int kPlaces = 2 * kThresholdTable;
constexpr int kSorted = 3 * kThresholdTable;
constexpr int kShared = (kSorted + 16) * 4;

// Stable, so FP4's two zeros keep their order.
__device__ __forceinline__ void fill_tables(const float* codebook, float* tables) {
  const int thread = static_cast<int>(threadIdx.x);
  float* sorted = tables + kSorted;
  if (thread < 16) {
    const float code = codebook[thread];
    int rank = 0;
    for (int i = 0; i < 16; ++i) {
      const float other = codebook[i];
      rank += other < code || (other == code && i < thread) ? 1 : 0;
    }
    sorted[rank] = code;
    for (int i = 0; i < kWarp; ++i) tables[kPlaces + rank * kWarp + i] = __int_as_float(thread);
  }
  __syncthreads();
  for (int i = thread; i < kThresholdTable; i += kThreads) {
    const int rank = i / kWarp;
    tables[kCodes + i] = sorted[rank];
    tables[i] = rank < 15 ? within_reach((sorted[rank] + sorted[rank + 1]) / 2.0F) : __uint_as_float(kInfinity);
  }
  __syncthreads();
}

struct Run {
  float v[2][kEach];
};

template <class T>
__device__ __forceinline__ void load_values(const Quantize4Args& args, int64_t start, bool aligned, Run* run) {
  uint4 raw[2];
  load_run(static_cast<const T*>(args.x), start, args.count, aligned && start + kRun <= args.count, raw);
#pragma unroll
  for (int step = 0; step < 2; ++step) floats_of<T>(raw[step], run->v[step]);
}

// ---- the scale of least squared error -------------------------------------------------------------------------------

// What the errors of a run's elements count; 0 beyond the tensor's end. `column`: that of element `start` + 4 lane.
__device__ __forceinline__ void weigh(const Quantize4Args& args, const Run& run, int64_t start,
                                      const float (&reciprocal)[2], int64_t column, float (&weights)[2][kEach]) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const int64_t left = args.count - place_of(start, step);
    if (args.search == Search::importance) {
      int64_t from = column + step * kStep;
      if (from >= args.columns) from %= args.columns;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        weights[step][i] = i < left ? __ldg(args.importance + from) : 0.0F;
        if (++from == args.columns) from = 0;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float s = __fmul_rn(run.v[step][i], reciprocal[step]);
        weights[step][i] = i < left ? args.search == Search::square ? __fmul_rn(s, s) : 1.0F : 0.0F;
      }
    }
  }
}

// For each of 33 candidate scales, absmax times 1, 63/64, ... 1/2, the codes c are picked by the rule; given them the
// best scale is <x, c> / <c, c> and the error <x, x> - <x, c>^2 / <c, c>, all products weighed. Sums are in units of
// the candidate, so neither tiny nor huge blocks leave fp32's range.
template <class T>
__device__ __forceinline__ void search_scales(const Quantize4Args& args, const Groups& groups,
                                              const Thresholds& thresholds, int64_t start, bool aligned, Run* run,
                                              float (&scale)[2]) {
  constexpr int kCandidates = 33;
  const float* codes = thresholds.table + kCodes;
  const float absmax[2] = {scale[0], scale[1]};
  const float reciprocal[2] = {__fdiv_rn(1.0F, absmax[0]), __fdiv_rn(1.0F, absmax[1])};
  const int64_t first = start + lane() * kEach;
  const int64_t column = args.search == Search::importance ? first % args.columns : 0;
  const int runs = groups.runs();
  float weights[2][kEach];
  weigh(args, *run, start, reciprocal, column, weights);
  float best_gain[2] = {0.0F, 0.0F};
#pragma unroll 1
  for (int candidate = 0; candidate < kCandidates; ++candidate) {
    const float factor = 1.0F - static_cast<float>(candidate) / 64.0F;
    float trial[2], by[2], dot[2] = {0.0F, 0.0F}, norm[2] = {0.0F, 0.0F};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      trial[step] = __fmul_rn(absmax[step], factor);
      by[step] = __fdiv_rn(1.0F, trial[step]);
    }
#pragma unroll 1
    for (int i = 0; i < runs; ++i) {
      if (runs > 1) {
        load_values<T>(args, start + i * kRun, aligned, run);
        weigh(args, *run, start + i * kRun, reciprocal, column + i * kRun, weights);
      }
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          const float s = __fmul_rn(run->v[step][j], by[step]);
          const float code = look_up(codes, thresholds.row_of(s));
          const float weighed = __fmul_rn(weights[step][j], code);
          dot[step] = __fmaf_rn(s, weighed, dot[step]);
          norm[step] = __fmaf_rn(code, weighed, norm[step]);
        }
      }
    }
    sum_over_block(groups, dot);
    sum_over_block(groups, norm);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      if (!(norm[step] > 0.0F) || !(dot[step] > 0.0F)) continue;
      const float projected = __fmul_rn(dot[step], factor);
      const float gain = __fmul_rn(projected, __fdiv_rn(projected, norm[step]));
      const float found = __fmul_rn(__fdiv_rn(dot[step], norm[step]), trial[step]);
      // absmax close to fp32's largest: the best scale may lie beyond it
      if (gain > best_gain[step] && __float_as_uint(found) < kInfinity) {
        best_gain[step] = gain;
        scale[step] = found;
      }
    }
  }
  for (float& each : scale) each = absmax_of(__float_as_uint(each));
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <class T, bool Searching>
__global__ void __launch_bounds__(kThreads, kBlocks<Searching>)
    quantize_4bit_kernel(Quantize4Args args, Groups groups, int64_t* failed, bool aligned) {
  float* tables = reinterpret_cast<float*>(shared_memory());
  fill_tables(args.codebook, tables);
  const Thresholds thresholds(tables);
  const float* places = thresholds.table + kPlaces;
  const int runs = groups.runs();
  const int64_t all = groups.groups();
  for (int64_t group = int64_t{blockIdx.x} * kWarps + warp(); group < all; group += int64_t{gridDim.x} * kWarps) {
    const int64_t start = group * groups.size();
    Run run;
    uint32_t largest[2] = {0, 0};
    for (int i = 0; i < runs; ++i) {
      load_values<T>(args, start + i * kRun, aligned, &run);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        for (const float each : run.v[step]) largest[step] = max(largest[step], magnitude_of(each));
      }
    }
    largest_of_block(groups, largest);
    float scale[2] = {absmax_of(largest[0]), absmax_of(largest[1])};
    if constexpr (Searching) search_scales<T>(args, groups, thresholds, start, aligned, &run, scale);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int64_t at = place_of(start, step);
      if (!groups.speaks(step, at)) continue;
      args.absmax[at >> groups.block_shift] = scale[step];
      if (largest[step] >= kInfinity) report(failed, at >> groups.block_shift);
    }
    const float by[2] = {__fdiv_rn(1.0F, scale[0]), __fdiv_rn(1.0F, scale[1])};
    for (int i = 0; i < runs; ++i) {
      if (runs > 1) load_values<T>(args, start + i * kRun, aligned, &run);
      const bool whole = aligned && start + (i + 1) * kRun <= args.count;
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t code[kEach];
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          const uint32_t row = thresholds.row_of(__fmul_rn(run.v[step][j], by[step]));
          code[j] = __float_as_uint(look_up(places, row));
        }
        const uint32_t bytes = code[0] << 4 | code[1] | code[2] << 12 | code[3] << 8;
        const int64_t at = place_of(start + i * kRun, step);
        uint8_t* to = args.packed + at / 2;
        if (whole) {
          *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(bytes);
        } else {
          if (at < args.count) to[0] = static_cast<uint8_t>(bytes);
          if (at + 2 < args.count) to[1] = static_cast<uint8_t>(bytes >> 8);
        }
      }
    }
  }
}

template <class T, bool Searching>
Status quantize_4bit_from(const Quantize4Args& args, int64_t* failed, const Place& place) {
  Device device;
  const Status status = device_properties(place.device, &device);
  if (!status.ok()) return status;
  const Groups groups{log2_of(args.block_size), args.count};
  const int64_t most = int64_t{kBlocks<Searching>} * device.multiprocessors;
  const dim3 grid(static_cast<unsigned>(smaller(divide_up(groups.groups(), kWarps), most)));
  const bool aligned = aligned_for(args.x, args.dtype) && aligned_for(args.packed, 2);
  return launch<&quantize_4bit_kernel<T, Searching>>(grid, kThreads, kShared, place, args, groups, failed, aligned);
}

template <class T>
Status quantize_4bit_from(const Quantize4Args& args, int64_t* failed, const Place& place) {
  return args.search == Search::absmax ? quantize_4bit_from<T, false>(args, failed, place)
                                       : quantize_4bit_from<T, true>(args, failed, place);
}

}  // namespace

Status quantize_4bit(const Quantize4Args& args, int64_t* failed, const Place& place) {
  if (args.dtype == DType::f32) return quantize_4bit_from<float>(args, failed, place);
  return args.dtype == DType::f16 ? quantize_4bit_from<F16>(args, failed, place)
                                  : quantize_4bit_from<Bf16>(args, failed, place);
}

}  // namespace nybble::cuda
