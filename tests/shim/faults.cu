// Small kernels with a fault to plant (0: none), by which the shim is proved: each fault is one that a kernel can have.
// Device code is the same text that a GPU would get.
#include "shim/faults.h"

#include <cstring>

#include "cuda/launch.cuh"

namespace nybble::cuda {

namespace {

constexpr int kThreads = 128;

// out[i] = in[127 - i] through shared memory.
__global__ void reverse(const int* in, int* out, int fault) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int i = static_cast<int>(threadIdx.x);
  shared[fault == 3 ? i + 1 : i] = in[fault == 4 ? i + 1 : i];
  if (fault != 1) __syncthreads();
  out[fault == 5 ? i + 1 : i] = shared[fault == 2 ? kThreads - i : kThreads - 1 - i];
  if (fault == 6) const_cast<int*>(in)[i] = 0;
}

// The same where only a warp's lanes exchange: out[i] = in[i ^ 31].
__global__ void reverse_warp(const int* in, int* out, int fault) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int i = static_cast<int>(threadIdx.x);
  shared[i] = in[i];
  if (fault != 1) __syncwarp();
  out[i] = shared[i ^ 31];
}

// out[i] = the sum of in over the thread's warp.
__global__ void sum_warp(const int* in, int* out, int fault) {
  const int i = static_cast<int>(threadIdx.x);
  if (fault == 1 && lane() == 7) return;
  int sum = in[i];
  for (int step = 16; step > 0; step /= 2) {
    if (fault == 2 && lane() < 16) continue;
    if (fault == 3) {
      sum += __shfl_xor_sync(0xFFFFU, sum, step);
    } else if (fault == 4 && lane() == 3) {
      __syncwarp();
    } else if (fault == 5 && lane() < 16) {
      sum += __shfl_xor_sync(0xFFFFU, sum, step & 15);
    } else {
      sum += __shfl_xor_sync(kWholeWarp, sum, step);
    }
  }
  out[i] = sum;
}

// out[16-byte chunk i] = in[chunk 127 - i], copied asynchronously.
__global__ void reverse_chunks(const uint4* in, uint4* out, int fault) {
  uint4* shared = reinterpret_cast<uint4*>(shared_memory());
  const int i = static_cast<int>(threadIdx.x);
  copy_async_16(shared + i, reinterpret_cast<const char*>(in + i) + (fault == 4 ? 8 : 0), i != 5);
  if (fault != 5) copy_async_commit();
  if (fault == 2) copy_async_wait<1>();
  if (fault != 1 && fault != 2) copy_async_wait<0>();
  if (fault != 3) __syncthreads();
  out[i] = shared[kThreads - 1 - i];
}

// out[i] = the sum over 8 rounds of in[128 round + (i + 1) % 128], two rounds of 16-byte copies in shared memory.
__global__ void sum_rounds(const int* in, int* out, int fault) {
  constexpr int kRounds = 8;
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int i = static_cast<int>(threadIdx.x);
  const auto start = [&](int round) {
    if (round < kRounds && i < kThreads / 4) {
      copy_async_16(shared + round % 2 * kThreads + 4 * i, in + round * kThreads + 4 * i);
    }
    copy_async_commit();
  };
  start(0);
  int sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    start(round + 1);
    if (fault == 2) {
      copy_async_wait<2>();
    } else {
      copy_async_wait<1>();
    }
    __syncthreads();
    sum += shared[round % 2 * kThreads + (i + 1) % kThreads];
    if (fault != 1) __syncthreads();
  }
  copy_async_wait<0>();
  out[i] = sum;
}

// out[i] = sum over 8 rounds of in[64 round + (i + 32) % 64], i < 64: two warps copy, two add, through two stages.
__global__ void sum_stages(const int* in, int* out, int fault) {
  constexpr int kRounds = 8, kStages = 2, kHalf = 64;
  int* shared = reinterpret_cast<int*>(shared_memory());
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + kStages * kHalf);
  uint64_t* empty = full + kStages;
  const int i = static_cast<int>(threadIdx.x) % kHalf;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full + stage, fault == 4 ? kHalf + 1 : kHalf);
      mbarrier_init(empty + stage, kHalf);
    }
  }
  if (fault != 3) __syncthreads();
  if (threadIdx.x < kHalf) {
    for (int round = 0; round < kRounds; ++round) {
      const int stage = round % kStages;
      const uint32_t parity = static_cast<uint32_t>(round / kStages) & 1;
      if (fault != 7) mbarrier_wait(empty + stage, fault == 2 ? parity : parity ^ 1);
      if (i < kHalf / 4) copy_async_16(shared + stage * kHalf + 4 * i, in + round * kHalf + 4 * i);
      if (fault == 5) {
        mbarrier_arrive(full + stage);
      } else {
        copy_async_arrive(full + stage);
      }
    }
    if (fault == 5) copy_async_commit();
    if (fault == 5) copy_async_wait<0>();
    return;
  }
  int sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    const int stage = round % kStages;
    const uint32_t parity = static_cast<uint32_t>(round / kStages) & 1;
    if (fault != 6) mbarrier_wait(full + stage, fault == 1 ? parity ^ 1 : parity);
    sum += shared[stage * kHalf + (i + 32) % kHalf];
    mbarrier_arrive(empty + stage);
  }
  out[i] = sum;
}

// Named barriers: warps 0 and 1 hand over to 2 and 3: out[i] = in[63 - i], i < 64.
__global__ void hand_over(const int* in, int* out, int fault) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int i = static_cast<int>(threadIdx.x) % 64;
  if (threadIdx.x < 64) {
    shared[i] = in[i];
    if (fault != 1) barrier_arrive(3, fault == 2 ? 96 : 128);
    return;
  }
  if (fault != 3) barrier_sync(fault == 4 ? 16 : 3, 128);
  out[i] = shared[63 - i];
}

// Every block adds its number to out[0] once all have: the last one to come, by a counter, writes the sum.
__global__ void sum_blocks(int* out, int* parts, int* counter, int fault) {
  int* last = reinterpret_cast<int*>(shared_memory());
  const int blocks = static_cast<int>(gridDim.x);
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
    if (fault != 3) __threadfence();
    *last = fault == 1 ? static_cast<int>(blockIdx.x) == blocks - 1 : atomicAdd(counter, 1) == blocks - 1;
    while (fault == 2 && blockIdx.x == 0 && atomicAdd(counter, 0) < blocks) {
    }
  }
  __syncthreads();
  if (*last == 0 || threadIdx.x != 0) return;
  int sum = 0;
  for (int i = 0; i < blocks; ++i) sum += parts[i];
  *out = sum;
  *counter = 0;
}

// out[thread] = the sum of parts [block][thread], which every thread of every block leaves.
__global__ void sum_parts(int* out, int* parts, int* counter, int fault) {
  int* last = reinterpret_cast<int*>(shared_memory());
  const int i = static_cast<int>(threadIdx.x), blocks = static_cast<int>(gridDim.x);
  parts[static_cast<int>(blockIdx.x) * kThreads + i] = static_cast<int>(blockIdx.x) + i;
  __threadfence();
  if (fault != 1) __syncthreads();
  if (i == 0) *last = atomicAdd(counter, 1) == blocks - 1;
  __syncthreads();
  if (*last == 0) return;
  int sum = 0;
  for (int block = 0; block < blocks; ++block) sum += parts[block * kThreads + (i ^ 64)];
  out[i ^ 64] = sum;
  if (i == 0) *counter = 0;
}

// What the compiler's checks find. out[i] = in[i].
__global__ void plain(const int* in, int* out, int fault) {
  const int i = static_cast<int>(threadIdx.x);
  int values[4];
  for (int j = 0; j < 4; ++j) {
    if (fault != 1 || j != i % 4) values[j] = in[i];
  }
  out[i] = values[fault == 2 ? 4 + i % 4 : i % 4];
  if (fault == 3) out[i] += in[i] << (32 + i % 2);
  if (fault == 4) out[i] += static_cast<int>(reinterpret_cast<const uint4*>(in + 1 + i / 8)->x);
  if (fault == 5) out[i] = in[i] / (i - i % 32);
}

}  // namespace

namespace shim {

Status run_faulty(const char* kernel, int fault, const void* in, void* out) {
  const Place place;
  const auto is = [kernel](const char* name) { return std::strcmp(kernel, name) == 0; };
  const int* numbers = static_cast<const int*>(in);
  int* results = static_cast<int*>(out);
  if (is("reverse")) return launch<&reverse>(dim3(1), kThreads, 512, place, numbers, results, fault);
  if (is("reverse_warp")) return launch<&reverse_warp>(dim3(1), kThreads, 512, place, numbers, results, fault);
  if (is("sum_warp")) return launch<&sum_warp>(dim3(1), kThreads, 0, place, numbers, results, fault);
  if (is("reverse_chunks")) {
    return launch<&reverse_chunks>(dim3(1), kThreads, 2048, place, static_cast<const uint4*>(in),
                                   static_cast<uint4*>(out), fault);
  }
  if (is("sum_rounds")) return launch<&sum_rounds>(dim3(1), kThreads, 1024, place, numbers, results, fault);
  if (is("sum_stages")) return launch<&sum_stages>(dim3(1), kThreads, 544, place, numbers, results, fault);
  if (is("hand_over")) return launch<&hand_over>(dim3(1), kThreads, 256, place, numbers, results, fault);
  if (is("sum_blocks")) {  // out: the sum, 8 parts, the counter
    return launch<&sum_blocks>(dim3(8), 32, 4, place, results, results + 1, results + 9, fault);
  }
  if (is("sum_parts")) {  // out: the sums, 4 times as many parts, the counter
    return launch<&sum_parts>(dim3(4), kThreads, 4, place, results, results + kThreads, results + 5 * kThreads, fault);
  }
  if (is("plain")) return launch<&plain>(dim3(1), kThreads, 0, place, numbers, results, fault);
  return run_faulty_tiles(kernel, fault, in, out);
}

}  // namespace shim

}  // namespace nybble::cuda
