// The threads of a Metal grid as fibers: what the stand-in for metal_stdlib asks of the runner, and a kernel's shape as
// the build step finds it in the text.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace shim {

constexpr int kLanes = 32;
constexpr size_t kThreadgroupBytes = 32 * 1024;  // what every GPU of Apple's has
constexpr int kMostBuffers = 31;

// What one lane gives to an operation of its simdgroup, and all lanes see.
struct alignas(8) Slot {
  float values[8];
};

// Gives `mine` to an operation of the simdgroup that is called `what`, waits until all its lanes have come to the same
// one, and returns what they gave, which stays until the lane's next operation but one. The last to come calls
// `finish`.
Slot* exchange(const char* what, const Slot& mine, void (*finish)(Slot* slots) = nullptr);
int lanes_of_simdgroup();
int lane();
// Remembers an operation that needs no other lane but must be the same in all: compared in the next exchange.
void note(uint64_t what);
void barrier(const char* what);

// The next array of threadgroup memory that the body of a kernel declares: one instance a threadgroup, poisoned before
// every threadgroup, its end at a page that must not be touched.
void* threadgroup_array(size_t bytes);

[[noreturn]] void fail(const char* message);

// Where an address lies, for what counts accesses (counts.cpp).
struct Place {
  int buffer = -1;    // of the launch; -1: none
  int array = -1;     // of threadgroup memory; -1: none
  size_t offset = 0;  // from the start
  size_t extent = 0;  // bytes of the whole
};
Place place_of(const void* address);
uint64_t groups_run();  // threadgroups begun since the library was loaded: tells one from another

// ---- kernels
// ---------------------------------------------------------------------------------------------------------

struct Triple {
  uint32_t x = 0, y = 0, z = 0;
};

// Where a parameter of a kernel comes from.
struct Parameter {
  const char* attribute;  // "buffer" or one of Metal's names for what a thread knows of itself
  int index = 0;          // of a buffer
};

struct Arguments {
  void* buffers[kMostBuffers] = {};
  const Parameter* parameters = nullptr;
};

Triple builtin(const char* attribute);

// What a parameter's C++ type says of a buffer.
struct Buffer {
  bool is_pointer = false;
  bool is_const = false;
  size_t bytes = 0;  // of what a reference refers to
};

struct Kernel {
  const char* name;
  void (*function)();
  void (*call)(void (*function)(), const Arguments&);
  const Parameter* parameters;
  int count;
  Buffer types[kMostBuffers + 16];
  size_t index;
};

void add(Kernel kernel);

template <class P, class = void>
struct Convert;

template <class T>
struct Convert<T*> {
  static constexpr Buffer type{true, std::is_const_v<T>, 0};
  static T* from(const Arguments& arguments, const Parameter& parameter) {
    return static_cast<T*>(arguments.buffers[parameter.index]);
  }
};

template <class T>
struct Convert<T&> {
  static constexpr Buffer type{false, std::is_const_v<T>, sizeof(T)};
  static T& from(const Arguments& arguments, const Parameter& parameter) {
    return *static_cast<T*>(arguments.buffers[parameter.index]);
  }
};

template <class T>
struct Convert<T, std::enable_if_t<std::is_integral_v<T>>> {
  static constexpr Buffer type{};
  static T from(const Arguments&, const Parameter& parameter) { return static_cast<T>(builtin(parameter.attribute).x); }
};

template <class T>
struct Convert<T, std::enable_if_t<std::is_class_v<T>>> {  // uint2 and uint3
  static constexpr Buffer type{};
  static T from(const Arguments&, const Parameter& parameter) {
    const Triple found = builtin(parameter.attribute);
    if constexpr (T::size == 2) {
      return T(found.x, found.y);
    } else {
      return T(found.x, found.y, found.z);
    }
  }
};

template <class... P>
struct Caller {
  template <size_t... I>
  static void call_with(void (*function)(P...), const Arguments& arguments, std::index_sequence<I...>) {
    function(Convert<P>::from(arguments, arguments.parameters[I])...);
  }
  static void call(void (*function)(), const Arguments& arguments) {
    call_with(reinterpret_cast<void (*)(P...)>(function), arguments, std::index_sequence_for<P...>());
  }
};

struct Registered {
  template <class... P, size_t N>
  Registered(const char* name, void (*function)(P...), const Parameter (&parameters)[N]) {
    static_assert(sizeof...(P) == N, "the build step has miscounted a kernel's parameters");
    add(Kernel{name,
               reinterpret_cast<void (*)()>(function),
               &Caller<P...>::call,
               parameters,
               static_cast<int>(N),
               {Convert<P>::type...},
               0});
  }
};

}  // namespace shim
