// The tile kernel (AMX, bf16): out[m, columns] = x[m, contraction] . D, where D is W^T (forward) or W (grad_input).
//
//   x is copied once into tiles, for all column tasks
//   a task takes a few dozen columns of D:
//     for a chunk of the contraction: decode D's part into tiles that stay in the core's caches
//       for 32 rows of x: multiply, 32 x 32 sums at a time in registers
//     behind the last one come the side path's tiles, from B or A instead of from W
//     bias, conversion, store
//
// A matrix unit takes one factor by rows and the other by pairs of rows, so neither direction transposes a weight:
//   forward     W is the factor by rows, x^T the one by pairs; the sums come out transposed
//   grad_input  W is the factor by pairs of rows, g the one by rows
// Packed bytes decode into even and odd elements. Forward, these are two steps of the contraction, in x's tiles too;
// in grad_input they are two groups of columns, put together when the sums are stored.
// Each output is summed in the order of the contraction, by one task, so neither the thread count nor the tiling
// changes a bit.

constexpr int64_t kWide = 2 * kTileSide;        // columns of D, and rows of x, that are multiplied at a time
constexpr int64_t kPairBytes = 2 * kTileBytes;  // of the kWide columns in one step
constexpr int64_t kSumFloats = 4 * kTileFloats;
constexpr int64_t kGroupOf = 2 * kTileDepth;           // elements that one read of packed bytes covers (forward)
constexpr int64_t kRowsOfBlock = 1024;                 // rows of x that share one decode
constexpr int64_t kMostBlocks = 2048 / kMinBlock + 1;  // that a row of a task can touch

// How the work is cut. Few rows of x: decoding is all there is, so a task's tiles stay in L1. Many: a task keeps its
// tiles in L2, and steps are multiplied a few at a time so that x's and the task's fit L1 together.
struct TileShape {
  int64_t columns;     // of D in a task
  int64_t chunk;       // steps decoded at a time; even
  int64_t multiplied;  // steps multiplied at a time
};
constexpr int64_t kFewRows = 64;

// Measured on two Sapphire Rapids class cores; columns are fewer where there would be too few tasks for the threads.
static TileShape tile_shape(const LinearArgs& args) {
  const int64_t part = divide_up(divide_up(args.columns(), args.threads), kWide) * kWide;
  if (args.grad_input) {
    // Every row of W is another page, so a task takes as much of it as it can: 4096 x 4096, 16 rows of x: 128 columns
    // 3.3 ms, 512 2.8 ms, 2048 1.9 ms.
    return {smaller(larger(part, 4 * kWide), args.m <= kFewRows ? 2048 : 1024), args.m <= 256 ? 8 : 16, 8};
  }
  if (args.m <= kFewRows) return {kWide, 16, 16};
  return {smaller(larger(divide_up(part, 2 * kWide) * kWide, kWide), 8 * kWide), 64, 8};
}

struct TilesJob {
  const LinearArgs* args;
  const char* x;       // tiles: [group of 16 rows][step]
  int64_t first_row;   // of this block of x
  int64_t rows;        // of this block of x
  int64_t steps;       // of the contraction with W
  int64_t side_steps;  // of the side path, behind them
  TileShape shape;
  Failure* failure;

  int64_t all_steps() const { return steps + side_steps; }
  int64_t groups() const { return divide_up(rows, kTileSide); }
};

static int64_t steps_for(const LinearArgs& args, int64_t length) {
  return args.grad_input ? divide_up(length, kTileDepth) : divide_up(length, kGroupOf) * 2;
}

// ---- x --------------------------------------------------------------------------------------------------------------

// Elements `at` to `at + want` of a row as bf16, zeros behind its end.
static void padded_row(const DenseRows& source, int64_t row, int64_t at, int64_t length, int64_t want, Bf16* out) {
  const int64_t count = larger(0, smaller(want, length - at));
  if (count > 0) source.row(row, at, count, out);
  memset(static_cast<void*>(out + count), 0, static_cast<size_t>(want - count) * sizeof(Bf16));
}

// A factor by pairs: 16 rows of `source` become 16 columns; even elements in one step, odd ones in the next.
static void tiles_by_pairs(const DenseRows& source, int64_t row, int64_t rows, int64_t length, char* tiles) {
  alignas(64) Bf16 values[kGroupOf];
  alignas(64) Bf16 apart[2][kTileSide][kTileDepth];
  memset(static_cast<void*>(apart), 0, sizeof apart);
  for (int64_t at = 0; at < length; at += kGroupOf, tiles += kPairBytes) {
    for (int64_t i = 0; i < rows; ++i) {
      padded_row(source, row + i, at, length, kGroupOf, values);
      split_apart(values, apart[0][i], apart[1][i]);
    }
    for (int part = 0; part < 2; ++part) {
      transpose(reinterpret_cast<const uint32_t*>(apart[part]), kTileSide,
                reinterpret_cast<uint32_t*>(tiles + part * kTileBytes), kTileSide);
    }
  }
}

// A factor by rows.
static void tiles_by_rows(const DenseRows& source, int64_t row, int64_t rows, int64_t length, char* tiles) {
  for (int64_t at = 0; at < length; at += kTileDepth, tiles += kTileBytes) {
    Bf16* to = reinterpret_cast<Bf16*>(tiles);
    for (int64_t i = 0; i < rows; ++i) padded_row(source, row + i, at, length, kTileDepth, to + i * kTileDepth);
    memset(static_cast<void*>(to + rows * kTileDepth), 0, static_cast<size_t>((kTileSide - rows) * 64));
  }
}

static void arrange_task(void* context, int64_t group) {
  const TilesJob& job = *static_cast<const TilesJob*>(context);
  const LinearArgs& args = *job.args;
  const int64_t row = job.first_row + group * kTileSide;
  const int64_t rows = smaller(kTileSide, job.rows - group * kTileSide);
  char* tiles = const_cast<char*>(job.x) + group * job.all_steps() * kTileBytes;
  const DenseRows x{args.x, args.dtype, args.x_stride};
  const DenseRows left{args.side.left, args.side.left_dtype, args.side.rank};
  const auto arrange = args.grad_input ? tiles_by_rows : tiles_by_pairs;
  arrange(x, row, rows, args.contraction(), tiles);
  arrange(left, row, rows, args.side.rank, tiles + job.steps * kTileBytes);
}

// ---- D --------------------------------------------------------------------------------------------------------------

// Whether the packed bytes of `unit` elements of a row lie in whole bytes of one block (of two: unit / 2 each).
static bool decodes_in_place(const Weight& weight, int64_t unit) {
  return !weight.is_int8() && weight.cols > 0 && weight.cols % unit == 0;
}
static bool decodes_in_place(const DenseRows&, int64_t) { return false; }
static bool decodes_in_place(const WeightRows& source, int64_t unit) { return decodes_in_place(*source.weight, unit); }
// Whether decode_row takes the rows of a weight.
static bool decodes_rows(const WeightRows& source) {
  const Weight& weight = *source.weight;
  return weight.is_int8() ? weight.cols > 0 && weight.cols % kGroupOf == 0 : decodes_in_place(weight, kGroupOf);
}
static bool decodes_rows(const DenseRows&) { return false; }

static inline Bf16* tile_row(char* tiles, int64_t step, int64_t row) {
  char* tile = tiles + step * kPairBytes + row / kTileSide * kTileBytes;
  return reinterpret_cast<Bf16*>(tile) + row % kTileSide * kTileDepth;
}

static void decode_row_int8(const WeightRows& source, int64_t row, int64_t place, int64_t first_step, int64_t steps,
                            char* tiles) {
  const int8_t* q = source.weight->rows8.q + row * source.weight->cols + first_step * kTileDepth;
  const float by = source.weight->rows8.absmax[row] / 127.0F;
  for (int64_t step = 0; step < steps; step += 2, q += kGroupOf) {
    prefetch(q + steps * kTileDepth);  // the next chunk of this row, or the next row
    decode_apart_int8_scaled(q, by, tile_row(tiles, step, place), tile_row(tiles, step + 1, place));
  }
}

// Forward, a row of W: steps first_step on, from the packed bytes.
static void decode_row(const WeightRows& source, int64_t row, int64_t place, int64_t first_step, int64_t steps,
                       char* tiles) {
  if (source.weight->is_int8()) return decode_row_int8(source, row, place, first_step, steps, tiles);
  const Packed4 from = source.weight->packed4;  // a copy: nothing that is stored can change it
  const Table codes = load_table(from.codebook);
  const int64_t start = row * source.weight->cols + first_step * kTileDepth;
  const int64_t ahead = steps * kTileDepth / 2;  // the next chunk of this row, or the next row
  const uint8_t* packed = from.packed + start / 2;
  Bf16* even = tile_row(tiles, 0, place);
  for (int64_t step = 0; step < steps; step += 2, packed += kGroupOf / 2, even += kPairBytes) {
    const int64_t block = (start + step * kTileDepth) >> from.block_shift;
    Bf16* odd = even + kPairBytes / 2;
    prefetch(packed + ahead);
    if (from.block_shift > 5) {
      decode_apart(packed, scaled_twice(codes, from.scales.at(block)), even, odd);
    } else {
      decode_apart_two(packed, scaled_both(codes, from.scales.at(block), from.scales.at(block + 1)), even, odd);
    }
  }
}
static void decode_row(const DenseRows&, int64_t, int64_t, int64_t, int64_t, char*) {}

// Forward: kWide columns of D are rows of `source`, those from `rows` on zeros.
template <class Source>
static void fill_rows(const Source& source, int64_t row, int64_t rows, int64_t length, int64_t first_step,
                      int64_t steps, char* tiles) {
  const bool in_place = decodes_rows(source);
  alignas(64) Bf16 values[kGroupOf];
  for (int64_t i = 0; i < kWide; ++i) {
    if (i < rows && in_place) {
      decode_row(source, row + i, i, first_step, steps, tiles);
      continue;
    }
    for (int64_t step = 0; step < steps; step += 2) {
      const int64_t at = (first_step + step) * kTileDepth;
      const int64_t count = i < rows ? smaller(kGroupOf, length - at) : 0;
      if (count > 0) source.row(row + i, at, count, values);
      memset(static_cast<void*>(values + count), 0, static_cast<size_t>(kGroupOf - count) * sizeof(Bf16));
      split_apart(values, tile_row(tiles, step, i), tile_row(tiles, step + 1, i));
    }
  }
}

constexpr int64_t kRowsAheadOfTiles = 8;

// grad_input, two rows of W: `width` columns from `column` on, from the packed bytes.
static void decode_row_pair(const WeightRows& source, int64_t row, int64_t column, int64_t width, int64_t step,
                            int64_t pair, int64_t stride, char* tiles) {
  const Packed4& from = source.weight->packed4;
  const Table codes = load_table(from.codebook);
  const int64_t cols = source.weight->cols;
  const int64_t start[2] = {row * cols + column, (row + 1) * cols + column};
  const int64_t shift = from.block_shift;
  alignas(64) float scales[2][kMostBlocks];
  for (int part = 0; part < 2; ++part) {
    source.fetch(row + kRowsAheadOfTiles + part, column, width);
    const int64_t last = (start[part] + width - 1) >> shift;
    load_scales(from.scales, start[part] >> shift, last - (start[part] >> shift) + 1, scales[part]);
  }
  const float* scale = scales[0];
  const float* below = scales[1];
  Table16 table = scaled_both(codes, *scale, *below);
  Bf16* even = tile_row(tiles, step, pair);
  for (int64_t j = 0; j < width; j += kWide, even += stride / 2) {
    const int64_t block = ((start[0] + j) >> shift) - (start[0] >> shift);
    const int64_t block_below = ((start[1] + j) >> shift) - (start[1] >> shift);
    if (scales[0] + block != scale || scales[1] + block_below != below) {
      scale = scales[0] + block;
      below = scales[1] + block_below;
      table = scaled_both(codes, *scale, *below);
    }
    decode_pairs(from.packed + (start[0] + j) / 2, from.packed + (start[1] + j) / 2, table, even,
                 even + kTileBytes / 2);
  }
}
static void decode_row_pair(const DenseRows&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, char*) {}

// grad_input: D's rows are rows of `source`; `width` columns from `column` on, in groups of kWide, each `stride` bytes.
template <class Source>
static void fill_columns(const Source& source, int64_t column, int64_t width, int64_t length, int64_t first_step,
                         int64_t steps, int64_t stride, char* tiles) {
  const bool in_place = decodes_in_place(source, kWide);
  alignas(64) Bf16 values[2][kWide];
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t pair = 0; pair < kTileSide; ++pair) {
      const int64_t row = (first_step + step) * kTileDepth + 2 * pair;
      if (in_place && row + 1 < length) {
        decode_row_pair(source, row, column, width, step, pair, stride, tiles);
        continue;
      }
      for (int64_t j = 0; j < width; j += kWide) {
        for (int64_t part = 0; part < 2; ++part) {
          const int64_t count = row + part < length ? smaller(kWide, width - j) : 0;
          if (count > 0) source.row(row + part, column + j, count, values[part]);
          memset(static_cast<void*>(values[part] + count), 0, static_cast<size_t>(kWide - count) * sizeof(Bf16));
        }
        char* group = tiles + j / kWide * stride;
        pair_apart(values[0], values[1], tile_row(group, step, pair), tile_row(group, step, pair + kTileSide));
      }
    }
  }
}

// ---- one task -------------------------------------------------------------------------------------------------------

// 32 x 32 sums of 32 columns of D and 32 (or 16) rows of x, finished and stored.
static void store_sums(const LinearArgs& args, float* sums, int64_t row, int64_t rows, int64_t column, int64_t width) {
  alignas(64) float out[kWide * kWide];
  alignas(64) float bias[kWide];
  for (int64_t tile = 0; tile < 4; ++tile) {
    // Tiles: two groups of D's columns by two groups of rows of x.
    if (tile % 2 * kTileSide >= rows) continue;
    const float* from = sums + tile * kTileFloats;
    float* to = out + tile % 2 * kTileSide * kWide;
    if (!args.grad_input) {
      transpose(reinterpret_cast<const uint32_t*>(from), kTileSide,
                reinterpret_cast<uint32_t*>(to + tile / 2 * kTileSide), kWide);
    } else if (tile < 2) {
      for (int64_t i = 0; i < kTileSide; ++i) {
        merge_columns(from + i * kTileSide, from + 2 * kTileFloats + i * kTileSide, to + i * kWide);
      }
    }
  }
  if (args.bias != nullptr) load_floats(args.bias, args.bias_dtype, column, width, bias);
  for (int64_t i = 0; i < rows; ++i) {
    float* values = out + i * kWide;
    if (args.bias != nullptr) {
      for (int64_t j = 0; j < width; ++j) values[j] += bias[j];
    }
    store_results(values, width, args.dtype, args.out, (row + i) * args.columns() + column);
  }
}

// sums += D's tiles . x's tiles for the kWide columns of D and rows of x that they hold.
static void multiply_groups(const LinearArgs& args, const char* d, const char* x, int64_t x_group, bool two,
                            int64_t steps, bool first, float* sums) {
  if (args.grad_input) {
    two ? multiply_tiles<2, true>(d, kPairBytes, x, x_group, steps, first, sums)
        : multiply_tiles<1, true>(d, kPairBytes, x, x_group, steps, first, sums);
  } else {
    two ? multiply_tiles<2, false>(d, kPairBytes, x, x_group, steps, first, sums)
        : multiply_tiles<1, false>(d, kPairBytes, x, x_group, steps, first, sums);
  }
}

// Steps `first_step` to `first_step + steps` of the contraction, decoded in `d`, with every row of x.
static void multiply_chunk(const TilesJob& job, const char* d, int64_t first_step, int64_t steps, int64_t column,
                           int64_t width, float* sums) {
  const LinearArgs& args = *job.args;
  const bool last = first_step + steps == job.all_steps();
  const bool once = last && first_step == 0;  // one chunk in all: sums are stored as soon as they are there
  const int64_t wides = divide_up(width, kWide);
  const int64_t x_group = job.all_steps() * kTileBytes;
  for (int64_t group = 0; group < job.groups(); group += 2) {
    const bool two = group + 1 < job.groups();
    const char* x = job.x + group * x_group + first_step * kTileBytes;
    float* here = once ? sums : sums + group / 2 * wides * kSumFloats;
    for (int64_t step = 0; step < steps; step += job.shape.multiplied) {
      const int64_t count = smaller(job.shape.multiplied, steps - step);
      for (int64_t wide = 0; wide < wides; ++wide) {
        multiply_groups(args, d + (wide * steps + step) * kPairBytes, x + step * kTileBytes, x_group, two, count,
                        first_step + step == 0, here + wide * kSumFloats);
      }
    }
    for (int64_t wide = 0; last && wide < wides; ++wide) {
      const int64_t row = group * kTileSide;
      store_sums(args, here + wide * kSumFloats, job.first_row + row, smaller(kWide, job.rows - row),
                 column + wide * kWide, smaller(kWide, width - wide * kWide));
    }
  }
}

// Steps of `source` for all columns of the task; `stride` bytes from one kWide of them to the next.
template <class Source>
static void fill_tiles(const LinearArgs& args, const Source& source, int64_t length, int64_t column, int64_t width,
                       int64_t first_step, int64_t steps, int64_t stride, char* d) {
  if (args.grad_input) return fill_columns(source, column, width, length, first_step, steps, stride, d);
  for (int64_t j = 0; j < width; j += kWide, d += stride) {
    fill_rows(source, column + j, smaller(kWide, width - j), length, first_step, steps, d);
  }
}

static void tiles_task(void* context, int64_t index) {
  const TilesJob& job = *static_cast<const TilesJob*>(context);
  const LinearArgs& args = *job.args;
  const int64_t column = index * job.shape.columns;
  const int64_t width = smaller(job.shape.columns, args.columns() - column);
  const int64_t wides = divide_up(width, kWide);
  const int64_t d_bytes = wides * (smaller(job.shape.chunk, job.steps) + job.side_steps) * kPairBytes;
  const int64_t sum_bytes = divide_up(job.groups(), 2) * wides * kSumFloats * 4;
  char* d = static_cast<char*>(scratch(Slot::panel, static_cast<size_t>(d_bytes)));
  auto* sums = static_cast<float*>(scratch(Slot::accumulators, static_cast<size_t>(sum_bytes)));
  if (d == nullptr || sums == nullptr) return job.failure->report_memory(d_bytes + sum_bytes);
  const SidePath& side = args.side;
  const DenseRows right{side.right, side.right_dtype, args.grad_input ? args.weight.cols : side.rank};
  open_tiles();
  for (int64_t step = 0; step < job.steps; step += job.shape.chunk) {
    const int64_t steps = smaller(job.shape.chunk, job.steps - step);
    const int64_t side_steps = step + steps == job.steps ? job.side_steps : 0;
    const int64_t stride = (steps + side_steps) * kPairBytes;
    fill_tiles(args, WeightRows{&args.weight}, args.contraction(), column, width, step, steps, stride, d);
    fill_tiles(args, right, side.rank, column, width, 0, side_steps, stride, d + steps * kPairBytes);
    multiply_chunk(job, d, step, steps + side_steps, column, width, sums);
  }
  close_tiles();
}

static Status linear_tiles_as(const LinearArgs& args, void (*task)(void*, int64_t), int64_t columns_of_task) {
  if (args.dtype != DType::bf16) return bad_argument("dtype", static_cast<int64_t>(args.dtype));
  if (args.m == 0 || args.columns() == 0) return success();
  Failure failure;
  TilesJob job;
  job.args = &args;
  // An empty contraction is one step of zeros.
  job.steps = larger(steps_for(args, args.contraction()), args.grad_input ? 1 : 2);
  job.side_steps = steps_for(args, args.side.rank);
  job.failure = &failure;
  job.shape = tile_shape(args);
  const int64_t most = smaller(args.m, kRowsOfBlock);
  const int64_t bytes = divide_up(most, kTileSide) * job.all_steps() * kTileBytes;
  char* x = static_cast<char*>(scratch(Slot::inputs, static_cast<size_t>(bytes)));
  if (x == nullptr) return out_of_memory(bytes);
  if (args.contraction() == 0) memset(x, 0, static_cast<size_t>(bytes));
  job.x = x;
  for (int64_t row = 0; row < args.m; row += kRowsOfBlock) {
    job.first_row = row;
    job.rows = smaller(kRowsOfBlock, args.m - row);
    parallel_for(args.threads, job.groups(), arrange_task, &job);
    parallel_for(args.threads, divide_up(args.columns(), columns_of_task), task, &job);
  }
  trim_scratch();
  return failure.status();
}

static Status linear_tiles(const LinearArgs& args) {
  return linear_tiles_as(args, tiles_task, tile_shape(args).columns);
}
