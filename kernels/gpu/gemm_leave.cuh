// How sums leave the registers of a warpgroup. Included by the kernels of sm_90a, after gemm.cuh.
//
// A warp sends its sums off 16 rows by 32 columns at a time. Of such a piece a lane has v[4 j + 2 h + e] at (lane / 4 +
// 8 h, 8 j + lane % 4 * 2 + e), as wgmma leaves them. f32 goes straight to memory: four lanes write 32 bytes of a row,
// a whole sector. bf16 changes lanes by way of shared memory, so that four lanes write 64 bytes; what joins the sums, a
// residual or what an activation was given, comes the same way, asked for a piece ahead. Rows that 16-byte words do not
// fit go element by element.
#pragma once

#if GPU_HOPPER
constexpr int PIECE = 32, PITCH = PIECE + 8;  // columns of a piece; as f32 its rows are staged 8 banks apart
constexpr int BIAS_BYTES = 256 * 2;                        // the bias of a tile's columns, for a warp by itself
constexpr int STAGED_BYTES = 16 * PITCH * 4 + BIAS_BYTES;  // of a warp; two stages of bf16 take less

// A warp's copy of the bias of a tile's columns, made before the products: to wait for it beside each piece takes as
// long as the piece.
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

// The bias of a lane's columns of a piece, of which the first two are that word.
template <class Out> struct PieceBias;
template <> struct PieceBias<bf16> {
  uint32_t words[PIECE / 8];

  DEV PieceBias(const unsigned char* staged, int word) {
    const uint32_t* from = reinterpret_cast<const uint32_t*>(staged) + word;
    for (int j = 0; j < PIECE / 8; j++) words[j] = from[4 * j];
  }
  DEV float at(int k) const { return k % 2 ? unpack_bf16(words[k / 4]).y : unpack_bf16(words[k / 4]).x; } // of v[k]
};
template <> struct PieceBias<float> {
  DEV PieceBias(const unsigned char*, int) {}
  DEV float at(int) const { return 0; }
};

// What is left of an output from an element on.
struct Rest { int rows, cols; };
DEV Rest operator+(Rest rest, Rest by) { return {rest.rows + by.rows, rest.cols + by.cols}; }
DEV Rest operator-(Rest rest, Rest by) { return {rest.rows - by.rows, rest.cols - by.cols}; }

// f32, to rows `pitch` apart: `to` and `rest` are those of a lane's first sum. Pairs where rows allow it.
DEV Rest first_float(int lane) { return {lane / 4, lane % 4 * 2}; }
DEV void leave_lane_floats(float* to, int64_t pitch, const float (&v)[PIECE / 2], Rest rest) {
  if (pitch % 2 == 0) {
    forget(to); // else it would be made anew for each pair
#pragma unroll
    for (int i = 0; i < PIECE / 4; i++)
      if (i / 4 * 8 < rest.rows && i % 4 * 8 < rest.cols)
        store8(to + i / 4 * 8 * pitch + i % 4 * 8, make_float2(v[i % 4 * 4 + i / 4 * 2], v[i % 4 * 4 + i / 4 * 2 + 1]));
  } else {
#pragma unroll
    for (int k = 0; k < PIECE / 2; k++)
      if (k / 2 % 2 * 8 < rest.rows && k / 4 * 8 + k % 2 < rest.cols)
        to[k / 2 % 2 * 8 * pitch + k / 4 * 8 + k % 2] = v[k];
  }
}
// Of a piece.
DEV void leave_floats(float* to, int lane, int64_t pitch, const float (&v)[PIECE / 2], Rest rest) {
  leave_lane_floats(to + first_float(lane).rows * pitch + first_float(lane).cols, pitch, v, rest - first_float(lane));
}
// What is there already of a lane's sums, or 0 with `add` being 0: all is asked for before any of it is used, so that
// one wait is enough.
struct OldFloats {
  float v[PIECE / 2];

  DEV OldFloats(const float* from, int64_t pitch, int add, Rest rest) : v{} {
    if (!add) return;
    if (pitch % 2 == 0) {
#pragma unroll
      for (int i = 0; i < PIECE / 4; i++)
        if (i / 4 * 8 < rest.rows && i % 4 * 8 < rest.cols) {
          float2 pair = *reinterpret_cast<const float2*>(from + i / 4 * 8 * pitch + i % 4 * 8);
          v[i % 4 * 4 + i / 4 * 2] = pair.x, v[i % 4 * 4 + i / 4 * 2 + 1] = pair.y;
        }
    } else {
#pragma unroll
      for (int k = 0; k < PIECE / 2; k++)
        if (k / 2 % 2 * 8 < rest.rows && k / 4 * 8 + k % 2 < rest.cols)
          v[k] = from[k / 2 % 2 * 8 * pitch + k / 4 * 8 + k % 2];
    }
  }
  DEV float at(int k) const { return v[k]; }
};
// What takes as many registers as a piece, which has to be made in them.
template <class Bias> constexpr bool IN_PLACE = false;
template <> constexpr bool IN_PLACE<OldFloats> = true;

// A piece rounded to bf16, into a stage and, when the lanes have met, out of it to rows that start at multiples of 16
// bytes. Word w of row r is at 4 r + (w ^ (r / 2 % 4)): eight rows of one word, and two rows, lie in different banks. A
// lane writes what is at `in`, and at in ^ 2; it reads what is at `out`, and eight rows below.
constexpr int STAGE_WORDS = 16 * PIECE / 8;
DEV int word_in(int lane) { return lane % 16 * 4 + (lane / 16 ^ lane % 16 / 2 % 4); }
DEV int word_out(int lane) { return lane / 4 * 4 + (lane % 4 ^ lane / 8 % 4); }
DEV void stage_words(uint4* staged, int in, const float (&v)[PIECE / 2]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const uint32_t words[4] = {pack_bf16(v[8 * half], v[8 * half + 1]), pack_bf16(v[8 * half + 2], v[8 * half + 3]),
                               pack_bf16(v[8 * half + 4], v[8 * half + 5]),
                               pack_bf16(v[8 * half + 6], v[8 * half + 7])};
    stmatrix_x4(staged + (in ^ 2 * half), words);
  }
}
// `to`, `from` and `rest` are those of a lane's first word.
DEV Rest first_word(int lane) { return {lane / 4, lane % 4 * 8}; }
DEV void leave_words(bf16* to, int64_t pitch, const uint4* staged, int out, Rest rest) {
  const uint4 upper = staged[out], lower = staged[out + STAGE_WORDS / 2];
  if (rest.cols <= 0) return;
  if (0 < rest.rows) store16(to, upper);
  if (8 < rest.rows) store16(to + 8 * pitch, lower);
}

// What joins a piece, from memory to a stage, and out of it when it has come and the lanes have met.
DEV void fetch_words(uint4* staged, int out, const bf16* from, int64_t pitch, Rest rest) {
  if (rest.cols <= 0) return;
  if (0 < rest.rows) cp_async16(staged + out, from);
  if (8 < rest.rows) cp_async16(staged + out + STAGE_WORDS / 2, from + 8 * pitch);
}
// Puts a piece in the place of what joins it: `f` of the sums and of that.
template <class F> DEV void join_each(uint4* staged, int in, const float (&v)[PIECE / 2], F f) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint32_t words[4];
    ldmatrix_x4(words, staged + (in ^ 2 * half));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float2 other = unpack_bf16(words[i]);
      words[i] = pack_bf16(f(v[8 * half + 2 * i], other.x), f(v[8 * half + 2 * i + 1], other.y));
    }
    __syncwarp();
    stmatrix_x4(staged + (in ^ 2 * half), words);
  }
}
// That is what the activation was given, or, where there is none, what is added. The kind is looked at once.
DEV void join_words(uint4* staged, int in, const float (&v)[PIECE / 2], int activation) {
  if (activation == ACTIVATION_NONE) join_each(staged, in, v, [](float d, float x) { return d + x; });
  else if (activation == ACTIVATION_RELU)
    join_each(staged, in, v, [](float d, float x) { return through_activation(ACTIVATION_RELU, d, x); });
  else if (activation == ACTIVATION_GELU_TANH)
    join_each(staged, in, v, [](float d, float x) { return through_activation(ACTIVATION_GELU_TANH, d, x); });
  else if (activation == ACTIVATION_GELU_ERF)
    join_each(staged, in, v, [](float d, float x) { return through_activation(ACTIVATION_GELU_ERF, d, x); });
  else if (activation == ACTIVATION_SILU)
    join_each(staged, in, v, [](float d, float x) { return through_activation(ACTIVATION_SILU, d, x); });
}

// What joins the sums by words: null where nothing does, or not so.
DEV const bf16* joins(const GemmEnd<bf16>& end) {
  return !end.octets() || (end.pre && end.addend) ? nullptr : end.reads_pre() ? end.pre : end.addend;
}

// One element after the other; a lane has a column. The bias is in the sums.
DEV void leave_elements(const GemmEnd<bf16>& end, int lane, int row0, int col0, const float (&v)[PIECE / 2],
                        float* staged) {
  __syncwarp();
#pragma unroll
  for (int j = 0; j < PIECE / 8; j++)
#pragma unroll
    for (int h = 0; h < 2; h++)
      *reinterpret_cast<float2*>(staged + (lane / 4 + 8 * h) * PITCH + j * 8 + lane % 4 * 2) =
          make_float2(v[4 * j + 2 * h], v[4 * j + 2 * h + 1]);
  __syncwarp();
  if (col0 + lane >= end.n) return;
#pragma unroll 1
  for (int row = 0; row < 16 && row0 + row < end.m; row++) end.put(row0 + row, col0 + lane, staged[row * PITCH + lane]);
}

// A piece of the sums, the bias added. Registers have no index.
template <int I, int BLOCKS, int HALF, class Bias>
DEV void take_piece(float (&v)[PIECE / 2], const float (&sums)[BLOCKS][HALF], const Bias& bias, int piece) {
  if constexpr (I + 1 < BLOCKS * HALF / (PIECE / 2))
    if (piece != I) return take_piece<I + 1>(v, sums, bias, piece);
#pragma unroll
  for (int k = 0; k < PIECE / 2; k++) {
    v[k] = sums[I % BLOCKS][I / BLOCKS * PIECE / 2 + k] + bias.at(k);
    if constexpr (IN_PLACE<Bias>)
      forget(v[k]);  // else all pieces would be added at one place, and the sums copied there
  }
}

DEV int first_bias(int warp, int lane) { return (warp + 1) * (STAGED_BYTES / 4) - BIAS_BYTES / 4 + lane % 4; }

// A lane's places in the pieces of its warp: 16 rows of each of BLOCKS blocks of 64, then of the next columns. In the
// output, with rows `pitch` apart, `at` is its first element's and `rest` what is left from there on; in shared memory
// `in` and `out` are words of the stage, `bias` the first word of that.
template <int BLOCKS> struct Places {
  int64_t at;
  Rest rest;
  int pitch, in, out, bias;

  DEV Places(int64_t before, int pitch, Rest size, Rest first, int warp, int lane)
      : at(before + first.rows * (int64_t)pitch + first.cols), rest{size.rows - first.rows, size.cols - first.cols},
        pitch(pitch), in(warp * (STAGED_BYTES / 16) + word_in(lane)), out(warp * (STAGED_BYTES / 16) + word_out(lane)),
        bias(first_bias(warp, lane)) {
    forget(at), forget(rest.rows), forget(rest.cols), forget(in), forget(out),
        forget(bias);  // else their parts, which are more, would be kept
  }
  DEV int64_t place(int piece) const { return at + (int64_t)(piece % BLOCKS * 64) * pitch + piece / BLOCKS * PIECE; }
  DEV Rest left(int piece) const { return {rest.rows - piece % BLOCKS * 64, rest.cols - piece / BLOCKS * PIECE}; }
  DEV int bias_word(int piece) const { return bias + piece / BLOCKS * (PIECE / 2); }
};

// A tile's sums, to an output of `size` from `first` on; what becomes of them is asked once, and each way out has a
// loop of its own: sums take most registers, so that none keeps what another needs. As f32, with what is there already.
template <int BLOCKS, int HALF>
DEV void leave_added(float* to, int pitch, int add, const float (&sums)[BLOCKS][HALF], int warp, int lane, Rest size,
                     Rest first) {
  Places<BLOCKS> at(0, pitch, size, first + first_float(lane), warp, lane);
  forget(add);
#pragma unroll 1
  for (int piece = 0; piece < BLOCKS * HALF * 2 / PIECE && at.left(piece).cols > 0; piece++) {
    float v[PIECE / 2];
    take_piece<0>(v, sums, OldFloats(to + at.place(piece), pitch, add, at.left(piece)), piece);
    leave_lane_floats(to + at.place(piece), pitch, v, at.left(piece));
  }
}
// As f32, those of a part of k.
template <class Out, int BLOCKS, int HALF>
DEV void leave_part(const GemmEnd<Out>& end, int part, const float (&sums)[BLOCKS][HALF], const unsigned char* staged,
                    int warp, int lane, Rest size, Rest first) {
  Places<BLOCKS> at(part * end.m * end.n, (int)end.n, size, first + first_float(lane), warp, lane);
#pragma unroll 1
  for (int piece = 0; piece < BLOCKS * HALF * 2 / PIECE && at.left(piece).cols > 0; piece++) {
    float v[PIECE / 2];
    take_piece<0>(v, sums, PieceBias<Out>(staged, at.bias_word(piece)), piece);
    leave_lane_floats(end.partials + at.place(piece), at.pitch, v, at.left(piece));
  }
}
// By words, with what joins them.
template <int BLOCKS, int HALF>
DEV void leave_joined(const GemmEnd<bf16>& end, const bf16* from, const float (&sums)[BLOCKS][HALF],
                      unsigned char* staged, int warp, int lane, Rest size, Rest first, int pieces) {
  uint4* stages = reinterpret_cast<uint4*>(staged);
  Places<BLOCKS> at(0, (int)end.pitch, size, first + first_word(lane), warp, lane);
  // Pieces take turns with two stages. The last one that is asked for is nothing.
  auto fetch = [&](int piece) {
    if (piece < pieces)
      fetch_words(stages + piece % 2 * STAGE_WORDS, at.out, from + at.place(piece), at.pitch, at.left(piece));
    cp_async_commit();
  };
  __syncwarp(); // the last tile's has left
  fetch(0);
#pragma unroll 1
  for (int piece = 0; piece < pieces; piece++) {
    __syncwarp(); // the piece before has left
    fetch(piece + 1);
    uint4* stage = stages + piece % 2 * STAGE_WORDS;
    float v[PIECE / 2];
    take_piece<0>(v, sums, PieceBias<bf16>(staged, at.bias_word(piece)), piece);
    cp_async_wait<1>(); // all but the next piece's
    __syncwarp();
    join_words(stage, at.in, v, end.reads_pre() ? end.activation - ACTIVATION_GRAD : ACTIVATION_NONE);
    __syncwarp();
    leave_words(end.out + at.place(piece), at.pitch, stage, at.out, at.left(piece));
  }
  cp_async_wait<0>(); // for nothing, but a thread may not end before
}
// By words, as they are.
template <int BLOCKS, int HALF>
DEV void leave_alone(const GemmEnd<bf16>& end, const float (&sums)[BLOCKS][HALF], unsigned char* staged, int warp,
                     int lane, Rest size, Rest first, int pieces) {
  uint4 *before = reinterpret_cast<uint4*>(staged), *after = before + STAGE_WORDS;
  Places<BLOCKS> at(0, (int)end.pitch, size, first + first_word(lane), warp, lane);
#pragma unroll 1
  for (int piece = 0; piece < pieces; piece++) {
    float v[PIECE / 2];
    take_piece<0>(v, sums, PieceBias<bf16>(staged, at.bias_word(piece)), piece);
    __syncwarp(); // the piece before has left
    if (end.pre) stage_words(before, at.in, v);
    activate_each(end.activation, v);
    stage_words(after, at.in, v);
    __syncwarp();
    if (end.pre) leave_words(end.pre + at.place(piece), at.pitch, before, at.out, at.left(piece));
    leave_words(end.out + at.place(piece), at.pitch, after, at.out, at.left(piece));
  }
}
// One element after the other.
template <int BLOCKS, int HALF>
DEV void leave_singly(const GemmEnd<bf16>& end, const float (&sums)[BLOCKS][HALF], unsigned char* staged, int warp,
                      int lane, Rest first, int pieces) {
#pragma unroll 1
  for (int piece = 0; piece < pieces; piece++) {
    float v[PIECE / 2];
    take_piece<0>(v, sums, PieceBias<bf16>(staged, first_bias(warp, lane) + piece / BLOCKS * (PIECE / 2)), piece);
    leave_elements(end, lane, first.rows + piece % BLOCKS * 64, first.cols + piece / BLOCKS * PIECE, v,
                   reinterpret_cast<float*>(staged + warp * STAGED_BYTES));
  }
}

template <int BLOCKS, int HALF>
DEV void leave_tile(const GemmEnd<float>& end, int part, const float (&sums)[BLOCKS][HALF], unsigned char* staged,
                    int warp, int lane, Rest first) {
  Rest size = {(int)end.m, (int)end.n};
  if (end.partials) leave_part(end, part, sums, staged, warp, lane, size, first);
  else leave_added(end.out, (int)end.pitch, end.addend != nullptr, sums, warp, lane, size, first);
}
template <int BLOCKS, int HALF>
DEV void leave_tile(const GemmEnd<bf16>& end, int part, const float (&sums)[BLOCKS][HALF], unsigned char* staged,
                    int warp, int lane, Rest first) {
  Rest size = {(int)end.m, (int)end.n};
  int pieces = BLOCKS * ((min(size.cols - first.cols, 2 * HALF) + PIECE - 1) / PIECE);
  if (end.partials) leave_part(end, part, sums, staged, warp, lane, size, first);
  else if (const bf16* from = joins(end)) leave_joined(end, from, sums, staged, warp, lane, size, first, pieces);
  else if (end.addend || !end.octets()) leave_singly(end, sums, staged, warp, lane, first, pieces);
  else leave_alone(end, sums, staged, warp, lane, size, first, pieces);
}

// The sums of the warps from the fifth on: each has 16 rows of each of BLOCKS blocks of 64, WARPS of them one beneath
// the other from row0 on, and columns from col0 on. `end_of(0)`, for what differs of a part is its place, which
// leave_part adds, and its bias, which is staged.
template <int WARPS, int BLOCKS, int HALF, class End>
DEV void leave_all(const float (&sums)[BLOCKS][HALF], const End& end_of, int part, unsigned char* staged, int row0,
                   int col0) {
  uint32_t thread = thread_again();
  int lane = thread % 32, warp = thread / 32 - 4;
  leave_tile(end_of(0), part, sums, staged, warp, lane, {row0 + (warp & (WARPS - 1)) * 16, col0});
}
#endif
