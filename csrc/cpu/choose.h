// The only place that decides which kernel runs a linear operation on the CPU, and it can be asked.
#pragma once
#include "core/kernels.h"

namespace nybble::cpu {

struct Choice {
  const char* kernel;  // "linear_small_m", "linear_panel" or "linear_int8"
  const char* reason;
  const char* compute;  // what is multiplied and accumulated
  Status (*run)(const LinearArgs&);
};

Choice choose_linear(const KernelTable& table, const LinearArgs& args);

}  // namespace nybble::cpu
