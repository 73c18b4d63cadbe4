// What the kernel tests stand on: seeded random numbers, buffers that notice an access outside, a count of cases.
#pragma once
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/kernels.h"

namespace nybble::test {

// splitmix64: the same numbers on every machine and with every standard library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15U);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t count) { return static_cast<int64_t>(next() % static_cast<uint64_t>(count)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool one_in(int64_t count) { return below(count) == 0; }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  // The sum of four uniform numbers: bell-shaped, mean 0, variance 1, at most 3.5.
  double normal() { return (uniform() + uniform() + uniform() + uniform() - 2.0) * 1.7320508075688772; }

  template <class T>
  T pick(const std::vector<T>& choices) {
    return choices[static_cast<size_t>(below(static_cast<int64_t>(choices.size())))];
  }

 private:
  uint64_t state_;
};

// An input in an allocation that ends with it, so that AddressSanitizer sees any read past the end. It begins `shift`
// elements after an aligned address.
class Input {
 public:
  Input() = default;
  Input(const void* from, size_t bytes, size_t lead) : memory_(new uint8_t[lead + bytes]), data_(memory_.get() + lead) {
    if (bytes > 0) std::memcpy(data_, from, bytes);
  }

  template <class T>
  static Input of(const std::vector<T>& values, int64_t shift) {
    return Input(values.data(), values.size() * sizeof(T), static_cast<size_t>(shift) * sizeof(T));
  }

  template <class T>
  const T* as() const {
    return reinterpret_cast<const T*>(data_);
  }

 private:
  std::unique_ptr<uint8_t[]> memory_;
  uint8_t* data_ = nullptr;
};

// An output between guard bytes, filled with a pattern that is a number no kernel computes.
class Output {
 public:
  Output(int64_t count, int64_t element, int64_t shift)
      : lead_(static_cast<size_t>(kGuard + shift * element)),
        size_(static_cast<size_t>(count * element)),
        memory_(lead_ + size_ + kGuard, kPattern) {}

  template <class T>
  T* as() {
    return reinterpret_cast<T*>(memory_.data() + lead_);
  }
  const uint8_t* bytes() const { return memory_.data() + lead_; }
  size_t size() const { return size_; }
  bool same(const Output& other) const {
    return size_ == other.size_ && (size_ == 0 || std::memcmp(bytes(), other.bytes(), size_) == 0);
  }
  bool guards_intact() const {
    for (size_t i = 0; i < lead_; ++i) {
      if (memory_[i] != kPattern) return false;
    }
    for (size_t i = lead_ + size_; i < memory_.size(); ++i) {
      if (memory_[i] != kPattern) return false;
    }
    return true;
  }

 private:
  static constexpr int64_t kGuard = 128;
  static constexpr uint8_t kPattern = 0xA5;
  size_t lead_;
  size_t size_;
  std::vector<uint8_t> memory_;
};

// Counts what was checked, prints what was wrong.
class Report {
 public:
  void checked(const std::string& isa);
  // `what` happened in the case that `description` tells; only the first failures are printed.
  void fail(const std::string& description, const std::string& what);
  int64_t failures() const { return failures_; }
  // "scalar 1234, avx2 1234"
  std::string summary() const;

 private:
  std::vector<std::pair<std::string, int64_t>> counts_;
  int64_t failures_ = 0;
};

// printf into a string.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
std::string format(const char* pattern, ...);

// What a whole run needs: the tables of this machine, the scale of the effort, where results go.
struct Run {
  std::vector<const KernelTable*> tables;
  uint64_t seed = 1;
  int64_t cases = 100;
  Report report;
};

void test_codecs(Run& run);
void test_searches(Run& run);
void test_rounding(Run& run);
void test_optimizer(Run& run);
void test_attention(Run& run);
void test_elementwise(Run& run);
void test_linear(Run& run);
void test_decoding(Run& run);

}  // namespace nybble::test
