// Switching fibers; see fiber.h.
#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

extern "C" void sim_switch(void** save_sp, void* load_sp);
asm(R"(.text
.globl sim_switch
.hidden sim_switch
.type sim_switch,@function
sim_switch:
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
  popq %rcx
  jmpq *%rcx
.size sim_switch,.-sim_switch
)");

namespace sim {

constexpr size_t PAGE = 4096;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK_BYTES = 256 << 10;  // red zones around every local array
#else
constexpr size_t STACK_BYTES = 64 << 10;
#endif

void Stacks::give(Fiber& fiber, unsigned number) {
  while (stacks.size() <= number) {
    void* m =
        mmap(nullptr, STACK_BYTES + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) {
      perror("emulator: no memory for a stack");
      abort();
    }
    mprotect(m, PAGE, PROT_NONE);
    stacks.push_back(static_cast<char*>(m) + PAGE);
  }
  fiber.stack = stacks[number];
  fiber.stack_bytes = STACK_BYTES;
}

void Fiber::prepare(void (*body)(), unsigned number) {
  // A body that ended left at most its own frame behind; one that was abandoned, anything.
  const size_t used = abandoned ? stack_bytes : 2 * PAGE;
  ASAN_UNPOISON_MEMORY_REGION(stack + stack_bytes - used, used);
  abandoned = false;
  // Stacks start at different places of their pages: at one and the same, they would share a few lines of the cache.
  void** top = reinterpret_cast<void**>(stack + stack_bytes - number % 12 * 320) - 2;
  *top = reinterpret_cast<void*>(body);
  for (int callee_saved = 0; callee_saved < 6; callee_saved++) *--top = nullptr;
  sp = top;
}

void Fiber::adopt_native_stack() {
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attr;
  void* lowest = nullptr;
  if (pthread_getattr_np(pthread_self(), &attr) == 0) {
    pthread_attr_getstack(&attr, &lowest, &stack_bytes);
    pthread_attr_destroy(&attr);
  }
  stack = static_cast<char*>(lowest);
#endif
}

void switch_fiber(Fiber& from, Fiber& to, bool forever) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(forever ? nullptr : &from.fake, to.stack, to.stack_bytes);
  sim_switch(&from.sp, to.sp);
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#else
  (void)forever;
  sim_switch(&from.sp, to.sp);
#endif
}

void fiber_entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace sim
