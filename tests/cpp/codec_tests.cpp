// Codecs: every ISA and every number of threads must give the bytes of the rule written out below.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "codec_rule.h"
#include "core/check.h"
#include "numbers.h"
#include "support.h"

namespace nybble::test {

namespace {

const std::vector<int> kThreads = {1, 2, 3};
const std::vector<DType> kDTypes = {DType::f32, DType::f16, DType::bf16};

// Around vectors of 4, 8 and 16, blocks, a task's 65536 elements.
int64_t random_count(Random& random) {
  const std::vector<int64_t> edges = {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 255, 1024, 4097};
  if (random.one_in(8)) return 65536 * random.between(1, 2) + random.between(-1, 70);
  return random.one_in(2) ? random.pick(edges) : random.between(1, 3000);
}

Magnitude random_magnitude(Random& random, DType dtype) {
  if (dtype == DType::f16) return random.pick<Magnitude>({{0, 0}, {-2, 0}, {-6, 1}, {3, 0}, {0, 3}});
  return random.pick<Magnitude>({{0, 0}, {-2, 0}, {-39, 1}, {-44, 1}, {37, 0}, {0, 12}});
}

// Numbers of one tensor; some are exactly zero, sometimes a long run of them.
std::vector<double> random_tensor(Random& random, int64_t count, DType dtype) {
  std::vector<double> values = random_values(random, count, random_magnitude(random, dtype));
  for (double& value : values) {
    if (random.one_in(20)) value = random.one_in(2) ? 0.0 : -0.0;
  }
  if (count > 0 && random.one_in(3)) {
    const int64_t start = random.below(count);
    const int64_t end = std::min(count, start + random.between(1, 300));
    std::fill(values.begin() + start, values.begin() + end, 0.0);
  }
  return values;
}

// Places that may not be finite; returns the first, or -1. More often in large tensors, whose tasks all report theirs.
int64_t damage(Random& random, std::vector<double>* values) {
  const auto count = static_cast<int64_t>(values->size());
  if (count == 0 || !random.one_in(count > 65536 ? 2 : 6)) return -1;
  const double bad[] = {std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity(),
                        std::numeric_limits<double>::quiet_NaN()};
  int64_t first = count;
  for (int64_t i = random.between(1, 6); i > 0; --i) {
    const int64_t at = random.below(count);
    (*values)[static_cast<size_t>(at)] = bad[random.below(3)];
    first = std::min(first, at);
  }
  return first;
}

// ---- the rule -------------------------------------------------------------------------------------------------------

std::vector<float> absmax_by_rule(const std::vector<float>& x, size_t block) {
  std::vector<float> absmax;
  for (size_t start = 0; start < x.size(); start += block) {
    absmax.push_back(std::max(kSmallest, largest(x, start, std::min(x.size(), start + block))));
  }
  return absmax;
}

// ---- comparison -----------------------------------------------------------------------------------------------------

// The bits of numbers of `dtype`, the sign of a zero included.
bool equal_numbers(const Output& output, const std::vector<float>& expected, DType dtype) {
  const auto width = static_cast<size_t>(size_of(dtype));
  if (output.size() != expected.size() * width) return false;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double found = decode(output.bytes() + i * width, dtype);
    const double wanted = rounded(expected[i], dtype);
    if (found != wanted || std::signbit(found) != std::signbit(wanted)) return false;
  }
  return true;
}

// Runs `one(table, threads, description)` for everything that must agree.
template <class One>
void everywhere(Run& run, const std::string& description, const One& one) {
  for (const KernelTable* table : run.tables) {
    for (int threads : kThreads) {
      one(*table, threads, format("%s: %s, %d threads", table->isa, description.c_str(), threads));
    }
    run.report.checked(table->isa);
  }
}

// `bad` is the first place that is not finite, or -1.
void expect_status(Run& run, const Status& status, int64_t bad, int64_t block, const std::string& description) {
  if (bad < 0) return expect(run, status.ok(), description, "fails");
  expect(run, status.code == Code::non_finite, description, "takes what is not finite");
  expect(run, status.value == bad / block, description, "names another block than the first bad one");
}

// ---- one case of each codec -----------------------------------------------------------------------------------------

void quantize_4bit_case(Run& run, Random& random) {
  const DType dtype = random.pick(kDTypes);
  const int64_t count = random_count(random);
  const int64_t block = int64_t{32} << random.below(8);
  std::vector<double> tensor = random_tensor(random, count, dtype);
  const int64_t bad = damage(random, &tensor);
  const Values x = encode(std::move(tensor), dtype, random.below(8));
  const std::vector<float> codes = random_codebook(random);
  const Input codebook = Input::of(codes, random.below(4));
  const Sorted sorted(codes);
  const std::vector<float> values = floats_of(x);
  const std::vector<float> absmax = absmax_by_rule(values, static_cast<size_t>(block));
  const auto expected =
      bad < 0 ? packed_by_rule(values, static_cast<size_t>(block), sorted, absmax.data()) : std::vector<uint8_t>();
  const std::string description =
      format("quantize_4bit %lld of %s, block %lld", (long long)count, name_of(dtype), (long long)block);
  everywhere(run, description, [&](const KernelTable& table, int threads, const std::string& what) {
    Output packed((count + 1) / 2, 1, threads), scales(divide_up(count, block), 4, threads);
    Quantize4Args args;
    args.x = x.memory.as<void>();
    args.dtype = dtype;
    args.count = count;
    args.block_size = block;
    args.codebook = codebook.as<float>();
    args.packed = packed.as<uint8_t>();
    args.absmax = scales.as<float>();
    args.threads = threads;
    expect(run, check(args).ok(), what, "its arguments are refused");
    expect_status(run, table.quantize_4bit(args), bad, block, what);
    expect(run, packed.guards_intact() && scales.guards_intact(), what, "writes outside its outputs");
    if (bad >= 0) return;
    expect(run, equal(scales, absmax), what, "other scales than the rule's");
    expect(run, equal(packed, expected), what, "other codes than the rule's");
  });
}

void dequantize_4bit_case(Run& run, Random& random) {
  const DType dtype = random.pick(kDTypes);
  const int64_t count = random_count(random);
  const int shift = static_cast<int>(random.between(5, 12));
  const int64_t blocks = divide_up(count, int64_t{1} << shift);
  std::vector<uint8_t> bytes(static_cast<size_t>((count + 1) / 2));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.next());
  const std::vector<float> codes = random_codebook(random);
  const bool nested = random.one_in(2);
  const int nested_shift = random.one_in(2) ? 8 : static_cast<int>(random.below(4));
  const auto scale_values = [&](int64_t n) {
    return floats_of(encode(random_values(random, n, random_magnitude(random, DType::f32)), DType::f32, 0));
  };
  const std::vector<float> plain = scale_values(blocks), map = scale_values(256), offset = scale_values(1);
  const std::vector<float> second =
      floats_of(encode(random_values(random, divide_up(blocks, int64_t{1} << nested_shift), {0, 0}), DType::f32, 0));
  std::vector<uint8_t> scale_codes(static_cast<size_t>(blocks));
  for (uint8_t& code : scale_codes) code = static_cast<uint8_t>(random.next());

  std::vector<float> expected(static_cast<size_t>(count));
  for (size_t i = 0; i < expected.size(); ++i) {
    const size_t block = i >> shift;
    const float product = map[scale_codes[block]] * second[block >> nested_shift];
    const float scale = nested ? product + offset[0] : plain[block];
    expected[i] = codes[i % 2 == 0 ? bytes[i / 2] >> 4 : bytes[i / 2] & 15] * scale;
  }
  const Input packed = Input::of(bytes, 1), codebook = Input::of(codes, 1), absmax = Input::of(plain, 1);
  const Input absmax8 = Input::of(scale_codes, 3), outer = Input::of(second, 1), map_in = Input::of(map, 1);
  const Input offset_in = Input::of(offset, 1);
  const std::string description = format("dequantize_4bit %lld to %s, block %d, %s", (long long)count, name_of(dtype),
                                         1 << shift, nested ? "nested" : "plain");
  everywhere(run, description, [&](const KernelTable& table, int threads, const std::string& what) {
    Output out(count, size_of(dtype), threads);
    Dequantize4Args args;
    args.source.packed = packed.as<uint8_t>();
    args.source.codebook = codebook.as<float>();
    args.source.block_shift = shift;
    if (nested) {
      args.source.scales = {
          nullptr, absmax8.as<uint8_t>(), outer.as<float>(), map_in.as<float>(), offset_in.as<float>(), nested_shift};
    } else {
      args.source.scales.plain = absmax.as<float>();
    }
    args.count = count;
    args.out = out.as<void>();
    args.dtype = dtype;
    args.threads = threads;
    expect(run, check(args).ok(), what, "its arguments are refused");
    expect(run, table.dequantize_4bit(args).ok(), what, "fails");
    expect(run, out.guards_intact(), what, "writes outside its output");
    expect(run, equal_numbers(out, expected, dtype), what, "other numbers than the rule's");
  });
}

std::vector<float> random_map(Random& random) {
  std::vector<float> map(256);
  for (float& entry : map) entry = static_cast<float>(2.0 * random.uniform() - 1.0);
  std::sort(map.begin(), map.end());
  return map;
}

int64_t random_block_8bit(Random& random) {
  return random.one_in(2) ? 256 : random.pick<int64_t>({1, 3, 17, 100, 1023, 1024, 1025, 1500, 4096, 70000});
}

void quantize_8bit_case(Run& run, Random& random) {
  const DType dtype = random.pick(kDTypes);
  const int64_t count = random_count(random);
  const int64_t block = random_block_8bit(random);
  std::vector<double> tensor = random_tensor(random, count, dtype);
  const int64_t bad = damage(random, &tensor);
  const Values x = encode(std::move(tensor), dtype, random.below(8));
  const Sorted map(random_map(random));
  const Input map_in = Input::of(map.code, 1);
  const std::vector<float> values = floats_of(x);
  const std::vector<float> absmax = absmax_by_rule(values, static_cast<size_t>(block));
  std::vector<uint8_t> expected(bad < 0 ? values.size() : 0);
  for (size_t i = 0; i < expected.size(); ++i) {
    const float reciprocal = 1.0F / absmax[i / static_cast<size_t>(block)];
    expected[i] = static_cast<uint8_t>(map.rank(clamped(values[i] * reciprocal)));
  }
  const std::string description =
      format("quantize_8bit %lld of %s, block %lld", (long long)count, name_of(dtype), (long long)block);
  everywhere(run, description, [&](const KernelTable& table, int threads, const std::string& what) {
    Output codes(count, 1, threads), scales(divide_up(count, block), 4, threads);
    Quantize8Args args;
    args.x = x.memory.as<void>();
    args.dtype = dtype;
    args.count = count;
    args.block_size = block;
    args.map = map_in.as<float>();
    args.codes = codes.as<uint8_t>();
    args.absmax = scales.as<float>();
    args.threads = threads;
    expect(run, check(args).ok(), what, "its arguments are refused");
    expect_status(run, table.quantize_8bit(args), bad, block, what);
    expect(run, codes.guards_intact() && scales.guards_intact(), what, "writes outside its outputs");
    if (bad >= 0) return;
    expect(run, equal(scales, absmax), what, "other scales than the rule's");
    expect(run, equal(codes, expected), what, "other codes than the rule's");
  });
}

void dequantize_8bit_case(Run& run, Random& random) {
  const DType dtype = random.pick(kDTypes);
  const int64_t count = random_count(random);
  const int64_t block = random_block_8bit(random);
  std::vector<uint8_t> bytes(static_cast<size_t>(count));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.next());
  const std::vector<float> map = random_map(random);
  const std::vector<float> scales = floats_of(
      encode(random_values(random, divide_up(count, block), random_magnitude(random, DType::f32)), DType::f32, 0));
  std::vector<float> expected(bytes.size());
  for (size_t i = 0; i < bytes.size(); ++i) expected[i] = map[bytes[i]] * scales[i / static_cast<size_t>(block)];
  const Input codes = Input::of(bytes, 1), absmax = Input::of(scales, 1), map_in = Input::of(map, 1);
  const std::string description =
      format("dequantize_8bit %lld to %s, block %lld", (long long)count, name_of(dtype), (long long)block);
  everywhere(run, description, [&](const KernelTable& table, int threads, const std::string& what) {
    Output out(count, size_of(dtype), threads);
    Dequantize8Args args;
    args.codes = codes.as<uint8_t>();
    args.absmax = absmax.as<float>();
    args.map = map_in.as<float>();
    args.count = count;
    args.block_size = block;
    args.out = out.as<void>();
    args.dtype = dtype;
    args.threads = threads;
    expect(run, check(args).ok(), what, "its arguments are refused");
    expect(run, table.dequantize_8bit(args).ok(), what, "fails");
    expect(run, out.guards_intact(), what, "writes outside its output");
    expect(run, equal_numbers(out, expected, dtype), what, "other numbers than the rule's");
  });
}

void int8_rows_case(Run& run, Random& random) {
  const DType dtype = random.pick(kDTypes);
  const int64_t rows = random.between(0, 9);
  const int64_t cols = random.one_in(2) ? random.between(0, 130) : random.pick<int64_t>({1023, 1024, 1025, 2100});
  std::vector<double> tensor =
      random_values(random, rows * cols, random.pick<Magnitude>({{0, 0}, {-2, 0}, {-6, 1}, {3, 0}, {0, 3}}));
  if (rows > 1) std::fill(tensor.begin(), tensor.begin() + cols, 0.0);
  const int64_t damaged = damage(random, &tensor);
  const Values x = encode(std::move(tensor), dtype, random.below(8));
  int64_t bad = damaged < 0 ? -1 : damaged / cols;
  std::vector<float> absmax(static_cast<size_t>(rows)), back(x.exact.size());
  std::vector<int8_t> q(x.exact.size());
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<float> values;
    for (int64_t i = row * cols; i < (row + 1) * cols; ++i) {
      values.push_back(static_cast<float>(rounded(x.exact[static_cast<size_t>(i)], DType::f16)));
    }
    const float most = largest(values, 0, values.size());
    if (std::isinf(most) && (bad < 0 || row < bad)) bad = row;  // fp16 overflows
    absmax[static_cast<size_t>(row)] = most;
    for (int64_t i = 0; i < cols && bad < 0; ++i) {
      const auto at = static_cast<size_t>(row * cols + i);
      const float level = values[static_cast<size_t>(i)] * (most == 0.0F ? 0.0F : 1.0F / most * 127.0F);
      q[at] = static_cast<int8_t>(std::nearbyint(level));
      back[at] = static_cast<float>(q[at]) * most / 127.0F;
    }
  }
  const std::string description =
      format("int8 rows %lld x %lld of %s", (long long)rows, (long long)cols, name_of(dtype));
  everywhere(run, description, [&](const KernelTable& table, int threads, const std::string& what) {
    Output codes(rows * cols, 1, threads), scales(rows, 4, threads), out(rows * cols, size_of(dtype), threads);
    QuantizeRowsArgs args;
    args.x = x.memory.as<void>();
    args.dtype = dtype;
    args.rows = rows;
    args.cols = cols;
    args.q = codes.as<int8_t>();
    args.absmax = scales.as<float>();
    args.threads = threads;
    expect(run, check(args).ok(), what, "its arguments are refused");
    expect_status(run, table.quantize_int8(args), bad, 1, what);
    expect(run, codes.guards_intact() && scales.guards_intact(), what, "writes outside its outputs");
    if (bad >= 0) return;
    expect(run, equal(scales, absmax), what, "other scales than the rule's");
    expect(run, equal(codes, q), what, "other codes than the rule's");
    const Input exact_codes = Input::of(q, 1), exact_scales = Input::of(absmax, 1);
    const DequantizeRowsArgs inverse{
        {exact_codes.as<int8_t>(), exact_scales.as<float>()}, rows, cols, out.as<void>(), dtype, threads};
    expect(run, table.dequantize_int8(inverse).ok(), what, "fails to dequantize");
    expect(run, out.guards_intact(), what, "writes outside its output");
    expect(run, equal_numbers(out, back, dtype), what, "dequantizes to other numbers than the rule's");
  });
}

}  // namespace

void test_codecs(Run& run) {
  using Case = void (*)(Run&, Random&);
  const Case kinds[] = {quantize_4bit_case, dequantize_4bit_case, quantize_8bit_case, dequantize_8bit_case,
                        int8_rows_case};
  for (int64_t index = 0; index < run.cases; ++index) {
    Random random(run.seed * 1000003 + static_cast<uint64_t>(index));
    for (const Case each : kinds) each(run, random);
  }
}

}  // namespace nybble::test
