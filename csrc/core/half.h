// fp16 and bf16 as bits, in portable C++: round to nearest even, NaN stays NaN, denormals kept.
#pragma once
#include <cstdint>
#include <cstring>

// Functions that a GPU runs as well.
#if defined(__CUDACC__)
#define NYBBLE_ANYWHERE __host__ __device__
#else
#define NYBBLE_ANYWHERE
#endif

namespace nybble {

NYBBLE_ANYWHERE inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

NYBBLE_ANYWHERE inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

NYBBLE_ANYWHERE inline float bf16_to_float(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

NYBBLE_ANYWHERE inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<uint16_t>((bits >> 16) | 0x0040U);
  return static_cast<uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

NYBBLE_ANYWHERE inline float f16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000U) << 16;
  const uint32_t magnitude = half & 0x7FFFU;
  if (magnitude >= 0x7C00U) return float_of(sign | 0x7F800000U | ((magnitude & 0x3FFU) << 13));
  if (magnitude >= 0x0400U) return float_of(sign | ((magnitude + 0x1C000U) << 13));
  // A denormal is magnitude * 2^-24, which fp32 holds exactly.
  return float_of(sign | bits_of(static_cast<float>(magnitude) * 5.9604644775390625e-8F));
}

NYBBLE_ANYWHERE inline uint16_t float_to_f16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000U;
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) return static_cast<uint16_t>(sign | 0x7E00U | ((magnitude >> 13) & 0x3FFU));
  if (magnitude >= 0x477FF000U) return static_cast<uint16_t>(sign | 0x7C00U);  // 65520 and above round to infinity
  if (magnitude < 0x38800000U) {
    // Below 2^-14: adding 0.5 makes the adder round to a multiple of 2^-24, the spacing of fp16 denormals.
    const float rounded = float_of(magnitude) + 0.5F;
    return static_cast<uint16_t>(sign | (bits_of(rounded) - 0x3F000000U));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000U + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13));
}

// The bits of one element, as types, so that a kernel's template knows what it loads and stores.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

NYBBLE_ANYWHERE inline float to_float(float value) { return value; }
NYBBLE_ANYWHERE inline float to_float(Bf16 value) { return bf16_to_float(value.bits); }
NYBBLE_ANYWHERE inline float to_float(F16 value) { return f16_to_float(value.bits); }
NYBBLE_ANYWHERE inline void from_float(float value, float* out) { *out = value; }
NYBBLE_ANYWHERE inline void from_float(float value, Bf16* out) { out->bits = float_to_bf16(value); }
NYBBLE_ANYWHERE inline void from_float(float value, F16* out) { out->bits = float_to_f16(value); }

}  // namespace nybble
