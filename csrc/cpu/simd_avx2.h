// AVX2 + FMA + F16C primitives. Included inside a target region and a namespace: no include lines of system headers
// here, and nothing from the C++ standard library. What each one does: simd_avx512.h says, name by name.

constexpr int kLanes = 8;
constexpr int kTileRows = 6;  // 6 x 2 accumulators + 2 operands + 1 broadcast of the 16 registers
constexpr int kTileVectors = 2;
constexpr int kSmallRows = 2;
constexpr int kSmallSums = 4;
constexpr bool kRowAfterRow = true;  // the shared parts of one row's lookups fill the registers

using F32 = __m256;
using I32 = __m256i;

static inline F32 zero() { return _mm256_setzero_ps(); }
static inline F32 broadcast(float v) { return _mm256_set1_ps(v); }
static inline F32 load(const float* p) { return _mm256_loadu_ps(p); }
static inline void store(float* p, F32 v) { _mm256_storeu_ps(p, v); }
static inline F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
static inline F32 sub(F32 a, F32 b) { return _mm256_sub_ps(a, b); }
static inline F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
static inline F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
static inline F32 root(F32 v) { return _mm256_sqrt_ps(v); }
static inline F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
static inline F32 clamp_unit(F32 v) {
  return _mm256_max_ps(_mm256_min_ps(v, _mm256_set1_ps(1.0F)), _mm256_set1_ps(-1.0F));
}
static inline F32 within(F32 v, float low, float high) {
  return _mm256_max_ps(_mm256_set1_ps(low), _mm256_min_ps(_mm256_set1_ps(high), v));
}
// The larger one, b where either is NaN.
static inline F32 maximum(F32 a, F32 b) { return _mm256_max_ps(a, b); }
// The largest lane; none is NaN.
static inline float largest(F32 v) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}
// By 2^(n - 1), which is finite for every n, and by 2.
static inline F32 times_power_of_two(F32 v, F32 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(126));
  const __m256i power = _mm256_slli_epi32(_mm256_max_epi32(exponent, _mm256_setzero_si256()), 23);
  const __m256 half = _mm256_mul_ps(v, _mm256_castsi256_ps(power));
  return _mm256_add_ps(half, half);
}
static inline float sum(F32 v) {
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}
static NYBBLE_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
// Into the first-level cache.
static NYBBLE_INLINE void prefetch_near(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

static inline F32 load(const Bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
static inline F32 load(const F16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
static inline F32 load(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// The low 16 bits of eight 32-bit lanes, which must fit (as unsigned).
static inline __m128i narrow(__m256i v) {
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0x08));
}
static inline void store(Bf16* p, F32 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i chosen = _mm256_blendv_epi8(rounded, quiet, nan);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(_mm256_srli_epi32(chosen, 16)));
}
static inline void store(F16* p, F32 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
static inline void store(int8_t* p, F32 v) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(v), _mm256_setzero_si256());
  const __m256i joined = _mm256_permute4x64_epi64(words, 0x08);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(joined), _mm_setzero_si128()));
}

static inline I32 zero_index() { return _mm256_setzero_si256(); }
static inline I32 max_magnitude(I32 so_far, F32 v) {
  return _mm256_max_epu32(so_far, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7FFFFFFF)));
}
static inline uint32_t reduce_max(I32 v) {
  __m128i m = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4E));
  m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
}

// The codes in two registers, for vpermps, and by planes (byte k of every code, in both halves), for vpshufb: eight
// lookups take two vpermps and a blend, 32 take four vpshufb and eight interleavings. What is not used costs nothing.
struct Table {
  __m256 low, high;
  __m256i plane[4];
};
// Of both halves: bytes 0 of its four words, then their bytes 1, and so on.
static inline __m256i bytes_by_place(__m256i words) {
  return _mm256_shuffle_epi8(words, _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                                     0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
}
static inline Table table_of(__m256 low, __m256 high) {
  const __m256i a = bytes_by_place(_mm256_castps_si256(low)), b = bytes_by_place(_mm256_castps_si256(high));
  const __m256i a0 = _mm256_permute2x128_si256(a, a, 0x00), a1 = _mm256_permute2x128_si256(a, a, 0x11);
  const __m256i b0 = _mm256_permute2x128_si256(b, b, 0x00), b1 = _mm256_permute2x128_si256(b, b, 0x11);
  const __m256i a_01 = _mm256_unpacklo_epi32(a0, a1), a_23 = _mm256_unpackhi_epi32(a0, a1);
  const __m256i b_01 = _mm256_unpacklo_epi32(b0, b1), b_23 = _mm256_unpackhi_epi32(b0, b1);
  return {low,
          high,
          {_mm256_unpacklo_epi64(a_01, b_01), _mm256_unpackhi_epi64(a_01, b_01), _mm256_unpacklo_epi64(a_23, b_23),
           _mm256_unpackhi_epi64(a_23, b_23)}};
}
static inline Table load_table(const float* codes) {
  return table_of(_mm256_loadu_ps(codes), _mm256_loadu_ps(codes + 8));
}
static inline Table scale(const Table& table, float by) {
  const __m256 factor = _mm256_set1_ps(by);
  return table_of(_mm256_mul_ps(table.low, factor), _mm256_mul_ps(table.high, factor));
}
// Only the low four bits of an index count: three pick the entry, the fourth the half.
static inline F32 lookup(const Table& table, I32 index) {
  const __m256 low = _mm256_permutevar8x32_ps(table.low, index);
  const __m256 high = _mm256_permutevar8x32_ps(table.high, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
static inline I32 offset(I32 index, int by) { return _mm256_add_epi32(index, _mm256_set1_epi32(by)); }
static inline I32 times_16(I32 index) { return _mm256_slli_epi32(index, 4); }
static inline I32 advance_where_greater(I32 index, F32 a, F32 b, int by) {
  const __m256i greater = _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ));
  return _mm256_add_epi32(index, _mm256_and_si256(greater, _mm256_set1_epi32(by)));
}
static inline I32 load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
static inline F32 gather(const float* table, I32 index) { return _mm256_i32gather_ps(table, index, 4); }
static inline I32 load_words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
// The shift waits for its lookup: the words' nibbles at Bits, or 4 above, are bytes of one vector of indices, so what
// the eight lookups of a register of words have in common is computed once.
template <int Bits>
struct Shifted {
  I32 words;
};
template <int Bits>
static inline Shifted<Bits> shift_right(I32 words) {
  return {words};
}
template <int Bits>
static NYBBLE_INLINE F32 lookup(const Table& table, Shifted<Bits> index) {
  const __m256i bytes = bytes_by_place(index.words);
  const __m256i nibbles = _mm256_and_si256(Bits % 8 == 0 ? bytes : _mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
  const __m256i b0 = _mm256_shuffle_epi8(table.plane[0], nibbles), b1 = _mm256_shuffle_epi8(table.plane[1], nibbles);
  const __m256i b2 = _mm256_shuffle_epi8(table.plane[2], nibbles), b3 = _mm256_shuffle_epi8(table.plane[3], nibbles);
  const __m256i low = Bits < 16 ? _mm256_unpacklo_epi8(b0, b1) : _mm256_unpackhi_epi8(b0, b1);
  const __m256i high = Bits < 16 ? _mm256_unpacklo_epi8(b2, b3) : _mm256_unpackhi_epi8(b2, b3);
  return _mm256_castsi256_ps(Bits % 16 < 8 ? _mm256_unpacklo_epi16(low, high) : _mm256_unpackhi_epi16(low, high));
}
static inline F32 spread(const float* p, I32 index) { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), index); }
static inline void store_bytes(uint8_t* p, I32 v) {
  const __m128i words = narrow(v);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
static inline void load_nibbles(const uint8_t* p, I32* even, I32* odd) {
  const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  *even = _mm256_srli_epi32(bytes, 4);
  *odd = bytes;
}

#include "cpu/simd_nibbles_sse.h"
#include "cpu/simd_codec_avx2.h"

static inline void decode(const uint8_t* p, Table table, float* out) {
  __m128i low, high;
  split_nibbles(p, &low, &high);
  store(out, lookup(table, _mm256_cvtepu8_epi32(low)));
  store(out + 8, lookup(table, _mm256_cvtepu8_epi32(_mm_srli_si128(low, 8))));
  store(out + 16, lookup(table, _mm256_cvtepu8_epi32(high)));
  store(out + 24, lookup(table, _mm256_cvtepu8_epi32(_mm_srli_si128(high, 8))));
}
struct Table16 {
  __m128i low, high;  // the low and the high bytes of the 16 codes: one pshufb each
};
static inline Table16 load_table(const Bf16* codes) {
  const __m128i* p = reinterpret_cast<const __m128i*>(codes);
  const __m128i a = _mm_loadu_si128(p), b = _mm_loadu_si128(p + 1), mask = _mm_set1_epi16(0xFF);
  return {_mm_packus_epi16(_mm_and_si128(a, mask), _mm_and_si128(b, mask)),
          _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8))};
}
static inline Table16 load_table(const F16* codes) { return load_table(reinterpret_cast<const Bf16*>(codes)); }
static inline void decode(const uint8_t* p, Table16 table, Bf16* out) {
  __m128i index[2];
  split_nibbles(p, &index[0], &index[1]);
  __m128i* to = reinterpret_cast<__m128i*>(out);
  for (int i = 0; i < 2; ++i) {
    const __m128i low = _mm_shuffle_epi8(table.low, index[i]), high = _mm_shuffle_epi8(table.high, index[i]);
    _mm_storeu_si128(to + 2 * i, _mm_unpacklo_epi8(low, high));
    _mm_storeu_si128(to + 2 * i + 1, _mm_unpackhi_epi8(low, high));
  }
}
static inline void decode(const uint8_t* p, Table16 table, F16* out) { decode(p, table, reinterpret_cast<Bf16*>(out)); }

static inline void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(from + i * from_stride));
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(reinterpret_cast<float*>(to + i * to_stride), _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(reinterpret_cast<float*>(to + (i + 4) * to_stride), _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
