// Nibbles and bytes in 128-bit registers, the same for AVX2 and AVX-512. Included by simd_avx2.h and simd_avx512.h.

// 16 packed bytes -> 32 indices in element order.
static inline void split_nibbles(const uint8_t* p, __m128i* first, __m128i* second) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i mask = _mm_set1_epi8(15);
  const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  const __m128i odd = _mm_and_si128(bytes, mask);
  *first = _mm_unpacklo_epi8(even, odd);
  *second = _mm_unpackhi_epi8(even, odd);
}

static inline uint32_t reduce_max_words(__m128i v) {
  const __m128i all = _mm_set1_epi16(-1);  // the minimum is what there is an instruction for
  return static_cast<uint32_t>(_mm_extract_epi16(_mm_xor_si128(_mm_minpos_epu16(_mm_xor_si128(v, all)), all), 0));
}
