// The elementwise parts of a decoder layer, forward and backward, each in one pass over memory: RMSNorm, a gated
// activation, the rotary embedding. They read and write fp32, fp16 or bf16 and compute in fp32, each result rounded
// once.
//
// A row of RMSNorm is read twice, the second time out of a cache. Elements past the last whole vector are computed as
// lanes of one that is filled up with zeros (load_some in optimizer.inl), so a result does not depend on where its
// vector began; sums are taken in an order that depends on the number of columns alone.

constexpr int64_t kElementsPerTask = 16384;
constexpr int kSums = 4;  // of a row at a time, so that an addition does not wait for the one before

// `step(i, count)` for every vector of a row: count is kLanes, but maybe for the last one.
template <class Step>
static NYBBLE_INLINE void each_vector(int64_t size, const Step& step) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) step(i, int64_t{kLanes});
  if (i < size) step(i, size - i);
}

// The sum of term(i, count) over a row; lanes beyond `count` must be 0.
template <class Term>
static NYBBLE_INLINE float sum_of(int64_t size, const Term& term) {
  F32 sums[kSums] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kSums * kLanes <= size; i += kSums * kLanes) {
    for (int a = 0; a < kSums; ++a) sums[a] = term(i + a * kLanes, int64_t{kLanes}, sums[a]);
  }
  for (; i + kLanes <= size; i += kLanes) sums[0] = term(i, int64_t{kLanes}, sums[0]);
  if (i < size) sums[1] = term(i, size - i, sums[1]);
  return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

template <class T>
static inline const T* row_of(const ElementRows& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + row * rows.stride;
}

// Kernel<X, Y>::task for a pair of dtypes that are the same, or of which one is fp32.
template <template <class, class> class Kernel>
static nybble::Task task_of(DType x, DType y) {
  if (x == DType::f32) {
    if (y == DType::f32) return Kernel<float, float>::task;
    return y == DType::f16 ? Kernel<float, F16>::task : Kernel<float, Bf16>::task;
  }
  if (y == DType::f32) return x == DType::f16 ? Kernel<F16, float>::task : Kernel<Bf16, float>::task;
  return x == DType::f16 ? Kernel<F16, F16>::task : Kernel<Bf16, Bf16>::task;
}

// ---- RMSNorm --------------------------------------------------------------------------------------------------------

template <class Args>
struct NormJob {
  const Args* args;
  const float* factors;  // [cols]: weight + offset
  int64_t rows_per_task;
  float* partial_sums;  // [tasks, cols] of grad_weight, or null
};

static inline int64_t rows_per_norm_task(int64_t cols) { return larger(1, kElementsPerTask / cols); }

// Null when memory cannot be had. It is the calling thread's, and no task takes another scratch.
template <class Args>
static float* norm_scratch(const Args& args, int64_t partial_sums) {
  const int64_t bytes = (1 + partial_sums) * args.cols * static_cast<int64_t>(sizeof(float));
  auto* factors = static_cast<float*>(scratch(Slot::inputs, static_cast<size_t>(bytes)));
  if (factors == nullptr) return nullptr;
  load_floats(args.weight, args.weight_dtype, 0, args.cols, factors);
  for (int64_t i = 0; i < args.cols; ++i) factors[i] += args.offset;
  return factors;
}

static inline float reciprocal_root(float v) {
  float lanes[kLanes];
  store(lanes, div(broadcast(1.0F), root(broadcast(v))));
  return lanes[0];
}

template <class X, class Y>
struct RmsNormKernel {
  static void task(void* context, int64_t index) {
    const auto& job = *static_cast<const NormJob<RmsNormArgs>*>(context);
    const RmsNormArgs& args = *job.args;
    const int64_t first = index * job.rows_per_task;
    const int64_t end = smaller(first + job.rows_per_task, args.rows);
    for (int64_t row = first; row < end; ++row) {
      const X* x = row_of<X>(args.x, row);
      Y* out = static_cast<Y*>(args.out) + row * args.cols;
      const float squares = sum_of(args.cols, [&](int64_t i, int64_t count, F32 so_far) {
        const F32 v = load_some(x + i, count);
        return fma(v, v, so_far);
      });
      const float rstd = reciprocal_root(squares / static_cast<float>(args.cols) + args.eps);
      args.rstd[row] = rstd;
      each_vector(args.cols, [&](int64_t i, int64_t count) {
        const F32 h = mul(load_some(x + i, count), broadcast(rstd));
        store_some(out + i, mul(h, load_some(job.factors + i, count)), count);
      });
    }
  }
};

template <class X, class G>
struct RmsNormBackwardKernel {
  using Job = NormJob<RmsNormBackwardArgs>;

  static void task(void* context, int64_t index) {
    const Job& job = *static_cast<const Job*>(context);
    const RmsNormBackwardArgs& args = *job.args;
    float* sums = job.partial_sums == nullptr ? nullptr : job.partial_sums + index * args.cols;
    if (sums != nullptr) memset(sums, 0, static_cast<size_t>(args.cols) * sizeof(float));
    const int64_t first = index * job.rows_per_task;
    const int64_t end = smaller(first + job.rows_per_task, args.rows);
    for (int64_t row = first; row < end; ++row) one_row(job, row, sums);
  }

  static NYBBLE_INLINE void one_row(const Job& job, int64_t row, float* sums) {
    const RmsNormBackwardArgs& args = *job.args;
    const float* factors = job.factors;
    const X* x = row_of<X>(args.x, row);
    const G* grad = row_of<G>(args.grad, row);
    X* out = static_cast<X*>(args.grad_x) + row * args.cols;
    const F32 rstd = broadcast(args.rstd[row]);
    const float products = sum_of(args.cols, [&](int64_t i, int64_t count, F32 so_far) {
      const F32 v = mul(load_some(grad + i, count), load_some(factors + i, count));
      return fma(v, mul(load_some(x + i, count), rstd), so_far);
    });
    const F32 mean = broadcast(products / static_cast<float>(args.cols));
    each_vector(args.cols, [&](int64_t i, int64_t count) {
      const F32 g = load_some(grad + i, count);
      const F32 h = mul(load_some(x + i, count), rstd);
      const F32 v = mul(g, load_some(factors + i, count));
      store_some(out + i, mul(rstd, sub(v, mul(h, mean))), count);
      if (sums != nullptr) store_some(sums + i, fma(g, h, load_some(sums + i, count)), count);
    });
  }
};

static Status rms_norm(const RmsNormArgs& args) {
  if (args.rows == 0 || args.cols == 0) return success();
  const float* factors = norm_scratch(args, 0);
  if (factors == nullptr) return out_of_memory(args.cols * static_cast<int64_t>(sizeof(float)));
  NormJob<RmsNormArgs> job = {&args, factors, rows_per_norm_task(args.cols), nullptr};
  const nybble::Task task = task_of<RmsNormKernel>(args.dtype, args.out_dtype);
  parallel_for(args.threads, divide_up(args.rows, job.rows_per_task), task, &job);
  return success();
}

// What the tasks summed, one after the other, for kSumColumns columns.
constexpr int64_t kSumColumns = 512;

struct ColumnSums {
  const float* partial;  // [count, cols]
  int64_t count, cols;
  float* out;  // [cols]
};

static void column_sums_task(void* context, int64_t index) {
  const ColumnSums& job = *static_cast<const ColumnSums*>(context);
  const int64_t first = index * kSumColumns;
  const int64_t size = smaller(kSumColumns, job.cols - first);
  float* out = job.out + first;
  memcpy(out, job.partial + first, static_cast<size_t>(size) * sizeof(float));
  for (int64_t k = 1; k < job.count; ++k) {
    const float* partial = job.partial + k * job.cols + first;
    each_vector(size, [&](int64_t i, int64_t count) {
      store_some(out + i, add(load_some(out + i, count), load_some(partial + i, count)), count);
    });
  }
}

// The rows are cut into pieces whose number depends on the shape alone: so do the bits of grad_weight.
constexpr int64_t kMostPartialSums = 64;

static Status rms_norm_backward(const RmsNormBackwardArgs& args) {
  if (args.cols == 0) return success();
  const bool summed = args.grad_weight != nullptr;
  if (args.rows == 0) {
    if (summed) memset(args.grad_weight, 0, static_cast<size_t>(args.cols) * sizeof(float));
    return success();
  }
  int64_t rows_per_task = rows_per_norm_task(args.cols);
  if (summed) rows_per_task = larger(rows_per_task, divide_up(args.rows, kMostPartialSums));
  const int64_t tasks = divide_up(args.rows, rows_per_task);
  float* factors = norm_scratch(args, summed ? tasks : 0);
  if (factors == nullptr) return out_of_memory((1 + tasks) * args.cols * static_cast<int64_t>(sizeof(float)));
  NormJob<RmsNormBackwardArgs> job = {&args, factors, rows_per_task, summed ? factors + args.cols : nullptr};
  parallel_for(args.threads, tasks, task_of<RmsNormBackwardKernel>(args.dtype, args.grad_dtype), &job);
  if (summed) {
    ColumnSums sums = {job.partial_sums, tasks, args.cols, args.grad_weight};
    parallel_for(args.threads, divide_up(args.cols, kSumColumns), column_sums_task, &sums);
  }
  return success();
}

// ---- a gated activation ---------------------------------------------------------------------------------------------

// An activation is z sigmoid(argument(z)); argument(z) > 90 wherever z > kSaturated, and < -90 below -kSaturated.
constexpr float kSaturated = 100.0F;

struct Silu {
  static NYBBLE_INLINE F32 argument(F32 z) { return z; }
  static NYBBLE_INLINE F32 slope(F32) { return broadcast(1.0F); }
};

struct GeluTanh {
  static constexpr float kScale = 1.59576912F;  // 2 sqrt(2 / pi)
  static constexpr float kCubic = 0.0713548163F;
  static NYBBLE_INLINE F32 argument(F32 z) { return mul(z, fma(mul(z, z), broadcast(kCubic), broadcast(kScale))); }
  static NYBBLE_INLINE F32 slope(F32 z) { return fma(mul(z, z), broadcast(3.0F * kCubic), broadcast(kScale)); }
};

static NYBBLE_INLINE F32 one_plus_exponential(F32 v) { return add(exponential(v), broadcast(1.0F)); }

struct GatedJob {
  int64_t rows, cols;  // as one row where all are contiguous
  int64_t pieces;      // of a row
  int64_t rows_per_task;
  ElementRows grad, gate, up;
  void *out, *grad_gate, *grad_up;
};

static GatedJob gated_job(int64_t rows, int64_t cols, bool contiguous) {
  GatedJob job = {};
  job.rows = contiguous ? 1 : rows;
  job.cols = contiguous ? rows * cols : cols;
  job.pieces = divide_up(job.cols, kElementsPerTask);
  job.rows_per_task = larger(1, kElementsPerTask / job.cols);
  return job;
}

static inline bool dense(const ElementRows& rows, int64_t cols) { return rows.stride == cols; }

template <class T, class Act>
struct GatedKernel {
  static void task(void* context, int64_t index) {
    const GatedJob& job = *static_cast<const GatedJob*>(context);
    const int64_t first = index / job.pieces * job.rows_per_task, from = index % job.pieces * kElementsPerTask;
    const int64_t end = smaller(first + job.rows_per_task, job.rows), size = smaller(kElementsPerTask, job.cols - from);
    for (int64_t row = first; row < end; ++row) {
      const T* gate = row_of<T>(job.gate, row) + from;
      const T* up = row_of<T>(job.up, row) + from;
      T* out = static_cast<T*>(job.out) + row * job.cols + from;
      each_vector(size, [&](int64_t i, int64_t count) {
        const F32 z = load_some(gate + i, count);
        const F32 divisor = one_plus_exponential(sub(zero(), Act::argument(z)));
        store_some(out + i, mul(div(z, divisor), load_some(up + i, count)), count);
      });
    }
  }
};

template <class T, class Act>
struct GatedBackwardKernel {
  static void task(void* context, int64_t index) {
    const GatedJob& job = *static_cast<const GatedJob*>(context);
    const int64_t first = index / job.pieces * job.rows_per_task, from = index % job.pieces * kElementsPerTask;
    const int64_t end = smaller(first + job.rows_per_task, job.rows), size = smaller(kElementsPerTask, job.cols - from);
    for (int64_t row = first; row < end; ++row) {
      const T* grad = row_of<T>(job.grad, row) + from;
      const T* gate = row_of<T>(job.gate, row) + from;
      const T* up = row_of<T>(job.up, row) + from;
      const int64_t at = row * job.cols + from;
      T* grad_gate = static_cast<T*>(job.grad_gate) + at;
      T* grad_up = static_cast<T*>(job.grad_up) + at;
      each_vector(size, [&](int64_t i, int64_t count) {
        const F32 one = broadcast(1.0F), g = load_some(grad + i, count), z = load_some(gate + i, count);
        const F32 bounded = within(z, -kSaturated, kSaturated);  // else infinity times 0
        const F32 s = div(one, one_plus_exponential(sub(zero(), Act::argument(bounded))));
        const F32 slope = mul(s, fma(mul(bounded, Act::slope(bounded)), sub(one, s), one));
        store_some(grad_gate + i, mul(mul(g, load_some(up + i, count)), slope), count);
        store_some(grad_up + i, mul(g, mul(z, s)), count);
      });
    }
  }
};

template <template <class, class> class Kernel, class Act>
static nybble::Task gated_task(DType dtype) {
  if (dtype == DType::f32) return Kernel<float, Act>::task;
  return dtype == DType::f16 ? Kernel<F16, Act>::task : Kernel<Bf16, Act>::task;
}

template <template <class, class> class Kernel>
static Status run_gated(GatedJob job, Activation activation, DType dtype, int threads) {
  const nybble::Task task =
      activation == Activation::silu ? gated_task<Kernel, Silu>(dtype) : gated_task<Kernel, GeluTanh>(dtype);
  parallel_for(threads, divide_up(job.rows, job.rows_per_task) * job.pieces, task, &job);
  return success();
}

static Status gated(const GatedArgs& args) {
  if (args.rows == 0 || args.cols == 0) return success();
  GatedJob job = gated_job(args.rows, args.cols, dense(args.gate, args.cols) && dense(args.up, args.cols));
  job.gate = args.gate, job.up = args.up, job.out = args.out;
  return run_gated<GatedKernel>(job, args.activation, args.dtype, args.threads);
}

static Status gated_backward(const GatedBackwardArgs& args) {
  if (args.rows == 0 || args.cols == 0) return success();
  const bool contiguous = dense(args.grad, args.cols) && dense(args.gate, args.cols) && dense(args.up, args.cols);
  GatedJob job = gated_job(args.rows, args.cols, contiguous);
  job.grad = args.grad, job.gate = args.gate, job.up = args.up;
  job.grad_gate = args.grad_gate, job.grad_up = args.grad_up;
  return run_gated<GatedBackwardKernel>(job, args.activation, args.dtype, args.threads);
}

// ---- the rotary embedding -------------------------------------------------------------------------------------------

struct RotaryJob {
  const RotaryArgs* args;
  int64_t pieces;            // of a batch's positions
  int64_t length_per_piece;  // positions
  Failure* failure;
};

// cos and sin of a position, sin's halves as the kernel multiplies with them: of the transposed matrix, the other half,
// negated.
static void rotary_table(const RotaryArgs& args, int64_t batch, int64_t position, float* cos, float* sin) {
  const int64_t half = args.dim / 2, at = batch * args.table_stride + position * args.dim;
  load_floats(args.cos, args.table_dtype, at, args.dim, cos);
  load_floats(args.sin, args.table_dtype, at, args.dim, sin);
  if (!args.transposed) return;
  for (int64_t i = 0; i < half; ++i) {
    const float first = sin[i];
    sin[i] = -sin[i + half];
    sin[i + half] = -first;
  }
}

template <class X, class Y>
struct RotaryKernel {
  static void task(void* context, int64_t index) {
    const RotaryJob& job = *static_cast<const RotaryJob*>(context);
    const RotaryArgs& args = *job.args;
    const int64_t batch = index / job.pieces, first = index % job.pieces * job.length_per_piece;
    const int64_t end = smaller(first + job.length_per_piece, args.length), half = args.dim / 2;
    const size_t bytes = static_cast<size_t>(2 * args.dim) * sizeof(float);
    auto* cos = static_cast<float*>(scratch(Slot::rows, bytes));
    if (cos == nullptr) return job.failure->report_memory(static_cast<int64_t>(bytes));
    float* sin = cos + args.dim;
    for (int64_t position = first; position < end; ++position) {
      rotary_table(args, batch, position, cos, sin);
      const X* x = static_cast<const X*>(args.x) + batch * args.x_strides[0] + position * args.x_strides[2];
      Y* out = static_cast<Y*>(args.out) + batch * args.out_strides[0] + position * args.out_strides[2];
      for (int64_t head = 0; head < args.heads; ++head, x += args.x_strides[1], out += args.out_strides[1]) {
        each_vector(half, [&](int64_t i, int64_t count) {
          const F32 a = load_some(x + i, count), b = load_some(x + half + i, count);
          const F32 from_b = mul(b, load_some(sin + i, count)), from_a = mul(a, load_some(sin + half + i, count));
          store_some(out + i, sub(mul(a, load_some(cos + i, count)), from_b), count);
          store_some(out + half + i, add(mul(b, load_some(cos + half + i, count)), from_a), count);
        });
      }
    }
  }
};

static Status rotary(const RotaryArgs& args) {
  if (args.batch == 0 || args.heads == 0 || args.length == 0 || args.dim == 0) return success();
  Failure failure;
  RotaryJob job = {&args, 0, 0, &failure};
  job.length_per_piece = larger(1, kElementsPerTask / (args.heads * args.dim));
  job.pieces = divide_up(args.length, job.length_per_piece);
  parallel_for(args.threads, args.batch * job.pieces, task_of<RotaryKernel>(args.dtype, args.out_dtype), &job);
  return failure.status();
}
