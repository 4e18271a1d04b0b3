// What the compiler calls at memory accesses of kernels compiled with -fsanitize=thread. Its own library is not linked.
#include <cstring>

#include "race.h"

using sim::race::access;

extern "C" {
// Called when instrumented code is loaded.
void __tsan_init() { sim::race::on = true; }

void __tsan_read1(void* p) { access(p, 1, false); }
void __tsan_read2(void* p) { access(p, 2, false); }
void __tsan_read4(void* p) { access(p, 4, false); }
void __tsan_read8(void* p) { access(p, 8, false); }
void __tsan_read16(void* p) { access(p, 16, false); }
void __tsan_write1(void* p) { access(p, 1, true); }
void __tsan_write2(void* p) { access(p, 2, true); }
void __tsan_write4(void* p) { access(p, 4, true); }
void __tsan_write8(void* p) { access(p, 8, true); }
void __tsan_write16(void* p) { access(p, 16, true); }
void __tsan_unaligned_read2(void* p) { access(p, 2, false); }
void __tsan_unaligned_read4(void* p) { access(p, 4, false); }
void __tsan_unaligned_read8(void* p) { access(p, 8, false); }
void __tsan_unaligned_read16(void* p) { access(p, 16, false); }
void __tsan_unaligned_write2(void* p) { access(p, 2, true); }
void __tsan_unaligned_write4(void* p) { access(p, 4, true); }
void __tsan_unaligned_write8(void* p) { access(p, 8, true); }
void __tsan_unaligned_write16(void* p) { access(p, 16, true); }
void __tsan_volatile_read1(void* p) { access(p, 1, false); }
void __tsan_volatile_read2(void* p) { access(p, 2, false); }
void __tsan_volatile_read4(void* p) { access(p, 4, false); }
void __tsan_volatile_read8(void* p) { access(p, 8, false); }
void __tsan_volatile_read16(void* p) { access(p, 16, false); }
void __tsan_volatile_write1(void* p) { access(p, 1, true); }
void __tsan_volatile_write2(void* p) { access(p, 2, true); }
void __tsan_volatile_write4(void* p) { access(p, 4, true); }
void __tsan_volatile_write8(void* p) { access(p, 8, true); }
void __tsan_volatile_write16(void* p) { access(p, 16, true); }
void __tsan_read_range(void* p, unsigned long bytes) { access(p, bytes, false); }
void __tsan_write_range(void* p, unsigned long bytes) { access(p, bytes, true); }

void* __tsan_memcpy(void* to, const void* from, unsigned long bytes) {
  access(from, bytes, false);
  access(to, bytes, true);
  return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, unsigned long bytes) {
  access(from, bytes, false);
  access(to, bytes, true);
  return memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, unsigned long bytes) {
  access(to, bytes, true);
  return memset(to, value, bytes);
}

void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// The only atomics that instrumented code has are the guards of static variables.
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
}
