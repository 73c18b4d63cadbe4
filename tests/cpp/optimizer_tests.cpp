// adamw_32bit, adamw_8bit and sum_of_squares against a reference in double.
//
// A double holds the product of two floats exactly, and has more than twice the digits of a float and two besides, so
// that a sum, a quotient or a root that is rounded to double and then to float is the one that is rounded to float at
// once. So the reference is the rule of kernels.h in double, each operation rounded to fp32, and the kernels must give
// its bits.
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <memory>
#include <utility>

#include "codec_rule.h"
#include "core/check.h"
#include "numbers.h"
#include "support.h"

namespace nybble::test {

namespace {

double f32(double value) { return rounded(value, DType::f32); }

// The dynamic maps as dynamic_maps.py describes them. An entry may be a unit off: the kernels are given these same
// ones.
std::vector<float> dynamic_map(bool with_sign) {
  std::vector<float> map = {0.0F, 1.0F};
  for (int i = 0; i < 7; ++i) {
    const int steps = 1 << (with_sign ? i : i + 1);
    for (int j = 0; j < steps; ++j) {
      const double middle = 0.1 + 0.9 * (j + 0.5) / steps;
      const auto value = static_cast<float>(std::pow(10.0, i - 6) * middle);
      map.push_back(value);
      if (with_sign) map.push_back(-value);
    }
  }
  std::sort(map.begin(), map.end());
  return map;
}

AdamWRule random_rule(Random& random) {
  const double beta1 = random.pick<double>({0.9, 0.0, 0.95}), beta2 = random.pick<double>({0.999, 0.5, 0.0});
  const double lr = random.pick<double>({1e-3, 0.0, 1.0, 1e-6});
  const auto step = static_cast<double>(random.between(1, 1000));
  AdamWRule rule;
  rule.grad_scale = random.pick<float>({1.0F, 0.37F, 0.0F});
  rule.beta1 = static_cast<float>(beta1);
  rule.rest1 = static_cast<float>(1.0 - beta1);
  rule.beta2 = static_cast<float>(beta2);
  rule.rest2 = static_cast<float>(1.0 - beta2);
  rule.decay = static_cast<float>(1.0 - lr * random.pick<double>({0.0, 0.1}));
  rule.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, step)));
  rule.root_scale = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, step)));
  rule.eps = random.pick<float>({1e-8F, 1e-3F, 1e-30F});
  return rule;
}

struct Element {
  double param, m, v;
};

Element updated(const AdamWRule& rule, Element old, double grad) {
  const double g = f32(grad * rule.grad_scale);
  Element now;
  now.m = f32(f32(rule.beta1 * old.m) + f32(rule.rest1 * g));
  now.v = f32(f32(rule.beta2 * old.v) + f32(f32(rule.rest2 * g) * g));
  const double denominator = f32(f32(f32(std::sqrt(now.v)) * rule.root_scale) + rule.eps);
  now.param = f32(f32(old.param * rule.decay) - f32(f32(rule.step_size * now.m) / denominator));
  return now;
}

// The bf16 number that a hash of key and index picks of the two next to it.
double picked(double value, uint64_t key, int64_t index) {
  if (!std::isfinite(value)) return value;
  auto x = static_cast<uint32_t>(index) ^ static_cast<uint32_t>(key);
  x = (x ^ (x >> 16)) * 0x7FEB352DU + static_cast<uint32_t>(key >> 32) + static_cast<uint32_t>(index >> 32);
  x = (x ^ (x >> 15)) * 0x846CA68BU;
  x = (x ^ (x >> 16)) * 0x7FEB352DU;
  // |value| is between two neighbours; of the 65536 steps between them it has gone so many.
  const int exponent = std::max(std::fabs(value) > 0.0 ? std::ilogb(value) : -126, -126);
  const double gap = std::ldexp(1.0, exponent - 7), size = std::fabs(value);
  const double below = std::floor(size / gap) * gap, gone = (size - below) / gap * 65536.0;
  const double chosen = gone + static_cast<double>(x >> 16) >= 65536.0 ? below + gap : below;
  return std::copysign(rounded(chosen, DType::bf16), value);
}

struct Problem {
  int64_t count = 0;
  DType dtype = DType::f32, grad_dtype = DType::f32;
  AdamWRule rule;
  bool stochastic = false;
  uint64_t key = 0;
  int64_t block_size = 32;
  int64_t shift = 0;  // of the outputs, from an aligned address
  Values param, grad;
  std::vector<float> m, v;          // for 32 bits
  std::vector<float> m_map, v_map;  // for 8 bits
  std::vector<uint8_t> m_codes, v_codes;
  std::vector<float> m_absmax, v_absmax;
  Input m_map_in, v_map_in;

  int64_t blocks() const { return divide_up(count, block_size); }
  std::string describe() const {
    return format("%lld elements, %s, gradient %s, block %lld%s", (long long)count, name_of(dtype), name_of(grad_dtype),
                  (long long)block_size, stochastic ? ", stochastic" : "");
  }
  double stored(double param_value, int64_t index) const {
    return stochastic ? picked(param_value, key, index) : rounded(param_value, dtype);
  }
};

int64_t random_count(Random& random) {
  if (random.one_in(3)) return random.pick<int64_t>({0, 1, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 65536, 65701});
  return random.between(0, 400);
}

Problem random_problem(Random& random) {
  const std::vector<DType> dtypes = {DType::f32, DType::f16, DType::bf16};
  Problem problem;
  const int64_t n = problem.count = random_count(random);
  problem.dtype = random.pick(dtypes);
  problem.grad_dtype = random.pick(dtypes);
  problem.rule = random_rule(random);
  problem.stochastic = problem.dtype == DType::bf16 && random.one_in(2);
  problem.key = random.next();
  problem.block_size = random.pick<int64_t>({32, 256, 4096});
  problem.shift = random.below(8);
  const auto sizes = random.pick<Magnitude>({{0, 0}, {-3, 0}, {-2, 2}});
  problem.param = encode(random_values(random, n, {0, 0}), problem.dtype, random.below(8));
  problem.grad = encode(random_values(random, n, sizes), problem.grad_dtype, random.below(8));
  const std::vector<double> m = random_values(random, n, random.one_in(4) ? Magnitude{-40, 3} : sizes);
  const std::vector<double> v = random_values(random, n, random.one_in(4) ? Magnitude{-38, 5} : Magnitude{-2, 1});
  problem.m_map = dynamic_map(true);
  problem.v_map = dynamic_map(false);
  for (size_t i = 0; i < m.size(); ++i) {
    problem.m.push_back(random.one_in(8) ? 0.0F : static_cast<float>(m[i]));
    problem.v.push_back(random.one_in(8) ? 0.0F : static_cast<float>(std::fabs(v[i])));
    problem.m_codes.push_back(static_cast<uint8_t>(random.below(256)));
    problem.v_codes.push_back(static_cast<uint8_t>(random.below(256)));
  }
  for (int64_t block = 0; block < problem.blocks(); ++block) {
    problem.m_absmax.push_back(static_cast<float>(0.01 + random.uniform()));
    problem.v_absmax.push_back(random.one_in(4) ? kSmallest : static_cast<float>(random.uniform()) + kSmallest);
  }
  problem.m_map_in = Input::of(problem.m_map, random.below(4));
  problem.v_map_in = Input::of(problem.v_map, random.below(4));
  return problem;
}

// ---- what a step leaves -------------------------------------------------------------------------------------------

struct Memory {
  Output param, m, v, m_absmax, v_absmax;

  Memory(const Problem& problem, bool eight_bits)
      : param(problem.count, size_of(problem.dtype), problem.shift),
        m(problem.count, eight_bits ? 1 : 4, problem.shift),
        v(problem.count, eight_bits ? 1 : 4, problem.shift + 1),
        m_absmax(eight_bits ? problem.blocks() : 0, 4, problem.shift),
        v_absmax(eight_bits ? problem.blocks() : 0, 4, problem.shift) {
    fill(&param, problem.param.memory.as<uint8_t>());
    if (eight_bits) {
      fill(&m, problem.m_codes.data());
      fill(&v, problem.v_codes.data());
      fill(&m_absmax, problem.m_absmax.data());
      fill(&v_absmax, problem.v_absmax.data());
    } else {
      fill(&m, problem.m.data());
      fill(&v, problem.v.data());
    }
  }
  static void fill(Output* output, const void* from) {
    if (output->size() > 0) std::memcpy(output->as<uint8_t>(), from, output->size());
  }
  bool guards_intact() const {
    return param.guards_intact() && m.guards_intact() && v.guards_intact() && m_absmax.guards_intact() &&
           v_absmax.guards_intact();
  }
  AdamWArgs args(const Problem& problem, int threads) {
    AdamWArgs result;
    result.param = param.as<void>();
    result.dtype = problem.dtype;
    result.grad = problem.grad.memory.as<void>();
    result.grad_dtype = problem.grad_dtype;
    result.count = problem.count;
    result.rule = problem.rule;
    result.stochastic = problem.stochastic;
    result.key = problem.key;
    result.threads = threads;
    return result;
  }
  AdamW32Args args32(const Problem& problem, int threads) {
    return {args(problem, threads), m.as<float>(), v.as<float>()};
  }
  AdamW8Args args8(const Problem& problem, int threads) {
    AdamW8Args result;
    result.common = args(problem, threads);
    result.block_size = problem.block_size;
    result.m_map = problem.m_map_in.as<float>();
    result.v_map = problem.v_map_in.as<float>();
    result.m = m.as<uint8_t>();
    result.v = v.as<uint8_t>();
    result.m_absmax = m_absmax.as<float>();
    result.v_absmax = v_absmax.as<float>();
    return result;
  }
  double param_at(int64_t i, DType dtype) const { return decode(param.bytes() + i * size_of(dtype), dtype); }
};

// Equal as numbers, and zeros with the same sign.
bool same(double a, double b) { return a == b && std::signbit(a) == std::signbit(b); }

struct Expected {
  std::vector<double> param;
  std::vector<float> m, v;
  std::vector<uint8_t> m_codes, v_codes;
  std::vector<float> m_absmax, v_absmax;
};

Expected expected32(const Problem& problem) {
  Expected result;
  for (size_t i = 0; i < problem.m.size(); ++i) {
    const Element now =
        updated(problem.rule, {problem.param.exact[i], problem.m[i], problem.v[i]}, problem.grad.exact[i]);
    result.param.push_back(problem.stored(now.param, static_cast<int64_t>(i)));
    result.m.push_back(static_cast<float>(now.m));
    result.v.push_back(static_cast<float>(now.v));
  }
  return result;
}

std::vector<uint8_t> codes_by_rule(const std::vector<float>& x, size_t start, float absmax, const Sorted& map,
                                   bool above_zero) {
  std::vector<uint8_t> codes;
  for (size_t i = start; i < x.size(); ++i) {
    const float s = clamped(x[i] * (1.0F / absmax));
    const size_t rank = map.rank(s);
    codes.push_back(static_cast<uint8_t>(above_zero && s > 0.0F ? std::max<size_t>(rank, 1) : rank));
  }
  return codes;
}

// Blocks whose moments would not be finite stay; `bad` becomes the first of them, or -1.
Expected expected8(const Problem& problem, int64_t* bad) {
  const Sorted m_map(problem.m_map), v_map(problem.v_map);
  Expected result;
  *bad = -1;
  for (int64_t block = 0; block < problem.blocks(); ++block) {
    const auto start = static_cast<size_t>(block * problem.block_size);
    const auto end = static_cast<size_t>(std::min(problem.count, (block + 1) * problem.block_size));
    bool finite = true;
    for (size_t i = start; i < end; ++i) {
      const double m = f32(double{problem.m_map[problem.m_codes[i]]} * problem.m_absmax[static_cast<size_t>(block)]);
      const double v = f32(double{problem.v_map[problem.v_codes[i]]} * problem.v_absmax[static_cast<size_t>(block)]);
      const Element now = updated(problem.rule, {problem.param.exact[i], m, v}, problem.grad.exact[i]);
      result.param.push_back(problem.stored(now.param, static_cast<int64_t>(i)));
      result.m.push_back(static_cast<float>(now.m));
      result.v.push_back(static_cast<float>(now.v));
      finite = finite && std::isfinite(now.m) && std::isfinite(now.v);
    }
    if (!finite) {
      if (*bad < 0) *bad = block;
      for (size_t i = start; i < end; ++i) result.param[i] = problem.param.exact[i];
      result.m_codes.insert(result.m_codes.end(), problem.m_codes.begin() + start, problem.m_codes.begin() + end);
      result.v_codes.insert(result.v_codes.end(), problem.v_codes.begin() + start, problem.v_codes.begin() + end);
      result.m_absmax.push_back(problem.m_absmax[static_cast<size_t>(block)]);
      result.v_absmax.push_back(problem.v_absmax[static_cast<size_t>(block)]);
      continue;
    }
    result.m_absmax.push_back(std::max(kSmallest, largest(result.m, start, end)));
    result.v_absmax.push_back(std::max(kSmallest, largest(result.v, start, end)));
    for (const uint8_t code : codes_by_rule(result.m, start, result.m_absmax.back(), m_map, false)) {
      result.m_codes.push_back(code);
    }
    for (const uint8_t code : codes_by_rule(result.v, start, result.v_absmax.back(), v_map, true)) {
      result.v_codes.push_back(code);
    }
  }
  return result;
}

void check_param(Run& run, const Problem& problem, const Memory& memory, const Expected& expected,
                 const std::string& what) {
  for (int64_t i = 0; i < problem.count; ++i) {
    const double found = memory.param_at(i, problem.dtype), right = expected.param[static_cast<size_t>(i)];
    if (!same(found, right) && !(std::isnan(found) && std::isnan(right))) {
      return run.report.fail(what, format("parameter %lld is %.9g, not %.9g", (long long)i, found, right));
    }
  }
}

void step_case(Run& run, Random& random, const Problem& problem) {
  const Expected right32 = expected32(problem);
  int64_t bad = -1;
  const Expected right8 = expected8(problem, &bad);
  const int threads = static_cast<int>(random.between(1, 3));
  for (const KernelTable* table : run.tables) {
    const std::string isa = format("%s: ", table->isa), more = format(", %d threads", threads);
    if (bad < 0) {
      const std::string what = isa + "adamw_32bit " + problem.describe() + more;
      Memory memory(problem, false);
      const AdamW32Args args = memory.args32(problem, threads);
      expect(run, check(args).ok(), what, "its arguments are refused");
      expect(run, table->adamw_32bit(args).ok(), what, "fails");
      check_param(run, problem, memory, right32, what);
      expect(run, equal(memory.m, right32.m) && equal(memory.v, right32.v), what, "other moments");
      expect(run, memory.guards_intact(), what, "writes outside its outputs");
    }
    const std::string what = isa + "adamw_8bit " + problem.describe() + more;
    Memory memory(problem, true);
    const AdamW8Args args = memory.args8(problem, threads);
    expect(run, check(args).ok(), what, "its arguments are refused");
    const Status status = table->adamw_8bit(args);
    expect(run, bad < 0 ? status.ok() : status.code == Code::non_finite && status.value == bad, what, "other status");
    check_param(run, problem, memory, right8, what);
    expect(run, equal(memory.m, right8.m_codes) && equal(memory.v, right8.v_codes), what, "other codes");
    expect(run, equal(memory.m_absmax, right8.m_absmax) && equal(memory.v_absmax, right8.v_absmax), what,
           "other scales");
    expect(run, memory.guards_intact(), what, "writes outside its outputs");
    run.report.checked(table->isa);
  }
}

void spoiled_gradient(Run& run, Random& random) {
  Problem problem = random_problem(random);
  std::vector<double> grad = problem.grad.exact;
  for (int64_t i = 0; i < std::min<int64_t>(2, problem.count); ++i) {
    grad[static_cast<size_t>(random.below(problem.count))] = random.pick<double>({NAN, INFINITY, -INFINITY});
  }
  problem.grad = encode(grad, problem.grad_dtype, 1);
  problem.rule.grad_scale = 1.0F;
  step_case(run, random, problem);
}

// ---- the norm, the arguments --------------------------------------------------------------------------------------

void squares_case(Run& run, Random& random) {
  const int64_t count = random.one_in(4) ? random.between(65000, 140000) : random.between(0, 9000);
  const DType dtype = random.pick<DType>({DType::f32, DType::f16, DType::bf16});
  const Values x = encode(random_values(random, count, {0, 2}), dtype, random.below(8));
  const int64_t sums = divide_up(count, kSquaresRun);
  std::vector<double> exact(static_cast<size_t>(sums));
  for (size_t i = 0; i < x.exact.size(); ++i) exact[i / kSquaresRun] += x.exact[i] * x.exact[i];
  std::unique_ptr<Output> first;
  for (const KernelTable* table : run.tables) {
    const std::string what = format("%s: sum_of_squares of %lld %s", table->isa, (long long)count, name_of(dtype));
    auto found = std::make_unique<Output>(sums, 8, random.below(4));
    SquaresArgs args;
    args.x = x.memory.as<void>();
    args.dtype = dtype;
    args.count = count;
    args.sums = found->as<double>();
    args.threads = static_cast<int>(random.between(1, 3));
    expect(run, check(args).ok(), what, "its arguments are refused");
    expect(run, table->sum_of_squares(args).ok(), what, "fails");
    expect(run, found->guards_intact(), what, "writes outside its output");
    for (int64_t i = 0; i < sums; ++i) {
      // 256 squares are added in fp32, and each is rounded.
      const double right = exact[static_cast<size_t>(i)], bound = 257.5 * 0x1p-24 * right + 65536.0 * 0x1p-149;
      expect(run, std::fabs(found->as<double>()[i] - right) <= bound, what, "is wrong");
    }
    if (first == nullptr)
      first = std::move(found);
    else
      expect(run, found->same(*first), what, "other bits than another ISA's");
  }
}

void refused_arguments(Run& run) {
  uint8_t bytes[64] = {};
  float floats[64] = {};
  AdamW8Args good;
  good.common.param = floats;
  good.common.grad = floats;
  good.common.count = 64;
  good.block_size = 32;
  good.m_map = good.v_map = floats;
  good.m = good.v = bytes;
  good.m_absmax = good.v_absmax = floats;
  expect(run, check(good).ok(), "adamw_8bit", "its arguments are refused");
  const auto refused = [&](const char* argument, const auto& spoil) {
    AdamW8Args bad = good;
    spoil(&bad);
    const Status status = check(bad);
    expect(run, status.code == Code::bad_argument && std::string(argument) == status.what,
           format("adamw_8bit with a bad %s", argument), "is not refused");
  };
  refused("param", [](AdamW8Args* args) { args->common.param = nullptr; });
  refused("grad", [](AdamW8Args* args) { args->common.grad = nullptr; });
  refused("count", [](AdamW8Args* args) { args->common.count = -1; });
  refused("dtype", [](AdamW8Args* args) { args->common.dtype = static_cast<DType>(3); });
  refused("grad.dtype", [](AdamW8Args* args) { args->common.grad_dtype = static_cast<DType>(-1); });
  refused("stochastic", [](AdamW8Args* args) { args->common.stochastic = true; });
  refused("threads", [](AdamW8Args* args) { args->common.threads = 0; });
  refused("block_size", [](AdamW8Args* args) { args->block_size = 33; });
  refused("block_size", [](AdamW8Args* args) { args->block_size = 8192; });
  refused("m", [](AdamW8Args* args) { args->m = nullptr; });
  refused("v", [](AdamW8Args* args) { args->v = nullptr; });
  refused("m_absmax", [](AdamW8Args* args) { args->m_absmax = nullptr; });
  refused("v_absmax", [](AdamW8Args* args) { args->v_absmax = nullptr; });
  refused("m_map", [](AdamW8Args* args) { args->m_map = nullptr; });
  refused("v_map", [](AdamW8Args* args) { args->v_map = nullptr; });
  // Maps that the buckets cannot tell apart: midpoints too close to 0, to each other, or beyond 1.
  const std::vector<float> m_map = dynamic_map(true), v_map = dynamic_map(false);
  for (const KernelTable* table : run.tables) {
    const auto refused_map = [&](std::initializer_list<std::pair<size_t, float>> changes) {
      std::vector<float> other = m_map;
      for (const auto& [place, entry] : changes) other[place] = entry;
      AdamW8Args bad = good;
      bad.m_map = other.data();
      bad.v_map = v_map.data();
      const Status status = table->adamw_8bit(bad);
      expect(run, status.code == Code::bad_argument && std::string("m_map") == status.what,
             format("%s: adamw_8bit with a bad m_map", table->isa), "is not refused");
    };
    refused_map({{128, 1e-8F}});
    refused_map({{255, 1e10F}});
    refused_map({{201, m_map[200] * (1.0F + 0x1p-20F)}, {202, m_map[200] * (1.0F + 0x1p-19F)}});
  }
}

}  // namespace

void test_optimizer(Run& run) {
  refused_arguments(run);
  for (int64_t index = 0; index < run.cases; ++index) {
    Random random(run.seed * 1000033 + static_cast<uint64_t>(index));
    step_case(run, random, random_problem(random));
    squares_case(run, random);
    if (index % 5 == 0) spoiled_gradient(run, random);
  }
}

}  // namespace nybble::test
