// Both sides: descriptors, by which wgmma finds an operand of bf16 in shared memory. `emulator/wgmma.cpp` says how they
// are read.
//
// Operands lie in tiles with a 128-byte swizzle, as bulk loads leave them with a box of 64 columns: a row is 64
// elements, 8 rows are an atom of 1024 bytes, at a multiple of 1024. Along a row runs K (K-major), or M or N
// (MN-major).
#pragma once

DEV uint64_t wgmma_descriptor(const void* p, uint32_t leading_bytes, uint32_t stride_bytes) {
  const uint64_t start = (smem_addr(p) & 0x3FFFF) >> 4, leading = (leading_bytes & 0x3FFFF) >> 4,
                 stride = (stride_bytes & 0x3FFFF) >> 4;
  return start | leading << 16 | stride << 32 | 1ull << 62;
}
// K-major: `p` is the tile's start, or 32 bytes further for each 16 along K. Atoms follow each other along M or N.
DEV uint64_t wgmma_desc(const void* p) { return wgmma_descriptor(p, 16, 1024); }
// MN-major: `p` is the start of the row of the first k, a multiple of 8. Tiles of 64 columns along M or N lie
// `tile_bytes` apart.
DEV uint64_t wgmma_desc_mn(const void* p, uint32_t tile_bytes) { return wgmma_descriptor(p, tile_bytes, 1024); }
// Of the same layout, `bytes` further. Addresses are below 2^18, so the sum stays in its bits; one addition where a new
// descriptor takes five instructions, which count beside products of 32 cycles.
DEV uint64_t wgmma_further(uint64_t desc, uint32_t bytes) {
  return desc >> 32 << 32 | static_cast<uint32_t>(static_cast<uint32_t>(desc) + (bytes >> 4));
}
