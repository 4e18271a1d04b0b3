// Tiles of a bf16 operand in shared memory, as mma_16816 reads them: how they get there and how fragments are taken.
//
// A tile is 128 rows (of m or n) by 32 k, in words of 16 bytes. K_ROWS: k runs along the rows of memory; a word is 8 k
// of a row, 4 words make a row, and word w of row r lies at 4 r + (w ^ (r / 2 % 4)): any 8 rows' words of one w fall
// into 8 different groups of banks. Otherwise a word is 8 rows of one k, 16 words make a k, and word w of k lies at 16
// k + (w ^ (k % 8)), with the same effect.
#pragma once

constexpr int MMA_TILE = 128, MMA_STEP = 32, MMA_WORDS = MMA_TILE * MMA_STEP / 8;

// One thread's share of an operand's tiles, of THREADS threads: WORDS words of each tile. RAGGED: rows may start
// anywhere.
template <bool K_ROWS, int THREADS, bool RAGGED> struct MmaOperand {
  static constexpr int WORDS = MMA_WORDS / THREADS;
  static constexpr int APART = K_ROWS ? THREADS / (MMA_STEP / 8) : THREADS / (MMA_TILE / 8); // rows or k between them
  const bf16* from; // the operand, where nothing is read
  const bf16* at;   // the first word of the next tile
  int pitch, rows_left, k_left, place;
  int shift; // of every word of this thread: they lie multiples of 16 bytes apart
  ShiftedWord held[RAGGED ? WORDS : 1];

  DEV MmaOperand(const bf16* operand, int row0, int rows, int k0, int k_end, int row_pitch)
      : from(operand), pitch(row_pitch) {
    int thread = threadIdx.x, row = K_ROWS ? thread / 4 : thread % 16 * 8, k = K_ROWS ? thread % 4 * 8 : thread / 16;
    rows_left = rows - row0 - row, k_left = k_end - k0 - k;
    at = operand + (K_ROWS ? (int64_t)(row0 + row) * pitch + k0 + k : (int64_t)(k0 + k) * pitch + row0 + row);
    shift = ShiftedWord::shift_of(at);
    place =
        K_ROWS ? thread / 4 * 4 + (thread % 4 ^ thread / 8 % 4) : thread / 16 * 16 + (thread % 16 ^ thread / 16 % 8);
  }

  // Bytes that are there of word i of the tile that lies `k_ahead` k before the next one.
  DEV int bytes(int i, int k_ahead) const {
    int along_k = k_left + k_ahead, across = (K_ROWS ? rows_left : along_k) - i * APART,
        along = K_ROWS ? along_k : rows_left;
    return across > 0 ? 2 * max(0, min(along, 8)) : 0;
  }

  DEV bool aligned() const { return !RAGGED || pitch % 8 == 0; }

  // Sets off for the next tile; with aligned rows straight to `tile`, else to registers.
  DEV void start(uint4* tile) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      int there = bytes(i, 0);
      const bf16* word = at + (int64_t)pitch * (i * APART);
      if (aligned()) cp_async16_zfill(tile + place + i * THREADS, there ? word : from, there);
      else held[RAGGED ? i : 0].fetch(word, shift, there);
    }
    at += K_ROWS ? MMA_STEP : (int64_t)pitch * MMA_STEP;
    k_left -= MMA_STEP;
  }

  // Puts into `tile` what start() has in registers.
  DEV void arrive(uint4* tile) const {
    if (aligned()) return;
#pragma unroll
    for (int i = 0; i < WORDS; i++) tile[place + i * THREADS] = held[RAGGED ? i : 0].value(shift, bytes(i, MMA_STEP));
  }
};

// Where a lane finds its rows of fragments (16 rows, 16 k) of a tile; `row0` is where the warp's rows start, a multiple
// of `ROWS`.
template <bool K_ROWS, int ROWS> struct MmaFragments {
  int first;

  DEV explicit MmaFragments(int row0) {
    int lane = threadIdx.x % 32, row = row0 + lane % 16, k = lane % 8 + lane / 16 * 8;
    first = K_ROWS ? row * 4 + (lane / 16 ^ row / 2 % 4) : k * 16 + ((row0 / 8 + lane / 8 % 2) ^ k % 8);
  }

  // Register 0: rows 0-7, k 0-7; 1: rows 8-15, k 0-7; 2: rows 0-7, k 8-15; 3: rows 8-15, k 8-15; of rows 16 i, k 16 j.
  DEV void take(uint32_t (&r)[4], const uint4* tile, int i, int j) const {
    static_assert(ROWS == 64 || ROWS == 32, "2 i may not carry beyond the bits that are 0 in row0 / 8");
    if (K_ROWS) ldmatrix_x4(r, tile + ((first ^ 2 * j) + 64 * i));
    else ldmatrix_x4_trans(r, tile + ((first ^ 2 * i) + 256 * j));
  }
};
