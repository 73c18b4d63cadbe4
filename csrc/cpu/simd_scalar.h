// The same primitives in plain C++: what runs on a machine that no other file serves, and the kernels' own reference.
// What each one does: simd_avx512.h says, name by name.

constexpr int kLanes = 8;
constexpr int kTileRows = 4;
constexpr int kTileVectors = 1;
constexpr int kSmallRows = 1;
constexpr int kSmallSums = 1;
constexpr bool kRowAfterRow = false;

struct F32 {
  float lane[kLanes];
};
struct I32 {
  uint32_t lane[kLanes];
};

#define NYBBLE_LANES(expression)     \
  for (int i = 0; i < kLanes; ++i) { \
    expression;                      \
  }

static inline F32 broadcast(float v) {
  F32 r;
  NYBBLE_LANES(r.lane[i] = v) return r;
}
static inline F32 zero() { return broadcast(0.0F); }
static inline F32 load(const float* p) {
  F32 r;
  NYBBLE_LANES(r.lane[i] = p[i]) return r;
}
static inline void store(float* p, F32 v) { NYBBLE_LANES(p[i] = v.lane[i]) }
static inline F32 add(F32 a, F32 b) { NYBBLE_LANES(a.lane[i] += b.lane[i]) return a; }
static inline F32 sub(F32 a, F32 b) { NYBBLE_LANES(a.lane[i] -= b.lane[i]) return a; }
static inline F32 mul(F32 a, F32 b) { NYBBLE_LANES(a.lane[i] *= b.lane[i]) return a; }
static inline F32 div(F32 a, F32 b) { NYBBLE_LANES(a.lane[i] /= b.lane[i]) return a; }
static inline F32 root(F32 v) { NYBBLE_LANES(v.lane[i] = sqrtf(v.lane[i])) return v; }
static inline F32 fma(F32 a, F32 b, F32 c) { NYBBLE_LANES(c.lane[i] += a.lane[i] * b.lane[i]) return c; }
static inline F32 clamp_unit(F32 v) {
  NYBBLE_LANES(v.lane[i] = v.lane[i] > 1.0F ? 1.0F : v.lane[i] < -1.0F ? -1.0F : v.lane[i])
  return v;
}
static inline F32 within(F32 v, float low, float high) {
  NYBBLE_LANES(v.lane[i] = v.lane[i] > high ? high : v.lane[i] < low ? low : v.lane[i])
  return v;
}
// The larger one, b where either is NaN.
static inline F32 maximum(F32 a, F32 b) {
  NYBBLE_LANES(a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i])
  return a;
}
// The largest lane; none is NaN.
static inline float largest(F32 v) {
  float most = v.lane[0];
  NYBBLE_LANES(most = v.lane[i] > most ? v.lane[i] : most)
  return most;
}
// By 2^(n - 1), which is finite for every n, and by 2. An integer added to 1.5 * 2^23 is in the low bits of the sum,
// which says something of a NaN too, where a conversion is undefined.
static inline F32 times_power_of_two(F32 v, F32 n) {
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t exponent = bits_of(n.lane[i] + 12582912.0F) - bits_of(12582912.0F) + 126U;
    v.lane[i] *= float_of(exponent < 255U ? exponent << 23 : 0U);  // a negative one has wrapped round
    v.lane[i] += v.lane[i];
  }
  return v;
}
static inline float sum(F32 v) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v.lane[i] += v.lane[i + width];
  }
  return v.lane[0];
}
static NYBBLE_INLINE void prefetch(const void*) {}
static NYBBLE_INLINE void prefetch_near(const void*) {}

static inline F32 load(const Bf16* p) {
  F32 r;
  NYBBLE_LANES(r.lane[i] = bf16_to_float(p[i].bits)) return r;
}
static inline F32 load(const F16* p) {
  F32 r;
  NYBBLE_LANES(r.lane[i] = f16_to_float(p[i].bits)) return r;
}
static inline F32 load(const int8_t* p) {
  F32 r;
  NYBBLE_LANES(r.lane[i] = static_cast<float>(p[i])) return r;
}
static inline void store(Bf16* p, F32 v) { NYBBLE_LANES(p[i].bits = float_to_bf16(v.lane[i])) }
static inline void store(F16* p, F32 v) { NYBBLE_LANES(p[i].bits = float_to_f16(v.lane[i])) }
// Adding and taking away 1.5 * 2^23 rounds to nearest even.
static inline void store(int8_t* p, F32 v) {
  NYBBLE_LANES(p[i] = static_cast<int8_t>((v.lane[i] + 12582912.0F) - 12582912.0F))
}

static inline I32 zero_index() {
  I32 r;
  NYBBLE_LANES(r.lane[i] = 0) return r;
}
static inline I32 max_magnitude(I32 so_far, F32 v) {
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t magnitude = bits_of(v.lane[i]) & 0x7FFFFFFFU;
    so_far.lane[i] = magnitude > so_far.lane[i] ? magnitude : so_far.lane[i];
  }
  return so_far;
}
static inline uint32_t reduce_max(I32 v) {
  uint32_t r = 0;
  NYBBLE_LANES(r = v.lane[i] > r ? v.lane[i] : r)
  return r;
}

struct Table {
  float entry[16];
};
static inline Table load_table(const float* codes) {
  Table table;
  for (int i = 0; i < 16; ++i) table.entry[i] = codes[i];
  return table;
}
static inline Table scale(Table table, float by) {
  for (float& entry : table.entry) entry *= by;
  return table;
}
static inline F32 lookup(const Table& table, I32 index) {
  F32 r;
  NYBBLE_LANES(r.lane[i] = table.entry[index.lane[i] & 15U])
  return r;
}
static inline I32 offset(I32 index, int by) { NYBBLE_LANES(index.lane[i] += static_cast<uint32_t>(by)) return index; }
static inline I32 times_16(I32 index) { NYBBLE_LANES(index.lane[i] *= 16) return index; }
static inline I32 advance_where_greater(I32 index, F32 a, F32 b, int by) {
  NYBBLE_LANES(index.lane[i] += a.lane[i] > b.lane[i] ? static_cast<uint32_t>(by) : 0U)
  return index;
}
static inline I32 load_bytes(const uint8_t* p) {
  I32 r;
  NYBBLE_LANES(r.lane[i] = p[i]) return r;
}
static inline I32 load_words(const uint8_t* p) {
  I32 r;
  NYBBLE_LANES(r.lane[i] = p[4 * i] | static_cast<uint32_t>(p[4 * i + 1]) << 8 |
                           static_cast<uint32_t>(p[4 * i + 2]) << 16 | static_cast<uint32_t>(p[4 * i + 3]) << 24)
  return r;
}
template <int Bits>
static inline I32 shift_right(I32 v) {
  NYBBLE_LANES(v.lane[i] >>= Bits) return v;
}
static inline void store_bytes(uint8_t* p, I32 v) { NYBBLE_LANES(p[i] = static_cast<uint8_t>(v.lane[i])) }
static inline F32 gather(const float* table, I32 index) {
  F32 r;
  NYBBLE_LANES(r.lane[i] = table[index.lane[i]]) return r;
}
static inline F32 spread(const float* p, I32 index) { return gather(p, index); }
static inline void load_nibbles(const uint8_t* p, I32* even, I32* odd) {
  NYBBLE_LANES(even->lane[i] = p[i] >> 4; odd->lane[i] = p[i] & 15U)
}
template <class T>
struct CodesOf {
  T entry[16];
};
static inline CodesOf<Bf16> load_table(const Bf16* codes) {
  CodesOf<Bf16> table;
  for (int i = 0; i < 16; ++i) table.entry[i] = codes[i];
  return table;
}
static inline CodesOf<F16> load_table(const F16* codes) {
  CodesOf<F16> table;
  for (int i = 0; i < 16; ++i) table.entry[i] = codes[i];
  return table;
}
template <class AnyTable, class T>
static inline void decode(const uint8_t* p, const AnyTable& table, T* out) {
  for (int i = 0; i < 16; ++i) {
    out[2 * i] = table.entry[p[i] >> 4];
    out[2 * i + 1] = table.entry[p[i] & 15];
  }
}
static inline void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  for (int row = 0; row < kLanes; ++row) {
    for (int column = 0; column < kLanes; ++column) to[column * to_stride + row] = from[row * from_stride + column];
  }
}

#include "cpu/simd_codec_scalar.h"

#undef NYBBLE_LANES
