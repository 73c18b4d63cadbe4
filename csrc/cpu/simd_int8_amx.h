// AMX on int8: a tile of 16 rows of 64 codes of W times a tile of 16 rows of x, which lies as the instruction wants it
// (16 steps of 16 lanes, 1 KiB). Included after simd_amx.h and simd_int8_avx512.h.

constexpr int64_t kTileRowsOfW = 32;  // rows of W that are multiplied at a time

// Where kTileRowsOfW rows of W lie: `stride` bytes from one to the next. While they are multiplied, what follows is
// fetched kTilesAhead tiles early; behind the last tile, as many rows at `next`. Null: nothing is fetched.
struct RowsOfW {
  const int8_t* codes;
  int64_t stride;
  const int8_t* next;
};
constexpr int64_t kTilesAhead = 8;

static inline void fetch_rows(const RowsOfW& w, int64_t tile, int64_t tiles) {
  if (w.next == nullptr) return;
  const int64_t ahead = tile + kTilesAhead;
  const int8_t* p = ahead < tiles ? w.codes + ahead * 64 : w.next + (ahead - tiles) * 64;
  for (int64_t row = 0; row < kTileRowsOfW; ++row) prefetch(p + row * w.stride);
}

// What the tiles are loaded from was stored by ordinary stores.
static inline void clear_sum_tiles() {
  tile_fence();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
static inline void store_sum_tiles(int32_t* sums) {
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + kTileSide, 128);
  _tile_stored(2, sums + kTileSide * 32, 128);
  _tile_stored(3, sums + kTileSide * 32 + kTileSide, 128);
  tile_fence();
}

// sums[32][32] = 32 rows of W times two blocks of x. Tiles 0 to 3: sums; 4, 5: W; 6, 7: x.
static inline void dot_two_blocks(const RowsOfW& rows, const char* x, const char* x_next, int64_t tiles,
                                  int32_t* sums) {
  clear_sum_tiles();
  const int8_t* w = rows.codes;
  for (int64_t tile = 0; tile < tiles; ++tile, w += 64, x += kTileBytes, x_next += kTileBytes) {
    _tile_loadd(4, w, rows.stride);
    _tile_loadd(6, x, 64);
    _tile_loadd(7, x_next, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, w + kTileSide * rows.stride, rows.stride);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
    fetch_rows(rows, tile, tiles);
  }
  store_sum_tiles(sums);
}

// sums[32][2][16] = 32 rows of W times one block of x, in two parts: the even tiles of the contraction and the odd
// ones, because four sums hide the latency.
static inline void dot_one_block(const RowsOfW& rows, const char* x, int64_t tiles, int32_t* sums) {
  clear_sum_tiles();
  const int8_t* w = rows.codes;
  const int64_t below = kTileSide * rows.stride;
  for (int64_t tile = 0; tile < tiles; tile += 2, w += 128, x += 2 * kTileBytes) {
    _tile_loadd(4, w, rows.stride);
    _tile_loadd(5, w + below, rows.stride);
    _tile_loadd(6, x, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(2, 5, 6);
    fetch_rows(rows, tile, tiles);
    if (tile + 1 == tiles) break;
    _tile_loadd(4, w + 64, rows.stride);
    _tile_loadd(5, w + 64 + below, rows.stride);
    _tile_loadd(7, x + kTileBytes, 64);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(3, 5, 7);
    fetch_rows(rows, tile + 1, tiles);
  }
  store_sum_tiles(sums);
}
static inline Sums add_parts(const int32_t* sums) {
  return _mm512_add_epi32(_mm512_loadu_si512(sums), _mm512_loadu_si512(sums + kTileSide));
}
