#include "rounding_problems.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "codec_rule.h"
#include "numbers.h"

namespace nybble::test {

namespace {

using Matrix = std::vector<double>;  // [n, n]

// Around vectors of 4, 8 and 16, four positions at a time, a block of 128 positions.
int64_t random_cols(Random& random) {
  if (random.one_in(3)) return random.pick<int64_t>({127, 128, 129, 131, 160, 255, 256, 257, 259, 300});
  return random.one_in(8) ? random.between(0, 300) : random.between(0, 70);
}

// Around a task's rows: 8, 16 or 64.
int64_t random_rows(Random& random) {
  if (random.one_in(3)) return random.pick<int64_t>({7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 150});
  return random.one_in(4) ? random.between(0, 150) : random.between(0, 40);
}

// Moments of a few inputs whose neighbours resemble each other and whose features differ in size, damped.
Matrix random_moments(Random& random, int64_t n) {
  const int64_t samples = random.between(1, 48);
  const double likeness = random.pick<double>({0.0, 0.5, 0.9});
  const int64_t spread = random.below(2);
  std::vector<double> size(static_cast<size_t>(n));
  for (double& factor : size) factor = std::pow(10.0, static_cast<double>(random.between(-spread, spread)) / 2.0);
  Matrix moments(static_cast<size_t>(n * n));
  for (int64_t sample = 0; sample < samples; ++sample) {
    std::vector<double> x(static_cast<size_t>(n));
    double previous = random.normal();
    for (size_t i = 0; i < x.size(); ++i) {
      previous = likeness * previous + std::sqrt(1.0 - likeness * likeness) * random.normal();
      x[i] = previous * size[i];
    }
    for (size_t i = 0; i < x.size(); ++i) {
      for (size_t j = 0; j < x.size(); ++j) moments[i * x.size() + j] += x[i] * x[j] / static_cast<double>(samples);
    }
  }
  double trace = 0.0;
  for (int64_t i = 0; i < n; ++i) trace += moments[static_cast<size_t>(i * n + i)];
  const double damping = random.pick<double>({0.01, 0.05, 1.0}) * trace / static_cast<double>(std::max<int64_t>(n, 1));
  for (int64_t i = 0; i < n; ++i) moments[static_cast<size_t>(i * n + i)] += damping;
  return moments;
}

// Upper triangular B with B B^T = H.
Matrix upper_root(const Matrix& h, size_t n) {
  Matrix b(n * n);
  for (size_t j = n; j-- > 0;) {
    for (size_t i = 0; i <= j; ++i) {
      double rest = h[i * n + j];
      for (size_t k = j + 1; k < n; ++k) rest -= b[i * n + k] * b[j * n + k];
      b[i * n + j] = rest;
    }
    const double root = std::sqrt(b[j * n + j]);
    for (size_t i = 0; i <= j; ++i) b[i * n + j] /= root;
  }
  return b;
}

Matrix inverse_of_upper(const Matrix& u, size_t n) {
  Matrix inverse(n * n);
  for (size_t i = n; i-- > 0;) {
    double* row = inverse.data() + i * n;
    for (size_t k = i + 1; k < n; ++k) {
      for (size_t j = k; j < n; ++j) row[j] -= u[i * n + k] * inverse[k * n + j];
    }
    row[i] = 1.0;
    for (size_t j = i; j < n; ++j) row[j] /= u[i * n + i];
  }
  return inverse;
}

std::vector<float> floats(const Matrix& matrix) { return {matrix.begin(), matrix.end()}; }

void pick_codebook(Random& random, RoundingProblem* problem) {
  const std::vector<std::pair<const char*, std::vector<float>>> known = {
      {"nf4",
       {-1.0F, -0.6961928F, -0.52507305F, -0.3949175F, -0.28444138F, -0.18477343F, -0.09105004F, 0.0F, 0.0795803F,
        0.1609302F, 0.2461123F, 0.33791524F, 0.44070983F, 0.562617F, 0.72295684F, 1.0F}},
      {"fp4",
       {0.0F, 0.0052083333F, 0.6666667F, 1.0F, 0.33333333F, 0.5F, 0.16666667F, 0.25F, 0.0F, -0.0052083333F, -0.6666667F,
        -1.0F, -0.33333333F, -0.5F, -0.16666667F, -0.25F}},
      {"int8", {}}};
  const int64_t which = random.below(5);
  if (which < 3) {
    problem->name = known[static_cast<size_t>(which)].first;
    problem->codebook = known[static_cast<size_t>(which)].second;
  } else if (which == 3) {
    problem->name = "int4";
    for (int i = -8; i < 8; ++i) problem->codebook.push_back(static_cast<float>(i) / 7.0F);
  } else {
    problem->name = "random codes";
    problem->codebook = random_codebook(random);
  }
}

// Scales that cover their block, or clip a little; of an int8 row of zeros 0.
void find_scales(Random& random, RoundingProblem* problem) {
  const size_t count = problem->target.size();
  const size_t step = problem->int8() ? static_cast<size_t>(problem->cols) : size_t{1} << problem->shift;
  const float share = random.pick<float>({1.0F, 0.9F, 0.6F});
  for (size_t start = 0; start < count; start += step) {
    const float most = share * largest(problem->target, start, std::min(count, start + step));
    problem->absmax.push_back(problem->int8() ? most : std::max(kSmallest, most));
  }
  if (problem->int8()) problem->absmax.resize(static_cast<size_t>(problem->rows), 1.0F);  // rows of no columns
}

}  // namespace

RoundingProblem random_rounding(Random& random) {
  RoundingProblem problem;
  problem.rows = random_rows(random);
  problem.cols = random_cols(random);
  problem.shift = static_cast<int>(random.between(5, 12));
  pick_codebook(random, &problem);
  const std::vector<double> numbers =
      random_values(random, problem.rows * problem.cols, random.pick<Magnitude>({{0, 0}, {-3, 0}, {4, 1}}));
  problem.target.assign(numbers.begin(), numbers.end());
  if (problem.rows > 0 && random.one_in(3)) {
    const int64_t row = random.below(problem.rows);
    std::fill_n(problem.target.begin() + row * problem.cols, problem.cols, 0.0F);
  }
  find_scales(random, &problem);
  if (random.one_in(2)) {
    for (int64_t i = 0; i < problem.cols; ++i) problem.order.push_back(static_cast<int32_t>(i));
    for (int64_t i = problem.cols - 1; i > 0; --i) std::swap(problem.order[i], problem.order[random.below(i + 1)]);
  }
  const auto n = static_cast<size_t>(problem.cols);
  problem.hessian = floats(random_moments(random, problem.cols));
  problem.factor = floats(inverse_of_upper(upper_root({problem.hessian.begin(), problem.hessian.end()}, n), n));
  problem.inverse = inverse_of_upper({problem.factor.begin(), problem.factor.end()}, n);
  problem.codebook_in = Input::of(problem.codebook, random.below(4));
  problem.target_in = Input::of(problem.target, random.below(8));
  problem.absmax_in = Input::of(problem.absmax, random.below(4));
  problem.order_in = Input::of(problem.order, random.below(4));
  problem.hessian_in = Input::of(problem.hessian, random.below(8));
  problem.factor_in = Input::of(problem.factor, random.below(8));
  return problem;
}

std::string RoundingProblem::describe() const {
  return format("%lld x %lld, %s, block %d%s", (long long)rows, (long long)cols, name.c_str(), 1 << shift,
                order.empty() ? "" : ", ordered");
}

RoundArgs RoundingProblem::args() const {
  RoundArgs result;
  result.target = target_in.as<float>();
  result.rows = rows;
  result.cols = cols;
  result.order = order.empty() ? nullptr : order_in.as<int32_t>();
  result.absmax = absmax_in.as<float>();
  result.codebook = int8() ? nullptr : codebook_in.as<float>();
  result.block_shift = shift;
  return result;
}

}  // namespace nybble::test
