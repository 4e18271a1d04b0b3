// What the two passes of attention's gradient on warpgroup products share (sm_90a): sizes of tiles, registers, left
// operands.
#pragma once

namespace hopper {
constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS);
constexpr int ROWS = 128;                  // keys (grad_kv) or queries (grad_q) of a part
constexpr int TILE = 64;                   // rows of a tile that is streamed, and of the boxes of every map
template <int W> constexpr int STAGES = W == 64 ? 5 : 3;   // of the ring of these

#if GPU_HOPPER
// Where the copying warps find their parts one after the other, they need more registers than where there is one.
template <bool SEVERAL> using Registers = RegisterShares<THREADS, SEVERAL ? 40 : 24, SEVERAL ? 232 : 240>;

constexpr int OWN = 1;                     // named barriers: one for each consumer's threads

// 64 rows of a part's tile as a left operand. Where registers allow they are HELD there: a product of 64 columns with
// both operands in shared memory takes all of its bandwidth.
template <int W, bool HELD> struct LeftRows {
  uint64_t rows;
  uint32_t held[W / 16][4];

  DEV void take(bf16* tile, int row, int lane) {
    rows = wgmma_desc(tile);
    if constexpr (HELD) {
#pragma unroll
      for (int i = 0; i < W / 16; i++) ldmatrix_x4(held[i], piece_of<ROWS>(tile, row + lane % 16, 2 * i + lane / 16));
    }
  }
  // products = rows tile^T, over the width.
  DEV void issue(float (&products)[TILE / 2], const bf16* tile) const {
    uint64_t cols = wgmma_desc(tile);
#pragma unroll
    for (int i = 0; i < W / 16; i++) {
      int column = i * 16 / BOX * BOX, at = i % (BOX / 16) * 16;
      uint64_t right = wgmma_further(cols, (column * TILE + at) * 2);
      if constexpr (HELD) wgmma_64xNx16<TILE>(products, held[i], right, i > 0);
      else wgmma_64xNx16<TILE>(products, wgmma_further(rows, (column * ROWS + at) * 2), right, i > 0);
    }
    wgmma_commit();
  }
};
#endif
}  // namespace hopper
