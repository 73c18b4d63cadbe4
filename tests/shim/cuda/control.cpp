// The part of the module that is for tests: `_cuda_shim_control`, beside the kernels' own bindings.
#include <pybind11/pybind11.h>

#include "bindings/shared.h"
#include "shim/cuda/control.h"
#include "shim/faults.h"

namespace py = pybind11;
using namespace nybble::cuda;

namespace {

void set_schedule(const std::string& name) {
  if (name == "random") {
    fibers::set_order(fibers::Order::random);
  } else if (name == "in order") {
    fibers::set_order(fibers::Order::in_order);
  } else if (name == "reverse") {
    fibers::set_order(fibers::Order::reverse);
  } else {
    throw py::value_error("a schedule is 'random', 'in order' or 'reverse', not '" + name + "'");
  }
}

uintptr_t guard(size_t bytes, size_t alignment, bool at_end, const std::string& name) {
  void* data = shim::new_guarded(bytes, alignment, at_end, name.c_str());
  if (data == nullptr) throw std::bad_alloc();
  return reinterpret_cast<uintptr_t>(data);
}

}  // namespace

PYBIND11_MODULE(_cuda_shim_control, m) {
  m.def("seed", &shim::set_seed, "Of all schedules from here on.");
  m.def("schedule", &set_schedule, "'random', 'in order' or 'reverse'.");
  m.def(
      "device", [](int capability, int multiprocessors) { shim::set_device({capability, multiprocessors}); },
      py::arg("capability"), py::arg("multiprocessors") = 132);
  m.def("launches", &shim::launches, "How many kernels have been started.");
  m.def("guard", &guard);
  m.def("protect",
        [](uintptr_t data, bool read_only) { return shim::protect_guarded(reinterpret_cast<void*>(data), read_only); });
  m.def("run_faulty", [](const std::string& kernel, int fault, uintptr_t in, uintptr_t out) {
    nybble::bindings::raise_unless_ok(
        shim::run_faulty(kernel.c_str(), fault, reinterpret_cast<const void*>(in), reinterpret_cast<void*>(out)));
  });
  m.def("release", [](uintptr_t data) { return shim::delete_guarded(reinterpret_cast<void*>(data)); });
}
