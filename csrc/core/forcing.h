// The kernel of a table that runs wherever it can instead of the chosen one: for tests and benches. At first it is what
// an environment variable names, read when it is first asked for; none unless that is a kernel.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <string>

namespace nybble {

// `Kernel` has a `const char* name`; the table outlives this.
template <class Kernel>
class Forcing {
 public:
  template <size_t Count>
  constexpr Forcing(const Kernel (&table)[Count], const char* variable)
      : table_(table), count_(Count), variable_(variable) {}

  // Null: none.
  const Kernel* now() {
    const Kernel* kernel = forced_.load(std::memory_order_acquire);
    if (kernel == &not_read_) {
      const char* name = std::getenv(variable_);
      kernel = name != nullptr ? find(name) : nullptr;
      forced_.store(kernel, std::memory_order_release);
    }
    return kernel;
  }

  // Its name; empty: none.
  std::string name() {
    const Kernel* kernel = now();
    return kernel != nullptr ? kernel->name : "";
  }

  // False if there is no kernel of that name; an empty name ends the forcing.
  bool force(const std::string& name) {
    const Kernel* kernel = find(name);
    if (kernel == nullptr && !name.empty()) return false;
    forced_.store(kernel, std::memory_order_release);
    return true;
  }

  // Every name that can be forced, separated by commas.
  std::string names() const {
    std::string names;
    for (size_t i = 0; i < count_; ++i) names += (names.empty() ? "" : ", ") + std::string(table_[i].name);
    return names;
  }

 private:
  const Kernel* find(const std::string& name) const {
    for (size_t i = 0; i < count_; ++i) {
      if (name == table_[i].name) return &table_[i];
    }
    return nullptr;
  }

  const Kernel* table_;
  size_t count_;
  const char* variable_;
  const Kernel not_read_ = {};
  std::atomic<const Kernel*> forced_{&not_read_};
};

}  // namespace nybble
