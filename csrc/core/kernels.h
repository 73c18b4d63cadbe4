// The table of entry points that every ISA fills: raw pointers, sizes, strides and a thread count in, a Status out.
// The sizes are checked again in check.h before a kernel touches memory. Layouts: format.h.
#pragma once
#include <cstdint>

#include "core/format.h"
#include "core/status.h"

namespace nybble {

enum class Search : int32_t { absmax = 0, mse = 1 };

struct Quantize4Args {
  const void* x = nullptr;  // [count], contiguous
  DType dtype = DType::f32;
  int64_t count = 0;
  int64_t block_size = 64;
  const float* codebook = nullptr;  // [16], any order
  Search search = Search::absmax;
  uint8_t* packed = nullptr;  // out [ceil(count / 2)]
  float* absmax = nullptr;    // out [ceil(count / block_size)]
  int threads = 1;
};

struct Dequantize4Args {
  Packed4 source;
  int64_t count = 0;
  void* out = nullptr;  // [count]
  DType dtype = DType::f32;
  int threads = 1;
};

struct Quantize8Args {      // block-wise 8-bit with a 256-entry map
  const void* x = nullptr;  // [count]
  DType dtype = DType::f32;
  int64_t count = 0;
  int64_t block_size = 256;
  const float* map = nullptr;  // [256], ascending
  uint8_t* codes = nullptr;    // out [count]
  float* absmax = nullptr;     // out [ceil(count / block_size)]
  int threads = 1;
};

struct Dequantize8Args {
  const uint8_t* codes = nullptr;
  const float* absmax = nullptr;
  const float* map = nullptr;
  int64_t count = 0;
  int64_t block_size = 256;
  void* out = nullptr;
  DType dtype = DType::f32;
  int threads = 1;
};

struct QuantizeRowsArgs {   // row-wise int8 (the LLM.int8 layout)
  const void* x = nullptr;  // [rows, cols]
  DType dtype = DType::f32;
  int64_t rows = 0;
  int64_t cols = 0;
  int8_t* q = nullptr;      // out [rows, cols]
  float* absmax = nullptr;  // out [rows]
  int threads = 1;
};

struct DequantizeRowsArgs {
  Rows8 source;
  int64_t rows = 0;
  int64_t cols = 0;
  void* out = nullptr;  // [rows, cols]
  DType dtype = DType::f32;
  int threads = 1;
};

// What is multiplied. `native`: activations in their own precision or better. `int8`: each row of x is quantized to
// int8 on the fly and multiplied with int8 weights in integers (dynamic quantization, an opt-in); one or two rows are
// computed as `native`, which is as fast.
enum class Compute : int32_t { native = 0, int8 = 1 };

// The low-rank extension of a contraction: out += left . right, in the same pass over the output.
struct SidePath {
  const void* left = nullptr;  // [m, rank], contiguous
  DType left_dtype = DType::f32;
  const void* right = nullptr;  // forward [rows, rank] (B of LoRA), grad_input [rank, cols] (A); contiguous
  DType right_dtype = DType::f32;
  int64_t rank = 0;  // 0: no side path
};

// forward      out[m, rows] = x[m, cols] . W^T + left . right^T + bias
// grad_input   out[m, cols] = x[m, rows] . W   + left . right
struct LinearArgs {
  Weight weight;
  bool grad_input = false;
  Compute compute = Compute::native;  // forward only; grad_input is always native
  const void* x = nullptr;
  int64_t x_stride = 0;  // elements from one row of x to the next
  int64_t m = 0;
  DType dtype = DType::f32;  // of x and out
  SidePath side;
  const void* bias = nullptr;  // [rows], forward only; null: none
  DType bias_dtype = DType::f32;
  void* out = nullptr;  // contiguous
  int threads = 1;

  int64_t contraction() const { return grad_input ? weight.rows : weight.cols; }
  int64_t columns() const { return grad_input ? weight.cols : weight.rows; }
};

struct KernelTable {
  const char* isa;
  bool bf16_dot;  // bf16 activations are multiplied as bf16 pairs with fp32 accumulation
  Status (*quantize_4bit)(const Quantize4Args&);
  Status (*dequantize_4bit)(const Dequantize4Args&);
  Status (*quantize_8bit)(const Quantize8Args&);
  Status (*dequantize_8bit)(const Dequantize8Args&);
  Status (*quantize_int8)(const QuantizeRowsArgs&);
  Status (*dequantize_int8)(const DequantizeRowsArgs&);
  Status (*linear_small_m)(const LinearArgs&);
  Status (*linear_panel)(const LinearArgs&);
  Status (*linear_tiles)(const LinearArgs&);      // null where the ISA has no matrix unit; bf16 only
  Status (*linear_tiles_few)(const LinearArgs&);  // likewise; forward, at most 32 rows of x
  Status (*linear_int8)(const LinearArgs&);       // Compute::int8, forward only
};

}  // namespace nybble
