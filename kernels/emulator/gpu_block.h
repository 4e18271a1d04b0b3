// What the threads of a block do together: barriers, asynchronous copies, mbarriers, bulk copies.
#pragma once
#include "gpu_words.h"
#include "sim.h"
#include "tensor_map.h"

using CUtensorMap = sim::TensorMap;

inline void __syncthreads(GPU_HERE("__syncthreads")) { sim::bar_sync(0, 0, site); }
inline void bar_sync(int id, int threads, GPU_HERE("bar.sync")) { sim::bar_sync(id, threads, site); }
inline void bar_arrive(int id, int threads, GPU_HERE("bar.arrive")) { sim::bar_arrive(id, threads, site); }

// ---- cp.async
namespace sim {
template <int BYTES> inline void copy_async(void* dst, const void* src, int from_source, const Site& site) {
  for (int i = 0; i < from_source / 4; i++) {  // touched by this thread, so that the checkers see it
    const uint32_t seen = static_cast<const volatile uint32_t*>(src)[i];
    (void)seen;
  }
  cp_async(dst, src, BYTES, from_source, site);
}
}  // namespace sim
inline void cp_async4(void* dst, const void* src, GPU_HERE("cp.async")) { sim::copy_async<4>(dst, src, 4, site); }
inline void cp_async8(void* dst, const void* src, GPU_HERE("cp.async")) { sim::copy_async<8>(dst, src, 8, site); }
inline void cp_async16(void* dst, const void* src, GPU_HERE("cp.async")) { sim::copy_async<16>(dst, src, 16, site); }
inline void cp_async4_zfill(void* dst, const void* src, int bytes, GPU_HERE("cp.async")) {
  sim::copy_async<4>(dst, src, bytes, site);
}
inline void cp_async8_zfill(void* dst, const void* src, int bytes, GPU_HERE("cp.async")) {
  sim::copy_async<8>(dst, src, bytes, site);
}
inline void cp_async16_zfill(void* dst, const void* src, int bytes, GPU_HERE("cp.async")) {
  sim::copy_async<16>(dst, src, bytes, site);
}
inline void cp_async_commit() { sim::cp_async_commit(); }
template <int N> inline void cp_async_wait() { sim::cp_async_wait(N); }

// ---- mbarrier
inline void mbar_init(uint64_t* bar, int count) { sim::mbar_init(bar, count); }
inline void mbar_init_fence() { sim::mbar_init_fence(); }
inline void mbar_arrive(uint64_t* bar, GPU_HERE("mbarrier.arrive")) { sim::mbar_arrive(bar, 0, site); }
inline void mbar_expect_tx(uint64_t* bar, int bytes, GPU_HERE("mbarrier.arrive.expect_tx")) {
  sim::mbar_arrive(bar, bytes, site);
}
inline void mbar_wait(uint64_t* bar, int parity, GPU_HERE("mbarrier.try_wait")) { sim::mbar_wait(bar, parity, site); }
inline void proxy_fence_shared() { sim::proxy_fence(); }

// ---- bulk copies
inline void tma_prefetch_map(const CUtensorMap*) {}
inline void tma_load_2d(void* dst, const CUtensorMap* map, int x, int y, uint64_t* bar, GPU_HERE("bulk load")) {
  sim::tma_load(dst, *map, 2, {x, y, 0, 0}, bar, site);
}
inline void tma_load_4d(void* dst, const CUtensorMap* map, int c, int w, int h, int n, uint64_t* bar,
                        GPU_HERE("bulk load")) {
  sim::tma_load(dst, *map, 4, {c, w, h, n}, bar, site);
}
inline void tma_store_2d(const CUtensorMap* map, const void* src, int x, int y, GPU_HERE("bulk store")) {
  sim::tma_store(*map, src, x, y, site);
}
inline void tma_store_commit() { sim::tma_store_commit(); }
template <int N> inline void tma_store_wait_read() { sim::tma_store_wait(N); }
template <int N> inline void tma_store_wait() { sim::tma_store_wait(N); }
