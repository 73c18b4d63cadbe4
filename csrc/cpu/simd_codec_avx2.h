// What the codecs alone need of AVX2. Included by simd_avx2.h; what each one does: simd_codec_avx512.h says.

static inline void stream_line(void* to, const void* from) {
  const __m256i* line = static_cast<const __m256i*>(from);
  _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_loadu_si256(line));
  _mm256_stream_si256(static_cast<__m256i*>(to) + 1, _mm256_loadu_si256(line + 1));
}
static inline void finish_streams() { _mm_sfence(); }
static inline F32 divide_by_127(F32 v) {
  const __m256 reciprocal = _mm256_set1_ps(1.0F / 127.0F);
  const __m256 quotient = _mm256_mul_ps(v, reciprocal);
  const __m256 rest = _mm256_fnmadd_ps(quotient, _mm256_set1_ps(127.0F), v);
  return _mm256_fmadd_ps(rest, reciprocal, quotient);
}
static inline F32 through_f16(F32 v) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

// A level of the search never asks for more than 8 thresholds: one permutation each.
struct Thresholds {
  __m256 middle, quarters, eighths, sixteenths;
};
static inline Thresholds load_thresholds(const float* t) {
  return {_mm256_set1_ps(t[7]), _mm256_setr_ps(t[3], t[11], 0, 0, 0, 0, 0, 0),
          _mm256_setr_ps(t[1], t[5], t[9], t[13], 0, 0, 0, 0),
          _mm256_setr_ps(t[0], t[2], t[4], t[6], t[8], t[10], t[12], t[14])};
}
// 2 rank + (s > threshold).
static inline I32 descend(I32 rank, F32 s, F32 threshold) {
  const __m256i greater = _mm256_castps_si256(_mm256_cmp_ps(s, threshold, _CMP_GT_OQ));
  return _mm256_sub_epi32(_mm256_add_epi32(rank, rank), greater);
}
static inline I32 rank_of(F32 s, const Thresholds& t) {
  I32 rank = descend(_mm256_setzero_si256(), s, t.middle);
  rank = descend(rank, s, _mm256_permutevar8x32_ps(t.quarters, rank));
  rank = descend(rank, s, _mm256_permutevar8x32_ps(t.eighths, rank));
  return descend(rank, s, _mm256_permutevar8x32_ps(t.sixteenths, rank));
}

// 32 bytes a0..7 b0..7 | a8..15 b8..15 of ranks -> 16 packed bytes of a, then of b.
static inline void pack_split_ranks(__m256i ranks, const uint8_t* map, uint8_t* packed) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(map)));
  const __m256i words = _mm256_maddubs_epi16(_mm256_shuffle_epi8(table, ranks), _mm256_set1_epi16(0x0110));
  const __m256i bytes = _mm256_packus_epi16(words, words);
  const __m128i joined = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), joined);
}
static inline void pack_ranks(const I32* ranks, const uint8_t* map, uint8_t* packed) {
  // Packing works on the halves of a register, so the halves are put where it leaves them in order.
  const __m256i first = _mm256_packus_epi32(_mm256_permute2x128_si256(ranks[0], ranks[1], 0x20),
                                            _mm256_permute2x128_si256(ranks[0], ranks[1], 0x31));
  const __m256i second = _mm256_packus_epi32(_mm256_permute2x128_si256(ranks[2], ranks[3], 0x20),
                                             _mm256_permute2x128_si256(ranks[2], ranks[3], 0x31));
  pack_split_ranks(_mm256_packus_epi16(first, second), map, packed);
}

template <int Shift, bool Signed>
static inline I32 bucket_codes(F32 v, const uint32_t* entries, uint32_t floor) {
  const __m256i bits = _mm256_castps_si256(v), magnitude = _mm256_set1_epi32(INT32_MAX);
  __m256i key = _mm256_max_epi32(_mm256_and_si256(bits, magnitude), _mm256_set1_epi32(static_cast<int>(floor)));
  if (Signed) key = _mm256_xor_si256(key, _mm256_srli_epi32(_mm256_srai_epi32(bits, 31), 1));
  const __m256i bucket =
      _mm256_sub_epi32(_mm256_srli_epi32(key, Shift), _mm256_set1_epi32(static_cast<int>(floor >> Shift)));
  const __m256i entry = _mm256_i32gather_epi32(reinterpret_cast<const int*>(entries), bucket, 4);
  const __m256i trailing = _mm256_set1_epi32((1 << Shift) - 1);
  const __m256i above = _mm256_cmpgt_epi32(_mm256_and_si256(key, trailing), _mm256_and_si256(entry, trailing));
  return _mm256_sub_epi32(_mm256_srli_epi32(entry, Shift), above);
}

struct Words {
  __m256i lanes;
};
static inline Words zero_words() { return {_mm256_setzero_si256()}; }
static inline Words max_words(Words so_far, const uint16_t* x) {
  const __m256i* p = reinterpret_cast<const __m256i*>(x);
  const __m256i mask = _mm256_set1_epi16(0x7FFF);
  const __m256i first = _mm256_max_epu16(so_far.lanes, _mm256_and_si256(_mm256_loadu_si256(p), mask));
  return {_mm256_max_epu16(first, _mm256_and_si256(_mm256_loadu_si256(p + 1), mask))};
}
static inline uint32_t reduce_max(Words v) {
  return reduce_max_words(_mm_max_epu16(_mm256_castsi256_si128(v.lanes), _mm256_extracti128_si256(v.lanes, 1)));
}

// A magnitude with a sign: v where the sign's lane is not negative, -v where it is (0 nowhere, as 1 is or-ed in).
static inline __m256i with_sign(__m256i v, __m256i sign) {
  return _mm256_sign_epi32(v, _mm256_or_si256(sign, _mm256_set1_epi32(1)));
}
static inline I32 floor_key(F32 v, const Bf16*) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
  return _mm256_srai_epi32(with_sign(magnitude, bits), 16);
}
static inline I32 floor_key(F32 v, const F16*) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFF));
  return with_sign(magnitude, _mm256_slli_epi32(bits, 16));
}
static inline F32 key_value(I32 key, const Bf16*) {
  const __m256i sign = _mm256_and_si256(key, _mm256_set1_epi32(INT32_MIN));
  return _mm256_castsi256_ps(_mm256_or_si256(_mm256_slli_epi32(_mm256_abs_epi32(key), 16), sign));
}
static inline F32 key_value(I32 key, const F16*) {
  const __m256i sign = _mm256_and_si256(_mm256_srai_epi32(key, 16), _mm256_set1_epi32(0x8000));
  return _mm256_cvtph_ps(narrow(_mm256_or_si256(_mm256_abs_epi32(key), sign)));
}
static inline void store_keys(int16_t* p, I32 key) {
  const __m256i flipped = _mm256_add_epi32(key, _mm256_srai_epi32(key, 31));
  const __m256i words = _mm256_packs_epi32(flipped, flipped);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0x08)));
}

// Each threshold in every lane: there is no 16-bit permutation, and 15 comparisons cost less than what replaces it.
struct KeyThresholds {
  __m256i each[15];
};
static inline KeyThresholds load_key_thresholds(const int16_t* t) {
  KeyThresholds thresholds;
  for (int i = 0; i < 15; ++i) thresholds.each[i] = _mm256_set1_epi16(t[i]);
  return thresholds;
}
static inline __m256i load_ordered_keys(const uint16_t* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm256_xor_si256(bits, _mm256_and_si256(_mm256_srai_epi16(bits, 15), _mm256_set1_epi16(0x7FFF)));
}
static inline void pack_keys(const uint16_t* x, const KeyThresholds& t, const uint8_t* map, uint8_t* packed) {
  const __m256i first = load_ordered_keys(x);
  const __m256i second = load_ordered_keys(x + 16);
  __m256i a = _mm256_setzero_si256();
  __m256i b = _mm256_setzero_si256();
  for (int i = 0; i < 15; ++i) {
    a = _mm256_sub_epi16(a, _mm256_cmpgt_epi16(first, t.each[i]));
    b = _mm256_sub_epi16(b, _mm256_cmpgt_epi16(second, t.each[i]));
  }
  pack_split_ranks(_mm256_packus_epi16(a, b), map, packed);
}
