// What the attention kernels on warpgroup products share (sm_90a): parts of the work and their order, tiles of a head
// in shared memory, fragments.
//
// In a block one warpgroup asks for bulk copies, the others, its consumers, have 64 rows each of the part that the
// block makes at a time. A tile lies in columns of 64 with a 128-byte swizzle, each column with all of the tile's rows.
// A consumer's lane 4 g + t of warp w holds in element 4 j + 2 h + e of an accumulator row 16 w + g + 8 h, column 8 j +
// 2 t + e; two accumulator columns of 8 are, rounded to bf16, the left operand of the next product: scores never leave
// the registers.
#pragma once

namespace hopper {
// What a block makes at a time: some positions of a head of a sequence, of which there are `parts` such. The number of
// a part says where it stands among these. The longest come first, where they are not as long, but no other head's
// before those of `together` heads, whose tiles fit the L2 cache.
struct Part {
  int head, number;
  DEV Part(int at, int heads, int parts, int together) {
    int first = at / (together * parts) * together;
    int width = heads - first < together ? heads - first : together;
    at -= first * parts;
    number = at / width, head = first + at % width;
  }
};

#if GPU_HOPPER
constexpr int BOX = 64;                    // columns of a swizzled tile: 128 bytes

// A place in a ring, and whose turn of the ring it is.
template <int N> struct Slot {
  int stage = 0, parity = 0;
  DEV void advance() {
    if (++stage == N) stage = 0, parity ^= 1;
  }
};

template <bool VALUE> struct Constant { static constexpr bool value = VALUE; };

// One thread: rows from `row` on and W columns from `col` on of a map whose boxes have BOX_ROWS rows and 64 columns.
template <int W, int ROWS, int BOX_ROWS = ROWS>
DEV void load(bf16* to, const CUtensorMap* map, int col, int row, uint64_t* full) {
  mbar_expect_tx(full, ROWS * W * 2);
#pragma unroll
  for (int box = 0; box < W / BOX; box++)
#pragma unroll
    for (int part = 0; part < ROWS; part += BOX_ROWS)
      tma_load_2d(to + (box * ROWS + part) * BOX, map, col + box * BOX, row + part, full);
}
// A warp: the last `rest` rows of a tile become 0. Others read it after a proxy_fence_shared() and a barrier.
template <int W, int ROWS> DEV void clear_rest(bf16* tile, int rest, int lane) {
#pragma unroll
  for (int box = 0; box < W / BOX; box++)
#pragma unroll 1
    for (int piece = lane; piece < rest * 8; piece += 32)
      store_pack(tile + ((box + 1) * ROWS - rest) * BOX + piece * 8, Pack<bf16>{});
}

// The 16-byte piece of a tile with column 8 `piece` of a row.
template <int ROWS> DEV bf16* piece_of(bf16* tile, int row, int piece) {
  return tile + piece / 8 * ROWS * BOX + row * BOX + (piece % 8 ^ row % 8) * 8;
}

// Keeps the compiler from moving uses of products over a wait, up where they are still written, or down from under
// other products.
template <int N> DEV void settle(float (&products)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) forget(products[i]);
}
template <int N> DEV void round_pairs(uint32_t (&to)[N / 8][4], const float (&from)[N]) {
#pragma unroll
  for (int i = 0; i < N / 8; i++)
#pragma unroll
    for (int r = 0; r < 4; r++) to[i][r] = pack_bf16(from[8 * i + 2 * r], from[8 * i + 2 * r + 1]);
}
// acc += weights tile, with the tile's rows as what is summed over.
template <int W, int ROWS>
DEV void issue_gather(float (&acc)[W / 2], const uint32_t (&weights)[ROWS / 16][4], const bf16* tile) {
  uint64_t rows = wgmma_desc_mn(tile, ROWS * BOX * 2);
#pragma unroll
  for (int i = 0; i < ROWS / 16; i++) wgmma_64xNx16<W, 1>(acc, weights[i], wgmma_further(rows, i * 16 * BOX * 2), 1);
  wgmma_commit();
}

// Rows 16 warp to 16 warp + 15 of a consumer's accumulator to global memory, of which there are `rows`. By way of a
// tile of the same shape (its part of 64 rows), so that memory is written in 16-byte pieces.
template <int W, int ROWS>
DEV void write_rows(bf16* to, int64_t pitch, int rows, bf16* tile, const float (&acc)[W / 2], const float (&factors)[2],
                    int warp, int lane) {
  int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int j = 0; j < W / 8; j++)
      *reinterpret_cast<uint32_t*>(piece_of<ROWS>(tile, 16 * warp + g + 8 * h, j) + 2 * t) =
          pack_bf16(acc[4 * j + 2 * h] * factors[h], acc[4 * j + 2 * h + 1] * factors[h]);
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < 16 * W / 8; i += 32) {
    int row = 16 * warp + i / (W / 8), piece = i % (W / 8);
    if (row < rows) store_pack(to + row * pitch + piece * 8, load_pack(piece_of<ROWS>(tile, row, piece)));
  }
}
#endif
}  // namespace hopper
