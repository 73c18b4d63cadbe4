// What an entry point of the core reports: no exceptions, no printing, no abort below bindings/.
#pragma once
#include <cstdint>

namespace nybble {

enum class Code : int32_t {
  ok = 0,
  bad_argument,   // `what` names the argument, `value` is what came
  non_finite,     // `value` is the flat index of the first offending block (or row)
  out_of_memory,  // `value` is the number of bytes that could not be had
  device_failed,  // `what` is what the driver says, `value` its number for that
};

struct Status {
  Code code = Code::ok;
  const char* what = "";
  int64_t value = 0;

  bool ok() const { return code == Code::ok; }
};

inline Status success() { return {}; }
inline Status bad_argument(const char* what, int64_t value) { return {Code::bad_argument, what, value}; }
inline Status non_finite(int64_t block) { return {Code::non_finite, "x", block}; }
inline Status device_failed(const char* what, int64_t value) { return {Code::device_failed, what, value}; }
inline Status out_of_memory(int64_t bytes) { return {Code::out_of_memory, "scratch", bytes}; }

}  // namespace nybble
