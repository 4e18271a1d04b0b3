// Pieces of the convolutions in bf16 on the tensor cores: tiles in shared memory, warp-wide products. Included by gpu.cuh, on both sides.
//
// The kernels see tensors with their channels last and padded with zeros to a multiple of 8, so that what one asynchronous copy
// moves, 16 bytes, is a group of channels at one pixel: present or padding as a whole.
#pragma once

constexpr int GROUP = 8;                                     // channels of a 16-byte group
DEV int groups_of(int channels) { return (channels + GROUP - 1) / GROUP; }

// A convolution's product is cut into tiles of DOWN x ACROSS warps, each with ROWS x COLUMNS of the result in registers.
template <int DOWN_, int ACROSS_, int ROWS_, int COLUMNS_> struct WarpTiling {
  static constexpr int DOWN = DOWN_, ACROSS = ACROSS_, WARP_ROWS = ROWS_, WARP_COLUMNS = COLUMNS_;
  static constexpr int ROWS = DOWN * WARP_ROWS, COLUMNS = ACROSS * WARP_COLUMNS, THREADS = DOWN * ACROSS * 32;
  static DEV int first_row() { return threadIdx.x / 32 % DOWN * WARP_ROWS; }
  static DEV int first_column() { return threadIdx.x / 32 / DOWN * WARP_COLUMNS; }
};

// A warp's part of the result: 16 x 8 pieces, spread over lanes as mma.sync leaves them. Element e of piece (i, j) belongs to row
// 16 i + lane / 4 + e / 2 * 8 and column 8 j + lane % 4 * 2 + e % 2 of the warp's part.
template <class Tiling> struct WarpSum {
  float piece[Tiling::WARP_ROWS / 16][Tiling::WARP_COLUMNS / 8][4];

  // sum += a * b over 16 steps; `a_row(i)` is where this lane's row of the i-th 16 x 16 piece of a lies, `b_row(j)` of b.
  // TRANSPOSED: shared memory has steps outermost, and rows or columns along its rows.
  template <bool TRANSPOSED, class ARow, class BRow> DEV void multiply(ARow a_row, BRow b_row) {
    uint32_t a[Tiling::WARP_ROWS / 16][4];
#pragma unroll
    for (int i = 0; i < Tiling::WARP_ROWS / 16; i++) {
      if (TRANSPOSED) ldmatrix_x4_trans(a[i], a_row(i));
      else ldmatrix_x4(a[i], a_row(i));
    }
#pragma unroll
    for (int j = 0; j < Tiling::WARP_COLUMNS / 16; j++) {
      uint32_t b[4];
      if (TRANSPOSED) ldmatrix_x4_trans(b, b_row(j));
      else ldmatrix_x4(b, b_row(j));
      uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < Tiling::WARP_ROWS / 16; i++) {
        mma_16816(piece[i][2 * j], a[i], left);
        mma_16816(piece[i][2 * j + 1], a[i], right);
      }
    }
  }
};

// A tile with 32 steps (4 groups) along its rows of 64 bytes. Two rows share a pass over the banks; a group's place is xored with the
// number of the row pair, so that the 8 rows of a matrix that ldmatrix reads at one group lie in 8 different sixteens of bytes.
constexpr int NARROW_BYTES = 64;
DEV int narrow_at(int row, int group) { return row * NARROW_BYTES + (group ^ (row / 2 & 3)) * 16; }

// A tile with steps outermost: rows of `bytes`, a multiple of 128, with groups xored by the row within every 8.
DEV int wide_at(int row, int group, int bytes) { return row * bytes + (group ^ (row & 7)) * 16; }
