#include "linear_problems.h"

#include <cmath>
#include <utility>

namespace nybble::test {

namespace {

const std::vector<DType> kDTypes = {DType::f32, DType::f16, DType::bf16};

Scales random_scales(Random& random, DType dtype) {
  if (dtype == DType::f16 || !random.one_in(3)) {
    return random.pick<Scales>({{{0, 0}, {0, 0}}, {{0, 0}, {-2, 0}}, {{-7, 0}, {0, 0}}, {{3, 0}, {0, 1}}});
  }
  return random.pick<Scales>({{{0, 9}, {0, 9}},
                              {{18, 0}, {17, 0}},
                              {{-39, 0}, {0, 0}},
                              {{0, 0}, {-39, 0}},
                              {{-39, 0}, {30, 0}},
                              {{-20, 1}, {-20, 1}},
                              {{35, 0}, {-35, 0}},
                              {{38, 0}, {-35, 0}},  // eight products with bare codes may overflow
                              {{-35, 0}, {35, 0}}});
}

std::vector<float> as_floats(const std::vector<double>& values) {
  std::vector<float> floats(values.size());
  for (size_t i = 0; i < values.size(); ++i) floats[i] = static_cast<float>(values[i]);
  return floats;
}

void make_int8_weight(Random& random, Magnitude magnitude, Problem* problem) {
  Weight& weight = problem->args.weight;
  weight.int8 = true;
  std::vector<int8_t> q(static_cast<size_t>(weight.rows * weight.cols));
  for (int8_t& level : q) level = static_cast<int8_t>(random.between(-127, 127));
  std::vector<float> absmax = as_floats(random_values(random, weight.rows, magnitude));
  for (float& scale : absmax) scale = random.one_in(10) ? 0.0F : std::fabs(scale);
  for (int64_t row = 0; row < weight.rows; ++row) {
    const float scale = absmax[static_cast<size_t>(row)];
    for (int64_t i = 0; i < weight.cols; ++i) {
      const int8_t level = q[static_cast<size_t>(row * weight.cols + i)];
      problem->weight.push_back(level * static_cast<double>(scale) / 127.0);
      problem->weight_floats.push_back(static_cast<float>(level) * (scale / 127.0F));
    }
  }
  problem->packed = Input::of(q, random.below(5));
  problem->plain = Input::of(absmax, random.below(3));
  weight.rows8 = {problem->packed.as<int8_t>(), problem->plain.as<float>()};
}

// Scales of blocks, plain or nested; returns what they are, in fp32 as every decoder computes them.
std::vector<float> make_scales(Random& random, int64_t blocks, Magnitude magnitude, Problem* problem) {
  BlockScales& scales = problem->args.weight.packed4.scales;
  if (random.one_in(2)) {
    const std::vector<float> plain = as_floats(random_values(random, blocks, magnitude));
    problem->plain = Input::of(plain, random.below(3));
    scales.plain = problem->plain.as<float>();
    return plain;
  }
  scales.nested_shift = random.one_in(2) ? 8 : static_cast<int>(random.below(3));
  std::vector<uint8_t> codes(static_cast<size_t>(blocks));
  for (uint8_t& code : codes) code = static_cast<uint8_t>(random.next());
  const int64_t groups = divide_up(blocks, int64_t{1} << scales.nested_shift);
  const std::vector<float> nested = as_floats(random_values(random, groups, magnitude));
  const std::vector<float> map = as_floats(random_values(random, 256, {0, 0}));
  const std::vector<float> offset = as_floats(random_values(random, 1, {magnitude.exponent, 0}));
  problem->codes = Input::of(codes, random.below(5));
  problem->nested = Input::of(nested, random.below(3));
  problem->map = Input::of(map, random.below(3));
  problem->offset = Input::of(offset, random.below(3));
  scales.codes = problem->codes.as<uint8_t>();
  scales.nested = problem->nested.as<float>();
  scales.map = problem->map.as<float>();
  scales.offset = problem->offset.as<float>();
  std::vector<float> all(static_cast<size_t>(blocks));
  for (size_t i = 0; i < all.size(); ++i) {
    const float product = map[codes[i]] * nested[i >> scales.nested_shift];
    all[i] = product + offset[0];
  }
  return all;
}

void make_4bit_weight(Random& random, Magnitude magnitude, Problem* problem) {
  Weight& weight = problem->args.weight;
  const int64_t count = weight.rows * weight.cols;
  weight.packed4.block_shift = static_cast<int>(random.one_in(2) ? random.between(5, 6) : random.between(5, 12));
  std::vector<uint8_t> bytes(static_cast<size_t>((count + 1) / 2));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.next());
  std::vector<float> codes(16);
  for (float& code : codes) code = static_cast<float>(2.0 * random.uniform() - 1.0);
  const auto scales = make_scales(random, divide_up(count, weight.packed4.block_size()), magnitude, problem);
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t byte = bytes[static_cast<size_t>(i / 2)];
    const float code = codes[i % 2 == 0 ? byte >> 4 : byte & 15];
    const float scale = scales[static_cast<size_t>(i >> weight.packed4.block_shift)];
    problem->weight.push_back(static_cast<double>(code) * scale);
    problem->weight_floats.push_back(code * scale);
  }
  problem->scales = scales;
  problem->packed = Input::of(bytes, random.below(5));
  problem->codebook = Input::of(codes, random.below(3));
  weight.packed4.packed = problem->packed.as<uint8_t>();
  weight.packed4.codebook = problem->codebook.as<float>();
}

// Rows of x with a gap between them that holds NaN: nothing may be computed from it.
void make_x(Random& random, Magnitude magnitude, Problem* problem) {
  LinearArgs& args = problem->args;
  const int64_t length = args.contraction();
  args.x_stride = random.one_in(2) ? length : length + random.between(1, 9);
  if (random.one_in(8)) args.x_stride = random.one_in(2) ? 0 : 1;  // one row many times; rows that overlap
  const int64_t count = args.m == 0 || length == 0 ? 0 : (args.m - 1) * args.x_stride + length;
  std::vector<double> values = random_values(random, count, magnitude);
  if (random.one_in(4)) {
    const int64_t from = random.below(count + 1), run = random.one_in(2) ? 3 : 2 * length;
    for (int64_t i = from; i < smaller(count, from + run); ++i) values[static_cast<size_t>(i)] = 0.0;
  }
  for (int64_t i = 0; i < count && args.x_stride > length; ++i) {
    if (i % args.x_stride >= length) values[static_cast<size_t>(i)] = std::nan("");
  }
  problem->x = encode(std::move(values), args.dtype, random.below(9));
  args.x = problem->x.memory.as<void>();
}

void make_extras(Random& random, Problem* problem) {
  LinearArgs& args = problem->args;
  if (random.one_in(2)) {
    SidePath& side = args.side;
    side.rank = random.one_in(2) ? random.pick<int64_t>({1, 2, 8, 16, 31, 33}) : random.between(1, 40);
    problem->left = encode(random_values(random, args.m * side.rank, {0, 0}), random.pick(kDTypes), random.below(9));
    problem->right =
        encode(random_values(random, side.rank * args.columns(), {0, 0}), random.pick(kDTypes), random.below(9));
    side.left = problem->left.memory.as<void>();
    side.left_dtype = problem->left.dtype;
    side.right = problem->right.memory.as<void>();
    side.right_dtype = problem->right.dtype;
  }
  if (!args.grad_input && random.one_in(2)) {
    problem->bias = encode(random_values(random, args.columns(), {0, 0}), random.pick(kDTypes), random.below(9));
    args.bias = problem->bias.memory.as<void>();
    args.bias_dtype = problem->bias.dtype;
  }
}

// Around vectors, pairs, tiles of 16 rows and 64 columns, blocks of 64, chunks of 256 and 512.
int64_t random_size(Random& random, bool long_one) {
  const std::vector<int64_t> edges = {0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 130};
  const std::vector<int64_t> far = {192, 255, 256, 257, 320, 511, 512, 513, 514, 640, 1030};
  if (long_one && random.one_in(3)) return random.pick(far);
  return random.one_in(2) ? random.pick(edges) : random.between(1, 100);
}

}  // namespace

void make(Random& random, Problem* problem) {
  LinearArgs& args = problem->args;
  const std::vector<int64_t> heights = {0, 1, 2, 3, 5, 8, 9, 16, 17, 33, 49};
  args.m = random.one_in(2) ? random.between(1, kSmallM) : random.pick(heights);
  args.grad_input = random.one_in(3);
  args.dtype = random.pick(kDTypes);
  const bool wide = random.one_in(4);  // several tiles of columns, so that threads have something to share
  int64_t contraction = random_size(random, !wide);
  int64_t columns = random_size(random, wide);
  if (random.one_in(25)) {  // longer than the segment of small M, than the largest block
    contraction = random.pick<int64_t>({4096, 4104, 4168, 8200});
    columns = random.between(1, 9);
  }
  if (!args.grad_input && args.m <= kSmallM && !random.one_in(4))
    contraction = divide_up(contraction, 8) * 8;  // small M
  args.weight.rows = args.grad_input ? contraction : columns;
  args.weight.cols = args.grad_input ? columns : contraction;
  const Scales scales = random_scales(random, args.dtype);
  problem->magnitudes = scales;
  if (random.one_in(4)) {
    make_int8_weight(random, scales.weight, problem);
  } else {
    make_4bit_weight(random, scales.weight, problem);
  }
  make_x(random, scales.x, problem);
  make_extras(random, problem);
  const Weight& weight = args.weight;
  const std::string kind = weight.is_int8() ? "int8"
                                            : format("4-bit, block %lld, %s", (long long)weight.packed4.block_size(),
                                                     weight.packed4.scales.plain != nullptr ? "plain" : "nested");
  problem->description = format(
      "%s m %lld, weight %lld x %lld (%s), %s, x_stride %lld, rank %lld, %s, magnitudes %d and %d",
      args.grad_input ? "grad_input" : "forward", (long long)args.m, (long long)weight.rows, (long long)weight.cols,
      kind.c_str(), name_of(args.dtype), (long long)args.x_stride, (long long)args.side.rank,
      args.bias != nullptr ? "bias" : "no bias", scales.x.exponent, scales.weight.exponent);
}

}  // namespace nybble::test
