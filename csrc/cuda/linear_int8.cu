#include "cuda/launch.cuh"

namespace nybble::cuda {

Status linear_int8(const LinearArgs&, const Device&, const Place&) { return bad_argument("kernel", 0); }

}  // namespace nybble::cuda
