// What every file of the bindings needs: addresses become pointers, a Status an exception, and the GIL is released
// while a kernel runs.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "core/check.h"
#include "core/kernels.h"

namespace nybble::bindings {

namespace py = pybind11;
using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// A NaN or an infinity in what was to be quantized; Python adds the tensor's name.
struct NonFinite : std::runtime_error {
  explicit NonFinite(int64_t at) : std::runtime_error(std::to_string(at)) {}
};

void raise_unless_ok(const Status& status);

// Of the active ISA; throws where the environment forces one, or a kernel, that is not there.
const KernelTable& kernels();

template <class Args>
Args with_threads(Args args, int threads) {
  args.threads = threads;
  return args;
}

template <class Args>
void run(Status (*KernelTable::*entry)(const Args&), const Args& args) {
  const KernelTable& table = kernels();
  if (table.*entry == nullptr) throw py::value_error(std::string(table.isa) + " has no such kernel");
  raise_unless_ok(check(args));
  Status status;
  {
    py::gil_scoped_release released;
    status = (table.*entry)(args);
  }
  raise_unless_ok(status);
}

// The files' own parts of the module.
void define_decoding(py::module_& m);
void define_training(py::module_& m);

}  // namespace nybble::bindings
