// out = x W^T for at most 8 rows of x: all time goes to reading the weight, once.
//
// A simdgroup takes 4 rows of W, its lanes lie along k. A lane loads a run of one row (16 bytes for one row of x),
// finds the codes in a table in threadgroup memory, multiplies them as they are, and applies the block's scale once, to
// the sum over its run. The same values of x, in registers, serve all 4 rows. Everything is fp32.
//
//   M (rows of x)   elements of a run   registers for x
//   1               32                  32
//   2               16                  32
//   4, 8             8                  32, 64
//
// Two simdgroups make a threadgroup: few enough for small layers to fill all cores.

constant constexpr int kSmallRows = 4;  // of W, a simdgroup

template <typename T, int M, bool Int8>
kernel void linear_small_m(device const T* x [[buffer(0)]], device const uchar* packed [[buffer(1)]],
                           device const uchar* absmax [[buffer(2)]], device const float* nested [[buffer(3)]],
                           device const float* map [[buffer(4)]], device const float* offset [[buffer(5)]],
                           device const float* codebook [[buffer(6)]], device const uchar* side [[buffer(7)]],
                           device const uchar* side_weight [[buffer(8)]], device const uchar* bias [[buffer(9)]],
                           device T* out [[buffer(10)]], constant LinearSizes& sizes [[buffer(11)]],
                           uint group [[threadgroup_position_in_grid]],
                           uint thread_index [[thread_index_in_threadgroup]],
                           uint simd_index [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                           uint simds [[simdgroups_per_threadgroup]]) {
  constexpr int run = M == 1 ? (Int8 ? 16 : 32) : M == 2 ? 16 : 8;
  constexpr int words = Int8 ? run / 4 : run / 8;
  threadgroup float table[16];
  if (!Int8 && thread_index < 16) table[thread_index] = codebook[thread_index];
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int rows = int(sizes.rows), cols = int(sizes.cols), m = int(sizes.m);
  const int first_row = int(group * simds + simd_index) * kSmallRows;
  if (first_row >= rows) return;  // the same for the whole simdgroup
  const Scales scales = scales_of(absmax, nested, map, offset, int(sizes.nested_shift));
  // Rows that are not there read the last one that is, and are not written.
  ulong starts[kSmallRows];
  UNROLL
  for (int r = 0; r < kSmallRows; ++r) starts[r] = ulong(min(first_row + r, rows - 1)) * ulong(cols);
  device const T* from[M];
  UNROLL
  for (int i = 0; i < M; ++i) from[i] = x + long(min(i, m - 1)) * sizes.x_stride;
  float sums[kSmallRows][M];
  UNROLL
  for (int r = 0; r < kSmallRows; ++r) {
    UNROLL
    for (int i = 0; i < M; ++i) sums[r][i] = 0.0f;
  }

  if (sizes.whole_x != 0 && sizes.whole_w != 0) {
    for (int k = int(lane) * run; k < cols; k += kLanes * run) {
      float inputs[M][run];
      UNROLL
      for (int i = 0; i < M; ++i) {
        UNROLL
        for (int j = 0; j < run; j += 4) {
          const float4 found = load_4(from[i] + k + j);
          inputs[i][j] = found.x;
          inputs[i][j + 1] = found.y;
          inputs[i][j + 2] = found.z;
          inputs[i][j + 3] = found.w;
        }
      }
      UNROLL
      for (int r = 0; r < kSmallRows; ++r) {
        const ulong element = starts[r] + ulong(k);
        uint found[words];
        load_words<words>(packed + (Int8 ? element : element >> 1), found);
        float partial[M];
        UNROLL
        for (int i = 0; i < M; ++i) partial[i] = 0.0f;
        UNROLL
        for (int j = 0; j < run; ++j) {
          const float code = Int8 ? q_in(found[j / 4], j % 4) : code_in(table, found[j / 8], j % 8);
          UNROLL
          for (int i = 0; i < M; ++i) partial[i] = fma(code, inputs[i][j], partial[i]);
        }
        const float scale = Int8 ? 1.0f : scale_of(scales, element >> sizes.block_shift);
        UNROLL
        for (int i = 0; i < M; ++i) sums[r][i] = fma(scale, partial[i], sums[r][i]);
      }
    }
  } else {
    for (int k = int(lane); k < cols; k += kLanes) {
      UNROLL
      for (int r = 0; r < kSmallRows; ++r) {
        const ulong element = starts[r] + ulong(k);
        const float code = Int8 ? float(((device const char*)packed)[element]) : code_at(table, packed, element);
        const float scale = Int8 ? 1.0f : scale_of(scales, element >> sizes.block_shift);
        UNROLL
        for (int i = 0; i < M; ++i) {
          const float product = code * float(from[i][k]);
          sums[r][i] = fma(scale, product, sums[r][i]);
        }
      }
    }
  }

  UNROLL
  for (int r = 0; r < kSmallRows; ++r) {
    const int row = min(first_row + r, rows - 1);
    UNROLL
    for (int i = 0; i < M; ++i) {
      float sum = simd_sum(sums[r][i]);
      if (Int8) sum = sum * divide_127(((device const float*)absmax)[row]);
      float extra = 0.0f;
      for (int j = int(lane); j < int(sizes.rank); j += kLanes) {
        const float left = load_any(side, ulong(min(i, m - 1)) * ulong(sizes.rank) + ulong(j), int(sizes.side_dtype));
        const float right =
            load_any(side_weight, ulong(row) * ulong(sizes.rank) + ulong(j), int(sizes.side_weight_dtype));
        extra = fma(left, right, extra);
      }
      if (sizes.rank != 0) sum = sum + simd_sum(extra);
      if (sizes.bias_dtype >= 0) sum = sum + load_any(bias, ulong(row), int(sizes.bias_dtype));
      if (int(lane) == r * M + i && first_row + r < rows && i < m) out[ulong(i) * ulong(rows) + ulong(row)] = T(sum);
    }
  }
}

#define SMALL_M(T, M)                                                 \
  template [[host_name("linear_small_m_4bit_" #T "_" #M)]] [[kernel]] \
  decltype(linear_small_m<T, M, false>) linear_small_m<T, M, false>;  \
  template [[host_name("linear_small_m_int8_" #T "_" #M)]] [[kernel]] \
  decltype(linear_small_m<T, M, true>) linear_small_m<T, M, true>;

#define SMALL_M_OF(T) SMALL_M(T, 1) SMALL_M(T, 2) SMALL_M(T, 4) SMALL_M(T, 8)

SMALL_M_OF(float)
SMALL_M_OF(half)
SMALL_M_OF(bfloat)
