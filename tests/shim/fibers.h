// Threads of a GPU as fibers of one thread of the host: each runs until it waits for others, then the next one does, in
// an order that is random (and repeatable), ascending or descending. Nothing here knows which kind of GPU.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fibers {

enum class Order { random, in_order, reverse };

struct Hooks {
  void (*body)(int fiber) = nullptr;
  // Called when no fiber can run: makes something happen that lets one (true), or says that nothing can any more.
  bool (*idle)() = nullptr;
  // How messages call a fiber, and what they say about an address that must not be touched.
  void (*name)(int fiber, char* text, size_t size) = nullptr;
  void (*explain)(const void* address, char* text, size_t size) = nullptr;
};

constexpr int kMostFibers = 4096;

// Runs body(0) to body(count - 1), each as a fiber, until all have returned. False: one of them failed, touched an
// address that it may not, or all that are left wait; error() says so. What they were doing is then abandoned: nothing
// that a fiber owns on its stack is destroyed.
bool run(int count, const Hooks& hooks);
const char* error();

// ---- for the running fiber ------------------------------------------------------------------------------------------

extern int current;  // its number
// Lets another one run, if one can.
void yield();
// Until another fiber wakes this one; `what` (text that lasts) is what a report of a deadlock says that it waits for.
void block(const char* what);
// Ends the run; the message begins with the fiber's name.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- for hooks and fibers -------------------------------------------------------------------------------------------

void wake(int fiber);
const char* waits_for(int fiber);  // null: it can run or has returned

// ---- the schedule ---------------------------------------------------------------------------------------------------

void seed(uint64_t value);
void set_order(Order order);
Order order();
uint64_t random();
// 0 to bound - 1.
inline uint32_t random_below(uint32_t bound) { return static_cast<uint32_t>((random() >> 32) * bound >> 32); }

}  // namespace fibers
