// Small kernels with a fault to plant, by which the shim is proved.
#pragma once
#include "core/status.h"

namespace nybble::cuda::shim {

// `fault` 0: none. in, out: [threads] or as the kernel says.
Status run_faulty(const char* kernel, int fault, const void* in, void* out);
Status run_faulty_tiles(const char* kernel, int fault, const void* in, void* out);

}  // namespace nybble::cuda::shim
