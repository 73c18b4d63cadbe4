#include "cpu/choose.h"

#include "core/forcing.h"

namespace nybble::cpu {

namespace {

// A kernel, what it can run at all, and what it multiplies. Which of those that can is the best is choose_linear's.
struct Kernel {
  const char* name;
  Status (*KernelTable::*entry)(const LinearArgs&);
  bool (*can_run)(const LinearArgs&);
  bool pairs;  // bf16 activations are multiplied as bf16 pairs where the ISA can
};

// grad_input has no int8 arithmetic: `compute` is for the forward.
bool wants_int8(const LinearArgs& args) { return args.compute == Compute::int8 && !args.grad_input; }
bool runs_int8(const LinearArgs& args) { return wants_int8(args); }
// Rows of x up to which int8 arithmetic is not worth its rounding: reading the weight takes as long (4096 x 4096, one
// row, Sapphire Rapids class: NF4 0.50 ms in fp32, 0.68 in int8; int8 weights 0.66 and 0.77).
constexpr int64_t kExactRows = 2;
bool allows_exact(const LinearArgs& args) { return !wants_int8(args) || args.m <= kExactRows; }
bool runs_small_m(const LinearArgs& args) {
  // The kernel holds 8 rows of x; a word of 8 packed elements must lie in one row and one block.
  return allows_exact(args) && !args.grad_input && args.m <= 8 && (args.weight.is_int8() || args.weight.cols % 8 == 0);
}
bool runs_panel(const LinearArgs& args) { return !wants_int8(args); }
bool runs_tiles_few(const LinearArgs& args) {
  // Two tiles of rows of x; 64 columns must lie in one block.
  const Weight& weight = args.weight;
  const bool whole = weight.cols > 0 && weight.cols % 64 == 0 && (weight.is_int8() || weight.packed4.block_shift >= 6);
  return allows_exact(args) && !args.grad_input && args.dtype == DType::bf16 && args.m <= 32 && whole;
}
bool runs_tiles(const LinearArgs& args) { return !wants_int8(args) && args.dtype == DType::bf16; }

const Kernel kKernels[] = {
    {"linear_small_m", &KernelTable::linear_small_m, runs_small_m, false},
    {"linear_panel", &KernelTable::linear_panel, runs_panel, true},
    {"linear_tiles", &KernelTable::linear_tiles, runs_tiles, true},
    {"linear_tiles_few", &KernelTable::linear_tiles_few, runs_tiles_few, true},
    {"linear_int8", &KernelTable::linear_int8, runs_int8, false},
};
const Kernel& kSmallM = kKernels[0];
const Kernel& kPanel = kKernels[1];
const Kernel& kTiles = kKernels[2];
const Kernel& kTilesFew = kKernels[3];
const Kernel& kInt8 = kKernels[4];

Forcing<Kernel> forcing(kKernels, "NYBBLE_FORCE_KERNEL");

bool can_run(const Kernel& kernel, const KernelTable& table, const LinearArgs& args) {
  return table.*kernel.entry != nullptr && kernel.can_run(args);
}

Choice with(const Kernel& kernel, const KernelTable& table, const LinearArgs& args, const char* reason) {
  if (&kernel == &kInt8) return {kernel.name, reason, "int8 x int8, int32 accumulation", table.*kernel.entry};
  const bool pairs = kernel.pairs && table.bf16_dot && args.dtype == DType::bf16;
  return {kernel.name, reason, pairs ? "bf16 pairs, fp32 accumulation" : "fp32", table.*kernel.entry};
}

// Rows of x from which on tiles beat decoding in registers (4096 x 4096, Sapphire Rapids class; NF4 0.57 ms for 2 rows,
// 0.88 for 4 in registers, 0.73 in tiles that are scaled afterwards, 1.0 in others; int8 0.67, 0.77, 1.3, and 1.8 for
// 8).
constexpr int64_t kTilesFewFrom = 3, kTilesFewFromInt8 = 5;
constexpr int64_t kTilesFrom = 5;

}  // namespace

Choice choose_linear(const KernelTable& table, const LinearArgs& args) {
  const Kernel* wanted = forcing.now();
  if (wanted != nullptr && can_run(*wanted, table, args)) return with(*wanted, table, args, "it was forced");
  const bool tiles = can_run(kTiles, table, args);
  if (wants_int8(args) && args.m <= kExactRows && can_run(kSmallM, table, args)) {
    return with(kSmallM, table, args, "few rows of x: bound by reading the weight, so int8 would round for nothing");
  }
  if (wants_int8(args)) {
    return with(kInt8, table, args, "int8 compute was asked for: rows of x are quantized on the fly, one scale a row");
  }
  if (args.grad_input) {
    if (tiles)
      return with(kTiles, table, args, "bf16 and a matrix unit, which takes the weight without transposing it");
    return with(kPanel, table, args,
                "grad_input contracts over the weight's rows: one decoded panel serves both directions");
  }
  if (can_run(kTilesFew, table, args) && args.m >= (args.weight.is_int8() ? kTilesFewFromInt8 : kTilesFewFrom)) {
    return with(kTilesFew, table, args,
                "bf16, a matrix unit and few rows of x: tiles hold bare codes, sums are scaled");
  }
  if (tiles && args.m >= kTilesFrom) {
    return with(kTiles, table, args, "bf16, a matrix unit, and enough rows of x to be worth filling its tiles");
  }
  if (args.m > 8) return with(kPanel, table, args, "m > 8: one decode of the weight is shared by all rows of x");
  if (!can_run(kSmallM, table, args)) {
    return with(kPanel, table, args,
                "in_features is no multiple of 8, so rows do not start at a word of packed elements");
  }
  return with(kSmallM, table, args, "few rows of x: bound by reading the weight, decoded in registers");
}

std::string forced_kernel() { return forcing.name(); }
bool force_kernel(const std::string& name) { return forcing.force(name); }
std::string kernel_names() { return forcing.names(); }

}  // namespace nybble::cpu
