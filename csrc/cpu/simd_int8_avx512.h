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

// What follows is faster than decoding in order. The order of the contraction is free as long as x has the same one:
// of every 128 codes, two blocks' or more, the even ones come first.
#define NYBBLE_CODES_APART 1

// Codes in order -> apart; a multiple of 128.
static inline void split_codes(int8_t* codes, int64_t count) {
  for (int64_t i = 0; i < count; i += 128, codes += 128) {
    const __m512i a = _mm512_loadu_si512(codes);
    const __m512i b = _mm512_loadu_si512(codes + 64);
    const __m512i odd_a = _mm512_srli_epi16(a, 8);
    const __m512i odd_b = _mm512_srli_epi16(b, 8);
    const __m512i even = _mm512_castsi256_si512(_mm512_cvtepi16_epi8(a));
    const __m512i odd = _mm512_castsi256_si512(_mm512_cvtepi16_epi8(odd_a));
    _mm512_storeu_si512(codes, _mm512_inserti64x4(even, _mm512_cvtepi16_epi8(b), 1));
    _mm512_storeu_si512(codes + 64, _mm512_inserti64x4(odd, _mm512_cvtepi16_epi8(odd_b), 1));
  }
}

// `scales` of 16 runs, which are two groups -> each one by its group's step, and the two steps: the groups' largest
// magnitudes times `unit`. A group of nothing but zeros (or what is below 1e-40) has step 0, one with a damaged scale
// NaN; both have codes of zero.
static inline void group_factors(const float* scales, float unit, float* factors, float* steps) {
  const __m512 v = _mm512_loadu_ps(scales);
  __m512i largest = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF));
  largest = _mm512_max_epu32(largest, _mm512_shuffle_epi32(largest, static_cast<_MM_PERM_ENUM>(0xB1)));
  largest = _mm512_max_epu32(largest, _mm512_shuffle_epi32(largest, static_cast<_MM_PERM_ENUM>(0x4E)));
  largest = _mm512_max_epu32(largest, _mm512_shuffle_i32x4(largest, largest, 0xB1));
  const __m512 by = _mm512_mul_ps(_mm512_castsi512_ps(largest), _mm512_set1_ps(unit));
  const __m512 infinity = _mm512_castsi512_ps(_mm512_set1_epi32(0x7F800000));
  const __mmask16 some = _mm512_cmp_ps_mask(by, _mm512_set1_ps(0x1p-140F), _CMP_GE_OQ);
  const __mmask16 bad = _mm512_cmp_ps_mask(by, infinity, _CMP_NLT_UQ);
  const __m512 step = _mm512_maskz_mov_ps(some, by);
  _mm512_storeu_ps(factors, _mm512_maskz_div_ps(_kandn_mask16(bad, some), v, by));
  const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7FC00000));
  const __m512 found = _mm512_mask_mov_ps(step, bad, nan);
  steps[0] = _mm512_cvtss_f32(found);
  steps[1] = _mm_cvtss_f32(_mm512_extractf32x4_ps(found, 2));
}

// 16 codes of each of four runs, codebook * factor rounded to nearest even. Byte 4 j + b of 128-bit lane i is code
// 4 i + b of run j.
static inline __m512i tables_of_runs(__m512 codebook, const float* factors) {
  __m512i codes[4];
  for (int i = 0; i < 4; ++i) codes[i] = _mm512_cvtps_epi32(_mm512_mul_ps(codebook, _mm512_set1_ps(factors[i])));
  return _mm512_packs_epi16(_mm512_packs_epi32(codes[0], codes[1]), _mm512_packs_epi32(codes[2], codes[3]));
}
// 64 packed bytes of runs `First` and First + 1 -> 128 codes apart.
template <int First>
static inline void decode_two_runs(const uint8_t* p, __m512i tables, int8_t* out) {
  constexpr int kA = First, kB = First + 1;
  const __m512i at = _mm512_setr_epi32(kA, 4 + kA, 8 + kA, 12 + kA, kA, 4 + kA, 8 + kA, 12 + kA, kB, 4 + kB, 8 + kB,
                                       12 + kB, kB, 4 + kB, 8 + kB, 12 + kB);
  const __m512i table = _mm512_permutexvar_epi32(at, tables);
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i bytes = _mm512_loadu_si512(p);
  _mm512_storeu_si512(out, _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble)));
  _mm512_storeu_si512(out + 64, _mm512_shuffle_epi8(table, _mm512_and_si512(bytes, nibble)));
}
// `count` codes apart, a multiple of 128, from packed bytes in order; `factors` of their runs, four of which are read
// for 256 codes or less. Fetches what lies at `next`, as much.
static inline void decode_codes_apart(const uint8_t* p, int64_t count, const float* codebook, const float* factors,
                                      const uint8_t* next, int8_t* out) {
  const __m512 codes = _mm512_loadu_ps(codebook);
  for (; count >= 256; count -= 256, p += 128, next += 128, factors += 4, out += 256) {
    prefetch(next);
    prefetch(next + 64);
    const __m512i tables = tables_of_runs(codes, factors);
    decode_two_runs<0>(p, tables, out);
    decode_two_runs<2>(p + 64, tables, out + 128);
  }
  if (count > 0) decode_two_runs<0>(p, tables_of_runs(codes, factors), out);
}
