// The 4-bit rule in plain C++, codebooks to try it with, and what tests of codes compare with.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "numbers.h"
#include "support.h"

namespace nybble::test {

constexpr float kSmallest = 1e-38F;  // the smallest scale that is stored

std::vector<float> floats_of(const Values& values);
// 16 numbers in [-1, 1], often with an exact zero, sometimes with two equal ones, not always ascending.
std::vector<float> random_codebook(Random& random);

// A codebook in ascending order.
struct Sorted {
  std::vector<float> code;
  std::vector<int> index;

  explicit Sorted(const std::vector<float>& codes);
  // The number of midpoints below s.
  size_t rank(float s) const;
};

float clamped(float s);
float largest(const std::vector<float>& x, size_t start, size_t end);
std::vector<uint8_t> packed_by_rule(const std::vector<float>& x, size_t block, const Sorted& sorted,
                                    const float* absmax);

template <class T>
bool equal(const Output& output, const std::vector<T>& expected) {
  return output.size() == expected.size() * sizeof(T) &&
         (expected.empty() || std::memcmp(output.bytes(), expected.data(), output.size()) == 0);
}

inline void expect(Run& run, bool holds, const std::string& description, const char* what) {
  if (!holds) run.report.fail(description, what);
}

}  // namespace nybble::test
