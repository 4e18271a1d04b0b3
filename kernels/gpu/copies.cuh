// Device side: cp.async, a thread's copies from global into shared memory, in groups that it waits for.
#pragma once

// 16 bytes go past the L1 cache; 4 and 8 cannot.
DEV void cp_async16(void* dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(smem_addr(dst)), "l"(src) : "memory");
}
DEV void cp_async8(void* dst, const void* src) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" : : "r"(smem_addr(dst)), "l"(src) : "memory");
}
DEV void cp_async4(void* dst, const void* src) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" : : "r"(smem_addr(dst)), "l"(src) : "memory");
}
// As much is written, of which the first `bytes` are copied and the rest is 0. `src` is not read where `bytes` is 0,
// but has to be aligned.
DEV void cp_async16_zfill(void* dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(smem_addr(dst)), "l"(src), "r"(bytes)
               : "memory");
}
DEV void cp_async8_zfill(void* dst, const void* src, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" : : "r"(smem_addr(dst)), "l"(src), "r"(bytes) : "memory");
}
DEV void cp_async4_zfill(void* dst, const void* src, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" : : "r"(smem_addr(dst)), "l"(src), "r"(bytes) : "memory");
}
DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }
// Until at most the N latest groups are on their way.
template <int N> DEV void cp_async_wait() { asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory"); }
