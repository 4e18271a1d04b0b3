// What the two passes of attention's gradient on warpgroup products share (sm_90a): which parts a block makes, left operands, rings.
#pragma once

namespace hopper {
constexpr int ROWS = 128;                  // keys (grad_kv) or queries (grad_q) of a part
constexpr int TILE = 64;                   // rows of a tile that is streamed, and of the boxes of every map
template <int W> constexpr int STAGES = W == 64 ? 5 : 3;   // of the ring of these

// What a block makes at a time: 128 positions of a head of a sequence. The number of a part says where it stands among all; the longest come
// first, where they are not as long, but no other head's before those of `together` heads, whose tiles fit the L2 cache.
struct Part {
  int head, number;
  DEV Part(int at, int heads, int positions, int together) {
    int parts = (positions + ROWS - 1) / ROWS, first = at / (together * parts) * together;
    int width = heads - first < together ? heads - first : together;
    at -= first * parts;
    number = at / width, head = first + at % width;
  }
};

#if GPU_HOPPER
// Where the copying warps find their parts one after the other, they need more registers than where there is one.
template <bool SEVERAL> struct Registers {
  static constexpr int PRODUCER = SEVERAL ? 40 : PRODUCER_REGISTERS, CONSUMER = SEVERAL ? 232 : CONSUMER_REGISTERS;
};

constexpr int OWN = 1;                     // named barriers: one for each consumer's threads

// A place in a ring, and whose turn of the ring it is.
template <int N> struct Slot {
  int stage = 0, parity = 0;
  DEV void advance() {
    if (++stage == N) stage = 0, parity ^= 1;
  }
};

template <bool VALUE> struct Constant { static constexpr bool value = VALUE; };

// 64 rows of a part's tile as a left operand. Where registers allow they are HELD there: a product of 64 columns with both operands in shared
// memory takes all of its bandwidth.
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
