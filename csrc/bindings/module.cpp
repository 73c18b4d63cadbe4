// The extension: addresses and sizes in, exceptions out, the GIL released while a kernel runs. It never sees torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "core/check.h"
#include "core/kernels.h"
#include "core/parallel.h"
#include "cpu/choose.h"
#include "cpu/dispatch.h"

namespace py = pybind11;
using namespace nybble;
using Address = uintptr_t;

namespace {

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// A NaN or an infinity in what was to be quantized; Python adds the tensor's name.
struct NonFinite : std::runtime_error {
  explicit NonFinite(int64_t at) : std::runtime_error(std::to_string(at)) {}
};

void raise_unless_ok(const Status& status) {
  switch (status.code) {
    case Code::ok:
      return;
    case Code::non_finite:
      throw NonFinite(status.value);
    case Code::out_of_memory:
      throw std::bad_alloc();
    case Code::bad_argument:
      throw py::value_error(std::string(status.what) + " is out of range or null: got " + std::to_string(status.value));
  }
}

bool check_forced_kernel() {
  const char* name = std::getenv("NYBBLE_FORCE_KERNEL");
  if (name == nullptr || *name == 0 || cpu::forced_kernel() == name) return true;
  throw py::value_error("NYBBLE_FORCE_KERNEL=" + std::string(name) +
                        " names no kernel; allowed: " + cpu::kernel_names());
}

const KernelTable& kernels() {
  static const bool checked = check_forced_kernel();  // once, unless it throws
  (void)checked;
  const KernelTable* table = cpu::active();
  if (table != nullptr) return *table;
  std::string known;
  for (const std::string& name : cpu::isas()) known += (known.empty() ? "" : ", ") + name;
  throw py::value_error("NYBBLE_FORCE_ISA=" + cpu::forced_isa() +
                        " names no instruction set of this machine; it has: " + known);
}

template <class Args>
void run(Status (*KernelTable::*entry)(const Args&), const Args& args) {
  const KernelTable& table = kernels();
  raise_unless_ok(check(args));
  Status status;
  {
    py::gil_scoped_release released;
    status = (table.*entry)(args);
  }
  raise_unless_ok(status);
}

int power_of_two(int64_t value, const char* what) {
  if (value < 1 || (value & (value - 1)) != 0) {
    throw py::value_error(std::string(what) + " must be a power of two, got " + std::to_string(value));
  }
  return log2_of(value);
}

// nested_absmax = 0: absmax is plain fp32.
BlockScales block_scales(Address absmax, Address nested_absmax, Address nested_map, Address offset,
                         int64_t nested_block) {
  BlockScales scales;
  if (nested_absmax == 0) {
    scales.plain = pointer<const float>(absmax);
  } else {
    scales.codes = pointer<const uint8_t>(absmax);
    scales.nested = pointer<const float>(nested_absmax);
    scales.map = pointer<const float>(nested_map);
    scales.offset = pointer<const float>(offset);
    scales.nested_shift = power_of_two(nested_block, "nested_block_size");
  }
  return scales;
}

void quantize_4bit(Address x, int dtype, int64_t count, int64_t block_size, Address codebook, int search,
                   Address importance, int64_t columns, Address packed, Address absmax, int threads) {
  Quantize4Args args;
  args.x = pointer<const void>(x);
  args.dtype = static_cast<DType>(dtype);
  args.count = count;
  args.block_size = block_size;
  args.codebook = pointer<const float>(codebook);
  args.search = static_cast<Search>(search);
  args.importance = pointer<const float>(importance);
  args.columns = columns;
  args.packed = pointer<uint8_t>(packed);
  args.absmax = pointer<float>(absmax);
  args.threads = threads;
  run(&KernelTable::quantize_4bit, args);
}

void dequantize_4bit(Address packed, Address absmax, Address nested_absmax, Address nested_map, Address offset,
                     int64_t nested_block, Address codebook, int64_t block_size, int64_t count, Address out, int dtype,
                     int threads) {
  Dequantize4Args args;
  args.source.packed = pointer<const uint8_t>(packed);
  args.source.codebook = pointer<const float>(codebook);
  args.source.block_shift = power_of_two(block_size, "block_size");
  args.source.scales = block_scales(absmax, nested_absmax, nested_map, offset, nested_block);
  args.count = count;
  args.out = pointer<void>(out);
  args.dtype = static_cast<DType>(dtype);
  args.threads = threads;
  run(&KernelTable::dequantize_4bit, args);
}

void quantize_8bit(Address x, int dtype, int64_t count, int64_t block_size, Address map, Address codes, Address absmax,
                   int threads) {
  Quantize8Args args;
  args.x = pointer<const void>(x);
  args.dtype = static_cast<DType>(dtype);
  args.count = count;
  args.block_size = block_size;
  args.map = pointer<const float>(map);
  args.codes = pointer<uint8_t>(codes);
  args.absmax = pointer<float>(absmax);
  args.threads = threads;
  run(&KernelTable::quantize_8bit, args);
}

void dequantize_8bit(Address codes, Address absmax, Address map, int64_t count, int64_t block_size, Address out,
                     int dtype, int threads) {
  Dequantize8Args args;
  args.codes = pointer<const uint8_t>(codes);
  args.absmax = pointer<const float>(absmax);
  args.map = pointer<const float>(map);
  args.count = count;
  args.block_size = block_size;
  args.out = pointer<void>(out);
  args.dtype = static_cast<DType>(dtype);
  args.threads = threads;
  run(&KernelTable::dequantize_8bit, args);
}

void quantize_int8(Address x, int dtype, int64_t rows, int64_t cols, Address q, Address absmax, int threads) {
  QuantizeRowsArgs args;
  args.x = pointer<const void>(x);
  args.dtype = static_cast<DType>(dtype);
  args.rows = rows;
  args.cols = cols;
  args.q = pointer<int8_t>(q);
  args.absmax = pointer<float>(absmax);
  args.threads = threads;
  run(&KernelTable::quantize_int8, args);
}

void dequantize_int8(Address q, Address absmax, int64_t rows, int64_t cols, Address out, int dtype, int threads) {
  DequantizeRowsArgs args;
  args.source = {pointer<const int8_t>(q), pointer<const float>(absmax)};
  args.rows = rows;
  args.cols = cols;
  args.out = pointer<void>(out);
  args.dtype = static_cast<DType>(dtype);
  args.threads = threads;
  run(&KernelTable::dequantize_int8, args);
}

// order = 0: columns as they are; codebook = 0: int8.
template <Status (*KernelTable::*Entry)(const RoundArgs&)>
void round_with(Address target, int64_t rows, int64_t cols, Address matrix, Address order, Address absmax,
                Address codebook, int64_t block_size, int sweeps, Address codes, int threads) {
  RoundArgs args;
  args.target = pointer<const float>(target);
  args.rows = rows;
  args.cols = cols;
  args.matrix = pointer<const float>(matrix);
  args.order = pointer<const int32_t>(order);
  args.absmax = pointer<const float>(absmax);
  args.codebook = pointer<const float>(codebook);
  args.block_shift = power_of_two(block_size, "block_size");
  args.sweeps = sweeps;
  args.codes = pointer<uint8_t>(codes);
  args.threads = threads;
  run(Entry, args);
}

// In the order of AdamWRule's fields.
using Rule = std::array<float, 9>;

AdamWArgs adamw_args(Address param, int dtype, Address grad, int grad_dtype, int64_t count, const Rule& rule,
                     bool stochastic, uint64_t key, int threads) {
  AdamWArgs args;
  args.param = pointer<void>(param);
  args.dtype = static_cast<DType>(dtype);
  args.grad = pointer<const void>(grad);
  args.grad_dtype = static_cast<DType>(grad_dtype);
  args.count = count;
  args.rule = {rule[0], rule[1], rule[2], rule[3], rule[4], rule[5], rule[6], rule[7], rule[8]};
  args.stochastic = stochastic;
  args.key = key;
  args.threads = threads;
  return args;
}

void adamw_32bit(Address param, int dtype, Address grad, int grad_dtype, int64_t count, const Rule& rule,
                 bool stochastic, uint64_t key, Address m, Address v, int threads) {
  AdamW32Args args;
  args.common = adamw_args(param, dtype, grad, grad_dtype, count, rule, stochastic, key, threads);
  args.m = pointer<float>(m);
  args.v = pointer<float>(v);
  run(&KernelTable::adamw_32bit, args);
}

void adamw_8bit(Address param, int dtype, Address grad, int grad_dtype, int64_t count, const Rule& rule,
                bool stochastic, uint64_t key, int64_t block_size, Address m_map, Address v_map, Address m, Address v,
                Address m_absmax, Address v_absmax, int threads) {
  AdamW8Args args;
  args.common = adamw_args(param, dtype, grad, grad_dtype, count, rule, stochastic, key, threads);
  args.block_size = block_size;
  args.m_map = pointer<const float>(m_map);
  args.v_map = pointer<const float>(v_map);
  args.m = pointer<uint8_t>(m);
  args.v = pointer<uint8_t>(v);
  args.m_absmax = pointer<float>(m_absmax);
  args.v_absmax = pointer<float>(v_absmax);
  run(&KernelTable::adamw_8bit, args);
}

void sum_of_squares(Address x, int dtype, int64_t count, Address sums, int threads) {
  SquaresArgs args;
  args.x = pointer<const void>(x);
  args.dtype = static_cast<DType>(dtype);
  args.count = count;
  args.sums = pointer<double>(sums);
  args.threads = threads;
  run(&KernelTable::sum_of_squares, args);
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

// The addresses and sizes of a weight as one object; whoever calls keeps the tensors alive.
class WeightHandle {
 public:
  static WeightHandle four_bit(Address packed, Address absmax, Address nested_absmax, Address nested_map,
                               Address offset, int64_t nested_block, Address codebook, int64_t block_size, int64_t rows,
                               int64_t cols) {
    WeightHandle handle;
    handle.weight.rows = rows;
    handle.weight.cols = cols;
    handle.weight.packed4.packed = pointer<const uint8_t>(packed);
    handle.weight.packed4.codebook = pointer<const float>(codebook);
    handle.weight.packed4.block_shift = power_of_two(block_size, "block_size");
    handle.weight.packed4.scales = block_scales(absmax, nested_absmax, nested_map, offset, nested_block);
    return handle;
  }

  static WeightHandle int8_rows(Address q, Address absmax, int64_t rows, int64_t cols) {
    WeightHandle handle;
    handle.weight.rows = rows;
    handle.weight.cols = cols;
    handle.weight.rows8 = {pointer<const int8_t>(q), pointer<const float>(absmax)};
    handle.weight.int8 = true;
    return handle;
  }

  Weight weight;
};

// Problems of fewer multiplications keep the GIL and take one thread: starting a second one costs about 1 us, and pays
// from 256 x 256 weights on (M = 1, one thread 5.3 us, two 5.0; 128 x 128: 1.9 and 2.9; Sapphire Rapids class).
constexpr int64_t kSmallProblem = int64_t{1} << 16;

// One Python integer after the other; what is none leaves a Python exception set.
class Integers {
 public:
  explicit Integers(PyObject* const* at) : at_(at) {}
  template <class T>
  T next() {
    return static_cast<T>(PyLong_AsLongLong(*at_++));
  }
  template <class T>
  const T* next_pointer() {
    return pointer<const T>(next<Address>());
  }

 private:
  PyObject* const* at_;
};

constexpr const char* kLinearDoc =
    "linear(weight, grad_input, compute, x, x_stride, m, dtype, side, side_dtype, side_weight, side_weight_dtype, "
    "rank, "
    "bias, bias_dtype, out, threads, /)\n--\n\n";
constexpr Py_ssize_t kLinearArguments = 16;

void linear(const WeightHandle& handle, Integers integers) {
  const KernelTable& table = kernels();
  LinearArgs args;
  args.weight = handle.weight;
  args.grad_input = integers.next<int>() != 0;
  args.compute = static_cast<Compute>(integers.next<int>());
  args.x = integers.next_pointer<void>();
  args.x_stride = integers.next<int64_t>();
  args.m = integers.next<int64_t>();
  args.dtype = static_cast<DType>(integers.next<int>());
  args.side.left = integers.next_pointer<void>();
  args.side.left_dtype = static_cast<DType>(integers.next<int>());
  args.side.right = integers.next_pointer<void>();
  args.side.right_dtype = static_cast<DType>(integers.next<int>());
  args.side.rank = integers.next<int64_t>();
  args.bias = integers.next_pointer<void>();
  args.bias_dtype = static_cast<DType>(integers.next<int>());
  args.out = pointer<void>(integers.next<Address>());
  args.threads = integers.next<int>();
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  raise_unless_ok(check(args));
  const cpu::Choice choice = cpu::choose_linear(table, args);
  Status status;
  if (args.weight.rows * args.weight.cols < kSmallProblem / (args.m > 0 ? args.m : 1)) {
    args.threads = 1;
    status = choice.run(args);
  } else {
    py::gil_scoped_release released;
    status = choice.run(args);
  }
  raise_unless_ok(status);
}

// `linear` is called for every layer of every token, so it is a plain CPython function: pybind11's dispatch of 16
// arguments takes 0.3 us more, as much as a third of the kernel's time with a 64 x 64 weight.
PyObject* linear_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    if (count != kLinearArguments) {
      throw py::type_error("linear takes " + std::to_string(kLinearArguments) + " arguments, got " +
                           std::to_string(count));
    }
    py::detail::make_caster<WeightHandle> weight;
    if (!weight.load(args[0], false)) throw py::type_error("linear: weight must be a nybble._core.Weight");
    linear(py::detail::cast_op<const WeightHandle&>(weight), Integers(args + 1));
    Py_RETURN_NONE;
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  }
  return nullptr;
}

PyMethodDef kLinearMethods[] = {
    {"linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(linear_call)), METH_FASTCALL, kLinearDoc},
    {nullptr, nullptr, 0, nullptr}};

py::dict explain_linear(int64_t rows, int64_t cols, int64_t m, int dtype, bool int8, bool grad_input, int compute,
                        int64_t block_size) {
  const KernelTable& table = kernels();
  LinearArgs args;
  args.weight.rows = rows;
  args.weight.cols = cols;
  args.weight.int8 = int8;
  args.weight.packed4.block_shift = 0;
  while (int64_t{1} << (args.weight.packed4.block_shift + 1) <= block_size) ++args.weight.packed4.block_shift;
  args.m = m;
  args.dtype = static_cast<DType>(dtype);
  args.grad_input = grad_input;
  args.compute = static_cast<Compute>(compute);
  const cpu::Choice choice = cpu::choose_linear(table, args);
  py::dict result;
  result["kernel"] = choice.kernel;
  result["isa"] = table.isa;
  result["compute"] = choice.compute;
  result["reason"] = choice.reason;
  return result;
}

std::string set_active_isa(const std::string& name) {
  const std::string previous = kernels().isa;
  if (!cpu::set_active(name)) {
    std::string known;
    for (const std::string& each : cpu::isas()) known += (known.empty() ? "" : ", ") + each;
    throw py::value_error("isa: this machine cannot run '" + name + "'; it has: " + known);
  }
  return previous;
}

std::string force_kernel(const std::string& name) {
  const std::string previous = cpu::forced_kernel();
  if (!cpu::force_kernel(name)) {
    throw py::value_error("name: there is no kernel '" + name + "'; allowed: " + cpu::kernel_names() +
                          ", or '' for none");
  }
  return previous;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "nybble's compiled core: raw addresses, sizes and thread counts; dtype codes 0 fp32, 1 fp16, 2 bf16.";
  py::register_exception<NonFinite>(m, "NonFiniteBlock", PyExc_ValueError);

  m.def("isas", &cpu::isas);
  m.def("active_isa", [] { return std::string(kernels().isa); });
  m.def("set_active_isa", &set_active_isa, py::arg("name"));
  m.def("force_kernel", &force_kernel, py::arg("name"));
  m.def("quantize_4bit", &quantize_4bit, py::arg("x"), py::arg("dtype"), py::arg("count"), py::arg("block_size"),
        py::arg("codebook"), py::arg("search"), py::arg("importance"), py::arg("columns"), py::arg("packed"),
        py::arg("absmax"), py::arg("threads"));
  m.def("round_feedback", &round_with<&KernelTable::round_feedback>, py::arg("target"), py::arg("rows"),
        py::arg("cols"), py::arg("matrix"), py::arg("order"), py::arg("absmax"), py::arg("codebook"),
        py::arg("block_size"), py::arg("sweeps"), py::arg("codes"), py::arg("threads"));
  m.def("round_descent", &round_with<&KernelTable::round_descent>, py::arg("target"), py::arg("rows"), py::arg("cols"),
        py::arg("matrix"), py::arg("order"), py::arg("absmax"), py::arg("codebook"), py::arg("block_size"),
        py::arg("sweeps"), py::arg("codes"), py::arg("threads"));
  m.def("dequantize_4bit", &dequantize_4bit, py::arg("packed"), py::arg("absmax"), py::arg("nested_absmax"),
        py::arg("nested_map"), py::arg("nested_offset"), py::arg("nested_block_size"), py::arg("codebook"),
        py::arg("block_size"), py::arg("count"), py::arg("out"), py::arg("dtype"), py::arg("threads"));
  m.def("quantize_8bit", &quantize_8bit, py::arg("x"), py::arg("dtype"), py::arg("count"), py::arg("block_size"),
        py::arg("map"), py::arg("codes"), py::arg("absmax"), py::arg("threads"));
  m.def("dequantize_8bit", &dequantize_8bit, py::arg("codes"), py::arg("absmax"), py::arg("map"), py::arg("count"),
        py::arg("block_size"), py::arg("out"), py::arg("dtype"), py::arg("threads"));
  m.def("quantize_int8", &quantize_int8, py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("q"),
        py::arg("absmax"), py::arg("threads"));
  m.def("dequantize_int8", &dequantize_int8, py::arg("q"), py::arg("absmax"), py::arg("rows"), py::arg("cols"),
        py::arg("out"), py::arg("dtype"), py::arg("threads"));

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

  py::class_<WeightHandle>(m, "Weight", "Addresses of a quantized weight; whoever holds it keeps the tensors alive.")
      .def_static("four_bit", &WeightHandle::four_bit, py::arg("packed"), py::arg("absmax"), py::arg("nested_absmax"),
                  py::arg("nested_map"), py::arg("nested_offset"), py::arg("nested_block_size"), py::arg("codebook"),
                  py::arg("block_size"), py::arg("rows"), py::arg("cols"))
      .def_static("int8_rows", &WeightHandle::int8_rows, py::arg("q"), py::arg("absmax"), py::arg("rows"),
                  py::arg("cols"));
  if (PyModule_AddFunctions(m.ptr(), kLinearMethods) != 0) throw py::error_already_set();
  m.def("explain_linear", &explain_linear, py::arg("rows"), py::arg("cols"), py::arg("m"), py::arg("dtype"),
        py::arg("int8"), py::arg("grad_input"), py::arg("compute"), py::arg("block_size"));
}
