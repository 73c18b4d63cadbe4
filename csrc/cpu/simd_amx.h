// Intel AMX: tiles of 16 rows by 64 bytes, multiplied as bf16 pairs into fp32 sums, and what fills them from packed
// bytes. A tile lies in memory as 1024 contiguous bytes, so that no two of its rows compete for a cache set. Included
// after simd_avx512.h, inside the target region; AVX-512-BF16 comes with every AMX.

constexpr int64_t kTileSide = 16;   // rows of a tile, and fp32 sums of a row
constexpr int64_t kTileDepth = 32;  // contraction indices that one multiplication covers
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileFloats = kTileSide * kTileSide;

// Every tile is 16 rows of 64 bytes, so one configuration serves all shapes; partial ones are padded with zeros.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// GCC's tile intrinsics do not tell it all that they read and write: it may drop or delay stores that only a tile load
// sees, or load before a tile is stored. So the configuration is a constant, and this stands between.
static NYBBLE_INLINE void tile_fence() {
#if defined(__GNUC__)
  __asm__ volatile("" : : : "memory");
#endif
}

constexpr TileConfig kTileConfig;
static inline void open_tiles() {
  tile_fence();
  _tile_loadconfig(&kTileConfig);
}
static inline void close_tiles() { _tile_release(); }

// sums[2][2], of which Groups of each two, += left[2] . right[Groups] over `steps` tiles of each; tile s of a group
// lies s * stride further on. Tiles 0 to 3 are the sums, 4 and 5 the left factors, 6 and 7 the right ones. `Swap`
// multiplies right . left instead.
template <int Groups, bool Swap>
static inline void multiply_tiles(const char* left, int64_t left_stride, const char* right, int64_t right_group,
                                  int64_t steps, bool first, float* sums) {
  tile_fence();
  if (first) {
    _tile_zero(0);
    _tile_zero(2);
    if (Groups == 2) {
      _tile_zero(1);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(2, sums + 2 * kTileFloats, 64);
    if (Groups == 2) {
      _tile_loadd(1, sums + kTileFloats, 64);
      _tile_loadd(3, sums + 3 * kTileFloats, 64);
    }
  }
  for (int64_t step = 0; step < steps; ++step, left += left_stride, right += kTileBytes) {
    _tile_loadd(6, right, 64);
    _tile_loadd(4, left, 64);
    if (Swap) {
      _tile_dpbf16ps(0, 6, 4);
    } else {
      _tile_dpbf16ps(0, 4, 6);
    }
    if (Groups == 2) {
      _tile_loadd(7, right + right_group, 64);
      if (Swap) {
        _tile_dpbf16ps(1, 7, 4);
      } else {
        _tile_dpbf16ps(1, 4, 7);
      }
    }
    _tile_loadd(5, left + kTileBytes, 64);
    if (Swap) {
      _tile_dpbf16ps(2, 6, 5);
      if (Groups == 2) _tile_dpbf16ps(3, 7, 5);
    } else {
      _tile_dpbf16ps(2, 5, 6);
      if (Groups == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(2, sums + 2 * kTileFloats, 64);
  if (Groups == 2) {
    _tile_stored(1, sums + kTileFloats, 64);
    _tile_stored(3, sums + 3 * kTileFloats, 64);
  }
  tile_fence();
}

// The instructions name their tiles; these choose them by template arguments. Sums are tiles 0 to 3, left factors 4 and
// 5, right ones 6 and 7.
template <int Tile>
static NYBBLE_INLINE void zero_tile() {
  if constexpr (Tile == 0) _tile_zero(0);
  if constexpr (Tile == 1) _tile_zero(1);
  if constexpr (Tile == 2) _tile_zero(2);
  if constexpr (Tile == 3) _tile_zero(3);
}
template <int Tile>
static NYBBLE_INLINE void load_tile(const char* p) {
  if constexpr (Tile == 4) _tile_loadd(4, p, 64);
  if constexpr (Tile == 5) _tile_loadd(5, p, 64);
  if constexpr (Tile == 6) _tile_loadd(6, p, 64);
  if constexpr (Tile == 7) _tile_loadd(7, p, 64);
}
template <int Sum, int Left, int Right>
static NYBBLE_INLINE void multiply_add_tiles() {
#define NYBBLE_MULTIPLY(sum, left, right) \
  if constexpr (Sum == sum && Left == left && Right == right) _tile_dpbf16ps(sum, left, right)
#define NYBBLE_MULTIPLY_INTO(sum) \
  NYBBLE_MULTIPLY(sum, 4, 6);     \
  NYBBLE_MULTIPLY(sum, 4, 7);     \
  NYBBLE_MULTIPLY(sum, 5, 6);     \
  NYBBLE_MULTIPLY(sum, 5, 7)
  NYBBLE_MULTIPLY_INTO(0);
  NYBBLE_MULTIPLY_INTO(1);
  NYBBLE_MULTIPLY_INTO(2);
  NYBBLE_MULTIPLY_INTO(3);
#undef NYBBLE_MULTIPLY_INTO
#undef NYBBLE_MULTIPLY
}
// Tiles 0 to 3 -> four times `step` floats.
static NYBBLE_INLINE void store_sum_tiles(float* p, int64_t step) {
  _tile_stored(0, p, 64);
  _tile_stored(1, p + step, 64);
  _tile_stored(2, p + 2 * step, 64);
  _tile_stored(3, p + 3 * step, 64);
}

// Tiles 0 and 2 -> side by side, 1 and 3 -> `step` floats further on.
static NYBBLE_INLINE void store_pair_tiles(float* p, int64_t step) {
  _tile_stored(0, p, 64);
  _tile_stored(2, p + kTileFloats, 64);
  _tile_stored(1, p + step, 64);
  _tile_stored(3, p + step + kTileFloats, 64);
}

static inline __m512i lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

// ---- filling tiles --------------------------------------------------------------------------------------------------

static inline void store_tile_row(Bf16* p, __m512i v) { _mm512_storeu_si512(p, v); }

// A block's 16 codes, scaled, as bf16; twice, because a word of packed bytes indexes with five bits. The conversion
// flushes denormals, as the multiplication of tiles does.
static inline Table16 scaled_twice(Table codes, float by) {
  const __m256i once = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(scale(codes, by).entries));
  return {_mm512_inserti64x4(_mm512_castsi256_si512(once), once, 1)};
}
// Two blocks' codes: the fifth bit of an index tells them apart.
static inline Table16 scaled_both(Table codes, float first, float second) {
  return {reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(scale(codes, second).entries, scale(codes, first).entries))};
}

// 32 packed bytes of one block -> its 32 even and its 32 odd elements. Any order of the contraction will do as long as
// both factors have it, and this one is a widening, a shift and two lookups for 64 weights.
static inline void decode_apart(const uint8_t* p, Table16 table, Bf16* even, Bf16* odd) {
  const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  store_tile_row(even, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table.entries));
  store_tile_row(odd, _mm512_permutexvar_epi16(words, table.entries));
}
// The same for two blocks of 32 elements.
static inline void decode_apart_two(const uint8_t* p, Table16 table, Bf16* even, Bf16* odd) {
  const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i nibble = _mm512_set1_epi16(15);
  const __m512i block = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  constexpr int kAndOr = 0xEA;  // (a & b) | c
  const __m512i high = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, 4), nibble, block, kAndOr);
  const __m512i low = _mm512_ternarylogic_epi32(words, nibble, block, kAndOr);
  store_tile_row(even, _mm512_permutexvar_epi16(high, table.entries));
  store_tile_row(odd, _mm512_permutexvar_epi16(low, table.entries));
}
// Words of bf16 bits in the high halves of `a` and of `b`, in turns.
static inline __m512i pair_halves(__m512i a, __m512i b) {
  constexpr int kSelect = 0xCA;  // a ? b : c
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(0xFFFF), _mm512_srli_epi32(a, 16), b, kSelect);
}
// 16 int8, byte `Byte` of every dword, as fp32.
template <int Byte>
static inline __m512 floats_of_byte(__m512i fours) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(fours, 24 - 8 * Byte), 24));
}
// 64 int8 -> the even and the odd ones, exactly: an integer of 8 bits fits bf16, so its fp32 has a low half of zeros.
static inline void decode_apart_int8(const int8_t* p, Bf16* even, Bf16* odd) {
  const __m512i q = _mm512_loadu_si512(p);
  const __m512i first = _mm512_castps_si512(floats_of_byte<0>(q)), second = _mm512_castps_si512(floats_of_byte<1>(q));
  const __m512i third = _mm512_castps_si512(floats_of_byte<2>(q)), fourth = _mm512_castps_si512(floats_of_byte<3>(q));
  store_tile_row(even, pair_halves(first, third));
  store_tile_row(odd, pair_halves(second, fourth));
}
// The same times `by`, rounded to nearest even; denormals become zeros, as for the multiplication of tiles.
static inline __m512i rounded_halves(__m512 v, __m512 by) {
  const __m256i words = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_mul_ps(v, by)));
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
}
static inline void decode_apart_int8_scaled(const int8_t* p, float by, Bf16* even, Bf16* odd) {
  const __m512i q = _mm512_loadu_si512(p);
  const __m512 scale = _mm512_set1_ps(by);
  store_tile_row(even,
                 pair_halves(rounded_halves(floats_of_byte<0>(q), scale), rounded_halves(floats_of_byte<2>(q), scale)));
  store_tile_row(odd,
                 pair_halves(rounded_halves(floats_of_byte<1>(q), scale), rounded_halves(floats_of_byte<3>(q), scale)));
}
// 64 elements in order -> the even and the odd ones.
static inline void split_apart(const Bf16* values, Bf16* even, Bf16* odd) {
  const __m512i first = _mm512_loadu_si512(values);
  const __m512i second = _mm512_loadu_si512(values + 32);
  // Words 0, 2, .. 62 of the two registers: word i of the index is 2 i.
  const __m512i at = _mm512_add_epi32(_mm512_set1_epi32(0x00020000),
                                      _mm512_mullo_epi32(_mm512_set1_epi32(0x00040004), lane_numbers()));
  store_tile_row(even, _mm512_permutex2var_epi16(first, at, second));
  store_tile_row(odd, _mm512_permutex2var_epi16(first, _mm512_or_si512(at, _mm512_set1_epi16(1)), second));
}

// 16 packed bytes of a row and of the row below -> 16 pairs of their even elements, 16 of their odd ones.
// `table`: scaled_both for the blocks of the two rows.
static inline void decode_pairs(const uint8_t* row, const uint8_t* below, Table16 table, Bf16* even, Bf16* odd) {
  const __m512i first = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
  const __m512i second = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(below)));
  const __m512i bytes = _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
  const __m512i nibble = _mm512_set1_epi16(15);
  const __m512i block = _mm512_set1_epi32(0x00100000);
  constexpr int kAndOr = 0xEA;
  const __m512i high = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bytes, 4), nibble, block, kAndOr);
  const __m512i low = _mm512_ternarylogic_epi32(bytes, nibble, block, kAndOr);
  store_tile_row(even, _mm512_permutexvar_epi16(high, table.entries));
  store_tile_row(odd, _mm512_permutexvar_epi16(low, table.entries));
}
// 32 elements of a row and of the row below, in order -> the same.
static inline void pair_apart(const Bf16* row, const Bf16* below, Bf16* even, Bf16* odd) {
  const __m512i first = _mm512_loadu_si512(row);
  const __m512i second = _mm512_loadu_si512(below);
  const __m512i low = _mm512_set1_epi32(0xFFFF);
  constexpr int kSelect = 0xCA;  // a ? b : c
  store_tile_row(even, _mm512_ternarylogic_epi32(low, first, _mm512_slli_epi32(second, 16), kSelect));
  store_tile_row(odd, _mm512_ternarylogic_epi32(low, _mm512_srli_epi32(first, 16), second, kSelect));
}
// 16 even and 16 odd columns of a row of sums -> 32 in order.
static inline void merge_columns(const float* even, const float* odd, float* out) {
  const __m512 a = _mm512_loadu_ps(even);
  const __m512 b = _mm512_loadu_ps(odd);
  const __m512i lane = lane_numbers();
  const __m512i from =
      _mm512_or_si512(_mm512_srli_epi32(lane, 1), _mm512_slli_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(1)), 4));
  _mm512_storeu_ps(out, _mm512_permutex2var_ps(a, from, b));
  _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(a, _mm512_add_epi32(from, _mm512_set1_epi32(8)), b));
}
