// A weight to round by second moments, for the tests of round_feedback and round_descent.
#pragma once
#include <string>
#include <vector>

#include "support.h"

namespace nybble::test {

struct RoundingProblem {
  int64_t rows = 0;
  int64_t cols = 0;
  int shift = 6;
  std::string name;             // of the codebook
  std::vector<float> codebook;  // [16], empty: int8
  std::vector<float> target;    // [rows, cols]
  std::vector<float> absmax;
  std::vector<int32_t> order;  // [cols], empty: as they are
  // [cols, cols], in the order of the positions: H, U with U^T U = H^-1, and U^-1 of the U that fp32 holds.
  std::vector<float> hessian, factor;
  std::vector<double> inverse;
  Input codebook_in, target_in, absmax_in, order_in, hessian_in, factor_in;

  bool int8() const { return codebook.empty(); }
  size_t at(int64_t row, int64_t position) const {
    return static_cast<size_t>(row * cols + (order.empty() ? position : order[static_cast<size_t>(position)]));
  }
  float scale(size_t element) const {
    return absmax[int8() ? element / static_cast<size_t>(cols) : element >> static_cast<size_t>(shift)];
  }
  // What a code stands for, in fp32.
  float value(uint8_t code, float scale) const {
    return int8() ? static_cast<float>(static_cast<int8_t>(code)) * (scale / 127.0F) : codebook[code & 15U] * scale;
  }
  std::string describe() const;
  // Everything but the matrix, the codes and the threads.
  RoundArgs args() const;
};

RoundingProblem random_rounding(Random& random);

}  // namespace nybble::test
