// What one token after another needs beside linear layers over quantized weights.
#include "bindings/shared.h"

namespace nybble::bindings {

namespace {

// bias = 0: none.
void dense_few(Address x, int64_t x_stride, int dtype, int64_t m, Address weight, int weight_dtype, int64_t rows,
               int64_t cols, Address bias, int bias_dtype, Address out, int out_dtype, int threads) {
  DenseArgs args;
  args.x = {pointer<const void>(x), x_stride};
  args.dtype = static_cast<DType>(dtype);
  args.m = m;
  args.weight = pointer<const void>(weight);
  args.weight_dtype = static_cast<DType>(weight_dtype);
  args.rows = rows;
  args.cols = cols;
  args.bias = pointer<const void>(bias);
  args.bias_dtype = static_cast<DType>(bias_dtype);
  args.out = pointer<void>(out);
  args.out_dtype = static_cast<DType>(out_dtype);
  args.threads = threads;
  run(&KernelTable::dense_few, args);
}

// inputs: addresses and strides of batches of query, key, value. table: addresses of cos and sin (0: no rotation) and
// their dtype. cache: addresses of the slots of keys and values, and strides of batches and heads. sizes: batch, heads,
// group, depth.
void attention_step(const std::array<int64_t, 6>& inputs, int dtype, const std::array<int64_t, 3>& table,
                    const std::array<int64_t, 4>& cache, Address first, int64_t slot,
                    const std::array<int64_t, 4>& sizes, float scale, Address out, int threads) {
  const auto address = [](int64_t value) { return static_cast<Address>(value); };
  AttentionStepArgs args;
  args.query = pointer<const void>(address(inputs[0]));
  args.query_stride = inputs[1];
  args.key = pointer<const void>(address(inputs[2]));
  args.key_stride = inputs[3];
  args.value = pointer<const void>(address(inputs[4]));
  args.value_stride = inputs[5];
  args.dtype = static_cast<DType>(dtype);
  args.cos = pointer<const void>(address(table[0]));
  args.sin = pointer<const void>(address(table[1]));
  args.table_dtype = static_cast<DType>(table[2]);
  args.keys = pointer<void>(address(cache[0]));
  args.values = pointer<void>(address(cache[1]));
  args.batch_stride = cache[2];
  args.head_stride = cache[3];
  args.first = pointer<const int64_t>(first);
  args.slot = slot;
  args.batch = sizes[0];
  args.heads = sizes[1];
  args.group = sizes[2];
  args.depth = sizes[3];
  args.scale = scale;
  args.out = pointer<void>(out);
  args.threads = threads;
  run(&KernelTable::attention_step, args);
}

}  // namespace

void define_decoding(py::module_& m) {
  m.attr("MOST_DENSE_ROWS") = kMostDenseRows;
  m.def("dense_few", &dense_few, py::arg("x"), py::arg("x_stride"), py::arg("dtype"), py::arg("m"), py::arg("weight"),
        py::arg("weight_dtype"), py::arg("rows"), py::arg("cols"), py::arg("bias"), py::arg("bias_dtype"),
        py::arg("out"), py::arg("out_dtype"), py::arg("threads"));
  m.def("attention_step", &attention_step, py::arg("inputs"), py::arg("dtype"), py::arg("table"), py::arg("cache"),
        py::arg("first"), py::arg("slot"), py::arg("sizes"), py::arg("scale"), py::arg("out"), py::arg("threads"));
}

}  // namespace nybble::bindings
