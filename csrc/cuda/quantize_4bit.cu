#include "cuda/launch.cuh"

namespace nybble::cuda {

Status quantize_4bit(const Quantize4Args&, int64_t*, const Place&) { return bad_argument("kernel", 0); }

}  // namespace nybble::cuda
