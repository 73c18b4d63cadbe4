// One step of AdamW over a flat parameter: its gradient, both moments and the parameter itself go through the registers
// once. The rule is kernels.h's and reference_optim.py's; every operation is rounded by itself and correctly (no fused
// multiply-add, no approximate root or quotient), so every ISA gives the same bits. A NaN may differ in its payload.

// ---- up to a vector of elements -------------------------------------------------------------------------------------

template <class T>
static inline F32 load_some(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  alignas(64) T padded[kLanes] = {};
  memcpy(static_cast<void*>(padded), p, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}

template <class T>
static inline void store_some(T* p, F32 v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  alignas(64) T padded[kLanes];
  store(padded, v);
  memcpy(static_cast<void*>(p), padded, static_cast<size_t>(count) * sizeof(T));
}

static inline I32 load_some_bytes(const uint8_t* p, int64_t count) {
  if (count >= kLanes) return load_bytes(p);
  alignas(64) uint8_t padded[kLanes] = {};
  memcpy(padded, p, static_cast<size_t>(count));
  return load_bytes(padded);
}

static inline void store_some_bytes(uint8_t* p, I32 v, int64_t count) {
  if (count >= kLanes) return store_bytes(p, v);
  alignas(64) uint8_t padded[kLanes];
  store_bytes(padded, v);
  memcpy(p, padded, static_cast<size_t>(count));
}

// ---- stochastic rounding --------------------------------------------------------------------------------------------

// A number next to v that bf16 holds: adding 16 random bits carries into the half that is kept as often as the other
// half says. What is not finite stays as it is. The bits are a hash of the key and of the element's number: two rounds
// of shifting and multiplying, half of the key before each. In plain integers, which compilers turn into vectors;
// `index`, the first lane's, is a multiple of kLanes, so that all lanes share its upper half.
static inline F32 to_bf16_stochastically(F32 v, uint64_t key, int64_t index) {
  const uint32_t first = static_cast<uint32_t>(index), key_low = static_cast<uint32_t>(key);
  const uint32_t key_high = static_cast<uint32_t>(key >> 32) + static_cast<uint32_t>(index >> 32);
  alignas(64) float values[kLanes];
  uint32_t bits[kLanes];
  store(values, v);
  memcpy(bits, values, sizeof bits);
  for (uint32_t i = 0; i < kLanes; ++i) {
    uint32_t x = (first + i) ^ key_low;
    x = (x ^ (x >> 16)) * 0x7FEB352DU + key_high;
    x = (x ^ (x >> 15)) * 0x846CA68BU;
    const uint32_t random = ((x ^ (x >> 16)) * 0x7FEB352DU) >> 16;
    const bool finite = (bits[i] & kInfinity) != kInfinity;
    bits[i] = finite ? (bits[i] + random) & 0xFFFF0000U : bits[i];
  }
  memcpy(values, bits, sizeof bits);
  return load(values);
}

template <class T>
static inline void store_param(const AdamWArgs& args, int64_t index, F32 v, int64_t count) {
  store_some(static_cast<T*>(args.param) + index, v, count);
}
template <>
inline void store_param<Bf16>(const AdamWArgs& args, int64_t index, F32 v, int64_t count) {
  const F32 rounded = args.stochastic ? to_bf16_stochastically(v, args.key, index) : v;
  store_some(static_cast<Bf16*>(args.param) + index, rounded, count);
}

// ---- the rule -------------------------------------------------------------------------------------------------------

struct AdamWVectors {
  F32 grad_scale, beta1, rest1, beta2, rest2, decay, step_size, root_scale, eps;
};

static inline AdamWVectors vectors_of(const AdamWRule& rule) {
  return {broadcast(rule.grad_scale), broadcast(rule.beta1),      broadcast(rule.rest1),
          broadcast(rule.beta2),      broadcast(rule.rest2),      broadcast(rule.decay),
          broadcast(rule.step_size),  broadcast(rule.root_scale), broadcast(rule.eps)};
}

static inline void update_moments(const AdamWVectors& rule, F32 grad, F32* m, F32* v) {
  const F32 g = mul(grad, rule.grad_scale);
  *m = add(mul(rule.beta1, *m), mul(rule.rest1, g));
  *v = add(mul(rule.beta2, *v), mul(mul(rule.rest2, g), g));
}

static inline F32 updated(const AdamWVectors& rule, F32 param, F32 m, F32 v) {
  const F32 denominator = add(mul(root(v), rule.root_scale), rule.eps);
  return sub(mul(param, rule.decay), div(mul(rule.step_size, m), denominator));
}

// ---- moments in fp32 ------------------------------------------------------------------------------------------------

struct AdamW32Job {
  const AdamW32Args* args;

  const AdamWArgs& common() const { return args->common; }

  template <class T, class G>
  void run(int64_t index) const {
    const AdamWArgs& each = common();
    const AdamWVectors rule = vectors_of(each.rule);
    const int64_t end = smaller(each.count, (index + 1) * kSpan);
    for (int64_t i = index * kSpan; i < end; i += kLanes) {
      const int64_t left = end - i;
      F32 m = load_some(args->m + i, left), v = load_some(args->v + i, left);
      update_moments(rule, load_some(static_cast<const G*>(each.grad) + i, left), &m, &v);
      store_some(args->m + i, m, left);
      store_some(args->v + i, v, left);
      const F32 param = load_some(static_cast<const T*>(each.param) + i, left);
      store_param<T>(each, i, updated(rule, param, m, v), left);
    }
  }
};

// ---- codes by buckets -----------------------------------------------------------------------------------------------

// The codes that nearest() finds with a binary search, by one lookup. Numbers are compared as integers: the key of one
// is its bits, of one below 0 with the magnitude counted down, so that a larger number of the same sign has the larger
// key. The leading bits of a key are its bucket. No bucket of a dynamic map holds more than one midpoint, so its entry
// is the code below it and its trailing bits:
//   code = (entry >> Shift) + (trailing bits of the key > trailing bits of the entry)
// Below 2^-22, where there is no midpoint, all numbers share a bucket on each side of 0.
constexpr uint32_t kMagnitude = 0x7FFFFFFFU;
constexpr uint32_t kBucketFloor = 0x34800000U;  // 2^-22
constexpr uint32_t kBucketTop = 0x3F800000U;    // 1
constexpr uint32_t kNoMidpoint = ~0U;

template <int Shift, bool Signed>
struct CodeBuckets {
  static constexpr uint32_t kFirst = kBucketFloor >> Shift;
  static constexpr uint32_t kCount = ((Signed ? kMagnitude - kBucketFloor : kBucketTop) >> Shift) - kFirst + 1;
  static constexpr uint32_t kTrailing = (1U << Shift) - 1;
  alignas(64) uint32_t entry[kCount];

  // Midpoints from number `from` on. False if there are two in a bucket, or one below 2^-22 or above 1.
  bool fill(const float* midpoint, int from) {
    for (uint32_t& each : entry) each = kNoMidpoint;
    for (int i = from; i < 255; ++i) {
      const uint32_t magnitude = bits_of(midpoint[i]) & kMagnitude;
      if (magnitude < kBucketFloor || magnitude > kBucketTop || (!Signed && midpoint[i] < 0.0F)) return false;
      const uint32_t key = Signed && midpoint[i] < 0.0F ? kMagnitude - magnitude : magnitude;
      uint32_t* const at = entry + (key >> Shift) - kFirst;
      if (*at != kNoMidpoint) return false;
      *at = key & kTrailing;
    }
    constexpr uint32_t kNegative = Signed ? ((kMagnitude - kBucketTop) >> Shift) - kFirst : kCount;
    uint32_t code = 0;
    count_codes(kNegative, kCount, &code);
    count_codes(0, kNegative, &code);
    return true;
  }

  I32 code_of(F32 unit) const { return bucket_codes<Shift, Signed>(unit, entry, kBucketFloor); }

 private:
  void count_codes(uint32_t begin, uint32_t end, uint32_t* code) {
    for (uint32_t bucket = begin; bucket < end; ++bucket) {
      const bool has_midpoint = entry[bucket] != kNoMidpoint;
      entry[bucket] = *code << Shift | (has_midpoint ? entry[bucket] : kTrailing);
      *code += has_midpoint ? 1U : 0U;
    }
  }
};

// ---- moments in 8 bits ----------------------------------------------------------------------------------------------

struct AdamW8Job {
  const AdamW8Args* args;
  CodeBuckets<17, true> m_codes;
  CodeBuckets<16, false> v_codes;  // of a v above 0, less 1
  Failure* failure;

  const AdamWArgs& common() const { return args->common; }

  template <class T, class G>
  void run(int64_t index) const {
    const int64_t each = blocks_per_task(args->block_size);
    const int64_t last = smaller(divide_up(common().count, args->block_size), (index + 1) * each);
    for (int64_t block = index * each; block < last; ++block) run_block<T, G>(block);
  }

  // The new moments wait in the first-level cache until their largest is known.
  template <class T, class G>
  void run_block(int64_t block) const {
    const AdamWArgs& each = common();
    const AdamWVectors rule = vectors_of(each.rule);
    const int64_t start = block * args->block_size;
    const int64_t count = smaller(args->block_size, each.count - start);
    alignas(64) float ms[kMaxBlock];
    alignas(64) float vs[kMaxBlock];
    const F32 m_scale = broadcast(args->m_absmax[block]), v_scale = broadcast(args->v_absmax[block]);
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t left = count - i;
      F32 m = mul(gather(args->m_map, load_some_bytes(args->m + start + i, left)), m_scale);
      F32 v = mul(gather(args->v_map, load_some_bytes(args->v + start + i, left)), v_scale);
      update_moments(rule, load_some(static_cast<const G*>(each.grad) + start + i, left), &m, &v);
      store(ms + i, m);
      store(vs + i, v);
    }
    const uint32_t m_largest = largest_magnitude(ms, count), v_largest = largest_magnitude(vs, count);
    if (m_largest >= kInfinity || v_largest >= kInfinity) return failure->report_block(block);
    args->m_absmax[block] = absmax_of(m_largest);
    args->v_absmax[block] = absmax_of(v_largest);
    const F32 m_factor = broadcast(1.0F / args->m_absmax[block]), v_factor = broadcast(1.0F / args->v_absmax[block]);
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t left = count - i;
      const F32 m = load(ms + i), v = load(vs + i);
      const F32 param = load_some(static_cast<const T*>(each.param) + start + i, left);
      store_param<T>(each, start + i, updated(rule, param, m, v), left);
      const F32 v_unit = clamp_unit(mul(v, v_factor));
      store_some_bytes(args->m + start + i, m_codes.code_of(clamp_unit(mul(m, m_factor))), left);
      store_some_bytes(args->v + start + i, advance_where_greater(v_codes.code_of(v_unit), v_unit, zero(), 1), left);
    }
  }
};

// ---- dtypes, tasks --------------------------------------------------------------------------------------------------

template <class T, class Job>
static void adamw_with_grad(const Job& job, int64_t index) {
  switch (job.common().grad_dtype) {
    case DType::f32:
      return job.template run<T, float>(index);
    case DType::f16:
      return job.template run<T, F16>(index);
    case DType::bf16:
      return job.template run<T, Bf16>(index);
  }
}

template <class Job>
static void adamw_task(void* context, int64_t index) {
  const Job& job = *static_cast<const Job*>(context);
  switch (job.common().dtype) {
    case DType::f32:
      return adamw_with_grad<float>(job, index);
    case DType::f16:
      return adamw_with_grad<F16>(job, index);
    case DType::bf16:
      return adamw_with_grad<Bf16>(job, index);
  }
}

static Status adamw_32bit(const AdamW32Args& args) {
  AdamW32Job job{&args};
  parallel_for(args.common.threads, divide_up(args.common.count, kSpan), adamw_task<AdamW32Job>, &job);
  return success();
}

static Status adamw_8bit(const AdamW8Args& args) {
  Failure failure;
  AdamW8Job job;
  job.args = &args;
  job.failure = &failure;
  Midpoints midpoints;
  find_midpoints(args.m_map, &midpoints);
  if (!job.m_codes.fill(midpoints.threshold, 0)) return bad_argument("m_map", 0);
  find_midpoints(args.v_map, &midpoints);
  if (!job.v_codes.fill(midpoints.threshold, 1)) return bad_argument("v_map", 0);
  const int64_t blocks = divide_up(args.common.count, args.block_size);
  parallel_for(args.common.threads, divide_up(blocks, blocks_per_task(args.block_size)), adamw_task<AdamW8Job>, &job);
  return failure.status();
}

// ---- the norm of a gradient -----------------------------------------------------------------------------------------

// Element i is squared and summed in fp32 in column i % 16 of its run of 4096, whatever the ISA's vectors; columns and
// runs are summed in double, in order.
constexpr int64_t kSquaresColumns = 16;
constexpr int64_t kSquaresInFloat = 4096;

template <class T>
static double squares_of(const T* x, int64_t count) {
  constexpr int kVectors = static_cast<int>(kSquaresColumns) / kLanes;
  double total = 0.0;
  for (int64_t start = 0; start < count; start += kSquaresInFloat) {
    const int64_t end = smaller(count, start + kSquaresInFloat);
    F32 sums[kVectors];
    for (F32& each : sums) each = zero();
    for (int64_t i = start; i < end; i += kSquaresColumns) {
      for (int j = 0; j < kVectors; ++j) {
        const int64_t at = i + j * kLanes;
        if (at >= end) break;
        const F32 value = load_some(x + at, end - at);
        sums[j] = add(sums[j], mul(value, value));
      }
    }
    alignas(64) float columns[kSquaresColumns];
    for (int j = 0; j < kVectors; ++j) store(columns + j * kLanes, sums[j]);
    for (const float column : columns) total += double{column};
  }
  return total;
}

static void squares_task(void* context, int64_t index) {
  const SquaresArgs& args = *static_cast<const SquaresArgs*>(context);
  const int64_t start = index * kSquaresRun;
  const int64_t count = smaller(kSquaresRun, args.count - start);
  switch (args.dtype) {
    case DType::f32:
      args.sums[index] = squares_of(static_cast<const float*>(args.x) + start, count);
      return;
    case DType::f16:
      args.sums[index] = squares_of(static_cast<const F16*>(args.x) + start, count);
      return;
    case DType::bf16:
      args.sums[index] = squares_of(static_cast<const Bf16*>(args.x) + start, count);
      return;
  }
}

static Status sum_of_squares(const SquaresArgs& args) {
  SquaresArgs job = args;
  parallel_for(args.threads, divide_up(args.count, kSquaresRun), squares_task, &job);
  return success();
}
