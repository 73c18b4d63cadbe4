// The codes that linear_int8.inl multiplies: rows of x, quantized and transposed; groups of rows of W.

// ---- activations ----------------------------------------------------------------------------------------------------

struct RowScale {
  float by;    // out = sums * by * lift
  float lift;  // 1, but for rows so small that 127 / absmax would overflow
};

struct CodesOfX {
  uint32_t* codes;  // [ceil(m / kLanes)][steps][kLanes]
  RowScale* scale;  // [m]
  int64_t steps;    // of a row
  bool apart;       // codes lie as decode_codes_apart leaves them

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

constexpr int64_t kRun = 64;  // columns that share a block's scale at least, where codes lie apart

// Whether runs of kRun columns lie in one block each, and 128 of them in whole bytes of one row.
static bool decodes_apart(const Weight& weight) {
#ifdef NYBBLE_CODES_APART
  return !weight.is_int8() && (int64_t{1} << weight.packed4.block_shift) >= kRun && weight.cols % (2 * kRun) == 0;
#else
  (void)weight;
  return false;
#endif
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

#ifndef NYBBLE_CODES_APART
static inline void split_codes(int8_t*, int64_t) {}
#endif

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
      if (to.apart) split_codes(codes, padded);
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
  to->apart = decodes_apart(args.weight);
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

constexpr int64_t kSection = 4096;  // columns whose scales are decoded at a time
constexpr int64_t kRunsOfGroup = kGroup / kRun;
constexpr int64_t kRunsOfSection = kSection / kRun;

// A group of a tile of rows of W.
struct CodesOfW {
  Code* codes;     // [kWideTile][kGroup]
  float* factors;  // [kWideTile][kRunsOfSection], what multiplies the codebook; used where codes lie apart
  float (*steps)[kSection / kGroup];  // [kWideTile], the groups' scales
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
  if (shift >= 6 && ((start | count) & 63) == 0) {
    const uint8_t* packed = source.packed + start / 2;
    for (int64_t i = 0; i < count; i += 64) {
      const float scale = scales[((start + i) >> shift) - first];
      decode_codes_64(packed + i / 2, source.codebook, scale / by, out + i);
    }
    return by;
  }
  int64_t done = 0;
  for (int64_t block = first; block <= last; ++block) {
    const int64_t run = smaller(count - done, ((block + 1) << shift) - start - done);
    alignas(16) int8_t codes[16];
    const float scale = scales[block - first];
    const F32 factor = broadcast(scale / by);
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
  float unit;             // the codebook's largest magnitude / 127
  int64_t tile;           // rows of W
  int64_t slice;          // of them
  int64_t tiles;          // of W
  int64_t tiles_of_task;  // a task's are neighbours
  int64_t rows_per_task;  // of x
  Failure* failure;
};

// Rows [first_row, first_row + rows) of W; next_* say where what is decoded afterwards begins, to be fetched.
struct TileOfW {
  int64_t first_row;
  int64_t rows;
  int64_t column;
  int64_t count;   // of columns
  int64_t padded;  // rows
  int64_t next_row;
  int64_t next_column;
};

#ifdef NYBBLE_CODES_APART
// The steps and factors of a section's groups.
static void scale_section(const Int8Job& job, const TileOfW& tile, CodesOfW* to) {
  const Weight& weight = job.args->weight;
  const BlockScales& scales = weight.packed4.scales;
  const int shift = weight.packed4.block_shift;
  const int64_t runs = smaller(kSection, weight.cols - tile.column) / kRun;
  alignas(64) float of_runs[kRunsOfSection] = {};
  for (int64_t row = 0; row < tile.rows; ++row) {
    const int64_t start = (tile.first_row + row) * weight.cols + tile.column;
    if (shift == 6) {
      load_scales(scales, start >> shift, runs, of_runs);
    } else {
      for (int64_t run = 0; run < runs; ++run) of_runs[run] = scales.at((start + run * kRun) >> shift);
    }
    float* factors = to->factors + row * kRunsOfSection;
    for (int64_t run = 0; run < runs; run += 2 * kRunsOfGroup) {
      group_factors(of_runs + run, job.unit, factors + run, to->steps[row] + run / kRunsOfGroup);
    }
  }
}

static float codes_of_row_apart(const Int8Job& job, const TileOfW& tile, int64_t row, const CodesOfW& w, int8_t* out) {
  const Weight& weight = job.args->weight;
  const Packed4& from = weight.packed4;
  const int64_t start = (tile.first_row + row) * weight.cols + tile.column;
  // Fetching does not fault, wherever it reads.
  const int64_t next = (tile.next_row + row) * weight.cols + tile.next_column;
  const int64_t column = tile.column % kSection;
  decode_codes_apart(from.packed + start / 2, tile.count, from.codebook,
                     w.factors + row * kRunsOfSection + column / kRun, from.packed + next / 2, out);
  return w.steps[row][column / kGroup];
}
#else
static void scale_section(const Int8Job&, const TileOfW&, CodesOfW*) {}
static float codes_of_row_apart(const Int8Job&, const TileOfW&, int64_t, const CodesOfW&, int8_t*) { return 0.0F; }
#endif

static float codes_of_row(const Int8Job& job, const TileOfW& tile, int64_t row, int8_t* out) {
  const Weight& weight = job.args->weight;
  const int64_t start = (tile.first_row + row) * weight.cols + tile.column;
  WeightRows{&weight}.fetch(tile.next_row + row, tile.next_column, kGroup);
  if (!weight.is_int8()) return decode_group(weight.packed4, job.unit, start, tile.count, out);
  memcpy(out, weight.rows8.q + start, static_cast<size_t>(tile.count));
  return weight.rows8.absmax[tile.first_row + row] / 127.0F;
}

static inline int8_t* codes_in(int8_t* row, int8_t*) { return row; }
static inline int8_t* codes_in(int16_t*, int8_t* buffer) { return buffer; }
static inline void widen(int8_t*, const int8_t*, int64_t) {}
static inline void widen(int16_t* row, const int8_t* codes, int64_t count) { put_codes(codes, count, 0, row); }

// A group of a tile's rows, filled up with rows of zeros.
static void decode_tile(const Int8Job& job, const TileOfW& tile, CodesOfW* to) {
  alignas(64) int8_t buffer[kGroup];
  const int64_t padded = divide_up(tile.count, kCodesOfTurn) * kCodesOfTurn;
  for (int64_t row = 0; row < tile.padded; ++row) {
    int8_t* out = codes_in(to->codes + row * kGroup, buffer);
    const int64_t here = row < tile.rows ? tile.count : 0;
    to->scale[row] = 0.0F;
    if (here > 0) {
      to->scale[row] = job.x.apart ? codes_of_row_apart(job, tile, row, *to, out) : codes_of_row(job, tile, row, out);
    }
    if (here < padded) memset(out + here, 0, static_cast<size_t>(padded - here));
    widen(to->codes + row * kGroup, out, padded);
    to->start[row] = -flip_sum(to->codes + row * kGroup, padded);
  }
}
