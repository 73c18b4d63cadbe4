// What a training step needs beside its linear layers: the optimizer, attention, the elementwise parts of a layer.
#include "bindings/arguments.h"

namespace nybble::bindings {

namespace {

void adamw_32bit(Address param, int dtype, Address grad, int grad_dtype, int64_t count, const Rule& rule,
                 bool stochastic, uint64_t key, Address m, Address v, int threads) {
  AdamWArgs common = adamw_args(param, dtype, grad, grad_dtype, count, rule, stochastic, key);
  common.threads = threads;
  run(&KernelTable::adamw_32bit, adamw_32bit_args(common, m, v));
}

void adamw_8bit(Address param, int dtype, Address grad, int grad_dtype, int64_t count, const Rule& rule,
                bool stochastic, uint64_t key, int64_t block_size, Address m_map, Address v_map, Address m, Address v,
                Address m_absmax, Address v_absmax, int threads) {
  AdamWArgs common = adamw_args(param, dtype, grad, grad_dtype, count, rule, stochastic, key);
  common.threads = threads;
  run(&KernelTable::adamw_8bit, adamw_8bit_args(common, block_size, m_map, v_map, m, v, m_absmax, v_absmax));
}

void sum_of_squares(Address x, int dtype, int64_t count, Address sums, int threads) {
  run(&KernelTable::sum_of_squares, with_threads(squares_args(x, dtype, count, sums), threads));
}

void factor_apply(Address x, int64_t x_stride, int64_t m, int64_t k, int64_t rank, Address factor, int factor_dtype,
                  bool by_rank, float scale, Address out, int threads) {
  FactorArgs args;
  args.x = pointer<const void>(x);
  args.x_stride = x_stride;
  args.m = m;
  args.k = k;
  args.rank = rank;
  args.factor = pointer<const void>(factor);
  args.factor_dtype = static_cast<DType>(factor_dtype);
  args.by_rank = by_rank;
  args.scale = scale;
  args.out = pointer<void>(out);
  args.threads = threads;
  run(&KernelTable::factor_apply, args);
}

void factor_gradient(Address left, Address x, int64_t x_stride, int64_t m, int64_t k, int64_t rank, Address out,
                     int64_t out_rank_stride, int64_t out_column_stride, int threads) {
  FactorGradArgs args;
  args.left = pointer<const void>(left);
  args.x = pointer<const void>(x);
  args.x_stride = x_stride;
  args.m = m;
  args.k = k;
  args.rank = rank;
  args.out = pointer<float>(out);
  args.out_rank_stride = out_rank_stride;
  args.out_column_stride = out_column_stride;
  args.threads = threads;
  run(&KernelTable::factor_gradient, args);
}

// Address, then the strides of batches, heads and rows.
using Strided = std::array<int64_t, 4>;

AttentionTensor attention_tensor(const Strided& x) {
  return {pointer<const void>(static_cast<Address>(x[0])), x[1], x[2], x[3]};
}

// mask_dtype = -1: boolean.
void fill_inputs(AttentionInputs* args, const Strided& query, const Strided& key, const Strided& value, int dtype,
                 const Strided& mask, int mask_dtype, const std::array<int64_t, 7>& sizes, int64_t diagonal,
                 float scale, int threads) {
  args->query = attention_tensor(query);
  args->key = attention_tensor(key);
  args->value = attention_tensor(value);
  args->dtype = static_cast<DType>(dtype);
  args->mask = attention_tensor(mask);
  args->mask_is_boolean = mask_dtype == -1;
  args->mask_dtype = args->mask_is_boolean ? DType::f32 : static_cast<DType>(mask_dtype);
  args->batches = sizes[0];
  args->heads = sizes[1];
  args->group = sizes[2];
  args->rows = sizes[3];
  args->cols = sizes[4];
  args->depth = sizes[5];
  args->value_depth = sizes[6];
  args->diagonal = diagonal;
  args->scale = scale;
  args->threads = threads;
}

void attention_forward(const Strided& query, const Strided& key, const Strided& value, int dtype, const Strided& mask,
                       int mask_dtype, const std::array<int64_t, 7>& sizes, int64_t diagonal, float scale,
                       const Strided& output, Address logsumexp, int threads) {
  AttentionForwardArgs args;
  fill_inputs(&args, query, key, value, dtype, mask, mask_dtype, sizes, diagonal, scale, threads);
  args.output = attention_tensor(output);
  args.logsumexp = pointer<float>(logsumexp);
  run(&KernelTable::attention_forward, args);
}

void attention_scores_grad(const Strided& query, const Strided& key, const Strided& value, int dtype,
                           const Strided& mask, int mask_dtype, const std::array<int64_t, 7>& sizes, int64_t diagonal,
                           float scale, const Strided& output, const Strided& grad_output, const Strided& logsumexp,
                           Address p, Address ds, int out_dtype, int threads) {
  AttentionArgs args;
  fill_inputs(&args, query, key, value, dtype, mask, mask_dtype, sizes, diagonal, scale, threads);
  args.output = attention_tensor(output);
  args.grad_output = attention_tensor(grad_output);
  args.logsumexp = attention_tensor(logsumexp);
  args.p = pointer<void>(p);
  args.ds = pointer<void>(ds);
  args.out_dtype = static_cast<DType>(out_dtype);
  run(&KernelTable::attention_scores_grad, args);
}

// Strides are elements from one row to the next.
void rms_norm(Address x, int64_t x_stride, int dtype, int64_t rows, int64_t cols, Address weight, int weight_dtype,
              float offset, float eps, Address out, int out_dtype, Address rstd, int threads) {
  RmsNormArgs args;
  args.x = {pointer<const void>(x), x_stride};
  args.dtype = static_cast<DType>(dtype);
  args.rows = rows;
  args.cols = cols;
  args.weight = pointer<const void>(weight);
  args.weight_dtype = static_cast<DType>(weight_dtype);
  args.offset = offset;
  args.eps = eps;
  args.out = pointer<void>(out);
  args.out_dtype = static_cast<DType>(out_dtype);
  args.rstd = pointer<float>(rstd);
  args.threads = threads;
  run(&KernelTable::rms_norm, args);
}

// grad_weight = 0: not wanted.
void rms_norm_backward(Address grad, int64_t grad_stride, int grad_dtype, Address x, int64_t x_stride, int dtype,
                       int64_t rows, int64_t cols, Address weight, int weight_dtype, float offset, Address rstd,
                       Address grad_x, Address grad_weight, int threads) {
  RmsNormBackwardArgs args;
  args.grad = {pointer<const void>(grad), grad_stride};
  args.grad_dtype = static_cast<DType>(grad_dtype);
  args.x = {pointer<const void>(x), x_stride};
  args.dtype = static_cast<DType>(dtype);
  args.rows = rows;
  args.cols = cols;
  args.weight = pointer<const void>(weight);
  args.weight_dtype = static_cast<DType>(weight_dtype);
  args.offset = offset;
  args.rstd = pointer<const float>(rstd);
  args.grad_x = pointer<void>(grad_x);
  args.grad_weight = pointer<float>(grad_weight);
  args.threads = threads;
  run(&KernelTable::rms_norm_backward, args);
}

void gated(int activation, Address gate, int64_t gate_stride, Address up, int64_t up_stride, int dtype, int64_t rows,
           int64_t cols, Address out, int threads) {
  GatedArgs args;
  args.activation = static_cast<Activation>(activation);
  args.gate = {pointer<const void>(gate), gate_stride};
  args.up = {pointer<const void>(up), up_stride};
  args.dtype = static_cast<DType>(dtype);
  args.rows = rows;
  args.cols = cols;
  args.out = pointer<void>(out);
  args.threads = threads;
  run(&KernelTable::gated, args);
}

void gated_backward(int activation, Address grad, int64_t grad_stride, Address gate, int64_t gate_stride, Address up,
                    int64_t up_stride, int dtype, int64_t rows, int64_t cols, Address grad_gate, Address grad_up,
                    int threads) {
  GatedBackwardArgs args;
  args.activation = static_cast<Activation>(activation);
  args.grad = {pointer<const void>(grad), grad_stride};
  args.gate = {pointer<const void>(gate), gate_stride};
  args.up = {pointer<const void>(up), up_stride};
  args.dtype = static_cast<DType>(dtype);
  args.rows = rows;
  args.cols = cols;
  args.grad_gate = pointer<void>(grad_gate);
  args.grad_up = pointer<void>(grad_up);
  args.threads = threads;
  run(&KernelTable::gated_backward, args);
}

// shape: batch, heads, length, dim; strides: those of the first three.
void rotary(Address x, int dtype, const std::array<int64_t, 4>& shape, const std::array<int64_t, 3>& strides,
            Address cos, Address sin, int table_dtype, int64_t table_stride, bool transposed, Address out,
            int out_dtype, const std::array<int64_t, 3>& out_strides, int threads) {
  RotaryArgs args;
  args.x = pointer<const void>(x);
  args.dtype = static_cast<DType>(dtype);
  args.batch = shape[0];
  args.heads = shape[1];
  args.length = shape[2];
  args.dim = shape[3];
  args.cos = pointer<const void>(cos);
  args.sin = pointer<const void>(sin);
  args.table_dtype = static_cast<DType>(table_dtype);
  args.table_stride = table_stride;
  args.transposed = transposed;
  args.out = pointer<void>(out);
  args.out_dtype = static_cast<DType>(out_dtype);
  for (size_t i = 0; i < 3; ++i) {
    args.x_strides[i] = strides[i];
    args.out_strides[i] = out_strides[i];
  }
  args.threads = threads;
  run(&KernelTable::rotary, args);
}

}  // namespace

void define_training(py::module_& m) {
  m.def("adamw_32bit", &adamw_32bit, py::arg("param"), py::arg("dtype"), py::arg("grad"), py::arg("grad_dtype"),
        py::arg("count"), py::arg("rule"), py::arg("stochastic"), py::arg("key"), py::arg("m"), py::arg("v"),
        py::arg("threads"));
  m.def("adamw_8bit", &adamw_8bit, py::arg("param"), py::arg("dtype"), py::arg("grad"), py::arg("grad_dtype"),
        py::arg("count"), py::arg("rule"), py::arg("stochastic"), py::arg("key"), py::arg("block_size"),
        py::arg("m_map"), py::arg("v_map"), py::arg("m"), py::arg("v"), py::arg("m_absmax"), py::arg("v_absmax"),
        py::arg("threads"));
  m.attr("SQUARES_RUN") = kSquaresRun;
  m.def("sum_of_squares", &sum_of_squares, py::arg("x"), py::arg("dtype"), py::arg("count"), py::arg("sums"),
        py::arg("threads"));

  m.attr("MOST_RANK") = kMostRank;
  m.def("has_factor_kernels", [] { return kernels().factor_apply != nullptr; });
  m.def("factor_apply", &factor_apply, py::arg("x"), py::arg("x_stride"), py::arg("m"), py::arg("k"), py::arg("rank"),
        py::arg("factor"), py::arg("factor_dtype"), py::arg("by_rank"), py::arg("scale"), py::arg("out"),
        py::arg("threads"));
  m.def("factor_gradient", &factor_gradient, py::arg("left"), py::arg("x"), py::arg("x_stride"), py::arg("m"),
        py::arg("k"), py::arg("rank"), py::arg("out"), py::arg("out_rank_stride"), py::arg("out_column_stride"),
        py::arg("threads"));
  m.attr("MAX_HEAD_DEPTH") = kMaxHeadDepth;
  // sizes: batches, heads, group, rows, cols, depth, value_depth
  m.def("attention_forward", &attention_forward, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("dtype"),
        py::arg("mask"), py::arg("mask_dtype"), py::arg("sizes"), py::arg("diagonal"), py::arg("scale"),
        py::arg("output"), py::arg("logsumexp"), py::arg("threads"));
  m.def("attention_scores_grad", &attention_scores_grad, py::arg("query"), py::arg("key"), py::arg("value"),
        py::arg("dtype"), py::arg("mask"), py::arg("mask_dtype"), py::arg("sizes"), py::arg("diagonal"),
        py::arg("scale"), py::arg("output"), py::arg("grad_output"), py::arg("logsumexp"), py::arg("p"), py::arg("ds"),
        py::arg("out_dtype"), py::arg("threads"));
  m.def("rms_norm", &rms_norm, py::arg("x"), py::arg("x_stride"), py::arg("dtype"), py::arg("rows"), py::arg("cols"),
        py::arg("weight"), py::arg("weight_dtype"), py::arg("offset"), py::arg("eps"), py::arg("out"),
        py::arg("out_dtype"), py::arg("rstd"), py::arg("threads"));
  m.def("rms_norm_backward", &rms_norm_backward, py::arg("grad"), py::arg("grad_stride"), py::arg("grad_dtype"),
        py::arg("x"), py::arg("x_stride"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("weight"),
        py::arg("weight_dtype"), py::arg("offset"), py::arg("rstd"), py::arg("grad_x"), py::arg("grad_weight"),
        py::arg("threads"));
  m.def("gated", &gated, py::arg("activation"), py::arg("gate"), py::arg("gate_stride"), py::arg("up"),
        py::arg("up_stride"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("out"), py::arg("threads"));
  m.def("gated_backward", &gated_backward, py::arg("activation"), py::arg("grad"), py::arg("grad_stride"),
        py::arg("gate"), py::arg("gate_stride"), py::arg("up"), py::arg("up_stride"), py::arg("dtype"), py::arg("rows"),
        py::arg("cols"), py::arg("grad_gate"), py::arg("grad_up"), py::arg("threads"));
  m.def("rotary", &rotary, py::arg("x"), py::arg("dtype"), py::arg("shape"), py::arg("strides"), py::arg("cos"),
        py::arg("sin"), py::arg("table_dtype"), py::arg("table_stride"), py::arg("transposed"), py::arg("out"),
        py::arg("out_dtype"), py::arg("out_strides"), py::arg("threads"));
}

}  // namespace nybble::bindings
