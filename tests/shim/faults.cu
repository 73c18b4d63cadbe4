// Small kernels with a fault to plant (0: none), by which the shim is proved: each fault is one that a kernel can have.
#include "shim/faults.h"

#include <cstring>

#include "cuda/launch.cuh"

namespace nybble::cuda {

namespace {

constexpr int kThreads = 128;

// out[i] = in[kThreads - 1 - i] through shared memory.
__global__ void reverse(const int* in, int* out, int fault) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int i = static_cast<int>(threadIdx.x);
  shared[fault == 3 ? i + 1 : i] = in[fault == 4 ? i + 1 : i];
  if (fault == 1) __syncwarp();
  if (fault != 1) __syncthreads();
  out[fault == 5 ? i + 1 : i] = shared[fault == 2 ? kThreads - i : kThreads - 1 - i];
}

}  // namespace

namespace shim {

Status run_faulty(const char* kernel, int fault, const void* in, void* out) {
  const Place place;
  const auto is = [kernel](const char* name) { return std::strcmp(kernel, name) == 0; };
  if (is("reverse")) {
    return launch<&reverse>(dim3(1), kThreads, kThreads * 4, place, static_cast<const int*>(in), static_cast<int*>(out),
                            fault);
  }
  return bad_argument("kernel", 0);
}

}  // namespace shim

}  // namespace nybble::cuda
