// The panel kernel: out[m, columns] = x[m, contraction] . D, where D is W^T (forward) or W (grad_input), any sizes.
//
//   for a tile of columns and a block of rows of x (one task):
//     for a chunk of the contraction:
//       decode D[chunk, tile] once into a panel that stays in L2, lanes along the columns
//       multiply every row of x with it, kTileRows x kTileVectors accumulators in registers
//     the side path is one more chunk, whose panel comes from B or A instead of from W
//     bias, conversion, store
//
// The decode is paid once for all rows of x. Both directions build the same panel, so they share the multiplication:
//   forward     a row of W is a column of D: decode kLanes rows, transpose them in registers
//   grad_input  a row of W is a row of D: decode it (bf16: two rows, interleaved)
// A panel is cut into strips of kStrip columns: [strip][step][kStrip] 32-bit elements; a step is one contraction index
// in fp32, a pair of them in bf16. Each output is summed in the order of the contraction, by one task, so neither the
// thread count nor the tiling changes a bit.

constexpr int64_t kStrip = kTileVectors * kLanes;
constexpr int64_t kMostChunk = 1024;     // contraction indices decoded at a time, of any Step
constexpr int64_t kForwardColumns = 64;  // rows of W in a tile
constexpr int64_t kMostColumns = 256;    // of a tile that finish() takes
constexpr int64_t kGradColumns = 128;    // columns of W in a tile: 64 packed bytes, one cache line
constexpr int64_t kRowsOfTask = 1024;    // rows of x that share one decode

static_assert(kForwardColumns % kStrip == 0 && kGradColumns % kStrip == 0, "strips fill a tile");
static_assert(kGradColumns <= kMostChunk, "a row of a panel fits DenseRows' buffer");
static_assert(kStrip % kLanes == 0 && kMostChunk % kLanes == 0, "transposition works on whole vectors");

// How a step is held and multiplied.
struct StepF32 {
  using Element = float;
  static constexpr int64_t kIndices = 1;             // contraction indices of a step
  static constexpr int64_t kAlign = 1;               // rows of x are padded to a multiple of this many indices
  static constexpr int64_t kChunk = kMostChunk / 2;  // contraction indices decoded at a time
  static inline F32 dot(F32 acc, const char* x, F32 panel) {
    float value;
    memcpy(&value, x, sizeof value);
    return fma(broadcast(value), panel, acc);
  }
};

#ifdef NYBBLE_BF16_DOT
struct StepBf16 {
  using Element = Bf16;
  static constexpr int64_t kIndices = 2;
  static constexpr int64_t kAlign = 2;
  static constexpr int64_t kChunk = kMostChunk;
  static inline F32 dot(F32 acc, const char* x, F32 panel) {
    uint32_t pair;
    memcpy(&pair, x, sizeof pair);
    return dot_pairs(acc, pair, panel);
  }
};
#endif

// ---- where a panel comes from
// -----------------------------------------------------------------------------------------

// Rows of the weight, decoded to the multiplication's type.
struct WeightRows {
  const Weight* weight;

  template <class T>
  void row(int64_t row, int64_t column, int64_t count, T* out) const {
    if (!weight->is_int8()) return decode_span(weight->packed4, row * weight->cols + column, count, out);
    const int8_t* q = weight->rows8.q + row * weight->cols + column;
    const float by = weight->rows8.absmax[row] / 127.0F;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, mul(load(q + i), broadcast(by)));
    for (; i < count; ++i) from_float(static_cast<float>(q[i]) * by, out + i);
  }

  // Rows are far apart and only a piece of each is wanted, which a hardware prefetcher does not follow.
  NYBBLE_INLINE void fetch(int64_t row, int64_t column, int64_t count) const {
    if (row >= weight->rows || column >= weight->cols) return;
    const int64_t start = row * weight->cols + column;
    const char* from = weight->is_int8() ? reinterpret_cast<const char*>(weight->rows8.q + start)
                                         : reinterpret_cast<const char*>(weight->packed4.packed + start / 2);
    const int64_t bytes = weight->is_int8() ? count : count / 2;
    for (int64_t at = 0; at < bytes; at += 64) prefetch(from + at);
    if (!weight->is_int8()) prefetch(weight->packed4.scales.address(start >> weight->packed4.block_shift));
  }
};

// Rows of a dense matrix: the side path's, or x.
struct DenseRows {
  const void* data;
  DType dtype;
  int64_t stride;

  template <class T>
  void row(int64_t row, int64_t column, int64_t count, T* out) const {
    if (copies(out)) {
      const T* from = static_cast<const T*>(data) + row * stride + column;
      memcpy(static_cast<void*>(out), from, static_cast<size_t>(count) * sizeof(T));
      return;
    }
    alignas(64) float values[kMostChunk];
    load_floats(data, dtype, row * stride + column, count, values);
    from_floats(values, count, out);
  }

  bool copies(const float*) const { return dtype == DType::f32; }
  bool copies(const Bf16*) const { return dtype == DType::bf16; }

  NYBBLE_INLINE void fetch(int64_t, int64_t, int64_t) const {}
};

// Columns of a tile that are computed: whole strips.
static int64_t strips_of(int64_t width) { return divide_up(width, kStrip) * kStrip; }

static int64_t steps_of(int64_t indices, int64_t per_step) { return divide_up(indices, per_step); }

// Elements from one row of the buffer that is transposed to the next: a cache line more than a chunk, so that the rows
// do not fall on the same lines of the first-level cache.
template <class Step>
constexpr int64_t kBufferRow = Step::kChunk + 64 / static_cast<int64_t>(sizeof(typename Step::Element));

// What pack_transposed and pack_straight put rows into.
template <class Step>
static size_t pack_buffer_bytes() {
  return static_cast<size_t>(larger(kLanes * kBufferRow<Step>, 2 * kGradColumns)) * sizeof(typename Step::Element);
}

// Rows of `source` are columns of the panel: column j of the panel is source row first_row + j.
template <class Step, class Source>
static void pack_transposed(const Source& source, int64_t first_row, int64_t rows, int64_t column, int64_t count,
                            typename Step::Element* buffer, uint32_t* panel) {
  using Element = typename Step::Element;
  constexpr int64_t kBufferStride = kBufferRow<Step> * static_cast<int64_t>(sizeof(Element)) / 4;
  const int64_t steps = divide_up(steps_of(count, Step::kIndices), kLanes) * kLanes;
  for (int64_t group = 0; group < strips_of(rows); group += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      Element* out = buffer + lane * kBufferRow<Step>;
      const int64_t here = group + lane < rows ? count : 0;
      if (here > 0) {
        source.fetch(first_row + group + lane, column + Step::kChunk, Step::kChunk);
        source.row(first_row + group + lane, column, here, out);
      }
      memset(static_cast<void*>(out + here), 0, static_cast<size_t>(steps * Step::kIndices - here) * sizeof(Element));
    }
    uint32_t* strip = panel + group / kStrip * steps * kStrip + group % kStrip;
    const uint32_t* elements = reinterpret_cast<const uint32_t*>(buffer);
    for (int64_t step = 0; step < steps; step += kLanes) {
      transpose(elements + step, kBufferStride, strip + step * kStrip, kStrip);
    }
  }
}

static inline void merge_rows(const float* first, const float*, uint32_t* out) {
  store(reinterpret_cast<float*>(out), load(first));
}
#ifdef NYBBLE_BF16_DOT
static inline void merge_rows(const Bf16* first, const Bf16* second, uint32_t* out) { interleave(first, second, out); }
#endif

constexpr int64_t kRowsAhead = 16;

// Rows of `source` are rows of the panel: step s is source row first_row + s (bf16: rows first_row + 2 s and + 1).
template <class Step, class Source>
static void pack_straight(const Source& source, int64_t first_row, int64_t rows, int64_t column, int64_t width,
                          typename Step::Element* buffer, uint32_t* panel) {
  using Element = typename Step::Element;
  const int64_t steps = steps_of(rows, Step::kIndices);
  const int64_t columns = strips_of(width);
  const int64_t padded = divide_up(steps, kLanes) * kLanes;
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t part = 0; part < Step::kIndices; ++part) {
      Element* out = buffer + part * kGradColumns;
      const int64_t row = step * Step::kIndices + part;
      const int64_t here = row < rows ? width : 0;
      if (here > 0) {
        source.fetch(first_row + row + kRowsAhead, column, width);
        source.row(first_row + row, column, here, out);
      }
      memset(static_cast<void*>(out + here), 0, static_cast<size_t>(columns - here) * sizeof(Element));
    }
    for (int64_t j = 0; j < columns; j += kLanes) {
      merge_rows(buffer + j, buffer + kGradColumns + j,
                 panel + j / kStrip * padded * kStrip + step * kStrip + j % kStrip);
    }
  }
  for (int64_t strip = 0; strip < columns / kStrip; ++strip) {
    uint32_t* rest = panel + (strip * padded + steps) * kStrip;
    memset(rest, 0, static_cast<size_t>((padded - steps) * kStrip) * sizeof(uint32_t));
  }
}

// ---- multiplication
// ---------------------------------------------------------------------------------------------------

// Rows of x (or of the side path's left factor) as the multiplication reads them: one 32-bit element a step.
struct Operand {
  const char* data = nullptr;
  int64_t stride = 0;  // bytes from row to row
};

constexpr int64_t kLineSteps = 16;  // of a row of x in a cache line

// `next`: the rows of x that are multiplied after these, which are fetched meanwhile.
template <class Step, int Rows>
static void multiply_tile(const char* x, const char* next, int64_t x_stride, const uint32_t* strip, int64_t steps,
                          float* acc, int64_t acc_stride) {
  F32 sums[Rows][kTileVectors];
  for (int row = 0; row < Rows; ++row) {
    for (int v = 0; v < kTileVectors; ++v) sums[row][v] = load(acc + row * acc_stride + v * kLanes);
  }
  const float* panel = reinterpret_cast<const float*>(strip);
  for (int64_t step = 0; step < steps; ++step, panel += kStrip, x += 4) {
    if (step % kLineSteps == 0) {
      for (int row = 0; row < Rows; ++row) prefetch_near(next + row * x_stride + step * 4);
    }
    F32 columns[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) columns[v] = load(panel + v * kLanes);
    for (int row = 0; row < Rows; ++row) {
      for (int v = 0; v < kTileVectors; ++v) sums[row][v] = Step::dot(sums[row][v], x + row * x_stride, columns[v]);
    }
  }
  for (int row = 0; row < Rows; ++row) {
    for (int v = 0; v < kTileVectors; ++v) store(acc + row * acc_stride + v * kLanes, sums[row][v]);
  }
}

template <class Step>
static void multiply_rows(int64_t rows, const char* x, const char* next, int64_t x_stride, const uint32_t* strip,
                          int64_t steps, float* acc, int64_t acc_stride) {
  switch (rows) {
    case 1:
      return multiply_tile<Step, 1>(x, next, x_stride, strip, steps, acc, acc_stride);
    case 2:
      return multiply_tile<Step, 2>(x, next, x_stride, strip, steps, acc, acc_stride);
    case 3:
      return multiply_tile<Step, 3>(x, next, x_stride, strip, steps, acc, acc_stride);
    case 4:
      return multiply_tile<Step, 4>(x, next, x_stride, strip, steps, acc, acc_stride);
    case 5:
      return multiply_tile<Step, 5>(x, next, x_stride, strip, steps, acc, acc_stride);
    default:
      return multiply_tile<Step, kTileRows>(x, next, x_stride, strip, steps, acc, acc_stride);
  }
}

// acc[rows, columns] += x . panel.
template <class Step>
static void multiply(const char* x, int64_t x_stride, int64_t rows, const uint32_t* panel, int64_t steps,
                     int64_t columns, float* acc) {
  const int64_t padded = divide_up(steps, kLanes) * kLanes;
  for (int64_t row = 0; row < rows; row += kTileRows) {
    for (int64_t column = 0; column < columns; column += kStrip) {
      const char* here = x + row * x_stride;
      const char* next = row + 2 * kTileRows <= rows ? here + kTileRows * x_stride : here;
      multiply_rows<Step>(smaller(kTileRows, rows - row), here, next, x_stride,
                          panel + column / kStrip * padded * kStrip, steps, acc + row * columns + column, columns);
    }
  }
}

// ---- operands
// ---------------------------------------------------------------------------------------------------------

struct ConvertJob {
  const void* from;
  DType dtype;
  int64_t stride;  // elements
  int64_t columns;
  int64_t padded;  // columns of the result
  void* to;
};

template <class Element>
static void convert_task(void* context, int64_t row) {
  const ConvertJob& job = *static_cast<const ConvertJob*>(context);
  alignas(64) float values[kMostChunk];
  Element* to = static_cast<Element*>(job.to) + row * job.padded;
  for (int64_t at = 0; at < job.columns; at += kMostChunk) {
    const int64_t count = smaller(kMostChunk, job.columns - at);
    load_floats(job.from, job.dtype, row * job.stride + at, count, values);
    from_floats(values, count, to + at);
  }
  for (int64_t at = job.columns; at < job.padded; ++at) from_float(0.0F, to + at);
}

static inline bool held_as(DType dtype, const float*) { return dtype == DType::f32; }
static inline bool held_as(DType dtype, const Bf16*) { return dtype == DType::bf16; }

// Uses the caller's memory where it already has the right form, else converts into scratch.
template <class Step>
static Status prepare(const void* from, DType dtype, int64_t rows, int64_t columns, int64_t stride, Slot slot,
                      int threads, Operand* operand) {
  using Element = typename Step::Element;
  if (held_as(dtype, static_cast<const Element*>(nullptr)) && columns % Step::kAlign == 0) {
    *operand = {static_cast<const char*>(from), stride * static_cast<int64_t>(sizeof(Element))};
    return success();
  }
  const int64_t padded = divide_up(columns, Step::kAlign) * Step::kAlign;
  const int64_t bytes = rows * padded * static_cast<int64_t>(sizeof(Element));
  void* to = scratch(slot, static_cast<size_t>(bytes));
  if (to == nullptr) return out_of_memory(bytes);
  ConvertJob job{from, dtype, stride, columns, padded, to};
  parallel_for(threads, rows, convert_task<Element>, &job);
  *operand = {static_cast<const char*>(to), padded * static_cast<int64_t>(sizeof(Element))};
  return success();
}

// ---- results
// ---------------------------------------------------------------------------------------------------

// Rounded as `store` does, but a denormal may become 0.
#ifndef NYBBLE_BF16_CONVERT
static inline void store_normal(Bf16* p, F32 v) { store(p, v); }
#endif
static inline void store_normal(F16* p, F32 v) { store(p, v); }
static inline void store_normal(float* p, F32 v) { store(p, v); }

template <class T>
static void store_results_as(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_normal(to + i, load(from + i));
  if (i == count) return;
  alignas(64) float rest[kLanes] = {};
  alignas(64) T tail[kLanes];
  memcpy(rest, from + i, static_cast<size_t>(count - i) * sizeof(float));
  store_normal(tail, load(rest));
  memcpy(static_cast<void*>(to + i), tail, static_cast<size_t>(count - i) * sizeof(T));
}

// As store_floats, but denormals may become 0, as the multiplication takes them anyway: a fifth of the instructions.
static void store_results(const float* from, int64_t count, DType dtype, void* to, int64_t start) {
  switch (dtype) {
    case DType::f32:
      return store_results_as(from, count, static_cast<float*>(to) + start);
    case DType::f16:
      return store_results_as(from, count, static_cast<F16*>(to) + start);
    case DType::bf16:
      return store_results_as(from, count, static_cast<Bf16*>(to) + start);
  }
}

// ---- one task
// -----------------------------------------------------------------------------------------------------------

struct PanelJob {
  const LinearArgs* args;
  Operand x;
  Operand side;
  int64_t tile;  // columns of a tile
  int64_t tiles;
  int64_t rows_per_task;
  Failure* failure;
};

struct TaskMemory {
  uint32_t* panel;
  void* rows;
  float* acc;
};

template <class Step>
static bool task_memory(int64_t rows, int64_t tile, int64_t panel_bytes, TaskMemory* memory, Failure* failure) {
  const size_t panel = static_cast<size_t>(larger(Step::kChunk / Step::kIndices * tile * 4, panel_bytes));
  const size_t buffer = pack_buffer_bytes<Step>();
  const size_t acc = static_cast<size_t>(rows * tile) * sizeof(float);
  memory->panel = static_cast<uint32_t*>(scratch(Slot::panel, panel));
  memory->rows = scratch(Slot::rows, buffer);
  memory->acc = static_cast<float*>(scratch(Slot::accumulators, acc));
  const bool had = memory->panel != nullptr && memory->rows != nullptr && memory->acc != nullptr;
  if (!had) failure->report_memory(static_cast<int64_t>(panel + buffer + acc));
  return had;
}

// acc += operand . source over `length` contraction indices.
template <class Step, class Source>
static void contract(const Source& source, const Operand& operand, int64_t length, bool transposed,
                     int64_t first_column, int64_t width, int64_t first_row, int64_t rows, const TaskMemory& memory) {
  auto* buffer = static_cast<typename Step::Element*>(memory.rows);
  const char* x = operand.data + first_row * operand.stride;
  for (int64_t at = 0; at < length; at += Step::kChunk) {
    const int64_t count = smaller(Step::kChunk, length - at);
    if (transposed) {
      pack_transposed<Step>(source, first_column, width, at, count, buffer, memory.panel);
    } else {
      pack_straight<Step>(source, at, count, first_column, width, buffer, memory.panel);
    }
    multiply<Step>(x + at / Step::kIndices * 4, operand.stride, rows, memory.panel, steps_of(count, Step::kIndices),
                   strips_of(width), memory.acc);
  }
}

static void finish(const LinearArgs& args, int64_t first_row, int64_t rows, int64_t first_column, int64_t width,
                   float* acc) {
  alignas(64) float bias[kMostColumns];
  if (args.bias != nullptr) load_floats(args.bias, args.bias_dtype, first_column, width, bias);
  for (int64_t row = 0; row < rows; ++row) {
    float* sums = acc + row * strips_of(width);
    if (args.bias != nullptr) {
      for (int64_t j = 0; j < width; ++j) sums[j] += bias[j];
    }
    const int64_t at = (first_row + row) * args.columns() + first_column;
    // int8 arithmetic takes denormals as they are.
    const auto store_row = args.compute == Compute::int8 ? store_floats : store_results;
    store_row(sums, width, args.dtype, args.out, at);
  }
}

template <class Step>
static void panel_task(void* context, int64_t index) {
  const PanelJob& job = *static_cast<const PanelJob*>(context);
  const LinearArgs& args = *job.args;
  const int64_t first_column = index % job.tiles * job.tile;
  const int64_t width = smaller(job.tile, args.columns() - first_column);
  const int64_t first_row = index / job.tiles * job.rows_per_task;
  const int64_t rows = smaller(job.rows_per_task, args.m - first_row);
  TaskMemory memory;
  if (!task_memory<Step>(rows, job.tile, 0, &memory, job.failure)) return;
  memset(memory.acc, 0, static_cast<size_t>(rows * job.tile) * sizeof(float));
  const bool transposed = !args.grad_input;
  contract<Step>(WeightRows{&args.weight}, job.x, args.contraction(), transposed, first_column, width, first_row, rows,
                 memory);
  const SidePath& side = args.side;
  if (side.rank > 0) {
    const DenseRows right{side.right, side.right_dtype, args.grad_input ? args.weight.cols : side.rank};
    contract<Step>(right, job.side, side.rank, transposed, first_column, width, first_row, rows, memory);
  }
  finish(args, first_row, rows, first_column, width, memory.acc);
}

// Rows of x are split only when there are too few column tiles to keep every thread busy: each part decodes again.
static int64_t rows_per_task(int64_t m, int64_t tiles, int threads) {
  int64_t rows = smaller(larger(m, 1), kRowsOfTask);
  while (tiles * divide_up(m, rows) < 2 * threads && rows > 16 * kTileRows) rows = divide_up(rows, 2);
  return divide_up(rows, kTileRows) * kTileRows;
}

template <class Step>
static Status linear_panel_as(const LinearArgs& args) {
  Failure failure;
  PanelJob job;
  job.args = &args;
  job.failure = &failure;
  job.tile = args.grad_input ? kGradColumns : kForwardColumns;
  job.tiles = divide_up(args.columns(), job.tile);
  job.rows_per_task = rows_per_task(args.m, job.tiles, args.threads);
  Status status =
      prepare<Step>(args.x, args.dtype, args.m, args.contraction(), args.x_stride, Slot::inputs, args.threads, &job.x);
  if (status.ok() && args.side.rank > 0) {
    status = prepare<Step>(args.side.left, args.side.left_dtype, args.m, args.side.rank, args.side.rank, Slot::side,
                           args.threads, &job.side);
  }
  if (status.ok()) {
    parallel_for(args.threads, job.tiles * divide_up(args.m, job.rows_per_task), panel_task<Step>, &job);
    status = failure.status();
  }
  trim_scratch();
  return status;
}

static Status linear_panel(const LinearArgs& args) {
  if (args.m == 0 || args.columns() == 0) return success();
#ifdef NYBBLE_BF16_DOT
  if (args.dtype == DType::bf16) return linear_panel_as<StepBf16>(args);
#endif
  return linear_panel_as<StepF32>(args);
}
