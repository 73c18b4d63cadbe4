#include "cuda/choose.h"

#include "core/forcing.h"

namespace nybble::cuda {

namespace {

struct Kernel {
  const char* name;
  Status (*run)(const LinearArgs&, const Device&, const Place&);
  bool (*can_run)(const LinearArgs&, const Device&);
};

bool is_half(const LinearArgs& args) { return args.dtype != DType::f32; }
bool wants_int8(const LinearArgs& args) { return args.compute == Compute::int8 && !args.grad_input; }
// Rows of x up to which int8 arithmetic is not worth its rounding: reading the weight takes as long.
constexpr int64_t kExactRows = 2;
bool allows_exact(const LinearArgs& args) {
  return !wants_int8(args) || args.m <= kExactRows || args.weight.cols > kMostInt8Columns;
}

// 64 columns of a row, which a tile has, must lie in one block (32: two), and 16-byte loads in one row.
bool whole(const Weight& weight) { return weight.cols > 0 && weight.cols % 64 == 0; }
bool aligned(const void* pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0; }
bool aligned_weight(const Weight& weight) {
  return aligned(weight.is_int8() ? static_cast<const void*>(weight.rows8.q) : weight.packed4.packed);
}
bool aligned_rows(const LinearArgs& args) { return aligned(args.x) && args.x_stride % 8 == 0; }

constexpr int64_t kSmallM = 16;

bool runs_small_m(const LinearArgs& args, const Device&) {
  // Where int8 is asked for too: its time hardly depends on the number of rows.
  return is_half(args) && !args.grad_input && args.m <= kSmallM && whole(args.weight) && aligned_weight(args.weight) &&
         aligned_rows(args);
}
bool runs_wgmma(const LinearArgs& args, const Device& device) {
  return device.hopper() && is_half(args) && allows_exact(args) && whole(args.weight) && aligned_weight(args.weight) &&
         aligned_rows(args) && (!args.grad_input || args.weight.rows % 8 == 0);
}
bool runs_mma(const LinearArgs& args, const Device&) { return is_half(args) && allows_exact(args); }
bool runs_fp32(const LinearArgs& args, const Device&) { return !is_half(args) && allows_exact(args); }
bool runs_int8(const LinearArgs& args, const Device&) {
  return wants_int8(args) && args.weight.cols <= kMostInt8Columns;
}
bool runs_dequantize(const LinearArgs& args, const Device&) { return allows_exact(args); }

const Kernel kKernels[] = {
    {"linear_small_m", linear_small_m, runs_small_m},
    {"linear_wgmma", linear_wgmma, runs_wgmma},
    {"linear_mma", linear_mma, runs_mma},
    {"linear_fp32", linear_fp32, runs_fp32},
    {"linear_int8", linear_int8, runs_int8},
    {kDequantize, nullptr, runs_dequantize},
};
const Kernel& kSmallMKernel = kKernels[0];
const Kernel& kWgmma = kKernels[1];
const Kernel& kMma = kKernels[2];
const Kernel& kFp32 = kKernels[3];
const Kernel& kInt8 = kKernels[4];
const Kernel& kDequantizeKernel = kKernels[5];

Forcing<Kernel> forcing(kKernels, "NYBBLE_FORCE_CUDA_KERNEL");

const char* compute_of(const Kernel& kernel, const LinearArgs& args) {
  if (&kernel == &kInt8) return "int8 x int8, int32 accumulation";
  if (args.dtype == DType::f32) return "fp32";
  return args.dtype == DType::bf16 ? "bf16 pairs, fp32 accumulation" : "fp16 pairs, fp32 accumulation";
}

Choice with(const Kernel& kernel, const LinearArgs& args, const char* reason) {
  return {kernel.name, reason, compute_of(kernel, args), kernel.run};
}

// Rows of x from which dequantizing once and leaving the product to cuBLAS is expected to be faster than decoding every
// tile anew. NOT measured yet: bench/cuda_kernels.py sweeps it.
constexpr int64_t kDequantizeFromHopper = 1024;
constexpr int64_t kDequantizeFrom = 128;

}  // namespace

Choice choose_linear(const LinearArgs& args, const Device& device) {
  const Kernel* wanted = forcing.now();
  if (wanted != nullptr && wanted->can_run(args, device)) return with(*wanted, args, "it was forced");
  if (!allows_exact(args) && !runs_small_m(args, device)) {
    return with(kInt8, args, "int8 compute was asked for: rows of x are quantized on the fly, one scale a row");
  }
  if (args.dtype == DType::f32) {
    return with(kFp32, args, "fp32 activations are multiplied in fp32, which no tensor core does");
  }
  if (runs_small_m(args, device)) {
    return with(kSmallMKernel, args,
                wants_int8(args) ? "few rows of x: bound by reading the weight, so int8 would round for nothing"
                                 : "few rows of x: bound by reading the weight, decoded as the tensor cores' operand");
  }
  const bool hopper = runs_wgmma(args, device);
  const int64_t dequantize_from = hopper ? kDequantizeFromHopper : kDequantizeFrom;
  if (!args.grad_input && args.m >= dequantize_from) {
    return with(kDequantizeKernel, args, "many rows of x: one dequantized weight is shared by all of them");
  }
  if (hopper) return with(kWgmma, args, "tiles are dequantized into shared memory for the warpgroups' tensor cores");
  return with(kMma, args,
              device.hopper() ? "in_features is no multiple of 64, or an address is not aligned to 16 bytes"
                              : "this GPU has no tensor cores that a whole warpgroup uses");
}

std::string forced_kernel() { return forcing.name(); }
bool force_kernel(const std::string& name) { return forcing.force(name); }
std::string kernel_names() { return forcing.names(); }

}  // namespace nybble::cuda
