// The codecs, written once against simd_*.h: 4-bit blocks, 8-bit blocks, int8 rows. The rule is format.h's and
// reference.py's; every ISA gives the same bits, which is why nothing here uses a fused multiply-add (mse search, whose
// sums may differ in the last bit, apart). Here what all of them share; the codecs themselves are included below.

// ---- rows of any dtype, in fp32 -------------------------------------------------------------------------------------

template <class T>
static void to_floats(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = to_float(from[i]);
}

template <class T>
static void from_floats(const float* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) from_float(from[i], to + i);
}

static void load_floats(const void* from, DType dtype, int64_t start, int64_t count, float* to) {
  switch (dtype) {
    case DType::f32:
      return to_floats(static_cast<const float*>(from) + start, count, to);
    case DType::f16:
      return to_floats(static_cast<const F16*>(from) + start, count, to);
    case DType::bf16:
      return to_floats(static_cast<const Bf16*>(from) + start, count, to);
  }
}

static void store_floats(const float* from, int64_t count, DType dtype, void* to, int64_t start) {
  switch (dtype) {
    case DType::f32:
      return from_floats(from, count, static_cast<float*>(to) + start);
    case DType::f16:
      return from_floats(from, count, static_cast<F16*>(to) + start);
    case DType::bf16:
      return from_floats(from, count, static_cast<Bf16*>(to) + start);
  }
}

// The bits of the largest magnitude; a NaN or an infinity gives kInfinity or more, because it is compared as an
// integer.
constexpr uint32_t kInfinity = 0x7F800000U;

template <class T>
static uint32_t largest_magnitude(const T* x, int64_t count) {
  I32 lanes = zero_index();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) lanes = max_magnitude(lanes, load(x + i));
  uint32_t largest = reduce_max(lanes);
  for (; i < count; ++i) {
    const uint32_t magnitude = bits_of(to_float(x[i])) & 0x7FFFFFFFU;
    if (magnitude > largest) largest = magnitude;
  }
  return largest;
}

constexpr float kSmallestAbsmax = 1e-38F;  // what an all-zero block stores

static inline float absmax_of(uint32_t magnitude) {
  return float_of(magnitude) > kSmallestAbsmax ? float_of(magnitude) : kSmallestAbsmax;
}

// Blocks of a task: about 64 Ki elements, whatever the thread count.
static int64_t blocks_per_task(int64_t block_size) { return larger(1, 65536 / block_size); }

// ---- outputs past the caches ----------------------------------------------------------------------------------------
//
// A plain store first reads the line that it overwrites, and of an output larger than the caches nothing is found there
// afterwards. Decoding NF4 to 90 MB of bf16 on two Sapphire Rapids class cores: 14 GB/s written plainly, 24 streamed.

constexpr int64_t kStreamFrom = int64_t{8} << 20;  // bytes
constexpr int64_t kLine = 64;

static inline bool streams(const void* out, int64_t bytes) {
  return bytes >= kStreamFrom && reinterpret_cast<uintptr_t>(out) % kLine == 0;
}

// `to` begins at a line; what does not fill a last one is stored plainly. A task ends with finish_streams.
static inline void stream(void* to, const void* from, int64_t bytes) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  int64_t at = 0;
  for (; at + kLine <= bytes; at += kLine) stream_line(out + at, in + at);
  if (at < bytes) memcpy(out + at, in + at, static_cast<size_t>(bytes - at));
}

#include "cpu/codec_mse.inl"
#include "cpu/codec_4bit.inl"
#include "cpu/codec_8bit.inl"
#include "cpu/codec_dequantize.inl"
