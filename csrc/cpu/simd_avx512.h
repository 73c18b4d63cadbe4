// AVX-512 (F, BW, VL, DQ) primitives; with NYBBLE_BF16_DOT also AVX-512-BF16's pair dot product. Included inside a
// target region and a namespace: no include lines here, and nothing from the C++ standard library.

constexpr int kLanes = 16;
constexpr int kTileRows = 6;  // 6 x 4 accumulators + 4 operands + 1 broadcast of the 32 registers
constexpr int kTileVectors = 4;
constexpr int kSmallRows = 4;         // weight rows in flight in the small-M kernel
constexpr int kSmallSums = 16;        // and their sums in registers
constexpr bool kRowAfterRow = false;  // a register of words of one row to its end before the next row's

using F32 = __m512;
using I32 = __m512i;

static inline F32 zero() { return _mm512_setzero_ps(); }
static inline F32 broadcast(float v) { return _mm512_set1_ps(v); }
static inline F32 load(const float* p) { return _mm512_loadu_ps(p); }
static inline void store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
static inline F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
static inline F32 sub(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
static inline F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
static inline F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
static inline F32 root(F32 v) { return _mm512_sqrt_ps(v); }  // correctly rounded, as div is
static inline F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
static inline F32 clamp_unit(F32 v) {
  return _mm512_max_ps(_mm512_min_ps(v, _mm512_set1_ps(1.0F)), _mm512_set1_ps(-1.0F));
}
// A NaN stays one.
static inline F32 within(F32 v, float low, float high) {
  return _mm512_max_ps(_mm512_set1_ps(low), _mm512_min_ps(_mm512_set1_ps(high), v));
}
// The larger one, b where either is NaN.
static inline F32 maximum(F32 a, F32 b) { return _mm512_max_ps(a, b); }
// The largest lane; none is NaN.
static inline float largest(F32 v) { return _mm512_reduce_max_ps(v); }
// v * 2^n of integers n from -160 to 128, v from 1/2 to 2; what is below 2^-124 may become 0, and below 2^-150 it does.
static inline F32 times_power_of_two(F32 v, F32 n) { return _mm512_scalef_ps(v, n); }
// Pairwise, so that the order is fixed.
static inline float sum(F32 v) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}
static NYBBLE_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
// Into the first-level cache.
static NYBBLE_INLINE void prefetch_near(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

static inline F32 load(const Bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
static inline F32 load(const F16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline F32 load(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// In integers: the BF16 instructions flush denormals, which a codec must not.
static inline void store(Bf16* p, F32 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x00400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}
static inline void store(F16* p, F32 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
// Round to nearest even; |v| <= 127.
static inline void store(int8_t* p, F32 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}

static inline I32 zero_index() { return _mm512_setzero_si512(); }
static inline I32 max_magnitude(I32 so_far, F32 v) {
  return _mm512_max_epu32(so_far, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7FFFFFFF)));
}
static inline uint32_t reduce_max(I32 v) { return _mm512_reduce_max_epu32(v); }

struct Table {
  __m512 entries;
};
static inline Table load_table(const float* codes) { return {_mm512_loadu_ps(codes)}; }
static inline Table scale(Table table, float by) { return {_mm512_mul_ps(table.entries, _mm512_set1_ps(by))}; }
// Only the low four bits of an index count.
static inline F32 lookup(Table table, I32 index) { return _mm512_permutexvar_ps(index, table.entries); }
static inline I32 offset(I32 index, int by) { return _mm512_add_epi32(index, _mm512_set1_epi32(by)); }
static inline I32 times_16(I32 index) { return _mm512_slli_epi32(index, 4); }
static inline I32 advance_where_greater(I32 index, F32 a, F32 b, int by) {
  return _mm512_mask_add_epi32(index, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), index, _mm512_set1_epi32(by));
}
static inline I32 load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// kLanes words of eight packed elements each: element 2 i of a word is nibble 2 i + 1, element 2 i + 1 nibble 2 i.
static inline I32 load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
template <int Bits>
static inline I32 shift_right(I32 v) {
  return Bits == 0 ? v : _mm512_srli_epi32(v, Bits);
}
// Lane i becomes p[index[i]]; an index is below kLanes, and kLanes floats may be read.
static inline F32 spread(const float* p, I32 index) { return _mm512_permutexvar_ps(index, _mm512_loadu_ps(p)); }
static inline void store_bytes(uint8_t* p, I32 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}
static inline F32 gather(const float* table, I32 index) { return _mm512_i32gather_ps(index, table, 4); }
// kLanes packed bytes: even elements from the high nibbles, odd ones from the low.
static inline void load_nibbles(const uint8_t* p, I32* even, I32* odd) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  *even = _mm512_srli_epi32(bytes, 4);
  *odd = bytes;
}

#include "cpu/simd_nibbles_sse.h"
#include "cpu/simd_codec_avx512.h"

// 16 packed bytes -> 32 elements in order.
static inline void decode(const uint8_t* p, Table table, float* out) {
  __m128i low, high;
  split_nibbles(p, &low, &high);
  _mm512_storeu_ps(out, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(low), table.entries));
  _mm512_storeu_ps(out + 16, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(high), table.entries));
}
struct Table16 {
  __m512i entries;  // twice the 16 codes: five index bits count, so a stray fifth bit is harmless and needs no mask
};
static inline Table16 load_table(const Bf16* codes) {
  const __m256i once = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  return {_mm512_broadcast_i64x4(once)};
}
static inline Table16 load_table(const F16* codes) { return load_table(reinterpret_cast<const Bf16*>(codes)); }
static inline void decode(const uint8_t* p, Table16 table, Bf16* out) {
  // A byte is one 32-bit pair: its high nibble indexes the low half, the byte itself (low nibble) the high half.
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table.entries));
}
static inline void decode(const uint8_t* p, Table16 table, F16* out) { decode(p, table, reinterpret_cast<Bf16*>(out)); }

// kLanes x kLanes transposition of 32-bit elements; strides in elements.
static inline void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xDD);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(to + (i + 0) * to_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_stride, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xDD));
    _mm512_storeu_si512(to + (i + 4) * to_stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
    _mm512_storeu_si512(to + (i + 12) * to_stride, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xDD));
  }
}

#ifdef NYBBLE_BF16_DOT
#define NYBBLE_BF16_CONVERT 1
// As store, in two instructions and not ten, but for denormals, which become 0.
static inline void store_normal(Bf16* p, F32 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
}
// acc + first * first' + second * second' over the bf16 pairs of every 32-bit lane.
static inline F32 dot_pairs(F32 acc, uint32_t pair, F32 pairs) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair))),
                          reinterpret_cast<__m512bh>(pairs));
}
// kLanes pairs (first[i], second[i]).
static inline void interleave(const Bf16* first, const Bf16* second, uint32_t* pairs) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
  _mm512_storeu_si512(pairs, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif
