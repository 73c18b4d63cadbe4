#include "codec_rule.h"

#include <algorithm>
#include <cmath>

namespace nybble::test {

std::vector<float> floats_of(const Values& values) { return {values.exact.begin(), values.exact.end()}; }

std::vector<float> random_codebook(Random& random) {
  std::vector<float> codes(16);
  for (float& code : codes) code = static_cast<float>(2.0 * random.uniform() - 1.0);
  if (!random.one_in(3)) codes[static_cast<size_t>(random.below(16))] = 0.0F;
  if (random.one_in(4)) codes[3] = codes[11];  // FP4 has two zeros
  if (!random.one_in(3)) std::sort(codes.begin(), codes.end());
  return codes;
}

Sorted::Sorted(const std::vector<float>& codes) : index(codes.size()) {
  for (size_t i = 0; i < index.size(); ++i) index[i] = static_cast<int>(i);
  std::stable_sort(index.begin(), index.end(), [&](int a, int b) { return codes[a] < codes[b]; });
  for (int i : index) code.push_back(codes[static_cast<size_t>(i)]);
}

size_t Sorted::rank(float s) const {
  size_t rank = 0;
  for (size_t i = 0; i + 1 < code.size(); ++i) rank += s > (code[i] + code[i + 1]) / 2.0F ? 1 : 0;
  return rank;
}

float clamped(float s) { return std::min(1.0F, std::max(-1.0F, s)); }

float largest(const std::vector<float>& x, size_t start, size_t end) {
  float most = 0.0F;
  for (size_t i = start; i < end; ++i) most = std::max(most, std::fabs(x[i]));
  return most;
}

std::vector<uint8_t> packed_by_rule(const std::vector<float>& x, size_t block, const Sorted& sorted,
                                    const float* absmax) {
  std::vector<uint8_t> packed((x.size() + 1) / 2);
  const auto nibble = [&](size_t i) {
    return sorted.index[sorted.rank(i < x.size() ? clamped(x[i] * (1.0F / absmax[i / block])) : 0.0F)];
  };
  for (size_t i = 0; i < packed.size(); ++i) packed[i] = static_cast<uint8_t>(nibble(2 * i) << 4 | nibble(2 * i + 1));
  return packed;
}

}  // namespace nybble::test
