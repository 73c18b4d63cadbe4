// fp32, fp16 and bf16 as double-precision numbers, written from their definitions and not with core/half.h, so that one
// can be wrong without the other.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "support.h"

namespace nybble::test {

const char* name_of(DType dtype);
double unit_roundoff(DType dtype);   // half the distance from 1 to the next number
double smallest_error(DType dtype);  // half the distance between two denormals
double largest_finite(DType dtype);

// The nearest number of `dtype`, ties to even; infinite where that format overflows.
double rounded(double value, DType dtype);
double decode(const uint8_t* bits, DType dtype);

// `count` numbers of `dtype` where a kernel reads them, and as doubles.
struct Values {
  std::vector<double> exact;
  DType dtype = DType::f32;
  Input memory;
};

// Rounds `values` to `dtype` first. `shift`: elements after an aligned address.
Values encode(std::vector<double> values, DType dtype, int64_t shift);

// What random numbers look like: `exponent` scales them by a power of ten, `spread` each one by one of its own besides.
struct Magnitude {
  int exponent = 0;
  int spread = 0;
};
std::vector<double> random_values(Random& random, int64_t count, Magnitude magnitude);

}  // namespace nybble::test
