// Pieces of the convolutions in bf16 on the tensor cores: tiles in shared memory, the ring that they pass through,
// warp-wide products and the end of a tile.
#pragma once

constexpr int GROUP = 8;  // elements of a 16-byte group: what one asynchronous copy moves
DEV int groups_of(int elems) { return (elems + GROUP - 1) / GROUP; }
DEV void copy_group(void* to, const bf16* from, bool there) { cp_async16_zfill(to, from, there ? 16 : 0); }

// Blocks of 4 warps; 32 steps of the product at a time, in a ring of 4 stages: three on their way hide a read of
// memory.
constexpr int MMA_THREADS = 128, STAGES = 4, STAGE_STEPS = 32, STAGE_GROUPS = STAGE_STEPS / GROUP;

// A block's tile is cut into DOWN x ACROSS warps, each with ROWS x COLUMNS of the result in registers.
template <int DOWN_, int ACROSS_, int ROWS_, int COLUMNS_> struct WarpTiling {
  static constexpr int DOWN = DOWN_, ACROSS = ACROSS_, WARP_ROWS = ROWS_, WARP_COLUMNS = COLUMNS_;
  static constexpr int ROWS = DOWN * WARP_ROWS, COLUMNS = ACROSS * WARP_COLUMNS;
  static constexpr int PLAIN_BYTES = ROWS * STAGE_STEPS * 2, STAGE_BYTES = (ROWS + COLUMNS) * STAGE_STEPS * 2;
  static DEV int first_row() { return threadIdx.x / 32 % DOWN * WARP_ROWS; }
  static DEV int first_column() { return threadIdx.x / 32 / DOWN * WARP_COLUMNS; }
};
using Square = WarpTiling<2, 2, 64, 64>;                     // 128 x 128
using Flat = WarpTiling<1, 4, 64, 64>;                       // 64 x 256, for few rows
using Small = WarpTiling<2, 2, 32, 32>;  // 64 x 64, where larger tiles would leave multiprocessors idle

// A narrow tile has its steps along rows of 64 bytes. Two rows share a pass over the banks; a group's place is xored
// with the number of the row pair, so that the 8 rows of a matrix that ldmatrix reads at one group lie in 8 different
// sixteens of bytes. 16 rows further the permutation is the same; 2 groups further is place ^ 32.
constexpr int NARROW_BYTES = STAGE_STEPS * 2;
DEV int narrow_at(int row, int group) { return row * NARROW_BYTES + (group ^ (row / 2 & 3)) * 16; }

// A wide tile has its steps outermost, in rows of `bytes`, a multiple of 128: groups are xored by the row within every
// 8. 16 rows further the permutation is the same; 2 i groups further, i < 4, is place ^ 32 i.
DEV int wide_at(int row, int group, int bytes) { return row * bytes + (group ^ (row & 7)) * 16; }

// A warp's part of the result: 16 x 8 pieces, spread over lanes as mma.sync leaves them. Element e of piece (i, j)
// belongs to row 16 i + lane / 4 + e / 2 * 8 and column 8 j + lane % 4 * 2 + e % 2 of the warp's part.
template <class Tiling> struct WarpSum {
  float piece[Tiling::WARP_ROWS / 16][Tiling::WARP_COLUMNS / 8][4];

  // sum += plain * gathered over one stage: the plain tile lies first, then the gathered one; each narrow or wide.
  template <bool PLAIN_WIDE, bool GATHERED_WIDE> DEV void multiply(const unsigned char* stage) {
    constexpr int PLAIN_ROW = Tiling::ROWS * 2, GATHERED_ROW = Tiling::COLUMNS * 2;
    int lane = threadIdx.x % 32;
    const unsigned char* gathered = stage + Tiling::PLAIN_BYTES;
    int plain_at = PLAIN_WIDE ? wide_at(lane / 16 * 8 + lane % 8, Tiling::first_row() / GROUP + lane / 8 % 2, PLAIN_ROW)
                              : narrow_at(Tiling::first_row() + lane % 16, lane / 16);
    int gathered_at = GATHERED_WIDE ? wide_at(lane % 16, Tiling::first_column() / GROUP + lane / 16, GATHERED_ROW)
                                    : narrow_at(Tiling::first_column() + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int half = 0; half < 2; half++) {                   // of 16 steps each
      uint32_t a[Tiling::WARP_ROWS / 16][4];
#pragma unroll
      for (int i = 0; i < Tiling::WARP_ROWS / 16; i++) {
        if (PLAIN_WIDE) ldmatrix_x4_trans(a[i], stage + (plain_at ^ i * 32) + half * 16 * PLAIN_ROW);
        else ldmatrix_x4(a[i], stage + (plain_at ^ half * 32) + i * 16 * NARROW_BYTES);
      }
#pragma unroll
      for (int j = 0; j < Tiling::WARP_COLUMNS / 16; j++) {
        uint32_t b[4];
        if (GATHERED_WIDE) ldmatrix_x4_trans(b, gathered + (gathered_at ^ j * 32) + half * 16 * GATHERED_ROW);
        else ldmatrix_x4(b, gathered + (gathered_at ^ half * 32) + j * 16 * NARROW_BYTES);
        // The matrices of a narrow tile come as (column, step), those of a wide one as (step, column): both in the
        // order of b.
        uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < Tiling::WARP_ROWS / 16; i++) {
          mma_16816(piece[i][2 * j], a[i], left);
          mma_16816(piece[i][2 * j + 1], a[i], right);
        }
      }
    }
  }
};

// Calls load(step), which starts the copies of 32 steps into stage step % STAGES, three stages ahead of multiply(step).
template <class Load, class Multiply> DEV void run_ring(int steps, Load load, Multiply multiply) {
  for (int step = 0; step < STAGES - 1; step++) {
    if (step < steps) load(step);
    cp_async_commit();
  }
  for (int step = 0; step < steps; step++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();                                         // this stage is full, and the one before it is free
    if (step + STAGES - 1 < steps) load(step + STAGES - 1);
    cp_async_commit();
    multiply(step);
  }
  cp_async_wait<0>();
  __syncthreads();
}

// Writes a finished tile of bf16 (rows, PITCH) in units of as many pixels as fit in a Unit.
template <class Tiling, int PITCH, class Unit>
DEV void store_tile(bf16* target, const bf16* tile, const Place* columns, int rows, int64_t plane) {
  constexpr int PIXELS = sizeof(Unit) / sizeof(bf16), ACROSS = Tiling::COLUMNS / PIXELS;
  for (int index = threadIdx.x; index < Tiling::ROWS * ACROSS; index += MMA_THREADS) {
    int row = index / ACROSS, column = index % ACROSS * PIXELS;
    if (row >= rows || columns[column].row < 0) continue;
    bf16* to = target + columns[column].offset + row * plane;
    *reinterpret_cast<Unit*>(to) = *reinterpret_cast<const Unit*>(tile + row * PITCH + column);
  }
}

// Adds the bias, rounds, and writes the tile's target pixels, NCHW, through shared memory: along rows of the image, 16
// bytes a store where planes are whole groups. `shared` and `columns`, a place for each of the tile's columns, are
// overwritten; they do not overlap.
template <class Tiling>
DEV void finish_tile(bf16* target, const bf16* bias, const WarpSum<Tiling>& sum, const GatherTile& tile,
                     unsigned char* shared, Place* columns) {
  constexpr int PITCH = Tiling::COLUMNS + GROUP;  // 4 banks further a row: the lanes of a piece do not collide
  const Gather& g = tile.gather;
  bf16* finished = reinterpret_cast<bf16*>(shared);
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Tiling::WARP_ROWS / 16; i++) {
#pragma unroll
    for (int below = 0; below < 2; below++) {
      int row = Tiling::first_row() + i * 16 + lane / 4 + below * 8;
      float add = bias && tile.channel + row < g.channels ? to_float(bias[tile.channel + row]) : 0.0f;
#pragma unroll
      for (int j = 0; j < Tiling::WARP_COLUMNS / 8; j++) {
        bf16* at = finished + row * PITCH + Tiling::first_column() + j * 8 + lane % 4 * 2;
        at[0] = from_float<bf16>(sum.piece[i][j][below * 2] + add);
        at[1] = from_float<bf16>(sum.piece[i][j][below * 2 + 1] + add);
      }
    }
  }
  for (int column = threadIdx.x; column < Tiling::COLUMNS; column += MMA_THREADS) {
    int64_t pixel = tile.pixel + column;
    columns[column] = {g.target(pixel_at(pixel, g.rows, g.cols)), pixel < g.columns() ? 0 : NOWHERE, 0};
  }
  __syncthreads();
  int64_t plane = (int64_t)g.height * g.width;
  int rows = g.channels - tile.channel;
  target += tile.channel * plane;
  if (g.apart == 1 && plane % GROUP == 0) store_tile<Tiling, PITCH, Pack<bf16>>(target, finished, columns, rows, plane);
  else if (g.apart == 1 && plane % 2 == 0) store_tile<Tiling, PITCH, uint32_t>(target, finished, columns, rows, plane);
  else store_tile<Tiling, PITCH, bf16>(target, finished, columns, rows, plane);
}

// Writes a tile of one part of the weight gradient: partials (rows, columns) f32 of that part, columns a whole number
// of groups.
template <class Tiling>
DEV void finish_partials(float* partials, const WarpSum<Tiling>& sum, int first_row, int rows, int first_column,
                         int64_t columns) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Tiling::WARP_ROWS / 16; i++) {
#pragma unroll
    for (int j = 0; j < Tiling::WARP_COLUMNS / 8; j++) {
#pragma unroll
      for (int below = 0; below < 2; below++) {
        int row = first_row + Tiling::first_row() + i * 16 + lane / 4 + below * 8;
        int column = first_column + Tiling::first_column() + j * 8 + lane % 4 * 2;
        if (row >= rows || column >= columns) continue;
        const float* pair = sum.piece[i][j] + below * 2;
        *reinterpret_cast<float2*>(partials + row * columns + column) = {pair[0], pair[1]};
      }
    }
  }
}
