// Column sums that are made beside a product whose operand they sum: the gradient of a bias beside that of its weight.
// Included by gemm_hopper.cu.
//
// Of the warpgroup that asks for copies one thread works. Its other three warps read the operand from memory once more,
// where the product's own copies have it in the L2 or will soon have it there; so they touch neither the ring nor its
// barriers, and the multiplying warps know nothing of them.
//   x (rows, cols) bf16, rows `pitch` apart, a multiple of 8; partials (parts, cols) f32, which column_sum_finish adds
//   in order.
// A warp takes 256 columns of a part of the rows, 8 columns a lane, rows one after the other. The order depends on
// shapes alone (graph::beside_parts); which warp takes what changes no bit. Rows come by cp.async, a lane's into a
// place of its own, for registers are the others'.
#pragma once

// A null x: nothing is summed.
struct Beside {
  const bf16* x;
  float* partials;
  int rows, cols, pitch, parts, part_rows;
};

#if GPU_HOPPER
constexpr int BESIDE_WARPS = 3, BESIDE_TILE = 256;
constexpr int BESIDE_GROUPS = 4, BESIDE_ROWS = 4;   // of the ring of a warp, and of a group of copies
constexpr int BESIDE_BYTES = BESIDE_WARPS * BESIDE_GROUPS * BESIDE_ROWS * BESIDE_TILE * 2;

// A lane's columns of the next group of rows, of which `left` are there.
DEV void fetch_rows(uint4* to, const bf16*& at, int64_t pitch, int left) {
#pragma unroll
  for (int r = 0; r < BESIDE_ROWS; r++) {
    cp_async16_zfill(to + r * 32, at, r < left ? 16 : 0);
    if (r < left) at += pitch;
  }
  cp_async_commit();
}

// The second warp of a block to the fourth, with BESIDE_BYTES of shared memory.
DEV void sum_beside(const Beside& s, unsigned char* shared) {
  if (!s.x) return;
  int warp = (int)threadIdx.x / 32 - 1, lane = threadIdx.x % 32, tiles = (s.cols + BESIDE_TILE - 1) / BESIDE_TILE;
  uint4* ring = reinterpret_cast<uint4*>(shared) + warp * (BESIDE_GROUPS * BESIDE_ROWS * 32) + lane;
  for (int unit = (int)blockIdx.x * BESIDE_WARPS + warp; unit < tiles * s.parts;
       unit += (int)gridDim.x * BESIDE_WARPS) {
    int part = unit / tiles, col = unit % tiles * BESIDE_TILE + lane * 8,
        left = min(s.rows - part * s.part_rows, s.part_rows);
    if (col >= s.cols) continue;
    const bf16* at = s.x + (int64_t)part * s.part_rows * s.pitch + col;
    Octet sums = {};
#pragma unroll 1
    for (int group = 0; group < BESIDE_GROUPS - 1; group++)
      fetch_rows(ring + group * BESIDE_ROWS * 32, at, s.pitch, left - group * BESIDE_ROWS);
#pragma unroll 1
    for (int group = 0; left > 0; group = (group + 1) % BESIDE_GROUPS, left -= BESIDE_ROWS) {
      fetch_rows(ring + (group + BESIDE_GROUPS - 1) % BESIDE_GROUPS * BESIDE_ROWS * 32, at, s.pitch,
                 left - (BESIDE_GROUPS - 1) * BESIDE_ROWS);
      cp_async_wait<BESIDE_GROUPS - 1>();
#pragma unroll
      for (int r = 0; r < BESIDE_ROWS; r++) {
        Octet row = load_octet(reinterpret_cast<const bf16*>(ring + (group * BESIDE_ROWS + r) * 32));
#pragma unroll
        for (int i = 0; i < 8; i++) sums.v[i] += row.v[i];
      }
    }
    float* to = s.partials + (int64_t)part * s.cols + col;
    if (s.cols % 8 == 0) {
      store_octet(to, sums);
    } else {
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (col + i < s.cols) to[i] = sums.v[i];
    }
    cp_async_wait<0>(); // for zeros, but they may not land on the next part's rows
  }
}
#endif
