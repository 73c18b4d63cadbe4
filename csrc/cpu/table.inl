// The last include of an ISA's file: the table that it exports. Needs NYBBLE_ISA_NAME and NYBBLE_ISA_BF16_DOT.

extern const KernelTable kTable;
const KernelTable kTable = {
    NYBBLE_ISA_NAME, NYBBLE_ISA_BF16_DOT, quantize_4bit,  dequantize_4bit, quantize_8bit,
    dequantize_8bit, quantize_int8,       dequantize_int8, linear_small_m, linear_panel,
};
