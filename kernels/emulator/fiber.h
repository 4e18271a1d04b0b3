// A fiber: a stack of its own, and where it stopped.
//
// x86-64 System V only: a switch saves the callee-saved registers and changes stacks, in about 2 ns. AddressSanitizer
// is told.
#pragma once
#include <cstddef>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace sim {

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;  // lowest byte, above a guard page
  size_t stack_bytes = 0;
  void* fake = nullptr;  // AddressSanitizer's
  bool abandoned = true;  // whether its last body was left in the middle

  // Makes the next switch to this fiber call `body`, which must not return.
  void prepare(void (*body)(), unsigned number);
  // Takes the stack of a fiber that has ended, or that goes on as this one.
  void trade_stacks(Fiber& other) {
    std::swap(stack, other.stack);
    std::swap(abandoned, other.abandoned);
  }
  // Describes the stack that the operating system gave this thread.
  void adopt_native_stack();
};

// Leaves `from`, which goes on when somebody switches to it; `forever` if nobody will.
void switch_fiber(Fiber& from, Fiber& to, bool forever = false);
// To be called first in a fiber's body.
void fiber_entered();

// Stacks, handed out by number and kept for the next block.
class Stacks {
 public:
  void give(Fiber& fiber, unsigned number);

 private:
  std::vector<char*> stacks;
};

}  // namespace sim
