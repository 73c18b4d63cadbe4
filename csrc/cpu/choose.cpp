#include "cpu/choose.h"

namespace nybble::cpu {

namespace {

// Up to here reading the weight once, decoding in registers, beats building a panel; the small-M kernel's limit is 8.
constexpr int64_t kSmallM = 8;

}  // namespace

Choice choose_linear(const KernelTable& table, const LinearArgs& args) {
  const bool pairs = table.bf16_dot && args.dtype == DType::bf16;
  const char* panel_compute = pairs ? "bf16 pairs, fp32 accumulation" : "fp32";
  const auto panel = [&](const char* reason) {
    return Choice{"linear_panel", reason, panel_compute, table.linear_panel};
  };
  if (args.grad_input)
    return panel("grad_input contracts over the weight's rows: one decoded panel serves both directions");
  if (args.compute == Compute::int8) {
    return {"linear_int8", "int8 compute was asked for: rows of x are quantized on the fly, one scale a row",
            "int8 x int8, int32 accumulation", table.linear_int8};
  }
  if (args.m > kSmallM) return panel("m > 8: one decode of the weight is shared by all rows of x");
  if (!args.weight.is_int8() && args.weight.cols % 2 != 0)
    return panel("in_features is odd, so rows do not start at a byte");
  return {"linear_small_m", "m <= 8: bound by reading the weight, decoded in registers", "fp32", table.linear_small_m};
}

}  // namespace nybble::cpu
