// From the integers that Python passes to the structs that kernels take; one place for all modules.
#pragma once
#include "bindings/shared.h"

namespace nybble::bindings {

inline int power_of_two(int64_t value, const char* what) {
  if (value < 1 || (value & (value - 1)) != 0) {
    throw py::value_error(std::string(what) + " must be a power of two, got " + std::to_string(value));
  }
  return log2_of(value);
}

// nested_absmax = 0: absmax is plain fp32.
inline BlockScales block_scales(Address absmax, Address nested_absmax, Address nested_map, Address offset,
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

inline Quantize4Args quantize_4bit_args(Address x, int dtype, int64_t count, int64_t block_size, Address codebook,
                                        int search, Address importance, int64_t columns, Address packed,
                                        Address absmax) {
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
  return args;
}

inline Dequantize4Args dequantize_4bit_args(Address packed, Address absmax, Address nested_absmax, Address nested_map,
                                            Address offset, int64_t nested_block, Address codebook, int64_t block_size,
                                            int64_t count, Address out, int dtype) {
  Dequantize4Args args;
  args.source.packed = pointer<const uint8_t>(packed);
  args.source.codebook = pointer<const float>(codebook);
  args.source.block_shift = power_of_two(block_size, "block_size");
  args.source.scales = block_scales(absmax, nested_absmax, nested_map, offset, nested_block);
  args.count = count;
  args.out = pointer<void>(out);
  args.dtype = static_cast<DType>(dtype);
  return args;
}

inline Quantize8Args quantize_8bit_args(Address x, int dtype, int64_t count, int64_t block_size, Address map,
                                        Address codes, Address absmax) {
  Quantize8Args args;
  args.x = pointer<const void>(x);
  args.dtype = static_cast<DType>(dtype);
  args.count = count;
  args.block_size = block_size;
  args.map = pointer<const float>(map);
  args.codes = pointer<uint8_t>(codes);
  args.absmax = pointer<float>(absmax);
  return args;
}

inline Dequantize8Args dequantize_8bit_args(Address codes, Address absmax, Address map, int64_t count,
                                            int64_t block_size, Address out, int dtype) {
  Dequantize8Args args;
  args.codes = pointer<const uint8_t>(codes);
  args.absmax = pointer<const float>(absmax);
  args.map = pointer<const float>(map);
  args.count = count;
  args.block_size = block_size;
  args.out = pointer<void>(out);
  args.dtype = static_cast<DType>(dtype);
  return args;
}

inline QuantizeRowsArgs quantize_int8_args(Address x, int dtype, int64_t rows, int64_t cols, Address q,
                                           Address absmax) {
  QuantizeRowsArgs args;
  args.x = pointer<const void>(x);
  args.dtype = static_cast<DType>(dtype);
  args.rows = rows;
  args.cols = cols;
  args.q = pointer<int8_t>(q);
  args.absmax = pointer<float>(absmax);
  return args;
}

inline DequantizeRowsArgs dequantize_int8_args(Address q, Address absmax, int64_t rows, int64_t cols, Address out,
                                               int dtype) {
  DequantizeRowsArgs args;
  args.source = {pointer<const int8_t>(q), pointer<const float>(absmax)};
  args.rows = rows;
  args.cols = cols;
  args.out = pointer<void>(out);
  args.dtype = static_cast<DType>(dtype);
  return args;
}

// In the order of AdamWRule's fields.
using Rule = std::array<float, 9>;

inline AdamWArgs adamw_args(Address param, int dtype, Address grad, int grad_dtype, int64_t count, const Rule& rule,
                            bool stochastic, uint64_t key) {
  AdamWArgs args;
  args.param = pointer<void>(param);
  args.dtype = static_cast<DType>(dtype);
  args.grad = pointer<const void>(grad);
  args.grad_dtype = static_cast<DType>(grad_dtype);
  args.count = count;
  args.rule = {rule[0], rule[1], rule[2], rule[3], rule[4], rule[5], rule[6], rule[7], rule[8]};
  args.stochastic = stochastic;
  args.key = key;
  return args;
}

inline AdamW32Args adamw_32bit_args(const AdamWArgs& common, Address m, Address v) {
  return {common, pointer<float>(m), pointer<float>(v)};
}

inline AdamW8Args adamw_8bit_args(const AdamWArgs& common, int64_t block_size, Address m_map, Address v_map, Address m,
                                  Address v, Address m_absmax, Address v_absmax) {
  AdamW8Args args;
  args.common = common;
  args.block_size = block_size;
  args.m_map = pointer<const float>(m_map);
  args.v_map = pointer<const float>(v_map);
  args.m = pointer<uint8_t>(m);
  args.v = pointer<uint8_t>(v);
  args.m_absmax = pointer<float>(m_absmax);
  args.v_absmax = pointer<float>(v_absmax);
  return args;
}

inline SquaresArgs squares_args(Address x, int dtype, int64_t count, Address sums) {
  SquaresArgs args;
  args.x = pointer<const void>(x);
  args.dtype = static_cast<DType>(dtype);
  args.count = count;
  args.sums = pointer<double>(sums);
  return args;
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

// Each module has a class of its own: addresses of one device mean nothing to another.
inline void define_weight(py::module_& m) {
  py::class_<WeightHandle>(m, "Weight", "Addresses of a quantized weight; whoever holds it keeps the tensors alive.",
                           py::module_local())
      .def_static("four_bit", &WeightHandle::four_bit, py::arg("packed"), py::arg("absmax"), py::arg("nested_absmax"),
                  py::arg("nested_map"), py::arg("nested_offset"), py::arg("nested_block_size"), py::arg("codebook"),
                  py::arg("block_size"), py::arg("rows"), py::arg("cols"))
      .def_static("int8_rows", &WeightHandle::int8_rows, py::arg("q"), py::arg("absmax"), py::arg("rows"),
                  py::arg("cols"));
}

// One Python number after the other, integers but for next_float; what is none leaves a Python exception set.
class Integers {
 public:
  explicit Integers(PyObject* const* at) : at_(at) {}
  template <class T>
  T next() {
    return static_cast<T>(PyLong_AsLongLong(*at_++));
  }
  float next_float() { return static_cast<float>(PyFloat_AsDouble(*at_++)); }
  template <class T>
  const T* next_pointer() {
    return pointer<const T>(next<Address>());
  }

 private:
  PyObject* const* at_;
};

// The arguments of `linear` up to `out`.
inline LinearArgs next_linear_args(const WeightHandle& handle, Integers& integers) {
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
  return args;
}

// A problem that is only asked about.
inline LinearArgs asked_linear_args(int64_t rows, int64_t cols, int64_t m, int dtype, bool int8, bool grad_input,
                                    int compute, int64_t block_size) {
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
  return args;
}

// `linear` is called for every layer of every token, so it is a plain CPython function: pybind11's dispatch of 16
// arguments takes 0.3 us more, as much as a third of the kernel's time with a 64 x 64 weight.
template <PyObject* (*Function)(const WeightHandle&, Integers), Py_ssize_t Count>
PyObject* call_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  try {
    if (count != Count) {
      throw py::type_error("linear takes " + std::to_string(Count) + " arguments, got " + std::to_string(count));
    }
    py::detail::make_caster<WeightHandle> weight;
    if (!weight.load(args[0], false)) throw py::type_error("linear: weight must be a Weight of this module");
    return Function(py::detail::cast_op<const WeightHandle&>(weight), Integers(args + 1));
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

}  // namespace nybble::bindings
