// One linear operation on random numbers, for the tests of linear kernels.
#pragma once
#include <string>
#include <vector>

#include "numbers.h"
#include "support.h"

namespace nybble::test {

constexpr int64_t kSmallM = 8;

// Powers of ten of x and of the weight: products and sums stay within fp32, except that fp16 results may not.
struct Scales {
  Magnitude x, weight;
};

// One linear operation and the memory that its arguments point into.
struct Problem {
  std::string description;
  LinearArgs args;
  Values x, left, right, bias;
  Input packed, codebook, plain, codes, nested, map, offset;
  std::vector<double> weight;        // [rows, cols], code * scale in double
  std::vector<float> weight_floats;  // the same in fp32, as a kernel that rounds it to bf16 begins
  std::vector<float> scales;         // of the blocks of a 4-bit weight
  Scales magnitudes;

  double x_at(int64_t row, int64_t i) const { return x.exact[static_cast<size_t>(row * args.x_stride + i)]; }
};

void make(Random& random, Problem* problem);

}  // namespace nybble::test
