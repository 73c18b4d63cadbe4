// The tile kernel for few rows of x, forward: decoding is most of the work, so tiles hold the bare codes (or int8),
// which takes a widening, a shift and two lookups for 64 weights, and the block's scale is applied to the sums: a row
// of 16 sums of a row of W needs one multiply-add for 64 weights times 16 rows of x.
//
// A task is a strip of rows of W. For 256 columns of it at a time, so that their part of x stays in L1, and 16 rows at
// a time: decode, multiply, scale. The next 16 rows are decoded between the multiplications of these, which another
// unit does.

constexpr int64_t kFewStrip = 64;                       // rows of W in a task
constexpr int64_t kFewGroups = 4;                       // groups of kGroupOf columns decoded and multiplied at a time
constexpr int64_t kFewColumns = kFewGroups * kGroupOf;  // 256
constexpr int64_t kFewSegment = 4096;                   // columns whose scales are loaded at a time
constexpr int64_t kFewScales = kFewSegment / kGroupOf;  // of a row
constexpr int64_t kFewTiles = kFewStrip / kTileSide;    // tiles of rows of W
constexpr int64_t kMostFewRows = 2 * kTileSide;         // of x
constexpr int64_t kRowsOfSlot = kTileSide / 2;          // decoded between two multiplications

struct FewMemory {
  char d[2][kFewGroups * 2 * kTileBytes];         // [group][even, odd]
  float products[2][kFewGroups][kTileFloats];     // [rows of x][group]
  float sums[kFewStrip / kWide][4][kTileFloats];  // as store_sums takes them
  float scales[kFewStrip][kFewScales];            // of groups
  char side[2 * kPairBytes];                      // two steps of the side path
};

// What a piece of work is about: 16 rows of W in kFewColumns columns.
struct FewPiece {
  const uint8_t* packed[kTileSide];  // or int8
  int64_t groups;                    // of columns; 0: no piece
  char* d;
  float* products;
  const float* scales;  // of its first row and group
  float* sums[2];       // for both groups of rows of x
  bool first;           // these sums have no value yet
};

// Bytes of `count` elements of W.
static inline int64_t bytes_of(const Weight& weight, int64_t count) { return weight.is_int8() ? count : count / 2; }

// Half the rows of one group of a piece's columns -> its even and its odd tile.
template <bool Int8>
static NYBBLE_INLINE void decode_rows_of_codes(const FewPiece& piece, int64_t group, int64_t first, int64_t ahead,
                                               Table16 codes) {
  auto* even = reinterpret_cast<Bf16*>(piece.d + group * kPairBytes);
  for (int64_t i = first; i < first + kRowsOfSlot; ++i) {
    Bf16* to = even + i * kTileDepth;
    Bf16* odd = to + kTileSide * kTileDepth;
    if (Int8) {
      const uint8_t* q = piece.packed[i] + group * kGroupOf;
      prefetch_near(q + ahead);
      decode_apart_int8(reinterpret_cast<const int8_t*>(q), to, odd);
    } else {
      const uint8_t* packed = piece.packed[i] + group * (kGroupOf / 2);
      if (group % 2 == 0) prefetch_near(packed + ahead);
      decode_apart(packed, codes, to, odd);
    }
  }
}

// The scale of every group of kGroupOf columns of a segment, for the strip's rows.
static void few_scales(const Weight& weight, int64_t row, int64_t rows, int64_t column, FewMemory* memory) {
  const int64_t groups = smaller(kFewSegment, weight.cols - column) / kGroupOf;
  if (weight.is_int8()) {
    for (int64_t i = 0; i < rows; ++i) {
      const float by = weight.rows8.absmax[row + i] / 127.0F;
      for (int64_t group = 0; group < groups; ++group) memory->scales[i][group] = by;
    }
    return;
  }
  alignas(64) float blocks[kFewScales + 1];
  const int shift = weight.packed4.block_shift;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t start = (row + i) * weight.cols + column;
    const int64_t first = start >> shift;
    prefetch(weight.packed4.scales.address(first + kFewStrip * (weight.cols >> shift)));
    if ((int64_t{1} << shift) == kGroupOf) {
      load_scales(weight.packed4.scales, first, groups, memory->scales[i]);
      continue;
    }
    const int64_t last = (start + (groups - 1) * kGroupOf) >> shift;
    load_scales(weight.packed4.scales, first, last - first + 1, blocks);
    for (int64_t group = 0; group < groups; ++group) {
      memory->scales[i][group] = blocks[((start + group * kGroupOf) >> shift) - first];
    }
  }
}

// The piece's sums += scale * products, for a group of rows of x.
static void add_scaled(const FewPiece& piece, int x_group) {
  const float* products = piece.products + x_group * kFewGroups * kTileFloats;
  float* sums = piece.sums[x_group];
  F32 rows[kTileSide];
  for (int64_t i = 0; i < kTileSide; ++i) rows[i] = piece.first ? zero() : load(sums + i * kTileSide);
  for (int64_t group = 0; group < piece.groups; ++group, products += kTileFloats) {
    for (int64_t i = 0; i < kTileSide; ++i) {
      rows[i] = fma(load(products + i * kTileSide), broadcast(piece.scales[i * kFewScales + group]), rows[i]);
    }
  }
  for (int64_t i = 0; i < kTileSide; ++i) store(sums + i * kTileSide, rows[i]);
}

// A slot of a piece: multiplications of one tile of W with 16 or 32 rows of x. Four sums take turns, so that none waits
// for its last multiplication. One x group: a sum for each group of columns, all even tiles before all odd ones. Two:
// groups 0 and 1, then 2 and 3, whose sums are stored in between.
template <int Groups, int Slot>
static NYBBLE_INLINE void multiply_slot(const FewPiece& piece, const char* x, int64_t x_group) {
  float* products = piece.products;
  if constexpr (Groups == 1) {
    constexpr int kGroup = Slot % 4, kPart = Slot / 4;
    if (kPart == 0) zero_tile<kGroup>();
    if (kGroup < piece.groups) {
      constexpr int64_t kAt = (kGroup * 2 + kPart) * kTileBytes;
      load_tile<4 + Slot % 2>(piece.d + kAt);
      load_tile<6 + Slot % 2>(x + kAt);
      multiply_add_tiles<kGroup, 4 + Slot % 2, 6 + Slot % 2>();
    }
    if (Slot == 7) store_sum_tiles(products, kTileFloats);
  } else {
    constexpr int kGroup = Slot / 4 * 2 + Slot % 2, kPart = Slot / 2 % 2;
    constexpr int kSum = Slot % 2 * 2;
    if (kPart == 0) zero_tile<kSum>(), zero_tile<kSum + 1>();
    if (kGroup < piece.groups) {
      constexpr int64_t kAt = (kGroup * 2 + kPart) * kTileBytes;
      load_tile<4 + Slot % 2>(piece.d + kAt);
      load_tile<6>(x + kAt);
      multiply_add_tiles<kSum, 4 + Slot % 2, 6>();
      load_tile<7>(x + x_group + kAt);
      multiply_add_tiles<kSum + 1, 4 + Slot % 2, 7>();
    }
    if (Slot % 4 == 3) store_pair_tiles(products + Slot / 4 * 2 * kTileFloats, kFewGroups * kTileFloats);
  }
}

// An eighth of decoding `next` and of multiplying `piece`, which different units of a core do.
template <int Groups, bool Int8, int Slot>
static NYBBLE_INLINE void few_slot(const FewPiece& next, const FewPiece& piece, const char* x, int64_t x_group,
                                   int64_t ahead, Table16 codes) {
  if (piece.groups > 0) multiply_slot<Groups, Slot>(piece, x, x_group);
  if (Slot / 2 < next.groups) decode_rows_of_codes<Int8>(next, Slot / 2, Slot % 2 * kRowsOfSlot, ahead, codes);
}

// Piece `index` of the strip's in columns [column, column + width): all rows, then the next columns. Rows behind the
// weight's last repeat it: their sums are not stored.
static inline void few_piece(const LinearArgs& args, int64_t row, int64_t column, int64_t width, int64_t index,
                             FewMemory* memory, FewPiece* piece) {
  const Weight& weight = args.weight;
  const uint8_t* bytes = weight.is_int8() ? reinterpret_cast<const uint8_t*>(weight.rows8.q) : weight.packed4.packed;
  const int64_t tile = index % kFewTiles;
  const int64_t at = index / kFewTiles * kFewColumns;
  piece->groups = at < width ? smaller(kFewGroups, (width - at) / kGroupOf) : 0;
  for (int64_t i = 0; i < kTileSide && piece->groups > 0; ++i) {
    const int64_t of = smaller(row + tile * kTileSide + i, weight.rows - 1);
    piece->packed[i] = bytes + bytes_of(weight, of * weight.cols + column + at);
  }
  piece->d = memory->d[index & 1];
  piece->products = memory->products[0][0];
  piece->scales = memory->scales[tile * kTileSide] + at / kGroupOf;
  for (int g = 0; g < 2; ++g) piece->sums[g] = memory->sums[tile / 2][tile % 2 * 2 + g];
  piece->first = column + at == 0;
}

// The strip's products with columns [column, column + width).
template <int Groups, bool Int8>
static void few_segment(const TilesJob& job, int64_t row, int64_t column, int64_t width, FewMemory* memory) {
  const LinearArgs& args = *job.args;
  const int64_t cols = args.weight.cols;
  Table16 codes = {};
  if (!Int8) codes = scaled_twice(load_table(args.weight.packed4.codebook), 1.0F);
  const int64_t x_group = job.all_steps() * kTileBytes;
  const int64_t pieces = divide_up(width, kFewColumns) * kFewTiles;
  FewPiece of[2];
  of[1].groups = 0;
  for (int64_t index = 0; index <= pieces; ++index) {
    FewPiece& next = of[index & 1];
    const FewPiece& piece = of[(index + 1) & 1];
    few_piece(args, row, column, width, index, memory, &next);
    const int64_t at = column + index / kFewTiles * kFewColumns;
    // Behind a row's end comes the next strip's.
    const int64_t ahead =
        bytes_of(args.weight, at + kFewColumns < cols ? kFewColumns : (kFewStrip - 1) * cols + kFewColumns);
    const int64_t x_at = column + larger(index - 1, 0) / kFewTiles * kFewColumns;
    const char* x = job.x + x_at / kTileDepth * kTileBytes;
    tile_fence();
    few_slot<Groups, Int8, 0>(next, piece, x, x_group, ahead, codes);
    few_slot<Groups, Int8, 1>(next, piece, x, x_group, ahead, codes);
    few_slot<Groups, Int8, 2>(next, piece, x, x_group, ahead, codes);
    few_slot<Groups, Int8, 3>(next, piece, x, x_group, ahead, codes);
    few_slot<Groups, Int8, 4>(next, piece, x, x_group, ahead, codes);
    few_slot<Groups, Int8, 5>(next, piece, x, x_group, ahead, codes);
    few_slot<Groups, Int8, 6>(next, piece, x, x_group, ahead, codes);
    few_slot<Groups, Int8, 7>(next, piece, x, x_group, ahead, codes);
    tile_fence();
    for (int g = 0; g < Groups && piece.groups > 0; ++g) add_scaled(piece, g);
  }
}

// sums += the side path's.
template <int Groups>
static void few_side(const TilesJob& job, int64_t row, FewMemory* memory) {
  const LinearArgs& args = *job.args;
  const SidePath& side = args.side;
  const DenseRows right{side.right, side.right_dtype, side.rank};
  for (int64_t wide = 0; wide < kFewStrip / kWide && row + wide * kWide < args.weight.rows; ++wide) {
    const int64_t first = row + wide * kWide;
    const int64_t rows = smaller(kWide, args.weight.rows - first);
    for (int64_t step = 0; step < job.side_steps; step += 2) {
      fill_rows(right, first, rows, side.rank, step, 2, memory->side);
      tile_fence();
      multiply_groups(args, memory->side, job.x + (job.steps + step) * kTileBytes, job.all_steps() * kTileBytes,
                      Groups == 2, 2, false, memory->sums[wide][0]);
    }
  }
}

template <int Groups, bool Int8>
static void few_task(void* context, int64_t index) {
  const TilesJob& job = *static_cast<const TilesJob*>(context);
  const LinearArgs& args = *job.args;
  const int64_t row = index * kFewStrip;
  const int64_t rows = smaller(kFewStrip, args.weight.rows - row);
  auto* memory = static_cast<FewMemory*>(scratch(Slot::panel, sizeof(FewMemory)));
  if (memory == nullptr) return job.failure->report_memory(sizeof(FewMemory));
  open_tiles();
  for (int64_t column = 0; column < args.weight.cols; column += kFewSegment) {
    few_scales(args.weight, row, rows, column, memory);
    few_segment<Groups, Int8>(job, row, column, smaller(kFewSegment, args.weight.cols - column), memory);
  }
  few_side<Groups>(job, row, memory);
  close_tiles();
  for (int64_t at = 0; at < rows; at += kWide) {
    store_sums(args, memory->sums[at / kWide][0], 0, args.m, row + at, smaller(kWide, rows - at));
  }
}

// Whether the codes are normal numbers in bf16, and their products with every row of x stay so far inside fp32's range
// that what is lost of smaller ones does not count.
static bool few_in_range(const LinearArgs& args) {
  constexpr float kMost = 1e30F, kLeast = 1e-25F, kLeastCode = 1e-37F;
  const auto* x = static_cast<const Bf16*>(args.x);
  const BareRange range = bare_range(args.weight);
  if (!(range.most <= kMost) || range.least < kLeastCode) return false;
  for (int64_t row = 0; row < args.m; ++row) {
    const uint32_t magnitude = largest_magnitude_of(x + row * args.x_stride, args.weight.cols);
    if (magnitude == 0) continue;
    const float largest = float_of(magnitude);
    if (magnitude >= kInfinity || !(largest * range.most <= kMost)) return false;
    if (largest < kLeast || largest * range.least < kLeast) return false;
  }
  return true;
}

// What it does not suit goes to linear_tiles.
static Status linear_tiles_few(const LinearArgs& args) {
  const Weight& weight = args.weight;
  const bool suits = !args.grad_input && args.m <= kMostFewRows && args.dtype == DType::bf16 && weight.cols > 0 &&
                     weight.cols % kGroupOf == 0 && (weight.is_int8() || weight.packed4.block_size() >= kGroupOf);
  if (!suits || !few_in_range(args)) return linear_tiles(args);
  const bool two = args.m > kTileSide;
  const auto task = weight.is_int8() ? (two ? few_task<2, true> : few_task<1, true>)
                                     : (two ? few_task<2, false> : few_task<1, false>);
  return linear_tiles_as(args, task, kFewStrip);
}
