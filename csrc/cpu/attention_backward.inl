// The softmax of attention in its backward pass, for a block of queries: what every query's weights were, and the
// gradient of its scores.
//
//   p  = exp(scale q . k + mask - logsumexp)
//   ds = p (grad_output . v - delta) scale,   delta = output . grad_output
//
// Both products contract over a head's depth, so both come out of the same panels as a linear layer's: keys and values
// are transposed once for the queries of a task, lanes along the keys. The scores and the products with v stay in fp32
// and in the first-level cache; only p and ds are rounded, to what the three products that follow multiply. One task
// writes a row, from left to right, so neither the thread count nor the tiling changes a bit.

struct AttentionJob {
  const AttentionArgs* args;
  Failure* failure;
};

// The queries of one task and its memory.
struct QueryBlock : Queries {
  char* query;  // [kQueriesOfTask, steps], padded with zeros
  char* grad_output;
  float* shift;  // logsumexp, delta: [kQueriesOfTask]
  float* delta;
  uint32_t* keys;  // panels of kScoreColumns
  uint32_t* values;
  void* rows_buffer;
  float* scores;  // [kScoreRows, kScoreColumns]
  float* products;
};

// One row of p and ds for columns that the row sees.
struct ScoreRow {
  const float* scores;
  const float* products;
  const float* bias;  // mask - logsumexp, [kScoreColumns]; null: -shift
  float shift;
  float delta;
  float scale;
};

template <class Out>
static inline void finish_vector(const ScoreRow& row, int64_t at, Out* p, Out* ds) {
  const F32 scale = broadcast(row.scale);
  const F32 bias = row.bias == nullptr ? broadcast(-row.shift) : load(row.bias + at);
  const F32 weight = exponential(fma(load(row.scores + at), scale, bias));
  store_normal(p, weight);
  store_normal(ds, mul(mul(weight, scale), sub(load(row.products + at), broadcast(row.delta))));
}

template <class Out>
static void finish_row(const ScoreRow& row, int64_t count, Out* p, Out* ds) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) finish_vector(row, i, p + i, ds + i);
  if (i == count) return;
  alignas(64) Out tail[2][kLanes];
  finish_vector(row, i, tail[0], tail[1]);
  memcpy(static_cast<void*>(p + i), tail[0], static_cast<size_t>(count - i) * sizeof(Out));
  memcpy(static_cast<void*>(ds + i), tail[1], static_cast<size_t>(count - i) * sizeof(Out));
}

// Rows `first` to `last` of the block by columns from `column` on.
template <class Step, class Out>
static void finish_tile(const AttentionArgs& args, const QueryBlock& block, int64_t first, int64_t last,
                        int64_t column) {
  const int64_t width = smaller(kScoreColumns, args.cols - column);
  alignas(64) float bias[kScoreColumns];
  const int64_t head_row = (block.batch * args.heads + block.head) * args.rows + block.first;
  for (int64_t row = first; row < last; ++row) {
    Out* p = static_cast<Out*>(args.p) + (head_row + row) * args.cols + column;
    Out* ds = static_cast<Out*>(args.ds) + (head_row + row) * args.cols + column;
    const int64_t seen = larger(0, smaller(width, visible_columns(args, block.first + row) - column));
    const float shift = block.shift[row];
    const int64_t count = bits_of(shift) == kMinusInfinity ? 0 : seen;  // a query that saw nothing
    if (count > 0) {
      if (args.mask.data != nullptr) load_bias(args, block, row, column, count, shift, bias);
      const int64_t at = (row - first) * kScoreColumns;
      finish_row(ScoreRow{block.scores + at, block.products + at, args.mask.data == nullptr ? nullptr : bias, shift,
                          block.delta[row], args.scale},
                 count, p, ds);
    }
    zero_columns(p, count, width);
    zero_columns(ds, count, width);
  }
}

static float dot_of_rows(const void* a, int64_t a_start, const void* b, int64_t b_start, DType dtype, int64_t count) {
  alignas(64) float left[kMaxHeadDepth], right[kMaxHeadDepth];
  load_floats(a, dtype, a_start, count, left);
  load_floats(b, dtype, b_start, count, right);
  for (int64_t i = count; i % kLanes != 0; ++i) left[i] = right[i] = 0.0F;
  F32 total = zero();
  for (int64_t i = 0; i < count; i += kLanes) total = fma(load(left + i), load(right + i), total);
  return sum(total);
}

template <class Step>
static bool open_block(const AttentionJob& job, int64_t index, QueryBlock* block) {
  const AttentionArgs& args = *job.args;
  static_cast<Queries&>(*block) = queries_of_task(args, index);
  const int64_t query_row = padded_steps<Step>(args.depth) * 4, value_row = padded_steps<Step>(args.value_depth) * 4;
  const int64_t padded = divide_up(kQueriesOfTask, kScoreRows) * kScoreRows;
  const int64_t inputs = padded * (query_row + value_row);
  const int64_t panels = kScoreColumns * (query_row + value_row);
  const int64_t buffer = static_cast<int64_t>(pack_buffer_bytes<Step>());
  const int64_t sums = 2 * kScoreRows * kScoreColumns * static_cast<int64_t>(sizeof(float));
  const int64_t rows = 2 * kQueriesOfTask * static_cast<int64_t>(sizeof(float));
  block->query = static_cast<char*>(scratch(Slot::inputs, static_cast<size_t>(inputs)));
  block->keys = static_cast<uint32_t*>(scratch(Slot::panel, static_cast<size_t>(panels)));
  block->rows_buffer = scratch(Slot::rows, static_cast<size_t>(buffer));
  block->scores = static_cast<float*>(scratch(Slot::accumulators, static_cast<size_t>(sums)));
  block->shift = static_cast<float*>(scratch(Slot::sums, static_cast<size_t>(rows)));
  if (block->query == nullptr || block->keys == nullptr || block->rows_buffer == nullptr || block->scores == nullptr ||
      block->shift == nullptr) {
    job.failure->report_memory(inputs + panels + buffer + sums + rows);
    return false;
  }
  block->grad_output = block->query + padded * query_row;
  block->values = block->keys + kScoreColumns * query_row / 4;
  block->products = block->scores + kScoreRows * kScoreColumns;
  block->delta = block->shift + kQueriesOfTask;

  const char* output = head_of(args.output, args.dtype, block->batch, block->head);
  const char* grad = head_of(args.grad_output, args.dtype, block->batch, block->head);
  const float* shift = static_cast<const float*>(args.logsumexp.data) + block->batch * args.logsumexp.batch_stride +
                       block->head * args.logsumexp.head_stride;
  for (int64_t row = 0; row < block->rows; ++row) {
    const int64_t at = block->first + row;
    block->shift[row] = shift[at * args.logsumexp.row_stride];
    block->delta[row] = dot_of_rows(output, at * args.output.row_stride, grad, at * args.grad_output.row_stride,
                                    args.dtype, args.value_depth);
  }
  copy_rows<Step>({head_of(args.query, args.dtype, block->batch, block->head), args.dtype, args.query.row_stride},
                  block->first, block->rows, args.depth, block->query);
  copy_rows<Step>({grad, args.dtype, args.grad_output.row_stride}, block->first, block->rows, args.value_depth,
                  block->grad_output);
  return true;
}

template <class Step, class Out>
static void attention_task(void* context, int64_t index) {
  using Element = typename Step::Element;
  const AttentionJob& job = *static_cast<const AttentionJob*>(context);
  const AttentionArgs& args = *job.args;
  QueryBlock block;
  if (!open_block<Step>(job, index, &block)) return;
  const int64_t group = block.head / args.group;
  const DenseRows keys{head_of(args.key, args.dtype, block.batch, group), args.dtype, args.key.row_stride};
  const DenseRows values{head_of(args.value, args.dtype, block.batch, group), args.dtype, args.value.row_stride};
  const int64_t query_row = padded_steps<Step>(args.depth) * 4, value_row = padded_steps<Step>(args.value_depth) * 4;
  const int64_t steps = steps_of(args.depth, Step::kIndices), value_steps = steps_of(args.value_depth, Step::kIndices);
  const int64_t seen = visible_columns(args, block.first + block.rows - 1);
  Element* buffer = static_cast<Element*>(block.rows_buffer);
#ifdef NYBBLE_AMX
  open_tiles();
#endif
  for (int64_t column = 0; column < args.cols; column += kScoreColumns) {
    const int64_t width = smaller(kScoreColumns, args.cols - column);
    if (column < seen) {
      pack_transposed<Step>(keys, column, width, 0, args.depth, buffer, block.keys);
      pack_transposed<Step>(values, column, width, 0, args.value_depth, buffer, block.values);
      // The strips behind the last column, which are not packed, are multiplied like the rest.
      const int64_t packed = strips_of(width);
      memset(block.keys + packed * query_row / 4, 0, static_cast<size_t>((kScoreColumns - packed) * query_row));
      memset(block.values + packed * value_row / 4, 0, static_cast<size_t>((kScoreColumns - packed) * value_row));
    }
    for (int64_t row = 0; row < block.rows; row += kScoreRows) {
      const int64_t last = smaller(row + kScoreRows, block.rows);
      if (column < visible_columns(args, block.first + last - 1)) {
        multiply_scores(Step{}, block.query + row * query_row, query_row, last - row, block.keys, steps, block.scores);
        multiply_scores(Step{}, block.grad_output + row * value_row, value_row, last - row, block.values, value_steps,
                        block.products);
      }
      finish_tile<Step, Out>(args, block, row, last, column);
    }
  }
#ifdef NYBBLE_AMX
  close_tiles();
#endif
}

template <class Step>
static Task attention_task_for(DType out) {
  switch (out) {
    case DType::f16:
      return attention_task<Step, F16>;
    case DType::bf16:
      return attention_task<Step, Bf16>;
    default:
      return attention_task<Step, float>;
  }
}

static Status attention_scores_grad(const AttentionArgs& args) {
  if (args.rows == 0 || args.cols == 0) return success();
  Failure failure;
  AttentionJob job{&args, &failure};
  Task task = attention_task_for<StepF32>(args.out_dtype);
#ifdef NYBBLE_BF16_DOT
  if (args.dtype == DType::bf16) task = attention_task_for<StepBf16>(args.out_dtype);
#endif
  parallel_for(args.threads, args.batches * args.heads * tasks_of_head(args), task, &job);
  return failure.status();
}
