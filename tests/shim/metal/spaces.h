// Declarations of what csrc/metal uses of Metal's standard library, for clang, which has address spaces and vectors as
// Metal's compiler has them, and C++14: the text compiles against this in one pass, and nothing runs.
#pragma once

#define SPACE_DEVICE __attribute__((address_space(1)))
#define SPACE_THREADGROUP __attribute__((address_space(2)))
#define SPACE_CONSTANT __attribute__((address_space(3)))

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef __bf16 bfloat;

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
typedef vec<float, 4> float4;
typedef vec<uint, 2> uint2;
typedef vec<uint, 3> uint3;
typedef vec<uint, 4> uint4;
typedef vec<ulong, 2> ulong2;

// What constructors of vectors become: clang has them in OpenCL's spelling only.
template <class T>
vec<T, 4> make_vec(T all);
template <class T>
vec<T, 4> make_vec(T x, T y, T z, T w);
ulong2 make_ulong2(ulong x, ulong y);

template <class To, class From>
To as_type(From from) {
  return __builtin_bit_cast(To, from);
}
float fma(float a, float b, float c);
float rint(float x);
uint clz(uint x);
#define SPACE_FUNCTIONS(T) \
  T min(T a, T b);         \
  T max(T a, T b);         \
  T clamp(T x, T low, T high);
SPACE_FUNCTIONS(int)
SPACE_FUNCTIONS(uint)
SPACE_FUNCTIONS(long)
SPACE_FUNCTIONS(ulong)
SPACE_FUNCTIONS(float)
float simd_sum(float value);
uint simd_max(uint value);

struct atomic_uint {
  uint value;
};
enum memory_order { memory_order_relaxed };
uint atomic_fetch_min_explicit(volatile SPACE_DEVICE atomic_uint* object, uint operand, memory_order order);

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags flags);
void simdgroup_barrier(mem_flags flags);

template <class T, int Columns, int Rows>
struct simdgroup_matrix {
  T elements[2];
};
template <class T, int Columns, int Rows>
simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value);
#define SPACE_MATRICES(SPACE)                                                                         \
  template <class T>                                                                                  \
  void simdgroup_load(simdgroup_matrix<T, 8, 8>& matrix, const SPACE T* from, ulong elements_per_row, \
                      ulong2 origin = make_ulong2(0, 0), bool transposed = false);                    \
  template <class T>                                                                                  \
  void simdgroup_store(simdgroup_matrix<T, 8, 8> matrix, SPACE T* to, ulong elements_per_row,         \
                       ulong2 origin = make_ulong2(0, 0), bool transposed = false);
SPACE_MATRICES(SPACE_DEVICE)
SPACE_MATRICES(SPACE_THREADGROUP)
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                   simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c);

void* threadgroup_array();

}  // namespace metal

#define kernel
#define thread
#define device SPACE_DEVICE
#define threadgroup SPACE_THREADGROUP
#define constant const SPACE_CONSTANT
