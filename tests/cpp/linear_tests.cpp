// Linear kernels against a double-precision reference, within the error bound of their accumulation.
//
// A sum of n products in any order, each operation rounded with |d| <= u, is off by at most
//     gamma_n * sum |x_i w_i|,   gamma_n = n u / (1 - n u)
// because no term passes through more than n roundings (Higham, Accuracy and Stability, 3.1 and 4.2). Here u = 2^-24
// and n is the contraction and the rank, plus 8: code * scale (one rounding; q * (absmax / 127) has two), a nested
// scale (two), the bias and a few partial sums. Underflow: each fp32 operation is off by at most 2^-150 more.
//
// A panel of bf16 pairs (KernelTable::bf16_dot) rounds code * scale and the side path to bf16, and so does the
// reference. x86's instruction rounds each of its additions to nearest; Arm's rounds to odd, off by up to 2 u, but a
// term passes through half as many: one for its pair, one for each pair from there on, (n + 2) / 2 in all, and the
// bound of n + 8 holds again. Both take denormal operands and results as zero: a product loses at most 2^-126 times its
// other factor, an addition 2^-126 for each of its numbers.
//
// linear_int8 rounds x and 4-bit weights to int8 and has a bound of its own, below.
//
// The result is rounded to the output's dtype.
#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "core/check.h"
#include "core/parallel.h"
#include "linear_problems.h"
#include "numbers.h"
#include "support.h"

namespace nybble::test {

namespace {

// ---- the reference --------------------------------------------------------------------------------------------------

struct Expected {
  std::vector<double> exact, bound;
};

double gamma_of(double n, double unit) { return n * unit / (1.0 - n * unit); }

// `pairs`: what is multiplied is rounded to bf16 first. `bare_codes`: of the weight that is the codes, and their sums
// are scaled, so an underflow counts in units of a scale.
Expected expected(const Problem& problem, bool pairs, bool bare_codes = false) {
  const LinearArgs& args = problem.args;
  const auto operand = [&](double value) { return pairs ? rounded(value, DType::bf16) : value; };
  std::vector<double> weight = problem.weight;
  for (size_t i = 0; pairs && !bare_codes && i < weight.size(); ++i) weight[i] = operand(problem.weight_floats[i]);
  double largest = 0.0;
  for (const double value : weight) largest = std::max(largest, std::fabs(value));
  const int64_t length = args.contraction(), columns = args.columns(), rank = args.side.rank;
  const double n = static_cast<double>(length + rank + 8);
  Expected result;
  for (int64_t row = 0; row < args.m; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      double exact = 0.0, size = 0.0, factors = 0.0;
      const auto add = [&](double a, double b) {
        exact += a * b;
        size += std::fabs(a * b);
        factors += std::fabs(a) + std::fabs(b);
      };
      for (int64_t i = 0; i < length; ++i) {
        const int64_t at = args.grad_input ? i * columns + column : column * length + i;
        add(problem.x_at(row, i), weight[static_cast<size_t>(at)]);
      }
      for (int64_t i = 0; i < rank; ++i) {
        const int64_t at = args.grad_input ? i * columns + column : column * rank + i;
        add(operand(problem.left.exact[static_cast<size_t>(row * rank + i)]),
            operand(problem.right.exact[static_cast<size_t>(at)]));
      }
      if (args.bias != nullptr) add(problem.bias.exact[static_cast<size_t>(column)], 1.0);
      double bound = (gamma_of(n, 0x1p-24) + gamma_of(n, 0x1p-53)) * size + 3.0 * n * (pairs ? 0x1p-126 : 0x1p-150);
      if (pairs) bound += 0x1p-126 * factors;
      if (bare_codes) bound += 0x1p-8 * (1.0 + 0x1p-8) * size + 3.0 * n * 0x1p-126 * largest;
      // A decoded weight may underflow too, which x multiplies: code * scale, or the absmax / 127 that q multiplies.
      bound += (args.weight.is_int8() ? 128.0 : 1.0) * 0x1p-150 * factors;
      bound += unit_roundoff(args.dtype) * (std::fabs(exact) + bound) + smallest_error(args.dtype);
      result.exact.push_back(exact);
      result.bound.push_back(bound);
    }
  }
  return result;
}

// linear_int8. With s = absmax / 127 of a row of x, the codes q = round(x * (127 / absmax)) have |x - s q| <= s / 2,
// besides three roundings of at most 127 steps each; the codes c of 4-bit weights |w - g c| <= g / 2, besides five,
// with g the largest magnitude in a group of 512 columns / 127. So an output is off by
//     s / 2 sum |w| + sum (|x| + s / 2) g / 2
// and by fp32's roundings of the sums over the groups, the rank and the bias, of terms that together are `size`.
// Weights below 127 * 2^-140 may become zero; a sum may underflow in units of s before it is multiplied by it.
constexpr int64_t kGroup = 512;

// The g of every weight; 0 where the weights are int8 as they are.
std::vector<double> steps_of(const Problem& problem) {
  const Weight& weight = problem.args.weight;
  std::vector<double> steps(problem.weight.size(), 0.0);
  if (weight.is_int8()) return steps;
  double largest_code = 0.0;
  for (int i = 0; i < 16; ++i) largest_code = std::max(largest_code, std::fabs(double{weight.packed4.codebook[i]}));
  for (int64_t row = 0; row < weight.rows; ++row) {
    for (int64_t at = 0; at < weight.cols; at += kGroup) {
      const int64_t begin = row * weight.cols + at, end = begin + smaller(kGroup, weight.cols - at);
      double largest = 0.0;
      for (int64_t i = begin; i < end; ++i) {
        const float scale = problem.scales[static_cast<size_t>(i >> weight.packed4.block_shift)];
        largest = std::max(largest, std::fabs(double{scale}));
      }
      std::fill(steps.begin() + begin, steps.begin() + end, largest * largest_code / 127.0);
    }
  }
  return steps;
}

// `pairs`: the side path is multiplied as bf16 pairs.
Expected expected_int8(const Problem& problem, bool pairs) {
  const LinearArgs& args = problem.args;
  const auto operand = [&](double value) { return pairs ? rounded(value, DType::bf16) : value; };
  const std::vector<double> steps = steps_of(problem);
  const int64_t length = args.contraction(), columns = args.columns(), rank = args.side.rank;
  const double n = static_cast<double>(divide_up(length, kGroup) + rank + 10);
  constexpr double kHalf = 0.5 + 127.0 * 5.0 * 0x1p-24;
  Expected result;
  for (int64_t row = 0; row < args.m; ++row) {
    double s = 0.0;
    for (int64_t i = 0; i < length; ++i) s = std::max(s, std::fabs(problem.x_at(row, i)) / 127.0);
    for (int64_t column = 0; column < columns; ++column) {
      double exact = 0.0, size = 0.0, bound = n * 0x1p-149 * (1.0 + s);
      for (int64_t i = 0; i < length; ++i) {
        const auto at = static_cast<size_t>(column * length + i);
        const double x = std::fabs(problem.x_at(row, i)), w = std::fabs(problem.weight[at]), g = steps[at];
        exact += problem.x_at(row, i) * problem.weight[at];
        bound += kHalf * s * w + (x + kHalf * s) * kHalf * g + 127.0 * 0x1p-140 * (x + s);
        size += (x + s) * (w + g);
      }
      for (int64_t i = 0; i < rank; ++i) {
        const double left = operand(problem.left.exact[static_cast<size_t>(row * rank + i)]);
        const double right = operand(problem.right.exact[static_cast<size_t>(column * rank + i)]);
        exact += left * right;
        size += std::fabs(left * right);
        if (pairs) bound += 0x1p-126 * (3.0 + std::fabs(left) + std::fabs(right));
      }
      if (args.bias != nullptr) {
        exact += problem.bias.exact[static_cast<size_t>(column)];
        size += std::fabs(problem.bias.exact[static_cast<size_t>(column)]);
      }
      bound += n * 0x1p-23 * size;
      bound += unit_roundoff(args.dtype) * (std::fabs(exact) + bound) + smallest_error(args.dtype);
      result.exact.push_back(exact);
      result.bound.push_back(bound);
    }
  }
  return result;
}

// Empty when every number is right.
std::string difference(const Problem& problem, const Expected& wanted, const Output& out) {
  const DType dtype = problem.args.dtype;
  const int64_t columns = problem.args.columns();
  for (size_t i = 0; i < wanted.exact.size(); ++i) {
    const double found = decode(out.bytes() + i * static_cast<size_t>(size_of(dtype)), dtype);
    const double exact = wanted.exact[i], bound = wanted.bound[i];
    if (std::fabs(found - exact) <= bound) continue;
    if (std::isinf(found) && std::copysign(1.0, found) * exact + bound >= largest_finite(dtype)) continue;
    const auto at = static_cast<int64_t>(i);
    return format("[%lld, %lld] is %g, expected %g within %g", (long long)(at / columns), (long long)(at % columns),
                  found, exact, bound);
  }
  return "";
}

// ---- running --------------------------------------------------------------------------------------------------------

// What the calling thread's scratch holds from before must not matter.
void poison_scratch() {
  for (int slot = 0; slot < static_cast<int>(Slot::count); ++slot) {
    constexpr size_t kBytes = size_t{1} << 20;
    if (void* memory = scratch(static_cast<Slot>(slot), kBytes)) std::memset(memory, 0xFF, kBytes);
  }
}

// Returns what one thread computed, or null.
std::unique_ptr<Output> check_kernel(Run& run, const Problem& problem, const char* isa, const char* kernel,
                                     Status (*function)(const LinearArgs&), const Expected& wanted) {
  std::unique_ptr<Output> first;
  for (int threads = 1; threads <= 3; ++threads) {
    const std::string what = format("%s %s, %d threads: %s", isa, kernel, threads, problem.description.c_str());
    const int64_t count = problem.args.m * problem.args.columns();
    auto out = std::make_unique<Output>(count, size_of(problem.args.dtype), threads);
    LinearArgs args = problem.args;
    args.out = out->as<void>();
    args.threads = threads;
    poison_scratch();
    const Status status = function(args);
    if (!status.ok()) {
      run.report.fail(what, format("fails: %s %lld", status.what, (long long)status.value));
      return nullptr;
    }
    if (!out->guards_intact()) run.report.fail(what, "writes outside its output");
    if (first == nullptr) {
      const std::string wrong = difference(problem, wanted, *out);
      if (!wrong.empty()) run.report.fail(what, wrong);
      first = std::move(out);
    } else if (!out->same(*first)) {
      run.report.fail(what, "other bits than one thread");
    }
  }
  run.report.checked(isa);
  return first;
}

void check_native(Run& run, const Problem& problem) {
  const LinearArgs& args = problem.args;
  const Expected as_given = expected(problem, false), as_pairs = expected(problem, true);
  const Expected as_codes = expected(problem, true, true);
  const bool small = !args.grad_input && args.m <= kSmallM && (args.weight.is_int8() || args.weight.cols % 8 == 0);
  for (const KernelTable* table : run.tables) {
    const bool pairs = table->bf16_dot && args.dtype == DType::bf16;
    check_kernel(run, problem, table->isa, "linear_panel", table->linear_panel, pairs ? as_pairs : as_given);
    if (small) check_kernel(run, problem, table->isa, "linear_small_m", table->linear_small_m, as_given);
    if (table->linear_tiles != nullptr && args.dtype == DType::bf16) {
      check_kernel(run, problem, table->isa, "linear_tiles", table->linear_tiles, as_pairs);
      check_kernel(run, problem, table->isa, "linear_tiles_few", table->linear_tiles_few, as_codes);
    }
  }
}

void check_int8(Run& run, Problem* problem) {
  LinearArgs& args = problem->args;
  // Its sums are in units of s: 127 times a row's weights must stay within fp32.
  if (args.grad_input || problem->magnitudes.weight.exponent > 30) return;
  args.compute = Compute::int8;
  const Expected as_given = expected_int8(*problem, false), as_pairs = expected_int8(*problem, true);
  std::unique_ptr<Output> first;
  for (const KernelTable* table : run.tables) {
    const bool pairs = table->bf16_dot && args.dtype == DType::bf16;
    auto out = check_kernel(run, *problem, table->isa, "linear_int8", table->linear_int8, pairs ? as_pairs : as_given);
    // Sums within a group are integers, so there is nothing in which two ISAs could differ.
    if (out == nullptr || args.side.rank > 0 || args.contraction() > kGroup) continue;
    if (first == nullptr) {
      first = std::move(out);
    } else if (!out->same(*first)) {
      run.report.fail(problem->description, format("%s linear_int8: other bits than another ISA", table->isa));
    }
  }
}

// With a scale of 1 on both sides an output is the integer product itself, here below 2^24. Row 0 is as large as a
// product can be; row 1 holds an infinity, which must stay in its row.
void check_exact_products(Run& run, int64_t m, int64_t rows, int64_t cols) {
  Random random(run.seed * 2000003 + static_cast<uint64_t>(cols));
  std::vector<float> x(static_cast<size_t>(m * cols));
  std::vector<int8_t> q(static_cast<size_t>(rows * cols));
  for (size_t i = 0; i < x.size(); ++i) {
    const bool first_column = static_cast<int64_t>(i) % cols == 0, first_row = static_cast<int64_t>(i) < cols;
    x[i] = first_column || first_row ? -127.0F : static_cast<float>(random.between(-127, 127));
  }
  for (size_t i = 0; i < q.size(); ++i) {
    q[i] = static_cast<int64_t>(i) < cols ? int8_t{-128} : static_cast<int8_t>(random.between(-128, 127));
  }
  if (m > 1) x[static_cast<size_t>(2 * cols - 1)] = HUGE_VALF;
  const std::vector<float> absmax(static_cast<size_t>(rows), 127.0F);
  LinearArgs args;
  args.compute = Compute::int8;
  args.weight.int8 = true;
  args.weight.rows = rows;
  args.weight.cols = cols;
  args.weight.rows8 = {q.data(), absmax.data()};
  args.x = x.data();
  args.x_stride = cols;
  args.m = m;
  args.threads = 2;
  std::vector<float> out(static_cast<size_t>(m * rows));
  args.out = out.data();
  for (const KernelTable* table : run.tables) {
    const std::string what = format("%s linear_int8, exact products %lld x %lld x %lld", table->isa, (long long)m,
                                    (long long)rows, (long long)cols);
    if (!table->linear_int8(args).ok()) run.report.fail(what, "fails");
    int64_t wrong = 0;
    for (int64_t at = 0; at < m * rows; ++at) {
      int64_t sum = 0;
      if (at / rows != 1) {
        for (int64_t i = 0; i < cols; ++i) {
          sum += static_cast<int64_t>(x[static_cast<size_t>(at / rows * cols + i)]) *
                 q[static_cast<size_t>(at % rows * cols + i)];
        }
      }
      const float found = out[static_cast<size_t>(at)];
      wrong += at / rows == 1 ? !std::isnan(found) : found != static_cast<float>(sum);
    }
    if (wrong > 0) run.report.fail(what, format("%lld outputs are wrong", (long long)wrong));
    run.report.checked(table->isa);
  }
}

}  // namespace

void test_linear(Run& run) {
  for (int64_t index = 0; index < 4 * run.cases; ++index) {
    Random random(run.seed * 2000003 + static_cast<uint64_t>(index));
    Problem problem;
    make(random, &problem);
    const LinearArgs& args = problem.args;
    std::vector<float> none(static_cast<size_t>(args.m * args.columns()) + 1);
    LinearArgs with_out = args;
    with_out.out = none.data();
    if (!check(with_out).ok()) run.report.fail(problem.description, "its arguments are refused");
    check_native(run, problem);
    check_int8(run, &problem);
  }
  for (const int64_t cols : {1, 3, 4, 17, 64, 127, 512, 513, 1000}) check_exact_products(run, 1 + cols % 40, 70, cols);
}

}  // namespace nybble::test
