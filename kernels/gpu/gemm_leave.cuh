// How sums leave the registers of a warpgroup. Included by the kernels of sm_90a, after gemm.cuh.
//
// A warp sends its sums off 16 rows by 32 columns at a time. Of such a piece a lane has v[4 j + 2 h + e] at (lane / 4 + 8 h, 8 j + lane % 4 * 2 + e), as
// wgmma leaves them. f32 goes straight to memory: four lanes write 32 bytes of a row, a whole sector. bf16 changes lanes by way of shared memory, so that
// four lanes write 64 bytes; what joins the sums, a residual or what an activation was given, comes the same way, asked for a piece ahead. Rows that
// 16-byte words do not fit go element by element.
#pragma once

#if GPU_HOPPER
constexpr int PIECE = 32, PITCH = PIECE + 8;               // columns of a piece; as f32 its rows are staged 8 banks apart
constexpr int BIAS_BYTES = 256 * 2;                        // the bias of a tile's columns, for a warp by itself
constexpr int STAGED_BYTES = 16 * PITCH * 4 + BIAS_BYTES;  // of a warp; two stages of bf16 take less

// A warp's copy of the bias of a tile's columns, made before the products: to wait for it beside each piece takes as long as the piece.
template <int TILE_N> DEV void stage_bias(const GemmEnd<bf16>& end, unsigned char* staged, int col0) {
  uint32_t* to = reinterpret_cast<uint32_t*>(staged + STAGED_BYTES - BIAS_BYTES);
  int lane = threadIdx.x % 32;
  __syncwarp(); // the last tile's has been read
#pragma unroll
  for (int c = 2 * lane; c < TILE_N; c += 64) {
    int64_t col = col0 + c;
    uint32_t pair = 0;
    if (end.bias && col < end.n) {
      if (end.n % 2 == 0) pair = *reinterpret_cast<const uint32_t*>(end.bias + col);
      else pair = pack_bf16(end.bias_at(col), col + 1 < end.n ? end.bias_at(col + 1) : 0.0f);
    }
    to[c / 2] = pair;
  }
  __syncwarp();
}
// Parameters' gradients, which are f32, have none.
template <int TILE_N> DEV void stage_bias(const GemmEnd<float>&, unsigned char*, int) {}

// The bias of a lane's columns of a piece.
template <class Out> struct PieceBias;
template <> struct PieceBias<bf16> {
  uint32_t words[PIECE / 8];

  DEV PieceBias(const unsigned char* staged, int col) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(staged + STAGED_BYTES - BIAS_BYTES);
    for (int j = 0; j < PIECE / 8; j++) words[j] = from[col / 2 + 4 * j];
  }
  DEV float at(int k) const { return k % 2 ? unpack_bf16(words[k / 4]).y : unpack_bf16(words[k / 4]).x; } // of v[k]
};
template <> struct PieceBias<float> {
  DEV PieceBias(const unsigned char*, int) {}
  DEV float at(int) const { return 0; }
};

// What is left of an output from a piece's first element on.
struct Rest { int rows, cols; };

// f32, to rows `pitch` apart. Of a lane's two rows, what is there already is read before any of it is written, so that one wait is enough.
DEV void leave_floats(float* to, int lane, int64_t pitch, bool add, const float (&v)[PIECE / 2], Rest rest) {
  int row = lane / 4, col = lane % 4 * 2;
  bool pairs = pitch % 2 == 0;
  rest.rows -= row, rest.cols -= col;
  to += row * pitch + col;
#pragma unroll
  for (int h = 0; h < 2; h++, to += 8 * pitch) {
    if (8 * h >= rest.rows) return;
    if (pairs) {
      float2 old[PIECE / 8] = {};
      if (add)
        for (int j = 0; j < PIECE / 8; j++)
          if (8 * j < rest.cols) old[j] = *reinterpret_cast<const float2*>(to + 8 * j);
      for (int j = 0; j < PIECE / 8; j++)
        if (8 * j < rest.cols)
          *reinterpret_cast<float2*>(to + 8 * j) = make_float2(v[4 * j + 2 * h] + old[j].x, v[4 * j + 2 * h + 1] + old[j].y);
    } else {
      for (int i = 0; i < PIECE / 4; i++) {
        int at = i / 2 * 8 + i % 2;
        if (at < rest.cols) to[at] = v[i / 2 * 4 + 2 * h + i % 2] + (add ? to[at] : 0.0f);
      }
    }
  }
}

// A piece rounded to bf16, into a stage and, when the lanes have met, out of it to rows that start at multiples of 16 bytes. Word w of row r is at
// 4 r + (w ^ (r / 2 % 4)): eight rows of one word, and two rows, lie in different banks.
constexpr int STAGE_WORDS = 16 * PIECE / 8;
DEV void stage_words(uint4* staged, int lane, const float (&v)[PIECE / 2]) {
  int row = lane % 16;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint32_t words[4] = {pack_bf16(v[8 * half], v[8 * half + 1]), pack_bf16(v[8 * half + 2], v[8 * half + 3]),
                               pack_bf16(v[8 * half + 4], v[8 * half + 5]), pack_bf16(v[8 * half + 6], v[8 * half + 7])};
    stmatrix_x4(staged + row * 4 + ((2 * half + lane / 16) ^ (row / 2 % 4)), words);
  }
}
DEV void leave_words(bf16* to, int lane, int64_t pitch, const uint4* staged, Rest rest) {
  int row = lane / 4, word = lane % 4;
  const uint4* mine = staged + row * 4 + (word ^ (row / 2 % 4));
  const uint4 upper = mine[0], lower = mine[STAGE_WORDS / 2];
  to += row * pitch + 8 * word;
  if (8 * word >= rest.cols) return;
  if (row < rest.rows) store16(to, upper);
  if (row + 8 < rest.rows) store16(to + 8 * pitch, lower);
}

// What joins a piece, from memory to a stage, and out of it when it has come and the lanes have met.
DEV void fetch_words(uint4* staged, int lane, const bf16* from, int64_t pitch, Rest rest) {
  int row = lane / 4, word = lane % 4;
  uint4* mine = staged + row * 4 + (word ^ (row / 2 % 4));
  from += row * pitch + 8 * word;
  if (8 * word >= rest.cols) return;
  if (row < rest.rows) cp_async16(mine, from);
  if (row + 8 < rest.rows) cp_async16(mine + STAGE_WORDS / 2, from + 8 * pitch);
}
// Puts a piece in the place of what joins it: of what the activation was given, or, where there is none, of what is added.
DEV void join_words(uint4* staged, int lane, const float (&v)[PIECE / 2], int activation) {
  int row = lane % 16;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t words[4];
    uint4* place = staged + row * 4 + ((2 * half + lane / 16) ^ (row / 2 % 4));
    ldmatrix_x4(words, place);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float2 other = unpack_bf16(words[i]);
      float sums[2] = {v[8 * half + 2 * i], v[8 * half + 2 * i + 1]}, others[2] = {other.x, other.y};
      if (activation == ACTIVATION_NONE) sums[0] += other.x, sums[1] += other.y;
      else through_each(activation, sums, others);
      words[i] = pack_bf16(sums[0], sums[1]);
    }
    __syncwarp();
    stmatrix_x4(place, words);
  }
}

// What joins the sums by words: null where nothing does, or not so.
DEV const bf16* joins(const GemmEnd<bf16>& end) {
  return end.partials || !end.octets() || (end.pre && end.addend) ? nullptr : end.reads_pre() ? end.pre : end.addend;
}

// Asks for what joins a piece; the last of them, of nothing, included. Pieces take turns with two stages.
DEV void fetch(const GemmEnd<bf16>& end, int lane, int64_t row, int64_t col, bool there, unsigned char* staged, int piece) {
  const bf16* from = joins(end);
  if (!from) return;
  __syncwarp(); // the piece that was in that stage has left
  if (there && row < end.m && col < end.n)
    fetch_words(reinterpret_cast<uint4*>(staged) + piece % 2 * STAGE_WORDS, lane, from + row * end.pitch + col, end.pitch, {(int)(end.m - row), (int)(end.n - col)});
  cp_async_commit();
}
// Parameters' gradients have no more to join than what is there.
DEV void fetch(const GemmEnd<float>&, int, int64_t, int64_t, bool, unsigned char*, int) {}

// One element after the other; a lane has a column.
template <class Out> DEV void leave_elements(const GemmEnd<Out>& end, int lane, int64_t row0, int64_t col0, const float (&v)[PIECE / 2], Rest rest, float* staged, bool biased) {
  __syncwarp();
#pragma unroll
  for (int j = 0; j < PIECE / 8; j++)
#pragma unroll
    for (int h = 0; h < 2; h++)
      *reinterpret_cast<float2*>(staged + (lane / 4 + 8 * h) * PITCH + j * 8 + lane % 4 * 2) = make_float2(v[4 * j + 2 * h], v[4 * j + 2 * h + 1]);
  __syncwarp();
  if (lane >= rest.cols) return;
  float bias = biased ? 0.0f : end.bias_at(col0 + lane);
#pragma unroll 1
  for (int row = 0; row < min(rest.rows, 16); row++) end.put(row0 + row, col0 + lane, staged[row * PITCH + lane] + bias);
}

DEV void leave(const GemmEnd<float>& end, int lane, int64_t row, int64_t col, float (&v)[PIECE / 2], Rest rest, float*, int) {
  if (end.partials) leave_floats(end.partials + row * end.n + col, lane, end.n, false, v, rest);
  else leave_floats(end.out + row * end.pitch + col, lane, end.pitch, end.addend != nullptr, v, rest);
}
DEV void leave(const GemmEnd<bf16>& end, int lane, int64_t row, int64_t col, float (&v)[PIECE / 2], Rest rest, float* staged, int piece) {
  if (end.partials) {
    leave_floats(end.partials + row * end.n + col, lane, end.n, false, v, rest);
    return;
  }
  uint4* first = reinterpret_cast<uint4*>(staged);
  int64_t at = row * end.pitch + col;
  if (joins(end)) {
    uint4* stage = first + piece % 2 * STAGE_WORDS;
    cp_async_wait<1>(); // all but the next piece's
    __syncwarp();
    join_words(stage, lane, v, end.reads_pre() ? end.activation - ACTIVATION_GRAD : ACTIVATION_NONE);
    __syncwarp();
    leave_words(end.out + at, lane, end.pitch, stage, rest);
  } else if (end.addend || !end.octets()) {
    leave_elements(end, lane, row, col, v, rest, staged, true);
  } else {
    uint4* out = first + STAGE_WORDS;
    __syncwarp(); // the piece before has left
    if (end.pre) stage_words(first, lane, v);
    activate_each(end.activation, v);
    stage_words(out, lane, v);
    __syncwarp();
    if (end.pre) leave_words(end.pre + at, lane, end.pitch, first, rest);
    leave_words(end.out + at, lane, end.pitch, out, rest);
  }
}

// A piece of the sums, the bias added. Registers have no index.
template <int I, int BLOCKS, int HALF, class Bias>
DEV void take_piece(float (&v)[PIECE / 2], const float (&sums)[BLOCKS][HALF], const Bias& bias, int piece) {
  if constexpr (I + 1 < BLOCKS * HALF / (PIECE / 2))
    if (piece != I) return take_piece<I + 1>(v, sums, bias, piece);
#pragma unroll
  for (int k = 0; k < PIECE / 2; k++) v[k] = sums[I % BLOCKS][I / BLOCKS * PIECE / 2 + k] + bias.at(k);
}

// Asks for what joins a piece of leave_all.
template <int BLOCKS, int WARPS, class End>
DEV void fetch_piece(const End& end_of, int part, unsigned char* staged, int row0, int col0, int piece, int pieces) {
  forget(part);
  uint32_t thread = thread_again();
  int lane = thread % 32, warp = thread / 32 - 4;
  fetch(end_of(part), lane, row0 + (warp & (WARPS - 1)) * 16 + piece % BLOCKS * 64, col0 + piece / BLOCKS * PIECE, piece < pieces,
        staged + warp * STAGED_BYTES, piece);
}

// The sums of the warps from the fifth on: each has 16 rows of each of BLOCKS blocks of 64, WARPS of them one beneath the other from row0 on, and TILE_N
// columns from col0 on. Sums take most registers: what becomes of them, `end_of(part)`, and addresses are made anew for each piece.
template <int BLOCKS, int TILE_N, int WARPS, class End>
DEV void leave_all(const float (&sums)[BLOCKS][TILE_N / 2], const End& end_of, int part, unsigned char* staged, int row0, int col0) {
  constexpr int PIECES = BLOCKS * TILE_N / PIECE;
  fetch_piece<BLOCKS, WARPS>(end_of, part, staged, row0, col0, 0, PIECES);
#pragma unroll 1
  for (int piece = 0; piece < PIECES; piece++) {
    fetch_piece<BLOCKS, WARPS>(end_of, part, staged, row0, col0, piece + 1, PIECES);
    forget(part);
    auto end = end_of(part);
    uint32_t thread = thread_again();
    int lane = thread % 32, warp = thread / 32 - 4;
    int row = row0 + (warp & (WARPS - 1)) * 16 + piece % BLOCKS * 64, col = col0 + piece / BLOCKS * PIECE;
    if (col >= end.n) break;
    float v[PIECE / 2];
    take_piece<0>(v, sums, PieceBias<typename decltype(end)::Element>(staged + warp * STAGED_BYTES, piece / BLOCKS * PIECE + lane % 4 * 2), piece);
    if (row < end.m) leave(end, lane, row, col, v, {(int)end.m - row, (int)end.n - col}, reinterpret_cast<float*>(staged + warp * STAGED_BYTES), piece);
  }
  cp_async_wait<0>(); // for nothing, but a thread may not end before
}
#endif
