// Integer dot products for linear_int8.inl in plain C++, for an ISA that brings no instruction of its own: int16 pairs,
// because a product of two int8 needs 16 bits. Included after the ISA's simd_*.h, inside its namespace.

using Code = int16_t;             // how a code lies in memory; a 32-bit step holds two of them
constexpr uint8_t kCodeFlip = 0;  // XORed into the codes of x

struct Sums {
  int32_t lane[kLanes];
};

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
// acc + the products of the codes of x in every lane with the weight's codes in one step.
static inline Sums dot_step(Sums acc, Sums x, uint32_t weight) {
  const int32_t low = static_cast<int16_t>(weight & 0xFFFFU), high = static_cast<int16_t>(weight >> 16);
  for (int i = 0; i < kLanes; ++i) {
    acc.lane[i] += low * static_cast<int16_t>(x.lane[i] & 0xFFFF) + high * (x.lane[i] >> 16);
  }
  return acc;
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
