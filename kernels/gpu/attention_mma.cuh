// Tiles, fragments and products of the bf16 attention kernels on tensor cores (mma.sync m16n8k16, f32 accumulation).
//
// A warp has 16 M rows of a tile (queries, or keys where d_k and d_v are made) and all of its N columns. Its lane 4 g +
// t holds of acc[m][n] the elements (row 16 m + g + 8 h, column 8 n + 2 t + e) at 2 h + e. Two accumulators side by
// side are, rounded to bf16, the left operand of the next product: weights never leave the registers.
// Tiles lie in shared memory in rows of W + 8 elements: a row is an odd number of 16-byte pieces, so that the 8 rows
// that ldmatrix reads at a time, straight or transposed, are in different banks.
#pragma once

namespace tensor {

template <int W> constexpr int PITCH = W + 8;

// What a lane is within its warp.
struct Lane {
  int lane, g, t;
  DEV Lane() : lane(threadIdx.x % 32), g(lane / 4), t(lane % 4) {}
};

// Rows of a matrix into a tile; rows from `rows` on and columns from `cols` on become 0. The columns are whole 16-byte
// pieces. Not unrolled: the addresses would take registers that the products need.
template <int W, int ROWS, int THREADS>
DEV void load_tile(bf16* to, const bf16* from, int64_t pitch, int rows, int cols) {
  constexpr int PIECES = W / 8;
  static_assert(ROWS * PIECES % THREADS == 0, "threads have as many pieces each");
#pragma unroll 1
  for (int i = 0; i < ROWS * PIECES / THREADS; i++) {
    int piece = i * THREADS + threadIdx.x, row = piece / PIECES, col = piece % PIECES * 8;
    bool inside = row < rows && col < cols;
    cp_async16_zfill(to + row * PITCH<W> + col, inside ? from + row * pitch + col : from, inside ? 16 : 0);
  }
}

// The left operand of a product: rows `row` to `row + 15`, summed over columns `k` to `k + 15`.
template <int W> DEV void load_rows(uint32_t (&a)[4], const bf16* tile, int row, int k, const Lane& at) {
  ldmatrix_x4(a, tile + (row + at.lane % 16) * PITCH<W> + k + at.lane / 16 * 8);
}
// The right operand of two products where the tile's rows are columns of the product: rows `col` to `col + 15`.
template <int W> DEV void load_cols(uint32_t (&b)[4], const bf16* tile, int col, int k, const Lane& at) {
  ldmatrix_x4(b, tile + (col + at.lane / 16 * 8 + at.lane % 8) * PITCH<W> + k + at.lane / 8 % 2 * 8);
}
// And where they are what is summed over: rows `k` to `k + 15`, columns `col` to `col + 15`.
template <int W> DEV void load_cols_trans(uint32_t (&b)[4], const bf16* tile, int k, int col, const Lane& at) {
  ldmatrix_x4_trans(b, tile + (k + at.lane % 16) * PITCH<W> + col + at.lane / 16 * 8);
}
DEV void multiply_two(float (&left)[4], float (&right)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
  mma_16816(left, a, first);
  mma_16816(right, a, second);
}

// The rows of a tile as left operands, for all of its width.
template <int W, int M> struct RowFragments {
  uint32_t a[W / 16][M][4];
  DEV void load(const bf16* tile, const Lane& at) {
#pragma unroll
    for (int k = 0; k < W / 16; k++)
#pragma unroll
      for (int m = 0; m < M; m++) load_rows<W>(a[k][m], tile, 16 * m, 16 * k, at);
  }
};

template <int M, int N> DEV void clear(float (&acc)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) acc[m][n][i] = 0;
}

// acc = rows cols^T over the width, with the rows in registers
template <int W, int M, int N>
DEV void products(float (&acc)[M][N][4], const RowFragments<W, M>& rows, const bf16* cols, const Lane& at) {
  clear(acc);
#pragma unroll
  for (int k = 0; k < W / 16; k++)
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      load_cols<W>(b, cols, 8 * n, 16 * k, at);
#pragma unroll
      for (int m = 0; m < M; m++) multiply_two(acc[m][n], acc[m][n + 1], rows.a[k][m], b);
    }
}
// The same with the rows in shared memory.
template <int W, int M, int N>
DEV void products(float (&acc)[M][N][4], const bf16* rows, const bf16* cols, const Lane& at) {
  clear(acc);
#pragma unroll 2
  for (int k = 0; k < W / 16; k++) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; m++) load_rows<W>(a[m], rows, 16 * m, 16 * k, at);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      load_cols<W>(b, cols, 8 * n, 16 * k, at);
#pragma unroll
      for (int m = 0; m < M; m++) multiply_two(acc[m][n], acc[m][n + 1], a[m], b);
    }
  }
}
// acc += weights from, summed over the tile's rows
template <int W, int M, int N>
DEV void gather(float (&acc)[M][W / 8][4], const float (&weights)[M][N][4], const bf16* from, const Lane& at) {
#pragma unroll
  for (int k = 0; k < N; k += 2) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        a[m][i] = pack_bf16(weights[m][k + i / 2][i % 2 * 2], weights[m][k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < W / 8; n += 2) {
      uint32_t b[4];
      load_cols_trans<W>(b, from, 8 * k, 8 * n, at);
#pragma unroll
      for (int m = 0; m < M; m++) multiply_two(acc[m][n], acc[m][n + 1], a[m], b);
    }
  }
}

// The four lanes of a row lie side by side.
DEV float quad_max(float v) {
  for (int apart = 2; apart > 0; apart /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, apart));
  return v;
}
DEV float quad_sum(float v) {
  for (int apart = 2; apart > 0; apart /= 2) v += __shfl_xor_sync(~0u, v, apart);
  return v;
}

// A warp's rows times `factors`, by way of its own rows of a tile, so that memory is written in 16-byte pieces.
template <int W, int M>
DEV void write_rows(bf16* to, int64_t pitch, int rows, int cols, bf16* tile, const float (&acc)[M][W / 8][4],
                    const float (&factors)[M][2], const Lane& at) {
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < W / 8; n++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        *reinterpret_cast<uint32_t*>(tile + (16 * m + at.g + 8 * h) * PITCH<W> + 8 * n + 2 * at.t) =
            pack_bf16(acc[m][n][2 * h] * factors[m][h], acc[m][n][2 * h + 1] * factors[m][h]);
  __syncwarp();
  constexpr int PIECES = W / 8;
#pragma unroll 4
  for (int i = at.lane; i < 16 * M * PIECES; i += 32) {
    int row = i / PIECES, col = i % PIECES * 8;
    if (row < rows && col < cols) store_pack(to + row * pitch + col, load_pack(tile + row * PITCH<W> + col));
  }
}

// Scores of keys that a query does not see become minus infinity: of those after it, and that are not there. Rows are
// queries, `query` the first; `key` is the first column.
template <int M, int N>
DEV void hide_by_query(float (&w)[M][N][4], const AttentionSizes& s, int query, int key, const Lane& at) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int seen = keys_seen(s, query + 16 * m + at.g + 8 * h + 1) - key - 2 * at.t;
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (8 * n + e >= seen) w[m][n][2 * h + e] = NOTHING;
    }
}
// And of those that the mask hides, of which the lanes have loaded their own.
template <int M, int N> DEV void hide_masked(float (&w)[M][N][4], Shown<8 * N>& shown, const Lane& at) {
  shown.vote();
  if (shown.all()) return;
#pragma unroll
  for (int n = 0; n < N; n++)
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (shown.hides(n, at.t, e))
#pragma unroll
        for (int m = 0; m < M; m++) w[m][n][e] = w[m][n][2 + e] = NOTHING;
}
// Causal: rows are keys, and columns queries.
template <int M, int N> DEV void hide_by_key(float (&w)[M][N][4], int query, int key, const Lane& at) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      // The first query that sees the key.
      int first = key + 16 * m + at.g + 8 * h - query - 2 * at.t;
#pragma unroll
      for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 2; e++)
          if (8 * n + e < first) w[m][n][2 * h + e] = NOTHING;
    }
}

// Which weights dropout keeps. Four keys share a block of random words, and the lanes that hold them share out the
// blocks. acc[m][n][i] is kept if bit 4 n + i of kept[m] is set. Here rows are queries, the first `row` among all (B,
// H, Tq).
template <int M, int N>
DEV void draw_by_query(uint32_t (&kept)[M], const AttentionSizes& s, const Now* now, int64_t row, int key,
                       const Lane& at) {
#pragma unroll
  for (int m = 0; m < M; m++) {
    static_assert(N <= 8, "a register has the bits of 8");
    uint32_t mine = 0;
    int64_t query = row + 16 * m + at.g + at.t % 2 * 8;
#pragma unroll 1
    for (int n = 0; n < N; n++) mine |= kept_of_4(s, now, query * s.keys + key + 8 * n + at.t / 2 * 4) << 4 * n;
    kept[m] = 0;
#pragma unroll
    for (int h = 0; h < 2; h++)
      kept[m] |= (__shfl_sync(~0u, mine, at.lane / 2 * 2 + h) >> at.t % 2 * 2 & 0x33333333u) << 2 * h;
  }
}
// And here keys, and `row` is the first column's.
template <int M, int N>
DEV void draw_by_key(uint32_t (&kept)[M], const AttentionSizes& s, const Now* now, int64_t row, int key,
                     const Lane& at) {
#pragma unroll
  for (int m = 0; m < M; m++) {
    static_assert(N <= 8, "a register has the bits of 8");
    uint32_t mine = 0;
    int own = at.g % 4;
    int64_t query = row + 2 * at.t + own % 2;
#pragma unroll 1
    for (int n = 0; n < N; n++)
      mine |= kept_of_4(s, now, (query + 8 * n) * s.keys + key + 16 * m + own / 2 * 8 + at.g / 4 * 4) << 4 * n;
    kept[m] = 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
      kept[m] |= (__shfl_sync(~0u, mine, at.lane / 16 * 16 + 4 * i + at.t) >> own & 0x11111111u) << i;
  }
}

// A block's tile of `ROWS` positions. Later tiles, which see the most keys when causal, come first. `part_again` is the
// same, made from the block's number anew, for the end of a kernel: so it takes no registers in the loop before.
template <int ROWS> struct Part {
  int batch, head, first;
  DEV Part(int heads, int positions, uint32_t block = blockIdx.x) {
    int tiles = (positions + ROWS - 1) / ROWS, at = block;
    first = (tiles - 1 - at % tiles) * ROWS, at /= tiles;
    head = at % heads, batch = at / heads;
  }
};

template <int ROWS> DEV Part<ROWS> part_again(int heads, int positions) {
  uint32_t block = blockIdx.x;
  forget(block);
  return Part<ROWS>(heads, positions, block);
}

}  // namespace tensor
