// The int8 forward: out = s * (q . c^T) * g + side path + bias, with q the rows of x in int8 and c the weight in int8.
//
//   activations  a row of x has one scale s = absmax / 127, q = round(x / s), ties to even
//   weights      int8 rows as they are, g = absmax / 127. 4-bit: a row's codebook * scale over a group of kGroup
//   columns
//                is rounded to int8 with one scale g = largest magnitude of the group / 127, so that the inner loop is
//                integers alone; scaling each block's sum instead would cost a conversion every 32 to 64 products
//   sums         int32 within a group, exact; fp32 over the groups. So every ISA sums the same integers
//
// Error beside the exact product with the decoded weight w, for one output (sums over the row's columns k, groups j):
//   s/2 * sum_k |w_k|  +  s/2 * sum_j g_j sum_{k in j} |q_k|   (the second for 4-bit weights only)
// and fp32 rounding. Measured relative root mean square for Gaussian x and w, NF4, K = 4096: 0.0113 (0.0087 by x,
// 0.0072 by w), where NF4's own error is 0.092; a column of x that is 30 times the others makes x's part 0.08. A row of
// x with a NaN or an infinity gives NaN.
//
// The scheme is linear_panel.inl's: a tile of columns is decoded group by group into a panel that stays in L2, and its
// side path, output and memory are used.

constexpr int64_t kGroup = 512;  // columns that share a scale, and what is decoded at a time
constexpr int64_t kCodesOfStep = 4 / static_cast<int64_t>(sizeof(Code));
constexpr int64_t kCodesOfPiece = 64 / static_cast<int64_t>(sizeof(Code));
#ifdef NYBBLE_AMX
constexpr int64_t kInt8Columns = 256;       // rows of W in a tile
constexpr int64_t kXBlock = kTileSide;      // rows of x whose pieces of 64 bytes lie together
constexpr int64_t kInt8Rows = 2 * kXBlock;  // rows of x that are multiplied at a time
#else
constexpr int64_t kInt8Columns = 64;
constexpr int64_t kXBlock = 1;
constexpr int64_t kInt8Rows = kTileRows;
#endif
static_assert(kInt8Columns % kStrip == 0 && kInt8Columns <= kGradColumns, "tiles that finish() takes");
static_assert(kGroup % (kLanes * kCodesOfStep) == 0 && kGroup % kCodesOfPiece == 0, "groups of whole steps and pieces");

// ---- activations
// ------------------------------------------------------------------------------------------------------

struct RowScale {
  float by;    // out = sums * by * lift
  float lift;  // 1, but for rows so small that 127 / absmax would overflow
};

struct CodesOfX {
  char* codes;         // [m / kXBlock][pieces][kXBlock][64 bytes]
  RowScale* scale;     // [m]
  int64_t row_pieces;  // of 64 bytes

  char* piece(int64_t row, int64_t index) const {
    return codes + ((row / kXBlock * row_pieces + index) * kXBlock + row % kXBlock) * 64;
  }
};

struct CodesJob {
  const LinearArgs* args;
  CodesOfX to;
};

static inline void put_piece(const int8_t* codes, char* to) {
  Code piece[kCodesOfPiece];
  for (int64_t i = 0; i < kCodesOfPiece; ++i) piece[i] = static_cast<Code>(codes[i] ^ static_cast<int8_t>(kCodeFlip));
  memcpy(to, piece, sizeof piece);
}

template <class T>
static uint32_t largest_magnitude_of(const T* x, int64_t count) {
  I32 lanes = zero_index();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) lanes = max_magnitude(lanes, load(x + i));
  uint32_t largest = reduce_max(lanes);
  for (; i < count; ++i) {
    const uint32_t magnitude = bits_of(to_float(x[i])) & 0x7FFFFFFFU;
    if (magnitude > largest) largest = magnitude;
  }
  return largest;
}

template <class T>
static void quantize_x_row(const T* x, int64_t count, int64_t row, const CodesOfX& to) {
  constexpr float kLift = 0x1p100F;
  const uint32_t magnitude = largest_magnitude_of(x, count);
  const bool finite = magnitude < kInfinity;
  const bool small = float_of(magnitude) < 1.0F / kLift;
  const float absmax = small ? float_of(magnitude) * kLift : float_of(magnitude);
  const float by = finite && magnitude != 0 ? 127.0F / absmax : 0.0F;
  to.scale[row] = {finite ? absmax / 127.0F : float_of(kInfinity | 1U), small ? 1.0F / kLift : 1.0F};
  const F32 lift = broadcast(small ? kLift : 1.0F);
  const F32 factor = broadcast(by);
  alignas(64) int8_t codes[kCodesOfPiece];
  for (int64_t piece = 0; piece < to.row_pieces; ++piece) {
    const int64_t at = piece * kCodesOfPiece;
    const int64_t here = finite ? larger(0, smaller(kCodesOfPiece, count - at)) : 0;
    alignas(64) float tail[kCodesOfPiece];
    if (here == kCodesOfPiece) {
      for (int64_t i = 0; i < kCodesOfPiece; i += kLanes) {
        store(codes + i, mul(mul(load(x + at + i), lift), factor));
      }
    } else {
      for (int64_t i = 0; i < kCodesOfPiece; ++i) tail[i] = i < here ? to_float(x[at + i]) : 0.0F;
      for (int64_t i = 0; i < kCodesOfPiece; i += kLanes) store(codes + i, mul(mul(load(tail + i), lift), factor));
    }
    put_piece(codes, to.piece(row, piece));
  }
}

static void quantize_x_task(void* context, int64_t row) {
  const CodesJob& job = *static_cast<const CodesJob*>(context);
  const LinearArgs& args = *job.args;
  const int64_t start = row * args.x_stride;
  const int64_t count = args.weight.cols;
  switch (args.dtype) {
    case DType::f32:
      return quantize_x_row(static_cast<const float*>(args.x) + start, count, row, job.to);
    case DType::f16:
      return quantize_x_row(static_cast<const F16*>(args.x) + start, count, row, job.to);
    case DType::bf16:
      return quantize_x_row(static_cast<const Bf16*>(args.x) + start, count, row, job.to);
  }
}

static Status quantize_x(const LinearArgs& args, CodesOfX* to) {
  // Rows that fill up the last block are never written: what they give is never read.
  const int64_t rows = divide_up(args.m, kXBlock) * kXBlock;
  to->row_pieces = divide_up(args.weight.cols, kCodesOfPiece);
  const int64_t bytes = rows * to->row_pieces * 64;
  const int64_t all = bytes + args.m * static_cast<int64_t>(sizeof(RowScale));
  to->codes = static_cast<char*>(scratch(Slot::inputs, static_cast<size_t>(all)));
  if (to->codes == nullptr) return out_of_memory(all);
  to->scale = reinterpret_cast<RowScale*>(to->codes + bytes);
  CodesJob job{&args, *to};
  parallel_for(args.threads, args.m, quantize_x_task, &job);
  return success();
}

// ---- weights
// ----------------------------------------------------------------------------------------------------------

// What a group of a tile is decoded to.
struct CodePanel {
  uint32_t* steps;  // [strip][step][kStrip]
  float scale[kInt8Columns];
  int32_t start[kInt8Columns];  // takes back what kCodeFlip adds to the codes of x
};

// `count` codes of one block from flat element `start` on.
static inline void decode_code_run(const uint8_t* packed, int64_t start, int64_t count, const int8_t* codes,
                                   int8_t* out) {
  int64_t i = 0;
  if ((start & 1) != 0 && count > 0) out[i++] = codes[packed[start >> 1] & 15];
  const uint8_t* p = packed + ((start + i) >> 1);
  for (; i + 64 <= count; i += 64, p += 32) decode_codes_64(p, codes, out + i);
  for (; i + 32 <= count; i += 32, p += 16) decode_codes_32(p, codes, out + i);
  for (; i + 2 <= count; i += 2, ++p) {
    out[i] = codes[*p >> 4];
    out[i + 1] = codes[*p & 15];
  }
  if (i < count) out[i] = codes[*p >> 4];
}

// The codes of `count` <= kGroup elements of a 4-bit tensor from flat element `start` on; returns their scale.
static float decode_group(const Packed4& source, float largest_code, int64_t start, int64_t count, int8_t* out) {
  constexpr int64_t kBlocks = kGroup / kMinBlock + 1;
  float scales[kBlocks];
  const int64_t first = start >> source.block_shift;
  const int64_t last = (start + count - 1) >> source.block_shift;
  uint32_t largest = 0;
  for (int64_t block = first; block <= last; ++block) {
    scales[block - first] = source.scales.at(block);
    const uint32_t magnitude = bits_of(scales[block - first]) & 0x7FFFFFFFU;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float by = float_of(largest) * largest_code / 127.0F;
  // Nothing but zeros (or what is below 1e-40), or a damaged scale, which shows as NaN.
  if (!(by >= 0x1p-140F && by < float_of(kInfinity))) {
    memset(out, 0, static_cast<size_t>(count));
    return by < 1.0F ? 0.0F : float_of(kInfinity | 1U);
  }
  const bool tiny = by < 0x1p-120F;  // whose reciprocal may overflow
  const float reciprocal = tiny ? 0.0F : 1.0F / by;
  int64_t done = 0;
  for (int64_t block = first; block <= last; ++block) {
    const int64_t run = smaller(count - done, ((block + 1) << source.block_shift) - start - done);
    alignas(16) int8_t codes[16];
    const float scale = scales[block - first];
    const F32 factor = broadcast(tiny ? scale / by : scale * reciprocal);
    for (int i = 0; i < 16; i += kLanes) store(codes + i, mul(load(source.codebook + i), factor));
    decode_code_run(source.packed, start + done, run, codes, out + done);
    done += run;
  }
  return by;
}

static float largest_code(const float* codebook) {
  float largest = 0.0F;
  for (int i = 0; i < 16; ++i) {
    const float magnitude = float_of(bits_of(codebook[i]) & 0x7FFFFFFFU);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

struct Int8Job {
  const LinearArgs* args;
  CodesOfX x;
  Operand side;
  float largest_code;
  int64_t tiles;
  int64_t rows_per_task;
  Failure* failure;
};

static float row_codes(const Int8Job& job, int64_t row, int64_t column, int64_t count, int8_t* out) {
  const Weight& weight = job.args->weight;
  const int64_t start = row * weight.cols + column;
  if (!weight.is_int8()) return decode_group(weight.packed4, job.largest_code, start, count, out);
  memcpy(out, weight.rows8.q + start, static_cast<size_t>(count));
  return weight.rows8.absmax[row] / 127.0F;
}

// Panels are read as words, whatever they hold.
static inline const uint32_t* steps_in(const int8_t* codes, int8_t*) {
  return reinterpret_cast<const uint32_t*>(codes);
}
static inline const uint32_t* steps_in(const int8_t* codes, int16_t* wide) {
  for (int64_t i = 0; i < kLanes * kGroup; ++i) wide[i] = codes[i];
  return reinterpret_cast<const uint32_t*>(wide);
}

// Returns the steps of the panel: whole transpositions.
static int64_t pack_codes(const Int8Job& job, int64_t first_row, int64_t rows, int64_t column, int64_t count,
                          CodePanel* panel) {
  alignas(64) int8_t buffer[kLanes * kGroup];
  alignas(64) Code wide[sizeof(Code) == 1 ? 1 : kLanes * kGroup];
  const WeightRows source{&job.args->weight};
  const int64_t steps = divide_up(count, kLanes * kCodesOfStep) * kLanes;
  for (int64_t group = 0; group < strips_of(rows); group += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      int8_t* out = buffer + lane * kGroup;
      const bool real = group + lane < rows;
      const int64_t row = first_row + group + lane;
      if (real) source.fetch(row, column + kGroup, kGroup);
      panel->scale[group + lane] = real ? row_codes(job, row, column, count, out) : 0.0F;
      const int64_t here = real ? count : 0;
      memset(out + here, 0, static_cast<size_t>(steps * kCodesOfStep - here));
    }
    uint32_t* strip = panel->steps + group / kStrip * steps * kStrip + group % kStrip;
    const uint32_t* elements = steps_in(buffer, wide);
    constexpr int64_t kStride = kGroup / kCodesOfStep;
    for (int64_t step = 0; step < steps; step += kLanes) {
      transpose(elements + step, kStride, strip + step * kStrip, kStrip);
    }
    if (kCodeFlip == 0) continue;
    Sums base = zero_sums();
    for (int64_t step = 0; step < steps; ++step) {
      base = dot_step(base, kCodeFlip * 0x01010101U, load_step(strip + step * kStrip));
    }
    int32_t lanes[kLanes];
    memcpy(lanes, &base, sizeof lanes);
    for (int64_t lane = 0; lane < kLanes; ++lane) panel->start[group + lane] = -lanes[lane];
  }
  return steps;
}

// ---- multiplication
// ---------------------------------------------------------------------------------------------------

#ifdef NYBBLE_AMX
// acc (+)= sums * scale
template <int Rows, int Columns>
static void add_scaled(const int32_t* sums, const float* scale, bool first, float* acc, int64_t acc_stride) {
  for (int row = 0; row < Rows; ++row) {
    for (int column = 0; column < Columns; column += kLanes) {
      float* to = acc + row * acc_stride + column;
      const F32 values = to_f32(load_step(reinterpret_cast<const uint32_t*>(sums) + row * Columns + column));
      store(to, fma(values, load(scale + column), first ? zero() : load(to)));
    }
  }
}

static void multiply_codes(const CodesOfX& x, int64_t first_row, int64_t rows, int64_t piece, const CodePanel& panel,
                           int64_t steps, int64_t columns, bool first, float* acc) {
  alignas(64) int32_t sums[32 * 32];
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t row = 0; row < rows; row += kInt8Rows) {
    const char* above = x.piece(first_row + row, piece);
    const char* below = x.piece(first_row + row + kXBlock, piece);
    float* out = acc + row * columns;
    if (rows - row > kXBlock) {
      for (int64_t column = 0; column < columns; column += 32) {
        const uint32_t* strip = panel.steps + column / kStrip * steps * kStrip + column % kStrip;
        dot_tiles_32(above, below, strip, kStrip, steps, sums);
        add_scaled<32, 32>(sums, panel.scale + column, first, out + column, columns);
      }
    } else {
      for (int64_t column = 0; column < columns; column += 64) {
        dot_tiles_16(above, panel.steps + column * steps, kStrip, steps, sums);
        add_scaled<16, 64>(sums, panel.scale + column, first, out + column, columns);
      }
    }
  }
  _tile_release();
}
#else
template <int Rows>
static void dot_tile(const char* x, int64_t x_stride, const uint32_t* strip, int64_t steps, const int32_t* start,
                     const float* scale, bool first, float* acc, int64_t acc_stride) {
  Sums sums[Rows][kTileVectors];
  for (int row = 0; row < Rows; ++row) {
    for (int v = 0; v < kTileVectors; ++v) {
      sums[row][v] = kCodeFlip != 0 ? load_step(reinterpret_cast<const uint32_t*>(start) + v * kLanes) : zero_sums();
    }
  }
  for (int64_t step = 0; step < steps; ++step, strip += kStrip, x += 4) {
    Sums columns[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) columns[v] = load_step(strip + v * kLanes);
    for (int row = 0; row < Rows; ++row) {
      uint32_t codes;
      memcpy(&codes, x + row * x_stride, sizeof codes);
      for (int v = 0; v < kTileVectors; ++v) sums[row][v] = dot_step(sums[row][v], codes, columns[v]);
    }
  }
  for (int row = 0; row < Rows; ++row) {
    for (int v = 0; v < kTileVectors; ++v) {
      float* to = acc + row * acc_stride + v * kLanes;
      store(to, fma(to_f32(sums[row][v]), load(scale + v * kLanes), first ? zero() : load(to)));
    }
  }
}

template <int Rows>
static void dot_tiles(int64_t rows, const char* x, int64_t x_stride, const uint32_t* strip, int64_t steps,
                      const int32_t* start, const float* scale, bool first, float* acc, int64_t acc_stride) {
  if constexpr (Rows > 1) {
    if (rows < Rows) {
      return dot_tiles<Rows - 1>(rows, x, x_stride, strip, steps, start, scale, first, acc, acc_stride);
    }
  }
  dot_tile<Rows>(x, x_stride, strip, steps, start, scale, first, acc, acc_stride);
}

static void multiply_codes(const CodesOfX& x, int64_t first_row, int64_t rows, int64_t piece, const CodePanel& panel,
                           int64_t steps, int64_t columns, bool first, float* acc) {
  const int64_t x_stride = x.row_pieces * 64;
  for (int64_t row = 0; row < rows; row += kTileRows) {
    for (int64_t column = 0; column < columns; column += kStrip) {
      dot_tiles<kTileRows>(smaller(kTileRows, rows - row), x.piece(first_row + row, piece), x_stride,
                           panel.steps + column * steps, steps, panel.start + column, panel.scale + column, first,
                           acc + row * columns + column, columns);
    }
  }
}
#endif

// ---- one task
// ---------------------------------------------------------------------------------------------------------

// acc[rows, columns] *= each row's scale
static void scale_rows(const RowScale* scale, int64_t rows, int64_t columns, float* acc) {
  for (int64_t row = 0; row < rows; ++row, acc += columns) {
    const F32 by = broadcast(scale[row].by);
    const F32 lift = broadcast(scale[row].lift);
    for (int64_t j = 0; j < columns; j += kLanes) store(acc + j, mul(mul(load(acc + j), by), lift));
  }
}

// `Step` multiplies the side path, in the precision of native compute.
template <class Step>
static void int8_task(void* context, int64_t index) {
  const Int8Job& job = *static_cast<const Int8Job*>(context);
  const LinearArgs& args = *job.args;
  const int64_t first_column = index % job.tiles * kInt8Columns;
  const int64_t width = smaller(kInt8Columns, args.columns() - first_column);
  const int64_t columns = strips_of(width);
  const int64_t first_row = index / job.tiles * job.rows_per_task;
  const int64_t rows = smaller(job.rows_per_task, args.m - first_row);
  // Asked for first: the slots only grow, so what task_memory returns serves both panels.
  constexpr int64_t kPanelBytes = kGroup * static_cast<int64_t>(sizeof(Code)) * kInt8Columns;
  TaskMemory memory;
  if (scratch(Slot::panel, static_cast<size_t>(kPanelBytes)) == nullptr) return job.failure->report_memory(kPanelBytes);
  if (!task_memory<Step>(divide_up(rows, kInt8Rows) * kInt8Rows, kInt8Columns, &memory, job.failure)) return;
  alignas(64) CodePanel panel;
  panel.steps = memory.panel;
  const int64_t length = args.contraction();
  if (length == 0) memset(memory.acc, 0, static_cast<size_t>(rows * columns) * sizeof(float));
  for (int64_t at = 0; at < length; at += kGroup) {
    const int64_t steps = pack_codes(job, first_column, width, at, smaller(kGroup, length - at), &panel);
    multiply_codes(job.x, first_row, rows, at / kCodesOfPiece, panel, steps, columns, at == 0, memory.acc);
  }
  scale_rows(job.x.scale + first_row, rows, columns, memory.acc);
  const SidePath& side = args.side;
  if (side.rank > 0) {
    const DenseRows right{side.right, side.right_dtype, side.rank};
    contract<Step>(right, job.side, side.rank, true, first_column, width, first_row, rows, memory);
  }
  finish(args, first_row, rows, first_column, width, memory.acc);
}

template <class Step>
static Status linear_int8_as(const LinearArgs& args) {
  Failure failure;
  Int8Job job;
  job.args = &args;
  job.failure = &failure;
  job.largest_code = args.weight.is_int8() ? 0.0F : largest_code(args.weight.packed4.codebook);
  job.tiles = divide_up(args.columns(), kInt8Columns);
  job.rows_per_task = rows_per_task(args.m, job.tiles, args.threads);
  Status status = quantize_x(args, &job.x);
  if (status.ok() && args.side.rank > 0) {
    status = prepare<Step>(args.side.left, args.side.left_dtype, args.m, args.side.rank, args.side.rank, Slot::side,
                           args.threads, &job.side);
  }
  if (status.ok()) {
    parallel_for(args.threads, job.tiles * divide_up(args.m, job.rows_per_task), int8_task<Step>, &job);
    status = failure.status();
  }
  trim_scratch();
  return status;
}

static Status linear_int8(const LinearArgs& args) {
  if (args.m == 0 || args.columns() == 0) return success();
  if (args.grad_input) return bad_argument("compute", static_cast<int64_t>(args.compute));
#ifdef NYBBLE_BF16_DOT
  if (args.dtype == DType::bf16) return linear_int8_as<StepBf16>(args);
#endif
  return linear_int8_as<StepF32>(args);
}
