// The int8 forward: out = s * (q . c^T) * g + side path + bias, with q the rows of x in int8 and c the weight in int8.
//
//   activations  a row of x has one scale s = absmax / 127, q = round(x / s), ties to even
//   weights      int8 rows as they are, g = absmax / 127. 4 bit: a row's codebook * scale over kGroup columns becomes
//                int8 with one scale g = largest magnitude / 127, so that the inner loop is integers alone; scaling
//                each block's sum instead would cost a conversion every 32 to 64 products
//   sums         int32 within a group, exact; fp32 over the groups. So every ISA sums the same integers. (int8 rows
//                have one scale: AMX, where it reads them in place, sums up to kExact columns in int32.)
//
// Error beside the exact product with the decoded weight w, for one output (sums over the row's columns k, groups j):
//   s/2 * sum_k |w_k|  +  s/2 * sum_j g_j sum_{k in j} |q_k|   (the second for 4-bit weights only)
// and fp32 rounding. Measured relative root mean square for Gaussian x and w, NF4, K = 4096: 0.0113 (0.0087 by x,
// 0.0072 by w), where NF4's own error is 0.092; a column of x that is 30 times the others makes x's part 0.08. A row of
// x with a NaN or an infinity gives NaN. Sums are in units of s: 127 times a row's sum of |w| must stay in fp32's
// range.
//
// A tile of rows of W is decoded group by group into L1 or L2, by rows as it lies in memory: lanes run along the rows
// of x, which are transposed once, so the weight, of which there is more to decode, needs no transposition. Sums come
// out transposed and are turned when they are complete.

constexpr int64_t kGroup = 512;  // columns that share a scale, and what is decoded at a time
constexpr int64_t kCodesOfStep = 4 / static_cast<int64_t>(sizeof(Code));
constexpr int64_t kCodesOfTurn = kLanes * kCodesOfStep;  // what one transposition takes from each of kLanes rows
constexpr int64_t kXVectors = 2;                         // blocks of kLanes rows of x that are multiplied at a time
constexpr int64_t kXRows = kXVectors * kLanes;
#ifdef NYBBLE_AMX
// Rows of W in a tile, and in a slice, which is decoded and multiplied at a time: many, so that x is read less often;
// but where reading W takes most of the time, few, because each is a stream of its own. m = 16, 4096 x 4096, two
// Sapphire Rapids class cores: slices of 64 rows NF4 0.85 ms, int8 1.0; of 32 rows 0.72 and 0.67.
constexpr int64_t kWideTile = 256;
constexpr int64_t kNarrowUpTo = 64;  // rows of x, up to which slices are narrow
constexpr int64_t kNarrowSlice = 32;
#else
constexpr int64_t kWideTile = 64;
constexpr int64_t kNarrowUpTo = 0;
constexpr int64_t kNarrowSlice = kWideTile;
#endif
constexpr int64_t kNarrowTile = 64;   // also what tiles are filled up to
constexpr int64_t kTilesOfTask = 4;   // narrow ones, neighbours: each fetches the beginning of the next
constexpr int64_t kRowsOfInt8 = 512;  // rows of x that share one decode: their sums stay in L2
static_assert(kWideTile % kNarrowTile == 0 && kNarrowTile % kNarrowSlice == 0 && kWideTile <= kMostColumns,
              "tiles that finish() takes");
static_assert(kGroup % kCodesOfTurn == 0, "groups of whole transpositions");

#include "cpu/linear_int8_codes.inl"

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
// acc[w_rows][kXRows] (+)= scale * (rows of W) . (up to kXRows rows of x)
static void multiply_rows_of(RowsOfW w, int64_t w_rows, const float* scale, const CodesOfX& x, int64_t x_row,
                             int64_t x_rows, int64_t step, int64_t steps, bool first, float* acc) {
  alignas(64) int32_t sums[kTileRowsOfW * kXRows];
  const int64_t tiles = steps / kTileSide;
  const char* codes = reinterpret_cast<const char*>(x.at(x_row, step));
  const bool two = x_rows > kLanes;
  const char* codes_below = two ? reinterpret_cast<const char*>(x.at(x_row + kLanes, step)) : nullptr;
  for (int64_t row = 0; row < w_rows; row += kTileRowsOfW, acc += kTileRowsOfW * kXRows, scale += kTileRowsOfW) {
    if (two) {
      dot_two_blocks(w, codes, codes_below, tiles, sums);
      for (int64_t i = 0; i < kTileRowsOfW; ++i) {
        const Sums lanes[2] = {load_steps(sums + i * kXRows), load_steps(sums + i * kXRows + kLanes)};
        add_scaled<2>(lanes, scale[i], first, acc + i * kXRows);
      }
    } else {
      dot_one_block(w, codes, tiles, sums);
      for (int64_t i = 0; i < kTileRowsOfW; ++i) {
        const Sums lanes = add_parts(sums + i * kXRows);
        add_scaled<1>(&lanes, scale[i], first, acc + i * kXRows);
      }
    }
    w.codes += kTileRowsOfW * w.stride;
    if (w.next != nullptr) w.next += kTileRowsOfW * w.stride;
  }
}

static void multiply_codes(const CodesOfW& w, int64_t w_rows, const CodesOfX& x, int64_t x_row, int64_t x_rows,
                           int64_t step, int64_t steps, bool first, float* acc) {
  multiply_rows_of({w.codes, kGroup, nullptr}, w_rows, w.scale, x, x_row, x_rows, step, steps, first, acc);
}

constexpr int64_t kExact = 65536;  // columns whose products int32 can sum: 128 * 127 * 65536 < 2^31

// Whether int8 weights are multiplied where they lie: for few rows of x; what is read often is better copied together.
static bool lies_in_tiles(const LinearArgs& args, int64_t width) {
  return args.weight.is_int8() && args.m <= kNarrowUpTo && width >= kTileRowsOfW && args.weight.cols % 64 == 0;
}

// sums = g * (q . c^T) of such a slice.
static void sum_in_place(const Int8Job& job, int64_t first_column, int64_t first_row, int64_t rows, float* sums,
                         float* scale) {
  const Weight& weight = job.args->weight;
  const int64_t length = weight.cols;
  const int64_t most = job.args->m > kXRows ? kGroup : kExact;  // not by the task's rows: the same for any threads
  for (int64_t i = 0; i < kTileRowsOfW; ++i) scale[i] = weight.rows8.absmax[first_column + i] / 127.0F;
  for (int64_t at = 0; at < length; at += most) {
    const int64_t count = smaller(most, length - at);
    const int8_t* codes = weight.rows8.q + first_column * length + at;
    const int8_t* next = at + most < length ? codes + count : codes - at + kTileRowsOfW * length;
    for (int64_t row = 0; row < rows; row += kXRows) {
      multiply_rows_of({codes, length, row == 0 ? next : nullptr}, kTileRowsOfW, scale, job.x, first_row + row,
                       rows - row, at / kCodesOfStep, count / kCodesOfTurn * kLanes, at == 0, sums + row * job.tile);
    }
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

// `Step` multiplies the side path, whose panel and ours are the same memory.
template <class Step>
static bool int8_memory(const Int8Job& job, int64_t rows, Int8Memory* memory) {
  constexpr int64_t kPanel = kGroup * static_cast<int64_t>(sizeof(Code)) * kWideTile;
  constexpr int64_t kFactors = kWideTile * kRunsOfSection * static_cast<int64_t>(sizeof(float));
  constexpr int64_t kSteps = kFactors / kRunsOfGroup;
  const bool side = job.args->side.rank > 0;
  const int64_t panel = kPanel + (job.x.apart ? kFactors + kSteps : 0);
  const int64_t sums = divide_up(rows, kXRows) * kXRows * job.tile * static_cast<int64_t>(sizeof(float));
  if (side && !task_memory<Step>(rows, job.tile, panel, &memory->side, job.failure)) return false;
  char* codes = side ? reinterpret_cast<char*>(memory->side.panel)
                     : static_cast<char*>(scratch(Slot::panel, static_cast<size_t>(panel)));
  memory->w.codes = reinterpret_cast<Code*>(codes);
  memory->w.factors = reinterpret_cast<float*>(codes + kPanel);
  memory->w.steps = reinterpret_cast<float (*)[kSection / kGroup]>(codes + kPanel + kFactors);
  memory->sums = static_cast<float*>(scratch(Slot::sums, static_cast<size_t>(sums)));
  if (codes != nullptr && memory->sums != nullptr) return true;
  job.failure->report_memory(panel + sums);
  return false;
}

// sums = g * (q . c^T) of a slice; `padded` rows of W with zeros.
static void sum_codes(const Int8Job& job, int64_t first_column, int64_t width, int64_t padded, int64_t first_row,
                      int64_t rows, float* sums, CodesOfW* w) {
  const int64_t length = job.args->contraction();
  if (length == 0) {
    for (int64_t row = 0; row < rows; row += kXRows) {
      memset(sums + row * job.tile, 0, static_cast<size_t>(padded * kXRows) * sizeof(float));
    }
  }
#ifdef NYBBLE_AMX
  open_tiles();
  if (lies_in_tiles(*job.args, width)) {
    sum_in_place(job, first_column, first_row, rows, sums, w->scale);
    return close_tiles();
  }
#endif
  for (int64_t at = 0; at < length; at += kGroup) {
    const int64_t count = smaller(kGroup, length - at);
    const bool last = at + kGroup >= length;
    const TileOfW tile{first_column,          width, at, count, padded, first_column + (last ? padded : 0),
                       last ? 0 : at + kGroup};
    if (job.x.apart && at % kSection == 0) scale_section(job, tile, w);
    decode_tile(job, tile, w);
    for (int64_t row = 0; row < rows; row += kXRows) {
      multiply_codes(*w, padded, job.x, first_row + row, rows - row, at / kCodesOfStep,
                     divide_up(count, kCodesOfTurn) * kLanes, at == 0, sums + row * job.tile);
    }
  }
#ifdef NYBBLE_AMX
  close_tiles();
#endif
}

// Rows [first_row, first_row + rows) of x with a tile of W.
template <class Step>
static void int8_tile(const Int8Job& job, int64_t tile, int64_t first_row, int64_t rows, Int8Memory* memory) {
  const LinearArgs& args = *job.args;
  const SidePath& side = args.side;
  const int64_t first_column = tile * job.tile;
  const int64_t width = smaller(job.tile, args.columns() - first_column);
  const int64_t columns = strips_of(width);
  if (side.rank > 0) {
    const DenseRows right{side.right, side.right_dtype, side.rank};
    memset(memory->side.acc, 0, static_cast<size_t>(rows * columns) * sizeof(float));
    contract<Step>(right, job.side, side.rank, true, first_column, width, first_row, rows, memory->side);
  }
  const int64_t padded = divide_up(width, kNarrowTile) * kNarrowTile;
  for (int64_t at = 0; at < padded; at += job.slice) {
    sum_codes(job, first_column + at, smaller(job.slice, width - at), smaller(job.slice, padded - at), first_row, rows,
              memory->sums + at * kXRows, &memory->w);
  }
  alignas(64) float block[kLanes * kWideTile];
  for (int64_t row = 0; row < rows; row += kLanes) {
    const int64_t here = smaller(kLanes, rows - row);
    float* out = side.rank > 0 ? memory->side.acc + row * columns : block;
    const float* sums = memory->sums + row / kXRows * kXRows * job.tile + row % kXRows;
    turn_sums(sums, job.x.scale + first_row + row, here, columns, side.rank > 0, out);
    finish(args, first_row + row, here, first_column, width, out);
  }
}

template <class Step>
static void int8_task(void* context, int64_t index) {
  const Int8Job& job = *static_cast<const Int8Job*>(context);
  const int64_t tasks = divide_up(job.tiles, job.tiles_of_task);
  const int64_t first_row = index / tasks * job.rows_per_task;
  const int64_t rows = smaller(job.rows_per_task, job.args->m - first_row);
  const int64_t first = index % tasks * job.tiles_of_task;
  alignas(64) Int8Memory memory;
  if (!int8_memory<Step>(job, rows, &memory)) return;
  for (int64_t tile = first; tile < smaller(first + job.tiles_of_task, job.tiles); ++tile) {
    int8_tile<Step>(job, tile, first_row, rows, &memory);
  }
}

template <class Step>
static Status linear_int8_as(const LinearArgs& args) {
  Failure failure;
  Int8Job job;
  job.args = &args;
  job.failure = &failure;
  job.unit = args.weight.is_int8() ? 0.0F : largest_code(args.weight.packed4.codebook) / 127.0F;
  const bool narrow = args.m <= kNarrowUpTo;
  job.tile = narrow ? kNarrowTile : kWideTile;
  job.slice = narrow ? kNarrowSlice : kWideTile;
  job.tiles = divide_up(args.columns(), job.tile);
  job.tiles_of_task = narrow ? larger(1, smaller(kTilesOfTask, job.tiles / (4 * args.threads))) : 1;
  job.rows_per_task = divide_up(smaller(kRowsOfInt8, rows_per_task(args.m, job.tiles, args.threads)), kXRows) * kXRows;
  Status status = quantize_x(args, &job.x);
  if (status.ok() && args.side.rank > 0) {
    status = prepare<Step>(args.side.left, args.side.left_dtype, args.m, args.side.rank, args.side.rank, Slot::side,
                           args.threads, &job.side);
  }
  if (status.ok()) {
    const int64_t tasks = divide_up(job.tiles, job.tiles_of_task) * divide_up(args.m, job.rows_per_task);
    parallel_for(args.threads, tasks, int8_task<Step>, &job);
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
