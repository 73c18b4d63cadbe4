// The codecs, written once against simd_*.h: 4-bit blocks, 8-bit blocks, int8 rows. The rule is format.h's and
// reference.py's; every ISA gives the same bits, which is why nothing here uses a fused multiply-add (mse search, whose
// sums may differ in the last bit, apart).

// ---- rows of any dtype, in fp32 -------------------------------------------------------------------------------------

template <class T>
static void to_floats(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

template <class T>
static void from_floats(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) from_float(from[i], to + i);
}

static void load_floats(const void* from, DType dtype, int64_t start, int64_t count, float* to) {
  switch (dtype) {
    case DType::f32:
      return to_floats(static_cast<const float*>(from) + start, count, to);
    case DType::f16:
      return to_floats(static_cast<const F16*>(from) + start, count, to);
    case DType::bf16:
      return to_floats(static_cast<const Bf16*>(from) + start, count, to);
  }
}

static void store_floats(const float* from, int64_t count, DType dtype, void* to, int64_t start) {
  switch (dtype) {
    case DType::f32:
      return from_floats(from, count, static_cast<float*>(to) + start);
    case DType::f16:
      return from_floats(from, count, static_cast<F16*>(to) + start);
    case DType::bf16:
      return from_floats(from, count, static_cast<Bf16*>(to) + start);
  }
}

// The bits of the largest magnitude; a NaN or an infinity gives kInfinity or more, because it is compared as an
// integer.
constexpr uint32_t kInfinity = 0x7F800000U;

static uint32_t largest_magnitude(const float* x, int64_t count) {
  I32 lanes = zero_index();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) lanes = max_magnitude(lanes, load(x + i));
  uint32_t largest = reduce_max(lanes);
  for (; i < count; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7FFFFFFFU;
    if (magnitude > largest) largest = magnitude;
  }
  return largest;
}

constexpr float kSmallestAbsmax = 1e-38F;  // what an all-zero block stores

// ---- quantize, 4 bit
// --------------------------------------------------------------------------------------------------

// The codebook in ascending order, with the midpoints that separate its ranks.
struct SortedCodebook {
  float code[16];
  float threshold[16];  // threshold[15] is never exceeded
  uint8_t index[16];    // rank -> place in the codebook
  uint8_t zero_rank;    // of the exact 0.0, the padding nibble of an odd tensor
};

static SortedCodebook sort_codebook(const float* codebook) {
  SortedCodebook sorted;
  for (int i = 0; i < 16; ++i) sorted.index[i] = static_cast<uint8_t>(i);
  for (int i = 1; i < 16; ++i) {  // stable, so FP4's two zeros keep their order
    for (int j = i; j > 0 && codebook[sorted.index[j]] < codebook[sorted.index[j - 1]]; --j) {
      const uint8_t swapped = sorted.index[j];
      sorted.index[j] = sorted.index[j - 1];
      sorted.index[j - 1] = swapped;
    }
  }
  for (int i = 0; i < 16; ++i) sorted.code[i] = codebook[sorted.index[i]];
  for (int i = 0; i < 15; ++i) sorted.threshold[i] = (sorted.code[i] + sorted.code[i + 1]) / 2.0F;
  sorted.threshold[15] = float_of(kInfinity);
  sorted.zero_rank = 0;
  while (0.0F > sorted.threshold[sorted.zero_rank]) ++sorted.zero_rank;
  return sorted;
}

// How many thresholds are below s, by four steps of a binary search in registers.
static inline I32 rank_of(F32 s, const Table& thresholds) {
  I32 rank = zero_index();
  for (int step = 8; step > 0; step /= 2) {
    rank = advance_where_greater(rank, s, lookup(thresholds, offset(rank, step - 1)), step);
  }
  return rank;
}

// x is padded to a multiple of kLanes with zeros.
static void rank_block(const float* x, int64_t padded, float reciprocal, const Table& thresholds, uint8_t* ranks) {
  const F32 factor = broadcast(reciprocal);
  for (int64_t i = 0; i < padded; i += kLanes) {
    store_bytes(ranks + i, rank_of(clamp_unit(mul(load(x + i), factor)), thresholds));
  }
}

// The scale of least squared error. For each of 33 candidate scales the codes c are picked by the rule; given them the
// best scale is <x, c> / <c, c> and the error |x|^2 - <x, c>^2 / <c, c>.
static float search_mse(const float* x, int64_t count, int64_t padded, float absmax, const SortedCodebook& sorted) {
  // A codebook without 0 gives the padding codes that are not 0; they must not count.
  const float code_of_zero = sorted.code[sorted.zero_rank];
  const float of_padding = static_cast<float>(padded - count) * code_of_zero * code_of_zero;
  const Table thresholds = load_table(sorted.threshold);
  const Table codes = load_table(sorted.code);
  float best_gain = 0.0F;
  float best_scale = absmax;
  for (int candidate = 32; candidate >= 0; --candidate) {
    const float factor = 0.5F + static_cast<float>(candidate) / 64.0F;
    const F32 reciprocal = broadcast(1.0F / (absmax * factor));
    F32 xc = zero();
    F32 cc = zero();
    for (int64_t i = 0; i < padded; i += kLanes) {
      const F32 values = load(x + i);
      const F32 code = lookup(codes, rank_of(clamp_unit(mul(values, reciprocal)), thresholds));
      // In units of absmax * factor, so that neither tiny nor huge blocks leave fp32's range.
      xc = fma(mul(values, reciprocal), code, xc);
      cc = fma(code, code, cc);
    }
    const float dot = sum(xc);
    const float norm = sum(cc) - of_padding;
    if (norm <= 0.0F || dot <= 0.0F) continue;
    const float gain = dot * factor * (dot * factor / norm);
    if (gain > best_gain) {
      const float scale = dot / norm * (absmax * factor);
      if (bits_of(scale) >= kInfinity) continue;  // absmax close to fp32's largest: the best scale may lie beyond it
      best_gain = gain;
      best_scale = scale;
    }
  }
  return best_scale > kSmallestAbsmax ? best_scale : kSmallestAbsmax;
}

struct Quantize4Job {
  const Quantize4Args* args;
  SortedCodebook sorted;
  int64_t blocks_per_task;
  int64_t blocks;
  Failure* failure;
};

static void pack_block(const uint8_t* ranks, int64_t count, const SortedCodebook& sorted, uint8_t* packed) {
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) pack_ranks(ranks + i, sorted.index, packed + i / 2);
  for (; i < count; i += 2) {
    const uint8_t odd = i + 1 < count ? ranks[i + 1] : sorted.zero_rank;
    packed[i / 2] = static_cast<uint8_t>((sorted.index[ranks[i]] << 4) | sorted.index[odd]);
  }
}

static void quantize_4bit_task(void* context, int64_t index) {
  const Quantize4Job& job = *static_cast<const Quantize4Job*>(context);
  const Quantize4Args& args = *job.args;
  const Table thresholds = load_table(job.sorted.threshold);
  alignas(64) float x[kMaxBlock];
  alignas(64) uint8_t ranks[kMaxBlock];
  const int64_t last = smaller(job.blocks, (index + 1) * job.blocks_per_task);
  for (int64_t block = index * job.blocks_per_task; block < last; ++block) {
    const int64_t start = block * args.block_size;
    const int64_t count = smaller(args.block_size, args.count - start);
    const int64_t padded = divide_up(count, kLanes) * kLanes;
    load_floats(args.x, args.dtype, start, count, x);
    for (int64_t i = count; i < padded; ++i) x[i] = 0.0F;
    const uint32_t magnitude = largest_magnitude(x, count);
    if (magnitude >= kInfinity) {
      job.failure->report_block(block);
      return;
    }
    float absmax = float_of(magnitude) > kSmallestAbsmax ? float_of(magnitude) : kSmallestAbsmax;
    if (args.search == Search::mse) absmax = search_mse(x, count, padded, absmax, job.sorted);
    args.absmax[block] = absmax;
    rank_block(x, padded, 1.0F / absmax, thresholds, ranks);
    pack_block(ranks, count, job.sorted, args.packed + start / 2);
  }
}

// Blocks of a task: about 64 Ki elements, whatever the thread count.
static int64_t blocks_per_task(int64_t block_size) { return larger(1, 65536 / block_size); }

static Status quantize_4bit(const Quantize4Args& args) {
  Failure failure;
  const int64_t blocks = divide_up(args.count, args.block_size);
  const int64_t per_task = blocks_per_task(args.block_size);
  Quantize4Job job{&args, sort_codebook(args.codebook), per_task, blocks, &failure};
  parallel_for(args.threads, divide_up(blocks, per_task), quantize_4bit_task, &job);
  return failure.status();
}

// ---- dequantize, 4 bit
// ------------------------------------------------------------------------------------------------

// codebook * scale, rounded to T: with it a block is decoded by lookups alone.
template <class T>
static inline void scaled_codes(const float* codebook, float by, T* codes) {
  for (int i = 0; i < 16; i += kLanes) store(codes + i, mul(load(codebook + i), broadcast(by)));
}

// `count` elements of one block from flat element `start` on.
template <class T>
static inline void decode_run(const uint8_t* packed, int64_t start, int64_t count, const T* codes, T* out) {
  int64_t i = 0;
  if ((start & 1) != 0 && count > 0) out[i++] = codes[packed[start >> 1] & 15];
  const uint8_t* p = packed + ((start + i) >> 1);
  if (count - i >= 32) {
    const auto table = load_table(codes);
    for (; i + 32 <= count; i += 32, p += 16) decode(p, table, out + i);
  }
  for (; i + 2 <= count; i += 2, ++p) {
    out[i] = codes[*p >> 4];
    out[i + 1] = codes[*p & 15];
  }
  if (i < count) out[i] = codes[*p >> 4];
}

// `count` elements from flat element `start` on, over as many blocks as that takes.
template <class T>
static void decode_span(const Packed4& source, int64_t start, int64_t count, T* out) {
  alignas(64) T codes[16];
  int64_t done = 0;
  while (done < count) {
    const int64_t at = start + done;
    const int64_t block = at >> source.block_shift;
    const int64_t run = smaller(count - done, ((block + 1) << source.block_shift) - at);
    scaled_codes(source.codebook, source.scales.at(block), codes);
    decode_run(source.packed, at, run, codes, out + done);
    done += run;
  }
}

constexpr int64_t kSpan = 65536;

static void dequantize_4bit_task(void* context, int64_t index) {
  const Dequantize4Args& args = *static_cast<const Dequantize4Args*>(context);
  const int64_t start = index * kSpan;
  const int64_t count = smaller(kSpan, args.count - start);
  switch (args.dtype) {
    case DType::f32:
      return decode_span(args.source, start, count, static_cast<float*>(args.out) + start);
    case DType::f16:
      return decode_span(args.source, start, count, static_cast<F16*>(args.out) + start);
    case DType::bf16:
      return decode_span(args.source, start, count, static_cast<Bf16*>(args.out) + start);
  }
}

static Status dequantize_4bit(const Dequantize4Args& args) {
  Dequantize4Args shared = args;
  parallel_for(args.threads, divide_up(args.count, kSpan), dequantize_4bit_task, &shared);
  return success();
}

// ---- block-wise 8 bit
// -------------------------------------------------------------------------------------------------

struct Quantize8Job {
  const Quantize8Args* args;
  float threshold[256];
  int64_t blocks;
  int64_t blocks_per_task;
  Failure* failure;
};

// Exact nearest entry, ties to the lower one: the count of midpoints below s.
static inline uint8_t nearest(float s, const float* threshold) {
  int code = 0;
  for (int step = 128; step > 0; step /= 2) code += s > threshold[code + step - 1] ? step : 0;
  return static_cast<uint8_t>(code);
}

static void quantize_8bit_task(void* context, int64_t index) {
  const Quantize8Job& job = *static_cast<const Quantize8Job*>(context);
  const Quantize8Args& args = *job.args;
  alignas(64) float x[1024];
  const int64_t last = smaller(job.blocks, (index + 1) * job.blocks_per_task);
  for (int64_t block = index * job.blocks_per_task; block < last; ++block) {
    const int64_t start = block * args.block_size;
    const int64_t end = smaller(args.count, start + args.block_size);
    uint32_t magnitude = 0;
    for (int64_t at = start; at < end; at += 1024) {
      const int64_t count = smaller(1024, end - at);
      load_floats(args.x, args.dtype, at, count, x);
      const uint32_t here = largest_magnitude(x, count);
      magnitude = here > magnitude ? here : magnitude;
    }
    if (magnitude >= kInfinity) {
      job.failure->report_block(block);
      return;
    }
    const float absmax = float_of(magnitude) > kSmallestAbsmax ? float_of(magnitude) : kSmallestAbsmax;
    const float reciprocal = 1.0F / absmax;
    args.absmax[block] = absmax;
    for (int64_t at = start; at < end; at += 1024) {
      const int64_t count = smaller(1024, end - at);
      load_floats(args.x, args.dtype, at, count, x);
      for (int64_t i = 0; i < count; ++i) {
        float s = x[i] * reciprocal;
        s = s > 1.0F ? 1.0F : s < -1.0F ? -1.0F : s;
        args.codes[at + i] = nearest(s, job.threshold);
      }
    }
  }
}

static Status quantize_8bit(const Quantize8Args& args) {
  Failure failure;
  Quantize8Job job;
  job.args = &args;
  for (int i = 0; i < 255; ++i) job.threshold[i] = (args.map[i] + args.map[i + 1]) / 2.0F;
  job.threshold[255] = float_of(kInfinity);
  job.blocks = divide_up(args.count, args.block_size);
  job.blocks_per_task = blocks_per_task(args.block_size);
  job.failure = &failure;
  parallel_for(args.threads, divide_up(job.blocks, job.blocks_per_task), quantize_8bit_task, &job);
  return failure.status();
}

static void dequantize_8bit_task(void* context, int64_t index) {
  const Dequantize8Args& args = *static_cast<const Dequantize8Args*>(context);
  alignas(64) float values[1024];
  const int64_t end = smaller(args.count, (index + 1) * kSpan);
  for (int64_t at = index * kSpan; at < end; at += 1024) {
    const int64_t count = smaller(1024, end - at);
    for (int64_t i = 0; i < count; ++i) {
      values[i] = args.map[args.codes[at + i]] * args.absmax[(at + i) / args.block_size];
    }
    store_floats(values, count, args.dtype, args.out, at);
  }
}

static Status dequantize_8bit(const Dequantize8Args& args) {
  Dequantize8Args shared = args;
  parallel_for(args.threads, divide_up(args.count, kSpan), dequantize_8bit_task, &shared);
  return success();
}

// ---- int8 rows
// --------------------------------------------------------------------------------------------------------

struct QuantizeRowsJob {
  const QuantizeRowsArgs* args;
  Failure* failure;
};

// The layout's first step is the cast to fp16.
static void load_through_f16(const QuantizeRowsArgs& args, int64_t start, int64_t count, float* to) {
  load_floats(args.x, args.dtype, start, count, to);
  if (args.dtype == DType::f16) return;
  F16 halves[1024];
  from_floats(to, count, halves);
  to_floats(halves, count, to);
}

static void quantize_int8_task(void* context, int64_t row) {
  const QuantizeRowsJob& job = *static_cast<const QuantizeRowsJob*>(context);
  const QuantizeRowsArgs& args = *job.args;
  alignas(64) float x[1024];
  const int64_t start = row * args.cols;
  const int64_t end = start + args.cols;
  uint32_t magnitude = 0;
  for (int64_t at = start; at < end; at += 1024) {
    const int64_t count = smaller(1024, end - at);
    load_through_f16(args, at, count, x);
    const uint32_t here = largest_magnitude(x, count);
    magnitude = here > magnitude ? here : magnitude;
  }
  if (magnitude >= kInfinity) {
    job.failure->report_block(row);
    return;
  }
  args.absmax[row] = float_of(magnitude);
  // torch's 127 / absmax, which bitsandbytes uses, is a reciprocal and a product; the two roundings decide exact ties.
  const F32 factor = broadcast(magnitude == 0 ? 0.0F : 1.0F / float_of(magnitude) * 127.0F);
  for (int64_t at = start; at < end; at += 1024) {
    const int64_t count = smaller(1024, end - at);
    load_through_f16(args, at, count, x);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(args.q + at + i, mul(load(x + i), factor));
    if (i < count) {
      alignas(64) float tail[kLanes] = {};
      alignas(64) int8_t codes[kLanes];
      for (int64_t j = i; j < count; ++j) tail[j - i] = x[j];
      store(codes, mul(load(tail), factor));
      for (int64_t j = i; j < count; ++j) args.q[at + j] = codes[j - i];
    }
  }
}

static Status quantize_int8(const QuantizeRowsArgs& args) {
  Failure failure;
  QuantizeRowsJob job{&args, &failure};
  parallel_for(args.threads, args.rows, quantize_int8_task, &job);
  return failure.status();
}

static void dequantize_int8_task(void* context, int64_t row) {
  const DequantizeRowsArgs& args = *static_cast<const DequantizeRowsArgs*>(context);
  alignas(64) float values[1024];
  const int64_t start = row * args.cols;
  const F32 absmax = broadcast(args.source.absmax[row]);
  const F32 levels = broadcast(127.0F);
  for (int64_t at = start; at < start + args.cols; at += 1024) {
    const int64_t count = smaller(1024, start + args.cols - at);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store(values + i, div(mul(load(args.source.q + at + i), absmax), levels));
    }
    for (; i < count; ++i) values[i] = static_cast<float>(args.source.q[at + i]) * args.source.absmax[row] / 127.0F;
    store_floats(values, count, args.dtype, args.out, at);
  }
}

static Status dequantize_int8(const DequantizeRowsArgs& args) {
  DequantizeRowsArgs shared = args;
  parallel_for(args.threads, args.rows, dequantize_int8_task, &shared);
  return success();
}
