// Codes to values, bit for bit as nybble.reference has them (but for values below 2^-126, where the GPU may flush
// them).

struct DequantizeSizes {
  long count;
  long block_shift;   // log2 of the block size
  long nested_shift;  // see LinearSizes
};

// Rounded to nearest, ties to even. bfloat in integers: what a cast does to a tie is nowhere promised.
inline float rounded(float value, float) { return value; }
inline half rounded(float value, half) { return half(value); }
inline bfloat rounded(float value, bfloat) {
  const uint bits = as_type<uint>(value);
  const uint nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return as_type<bfloat>(ushort(is_nan ? (bits >> 16) | 0x40u : nearest));
}

template <typename T>
inline void store_4(device T* to, float a, float b, float c, float d) {
  *(device vec<T, 4>*)to = vec<T, 4>(rounded(a, T(0)), rounded(b, T(0)), rounded(c, T(0)), rounded(d, T(0)));
}

// A thread takes 8 elements, which never leave their block: a simdgroup reads 128 bytes that are neighbours and writes
// 512 or 1024. packed and out are aligned to 16 bytes.
template <typename T>
kernel void dequantize_4bit(device const uchar* packed [[buffer(0)]], device const uchar* absmax [[buffer(1)]],
                            device const float* nested [[buffer(2)]], device const float* map [[buffer(3)]],
                            device const float* offset [[buffer(4)]], device const float* codebook [[buffer(5)]],
                            device T* out [[buffer(6)]], constant DequantizeSizes& sizes [[buffer(7)]],
                            uint position [[thread_position_in_grid]],
                            uint thread_index [[thread_index_in_threadgroup]]) {
  threadgroup float table[16];
  if (thread_index < 16) table[thread_index] = codebook[thread_index];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const ulong first = ulong(position) * 8;
  const ulong count = ulong(sizes.count);
  if (first >= count) return;
  const Scales scales = scales_of(absmax, nested, map, offset, int(sizes.nested_shift));
  const float scale = scale_of(scales, first >> sizes.block_shift);
  if (first + 8 <= count) {
    const uint word = ((device const uint*)packed)[position];
    float values[8];
    for (int i = 0; i < 8; ++i) values[i] = code_in(table, word, i) * scale;
    store_4(out + first, values[0], values[1], values[2], values[3]);
    store_4(out + first + 4, values[4], values[5], values[6], values[7]);
    return;
  }
  for (ulong element = first; element < count; ++element) {
    const float value = code_at(table, packed, element) * scale;
    out[element] = rounded(value, T(0));
  }
}

// Blocks of 8-bit codes with a map of 256 values; a thread takes 4 elements. codes and out are aligned to 16 bytes.
template <typename T>
kernel void dequantize_8bit(device const uchar* codes [[buffer(0)]], device const float* absmax [[buffer(1)]],
                            device const float* map [[buffer(2)]], device T* out [[buffer(3)]],
                            constant DequantizeSizes& sizes [[buffer(4)]], uint position [[thread_position_in_grid]]) {
  const ulong first = ulong(position) * 4;
  const ulong count = ulong(sizes.count);
  if (first >= count) return;
  const float scale = absmax[first >> sizes.block_shift];
  if (first + 4 <= count) {
    const uint word = ((device const uint*)codes)[position];
    store_4(out + first, map[word & 255u] * scale, map[(word >> 8) & 255u] * scale, map[(word >> 16) & 255u] * scale,
            map[word >> 24] * scale);
    return;
  }
  for (ulong element = first; element < count; ++element) {
    const float value = map[codes[element]] * scale;
    out[element] = rounded(value, T(0));
  }
}

// Rows of int8; a threadgroup takes a row, so that no element is divided by the length of one.
struct RowSizes {
  long rows;
  long cols;
};

template <typename T>
kernel void dequantize_int8(device const char* q [[buffer(0)]], device const float* absmax [[buffer(1)]],
                            device T* out [[buffer(2)]], constant RowSizes& sizes [[buffer(3)]],
                            uint row [[threadgroup_position_in_grid]],
                            uint thread_index [[thread_index_in_threadgroup]],
                            uint threads [[threads_per_threadgroup]]) {
  const float scale = absmax[row];
  const ulong start = ulong(row) * ulong(sizes.cols);
  for (ulong column = thread_index; column < ulong(sizes.cols); column += threads) {
    out[start + column] = rounded(int8_value(float(q[start + column]), scale), T(0));
  }
}

#define DEQUANTIZE(T)                                                                                       \
  template [[host_name("dequantize_4bit_" #T)]] [[kernel]] decltype(dequantize_4bit<T>) dequantize_4bit<T>; \
  template [[host_name("dequantize_8bit_" #T)]] [[kernel]] decltype(dequantize_8bit<T>) dequantize_8bit<T>; \
  template [[host_name("dequantize_int8_" #T)]] [[kernel]] decltype(dequantize_int8<T>) dequantize_int8<T>;

DEQUANTIZE(float)
DEQUANTIZE(half)
DEQUANTIZE(bfloat)
