// wgmma: the operands are read where the matrix descriptor says, through the address function of the 128-byte swizzle
// (PTX ISA, "Asynchronous warpgroup-level matrix shared memory layout"; written from that text, not from wgmma.cuh).
// A multiplication is performed between its commit and the wait for it, at random in the random schedule, as late as
// possible in reverse order; its registers hold a NaN from its issue to the wait.
#include <algorithm>
#include <limits>

#include "shim/cuda/control.h"
#include "shim/cuda/warpgroup.h"
#include "shim/cuda/watch.h"

namespace nybble::cuda::shim {

namespace {

constexpr int kRows = 64;
constexpr int kDepth = 16;
constexpr float kInUse = std::numeric_limits<float>::quiet_NaN();

Warpgroup& group_of(const Thread& thread) {
  const auto at = static_cast<size_t>(thread.number / kWarpgroup);
  if (at >= thread.block->warpgroups.size()) fail("wgmma: the thread is in no whole warpgroup");
  return *thread.block->warpgroups[at];
}

struct Descriptor {
  uint32_t start, leading, stride;
  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3FFF) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3FFF) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3FFF) << 4) {
    if (bits >> 62 != 1)
      fail("wgmma: the descriptor's swizzle mode is %d, not 1 (128 bytes)", static_cast<int>(bits >> 62));
    if ((bits >> 49 & 7) != 0)
      fail("wgmma: the descriptor's base offset is %d, not 0", static_cast<int>(bits >> 49 & 7));
    constexpr uint64_t kReserved =
        (uint64_t{3} << 14) | (uint64_t{3} << 30) | (uint64_t{7} << 46) | (uint64_t{0x3FF} << 52);
    if ((bits & kReserved) != 0) fail("wgmma: reserved bits of the descriptor are set");
  }
};

// 8 elements that lie beside each other, at a linear address of the shared window that the swizzle then changes: bits 4
// to 6 are XORed with bits 7 to 9.
void read_chunk(const Block& block, uint32_t address, const Multiplication& one, uint16_t (&elements)[8]) {
  const int64_t offset = static_cast<int64_t>(address ^ (address >> 7 & 7) << 4) - kSystemShared;
  if (offset < 0 || offset + 16 > static_cast<int64_t>(grid.shared_bytes)) {
    fail("wgmma: reads %lld bytes into the %zu of shared memory", static_cast<long long>(offset), grid.shared_bytes);
  }
  for (size_t at = 0; at < 16; at += kGranule) {
    const Written& written = written_at(block.number, static_cast<size_t>(offset) + at);
    if (written.time > one.issued) {
      fail("wgmma: reads what thread %d wrote after another had issued it (%lld bytes into shared memory)",
           threads[written.fiber].number, static_cast<long long>(offset));
    }
    if (written.time > one.proxy_fence && written.time > threads[written.fiber].proxy_fence) {
      fail("wgmma: reads what thread %d wrote without fence_async_shared since (%lld bytes into shared memory)",
           threads[written.fiber].number, static_cast<long long>(offset));
    }
  }
  std::memcpy(elements, block.shared + offset, 16);
}

// Rows of A (columns of B) by 16 k: element [i][k] to out[i * i_step + k * k_step]. In units of 16 bytes, that is 8
// elements, the canonical layouts with 128-byte swizzle are
//   K-major:  ((8, i), 2) : ((8, stride), 1)                   k runs along a line of 128 bytes
//   MN-major: ((8, i), (8, k)) : ((1, leading), (8, stride))   rows (columns) do
void read_operand(const Block& block, uint64_t bits, bool mn_major, int rows, const Multiplication& one, int i_step,
                  int k_step, float* out) {
  const Descriptor descriptor(bits);
  const int chunks = mn_major ? rows / 8 : kDepth / 8, lines = mn_major ? kDepth : rows;
  const int element_step = mn_major ? i_step : k_step, line_step = mn_major ? k_step : i_step;
  for (int line = 0; line < lines; ++line) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const uint32_t address = descriptor.start + static_cast<uint32_t>(line % 8) * 128 +
                               static_cast<uint32_t>(line / 8) * descriptor.stride +
                               (mn_major ? static_cast<uint32_t>(chunk / 8) * descriptor.leading : 0) +
                               static_cast<uint32_t>(chunk % 8) * 16;
      uint16_t elements[8];
      read_chunk(block, address, one, elements);
      float* to = out + line * line_step + chunk * 8 * element_step;
      for (int i = 0; i < 8; ++i) {
        to[i * element_step] = one.bf16 ? bf16_to_float(elements[i]) : f16_to_float(elements[i]);
      }
    }
  }
}

// Where d[index] of a thread lies in [64, 2 count].
int place_in_tile(int thread, int index, int count) {
  const int warp = thread / kWarp, g = thread % kWarp / 4, t = thread % 4;
  const int row = 16 * warp + g + 8 * (index % 4 / 2);
  const int column = 8 * (index / 4) + 2 * t + index % 2;
  return row * 2 * count + column;
}

void perform(const Block& block, Multiplication& one) {
  const int columns = 2 * one.accumulators->count;
  float a[kRows * kDepth];
  static float b[kDepth * 256];
  read_operand(block, one.a, one.a_major, kRows, one, kDepth, 1, a);
  read_operand(block, one.b, one.b_major, columns, one, 1, columns, b);
  float* d = one.accumulators->values.data();
  if (!one.accumulate) std::fill(one.accumulators->values.begin(), one.accumulators->values.end(), 0.0F);
  for (int row = 0; row < kRows; ++row) {
    for (int k = 0; k < kDepth; ++k) {
      const float left = a[row * kDepth + k];
      float* sums = d + row * columns;
      const float* right = b + k * columns;
      for (int column = 0; column < columns; ++column) sums[column] += left * right[column];
    }
  }
  one.performed = true;
}

// All up to `last` (exclusive) that all threads have issued; false if some have not.
bool perform_to(Block& block, Warpgroup& group, int last) {
  while (group.performed < last) {
    if (group.performed >= static_cast<int>(group.multiplications.size())) return false;
    Multiplication& next = group.multiplications[static_cast<size_t>(group.performed)];
    if (next.arrived != kWarpgroup) return false;
    perform(block, next);
    ++group.performed;
  }
  return true;
}

Accumulators& accumulators_of(Warpgroup& group, Thread& thread, int member, float* d, int count, bool first) {
  for (Accumulators& all : group.accumulators) {
    if (all.registers[member] == d && all.count == count) return all;
    if (all.registers[member] != nullptr && d < all.registers[member] + all.count &&
        all.registers[member] < d + count) {
      fail("wgmma: its registers overlap with others that are in use");
    }
  }
  if (!thread.fenced) {
    fail("wgmma: no wgmma_fence since other code could touch the accumulators");
  }
  // Not in use: those that other threads of the same multiplication have begun with, or new ones.
  if (!first) return *group.multiplications[static_cast<size_t>(thread.multiplications)].accumulators;
  group.accumulators.emplace_back();
  Accumulators& all = group.accumulators.back();
  all.count = count;
  all.values.assign(static_cast<size_t>(kRows) * 2 * count, kInUse);
  return all;
}

}  // namespace

void wgmma(float* d, int count, uint64_t a, uint64_t b, bool accumulate, bool a_major, bool b_major,
           float (*convert)(uint16_t)) {
  check_hopper("wgmma");
  Thread& thread = self();
  Warpgroup& group = group_of(thread);
  const int member = thread.number % kWarpgroup;
  const bool bf16 = convert == static_cast<float (*)(uint16_t)>(bf16_to_float);
  const bool first = thread.multiplications == static_cast<int>(group.multiplications.size());
  Accumulators& all = accumulators_of(group, thread, member, d, count, first);
  if (first) {
    Multiplication one;
    one.a = a;
    one.b = b;
    one.accumulate = accumulate;
    one.a_major = a_major;
    one.b_major = b_major;
    one.bf16 = bf16;
    one.accumulators = &all;
    one.issued = now();
    group.multiplications.push_back(one);
  }
  Multiplication& one = group.multiplications[static_cast<size_t>(thread.multiplications)];
  if (one.a != a || one.b != b) {
    fail("wgmma: descriptors 0x%016llX, 0x%016llX, while another thread of the warpgroup has 0x%016llX, 0x%016llX",
         static_cast<unsigned long long>(a), static_cast<unsigned long long>(b), static_cast<unsigned long long>(one.a),
         static_cast<unsigned long long>(one.b));
  }
  if (one.accumulate != accumulate || one.a_major != a_major || one.b_major != b_major || one.bf16 != bf16 ||
      one.accumulators != &all || all.count != count) {
    fail("wgmma: threads of the warpgroup issue different multiplications");
  }
  if (all.registers[member] == nullptr) {
    all.registers[member] = d;
    for (int i = 0; i < count; ++i) {
      all.values[static_cast<size_t>(place_in_tile(member, i, count))] = d[i];
      d[i] = kInUse;
    }
  }
  one.proxy_fence = std::min(one.proxy_fence, thread.proxy_fence);
  all.last_use[member] = thread.multiplications++;
  if (++one.arrived == kWarpgroup && !group.waiting.empty()) {
    for (const int fiber : group.waiting) fibers::wake(fiber);
    group.waiting.clear();
  }
}

void wgmma_wait(int pending) {
  check_hopper("wgmma_wait");
  collective("wgmma_wait", kWholeWarp, pending, nullptr, [](void**) {});
  Thread& thread = self();
  Warpgroup& group = group_of(thread);
  const int member = thread.number % kWarpgroup;
  const int groups = static_cast<int>(thread.multiply_groups.size()) - pending;
  const int last = groups > 0 ? thread.multiply_groups[static_cast<size_t>(groups) - 1] : 0;
  while (!perform_to(*thread.block, group, last)) {
    group.waiting.push_back(fibers::current);
    fibers::block("wgmma_wait (for other warps of the warpgroup to issue the same)");
  }
  for (auto at = group.accumulators.begin(); at != group.accumulators.end();) {
    Accumulators& all = *at;
    if (all.registers[member] != nullptr && all.last_use[member] < last) {
      for (int i = 0; i < all.count; ++i) {
        all.registers[member][i] = all.values[static_cast<size_t>(place_in_tile(member, i, all.count))];
      }
      all.registers[member] = nullptr;
      thread.fenced = false;
    }
    // Nothing refers to it once every thread has its values back.
    const bool used =
        std::any_of(std::begin(all.registers), std::end(all.registers), [](float* r) { return r != nullptr; });
    const bool begun =
        std::any_of(group.multiplications.begin(), group.multiplications.end(),
                    [&](const Multiplication& one) { return one.accumulators == &all && one.arrived != kWarpgroup; });
    at = used || begun ? std::next(at) : group.accumulators.erase(at);
  }
}

void set_registers(int registers, bool more) {
  check_hopper("setmaxnreg");
  collective(more ? "more_registers" : "fewer_registers", kWholeWarp, registers, nullptr, [](void**) {});
  Warpgroup& group = group_of(self());
  if (group.registers_set % kWarpgroup != 0 && group.registers != registers) {
    fail("setmaxnreg: %d registers, while other threads of the warpgroup set %d", registers, group.registers);
  }
  group.registers = registers;
  ++group.registers_set;
}

std::string registers_problem(const Block& block) {
  int64_t sum = 0;
  bool all = true;
  for (const auto& group : block.warpgroups) {
    if (group->registers_set % kWarpgroup != 0) return "setmaxnreg was called by a part of a warpgroup";
    all = all && group->registers != 0;
    sum += int64_t{kWarpgroup} * group->registers;
  }
  constexpr int64_t kRegisters = 65536;  // of a multiprocessor
  if (all && sum > kRegisters) return "setmaxnreg: the warpgroups' registers are " + std::to_string(sum);
  return "";
}

void multiplications_at_exit(const Thread& thread) {
  if (thread.multiplications == 0) return;
  const Warpgroup& group = group_of(thread);
  if (group.performed < thread.multiplications) fail("returns while its wgmma are under way");
}

}  // namespace nybble::cuda::shim

namespace nybble::cuda {

void fence_async_shared() {
  shim::check_hopper("fence_async_shared");
  shim::self().proxy_fence = shim::now();
}

void wgmma_fence() {
  shim::check_hopper("wgmma_fence");
  shim::self().fenced = true;
}

void wgmma_commit() {
  shim::check_hopper("wgmma_commit");
  shim::Thread& thread = shim::self();
  thread.multiply_groups.push_back(thread.multiplications);
  shim::collective("wgmma_commit", kWholeWarp, 0, nullptr, [](void**) {});
  shim::Warpgroup& group = shim::group_of(thread);
  if (fibers::order() == fibers::Order::random ? shim::chance(64) : fibers::order() == fibers::Order::in_order) {
    shim::perform_to(*thread.block, group, thread.multiplications);
  }
}

}  // namespace nybble::cuda
