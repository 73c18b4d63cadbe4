// The extension: addresses and sizes in, exceptions out, the GIL released while a kernel runs. It never sees torch.
#include <cstdlib>

#include "bindings/shared.h"
#include "core/parallel.h"
#include "cpu/choose.h"
#include "cpu/dispatch.h"

namespace py = pybind11;
using namespace nybble;
using namespace nybble::bindings;

namespace {

bool check_forced_kernel() {
  const char* name = std::getenv("NYBBLE_FORCE_KERNEL");
  if (name == nullptr || *name == 0 || cpu::forced_kernel() == name) return true;
  throw py::value_error("NYBBLE_FORCE_KERNEL=" + std::string(name) +
                        " names no kernel; allowed: " + cpu::kernel_names());
}

}  // namespace

namespace nybble::bindings {

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

}  // namespace nybble::bindings

namespace {

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

  define_training(m);
  define_decoding(m);

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
