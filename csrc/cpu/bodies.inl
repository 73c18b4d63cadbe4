// Every kernel of an ISA and the table that it exports: included by the ISA's file after its primitives (simd_*.h).
// NYBBLE_ISA_NAME names it; NYBBLE_BF16_DOT and NYBBLE_AMX say what it has beyond fp32.
#include "cpu/codec.inl"
#include "cpu/rounding.inl"
#include "cpu/optimizer.inl"
#include "cpu/linear_panel.inl"
#include "cpu/factors.inl"
#include "cpu/exponential.inl"
#include "cpu/attention.inl"
#include "cpu/attention_forward.inl"
#include "cpu/attention_backward.inl"
#include "cpu/elementwise.inl"
#include "cpu/linear_int8.inl"
#include "cpu/linear_small_m.inl"
#include "cpu/dense_few.inl"
#include "cpu/attention_step.inl"
#ifdef NYBBLE_AMX
#include "cpu/linear_tiles.inl"
#include "cpu/linear_tiles_few.inl"
#else
constexpr Status (*linear_tiles)(const LinearArgs&) = nullptr;
constexpr Status (*linear_tiles_few)(const LinearArgs&) = nullptr;
#endif

#ifdef NYBBLE_BF16_DOT
constexpr bool kBf16Dot = true;
#else
constexpr bool kBf16Dot = false;
#endif

extern const KernelTable kTable;
const KernelTable kTable = {
    NYBBLE_ISA_NAME,
    kBf16Dot,
    quantize_4bit,
    dequantize_4bit,
    quantize_8bit,
    dequantize_8bit,
    quantize_int8,
    dequantize_int8,
    round_feedback,
    round_descent,
    adamw_32bit,
    adamw_8bit,
    sum_of_squares,
    attention_forward,
    attention_scores_grad,
    rms_norm,
    rms_norm_backward,
    gated,
    gated_backward,
    rotary,
    dense_few,
    attention_step,
    factor_apply,
    factor_gradient,
    linear_small_m,
    linear_panel,
    linear_tiles,
    linear_tiles_few,
    linear_int8,
};
