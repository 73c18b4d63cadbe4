// The extension: addresses and sizes in, exceptions out, the GIL released while a kernel runs. It never sees torch.
#include <cstdlib>

#include "bindings/arguments.h"
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

void quantize_4bit(Address x, int dtype, int64_t count, int64_t block_size, Address codebook, int search,
                   Address importance, int64_t columns, Address packed, Address absmax, int threads) {
  run(&KernelTable::quantize_4bit, with_threads(quantize_4bit_args(x, dtype, count, block_size, codebook, search,
                                                                   importance, columns, packed, absmax),
                                                threads));
}

void dequantize_4bit(Address packed, Address absmax, Address nested_absmax, Address nested_map, Address offset,
                     int64_t nested_block, Address codebook, int64_t block_size, int64_t count, Address out, int dtype,
                     int threads) {
  run(&KernelTable::dequantize_4bit,
      with_threads(dequantize_4bit_args(packed, absmax, nested_absmax, nested_map, offset, nested_block, codebook,
                                        block_size, count, out, dtype),
                   threads));
}

void quantize_8bit(Address x, int dtype, int64_t count, int64_t block_size, Address map, Address codes, Address absmax,
                   int threads) {
  run(&KernelTable::quantize_8bit,
      with_threads(quantize_8bit_args(x, dtype, count, block_size, map, codes, absmax), threads));
}

void dequantize_8bit(Address codes, Address absmax, Address map, int64_t count, int64_t block_size, Address out,
                     int dtype, int threads) {
  run(&KernelTable::dequantize_8bit,
      with_threads(dequantize_8bit_args(codes, absmax, map, count, block_size, out, dtype), threads));
}

void quantize_int8(Address x, int dtype, int64_t rows, int64_t cols, Address q, Address absmax, int threads) {
  run(&KernelTable::quantize_int8, with_threads(quantize_int8_args(x, dtype, rows, cols, q, absmax), threads));
}

void dequantize_int8(Address q, Address absmax, int64_t rows, int64_t cols, Address out, int dtype, int threads) {
  run(&KernelTable::dequantize_int8, with_threads(dequantize_int8_args(q, absmax, rows, cols, out, dtype), threads));
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

// Problems of fewer multiplications keep the GIL and take one thread: starting a second one costs about 1 us, and pays
// from 256 x 256 weights on (M = 1, one thread 5.3 us, two 5.0; 128 x 128: 1.9 and 2.9; Sapphire Rapids class).
constexpr int64_t kSmallProblem = int64_t{1} << 16;

constexpr const char* kLinearDoc =
    "linear(weight, grad_input, compute, x, x_stride, m, dtype, side, side_dtype, side_weight, side_weight_dtype, "
    "rank, "
    "bias, bias_dtype, out, threads, /)\n--\n\n";
constexpr Py_ssize_t kLinearArguments = 16;

PyObject* linear(const WeightHandle& handle, Integers integers) {
  const KernelTable& table = kernels();
  LinearArgs args = next_linear_args(handle, integers);
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
  Py_RETURN_NONE;
}

PyMethodDef kLinearMethods[] = {
    {"linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_linear<&linear, kLinearArguments>)),
     METH_FASTCALL, kLinearDoc},
    {nullptr, nullptr, 0, nullptr}};

py::dict explain_linear(int64_t rows, int64_t cols, int64_t m, int dtype, bool int8, bool grad_input, int compute,
                        int64_t block_size) {
  const KernelTable& table = kernels();
  const LinearArgs args = asked_linear_args(rows, cols, m, dtype, int8, grad_input, compute, block_size);
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

  define_weight(m);
  if (PyModule_AddFunctions(m.ptr(), kLinearMethods) != 0) throw py::error_already_set();
  m.def("explain_linear", &explain_linear, py::arg("rows"), py::arg("cols"), py::arg("m"), py::arg("dtype"),
        py::arg("int8"), py::arg("grad_input"), py::arg("compute"), py::arg("block_size"));
}
