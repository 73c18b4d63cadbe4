#include "shim/fibers.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

// ---- switching stacks -----------------------------------------------------------------------------------------------

// Saves what a called function must preserve on the running stack and its pointer in *from, and goes on where `to` was
// saved. swapcontext would do, but makes a system call each time.
#if defined(NYBBLE_FIBER_UCONTEXT)
#include <ucontext.h>
#elif defined(__x86_64__)
extern "C" void nybble_fiber_switch(void** from, void* to);
asm(R"(
.text
.globl nybble_fiber_switch
.hidden nybble_fiber_switch
.type nybble_fiber_switch, @function
nybble_fiber_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size nybble_fiber_switch, .-nybble_fiber_switch
)");
#elif defined(__aarch64__)
extern "C" void nybble_fiber_switch(void** from, void* to);
asm(R"(
.text
.globl nybble_fiber_switch
.hidden nybble_fiber_switch
.type nybble_fiber_switch, %function
nybble_fiber_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size nybble_fiber_switch, .-nybble_fiber_switch
)");
#else
#define NYBBLE_FIBER_UCONTEXT
#include <ucontext.h>
#endif

namespace fibers {

int current = -1;

namespace {

constexpr size_t kStackBytes = 128 * 1024;

#if defined(NYBBLE_FIBER_UCONTEXT)
struct Context {
  ucontext_t saved;
};
void switch_context(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }
void prepare(Context& context, char* stack, char* top, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = stack;
  context.saved.uc_stack.ss_size = static_cast<size_t>(top - stack);
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
}
#else
struct Context {
  void* stack_pointer = nullptr;
};
void switch_context(Context& from, Context& to) { nybble_fiber_switch(&from.stack_pointer, to.stack_pointer); }
void prepare(Context& context, char*, char* top, void (*entry)()) {
  void** frame = reinterpret_cast<void**>(top);
#if defined(__x86_64__)
  frame -= 8;  // six registers, the address to return to, and one word: a function starts 8 bytes off 16
  std::fill(frame, frame + 8, nullptr);
  frame[6] = reinterpret_cast<void*>(entry);
#else
  frame -= 20;
  std::fill(frame, frame + 20, nullptr);
  frame[11] = reinterpret_cast<void*>(entry);
#endif
  context.stack_pointer = frame;
}
#endif

struct Fiber {
  Context context;
  const char* waiting = nullptr;
  bool done = false;
  bool slow = false;
};

struct Scheduler {
  Hooks hooks;
  Fiber fibers[kMostFibers];
  char* stacks[kMostFibers] = {};
  int count = 0;
  int left = 0;
  Context main;
  jmp_buf failed;
  // Random order: who can run. Half of the time some are slow, alone or in groups: they run when no other one can, and
  // now and then. What a fiber does then comes long after its like, which without this is rare.
  int ready[2][kMostFibers] = {};
  int ready_of[2] = {};    // how many; [1]: the slow ones
  uint32_t slow_in = 1;    // a slow one runs once in this many times that another one can
  int64_t until_slow = 0;  // times until others are slow
  int ready_count = 0;
  uint64_t ready_bits[kMostFibers / 64] = {};  // the other orders: the same as a set
  Order order = Order::random;
  uint64_t state = 0x9E3779B97F4A7C15U;
  char error[8192] = "";
} scheduler;

char signal_stack[64 * 1024];

void push(int fiber) {
  Scheduler& s = scheduler;
  if (s.order == Order::random) {
    const int slow = s.fibers[fiber].slow ? 1 : 0;
    s.ready[slow][s.ready_of[slow]++] = fiber;
  } else {
    s.ready_bits[fiber / 64] |= uint64_t{1} << (fiber % 64);
  }
  ++s.ready_count;
}

void choose_slow() {
  Scheduler& s = scheduler;
  constexpr int kGroups[] = {0, 0, 1, 32, 32, 128};
  const int group = s.order == Order::random ? kGroups[random_below(6)] : 0;
  s.slow_in = 16U << 4 * random_below(3);
  s.until_slow = int64_t{64} << random_below(11);
  bool slow = false;
  for (int i = 0; i < s.count; ++i) {
    if (group != 0 && i % group == 0) slow = random_below(4) == 0;
    s.fibers[i].slow = slow;
  }
}

int pop() {
  Scheduler& s = scheduler;
  --s.ready_count;
  if (s.order == Order::random) {
    if (--s.until_slow < 0) choose_slow();
    const int slow = s.ready_of[0] == 0 || (s.ready_of[1] != 0 && random_below(s.slow_in) == 0) ? 1 : 0;
    int* ready = s.ready[slow];
    const uint32_t at = random_below(static_cast<uint32_t>(s.ready_of[slow]));
    const int fiber = ready[at];
    ready[at] = ready[--s.ready_of[slow]];
    return fiber;
  }
  constexpr int kWords = kMostFibers / 64;
  int word = s.order == Order::in_order ? 0 : kWords - 1;
  while (s.ready_bits[word] == 0) word += s.order == Order::in_order ? 1 : -1;
  const int bit =
      s.order == Order::in_order ? __builtin_ctzll(s.ready_bits[word]) : 63 - __builtin_clzll(s.ready_bits[word]);
  s.ready_bits[word] &= ~(uint64_t{1} << bit);
  return word * 64 + bit;
}

void set_error(int fiber, const char* message) {
  char name[256] = "";
  if (fiber >= 0 && scheduler.hooks.name != nullptr) scheduler.hooks.name(fiber, name, sizeof name);
  snprintf(scheduler.error, sizeof scheduler.error, "%s%s%s", name, name[0] != 0 ? ": " : "", message);
}

[[noreturn]] void abandon() { longjmp(scheduler.failed, 1); }

// "a, b and 3 more" of those that wait for the same.
[[noreturn]] void deadlock() {
  std::map<std::string, std::pair<std::string, int>> groups;
  constexpr int kNamed = 3;
  for (int i = 0; i < scheduler.count; ++i) {
    const Fiber& fiber = scheduler.fibers[i];
    auto& [names, members] = groups[fiber.done ? "returned" : std::string("waits for ") + fiber.waiting];
    if (++members > kNamed) continue;
    char name[256] = "";
    scheduler.hooks.name(i, name, sizeof name);
    names += (names.empty() ? "" : ", ") + std::string(name);
  }
  std::string message = "deadlock:";
  for (const auto& [what, group] : groups) {
    message += " [" + group.first;
    if (group.second > kNamed) message += " and " + std::to_string(group.second - kNamed) + " more";
    message += "] " + what + ";";
  }
  message.pop_back();
  set_error(-1, message.c_str());
  abandon();
}

int next_ready() {
  const auto can_happen = [] { return scheduler.hooks.idle != nullptr && scheduler.hooks.idle(); };
  // What goes on beside the fibers is not slow.
  while (scheduler.ready_of[0] == 0 && scheduler.ready_of[1] != 0 && can_happen()) {
  }
  while (scheduler.ready_count == 0) {
    if (!can_happen()) deadlock();
  }
  return pop();
}

void resume(int next) {
  const int before = current;
  current = next;
  switch_context(scheduler.fibers[before].context, scheduler.fibers[next].context);
}

void entry() {
  scheduler.hooks.body(current);
  Fiber& fiber = scheduler.fibers[current];
  fiber.done = true;
  if (--scheduler.left == 0) {
    switch_context(fiber.context, scheduler.main);
  } else {
    resume(next_ready());
  }
  __builtin_unreachable();
}

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// Below a stack lies a page that must not be touched.
char* stack_of(int fiber) {
  char*& stack = scheduler.stacks[fiber];
  if (stack == nullptr) {
    void* memory = mmap(nullptr, kStackBytes + page_bytes(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    mprotect(memory, page_bytes(), PROT_NONE);
    stack = static_cast<char*>(memory) + page_bytes();
  }
  return stack;
}

struct sigaction before_segv, before_bus;

void on_fault(int number, siginfo_t* info, void*) {
  if (current < 0) {  // not a fiber's
    sigaction(number, number == SIGSEGV ? &before_segv : &before_bus, nullptr);
    return;
  }
  char* address = static_cast<char*>(info->si_addr);
  char what[256] = "";
  for (int i = 0; i < scheduler.count; ++i) {
    if (address < scheduler.stacks[i] && address >= scheduler.stacks[i] - page_bytes()) {
      snprintf(what, sizeof what, "a fiber's stack has overflowed");
    }
  }
  if (what[0] == 0 && scheduler.hooks.explain != nullptr) scheduler.hooks.explain(address, what, sizeof what);
  char message[512];
  snprintf(message, sizeof message, "touches address %p, which it may not%s%s", info->si_addr, what[0] != 0 ? ": " : "",
           what);
  set_error(current, message);
  abandon();
}

// Faults become errors while fibers run; who else handles signals (faulthandler) gets them back.
class Faults {
 public:
  Faults() {
    stack_t stack = {};
    stack.ss_sp = signal_stack;
    stack.ss_size = sizeof signal_stack;
    sigaltstack(&stack, &before_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // left by a jump, so never blocked
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &before_segv);
    sigaction(SIGBUS, &action, &before_bus);
  }
  Faults(const Faults&) = delete;
  Faults& operator=(const Faults&) = delete;
  ~Faults() {
    sigaction(SIGSEGV, &before_segv, nullptr);
    sigaction(SIGBUS, &before_bus, nullptr);
    sigaltstack(&before_stack_, nullptr);
  }

 private:
  stack_t before_stack_ = {};
};

bool run_all() {
  if (setjmp(scheduler.failed) != 0) {
    current = -1;
    return false;
  }
  current = next_ready();
  switch_context(scheduler.main, scheduler.fibers[current].context);
  current = -1;
  return true;
}

}  // namespace

bool run(int count, const Hooks& hooks) {
  Scheduler& s = scheduler;
  s.hooks = hooks;
  s.count = s.left = count;
  s.ready_count = s.ready_of[0] = s.ready_of[1] = 0;
  choose_slow();
  std::fill(std::begin(s.ready_bits), std::end(s.ready_bits), 0);
  s.error[0] = 0;
  if (count == 0) return true;
  if (count > kMostFibers) {
    set_error(-1, "too many fibers");
    return false;
  }
  for (int i = 0; i < count; ++i) {
    char* stack = stack_of(i);
    if (stack == nullptr) {
      set_error(-1, "no memory for a fiber's stack");
      return false;
    }
    // Stacks that begin at the same offset in their pages would share a few sets of the first-level cache.
    prepare(s.fibers[i].context, stack, stack + kStackBytes - (i % 16) * 256, entry);
    s.fibers[i].waiting = nullptr;
    s.fibers[i].done = false;
    push(i);
  }
  const Faults faults;
  return run_all();
}

const char* error() { return scheduler.error; }

void yield() {
  push(current);
  const int next = pop();
  if (next != current) resume(next);
}

void block(const char* what) {
  const int me = current;
  scheduler.fibers[me].waiting = what;
  const int next = next_ready();
  if (next != me) resume(next);
}

void fail(const char* format, ...) {
  char message[4096];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  set_error(current, message);
  abandon();
}

void wake(int fiber) {
  scheduler.fibers[fiber].waiting = nullptr;
  push(fiber);
}

const char* waits_for(int fiber) { return scheduler.fibers[fiber].waiting; }

void seed(uint64_t value) {
  scheduler.state = value * 0x9E3779B97F4A7C15U + 0xD1B54A32D192ED03U;
  if (scheduler.state == 0) scheduler.state = 1;
}
void set_order(Order order) { scheduler.order = order; }
Order order() { return scheduler.order; }

uint64_t random() {
  uint64_t x = scheduler.state;  // xorshift64*
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  scheduler.state = x;
  return x * 0x2545F4914F6CDD1DU;
}

}  // namespace fibers
