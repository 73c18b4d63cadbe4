// What the core reports, as exceptions.
#include "bindings/shared.h"

namespace nybble::bindings {

void raise_unless_ok(const Status& status) {
  switch (status.code) {
    case Code::ok:
      return;
    case Code::non_finite:
      throw NonFinite(status.value);
    case Code::out_of_memory:
      throw std::bad_alloc();
    case Code::device_failed:
      throw std::runtime_error("CUDA: " + std::string(status.what) + " (error " + std::to_string(status.value) + ")");
    case Code::bad_argument:
      throw py::value_error(std::string(status.what) + " is out of range or null: got " + std::to_string(status.value));
  }
}

}  // namespace nybble::bindings
