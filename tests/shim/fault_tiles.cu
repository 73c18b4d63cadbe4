// The tensor cores' part of faults.cu: in holds A [64, 64] and B [columns, 64] (of a transposed kind: [64, columns]),
// 16-bit, one after the other; out is fp32.
#include <cstring>

#include "cuda/launch.cuh"
#include "shim/faults.h"

namespace nybble::cuda {

namespace {

constexpr int kThreads = 128;

// out[16, 8] = A[0:16, 0:16] B[0:8, 0:16]^T (B [16, 8] if transposed), by one warp.
template <class T, bool Transposed>
__global__ void tile_of_warp(const uint4* in, float* out, int fault) {
  uint4* shared = reinterpret_cast<uint4*>(shared_memory());
  const int i = lane();
  shared[i] = in[(i / 2) * 8 + i % 2];  // 16 rows of 32 bytes
  const uint4* b = in + 64 * 8;
  if (i < 16) shared[32 + i] = Transposed ? b[i] : b[(i / 2) * 8 + i % 2];
  if (fault != 1) __syncwarp();
  uint32_t left[4], right[4];
  const int row = i % 8, matrix = i / 8;
  load_matrices(left, shared + (row + matrix % 2 * 8) * 2 + matrix / 2);
  if (Transposed && fault != 2) {
    load_matrices_transposed(right, shared + 32 + i % 16);
  } else {
    load_matrices(right, shared + 32 + (fault == 3 ? 1 : 0) + row * 2 + matrix % 2);
  }
  float sum[4] = {0.0F, 0.0F, 0.0F, 0.0F};
  const uint32_t pair[2] = {right[0], right[1]};
  if (fault != 4 || i != 9) multiply<T>(sum, left, pair);
  for (int j = 0; j < 4; ++j) out[(i / 4 + j / 2 * 8) * 8 + i % 4 * 2 + j % 2] = sum[j];
}

// out[64, 2 Count] = A B^T, twice 32 k, by one warpgroup. AMajor = 1: A is [64 k, 64]; BMajor = 1: B is [64 k, 2
// Count].
template <class T, int AMajor, int BMajor, int Count>
__global__ void tile_of_warpgroup(const uint4* in, float* out, int fault) {
  constexpr int kColumns = 2 * Count;
  constexpr uint32_t kAtom = 1024;
  unsigned char* a = shared_memory();
  unsigned char* b = a + 64 * 128;
  const int thread = static_cast<int>(threadIdx.x);
  for (int at = thread; at < 64 * 8; at += kThreads) {
    const uint32_t line = static_cast<uint32_t>(at) / 8, chunk = static_cast<uint32_t>(at) % 8;
    *reinterpret_cast<uint4*>(a + (fault == 6 ? line * 128 + chunk * 16 : swizzled(line, chunk))) = in[at];
  }
  const uint4* source = in + 64 * 8;
  if (BMajor == 0) {
    for (int at = thread; at < kColumns * 8; at += kThreads) {
      *reinterpret_cast<uint4*>(b + swizzled(static_cast<uint32_t>(at) / 8, static_cast<uint32_t>(at) % 8)) =
          source[at];
    }
  } else {  // atoms of 64 columns, each [64 k] lines long
    for (int at = thread; at < kColumns * 8; at += kThreads) {
      const uint32_t k = static_cast<uint32_t>(at) / (kColumns / 8),
                     column = static_cast<uint32_t>(at) % (kColumns / 8);
      *reinterpret_cast<uint4*>(b + column / 8 * 64 * 128 + swizzled(k, column % 8)) = source[at];
    }
  }
  if (fault != 4 && !(fault == 9 && thread == 77)) fence_async_shared();
  if (fault != 5) __syncthreads();
  if (fault == 10) fence_async_shared();
  float sum[Count];
  for (float& one : sum) one = 1.0F;  // what the first product must not keep
  if (fault != 2) wgmma_fence();
  const uint32_t stride = fault == 3 ? kAtom / 2 : kAtom;
  for (uint32_t k = 0; k < 4; ++k) {
    const uint64_t left = AMajor == 0 ? describe(a + 32 * k, 0, kAtom) : describe(a + 2 * kAtom * k, 0, stride);
    const uint64_t right = BMajor == 0 ? describe(b + 32 * (fault == 7 && thread == 5 ? 0 : k), 0, stride)
                                       : describe(b + 2 * kAtom * k, 64 * 128, stride);
    wgmma<T, AMajor, BMajor>(sum, left, right, fault == 8 ? true : k != 0);
    if (k == 1) wgmma_commit();
  }
  wgmma_commit();
  if (fault == 1) {
    wgmma_wait<1>();
  } else {
    wgmma_wait<0>();
  }
  for (int j = 0; j < Count; ++j) {
    const int row = thread / 32 * 16 + thread % 32 / 4 + j % 4 / 2 * 8;
    out[row * kColumns + j / 4 * 8 + thread % 4 * 2 + j % 2] = sum[j];
  }
  wgmma_wait<0>();
}

template <class T>
Status run_tiles(const char* kernel, int fault, const uint4* in, float* out) {
  const Place place;
  const auto is = [kernel](const char* name) { return std::strcmp(kernel, name) == 0; };
  if (is("warp")) return launch<&tile_of_warp<T, false>>(dim3(1), 32, 768, place, in, out, fault);
  if (is("warp transposed")) return launch<&tile_of_warp<T, true>>(dim3(1), 32, 768, place, in, out, fault);
  const auto bytes = [](size_t columns) { return (64 + columns) * 128; };
  if (is("warpgroup 16")) {
    return launch<&tile_of_warpgroup<T, 0, 0, 8>>(dim3(1), kThreads, bytes(16), place, in, out, fault);
  }
  if (is("warpgroup 128")) {
    return launch<&tile_of_warpgroup<T, 0, 0, 64>>(dim3(1), kThreads, bytes(128), place, in, out, fault);
  }
  if (is("warpgroup 256, B transposed")) {
    return launch<&tile_of_warpgroup<T, 0, 1, 128>>(dim3(1), kThreads, bytes(256), place, in, out, fault);
  }
  if (is("warpgroup 64, A transposed")) {
    return launch<&tile_of_warpgroup<T, 1, 0, 32>>(dim3(1), kThreads, bytes(64), place, in, out, fault);
  }
  return bad_argument("kernel", 0);
}

// out[16, 8] = A[16, 32] B[8, 32]^T of int8, by one warp.
__global__ void tile_of_int8(const uint32_t* in, int* out, int fault) {
  const int g = lane() / 4, t = lane() % 4;
  const uint32_t left[4] = {in[g * 8 + t], in[(g + 8) * 8 + t], in[g * 8 + t + 4], in[(g + 8) * 8 + t + 4]};
  const uint32_t* b = in + 16 * 8;
  const uint32_t right[2] = {b[g * 8 + t], b[g * 8 + t + (fault == 1 ? 3 : 4)]};
  int sum[4];
  multiply_int8_from(0, sum, left, right);
  for (int j = 0; j < 4; ++j) out[(g + j / 2 * 8) * 8 + t * 2 + j % 2] = sum[j];
}

}  // namespace

namespace shim {

Status run_faulty_tiles(const char* kernel, int fault, const void* in, void* out) {
  if (std::strcmp(kernel, "int8") == 0) {
    return launch<&tile_of_int8>(dim3(1), 32, 0, Place(), static_cast<const uint32_t*>(in), static_cast<int*>(out),
                                 fault);
  }
  const uint4* operands = static_cast<const uint4*>(in);
  float* results = static_cast<float*>(out);
  if (std::strncmp(kernel, "bf16 ", 5) == 0) return run_tiles<Bf16>(kernel + 5, fault, operands, results);
  if (std::strncmp(kernel, "fp16 ", 5) == 0) return run_tiles<F16>(kernel + 5, fault, operands, results);
  return bad_argument("kernel", 0);
}

}  // namespace shim

}  // namespace nybble::cuda
