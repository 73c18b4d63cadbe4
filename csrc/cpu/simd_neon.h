// NEON (Advanced SIMD of AArch64) primitives; with NYBBLE_BF16_DOT also BFDOT. Included inside a namespace: no include
// lines here, and nothing from the C++ standard library. What each one does: simd_avx512.h says, name by name.

constexpr int kLanes = 4;
constexpr int kTileRows = 5;  // 5 x 4 accumulators + 4 operands + 5 of x of the 32 registers; with 6 GCC spills two
constexpr int kTileVectors = 4;
#if defined(__clang__)
constexpr int kSmallRows = 1;  // with two Clang 22 spills 17 operands: 59 instructions for 32 weights, not 54
#else
constexpr int kSmallRows = 2;
#endif
constexpr int kSmallSums = 8;
constexpr bool kRowAfterRow = false;

using F32 = float32x4_t;
using I32 = uint32x4_t;

static inline F32 zero() { return vdupq_n_f32(0.0F); }
static inline F32 broadcast(float v) { return vdupq_n_f32(v); }
static inline F32 load(const float* p) { return vld1q_f32(p); }
static inline void store(float* p, F32 v) { vst1q_f32(p, v); }
static inline F32 add(F32 a, F32 b) { return vaddq_f32(a, b); }
static inline F32 sub(F32 a, F32 b) { return vsubq_f32(a, b); }
static inline F32 mul(F32 a, F32 b) { return vmulq_f32(a, b); }
static inline F32 div(F32 a, F32 b) { return vdivq_f32(a, b); }
static inline F32 root(F32 v) { return vsqrtq_f32(v); }
static inline F32 fma(F32 a, F32 b, F32 c) { return vfmaq_f32(c, a, b); }
static inline F32 clamp_unit(F32 v) { return vmaxq_f32(vminq_f32(v, vdupq_n_f32(1.0F)), vdupq_n_f32(-1.0F)); }
static inline F32 within(F32 v, float low, float high) {
  return vmaxq_f32(vdupq_n_f32(low), vminq_f32(vdupq_n_f32(high), v));
}
// The larger one, b where either is NaN.
static inline F32 maximum(F32 a, F32 b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
// The largest lane; none is NaN.
static inline float largest(F32 v) { return vmaxvq_f32(v); }
// By 2^(n - 1), which is finite for every n, and by 2.
static inline F32 times_power_of_two(F32 v, F32 n) {
  const int32x4_t exponent = vmaxq_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(126)), vdupq_n_s32(0));
  const F32 half = vmulq_f32(v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  return vaddq_f32(half, half);
}
static inline float sum(F32 v) { return vaddvq_f32(v); }
static NYBBLE_INLINE void prefetch(const void* p) {
#if defined(_MSC_VER) && !defined(__clang__)
  __prefetch(p);
#else
  __builtin_prefetch(p, 0, 2);
#endif
}
// Into the first-level cache.
static NYBBLE_INLINE void prefetch_near(const void* p) {
#if defined(_MSC_VER) && !defined(__clang__)
  __prefetch(p);
#else
  __builtin_prefetch(p, 0, 3);
#endif
}

// Four bytes, wherever they lie.
static inline uint8x8_t four_bytes(const void* p) {
  uint32_t bytes;
  memcpy(&bytes, p, sizeof bytes);
  return vreinterpret_u8_u32(vdup_n_u32(bytes));
}
static inline void store_low_bytes(void* p, uint8x8_t v) {
  const uint32_t bytes = vget_lane_u32(vreinterpret_u32_u8(v), 0);
  memcpy(p, &bytes, sizeof bytes);
}
static inline F32 load(const Bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16)); }
static inline F32 load(const F16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
static inline F32 load(const int8_t* p) {
  const int16x8_t words = vmovl_s8(vreinterpret_s8_u8(four_bytes(p)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)));
}
// In integers: the BF16 instructions are an extension.
static inline void store(Bf16* p, F32 v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x00400000));
  vst1_u16(&p->bits, vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16));
}
static inline void store(F16* p, F32 v) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
static inline void store(int8_t* p, F32 v) {
  const int16x4_t words = vmovn_s32(vcvtnq_s32_f32(v));
  store_low_bytes(p, vreinterpret_u8_s8(vmovn_s16(vcombine_s16(words, words))));
}

static inline I32 zero_index() { return vdupq_n_u32(0); }
static inline I32 max_magnitude(I32 so_far, F32 v) {
  return vmaxq_u32(so_far, vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0x7FFFFFFF)));
}
static inline uint32_t reduce_max(I32 v) { return vmaxvq_u32(v); }

// The 64 bytes of the table in four registers, which one instruction looks up (entry i lies at 4 i + {0, 1, 2, 3}), and
// by planes (byte k of every entry), for 16 lookups at a time. What is not used costs nothing.
struct Table {
  uint8x16x4_t bytes;
  uint8x16_t plane[4];
};
static inline Table table_of(uint8x16_t a, uint8x16_t b, uint8x16_t c, uint8x16_t d) {
  const uint8x16_t even_a = vuzp1q_u8(a, b), even_b = vuzp1q_u8(c, d);
  const uint8x16_t odd_a = vuzp2q_u8(a, b), odd_b = vuzp2q_u8(c, d);
  return {{{a, b, c, d}},
          {vuzp1q_u8(even_a, even_b), vuzp1q_u8(odd_a, odd_b), vuzp2q_u8(even_a, even_b), vuzp2q_u8(odd_a, odd_b)}};
}
static inline Table load_table(const float* codes) {
  return table_of(vreinterpretq_u8_f32(vld1q_f32(codes)), vreinterpretq_u8_f32(vld1q_f32(codes + 4)),
                  vreinterpretq_u8_f32(vld1q_f32(codes + 8)), vreinterpretq_u8_f32(vld1q_f32(codes + 12)));
}
static inline uint8x16_t scale_part(uint8x16_t part, float by) {
  return vreinterpretq_u8_f32(vmulq_n_f32(vreinterpretq_f32_u8(part), by));
}
static inline Table scale(const Table& table, float by) {
  return table_of(scale_part(table.bytes.val[0], by), scale_part(table.bytes.val[1], by),
                  scale_part(table.bytes.val[2], by), scale_part(table.bytes.val[3], by));
}
// Where the four bytes of each entry lie.
static inline uint8x16_t bytes_of_entry(I32 index) {
  return vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100), index, vdupq_n_u32(0x04040404)));
}
static inline F32 lookup(const Table& table, I32 index) {
  return vreinterpretq_f32_u8(vqtbl4q_u8(table.bytes, bytes_of_entry(vandq_u32(index, vdupq_n_u32(15)))));
}
static inline F32 spread(const float* p, I32 index) {
  return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(vld1q_f32(p)), bytes_of_entry(index)));
}
static inline I32 offset(I32 index, int by) { return vaddq_u32(index, vdupq_n_u32(static_cast<uint32_t>(by))); }
static inline I32 times_16(I32 index) { return vshlq_n_u32(index, 4); }
static inline I32 advance_where_greater(I32 index, F32 a, F32 b, int by) {
  return vaddq_u32(index, vandq_u32(vcgtq_f32(a, b), vdupq_n_u32(static_cast<uint32_t>(by))));
}
static inline I32 load_bytes(const uint8_t* p) { return vmovl_u16(vget_low_u16(vmovl_u8(four_bytes(p)))); }
static inline I32 load_words(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
static inline F32 gather(const float* table, I32 index) {
  const float lanes[4] = {table[vgetq_lane_u32(index, 0)], table[vgetq_lane_u32(index, 1)],
                          table[vgetq_lane_u32(index, 2)], table[vgetq_lane_u32(index, 3)]};
  return vld1q_f32(lanes);
}
static inline void store_bytes(uint8_t* p, I32 v) {
  const uint16x4_t words = vmovn_u32(v);
  store_low_bytes(p, vmovn_u16(vcombine_u16(words, words)));
}
static inline void load_nibbles(const uint8_t* p, I32* even, I32* odd) {
  const uint32x4_t bytes = load_bytes(p);
  *even = vshrq_n_u32(bytes, 4);
  *odd = bytes;
}

// 16 packed bytes -> 32 indices in element order.
static inline void split_nibbles(const uint8_t* p, uint8x16_t* first, uint8x16_t* second) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint8x16_t even = vshrq_n_u8(bytes, 4);
  const uint8x16_t odd = vandq_u8(bytes, vdupq_n_u8(15));
  *first = vzip1q_u8(even, odd);
  *second = vzip2q_u8(even, odd);
}
#include "cpu/simd_codec_neon.h"

// 16 entries of a 16-bit plane each, bytes in front and behind.
static inline void store_words(uint8_t* p, uint8x16_t low, uint8x16_t high) {
  vst1q_u8(p, vzip1q_u8(low, high));
  vst1q_u8(p + 16, vzip2q_u8(low, high));
}
// Floats 4 * Four to 4 * Four + 3 of the 16 that `index` asks for. Four lookups and eight interleavings make all 16,
// where 16 lanes of lookup() would take 20 operations, four of them of the slow kind that reads four registers.
template <int Four>
static inline F32 four_of(const Table& table, uint8x16_t index) {
  const uint8x16_t b0 = vqtbl1q_u8(table.plane[0], index), b1 = vqtbl1q_u8(table.plane[1], index);
  const uint8x16_t b2 = vqtbl1q_u8(table.plane[2], index), b3 = vqtbl1q_u8(table.plane[3], index);
  const uint16x8_t low = vreinterpretq_u16_u8(Four < 2 ? vzip1q_u8(b0, b1) : vzip2q_u8(b0, b1));
  const uint16x8_t high = vreinterpretq_u16_u8(Four < 2 ? vzip1q_u8(b2, b3) : vzip2q_u8(b2, b3));
  return vreinterpretq_f32_u16(Four % 2 == 0 ? vzip1q_u16(low, high) : vzip2q_u16(low, high));
}
static inline void decode(const uint8_t* p, const Table& table, float* out) {
  uint8x16_t index[2];
  split_nibbles(p, &index[0], &index[1]);
  for (int i = 0; i < 2; ++i, out += 16) {
    vst1q_f32(out, four_of<0>(table, index[i]));
    vst1q_f32(out + 4, four_of<1>(table, index[i]));
    vst1q_f32(out + 8, four_of<2>(table, index[i]));
    vst1q_f32(out + 12, four_of<3>(table, index[i]));
  }
}
// The shift waits for its lookup: the four words' nibbles at 8 * Four, or 4 above, are four bytes of one vector of
// indices, so what the eight lookups of a register of words have in common is computed once.
template <int Bits>
struct Shifted {
  I32 words;
};
template <int Bits>
static inline Shifted<Bits> shift_right(I32 words) {
  return {words};
}
template <int Bits>
static inline F32 lookup(const Table& table, Shifted<Bits> index) {
  const uint8x16_t order = vreinterpretq_u8_u32(uint32x4_t{0x0C080400U, 0x0D090501U, 0x0E0A0602U, 0x0F0B0703U});
  const uint8x16_t bytes = vqtbl1q_u8(vreinterpretq_u8_u32(index.words), order);
  const uint8x16_t nibbles = Bits % 8 == 0 ? vandq_u8(bytes, vdupq_n_u8(15)) : vshrq_n_u8(bytes, 4);
  return four_of<Bits / 8>(table, nibbles);
}
struct Table16 {
  uint8x16_t low, high;  // the low and the high bytes of the 16 codes
};
static inline Table16 load_table(const Bf16* codes) {
  const uint8x16_t a = vreinterpretq_u8_u16(vld1q_u16(&codes->bits));
  const uint8x16_t b = vreinterpretq_u8_u16(vld1q_u16(&codes[8].bits));
  return {vuzp1q_u8(a, b), vuzp2q_u8(a, b)};
}
static inline Table16 load_table(const F16* codes) { return load_table(reinterpret_cast<const Bf16*>(codes)); }
static inline void decode(const uint8_t* p, Table16 table, Bf16* out) {
  uint8x16_t index[2];
  split_nibbles(p, &index[0], &index[1]);
  for (int i = 0; i < 2; ++i) {
    store_words(reinterpret_cast<uint8_t*>(out + 16 * i), vqtbl1q_u8(table.low, index[i]),
                vqtbl1q_u8(table.high, index[i]));
  }
}
static inline void decode(const uint8_t* p, Table16 table, F16* out) { decode(p, table, reinterpret_cast<Bf16*>(out)); }

static inline void transpose(const uint32_t* from, int64_t from_stride, uint32_t* to, int64_t to_stride) {
  const uint32x4_t a = vld1q_u32(from), b = vld1q_u32(from + from_stride);
  const uint32x4_t c = vld1q_u32(from + 2 * from_stride), d = vld1q_u32(from + 3 * from_stride);
  const uint64x2_t ab_even = vreinterpretq_u64_u32(vtrn1q_u32(a, b)), ab_odd = vreinterpretq_u64_u32(vtrn2q_u32(a, b));
  const uint64x2_t cd_even = vreinterpretq_u64_u32(vtrn1q_u32(c, d)), cd_odd = vreinterpretq_u64_u32(vtrn2q_u32(c, d));
  vst1q_u32(to, vreinterpretq_u32_u64(vtrn1q_u64(ab_even, cd_even)));
  vst1q_u32(to + to_stride, vreinterpretq_u32_u64(vtrn1q_u64(ab_odd, cd_odd)));
  vst1q_u32(to + 2 * to_stride, vreinterpretq_u32_u64(vtrn2q_u64(ab_even, cd_even)));
  vst1q_u32(to + 3 * to_stride, vreinterpretq_u32_u64(vtrn2q_u64(ab_odd, cd_odd)));
}

#ifdef NYBBLE_BF16_DOT
// Not what x86's instruction rounds: both products are added first, then that sum to acc, each addition rounded to odd
// (off by up to 2^-23 of its result, twice as far as to nearest) and never to infinity; denormals count as zero, in and
// out. A term passes through one addition of its pair and one for each pair that follows.
static inline F32 dot_pairs(F32 acc, uint32_t pair, F32 pairs) {
  return vbfdotq_lane_f32(acc, vreinterpretq_bf16_f32(pairs), vreinterpret_bf16_u64(vcreate_u64(pair)), 0);
}
static inline void interleave(const Bf16* first, const Bf16* second, uint32_t* pairs) {
  const uint16x4_t a = vld1_u16(&first->bits), b = vld1_u16(&second->bits);
  vst1q_u32(pairs, vreinterpretq_u32_u16(vcombine_u16(vzip1_u16(a, b), vzip2_u16(a, b))));
}
#endif
