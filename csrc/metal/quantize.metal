// Values to codes, bit for bit as nybble.reference has them, on any GPU and in any math mode.
//
// Apple's GPUs take fp32 numbers below 2^-126 as 0 and may make a division approximate. So a block's absmax is the
// largest bit pattern, its reciprocal comes from an integer division (once a block), and an element is multiplied as
// numbers of ordinary size: both factors carry exponents shifted by integer additions, which cancel in the product. A
// product of two ordinary numbers is correctly rounded everywhere.
//
// One assumption: midpoints between neighbouring codes are 0 or at least 2^-120.

struct QuantizeSizes {
  long count;
  long block_shift;  // log2 of the block size
};

constant constexpr uint kMagnitude = 0x7FFFFFFFu;
constant constexpr uint kInfinity = 0x7F800000u;
constant constexpr uint kNormal = 0x00800000u;     // the smallest number that is not denormal
constant constexpr uint kMinAbsmax = 0x006CE3EEu;  // 1e-38, reference.MIN_ABSMAX

inline uint bits_of(float value) { return as_type<uint>(value); }
// A float here may be a half's denormal, an ordinary number.
inline uint bits_of(half value) { return as_type<uint>(float(value)); }
inline uint bits_of(bfloat value) { return uint(as_type<ushort>(value)) << 16; }

// mantissa * 2^exponent with mantissa in [2^23, 2^24), of a number above 0.
struct Parts {
  uint mantissa;
  int exponent;
};

inline Parts parts_of(uint magnitude) {
  Parts parts;
  parts.mantissa = magnitude & 0x007FFFFFu;
  parts.exponent = int(magnitude >> 23) - 150;
  if (magnitude < kNormal) {
    const int shift = int(clz(parts.mantissa)) - 8;
    parts.mantissa <<= shift;
    parts.exponent = -149 - shift;
  } else {
    parts.mantissa |= kNormal;
  }
  return parts;
}

// fp32's 1 / absmax as parts; where that is denormal, its mantissa has fewer bits.
inline Parts reciprocal_of(uint absmax) {
  const Parts a = parts_of(absmax);
  Parts result;
  if (a.mantissa == kNormal) {  // a power of two
    result.mantissa = kNormal;
    result.exponent = -a.exponent - 46;
    return result;
  }
  result.exponent = -a.exponent - 47;
  const int lost = max(0, -149 - result.exponent);
  const ulong one = ulong(1) << (47 - lost);
  const ulong quotient = one / ulong(a.mantissa), rest = one % ulong(a.mantissa);
  result.exponent += lost;
  result.mantissa = uint(quotient) + (2 * rest > ulong(a.mantissa) ? 1u : 0u);  // never a tie
  return result;
}

// value * 1/absmax for a block's value, clamped to -1 .. 1. A product too small to be an ordinary number is 0 or the
// smallest of its sign: no more is asked of it than on which side of 0 it lies.
inline float relative(uint bits, Parts reciprocal) {
  const uint magnitude = bits & kMagnitude;
  if (magnitude == 0) return 0.0f;
  const Parts value = parts_of(magnitude);
  const uint sign = bits & ~kMagnitude;
  // The value times 2^(exponent of the reciprocal + 24), times the reciprocal's mantissa / 2^24.
  const int biased = value.exponent + reciprocal.exponent + 24 + 150;
  if (biased < 8) {
    const int shift = -150 - value.exponent - reciprocal.exponent;  // above 2^-150 a product is not rounded to 0
    const ulong product = ulong(value.mantissa) * ulong(reciprocal.mantissa);
    const bool above = shift < 0 || (shift < 48 && product > (ulong(1) << shift));
    return above ? as_type<float>(sign | kNormal) : 0.0f;
  }
  const float left = as_type<float>(sign | (uint(biased) << 23) | (value.mantissa & 0x007FFFFFu));
  const float right = float(reciprocal.mantissa) * 5.9604644775390625e-8f;
  const float product = left * right;
  return clamp(product, -1.0f, 1.0f);
}

// Sorts `count` codes into `ascending`, equal ones in their order, with their places; then makes them midpoints. All
// threads of the threadgroup call it.
inline void sort_codes(device const float* codes, threadgroup float* ascending, threadgroup uchar* places,
                       threadgroup float* midpoints, int count, uint thread_index, uint threads) {
  for (int i = int(thread_index); i < count; i += int(threads)) {
    const float code = codes[i];
    int rank = 0;
    for (int j = 0; j < count; ++j) {
      const float other = codes[j];
      rank += other < code || (other == code && j < i) ? 1 : 0;
    }
    ascending[rank] = code;
    places[rank] = uchar(i);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = int(thread_index); i + 1 < count; i += int(threads)) {
    const float sum = ascending[i] + ascending[i + 1];
    midpoints[i] = sum * 0.5f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// How many of the midpoints of a map of 2 * half_count codes lie below s.
template <int HalfCount>
inline int rank_of(threadgroup const float* midpoints, float s) {
  int rank = 0;
  for (int step = HalfCount; step > 0; step /= 2) rank += s > midpoints[rank + step - 1] ? step : 0;
  return rank;
}

// The absmax of `count` elements as bits, at least `least`; all lanes of a simdgroup call it. At or above kInfinity: an
// element is not finite.
template <typename T>
inline uint absmax_of(device const T* x, ulong count, uint lane, uint least) {
  uint found = least;
  for (ulong i = lane; i < count; i += kLanes) found = max(found, bits_of(x[i]) & kMagnitude);
  return simd_max(found);
}

// A simdgroup takes a block. `failed`: the lowest number of a block that is not all finite.
template <typename T>
kernel void quantize_4bit(device const T* x [[buffer(0)]], device const float* codebook [[buffer(1)]],
                          device uchar* packed [[buffer(2)]], device uint* absmax [[buffer(3)]],
                          device atomic_uint* failed [[buffer(4)]], constant QuantizeSizes& sizes [[buffer(5)]],
                          uint group [[threadgroup_position_in_grid]],
                          uint thread_index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]],
                          uint simd_index [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                          uint simds [[simdgroups_per_threadgroup]]) {
  threadgroup float ascending[16];
  threadgroup uchar places[16];
  threadgroup float midpoints[16];
  sort_codes(codebook, ascending, places, midpoints, 16, thread_index, threads);
  const uint block = group * simds + simd_index;
  const ulong first = ulong(block) << sizes.block_shift;
  if (first >= ulong(sizes.count)) return;
  const ulong count = min(ulong(sizes.count) - first, ulong(1) << sizes.block_shift);
  const uint found = absmax_of(x + first, count, lane, kMinAbsmax);
  if (lane == 0) absmax[block] = found;
  if (found >= kInfinity) {
    if (lane == 0) atomic_fetch_min_explicit(failed, block, memory_order_relaxed);
    return;
  }
  const Parts reciprocal = reciprocal_of(found);
  for (ulong pair = lane; pair * 2 < count; pair += kLanes) {
    // The other half of an odd tail's byte is the code of 0.
    const ulong even = first + 2 * pair;
    const float high = relative(bits_of(x[even]), reciprocal);
    const float low = 2 * pair + 1 < count ? relative(bits_of(x[even + 1]), reciprocal) : 0.0f;
    const uint high_code = places[rank_of<8>(midpoints, high)];
    const uint low_code = places[rank_of<8>(midpoints, low)];
    packed[even >> 1] = uchar((high_code << 4) | low_code);
  }
}

template <typename T>
kernel void quantize_8bit(device const T* x [[buffer(0)]], device const float* map [[buffer(1)]],
                          device uchar* codes [[buffer(2)]], device uint* absmax [[buffer(3)]],
                          device atomic_uint* failed [[buffer(4)]], constant QuantizeSizes& sizes [[buffer(5)]],
                          uint group [[threadgroup_position_in_grid]],
                          uint thread_index [[thread_index_in_threadgroup]], uint threads [[threads_per_threadgroup]],
                          uint simd_index [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                          uint simds [[simdgroups_per_threadgroup]]) {
  threadgroup float ascending[256];
  threadgroup uchar places[256];
  threadgroup float midpoints[256];
  sort_codes(map, ascending, places, midpoints, 256, thread_index, threads);
  const uint block = group * simds + simd_index;
  const ulong first = ulong(block) << sizes.block_shift;
  if (first >= ulong(sizes.count)) return;
  const ulong count = min(ulong(sizes.count) - first, ulong(1) << sizes.block_shift);
  const uint found = absmax_of(x + first, count, lane, kMinAbsmax);
  if (lane == 0) absmax[block] = found;
  if (found >= kInfinity) {
    if (lane == 0) atomic_fetch_min_explicit(failed, block, memory_order_relaxed);
    return;
  }
  const Parts reciprocal = reciprocal_of(found);
  for (ulong i = lane; i < count; i += kLanes) {
    codes[first + i] = places[rank_of<128>(midpoints, relative(bits_of(x[first + i]), reciprocal))];
  }
}

// A simdgroup takes a row; values are cast to fp16 first, whose largest is 65504.
struct QuantizeRows {
  long rows;
  long cols;
};

template <typename T>
kernel void quantize_int8(device const T* x [[buffer(0)]], device char* q [[buffer(1)]],
                          device float* absmax [[buffer(2)]], device atomic_uint* failed [[buffer(3)]],
                          constant QuantizeRows& sizes [[buffer(4)]], uint group [[threadgroup_position_in_grid]],
                          uint simd_index [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                          uint simds [[simdgroups_per_threadgroup]]) {
  const uint row = group * simds + simd_index;
  if (row >= uint(sizes.rows)) return;
  const ulong first = ulong(row) * ulong(sizes.cols);
  uint found = 0;
  for (ulong i = lane; i < ulong(sizes.cols); i += kLanes) {
    found = max(found, bits_of(half(float(x[first + i]))) & kMagnitude);
  }
  found = simd_max(found);
  if (lane == 0) absmax[row] = as_type<float>(found);
  if (found >= kInfinity) {
    if (lane == 0) atomic_fetch_min_explicit(failed, row, memory_order_relaxed);
    return;
  }
  float factor = 0.0f;
  if (found != 0) {
    // Between 2^-16 and 2^24: mantissa and power of two are ordinary numbers.
    const Parts reciprocal = reciprocal_of(found);
    factor = float(reciprocal.mantissa) * as_type<float>(uint(reciprocal.exponent + 127) << 23);
    factor = factor * 127.0f;
  }
  for (ulong i = lane; i < ulong(sizes.cols); i += kLanes) {
    const float scaled = float(half(float(x[first + i]))) * factor;
    q[first + i] = char(int(clamp(rint(scaled), -127.0f, 127.0f)));
  }
}

#define QUANTIZE(T)                                                                                   \
  template [[host_name("quantize_4bit_" #T)]] [[kernel]] decltype(quantize_4bit<T>) quantize_4bit<T>; \
  template [[host_name("quantize_8bit_" #T)]] [[kernel]] decltype(quantize_8bit<T>) quantize_8bit<T>; \
  template [[host_name("quantize_int8_" #T)]] [[kernel]] decltype(quantize_int8<T>) quantize_int8<T>;

QUANTIZE(float)
QUANTIZE(half)
QUANTIZE(bfloat)
