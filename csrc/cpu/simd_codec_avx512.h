// What the codecs alone need of AVX-512. Included by simd_avx512.h.

// One line of 64 bytes past the caches; `to` is aligned. finish_streams makes the lines visible to other threads.
static inline void stream_line(void* to, const void* from) {
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
static inline void finish_streams() { _mm_sfence(); }

// v / 127, correctly rounded, for v neither tiny nor huge: the quotient by the reciprocal is off by at most one unit,
// its remainder is exact, and the reciprocal of 127 is the nearest float (Markstein 1990).
static inline F32 divide_by_127(F32 v) {
  const __m512 reciprocal = _mm512_set1_ps(1.0F / 127.0F);
  const __m512 quotient = _mm512_mul_ps(v, reciprocal);
  const __m512 rest = _mm512_fnmadd_ps(quotient, _mm512_set1_ps(127.0F), v);
  return _mm512_fmadd_ps(rest, reciprocal, quotient);
}
static inline F32 through_f16(F32 v) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

// 16 ascending thresholds, the last one infinite. rank_of: how many of them are below s, by a binary search.
struct Thresholds {
  __m512 all, third, seventh, eleventh;
};
static inline Thresholds load_thresholds(const float* t) {
  return {_mm512_loadu_ps(t), _mm512_set1_ps(t[3]), _mm512_set1_ps(t[7]), _mm512_set1_ps(t[11])};
}
static inline I32 rank_of(F32 s, const Thresholds& t) {
  const __mmask16 upper = _mm512_cmp_ps_mask(s, t.seventh, _CMP_GT_OQ);
  __m512i rank = _mm512_maskz_mov_epi32(upper, _mm512_set1_epi32(8));
  rank = advance_where_greater(rank, s, _mm512_mask_blend_ps(upper, t.third, t.eleventh), 4);
  rank = advance_where_greater(rank, s, _mm512_permutexvar_ps(offset(rank, 1), t.all), 2);
  return advance_where_greater(rank, s, _mm512_permutexvar_ps(rank, t.all), 1);
}

// 32 ranks -> 16 packed bytes of map[rank]; an even element goes to the high nibble.
static inline void pack_ranks(const I32* ranks, const uint8_t* map, uint8_t* packed) {
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(map)));
  const __m512i both = _mm512_or_si512(ranks[0], _mm512_slli_epi32(ranks[1], 8));
  const __m512i codes = _mm512_shuffle_epi8(table, both);
  const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(codes, 4), _mm512_srli_epi64(codes, 32));
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm_shuffle_epi8(_mm512_cvtepi64_epi16(pairs), order));
}

// The codes of kLanes numbers, |v| <= 1, by their buckets (see CodeBuckets in optimizer.inl).
template <int Shift, bool Signed>
static inline I32 bucket_codes(F32 v, const uint32_t* entries, uint32_t floor) {
  const __m512i bits = _mm512_castps_si512(v), magnitude = _mm512_set1_epi32(INT32_MAX);
  __m512i key = _mm512_max_epu32(_mm512_and_si512(bits, magnitude), _mm512_set1_epi32(static_cast<int>(floor)));
  if (Signed) key = _mm512_mask_xor_epi32(key, _mm512_movepi32_mask(bits), key, magnitude);
  const __m512i first = _mm512_set1_epi32(static_cast<int>(floor >> Shift));
  const __m512i entry = _mm512_i32gather_epi32(_mm512_sub_epi32(_mm512_srli_epi32(key, Shift), first), entries, 4);
  const __m512i trailing = _mm512_set1_epi32((1 << Shift) - 1), code = _mm512_srli_epi32(entry, Shift);
  const __mmask16 above = _mm512_cmpgt_epu32_mask(_mm512_and_si512(key, trailing), _mm512_and_si512(entry, trailing));
  return _mm512_mask_add_epi32(code, above, code, _mm512_set1_epi32(1));
}

// ---- 16-bit floats as integers: their keys, and the ranks of keys ---------------------------------------------------

struct Words {
  __m512i lanes;
};
static inline Words zero_words() { return {_mm512_setzero_si512()}; }
// The magnitudes of 32 fp16 or bf16 values, as integers.
static inline Words max_words(Words so_far, const uint16_t* x) {
  const __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(x), _mm512_set1_epi16(0x7FFF));
  return {_mm512_max_epu16(so_far.lanes, magnitude)};
}
static inline uint32_t reduce_max(Words v) {
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(v.lanes), _mm512_extracti64x4_epi64(v.lanes, 1));
  return reduce_max_words(_mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}

// The key of the largest value of the dtype that is not above v; a key is the magnitude's bits, negative for v < 0.
static inline I32 floor_key(F32 v, const Bf16*) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
  const __mmask16 negative = _mm512_movepi32_mask(bits);
  return _mm512_srai_epi32(_mm512_mask_sub_epi32(magnitude, negative, _mm512_setzero_si512(), magnitude), 16);
}
static inline I32 floor_key(F32 v, const F16*) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFF));
  const __mmask16 negative = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x8000));
  return _mm512_mask_sub_epi32(magnitude, negative, _mm512_setzero_si512(), magnitude);
}
// The value that a key stands for.
static inline F32 key_value(I32 key, const Bf16*) {
  const __m512i sign = _mm512_and_si512(key, _mm512_set1_epi32(INT32_MIN));
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_slli_epi32(_mm512_abs_epi32(key), 16), sign));
}
static inline F32 key_value(I32 key, const F16*) {
  const __m512i sign = _mm512_and_si512(_mm512_srai_epi32(key, 16), _mm512_set1_epi32(0x8000));
  return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_or_si512(_mm512_abs_epi32(key), sign)));
}
// Keys as pack_keys compares them: a negative one with its magnitude's bits flipped, which takes one instruction less.
static inline void store_keys(int16_t* p, I32 key) {
  const __m512i flipped = _mm512_add_epi32(key, _mm512_srai_epi32(key, 31));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(flipped));
}

struct KeyTable {
  __m512i all, third, seventh, eleventh;
};
using KeyThresholds = KeyTable;
static inline KeyThresholds load_key_thresholds(const int16_t* t) {
  return {_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(t))), _mm512_set1_epi16(t[3]),
          _mm512_set1_epi16(t[7]), _mm512_set1_epi16(t[11])};
}
static inline __m512i advance_where_greater(__m512i rank, __m512i a, __m512i b, short by) {
  return _mm512_mask_add_epi16(rank, _mm512_cmpgt_epi16_mask(a, b), rank, _mm512_set1_epi16(by));
}
// 32 fp16 or bf16 values -> 16 packed bytes of map[rank].
static inline void pack_keys(const uint16_t* x, const KeyThresholds& t, const uint8_t* map, uint8_t* packed) {
  const __m512i bits = _mm512_loadu_si512(x);
  // sign ? ~magnitude : magnitude, that is bits ^ (sign & 0x7FFF)
  const __m512i key = _mm512_ternarylogic_epi64(bits, _mm512_srai_epi16(bits, 15), _mm512_set1_epi16(0x7FFF), 0x78);
  const __mmask32 upper = _mm512_cmpgt_epi16_mask(key, t.seventh);
  __m512i rank = _mm512_maskz_mov_epi16(upper, _mm512_set1_epi16(8));
  rank = advance_where_greater(rank, key, _mm512_mask_blend_epi16(upper, t.third, t.eleventh), 4);
  const __m512i second = _mm512_permutexvar_epi16(_mm512_add_epi16(rank, _mm512_set1_epi16(1)), t.all);
  rank = advance_where_greater(rank, key, second, 2);
  rank = advance_where_greater(rank, key, _mm512_permutexvar_epi16(rank, t.all), 1);
  const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(map)));
  const __m512i codes = _mm512_maskz_shuffle_epi8(0x5555555555555555U, table, rank);
  const __m512i bytes = _mm512_madd_epi16(codes, _mm512_set1_epi32(0x00010010));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi32_epi8(bytes));
}

// ---- codes by buckets, for search="mse" -----------------------------------------------------------------------------

#define NYBBLE_BUCKETS 1
// 31 equal buckets of [-1, 1]; each knows its one threshold and the codes below and above it.
struct Buckets {
  __m512 threshold[2], low[2], high[2];

  F32 at(F32 s) const;
};
static inline Buckets load_buckets(const float* threshold, const float* low, const float* high) {
  return {{_mm512_loadu_ps(threshold), _mm512_loadu_ps(threshold + 16)},
          {_mm512_loadu_ps(low), _mm512_loadu_ps(low + 16)},
          {_mm512_loadu_ps(high), _mm512_loadu_ps(high + 16)}};
}
// The bucket, 1 to 31, in the low five bits, all that a permutation of 32 entries looks at: added to 1.5 * 2^23, a
// number is rounded to an integer.
static inline I32 bucket_of(F32 unit) {
  return _mm512_castps_si512(_mm512_fmadd_ps(unit, _mm512_set1_ps(15.25F), _mm512_set1_ps(12582912.0F + 16.0F)));
}
static inline void store_index(uint32_t* p, I32 v) { _mm512_storeu_si512(p, v); }
inline F32 Buckets::at(F32 s) const {
  // The smaller magnitude of the two with the sign of s: a clamp in one instruction.
  const __m512 unit = _mm512_range_ps(s, _mm512_set1_ps(1.0F), 0x02);
  const __m512i bucket = bucket_of(unit);
  const __mmask16 above =
      _mm512_cmp_ps_mask(unit, _mm512_permutex2var_ps(threshold[0], bucket, threshold[1]), _CMP_GT_OQ);
  const __m512 code = _mm512_permutex2var_ps(low[0], bucket, low[1]);
  const __m512 other = _mm512_permutex2var_ps(high[0], bucket, high[1]);
  return _mm512_mask_blend_ps(above, code, other);
}
