// The small-M forward: lanes along the contraction, a few rows of W at once, nothing written but the outputs. Memory
// bound, so each packed byte is read once and decoded in registers; activations are held as fp32, split once into even
// and odd elements, which is how a register of packed bytes decodes. Needs an even in_features (rows start at a byte).

constexpr int64_t kRowsOfStrip = 64;  // rows of W in a task
constexpr int kSmallM = 8;

struct SmallJob {
  const LinearArgs* args;
  const float* x;     // 4-bit: [m][even | odd][half]; int8: [m][cols]
  int64_t half;       // floats of one part
  const float* side;  // [m][rank], null without side path
};

// Sums of one row of W with M rows of x: two accumulators a pair to hide the latency of the multiply-add.
template <int M>
struct RowSums {
  F32 even[M];
  F32 odd[M];
  float tail[M];

  void clear() {
    for (int m = 0; m < M; ++m) {
      even[m] = zero();
      odd[m] = zero();
      tail[m] = 0.0F;
    }
  }
  float total(int m) const { return sum(add(even[m], odd[m])) + tail[m]; }
};

template <int M>
static inline void multiply_bytes(const uint8_t* packed, const Table& table, const float* x, int64_t half, int64_t at,
                                  RowSums<M>* sums) {
  I32 high, low;
  load_nibbles(packed, &high, &low);
  const F32 even = lookup(table, high);
  const F32 odd = lookup(table, low);
  for (int m = 0; m < M; ++m) {
    const float* row = x + m * 2 * half + at;
    sums->even[m] = fma(even, load(row), sums->even[m]);
    sums->odd[m] = fma(odd, load(row + half), sums->odd[m]);
  }
}

template <int M>
static void multiply_tail(const uint8_t* packed, int64_t bytes, const float* codebook, float by, const float* x,
                          int64_t half, int64_t at, RowSums<M>* sums) {
  for (int64_t i = 0; i < bytes; ++i) {
    const float even = codebook[packed[i] >> 4] * by;
    const float odd = codebook[packed[i] & 15] * by;
    for (int m = 0; m < M; ++m) {
      const float* row = x + m * 2 * half + at + i;
      sums->tail[m] += even * row[0];
      sums->tail[m] += odd * row[half];
    }
  }
}

// `Rows` rows of W from `first` on whose blocks begin where the rows begin.
template <int Rows, int M>
static void aligned_rows(const SmallJob& job, int64_t first, RowSums<M>* sums) {
  const Weight& weight = job.args->weight;
  const Packed4& source = weight.packed4;
  const int64_t row_bytes = weight.cols / 2;
  const int64_t block_bytes = source.block_size() / 2;
  const int64_t row_blocks = weight.cols >> source.block_shift;
  const Table codes = load_table(source.codebook);
  const uint8_t* packed = source.packed + first * row_bytes;
  for (int64_t block = 0; block < row_blocks; ++block) {
    Table table[Rows];
    for (int r = 0; r < Rows; ++r) table[r] = scale(codes, source.scales.at((first + r) * row_blocks + block));
    for (int64_t at = block * block_bytes; at < (block + 1) * block_bytes; at += kLanes) {
      for (int r = 0; r < Rows; ++r) {
        // The same place of the next group of rows: it is wanted when this group is done.
        prefetch(packed + (r + Rows) * row_bytes + at);
        multiply_bytes(packed + r * row_bytes + at, table[r], job.x, job.half, at, &sums[r]);
      }
    }
  }
}

// One row whose blocks may straddle rows.
template <int M>
static void straddling_row(const SmallJob& job, int64_t row, RowSums<M>* sums) {
  const Weight& weight = job.args->weight;
  const Packed4& source = weight.packed4;
  const Table codes = load_table(source.codebook);
  const int64_t start = row * weight.cols;
  int64_t done = 0;
  while (done < weight.cols) {
    const int64_t block = (start + done) >> source.block_shift;
    const int64_t run = smaller(weight.cols - done, ((block + 1) << source.block_shift) - start - done);
    const float by = source.scales.at(block);
    const Table table = scale(codes, by);
    const uint8_t* packed = source.packed + (start + done) / 2;
    int64_t i = 0;
    for (; i + kLanes <= run / 2; i += kLanes) multiply_bytes(packed + i, table, job.x, job.half, done / 2 + i, sums);
    multiply_tail(packed + i, run / 2 - i, source.codebook, by, job.x, job.half, done / 2 + i, sums);
    done += run;
  }
}

template <int M>
static void int8_row(const SmallJob& job, int64_t row, RowSums<M>* sums) {
  const Weight& weight = job.args->weight;
  const int8_t* q = weight.rows8.q + row * weight.cols;
  const float by = weight.rows8.absmax[row] / 127.0F;
  int64_t i = 0;
  for (; i + 2 * kLanes <= weight.cols; i += 2 * kLanes) {
    // Scaled before the sum, so that no partial sum leaves fp32's range where the result does not.
    const F32 first = mul(load(q + i), broadcast(by));
    const F32 second = mul(load(q + i + kLanes), broadcast(by));
    for (int m = 0; m < M; ++m) {
      const float* x = job.x + m * job.half + i;
      sums->even[m] = fma(first, load(x), sums->even[m]);
      sums->odd[m] = fma(second, load(x + kLanes), sums->odd[m]);
    }
  }
  for (; i < weight.cols; ++i) {
    for (int m = 0; m < M; ++m) sums->tail[m] += static_cast<float>(q[i]) * by * job.x[m * job.half + i];
  }
}

// Side path, bias, store of one row of W.
template <int M>
static void finish_row(const SmallJob& job, int64_t row, const RowSums<M>& sums) {
  const LinearArgs& args = *job.args;
  const int64_t rank = args.side.rank;
  float bias = 0.0F;
  if (args.bias != nullptr) load_floats(args.bias, args.bias_dtype, row, 1, &bias);
  for (int64_t m = 0; m < smaller(M, args.m); ++m) {
    float value = sums.total(static_cast<int>(m));
    for (int64_t at = 0; at < rank; at += kChunk) {
      alignas(64) float right[kChunk];
      const int64_t count = smaller(kChunk, rank - at);
      load_floats(args.side.right, args.side.right_dtype, row * rank + at, count, right);
      float extra = 0.0F;
      for (int64_t i = 0; i < count; ++i) extra += job.side[m * rank + at + i] * right[i];
      value += extra;
    }
    value += bias;
    store_floats(&value, 1, args.dtype, args.out, m * args.weight.rows + row);
  }
}

template <int M>
static void small_m_task(void* context, int64_t index) {
  const SmallJob& job = *static_cast<const SmallJob*>(context);
  const Weight& weight = job.args->weight;
  constexpr int kTogether = M == 1 ? kSmallRows : M <= 4 ? (kSmallRows + 1) / 2 : 1;
  const bool aligned = !weight.is_int8() && weight.cols % weight.packed4.block_size() == 0;
  const int64_t last = smaller(weight.rows, (index + 1) * kRowsOfStrip);
  RowSums<M> sums[kTogether];
  int64_t row = index * kRowsOfStrip;
  for (; aligned && row + kTogether <= last; row += kTogether) {
    for (RowSums<M>& each : sums) each.clear();
    aligned_rows<kTogether, M>(job, row, sums);
    for (int r = 0; r < kTogether; ++r) finish_row(job, row + r, sums[r]);
  }
  for (; row < last; ++row) {
    sums[0].clear();
    if (weight.is_int8()) {
      int8_row(job, row, &sums[0]);
    } else if (aligned) {
      aligned_rows<1, M>(job, row, sums);
    } else {
      straddling_row(job, row, &sums[0]);
    }
    finish_row(job, row, sums[0]);
  }
}

// x as fp32: even elements, then odd ones (4-bit), or as it is (int8); rows up to `padded` are zero.
static void spread_inputs(const LinearArgs& args, int64_t padded, float* to) {
  const int64_t cols = args.weight.cols;
  for (int64_t m = 0; m < padded; ++m) {
    float* row = to + m * cols;
    if (m >= args.m) {
      memset(row, 0, static_cast<size_t>(cols) * sizeof(float));
      continue;
    }
    if (args.weight.is_int8()) {
      load_floats(args.x, args.dtype, m * args.x_stride, cols, row);
      continue;
    }
    alignas(64) float values[kChunk];
    for (int64_t at = 0; at < cols; at += kChunk) {
      const int64_t count = smaller(kChunk, cols - at);
      load_floats(args.x, args.dtype, m * args.x_stride + at, count, values);
      for (int64_t i = 0; i < count / 2; ++i) {
        row[at / 2 + i] = values[2 * i];
        row[cols / 2 + at / 2 + i] = values[2 * i + 1];
      }
    }
  }
}

static Status linear_small_m(const LinearArgs& args) {
  if (args.m == 0 || args.weight.rows == 0) return success();
  const int64_t cols = args.weight.cols;
  if (args.grad_input || args.m > kSmallM) return bad_argument("m", args.m);
  if (!args.weight.is_int8() && cols % 2 != 0) return bad_argument("in_features", cols);
  const int64_t padded = args.m <= 2 ? args.m : args.m <= 4 ? 4 : 8;
  const int64_t bytes = padded * cols * 4;
  auto* x = static_cast<float*>(scratch(Slot::inputs, static_cast<size_t>(bytes)));
  if (x == nullptr) return out_of_memory(bytes);
  spread_inputs(args, padded, x);
  SmallJob job{&args, x, args.weight.is_int8() ? cols : cols / 2, nullptr};
  if (args.side.rank > 0) {
    Operand side;
    const Status status = prepare<StepF32>(args.side.left, args.side.left_dtype, args.m, args.side.rank, args.side.rank,
                                           Slot::side, 1, &side);
    if (!status.ok()) return status;
    job.side = reinterpret_cast<const float*>(side.data);
  }
  const int64_t tasks = divide_up(args.weight.rows, kRowsOfStrip);
  switch (padded) {
    case 1:
      parallel_for(args.threads, tasks, small_m_task<1>, &job);
      break;
    case 2:
      parallel_for(args.threads, tasks, small_m_task<2>, &job);
      break;
    case 4:
      parallel_for(args.threads, tasks, small_m_task<4>, &job);
      break;
    default:
      parallel_for(args.threads, tasks, small_m_task<8>, &job);
      break;
  }
  return success();
}
