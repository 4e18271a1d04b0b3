// Warpgroup products; the descriptors are read in wgmma.cpp.
#pragma once
#include "gpu_words.h"
#include "sim.h"

inline void wgmma_fence(GPU_HERE("wgmma.fence")) { sim::wgmma_fence(site); }
inline void wgmma_commit(GPU_HERE("wgmma.commit_group")) { sim::wgmma_commit(site); }
template <int N> inline void wgmma_wait(GPU_HERE("wgmma.wait_group")) { sim::wgmma_wait(N, site); }

template <int N, int A_MN = 0, int B_MN = 0>
inline void wgmma_64xNx16(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate, GPU_HERE("wgmma.mma_async")) {
  sim::wgmma({d, nullptr, a, b, N, A_MN, B_MN, accumulate}, site);
}
template <int N, int B_MN = 0>
inline void wgmma_64xNx16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate,
                          GPU_HERE("wgmma.mma_async")) {
  sim::wgmma({d, a, 0, b, N, 0, B_MN, accumulate}, site);
}

inline void wgmma_64x64x16(float (&d)[32], uint64_t a, uint64_t b, int accumulate, GPU_HERE("wgmma.mma_async")) {
  wgmma_64xNx16<64>(d, a, b, accumulate, site);
}

template <int REGISTERS> inline void setmaxnreg_dec() {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256);
}
template <int REGISTERS> inline void setmaxnreg_inc() {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256);
}
