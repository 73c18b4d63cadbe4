// Codes of a weight picked one column after another, so that the error of a column is made up for by others: what is
// measured is (W - Q) H (W - Q)^T, H the second moments of the layer's inputs, not the error of the weight itself.
//
//   round_feedback   GPTQ (arXiv 2210.17323): what rounding column p did is taken to the columns after it
//   round_descent    coordinate descent (QuantEase, arXiv 2309.01885): each code in turn becomes the best one, all
//                    others given; the measure never rises
//
// Rows of the weight do not know of each other. So a task takes kRoundRows of them, turned round so that lanes are
// rows:
//
//                 row 0 .. kRoundRows - 1
//   position 0    [ . . . . . . . . ]
//   position 1    [ . . . . . . . . ]
//      ...
//
// In a block of kRoundBlock positions each waits for the one before. What they do to all other positions is one product
// with a slice of the matrix, four positions by kRoundRows sums in registers. An output depends on nothing that another
// task does.

constexpr int kRoundVectors = kLanes == 16 ? 4 : 2;
constexpr int64_t kRoundRows = kRoundVectors * kLanes;
constexpr int64_t kRoundBlock = 128;
constexpr int kRoundTogether = 4;  // positions in registers

// How a value becomes a code: the nearest one.
struct CodePicker {
  bool int8;
  SortedCodebook sorted;
  Thresholds thresholds;
  Table codes;
};

static CodePicker code_picker(const RoundArgs& args) {
  CodePicker picker;
  picker.int8 = args.codebook == nullptr;
  if (!picker.int8) {
    picker.sorted = sort_codebook(args.codebook);
    // Halfway between two codes, also beyond [-1, 1]: int4's lowest code lies there, which the plain rule never picks.
    float* threshold = picker.sorted.threshold;
    for (int i = 0; i < 15; ++i) threshold[i] = (picker.sorted.code[i] + picker.sorted.code[i + 1]) / 2.0F;
    picker.thresholds = load_thresholds(threshold);
    picker.codes = load_table(picker.sorted.code);
  }
  return picker;
}

// Adding and taking away 1.5 * 2^23 rounds to nearest even.
static inline F32 to_integer(F32 v) { return add(add(v, broadcast(12582912.0F)), broadcast(-12582912.0F)); }

// The nearest value that a code stands for; `code`, kLanes bytes: its rank, or the int8 itself.
static inline F32 round_to_code(F32 v, F32 scale, F32 reciprocal, const CodePicker& picker, uint8_t* code) {
  const F32 s = mul(v, reciprocal);
  if (picker.int8) {
    const F32 q = to_integer(mul(clamp_unit(s), broadcast(127.0F)));
    store(reinterpret_cast<int8_t*>(code), q);
    return mul(q, div(scale, broadcast(127.0F)));
  }
  const I32 rank = rank_of(s, picker.thresholds);
  store_bytes(code, rank);
  return mul(lookup(picker.codes, rank), scale);
}

struct RoundJob {
  const RoundArgs* args;
  CodePicker picker;
  Failure* failure;
};

static inline int64_t column_at(const RoundArgs& args, int64_t position) {
  return args.order == nullptr ? position : args.order[position];
}

// The rows of one task.
struct RoundTile {
  int64_t first, count;  // rows
  float* values;         // [cols, kRoundRows]: what is still to be rounded, or the gradient
  float* errors;         // [kRoundBlock, kRoundRows]
};

static inline void scales_of(const RoundArgs& args, const RoundTile& tile, int64_t column, float* scales) {
  for (int64_t r = 0; r < tile.count; ++r) {
    const int64_t row = tile.first + r;
    scales[r] = args.absmax[args.codebook == nullptr ? row : (row * args.cols + column) >> args.block_shift];
  }
  for (int64_t r = tile.count; r < kRoundRows; ++r) scales[r] = 1.0F;
}

// Of an int8 row of zeros, whose scale is 0, it is 0 and not infinite: so are its codes, and no NaN spreads.
static inline void reciprocals_of(const RoundArgs& args, const float* scales, float* reciprocals) {
  for (int v = 0; v < kRoundVectors; ++v) {
    store(reciprocals + v * kLanes, div(broadcast(1.0F), load(scales + v * kLanes)));
  }
  if (args.codebook != nullptr) return;
  for (int64_t r = 0; r < kRoundRows; ++r) reciprocals[r] = scales[r] == 0.0F ? 0.0F : reciprocals[r];
}

static inline void write_codes(const RoundJob& job, const RoundTile& tile, int64_t column, const uint8_t* codes) {
  const RoundArgs& args = *job.args;
  uint8_t* out = args.codes + tile.first * args.cols + column;
  for (int64_t r = 0; r < tile.count; ++r) {
    out[r * args.cols] = job.picker.int8 ? codes[r] : job.picker.sorted.index[codes[r]];
  }
}

// values[i] += sum over the rows j of the matrix, first <= j < last, of matrix[j, i] * errors[j - first], for i from
// `begin` to `end`.
template <int Together>
static inline void add_products_at(const RoundArgs& args, const RoundTile& tile, int64_t first, int64_t last,
                                   int64_t i) {
  F32 sums[Together][kRoundVectors];
  for (int a = 0; a < Together; ++a) {
    for (int v = 0; v < kRoundVectors; ++v) sums[a][v] = load(tile.values + (i + a) * kRoundRows + v * kLanes);
  }
  const float* matrix = args.matrix + first * args.cols + i;
  const float* error = tile.errors;
  for (int64_t j = first; j < last; ++j, matrix += args.cols, error += kRoundRows) {
    F32 errors[kRoundVectors];
    for (int v = 0; v < kRoundVectors; ++v) errors[v] = load(error + v * kLanes);
    for (int a = 0; a < Together; ++a) {
      const F32 factor = broadcast(matrix[a]);
      for (int v = 0; v < kRoundVectors; ++v) sums[a][v] = fma(factor, errors[v], sums[a][v]);
    }
  }
  for (int a = 0; a < Together; ++a) {
    for (int v = 0; v < kRoundVectors; ++v) store(tile.values + (i + a) * kRoundRows + v * kLanes, sums[a][v]);
  }
}

static void add_products(const RoundArgs& args, const RoundTile& tile, int64_t first, int64_t last, int64_t begin,
                         int64_t end) {
  int64_t i = begin;
  for (; i + kRoundTogether <= end; i += kRoundTogether) add_products_at<kRoundTogether>(args, tile, first, last, i);
  for (; i < end; ++i) add_products_at<1>(args, tile, first, last, i);
}

static inline void add_error(const RoundArgs& args, const RoundTile& tile, int64_t position, const float* error,
                             int64_t begin, int64_t end) {
  const float* row = args.matrix + position * args.cols;
  F32 errors[kRoundVectors];
  for (int v = 0; v < kRoundVectors; ++v) errors[v] = load(error + v * kLanes);
  for (int64_t i = begin; i < end; ++i) {
    const F32 factor = broadcast(row[i]);
    float* to = tile.values + i * kRoundRows;
    for (int v = 0; v < kRoundVectors; ++v) store(to + v * kLanes, fma(factor, errors[v], load(to + v * kLanes)));
  }
}

static bool open_tile(const RoundJob& job, int64_t index, RoundTile* tile) {
  const RoundArgs& args = *job.args;
  tile->first = index * kRoundRows;
  tile->count = smaller(kRoundRows, args.rows - tile->first);
  const int64_t bytes = args.cols * kRoundRows * static_cast<int64_t>(sizeof(float));
  const int64_t error_bytes = kRoundBlock * kRoundRows * static_cast<int64_t>(sizeof(float));
  tile->values = static_cast<float*>(scratch(Slot::panel, static_cast<size_t>(bytes)));
  tile->errors = static_cast<float*>(scratch(Slot::rows, static_cast<size_t>(error_bytes)));
  if (tile->values != nullptr && tile->errors != nullptr) return true;
  job.failure->report_memory(bytes + error_bytes);
  return false;
}

static void round_feedback_task(void* context, int64_t index) {
  const RoundJob& job = *static_cast<const RoundJob*>(context);
  const RoundArgs& args = *job.args;
  RoundTile tile;
  if (!open_tile(job, index, &tile)) return;
  for (int64_t p = 0; p < args.cols; ++p) {
    const float* from = args.target + tile.first * args.cols + column_at(args, p);
    float* to = tile.values + p * kRoundRows;
    for (int64_t r = 0; r < kRoundRows; ++r) to[r] = r < tile.count ? from[r * args.cols] : 0.0F;
  }
  alignas(64) float scales[kRoundRows];
  alignas(64) float reciprocals[kRoundRows];
  alignas(64) uint8_t codes[kRoundRows];
  for (int64_t block = 0; block < args.cols; block += kRoundBlock) {
    const int64_t end = smaller(block + kRoundBlock, args.cols);
    for (int64_t p = block; p < end; ++p) {
      scales_of(args, tile, column_at(args, p), scales);
      reciprocals_of(args, scales, reciprocals);
      const F32 pivot = broadcast(-1.0F / args.matrix[p * args.cols + p]);
      const float* value = tile.values + p * kRoundRows;
      float* error = tile.errors + (p - block) * kRoundRows;
      for (int v = 0; v < kRoundVectors; ++v) {
        const F32 x = load(value + v * kLanes);
        const F32 q =
            round_to_code(x, load(scales + v * kLanes), load(reciprocals + v * kLanes), job.picker, codes + v * kLanes);
        store(error + v * kLanes, mul(sub(x, q), pivot));
      }
      write_codes(job, tile, column_at(args, p), codes);
      add_error(args, tile, p, error, p + 1, end);
    }
    add_products(args, tile, block, end, end, args.cols);
  }
}

// errors[p - begin] = target - what the codes say, negated if `sign` is -1.
static void residuals(const RoundJob& job, const RoundTile& tile, int64_t begin, int64_t end) {
  const RoundArgs& args = *job.args;
  alignas(64) float scales[kRoundRows];
  for (int64_t p = begin; p < end; ++p) {
    const int64_t column = column_at(args, p);
    scales_of(args, tile, column, scales);
    float* to = tile.errors + (p - begin) * kRoundRows;
    for (int64_t r = 0; r < kRoundRows; ++r) {
      if (r >= tile.count) {
        to[r] = 0.0F;
        continue;
      }
      const int64_t at = (tile.first + r) * args.cols + column;
      const float value = job.picker.int8
                              ? static_cast<float>(static_cast<int8_t>(args.codes[at])) * (scales[r] / 127.0F)
                              : args.codebook[args.codes[at] & 15U] * scales[r];
      to[r] = args.target[at] - value;
    }
  }
}

static void round_descent_task(void* context, int64_t index) {
  const RoundJob& job = *static_cast<const RoundJob*>(context);
  const RoundArgs& args = *job.args;
  RoundTile tile;
  if (!open_tile(job, index, &tile)) return;
  memset(tile.values, 0, static_cast<size_t>(args.cols * kRoundRows) * sizeof(float));
  for (int64_t block = 0; block < args.cols; block += kRoundBlock) {  // the gradient, (W - Q) H
    const int64_t end = smaller(block + kRoundBlock, args.cols);
    residuals(job, tile, block, end);
    add_products(args, tile, block, end, 0, args.cols);
  }
  alignas(64) float scales[kRoundRows];
  alignas(64) float reciprocals[kRoundRows];
  alignas(64) float old[kRoundRows];
  alignas(64) float change[kRoundRows];
  alignas(64) uint8_t codes[kRoundRows];
  for (int sweep = 0; sweep < args.sweeps; ++sweep) {
    bool changed = false;
    for (int64_t block = 0; block < args.cols; block += kRoundBlock) {
      const int64_t end = smaller(block + kRoundBlock, args.cols);
      bool here = false;
      for (int64_t p = block; p < end; ++p) {
        const int64_t column = column_at(args, p);
        scales_of(args, tile, column, scales);
        reciprocals_of(args, scales, reciprocals);
        const uint8_t* stored = args.codes + tile.first * args.cols + column;
        for (int64_t r = 0; r < kRoundRows; ++r) {
          const uint8_t code = r < tile.count ? stored[r * args.cols] : 0;
          old[r] = job.picker.int8 ? static_cast<float>(static_cast<int8_t>(code)) * (scales[r] / 127.0F)
                                   : args.codebook[code & 15U] * scales[r];
        }
        const F32 pivot = broadcast(1.0F / args.matrix[p * args.cols + p]);
        const float* gradient = tile.values + p * kRoundRows;
        for (int v = 0; v < kRoundVectors; ++v) {
          const F32 before = load(old + v * kLanes);
          const F32 aim = fma(load(gradient + v * kLanes), pivot, before);
          const F32 after = round_to_code(aim, load(scales + v * kLanes), load(reciprocals + v * kLanes), job.picker,
                                          codes + v * kLanes);
          store(change + v * kLanes, sub(before, after));
        }
        float* error = tile.errors + (p - block) * kRoundRows;
        bool any = false;
        for (int64_t r = 0; r < kRoundRows; ++r) {
          error[r] = r < tile.count ? change[r] : 0.0F;
          any = any || error[r] != 0.0F;
        }
        if (!any) continue;
        here = true;
        write_codes(job, tile, column, codes);
        add_error(args, tile, p, error, block, end);
      }
      if (!here) continue;
      changed = true;
      add_products(args, tile, block, end, 0, block);
      add_products(args, tile, block, end, end, args.cols);
    }
    if (!changed) break;
  }
}

static Status run_rounding(const RoundArgs& args, nybble::Task task) {
  Failure failure;
  RoundJob job;
  job.args = &args;
  job.picker = code_picker(args);
  job.failure = &failure;
  parallel_for(args.threads, divide_up(args.rows, kRoundRows), task, &job);
  return failure.status();
}

static Status round_feedback(const RoundArgs& args) { return run_rounding(args, round_feedback_task); }
static Status round_descent(const RoundArgs& args) { return run_rounding(args, round_descent_task); }
