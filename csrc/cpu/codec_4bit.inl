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
// second successor. A threshold of 0 is passed by whatever does not underflow to 0, so by x > 2^-150 * scale; one so
// close to 0 that its product with the smallest scale could underflow makes the codebook go the general way.

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
      if (magnitude < bits_of(0x1p-22F) || magnitude > kInfinity) job->keyed = false;
    }
  }
}

template <class T>
static inline void key_thresholds(const Quantize4Job& job, float scale, float reciprocal, int16_t* keys) {
  for (int i = 0; i < 16; i += kLanes) {
    const F32 below = mul(mul(broadcast(scale), load(job.below + i)), load(job.below_too + i));
    const I32 next = offset(floor_key(below, static_cast<const T*>(nullptr)), 1);
    const F32 s = mul(key_value(next, static_cast<const T*>(nullptr)), broadcast(reciprocal));
    store_keys(keys + i, advance_where_greater(next, s, load(job.sorted.threshold + i), -1));
  }
}

// ---- strips of blocks -----------------------------------------------------------------------------------------------
//
// One block is a long chain of dependent steps, and a core looks only about two blocks ahead. So each step is done for
// all blocks of a strip before the next one: 8.0 GB/s of bf16 before, 12 after, prefetched (two Sapphire
// Rapids class cores).

constexpr int64_t kAheadBytes =
    8192;  // from memory, one core: 4.5 GB/s without, 6.6 at 4096, 7.2 at 8192, 6.4 at 16384
constexpr int64_t kStripBlocks = 16;
constexpr int64_t kStripElements = 4096;  // a strip stays in L1

struct Strip {
  int64_t blocks;
  int64_t block_size;  // a multiple of 32
  alignas(64) float scale[kStripBlocks];
  alignas(64) float reciprocal[kStripBlocks];
  alignas(64) int16_t keys[kStripBlocks][16];
};

static inline void invert_scales(Strip* strip) {
  for (int i = 0; i < kStripBlocks; i += kLanes) {
    store(strip->reciprocal + i, div(broadcast(1.0F), load(strip->scale + i)));
  }
}

static inline void pack_strip(const float* x, const Quantize4Job& job, Strip* strip, uint8_t* packed) {
  const Thresholds thresholds = load_thresholds(job.sorted.threshold);
  for (int64_t block = 0; block < strip->blocks; ++block) {
    const F32 factor = broadcast(strip->reciprocal[block]);
    for (int64_t end = strip->block_size; end > 0; end -= 32, x += 32, packed += 16) {
      prefetch(x + kAheadBytes / 4);
      prefetch(x + kAheadBytes / 4 + 16);
      I32 ranks[32 / kLanes];
      for (int v = 0; v < 32 / kLanes; ++v) ranks[v] = rank_of(mul(load(x + v * kLanes), factor), thresholds);
      pack_ranks(ranks, job.sorted.index, packed);
    }
  }
}

template <class T>
static inline void pack_strip(const T* x, const Quantize4Job& job, Strip* strip, uint8_t* packed) {
  const int64_t count = strip->blocks * strip->block_size;
  if (!job.keyed) {
    alignas(64) float values[kStripElements];
    to_floats(x, count, values);
    return pack_strip(values, job, strip, packed);
  }
  for (int64_t block = 0; block < strip->blocks; ++block) {
    key_thresholds<T>(job, strip->scale[block], strip->reciprocal[block], strip->keys[block]);
  }
  const uint16_t* words = reinterpret_cast<const uint16_t*>(x);
  for (int64_t block = 0; block < strip->blocks; ++block) {
    const KeyThresholds thresholds = load_key_thresholds(strip->keys[block]);
    for (int64_t end = strip->block_size; end > 0; end -= 32, words += 32, packed += 16) {
      prefetch(words + kAheadBytes / 2);
      pack_keys(words, thresholds, job.sorted.index, packed);
    }
  }
}

static inline uint32_t block_magnitude(const float* x, int64_t count) { return largest_magnitude(x, count); }

template <class T>
static inline uint32_t block_magnitude(const T* x, int64_t count) {
  Words lanes = zero_words();
  for (int64_t i = 0; i < count; i += 32) lanes = max_words(lanes, reinterpret_cast<const uint16_t*>(x) + i);
  return bits_of(to_float(T{static_cast<uint16_t>(reduce_max(lanes))}));
}

// What the errors of a block count whose first element is the tensor's element `first`; null: all alike.
static inline const float* weights_of(const Quantize4Args& args, const float* values, float absmax, int64_t first,
                                      int64_t count, int64_t padded, float* weights) {
  if (args.search == Search::mse) return nullptr;
  if (args.search == Search::square) {
    const F32 reciprocal = broadcast(1.0F / absmax);
    for (int64_t i = 0; i < padded; i += kLanes) {
      const F32 s = mul(load(values + i), reciprocal);
      store(weights + i, mul(s, s));
    }
    return weights;
  }
  int64_t column = first % args.columns;
  for (int64_t i = 0; i < count; ++i) {
    weights[i] = args.importance[column];
    if (++column == args.columns) column = 0;
  }
  for (int64_t i = count; i < padded; ++i) weights[i] = 0.0F;
  return weights;
}

// `count` elements of x count, the first of them the tensor's element `first`; the rest of the strip is padded with
// zeros.
template <class T>
static void search_scales(const T* x, int64_t count, int64_t first, const Quantize4Job& job, Strip* strip) {
  alignas(64) float values[kMaxBlock];
  alignas(64) float weights[kMaxBlock];
  const float code_of_zero = job.sorted.code[job.sorted.zero_rank];
  for (int64_t block = 0; block < strip->blocks; ++block) {
    const int64_t start = block * strip->block_size;
    const int64_t here = smaller(strip->block_size, count - start);
    to_floats(x + start, strip->block_size, values);
    float* scale = strip->scale + block;
    const float* weight = weights_of(*job.args, values, *scale, first + start, here, strip->block_size, weights);
#ifdef NYBBLE_BUCKETS
    if (job.bucketed) {
      *scale = search_mse(values, weight, here, strip->block_size, *scale, job.buckets, code_of_zero);
      continue;
    }
#endif
    *scale = search_mse(values, weight, here, strip->block_size, *scale, codes_by_rank(job.sorted), code_of_zero);
  }
}

// False: a value is not finite, in the block that strip->blocks then says.
template <class T>
static inline bool quantize_strip(const T* x, int64_t count, int64_t first, const Quantize4Job& job, Strip* strip,
                                  uint8_t* packed) {
  for (int64_t block = 0; block < strip->blocks; ++block) {
    const uint32_t magnitude = block_magnitude(x + block * strip->block_size, strip->block_size);
    strip->scale[block] = absmax_of(magnitude);
    if (magnitude >= kInfinity) {
      strip->blocks = block;
      return false;
    }
  }
  if (job.args->search != Search::absmax) search_scales(x, count, first, job, strip);
  invert_scales(strip);
  pack_strip(x, job, strip, packed);
  return true;
}

// The last block of a tensor whose size is no multiple of the block size.
template <class T>
static bool quantize_partial_block(const T* x, int64_t count, int64_t first, const Quantize4Job& job, Strip* strip,
                                   uint8_t* packed) {
  alignas(64) T values[kMaxBlock];
  alignas(64) uint8_t bytes[kMaxBlock / 2];
  strip->blocks = 1;
  strip->block_size = divide_up(count, 32) * 32;
  memcpy(static_cast<void*>(values), x, static_cast<size_t>(count) * sizeof(T));
  memset(static_cast<void*>(values + count), 0, static_cast<size_t>(strip->block_size - count) * sizeof(T));
  if (!quantize_strip(values, count, first, job, strip, bytes)) return false;
  memcpy(packed, bytes, static_cast<size_t>(divide_up(count, 2)));
  return true;
}

template <class T>
static void quantize_blocks(const Quantize4Job& job, int64_t first, int64_t last) {
  const Quantize4Args& args = *job.args;
  const int64_t whole = args.count / args.block_size;  // blocks
  const int64_t together = smaller(kStripBlocks, kStripElements / args.block_size);
  Strip strip;
  for (float& scale : strip.scale) scale = 1.0F;
  int64_t block = first;
  while (block < last) {
    const int64_t start = block * args.block_size;
    const T* x = static_cast<const T*>(args.x) + start;
    uint8_t* packed = args.packed + start / 2;
    strip.blocks = smaller(together, smaller(last, whole) - block);
    strip.block_size = args.block_size;
    const bool finite = strip.blocks > 0 ? quantize_strip(x, strip.blocks * args.block_size, start, job, &strip, packed)
                                         : quantize_partial_block(x, args.count - start, start, job, &strip, packed);
    if (!finite) return job.failure->report_block(block + strip.blocks);
    memcpy(args.absmax + block, strip.scale, static_cast<size_t>(strip.blocks) * sizeof(float));
    block += strip.blocks;
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
