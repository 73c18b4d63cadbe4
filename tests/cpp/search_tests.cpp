// Scales of least squared error: Search::mse, and Search::square and importance, which weigh it.
//
// Sums may differ in their last bits from ISA to ISA, so a scale may. What must hold is that the codes are the rule's
// for the stored scale and that its error is the least of the candidates'. With energy = sum w x^2 over a block of n:
// <x, c>_w and <c, c>_w are off by gamma_(n + 9) of the sums of their magnitudes (n roundings each, one of the weight
// times the code, 8 of the scales and their combination); by Cauchy-Schwarz the gain <x, c>_w^2 / <c, c>_w is then off
// by at most 3 gamma of the energy, and two gains are compared. A square's weight has three roundings of its own, which
// change each gain by at most 6 u of the energy.
#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "codec_rule.h"
#include "core/check.h"
#include "numbers.h"
#include "support.h"

namespace nybble::test {

namespace {

struct Problem {
  Values x;
  std::vector<float> values;
  int64_t count = 0;
  int64_t block = 0;
  std::vector<float> codes;
  Input codebook;
  Search search = Search::mse;
  std::vector<float> importance;  // [columns]
  Input importance_in;
  std::vector<double> weights;  // [count]: what each error counts

  std::string describe() const {
    const char* names[] = {"absmax", "mse", "square", "importance"};
    return format("%s of %lld %s, block %lld, %zu columns", names[static_cast<int>(search)], (long long)count,
                  name_of(x.dtype), (long long)block, importance.size());
  }
};

void find_weights(Problem* problem) {
  const auto block = static_cast<size_t>(problem->block);
  problem->weights.assign(problem->values.size(), 1.0);
  for (size_t i = 0; i < problem->values.size(); ++i) {
    if (problem->search == Search::importance) {
      problem->weights[i] = problem->importance[i % problem->importance.size()];
    } else if (problem->search == Search::square) {
      const size_t start = i / block * block;
      const float absmax = largest(problem->values, start, std::min(problem->values.size(), start + block));
      const double share = problem->values[i] / double{std::max(kSmallest, absmax)};
      problem->weights[i] = share * share;
    }
  }
}

// Of a matrix's columns; some do not count at all.
std::vector<float> random_importance(Random& random) {
  std::vector<float> importance(static_cast<size_t>(random.one_in(2) ? random.between(1, 40) : random.between(1, 900)));
  const double scale = std::pow(10.0, static_cast<double>(random.between(-6, 6)));
  const bool holes = random.one_in(2);
  for (float& value : importance) value = static_cast<float>(scale * random.uniform());
  for (float& value : importance) value = holes && random.one_in(3) ? 0.0F : value;
  return importance;
}

Problem random_problem(Random& random, Search search) {
  Problem problem;
  problem.search = search;
  problem.count = random.between(1, 1500);
  problem.block = int64_t{32} << random.below(8);
  std::vector<double> tensor = random_values(random, problem.count, random.pick<Magnitude>({{0, 0}, {-3, 0}, {0, 3}}));
  if (random.one_in(3)) {
    std::fill(tensor.begin(), tensor.begin() + std::min<int64_t>(problem.count, problem.block), 0.0);
  }
  problem.x = encode(std::move(tensor), random.pick<DType>({DType::f32, DType::f16, DType::bf16}), random.below(8));
  problem.values = floats_of(problem.x);
  problem.codes = random_codebook(random);
  problem.codebook = Input::of(problem.codes, random.below(4));
  if (search == Search::importance) problem.importance = random_importance(random);
  problem.importance_in = Input::of(problem.importance, random.below(4));
  find_weights(&problem);
  return problem;
}

// Weighed error of elements [start, end) of one block under the rule with this scale.
double error_of(const Problem& problem, size_t start, size_t end, const Sorted& sorted, float scale) {
  double error = 0.0;
  for (size_t i = start; i < end; ++i) {
    const double off =
        problem.values[i] - double{sorted.code[sorted.rank(clamped(problem.values[i] * (1.0F / scale)))]} * scale;
    error += problem.weights[i] * off * off;
  }
  return error;
}

// The least error over the candidates, each with the least-squares scale of its own codes.
double best_error(const Problem& problem, size_t start, size_t end, const Sorted& sorted, float absmax, double energy) {
  double best = error_of(problem, start, end, sorted, absmax);
  for (int candidate = 0; candidate <= 32; ++candidate) {
    const float scale = absmax * (0.5F + static_cast<float>(candidate) / 64.0F);
    double dot = 0.0, square = 0.0;
    for (size_t i = start; i < end; ++i) {
      const double code = sorted.code[sorted.rank(clamped(problem.values[i] * (1.0F / scale)))];
      dot += problem.weights[i] * problem.values[i] * code;
      square += problem.weights[i] * code * code;
    }
    if (square > 0.0 && dot > 0.0) best = std::min(best, energy - dot * dot / square);
  }
  return best;
}

void check_scales(Run& run, const Problem& problem, const Output& packed, const float* scales,
                  const std::string& what) {
  const Sorted sorted(problem.codes);
  const auto block = static_cast<size_t>(problem.block);
  expect(run, equal(packed, packed_by_rule(problem.values, block, sorted, scales)), what,
         "other codes than its scales give");
  for (size_t start = 0; start < problem.values.size(); start += block) {
    const size_t end = std::min(problem.values.size(), start + block);
    const float absmax = std::max(kSmallest, largest(problem.values, start, end));
    double energy = 0.0;
    for (size_t i = start; i < end; ++i) energy += problem.weights[i] * problem.values[i] * problem.values[i];
    const double slack = (6.0 * static_cast<double>(end - start + 9) + 12.0) * 0x1p-24 * energy;
    const double error = error_of(problem, start, end, sorted, scales[start / block]);
    if (!(error <= best_error(problem, start, end, sorted, absmax, energy) + slack)) {
      return run.report.fail(what, format("block %zu is not of least error", start / block));
    }
  }
}

struct Quantized {
  std::unique_ptr<Output> packed, scales;

  bool same(const Quantized& other) const { return packed->same(*other.packed) && scales->same(*other.scales); }
};

Quantized quantize(Run& run, const Problem& problem, const KernelTable& table, int threads, const std::string& what) {
  Quantized result{std::make_unique<Output>((problem.count + 1) / 2, 1, 1),
                   std::make_unique<Output>(divide_up(problem.count, problem.block), 4, 1)};
  Quantize4Args args;
  args.x = problem.x.memory.as<void>();
  args.dtype = problem.x.dtype;
  args.count = problem.count;
  args.block_size = problem.block;
  args.codebook = problem.codebook.as<float>();
  args.search = problem.search;
  args.importance = problem.search == Search::importance ? problem.importance_in.as<float>() : nullptr;
  args.columns = static_cast<int64_t>(problem.importance.size());
  args.packed = result.packed->as<uint8_t>();
  args.absmax = result.scales->as<float>();
  args.threads = threads;
  expect(run, check(args).ok(), what, "its arguments are refused");
  expect(run, table.quantize_4bit(args).ok(), what, "fails");
  expect(run, result.packed->guards_intact() && result.scales->guards_intact(), what, "writes outside its outputs");
  return result;
}

void search_case(Run& run, const Problem& problem) {
  for (const KernelTable* table : run.tables) {
    Quantized first;
    for (int threads = 1; threads <= 3; ++threads) {
      const std::string what = format("%s: %s, %d threads", table->isa, problem.describe().c_str(), threads);
      Quantized found = quantize(run, problem, *table, threads, what);
      if (threads > 1) {
        expect(run, found.same(first), what, "other bits than one thread");
        continue;
      }
      check_scales(run, problem, *found.packed, found.scales->as<float>(), what);
      first = std::move(found);
    }
    run.report.checked(table->isa);
  }
}

// Whole blocks only: the sums over a partial one take another way.
void equal_importance_case(Run& run, Random& random) {
  Problem problem = random_problem(random, Search::mse);
  problem.count = random.between(1, 4) * problem.block;
  problem.x = encode(random_values(random, problem.count, {0, 0}), problem.x.dtype, random.below(8));
  Problem alike;
  alike.x = encode(problem.x.exact, problem.x.dtype, 0);
  alike.count = problem.count;
  alike.block = problem.block;
  alike.codes = problem.codes;
  alike.codebook = Input::of(alike.codes, 0);
  alike.search = Search::importance;
  alike.importance.assign(static_cast<size_t>(random.between(1, 100)), 1.0F);
  alike.importance_in = Input::of(alike.importance, 1);
  for (const KernelTable* table : run.tables) {
    const std::string what = format("%s: %s, all alike", table->isa, alike.describe().c_str());
    const Quantized plain = quantize(run, problem, *table, 1, what), weighed = quantize(run, alike, *table, 2, what);
    expect(run, weighed.same(plain), what, "other bits than mse");
    run.report.checked(table->isa);
  }
}

void refused_arguments(Run& run) {
  const float ones[16] = {1.0F};
  uint8_t packed[16];
  float absmax[1];
  Quantize4Args good;
  good.x = ones;
  good.count = 16;
  good.codebook = good.importance = ones;
  good.columns = 16;
  good.search = Search::importance;
  good.packed = packed;
  good.absmax = absmax;
  const auto refused = [&](const char* argument, const Quantize4Args& args) {
    const Status status = check(args);
    expect(run, status.code == Code::bad_argument && std::string(argument) == status.what,
           format("quantize_4bit with a bad %s", argument), "is not refused");
  };
  expect(run, check(good).ok(), "quantize_4bit with an importance", "its arguments are refused");
  Quantize4Args bad = good;
  bad.importance = nullptr;
  refused("importance", bad);
  for (const int64_t columns : {int64_t{0}, int64_t{-3}}) {
    bad = good;
    bad.columns = columns;
    refused("columns", bad);
  }
  for (const int search : {-1, 4}) {
    bad = good;
    bad.search = static_cast<Search>(search);
    refused("search", bad);
  }
}

}  // namespace

void test_searches(Run& run) {
  refused_arguments(run);
  for (int64_t index = 0; index < run.cases; ++index) {
    Random random(run.seed * 1000003 + static_cast<uint64_t>(index));
    for (const Search search : {Search::mse, Search::square, Search::importance}) {
      search_case(run, random_problem(random, search));
    }
    equal_importance_case(run, random);
  }
}

}  // namespace nybble::test
