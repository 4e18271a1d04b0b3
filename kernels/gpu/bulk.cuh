// Device side, sm_90a: mbarriers, the bulk copy engine, stmatrix, moving registers between warpgroups.
#pragma once

// An mbarrier: a phase is over after `count` arrivals and the bytes that these announced. The one that initializes it
// calls the fence and then lets others know by a barrier.
DEV void mbar_init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(smem_addr(bar)), "r"(count) : "memory");
}
DEV void mbar_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" : : : "memory");
}
DEV void mbar_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(smem_addr(bar)) : "memory");
}
// Arrives, and announces bytes.
DEV void mbar_expect_tx(uint64_t* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(smem_addr(bar)), "r"(bytes) : "memory");
}
// Until the phase of this parity is over: 0 for the first, 1 for the second, 0 for the third.
DEV void mbar_wait(uint64_t* bar, int parity) {
  asm volatile(
      "{\n.reg .pred over;\n"
      "AGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n@over bra OVER;\nbra AGAIN;\nOVER:\n}"
      :
      : "r"(smem_addr(bar)), "r"(parity)
      : "memory");
}
// Makes this thread's writes to shared memory visible to the copy engine and to wgmma, once others have met it at a
// barrier.
DEV void proxy_fence_shared() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

// A box of a matrix, with its first column `x` and row `y`, into shared memory; its bytes count toward `bar`. What lies
// outside is 0.
DEV void tma_load_2d(void* dst, const CUtensorMap* map, int x, int y, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2,%3}], [%4];"
      :
      : "r"(smem_addr(dst)), "l"(map), "r"(x), "r"(y), "r"(smem_addr(bar))
      : "memory");
}
// The same of a tensor of four axes, the innermost first: they lie in shared memory as in the tensor.
DEV void tma_load_4d(void* dst, const CUtensorMap* map, int c, int w, int h, int n, uint64_t* bar) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
               "{%2,%3,%4,%5}], [%6];"
               :
               : "r"(smem_addr(dst)), "l"(map), "r"(c), "r"(w), "r"(h), "r"(n), "r"(smem_addr(bar))
               : "memory");
}
// And back; what lies outside is not written. In groups of the issuing thread, which waits until the source may be
// overwritten (`_read`) or the writes are done.
DEV void tma_store_2d(const CUtensorMap* map, const void* src, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1,%2}], [%3];"
               :
               : "l"(map), "r"(x), "r"(y), "r"(smem_addr(src))
               : "memory");
}
DEV void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" : : : "memory"); }
template <int N> DEV void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(N) : "memory");
}
template <int N> DEV void tma_store_wait() { asm volatile("cp.async.bulk.wait_group %0;" : : "n"(N) : "memory"); }
DEV void tma_prefetch_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory"); }

// The reverse of ldmatrix.
DEV void stmatrix_x2(void* row, const uint32_t (&r)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};"
               :
               : "r"(smem_addr(row)), "r"(r[0]), "r"(r[1])
               : "memory");
}
DEV void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};"
               :
               : "r"(smem_addr(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
DEV void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};"
               :
               : "r"(smem_addr(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Registers per thread of the calling warpgroup, from now on: fewer, so that others can have more.
template <int REGISTERS> DEV void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(REGISTERS));
}
template <int REGISTERS> DEV void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(REGISTERS));
}
