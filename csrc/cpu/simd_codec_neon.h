// What the codecs alone need of NEON. Included by simd_neon.h; what each one does: simd_codec_avx512.h says.

// No store past the caches: cores notice whole lines that are overwritten and do not read them first.
static inline void stream_line(void* to, const void* from) { memcpy(to, from, 64); }
static inline void finish_streams() {}
static inline F32 divide_by_127(F32 v) {
  const F32 reciprocal = vdupq_n_f32(1.0F / 127.0F);
  const F32 quotient = vmulq_f32(v, reciprocal);
  const F32 rest = vfmsq_f32(v, quotient, vdupq_n_f32(127.0F));
  return vfmaq_f32(quotient, rest, reciprocal);
}
static inline F32 through_f16(F32 v) { return vcvt_f32_f16(vcvt_f16_f32(v)); }

// A level of the search never asks for more than 8 thresholds: a lookup in one or two registers each.
struct Thresholds {
  float32x4_t middle, lower, upper;
  uint8x16_t eighths;
  uint8x16x2_t sixteenths;
};
static inline Thresholds load_thresholds(const float* t) {
  const float32x4x2_t first = vld2q_f32(t), second = vld2q_f32(t + 8);
  const float eighths[4] = {t[1], t[5], t[9], t[13]};
  return {vdupq_n_f32(t[7]),
          vdupq_n_f32(t[3]),
          vdupq_n_f32(t[11]),
          vreinterpretq_u8_f32(vld1q_f32(eighths)),
          {{vreinterpretq_u8_f32(first.val[0]), vreinterpretq_u8_f32(second.val[0])}}};
}
// 2 rank + (s > threshold).
static inline I32 descend(I32 rank, F32 s, F32 threshold) {
  return vsubq_u32(vaddq_u32(rank, rank), vcgtq_f32(s, threshold));
}
static inline I32 rank_of(F32 s, const Thresholds& t) {
  const uint32x4_t above = vcgtq_f32(s, t.middle);
  I32 rank = descend(vshrq_n_u32(above, 31), s, vbslq_f32(above, t.upper, t.lower));
  rank = descend(rank, s, vreinterpretq_f32_u8(vqtbl1q_u8(t.eighths, bytes_of_entry(rank))));
  return descend(rank, s, vreinterpretq_f32_u8(vqtbl2q_u8(t.sixteenths, bytes_of_entry(rank))));
}

// 2 x 16 ranks in bytes -> 16 packed bytes.
static inline void pack_rank_bytes(uint8x16_t first, uint8x16_t second, const uint8_t* map, uint8_t* packed) {
  const uint8x16_t table = vld1q_u8(map);
  const uint8x16_t a = vqtbl1q_u8(table, first), b = vqtbl1q_u8(table, second);
  vst1q_u8(packed, vsliq_n_u8(vuzp2q_u8(a, b), vuzp1q_u8(a, b), 4));
}
static inline uint8x16_t narrow_four(const I32* v) {
  const uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_u32(v[0]), vreinterpretq_u16_u32(v[1]));
  const uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_u32(v[2]), vreinterpretq_u16_u32(v[3]));
  return vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
}
static inline void pack_ranks(const I32* ranks, const uint8_t* map, uint8_t* packed) {
  pack_rank_bytes(narrow_four(ranks), narrow_four(ranks + 4), map, packed);
}

#include "cpu/simd_buckets_plain.h"

struct Words {
  uint16x8_t lanes;
};
static inline Words zero_words() { return {vdupq_n_u16(0)}; }
static inline uint16x8_t magnitudes(const uint16_t* x) { return vandq_u16(vld1q_u16(x), vdupq_n_u16(0x7FFF)); }
static inline Words max_words(Words so_far, const uint16_t* x) {
  const uint16x8_t first = vmaxq_u16(magnitudes(x), magnitudes(x + 8));
  const uint16x8_t second = vmaxq_u16(magnitudes(x + 16), magnitudes(x + 24));
  return {vmaxq_u16(so_far.lanes, vmaxq_u16(first, second))};
}
static inline uint32_t reduce_max(Words v) { return vmaxvq_u16(v.lanes); }

// -magnitude where `negative`.
static inline int32x4_t with_sign(uint32x4_t magnitude, uint32x4_t negative) {
  const int32x4_t plain = vreinterpretq_s32_u32(magnitude);
  return vbslq_s32(negative, vnegq_s32(plain), plain);
}
static inline I32 floor_key(F32 v, const Bf16*) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t negative = vcltzq_s32(vreinterpretq_s32_u32(bits));
  return vreinterpretq_u32_s32(vshrq_n_s32(with_sign(vandq_u32(bits, vdupq_n_u32(0x7FFFFFFF)), negative), 16));
}
// To nearest, and one key down where that is above v.
static inline I32 floor_key(F32 v, const F16*) {
  const float16x4_t nearest = vcvt_f16_f32(v);
  const int32x4_t bits = vmovl_s16(vreinterpret_s16_f16(nearest));
  const uint32x4_t magnitude = vandq_u32(vreinterpretq_u32_s32(bits), vdupq_n_u32(0x7FFF));
  const uint32x4_t key = vreinterpretq_u32_s32(with_sign(magnitude, vcltzq_s32(bits)));
  return vaddq_u32(key, vcgtq_f32(vcvt_f32_f16(nearest), v));
}
static inline F32 key_value(I32 key, const Bf16*) {
  const uint32x4_t magnitude = vreinterpretq_u32_s32(vabsq_s32(vreinterpretq_s32_u32(key)));
  const uint32x4_t sign = vandq_u32(key, vdupq_n_u32(0x80000000));
  return vreinterpretq_f32_u32(vorrq_u32(vshlq_n_u32(magnitude, 16), sign));
}
static inline F32 key_value(I32 key, const F16*) {
  const uint32x4_t magnitude = vreinterpretq_u32_s32(vabsq_s32(vreinterpretq_s32_u32(key)));
  const uint32x4_t sign = vandq_u32(vshrq_n_u32(key, 16), vdupq_n_u32(0x8000));
  return vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32(vorrq_u32(magnitude, sign))));
}
static inline void store_keys(int16_t* p, I32 key) {
  const int32x4_t signed_key = vreinterpretq_s32_u32(key);
  vst1_s16(p, vmovn_s32(vaddq_s32(signed_key, vshrq_n_s32(signed_key, 31))));
}

struct KeyThresholds {
  int16x8_t middle, lower, upper;
  uint8x16_t eighths, sixteenths;
};
static inline KeyThresholds load_key_thresholds(const int16_t* t) {
  const int16_t eighths[8] = {t[1], t[5], t[9], t[13], 0, 0, 0, 0};
  const int16x8_t sixteenths = vuzp1q_s16(vld1q_s16(t), vld1q_s16(t + 8));
  return {vdupq_n_s16(t[7]), vdupq_n_s16(t[3]), vdupq_n_s16(t[11]), vreinterpretq_u8_s16(vld1q_s16(eighths)),
          vreinterpretq_u8_s16(sixteenths)};
}
static inline uint16x8_t descend(uint16x8_t rank, int16x8_t key, int16x8_t threshold) {
  return vsubq_u16(vaddq_u16(rank, rank), vcgtq_s16(key, threshold));
}
static inline int16x8_t key_entries(uint8x16_t table, uint16x8_t index) {
  const uint16x8_t at = vmlaq_u16(vdupq_n_u16(0x0100), index, vdupq_n_u16(0x0202));
  return vreinterpretq_s16_u8(vqtbl1q_u8(table, vreinterpretq_u8_u16(at)));
}
static inline uint8x16_t rank_of_keys(const uint16_t* x, const KeyThresholds& t) {
  const int16x8_t bits = vreinterpretq_s16_u16(vld1q_u16(x));
  const int16x8_t key = veorq_s16(bits, vandq_s16(vshrq_n_s16(bits, 15), vdupq_n_s16(0x7FFF)));
  const uint16x8_t above = vcgtq_s16(key, t.middle);
  uint16x8_t rank = descend(vshrq_n_u16(above, 15), key, vbslq_s16(above, t.upper, t.lower));
  rank = descend(rank, key, key_entries(t.eighths, rank));
  return vreinterpretq_u8_u16(descend(rank, key, key_entries(t.sixteenths, rank)));
}
static inline void pack_keys(const uint16_t* x, const KeyThresholds& t, const uint8_t* map, uint8_t* packed) {
  const uint8x16_t first = vuzp1q_u8(rank_of_keys(x, t), rank_of_keys(x + 8, t));
  const uint8x16_t second = vuzp1q_u8(rank_of_keys(x + 16, t), rank_of_keys(x + 24, t));
  pack_rank_bytes(first, second, map, packed);
}
