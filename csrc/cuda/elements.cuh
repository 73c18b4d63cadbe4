// Runs of a flat tensor: 256 elements that a warp holds in its registers, in two steps of 128, 4 neighbours a lane.
// Every access of a step is 8 or 16 bytes a lane (4 of 8-bit codes), side by side, whatever the dtype. Loading and
// converting are two functions, so that several loads can be under way before the first is waited for.
#pragma once
#include "cuda/device.cuh"

namespace nybble::cuda {

constexpr int kEach = 4;              // elements of a lane in a step
constexpr int kStep = kEach * kWarp;  // elements of a warp in a step
constexpr int kRun = 2 * kStep;

// Whether four elements at a multiple of four can be read at once.
inline bool aligned_for(const void* pointer, int64_t bytes_of_four) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes_of_four) == 0;
}
inline bool aligned_for(const void* pointer, DType dtype) { return aligned_for(pointer, kEach * size_of(dtype)); }

// ---- four elements at once, as they are in memory: floats, or pairs in the first two words --------------------------

__device__ __forceinline__ uint4 load_four(const float* p) { return *reinterpret_cast<const uint4*>(p); }
template <class T>
__device__ __forceinline__ uint4 load_four(const T* p) {
  const uint2 pairs = *reinterpret_cast<const uint2*>(p);
  return make_uint4(pairs.x, pairs.y, 0, 0);
}

// The first `left` of them (none, up to all), zeros for the others; at any address.
__device__ __forceinline__ uint4 load_some(const float* p, int64_t left) {
  uint4 raw = make_uint4(0, 0, 0, 0);
  if (left > 0) raw.x = __float_as_uint(p[0]);
  if (left > 1) raw.y = __float_as_uint(p[1]);
  if (left > 2) raw.z = __float_as_uint(p[2]);
  if (left > 3) raw.w = __float_as_uint(p[3]);
  return raw;
}
template <class T>
__device__ __forceinline__ uint4 load_some(const T* p, int64_t left) {
  uint4 raw = make_uint4(0, 0, 0, 0);
  if (left > 0) raw.x = p[0].bits;
  if (left > 1) raw.x |= static_cast<uint32_t>(p[1].bits) << 16;
  if (left > 2) raw.y = p[2].bits;
  if (left > 3) raw.y |= static_cast<uint32_t>(p[3].bits) << 16;
  return raw;
}

template <class T>
__device__ __forceinline__ void floats_of(uint4 raw, float (&out)[kEach]) {
  if constexpr (sizeof(T) == 4) {
    out[0] = __uint_as_float(raw.x);
    out[1] = __uint_as_float(raw.y);
    out[2] = __uint_as_float(raw.z);
    out[3] = __uint_as_float(raw.w);
  } else {
    const float2 low = unpack<T>(raw.x), high = unpack<T>(raw.y);
    out[0] = low.x;
    out[1] = low.y;
    out[2] = high.x;
    out[3] = high.y;
  }
}

template <class T>
__device__ __forceinline__ uint4 raw_of(const float (&v)[kEach]) {
  if constexpr (sizeof(T) == 4) {
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
  } else {
    return make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), 0, 0);
  }
}

__device__ __forceinline__ void store_four(float* p, uint4 raw) { store_16(p, raw); }
template <class T>
__device__ __forceinline__ void store_four(T* p, uint4 raw) {
  store_8(p, make_uint2(raw.x, raw.y));
}

__device__ __forceinline__ void store_some(float* p, uint4 raw, int64_t left) {
  if (left > 0) p[0] = __uint_as_float(raw.x);
  if (left > 1) p[1] = __uint_as_float(raw.y);
  if (left > 2) p[2] = __uint_as_float(raw.z);
  if (left > 3) p[3] = __uint_as_float(raw.w);
}
template <class T>
__device__ __forceinline__ void store_some(T* p, uint4 raw, int64_t left) {
  if (left > 0) p[0].bits = static_cast<uint16_t>(raw.x);
  if (left > 1) p[1].bits = static_cast<uint16_t>(raw.x >> 16);
  if (left > 2) p[2].bits = static_cast<uint16_t>(raw.y);
  if (left > 3) p[3].bits = static_cast<uint16_t>(raw.y >> 16);
}

// Four bytes, the first in bits 0 to 7.
__device__ __forceinline__ uint32_t load_bytes(const uint8_t* p, int64_t left) {
  uint32_t bytes = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (i < left) bytes |= static_cast<uint32_t>(p[i]) << (8 * i);
  }
  return bytes;
}
__device__ __forceinline__ void store_bytes(uint8_t* p, uint32_t bytes, int64_t left) {
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (i < left) p[i] = static_cast<uint8_t>(bytes >> (8 * i));
  }
}

// ---- runs -----------------------------------------------------------------------------------------------------------

// A lane's place in a run that begins at element `start`.
__device__ __forceinline__ int64_t place_of(int64_t start, int step) { return start + step * kStep + lane() * kEach; }

// `whole`: nothing of the run lies beyond the tensor's `count` elements, and its address is aligned.
template <class T>
__device__ __forceinline__ void load_run(const T* from, int64_t start, int64_t count, bool whole, uint4 (&raw)[2]) {
  if (whole) {
#pragma unroll
    for (int step = 0; step < 2; ++step) raw[step] = load_four(from + place_of(start, step));
  } else {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const int64_t at = place_of(start, step);
      raw[step] = load_some(from + at, count - at);
    }
  }
}
template <class T>
__device__ __forceinline__ void store_step(T* to, uint4 raw, int64_t left, bool whole) {
  if (whole) {
    store_four(to, raw);
  } else {
    store_some(to, raw, left);
  }
}
template <class T>
__device__ __forceinline__ void store_run(T* to, int64_t start, int64_t count, bool whole, const uint4 (&raw)[2]) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const int64_t at = place_of(start, step);
    store_step(to + at, raw[step], count - at, whole);
  }
}
__device__ __forceinline__ void load_run(const uint8_t* from, int64_t start, int64_t count, bool whole,
                                         uint32_t (&bytes)[2]) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const int64_t at = place_of(start, step);
    bytes[step] = whole ? *reinterpret_cast<const uint32_t*>(from + at) : load_bytes(from + at, count - at);
  }
}
__device__ __forceinline__ void store_run(uint8_t* to, int64_t start, int64_t count, bool whole,
                                          const uint32_t (&bytes)[2]) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const int64_t at = place_of(start, step);
    if (whole) {
      *reinterpret_cast<uint32_t*>(to + at) = bytes[step];
    } else {
      store_bytes(to + at, bytes[step], count - at);
    }
  }
}

}  // namespace nybble::cuda
