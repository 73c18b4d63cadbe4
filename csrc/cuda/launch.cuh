// Starting a kernel on a stream; errors of the start as a Status. The shim has the same function.
#pragma once
#include "cuda/device.cuh"
#include "cuda/kernels.h"

#if !defined(NYBBLE_SHIM)

namespace nybble::cuda {

inline Status status_of(cudaError_t error) {
  return error == cudaSuccess ? success() : device_failed(cudaGetErrorString(error), static_cast<int64_t>(error));
}

// `params`: exactly the kernel's. More than 48 KB of shared memory have to be asked for, once for a kernel and device.
template <auto Kernel, class... P>
Status launch(dim3 grid, int threads, size_t shared_bytes, const Place& place, P... params) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return success();
  const void* kernel = reinterpret_cast<const void*>(Kernel);
  if (shared_bytes > 48 * 1024) {
    constexpr int kRemembered = 64;
    static bool asked[kRemembered] = {};  // two threads that both ask do no harm
    if (place.device >= kRemembered || !asked[place.device]) {
      int most = 0;
      Status status = status_of(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, place.device));
      if (!status.ok()) return status;
      status = status_of(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
      if (!status.ok()) return status;
      if (place.device < kRemembered) asked[place.device] = true;
    }
  }
  void* pointers[] = {&params...};
  return status_of(cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(threads)), pointers, shared_bytes,
                                    static_cast<cudaStream_t>(place.stream)));
}

}  // namespace nybble::cuda

#endif
