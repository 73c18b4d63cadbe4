// The small-M forward: lanes along the contraction, a few rows of W at once, nothing written but the outputs. Memory
// bound, so each packed byte is read once and decoded in registers.
//
// 4 bit: a register of packed bytes is kLanes words of eight elements, and lookups see only an index's low four bits,
// so a shift and a lookup decode an element of every word: 8 shifts, 8 lookups, 8 multiply-adds for 8 * kLanes weights.
// x is held as fp32 in that order, arranged once per call. A word must lie in one block: in_features is a multiple
// of 8. The block's scale is applied to the sum of a word's products, once for 8 weights.

constexpr int64_t kRowsOfStrip = 64;  // rows of W in a task
constexpr int kSmallM = 8;
constexpr int64_t kWord = 8;               // elements of a word
constexpr int64_t kUnit = kWord * kLanes;  // elements of a register
constexpr int64_t kSegment = 4096;         // elements of a row whose scales are decoded at a time
constexpr int64_t kScales = kSegment / kMinBlock + 1 + kLanes;

static_assert(kSegment % kMaxBlock == 0 && kSegment % kUnit == 0, "a segment is whole blocks and registers");

struct SmallJob {
  const LinearArgs* args;
  const float* x;     // 4-bit: [m][unit][element of a word][lane]; int8: [m][cols]
  int64_t stride;     // floats of a row of x
  const float* side;  // [m][rank], null without side path
  bool scale_first;   // x is so large or so small that products with the bare codes would leave fp32's range
};

// ---- 4 bit ----------------------------------------------------------------------------------------------------------

// sums += products of one element of every word with M rows of x.
template <int M, int Element, bool ScaleFirst>
static inline void multiply_element(const Table& codes, I32 words, const F32& scales, const float* x, int64_t stride,
                                    F32* sums) {
  F32 weight = lookup(codes, shift_right<4 * Element>(words));
  if (ScaleFirst) weight = mul(weight, scales);
  for (int m = 0; m < M; ++m) {
    const F32 values = load(x + m * stride + Element * kLanes);
    sums[m] = Element == 0 && !ScaleFirst ? mul(weight, values) : fma(weight, values, sums[m]);
  }
}

template <int M, bool ScaleFirst>
static inline void multiply_words(const Table& codes, I32 words, F32 scales, const float* x, int64_t stride,
                                  F32* sums) {
  F32 products[M];
  F32* to = ScaleFirst ? sums : products;
  multiply_element<M, 0, ScaleFirst>(codes, words, scales, x, stride, to);
  multiply_element<M, 1, ScaleFirst>(codes, words, scales, x, stride, to);
  multiply_element<M, 2, ScaleFirst>(codes, words, scales, x, stride, to);
  multiply_element<M, 3, ScaleFirst>(codes, words, scales, x, stride, to);
  multiply_element<M, 4, ScaleFirst>(codes, words, scales, x, stride, to);
  multiply_element<M, 5, ScaleFirst>(codes, words, scales, x, stride, to);
  multiply_element<M, 6, ScaleFirst>(codes, words, scales, x, stride, to);
  multiply_element<M, 7, ScaleFirst>(codes, words, scales, x, stride, to);
  for (int m = 0; m < M && !ScaleFirst; ++m) sums[m] = fma(products[m], scales, sums[m]);
}

// The block of every lane's word, counted from the one that holds flat element `start`'s segment.
static inline I32 blocks_of_lanes(int64_t offset, int shift) {
  alignas(64) uint32_t blocks[kLanes];
  for (int i = 0; i < kLanes; ++i) blocks[i] = static_cast<uint32_t>((offset + i * kWord) >> shift);
  return load_words(reinterpret_cast<const uint8_t*>(blocks));
}

// out[m * kRowsOfStrip + r] = row first + r of W times row m of x. `Aligned`: blocks begin where the rows begin.
template <int Rows, int M, bool ScaleFirst, bool Aligned>
static void multiply_packed_rows(const SmallJob& job, int64_t first, float* out) {
  const int64_t cols = job.args->weight.cols;
  const Packed4 source = job.args->weight.packed4;
  const int shift = source.block_shift;
  const int64_t row_bytes = cols / 2;
  const Table codes = load_table(source.codebook);
  const I32 aligned_blocks = blocks_of_lanes(0, shift);
  F32 sums[Rows][M];
  for (int r = 0; r < Rows; ++r) {
    for (int m = 0; m < M; ++m) sums[r][m] = zero();
  }
  alignas(64) float scales[Rows][kScales];
  alignas(64) uint8_t tail[Rows][kUnit / 2];
  for (int64_t segment = 0; segment < cols; segment += kSegment) {
    const int64_t width = smaller(kSegment, cols - segment);
    const int64_t whole = width / kUnit * kUnit;
    int64_t offset[Rows];  // of the segment in its first block
    for (int r = 0; r < Rows; ++r) {
      const int64_t start = (first + r) * cols + segment;
      const int64_t blocks = ((start + width - 1) >> shift) - (start >> shift) + 1;
      offset[r] = start - (start >> shift << shift);
      load_scales(source.scales, start >> shift, blocks, scales[r]);
      for (int i = 0; i < kLanes; ++i) scales[r][blocks + i] = 0.0F;
      if (whole < width) {
        memset(tail[r], 0, sizeof tail[r]);
        memcpy(tail[r], source.packed + (start + whole) / 2, static_cast<size_t>((width - whole) / 2));
      }
    }
    const uint8_t* packed = source.packed + (first * cols + segment) / 2;
    // The whole registers, then the rest of a row, from the buffer that fills it up with zeros.
    for (int64_t at = 0; at < width; at += kUnit) {
      const bool in_place = at < whole;
      const float* x = job.x + segment + at;
      for (int r = 0; r < Rows; ++r) {
        const uint8_t* from = in_place ? packed + r * row_bytes + at / 2 : tail[r];
        // The same place of the next group of rows: it is wanted when this group is done.
        prefetch(packed + (r + Rows) * row_bytes + at / 2);
        const int64_t place = Aligned ? at : at + offset[r];
        const I32 blocks = Aligned ? aligned_blocks : blocks_of_lanes(place - (place >> shift << shift), shift);
        const F32 by = spread(scales[r] + (place >> shift), blocks);
        multiply_words<M, ScaleFirst>(codes, load_words(from), by, x, job.stride, sums[r]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int m = 0; m < M; ++m) out[m * kRowsOfStrip + r] = sum(sums[r][m]);
  }
}

template <int Rows, int M>
static void packed_rows(const SmallJob& job, int64_t first, float* out) {
  const Weight& weight = job.args->weight;
  const bool aligned = weight.cols % weight.packed4.block_size() == 0;
  if (aligned) {
    return job.scale_first ? multiply_packed_rows<Rows, M, true, true>(job, first, out)
                           : multiply_packed_rows<Rows, M, false, true>(job, first, out);
  }
  return job.scale_first ? multiply_packed_rows<Rows, M, true, false>(job, first, out)
                         : multiply_packed_rows<Rows, M, false, false>(job, first, out);
}

// ---- int8 -----------------------------------------------------------------------------------------------------------

template <int M>
static void int8_row(const SmallJob& job, int64_t row, float* out) {
  const Weight& weight = job.args->weight;
  const int8_t* q = weight.rows8.q + row * weight.cols;
  const float by = weight.rows8.absmax[row] / 127.0F;
  F32 sums[2][M];
  for (int m = 0; m < M; ++m) sums[0][m] = sums[1][m] = zero();
  int64_t i = 0;
  for (; i + 2 * kLanes <= weight.cols; i += 2 * kLanes) {
    // Scaled before the sum, so that no partial sum leaves fp32's range where the result does not.
    const F32 first = mul(load(q + i), broadcast(by));
    const F32 second = mul(load(q + i + kLanes), broadcast(by));
    for (int m = 0; m < M; ++m) {
      const float* x = job.x + m * job.stride + i;
      sums[0][m] = fma(first, load(x), sums[0][m]);
      sums[1][m] = fma(second, load(x + kLanes), sums[1][m]);
    }
  }
  for (int m = 0; m < M; ++m) out[m * kRowsOfStrip] = sum(add(sums[0][m], sums[1][m]));
  for (; i < weight.cols; ++i) {
    for (int m = 0; m < M; ++m) {
      out[m * kRowsOfStrip] += static_cast<float>(q[i]) * by * job.x[m * job.stride + i];
    }
  }
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
  constexpr int kTogether = M == 1 ? kSmallRows : M <= 4 ? (kSmallRows + 1) / 2 : 1;
  const int64_t first = index * kRowsOfStrip;
  const int64_t rows = smaller(args.weight.rows - first, kRowsOfStrip);
  alignas(64) float out[M * kRowsOfStrip];
  int64_t row = 0;
  if (args.weight.is_int8()) {
    for (; row < rows; ++row) int8_row<M>(job, first + row, out + row);
  } else {
    for (; row + kTogether <= rows; row += kTogether) packed_rows<kTogether, M>(job, first + row, out + row);
    for (; row < rows; ++row) packed_rows<1, M>(job, first + row, out + row);
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

// A row of x in the order in which words of packed elements decode, with zeros behind its end.
static void arrange_words(const float* from, int64_t count, float* to) {
  for (int64_t lane = 0; lane * kWord < count; ++lane) {
    float* unit = to + lane / kLanes * kUnit + lane % kLanes;
    for (int64_t i = 0; i < kWord; ++i) unit[(i ^ 1) * kLanes] = from[lane * kWord + i];
  }
}

static void arrange_inputs(const LinearArgs& args, int64_t padded, int64_t stride, float* to) {
  const int64_t cols = args.weight.cols;
  memset(to, 0, static_cast<size_t>(padded * stride) * sizeof(float));
  for (int64_t m = 0; m < args.m; ++m) {
    float* row = to + m * stride;
    if (args.weight.is_int8()) {
      load_floats(args.x, args.dtype, m * args.x_stride, cols, row);
      continue;
    }
    alignas(64) float values[kUnit];
    for (int64_t at = 0; at < cols; at += kUnit) {
      const int64_t count = smaller(kUnit, cols - at);
      load_floats(args.x, args.dtype, m * args.x_stride + at, count, values);
      arrange_words(values, count, row + at);
    }
  }
}

// Whether a product of an x with a bare code, or a sum of eight, can leave fp32's normal range.
static bool leaves_range(const float* x, int64_t count, const float* codebook) {
  float most = 0.0F, least = 1.0F;
  for (int i = 0; i < 16; ++i) {
    const float magnitude = float_of(bits_of(codebook[i]) & 0x7FFFFFFFU);
    most = magnitude > most ? magnitude : most;
    least = magnitude > 0.0F && magnitude < least ? magnitude : least;
  }
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
  return largest >= kInfinity || !(float_of(largest) * most * 8.0F < kLargest) ||
         float_of(smallest + 1U) * least < kSmallest;
}

static Status linear_small_m(const LinearArgs& args) {
  if (args.m == 0 || args.weight.rows == 0) return success();
  const int64_t cols = args.weight.cols;
  if (args.grad_input || args.m > kSmallM) return bad_argument("m", args.m);
  if (!args.weight.is_int8() && cols % kWord != 0) return bad_argument("in_features", cols);
  const int64_t padded = args.m <= 2 ? args.m : args.m <= 4 ? 4 : 8;
  const int64_t stride = divide_up(cols, kUnit) * kUnit;
  const int64_t bytes = padded * stride * 4;
  auto* x = static_cast<float*>(scratch(Slot::inputs, static_cast<size_t>(bytes)));
  if (x == nullptr) return out_of_memory(bytes);
  arrange_inputs(args, padded, stride, x);
  SmallJob job{&args, x, stride, nullptr, false};
  if (!args.weight.is_int8()) job.scale_first = leaves_range(x, args.m * stride, args.weight.packed4.codebook);
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
