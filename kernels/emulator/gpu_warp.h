// What the lanes of a warp do together: shuffles, votes, matrix fragments.
#pragma once
#include <cstring>

#include "gpu_numbers.h"
#include "sim.h"

inline void __syncwarp(uint32_t mask = ~0u, GPU_HERE("__syncwarp")) {
  sim::warp_collective(mask, nullptr, nullptr, site);
}

// ---- shuffles of any value of up to 8 bytes
namespace sim {
struct Shuffle {
  uint64_t in, out;
  int source;
};
inline GPU_QUIET void shuffle(void** args, uint32_t mask) {
  for (uint32_t left = mask; left; left &= left - 1) {
    Shuffle& s = *static_cast<Shuffle*>(args[__builtin_ctz(left)]);
    if (!(mask >> s.source & 1)) fail("a shuffle reads lane %d, which is not in the mask %08x", s.source, mask);
    s.out = static_cast<Shuffle*>(args[s.source])->in;
  }
}
template <class T> GPU_QUIET inline T shuffle(uint32_t mask, T value, int source, const Site& site) {
  static_assert(sizeof(T) <= 8);
  Shuffle s{0, 0, source};
  memcpy(&s.in, &value, sizeof value);
  warp_collective(mask, shuffle, &s, site);
  memcpy(&value, &s.out, sizeof value);
  return value;
}
}  // namespace sim
// Within segments of `width` lanes; a lane that would read beyond its segment reads itself.
template <class T>
GPU_QUIET inline T __shfl_sync(uint32_t mask, T v, int from, int width = 32, GPU_HERE("__shfl_sync")) {
  const int lane = static_cast<int>(sim::cur->lane);
  return sim::shuffle(mask, v, (lane & ~(width - 1)) | (from & (width - 1)), site);
}
template <class T>
GPU_QUIET inline T __shfl_xor_sync(uint32_t mask, T v, int apart, int width = 32, GPU_HERE("__shfl_xor_sync")) {
  const int lane = static_cast<int>(sim::cur->lane), from = lane ^ apart;
  return sim::shuffle(mask, v, from > (lane | (width - 1)) ? lane : from, site);
}
template <class T>
GPU_QUIET inline T __shfl_up_sync(uint32_t mask, T v, uint32_t by, int width = 32, GPU_HERE("__shfl_up_sync")) {
  const int lane = static_cast<int>(sim::cur->lane), from = lane - static_cast<int>(by);
  return sim::shuffle(mask, v, from < (lane & ~(width - 1)) ? lane : from, site);
}
template <class T>
GPU_QUIET inline T __shfl_down_sync(uint32_t mask, T v, uint32_t by, int width = 32, GPU_HERE("__shfl_down_sync")) {
  const int lane = static_cast<int>(sim::cur->lane), from = lane + static_cast<int>(by);
  return sim::shuffle(mask, v, from > (lane | (width - 1)) ? lane : from, site);
}

// ---- votes
namespace sim {
struct Vote {
  uint32_t yes, all;
};
GPU_QUIET inline uint32_t vote(uint32_t mask, int predicate, const Site& site) {
  Vote v{predicate != 0, 0};
  warp_collective(
      mask,
      [](void** args, uint32_t members) GPU_QUIET {
        uint32_t all = 0;
        for (uint32_t left = members; left; left &= left - 1)
          all |= static_cast<Vote*>(args[__builtin_ctz(left)])->yes << __builtin_ctz(left);
        for (uint32_t left = members; left; left &= left - 1) static_cast<Vote*>(args[__builtin_ctz(left)])->all = all;
      },
      &v, site);
  return v.all;
}
}  // namespace sim
inline uint32_t __ballot_sync(uint32_t mask, int predicate, GPU_HERE("__ballot_sync")) {
  return sim::vote(mask, predicate, site);
}
inline int __any_sync(uint32_t mask, int predicate, GPU_HERE("__any_sync")) {
  return sim::vote(mask, predicate, site) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, GPU_HERE("__all_sync")) {
  return sim::vote(mask, !predicate, site) == 0;
}

// ---- matrix fragments: 8 x 8 matrices of 16-bit elements, one or more at once. Lane 8 i + r gives the address of row
// r of matrix i. A lane holds in register i the elements (l / 4, 2 (l % 4)) and the next of matrix i, or of its
// transpose.
namespace sim {
struct Rows {
  uint32_t* regs;
  uint16_t row[8];
};

template <bool TRANS>
inline int fragment_index(int lane, int e,
                          int& row) {  // the row that element e of a register is in, and its place there
  const int a = lane / 4, b = lane % 4 * 2 + e;
  row = TRANS ? b : a;
  return TRANS ? a : b;
}
inline void check_row(const void* row, const Site& site) {
  if (reinterpret_cast<uintptr_t>(row) % 16)
    fail("%s at %s:%d: a row is not 16-byte aligned", site.what, site.file, site.line);
  shared_offset(row);
}
template <int COUNT, bool TRANS> inline void load_matrices(uint32_t* regs, const void* row, const Site& site) {
  Rows mine{regs, {}};
  if (cur->lane < 8 * COUNT) {  // each lane reads its own row, so that the checkers see who reads what
    check_row(row, site);
    for (int i = 0; i < 8; i++) mine.row[i] = static_cast<const uint16_t*>(row)[i];
  }
  warp_collective(
      ~0u,
      [](void** args, uint32_t) GPU_QUIET {
        for (int lane = 0; lane < 32; lane++)
          for (int m = 0; m < COUNT; m++) {
            uint32_t pair = 0;
            for (int e = 0; e < 2; e++) {
              int r;
              const int c = fragment_index<TRANS>(lane, e, r);
              pair |= static_cast<uint32_t>(static_cast<Rows*>(args[8 * m + r])->row[c]) << 16 * e;
            }
            static_cast<Rows*>(args[lane])->regs[m] = pair;
          }
      },
      &mine, site);
}
template <int COUNT, bool TRANS> inline void store_matrices(void* row, const uint32_t* regs, const Site& site) {
  Rows mine{const_cast<uint32_t*>(regs), {}};
  warp_collective(
      ~0u,
      [](void** args, uint32_t) GPU_QUIET {
        for (int lane = 0; lane < 32; lane++)
          for (int m = 0; m < COUNT; m++)
            for (int e = 0; e < 2; e++) {
              int r;
              const int c = fragment_index<TRANS>(lane, e, r);
              static_cast<Rows*>(args[8 * m + r])->row[c] =
                  static_cast<uint16_t>(static_cast<Rows*>(args[lane])->regs[m] >> 16 * e);
            }
      },
      &mine, site);
  if (cur->lane >= 8 * COUNT) return;
  check_row(row, site);
  for (int i = 0; i < 8; i++) static_cast<uint16_t*>(row)[i] = mine.row[i];
}
}  // namespace sim
inline void ldmatrix_x1(uint32_t& r, const void* row, GPU_HERE("ldmatrix")) {
  sim::load_matrices<1, false>(&r, row, site);
}
inline void ldmatrix_x1_trans(uint32_t& r, const void* row, GPU_HERE("ldmatrix.trans")) {
  sim::load_matrices<1, true>(&r, row, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, GPU_HERE("ldmatrix")) {
  sim::load_matrices<2, false>(r, row, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, GPU_HERE("ldmatrix.trans")) {
  sim::load_matrices<2, true>(r, row, site);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, GPU_HERE("ldmatrix")) {
  sim::load_matrices<4, false>(r, row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, GPU_HERE("ldmatrix.trans")) {
  sim::load_matrices<4, true>(r, row, site);
}
inline void stmatrix_x2(void* row, const uint32_t (&r)[2], GPU_HERE("stmatrix")) {
  sim::store_matrices<2, false>(row, r, site);
}
inline void stmatrix_x4(void* row, const uint32_t (&r)[4], GPU_HERE("stmatrix")) {
  sim::store_matrices<4, false>(row, r, site);
}
inline void stmatrix_x4_trans(void* row, const uint32_t (&r)[4], GPU_HERE("stmatrix.trans")) {
  sim::store_matrices<4, true>(row, r, site);
}

inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], GPU_HERE("mma.sync")) {
  sim::mma_16816_bf16(d, a, b, site);
}
inline void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], GPU_HERE("mma.sync")) {
  sim::mma_1688_tf32(d, a, b, site);
}
