// Integer dot products for linear_int8.inl with NEON: 2 x 2 tiles of eight codes (NYBBLE_I8MM), quads (NYBBLE_DOT), or
// products in int16 on the baseline. What each one does: simd_int8_generic.h says, name by name.

using Code = int8_t;
constexpr uint8_t kCodeFlip = 0;
using Steps = int8x16_t;

static inline Steps load_steps(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }

#if defined(NYBBLE_I8MM)
// An instruction multiplies two rows of x with two of W, so both lie in pairs: turn_codes() puts eight codes of a row
// beside eight of the next, and a sum is of two rows of x by two of W until split_rows().
constexpr int kStepsOfDot = 2;
constexpr int kRowsOfDot = 2;
constexpr int kDotRows = 8;

using Sums = int32x4_t;
using WeightSteps = int8x16_t;
static inline Sums broadcast_sum(int32_t v) { return vdupq_n_s32(v); }
static inline WeightSteps load_weight(const char* p, int64_t stride) {
  return vcombine_s8(vld1_s8(reinterpret_cast<const int8_t*>(p)), vld1_s8(reinterpret_cast<const int8_t*>(p + stride)));
}
static inline void dot_steps(Sums* sums, const Steps* x, WeightSteps weight) {
  sums[0] = vmmlaq_s32(sums[0], weight, x[0]);
  sums[1] = vmmlaq_s32(sums[1], weight, x[1]);
}
static inline void split_rows(Sums* sums) {
  const int64x2_t a = vreinterpretq_s64_s32(sums[0]), b = vreinterpretq_s64_s32(sums[1]);
  sums[0] = vreinterpretq_s32_s64(vtrn1q_s64(a, b));
  sums[1] = vreinterpretq_s32_s64(vtrn2q_s64(a, b));
}
static inline F32 to_f32(Sums sums) { return vcvtq_f32_s32(sums); }
static inline void turn_codes(const Code* rows, int64_t stride, uint32_t* to) {
  const int64x2_t a = vreinterpretq_s64_s8(load_steps(rows)), b = vreinterpretq_s64_s8(load_steps(rows + stride));
  const int64x2_t c = vreinterpretq_s64_s8(load_steps(rows + 2 * stride));
  const int64x2_t d = vreinterpretq_s64_s8(load_steps(rows + 3 * stride));
  vst1q_u32(to, vreinterpretq_u32_s64(vtrn1q_s64(a, b)));
  vst1q_u32(to + 4, vreinterpretq_u32_s64(vtrn1q_s64(c, d)));
  vst1q_u32(to + 8, vreinterpretq_u32_s64(vtrn2q_s64(a, b)));
  vst1q_u32(to + 12, vreinterpretq_u32_s64(vtrn2q_s64(c, d)));
}
#else
constexpr int kRowsOfDot = 1;

#if defined(NYBBLE_DOT)
constexpr int kStepsOfDot = 4;
constexpr int kDotRows = 8;

using Sums = int32x4_t;
using WeightSteps = int8x16_t;
static inline Sums broadcast_sum(int32_t v) { return vdupq_n_s32(v); }
static inline WeightSteps load_weight(const char* p, int64_t) { return load_steps(p); }
static inline void dot_steps(Sums* sums, const Steps* x, WeightSteps weight) {
  *sums = vdotq_laneq_s32(*sums, x[0], weight, 0);
  *sums = vdotq_laneq_s32(*sums, x[1], weight, 1);
  *sums = vdotq_laneq_s32(*sums, x[2], weight, 2);
  *sums = vdotq_laneq_s32(*sums, x[3], weight, 3);
}
static inline F32 to_f32(Sums sums) { return vcvtq_f32_s32(sums); }
#else
constexpr int kStepsOfDot = 2;
constexpr int kDotRows = 4;

// Two partial sums for each of four rows of x.
struct Sums {
  int32x4_t low, high;
};
struct WeightSteps {
  int8x16_t first, second;  // each one step, four times
};
static inline Sums broadcast_sum(int32_t v) {
  const int32x4_t start = vtrn1q_s32(vdupq_n_s32(v), vdupq_n_s32(0));
  return {start, start};
}
static inline int8x16_t repeat_step(const char* p) {
  int32_t step;
  memcpy(&step, p, sizeof step);
  return vreinterpretq_s8_s32(vdupq_n_s32(step));
}
static inline WeightSteps load_weight(const char* p, int64_t) { return {repeat_step(p), repeat_step(p + 4)}; }
// Two products fit int16: x is at most 127 in magnitude, the weight 128.
static inline void dot_steps(Sums* sums, const Steps* x, WeightSteps weight) {
  const int16x8_t low = vmull_s8(vget_low_s8(x[0]), vget_low_s8(weight.first));
  const int16x8_t high = vmull_high_s8(x[0], weight.first);
  sums->low = vpadalq_s16(sums->low, vmlal_s8(low, vget_low_s8(x[1]), vget_low_s8(weight.second)));
  sums->high = vpadalq_s16(sums->high, vmlal_high_s8(high, x[1], weight.second));
}
static inline F32 to_f32(Sums sums) { return vcvtq_f32_s32(vpaddq_s32(sums.low, sums.high)); }
#endif

static inline void split_rows(Sums*) {}
static inline void turn_codes(const Code* rows, int64_t stride, uint32_t* to) {
  transpose(reinterpret_cast<const uint32_t*>(rows), stride / 4, to, kLanes);
}
#endif

static inline int32_t flip_sum(const Code*, int64_t) { return 0; }
static inline void decode_with(const uint8_t* p, int8x16_t table, int8_t* out) {
  uint8x16_t first, second;
  split_nibbles(p, &first, &second);
  vst1q_s8(out, vqtbl1q_s8(table, first));
  vst1q_s8(out + 16, vqtbl1q_s8(table, second));
}
static inline void decode_codes_32(const uint8_t* p, const int8_t* codes, int8_t* out) {
  decode_with(p, vld1q_s8(codes), out);
}
static inline int16x8_t round_eight(const float* p, float factor) {
  const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(p), factor));
  const int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(p + 4), factor));
  return vcombine_s16(vmovn_s32(low), vmovn_s32(high));
}
static inline void decode_codes_64(const uint8_t* p, const float* codebook, float factor, int8_t* out) {
  const int8x8_t low = vmovn_s16(round_eight(codebook, factor)), high = vmovn_s16(round_eight(codebook + 8, factor));
  const int8x16_t table = vcombine_s8(low, high);
  decode_with(p, table, out);
  decode_with(p + 16, table, out + 32);
}
