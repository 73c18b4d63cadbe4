// out = x W^T, and grad_input out = x W, for many rows of x, on simdgroup matrices.
//
// A threadgroup of 4 simdgroups makes a tile of BM rows and 64 columns of out. In every step it loads BM x 32 of x and
// decodes 2048 elements of W, once, into threadgroup memory, as the activations' type; products are summed in fp32.
//
//   forward      W tile [64 rows][32 cols], read transposed          grad_input   W tile [32 rows][64 cols], as it is
//   simdgroups   0 1        each BM / 2 rows x 32 columns, BM / 16 x 4 matrices of 8 x 8
//                2 3
//
// Rows of the tiles are 8 elements longer than they need: 8 rows of a matrix then lie in different banks.
//
// Decoding costs about 6 instructions an element, the products 2 BM / 32: a tenth of the time where BM is 64.
// Threadgroup memory: 10 KB of the 32 for 16-bit elements, 20 KB for fp32.

template <typename T, int BM, bool Grad, bool Int8>
kernel void linear_tiles(device const T* x [[buffer(0)]], device const uchar* packed [[buffer(1)]],
                         device const uchar* absmax [[buffer(2)]], device const float* nested [[buffer(3)]],
                         device const float* map [[buffer(4)]], device const float* offset [[buffer(5)]],
                         device const float* codebook [[buffer(6)]], device const uchar* side [[buffer(7)]],
                         device const uchar* side_weight [[buffer(8)]], device const uchar* bias [[buffer(9)]],
                         device T* out [[buffer(10)]], constant LinearSizes& sizes [[buffer(11)]],
                         uint3 group [[threadgroup_position_in_grid]],
                         uint thread_index [[thread_index_in_threadgroup]],
                         uint simd_index [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  constexpr int BN = 64, BK = 32, threads = 128;
  constexpr int x_row = BK + 8;                // elements of a row of the x tile
  constexpr int w_row = (Grad ? BN : BK) + 8;  // of the W tile
  constexpr int w_rows = Grad ? BK : BN;
  constexpr int side_row = 12, out_row = 36;  // floats
  // One piece of memory: the tiles, then those of the side path in fp32, then the sums on their way out.
  threadgroup float4 memory[(BM * x_row + w_rows * w_row) * int(sizeof(T)) / 16];
  threadgroup float table[16];
  threadgroup T* x_tile = (threadgroup T*)memory;
  threadgroup T* w_tile = x_tile + BM * x_row;
  threadgroup float* floats = (threadgroup float*)memory;

  const int t = int(thread_index);
  const int m = int(sizes.m), rows = int(sizes.rows), cols = int(sizes.cols);
  const int columns = Grad ? cols : rows, contraction = Grad ? rows : cols;
  const int first_m = int(group.y) * BM, first_n = int(group.x) * BN;
  const Scales scales = scales_of(absmax, nested, map, offset, int(sizes.nested_shift));
  if (!Int8 && t < 16) table[t] = codebook[t];

  const int simd_m = int(simd_index / 2) * (BM / 2), simd_n = int(simd_index % 2) * 32;
  simdgroup_matrix<float, 8, 8> sums[BM / 16][4];
  UNROLL
  for (int i = 0; i < BM / 16; ++i) {
    UNROLL
    for (int j = 0; j < 4; ++j) sums[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }

  // What this thread loads: runs of one row of x, and of one row of W.
  constexpr int x_run = BM * BK / threads, w_run = 16;
  const int x_at = t / (BK / x_run), x_column = t % (BK / x_run) * x_run;
  const int w_at = t / ((Grad ? BN : BK) / w_run), w_column = t % ((Grad ? BN : BK) / w_run) * w_run;
  const bool has_x = first_m + x_at < m;
  device const T* x_from = x + long(has_x ? first_m + x_at : 0) * sizes.x_stride;

  for (int k0 = 0; k0 < contraction; k0 += BK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the tiles of the step before have been read
    UNROLL
    for (int j = 0; j < x_run; j += 4) {
      const int k = k0 + x_column + j;
      threadgroup T* to = x_tile + x_at * x_row + x_column + j;
      if (sizes.whole_x != 0) {
        vec<T, 4> found = vec<T, 4>(T(0));
        if (has_x && k < contraction) found = *(device const vec<T, 4>*)(x_from + k);
        *(threadgroup vec<T, 4>*)to = found;
      } else {
        for (int e = 0; e < 4; ++e) {
          T found = T(0);
          if (has_x && k + e < contraction) found = x_from[k + e];
          to[e] = found;
        }
      }
    }
    {
      const int row = (Grad ? k0 : first_n) + w_at, column = (Grad ? first_n : k0) + w_column;
      threadgroup T* to = w_tile + w_at * w_row + w_column;
      const ulong element = ulong(row) * ulong(cols) + ulong(column);
      if (row >= rows || column >= cols) {
        UNROLL
        for (int j = 0; j < w_run; ++j) to[j] = T(0);
      } else if (sizes.whole_w != 0) {
        uint words[4];
        load_words<Int8 ? 4 : 2>(packed + (Int8 ? element : element >> 1), words);
        const float scale = Int8 ? ((device const float*)absmax)[row] : scale_of(scales, element >> sizes.block_shift);
        UNROLL
        for (int j = 0; j < w_run; j += 4) {
          float values[4];
          for (int e = 0; e < 4; ++e) {
            values[e] =
                Int8 ? int8_value(q_in(words[j / 4], e), scale) : code_in(table, words[j / 8], j % 8 + e) * scale;
          }
          *(threadgroup vec<T, 4>*)(to + j) = vec<T, 4>(T(values[0]), T(values[1]), T(values[2]), T(values[3]));
        }
      } else {
        for (int j = 0; j < w_run; ++j) {
          float value = 0.0f;
          const ulong at = element + ulong(j);
          if (column + j < cols) {
            value = Int8 ? int8_value(float(((device const char*)packed)[at]), ((device const float*)absmax)[row])
                         : code_at(table, packed, at) * scale_of(scales, at >> sizes.block_shift);
          }
          to[j] = T(value);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    UNROLL
    for (int k = 0; k < BK; k += 8) {
      simdgroup_matrix<T, 8, 8> left[BM / 16], right[4];
      UNROLL
      for (int i = 0; i < BM / 16; ++i) simdgroup_load(left[i], x_tile + (simd_m + 8 * i) * x_row + k, x_row);
      UNROLL
      for (int j = 0; j < 4; ++j) {
        if (Grad) {
          simdgroup_load(right[j], w_tile + k * w_row + simd_n + 8 * j, w_row);
        } else {
          simdgroup_load(right[j], w_tile + (simd_n + 8 * j) * w_row + k, w_row, ulong2(0, 0), true);
        }
      }
      UNROLL
      for (int i = 0; i < BM / 16; ++i) {
        UNROLL
        for (int j = 0; j < 4; ++j) simdgroup_multiply_accumulate(sums[i][j], left[i], right[j], sums[i][j]);
      }
    }
  }

  // The side path: more of the contraction, 8 of the rank a step, in fp32 whatever the dtypes.
  const int rank = int(sizes.rank);
  for (int j0 = 0; j0 < rank; j0 += 8) {
    threadgroup float* side_tile = floats;
    threadgroup float* side_weight_tile = floats + BM * side_row;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = t; i < BM * 8; i += threads) {
      const int row = first_m + i / 8, j = j0 + i % 8;
      float value = 0.0f;
      if (row < m && j < rank) {
        value = load_any(side, ulong(row) * ulong(rank) + ulong(j), int(sizes.side_dtype));
      }
      side_tile[i / 8 * side_row + i % 8] = value;
    }
    for (int i = t; i < BN * 8; i += threads) {
      // Neighbouring threads take what lies side by side: the rank in forward, the columns in grad_input.
      const int n = Grad ? i % BN : i / 8, j = Grad ? i / BN : i % 8;
      const int column = first_n + n;
      float value = 0.0f;
      if (column < columns && j0 + j < rank) {
        const ulong at =
            Grad ? ulong(j0 + j) * ulong(cols) + ulong(column) : ulong(column) * ulong(rank) + ulong(j0 + j);
        value = load_any(side_weight, at, int(sizes.side_weight_dtype));
      }
      side_weight_tile[n * side_row + j] = value;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_matrix<float, 8, 8> left, right[4];
    UNROLL
    for (int j = 0; j < 4; ++j) {
      simdgroup_load(right[j], side_weight_tile + (simd_n + 8 * j) * side_row, side_row, ulong2(0, 0), true);
    }
    UNROLL
    for (int i = 0; i < BM / 16; ++i) {
      simdgroup_load(left, side_tile + (simd_m + 8 * i) * side_row, side_row);
      UNROLL
      for (int j = 0; j < 4; ++j) simdgroup_multiply_accumulate(sums[i][j], left, right[j], sums[i][j]);
    }
  }

  // 8 rows at a time through memory of the simdgroup's own, so that a lane writes a column of each: 32 neighbours.
  threadgroup_barrier(mem_flags::mem_threadgroup);
  threadgroup float* mine = floats + int(simd_index) * 8 * out_row;
  const int column = first_n + simd_n + int(lane);
  float added = 0.0f;
  if (!Grad && sizes.bias_dtype >= 0 && column < columns) added = load_any(bias, ulong(column), int(sizes.bias_dtype));
  UNROLL
  for (int i = 0; i < BM / 16; ++i) {
    UNROLL
    for (int j = 0; j < 4; ++j) simdgroup_store(sums[i][j], mine + 8 * j, out_row);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int r = 0; r < 8; ++r) {
      const int row = first_m + simd_m + 8 * i + r;
      if (row < m && column < columns) {
        const float sum = mine[r * out_row + int(lane)] + added;
        out[ulong(row) * ulong(columns) + ulong(column)] = T(sum);
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

#define TILES(T, BM)                                                             \
  template [[host_name("linear_tiles_4bit_" #T "_" #BM)]] [[kernel]]             \
  decltype(linear_tiles<T, BM, false, false>) linear_tiles<T, BM, false, false>; \
  template [[host_name("linear_tiles_int8_" #T "_" #BM)]] [[kernel]]             \
  decltype(linear_tiles<T, BM, false, true>) linear_tiles<T, BM, false, true>;   \
  template [[host_name("grad_input_tiles_4bit_" #T "_" #BM)]] [[kernel]]         \
  decltype(linear_tiles<T, BM, true, false>) linear_tiles<T, BM, true, false>;   \
  template [[host_name("grad_input_tiles_int8_" #T "_" #BM)]] [[kernel]]         \
  decltype(linear_tiles<T, BM, true, true>) linear_tiles<T, BM, true, true>;

#define TILES_OF(T) TILES(T, 32) TILES(T, 64)

TILES_OF(float)
TILES_OF(half)
TILES_OF(bfloat)
