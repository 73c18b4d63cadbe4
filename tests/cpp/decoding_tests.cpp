// A few rows times a dense matrix, and attention of one token over a cache, against a double-precision reference.
//
// u = 2^-24, gamma_n = n u / (1 - n u); a result is then rounded to its dtype.
//
// dense_few        sums of cols products: gamma_(cols + 2) of the sum of their magnitudes.
// attention_step   A score is off by e = gamma_(depth + 6) of the sum of its products' magnitudes, where the rotated
//                  query is bounded by the sum of the pair that it is made of; so a weight is off by a factor within
//                  exp(2 e) (1 + gamma_(keys + 14)), and the result by twice that of sum p |v|.
#include <cmath>

#include "core/check.h"
#include "numbers.h"

namespace nybble::test {

namespace {

constexpr double kUnit = 0x1p-24;

double gamma_of(double n) { return n * kUnit / (1.0 - n * kUnit); }

const std::vector<DType> kDtypes = {DType::f32, DType::f16, DType::bf16};

Values random_of(Random& random, int64_t count, DType dtype) {
  return encode(random_values(random, count, {}), dtype, random.between(0, 3));
}

bool within(double found, double exact, double bound, DType dtype) {
  const double rounding = dtype == DType::f32 ? 0.0 : unit_roundoff(dtype) * (std::fabs(exact) + bound);
  return std::fabs(found - exact) <= bound + rounding + smallest_error(dtype);
}

template <class Args>
bool run_checked(Run& run, Status (*kernel)(const Args&), const Args& args, const std::string& what) {
  if (!check(args).ok()) {
    run.report.fail(what, "its arguments are refused");
    return false;
  }
  const Status status = kernel(args);
  if (!status.ok()) run.report.fail(what, "it returned an error");
  return status.ok();
}

void dense_case(Run& run, Random& random, const KernelTable& table, int64_t number) {
  DenseArgs args;
  args.m = random.between(1, kMostDenseRows);
  args.rows = random.between(1, 150);
  args.cols = random.between(1, 200);
  args.dtype = random.pick(kDtypes);
  args.weight_dtype = random.pick(kDtypes);
  args.out_dtype = random.pick(kDtypes);
  args.x.stride = args.cols + random.between(0, 4);
  const Values x = random_of(random, (args.m - 1) * args.x.stride + args.cols, args.dtype);
  const Values weight = random_of(random, args.rows * args.cols, args.weight_dtype);
  const Values bias = random_of(random, args.rows, args.bias_dtype);
  args.x.data = x.memory.as<uint8_t>();
  args.weight = weight.memory.as<uint8_t>();
  if (random.one_in(2)) args.bias = bias.memory.as<uint8_t>();
  const std::string what = format("dense_few, case %lld, %s", static_cast<long long>(number), table.isa);
  Output first(args.m * args.rows, size_of(args.out_dtype), random.between(0, 3));
  for (const int threads : {1, 3}) {
    Output out(args.m * args.rows, size_of(args.out_dtype), random.between(0, 3));
    args.out = out.as<uint8_t>();
    args.threads = threads;
    if (!run_checked(run, table.dense_few, args, what)) return;
    if (!out.guards_intact()) return run.report.fail(what, "it wrote outside");
    if (threads == 1) {
      std::memcpy(first.as<uint8_t>(), out.bytes(), out.size());
    } else if (!out.same(first)) {
      return run.report.fail(what, "other bits with another number of threads");
    }
  }
  for (int64_t m = 0; m < args.m; ++m) {
    for (int64_t row = 0; row < args.rows; ++row) {
      double exact = args.bias == nullptr ? 0.0 : bias.exact[static_cast<size_t>(row)];
      double size = std::fabs(exact);
      for (int64_t i = 0; i < args.cols; ++i) {
        const double product = x.exact[static_cast<size_t>(m * args.x.stride + i)] *
                               weight.exact[static_cast<size_t>(row * args.cols + i)];
        exact += product;
        size += std::fabs(product);
      }
      const double found = decode(first.bytes() + (m * args.rows + row) * size_of(args.out_dtype), args.out_dtype);
      if (!within(found, exact, gamma_of(static_cast<double>(args.cols + 2)) * size, args.out_dtype)) {
        return run.report.fail(what, format("row %lld, column %lld: %.9g, expected %.9g", static_cast<long long>(m),
                                            static_cast<long long>(row), found, exact));
      }
    }
  }
}

struct StepCase {
  AttentionStepArgs args;
  int64_t slots;
  Values query, key, value, cos, sin, keys, values;
  std::vector<int64_t> first;

  int64_t kv_heads() const { return args.heads / args.group; }
};

StepCase step_case(Random& random) {
  StepCase c;
  AttentionStepArgs& args = c.args;
  args.batch = random.between(1, 3);
  args.group = random.between(1, 3);
  args.heads = args.group * random.between(1, 2);
  args.depth = 2 * random.between(1, 40);
  args.slot = random.one_in(4) ? random.between(250, 600) : random.between(0, 40);
  args.dtype = random.pick(kDtypes);
  args.table_dtype = random.pick(kDtypes);
  args.scale = 1.0F / std::sqrt(static_cast<float>(args.depth));
  c.slots = args.slot + random.between(1, 3);
  args.query_stride = args.heads * args.depth;
  args.key_stride = args.value_stride = c.kv_heads() * args.depth;
  args.head_stride = c.slots * args.depth;
  args.batch_stride = c.kv_heads() * args.head_stride;
  c.query = random_of(random, args.batch * args.query_stride, args.dtype);
  c.key = random_of(random, args.batch * args.key_stride, args.dtype);
  c.value = random_of(random, args.batch * args.value_stride, args.dtype);
  c.keys = random_of(random, args.batch * args.batch_stride, args.dtype);
  c.values = random_of(random, args.batch * args.batch_stride, args.dtype);
  std::vector<double> cosines, sines;
  for (int64_t i = 0; i < args.batch * args.depth; ++i) {
    const double angle = 3.0 * random.normal();
    cosines.push_back(std::cos(angle));
    sines.push_back(std::sin(angle));
  }
  c.cos = encode(cosines, args.table_dtype, 0);
  c.sin = encode(sines, args.table_dtype, 0);
  for (int64_t row = 0; row < args.batch; ++row) c.first.push_back(random.between(0, args.slot));
  args.query = c.query.memory.as<uint8_t>();
  args.key = c.key.memory.as<uint8_t>();
  args.value = c.value.memory.as<uint8_t>();
  if (random.one_in(2)) {
    args.cos = c.cos.memory.as<uint8_t>();
    args.sin = c.sin.memory.as<uint8_t>();
  }
  args.first = c.first.data();
  return c;
}

// Element i of a rotated head; *size: of what it is the sum of.
double rotated(const StepCase& c, const std::vector<double>& x, int64_t start, int64_t batch, int64_t i, double* size) {
  const int64_t half = c.args.depth / 2;
  const double own = x[static_cast<size_t>(start + i)];
  *size = std::fabs(own);
  if (c.args.cos == nullptr) return own;
  const auto at = static_cast<size_t>(batch * c.args.depth + i);
  const double other = i < half ? -x[static_cast<size_t>(start + i + half)] : x[static_cast<size_t>(start + i - half)];
  *size = std::fabs(own * c.cos.exact[at]) + std::fabs(other * c.sin.exact[at]);
  return own * c.cos.exact[at] + other * c.sin.exact[at];
}

// The slots of keys and values that a call leaves, as numbers; `bytes` holds all of them.
std::vector<double> decoded(const uint8_t* bytes, int64_t count, DType dtype) {
  std::vector<double> all(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) all[static_cast<size_t>(i)] = decode(bytes + i * size_of(dtype), dtype);
  return all;
}

// What was kept: the new key and value in their slot, all else as it was. Returns what is wrong.
std::string wrong_slots(const StepCase& c, const std::vector<double>& keys, const std::vector<double>& values) {
  const AttentionStepArgs& args = c.args;
  for (int64_t batch = 0; batch < args.batch; ++batch) {
    for (int64_t head = 0; head < c.kv_heads(); ++head) {
      for (int64_t slot = 0; slot < c.slots; ++slot) {
        for (int64_t i = 0; i < args.depth; ++i) {
          const auto at =
              static_cast<size_t>(batch * args.batch_stride + head * args.head_stride + slot * args.depth + i);
          double key = c.keys.exact[at], value = c.values.exact[at], bound = 0.0;
          if (slot == args.slot) {
            const int64_t start = batch * args.key_stride + head * args.depth;
            double size = 0.0;
            key = rotated(c, c.key.exact, start, batch, i, &size);
            value = c.value.exact[static_cast<size_t>(start + i)];
            bound = gamma_of(3) * size + unit_roundoff(args.dtype) * (std::fabs(key) + size * gamma_of(3));
            bound += smallest_error(args.dtype);
          }
          if (std::fabs(keys[at] - key) > bound || values[at] != value) {
            return format("slot %lld of head %lld: key %.9g, expected %.9g; value %.9g, expected %.9g",
                          static_cast<long long>(slot), static_cast<long long>(head), keys[at], key, values[at], value);
          }
        }
      }
    }
  }
  return "";
}

std::string wrong_output(const StepCase& c, const std::vector<double>& keys, const std::vector<double>& values,
                         const uint8_t* out) {
  const AttentionStepArgs& args = c.args;
  for (int64_t batch = 0; batch < args.batch; ++batch) {
    const int64_t begin = c.first[static_cast<size_t>(batch)], count = args.slot + 1 - begin;
    for (int64_t head = 0; head < args.heads; ++head) {
      const int64_t slots = batch * args.batch_stride + head / args.group * args.head_stride + begin * args.depth;
      std::vector<double> scores(static_cast<size_t>(count));
      double most = -INFINITY, off = 0.0;
      for (int64_t j = 0; j < count; ++j) {
        double score = 0.0, magnitude = 0.0;
        for (int64_t i = 0; i < args.depth; ++i) {
          double size = 0.0;
          const int64_t start = batch * args.query_stride + head * args.depth;
          const double q = rotated(c, c.query.exact, start, batch, i, &size);
          const double k = keys[static_cast<size_t>(slots + j * args.depth + i)];
          score += q * k;
          magnitude += size * std::fabs(k);
        }
        scores[static_cast<size_t>(j)] = score * static_cast<double>(args.scale);
        most = std::fmax(most, scores[static_cast<size_t>(j)]);
        off =
            std::fmax(off, magnitude * static_cast<double>(args.scale) * gamma_of(static_cast<double>(args.depth + 6)));
      }
      double total = 0.0;
      for (double& score : scores) total += score = std::exp(score - most);
      for (int64_t i = 0; i < args.depth; ++i) {
        double exact = 0.0, size = 0.0;
        for (int64_t j = 0; j < count; ++j) {
          const double term =
              scores[static_cast<size_t>(j)] / total * values[static_cast<size_t>(slots + j * args.depth + i)];
          exact += term;
          size += std::fabs(term);
        }
        const double bound = 2.0 * size * (std::expm1(2.0 * off) + gamma_of(static_cast<double>(count + 14)));
        const int64_t at = (batch * args.heads + head) * args.depth + i;
        const double found = decode(out + at * size_of(args.dtype), args.dtype);
        if (!within(found, exact, bound, args.dtype)) {
          return format("head %lld, element %lld: %.9g, expected %.9g within %.3g", static_cast<long long>(head),
                        static_cast<long long>(i), found, exact, bound);
        }
      }
    }
  }
  return "";
}

void attention_case(Run& run, Random& random, const KernelTable& table, int64_t number) {
  StepCase c = step_case(random);
  AttentionStepArgs& args = c.args;
  const std::string what = format("attention_step, case %lld, %s", static_cast<long long>(number), table.isa);
  const int64_t kept = args.batch * args.batch_stride, count = args.batch * args.heads * args.depth;
  const int64_t element = size_of(args.dtype);
  Output first(count, element, 0);
  for (const int threads : {1, 3}) {
    Output out(count, element, random.between(0, 3));
    Output keys(kept, element, random.between(0, 3)), values(kept, element, random.between(0, 3));
    std::memcpy(keys.as<uint8_t>(), c.keys.memory.as<uint8_t>(), keys.size());
    std::memcpy(values.as<uint8_t>(), c.values.memory.as<uint8_t>(), values.size());
    args.keys = keys.as<uint8_t>();
    args.values = values.as<uint8_t>();
    args.out = out.as<uint8_t>();
    args.threads = threads;
    if (!run_checked(run, table.attention_step, args, what)) return;
    if (!out.guards_intact() || !keys.guards_intact() || !values.guards_intact()) {
      return run.report.fail(what, "it wrote outside");
    }
    if (threads == 1) {
      std::memcpy(first.as<uint8_t>(), out.bytes(), out.size());
    } else if (!out.same(first)) {
      return run.report.fail(what, "other bits with another number of threads");
    }
    const std::vector<double> all_keys = decoded(keys.bytes(), kept, args.dtype);
    const std::vector<double> all_values = decoded(values.bytes(), kept, args.dtype);
    std::string wrong = wrong_slots(c, all_keys, all_values);
    if (wrong.empty()) wrong = wrong_output(c, all_keys, all_values, out.bytes());
    if (!wrong.empty()) return run.report.fail(what, wrong);
  }
}

}  // namespace

void test_decoding(Run& run) {
  Random random(run.seed ^ 0xDEC0DEU);
  for (int64_t number = 0; number < run.cases; ++number) {
    const uint64_t seed = random.next();
    for (const KernelTable* table : run.tables) {
      Random own(seed);
      dense_case(run, own, *table, number);
      attention_case(run, own, *table, number);
      run.report.checked(table->isa);
    }
  }
}

}  // namespace nybble::test
