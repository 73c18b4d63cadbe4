// What the host asks of a GPU.
#include "cuda/launch.cuh"

namespace nybble::cuda {

#if defined(NYBBLE_SHIM)
Status device_properties(int, Device* device) {
  *device = shim_device();
  return success();
}
Status make_current(int number, int* before) {
  *before = number;
  return success();
}
#else
Status device_properties(int number, Device* device) {
  constexpr int kRemembered = 64;
  static Device known[kRemembered];
  static bool read[kRemembered] = {};  // two threads that both read find the same
  if (number >= 0 && number < kRemembered && read[number]) {
    *device = known[number];
    return success();
  }
  int major = 0, minor = 0, multiprocessors = 0;
  Status status = status_of(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number));
  if (!status.ok()) return status;
  status = status_of(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, number));
  if (!status.ok()) return status;
  status = status_of(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, number));
  if (!status.ok()) return status;
  *device = {10 * major + minor, multiprocessors};
  if (number >= 0 && number < kRemembered) {
    known[number] = *device;
    read[number] = true;
  }
  return success();
}
Status make_current(int number, int* before) {
  Status status = status_of(cudaGetDevice(before));
  if (status.ok() && *before != number) status = status_of(cudaSetDevice(number));
  return status;
}
#endif

}  // namespace nybble::cuda
