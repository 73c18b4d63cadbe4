#include "core/check.h"

#include <initializer_list>

namespace nybble {

namespace {

constexpr int64_t kMaxElements = int64_t{1} << 46;  // keeps every byte offset far from overflow

Status non_null(const void* pointer, int64_t count, const char* what) {
  return pointer == nullptr && count > 0 ? bad_argument(what, 0) : success();
}

Status in_range(int64_t value, int64_t low, int64_t high, const char* what) {
  return value < low || value > high ? bad_argument(what, value) : success();
}

Status valid_dtype(DType dtype, const char* what) { return in_range(static_cast<int64_t>(dtype), 0, 2, what); }

// The first failure of a list of checks.
Status first(std::initializer_list<Status> checks) {
  for (const Status& status : checks) {
    if (!status.ok()) return status;
  }
  return success();
}

Status block_size_ok(int64_t block_size) {
  return valid_block_size(block_size) ? success() : bad_argument("block_size", block_size);
}

Status check_adamw(const AdamWArgs& args) {
  return first({in_range(args.count, 0, kMaxElements, "count"), valid_dtype(args.dtype, "dtype"),
                valid_dtype(args.grad_dtype, "grad.dtype"), non_null(args.param, args.count, "param"),
                non_null(args.grad, args.count, "grad"),
                args.stochastic && args.dtype != DType::bf16 ? bad_argument("stochastic", 1) : success(),
                in_range(args.threads, 1, 4096, "threads")});
}

Status matrix_ok(int64_t rows, int64_t cols) {
  return first({in_range(rows, 0, kMaxElements, "rows"), in_range(cols, 0, kMaxElements, "cols"),
                rows > 0 && cols > kMaxElements / rows ? bad_argument("cols", cols) : success()});
}

// They are only read, so they may overlap, or be one row many times.
Status rows_ok(const ElementRows& rows, int64_t count, const char* what) {
  return first({non_null(rows.data, count, what), in_range(rows.stride, 0, kMaxElements, what)});
}

// Two dtypes that a kernel converts between: the same, or one of them fp32.
Status pair_ok(DType dtype, DType x, const char* what) {
  return dtype == x || dtype == DType::f32 || x == DType::f32 ? success()
                                                              : bad_argument(what, static_cast<int64_t>(dtype));
}

Status activation_ok(Activation activation) { return in_range(static_cast<int64_t>(activation), 0, 1, "activation"); }

}  // namespace

Status check(const Packed4& weight, int64_t count) {
  const BlockScales& scales = weight.scales;
  const bool nested = scales.plain == nullptr;
  return first({in_range(count, 0, kMaxElements, "count"), block_size_ok(weight.block_size()),
                non_null(weight.packed, count, "packed"), non_null(weight.codebook, 1, "codebook"),
                nested ? non_null(scales.codes, count, "absmax") : success(),
                nested ? non_null(scales.nested, count, "nested_absmax") : success(),
                nested ? non_null(scales.map, count, "nested_map") : success(),
                nested ? non_null(scales.offset, count, "nested_offset") : success(),
                in_range(scales.nested_shift, 0, 46, "nested_block_size")});
}

Status check(const Quantize4Args& args) {
  return first(
      {in_range(args.count, 0, kMaxElements, "count"), valid_dtype(args.dtype, "dtype"), block_size_ok(args.block_size),
       non_null(args.x, args.count, "x"), non_null(args.codebook, 1, "codebook"),
       non_null(args.packed, args.count, "packed"), non_null(args.absmax, args.count, "absmax"),
       in_range(static_cast<int64_t>(args.search), 0, 3, "search"), in_range(args.threads, 1, 4096, "threads"),
       args.search == Search::importance
           ? first({in_range(args.columns, 1, kMaxElements, "columns"), non_null(args.importance, 1, "importance")})
           : success()});
}

Status check(const Dequantize4Args& args) {
  return first({check(args.source, args.count), valid_dtype(args.dtype, "dtype"), non_null(args.out, args.count, "out"),
                in_range(args.threads, 1, 4096, "threads")});
}

Status check(const Quantize8Args& args) {
  return first({in_range(args.count, 0, kMaxElements, "count"), valid_dtype(args.dtype, "dtype"),
                in_range(args.block_size, 1, kMaxElements, "block_size"), non_null(args.x, args.count, "x"),
                non_null(args.map, 1, "map"), non_null(args.codes, args.count, "codes"),
                non_null(args.absmax, args.count, "absmax"), in_range(args.threads, 1, 4096, "threads")});
}

Status check(const Dequantize8Args& args) {
  return first({in_range(args.count, 0, kMaxElements, "count"), valid_dtype(args.dtype, "dtype"),
                in_range(args.block_size, 1, kMaxElements, "block_size"), non_null(args.codes, args.count, "codes"),
                non_null(args.absmax, args.count, "absmax"), non_null(args.map, 1, "map"),
                non_null(args.out, args.count, "out"), in_range(args.threads, 1, 4096, "threads")});
}

Status check(const QuantizeRowsArgs& args) {
  const int64_t count = args.rows > 0 && args.cols > 0 ? 1 : 0;
  return first({in_range(args.rows, 0, kMaxElements, "rows"), in_range(args.cols, 0, kMaxElements, "cols"),
                valid_dtype(args.dtype, "dtype"), non_null(args.x, count, "x"), non_null(args.q, count, "q"),
                non_null(args.absmax, args.rows, "absmax"), in_range(args.threads, 1, 4096, "threads")});
}

Status check(const DequantizeRowsArgs& args) {
  const int64_t count = args.rows > 0 && args.cols > 0 ? 1 : 0;
  return first({in_range(args.rows, 0, kMaxElements, "rows"), in_range(args.cols, 0, kMaxElements, "cols"),
                valid_dtype(args.dtype, "dtype"), non_null(args.source.q, count, "q"),
                non_null(args.source.absmax, args.rows, "absmax"), non_null(args.out, count, "out"),
                in_range(args.threads, 1, 4096, "threads")});
}

Status check(const RoundArgs& args) {
  constexpr int64_t kMaxColumns = INT32_MAX;  // an order is of 32-bit numbers
  const int64_t count = args.rows > 0 && args.cols > 0 ? 1 : 0;
  const Status found =
      first({in_range(args.rows, 0, kMaxColumns, "rows"), in_range(args.cols, 0, kMaxColumns, "cols"),
             args.block_shift < 0 || args.block_shift > 46 ? bad_argument("block_size", args.block_shift)
                                                           : block_size_ok(int64_t{1} << args.block_shift),
             in_range(args.sweeps, 0, 1000000, "sweeps"), non_null(args.target, count, "target"),
             non_null(args.matrix, count, "matrix"), non_null(args.absmax, count, "absmax"),
             non_null(args.codes, count, "codes"), in_range(args.threads, 1, 4096, "threads")});
  if (!found.ok() || args.order == nullptr) return found;
  for (int64_t p = 0; p < args.cols; ++p) {
    if (args.order[p] < 0 || args.order[p] >= args.cols) return bad_argument("order", args.order[p]);
  }
  return success();
}

Status check(const AdamW32Args& args) {
  return first(
      {check_adamw(args.common), non_null(args.m, args.common.count, "m"), non_null(args.v, args.common.count, "v")});
}

Status check(const AdamW8Args& args) {
  const int64_t count = args.common.count;
  return first({check_adamw(args.common), block_size_ok(args.block_size), non_null(args.m, count, "m"),
                non_null(args.v, count, "v"), non_null(args.m_absmax, count, "m_absmax"),
                non_null(args.v_absmax, count, "v_absmax"), non_null(args.m_map, 1, "m_map"),
                non_null(args.v_map, 1, "v_map")});
}

Status check(const SquaresArgs& args) {
  return first({in_range(args.count, 0, kMaxElements, "count"), valid_dtype(args.dtype, "dtype"),
                non_null(args.x, args.count, "x"), non_null(args.sums, args.count, "sums"),
                in_range(args.threads, 1, 4096, "threads")});
}

Status check(const RmsNormArgs& args) {
  const Status sizes = matrix_ok(args.rows, args.cols);
  if (!sizes.ok()) return sizes;
  const int64_t count = args.rows * args.cols;
  return first({rows_ok(args.x, count, "x"), valid_dtype(args.dtype, "dtype"), non_null(args.weight, count, "weight"),
                valid_dtype(args.weight_dtype, "weight.dtype"), valid_dtype(args.out_dtype, "out.dtype"),
                pair_ok(args.out_dtype, args.dtype, "out.dtype"), non_null(args.out, count, "out"),
                non_null(args.rstd, args.rows, "rstd"), in_range(args.threads, 1, 4096, "threads")});
}

Status check(const RmsNormBackwardArgs& args) {
  const Status sizes = matrix_ok(args.rows, args.cols);
  if (!sizes.ok()) return sizes;
  const int64_t count = args.rows * args.cols;
  return first({rows_ok(args.x, count, "x"), rows_ok(args.grad, count, "grad"), valid_dtype(args.dtype, "dtype"),
                valid_dtype(args.grad_dtype, "grad.dtype"), pair_ok(args.grad_dtype, args.dtype, "grad.dtype"),
                non_null(args.weight, count, "weight"), valid_dtype(args.weight_dtype, "weight.dtype"),
                non_null(args.rstd, args.rows, "rstd"), non_null(args.grad_x, count, "grad_x"),
                in_range(args.threads, 1, 4096, "threads")});
}

Status check(const GatedArgs& args) {
  const Status sizes = matrix_ok(args.rows, args.cols);
  if (!sizes.ok()) return sizes;
  const int64_t count = args.rows * args.cols;
  return first({rows_ok(args.gate, count, "gate"), rows_ok(args.up, count, "up"), activation_ok(args.activation),
                valid_dtype(args.dtype, "dtype"), non_null(args.out, count, "out"),
                in_range(args.threads, 1, 4096, "threads")});
}

Status check(const GatedBackwardArgs& args) {
  const Status sizes = matrix_ok(args.rows, args.cols);
  if (!sizes.ok()) return sizes;
  const int64_t count = args.rows * args.cols;
  return first({rows_ok(args.grad, count, "grad"), rows_ok(args.gate, count, "gate"), rows_ok(args.up, count, "up"),
                activation_ok(args.activation), valid_dtype(args.dtype, "dtype"),
                non_null(args.grad_gate, count, "grad_gate"), non_null(args.grad_up, count, "grad_up"),
                in_range(args.threads, 1, 4096, "threads")});
}

Status check(const RotaryArgs& args) {
  const Status sizes = first({in_range(args.batch, 0, kMaxElements, "batch"), matrix_ok(args.heads, args.length),
                              in_range(args.dim, 0, INT32_MAX, "dim")});
  if (!sizes.ok()) return sizes;
  const int64_t count = args.batch > 0 && args.heads > 0 && args.length > 0 && args.dim > 0 ? 1 : 0;
  for (const int64_t stride : args.x_strides) {
    if (stride < 0 || stride > kMaxElements) return bad_argument("x_strides", stride);
  }
  for (const int64_t stride : args.out_strides) {
    if (stride < 0 || stride > kMaxElements) return bad_argument("out_strides", stride);
  }
  return first({args.dim % 2 != 0 ? bad_argument("dim", args.dim) : success(), non_null(args.x, count, "x"),
                valid_dtype(args.dtype, "dtype"), non_null(args.cos, count, "cos"), non_null(args.sin, count, "sin"),
                valid_dtype(args.table_dtype, "table.dtype"),
                in_range(args.table_stride, 0, kMaxElements, "table_stride"), non_null(args.out, count, "out"),
                valid_dtype(args.out_dtype, "out.dtype"), pair_ok(args.out_dtype, args.dtype, "out.dtype"),
                in_range(args.threads, 1, 4096, "threads")});
}

Status check(const DenseArgs& args) {
  const Status sizes = first({in_range(args.m, 0, kMostDenseRows, "m"), matrix_ok(args.rows, args.cols)});
  if (!sizes.ok()) return sizes;
  const int64_t products = args.m * args.rows > 0 ? args.cols : 0;
  return first({rows_ok(args.x, products, "x"), valid_dtype(args.dtype, "dtype"),
                non_null(args.weight, products, "weight"), valid_dtype(args.weight_dtype, "weight.dtype"),
                valid_dtype(args.bias_dtype, "bias.dtype"), non_null(args.out, args.m * args.rows, "out"),
                valid_dtype(args.out_dtype, "out.dtype"), in_range(args.threads, 1, 4096, "threads")});
}

Status check(const AttentionStepArgs& args) {
  const Status sizes = first({in_range(args.batch, 0, INT32_MAX, "batch"), in_range(args.heads, 0, INT32_MAX, "heads"),
                              in_range(args.group, 1, INT32_MAX, "group"), in_range(args.depth, 0, INT32_MAX, "depth"),
                              in_range(args.slot, 0, kMaxElements, "slot")});
  if (!sizes.ok()) return sizes;
  if (args.heads % args.group != 0) return bad_argument("group", args.group);
  if (args.cos != nullptr && args.depth % 2 != 0) return bad_argument("depth", args.depth);
  const int64_t count = args.batch > 0 && args.heads > 0 && args.depth > 0 ? 1 : 0;
  const Status pointers = first({non_null(args.query, count, "query"), non_null(args.key, count, "key"),
                                 non_null(args.value, count, "value"), valid_dtype(args.dtype, "dtype"),
                                 args.cos != nullptr ? non_null(args.sin, count, "sin") : success(),
                                 valid_dtype(args.table_dtype, "table.dtype"), non_null(args.keys, count, "keys"),
                                 non_null(args.values, count, "values"), non_null(args.first, count, "first"),
                                 non_null(args.out, count, "out"), in_range(args.threads, 1, 4096, "threads")});
  if (!pointers.ok()) return pointers;
  for (const int64_t stride :
       {args.query_stride, args.key_stride, args.value_stride, args.batch_stride, args.head_stride}) {
    if (stride < 0 || stride > kMaxElements) return bad_argument("stride", stride);
  }
  for (int64_t row = 0; row < args.batch * count; ++row) {
    if (args.first[row] < 0 || args.first[row] > args.slot) return bad_argument("first", args.first[row]);
  }
  return success();
}

Status check(const LinearArgs& args) {
  const Weight& weight = args.weight;
  const int64_t rows = weight.rows;
  const int64_t cols = weight.cols;
  const Status sizes =
      first({in_range(rows, 0, kMaxElements, "out_features"), in_range(cols, 0, kMaxElements, "in_features"),
             in_range(static_cast<int64_t>(args.compute), 0, args.grad_input ? 0 : 1, "compute"),
             args.outlier_threshold >= 0.0F && (args.outlier_threshold == 0.0F || args.compute == Compute::int8)
                 ? success()
                 : bad_argument("outlier_threshold", static_cast<int64_t>(args.compute)),
             in_range(args.m, 0, kMaxElements, "m"), valid_dtype(args.dtype, "dtype"),
             in_range(args.side.rank, 0, kMaxElements, "rank"), in_range(args.threads, 1, 4096, "threads")});
  if (!sizes.ok()) return sizes;
  const int64_t count = rows > 0 && cols > kMaxElements / rows ? -1 : rows * cols;
  if (count < 0) return bad_argument("in_features", cols);
  const int64_t rank = args.side.rank;
  return first({weight.is_int8()
                    ? first({non_null(weight.rows8.absmax, rows, "absmax"), non_null(weight.rows8.q, count, "packed")})
                    : check(weight.packed4, count),
                non_null(args.x, args.m * args.contraction(), "x"),
                // x is only read, so its rows may overlap, or be one row many times (an expanded tensor).
                args.m > 1 ? in_range(args.x_stride, 0, kMaxElements, "x_stride") : success(),
                non_null(args.out, args.m * args.columns(), "out"), non_null(args.side.left, args.m * rank, "side"),
                non_null(args.side.right, rank * args.columns(), "side_weight"),
                valid_dtype(args.side.left_dtype, "side.dtype"),
                valid_dtype(args.side.right_dtype, "side_weight.dtype"), valid_dtype(args.bias_dtype, "bias.dtype"),
                args.grad_input && args.bias != nullptr ? bad_argument("bias", 1) : success()});
}

namespace {

Status check_factor_sizes(int64_t m, int64_t k, int64_t rank, int64_t x_stride, int threads) {
  const Status sizes =
      first({in_range(m, 0, kMaxElements, "m"), in_range(k, 0, kMaxElements, "k"), in_range(rank, 0, kMostRank, "rank"),
             in_range(x_stride, 0, kMaxElements, "x_stride"), in_range(threads, 1, 4096, "threads")});
  if (!sizes.ok()) return sizes;
  return m > 0 && k > kMaxElements / m ? bad_argument("k", k) : success();
}

}  // namespace

Status check(const FactorArgs& args) {
  const Status sizes = check_factor_sizes(args.m, args.k, args.rank, args.x_stride, args.threads);
  if (!sizes.ok()) return sizes;
  return first({non_null(args.x, args.m * args.k, "x"), non_null(args.factor, args.k * args.rank, "factor"),
                valid_dtype(args.factor_dtype, "factor.dtype"), non_null(args.out, args.m * args.rank, "out")});
}

Status check(const FactorGradArgs& args) {
  const Status sizes = check_factor_sizes(args.m, args.k, args.rank, args.x_stride, args.threads);
  if (!sizes.ok()) return sizes;
  return first({non_null(args.left, args.m * args.rank, "left"), non_null(args.x, args.m * args.k, "x"),
                non_null(args.out, args.k * args.rank, "out"),
                in_range(args.out_rank_stride, 0, kMaxElements, "out_rank_stride"),
                in_range(args.out_column_stride, 0, kMaxElements, "out_column_stride")});
}

namespace {

// Sizes, and the number of scores, which is below 0 where there are too many.
Status check_inputs(const AttentionInputs& args, int64_t* count) {
  const Status sizes = first(
      {in_range(args.batches, 0, kMaxElements, "batches"), in_range(args.heads, 0, kMaxElements, "heads"),
       in_range(args.rows, 0, kMaxElements, "rows"), in_range(args.cols, 0, kMaxElements, "cols"),
       in_range(args.depth, 1, kMaxHeadDepth, "depth"), in_range(args.value_depth, 1, kMaxHeadDepth, "value_depth"),
       in_range(args.group, 1, larger(args.heads, 1), "group"), valid_dtype(args.dtype, "dtype"),
       valid_dtype(args.mask_dtype, "mask.dtype"), in_range(args.diagonal, -kMaxElements, kMaxElements, "diagonal"),
       in_range(args.threads, 1, 4096, "threads")});
  if (!sizes.ok()) return sizes;
  if (args.heads % args.group != 0) return bad_argument("group", args.group);
  *count = 1;
  for (const int64_t size : {args.batches, args.heads, args.rows, args.cols}) {
    if (size > 0 && *count > kMaxElements / size) return bad_argument("cols", args.cols);
    *count *= size;
  }
  return success();
}

// What is only read may overlap along a stride.
Status check_strides(const AttentionTensor& x, const char* what) {
  return first({in_range(x.batch_stride, 0, kMaxElements, what), in_range(x.head_stride, 0, kMaxElements, what),
                in_range(x.row_stride, 0, kMaxElements, what)});
}

Status check_tensor(const AttentionTensor& x, int64_t count, const char* what) {
  return first({non_null(x.data, count, what), check_strides(x, what)});
}

Status check_tensors(const AttentionInputs& args, int64_t count) {
  return first({check_tensor(args.query, count, "query"), check_tensor(args.key, count, "key"),
                check_tensor(args.value, count, "value"), check_strides(args.mask, "mask")});
}

}  // namespace

Status check(const AttentionForwardArgs& args) {
  int64_t count = 0;
  const Status inputs = check_inputs(args, &count);
  if (!inputs.ok()) return inputs;
  const int64_t queries = args.batches * args.heads * args.rows;
  return first({check_tensors(args, count), check_tensor(args.output, queries, "output"),
                non_null(args.logsumexp, queries, "logsumexp")});
}

Status check(const AttentionArgs& args) {
  int64_t count = 0;
  const Status inputs = first({check_inputs(args, &count), valid_dtype(args.out_dtype, "out.dtype")});
  if (!inputs.ok()) return inputs;
  return first({check_tensors(args, count), check_tensor(args.output, count, "output"),
                check_tensor(args.grad_output, count, "grad_output"), check_tensor(args.logsumexp, count, "logsumexp"),
                non_null(args.p, count, "p"), non_null(args.ds, count, "ds")});
}

}  // namespace nybble
