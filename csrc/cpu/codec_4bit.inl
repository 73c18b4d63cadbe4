// Quantize to 4 bits.

struct Quantize4Job {
  const Quantize4Args* args;
  SortedCodebook sorted;
  bool keyed;  // the thresholds allow 16-bit sources to be ranked as integers
  // Of threshold j: a value a little below it, in units of the scale, as a product of two factors.
  alignas(64) float below[16];
  alignas(64) float below_too[16];
#ifdef NYBBLE_BUCKETS
  bool bucketed;
  Buckets buckets;
#endif
  int64_t blocks_per_task;
  int64_t blocks;
  Failure* failure;
};

// ---- 16-bit sources -------------------------------------------------------------------------------------------------
//
// fp16 and bf16 order like integers (their keys: magnitude, negative for negative numbers), and s = x * (1 / scale)
// does not fall as x rises. So per block each threshold becomes the largest key whose s does not exceed it, and the
// values are ranked by comparing 16-bit integers, twice as many to a register as there are floats, without any
// conversion.
//
// That key is found exactly: one just below the threshold is rounded down to the grid of the dtype, and its successor
// is tried by the rule itself. Where threshold * scale loses 2^-12, a grid's spacing (2^-11 at least) cannot hide a
// second successor. A threshold of 0 is passed by whatever does not underflow to 0, so by x > 2^-150 * scale; other
// thresholds that small would need the same care, and go the general way.

constexpr float kBelow = 1.0F - 1.0F / 4096.0F;
constexpr float kAbove = 1.0F + 1.0F / 4096.0F;

static void place_thresholds(Quantize4Job* job) {
  job->keyed = true;
  for (int i = 0; i < 16; ++i) {
    const float threshold = job->sorted.threshold[i];
    const uint32_t magnitude = bits_of(threshold) & 0x7FFFFFFFU;
    if (magnitude == 0) {
      job->below[i] = 0x1p-75F;
      job->below_too[i] = 0x1p-75F * kBelow;
    } else {
      job->below[i] = threshold;
      job->below_too[i] = threshold > 0.0F ? kBelow : kAbove;
      if (magnitude < bits_of(0x1p-60F) || magnitude > kInfinity) job->keyed = false;
    }
  }
}

template <class T>
static inline KeyThresholds key_thresholds(const Quantize4Job& job, float scale, float reciprocal) {
  alignas(64) int16_t keys[16];
  for (int i = 0; i < 16; i += kLanes) {
    const F32 below = mul(mul(broadcast(scale), load(job.below + i)), load(job.below_too + i));
    const I32 next = offset(floor_key(below, static_cast<const T*>(nullptr)), 1);
    const F32 s = mul(key_value(next, static_cast<const T*>(nullptr)), broadcast(reciprocal));
    store_keys(keys + i, advance_where_greater(next, s, load(job.sorted.threshold + i), -1));
  }
  return load_key_thresholds(keys);
}

// ---- one block ------------------------------------------------------------------------------------------------------

// `count` is a multiple of 32.
static inline void pack_block(const float* x, int64_t count, const Quantize4Job& job, float, float reciprocal,
                              uint8_t* packed) {
  const Thresholds thresholds = load_thresholds(job.sorted.threshold);
  const F32 factor = broadcast(reciprocal);
  for (int64_t i = 0; i < count; i += 32) {
    I32 ranks[32 / kLanes];
    for (int v = 0; v < 32 / kLanes; ++v) ranks[v] = rank_of(mul(load(x + i + v * kLanes), factor), thresholds);
    pack_ranks(ranks, job.sorted.index, packed + i / 2);
  }
}

template <class T>
static inline void pack_block(const T* x, int64_t count, const Quantize4Job& job, float scale, float reciprocal,
                              uint8_t* packed) {
  if (!job.keyed) {
    alignas(64) float values[kMaxBlock];
    to_floats(x, count, values);
    return pack_block(values, count, job, scale, reciprocal, packed);
  }
  const KeyThresholds thresholds = key_thresholds<T>(job, scale, reciprocal);
  for (int64_t i = 0; i < count; i += 32) {
    pack_keys(reinterpret_cast<const uint16_t*>(x) + i, thresholds, job.sorted.index, packed + i / 2);
  }
}

static inline uint32_t block_magnitude(const float* x, int64_t count) { return largest_magnitude(x, count); }

template <class T>
static inline uint32_t block_magnitude(const T* x, int64_t count) {
  Words lanes = zero_words();
  for (int64_t i = 0; i < count; i += 32) lanes = max_words(lanes, reinterpret_cast<const uint16_t*>(x) + i);
  return bits_of(to_float(T{static_cast<uint16_t>(reduce_max(lanes))}));
}

template <class T>
static float search_scale(const T* x, int64_t count, int64_t padded, float absmax, const Quantize4Job& job) {
  alignas(64) float values[kMaxBlock];
  to_floats(x, padded, values);
  const float code_of_zero = job.sorted.code[job.sorted.zero_rank];
#ifdef NYBBLE_BUCKETS
  if (job.bucketed) return search_mse(values, count, padded, absmax, job.buckets, code_of_zero);
#endif
  return search_mse(values, count, padded, absmax, codes_by_rank(job.sorted), code_of_zero);
}

// False: a value is not finite. x is padded with zeros to a multiple of 32 elements.
template <class T>
static inline bool quantize_block(const T* x, int64_t count, int64_t padded, const Quantize4Job& job, float* absmax,
                                  uint8_t* packed) {
  const uint32_t magnitude = block_magnitude(x, padded);
  if (magnitude >= kInfinity) return false;
  float scale = absmax_of(magnitude);
  if (job.args->search == Search::mse) scale = search_scale(x, count, padded, scale, job);
  *absmax = scale;
  pack_block(x, padded, job, scale, 1.0F / scale, packed);
  return true;
}

template <class T>
static bool quantize_partial_block(const T* x, int64_t count, const Quantize4Job& job, float* absmax, uint8_t* packed) {
  alignas(64) T values[kMaxBlock];
  alignas(64) uint8_t bytes[kMaxBlock / 2];
  const int64_t padded = divide_up(count, 32) * 32;
  memcpy(static_cast<void*>(values), x, static_cast<size_t>(count) * sizeof(T));
  memset(static_cast<void*>(values + count), 0, static_cast<size_t>(padded - count) * sizeof(T));
  if (!quantize_block(values, count, padded, job, absmax, bytes)) return false;
  memcpy(packed, bytes, static_cast<size_t>(divide_up(count, 2)));
  return true;
}

template <class T>
static void quantize_blocks(const Quantize4Job& job, int64_t first, int64_t last) {
  const Quantize4Args& args = *job.args;
  const T* x = static_cast<const T*>(args.x);
  for (int64_t block = first; block < last; ++block) {
    const int64_t start = block * args.block_size;
    const int64_t count = args.count - start;
    float* absmax = args.absmax + block;
    uint8_t* packed = args.packed + start / 2;
    const bool finite = count < args.block_size
                            ? quantize_partial_block(x + start, count, job, absmax, packed)
                            : quantize_block(x + start, args.block_size, args.block_size, job, absmax, packed);
    if (!finite) return job.failure->report_block(block);
  }
}

static void quantize_4bit_task(void* context, int64_t index) {
  const Quantize4Job& job = *static_cast<const Quantize4Job*>(context);
  const int64_t first = index * job.blocks_per_task;
  const int64_t last = smaller(job.blocks, first + job.blocks_per_task);
  switch (job.args->dtype) {
    case DType::f32:
      return quantize_blocks<float>(job, first, last);
    case DType::f16:
      return quantize_blocks<F16>(job, first, last);
    case DType::bf16:
      return quantize_blocks<Bf16>(job, first, last);
  }
}

static Status quantize_4bit(const Quantize4Args& args) {
  Failure failure;
  Quantize4Job job;
  job.args = &args;
  job.sorted = sort_codebook(args.codebook);
  place_thresholds(&job);
#ifdef NYBBLE_BUCKETS
  job.bucketed = codes_by_bucket(job.sorted, &job.buckets);
#endif
  job.blocks = divide_up(args.count, args.block_size);
  job.blocks_per_task = blocks_per_task(args.block_size);
  job.failure = &failure;
  parallel_for(args.threads, divide_up(job.blocks, job.blocks_per_task), quantize_4bit_task, &job);
  return failure.status();
}
