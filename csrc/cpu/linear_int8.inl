// The int8 forward: out = s * (q . c^T) * g + side path + bias, with q the rows of x in int8 and c the weight in int8.
//
//   activations  a row of x has one scale s = absmax / 127, q = round(x / s), ties to even
//   weights      int8 rows as they are, g = absmax / 127. 4 bit: a row's codebook * scale over kGroup columns becomes
//                int8 with one scale g = largest magnitude / 127, so that the inner loop is integers alone; scaling
//                each block's sum instead would cost a conversion every 32 to 64 products
//   sums         int32 within a group, exact; fp32 over the groups. So every ISA sums the same integers
//
// Error beside the exact product with the decoded weight w, for one output (sums over the row's columns k, groups j):
//   s/2 * sum_k |w_k|  +  s/2 * sum_j g_j sum_{k in j} |q_k|   (the second for 4-bit weights only)
// and fp32 rounding. Measured relative root mean square for Gaussian x and w, NF4, K = 4096: 0.0113 (0.0087 by x,
// 0.0072 by w), where NF4's own error is 0.092; a column of x that is 30 times the others makes x's part 0.08. A row of
// x with a NaN or an infinity gives NaN. Sums are in units of s: 127 times a row's sum of |w| must stay in fp32's
// range.
//
// A tile of rows of W is decoded group by group into L2, as it lies in memory: lanes run along the rows of x, which are
// transposed once, so the weight, of which there is more to decode, needs no transposition. Sums come out transposed
// and are turned when they are complete.

constexpr int64_t kGroup = 512;  // columns that share a scale, and what is decoded at a time
constexpr int64_t kCodesOfStep = 4 / static_cast<int64_t>(sizeof(Code));
constexpr int64_t kCodesOfTurn = kLanes * kCodesOfStep;  // what one transposition takes from each of kLanes rows
constexpr int64_t kXVectors = 2;                         // blocks of kLanes rows of x that are multiplied at a time
constexpr int64_t kXRows = kXVectors * kLanes;
#ifdef NYBBLE_AMX
// Rows of W in a tile: many, so that x is read less often; but where reading W takes most of the time, the rows that
// are streamed at once should be few (m = 16, 4096 x 4096: NF4 1.9 to 1.3 ms, int8 1.5 to 1.2, Sapphire Rapids class).
constexpr int64_t kWideTile = 256;
constexpr int64_t kNarrowUpTo = 64;  // of x, up to which tiles are narrow
#else
constexpr int64_t kWideTile = 64;
constexpr int64_t kNarrowUpTo = 0;
#endif
constexpr int64_t kNarrowTile = 64;
static_assert(kWideTile % 64 == 0 && kWideTile <= kMostColumns, "tiles that finish() takes");
static_assert(kGroup % kCodesOfTurn == 0, "groups of whole transpositions");

// ---- activations ----------------------------------------------------------------------------------------------------

struct RowScale {
  float by;    // out = sums * by * lift
  float lift;  // 1, but for rows so small that 127 / absmax would overflow
};

struct CodesOfX {
  uint32_t* codes;  // [ceil(m / kLanes)][steps][kLanes]
  RowScale* scale;  // [m]
  int64_t steps;    // of a row

  uint32_t* at(int64_t row, int64_t step) const { return codes + (row / kLanes * steps + step) * kLanes; }
};

struct CodesJob {
  const LinearArgs* args;
  CodesOfX to;
};

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

// How the codes of a row are made.
struct Rounding {
  float lift;
  float by;
};

template <class T>
static Rounding rounding_of(const T* x, int64_t count, RowScale* scale) {
  constexpr float kLift = 0x1p100F;
  const uint32_t magnitude = largest_magnitude_of(x, count);
  if (magnitude >= kInfinity || magnitude == 0) {
    *scale = {magnitude == 0 ? 0.0F : float_of(kInfinity | 1U), 1.0F};
    return {0.0F, 0.0F};
  }
  const bool small = float_of(magnitude) < 1.0F / kLift;
  const float lift = small ? kLift : 1.0F;
  const float absmax = float_of(magnitude) * lift;
  *scale = {absmax / 127.0F, small ? 1.0F / kLift : 1.0F};
  return {lift, 127.0F / absmax};
}

template <class T>
static void round_codes(const T* x, int64_t count, int64_t padded, Rounding rounding, int8_t* codes) {
  const F32 lift = broadcast(rounding.lift);
  const F32 by = broadcast(rounding.by);
  int64_t i = 0;
  if (rounding.by != 0.0F) {
    for (; i + kLanes <= count; i += kLanes) store(codes + i, mul(mul(load(x + i), lift), by));
    alignas(64) float tail[kLanes] = {};
    if (i < count) {
      for (int64_t j = i; j < count; ++j) tail[j - i] = to_float(x[j]);
      store(codes + i, mul(mul(load(tail), lift), by));
      i += kLanes;
    }
  }
  if (i < padded) memset(codes + i, 0, static_cast<size_t>(padded - i));
}

template <class T>
static inline void put_codes(const int8_t* codes, int64_t count, uint8_t flip, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(codes[i] ^ static_cast<int8_t>(flip));
}

// kLanes rows of x.
template <class T>
static void quantize_x_block(const LinearArgs& args, int64_t block, const CodesOfX& to) {
  alignas(64) int8_t codes[kGroup];
  alignas(64) Code rows[kLanes * kGroup];
  Rounding rounding[kLanes] = {};
  const int64_t cols = args.weight.cols;
  const int64_t first = block * kLanes;
  const int64_t here = smaller(kLanes, args.m - first);
  const T* x = static_cast<const T*>(args.x) + first * args.x_stride;
  for (int64_t row = 0; row < here; ++row) {
    rounding[row] = rounding_of(x + row * args.x_stride, cols, to.scale + first + row);
  }
  for (int64_t at = 0; at < cols; at += kGroup) {
    const int64_t count = smaller(kGroup, cols - at);
    const int64_t padded = divide_up(count, kCodesOfTurn) * kCodesOfTurn;
    for (int64_t row = 0; row < kLanes; ++row) {
      round_codes(x + row * args.x_stride + at, row < here ? count : 0, padded, rounding[row], codes);
      put_codes(codes, padded, kCodeFlip, rows + row * kGroup);
    }
    for (int64_t i = 0; i < padded; i += kCodesOfTurn) {
      turn_codes(rows + i, kGroup, to.at(first, (at + i) / kCodesOfStep));
    }
  }
}

static void quantize_x_task(void* context, int64_t block) {
  const CodesJob& job = *static_cast<const CodesJob*>(context);
  switch (job.args->dtype) {
    case DType::f32:
      return quantize_x_block<float>(*job.args, block, job.to);
    case DType::f16:
      return quantize_x_block<F16>(*job.args, block, job.to);
    case DType::bf16:
      return quantize_x_block<Bf16>(*job.args, block, job.to);
  }
}

static Status quantize_x(const LinearArgs& args, CodesOfX* to) {
  const int64_t blocks = divide_up(args.m, kLanes);
  to->steps = divide_up(args.weight.cols, kCodesOfTurn) * kLanes;
  const int64_t bytes = blocks * to->steps * kLanes * 4;
  const int64_t all = bytes + args.m * static_cast<int64_t>(sizeof(RowScale));
  char* memory = static_cast<char*>(scratch(Slot::inputs, static_cast<size_t>(all)));
  if (memory == nullptr) return out_of_memory(all);
  to->codes = reinterpret_cast<uint32_t*>(memory);
  to->scale = reinterpret_cast<RowScale*>(memory + bytes);
  CodesJob job{&args, *to};
  parallel_for(args.threads, blocks, quantize_x_task, &job);
  return success();
}

// ---- weights --------------------------------------------------------------------------------------------------------

// A group of a tile of rows of W.
struct CodesOfW {
  Code* codes;  // [kWideTile][kGroup]
  float scale[kWideTile];
  int32_t start[kWideTile];  // of a sum: takes back what kCodeFlip adds
};

// `count` codes of one block from flat element `start` on.
static inline void decode_code_run(const uint8_t* packed, int64_t start, int64_t count, const int8_t* codes,
                                   int8_t* out) {
  int64_t i = 0;
  if ((start & 1) != 0 && count > 0) out[i++] = codes[packed[start >> 1] & 15];
  const uint8_t* p = packed + ((start + i) >> 1);
  for (; i + 32 <= count; i += 32, p += 16) decode_codes_32(p, codes, out + i);
  for (; i + 2 <= count; i += 2, ++p) {
    out[i] = codes[*p >> 4];
    out[i + 1] = codes[*p & 15];
  }
  if (i < count) out[i] = codes[*p >> 4];
}

// The codes of `count` <= kGroup elements of a 4-bit tensor from flat element `start` on; returns their scale. `unit`
// is the codebook's largest magnitude / 127.
static float decode_group(const Packed4& source, float unit, int64_t start, int64_t count, int8_t* out) {
  float scales[kGroup / kMinBlock + 1];
  const int shift = source.block_shift;
  const int64_t first = start >> shift;
  const int64_t last = (start + count - 1) >> shift;
  uint32_t largest = 0;
  for (int64_t block = first; block <= last; ++block) {
    scales[block - first] = source.scales.at(block);
    const uint32_t magnitude = bits_of(scales[block - first]) & 0x7FFFFFFFU;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float by = float_of(largest) * unit;
  // Nothing but zeros (or what is below 1e-40), or a damaged scale, which shows as NaN.
  if (!(by >= 0x1p-140F && by < float_of(kInfinity))) {
    memset(out, 0, static_cast<size_t>(count));
    return by < 1.0F ? 0.0F : float_of(kInfinity | 1U);
  }
  const bool tiny = by < 0x1p-120F;  // whose reciprocal may overflow
  const float reciprocal = tiny ? 0.0F : 1.0F / by;
  if (shift >= 6 && ((start | count) & 63) == 0 && !tiny) {
    const uint8_t* packed = source.packed + start / 2;
    for (int64_t i = 0; i < count; i += 64) {
      const float scale = scales[((start + i) >> shift) - first];
      decode_codes_64(packed + i / 2, source.codebook, scale * reciprocal, out + i);
    }
    return by;
  }
  int64_t done = 0;
  for (int64_t block = first; block <= last; ++block) {
    const int64_t run = smaller(count - done, ((block + 1) << shift) - start - done);
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
  float unit;    // of decode_group
  int64_t tile;  // rows of W
  int64_t tiles;
  int64_t rows_per_task;
  Failure* failure;
};

static float codes_of_row(const Int8Job& job, int64_t row, int64_t column, int64_t count, int8_t* out) {
  const Weight& weight = job.args->weight;
  const int64_t start = row * weight.cols + column;
  if (!weight.is_int8()) return decode_group(weight.packed4, job.unit, start, count, out);
  memcpy(out, weight.rows8.q + start, static_cast<size_t>(count));
  return weight.rows8.absmax[row] / 127.0F;
}

static inline int8_t* codes_in(int8_t* row, int8_t*) { return row; }
static inline int8_t* codes_in(int16_t*, int8_t* buffer) { return buffer; }
static inline void widen(int8_t*, const int8_t*, int64_t) {}
static inline void widen(int16_t* row, const int8_t* codes, int64_t count) { put_codes(codes, count, 0, row); }

// Rows [first_row, first_row + rows) of W, filled up with rows of zeros to a multiple of 64.
static void decode_tile(const Int8Job& job, int64_t first_row, int64_t rows, int64_t column, int64_t count,
                        CodesOfW* to) {
  alignas(64) int8_t buffer[kGroup];
  const WeightRows source{&job.args->weight};
  const int64_t padded = divide_up(count, kCodesOfTurn) * kCodesOfTurn;
  for (int64_t row = 0; row < divide_up(rows, 64) * 64; ++row) {
    int8_t* out = codes_in(to->codes + row * kGroup, buffer);
    const int64_t here = row < rows ? count : 0;
    to->scale[row] = 0.0F;
    if (here > 0) {
      source.fetch(first_row + row, column + kGroup, kGroup);
      to->scale[row] = codes_of_row(job, first_row + row, column, count, out);
    }
    if (here < padded) memset(out + here, 0, static_cast<size_t>(padded - here));
    widen(to->codes + row * kGroup, out, padded);
    to->start[row] = -flip_sum(to->codes + row * kGroup, padded);
  }
}

// ---- multiplication -------------------------------------------------------------------------------------------------

// acc[Rows][kXRows], of which Vectors * kLanes columns count, (+)= sums * scale
template <int Vectors>
static inline void add_scaled(const Sums* sums, float scale, bool first, float* acc) {
  for (int v = 0; v < Vectors; ++v) {
    float* to = acc + v * kLanes;
    store(to, fma(to_f32(sums[v]), broadcast(scale), first ? zero() : load(to)));
  }
}

#ifdef NYBBLE_AMX
template <int Rows, int Vectors>
static inline void add_tiles(const int32_t* sums, const float* scale, bool first, float* acc) {
  for (int row = 0; row < Rows; ++row) {
    Sums lanes[Vectors];
    for (int v = 0; v < Vectors; ++v) lanes[v] = load_steps(sums + (row * Vectors + v) * kLanes);
    add_scaled<Vectors>(lanes, scale[row], first, acc + row * kXRows);
  }
}

// acc[rows of W][kXRows] (+)= scale * (rows of W) . (up to kXRows rows of x)
static void multiply_codes(const CodesOfW& w, int64_t w_rows, const CodesOfX& x, int64_t x_row, int64_t x_rows,
                           int64_t step, int64_t steps, bool first, float* acc) {
  alignas(64) int32_t sums[32 * 32];
  const char* codes = reinterpret_cast<const char*>(x.at(x_row, step));
  if (x_rows > kLanes) {
    const char* next = reinterpret_cast<const char*>(x.at(x_row + kLanes, step));
    for (int64_t row = 0; row < w_rows; row += 32) {
      dot_tiles_32(w.codes + row * kGroup, kGroup, codes, next, steps / kTileSide, sums);
      add_tiles<32, 2>(sums, w.scale + row, first, acc + row * kXRows);
    }
    return;
  }
  for (int64_t row = 0; row < w_rows; row += 64) {
    dot_tiles_16(w.codes + row * kGroup, kGroup, codes, steps / kTileSide, sums);
    add_tiles<64, 1>(sums, w.scale + row, first, acc + row * kXRows);
  }
}
#else
template <int Rows, int Vectors>
static void dot_rows(const CodesOfW& w, int64_t w_row, const uint32_t* x, int64_t x_stride, int64_t steps, bool first,
                     float* acc) {
  constexpr int64_t kStride = kGroup * static_cast<int64_t>(sizeof(Code));
  Sums sums[Rows / kRowsOfDot][Vectors][kRowsOfDot];
  for (int row = 0; row < Rows; ++row) {
    for (int v = 0; v < Vectors; ++v) {
      sums[row / kRowsOfDot][v][row % kRowsOfDot] = broadcast_sum(w.start[w_row + row]);
    }
  }
  const char* codes = reinterpret_cast<const char*>(w.codes + w_row * kGroup);
  for (int64_t step = 0; step < steps; step += kStepsOfDot, x += kStepsOfDot * kLanes, codes += kStepsOfDot * 4) {
    Steps lanes[Vectors][kStepsOfDot];
    for (int v = 0; v < Vectors; ++v) {
      for (int i = 0; i < kStepsOfDot; ++i) lanes[v][i] = load_steps(x + v * x_stride + i * kLanes);
    }
    for (int row = 0; row < Rows; row += kRowsOfDot) {
      const WeightSteps weight = load_weight(codes + row * kStride, kStride);
      for (int v = 0; v < Vectors; ++v) dot_steps(sums[row / kRowsOfDot][v], lanes[v], weight);
    }
  }
  for (int row = 0; row < Rows; row += kRowsOfDot) {
    for (int v = 0; v < Vectors; ++v) split_rows(sums[row / kRowsOfDot][v]);
    for (int i = 0; i < kRowsOfDot; ++i) {
      Sums all[Vectors];
      for (int v = 0; v < Vectors; ++v) all[v] = sums[row / kRowsOfDot][v][i];
      add_scaled<Vectors>(all, w.scale[w_row + row + i], first, acc + (row + i) * kXRows);
    }
  }
}

// acc[rows of W][kXRows] (+)= scale * (rows of W) . (up to kXRows rows of x)
static void multiply_codes(const CodesOfW& w, int64_t w_rows, const CodesOfX& x, int64_t x_row, int64_t x_rows,
                           int64_t step, int64_t steps, bool first, float* acc) {
  const uint32_t* codes = x.at(x_row, step);
  const int64_t x_stride = x.steps * kLanes;
  if (x_rows > kLanes) {
    for (int64_t row = 0; row < w_rows; row += kDotRows) {
      dot_rows<kDotRows, 2>(w, row, codes, x_stride, steps, first, acc + row * kXRows);
    }
    return;
  }
  for (int64_t row = 0; row < w_rows; row += 2 * kDotRows) {
    dot_rows<2 * kDotRows, 1>(w, row, codes, x_stride, steps, first, acc + row * kXRows);
  }
}
#endif

// ---- one task -------------------------------------------------------------------------------------------------------

// out[rows <= kLanes][columns] (+)= the sums [columns][kXRows] of these rows, times each row's scale
static void turn_sums(const float* sums, const RowScale* scale, int64_t rows, int64_t columns, bool add_to,
                      float* out) {
  alignas(64) float turned[kLanes * kLanes];
  for (int64_t column = 0; column < columns; column += kLanes) {
    transpose(reinterpret_cast<const uint32_t*>(sums + column * kXRows), kXRows, reinterpret_cast<uint32_t*>(turned),
              kLanes);
    for (int64_t row = 0; row < rows; ++row) {
      float* to = out + row * columns + column;
      const F32 value = mul(mul(load(turned + row * kLanes), broadcast(scale[row].by)), broadcast(scale[row].lift));
      store(to, add_to ? add(load(to), value) : value);
    }
  }
}

struct Int8Memory {
  CodesOfW w;
  float* sums;  // [ceil(rows / kXRows)][tile][kXRows]
  TaskMemory side;
};

// `Step` multiplies the side path. The slots only grow, so its panel and ours can be one.
template <class Step>
static bool int8_memory(int64_t rows, int64_t tile, bool side, Int8Memory* memory, Failure* failure) {
  constexpr int64_t kPanel = kGroup * static_cast<int64_t>(sizeof(Code)) * kWideTile;
  const int64_t sums = divide_up(rows, kXRows) * kXRows * tile * static_cast<int64_t>(sizeof(float));
  if (side && !task_memory<Step>(rows, tile, &memory->side, failure)) return false;
  memory->w.codes = static_cast<Code*>(scratch(Slot::panel, static_cast<size_t>(kPanel)));
  if (side) memory->side.panel = reinterpret_cast<uint32_t*>(memory->w.codes);
  memory->sums = static_cast<float*>(scratch(Slot::sums, static_cast<size_t>(sums)));
  if (memory->w.codes != nullptr && memory->sums != nullptr) return true;
  failure->report_memory(kPanel + sums);
  return false;
}

// sums = g * (q . c^T) of a tile.
static void sum_codes(const Int8Job& job, int64_t first_column, int64_t width, int64_t first_row, int64_t rows,
                      Int8Memory* memory) {
  const int64_t length = job.args->contraction();
  if (length == 0) {
    memset(memory->sums, 0, static_cast<size_t>(divide_up(rows, kXRows) * kXRows * job.tile) * sizeof(float));
  }
  for (int64_t at = 0; at < length; at += kGroup) {
    const int64_t count = smaller(kGroup, length - at);
    decode_tile(job, first_column, width, at, count, &memory->w);
#ifdef NYBBLE_AMX
    open_tiles();
#endif
    for (int64_t row = 0; row < rows; row += kXRows) {
      multiply_codes(memory->w, divide_up(width, 64) * 64, job.x, first_row + row, rows - row, at / kCodesOfStep,
                     divide_up(count, kCodesOfTurn) * kLanes, at == 0, memory->sums + row * job.tile);
    }
#ifdef NYBBLE_AMX
    close_tiles();
#endif
  }
}

template <class Step>
static void int8_task(void* context, int64_t index) {
  const Int8Job& job = *static_cast<const Int8Job*>(context);
  const LinearArgs& args = *job.args;
  const SidePath& side = args.side;
  const int64_t first_column = index % job.tiles * job.tile;
  const int64_t width = smaller(job.tile, args.columns() - first_column);
  const int64_t columns = strips_of(width);
  const int64_t first_row = index / job.tiles * job.rows_per_task;
  const int64_t rows = smaller(job.rows_per_task, args.m - first_row);
  alignas(64) Int8Memory memory;
  if (!int8_memory<Step>(rows, job.tile, side.rank > 0, &memory, job.failure)) return;
  if (side.rank > 0) {
    const DenseRows right{side.right, side.right_dtype, side.rank};
    memset(memory.side.acc, 0, static_cast<size_t>(rows * columns) * sizeof(float));
    contract<Step>(right, job.side, side.rank, true, first_column, width, first_row, rows, memory.side);
  }
  sum_codes(job, first_column, width, first_row, rows, &memory);
  alignas(64) float block[kLanes * kWideTile];
  for (int64_t row = 0; row < rows; row += kLanes) {
    const int64_t here = smaller(kLanes, rows - row);
    float* out = side.rank > 0 ? memory.side.acc + row * columns : block;
    const float* sums = memory.sums + row / kXRows * kXRows * job.tile + row % kXRows;
    turn_sums(sums, job.x.scale + first_row + row, here, columns, side.rank > 0, out);
    finish(args, first_row + row, here, first_column, width, out);
  }
}

template <class Step>
static Status linear_int8_as(const LinearArgs& args) {
  Failure failure;
  Int8Job job;
  job.args = &args;
  job.failure = &failure;
  job.unit = args.weight.is_int8() ? 0.0F : largest_code(args.weight.packed4.codebook) / 127.0F;
  job.tile = args.m <= kNarrowUpTo ? kNarrowTile : kWideTile;
  job.tiles = divide_up(args.columns(), job.tile);
  job.rows_per_task = divide_up(rows_per_task(args.m, job.tiles, args.threads), kXRows) * kXRows;
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
