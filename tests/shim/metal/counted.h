// An fp32 number whose operations are counted: `float` in the text of kernels that count (see counts.cpp). It converts
// from float silently, as constants do, and to anything else only where the text asks for it.
#pragma once

namespace shim {

enum class Counter { scalar, matrix };
void count(Counter counter, uint64_t by = 1);  // not inline: the counter is no memory of the kernel's

}  // namespace shim

class counted {
 public:
  counted() = default;
  counted(float value) : value_(value) {}
  explicit operator float() const { return value_; }
  explicit operator half() const { return static_cast<half>(value_); }
  explicit operator bfloat() const { return bfloat(value_); }
  explicit operator int() const { return static_cast<int>(value_); }

 private:
  float value_;
};

#define SHIM_COUNTED(result, op)                                                \
  inline result operator op(counted a, counted b) {                             \
    shim::count(shim::Counter::scalar);                                         \
    return static_cast<result>(static_cast<float>(a) op static_cast<float>(b)); \
  }
SHIM_COUNTED(counted, +)
SHIM_COUNTED(counted, -)
SHIM_COUNTED(counted, *)
SHIM_COUNTED(counted, /)
SHIM_COUNTED(bool, <)
SHIM_COUNTED(bool, >)
SHIM_COUNTED(bool, ==)
inline counted operator-(counted a) { return counted(-static_cast<float>(a)); }  // a modifier of an operand

namespace metal {

typedef vec<counted, 4> counted4;

inline counted fma(counted a, counted b, counted c) {
  shim::count(shim::Counter::scalar);
  return fma(static_cast<float>(a), static_cast<float>(b), static_cast<float>(c));
}
inline counted rint(counted x) {
  shim::count(shim::Counter::scalar);
  return rint(static_cast<float>(x));
}
inline counted clamp(counted x, counted low, counted high) {
  shim::count(shim::Counter::scalar, 2);
  return clamp(static_cast<float>(x), static_cast<float>(low), static_cast<float>(high));
}
inline counted simd_sum(counted value) {
  shim::count(shim::Counter::scalar, 5);  // a tree over 32 lanes
  return simd_sum(static_cast<float>(value));
}

// 512 multiply-adds, 16 of which count for each lane.
template <class A, class B>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<counted, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                          simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<counted, 8, 8> c) {
  shim::count(shim::Counter::matrix, 16);
  simdgroup_matrix<float, 8, 8> sum;
  for (int i = 0; i < 2; ++i) sum.elements[i] = c.elements[i];
  simdgroup_multiply_accumulate(sum, a, b, sum);
  for (int i = 0; i < 2; ++i) d.elements[i] = sum.elements[i];
}

}  // namespace metal
