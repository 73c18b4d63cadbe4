#include "numbers.h"

#include <cmath>
#include <limits>

namespace nybble::test {

namespace {

struct Form {
  const char* name;
  int digits;        // of the significand, the leading one included
  int min_exponent;  // of normal numbers
  double largest;
};

const Form& form(DType dtype) {
  static const Form kForms[] = {
      {"f32", 24, -126, 0x1.fffffep127}, {"f16", 11, -14, 65504.0}, {"bf16", 8, -126, 0x1.fep127}};
  return kForms[static_cast<int>(dtype)];
}

// The bits of a number that `dtype` holds.
uint32_t bits_of_exact(double value, DType dtype) {
  const Form& f = form(dtype);
  const int width = 8 * static_cast<int>(size_of(dtype));
  const uint32_t sign = std::signbit(value) ? 1U << (width - 1) : 0U;
  const uint32_t top = (1U << (width - f.digits)) - 1U;  // the exponent of infinities and NaN
  if (std::isnan(value)) return sign | top << (f.digits - 1) | 1U << (f.digits - 2);
  if (std::isinf(value)) return sign | top << (f.digits - 1);
  if (value == 0.0) return sign;
  const int exponent = std::ilogb(value) > f.min_exponent ? std::ilogb(value) : f.min_exponent;
  const auto whole = static_cast<uint32_t>(std::ldexp(std::fabs(value), f.digits - 1 - exponent));
  // A normal number's leading one carries into the exponent field.
  return sign | ((static_cast<uint32_t>(exponent - f.min_exponent) << (f.digits - 1)) + whole);
}

}  // namespace

const char* name_of(DType dtype) { return form(dtype).name; }
double unit_roundoff(DType dtype) { return std::ldexp(1.0, -form(dtype).digits); }
double smallest_error(DType dtype) { return std::ldexp(1.0, form(dtype).min_exponent - form(dtype).digits); }
double largest_finite(DType dtype) { return form(dtype).largest; }

double rounded(double value, DType dtype) {
  if (value == 0.0 || !std::isfinite(value)) return value;
  const Form& f = form(dtype);
  const int exponent = std::ilogb(value) > f.min_exponent ? std::ilogb(value) : f.min_exponent;
  const int spacing = exponent - f.digits + 1;
  const double result = std::ldexp(std::nearbyint(std::ldexp(value, -spacing)), spacing);
  return std::fabs(result) > f.largest ? std::copysign(std::numeric_limits<double>::infinity(), value) : result;
}

double decode(const uint8_t* bits, DType dtype) {
  const Form& f = form(dtype);
  const int bytes = static_cast<int>(size_of(dtype));
  uint32_t word = 0;
  for (int i = 0; i < bytes; ++i) word |= static_cast<uint32_t>(bits[i]) << (8 * i);
  const uint32_t significand = word & ((1U << (f.digits - 1)) - 1U);
  const int exponent_bits = 8 * bytes - f.digits;
  const int exponent = static_cast<int>((word >> (f.digits - 1)) & ((1U << exponent_bits) - 1U));
  const double sign = (word >> (8 * bytes - 1)) != 0 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return significand != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  const double whole = exponent == 0 ? significand : significand + std::ldexp(1.0, f.digits - 1);
  const int scale = (exponent == 0 ? 1 : exponent) - 1 + f.min_exponent - f.digits + 1;
  return sign * std::ldexp(whole, scale);
}

Values encode(std::vector<double> values, DType dtype, int64_t shift) {
  const auto width = static_cast<size_t>(size_of(dtype));
  std::vector<uint8_t> bytes(values.size() * width);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = rounded(values[i], dtype);
    const uint32_t bits = bits_of_exact(values[i], dtype);
    for (size_t j = 0; j < width; ++j) bytes[i * width + j] = static_cast<uint8_t>(bits >> (8 * j));
  }
  Values result;
  result.dtype = dtype;
  result.memory = Input(bytes.data(), bytes.size(), static_cast<size_t>(shift) * width);
  result.exact = std::move(values);
  return result;
}

std::vector<double> random_values(Random& random, int64_t count, Magnitude magnitude) {
  std::vector<double> values(static_cast<size_t>(count));
  for (double& value : values) {
    const auto exponent = magnitude.exponent + random.between(-magnitude.spread, magnitude.spread);
    value = random.normal() * std::pow(10.0, static_cast<double>(exponent));
  }
  return values;
}

}  // namespace nybble::test
