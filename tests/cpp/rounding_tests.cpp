// round_feedback and round_descent, decision by decision, against a double-precision reference.
//
// A decision depends on all that came before it in its row, and a near-tie that fp32 decides the other way changes
// every later one. So the reference follows the codes found: given the earlier ones, what is to be rounded next is
// computed in double, and the next code must stand for a value as near to it as any, within twice what fp32 may have
// been off by (the distance to the code found, and to the best one). Where no decision is that close, the codes are
// the reference's own.
//
// Roundings, u = 2^-24, gamma_n = n u / (1 - n u), of terms that pass through at most n of them:
//
// feedback   The kernel's errors e' solve sum_{j <= p} U_jp e'_j = t_p - q_p + d_p, where p + 1 additions and three
//            operations on e'_p itself give |d_p| <= gamma (|t_p| + sum_{j <= p} |U_jp e'_j|), gamma = gamma_(cols +
//            4). Hence e' - e = d U^-1, and what is rounded at p is off by at most
//                U_pp sum_{j < p} |d_j| |U^-1_jp| + gamma (|t_p| + sum_{j < p} |U_jp e'_j|).
// descent    The gradient at p is a sum of cols residuals and of every change so far, each rounded once, times H:
//            off by gamma_n of the sum of magnitudes, n one for each addition and 8. The aim q_p + gradient / H_pp has
//            three roundings more.
// picking    x / scale has two roundings and int8 a third, a midpoint one, a code's value two.
//
// A step of descent from a to b, aiming at x, changes (W - Q) H (W - Q)^T by H_pp ((x - b)^2 - (x - a)^2). As b is at
// most `slack` farther from x than a is, that is at most H_pp slack (2 |x - a| + slack).
#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "core/check.h"
#include "codec_rule.h"
#include "rounding_problems.h"

namespace nybble::test {

namespace {

using Codes = std::vector<uint8_t>;
constexpr double kUnit = 0x1p-24;

double gamma_of(double n, double unit) { return n * unit / (1.0 - n * unit); }

// All values that codes of one scale stand for.
std::vector<double> values_of(const RoundingProblem& problem, float scale) {
  std::vector<double> values;
  for (int code = problem.int8() ? -127 : 0; code < (problem.int8() ? 128 : 16); ++code) {
    values.push_back(problem.value(static_cast<uint8_t>(code), scale));
  }
  return values;
}

// How much farther than the nearest value that of a code may be from x, if x is off by `error`.
double slack_of(double x, double error, const std::vector<double>& values) {
  double largest = 0.0;
  for (const double value : values) largest = std::max(largest, std::fabs(value));
  return 2.0 * (error + 4.0 * kUnit * (std::fabs(x) + error) + 4.0 * kUnit * largest);
}

bool nearest(double x, double value, double slack, const std::vector<double>& values) {
  double least = std::fabs(x - value);
  for (const double other : values) least = std::min(least, std::fabs(x - other));
  return std::fabs(x - value) <= least + slack;
}

// A row's scales and what they give, found anew only where the scale changes.
class ValueCache {
 public:
  explicit ValueCache(const RoundingProblem& problem) : problem_(problem) {}

  const std::vector<double>& at(float scale) {
    if (values_.empty() || scale != scale_) values_ = values_of(problem_, scale_ = scale);
    return values_;
  }

 private:
  const RoundingProblem& problem_;
  float scale_ = 0.0F;
  std::vector<double> values_;
};

// The first position at which a row's code is not the nearest, or -1.
int64_t first_wrong_feedback(const RoundingProblem& problem, int64_t row, const uint8_t* codes, ValueCache* cache) {
  const auto n = static_cast<size_t>(problem.cols);
  const double gamma = gamma_of(static_cast<double>(n + 4), kUnit);
  std::vector<double> rest(n);
  std::vector<double> size(n);      // |t_p| + sum of |U_jp e'_j|
  std::vector<double> off(n, 0.0);  // sum of |d_j| |U^-1_jp|
  for (size_t p = 0; p < n; ++p) {
    rest[p] = problem.target[problem.at(row, static_cast<int64_t>(p))];
    size[p] = std::fabs(rest[p]);
  }
  for (size_t p = 0; p < n; ++p) {
    const size_t element = problem.at(row, static_cast<int64_t>(p));
    const float scale = problem.scale(element);
    const float* u = problem.factor.data() + p * n;
    const double* inverse = problem.inverse.data() + p * n;
    const double value = problem.value(codes[element], scale);
    const double error = u[p] * off[p] + gamma * size[p];
    const std::vector<double>& values = cache->at(scale);
    if (!nearest(rest[p], value, slack_of(rest[p], error, values), values)) return static_cast<int64_t>(p);
    const double e = (rest[p] - value) / u[p];
    const double most = std::fabs(e) + (error / u[p] + gamma * std::fabs(e)) / (1.0 - gamma);  // of |e'|
    const double d = gamma * (size[p] + u[p] * most);
    for (size_t i = p + 1; i < n; ++i) {
      rest[i] -= e * u[i];
      size[i] += most * std::fabs(u[i]);
      off[i] += d * std::fabs(inverse[i]);
    }
  }
  return -1;
}

// A row on its way through the sweeps.
class Descent {
 public:
  Descent(const RoundingProblem& problem, int64_t row, const uint8_t* codes)
      : problem_(problem), row_(row), n_(static_cast<size_t>(problem.cols)), terms_(n_ + 8), gradient_(n_), size_(n_) {
    for (size_t p = 0; p < n_; ++p) add(p, problem.target[element(p)] - double{value(p, codes)});
  }

  // The first position at which a sweep from `before` does not find the best code, or -1; `rise`: the most that the
  // objective may have risen.
  int64_t first_wrong(const uint8_t* before, const uint8_t* after, ValueCache* cache, double* rise) {
    terms_ += n_;
    *rise = 0.0;
    for (size_t p = 0; p < n_; ++p) {
      const double pivot = problem_.hessian[p * n_ + p];
      const double a = value(p, before), b = value(p, after);
      const double step = gradient_[p] / pivot;
      const double error = gamma_of(static_cast<double>(terms_), kUnit) * size_[p] / pivot +
                           gamma_of(4, kUnit) * (std::fabs(a) + std::fabs(step));
      const std::vector<double>& values = cache->at(problem_.scale(element(p)));
      const double slack = slack_of(a + step, error, values);
      if (!nearest(a + step, b, slack, values)) return static_cast<int64_t>(p);
      if (a == b) continue;
      *rise += pivot * slack * (2.0 * std::fabs(step) + slack);
      add(p, a - b);
    }
    return -1;
  }

 private:
  size_t element(size_t position) const { return problem_.at(row_, static_cast<int64_t>(position)); }
  float value(size_t position, const uint8_t* codes) const {
    return problem_.value(codes[element(position)], problem_.scale(element(position)));
  }
  void add(size_t position, double change) {
    const float* h = problem_.hessian.data() + position * n_;
    for (size_t i = 0; i < n_; ++i) {
      gradient_[i] += change * h[i];
      size_[i] += std::fabs(change * h[i]);
    }
  }

  const RoundingProblem& problem_;
  int64_t row_;
  size_t n_;
  size_t terms_;  // of a gradient, at most, and its roundings
  std::vector<double> gradient_, size_;
};

struct Objective {
  double value = 0.0;
  double bound = 0.0;  // of what double may be off by
};

// (w - q) H (w - q)^T of a row.
Objective objective(const RoundingProblem& problem, int64_t row, const uint8_t* codes) {
  const auto n = static_cast<size_t>(problem.cols);
  std::vector<double> e(n);
  for (size_t p = 0; p < n; ++p) {
    const size_t element = problem.at(row, static_cast<int64_t>(p));
    e[p] = problem.target[element] - double{problem.value(codes[element], problem.scale(element))};
  }
  Objective result;
  double size = 0.0;
  for (size_t i = 0; i < n; ++i) {
    const float* h = problem.hessian.data() + i * n;
    double product = 0.0, magnitude = 0.0;
    for (size_t j = 0; j < n; ++j) {
      product += e[j] * h[j];
      magnitude += std::fabs(e[j] * h[j]);
    }
    result.value += product * e[i];
    size += magnitude * std::fabs(e[i]);
  }
  result.bound = gamma_of(static_cast<double>(2 * n + 4), 0x1p-53) * size;
  return result;
}

void check_feedback(Run& run, const RoundingProblem& problem, const Codes& codes, const std::string& what) {
  ValueCache cache(problem);
  for (int64_t row = 0; row < problem.rows; ++row) {
    const int64_t wrong = first_wrong_feedback(problem, row, codes.data(), &cache);
    if (wrong >= 0) {
      return run.report.fail(what,
                             format("row %lld, position %lld: not the nearest code", (long long)row, (long long)wrong));
    }
  }
}

// path: the codes before the first sweep, after it, after the second ...
void check_descent(Run& run, const RoundingProblem& problem, const std::vector<Codes>& path, const std::string& what) {
  ValueCache cache(problem);
  for (int64_t row = 0; row < problem.rows; ++row) {
    Descent descent(problem, row, path[0].data());
    for (size_t sweep = 1; sweep < path.size(); ++sweep) {
      const uint8_t* before = path[sweep - 1].data();
      const uint8_t* after = path[sweep].data();
      double rise = 0.0;
      const int64_t wrong = descent.first_wrong(before, after, &cache, &rise);
      if (wrong >= 0) {
        return run.report.fail(what, format("row %lld, sweep %zu, position %lld: not the best code", (long long)row,
                                            sweep, (long long)wrong));
      }
      const Objective was = objective(problem, row, before), is = objective(problem, row, after);
      if (!(is.value <= was.value + rise + was.bound + is.bound)) {
        return run.report.fail(what, format("row %lld, sweep %zu: the error rises from %.9g to %.9g", (long long)row,
                                            sweep, was.value, is.value));
      }
    }
  }
}

// Codes of a row whose scale is 0: none but 0, on every ISA.
void check_empty_rows(Run& run, const RoundingProblem& problem, const Codes& codes, const std::string& what) {
  for (int64_t row = 0; row < problem.rows && problem.int8(); ++row) {
    if (problem.absmax[static_cast<size_t>(row)] != 0.0F) continue;
    const auto first = codes.begin() + row * problem.cols;
    expect(run, std::all_of(first, first + problem.cols, [](uint8_t code) { return code == 0; }), what,
           "a row of zeros has codes other than 0");
  }
}

struct Call {
  const char* name;
  Status (*kernel)(const RoundArgs&);
  const Input* matrix;
  int sweeps;
};

// Runs it with one thread, two and three on the codes given.
Codes round_codes(Run& run, const RoundingProblem& problem, const Call& call, const Codes& from,
                  const std::string& what) {
  Codes result;
  for (int threads = 1; threads <= 3; ++threads) {
    const std::string which = format("%s, %d sweeps, %d threads", what.c_str(), call.sweeps, threads);
    Output codes(static_cast<int64_t>(from.size()), 1, threads);
    std::copy(from.begin(), from.end(), codes.as<uint8_t>());
    RoundArgs args = problem.args();
    args.matrix = call.matrix->as<float>();
    args.sweeps = call.sweeps;
    args.codes = codes.as<uint8_t>();
    args.threads = threads;
    expect(run, check(args).ok(), which, "its arguments are refused");
    expect(run, call.kernel(args).ok(), which, "fails");
    expect(run, codes.guards_intact(), which, "writes outside its output");
    const Codes found(codes.bytes(), codes.bytes() + codes.size());
    if (threads == 1) {
      result = found;
    } else {
      expect(run, found == result, which, "other bits than one thread");
    }
  }
  return result;
}

Codes random_codes(Random& random, const RoundingProblem& problem) {
  Codes codes(problem.target.size());
  for (uint8_t& code : codes) {
    code = static_cast<uint8_t>(problem.int8() ? random.between(-127, 127) : random.between(0, 15));
  }
  return codes;
}

void rounding_case(Run& run, Random& random) {
  const RoundingProblem problem = random_rounding(random);
  const Codes arbitrary = random_codes(random, problem);
  const bool from_feedback = random.one_in(2);
  const int sweeps = static_cast<int>(random.between(1, 3));
  std::vector<Codes> right_feedback;  // what another ISA gave and was found right
  std::vector<std::vector<Codes>> right_paths;
  const auto is_new = [](const auto& found, auto* known) {
    if (std::find(known->begin(), known->end(), found) != known->end()) return false;
    known->push_back(found);
    return true;
  };
  for (const KernelTable* table : run.tables) {
    const std::string isa = format("%s: ", table->isa);
    std::string what = isa + "round_feedback " + problem.describe();
    const Codes codes =
        round_codes(run, problem, {"feedback", table->round_feedback, &problem.factor_in, 1}, arbitrary, what);
    if (is_new(codes, &right_feedback)) check_feedback(run, problem, codes, what);
    check_empty_rows(run, problem, codes, what);

    what = isa + "round_descent " + problem.describe();
    std::vector<Codes> path = {from_feedback ? codes : arbitrary};
    for (int sweep = 1; sweep <= sweeps; ++sweep) {
      path.push_back(
          round_codes(run, problem, {"descent", table->round_descent, &problem.hessian_in, sweep}, path[0], what));
    }
    if (is_new(path, &right_paths)) check_descent(run, problem, path, what);
    if (from_feedback) check_empty_rows(run, problem, path.back(), what);
    run.report.checked(table->isa);
  }
}

void no_sweep_changes_nothing(Run& run, Random& random) {
  const RoundingProblem problem = random_rounding(random);
  const Codes arbitrary = random_codes(random, problem);
  for (const KernelTable* table : run.tables) {
    const std::string what = format("%s: round_descent %s", table->isa, problem.describe().c_str());
    const Codes found =
        round_codes(run, problem, {"descent", table->round_descent, &problem.hessian_in, 0}, arbitrary, what);
    expect(run, found == arbitrary, what, "no sweep changes codes");
  }
}

void refused_arguments(Run& run) {
  const float numbers[16] = {1.0F, 0.0F, 0.0F, 0.0F, 0.0F, 1.0F};
  const int32_t order[4] = {3, 1, 0, 2};
  uint8_t codes[16];
  RoundArgs good;
  good.target = good.matrix = good.absmax = good.codebook = numbers;
  good.rows = good.cols = 4;
  good.order = order;
  good.codes = codes;
  expect(run, check(good).ok(), "rounding", "its arguments are refused");
  const auto refused = [&](const char* argument, const auto& spoil) {
    RoundArgs bad = good;
    spoil(&bad);
    const Status status = check(bad);
    expect(run, status.code == Code::bad_argument && std::string(argument) == status.what,
           format("rounding with a bad %s", argument), "is not refused");
  };
  refused("target", [](RoundArgs* args) { args->target = nullptr; });
  refused("matrix", [](RoundArgs* args) { args->matrix = nullptr; });
  refused("absmax", [](RoundArgs* args) { args->absmax = nullptr; });
  refused("codes", [](RoundArgs* args) { args->codes = nullptr; });
  refused("rows", [](RoundArgs* args) { args->rows = -1; });
  refused("cols", [](RoundArgs* args) { args->cols = int64_t{1} << 31; });
  refused("sweeps", [](RoundArgs* args) { args->sweeps = -1; });
  refused("threads", [](RoundArgs* args) { args->threads = 0; });
  for (const int shift : {0, 4, 13, 40}) {
    refused("block_size", [shift](RoundArgs* args) { args->block_shift = shift; });
  }
  for (const int32_t outside : {-1, 4, 1 << 30}) {
    const int32_t bad[4] = {0, 1, 2, outside};
    refused("order", [&bad](RoundArgs* args) { args->order = bad; });
  }
}

}  // namespace

void test_rounding(Run& run) {
  refused_arguments(run);
  for (int64_t index = 0; index < run.cases; ++index) {
    Random random(run.seed * 1000003 + static_cast<uint64_t>(index));
    rounding_case(run, random);
    if (index % 10 == 0) no_sweep_changes_nothing(run, random);
  }
}

}  // namespace nybble::test
