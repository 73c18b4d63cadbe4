// The sizes once more, in C++, before any kernel touches memory. Python has already checked dtypes and devices.
#pragma once
#include "core/kernels.h"

namespace nybble {

Status check(const Packed4& weight, int64_t count);
Status check(const Quantize4Args& args);
Status check(const Dequantize4Args& args);
Status check(const Quantize8Args& args);
Status check(const Dequantize8Args& args);
Status check(const QuantizeRowsArgs& args);
Status check(const DequantizeRowsArgs& args);
Status check(const RoundArgs& args);
Status check(const AdamW32Args& args);
Status check(const AdamW8Args& args);
Status check(const SquaresArgs& args);
Status check(const RmsNormArgs& args);
Status check(const RmsNormBackwardArgs& args);
Status check(const GatedArgs& args);
Status check(const GatedBackwardArgs& args);
Status check(const RotaryArgs& args);
Status check(const DenseArgs& args);
Status check(const AttentionStepArgs& args);
Status check(const LinearArgs& args);
Status check(const FactorArgs& args);
Status check(const FactorGradArgs& args);
Status check(const AttentionForwardArgs& args);
Status check(const AttentionArgs& args);

}  // namespace nybble
