// What attention's forward and backward pass share: where heads lie, which keys a query sees, and the product of a few
// queries with a block of keys, which comes out of the same panels as a linear layer's.

constexpr int64_t kScoreColumns = kForwardColumns;
constexpr int64_t kQueriesOfTask = 128;  // share one transposition of keys and values
#ifdef NYBBLE_AMX
constexpr int64_t kScoreRows = kTileSide;
#else
constexpr int64_t kScoreRows = 4 * kTileRows;
#endif

constexpr uint32_t kMinusInfinity = 0xFF800000U;

// Which queries a task takes: some of one head.
struct Queries {
  int64_t batch, head, first, rows;
};

static inline int64_t tasks_of_head(const AttentionInputs& args) { return divide_up(args.rows, kQueriesOfTask); }

static inline Queries queries_of_task(const AttentionInputs& args, int64_t index) {
  const int64_t tasks = tasks_of_head(args);
  const int64_t head = index / tasks;
  // The last queries first: under a diagonal they see most, and what is left at the end should be small.
  const int64_t first = (tasks - 1 - index % tasks) * kQueriesOfTask;
  return {head / args.heads, head % args.heads, first, smaller(kQueriesOfTask, args.rows - first)};
}

static inline const char* head_of(const AttentionTensor& x, DType dtype, int64_t batch, int64_t head) {
  return static_cast<const char*>(x.data) + (batch * x.batch_stride + head * x.head_stride) * size_of(dtype);
}

template <class Step>
static int64_t padded_steps(int64_t depth) {
  return divide_up(steps_of(depth, Step::kIndices), kLanes) * kLanes;
}

#ifdef NYBBLE_AMX
// sums[16, 64] = x . panel; a strip's step is a row of four tiles.
static void multiply_strip(const char* x, int64_t x_stride, const uint32_t* strip, int64_t steps, float* sums) {
  static_assert(kStrip == 4 * kTileSide && kScoreColumns == kStrip, "a strip is four tiles wide");
  constexpr int64_t kRow = kStrip * 4;
  tile_fence();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; step += kTileSide, strip += kTileSide * kStrip, x += 64) {
    _tile_loadd(4, x, x_stride);
    _tile_loadd(6, strip, kRow);
    _tile_loadd(7, strip + kTileSide, kRow);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(6, strip + 2 * kTileSide, kRow);
    _tile_loadd(7, strip + 3 * kTileSide, kRow);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 4, 7);
  }
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + kTileSide, kRow);
  _tile_stored(2, sums + 2 * kTileSide, kRow);
  _tile_stored(3, sums + 3 * kTileSide, kRow);
  tile_fence();
}

static inline void multiply_scores(StepBf16, const char* x, int64_t x_stride, int64_t, const uint32_t* panel,
                                   int64_t steps, float* sums) {
  multiply_strip(x, x_stride, panel, divide_up(steps, kLanes) * kLanes, sums);
}
#endif

template <class Step>
static void multiply_scores(Step, const char* x, int64_t x_stride, int64_t rows, const uint32_t* panel, int64_t steps,
                            float* sums) {
  memset(sums, 0, static_cast<size_t>(rows * kScoreColumns) * sizeof(float));
  multiply<Step>(x, x_stride, rows, panel, steps, kScoreColumns, sums);
}

// By vectors: GCC makes a string instruction of a short memset, which takes some 30 ns to start.
template <class Out>
static inline void zero_columns(Out* row, int64_t from, int64_t to) {
  for (; from + kLanes <= to; from += kLanes) store(row + from, zero());
  for (; from < to; ++from) from_float(0.0F, row + from);
}

// Columns that a row sees: all, or under the diagonal.
static inline int64_t visible_columns(const AttentionInputs& args, int64_t row) {
  return larger(0, smaller(args.cols, row + args.diagonal + 1));
}

// The mask of `count` columns of a row as what is added to the scores, less the row's shift.
static void load_bias(const AttentionInputs& args, const Queries& block, int64_t row, int64_t column, int64_t count,
                      float shift, float* bias) {
  const AttentionTensor& mask = args.mask;
  const int64_t start =
      block.batch * mask.batch_stride + block.head * mask.head_stride + (block.first + row) * mask.row_stride + column;
  if (args.mask_is_boolean) {
    const uint8_t* seen = static_cast<const uint8_t*>(mask.data) + start;
    for (int64_t j = 0; j < count; ++j) bias[j] = seen[j] != 0 ? -shift : float_of(kMinusInfinity);
  } else {
    load_floats(mask.data, args.mask_dtype, start, count, bias);
    for (int64_t j = 0; j < count; ++j) bias[j] -= shift;
  }
  for (int64_t j = count; j < kScoreColumns; ++j) bias[j] = 0.0F;
}

// Rows of a head into memory that the multiplication reads, zeros around them.
template <class Step>
static void copy_rows(const DenseRows& from, int64_t first, int64_t rows, int64_t depth, char* to) {
  using Element = typename Step::Element;
  const int64_t stride = padded_steps<Step>(depth) * Step::kIndices;
  const int64_t padded = divide_up(rows, kScoreRows) * kScoreRows;
  for (int64_t row = 0; row < padded; ++row) {
    Element* out = reinterpret_cast<Element*>(to) + row * stride;
    if (row < rows) from.row(first + row, 0, depth, out);
    const int64_t filled = row < rows ? depth : 0;
    memset(static_cast<void*>(out + filled), 0, static_cast<size_t>(stride - filled) * sizeof(Element));
  }
}
