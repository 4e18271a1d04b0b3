// How batch normalization and its gradient are divided among blocks.
// Partial results come in two ways. Where a plane is large, there is one of them a channel and part: one block a channel
// and part, one warp at a time on a piece of a plane. Else there are HW: x is a matrix (N, C HW), 256 columns a block,
// one warp a row, 8 columns a lane. The elementwise pass goes from the end to the beginning, since L2 still has what was
// read last; forward it is divided in the same two ways.
#pragma once

constexpr int WARPS = 8;
constexpr int TILE = 256;    // columns a block; graph::COLUMN_TILE
constexpr int PIECE = 8192;  // elements of a plane that a warp takes at a time; graph::PLANE_PIECE
constexpr int AHEAD = 4;     // packs, or rows, that a thread has on their way at once
constexpr int PER_LANE = TILE / 32;
constexpr int THREADS = WARPS * 32;

// Elements of each of so many pieces of a plane: even, and their first elements at the same place in a 16-byte word.
DEV int piece_len(int positions, int pieces) { return ((positions + pieces - 1) / pieces + 7) / 8 * 8; }

// The part of channel blockIdx.x that blockIdx.y has, piece by piece: calls `piece(first element, elements)`, one warp
// a piece.
template <class F> DEV void each_piece(int64_t images, int channels, int positions, int64_t pieces_per_part, F piece) {
  int pieces = (positions + PIECE - 1) / PIECE, len = piece_len(positions, pieces);
  int64_t begin = blockIdx.y * pieces_per_part, end = begin + pieces_per_part;
  if (end > images * pieces) end = images * pieces;
  for (int64_t at = begin + threadIdx.x / 32; at < end; at += WARPS) {
    int64_t image = at / pieces;
    int from = (int)(at % pieces) * len, left = positions - from;
    if (left > 0) piece((image * channels + blockIdx.x) * positions + from, left < len ? left : len);
  }
}
