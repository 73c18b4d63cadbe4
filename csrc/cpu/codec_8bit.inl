// Quantize to 8 bits: blocks with a 256-entry map, and rows of int8.

// Where a code ends and the next begins.
struct Midpoints {
  alignas(64) float threshold[256];
  alignas(64) float coarse[16];  // every 16th threshold
};

static void find_midpoints(const float* map, Midpoints* midpoints) {
  for (int i = 0; i < 255; ++i) midpoints->threshold[i] = (map[i] + map[i + 1]) / 2.0F;
  midpoints->threshold[255] = float_of(kInfinity);
  for (int i = 0; i < 16; ++i) midpoints->coarse[i] = midpoints->threshold[16 * i + 15];
}

struct Quantize8Job {
  const Quantize8Args* args;
  Midpoints midpoints;
  int64_t blocks;
  int64_t blocks_per_task;
  Failure* failure;
};

// Exact nearest entry, ties to the lower one: the count of midpoints below s. Four steps of the search in registers,
// four in memory.
static inline I32 nearest(F32 s, const Thresholds& coarse, const float* threshold) {
  I32 rank = times_16(rank_of(s, coarse));
  for (int step = 8; step > 0; step /= 2) {
    rank = advance_where_greater(rank, s, gather(threshold, offset(rank, step - 1)), step);
  }
  return rank;
}

template <class T>
static void quantize_run_8bit(const Quantize8Job& job, const T* x, int64_t count, float reciprocal, uint8_t* codes) {
  const Thresholds coarse = load_thresholds(job.midpoints.coarse);
  const F32 factor = broadcast(reciprocal);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store_bytes(codes + i, nearest(clamp_unit(mul(load(x + i), factor)), coarse, job.midpoints.threshold));
  }
  if (i == count) return;
  alignas(64) T tail[kLanes] = {};
  alignas(64) uint8_t tail_codes[kLanes];
  memcpy(static_cast<void*>(tail), x + i, static_cast<size_t>(count - i) * sizeof(T));
  store_bytes(tail_codes, nearest(clamp_unit(mul(load(tail), factor)), coarse, job.midpoints.threshold));
  memcpy(codes + i, tail_codes, static_cast<size_t>(count - i));
}

template <class T>
static void quantize_blocks_8bit(const Quantize8Job& job, int64_t first, int64_t last) {
  const Quantize8Args& args = *job.args;
  for (int64_t block = first; block < last; ++block) {
    const int64_t start = block * args.block_size;
    const int64_t count = smaller(args.block_size, args.count - start);
    const T* x = static_cast<const T*>(args.x) + start;
    const uint32_t magnitude = largest_magnitude(x, count);
    if (magnitude >= kInfinity) return job.failure->report_block(block);
    const float absmax = absmax_of(magnitude);
    args.absmax[block] = absmax;
    quantize_run_8bit(job, x, count, 1.0F / absmax, args.codes + start);
  }
}

static void quantize_8bit_task(void* context, int64_t index) {
  const Quantize8Job& job = *static_cast<const Quantize8Job*>(context);
  const int64_t first = index * job.blocks_per_task;
  const int64_t last = smaller(job.blocks, first + job.blocks_per_task);
  switch (job.args->dtype) {
    case DType::f32:
      return quantize_blocks_8bit<float>(job, first, last);
    case DType::f16:
      return quantize_blocks_8bit<F16>(job, first, last);
    case DType::bf16:
      return quantize_blocks_8bit<Bf16>(job, first, last);
  }
}

static Status quantize_8bit(const Quantize8Args& args) {
  Failure failure;
  Quantize8Job job;
  job.args = &args;
  find_midpoints(args.map, &job.midpoints);
  job.blocks = divide_up(args.count, args.block_size);
  job.blocks_per_task = blocks_per_task(args.block_size);
  job.failure = &failure;
  parallel_for(args.threads, divide_up(job.blocks, job.blocks_per_task), quantize_8bit_task, &job);
  return failure.status();
}

// ---- int8 rows
// --------------------------------------------------------------------------------------------------------

struct QuantizeRowsJob {
  const QuantizeRowsArgs* args;
  Failure* failure;
};

// The layout's first step is the cast to fp16.
static inline F32 load_through_f16(const F16* p) { return load(p); }
template <class T>
static inline F32 load_through_f16(const T* p) {
  return through_f16(load(p));
}

template <class T>
static uint32_t largest_magnitude_through_f16(const T* x, int64_t count) {
  I32 lanes = zero_index();
  for (int64_t i = 0; i < count; i += kLanes) lanes = max_magnitude(lanes, load_through_f16(x + i));
  return reduce_max(lanes);
}

template <class T>
static void quantize_row(const QuantizeRowsJob& job, int64_t row) {
  const QuantizeRowsArgs& args = *job.args;
  const int64_t whole = args.cols / kLanes * kLanes;
  const T* x = static_cast<const T*>(args.x) + row * args.cols;
  alignas(64) T tail[kLanes] = {};
  const int64_t over = args.cols - whole;
  if (over > 0) memcpy(static_cast<void*>(tail), x + whole, static_cast<size_t>(over) * sizeof(T));
  const uint32_t body = largest_magnitude_through_f16(x, whole);
  const uint32_t rest = largest_magnitude_through_f16(tail, kLanes);
  const uint32_t magnitude = body > rest ? body : rest;
  if (magnitude >= kInfinity) return job.failure->report_block(row);
  args.absmax[row] = float_of(magnitude);
  // torch's 127 / absmax, which bitsandbytes uses, is a reciprocal and a product; the two roundings decide exact ties.
  const F32 factor = broadcast(magnitude == 0 ? 0.0F : 1.0F / float_of(magnitude) * 127.0F);
  int8_t* q = args.q + row * args.cols;
  for (int64_t i = 0; i < whole; i += kLanes) store(q + i, mul(load_through_f16(x + i), factor));
  alignas(64) int8_t codes[kLanes];
  store(codes, mul(load_through_f16(tail), factor));
  if (over > 0) memcpy(q + whole, codes, static_cast<size_t>(over));
}

static void quantize_int8_task(void* context, int64_t row) {
  const QuantizeRowsJob& job = *static_cast<const QuantizeRowsJob*>(context);
  switch (job.args->dtype) {
    case DType::f32:
      return quantize_row<float>(job, row);
    case DType::f16:
      return quantize_row<F16>(job, row);
    case DType::bf16:
      return quantize_row<Bf16>(job, row);
  }
}

static Status quantize_int8(const QuantizeRowsArgs& args) {
  Failure failure;
  QuantizeRowsJob job{&args, &failure};
  parallel_for(args.threads, args.rows, quantize_int8_task, &job);
  return failure.status();
}
