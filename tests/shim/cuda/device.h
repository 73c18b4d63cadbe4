// CUDA on the host: what csrc/cuda/device.cuh, wgmma.cuh and launch.cuh define for a GPU, under the same names, and the
// keywords and built-ins that kernels may use. The threads of a block are fibers; README.md says what that can show.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/half.h"
#include "cuda/kernels.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

// Objects in CUDA; here what the running fiber has.
#define threadIdx (::nybble::cuda::shim::thread_index())
#define blockIdx (::nybble::cuda::shim::block_index())
#define blockDim (::nybble::cuda::shim::block_dim())
#define gridDim (::nybble::cuda::shim::grid_dim())

namespace nybble::cuda {

// ---- built-in types -------------------------------------------------------------------------------------------------

struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned width = 1, unsigned height = 1, unsigned depth = 1) : x(width), y(height), z(depth) {}
};

constexpr bool kCodeForHopper = true;  // the shim runs all code
constexpr int kWarp = 32;
constexpr uint32_t kWholeWarp = 0xFFFFFFFFU;

// ---- behind the functions of this file ------------------------------------------------------------------------------

namespace shim {

const uint3& thread_index();
const uint3& block_index();
const dim3& block_dim();
const dim3& grid_dim();

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void check_aligned(const void* address, uintptr_t bytes, const char* operation);

Status run_grid(const char* signature, dim3 grid, int threads, size_t shared_bytes, void (*call)(void*), void* closure);

enum class From { lane, exclusive_or, down, up };
uint64_t shuffle(uint32_t mask, uint64_t value, From from, int operand, int width);
uint32_t vote(uint32_t mask, bool predicate, const char* operation);
void sync_warp(uint32_t mask);
void barrier(int id, int threads, bool waits);
void atomic_point();  // before an atomic operation: another thread may come first
void publish();
void check_published();

void copy_async(void* shared, const void* global, bool valid);
constexpr uint64_t kEvictFirst = 0x12F0000000000000U;

void load_matrices(uint32_t* out, const void* shared, bool transposed);
void multiply(float* d, const uint32_t* a, const uint32_t* b, float (*convert)(uint16_t));
void wgmma(float* d, int count, uint64_t a, uint64_t b, bool accumulate, bool a_major, bool b_major,
           float (*convert)(uint16_t));
void wgmma_wait(int pending);
void copy_async_wait(int pending);
void set_registers(int registers, bool more);

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 32 or 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace shim

// ---- CUDA's functions -----------------------------------------------------------------------------------------------

inline void __syncthreads() { shim::barrier(0, 0, true); }
inline void __syncwarp(uint32_t mask = kWholeWarp) { shim::sync_warp(mask); }
inline void __threadfence() { shim::publish(); }

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = kWarp) {
  return shim::from_bits<T>(shim::shuffle(mask, shim::to_bits(value), shim::From::lane, source, width));
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = kWarp) {
  return shim::from_bits<T>(shim::shuffle(mask, shim::to_bits(value), shim::From::exclusive_or, bits, width));
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = kWarp) {
  return shim::from_bits<T>(
      shim::shuffle(mask, shim::to_bits(value), shim::From::down, static_cast<int>(delta), width));
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = kWarp) {
  return shim::from_bits<T>(shim::shuffle(mask, shim::to_bits(value), shim::From::up, static_cast<int>(delta), width));
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  return shim::vote(mask, predicate != 0, "__ballot_sync");
}
inline int __any_sync(uint32_t mask, int predicate) { return shim::vote(mask, predicate != 0, "__any_sync") != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return shim::vote(mask, predicate != 0, "__all_sync") == mask; }

// Of counters alone, by which a block tells others that what it has written is there.
template <class T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>,
                "atomicAdd: int, unsigned or unsigned long long, and no floats, whose sum would depend on the order");
  shim::check_aligned(address, sizeof(T), "atomicAdd");
  shim::check_published();
  shim::atomic_point();
  const T before = *address;
  *address = before + value;
  return before;
}
template <class T>
T atomicMin(T* address, T value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, long long> ||
                    std::is_same_v<T, unsigned long long>,
                "atomicMin: int, unsigned, long long or unsigned long long");
  shim::check_aligned(address, sizeof(T), "atomicMin");
  shim::atomic_point();
  const T before = *address;
  if (value < before) *address = value;
  return before;
}

template <class T>
T __ldg(const T* address) {
  shim::check_aligned(address, alignof(T), "__ldg");
  return *address;
}

inline uint32_t __float_as_uint(float value) { return bits_of(value); }
inline float __uint_as_float(uint32_t bits) { return float_of(bits); }
inline int __float_as_int(float value) { return static_cast<int>(bits_of(value)); }
inline float __int_as_float(int bits) { return float_of(static_cast<uint32_t>(bits)); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
// To nearest even; what no int can hold becomes the nearest, NaN 0.
inline int __float2int_rn(float value) {
  if (value != value) return 0;
  const float rounded = std::nearbyint(value);
  if (rounded >= 2147483648.0F) return INT32_MAX;
  if (rounded <= -2147483648.0F) return INT32_MIN;
  return static_cast<int>(rounded);
}
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  if ((selector & 0x8888U) != 0) shim::fail("__byte_perm: selector 0x%X has bits that it must not", selector);
  const uint64_t bytes = (static_cast<uint64_t>(y) << 32) | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>((bytes >> (8 * ((selector >> (4 * i)) & 7))) & 0xFF) << (8 * i);
  }
  return result;
}
// prmt.b32 as it is: bit 3 of a selector's nibble means something else there.
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(value)); }
inline int __ffs(int value) { return __builtin_ffs(value); }

#define NYBBLE_SHIM_MIN_MAX(T)                     \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
NYBBLE_SHIM_MIN_MAX(int)
NYBBLE_SHIM_MIN_MAX(unsigned)
NYBBLE_SHIM_MIN_MAX(long)
NYBBLE_SHIM_MIN_MAX(unsigned long)
NYBBLE_SHIM_MIN_MAX(long long)
NYBBLE_SHIM_MIN_MAX(unsigned long long)
#undef NYBBLE_SHIM_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

// ---- device.cuh -----------------------------------------------------------------------------------------------------

inline int lane() { return static_cast<int>(threadIdx.x) & (kWarp - 1); }
inline int warp() { return __shfl_sync(kWholeWarp, static_cast<int>(threadIdx.x) / kWarp, 0); }

unsigned char* shared_memory();
// Where it lies in what a GPU calls the shared window, which begins with memory of the system's.
uint32_t shared_address(const void* pointer);

inline void barrier_sync(int id, int threads) { shim::barrier(id, threads, true); }
inline void barrier_arrive(int id, int threads) { shim::barrier(id, threads, false); }

void mbarrier_init(uint64_t* barrier, uint32_t count);
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);

inline void copy_async_16(void* shared, const void* global, bool valid = true) {
  shim::copy_async(shared, global, valid);
}
inline uint64_t evict_first_policy() { return shim::kEvictFirst; }
inline void copy_async_16_once(void* shared, const void* global, uint64_t policy, bool valid = true) {
  if (policy != shim::kEvictFirst) shim::fail("copy_async_16_once: this is no policy");
  shim::copy_async(shared, global, valid);
}
void copy_async_commit();
template <int Pending>
void copy_async_wait() {
  static_assert(Pending >= 0);
  shim::copy_async_wait(Pending);
}
void copy_async_arrive(uint64_t* barrier);

inline uint4 load_once_16(const void* global) {
  shim::check_aligned(global, 16, "load_once_16");
  return *static_cast<const uint4*>(global);
}

// rcp.approx.ftz.f32. Its result may be a unit in the last place off; here it is, down or up, for some values.
inline float reciprocal(float value) {
  constexpr uint32_t kSmallestNormal = 0x00800000U;
  const uint32_t sign = bits_of(value) & 0x80000000U;
  if ((bits_of(value) ^ sign) < kSmallestNormal) return float_of(sign | 0x7F800000U);
  const float result = 1.0F / value;
  const uint32_t magnitude = bits_of(result) & 0x7FFFFFFFU;
  if (magnitude < kSmallestNormal) return float_of(sign);
  if (magnitude <= kSmallestNormal || magnitude >= 0x7F7FFFFFU || (magnitude & 0x007FFFFFU) == 0) return result;
  return float_of(bits_of(result) + bits_of(value) * 0x9E3779B1U % 3 - 1);
}

inline void store_16(void* global, uint4 value) {
  shim::check_aligned(global, 16, "store_16");
  *static_cast<uint4*>(global) = value;
}
inline void store_8(void* global, uint2 value) {
  shim::check_aligned(global, 8, "store_8");
  *static_cast<uint2*>(global) = value;
}

template <class T>
uint32_t pack(float low, float high);
template <>
inline uint32_t pack<Bf16>(float low, float high) {  // a GPU has one NaN
  const uint32_t first = low != low ? 0x7FFFU : float_to_bf16(low);
  return first | (high != high ? 0x7FFFU : static_cast<uint32_t>(float_to_bf16(high))) << 16;
}
template <>
inline uint32_t pack<F16>(float low, float high) {
  const uint32_t first = low != low ? 0x7FFFU : float_to_f16(low);
  return first | (high != high ? 0x7FFFU : static_cast<uint32_t>(float_to_f16(high))) << 16;
}
template <class T>
float2 unpack(uint32_t pair);
template <>
inline float2 unpack<Bf16>(uint32_t pair) {
  return {float_of(pair << 16), float_of(pair & 0xFFFF0000U)};
}
template <>
inline float2 unpack<F16>(uint32_t pair) {
  return {f16_to_float(static_cast<uint16_t>(pair)), f16_to_float(static_cast<uint16_t>(pair >> 16))};
}

inline void load_matrices(uint32_t (&out)[4], const void* shared) { shim::load_matrices(out, shared, false); }
inline void load_matrices_transposed(uint32_t (&out)[4], const void* shared) { shim::load_matrices(out, shared, true); }

// Sums over k in ascending order, in fp32, every product and sum rounded to nearest. A GPU adds several products at
// once and truncates: what depends on that is not what a kernel may rely on.
template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, F16>);
  shim::multiply(d, a, b, std::is_same_v<T, Bf16> ? bf16_to_float : f16_to_float);
}
void multiply_int8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
inline void multiply_int8_from(int start, int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  for (int& one : d) one = start;
  multiply_int8(d, a, b);
}

// ---- wgmma.cuh ------------------------------------------------------------------------------------------------------

inline uint32_t swizzled(uint32_t line, uint32_t chunk) { return line * 128 + ((chunk ^ (line & 7)) << 4); }
// Fields of the PTX ISA's "Matrix Descriptor Format".
inline uint64_t describe(const void* shared, uint32_t leading, uint32_t stride) {
  const auto encode = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3FFFFU) >> 4); };
  return encode(shared_address(shared)) | (encode(leading) << 16) | (encode(stride) << 32) | (uint64_t{1} << 62);
}
void fence_async_shared();
void wgmma_fence();
void wgmma_commit();
template <int Pending>
void wgmma_wait() {
  static_assert(Pending >= 0 && Pending <= 7, "PTX ISA: N of wgmma.wait_group is 0 to 7");
  shim::wgmma_wait(Pending);
}
template <int Registers>
void more_registers() {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256, "PTX ISA: setmaxnreg");
  shim::set_registers(Registers, true);
}
template <int Registers>
void fewer_registers() {
  static_assert(Registers % 8 == 0 && Registers >= 24 && Registers <= 256, "PTX ISA: setmaxnreg");
  shim::set_registers(Registers, false);
}
template <class T, int AMajor, int BMajor, int Count>
void wgmma(float (&d)[Count], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(Count == 8 || Count == 16 || Count == 32 || Count == 64 || Count == 128);
  static_assert(std::is_same_v<T, Bf16> || std::is_same_v<T, F16>);
  shim::wgmma(d, Count, a, b, accumulate, AMajor != 0, BMajor != 0,
              std::is_same_v<T, Bf16> ? bf16_to_float : f16_to_float);
}

// ---- launch.cuh and device.cu ---------------------------------------------------------------------------------------

Device shim_device();

template <auto Kernel, class... P>
Status launch(dim3 grid, int threads, size_t shared_bytes, const Place&, P... params) {
  static_assert(std::is_same_v<std::remove_cv_t<decltype(Kernel)>, void (*)(P...)>,
                "launch passes the addresses of the arguments: their types must be exactly the kernel's");
  auto call = [&] { Kernel(params...); };
  return shim::run_grid(
      __PRETTY_FUNCTION__, grid, threads, shared_bytes,
      [](void* closure) { (*static_cast<decltype(call)*>(closure))(); }, &call);
}

}  // namespace nybble::cuda
