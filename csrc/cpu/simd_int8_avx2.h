// Integer dot products for linear_int8.inl with AVX2: int16 pairs (vpmaddwd), which are exact; the instruction that
// multiplies bytes (vpmaddubsw) saturates. What each one does: simd_int8_generic.h says, name by name.

using Code = int16_t;
constexpr uint8_t kCodeFlip = 0;
constexpr int kStepsOfDot = 1;
constexpr int kRowsOfDot = 1;
constexpr int kDotRows = 4;

using Sums = __m256i;
using Steps = __m256i;
using WeightSteps = __m256i;

static inline Sums broadcast_sum(int32_t v) { return _mm256_set1_epi32(v); }
static inline Sums load_steps(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
static inline WeightSteps load_weight(const char* p, int64_t) {
  int weight;
  memcpy(&weight, p, sizeof weight);
  return _mm256_set1_epi32(weight);
}
static inline void dot_steps(Sums* sums, const Steps* x, WeightSteps weight) {
  *sums = _mm256_add_epi32(*sums, _mm256_madd_epi16(*x, weight));
}
static inline void split_rows(Sums*) {}
static inline void turn_codes(const Code* rows, int64_t stride, uint32_t* to) {
  transpose(reinterpret_cast<const uint32_t*>(rows), stride / 2, to, kLanes);
}
static inline F32 to_f32(Sums sums) { return _mm256_cvtepi32_ps(sums); }
static inline int32_t flip_sum(const Code*, int64_t) { return 0; }
static inline void decode_with(const uint8_t* p, __m128i table, int8_t* out) {
  __m128i low, high;
  split_nibbles(p, &low, &high);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(table, low));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16), _mm_shuffle_epi8(table, high));
}
static inline void decode_codes_32(const uint8_t* p, const int8_t* codes, int8_t* out) {
  decode_with(p, _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), out);
}
static inline void decode_codes_64(const uint8_t* p, const float* codebook, float factor, int8_t* out) {
  const __m256 by = _mm256_set1_ps(factor);
  const __m256i first = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(codebook), by));
  const __m256i second = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(codebook + 8), by));
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xD8);
  const __m128i table = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  decode_with(p, table, out);
  decode_with(p + 16, table, out + 32);
}
