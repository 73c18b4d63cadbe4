// The small-M forward: lanes along the contraction, a few rows of W at once, nothing written but the outputs. Bound by
// reading the weight or by decoding it, so each packed byte is read once and decoded in registers.
//
// 4 bit: a register of packed bytes is kLanes words of eight elements, and lookups see only an index's low four bits,
// so a shift and a lookup decode an element of every word. x is held as fp32 in that order, arranged once per call. A
// word must lie in one block: in_features is a multiple of 8. The block's scale is applied to the sum of a word's
// products, once for 8 weights; for any number of rows of x, so that a row's bits do not depend on its neighbours.
//
// The rows that are decoded together lie far apart, so that each is a long stream of its own for the prefetchers.

constexpr int64_t kRowsOfStrip = 64;  // rows of W in a task
constexpr int kSmallM = 8;
constexpr int64_t kWord = 8;               // elements of a word
constexpr int64_t kUnit = kWord * kLanes;  // elements of a register
constexpr int64_t kMostSegment = 4096;
constexpr int64_t kScales = kMostSegment / kMinBlock + 1 + kLanes;
constexpr int64_t kPrefetch = 512;  // bytes ahead in a row of W

// Columns of W that all rows of a task are multiplied with before the next: their part of x stays in L1.
constexpr int64_t segment_for(int m) { return m <= 2 ? kMostSegment : 2 * kMostSegment / m; }
// Rows of W at once: their sums stay in registers.
constexpr int rows_together(int m) {
  return kSmallSums / m < 1 ? 1 : kSmallSums / m < kSmallRows ? kSmallSums / m : kSmallRows;
}

static_assert(segment_for(kSmallM) % kUnit == 0, "a segment is whole registers");

struct SmallJob {
  const LinearArgs* args;
  const float* x;     // 4-bit: [unit][element of a word][m][lane]; int8: [m][cols]
  const float* side;  // [m][rank], null without side path
  bool scale_first;   // x is so large or so small that products with the bare codes would leave fp32's range
};

// ---- 4 bit ----------------------------------------------------------------------------------------------------------

// sums[row * M + m] (+)= the products of one element of every word of `Rows` rows of W with M rows of x.
template <int Rows, int M, int Element, bool ScaleFirst>
static NYBBLE_INLINE void multiply_element(const Table& codes, const I32* words, const F32* scales, const float* x,
                                           F32* sums) {
  F32 weights[Rows];
  for (int r = 0; r < Rows; ++r) {
    weights[r] = lookup(codes, shift_right<4 * Element>(words[r]));
    if (ScaleFirst) weights[r] = mul(weights[r], scales[r]);
  }
  for (int m = 0; m < M; ++m) {
    const F32 values = load(x + (Element * M + m) * kLanes);
    for (int r = 0; r < Rows; ++r) {
      F32* to = sums + r * M + m;
      *to = Element == 0 && !ScaleFirst ? mul(weights[r], values) : fma(weights[r], values, *to);
    }
  }
}

template <int Rows, int M, bool ScaleFirst>
static NYBBLE_INLINE void multiply_words(const Table& codes, const I32* words, const F32* scales, const float* x,
                                         F32* sums) {
  F32 products[Rows * M];
  F32* to = ScaleFirst ? sums : products;
  // All low nibbles, then all high ones: what lookups of either share need not be held beside the other's.
  multiply_element<Rows, M, 0, ScaleFirst>(codes, words, scales, x, to);
  multiply_element<Rows, M, 2, ScaleFirst>(codes, words, scales, x, to);
  multiply_element<Rows, M, 4, ScaleFirst>(codes, words, scales, x, to);
  multiply_element<Rows, M, 6, ScaleFirst>(codes, words, scales, x, to);
  multiply_element<Rows, M, 1, ScaleFirst>(codes, words, scales, x, to);
  multiply_element<Rows, M, 3, ScaleFirst>(codes, words, scales, x, to);
  multiply_element<Rows, M, 5, ScaleFirst>(codes, words, scales, x, to);
  multiply_element<Rows, M, 7, ScaleFirst>(codes, words, scales, x, to);
  for (int r = 0; r < Rows && !ScaleFirst; ++r) {
    for (int m = 0; m < M; ++m) sums[r * M + m] = fma(products[r * M + m], scales[r], sums[r * M + m]);
  }
}

// The block of every lane's word, counted from the block of an element that lies `offset` elements into its own.
static inline I32 blocks_of_lanes(int64_t offset, int shift) {
  alignas(64) uint32_t blocks[kLanes];
  for (int i = 0; i < kLanes; ++i) blocks[i] = static_cast<uint32_t>((offset + i * kWord) >> shift);
  return load_words(reinterpret_cast<const uint8_t*>(blocks));
}

// The columns [first, first + width) of W that rows are multiplied with before the next columns are.
struct Segment {
  int64_t first;
  int64_t width;
};

// A row's part in a segment: where its bytes lie, its scales, and how far into a block it begins.
struct RowPart {
  alignas(64) float scales[kScales];
  const uint8_t* packed;
  int64_t offset;
};

static inline void open_row(const Weight& weight, int64_t row, Segment segment, RowPart* part) {
  const Packed4& source = weight.packed4;
  const int shift = source.block_shift;
  const int64_t start = row * weight.cols + segment.first;
  const int64_t block = start >> shift;
  const int64_t blocks = ((start + segment.width - 1) >> shift) - block + 1;
  part->packed = source.packed + start / 2;
  part->offset = start - (block << shift);
  prefetch(source.scales.address(block + (weight.cols >> shift)));  // the next row's
  load_scales(source.scales, block, blocks, part->scales);
  for (int i = 0; i < kLanes; ++i) part->scales[blocks + i] = 0.0F;  // lanes behind the last block read these
}

// sums += the products of a register of every row, from column `at` of the segment on. `Aligned`: blocks begin where
// the rows begin, so one vector of blocks serves everywhere.
template <int Rows, int M, bool ScaleFirst, bool Aligned>
static NYBBLE_INLINE void multiply_unit(const Table& codes, const RowPart* parts, const uint8_t* const* bytes,
                                        int64_t at, int shift, I32 aligned_blocks, const float* x, F32* sums) {
  I32 words[Rows];
  F32 scales[Rows];
  for (int r = 0; r < Rows; ++r) {
    const int64_t place = at + parts[Aligned ? 0 : r].offset;
    const I32 blocks = Aligned ? aligned_blocks : blocks_of_lanes(place & ((int64_t{1} << shift) - 1), shift);
    scales[r] = spread(parts[r].scales + (place >> shift), blocks);
    words[r] = load_words(bytes[r]);
  }
  if (kRowAfterRow) {
    for (int r = 0; r < Rows; ++r) {
      multiply_words<1, M, ScaleFirst>(codes, words + r, scales + r, x, sums + r * M);
    }
  } else {
    multiply_words<Rows, M, ScaleFirst>(codes, words, scales, x, sums);
  }
}

// Rows `first`, first + step, ... of W: partial[r * partial_step + m * kLanes] += their products, lane by lane.
template <int Rows, int M, bool ScaleFirst, bool Aligned>
static NYBBLE_INLINE void multiply_rows(const SmallJob& job, int64_t first, int64_t step, Segment segment,
                                        float* partial, int64_t partial_step) {
  const Weight& weight = job.args->weight;
  const int shift = weight.packed4.block_shift;
  const Table codes = load_table(weight.packed4.codebook);
  const I32 aligned_blocks = blocks_of_lanes(0, shift);
  RowPart parts[Rows];
  const uint8_t* bytes[Rows];
  F32 sums[Rows * M];
  for (int r = 0; r < Rows; ++r) {
    open_row(weight, first + r * step, segment, parts + r);
    bytes[r] = parts[r].packed;
    for (int m = 0; m < M; ++m) {
      sums[r * M + m] = segment.first == 0 ? zero() : load(partial + r * partial_step + m * kLanes);
    }
  }
  const int64_t whole = segment.width / kUnit * kUnit;
  const float* x = job.x + segment.first * M;
  for (int64_t at = 0; at < whole; at += kUnit, x += kUnit * M) {
    // Behind the segment's end comes the next row's.
    const int64_t next =
        at / 2 + kPrefetch < segment.width / 2 ? kPrefetch : kPrefetch + (weight.cols - segment.width) / 2;
    for (int r = 0; r < Rows; ++r) prefetch_near(bytes[r] + next);
    multiply_unit<Rows, M, ScaleFirst, Aligned>(codes, parts, bytes, at, shift, aligned_blocks, x, sums);
    for (int r = 0; r < Rows; ++r) bytes[r] += kUnit / 2;
  }
  if (whole < segment.width) {
    alignas(64) uint8_t rest[Rows][kUnit / 2] = {};
    for (int r = 0; r < Rows; ++r) {
      memcpy(rest[r], bytes[r], static_cast<size_t>((segment.width - whole) / 2));
      bytes[r] = rest[r];
    }
    multiply_unit<Rows, M, ScaleFirst, Aligned>(codes, parts, bytes, whole, shift, aligned_blocks, x, sums);
  }
  for (int r = 0; r < Rows; ++r) {
    for (int m = 0; m < M; ++m) store(partial + r * partial_step + m * kLanes, sums[r * M + m]);
  }
}

// Rows [first, first + Rows * step) of W; partial: [row][m][lane].
template <int Rows, int M, bool ScaleFirst, bool Aligned>
static void packed_rows_as(const SmallJob& job, int64_t first, int64_t step, Segment segment, float* partial) {
  constexpr int64_t kOfRow = M * kLanes;
  for (int64_t row = 0; row < step; ++row) {
    multiply_rows<Rows, M, ScaleFirst, Aligned>(job, first + row, step, segment, partial + row * kOfRow, step * kOfRow);
  }
}

template <int Rows, int M>
static void packed_rows(const SmallJob& job, int64_t first, int64_t step, Segment segment, float* partial) {
  const Weight& weight = job.args->weight;
  const bool aligned = weight.cols % weight.packed4.block_size() == 0;
  const auto multiply = job.scale_first
                            ? aligned ? packed_rows_as<Rows, M, true, true> : packed_rows_as<Rows, M, true, false>
                        : aligned ? packed_rows_as<Rows, M, false, true>
                                  : packed_rows_as<Rows, M, false, false>;
  multiply(job, first, step, segment, partial);
}

// out[m * kRowsOfStrip + r] = row first + r of W times row m of x, for `rows` rows.
template <int M>
static void multiply_packed(const SmallJob& job, int64_t first, int64_t rows, float* out) {
  constexpr int kTogether = rows_together(M);
  constexpr int64_t kOfRow = M * kLanes;
  alignas(64) float partial[kRowsOfStrip * kOfRow];
  const int64_t step = rows / kTogether;
  const int64_t rest = step * kTogether;
  const int64_t cols = job.args->weight.cols;
  if (cols == 0) memset(partial, 0, sizeof partial);
  for (int64_t column = 0; column < cols; column += segment_for(M)) {
    const Segment segment{column, smaller(segment_for(M), cols - column)};
    if (step > 0) packed_rows<kTogether, M>(job, first, step, segment, partial);
    if (rest < rows) packed_rows<1, M>(job, first + rest, rows - rest, segment, partial + rest * kOfRow);
  }
  for (int64_t row = 0; row < rows; ++row) {
    for (int m = 0; m < M; ++m) out[m * kRowsOfStrip + row] = sum(load(partial + row * kOfRow + m * kLanes));
  }
}

// ---- int8 -----------------------------------------------------------------------------------------------------------

// out[m * kRowsOfStrip + r * step] = row first + r * step of W times row m of x. The row's scale is applied to the
// sums, or to the weights where x is so large that sums of its products with bare integers would leave fp32's range.
template <int Rows, int M>
static void int8_rows(const SmallJob& job, int64_t first, int64_t step, float* out) {
  const Weight& weight = job.args->weight;
  const int64_t cols = weight.cols;
  const int8_t* q[Rows];
  float by[Rows], before[Rows];
  F32 sums[Rows * M];
  for (int r = 0; r < Rows; ++r) {
    q[r] = weight.rows8.q + (first + r * step) * cols;
    by[r] = weight.rows8.absmax[first + r * step] / 127.0F;
    before[r] = job.scale_first ? by[r] : 1.0F;
    for (int m = 0; m < M; ++m) sums[r * M + m] = zero();
  }
  int64_t i = 0;
  for (; i + kLanes <= cols; i += kLanes) {
    F32 weights[Rows];
    for (int r = 0; r < Rows; ++r) {
      if (i % 64 == 0) prefetch_near(q[r] + i + kPrefetch);
      weights[r] = load(q[r] + i);
      if (job.scale_first) weights[r] = mul(weights[r], broadcast(before[r]));
    }
    for (int m = 0; m < M; ++m) {
      const F32 values = load(job.x + m * cols + i);
      for (int r = 0; r < Rows; ++r) sums[r * M + m] = fma(weights[r], values, sums[r * M + m]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int m = 0; m < M; ++m) {
      float total = sum(sums[r * M + m]);
      for (int64_t j = i; j < cols; ++j) total += static_cast<float>(q[r][j]) * before[r] * job.x[m * cols + j];
      out[m * kRowsOfStrip + r * step] = job.scale_first ? total : total * by[r];
    }
  }
}

template <int M>
static void multiply_int8(const SmallJob& job, int64_t first, int64_t rows, float* out) {
  constexpr int kTogether = rows_together(M);
  const int64_t step = rows / kTogether;
  for (int64_t row = 0; row < step; ++row) int8_rows<kTogether, M>(job, first + row, step, out + row);
  for (int64_t row = step * kTogether; row < rows; ++row) int8_rows<1, M>(job, first + row, 1, out + row);
}

// ---- one task -------------------------------------------------------------------------------------------------------

static inline float dot(const float* a, const float* b, int64_t count) {
  F32 lanes = zero();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) lanes = fma(load(a + i), load(b + i), lanes);
  float result = sum(lanes);
  for (; i < count; ++i) result += a[i] * b[i];
  return result;
}

// out[m * kRowsOfStrip + r] += left[m] . right[first + r], whole rows of `right` converted together.
static void add_side(const SmallJob& job, int64_t first, int64_t rows, float* out) {
  const SidePath& side = job.args->side;
  constexpr int64_t kBuffer = 1024;
  alignas(64) float right[kBuffer];
  const int64_t together = larger(1, kBuffer / side.rank);
  for (int64_t row = 0; row < rows; row += together) {
    const int64_t here = smaller(together, rows - row);
    for (int64_t at = 0; at < side.rank; at += kBuffer) {
      const int64_t count = smaller(kBuffer, side.rank - at);
      load_floats(side.right, side.right_dtype, (first + row) * side.rank + at, here * count, right);
      for (int64_t m = 0; m < job.args->m; ++m) {
        for (int64_t r = 0; r < here; ++r) {
          out[m * kRowsOfStrip + row + r] += dot(job.side + m * side.rank + at, right + r * count, count);
        }
      }
    }
  }
}

template <int M>
static void small_m_task(void* context, int64_t index) {
  const SmallJob& job = *static_cast<const SmallJob*>(context);
  const LinearArgs& args = *job.args;
  const int64_t first = index * kRowsOfStrip;
  const int64_t rows = smaller(args.weight.rows - first, kRowsOfStrip);
  alignas(64) float out[M * kRowsOfStrip];
  if (args.weight.is_int8()) {
    multiply_int8<M>(job, first, rows, out);
  } else {
    multiply_packed<M>(job, first, rows, out);
  }
  if (args.side.rank > 0) add_side(job, first, rows, out);
  alignas(64) float bias[kRowsOfStrip];
  if (args.bias != nullptr) load_floats(args.bias, args.bias_dtype, first, rows, bias);
  for (int64_t m = 0; m < args.m; ++m) {
    float* values = out + m * kRowsOfStrip;
    if (args.bias != nullptr) {
      for (int64_t r = 0; r < rows; ++r) values[r] += bias[r];
    }
    store_floats(values, rows, args.dtype, args.out, m * args.weight.rows + first);
  }
}

// ---- x --------------------------------------------------------------------------------------------------------------

// kUnit elements of a row of x in the order in which words of packed elements decode; the next element of a word lies
// `padded` lanes further on.
static void arrange_unit(const float* from, int64_t padded, float* to) {
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    for (int64_t i = 0; i < kWord; ++i) to[(i ^ 1) * padded * kLanes + lane] = from[lane * kWord + i];
  }
}

// Rows up to `padded` and elements behind the end become zeros.
static void arrange_inputs(const LinearArgs& args, int64_t padded, float* to) {
  const int64_t cols = args.weight.cols;
  if (args.weight.is_int8()) {
    memset(to + args.m * cols, 0, static_cast<size_t>((padded - args.m) * cols) * sizeof(float));
    for (int64_t m = 0; m < args.m; ++m) load_floats(args.x, args.dtype, m * args.x_stride, cols, to + m * cols);
    return;
  }
  alignas(64) float values[kUnit];
  for (int64_t at = 0; at < cols; at += kUnit) {
    const int64_t count = smaller(kUnit, cols - at);
    for (int64_t m = 0; m < padded; ++m) {
      const int64_t have = m < args.m ? count : 0;
      if (have < kUnit) memset(values, 0, sizeof values);
      if (have > 0) load_floats(args.x, args.dtype, m * args.x_stride + at, have, values);
      arrange_unit(values, padded, to + at * padded + m * kLanes);
    }
  }
}

// Magnitudes of what x is multiplied with before it is scaled, and how many products are summed before that.
struct BareRange {
  float least, most;
  float terms;
};

static BareRange bare_range(const Weight& weight) {
  if (weight.is_int8()) return {1.0F, 128.0F, static_cast<float>(weight.cols)};
  BareRange range{1.0F, 0.0F, kWord};
  for (int i = 0; i < 16; ++i) {
    const float magnitude = float_of(bits_of(weight.packed4.codebook[i]) & 0x7FFFFFFFU);
    range.most = magnitude > range.most ? magnitude : range.most;
    range.least = magnitude > 0.0F && magnitude < range.least ? magnitude : range.least;
  }
  return range;
}

// Whether a product of an x with a bare weight, or a sum of those, can leave fp32's normal range.
static bool leaves_range(const float* x, int64_t count, BareRange range) {
  // Magnitudes compare as their bits do, and an infinity or a NaN is the largest. Zeros, which take no part, become
  // the largest by the wrap-around.
  uint32_t largest = 0, smallest = 0xFFFFFFFFU;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFFU;
    largest = magnitude > largest ? magnitude : largest;
    smallest = magnitude - 1U < smallest ? magnitude - 1U : smallest;
  }
  if (largest == 0) return false;
  constexpr float kLargest = 1.0e38F, kSmallest = 1.2e-38F;
  return largest >= kInfinity || !(float_of(largest) * range.most * range.terms < kLargest) ||
         float_of(smallest + 1U) * range.least < kSmallest;
}

static Status linear_small_m(const LinearArgs& args);

static const char* element_of(const void* data, DType dtype, int64_t index) {
  return static_cast<const char*>(data) + index * size_of(dtype);
}

// Every row as if it were alone: an extreme one does not change the others' bits.
static Status small_m_row_by_row(const LinearArgs& args) {
  for (int64_t m = 0; m < args.m; ++m) {
    LinearArgs row = args;
    row.m = 1;
    row.x = element_of(args.x, args.dtype, m * args.x_stride);
    row.out = static_cast<char*>(args.out) + m * args.weight.rows * size_of(args.dtype);
    if (args.side.rank > 0) row.side.left = element_of(args.side.left, args.side.left_dtype, m * args.side.rank);
    const Status status = linear_small_m(row);
    if (!status.ok()) return status;
  }
  return success();
}

static Status linear_small_m(const LinearArgs& args) {
  if (args.m == 0 || args.weight.rows == 0) return success();
  const int64_t cols = args.weight.cols;
  if (args.grad_input || args.m > kSmallM) return bad_argument("m", args.m);
  if (!args.weight.is_int8() && cols % kWord != 0) return bad_argument("in_features", cols);
  const int64_t padded = args.m <= 2 ? args.m : args.m <= 4 ? 4 : 8;
  const int64_t count = padded * (args.weight.is_int8() ? cols : divide_up(cols, kUnit) * kUnit);
  const int64_t bytes = count * 4;
  auto* x = static_cast<float*>(scratch(Slot::inputs, static_cast<size_t>(bytes)));
  if (x == nullptr) return out_of_memory(bytes);
  arrange_inputs(args, padded, x);
  const bool scale_first = leaves_range(x, count, bare_range(args.weight));
  if (scale_first && args.m > 1) return small_m_row_by_row(args);
  SmallJob job{&args, x, nullptr, scale_first};
  if (args.side.rank > 0) {
    Operand side;
    const Status status = prepare<StepF32>(args.side.left, args.side.left_dtype, args.m, args.side.rank, args.side.rank,
                                           Slot::side, 1, &side);
    if (!status.ok()) return status;
    job.side = reinterpret_cast<const float*>(side.data);
  }
  const int64_t tasks = divide_up(args.weight.rows, kRowsOfStrip);
  const auto task = padded == 1   ? small_m_task<1>
                    : padded == 2 ? small_m_task<2>
                    : padded == 4 ? small_m_task<4>
                                  : small_m_task<8>;
  parallel_for(args.threads, tasks, task, &job);
  return success();
}
