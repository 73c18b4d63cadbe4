// RMSNorm, gated activations and the rotary embedding, forward and backward, against a double-precision reference.
//
// u = 2^-24, gamma_n = n u / (1 - n u); a result is then rounded to its dtype.
//
// rms_norm    The sum of squares has relative error gamma_(cols + 2), rstd half of that and 3 u.
// backward    h = x rstd; of rstd (v - h mean(v h)) no term passes through more than 3 cols + 24 roundings.
// gated       e^-argument has relative error 4 u, and 6 |argument| u if the argument is computed (gelu_tanh). With
//             r = sigmoid(-argument), s = 1 - r has relative error e = (4 + r (4 + 6 |argument|)) u.
//             The slope is s (1 + m r), m = z argument'(z): r is off by s e + u, or where s is rounded to 1 by all of
//             r. What e^-argument loses where it is infinite is at most 2^-118.
// rotary      two products and a sum.
#include <cmath>
#include <limits>

#include "codec_rule.h"
#include "core/check.h"
#include "numbers.h"

namespace nybble::test {

namespace {

constexpr double kUnit = 0x1p-24;
constexpr double kUnderflow = 0x1p-118;

double gamma_of(double n) { return n * kUnit / (1.0 - n * kUnit); }

// A matrix where a kernel reads it, `stride` elements from row to row.
struct Matrix {
  Values values;
  int64_t stride = 0;

  double at(int64_t row, int64_t column) const { return values.exact[static_cast<size_t>(row * stride + column)]; }
  ElementRows rows() const { return {values.memory.as<uint8_t>(), stride}; }
};

Matrix random_matrix(Random& random, int64_t rows, int64_t cols, DType dtype, Magnitude magnitude) {
  Matrix matrix;
  matrix.stride = cols + (random.one_in(2) ? 0 : random.between(0, 5));
  const int64_t count = rows > 0 ? (rows - 1) * matrix.stride + cols : 0;
  matrix.values = encode(random_values(random, count, magnitude), dtype, random.between(0, 3));
  return matrix;
}

// One result of a kernel, and what it may be.
struct Result {
  const char* name;
  int64_t rows, cols;
  DType dtype;
  std::vector<double> exact, bound;

  Result(const char* of, int64_t rows_, int64_t cols_, DType as)
      : name(of),
        rows(rows_),
        cols(cols_),
        dtype(as),
        exact(static_cast<size_t>(rows_ * cols_)),
        bound(static_cast<size_t>(rows_ * cols_)) {}

  void set(int64_t row, int64_t column, double value, double off) {
    exact[static_cast<size_t>(row * cols + column)] = value;
    bound[static_cast<size_t>(row * cols + column)] = off;
  }

  void check(Run& run, const uint8_t* bytes, const std::string& what) const {
    for (size_t i = 0; i < exact.size(); ++i) {
      const double found = decode(bytes + static_cast<int64_t>(i) * size_of(dtype), dtype);
      double allowed = bound[i];
      if (dtype != DType::f32) allowed += unit_roundoff(dtype) * (std::fabs(exact[i]) + allowed);
      allowed += smallest_error(dtype);
      const bool overflows =
          std::isinf(found) && std::copysign(1.0, found) * exact[i] + allowed >= largest_finite(dtype);
      if (std::fabs(found - exact[i]) <= allowed || overflows) continue;
      return run.report.fail(
          what, format("%s, element %zu: %.9g, expected %.9g within %.3g", name, i, found, exact[i], allowed));
    }
  }
};

// A kernel that writes `results` to outputs of its own: with every number of threads the same bits, right ones, and no
// byte outside.
template <class Kernel>
void check_kernel(Run& run, const std::string& what, const std::vector<Result>& results, const Kernel& kernel) {
  std::vector<Output> first;
  for (int threads = 1; threads <= 3; ++threads) {
    std::vector<Output> outputs;
    for (const Result& result : results)
      outputs.emplace_back(result.rows * result.cols, size_of(result.dtype), threads);
    const std::string which = format("%s, %d threads", what.c_str(), threads);
    expect(run, kernel(outputs, threads).ok(), which, "fails");
    for (size_t i = 0; i < outputs.size(); ++i) {
      expect(run, outputs[i].guards_intact(), which, "writes outside its output");
      if (threads == 1) results[i].check(run, outputs[i].bytes(), which);
      if (threads > 1) expect(run, outputs[i].same(first[i]), which, "other bits than one thread");
    }
    if (threads == 1) first = std::move(outputs);
  }
}

template <class Args>
Status checked(Status (*kernel)(const Args&), const Args& args) {
  const Status status = check(args);
  return status.ok() ? kernel(args) : status;
}

DType random_dtype(Random& random) { return random.pick(std::vector<DType>{DType::f32, DType::f16, DType::bf16}); }

// Few columns, some, or several tasks of a row.
int64_t random_columns(Random& random) {
  if (random.one_in(12)) return random.between(16000, 33000);
  return random.one_in(2) ? random.between(1, 40) : random.between(41, 700);
}

// Few, or several tasks of them.
int64_t random_rows(Random& random, int64_t cols) {
  return random.between(1, cols > 10000 ? 3 : random.one_in(8) ? 1 + 60000 / cols : 12);
}

// ---- RMSNorm --------------------------------------------------------------------------------------------------------

void norm_case(Run& run, Random& random) {
  const int64_t cols = random_columns(random), rows = random_rows(random, cols);
  const DType dtype = random_dtype(random), weight_dtype = random_dtype(random);
  const DType wide = random.one_in(2) ? dtype : DType::f32;  // of y and its gradient
  // Within fp16's range.
  const Magnitude magnitude = {static_cast<int>(random.between(-3, 2)), static_cast<int>(random.between(0, 1))};
  const Matrix x = random_matrix(random, rows, cols, dtype, magnitude), g = random_matrix(random, rows, cols, wide, {});
  const Values weight = encode(random_values(random, cols, {}), weight_dtype, 1);
  const double offset = random.one_in(2) ? 1.0 : 0.0, eps = double{random.one_in(2) ? 1e-5F : 1e-6F};

  Result out("out", rows, cols, wide), rstd("rstd", rows, 1, DType::f32), grad_x("grad_x", rows, cols, dtype);
  Result grad_weight("grad_weight", 1, cols, DType::f32);
  std::vector<float> stored(static_cast<size_t>(rows));  // the rstd that backward gets
  std::vector<double> sums(static_cast<size_t>(cols)), sizes(static_cast<size_t>(cols));
  const auto n = static_cast<double>(cols);
  for (int64_t row = 0; row < rows; ++row) {
    double squares = 0.0;
    for (int64_t i = 0; i < cols; ++i) squares += x.at(row, i) * x.at(row, i);
    const double r = 1.0 / std::sqrt(squares / n + eps);
    rstd.set(row, 0, r, gamma_of(n / 2 + 5) * r);
    stored[static_cast<size_t>(row)] = static_cast<float>(r);
    double mean = 0.0, size = 0.0;
    for (int64_t i = 0; i < cols; ++i) {
      const double h = x.at(row, i) * r, v = g.at(row, i) * (weight.exact[static_cast<size_t>(i)] + offset);
      mean += v * h / n;
      size += std::fabs(v * h) / n;
    }
    for (int64_t i = 0; i < cols; ++i) {
      const double w = weight.exact[static_cast<size_t>(i)] + offset, h = x.at(row, i) * r, v = g.at(row, i) * w;
      const double tiny = 0x1p-140 * (1.0 + r) * (1.0 + std::fabs(w) + std::fabs(v)) * (1.0 + std::fabs(h));
      out.set(row, i, h * w, gamma_of(n / 2 + 8) * std::fabs(h * w) + tiny);
      grad_x.set(row, i, r * (v - h * mean), gamma_of(3 * n + 24) * r * (std::fabs(v) + std::fabs(h) * size) + tiny);
      sums[static_cast<size_t>(i)] += g.at(row, i) * h;
      sizes[static_cast<size_t>(i)] += std::fabs(g.at(row, i) * h);
    }
  }
  for (int64_t i = 0; i < cols; ++i) {
    const auto at = static_cast<size_t>(i);
    grad_weight.set(0, i, sums[at],
                    gamma_of(static_cast<double>(rows) + 8) * sizes[at] + static_cast<double>(rows) * 0x1p-140);
  }
  const bool weighted = random.one_in(2);
  const std::string shape = format("[%lld, %lld] %s, weight %s, %s, offset %g", (long long)rows, (long long)cols,
                                   name_of(dtype), name_of(weight_dtype), name_of(wide), offset);
  for (const KernelTable* table : run.tables) {
    check_kernel(run, format("%s: rms_norm %s", table->isa, shape.c_str()), {out, rstd},
                 [&](std::vector<Output>& outputs, int threads) {
                   RmsNormArgs args;
                   args.x = x.rows(), args.dtype = dtype, args.rows = rows, args.cols = cols;
                   args.weight = weight.memory.as<uint8_t>(), args.weight_dtype = weight_dtype;
                   args.offset = static_cast<float>(offset), args.eps = static_cast<float>(eps);
                   args.out = outputs[0].as<uint8_t>(), args.out_dtype = wide, args.rstd = outputs[1].as<float>();
                   args.threads = threads;
                   return checked(table->rms_norm, args);
                 });
    std::vector<Result> results = {grad_x};
    if (weighted) results.push_back(grad_weight);
    check_kernel(run, format("%s: rms_norm_backward %s", table->isa, shape.c_str()), results,
                 [&](std::vector<Output>& outputs, int threads) {
                   RmsNormBackwardArgs args;
                   args.x = x.rows(), args.dtype = dtype, args.grad = g.rows(), args.grad_dtype = wide;
                   args.rows = rows, args.cols = cols, args.offset = static_cast<float>(offset);
                   args.weight = weight.memory.as<uint8_t>(), args.weight_dtype = weight_dtype;
                   args.rstd = stored.data(), args.grad_x = outputs[0].as<uint8_t>(), args.threads = threads;
                   args.grad_weight = weighted ? outputs[1].as<float>() : nullptr;
                   return checked(table->rms_norm_backward, args);
                 });
    run.report.checked(table->isa);
  }
}

// ---- gated activations ----------------------------------------------------------------------------------------------

struct Activated {
  double value, slope, error, slope_bound;  // error: of value and of sigmoid, relative

  Activated(double z, Activation activation) {
    const bool silu = activation == Activation::silu;
    const double scale = 1.5957691216057308;  // 2 sqrt(2 / pi)
    const double argument = silu ? z : scale * (z + 0.044715 * z * z * z);
    const double m = silu ? z : scale * (z + 3 * 0.044715 * z * z * z);
    const double s = 1.0 / (1.0 + std::exp(-argument)), r = 1.0 / (1.0 + std::exp(argument));
    error = (4.0 + r * (4.0 + (silu ? 0.0 : 6.0 * std::fabs(argument)))) * kUnit;
    const double rest_error = argument > 17.0 ? r : s * (s * error + kUnit);
    value = z * s;
    slope = s * (1.0 + m * r);
    slope_bound = s * (1.0 + std::fabs(m) * r) * (error + 6 * kUnit) + rest_error * std::fabs(m) + kUnderflow;
  }
};

void gated_case(Run& run, Random& random) {
  const int64_t cols = random_columns(random), rows = random_rows(random, cols);
  const DType dtype = random_dtype(random);
  const Activation activation = random.one_in(2) ? Activation::silu : Activation::gelu_tanh;
  const Magnitude magnitude = {0, static_cast<int>(random.between(0, 3))};
  const Matrix gate = random_matrix(random, rows, cols, dtype, magnitude);
  const Matrix up = random_matrix(random, rows, cols, dtype, {}), g = random_matrix(random, rows, cols, dtype, {});
  Result out("out", rows, cols, dtype), grad_gate("grad_gate", rows, cols, dtype),
      grad_up("grad_up", rows, cols, dtype);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < cols; ++i) {
      const Activated act(gate.at(row, i), activation);
      const double u = up.at(row, i), product = g.at(row, i) * u, v = g.at(row, i) * act.value;
      out.set(row, i, act.value * u,
              (act.error + 4 * kUnit) * std::fabs(act.value * u) + kUnderflow * std::fabs(u) + 0x1p-149);
      grad_gate.set(
          row, i, product * act.slope,
          (act.slope_bound * (1 + 4 * kUnit) + 4 * kUnit * std::fabs(act.slope)) * std::fabs(product) + 0x1p-147);
      grad_up.set(row, i, v, (act.error + 6 * kUnit) * std::fabs(v) + kUnderflow * std::fabs(g.at(row, i)) + 0x1p-149);
    }
  }
  const std::string shape = format("[%lld, %lld] %s, activation %d", (long long)rows, (long long)cols, name_of(dtype),
                                   static_cast<int>(activation));
  for (const KernelTable* table : run.tables) {
    check_kernel(run, format("%s: gated %s", table->isa, shape.c_str()), {out},
                 [&](std::vector<Output>& outputs, int threads) {
                   GatedArgs args;
                   args.gate = gate.rows(), args.up = up.rows(), args.activation = activation, args.dtype = dtype;
                   args.rows = rows, args.cols = cols, args.out = outputs[0].as<uint8_t>(), args.threads = threads;
                   return checked(table->gated, args);
                 });
    check_kernel(run, format("%s: gated_backward %s", table->isa, shape.c_str()), {grad_gate, grad_up},
                 [&](std::vector<Output>& outputs, int threads) {
                   GatedBackwardArgs args;
                   args.grad = g.rows(), args.gate = gate.rows(), args.up = up.rows();
                   args.activation = activation, args.dtype = dtype, args.rows = rows, args.cols = cols;
                   args.grad_gate = outputs[0].as<uint8_t>(), args.grad_up = outputs[1].as<uint8_t>();
                   args.threads = threads;
                   return checked(table->gated_backward, args);
                 });
    run.report.checked(table->isa);
  }
}

// ---- the rotary embedding -------------------------------------------------------------------------------------------

void rotary_case(Run& run, Random& random) {
  const int64_t batch = random.between(1, 3), heads = random.between(1, 4), length = random.between(1, 12);
  const int64_t half = random.one_in(4) ? random.between(60, 3000) : random.between(1, 40), dim = 2 * half;
  const bool shared = random.one_in(2), transposed = random.one_in(2), by_position = random.one_in(2);
  const DType dtype = random_dtype(random), table_dtype = random_dtype(random);
  const DType wide = random.one_in(2) ? dtype : DType::f32;
  const Values x = encode(random_values(random, batch * heads * length * dim, {}), dtype, 1);
  const Values cos = encode(random_values(random, (shared ? 1 : batch) * length * dim, {}), table_dtype, 1);
  const Values sin = encode(random_values(random, (shared ? 1 : batch) * length * dim, {}), table_dtype, 2);
  // Of batch, heads and length: [batch, length, heads, dim] in memory or [batch, heads, length, dim].
  const int64_t strides[3] = {heads * length * dim, by_position ? dim : length * dim, by_position ? heads * dim : dim};
  Result out("out", batch * heads * length, dim, wide);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t t = 0; t < length; ++t) {
        const int64_t at = b * strides[0] + h * strides[1] + t * strides[2];
        const int64_t table = ((shared ? 0 : b) * length + t) * dim;
        for (int64_t i = 0; i < dim; ++i) {
          const int64_t other = i < half ? i + half : i - half;
          const double s = sin.exact[static_cast<size_t>(table + (transposed ? other : i))];
          const double first = x.exact[static_cast<size_t>(at + i)] * cos.exact[static_cast<size_t>(table + i)];
          const double second = x.exact[static_cast<size_t>(at + other)] * ((i < half) == transposed ? s : -s);
          out.set(at / dim, i, first + second, gamma_of(3) * (std::fabs(first) + std::fabs(second)) + 0x1p-148);
        }
      }
    }
  }
  const std::string shape =
      format("[%lld, %lld, %lld, %lld] %s, tables %s, %s%s", (long long)batch, (long long)heads, (long long)length,
             (long long)dim, name_of(dtype), name_of(table_dtype), name_of(wide), transposed ? ", transposed" : "");
  for (const KernelTable* table : run.tables) {
    check_kernel(run, format("%s: rotary %s", table->isa, shape.c_str()), {out},
                 [&](std::vector<Output>& outputs, int threads) {
                   RotaryArgs args;
                   args.x = x.memory.as<uint8_t>(), args.dtype = dtype, args.batch = batch, args.heads = heads;
                   args.length = length, args.dim = dim, args.cos = cos.memory.as<uint8_t>();
                   args.sin = sin.memory.as<uint8_t>(), args.table_dtype = table_dtype;
                   args.table_stride = shared ? 0 : length * dim, args.transposed = transposed;
                   args.out = outputs[0].as<uint8_t>(), args.out_dtype = wide, args.threads = threads;
                   for (int i = 0; i < 3; ++i) args.x_strides[i] = args.out_strides[i] = strides[i];
                   return checked(table->rotary, args);
                 });
    run.report.checked(table->isa);
  }
}

// ---- arguments ------------------------------------------------------------------------------------------------------

template <class Args, class Spoil>
void refused(Run& run, const Args& good, const char* argument, const Spoil& spoil) {
  Args bad = good;
  spoil(&bad);
  const Status status = check(bad);
  expect(run, status.code == Code::bad_argument && std::string(argument) == status.what,
         format("an elementwise kernel with a bad %s", argument), "is not refused");
}

void refused_arguments(Run& run) {
  float numbers[16] = {};
  RmsNormArgs norm;
  norm.x = {numbers, 4}, norm.rows = norm.cols = 4, norm.weight = norm.out = norm.rstd = numbers;
  expect(run, check(norm).ok(), "rms_norm", "its arguments are refused");
  refused(run, norm, "x", [](RmsNormArgs* args) { args->x.data = nullptr; });
  refused(run, norm, "x", [](RmsNormArgs* args) { args->x.stride = -1; });
  refused(run, norm, "weight", [](RmsNormArgs* args) { args->weight = nullptr; });
  refused(run, norm, "rstd", [](RmsNormArgs* args) { args->rstd = nullptr; });
  refused(run, norm, "rows", [](RmsNormArgs* args) { args->rows = -1; });
  refused(run, norm, "cols", [](RmsNormArgs* args) { args->cols = int64_t{1} << 45; });
  refused(run, norm, "out.dtype", [](RmsNormArgs* args) { args->dtype = DType::f16, args->out_dtype = DType::bf16; });

  RmsNormBackwardArgs backward;
  backward.x = backward.grad = {numbers, 4}, backward.rows = backward.cols = 4;
  backward.weight = backward.rstd = numbers, backward.grad_x = numbers;
  expect(run, check(backward).ok(), "rms_norm_backward", "its arguments are refused");
  refused(run, backward, "grad", [](RmsNormBackwardArgs* args) { args->grad.data = nullptr; });
  refused(run, backward, "grad_x", [](RmsNormBackwardArgs* args) { args->grad_x = nullptr; });

  GatedArgs forward;
  forward.gate = forward.up = {numbers, 4}, forward.rows = forward.cols = 4, forward.out = numbers;
  expect(run, check(forward).ok(), "gated", "its arguments are refused");
  refused(run, forward, "up", [](GatedArgs* args) { args->up.data = nullptr; });
  refused(run, forward, "activation", [](GatedArgs* args) { args->activation = static_cast<Activation>(2); });
  refused(run, forward, "threads", [](GatedArgs* args) { args->threads = 0; });

  GatedBackwardArgs both;
  both.grad = both.gate = both.up = {numbers, 4}, both.rows = both.cols = 4, both.grad_gate = both.grad_up = numbers;
  expect(run, check(both).ok(), "gated_backward", "its arguments are refused");
  refused(run, both, "grad_up", [](GatedBackwardArgs* args) { args->grad_up = nullptr; });

  RotaryArgs turn;
  turn.x = turn.cos = turn.sin = numbers, turn.out = numbers;
  turn.batch = turn.heads = turn.length = 2, turn.dim = 2;
  expect(run, check(turn).ok(), "rotary", "its arguments are refused");
  refused(run, turn, "dim", [](RotaryArgs* args) { args->dim = 3; });
  refused(run, turn, "sin", [](RotaryArgs* args) { args->sin = nullptr; });
  refused(run, turn, "x_strides", [](RotaryArgs* args) { args->x_strides[1] = -1; });
  refused(run, turn, "out_strides", [](RotaryArgs* args) { args->out_strides[2] = -1; });
  refused(run, turn, "table_stride", [](RotaryArgs* args) { args->table_stride = -1; });
}

}  // namespace

void test_elementwise(Run& run) {
  refused_arguments(run);
  for (int64_t index = 0; index < run.cases; ++index) {
    Random random(run.seed * 1000033 + static_cast<uint64_t>(index));
    norm_case(run, random);
    gated_case(run, random);
    rotary_case(run, random);
  }
}

}  // namespace nybble::test
