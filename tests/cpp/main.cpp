// kernel_tests [--cases N] [--seed S] [--isa NAME]
// Runs every kernel table of this machine on seeded random problems; the exit status is 1 if anything was wrong.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "cpu/dispatch.h"
#include "support.h"

namespace nybble::test {

void Report::checked(const std::string& isa) {
  for (auto& [name, count] : counts_) {
    if (name == isa) {
      ++count;
      return;
    }
  }
  counts_.emplace_back(isa, 1);
}

void Report::fail(const std::string& description, const std::string& what) {
  constexpr int64_t kPrinted = 20;
  if (failures_++ < kPrinted) std::printf("FAILED %s: %s\n", description.c_str(), what.c_str());
}

std::string Report::summary() const {
  std::string all;
  for (const auto& [name, count] : counts_) {
    all += (all.empty() ? "" : ", ") + name + " " + std::to_string(count);
  }
  return all;
}

std::string format(const char* pattern, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

}  // namespace nybble::test

namespace {

int usage(const char* problem) {
  std::fprintf(stderr, "%s\nusage: kernel_tests [--cases N] [--seed S] [--isa NAME]\n", problem);
  return 2;
}

}  // namespace

int main(int count, char** arguments) {
  using namespace nybble;
  test::Run run;
  std::vector<std::string> names = cpu::isas();
  for (int i = 1; i < count; i += 2) {
    const std::string option = arguments[i];
    if (i + 1 == count) return usage((option + " needs a value").c_str());
    if (option == "--cases") {
      run.cases = std::atoll(arguments[i + 1]);
    } else if (option == "--seed") {
      run.seed = std::strtoull(arguments[i + 1], nullptr, 10);
    } else if (option == "--isa") {
      names = {arguments[i + 1]};
    } else {
      return usage(("unknown option " + option).c_str());
    }
  }
  for (const std::string& name : names) {
    if (!cpu::set_active(name)) return usage(("this machine cannot run " + name).c_str());
    run.tables.push_back(cpu::active());
  }
  test::test_codecs(run);
  test::test_searches(run);
  test::test_rounding(run);
  test::test_optimizer(run);
  test::test_attention(run);
  test::test_elementwise(run);
  test::test_linear(run);
  test::test_decoding(run);
  std::printf("kernel_tests, seed %llu: problems checked under each ISA: %s\n",
              static_cast<unsigned long long>(run.seed), run.report.summary().c_str());
  if (run.report.failures() > 0) {
    std::printf("%lld checks failed\n", static_cast<long long>(run.report.failures()));
    return 1;
  }
  return 0;
}
