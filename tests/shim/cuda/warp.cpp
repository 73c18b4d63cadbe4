// What the lanes of a warp do together: each brings its operand and waits; the last one does the work for all.
#include "shim/cuda/block.h"

namespace nybble::cuda::shim {

namespace {

int count_of(uint32_t mask) { return __builtin_popcount(mask); }

Collective& place_of(Warp& warp, uint32_t mask) {
  if (mask == kWholeWarp) return warp.whole;
  for (Collective& part : warp.parts) {
    if (part.arrived != 0 && part.mask == mask) return part;
  }
  for (Collective& part : warp.parts) {
    if (part.arrived == 0) {
      part.mask = mask;
      return part;
    }
  }
  warp.parts.reserve(kWarp);  // others hold references
  warp.parts.emplace_back();
  warp.parts.back().mask = mask;
  return warp.parts.back();
}

void check_others(const Warp& warp, const Collective& mine, const char* operation, uint32_t mask) {
  const auto check = [&](const Collective& other) {
    if (&other != &mine && other.arrived != 0 && (other.mask & mask) != 0) {
      fail("%s with lanes 0x%08X, while other lanes of the warp are at %s with lanes 0x%08X", operation, mask,
           other.operation, other.mask);
    }
  };
  check(warp.whole);
  for (const Collective& part : warp.parts) check(part);
}

}  // namespace

Collective& join(const char* operation, uint32_t mask, int64_t detail, void* operand) {
  Thread& thread = self();
  Warp& warp = thread.block->warps[static_cast<size_t>(thread.warp)];
  if ((mask >> thread.lane & 1) == 0) fail("%s: the mask 0x%08X does not have this lane", operation, mask);
  if ((mask & warp.exited) != 0) fail("%s: lanes 0x%08X have returned", operation, mask & warp.exited);
  Collective& all = place_of(warp, mask);
  if (all.arrived == 0) {
    if (mask != kWholeWarp || !warp.parts.empty()) check_others(warp, all, operation, mask);
    all.mask = mask;
    all.operation = operation;
    all.detail = detail;
  } else if (all.operation != operation) {
    fail("%s, while %d lanes of the warp are at %s", operation, count_of(all.arrived), all.operation);
  } else if (all.detail != detail) {
    fail("%s: lanes of a warp do not agree (%lld here, %lld there)", operation, static_cast<long long>(detail),
         static_cast<long long>(all.detail));
  }
  all.operands[thread.lane] = operand;
  all.arrived |= 1U << thread.lane;
  return all;
}

void leave(Collective& all) {
  const Thread& thread = self();
  all.arrived = 0;
  const int first = fibers::current - thread.lane;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (lane != thread.lane && (all.mask >> lane & 1) != 0) fibers::wake(first + lane);
  }
}

void thread_exits() {
  Thread& thread = self();
  Warp& warp = thread.block->warps[static_cast<size_t>(thread.warp)];
  copies_at_exit(thread);
  multiplications_at_exit(thread);
  warp.exited |= 1U << thread.lane;
  const auto check = [&](const Collective& all) {
    if (all.arrived != 0 && (all.mask >> thread.lane & 1) != 0) {
      fail("returns, while %d lanes of its warp wait for it at %s", count_of(all.arrived), all.operation);
    }
  };
  check(warp.whole);
  for (const Collective& part : warp.parts) check(part);
}

void sync_warp(uint32_t mask) {
  perform_own_copies();
  collective("__syncwarp", mask, 0, nullptr, [](void**) {});
}

uint32_t vote(uint32_t mask, bool predicate, const char* operation) {
  struct Operand {
    bool predicate;
    uint32_t result;
  } mine = {predicate, 0};
  collective(operation, mask, 0, &mine, [mask](void** operands) {
    uint32_t result = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) != 0 && static_cast<Operand*>(operands[lane])->predicate) result |= 1U << lane;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      if ((mask >> lane & 1) != 0) static_cast<Operand*>(operands[lane])->result = result;
    }
  });
  return mine.result;
}

uint64_t shuffle(uint32_t mask, uint64_t value, From from, int operand, int width) {
  static const char* const kNames[] = {"__shfl_sync", "__shfl_xor_sync", "__shfl_down_sync", "__shfl_up_sync"};
  const char* operation = kNames[static_cast<int>(from)];
  struct Operand {
    uint64_t value;
    uint64_t result;
    int source;
  } mine = {value, 0, 0};
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) fail("%s: width %d", operation, width);
  const int lane = self().lane;
  const int segment = lane & ~(width - 1);
  int source = lane;
  switch (from) {
    case From::lane:
      source = segment + (operand & (width - 1));
      break;
    case From::exclusive_or:
      source = lane ^ operand;
      if (source >= segment + width) source = lane;
      break;
    case From::down:
      source = lane + operand;
      if (source >= segment + width) source = lane;
      break;
    case From::up:
      source = lane - operand;
      if (source < segment) source = lane;
      break;
  }
  if (source < 0 || source >= kWarp || (mask >> source & 1) == 0) {
    fail("%s: takes from lane %d, which the mask 0x%08X does not have", operation, source, mask);
  }
  mine.source = source;
  collective(operation, mask, width, &mine, [mask](void** operands) {
    for (int i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1) == 0) continue;
      auto* one = static_cast<Operand*>(operands[i]);
      one->result = static_cast<Operand*>(operands[one->source])->value;
    }
  });
  return mine.result;
}

// A lane's row is read when the lane comes: what others write only then, without a barrier, need not be seen.
void load_matrices(uint32_t* out, const void* shared, bool transposed) {
  struct Operand {
    uint32_t* out;
    uint16_t row[8];
  } mine;
  const char* operation = transposed ? "load_matrices_transposed" : "load_matrices";
  check_aligned(shared, 16, operation);
  check_shared(shared, 16, operation);
  mine.out = out;
  std::memcpy(mine.row, shared, 16);
  collective(operation, kWholeWarp, 0, &mine, [transposed](void** operands) {
    for (int lane = 0; lane < kWarp; ++lane) {
      const int major = lane / 4, minor = lane % 4 * 2;
      uint32_t* destination = static_cast<Operand*>(operands[lane])->out;
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto row = [&](int i) { return static_cast<const Operand*>(operands[8 * matrix + i])->row; };
        const uint32_t low = transposed ? row(minor)[major] : row(major)[minor];
        const uint32_t high = transposed ? row(minor + 1)[major] : row(major)[minor + 1];
        destination[matrix] = low | high << 16;
      }
    }
  });
}

void multiply(float* d, const uint32_t* a, const uint32_t* b, float (*convert)(uint16_t)) {
  struct Operand {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
  } mine = {d, a, b};
  const bool bf16 = convert == static_cast<float (*)(uint16_t)>(bf16_to_float);
  collective("multiply", kWholeWarp, bf16 ? 1 : 0, &mine, [bf16](void** operands) {
    float left[16][16], right[16][8], sum[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const Operand& one = *static_cast<Operand*>(operands[lane]);
      const int g = lane / 4, t = lane % 4;
      const auto both = [bf16](uint32_t pair, float* low, float* high) {
        *low = bf16 ? float_of(pair << 16) : f16_to_float(static_cast<uint16_t>(pair));
        *high = bf16 ? float_of(pair & 0xFFFF0000U) : f16_to_float(static_cast<uint16_t>(pair >> 16));
      };
      for (int i = 0; i < 4; ++i) {
        float* row = left[g + 8 * (i % 2)] + 2 * t + 8 * (i / 2);
        both(one.a[i], row, row + 1);
      }
      for (int i = 0; i < 2; ++i) both(one.b[i], &right[2 * t + 8 * i][g], &right[2 * t + 8 * i + 1][g]);
      for (int i = 0; i < 4; ++i) sum[g + 8 * (i / 2)][2 * t + i % 2] = one.d[i];
    }
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 16; ++k) {
        for (int j = 0; j < 8; ++j) sum[i][j] += left[i][k] * right[k][j];
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      Operand& one = *static_cast<Operand*>(operands[lane]);
      for (int i = 0; i < 4; ++i) one.d[i] = sum[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    }
  });
}

}  // namespace nybble::cuda::shim

namespace nybble::cuda {

void multiply_int8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operand {
    int* d;
    const uint32_t* a;
    const uint32_t* b;
  } mine = {d, a, b};
  shim::collective("multiply_int8", kWholeWarp, 0, &mine, [](void** operands) {
    int left[16][32], right[32][8];
    const auto byte = [](uint32_t word, int i) { return static_cast<int>(static_cast<int8_t>(word >> (8 * i))); };
    for (int lane = 0; lane < kWarp; ++lane) {
      const Operand& one = *static_cast<Operand*>(operands[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) left[g + 8 * (i % 2)][4 * t + 16 * (i / 2) + j] = byte(one.a[i], j);
      }
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) right[4 * t + 16 * i + j][g] = byte(one.b[i], j);
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      Operand& one = *static_cast<Operand*>(operands[lane]);
      for (int i = 0; i < 4; ++i) {
        int64_t sum = one.d[i];
        for (int k = 0; k < 32; ++k) sum += left[lane / 4 + 8 * (i / 2)][k] * right[k][2 * (lane % 4) + i % 2];
        if (sum != static_cast<int32_t>(sum)) shim::fail("multiply_int8: the sum does not fit in 32 bits");
        one.d[i] = static_cast<int32_t>(sum);
      }
    }
  });
}

}  // namespace nybble::cuda
