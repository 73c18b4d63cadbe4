// Integer dot products for linear_int8.inl with AVX2: int16 pairs (vpmaddwd), which are exact; the instruction that
// multiplies bytes (vpmaddubsw) saturates. What each one does: simd_int8_generic.h says, name by name.

using Code = int16_t;
constexpr uint8_t kCodeFlip = 0;

using Sums = __m256i;

static inline Sums zero_sums() { return _mm256_setzero_si256(); }
static inline Sums load_step(const uint32_t* panel) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel));
}
static inline Sums dot_step(Sums acc, uint32_t x, Sums panel) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_set1_epi32(static_cast<int>(x)), panel));
}
static inline F32 to_f32(Sums sums) { return _mm256_cvtepi32_ps(sums); }
static inline void decode_codes_32(const uint8_t* p, const int8_t* codes, int8_t* out) {
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  __m128i low, high;
  split_nibbles(p, &low, &high);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(table, low));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16), _mm_shuffle_epi8(table, high));
}
static inline void decode_codes_64(const uint8_t* p, const int8_t* codes, int8_t* out) {
  decode_codes_32(p, codes, out);
  decode_codes_32(p + 16, codes, out + 32);
}
