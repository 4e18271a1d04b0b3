// The embedding: rows of a table picked by token ids, and the gradient that adds rows back.
//   forward  out[t,:] = table[ids[t],:]; ids (tokens) i32, table (V, C), out (tokens, C).
//   grad     d_table[v,:] = sum over t with ids[t] = v, in order, of d_y[t,:]; d_y (tokens, C), d_table (V, C) f32. Rows of tokens that do
//            not occur get 0; where d_table is an accumulator and now->accumulate is set it is added to instead.
// The gradient first sorts the tokens by id, keeping their order among equals: a radix sort by 8 bits a pass, least significant first, each
// pass a kernel that counts digits and one that places tokens. Then one kernel notes where each id's stretch begins and ends, and in the
// last one a warp has a row of the table and 128 columns, and adds up its tokens' rows in order. A single writer an element, no atomics:
// the bits are those of the host's loop over tokens.
//
// Bytes an element (f32 / bf16): forward 8 / 4, at 90 % of the copy rate. Grad: d_y once, 4 / 2, and the table once, 4 (8 when added
// to): 85 % of the copy rate is expected, less what the five to seven small kernels before cost, 2-3 us each. A row that very many tokens
// share is summed by one warp per 128 columns, 8 rows in flight, since the order is fixed: 65,536 equal tokens take about 5 ms.
#include "gpu.cuh"
#include "gpu/pointwise.cuh"

constexpr int ROWS = 8;        // rows of a block, one warp each
constexpr int IN_FLIGHT = 4;   // packs that a lane has on their way at once

// One warp a row. The rows are copied bit by bit, so T may be any type of the element's size. A row whose id is outside the table,
// which the loader rules out, becomes 0.
template <class T> DEV void pick_rows(T* out, const int* ids, const T* table, int64_t tokens, int table_rows, int cols) {
  constexpr int N = FEW<T>;
  int64_t t = (int64_t)blockIdx.x * ROWS + threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  if (t >= tokens) return;
  int id = ids[t];
  bool inside = (unsigned)id < (unsigned)table_rows;
  const T* from = table + (int64_t)(inside ? id : 0) * cols;
  T* to = out + t * cols;
  if (cols % N == 0 && aligned_few<N>(table) && aligned_few<N>(out)) {
#pragma unroll 1
    for (int c = lane * N; c < cols; c += IN_FLIGHT * 32 * N) {
      Few<T, N> v[IN_FLIGHT];
#pragma unroll
      for (int j = 0; j < IN_FLIGHT; j++) {
        v[j] = {};
        if (inside && c + j * 32 * N < cols) v[j] = load_few<N>(from + c + j * 32 * N);
      }
#pragma unroll
      for (int j = 0; j < IN_FLIGHT; j++)
        if (c + j * 32 * N < cols) store_few<N>(to + c + j * 32 * N, v[j]);
    }
    return;
  }
#pragma unroll 4
  for (int c = lane; c < cols; c += 32) to[c] = inside ? from[c] : from_float<T>(0);
}
extern "C" __global__ void __launch_bounds__(ROWS * 32) embedding_forward_f32(float* out, const int* ids, const float* table, int64_t tokens, int table_rows, int cols) {
  pick_rows(out, ids, table, tokens, table_rows, cols);
}
extern "C" __global__ void __launch_bounds__(ROWS * 32) embedding_forward_bf16(bf16* out, const int* ids, const bf16* table, int64_t tokens, int table_rows, int cols) {
  pick_rows(out, ids, table, tokens, table_rows, cols);
}
GPU_EXPORT(embedding_forward_f32)
GPU_EXPORT(embedding_forward_bf16)

constexpr int SORT_WARPS = 8;
constexpr int SORT_ROUNDS = 8;                                // tokens of a lane
constexpr int SORT_KEYS = SORT_WARPS * SORT_ROUNDS * 32;      // tokens of a block
constexpr int DIGITS = 256;                                   // values of a digit, one thread each

// What a token sorts by: its id, or past all ids where that is outside the table.
DEV unsigned sort_key(const int* ids, int token, int table_rows) {
  unsigned id = (unsigned)ids[token];
  return id < (unsigned)table_rows ? id : (unsigned)table_rows;
}
// The token in place s of the order so far; at first, the token itself.
DEV int token_at(const int* order, int s) { return order ? order[s] : s; }

// The lanes whose digit is this lane's, of those that have a token.
DEV unsigned lanes_alike(unsigned digit, bool has_token) {
  unsigned alike = __ballot_sync(~0u, has_token);
#pragma unroll
  for (int bit = 0; bit < 8; bit++) {
    bool one = digit >> bit & 1;
    unsigned ones = __ballot_sync(~0u, one);
    alike &= one ? ones : ~ones;
  }
  return alike;
}

// Walks over a warp's stretch of the block's tokens in order, 32 at a time: visit(token, digit, has_token, alike).
template <class Visit> DEV void each_key(const int* ids, const int* order, int tokens, int table_rows, int shift, Visit visit) {
  int64_t first = (int64_t)blockIdx.x * SORT_KEYS + threadIdx.x / 32 * (SORT_ROUNDS * 32) + threadIdx.x % 32;
  int token[SORT_ROUNDS];
  unsigned digit[SORT_ROUNDS];
#pragma unroll
  for (int r = 0; r < SORT_ROUNDS; r++) {
    int64_t s = first + r * 32;
    token[r] = s < tokens ? token_at(order, (int)s) : 0;
    digit[r] = s < tokens ? sort_key(ids, token[r], table_rows) >> shift & (DIGITS - 1) : 0;
  }
#pragma unroll
  for (int r = 0; r < SORT_ROUNDS; r++) {
    bool has_token = first + r * 32 < tokens;
    visit(token[r], digit[r], has_token, lanes_alike(digit[r], has_token));
  }
}

// Counts the digits of each warp's tokens. Ends with every thread seeing all counts.
DEV void count_digits(int (&counts)[SORT_WARPS][DIGITS], const int* ids, const int* order, int tokens, int table_rows, int shift) {
  for (int w = 0; w < SORT_WARPS; w++) counts[w][threadIdx.x] = 0;
  __syncthreads();
  int (&mine)[DIGITS] = counts[threadIdx.x / 32];
  unsigned below = (1u << threadIdx.x % 32) - 1;
  each_key(ids, order, tokens, table_rows, shift, [&](int, unsigned digit, bool has_token, unsigned alike) {
    if (has_token && (alike & below) == 0) mine[digit] += __popc(alike);
    __syncwarp();
  });
  __syncthreads();
}

// counts (blocks, 256): how many of a block's tokens have each digit.
extern "C" __global__ void __launch_bounds__(DIGITS) embedding_grad_count(int* counts, const int* ids, const int* order, int tokens, int table_rows, int shift) {
  GPU_SHARED(int, by_warp, [SORT_WARPS][DIGITS]);
  count_digits(by_warp, ids, order, tokens, table_rows, shift);
  int sum = 0;
  for (int w = 0; w < SORT_WARPS; w++) sum += by_warp[w][threadIdx.x];
  counts[(int64_t)blockIdx.x * DIGITS + threadIdx.x] = sum;
}
GPU_EXPORT(embedding_grad_count)

// Puts each token into its place by this digit: after all tokens with smaller digits, and after those with the same that come before it.
extern "C" __global__ void __launch_bounds__(DIGITS) embedding_grad_place(int* placed, const int* counts, const int* ids, const int* order, int tokens, int table_rows, int shift) {
  GPU_SHARED(int, next, [SORT_WARPS][DIGITS]);  // counts by warp, then the place of a warp's next token of each digit
  GPU_SHARED(int, totals, [DIGITS]);
  count_digits(next, ids, order, tokens, table_rows, shift);
  int before = 0, total = 0;
#pragma unroll 8
  for (int b = 0; b < (int)gridDim.x; b++) {
    int count = counts[(int64_t)b * DIGITS + threadIdx.x];
    if (b < (int)blockIdx.x) before += count;
    total += count;
  }
  totals[threadIdx.x] = total;
  __syncthreads();
  for (int apart = 1; apart < DIGITS; apart *= 2) {  // sums over all digits up to one's own
    int smaller = (int)threadIdx.x >= apart ? totals[threadIdx.x - apart] : 0;
    __syncthreads();
    totals[threadIdx.x] += smaller;
    __syncthreads();
  }
  int place = totals[threadIdx.x] - total + before;
  for (int w = 0; w < SORT_WARPS; w++) {
    int count = next[w][threadIdx.x];
    next[w][threadIdx.x] = place;
    place += count;
  }
  __syncthreads();
  int (&mine)[DIGITS] = next[threadIdx.x / 32];
  unsigned below = (1u << threadIdx.x % 32) - 1;
  each_key(ids, order, tokens, table_rows, shift, [&](int token, unsigned digit, bool has_token, unsigned alike) {
    int at = mine[digit];
    __syncwarp();
    if (has_token) {
      placed[at + __popc(alike & below)] = token;
      if ((alike & below) == 0) mine[digit] = at + __popc(alike);
    }
    __syncwarp();
  });
}
GPU_EXPORT(embedding_grad_place)

// bounds (V, 2): begin and end of each id's stretch in `order`. Those of ids that do not occur stay as they are, 0 and 0.
extern "C" __global__ void __launch_bounds__(256) embedding_grad_bounds(int* bounds, const int* ids, const int* order, int tokens, int table_rows) {
  int64_t s = (int64_t)blockIdx.x * 256 + threadIdx.x;
  if (s >= tokens) return;
  unsigned key = sort_key(ids, order[s], table_rows), outside = (unsigned)table_rows;
  if (key == outside) return;
  if (s == 0 || sort_key(ids, order[s - 1], table_rows) != key) bounds[2 * (int64_t)key] = (int)s;
  if (s == tokens - 1 || sort_key(ids, order[s + 1], table_rows) != key) bounds[2 * (int64_t)key + 1] = (int)s + 1;
}
GPU_EXPORT(embedding_grad_bounds)

constexpr int GROUP_FEW = FEW<float>;             // columns of a lane
constexpr int GROUP = 32 * GROUP_FEW;             // columns of a warp
constexpr int TOKENS_AHEAD = 8;                   // rows of d_y that a lane has on their way at once

// A lane's columns of its warp's group: side by side where rows are aligned, else 32 apart, so that neighbouring lanes are neighbours.
template <class T, bool WIDE> DEV Few<T, GROUP_FEW> load_group(const T* row, int lane, int here) {
  Few<T, GROUP_FEW> v = {};
  if constexpr (WIDE) {
    if (lane * GROUP_FEW < here) v = load_few<GROUP_FEW>(row + lane * GROUP_FEW);
  } else {
#pragma unroll
    for (int i = 0; i < GROUP_FEW; i++)
      if (i * 32 + lane < here) v.x[i] = row[i * 32 + lane];
  }
  return v;
}

// Block (x, y): rows 8x.. of the table, one warp each, and columns 128y..
template <class T, bool WIDE>
DEV void add_token_rows(float* d_table, const T* d_y, const int* order, const int* bounds, int table_rows, int cols, bool adds) {
  int64_t v = (int64_t)blockIdx.x * ROWS + threadIdx.x / 32;
  if (v >= table_rows) return;
  int lane = threadIdx.x % 32, first = blockIdx.y * GROUP, here = cols - first < GROUP ? cols - first : GROUP;
  int begin = bounds[2 * v], end = bounds[2 * v + 1];
  if (adds && begin == end) return;
  float* to = d_table + v * cols + first;
  d_y += first;
  Few<float, GROUP_FEW> sum = {};
  if (adds) sum = load_group<float, WIDE>(to, lane, here);
  for (int s = begin; s < end; s += 32) {
    int count = end - s < 32 ? end - s : 32;
    int token = lane < count ? order[s + lane] : 0;
#pragma unroll 1
    for (int k = 0; k < count; k += TOKENS_AHEAD) {
      Few<T, GROUP_FEW> rows[TOKENS_AHEAD];
#pragma unroll
      for (int j = 0; j < TOKENS_AHEAD; j++) {
        int64_t t = __shfl_sync(~0u, token, k + j);
        if (k + j < count) rows[j] = load_group<T, WIDE>(d_y + t * cols, lane, here);
      }
#pragma unroll
      for (int j = 0; j < TOKENS_AHEAD; j++)
        if (k + j < count)
          for (int i = 0; i < GROUP_FEW; i++) sum.x[i] += to_float(rows[j].x[i]);
    }
  }
  if constexpr (WIDE) {
    if (lane * GROUP_FEW < here) store_few<GROUP_FEW>(to + lane * GROUP_FEW, sum);
  } else {
    for (int i = 0; i < GROUP_FEW; i++)
      if (i * 32 + lane < here) to[i * 32 + lane] = sum.x[i];
  }
}
template <class T>
DEV void add_rows_back(float* d_table, const T* d_y, const int* order, const int* bounds, int table_rows, int cols, int accumulator, const Now* now) {
  bool adds = accumulator && now->accumulate;
  if (cols % GROUP_FEW == 0 && aligned_few<GROUP_FEW>(d_table) && aligned_few<GROUP_FEW>(d_y)) {
    add_token_rows<T, true>(d_table, d_y, order, bounds, table_rows, cols, adds);
  } else {
    add_token_rows<T, false>(d_table, d_y, order, bounds, table_rows, cols, adds);
  }
}
extern "C" __global__ void __launch_bounds__(ROWS * 32) embedding_grad_f32(float* d_table, const float* d_y, const int* order, const int* bounds, int table_rows, int cols, int accumulator, const Now* now) {
  add_rows_back(d_table, d_y, order, bounds, table_rows, cols, accumulator, now);
}
extern "C" __global__ void __launch_bounds__(ROWS * 32) embedding_grad_bf16(float* d_table, const bf16* d_y, const int* order, const int* bounds, int table_rows, int cols, int accumulator, const Now* now) {
  add_rows_back(d_table, d_y, order, bounds, table_rows, cols, accumulator, now);
}
GPU_EXPORT(embedding_grad_f32)
GPU_EXPORT(embedding_grad_bf16)
