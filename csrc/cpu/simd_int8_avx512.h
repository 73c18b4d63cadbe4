// Integer dot products for linear_int8.inl with AVX-512: VNNI's int8 quads where the ISA has them (NYBBLE_VNNI), else
// int16 pairs. What each one does: simd_int8_generic.h says, name by name.

#ifdef NYBBLE_VNNI
using Code = int8_t;
#else
using Code = int16_t;
#endif
#if defined(NYBBLE_VNNI) && !defined(NYBBLE_AMX)
constexpr uint8_t kCodeFlip = 0x80;  // vpdpbusd takes x as unsigned: x + 128
#else
constexpr uint8_t kCodeFlip = 0;  // tiles multiply signed by signed
#endif

constexpr int kStepsOfDot = 1;
constexpr int kRowsOfDot = 1;
constexpr int kDotRows = 8;

using Sums = __m512i;
using Steps = __m512i;
using WeightSteps = __m512i;

static inline Sums broadcast_sum(int32_t v) { return _mm512_set1_epi32(v); }
static inline Sums load_steps(const void* p) { return _mm512_loadu_si512(p); }
static inline WeightSteps load_weight(const char* p, int64_t) {
  int weight;
  memcpy(&weight, p, sizeof weight);
  return _mm512_set1_epi32(weight);
}
static inline void dot_steps(Sums* sums, const Steps* x, WeightSteps weight) {
#ifdef NYBBLE_VNNI
  *sums = _mm512_dpbusd_epi32(*sums, *x, weight);
#else
  *sums = _mm512_add_epi32(*sums, _mm512_madd_epi16(*x, weight));
#endif
}
static inline void split_rows(Sums*) {}
static inline void turn_codes(const Code* rows, int64_t stride, uint32_t* to) {
  transpose(reinterpret_cast<const uint32_t*>(rows), stride * static_cast<int64_t>(sizeof(Code)) / 4, to, kLanes);
}
static inline F32 to_f32(Sums sums) { return _mm512_cvtepi32_ps(sums); }
#if defined(NYBBLE_VNNI) && !defined(NYBBLE_AMX)
static inline int32_t flip_sum(const Code* codes, int64_t count) {
  __m512i sums = _mm512_setzero_si512();
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(kCodeFlip));
  for (int64_t i = 0; i < count; i += 64) sums = _mm512_dpbusd_epi32(sums, flip, _mm512_loadu_si512(codes + i));
  return _mm512_reduce_add_epi32(sums);
}
#else
static inline int32_t flip_sum(const Code*, int64_t) { return 0; }
#endif
static inline void decode_codes_32(const uint8_t* p, const int8_t* codes, int8_t* out) {
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  __m128i low, high;
  split_nibbles(p, &low, &high);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(table, low));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16), _mm_shuffle_epi8(table, high));
}
static inline void decode_codes_64(const uint8_t* p, const float* codebook, float factor, int8_t* out) {
  const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(factor));
  const __m512i table = _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(_mm512_cvtps_epi32(scaled)));
  const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i both = _mm512_or_si512(_mm512_srli_epi16(words, 4), _mm512_slli_epi16(words, 8));
  const __m512i index = _mm512_and_si512(both, _mm512_set1_epi8(15));
  _mm512_storeu_si512(out, _mm512_shuffle_epi8(table, index));
}
