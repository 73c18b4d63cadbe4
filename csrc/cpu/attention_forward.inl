// Attention's forward pass: softmax(scale q k^T + mask) v for a block of queries, keys taken kScoreColumns at a time
// (the running softmax of arXiv 2205.14135).
//
//   for a block of keys that some query of the task sees:
//     transpose keys and arrange values into panels, as for a linear layer
//     for kScoreRows queries:
//       scores in the first-level cache; with m the largest so far, p = exp(score - m), sum += p
//       out += p . values, out and sum having been multiplied by exp(m before - m)
//   out / sum, m + log(sum)
//
// Scores, sums and out are fp32; p is rounded to what is multiplied. One task writes a row, keys in ascending order, so
// neither the thread count nor the tiling changes a bit.

struct AttentionForwardJob {
  const AttentionForwardArgs* args;
  Failure* failure;
};

struct ForwardBlock : Queries {
  char* query;       // [kQueriesOfTask, steps], padded with zeros
  uint32_t* keys;    // panel of kScoreColumns
  uint32_t* values;  // panel of all columns of the values
  void* rows_buffer;
  float* scores;  // [kScoreRows, kScoreColumns]
  void* weights;  // likewise, in the multiplication's type
  float* out;     // [kQueriesOfTask, strips_of(value_depth)]
  float* most;    // the largest score so far, -infinity before there is one: [kQueriesOfTask]
  float* sums;
};

template <class Step>
static bool open_forward(const AttentionForwardJob& job, int64_t index, ForwardBlock* block) {
  using Element = typename Step::Element;
  const AttentionForwardArgs& args = *job.args;
  static_cast<Queries&>(*block) = queries_of_task(args, index);
  constexpr int64_t kElement = sizeof(Element), kFloat = sizeof(float), kScores = kScoreRows * kScoreColumns;
  constexpr int64_t kPadded = (kQueriesOfTask + kScoreRows - 1) / kScoreRows * kScoreRows;
  const int64_t columns = strips_of(args.value_depth);
  const int64_t query = kPadded * padded_steps<Step>(args.depth) * 4;
  const int64_t keys = kScoreColumns * padded_steps<Step>(args.depth) * 4;
  const int64_t values = padded_steps<Step>(kScoreColumns) * columns * 4;
  const int64_t buffer = static_cast<int64_t>(pack_buffer_bytes<Step>());
  const int64_t sums = kScores * (kFloat + kElement) + kQueriesOfTask * columns * kFloat;
  const int64_t rows = 2 * kQueriesOfTask * kFloat;
  block->query = static_cast<char*>(scratch(Slot::inputs, static_cast<size_t>(query)));
  block->keys = static_cast<uint32_t*>(scratch(Slot::panel, static_cast<size_t>(keys + values)));
  block->rows_buffer = scratch(Slot::rows, static_cast<size_t>(buffer));
  block->scores = static_cast<float*>(scratch(Slot::accumulators, static_cast<size_t>(sums)));
  block->most = static_cast<float*>(scratch(Slot::sums, static_cast<size_t>(rows)));
  if (block->query == nullptr || block->keys == nullptr || block->rows_buffer == nullptr || block->scores == nullptr ||
      block->most == nullptr) {
    job.failure->report_memory(query + keys + values + buffer + sums + rows);
    return false;
  }
  block->values = block->keys + keys / 4;
  block->out = block->scores + kScores;
  block->weights = block->out + kQueriesOfTask * columns;
  block->sums = block->most + kQueriesOfTask;
  for (int64_t row = 0; row < block->rows; ++row) {
    block->most[row] = float_of(kMinusInfinity);
    block->sums[row] = 0.0F;
  }
  memset(block->out, 0, static_cast<size_t>(block->rows * columns * kFloat));
  copy_rows<Step>({head_of(args.query, args.dtype, block->batch, block->head), args.dtype, args.query.row_stride},
                  block->first, block->rows, args.depth, block->query);
  return true;
}

// Keys and values `column` on, as panels. Behind the last one there are zeros.
template <class Step>
static void pack_keys_and_values(const AttentionInputs& args, const ForwardBlock& block, int64_t column,
                                 int64_t width) {
  auto* buffer = static_cast<typename Step::Element*>(block.rows_buffer);
  const int64_t group = block.head / args.group;
  const DenseRows keys{head_of(args.key, args.dtype, block.batch, group), args.dtype, args.key.row_stride};
  const DenseRows values{head_of(args.value, args.dtype, block.batch, group), args.dtype, args.value.row_stride};
  const int64_t row = padded_steps<Step>(args.depth) * 4;
  pack_transposed<Step>(keys, column, width, 0, args.depth, buffer, block.keys);
  const int64_t packed = strips_of(width);
  memset(block.keys + packed * row / 4, 0, static_cast<size_t>((kScoreColumns - packed) * row));
  const int64_t padded = divide_up(steps_of(width, Step::kIndices), kLanes) * kLanes;
  for (int64_t at = 0; at < args.value_depth; at += kGradColumns) {
    pack_straight<Step>(values, column, width, at, smaller(kGradColumns, args.value_depth - at), buffer,
                        block.values + at * padded);
  }
}

// One row of scores, `count` of them, scaled and masked; up to a whole vector there are -infinities behind them.
// Returns the largest of them and `most`.
static inline float scale_row(float* scores, int64_t count, float scale, const float* bias, float most) {
  const F32 by = broadcast(scale);
  for (int64_t j = 0; j < count; j += kLanes) {
    const F32 score = mul(load(scores + j), by);
    store(scores + j, bias != nullptr ? add(score, load(bias + j)) : score);
  }
  for (int64_t j = count; j % kLanes != 0; ++j) scores[j] = float_of(kMinusInfinity);
  F32 largest_yet = broadcast(most);
  for (int64_t j = 0; j < count; j += kLanes) largest_yet = maximum(load(scores + j), largest_yet);
  return largest(largest_yet);
}

// Weights exp(score - shift) and zeros behind them; returns their sum.
template <class Element>
static inline float weigh_row(const float* scores, int64_t count, float shift, Element* weights) {
  F32 total = zero();
  for (int64_t j = 0; j < count; j += kLanes) {
    const F32 weight = exponential(sub(load(scores + j), broadcast(shift)));
    total = add(total, weight);
    store_normal(weights + j, weight);
  }
  zero_columns(weights, divide_up(count, kLanes) * kLanes, kScoreColumns);
  return sum(total);
}

// Queries `first` to `last` of the block, kScoreRows at most, and the keys in its panels. Row by row a maximum, an
// exponential and a sum would wait for each other, so every step is taken for all rows.
template <class Step>
static void attend(const AttentionInputs& args, const ForwardBlock& block, int64_t first, int64_t last, int64_t column,
                   int64_t width) {
  using Element = typename Step::Element;
  constexpr int64_t kRows = (kScoreRows + kLanes - 1) / kLanes * kLanes;
  alignas(64) float bias[kScoreColumns], shifts[kRows] = {}, factors[kRows] = {};
  int64_t seen[kScoreRows];
  const int64_t query_row = padded_steps<Step>(args.depth) * 4;
  const int64_t columns = strips_of(args.value_depth), rows = last - first;
  multiply_scores(Step{}, block.query + first * query_row, query_row, rows, block.keys,
                  steps_of(args.depth, Step::kIndices), block.scores);
  const bool masked = args.mask.data != nullptr;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = first + i;
    seen[i] = larger(0, smaller(width, visible_columns(args, block.first + row) - column));
    if (masked) load_bias(args, block, row, column, seen[i], 0.0F, bias);
    const float before = block.most[row];
    const float now = scale_row(block.scores + i * kScoreColumns, seen[i], args.scale, masked ? bias : nullptr, before);
    shifts[i] = bits_of(now) == kMinusInfinity ? 0.0F : now;  // -infinity less itself would be NaN
    factors[i] = before - shifts[i];
    block.most[row] = now;
  }
  for (int64_t i = 0; i < rows; i += kLanes) store(factors + i, exponential(load(factors + i)));
  auto* weights = static_cast<Element*>(block.weights);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = first + i, at = i * kScoreColumns;
    const float total = weigh_row(block.scores + at, seen[i], shifts[i], weights + at);
    block.sums[row] = block.sums[row] * factors[i] + total;
    if (factors[i] == 1.0F) continue;
    float* out = block.out + row * columns;
    for (int64_t j = 0; j < columns; j += kLanes) store(out + j, mul(load(out + j), broadcast(factors[i])));
  }
  multiply<Step>(reinterpret_cast<const char*>(weights), kScoreColumns * static_cast<int64_t>(sizeof(Element)), rows,
                 block.values, steps_of(width, Step::kIndices), columns, block.out + first * columns);
}

static void finish_queries(const AttentionForwardArgs& args, const ForwardBlock& block) {
  const int64_t columns = strips_of(args.value_depth);
  void* to = const_cast<char*>(head_of(args.output, args.dtype, block.batch, block.head));
  float* logsumexp = args.logsumexp + (block.batch * args.heads + block.head) * args.rows + block.first;
  for (int64_t row = 0; row < block.rows; ++row) {
    float* out = block.out + row * columns;
    const float total = block.sums[row];
    const bool blind = total == 0.0F;  // all keys hidden; a largest score that is there has weight 1
    logsumexp[row] = blind ? float_of(kMinusInfinity) : block.most[row] + logf(total);
    const F32 by = broadcast(blind ? 0.0F : 1.0F / total);
    for (int64_t j = 0; j < columns; j += kLanes) store(out + j, mul(load(out + j), by));
    store_results(out, args.value_depth, args.dtype, to, (block.first + row) * args.output.row_stride);
  }
}

template <class Step>
static void attention_forward_task(void* context, int64_t index) {
  const AttentionForwardJob& job = *static_cast<const AttentionForwardJob*>(context);
  const AttentionForwardArgs& args = *job.args;
  ForwardBlock block;
  if (!open_forward<Step>(job, index, &block)) return;
  const int64_t seen = visible_columns(args, block.first + block.rows - 1);
#ifdef NYBBLE_AMX
  open_tiles();
#endif
  for (int64_t column = 0; column < seen; column += kScoreColumns) {
    const int64_t width = smaller(kScoreColumns, args.cols - column);
    pack_keys_and_values<Step>(args, block, column, width);
    for (int64_t row = 0; row < block.rows; row += kScoreRows) {
      const int64_t last = smaller(row + kScoreRows, block.rows);
      if (column < visible_columns(args, block.first + last - 1)) attend<Step>(args, block, row, last, column, width);
    }
  }
#ifdef NYBBLE_AMX
  close_tiles();
#endif
  finish_queries(args, block);
}

static Status attention_forward(const AttentionForwardArgs& args) {
  if (args.rows == 0) return success();
  Failure failure;
  AttentionForwardJob job{&args, &failure};
  Task task = attention_forward_task<StepF32>;
#ifdef NYBBLE_BF16_DOT
  if (args.dtype == DType::bf16) task = attention_forward_task<StepBf16>;
#endif
  parallel_for(args.threads, args.batches * args.heads * tasks_of_head(args), task, &job);
  return failure.status();
}
