// The table of entry points that every ISA fills: raw pointers, sizes, strides and a thread count in, a Status out.
// The sizes are checked again in check.h before a kernel touches memory. Layouts: format.h.
#pragma once
#include <cstdint>

#include "core/format.h"
#include "core/status.h"

namespace nybble {

// How the scale of a block is found: its largest magnitude; or the scale of least squared error, every error weighted
// alike (mse), by the square of the value itself (square), or by the importance of its column.
enum class Search : int32_t { absmax = 0, mse = 1, square = 2, importance = 3 };

struct Quantize4Args {
  const void* x = nullptr;  // [count], contiguous
  DType dtype = DType::f32;
  int64_t count = 0;
  int64_t block_size = 64;
  const float* codebook = nullptr;  // [16], any order
  Search search = Search::absmax;
  const float* importance = nullptr;  // [columns], not negative, for Search::importance: of element i, i % columns
  int64_t columns = 0;
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
  // Compute::int8 on a GPU: columns of x in which a magnitude reaches it are not rounded; 0: none. (On a CPU the caller
  // hands them over as a side path.)
  float outlier_threshold = 0.0F;
  const void* x = nullptr;
  int64_t x_stride = 0;  // elements from one row of x to the next
  int64_t m = 0;
  DType dtype = DType::f32;  // of x and out
  SidePath side;
  const void* bias = nullptr;  // [rows], forward only; null: none
  DType bias_dtype = DType::f32;
  void* out = nullptr;  // contiguous
  int threads = 1;

  NYBBLE_ANYWHERE int64_t contraction() const { return grad_input ? weight.rows : weight.cols; }
  NYBBLE_ANYWHERE int64_t columns() const { return grad_input ? weight.cols : weight.rows; }
};

constexpr int64_t kMostRank = 64;

// out[m, rank] = scale x . factor^T of a matrix x [m, k], all but the factor in bf16; sums in fp32, rounded once.
struct FactorArgs {
  const void* x = nullptr;
  int64_t x_stride = 0;  // elements from one row to the next
  int64_t m = 0;
  int64_t k = 0;
  int64_t rank = 0;              // at most kMostRank
  const void* factor = nullptr;  // contiguous; rounded to bf16
  DType factor_dtype = DType::f32;
  bool by_rank = true;  // [rank, k], such as LoRA's A; else [k, rank], such as B
  float scale = 1.0F;
  void* out = nullptr;  // [m, rank]
  int threads = 1;
};

// out[rank, k] = left^T . x of bf16 matrices left [m, rank], contiguous, and x [m, k]; fp32.
struct FactorGradArgs {
  const void* left = nullptr;
  const void* x = nullptr;
  int64_t x_stride = 0;
  int64_t m = 0;
  int64_t k = 0;
  int64_t rank = 0;  // at most kMostRank
  float* out = nullptr;
  int64_t out_rank_stride = 0;
  int64_t out_column_stride = 1;
  int threads = 1;
};

// Data-aware rounding of target [rows, cols] to codes whose scales are given. Columns are taken in an order: position p
// of it is column order[p], and `matrix` is in that order.
struct RoundArgs {
  const float* target = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  // [cols, cols], no 0 on its diagonal. round_feedback: U, upper triangular, U^T U = H^-1. round_descent: H, symmetric.
  const float* matrix = nullptr;
  const int32_t* order = nullptr;   // [cols], a permutation; null: as they are
  const float* absmax = nullptr;    // 4 bits: [ceil(rows * cols / block)]; int8: [rows]
  const float* codebook = nullptr;  // [16], any order; null: int8
  int block_shift = 6;
  int sweeps = 1;  // round_descent: over all columns, at most
  // [rows, cols], one byte a code, an index into the codebook or an int8. round_feedback writes it, round_descent
  // starts from what is there.
  uint8_t* codes = nullptr;
  int threads = 1;
};

// The numbers of one step of AdamW (arXiv 1711.05101), which its caller derives from lr, the betas and the step's
// number t in double and rounds to fp32. In fp32, every operation rounded by itself:
//   g = grad * grad_scale
//   m = beta1 * m + rest1 * g
//   v = beta2 * v + (rest2 * g) * g
//   param = param * decay - (step_size * m) / (sqrt(v) * root_scale + eps)
struct AdamWRule {
  float grad_scale = 1.0F;
  float beta1 = 0.9F, rest1 = 0.1F;      // rest1 = 1 - beta1
  float beta2 = 0.999F, rest2 = 0.001F;  // rest2 = 1 - beta2
  float decay = 1.0F;                    // 1 - lr * weight_decay
  float step_size = 0.0F;                // lr / (1 - beta1^t)
  float root_scale = 1.0F;               // 1 / sqrt(1 - beta2^t)
  float eps = 1e-8F;
};

// A flat parameter and its gradient, both contiguous; the parameter is read and written.
struct AdamWArgs {
  void* param = nullptr;  // [count]
  DType dtype = DType::f32;
  const void* grad = nullptr;  // [count]
  DType grad_dtype = DType::f32;
  int64_t count = 0;
  AdamWRule rule;
  // bf16 parameters: rounded up or down by a hash of `key` and the element's number, as often up as its distance says.
  bool stochastic = false;
  uint64_t key = 0;
  int threads = 1;
};

struct AdamW32Args {
  AdamWArgs common;
  float* m = nullptr;  // [count], read and written
  float* v = nullptr;
};

// Both moments in blocks of 8-bit codes, as quantize_8bit writes them but for one thing: a v above 0 never gets the
// code of 0, where its element would take a step of m / eps. A block whose new moments are not all finite is left as it
// was, its part of the parameter too, and the first such block reported; all others are updated.
struct AdamW8Args {
  AdamWArgs common;
  int64_t block_size = 256;
  const float* m_map = nullptr;  // [256], ascending
  const float* v_map = nullptr;  // [256], ascending, the first entry 0
  uint8_t* m = nullptr;          // [count], read and written
  uint8_t* v = nullptr;
  float* m_absmax = nullptr;  // [ceil(count / block_size)], read and written
  float* v_absmax = nullptr;
};

constexpr int64_t kSquaresRun = 65536;  // elements that share a sum

// Sums of squares, the same bits under every ISA: what a gradient's norm is made of.
struct SquaresArgs {
  const void* x = nullptr;  // [count]
  DType dtype = DType::f32;
  int64_t count = 0;
  double* sums = nullptr;  // out [ceil(count / kSquaresRun)]
  int threads = 1;
};

// A tensor [batches, heads, rows, columns], its columns contiguous; strides in elements.
struct AttentionTensor {
  const void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;
};

constexpr int64_t kMaxHeadDepth = 512;

// Scaled dot product attention of a block of queries. Scores are scale q . k + mask, -infinity where a key is hidden.
struct AttentionInputs {
  AttentionTensor query;     // [batches, heads, rows, depth]
  AttentionTensor key;       // [batches, heads / group, cols, depth]
  AttentionTensor value;     // [batches, heads / group, cols, value_depth]
  AttentionTensor mask;      // [batches, heads, rows, cols], added, or one byte: 0 hides a key; null: none
  DType dtype = DType::f32;  // of the first three
  DType mask_dtype = DType::f32;
  bool mask_is_boolean = false;
  int64_t batches = 0;
  int64_t heads = 0;
  int64_t group = 1;  // heads that share a key and a value
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t depth = 0;
  int64_t value_depth = 0;
  int64_t diagonal = 0;  // row r sees columns j <= r + diagonal; cols or more: all
  float scale = 1.0F;
  int threads = 1;
};

//   logsumexp = log sum_j exp(score_j), -infinity where all keys are hidden
//   output    = sum_j exp(score_j - logsumexp) value_j, 0 where all keys are hidden
struct AttentionForwardArgs : AttentionInputs {
  AttentionTensor output;      // [batches, heads, rows, value_depth], in `dtype`; written
  float* logsumexp = nullptr;  // out [batches, heads, rows], contiguous
};

// For the backward pass: the weights p and the gradient ds of q . k, from which come grad_value = p^T grad_output,
// grad_query = ds key and grad_key = ds^T query.
//   p  = exp(score - logsumexp), 0 where a key is hidden or logsumexp is -infinity
//   ds = p (grad_output . v - output . grad_output) scale
struct AttentionArgs : AttentionInputs {
  AttentionTensor output;       // [batches, heads, rows, value_depth], in `dtype`
  AttentionTensor grad_output;  // likewise
  AttentionTensor logsumexp;    // [batches, heads, rows], fp32
  void* p = nullptr;            // out [batches, heads, rows, cols], contiguous
  void* ds = nullptr;           // likewise
  DType out_dtype = DType::f32;
};

// ---- the elementwise parts of a decoder layer; arithmetic in fp32 ---------------------------------------------------

// Rows of a matrix, read where they lie; consecutive elements of a row are neighbours.
struct ElementRows {
  const void* data = nullptr;  // [rows, cols]
  int64_t stride = 0;          // elements from one row to the next
};

// y = x rstd (weight + offset), rstd = 1 / sqrt(mean(x^2) + eps) of each row (arXiv 1910.07467).
struct RmsNormArgs {
  ElementRows x;
  DType dtype = DType::f32;  // of x
  int64_t rows = 0;
  int64_t cols = 0;
  const void* weight = nullptr;  // [cols]
  DType weight_dtype = DType::f32;
  float offset = 0.0F;
  float eps = 0.0F;
  void* out = nullptr;           // [rows, cols]
  DType out_dtype = DType::f32;  // x's, or one of both is fp32
  float* rstd = nullptr;         // out [rows]
  int threads = 1;
};

// With h = x rstd and v = g (weight + offset): dx = rstd (v - h mean(v h)) of each row, dweight = sum of g h over rows.
struct RmsNormBackwardArgs {
  ElementRows x;
  DType dtype = DType::f32;  // of x and grad_x
  ElementRows grad;
  DType grad_dtype = DType::f32;  // x's, or one of both is fp32
  int64_t rows = 0;
  int64_t cols = 0;
  const void* weight = nullptr;  // [cols]
  DType weight_dtype = DType::f32;
  float offset = 0.0F;
  const float* rstd = nullptr;   // [rows]
  void* grad_x = nullptr;        // out [rows, cols]
  float* grad_weight = nullptr;  // out [cols]; null: not wanted
  int threads = 1;
};

// silu(z) = z sigmoid(z); gelu_tanh(z) = z sigmoid(2 sqrt(2 / pi) (z + 0.044715 z^3)), the approximation of GELU.
enum class Activation : int32_t { silu = 0, gelu_tanh = 1 };

// y = activation(gate) * up (arXiv 2002.05202), all of one dtype.
struct GatedArgs {
  ElementRows gate, up;
  Activation activation = Activation::silu;
  DType dtype = DType::f32;
  int64_t rows = 0;
  int64_t cols = 0;
  void* out = nullptr;  // [rows, cols]
  int threads = 1;
};

// grad_gate = grad * up * activation'(gate), grad_up = grad * activation(gate)
struct GatedBackwardArgs {
  ElementRows grad, gate, up;
  Activation activation = Activation::silu;
  DType dtype = DType::f32;
  int64_t rows = 0;
  int64_t cols = 0;
  void* grad_gate = nullptr;  // out [rows, cols]
  void* grad_up = nullptr;    // out [rows, cols]
  int threads = 1;
};

// Rotary position embedding (arXiv 2104.09864), pairs a half apart. With h = dim / 2 and i < h:
//   out[i]     = x[i]     cos[i]     - x[i + h] sin[i]
//   out[i + h] = x[i + h] cos[i + h] + x[i]     sin[i + h]
// `transposed` applies the transposed matrix, which takes the gradient of out to that of x.
struct RotaryArgs {
  const void* x = nullptr;  // [batch, heads, length, dim], the elements of a head beside each other
  DType dtype = DType::f32;
  int64_t x_strides[3] = {};  // of batch, heads, length; in elements
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t length = 0;
  int64_t dim = 0;            // even
  const void* cos = nullptr;  // [batch, length, dim], contiguous but for batches
  const void* sin = nullptr;
  DType table_dtype = DType::f32;
  int64_t table_stride = 0;  // of batches, in elements; 0: all share one
  bool transposed = false;
  void* out = nullptr;           // [batch, heads, length, dim]
  DType out_dtype = DType::f32;  // x's, or one of both is fp32
  int64_t out_strides[3] = {};
  int threads = 1;
};

// ---- one token after another
// -----------------------------------------------------------------------------------------

constexpr int64_t kMostDenseRows = 8;

// out[m, rows] = x[m, cols] . weight^T + bias of a dense matrix, for at most kMostDenseRows rows of x; fp32, rounded
// once.
struct DenseArgs {
  ElementRows x;
  DType dtype = DType::f32;  // of x
  int64_t m = 0;
  const void* weight = nullptr;  // [rows, cols], contiguous
  DType weight_dtype = DType::f32;
  int64_t rows = 0;
  int64_t cols = 0;
  const void* bias = nullptr;  // [rows]; null: none
  DType bias_dtype = DType::f32;
  void* out = nullptr;  // [m, rows]
  DType out_dtype = DType::f32;
  int threads = 1;
};

// Attention of one new token of each row over the slots of a cache. The new key, rotated as in RotaryArgs, and the new
// value are written to `slot`; then out = softmax(scale q . k) v over the slots from a row's `first` to `slot`.
struct AttentionStepArgs {
  const void* query = nullptr;  // [batch, heads, depth], heads beside each other; strides of batches in elements
  const void* key = nullptr;    // [batch, heads / group, depth]
  const void* value = nullptr;
  int64_t query_stride = 0;
  int64_t key_stride = 0;
  int64_t value_stride = 0;
  DType dtype = DType::f32;   // of these, of the slots and of out
  const void* cos = nullptr;  // [batch, depth], contiguous; null: no rotation
  const void* sin = nullptr;
  DType table_dtype = DType::f32;
  void* keys = nullptr;  // [batch, heads / group, slots, depth]; slots are contiguous, other strides in elements
  void* values = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  const int64_t* first = nullptr;  // [batch]
  int64_t slot = 0;
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t group = 1;  // heads that share a key and a value
  int64_t depth = 0;  // even where there is a rotation
  float scale = 1.0F;
  void* out = nullptr;  // [batch, heads, depth]
  int threads = 1;
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
  Status (*round_feedback)(const RoundArgs&);
  Status (*round_descent)(const RoundArgs&);
  Status (*adamw_32bit)(const AdamW32Args&);
  Status (*adamw_8bit)(const AdamW8Args&);
  Status (*sum_of_squares)(const SquaresArgs&);
  Status (*attention_forward)(const AttentionForwardArgs&);
  Status (*attention_scores_grad)(const AttentionArgs&);
  Status (*rms_norm)(const RmsNormArgs&);
  Status (*rms_norm_backward)(const RmsNormBackwardArgs&);
  Status (*gated)(const GatedArgs&);
  Status (*gated_backward)(const GatedBackwardArgs&);
  Status (*rotary)(const RotaryArgs&);
  Status (*dense_few)(const DenseArgs&);
  Status (*attention_step)(const AttentionStepArgs&);
  Status (*factor_apply)(const FactorArgs&);         // null without bf16_dot
  Status (*factor_gradient)(const FactorGradArgs&);  // likewise
  Status (*linear_small_m)(const LinearArgs&);
  Status (*linear_panel)(const LinearArgs&);
  Status (*linear_tiles)(const LinearArgs&);      // null where the ISA has no matrix unit; bf16 only
  Status (*linear_tiles_few)(const LinearArgs&);  // likewise; forward, at most 32 rows of x
  Status (*linear_int8)(const LinearArgs&);       // Compute::int8, forward only
};

}  // namespace nybble
