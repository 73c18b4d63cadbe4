// Matrices that the lanes of a simdgroup hold together: exact products of what they hold, summed in fp32 in the order
// of the contraction, each step a fused multiply-add. Which lane holds which element is not published; here lane l
// holds elements 2 (l % 4) and the next of row l / 4, and no kernel may depend on that.
#pragma once
#include <limits>

namespace metal {

template <class T, int Rows, int Columns>
struct simdgroup_matrix {
  static_assert(Rows == 8 && Columns == 8, "Metal has matrices of 8 x 8 only");
  float elements[2] = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::quiet_NaN()};
};

typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

inline int shim_row() { return shim::lane() / 4; }
inline int shim_column() { return shim::lane() % 4 * 2; }

template <class T, int Rows, int Columns>
inline simdgroup_matrix<T, Rows, Columns> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Rows, Columns> result;
  result.elements[0] = result.elements[1] = static_cast<float>(value);
  return result;
}

inline void shim_note(int kind, const volatile void* address, ulong stride, ulong2 origin, bool transposed) {
  uint64_t what = reinterpret_cast<uint64_t>(address);
  for (const uint64_t part : {static_cast<uint64_t>(kind), stride, origin.x, origin.y, uint64_t{transposed}}) {
    what = (what ^ part) * 0x9E3779B97F4A7C15U;
  }
  shim::note(what);
}

inline ulong shim_place(int element, ulong stride, ulong2 origin, bool transposed) {
  ulong row = static_cast<ulong>(shim_row()), column = static_cast<ulong>(shim_column() + element);
  if (transposed) std::swap(row, column);
  return (origin.y + row) * stride + origin.x + column;
}

template <class T>
inline void simdgroup_load(simdgroup_matrix<T, 8, 8>& matrix, const SHIM_VOLATILE T* from, ulong elements_per_row = 8,
                           ulong2 origin = ulong2(0, 0), bool transposed = false) {
  shim_note(1, from, elements_per_row, origin, transposed);
  for (int i = 0; i < 2; ++i) {
    matrix.elements[i] = static_cast<float>(from[shim_place(i, elements_per_row, origin, transposed)]);
  }
}

template <class T>
inline void simdgroup_store(simdgroup_matrix<T, 8, 8> matrix, SHIM_VOLATILE T* to, ulong elements_per_row = 8,
                            ulong2 origin = ulong2(0, 0), bool transposed = false) {
  shim_note(2, to, elements_per_row, origin, transposed);
  for (int i = 0; i < 2; ++i) {
    to[shim_place(i, elements_per_row, origin, transposed)] = static_cast<T>(matrix.elements[i]);
  }
}

// a and b, then d in the place of c.
inline void shim_multiply(shim::Slot* slots) {
  float b[8][8];
  for (int lane = 0; lane < shim::kLanes; ++lane) {
    for (int i = 0; i < 2; ++i) b[lane / 4][lane % 4 * 2 + i] = slots[lane].values[2 + i];
  }
  for (int row = 0; row < 8; ++row) {
    float sums[8];
    for (int column = 0; column < 8; ++column) sums[column] = slots[row * 4 + column / 2].values[4 + column % 2];
    for (int k = 0; k < 8; ++k) {
      const float a = slots[row * 4 + k / 2].values[k % 2];
      for (int column = 0; column < 8; ++column) sums[column] = __builtin_fmaf(a, b[k][column], sums[column]);
    }
    for (int column = 0; column < 8; ++column) slots[row * 4 + column / 2].values[4 + column % 2] = sums[column];
  }
}

template <class A, class B>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<float, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                          simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<float, 8, 8> c) {
  const shim::Slot mine{{a.elements[0], a.elements[1], b.elements[0], b.elements[1], c.elements[0], c.elements[1]}};
  const shim::Slot& result = shim::exchange("simdgroup_multiply_accumulate", mine, shim_multiply)[shim::lane()];
  d.elements[0] = result.values[4];
  d.elements[1] = result.values[5];
}

}  // namespace metal
