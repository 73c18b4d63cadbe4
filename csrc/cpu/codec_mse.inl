// The 4-bit rule in registers, and the search for the scale of least squared error.

// The codebook in ascending order, with the midpoints that separate its ranks.
struct SortedCodebook {
  float code[16];
  float threshold[16];  // threshold[15] is never exceeded; those out of reach of clamp(s, -1, 1) are infinite instead
  uint8_t index[16];    // rank -> place in the codebook
  uint8_t zero_rank;    // of the exact 0.0, which fills partial blocks
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
  const float infinity = float_of(kInfinity);
  for (int i = 0; i < 16; ++i) sorted.code[i] = codebook[sorted.index[i]];
  for (int i = 0; i < 15; ++i) {
    const float middle = (sorted.code[i] + sorted.code[i + 1]) / 2.0F;
    // So no kernel has to clamp s: nothing clamped exceeds 1, everything exceeds what lies below -1.
    sorted.threshold[i] = middle >= 1.0F ? infinity : middle < -1.0F ? -infinity : middle;
  }
  sorted.threshold[15] = infinity;
  sorted.zero_rank = 0;
  while (0.0F > sorted.threshold[sorted.zero_rank]) ++sorted.zero_rank;
  return sorted;
}

// How a value in units of the scale finds its code: for any codebook by a search among the thresholds...
struct CodesByRank {
  Thresholds thresholds;
  Table codes;

  F32 at(F32 s) const { return lookup(codes, rank_of(s, thresholds)); }
};

static CodesByRank codes_by_rank(const SortedCodebook& sorted) {
  return {load_thresholds(sorted.threshold), load_table(sorted.code)};
}

#ifdef NYBBLE_BUCKETS
// ... or, where no two thresholds share one of 31 equal buckets of [-1, 1] (NF4, INT4), by the bucket's own threshold
// and the codes on its two sides: 9 instructions instead of 17.
static bool codes_by_bucket(const SortedCodebook& sorted, Buckets* buckets) {
  alignas(64) uint32_t bucket[16];
  alignas(64) float threshold[32], low[32], high[32];
  for (int i = 0; i < 16; i += kLanes) store_index(bucket + i, bucket_of(clamp_unit(load(sorted.threshold + i))));
  int rank = 0;
  while (sorted.threshold[rank] == -float_of(kInfinity)) ++rank;
  for (uint32_t b = 0; b < 32; ++b) {
    threshold[b] = float_of(kInfinity);
    low[b] = high[b] = sorted.code[rank];
    if (sorted.threshold[rank] == float_of(kInfinity) || (bucket[rank] & 31U) != b) continue;
    threshold[b] = sorted.threshold[rank++];
    high[b] = sorted.code[rank];
    if (sorted.threshold[rank] != float_of(kInfinity) && (bucket[rank] & 31U) == b) return false;
  }
  *buckets = load_buckets(threshold, low, high);
  return true;
}
#endif

constexpr int kCandidates = 33;
constexpr int kCandidateVectors = (kCandidates - 1) / kLanes;

// 1, 63/64, ... 1/2: what the search multiplies absmax with.
static inline float factor_of(int candidate) { return 1.0F - static_cast<float>(candidate) / 64.0F; }

struct Candidates {
  alignas(64) float dot[kCandidates + 15];   // <x, c>, in units of absmax * factor: neither tiny nor huge blocks leave
  alignas(64) float norm[kCandidates + 15];  // <c, c>     fp32's range
};

// What each element's error counts.
struct AllAlike {
  F32 of_one(int64_t, F32 v) const { return v; }
  F32 of_lanes(int64_t, F32 v) const { return v; }
};
struct Weighed {
  const float* weight;  // [padded], 0 where x is padded

  F32 of_one(int64_t i, F32 v) const { return mul(broadcast(weight[i]), v); }
  F32 of_lanes(int64_t i, F32 v) const { return mul(load(weight + i), v); }
};

// Candidates 1 to 32 side by side in lanes, one value of x at a time: no sum across lanes. Candidate 0 the other way.
template <class Codes, class Weights>
static inline void sum_candidates(const float* x, const Weights& weights, int64_t count, int64_t padded, float absmax,
                                  const Codes& codes, float norm_of_padding, Candidates* sums) {
  alignas(64) float scale[kCandidates - 1];
  for (int i = 0; i < kCandidates - 1; ++i) scale[i] = absmax * factor_of(i + 1);
  F32 by[kCandidateVectors], dot[kCandidateVectors], norm[kCandidateVectors];
  for (int v = 0; v < kCandidateVectors; ++v) {
    by[v] = div(broadcast(1.0F), load(scale + v * kLanes));
    dot[v] = norm[v] = zero();
  }
  for (int64_t i = 0; i < count; ++i) {
    const F32 value = broadcast(x[i]);
    for (int v = 0; v < kCandidateVectors; ++v) {
      const F32 s = mul(value, by[v]);
      const F32 code = codes.at(s);
      const F32 weighed = weights.of_one(i, code);
      dot[v] = fma(s, weighed, dot[v]);
      norm[v] = fma(code, weighed, norm[v]);
    }
  }
  for (int v = 0; v < kCandidateVectors; ++v) {
    store(sums->dot + 1 + v * kLanes, dot[v]);
    store(sums->norm + 1 + v * kLanes, norm[v]);
  }
  F32 first_dot = zero();
  F32 first_norm = zero();
  const F32 whole = broadcast(1.0F / absmax);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const F32 s = mul(load(x + i), whole);
    const F32 code = codes.at(s);
    const F32 weighed = weights.of_lanes(i, code);
    first_dot = fma(s, weighed, first_dot);
    first_norm = fma(code, weighed, first_norm);
  }
  sums->dot[0] = sum(first_dot);
  sums->norm[0] = sum(first_norm) - norm_of_padding;
}

// The scale of least squared error, x padded with zeros to a multiple of kLanes. For each of 33 candidate scales the
// codes c are picked by the rule; given them the best scale is <x, c> / <c, c> and the error
// |x|^2 - <x, c>^2 / <c, c>, all products weighed by `weight` [padded] unless that is null.
template <class Codes>
static float search_mse(const float* x, const float* weight, int64_t count, int64_t padded, float absmax,
                        const Codes& codes, float code_of_zero) {
  Candidates sums;
  if (weight != nullptr) {
    sum_candidates(x, Weighed{weight}, count, padded, absmax, codes, 0.0F, &sums);
  } else {
    // A codebook without 0 gives the padding codes that are not 0; they must not count.
    const float norm_of_padding = static_cast<float>(padded - count) * code_of_zero * code_of_zero;
    sum_candidates(x, AllAlike{}, count, padded, absmax, codes, norm_of_padding, &sums);
  }
  float best_gain = 0.0F;
  float best_scale = absmax;
  for (int i = 0; i < kCandidates; ++i) {
    if (!(sums.norm[i] > 0.0F) || !(sums.dot[i] > 0.0F)) continue;
    const float projected = sums.dot[i] * factor_of(i);
    const float gain = projected * (projected / sums.norm[i]);
    if (gain > best_gain) {
      const float scale = sums.dot[i] / sums.norm[i] * (absmax * factor_of(i));
      if (bits_of(scale) >= kInfinity) continue;  // absmax close to fp32's largest: the best scale may lie beyond it
      best_gain = gain;
      best_scale = scale;
    }
  }
  return best_scale > kSmallestAbsmax ? best_scale : kSmallestAbsmax;
}
