// Everything that only a GPU has, behind functions: the one file with PTX. Kernels use these, the built-in indices and
// the CUDA functions that tests/shim/cuda/device.h lists, nothing else, so that the same text also compiles as C++ and
// runs on a host, where threads are fibers. PTX ISA 9.0; sm_80 and, where said, sm_90a.
#pragma once
#include <cstdint>

#include "core/half.h"
#include "core/kernels.h"

#if defined(NYBBLE_SHIM)
#include "shim/cuda/device.h"
#else
#include <cuda_runtime.h>

// wgmma and its registers exist in code for sm_90a alone.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define NYBBLE_HOPPER 1
#endif

namespace nybble::cuda {

#if defined(NYBBLE_HOPPER)
constexpr bool kCodeForHopper = true;
#else
constexpr bool kCodeForHopper = false;
#endif

constexpr int kWarp = 32;
constexpr uint32_t kWholeWarp = 0xFFFFFFFFU;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) & (kWarp - 1); }
// The same for all lanes of a warp, and the compiler knows.
__device__ __forceinline__ int warp() { return __shfl_sync(kWholeWarp, static_cast<int>(threadIdx.x) / kWarp, 0); }

// The block's dynamic shared memory: its first byte, 1024-byte aligned. What it holds at first is undefined.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char nybble_shared[];
  return nybble_shared;
}
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- barriers among some threads of a block -------------------------------------------------------------------------

// `threads` threads, whole warps, meet at barrier `id`, 1 to 15 (0 is __syncthreads). The second one does not wait.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// An mbarrier in shared memory, for sm_90: a phase ends when `count` arrivals have come; `wait` returns once the phase
// of this parity (0 first) has ended.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#if defined(NYBBLE_HOPPER)
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  (void)barrier, (void)parity;
#endif
}

// ---- asynchronous copies to shared memory ---------------------------------------------------------------------------

// 16 bytes, both addresses 16-byte aligned; zeros instead where `valid` is false (the address is then not read). They
// are there after copy_async_commit and copy_async_wait of the SAME thread; other threads need a barrier after that.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
// The same for what nobody reads again: it must not push out of L2 what others want. Fetched in whole lines of 128
// bytes.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void copy_async_16_once(void* shared, const void* global, uint64_t policy,
                                                   bool valid = true) {
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(shared_address(shared)),
      "l"(global), "r"(valid ? 16 : 0), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `Pending` of this thread's latest groups are under way.
template <int Pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}
// One arrival at the barrier, once all copies that this thread has started so far are there; it counts among the
// arrivals that the barrier was made for.
__device__ __forceinline__ void copy_async_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// ---- loads that bypass L1 -------------------------------------------------------------------------------------------

// Read-only memory, read once; 16-byte aligned.
__device__ __forceinline__ uint4 load_once_16(const void* global) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(global));
  return value;
}

// ---- stores of several words at once: an assignment the compiler may take apart -------------------------------------

// 16 or 8 bytes, aligned to as many.
__device__ __forceinline__ void store_16(void* global, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
}
__device__ __forceinline__ void store_8(void* global, uint2 value) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(global), "r"(value.x), "r"(value.y) : "memory");
}

// ---- numbers --------------------------------------------------------------------------------------------------------

// 1 / value to a unit in the last place; 0 where that is below 2^-126, infinite where the value is.
__device__ __forceinline__ float reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// Byte i of the result: of the eight bytes of a (0 to 3) and b (4 to 7) the one that bits 4 i to 4 i + 2 of the
// selector name; bits 3, 7, 11 and 15 are 0, which __byte_perm would make sure of with one more instruction.
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}

// Two floats rounded to nearest even: `low` in bits 0 to 15.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<Bf16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
__device__ __forceinline__ uint32_t pack<F16>(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<Bf16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000U));
}
template <>
__device__ __forceinline__ float2 unpack<F16>(uint32_t pair) {
  float2 value;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}\n"
      : "=f"(value.x), "=f"(value.y)
      : "r"(pair));
  return value;
}

// ---- the tensor cores of a warp (sm_80) -----------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + r gives the address of row r of matrix i (16 bytes, aligned); of
// each, lane l gets elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; transposed, of column l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(shared))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(shared))
               : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8]. With g = lane / 4, t = lane % 4: a[0] holds row g, columns 2t and 2t + 1; a[1] row
// g + 8; a[2] row g, columns 2t + 8 and 2t + 9; a[3] row g + 8 of those. b[0] holds column g, rows 2t and 2t + 1; b[1]
// rows 2t + 8 and 2t + 9. d[0], d[1] are row g, columns 2t and 2t + 1; d[2], d[3] row g + 8.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply<Bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void multiply<F16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d[16, 8] += a[16, 32] b[32, 8] of int8: a[0] holds row g, columns 4t to 4t + 3; a[1] row g + 8; a[2], a[3] columns
// 4t + 16 to 4t + 19 of both; b[0] column g, rows 4t to 4t + 3; b[1] rows 4t + 16 to 4t + 19.
__device__ __forceinline__ void multiply_int8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same, but d = start (in each element) + a b.
__device__ __forceinline__ void multiply_int8_from(int start, int (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(start));
}

}  // namespace nybble::cuda

#include "cuda/wgmma.cuh"

#endif  // NYBBLE_SHIM
