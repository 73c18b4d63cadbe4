// What all kernels share; Python puts this text before each other file, as compile_shader takes one string.
//
// The layout is csrc/core/format.h's: byte i holds elements 2i (high nibble) and 2i + 1 (low nibble); a value is
// codebook[nibble] * scale[block]; an int8 value is q * absmax[row] / 127.
//
// What every compiler from macOS 14 to 27 accepts: free functions, explicit address spaces, explicit conversions to
// bfloat, threadgroup arrays declared in a kernel's body, templates with host_name.
#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;

// A product and a sum are rounded one by one, as the bits of a file format must be. A compiler that does not know the
// pragma still cannot fuse them across statements (contraction is "on" in torch's default math mode, which ends with
// the statement), so those that must not be fused are statements of their own. fma() is written where it is meant.
#pragma METAL fp contract(off)

// Before a loop of constant length over arrays: they stay in registers only if it is unrolled.
#define UNROLL _Pragma("clang loop unroll(full)")

constant constexpr int kLanes = 32;  // of a simdgroup, on every GPU of Apple's

// Python passes sizes as one list of ints, which compile_shader makes an array of 8-byte integers.

// ---- scales
// ----------------------------------------------------------------------------------------------------------

// The scales of 4-bit blocks: fp32, or (double quantization) map[code] * nested[block >> nested_shift] + offset.
struct Scales {
  device const uchar* stored;  // fp32 [blocks], or codes [blocks]
  device const float* nested;
  device const float* map;
  float offset;
  int nested_shift;  // below 0: stored is fp32
};

inline Scales scales_of(device const uchar* stored, device const float* nested, device const float* map,
                        device const float* offset, int nested_shift) {
  Scales scales;
  scales.stored = stored;
  scales.nested = nested;
  scales.map = map;
  scales.offset = nested_shift < 0 ? 0.0f : offset[0];
  scales.nested_shift = nested_shift;
  return scales;
}

inline float scale_of(Scales scales, ulong block) {
  if (scales.nested_shift < 0) return ((device const float*)scales.stored)[block];
  float scale = scales.map[scales.stored[block]] * scales.nested[block >> scales.nested_shift];
  scale = scale + scales.offset;
  return scale;
}

// ---- codes
// -----------------------------------------------------------------------------------------------------------

// `table` is the codebook in threadgroup memory: its 16 floats lie in 16 banks, so no two lanes ever wait for each
// other.

// Element i (0 to 7) of the 4 bytes of a little-endian word.
inline float code_in(threadgroup const float* table, uint word, int i) { return table[(word >> ((i ^ 1) * 4)) & 15u]; }

inline float code_at(threadgroup const float* table, device const uchar* packed, ulong element) {
  const uint byte = packed[element >> 1];
  return table[(element & 1) != 0 ? byte & 15u : byte >> 4];
}

// Byte i (0 to 3) of a word as a signed integer.
inline float q_in(uint word, int i) { return float(int(word << (24 - 8 * i)) >> 24); }

// x / 127, rounded correctly whatever the math mode makes of a division: 1 / 127 is correctly rounded and the quotient
// is off by at most one unit in its last place, so the rounded sum of it and the remainder's part is exact
// (Markstein 1990).
inline float divide_127(float x) {
  const float reciprocal = 0.0078740157f;
  const float quotient = x * reciprocal;
  return fma(fma(-quotient, 127.0f, x), reciprocal, quotient);
}

inline float int8_value(float q, float absmax) {
  const float product = q * absmax;
  return divide_127(product);
}

// ---- elements
// --------------------------------------------------------------------------------------------------------

template <typename T>
inline float4 load_4(device const T* from) {
  const vec<T, 4> found = *(device const vec<T, 4>*)from;
  return float4(float(found.x), float(found.y), float(found.z), float(found.w));
}

// An element of a tensor whose dtype is known at run time only: 0 fp32, 1 fp16, 2 bf16.
inline float load_any(device const uchar* from, ulong index, int dtype) {
  if (dtype == 0) return ((device const float*)from)[index];
  if (dtype == 1) return float(((device const half*)from)[index]);
  return float(((device const bfloat*)from)[index]);
}

// 1, 2 or 4 words in one load; the address is aligned to as many bytes.
template <int Words>
inline void load_words(device const uchar* from, thread uint* words) {
  if (Words == 4) {
    const uint4 found = *(device const uint4*)from;
    words[0] = found.x;
    words[1] = found.y;
    words[2] = found.z;
    words[3] = found.w;
  } else if (Words == 2) {
    const uint2 found = *(device const uint2*)from;
    words[0] = found.x;
    words[1] = found.y;
  } else {
    words[0] = *(device const uint*)from;
  }
}

// ---- a linear layer
// --------------------------------------------------------------------------------------------------

// forward      out[m, rows] = x[m, cols] . W^T + side[m, rank] . side_weight[rows, rank]^T + bias[rows]
// grad_input   out[m, cols] = x[m, rows] . W   + side[m, rank] . side_weight[rank, cols]
struct LinearSizes {
  long m;
  long rows;
  long cols;
  long x_stride;      // elements from one row of x to the next
  long rank;          // 0: no side path
  long block_shift;   // log2 of the block size
  long nested_shift;  // log2 of the scales that share a nested scale; -1: the scales are fp32
  long side_dtype;    // as load_any's
  long side_weight_dtype;
  long bias_dtype;  // -1: no bias
  long whole_x;     // 1: the runs of x that a thread takes are whole and aligned
  long whole_w;     // likewise of the weight
};
