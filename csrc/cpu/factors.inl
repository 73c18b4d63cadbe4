// Products of a bf16 matrix with a LoRA factor, whose rank is small beside both sizes of the matrix. For a general
// multiplication they are all edge: half of its time goes into rearranging the matrix.
//
//   apply     out[m, rank] = scale x[m, k] . factor^T: the factor becomes a panel once, rows of x are read in place
//   gradient  out[rank, k] = left^T . x[m, k]: two rows of x are interleaved in registers, and never stored; left,
//   which
//             is small, is what is arranged
//
// x is read once. Each output is summed in order, by one task, so neither the thread count nor the tiling changes a
// bit.

#ifdef NYBBLE_BF16_DOT

constexpr int64_t kRowsOfFactorTask = 96;
constexpr int64_t kRanks = 16;  // that the gradient sums at a time
constexpr int64_t kColumnsOfFactorTask = 128;
constexpr int64_t kRowsAheadOfGradient = 32;
constexpr int64_t kRowsOfFactorChunk = 256;  // of x, whose columns of a task then lie in the second-level cache

static_assert(kColumnsOfFactorTask % kLanes == 0 && kRanks % kLanes == 0, "whole vectors");

// ---- apply ----------------------------------------------------------------------------------------------------------

struct ApplyJob {
  const FactorArgs* args;
  Operand x;
  const uint32_t* panel;  // [group of columns][step][vectors of the group]
};

// Vectors of ranks that are summed at a time, and how many of them a group has.
static int64_t vectors_of(int64_t rank) { return divide_up(rank, kLanes); }

template <int Rows, int Vectors>
static NYBBLE_INLINE void apply_tile(const char* x, int64_t x_stride, const uint32_t* panel, int64_t steps, float* acc,
                                     int64_t acc_stride) {
  F32 sums[Rows][Vectors];
  for (int row = 0; row < Rows; ++row) {
    for (int v = 0; v < Vectors; ++v) sums[row][v] = load(acc + row * acc_stride + v * kLanes);
  }
  const float* columns = reinterpret_cast<const float*>(panel);
  for (int64_t step = 0; step < steps; ++step, columns += Vectors * kLanes, x += 4) {
    F32 factor[Vectors];
    for (int v = 0; v < Vectors; ++v) factor[v] = load(columns + v * kLanes);
    for (int row = 0; row < Rows; ++row) {
      for (int v = 0; v < Vectors; ++v) sums[row][v] = StepBf16::dot(sums[row][v], x + row * x_stride, factor[v]);
    }
  }
  for (int row = 0; row < Rows; ++row) {
    for (int v = 0; v < Vectors; ++v) store(acc + row * acc_stride + v * kLanes, sums[row][v]);
  }
}

// More rows at a time would fall on the same lines of the first-level cache where their distance is a power of two.
template <int Vectors>
static void apply_rows(const char* x, int64_t x_stride, int64_t rows, const uint32_t* panel, int64_t steps, float* acc,
                       int64_t acc_stride) {
  constexpr int kRows = Vectors == 1 ? 12 : Vectors == 2 ? 8 : kTileRows;
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    apply_tile<kRows, Vectors>(x + row * x_stride, x_stride, panel, steps, acc + row * acc_stride, acc_stride);
  }
  for (; row < rows; ++row) {
    apply_tile<1, Vectors>(x + row * x_stride, x_stride, panel, steps, acc + row * acc_stride, acc_stride);
  }
}

static void apply_group(int64_t vectors, const char* x, int64_t x_stride, int64_t rows, const uint32_t* panel,
                        int64_t steps, float* acc, int64_t acc_stride) {
  switch (vectors) {
    case 1:
      return apply_rows<1>(x, x_stride, rows, panel, steps, acc, acc_stride);
    case 2:
      return apply_rows<2>(x, x_stride, rows, panel, steps, acc, acc_stride);
    case 3:
      return apply_rows<3>(x, x_stride, rows, panel, steps, acc, acc_stride);
    default:
      return apply_rows<kTileVectors>(x, x_stride, rows, panel, steps, acc, acc_stride);
  }
}

static void apply_task(void* context, int64_t index) {
  const ApplyJob& job = *static_cast<const ApplyJob*>(context);
  const FactorArgs& args = *job.args;
  const int64_t first = index * kRowsOfFactorTask;
  const int64_t rows = smaller(kRowsOfFactorTask, args.m - first);
  const int64_t vectors = vectors_of(args.rank), steps = steps_of(args.k, StepBf16::kIndices);
  alignas(64) float acc[kRowsOfFactorTask * kMostRank];
  memset(acc, 0, sizeof acc);
  const char* x = job.x.data + first * job.x.stride;
  for (int64_t v = 0; v < vectors; v += kTileVectors) {
    apply_group(smaller(kTileVectors, vectors - v), x, job.x.stride, rows, job.panel + v * steps * kLanes, steps,
                acc + v * kLanes, kMostRank);
  }
  const F32 scale = broadcast(args.scale);
  for (int64_t row = 0; row < rows; ++row) {
    float* sums = acc + row * kMostRank;
    for (int64_t j = 0; j < args.rank; j += kLanes) store(sums + j, mul(load(sums + j), scale));
    store_results(sums, args.rank, DType::bf16, args.out, (first + row) * args.rank);
  }
}

// The factor as a panel without gaps: packed a chunk at a time into strips, of which only the ranks' vectors are kept.
static Status pack_factor(const FactorArgs& args, uint32_t** panel) {
  const int64_t vectors = vectors_of(args.rank), steps = steps_of(args.k, StepBf16::kIndices);
  const int64_t chunk_steps = StepBf16::kChunk / StepBf16::kIndices;
  const int64_t strips = strips_of(args.rank) / kStrip;
  const int64_t bytes = larger(vectors * kLanes * steps, kLanes) * 4, chunk_bytes = chunk_steps * strips * kStrip * 4;
  *panel = static_cast<uint32_t*>(scratch(Slot::panel, static_cast<size_t>(bytes)));
  auto* chunk = static_cast<uint32_t*>(scratch(Slot::accumulators, static_cast<size_t>(chunk_bytes)));
  auto* buffer = static_cast<Bf16*>(scratch(Slot::rows, pack_buffer_bytes<StepBf16>()));
  if (*panel == nullptr || chunk == nullptr || buffer == nullptr) return out_of_memory(bytes + chunk_bytes);
  const DenseRows factor{args.factor, args.factor_dtype, args.by_rank ? args.k : args.rank};
  for (int64_t at = 0; at < args.k; at += StepBf16::kChunk) {
    const int64_t count = smaller(StepBf16::kChunk, args.k - at), here = steps_of(count, StepBf16::kIndices);
    const int64_t padded = divide_up(here, kLanes) * kLanes;
    if (args.by_rank) {
      pack_transposed<StepBf16>(factor, 0, args.rank, at, count, buffer, chunk);
    } else {
      pack_straight<StepBf16>(factor, at, count, 0, args.rank, buffer, chunk);
    }
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t group = v / kTileVectors * kTileVectors;
      const int64_t width = smaller(kTileVectors, vectors - group) * kLanes;
      const uint32_t* from = chunk + v * kLanes / kStrip * padded * kStrip + v * kLanes % kStrip;
      uint32_t* to = *panel + group * steps * kLanes + at / StepBf16::kIndices * width + (v - group) * kLanes;
      for (int64_t step = 0; step < here; ++step) memcpy(to + step * width, from + step * kStrip, kLanes * 4);
    }
  }
  return success();
}

static Status factor_apply(const FactorArgs& args) {
  if (args.m == 0 || args.rank == 0) return success();
  ApplyJob job{&args, {}, nullptr};
  Status status =
      prepare<StepBf16>(args.x, DType::bf16, args.m, args.k, args.x_stride, Slot::inputs, args.threads, &job.x);
  uint32_t* panel = nullptr;
  if (status.ok()) status = pack_factor(args, &panel);
  if (!status.ok()) return status;
  job.panel = panel;
  parallel_for(args.threads, divide_up(args.m, kRowsOfFactorTask), apply_task, &job);
  trim_scratch();
  return success();
}

// ---- gradient -------------------------------------------------------------------------------------------------------

struct FactorGradJob {
  const FactorGradArgs* args;
  const uint32_t* left;  // [group of kRanks][pair of rows][kRanks]: pairs of bf16
  int64_t pairs;
};

// `count` elements of two rows as kLanes pairs, zeros behind them; without a second row, zeros in its place.
static NYBBLE_INLINE F32 pairs_at(const Bf16* first, const Bf16* second, int64_t count) {
  alignas(64) uint32_t pairs[kLanes];
  alignas(64) Bf16 values[2][kLanes];
  if (count < kLanes || second == nullptr) {
    memset(static_cast<void*>(values), 0, sizeof values);
    memcpy(static_cast<void*>(values[0]), first, static_cast<size_t>(count) * sizeof(Bf16));
    if (second != nullptr) memcpy(static_cast<void*>(values[1]), second, static_cast<size_t>(count) * sizeof(Bf16));
    first = values[0];
    second = values[1];
  }
  interleave(first, second, pairs);
  return load(reinterpret_cast<const float*>(pairs));
}

// acc[kRanks][kLanes of kColumnsOfFactorTask] += left^T . x for the rows `first` to `last` and `count` columns.
static void gradient_tile(const FactorGradArgs& args, const uint32_t* left, int64_t first, int64_t last, int64_t column,
                          int64_t count, float* acc) {
  F32 sums[kRanks];
  for (int64_t i = 0; i < kRanks; ++i) sums[i] = load(acc + i * kColumnsOfFactorTask);
  const Bf16* x = static_cast<const Bf16*>(args.x) + column;
  left += first / 2 * kRanks;
  int64_t row = first;
  if (count == kLanes) {
    for (; row + 1 < last; row += 2, left += kRanks) {
      alignas(64) uint32_t pairs[kLanes];
      prefetch_near(x + (row + kRowsAheadOfGradient) * args.x_stride);
      prefetch_near(x + (row + kRowsAheadOfGradient + 1) * args.x_stride);
      interleave(x + row * args.x_stride, x + (row + 1) * args.x_stride, pairs);
      const F32 columns = load(reinterpret_cast<const float*>(pairs));
      for (int64_t i = 0; i < kRanks; ++i) sums[i] = dot_pairs(sums[i], left[i], columns);
    }
  }
  for (; row < last; row += 2, left += kRanks) {
    const Bf16* second = row + 1 < last ? x + (row + 1) * args.x_stride : nullptr;
    const F32 columns = pairs_at(x + row * args.x_stride, second, count);
    for (int64_t i = 0; i < kRanks; ++i) sums[i] = dot_pairs(sums[i], left[i], columns);
  }
  for (int64_t i = 0; i < kRanks; ++i) store(acc + i * kColumnsOfFactorTask, sums[i]);
}

static void factor_grad_task(void* context, int64_t index) {
  const FactorGradJob& job = *static_cast<const FactorGradJob*>(context);
  const FactorGradArgs& args = *job.args;
  const int64_t first_column = index * kColumnsOfFactorTask;
  const int64_t width = smaller(kColumnsOfFactorTask, args.k - first_column);
  alignas(64) float acc[kMostRank * kColumnsOfFactorTask];
  memset(acc, 0, sizeof acc);
  for (int64_t row = 0; row < args.m; row += kRowsOfFactorChunk) {
    const int64_t last = smaller(row + kRowsOfFactorChunk, args.m);
    for (int64_t j = 0; j < width; j += kLanes) {
      for (int64_t rank = 0; rank < args.rank; rank += kRanks) {
        gradient_tile(args, job.left + rank * job.pairs, row, last, first_column + j, smaller(kLanes, width - j),
                      acc + rank * kColumnsOfFactorTask + j);
      }
    }
  }
  for (int64_t rank = 0; rank < args.rank; ++rank) {
    const float* sums = acc + rank * kColumnsOfFactorTask;
    float* out = args.out + rank * args.out_rank_stride + first_column * args.out_column_stride;
    for (int64_t j = 0; j < width; ++j) out[j * args.out_column_stride] = sums[j];
  }
}

static Status factor_gradient(const FactorGradArgs& args) {
  if (args.rank == 0 || args.k == 0) return success();
  FactorGradJob job{&args, nullptr, divide_up(args.m, 2)};
  const int64_t groups = divide_up(args.rank, kRanks);
  const int64_t bytes = larger(groups * job.pairs * kRanks, 1) * 4;
  auto* left = static_cast<uint32_t*>(scratch(Slot::side, static_cast<size_t>(bytes)));
  if (left == nullptr) return out_of_memory(bytes);
  const Bf16* from = static_cast<const Bf16*>(args.left);
  for (int64_t rank = 0; rank < groups * kRanks; rank += kLanes) {
    for (int64_t pair = 0; pair < job.pairs; ++pair) {
      const Bf16* first = from + 2 * pair * args.rank + rank;
      const int64_t count = larger(0, smaller(kLanes, args.rank - rank));
      const F32 pairs =
          count > 0 ? pairs_at(first, 2 * pair + 1 < args.m ? first + args.rank : nullptr, count) : zero();
      store(reinterpret_cast<float*>(left + rank / kRanks * job.pairs * kRanks + pair * kRanks + rank % kRanks), pairs);
    }
  }
  job.left = left;
  parallel_for(args.threads, divide_up(args.k, kColumnsOfFactorTask), factor_grad_task, &job);
  trim_scratch();
  return success();
}

#else
constexpr Status (*factor_apply)(const FactorArgs&) = nullptr;
constexpr Status (*factor_gradient)(const FactorGradArgs&) = nullptr;
#endif
