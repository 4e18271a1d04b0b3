// The ring through which tiles of both operands reach warpgroup products: steps of 64 k, laid down by bulk copies.
// Included by the kernels of sm_90a, after gemm.cuh.
//
// A box is 64 columns wide. Where k runs along an operand's rows it is as high as the tile, and else one step high, and
// a tile takes several.
#pragma once

struct Sizes { int m, n, k, k_part, parts; };

#if GPU_HOPPER
constexpr int TILE_M = 128, STEP = 64;
constexpr int BOX_BYTES = 64 * STEP * 2;                   // 64 rows of m or n by one step of k

// Where each step is: `full` once its bytes are there, `empty` once who reads it is done. And whose products come next,
// of two warpgroups that take turns.
template <int TILE_N> struct Ring {
  static constexpr int STAGES = TILE_N == 256 ? 4 : TILE_N == 192 ? 5 : 6;
  static constexpr int A_BYTES = TILE_M / 64 * BOX_BYTES, BYTES = A_BYTES + TILE_N / 64 * BOX_BYTES;
  uint64_t full[STAGES], empty[STAGES], next[2];
};

// A stage, and how often the ring has gone round as a parity: one number, for registers are dear.
template <int STAGES> struct Turn {
  int at = 0;
  DEV int stage() const { return at < STAGES ? at : at - STAGES; }
  DEV int parity() const { return at >= STAGES; }
  DEV void next() { at = at + 1 < 2 * STAGES ? at + 1 : 0; }
};

// The tiles and parts of k of all blocks; the first part's tiles come first. A block has items: every gridDim.x-th of
// them.
template <int TILE_N> struct Work {
  Sizes s;
  DEV int tiles_m() const { return (s.m + TILE_M - 1) / TILE_M; }
  DEV int tiles_n() const { return (s.n + TILE_N - 1) / TILE_N; }
  DEV int count() const { return tiles_m() * tiles_n() * s.parts; }
  DEV GemmTile tile(int index) const { return gemm_tile(index % (tiles_m() * tiles_n()), tiles_m(), tiles_n()); }
  DEV int part(int index) const { return index / (tiles_m() * tiles_n()); }
  DEV int index(int item) const { return (int)blockIdx.x + item * (int)gridDim.x; }
  // Steps of a block's items before this one: all parts but the last have as many.
  DEV int steps_before(int item) const {
    int whole = tiles_m() * tiles_n() * (s.parts - 1),
        of_whole = min(item, max(0, (whole - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x));
    return of_whole * (s.k_part / STEP) + (item - of_whole) * steps(s.parts - 1);
  }
  DEV int steps(int part) const { return (min(s.k - part * s.k_part, s.k_part) + STEP - 1) / STEP; }
};

// One step of an operand by its tensor map: `rows` of m or n from row0 on.
template <bool K_ROWS>
DEV void load_boxes(unsigned char* to, const CUtensorMap* map, int rows, int row0, int k0, uint64_t* full) {
  if constexpr (K_ROWS) tma_load_2d(to, map, k0, row0, full);
  else for (int i = 0; i < rows / 64; i++) tma_load_2d(to + i * BOX_BYTES, map, row0 + 64 * i, k0, full);
}

// The left operand by its tensor map. One thread loads it.
template <bool TRANSPOSED> struct Boxes {
  static constexpr bool COPIED = true;
  const CUtensorMap* map;

  DEV void prefetch() const { tma_prefetch_map(map); }
  DEV void load(unsigned char* to, int row0, int k0, uint64_t* full) const {
    load_boxes<!TRANSPOSED>(to, map, TILE_M, row0, k0, full);
  }
};

// What the first warpgroup does: fills the ring, tile after tile.
template <int TILE_N, bool B_TRANSPOSED, class Left>
DEV void produce(Ring<TILE_N>& ring, unsigned char* stages, const Left& a, const CUtensorMap* b,
                 const Work<TILE_N>& work) {
  typedef Ring<TILE_N> R;
  bool speaks = threadIdx.x == 0;
  if (Left::COPIED && !speaks) return;
  Turn<R::STAGES> turn;
  for (int item = 0, index; (index = work.index(item)) < work.count(); item++) {
    GemmTile tile = work.tile(index);
    int part = work.part(index), steps = work.steps(part);
    for (int step = 0; step < steps; step++, turn.next()) {
      unsigned char* to = stages + turn.stage() * R::BYTES;
      uint64_t* full = &ring.full[turn.stage()];
      int k0 = part * work.s.k_part + step * STEP;
      mbar_wait(&ring.empty[turn.stage()], turn.parity() ^ 1);
      if (speaks) {
        mbar_expect_tx(full, Left::COPIED ? R::BYTES : R::BYTES - R::A_BYTES);
        load_boxes<B_TRANSPOSED>(to + R::A_BYTES, b, TILE_N, tile.col * TILE_N, k0, full);
      }
      a.load(to, tile.row * TILE_M, k0, full);
    }
  }
}

// The sums of a warpgroup's BLOCKS times 64 rows over one part of k; the first of them are block `block` of the tile.
// When the last products are under way, one thread arrives at `after`, where that is not null.
template <int TILE_N, int BLOCKS, bool A_TRANSPOSED, bool B_TRANSPOSED>
DEV void multiply(float (&sums)[BLOCKS][TILE_N / 2], Ring<TILE_N>& ring, unsigned char* stages,
                  Turn<Ring<TILE_N>::STAGES>& turn, int steps, int block, uint64_t* after) {
  typedef Ring<TILE_N> R;
  bool speaks = threadIdx.x % 128 == 0;
  int before = 0;
  for (int step = 0; step < steps; step++, turn.next()) {
    mbar_wait(&ring.full[turn.stage()], turn.parity());
    const unsigned char *a = stages + turn.stage() * R::BYTES + block * BOX_BYTES,
                        *b = stages + turn.stage() * R::BYTES + R::A_BYTES;
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < STEP / 16; j++) {
      uint64_t right = B_TRANSPOSED ? wgmma_desc(b + j * 32) : wgmma_desc_mn(b + j * 2048, BOX_BYTES);
#pragma unroll
      for (int i = 0; i < BLOCKS; i++) {
        const unsigned char* rows = a + i * BOX_BYTES;
        uint64_t left = A_TRANSPOSED ? wgmma_desc_mn(rows + j * 2048, BOX_BYTES) : wgmma_desc(rows + j * 32);
        wgmma_64xNx16<TILE_N, A_TRANSPOSED, !B_TRANSPOSED>(sums[i], left, right, step + j > 0);
      }
    }
    wgmma_commit();
    if (step > 0) {
      wgmma_wait<1>();
      if (speaks) mbar_arrive(&ring.empty[before]);
    }
    before = turn.stage();
  }
  if (after && speaks) mbar_arrive(after);
  wgmma_wait<0>();
  if (speaks) mbar_arrive(&ring.empty[before]);
}
#endif
