// The only place that decides which kernel runs a linear operation on the CPU, and it can be asked.
#pragma once
#include <string>

#include "core/kernels.h"

namespace nybble::cpu {

struct Choice {
  const char* kernel;  // its name, as in kernels.h
  const char* reason;
  const char* compute;  // what is multiplied and accumulated
  Status (*run)(const LinearArgs&);
};

Choice choose_linear(const KernelTable& table, const LinearArgs& args);

// The kernel that runs wherever it can instead of the chosen one, for tests and benches; empty: none. It starts as the
// environment variable NYBBLE_FORCE_KERNEL.
std::string forced_kernel();

// Returns false if there is no kernel of that name; an empty name ends the forcing.
bool force_kernel(const std::string& name);

// Every name that can be forced, separated by commas.
std::string kernel_names();

}  // namespace nybble::cpu
