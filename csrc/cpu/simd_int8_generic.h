// Integer dot products for linear_int8.inl in plain C++, for an ISA that brings no instruction of its own: int16 pairs,
// because a product of two int8 needs 16 bits. Included after the ISA's simd_*.h, inside its namespace.

using Code = int16_t;             // how a code lies in a panel and in the quantized rows of x
constexpr uint8_t kCodeFlip = 0;  // XORed into the codes of x

struct Sums {
  int32_t lane[kLanes];
};

static inline Sums zero_sums() { return Sums{}; }
static inline Sums load_step(const uint32_t* panel) {
  Sums r;
  memcpy(&r, panel, sizeof r);
  return r;
}
// acc + the products of x's two codes with the two codes of every lane.
static inline Sums dot_step(Sums acc, uint32_t x, Sums panel) {
  const int32_t low = static_cast<int16_t>(x & 0xFFFFU), high = static_cast<int16_t>(x >> 16);
  for (int i = 0; i < kLanes; ++i) {
    acc.lane[i] += low * static_cast<int16_t>(panel.lane[i] & 0xFFFF) + high * (panel.lane[i] >> 16);
  }
  return acc;
}
static inline F32 to_f32(Sums sums) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(sums.lane[i]);
  return load(lanes);
}
// 16 packed bytes -> 32 codes in element order, each codes[nibble].
static inline void decode_codes_32(const uint8_t* p, const int8_t* codes, int8_t* out) {
  for (int i = 0; i < 16; ++i) {
    out[2 * i] = codes[p[i] >> 4];
    out[2 * i + 1] = codes[p[i] & 15];
  }
}
static inline void decode_codes_64(const uint8_t* p, const int8_t* codes, int8_t* out) {
  decode_codes_32(p, codes, out);
  decode_codes_32(p + 16, codes, out + 32);
}
