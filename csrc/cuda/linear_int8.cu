// The forward with int8 activations: out = s * (q . c^T) * g + side path + outlier columns + bias, q and c the codes of
// linear_int8.cuh, multiplied by the tensor cores of a warp and summed in int32.
//
// Three ways to read W: 4 bits where it lies, a table of 16 int8 codes for each block, looked up four weights at a time
// by byte permutes; int8 where it lies; codes that another kernel wrote, for rows that begin at any byte. The first and
// the last have a scale for each step of 128 columns, whose integer sums are added to fp32 ones.
//
// A warp multiplies rows of W that no other has with all rows of x of its block, so that a weight is decoded once and
// goes from registers into the tensor cores:
//
//                 kXRows rows of x, a step in shared memory, read by all warps
//               +-----------------------------------------------+
//        warp 0 | 16 or 32 rows of W                            |
//        warp 1 | ...                                           |
//
// The order of columns within a step is free: thread t of four takes columns 32 t to 32 t + 31 of both operands, which
// lie together. For each step of 256 x 128 outputs an SM's tensor cores need 256 * 128 * 128 / 2500 = 1680 clocks (a
// rate of mma.sync on Hopper), its shared memory 8 * (16 + 2) KB / 128 = 1150, decoding 256 * 128 * 1.4 / 64 = 720 of
// the integer units; the flush is 2 instructions for an output, 512 issue slots of four schedulers.
#include "cuda/launch.cuh"
#include "cuda/linear_int8_codes.cuh"
#include "cuda/linear_int8_results.cuh"
#include "cuda/linear_int8_weight.cuh"

namespace nybble::cuda {

namespace {

constexpr int64_t kMostBytes = int64_t{1} << 31;  // of W in a launch
constexpr int64_t kExact = 65536;                 // columns whose products int32 can sum: 128 * 127 * 65536 < 2^31

// ---- copies to shared memory ----------------------------------------------------------------------------------------

// What a thread copies of every step: some 16-byte chunks of rows of W and of x, the rows a multiple of 8 apart, so
// that the swizzle is the same.
template <class T, Source kSource>
struct Copier {
  static constexpr int kChunks = T::kRowBytes / 16;  // of a row of W
  static constexpr int kWRows = kThreads / kChunks;
  static constexpr int kXRows = kThreads / 8;
  uint32_t w_from, x_from;  // bytes: a launch's rows are below 4 GB, so that a thread keeps no 64-bit addresses
  int w_left, x_left;       // rows from this thread's first one to the last

  static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / kChunks; }
  static __device__ __forceinline__ int chunk() { return static_cast<int>(threadIdx.x) % kChunks; }
  static __device__ __forceinline__ int x_row() { return static_cast<int>(threadIdx.x) / 8; }
  static __device__ __forceinline__ int x_chunk() { return static_cast<int>(threadIdx.x) % 8; }

  __device__ __forceinline__ Copier(const Int8Job& job, int first_w, int first_x) {
    w_from = static_cast<uint32_t>(first_w + row()) * job.w_stride + chunk() * 16;
    w_left = job.w_rows - first_w - row();
    x_from = static_cast<uint32_t>(first_x + x_row()) * job.x_stride + x_chunk() * 16;
    x_left = job.x_rows - first_x - x_row();
  }

  __device__ __forceinline__ void copy(const Int8Job& job, unsigned char* stage, int step) const {
    const int at = step * T::kRowBytes;
    const bool inside = static_cast<uint32_t>(at + chunk() * 16) < job.w_stride;
    unsigned char* to =
        stage + (kSource == Source::packed ? threadIdx.x * 16 : swizzled(static_cast<uint32_t>(row()), chunk()));
#pragma unroll
    for (int i = 0; i < T::kRows / kWRows; ++i) {
      copy_async_16(to + i * kWRows * T::kRowBytes, job.w + (w_from + i * kWRows * job.w_stride + at),
                    inside && i * kWRows < w_left);
    }
    to = stage + T::kWBytes + swizzled(static_cast<uint32_t>(x_row()), x_chunk());
#pragma unroll
    for (int i = 0; i < T::kXRows / kXRows; ++i) {
      copy_async_16(to + i * kXRows * kStep, job.x + (x_from + i * kXRows * job.x_stride + step * kStep),
                    i * kXRows < x_left);
    }
  }
};

// Until all but the latest `pending` groups have come.
__device__ __forceinline__ void wait_for_copies(int pending) {
  if (pending == 0) return copy_async_wait<0>();
  if (pending == 1) return copy_async_wait<1>();
  copy_async_wait<2>();
}

// ---- a step ---------------------------------------------------------------------------------------------------------

// sums += the step's products. `at`: where this thread's codes of row g of x begin.
template <class T>
__device__ __forceinline__ void multiply_step(const unsigned char* stages, int at, const Fragments<T>& w,
                                              int (&sums)[T::kXRows / 8][T::kOwn / 2][4]) {
#pragma unroll
  for (int j = 0; j < T::kXRows / 8; ++j) {
    uint32_t words[8];
    load_codes(stages, at + j * 8 * kStep, words);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint32_t b[2] = {words[2 * s], words[2 * s + 1]};
#pragma unroll
      for (int i = 0; i < T::kOwn / 2; ++i) multiply_int8(sums[j][i], w.a[i][s], b);
    }
  }
}

// The same, the step's integers times the steps of the rows of W.
template <class T>
__device__ __forceinline__ void multiply_step(const unsigned char* stages, int at, const Fragments<T>& w,
                                              float (&sums)[T::kXRows / 8][T::kOwn / 2][4]) {
  constexpr int kRowTiles = T::kOwn / 2;
#pragma unroll
  for (int j = 0; j < T::kXRows / 8; ++j) {
    uint32_t words[8];
    load_codes(stages, at + j * 8 * kStep, words);
    int shifted[kRowTiles][4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const uint32_t b[2] = {words[2 * s], words[2 * s + 1]};
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        if (s == 0) {
          multiply_int8_from(static_cast<int>(kShiftedBits), shifted[i], w.a[i][s], b);
        } else {
          multiply_int8(shifted[i], w.a[i][s], b);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float sum = __fsub_rn(__int_as_float(shifted[i][e]), kShifted);
        sums[j][i][e] = __fmaf_rn(sum, w.step[2 * i + e / 2], sums[j][i][e]);
      }
    }
  }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <Source kSource, int kRowTiles, int kXTiles>
__device__ __forceinline__ void multiply_tile(const Int8Job& job) {
  using T = Tile<kSource, kRowTiles, kXTiles>;
  unsigned char* shared = shared_memory();
  Tables* tables = reinterpret_cast<Tables*>(shared);
  unsigned char* stages = shared + kTablesBytes;
  const Weight& weight = job.args.weight;
  const int g = lane() / 4, t = lane() % 4;
  const int own_warp = warp();
  const int x_tiles = (job.x_rows + T::kXRows - 1) / T::kXRows;
  const Origin origin{static_cast<int>(blockIdx.x) % x_tiles * T::kXRows,
                      static_cast<int>(blockIdx.x) / x_tiles * T::kRows};
  Origin* kept = reinterpret_cast<Origin*>(shared + sizeof(Tables));
  if (threadIdx.x == 0) *kept = origin;
  const int steps = static_cast<int>(job.padded / kStep);

  const Copier<T, kSource> copier(job, origin.w_row, origin.x_row);
  for (int step = 0; step < job.stages - 1; ++step) {
    if (step < steps) copier.copy(job, stages + step * T::kStageBytes, step);
    copy_async_commit();
  }

  float unit = 0.0F, offset = 0.0F;
  std::conditional_t<kSource == Source::packed, BlockReader<T>, Nothing> blocks(job, tables, origin.w_row,
                                                                                own_warp * T::kWarpRows + g);
  if constexpr (kSource == Source::packed) {
    const BlockScales& scales = weight.packed4.scales;
    if (threadIdx.x < 16) tables->codebook[threadIdx.x] = __ldg(weight.packed4.codebook + threadIdx.x);
    if (scales.plain == nullptr && steps > 0) {
      tables->map[threadIdx.x] = __ldg(scales.map + threadIdx.x);
      if (threadIdx.x == 0) tables->offset = *scales.offset;
    }
    if (threadIdx.x == 32) tables->unit = __fdiv_rn(largest_magnitude(weight.packed4.codebook), 127.0F);
    __syncthreads();
    unit = tables->unit;
    offset = tables->offset;
    if (steps > 0) blocks.fetch(weight, 0);
  }

  // Where this thread's codes begin in a stage.
  const int first_chunk = static_cast<int>(swizzled(g, 2 * t));
  const int x_at = T::kWBytes + first_chunk;
  const int w_at =
      own_warp * T::kWarpRows * T::kRowBytes + (kSource == Source::packed ? g * T::kRowBytes + t * 16 : first_chunk);

  Fragments<T> fragments;
  std::conditional_t<kSource == Source::codes, int, float> sums[kXTiles][kRowTiles][4] = {};
  // Half of the warps decode a step before they need it, so that of two that share a scheduler one decodes while the
  // other multiplies.
  const bool early = kSource == Source::packed && own_warp >= kWarps / 2;
  const auto take = [&](int step, int stage) {
    if constexpr (kSource == Source::packed) {
      decode_packed<T>(weight, stages + stage + w_at, tables, unit, offset, blocks, step, fragments);
      blocks.fetch(weight, step + 1);
    } else {
      read_codes<T>(stages, stage + w_at, fragments);
    }
    if constexpr (kSource == Source::groups) {
#pragma unroll
      for (int own = 0; own < T::kOwn; ++own) {
        const int64_t row = min(origin.w_row + own_warp * T::kWarpRows + g + 8 * own, job.w_rows - 1);
        fragments.step[own] = __ldg(job.w_scale + row * steps + step);
      }
    }
  };
  int stage = 0, free = job.stages - 1;  // which is read, and which the step before has read
  for (int step = 0; step < steps; ++step) {
    wait_for_copies(job.stages - (kSource == Source::packed ? 3 : 2));
    __syncthreads();
    if (step + job.stages - 1 < steps) copier.copy(job, stages + free * T::kStageBytes, step + job.stages - 1);
    copy_async_commit();
    free = stage;
    stage = stage + 1 == job.stages ? 0 : stage + 1;
    if (!early || step == 0) take(step, free * T::kStageBytes);
    multiply_step<T>(stages, free * T::kStageBytes + x_at, fragments, sums);
    if (early && step + 1 < steps) take(step + 1, stage * T::kStageBytes);
  }
  copy_async_wait<0>();
  __syncthreads();
  const int x_row = kept->x_row, w_row = kept->w_row;
  const int own_row = w_row + warp() * T::kWarpRows + lane() / 4;

  float out[kXTiles][kRowTiles][4];
  float row_scale[T::kOwn];
#pragma unroll
  for (int own = 0; own < T::kOwn; ++own) {
    row_scale[own] = 1.0F;
    if constexpr (kSource == Source::codes) {
      row_scale[own] = __fdiv_rn(weight.rows8.absmax[job.first_w + min(own_row + 8 * own, job.w_rows - 1)], 127.0F);
    }
  }
#pragma unroll
  for (int j = 0; j < kXTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = x_row + 8 * j + 2 * t + e;
      const Int8Scale scale = row < job.x_rows ? job.x_scale[row] : Int8Scale{0.0F, 0.0F};
#pragma unroll
      for (int own = 0; own < T::kOwn; ++own) {
        float sum = static_cast<float>(sums[j][own / 2][own % 2 * 2 + e]);
        if constexpr (kSource == Source::codes) sum = __fmul_rn(sum, row_scale[own]);
        out[j][own / 2][own % 2 * 2 + e] = __fmul_rn(__fmul_rn(sum, scale.by), scale.lift);
      }
    }
  }
  float* buffers = reinterpret_cast<float*>(stages);
  if (job.outliers.count != nullptr) add_extra<T>(job, true, x_row, w_row, buffers, out);
  if (job.args.side.rank > 0) add_extra<T>(job, false, x_row, w_row, buffers, out);
  __syncthreads();
  store_sums<T>(job, x_row, w_row, buffers, out);
}

// 128 rows of x with 4-bit weights just fit the registers of code for Hopper; elsewhere the compiler would keep some in
// memory, and 64 are multiplied at a time.
template <Source kSource, int kRowTiles, int kXTiles>
__global__ void __launch_bounds__(kThreads, kRowTiles == 1 ? 2 : 1) linear_int8_kernel(Int8Job job) {
  if constexpr (kCodeForHopper || kSource != Source::packed || kXTiles < 16) {
    multiply_tile<kSource, kRowTiles, kXTiles>(job);
  }
}

// ---- the host's part ------------------------------------------------------------------------------------------------

// Bytes of shared memory that a block may have.
int shared_limit(const Device& device) {
  const int capability = device.capability;
  if (capability == 80 || capability == 87) return 163 * 1024;
  return capability >= 90 && capability < 120 ? 227 * 1024 : 99 * 1024;
}

template <Source kSource, int kRowTiles, int kXTiles>
Status multiply(Int8Job job, const Device& device, const Place& place) {
  using T = Tile<kSource, kRowTiles, kXTiles>;
  constexpr int kBlocks = kRowTiles == 1 ? 2 : 1;  // that an SM is to hold
  constexpr int kFewest = kSource == Source::packed ? 3 : 2;
  const int fit = (shared_limit(device) / kBlocks - (kBlocks - 1) * 1024 - kTablesBytes) / T::kStageBytes;
  job.stages = fit < kFewest ? kFewest : (fit > 4 ? 4 : fit);
  const int bytes = job.stages * T::kStageBytes;
  const int most = bytes > T::kExtraBytes ? bytes : T::kExtraBytes;
  const int64_t tiles = divide_up(job.x_rows, T::kXRows) * divide_up(job.w_rows, T::kRows);
  return launch<&linear_int8_kernel<kSource, kRowTiles, kXTiles>>(dim3(static_cast<unsigned>(tiles)), kThreads,
                                                                  kTablesBytes + most, place, job);
}

template <Source kSource>
Status multiply(const Int8Job& job, const Device& device, const Place& place) {
  using Large = Tile<kSource, 2, 16>;
  const int64_t tiles = divide_up(job.x_rows, Large::kXRows) * divide_up(job.w_rows, Large::kRows);
  if (tiles < device.multiprocessors) return multiply<kSource, 1, 8>(job, device, place);
  if constexpr (kSource == Source::packed) {
    if (!device.hopper()) return multiply<kSource, 2, 8>(job, device, place);
  }
  return multiply<kSource, 2, 16>(job, device, place);
}

// Memory handed out from the workspace, after its counters.
class Space {
 public:
  explicit Space(void* workspace) : at_(static_cast<uint8_t*>(workspace) + kCounters * 4), left_(kAll) {}
  int64_t left() const { return left_; }
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at_);
    const int64_t bytes = divide_up(count * static_cast<int64_t>(sizeof(T)), 128) * 128;
    at_ += bytes, left_ -= bytes;
    return taken;
  }

 private:
#if defined(NYBBLE_SHIM)
  static constexpr int64_t kAll = int64_t{512} << 10;  // small problems are cut up as large ones on a GPU
#else
  static constexpr int64_t kAll = kWorkspaceBytes - kCounters * 4;
#endif
  uint8_t* at_;
  int64_t left_;
};

template <class T>
Status find(const LinearArgs& args, int64_t padded, const Device& device, const Place& place, Space* space,
            Outliers* outliers) {
  const int64_t blocks = divide_up(padded, kFindColumns);
  const int64_t slices = smaller(larger(1, smaller(divide_up(2 * device.multiprocessors, blocks), 16)), args.m);
  const int64_t rows = divide_up(args.m, slices);
  uint8_t* is = space->take<uint8_t>(padded);
  int32_t* list = space->take<int32_t>(padded);
  int32_t* count = space->take<int32_t>(1);
  uint8_t* found = space->take<uint8_t>(slices * padded);
  *outliers = {is, list, count};
  const Status status =
      launch<&find_outliers<T>>(dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(slices)), kCodesThreads,
                                kCodesThreads * 4, place, static_cast<const T*>(args.x), args.x_stride, args.m, rows,
                                args.weight.cols, padded, args.outlier_threshold, found);
  if (!status.ok()) return status;
  return launch<&list_outliers>(dim3(1), kListThreads, 128, place, static_cast<const uint8_t*>(found), slices, padded,
                                is, list, count);
}

template <class T>
Status round(const Int8Job& job, bool swapped, uint8_t* codes, Int8Scale* scale, const Place& place) {
  const LinearArgs& args = job.args;
  return launch<&round_rows<T>>(dim3(static_cast<unsigned>(job.x_rows)), kCodesThreads, kCodesWarps * 4, place,
                                static_cast<const T*>(args.x) + job.first_x * args.x_stride, args.x_stride,
                                args.weight.cols, job.padded, swapped, job.outliers, codes, scale);
}

// All rows of W with the rows of x that the job has.
Status multiply_all(Int8Job job, Source source, Space space, const Device& device, const Place& place) {
  const Weight& weight = job.args.weight;
  if (source != Source::groups) {
    const bool packed = source == Source::packed;
    const uint8_t* w = packed ? weight.packed4.packed : reinterpret_cast<const uint8_t*>(weight.rows8.q);
    job.w_stride = static_cast<uint32_t>(packed ? weight.cols / 2 : weight.cols);
    const int64_t most = larger(1, kMostBytes / larger(1, job.w_stride));
    Status status;
    for (job.first_w = 0; job.first_w < weight.rows && status.ok(); job.first_w += most) {
      job.w_rows = static_cast<int>(smaller(most, weight.rows - job.first_w));
      job.w = w + job.first_w * job.w_stride;
      status = packed ? multiply<Source::packed>(job, device, place) : multiply<Source::codes>(job, device, place);
    }
    return status;
  }
  const int64_t steps = job.padded / kStep;
  const int64_t rows = smaller(larger(1, (space.left() - 256) / (job.padded + 4 * steps)), weight.rows);
  uint8_t* codes = space.take<uint8_t>(rows * job.padded);
  float* scale = space.take<float>(rows * steps);
  job.w = codes, job.w_scale = scale, job.w_stride = job.x_stride;
  for (job.first_w = 0; job.first_w < weight.rows; job.first_w += rows) {
    job.w_rows = static_cast<int>(smaller(rows, weight.rows - job.first_w));
    Status status = launch<&code_weight>(
        dim3(static_cast<unsigned>(job.w_rows), static_cast<unsigned>(divide_up(steps, kCodesWarps))), kCodesThreads, 0,
        place, weight, job.first_w, job.padded, codes, scale);
    if (status.ok()) status = multiply<Source::groups, 1, 8>(job, device, place);
    if (!status.ok()) return status;
  }
  return success();
}

Source source_of(const Weight& weight) {
  const void* bytes = weight.is_int8() ? static_cast<const void*>(weight.rows8.q) : weight.packed4.packed;
  const bool whole = weight.cols % (weight.is_int8() ? 16 : 32) == 0 && (reinterpret_cast<uintptr_t>(bytes) & 15) == 0;
  const bool many = weight.is_int8() ? weight.cols > kExact
                                     : weight.rows * weight.cols >> weight.packed4.block_shift > int64_t{UINT32_MAX};
  if (!whole || many) return Source::groups;
  return weight.is_int8() ? Source::codes : Source::packed;
}

template <class T>
Status linear_int8_as(const LinearArgs& args, const Device& device, const Place& place) {
  Space space(place.workspace);
  Int8Job job;
  job.args = args;
  job.padded = divide_up(args.weight.cols, kStep) * kStep;
  job.x_stride = static_cast<uint32_t>(job.padded);
  job.wide_stores = args.weight.rows % 8 == 0 && (reinterpret_cast<uintptr_t>(args.out) & 15) == 0;
  const Source source = source_of(args.weight);
  Status status;
  if (args.outlier_threshold > 0.0F && args.weight.cols > 0) {
    status = find<T>(args, job.padded, device, place, &space, &job.outliers);
    if (!status.ok()) return status;
  }
  // As many rows of x as fit, in parts of about the same size; half of the memory is for codes of W, if they need it.
  const int64_t bytes = source == Source::groups ? space.left() / 2 : space.left();
  const int64_t fit = larger(1, (bytes - 256) / (job.padded + static_cast<int64_t>(sizeof(Int8Scale))));
  const int64_t even = divide_up(args.m, divide_up(args.m, fit));
  const int64_t rows = smaller(divide_up(even, 128) * 128, fit);
  uint8_t* codes = space.take<uint8_t>(rows * job.padded);
  Int8Scale* scale = space.take<Int8Scale>(rows);
  job.x = codes, job.x_scale = scale;
  for (job.first_x = 0; job.first_x < args.m && status.ok(); job.first_x += rows) {
    job.x_rows = static_cast<int>(smaller(rows, args.m - job.first_x));
    status = round<T>(job, source == Source::packed, codes, scale, place);
    if (status.ok()) status = multiply_all(job, source, space, device, place);
  }
  return status;
}

}  // namespace

Status linear_int8(const LinearArgs& args, const Device& device, const Place& place) {
  if (args.m == 0 || args.weight.rows == 0) return success();
  if (args.grad_input) return bad_argument("compute", static_cast<int64_t>(args.compute));
  switch (args.dtype) {
    case DType::f32:
      return linear_int8_as<float>(args, device, place);
    case DType::f16:
      return linear_int8_as<F16>(args, device, place);
    case DType::bf16:
      return linear_int8_as<Bf16>(args, device, place);
  }
  return bad_argument("dtype", static_cast<int64_t>(args.dtype));
}

}  // namespace nybble::cuda
