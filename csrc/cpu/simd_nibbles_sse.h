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

// 32 ranks -> 16 packed bytes of map[rank]; an even element goes to the high nibble.
static inline void pack_ranks(const uint8_t* ranks, const uint8_t* map, uint8_t* packed) {
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(map));
  const __m128i weights = _mm_set1_epi16(0x0110);
  const __m128i first = _mm_shuffle_epi8(table, _mm_loadu_si128(reinterpret_cast<const __m128i*>(ranks)));
  const __m128i second = _mm_shuffle_epi8(table, _mm_loadu_si128(reinterpret_cast<const __m128i*>(ranks + 16)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(packed),
                   _mm_packus_epi16(_mm_maddubs_epi16(first, weights), _mm_maddubs_epi16(second, weights)));
}
