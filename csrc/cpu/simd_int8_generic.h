// Integer dot products for linear_int8.inl in plain C++, for an ISA that brings no instruction of its own: int16 pairs,
// because a product of two int8 needs 16 bits. Included after the ISA's simd_*.h, inside its namespace.

using Code = int16_t;             // how a code lies in memory; a 32-bit step holds two of them
constexpr uint8_t kCodeFlip = 0;  // XORed into the codes of x
constexpr int kStepsOfDot = 1;    // a divisor of kLanes
constexpr int kRowsOfDot = 1;     // rows of W that are multiplied together
constexpr int kDotRows = 4;       // rows of W at a time: times kXVectors, the sums in registers

struct Sums {  // of kLanes rows of x
  int32_t lane[kLanes];
};
using Steps = Sums;            // a step of kLanes rows of x
using WeightSteps = uint32_t;  // kStepsOfDot steps of kRowsOfDot rows of W

static inline Sums broadcast_sum(int32_t v) {
  Sums r;
  for (int i = 0; i < kLanes; ++i) r.lane[i] = v;
  return r;
}
static inline Sums load_steps(const void* p) {
  Sums r;
  memcpy(&r, p, sizeof r);
  return r;
}
static inline WeightSteps load_weight(const char* p, int64_t /* bytes from a row to the next */) {
  WeightSteps weight;
  memcpy(&weight, p, sizeof weight);
  return weight;
}
// sums[kRowsOfDot] += the products of x[kStepsOfDot] with the weight's codes.
static inline void dot_steps(Sums* sums, const Steps* x, WeightSteps weight) {
  const int32_t low = static_cast<int16_t>(weight & 0xFFFFU), high = static_cast<int16_t>(weight >> 16);
  for (int i = 0; i < kLanes; ++i) {
    sums->lane[i] += low * static_cast<int16_t>(x->lane[i] & 0xFFFF) + high * (x->lane[i] >> 16);
  }
}
// Makes sums[i], however they were kept, those of row i of W.
static inline void split_rows(Sums*) {}
// kLanes steps of kLanes rows, `stride` codes apart, as load_steps() wants them.
static inline void turn_codes(const Code* rows, int64_t stride, uint32_t* to) {
  transpose(reinterpret_cast<const uint32_t*>(rows), stride / 2, to, kLanes);
}
static inline F32 to_f32(Sums sums) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(sums.lane[i]);
  return load(lanes);
}
// What kCodeFlip adds to the sum over these codes; a multiple of kLanes steps.
static inline int32_t flip_sum(const Code*, int64_t) { return 0; }
// 16 packed bytes -> 32 codes in element order, each codes[nibble].
static inline void decode_codes_32(const uint8_t* p, const int8_t* codes, int8_t* out) {
  for (int i = 0; i < 16; ++i) {
    out[2 * i] = codes[p[i] >> 4];
    out[2 * i + 1] = codes[p[i] & 15];
  }
}
// 32 packed bytes -> 64 codes; the codes are codebook[nibble] * factor, rounded to nearest even.
static inline void decode_codes_64(const uint8_t* p, const float* codebook, float factor, int8_t* out) {
  int8_t codes[16];
  for (int i = 0; i < 16; i += kLanes) store(codes + i, mul(load(codebook + i), broadcast(factor)));
  decode_codes_32(p, codes, out);
  decode_codes_32(p + 16, codes, out + 32);
}
