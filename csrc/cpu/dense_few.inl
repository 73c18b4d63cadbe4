// A few rows of x times a dense matrix: bound by reading it, so each of its elements is read once, where it lies, and
// widened in registers. Products and sums are fp32. A row's bits do not depend on the rows beside it.

struct DenseJob {
  const DenseArgs* args;
  const float* x;  // [padded m, cols]
};

// out[m * kRowsOfStrip + r * step] = row first + r * step of the matrix times row m of x.
template <class W, int Rows, int M>
static void dense_rows(const DenseJob& job, int64_t first, int64_t step, float* out) {
  constexpr int64_t kLine = 64 / sizeof(W), kAhead = kPrefetch / sizeof(W);
  const int64_t cols = job.args->cols;
  const W* weights[Rows];
  F32 sums[Rows * M];
  for (int r = 0; r < Rows; ++r) {
    weights[r] = static_cast<const W*>(job.args->weight) + (first + r * step) * cols;
    for (int m = 0; m < M; ++m) sums[r * M + m] = zero();
  }
  int64_t i = 0;
  const auto multiply = [&](int64_t count) {
    F32 values[Rows];
    for (int r = 0; r < Rows; ++r) values[r] = load_some(weights[r] + i, count);
    for (int m = 0; m < M; ++m) {
      const F32 x = load_some(job.x + m * cols + i, count);
      for (int r = 0; r < Rows; ++r) sums[r * M + m] = fma(values[r], x, sums[r * M + m]);
    }
  };
  for (; i + kLanes <= cols; i += kLanes) {
    if (i % kLine == 0) {
      for (int r = 0; r < Rows; ++r) prefetch_near(weights[r] + i + kAhead);
    }
    multiply(kLanes);
  }
  if (i < cols) multiply(cols - i);
  for (int r = 0; r < Rows; ++r) {
    for (int m = 0; m < M; ++m) out[m * kRowsOfStrip + r * step] = sum(sums[r * M + m]);
  }
}

template <class W, int M>
static void dense_task(void* context, int64_t index) {
  const DenseJob& job = *static_cast<const DenseJob*>(context);
  const DenseArgs& args = *job.args;
  constexpr int kTogether = rows_together(M);
  const int64_t first = index * kRowsOfStrip;
  const int64_t rows = smaller(args.rows - first, kRowsOfStrip);
  alignas(64) float out[M * kRowsOfStrip];
  const int64_t step = rows / kTogether;
  for (int64_t row = 0; row < step; ++row) dense_rows<W, kTogether, M>(job, first + row, step, out + row);
  for (int64_t row = step * kTogether; row < rows; ++row) dense_rows<W, 1, M>(job, first + row, 1, out + row);
  alignas(64) float bias[kRowsOfStrip];
  if (args.bias != nullptr) load_floats(args.bias, args.bias_dtype, first, rows, bias);
  for (int64_t m = 0; m < args.m; ++m) {
    float* values = out + m * kRowsOfStrip;
    if (args.bias != nullptr) {
      for (int64_t r = 0; r < rows; ++r) values[r] += bias[r];
    }
    store_floats(values, rows, args.out_dtype, args.out, m * args.rows + first);
  }
}

template <class W>
static nybble::Task dense_task_for(int64_t padded) {
  return padded == 1   ? dense_task<W, 1>
         : padded == 2 ? dense_task<W, 2>
         : padded == 4 ? dense_task<W, 4>
                       : dense_task<W, 8>;
}

static Status dense_few(const DenseArgs& args) {
  if (args.m == 0 || args.rows == 0) return success();
  const int64_t padded = args.m <= 2 ? args.m : args.m <= 4 ? 4 : 8;
  const int64_t bytes = larger(1, padded * args.cols) * 4;
  auto* x = static_cast<float*>(scratch(Slot::inputs, static_cast<size_t>(bytes)));
  if (x == nullptr) return out_of_memory(bytes);
  for (int64_t m = 0; m < args.m; ++m) {
    load_floats(args.x.data, args.dtype, m * args.x.stride, args.cols, x + m * args.cols);
  }
  memset(x + args.m * args.cols, 0, static_cast<size_t>((padded - args.m) * args.cols) * sizeof(float));
  DenseJob job{&args, x};
  const nybble::Task task = args.weight_dtype == DType::f32   ? dense_task_for<float>(padded)
                            : args.weight_dtype == DType::f16 ? dense_task_for<F16>(padded)
                                                              : dense_task_for<Bf16>(padded);
  parallel_for(args.threads, divide_up(args.rows, kRowsOfStrip), task, &job);
  return success();
}
