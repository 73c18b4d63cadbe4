// AMX on int8: a tile is 16 rows of 64 codes, multiplied as quads into int32. x lies in blocks of 16 rows as tiles
// (1 KiB each, one after another along the contraction), the panel's strips are read as in simd_amx.h. Included after
// simd_amx.h and simd_int8_avx512.h.

constexpr int64_t kTileBytes = 1024;

// sums[32][32] = two blocks of x times 32 columns of the panel. Tiles 0 to 3: sums; 4, 5: x; 6, 7: the panel.
static inline void dot_tiles_32(const char* x, const char* x_below, const uint32_t* panel, int64_t panel_stride,
                                int64_t steps, int32_t* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; step += kTileSide, x += kTileBytes, x_below += kTileBytes) {
    const uint32_t* columns = panel + step * panel_stride;
    _tile_loadd(4, x, 64);
    _tile_loadd(6, columns, panel_stride * 4);
    _tile_loadd(7, columns + kTileSide, panel_stride * 4);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(5, x_below, 64);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + kTileSide, 128);
  _tile_stored(2, sums + kTileSide * 32, 128);
  _tile_stored(3, sums + kTileSide * 32 + kTileSide, 128);
}

// sums[16][64] = one block of x times 64 columns of the panel: four sums hide the latency.
static inline void dot_tiles_16(const char* x, const uint32_t* panel, int64_t panel_stride, int64_t steps,
                                int32_t* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; step += kTileSide, x += kTileBytes) {
    const uint32_t* columns = panel + step * panel_stride;
    _tile_loadd(4, x, 64);
    _tile_loadd(5, columns, panel_stride * 4);
    _tile_loadd(6, columns + kTileSide, panel_stride * 4);
    _tile_loadd(7, columns + 2 * kTileSide, panel_stride * 4);
    _tile_dpbssd(0, 4, 5);
    _tile_dpbssd(1, 4, 6);
    _tile_loadd(5, columns + 3 * kTileSide, panel_stride * 4);
    _tile_dpbssd(2, 4, 7);
    _tile_dpbssd(3, 4, 5);
  }
  _tile_stored(0, sums, 256);
  _tile_stored(1, sums + kTileSide, 256);
  _tile_stored(2, sums + 2 * kTileSide, 256);
  _tile_stored(3, sums + 3 * kTileSide, 256);
}
