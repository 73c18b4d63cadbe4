// The extension for NVIDIA GPUs: addresses of device memory in, work on a stream started. Nothing waits for the GPU.
#include <cstdlib>

#include "bindings/arguments.h"
#include "cuda/choose.h"

namespace py = pybind11;
using namespace nybble;
using namespace nybble::bindings;

namespace {

void check_forced_kernel() {
  const char* name = std::getenv("NYBBLE_FORCE_CUDA_KERNEL");
  if (name == nullptr || *name == 0 || cuda::forced_kernel() == name) return;
  throw py::value_error("NYBBLE_FORCE_CUDA_KERNEL=" + std::string(name) +
                        " names no kernel; allowed: " + cuda::kernel_names());
}

// The device of a call is the thread's current one while it lasts.
class Current {
 public:
  explicit Current(int device) : device_(device) { raise_unless_ok(cuda::make_current(device, &before_)); }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  ~Current() {
    int other = 0;
    if (before_ != device_) cuda::make_current(before_, &other);
  }

 private:
  int device_;
  int before_ = 0;
};

cuda::Place place_of(int device, Address stream, Address workspace = 0) {
  return {device, pointer<void>(stream), pointer<void>(workspace)};
}

template <class Args>
void start(Status (*entry)(const Args&, const cuda::Place&), const Args& args, int device, Address stream) {
  raise_unless_ok(check(args));
  const Current current(device);
  raise_unless_ok(entry(args, place_of(device, stream)));
}

template <class Args>
void start(Status (*entry)(const Args&, int64_t*, const cuda::Place&), const Args& args, Address failed, int device,
           Address stream) {
  raise_unless_ok(check(args));
  const Current current(device);
  raise_unless_ok(entry(args, pointer<int64_t>(failed), place_of(device, stream)));
}

void quantize_4bit(Address x, int dtype, int64_t count, int64_t block_size, Address codebook, int search,
                   Address importance, int64_t columns, Address packed, Address absmax, Address failed, int device,
                   Address stream) {
  start(&cuda::quantize_4bit,
        quantize_4bit_args(x, dtype, count, block_size, codebook, search, importance, columns, packed, absmax), failed,
        device, stream);
}

void dequantize_4bit(Address packed, Address absmax, Address nested_absmax, Address nested_map, Address offset,
                     int64_t nested_block, Address codebook, int64_t block_size, int64_t count, Address out, int dtype,
                     int device, Address stream) {
  start(&cuda::dequantize_4bit,
        dequantize_4bit_args(packed, absmax, nested_absmax, nested_map, offset, nested_block, codebook, block_size,
                             count, out, dtype),
        device, stream);
}

void quantize_8bit(Address x, int dtype, int64_t count, int64_t block_size, Address map, Address codes, Address absmax,
                   Address failed, int device, Address stream) {
  start(&cuda::quantize_8bit, quantize_8bit_args(x, dtype, count, block_size, map, codes, absmax), failed, device,
        stream);
}

void dequantize_8bit(Address codes, Address absmax, Address map, int64_t count, int64_t block_size, Address out,
                     int dtype, int device, Address stream) {
  start(&cuda::dequantize_8bit, dequantize_8bit_args(codes, absmax, map, count, block_size, out, dtype), device,
        stream);
}

void quantize_int8(Address x, int dtype, int64_t rows, int64_t cols, Address q, Address absmax, Address failed,
                   int device, Address stream) {
  start(&cuda::quantize_int8, quantize_int8_args(x, dtype, rows, cols, q, absmax), failed, device, stream);
}

void dequantize_int8(Address q, Address absmax, int64_t rows, int64_t cols, Address out, int dtype, int device,
                     Address stream) {
  start(&cuda::dequantize_int8, dequantize_int8_args(q, absmax, rows, cols, out, dtype), device, stream);
}

void adamw_32bit(Address param, int dtype, Address grad, int grad_dtype, int64_t count, const Rule& rule,
                 bool stochastic, uint64_t key, Address m, Address v, int device, Address stream) {
  const AdamWArgs common = adamw_args(param, dtype, grad, grad_dtype, count, rule, stochastic, key);
  start(&cuda::adamw_32bit, adamw_32bit_args(common, m, v), device, stream);
}

void adamw_8bit(Address param, int dtype, Address grad, int grad_dtype, int64_t count, const Rule& rule,
                bool stochastic, uint64_t key, int64_t block_size, Address m_map, Address v_map, Address m, Address v,
                Address m_absmax, Address v_absmax, Address failed, int device, Address stream) {
  const AdamWArgs common = adamw_args(param, dtype, grad, grad_dtype, count, rule, stochastic, key);
  start(&cuda::adamw_8bit, adamw_8bit_args(common, block_size, m_map, v_map, m, v, m_absmax, v_absmax), failed, device,
        stream);
}

void sum_of_squares(Address x, int dtype, int64_t count, Address sums, int device, Address stream) {
  start(&cuda::sum_of_squares, squares_args(x, dtype, count, sums), device, stream);
}

constexpr const char* kLinearDoc =
    "linear(weight, grad_input, compute, x, x_stride, m, dtype, side, side_dtype, side_weight, side_weight_dtype, "
    "rank, bias, bias_dtype, out, device, stream, workspace, outlier_threshold, /)\n--\n\nFalse: nothing was done, the "
    "caller is to "
    "dequantize the weight and multiply.";
constexpr Py_ssize_t kLinearArguments = 19;

PyObject* linear(const WeightHandle& handle, Integers integers) {
  LinearArgs args = next_linear_args(handle, integers);
  const int number = integers.next<int>();
  const Address stream = integers.next<Address>();
  const Address workspace = integers.next<Address>();
  args.outlier_threshold = integers.next_float();
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  raise_unless_ok(check(args));
  cuda::Device device;
  raise_unless_ok(cuda::device_properties(number, &device));
  const cuda::Choice choice = cuda::choose_linear(args, device);
  if (choice.run == nullptr) Py_RETURN_FALSE;
  const Current current(number);
  raise_unless_ok(choice.run(args, device, place_of(number, stream, workspace)));
  Py_RETURN_TRUE;
}

PyMethodDef kLinearMethods[] = {
    {"linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_linear<&linear, kLinearArguments>)),
     METH_FASTCALL, kLinearDoc},
    {nullptr, nullptr, 0, nullptr}};

py::dict explain_linear(int64_t rows, int64_t cols, int64_t m, int dtype, bool int8, bool grad_input, int compute,
                        int64_t block_size, int capability, int multiprocessors) {
  const LinearArgs args = asked_linear_args(rows, cols, m, dtype, int8, grad_input, compute, block_size);
  const cuda::Choice choice = cuda::choose_linear(args, {capability, multiprocessors});
  py::dict result;
  result["kernel"] = choice.kernel;
  result["isa"] = "sm_" + std::to_string(capability);
  result["compute"] = choice.compute;
  result["reason"] = choice.reason;
  return result;
}

std::pair<int, int> properties(int number) {
  cuda::Device device;
  raise_unless_ok(cuda::device_properties(number, &device));
  return {device.capability, device.multiprocessors};
}

std::string force_kernel(const std::string& name) {
  const std::string previous = cuda::forced_kernel();
  if (!cuda::force_kernel(name)) {
    throw py::value_error("name: there is no kernel '" + name + "'; allowed: " + cuda::kernel_names() +
                          ", or '' for none");
  }
  return previous;
}

}  // namespace

PYBIND11_MODULE(NYBBLE_CUDA_MODULE, m) {
  m.doc() = "nybble's kernels for NVIDIA GPUs: addresses of device memory, sizes, a device's number and a stream.";
  check_forced_kernel();
  m.attr("SQUARES_RUN") = kSquaresRun;
  m.attr("WORKSPACE_BYTES") = cuda::kWorkspaceBytes;
  m.attr("COUNTERS") = cuda::kCounters;
  define_weight(m);
  m.def("force_kernel", &force_kernel, py::arg("name"));
  m.def("kernel_names", &cuda::kernel_names);
  m.def("properties", &properties, py::arg("device"), "Compute capability, 10 * major + minor, and multiprocessors.");
  m.def("quantize_4bit", &quantize_4bit, py::arg("x"), py::arg("dtype"), py::arg("count"), py::arg("block_size"),
        py::arg("codebook"), py::arg("search"), py::arg("importance"), py::arg("columns"), py::arg("packed"),
        py::arg("absmax"), py::arg("failed"), py::arg("device"), py::arg("stream"));
  m.def("dequantize_4bit", &dequantize_4bit, py::arg("packed"), py::arg("absmax"), py::arg("nested_absmax"),
        py::arg("nested_map"), py::arg("nested_offset"), py::arg("nested_block_size"), py::arg("codebook"),
        py::arg("block_size"), py::arg("count"), py::arg("out"), py::arg("dtype"), py::arg("device"),
        py::arg("stream"));
  m.def("quantize_8bit", &quantize_8bit, py::arg("x"), py::arg("dtype"), py::arg("count"), py::arg("block_size"),
        py::arg("map"), py::arg("codes"), py::arg("absmax"), py::arg("failed"), py::arg("device"), py::arg("stream"));
  m.def("dequantize_8bit", &dequantize_8bit, py::arg("codes"), py::arg("absmax"), py::arg("map"), py::arg("count"),
        py::arg("block_size"), py::arg("out"), py::arg("dtype"), py::arg("device"), py::arg("stream"));
  m.def("quantize_int8", &quantize_int8, py::arg("x"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("q"),
        py::arg("absmax"), py::arg("failed"), py::arg("device"), py::arg("stream"));
  m.def("dequantize_int8", &dequantize_int8, py::arg("q"), py::arg("absmax"), py::arg("rows"), py::arg("cols"),
        py::arg("out"), py::arg("dtype"), py::arg("device"), py::arg("stream"));
  m.def("adamw_32bit", &adamw_32bit, py::arg("param"), py::arg("dtype"), py::arg("grad"), py::arg("grad_dtype"),
        py::arg("count"), py::arg("rule"), py::arg("stochastic"), py::arg("key"), py::arg("m"), py::arg("v"),
        py::arg("device"), py::arg("stream"));
  m.def("adamw_8bit", &adamw_8bit, py::arg("param"), py::arg("dtype"), py::arg("grad"), py::arg("grad_dtype"),
        py::arg("count"), py::arg("rule"), py::arg("stochastic"), py::arg("key"), py::arg("block_size"),
        py::arg("m_map"), py::arg("v_map"), py::arg("m"), py::arg("v"), py::arg("m_absmax"), py::arg("v_absmax"),
        py::arg("failed"), py::arg("device"), py::arg("stream"));
  m.def("sum_of_squares", &sum_of_squares, py::arg("x"), py::arg("dtype"), py::arg("count"), py::arg("sums"),
        py::arg("device"), py::arg("stream"));
  if (PyModule_AddFunctions(m.ptr(), kLinearMethods) != 0) throw py::error_already_set();
  m.def("explain_linear", &explain_linear, py::arg("rows"), py::arg("cols"), py::arg("m"), py::arg("dtype"),
        py::arg("int8"), py::arg("grad_input"), py::arg("compute"), py::arg("block_size"), py::arg("capability"),
        py::arg("multiprocessors"));
}
