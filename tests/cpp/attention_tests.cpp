// attention_forward and attention_scores_grad against their rules in double.
//
// The bounds are those of the sums: a score is `depth` products, the mask and the logsumexp, each rounding of it no
// more than a unit of the sum of their magnitudes; an exponent that is off by e multiplies an exponential, which is
// within four units itself, by exp(e); the gradient is a product of factors that round on their own.
#include <algorithm>
#include <cmath>
#include <limits>

#include "codec_rule.h"
#include "core/check.h"
#include "numbers.h"
#include "support.h"

namespace nybble::test {

namespace {

constexpr double kUnit = 0x1p-24;
constexpr double kInfinite = std::numeric_limits<double>::infinity();

struct Sizes {
  int64_t batches = 1, heads = 1, group = 1, rows = 1, cols = 1, depth = 1, value_depth = 1;

  int64_t kv_heads() const { return heads / group; }
};

// [batches, heads, rows, columns]: head after head, or the heads of a row side by side; `gap` elements between rows.
struct Tensor4 {
  Values values;
  int64_t batch = 0, head = 0, row = 0;

  double at(int64_t b, int64_t h, int64_t r, int64_t c) const {
    return values.exact[static_cast<size_t>(b * batch + h * head + r * row + c)];
  }
  AttentionTensor view() const { return {values.memory.as<uint8_t>(), batch, head, row}; }
};

Tensor4 tensor(Random& random, int64_t batches, int64_t heads, int64_t rows, int64_t columns, DType dtype) {
  Tensor4 result;
  const int64_t width = columns + (random.one_in(3) ? random.between(1, 5) : 0);
  const bool side_by_side = random.one_in(2);
  result.head = side_by_side ? width : rows * width;
  result.row = side_by_side ? heads * width : width;
  result.batch = heads * rows * width;
  // The last row ends with its columns: what would be its gap is not there.
  const int64_t count = batches * result.batch - (width - columns);
  result.values = encode(random_values(random, count, {0, 0}), dtype, random.between(0, 3));
  return result;
}

struct AttentionProblem {
  Sizes sizes;
  DType dtype = DType::f32, out_dtype = DType::f32, mask_dtype = DType::f32;
  Tensor4 query, key, value, output, grad_output, logsumexp;
  enum class Mask { none, boolean, added } mask = Mask::none;
  bool mask_of_batches = false, mask_of_heads = false, mask_of_rows = false;  // else one for all of them
  int64_t mask_width = 0;
  std::vector<double> mask_values;  // what is added
  Input mask_memory;
  int64_t diagonal = 0;
  float scale = 1.0F;

  size_t mask_at(int64_t b, int64_t h, int64_t r, int64_t c) const {
    const AttentionTensor strides = mask_strides();
    return static_cast<size_t>(b * strides.batch_stride + h * strides.head_stride + r * strides.row_stride + c);
  }
  AttentionTensor mask_strides() const {
    const int64_t rows = mask_of_rows ? sizes.rows : 1, heads = mask_of_heads ? sizes.heads : 1;
    return {nullptr, mask_of_batches ? heads * rows * mask_width : 0, mask_of_heads ? rows * mask_width : 0,
            mask_of_rows ? mask_width : 0};
  }
  double added(int64_t b, int64_t h, int64_t r, int64_t c) const {
    if (c > r + diagonal) return -kInfinite;
    return mask == Mask::none ? 0.0 : mask_values[mask_at(b, h, r, c)];
  }

  AttentionArgs args() const {
    AttentionArgs args;
    args.query = query.view();
    args.key = key.view();
    args.value = value.view();
    args.output = output.view();
    args.grad_output = grad_output.view();
    args.logsumexp = logsumexp.view();
    args.dtype = dtype;
    args.out_dtype = out_dtype;
    if (mask != Mask::none) {
      args.mask = mask_strides();
      args.mask.data = mask_memory.as<uint8_t>();
      args.mask_is_boolean = mask == Mask::boolean;
      args.mask_dtype = mask_dtype;
    }
    args.batches = sizes.batches;
    args.heads = sizes.heads;
    args.group = sizes.group;
    args.rows = sizes.rows;
    args.cols = sizes.cols;
    args.depth = sizes.depth;
    args.value_depth = sizes.value_depth;
    args.diagonal = diagonal;
    args.scale = scale;
    return args;
  }

  std::string describe() const {
    const Sizes& s = sizes;
    return format("[%lld, %lld / %lld, %lld x %lld, %lld and %lld] %s to %s, diagonal %lld, mask %d",
                  (long long)s.batches, (long long)s.heads, (long long)s.group, (long long)s.rows, (long long)s.cols,
                  (long long)s.depth, (long long)s.value_depth, name_of(dtype), name_of(out_dtype), (long long)diagonal,
                  static_cast<int>(mask));
  }
};

void random_mask(Random& random, AttentionProblem* problem) {
  using Mask = AttentionProblem::Mask;
  problem->mask = random.pick<Mask>({Mask::none, Mask::none, Mask::boolean, Mask::added});
  if (problem->mask == Mask::none) return;
  problem->mask_of_batches = random.one_in(2);
  problem->mask_of_heads = random.one_in(2);
  problem->mask_of_rows = random.one_in(2);
  problem->mask_width = problem->sizes.cols + (random.one_in(3) ? 3 : 0);
  const int64_t count = (problem->mask_of_batches ? problem->sizes.batches : 1) *
                            (problem->mask_of_heads ? problem->sizes.heads : 1) *
                            (problem->mask_of_rows ? problem->sizes.rows : 1) * problem->mask_width -
                        (problem->mask_width - problem->sizes.cols);
  if (problem->mask == Mask::boolean) {
    std::vector<uint8_t> seen(static_cast<size_t>(count));
    for (uint8_t& byte : seen) byte = random.one_in(3) ? 0 : 1;
    for (const uint8_t byte : seen) problem->mask_values.push_back(byte != 0 ? 0.0 : -kInfinite);
    problem->mask_memory = Input::of(seen, random.between(0, 3));
    return;
  }
  problem->mask_dtype = random.pick<DType>({DType::f32, DType::f16, DType::bf16});
  std::vector<double> values = random_values(random, count, {0, 0});
  for (double& value : values) value = random.one_in(4) ? -kInfinite : value;
  Values encoded = encode(std::move(values), problem->mask_dtype, random.between(0, 3));
  problem->mask_values = std::move(encoded.exact);
  problem->mask_memory = std::move(encoded.memory);
}

struct Score {
  double value = 0.0, magnitude = 0.0;
};

Score score(const AttentionProblem& problem, int64_t b, int64_t h, int64_t r, int64_t c) {
  Score result;
  for (int64_t i = 0; i < problem.sizes.depth; ++i) {
    const double product = problem.query.at(b, h, r, i) * problem.key.at(b, h / problem.sizes.group, c, i);
    result.value += product;
    result.magnitude += std::fabs(product);
  }
  result.value *= problem.scale;
  result.magnitude *= problem.scale;
  return result;
}

// What the forward pass would have given, and for some queries -infinity.
void find_logsumexp(Random& random, AttentionProblem* problem) {
  const Sizes& s = problem->sizes;
  problem->logsumexp = tensor(random, s.batches, s.heads, s.rows, 1, DType::f32);
  Tensor4& out = problem->logsumexp;
  std::vector<double> values = out.values.exact;
  for (int64_t b = 0; b < s.batches; ++b) {
    for (int64_t h = 0; h < s.heads; ++h) {
      for (int64_t r = 0; r < s.rows; ++r) {
        double sum = 0.0;
        for (int64_t c = 0; c < s.cols; ++c) {
          sum += std::exp(score(*problem, b, h, r, c).value + problem->added(b, h, r, c));
        }
        const double value = random.one_in(20) ? -kInfinite : std::log(sum);
        values[static_cast<size_t>(b * out.batch + h * out.head + r * out.row)] = value;
      }
    }
  }
  out.values = encode(std::move(values), DType::f32, random.between(0, 3));
}

AttentionProblem random_attention(Random& random) {
  AttentionProblem problem;
  Sizes& s = problem.sizes;
  const auto length = [&] {
    return random.one_in(8) ? random.pick<int64_t>({64, 65, 127, 129, 150}) : random.between(1, 40);
  };
  const auto width = [&] { return random.one_in(8) ? random.pick<int64_t>({64, 80, 128}) : random.between(1, 34); };
  s.batches = random.between(1, 2);
  s.group = random.between(1, 3);
  s.heads = s.group * random.between(1, 2);
  s.rows = length();
  s.cols = length();
  s.depth = width();
  s.value_depth = width();
  problem.dtype = random.pick<DType>({DType::f32, DType::f16, DType::bf16});
  problem.out_dtype = random.pick<DType>({DType::f32, DType::f16, DType::bf16});
  problem.diagonal = random.one_in(2) ? s.cols : random.between(-3, s.cols);
  problem.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(s.depth)));
  problem.query = tensor(random, s.batches, s.heads, s.rows, s.depth, problem.dtype);
  problem.key = tensor(random, s.batches, s.kv_heads(), s.cols, s.depth, problem.dtype);
  problem.value = tensor(random, s.batches, s.kv_heads(), s.cols, s.value_depth, problem.dtype);
  problem.output = tensor(random, s.batches, s.heads, s.rows, s.value_depth, problem.dtype);
  problem.grad_output = tensor(random, s.batches, s.heads, s.rows, s.value_depth, problem.dtype);
  random_mask(random, &problem);
  find_logsumexp(random, &problem);
  return problem;
}

// p and ds of one query and one key: "" or what is wrong.
const char* wrong_element(const AttentionProblem& problem, int64_t b, int64_t h, int64_t r, int64_t c, double p,
                          double ds) {
  const double added = problem.added(b, h, r, c), shift = problem.logsumexp.at(b, h, r, 0);
  if (added == -kInfinite || shift == -kInfinite) return p == 0.0 && ds == 0.0 ? "" : "a hidden key is not 0";
  const Sizes& s = problem.sizes;
  double product = 0.0, delta = 0.0, magnitude = 0.0;
  for (int64_t i = 0; i < s.value_depth; ++i) {
    const double grad = problem.grad_output.at(b, h, r, i), out = problem.output.at(b, h, r, i);
    const double value = problem.value.at(b, h / s.group, c, i);
    product += grad * value;
    delta += grad * out;
    magnitude += std::fabs(grad * value) + std::fabs(grad * out);
  }
  const Score scored = score(problem, b, h, r, c);
  const double weight = std::exp(scored.value + added - shift);
  const double size = static_cast<double>(s.depth + 4) * scored.magnitude + 4.0 * (std::fabs(added) + std::fabs(shift));
  constexpr double kLeast = 0x1p-123;  // what is smaller may become 0
  const double off = weight * (std::expm1(kUnit * size) + 4.0 * kUnit) + kLeast;
  const double unit = unit_roundoff(problem.out_dtype);
  const double least = std::max(kLeast, 2.0 * smallest_error(problem.out_dtype));
  if (!(std::fabs(p - weight) <= off + unit * (weight + off) + least)) return "p is off";
  const double scale = problem.scale;
  const double bound = scale * magnitude * (off + static_cast<double>(s.value_depth + 6) * kUnit * weight);
  const double expected = weight * (product - delta) * scale;
  return std::fabs(ds - expected) <= bound + unit * (std::fabs(expected) + bound) + least ? "" : "ds is off";
}

void check_elements(Run& run, const AttentionProblem& problem, const Output& p, const Output& ds,
                    const std::string& what) {
  const Sizes& s = problem.sizes;
  const int64_t width = size_of(problem.out_dtype);
  int64_t at = 0;
  for (int64_t b = 0; b < s.batches; ++b) {
    for (int64_t h = 0; h < s.heads; ++h) {
      for (int64_t r = 0; r < s.rows; ++r) {
        for (int64_t c = 0; c < s.cols; ++c, at += width) {
          const char* wrong = wrong_element(problem, b, h, r, c, decode(p.bytes() + at, problem.out_dtype),
                                            decode(ds.bytes() + at, problem.out_dtype));
          if (*wrong == 0) continue;
          return run.report.fail(what, format("batch %lld, head %lld, query %lld, key %lld: %s", (long long)b,
                                              (long long)h, (long long)r, (long long)c, wrong));
        }
      }
    }
  }
}

// What the forward pass should give for one query, and by how much it may be off. A score is off by the roundings of
// what it is made of; sums over keys round once a key, and are multiplied by an exponential where a larger score turns
// up, once in 64 keys; weights are rounded to what is multiplied.
struct ForwardRow {
  std::vector<double> output, bound;
  double logsumexp = -kInfinite, bound_of_sum = 0.0;
};

ForwardRow forward_row(const AttentionProblem& problem, int64_t b, int64_t h, int64_t r) {
  const Sizes& s = problem.sizes;
  std::vector<double> exponents;
  double largest = -kInfinite, off = 0.0;
  for (int64_t c = 0; c < s.cols; ++c) {
    const double added = problem.added(b, h, r, c);
    const Score scored = score(problem, b, h, r, c);
    exponents.push_back(scored.value + added);
    if (added == -kInfinite) continue;
    largest = std::max(largest, exponents.back());
    off = std::max(off, static_cast<double>(s.depth + 4) * scored.magnitude + 4.0 * std::fabs(added));
  }
  ForwardRow row;
  row.output.assign(static_cast<size_t>(s.value_depth), 0.0);
  row.bound = row.output;
  if (largest == -kInfinite) return row;
  double sum = 0.0;
  for (const double exponent : exponents) sum += std::exp(exponent - largest);
  row.logsumexp = largest + std::log(sum);
  const double blocks = static_cast<double>((s.cols + 63) / 64);
  const double exponent_off = 2.0 * kUnit * off, sums = (static_cast<double>(s.cols) + 16.0 + 6.0 * blocks) * kUnit;
  row.bound_of_sum = exponent_off + sums + 8.0 * kUnit * (std::fabs(row.logsumexp) + 1.0);
  const double weight = problem.dtype == DType::bf16 ? 0x1p-8 : kUnit;
  const double relative = std::expm1(2.0 * exponent_off) + 2.0 * sums + weight, unit = unit_roundoff(problem.dtype);
  for (int64_t i = 0; i < s.value_depth; ++i) {
    double magnitude = 0.0, all = 0.0, total = 0.0;
    for (int64_t c = 0; c < s.cols; ++c) {
      const double value = problem.value.at(b, h / s.group, c, i);
      const double p = std::exp(exponents[static_cast<size_t>(c)] - row.logsumexp);
      total += p * value;
      magnitude += p * std::fabs(value);
      all += std::fabs(value);
    }
    const double error = relative * magnitude + 0x1p-123 * (all + 1.0);
    row.output[static_cast<size_t>(i)] = total;
    row.bound[static_cast<size_t>(i)] = error + unit * (std::fabs(total) + error) + 2.0 * smallest_error(problem.dtype);
  }
  return row;
}

void check_forward(Run& run, const AttentionProblem& problem, const Output& output, const Output& sums,
                   const std::string& what) {
  const Sizes& s = problem.sizes;
  const int64_t width = size_of(problem.dtype);
  for (int64_t at = 0; at < s.batches * s.heads * s.rows; ++at) {
    const int64_t b = at / s.rows / s.heads, h = at / s.rows % s.heads, r = at % s.rows;
    const ForwardRow expected = forward_row(problem, b, h, r);
    const double sum = decode(sums.bytes() + at * 4, DType::f32);
    const bool blind = expected.logsumexp == -kInfinite;
    bool right = blind ? sum == -kInfinite : std::fabs(sum - expected.logsumexp) <= expected.bound_of_sum;
    for (int64_t i = 0; i < s.value_depth; ++i) {
      const double found = decode(output.bytes() + (at * s.value_depth + i) * width, problem.dtype);
      const size_t index = static_cast<size_t>(i);
      right = right && std::fabs(found - expected.output[index]) <= (blind ? 0.0 : expected.bound[index]);
    }
    if (right) continue;
    return run.report.fail(
        what, format("batch %lld, head %lld, query %lld is off", (long long)b, (long long)h, (long long)r));
  }
}

void forward_case(Run& run, Random& random) {
  const AttentionProblem problem = random_attention(random);
  const Sizes& s = problem.sizes;
  const int64_t queries = s.batches * s.heads * s.rows, width = size_of(problem.dtype);
  for (const KernelTable* table : run.tables) {
    const std::string what = format("%s: attention_forward %s", table->isa, problem.describe().c_str());
    Output output(queries * s.value_depth, width, 0), sums(queries, 4, 0);
    for (int threads = 1; threads <= 3; ++threads) {
      const std::string which = format("%s, %d threads", what.c_str(), threads);
      Output found(queries * s.value_depth, width, threads - 1), found_sums(queries, 4, threads - 1);
      AttentionForwardArgs args;
      static_cast<AttentionInputs&>(args) = problem.args();
      args.output = {found.as<uint8_t>(), s.heads * s.rows * s.value_depth, s.rows * s.value_depth, s.value_depth};
      args.logsumexp = found_sums.as<float>();
      args.threads = threads;
      expect(run, check(args).ok(), which, "its arguments are refused");
      expect(run, table->attention_forward(args).ok(), which, "fails");
      expect(run, found.guards_intact() && found_sums.guards_intact(), which, "writes outside its outputs");
      if (threads == 1) {
        output = found;
        sums = found_sums;
        check_forward(run, problem, output, sums, which);
      } else {
        expect(run, found.same(output) && found_sums.same(sums), which, "other bits than one thread");
      }
    }
    run.report.checked(table->isa);
  }
}

void attention_case(Run& run, Random& random) {
  const AttentionProblem problem = random_attention(random);
  const Sizes& s = problem.sizes;
  const int64_t count = s.batches * s.heads * s.rows * s.cols, width = size_of(problem.out_dtype);
  for (const KernelTable* table : run.tables) {
    const std::string what = format("%s: attention_scores_grad %s", table->isa, problem.describe().c_str());
    Output p(count, width, 0), ds(count, width, 0);
    for (int threads = 1; threads <= 3; ++threads) {
      const std::string which = format("%s, %d threads", what.c_str(), threads);
      Output found_p(count, width, threads - 1), found_ds(count, width, threads - 1);
      AttentionArgs args = problem.args();
      args.p = found_p.as<uint8_t>();
      args.ds = found_ds.as<uint8_t>();
      args.threads = threads;
      expect(run, check(args).ok(), which, "its arguments are refused");
      expect(run, table->attention_scores_grad(args).ok(), which, "fails");
      expect(run, found_p.guards_intact() && found_ds.guards_intact(), which, "writes outside its outputs");
      if (threads == 1) {
        p = found_p;
        ds = found_ds;
        check_elements(run, problem, p, ds, which);
      } else {
        expect(run, found_p.same(p) && found_ds.same(ds), which, "other bits than one thread");
      }
    }
    run.report.checked(table->isa);
  }
}

void refused_arguments(Run& run) {
  const float numbers[4] = {};
  float out[4];
  AttentionArgs good;
  for (AttentionTensor* each :
       {&good.query, &good.key, &good.value, &good.output, &good.grad_output, &good.logsumexp}) {
    *each = {numbers, 0, 0, 1};
  }
  good.batches = good.heads = good.rows = good.cols = good.depth = good.value_depth = 1;
  good.p = good.ds = out;
  expect(run, check(good).ok(), "attention", "its arguments are refused");
  const auto refused = [&](const char* argument, const auto& spoil) {
    AttentionArgs bad = good;
    spoil(&bad);
    const Status status = check(bad);
    expect(run, status.code == Code::bad_argument && std::string(argument) == status.what,
           format("attention with a bad %s", argument), "is not refused");
  };
  refused("query", [](AttentionArgs* args) { args->query.data = nullptr; });
  refused("key", [](AttentionArgs* args) { args->key.row_stride = -1; });
  refused("value", [](AttentionArgs* args) { args->value.data = nullptr; });
  refused("output", [](AttentionArgs* args) { args->output.data = nullptr; });
  refused("grad_output", [](AttentionArgs* args) { args->grad_output.data = nullptr; });
  refused("logsumexp", [](AttentionArgs* args) { args->logsumexp.head_stride = -1; });
  refused("mask", [](AttentionArgs* args) { args->mask.batch_stride = -1; });
  refused("p", [](AttentionArgs* args) { args->p = nullptr; });
  refused("ds", [](AttentionArgs* args) { args->ds = nullptr; });
  refused("batches", [](AttentionArgs* args) { args->batches = -1; });
  refused("heads", [](AttentionArgs* args) { args->heads = -1; });
  refused("rows", [](AttentionArgs* args) { args->rows = -1; });
  refused("cols", [](AttentionArgs* args) { args->cols = int64_t{1} << 47; });
  refused("cols", [](AttentionArgs* args) { args->rows = args->cols = int64_t{1} << 40; });
  refused("depth", [](AttentionArgs* args) { args->depth = 0; });
  refused("value_depth", [](AttentionArgs* args) { args->value_depth = kMaxHeadDepth + 1; });
  refused("group", [](AttentionArgs* args) {
    args->heads = 3;
    args->group = 2;
  });
  refused("threads", [](AttentionArgs* args) { args->threads = 0; });
  AttentionForwardArgs forward;
  static_cast<AttentionInputs&>(forward) = good;
  forward.output = good.output;
  forward.logsumexp = out;
  expect(run, check(forward).ok(), "attention_forward", "its arguments are refused");
  AttentionForwardArgs bad = forward;
  bad.logsumexp = nullptr;
  expect(run, std::string("logsumexp") == check(bad).what, "attention_forward", "writes to a null logsumexp");
  bad = forward;
  bad.output.data = nullptr;
  expect(run, std::string("output") == check(bad).what, "attention_forward", "writes to a null output");
  bad = forward;
  bad.depth = 0;
  expect(run, std::string("depth") == check(bad).what, "attention_forward", "takes heads of no depth");
}

}  // namespace

void test_attention(Run& run) {
  refused_arguments(run);
  for (int64_t index = 0; index < run.cases; ++index) {
    Random random(run.seed * 1000033 + static_cast<uint64_t>(index));
    attention_case(run, random);
    forward_case(run, random);
  }
}

}  // namespace nybble::test
