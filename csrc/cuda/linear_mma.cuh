// What the parts of linear_mma.cu share: where tiles lie in shared memory, and a warp's products of two of them.
#pragma once
#include "cuda/tiles.cuh"
#include "cuda/weights.cuh"

namespace nybble::cuda::mma_tiles {

constexpr int kThreads = 128;
constexpr int kColumns = 128;
constexpr int kDepth = 64;
constexpr int kWeightTile = kColumns * kDepth * 2;  // bytes
constexpr int kUnit = 32;                           // weights: 16 bytes, or 32 of int8
constexpr int kUnits = kColumns * kDepth / kUnit / kThreads;

// What lies where in shared memory; the ring of bytes comes last.
constexpr int kTableAt = 0;
constexpr int kMapAt = kTableAt + kCodeTable * 4;
constexpr int kBiasAt = kMapAt + kScaleMap * 4;
constexpr int kWeightAt = kBiasAt + kColumns * 4;
constexpr int kInputAt = kWeightAt + 2 * kWeightTile;

template <int Rows>
struct Shape {
  static constexpr int kWarpsDown = Rows >= 128 ? 2 : 1;
  static constexpr int kWarpsAcross = 4 / kWarpsDown;
  static constexpr int kDown = Rows / kWarpsDown / 16;         // mma tiles of a warp
  static constexpr int kAcross = kColumns / kWarpsAcross / 8;  // likewise
  static constexpr int kStages = Rows >= 128 ? 2 : 3;          // two blocks in an A100's 164 KB; three of 16 rows
  static constexpr int kBlocks = Rows >= 64 ? 2 : 3;
  static constexpr int kInputTile = Rows * kDepth * 2;
  static constexpr int kRingAt = kInputAt + kStages * kInputTile;
  static constexpr int kSums = kDown * kAcross * 4;
};

// Byte of 16-byte chunk `chunk` of a line, so that neither the eight lines of an ldmatrix nor the eight lanes that
// store a decoded chunk at once meet in a bank.
__device__ __forceinline__ int short_line(int line, int chunk) { return line * 128 + ((chunk ^ (line & 7)) << 4); }
__device__ __forceinline__ int long_line(int line, int chunk) {
  return line * 256 + ((chunk ^ (line & 7) ^ ((chunk >> 3) << 1)) << 4);
}

template <bool Grad>
__device__ __forceinline__ int weight_chunk(int line, int chunk) {
  return Grad ? long_line(line, chunk) : short_line(line, chunk);
}

// Where a lane reads the operands of its warp's products, in a tile of x and of the weight.
template <bool Grad, int Rows>
struct Fragments {
  int a, b;

  __device__ __forceinline__ Fragments() {
    using S = Shape<Rows>;
    const int matrix = lane() / 8, line = lane() % 8;
    const int down = warp() / S::kWarpsAcross * S::kDown * 16, across = warp() % S::kWarpsAcross * S::kAcross;
    a = short_line(down + (matrix & 1) * 8 + line, matrix >> 1);
    b = Grad ? long_line((matrix & 1) * 8 + line, across + (matrix >> 1))
             : short_line((across + (matrix >> 1)) * 8 + line, matrix & 1);
  }
};

// sums += x tile . W tile over 16 k, the `quarter`th of a step. Chunks two apart, of k as of transposed columns, differ
// in bits that the swizzle leaves apart: an exclusive or with them.
template <class T, bool Grad, int Rows>
__device__ __forceinline__ void multiply_quarter(float (&sums)[Shape<Rows>::kSums], const Fragments<Grad, Rows>& at,
                                                 const unsigned char* input, const unsigned char* weight, int quarter) {
  using S = Shape<Rows>;
  uint32_t a[S::kDown][4];
#pragma unroll
  for (int i = 0; i < S::kDown; ++i) load_matrices(a[i], input + (at.a ^ (quarter << 5)) + i * 16 * 128);
#pragma unroll
  for (int j = 0; j < S::kAcross; j += 2) {
    uint32_t b[4];
    if (Grad) {
      load_matrices_transposed(b, weight + (at.b ^ (j << 4)) + quarter * 16 * 256);
    } else {
      load_matrices(b, weight + (at.b ^ (quarter << 5)) + j * 8 * 128);
    }
    const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
    for (int i = 0; i < S::kDown; ++i) {
      float (&d)[4] = *reinterpret_cast<float (*)[4]>(&sums[(i * S::kAcross + j) * 4]);
      float (&e)[4] = *reinterpret_cast<float (*)[4]>(&sums[(i * S::kAcross + j + 1) * 4]);
      multiply<T>(d, a[i], low);
      multiply<T>(e, a[i], high);
    }
  }
}

}  // namespace nybble::cuda::mma_tiles
