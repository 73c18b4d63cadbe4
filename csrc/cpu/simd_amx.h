// Intel AMX: tiles of 16 rows by 64 bytes, multiplied as bf16 pairs into fp32. A panel's strip of 16 columns by 16
// steps is such a tile as it lies in memory, so this is the same panel with another multiplication. Included after
// simd_avx512.h, inside the target region.

constexpr int64_t kTileSide = 16;

// Every tile is 16 rows of 64 bytes, so one configuration serves all shapes; partial ones are padded with zeros.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles 0 to 3: sums of two row groups by two column groups; 4, 5: rows of x; 6, 7: the panel.
static inline void multiply_tiles_32(const char* x, int64_t x_stride, const uint32_t* panel, int64_t panel_stride,
                                     int64_t steps, float* acc, int64_t acc_stride) {
  float* below = acc + kTileSide * acc_stride;
  const char* x_below = x + kTileSide * x_stride;
  _tile_loadd(0, acc, acc_stride * 4);
  _tile_loadd(1, acc + kTileSide, acc_stride * 4);
  _tile_loadd(2, below, acc_stride * 4);
  _tile_loadd(3, below + kTileSide, acc_stride * 4);
  for (int64_t step = 0; step < steps; step += kTileSide) {
    const uint32_t* columns = panel + step * panel_stride;
    _tile_loadd(4, x + step * 4, x_stride);
    _tile_loadd(6, columns, panel_stride * 4);
    _tile_loadd(7, columns + kTileSide, panel_stride * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, x_below + step * 4, x_stride);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, acc, acc_stride * 4);
  _tile_stored(1, acc + kTileSide, acc_stride * 4);
  _tile_stored(2, below, acc_stride * 4);
  _tile_stored(3, below + kTileSide, acc_stride * 4);
}

static inline void multiply_tiles_16(const char* x, int64_t x_stride, const uint32_t* panel, int64_t panel_stride,
                                     int64_t steps, float* acc, int64_t acc_stride) {
  _tile_loadd(0, acc, acc_stride * 4);
  _tile_loadd(1, acc + kTileSide, acc_stride * 4);
  for (int64_t step = 0; step < steps; step += kTileSide) {
    const uint32_t* columns = panel + step * panel_stride;
    _tile_loadd(4, x + step * 4, x_stride);
    _tile_loadd(6, columns, panel_stride * 4);
    _tile_loadd(7, columns + kTileSide, panel_stride * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, acc, acc_stride * 4);
  _tile_stored(1, acc + kTileSide, acc_stride * 4);
}
