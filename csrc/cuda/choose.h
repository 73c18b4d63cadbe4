// The only place that decides which kernel runs a linear operation on a GPU, and it can be asked.
#pragma once
#include <string>

#include "cuda/kernels.h"

namespace nybble::cuda {

struct Choice {
  const char* kernel;  // its name, as in kernels.h, or kDequantize
  const char* reason;
  const char* compute;  // what is multiplied and accumulated
  // Null for kDequantize: the caller dequantizes the weight in one launch and leaves the product to its library.
  Status (*run)(const LinearArgs& args, const Device& device, const Place& place);
};

constexpr const char* kDequantize = "dequantize + matmul";

Choice choose_linear(const LinearArgs& args, const Device& device);

// As for the CPU (cpu/choose.h): for tests and benches; empty: none; at first the environment's
// NYBBLE_FORCE_CUDA_KERNEL.
std::string forced_kernel();
bool force_kernel(const std::string& name);
std::string kernel_names();

}  // namespace nybble::cuda
