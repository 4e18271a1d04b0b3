// The embedding: rows of a table picked by token ids, and the gradient that adds rows back.
//   forward  out[t,:] = table[ids[t],:]; ids (tokens) i32, table (V, C), out (tokens, C).
//   grad     d_table[v,:] = sum over t with ids[t] = v, in order, of d_y[t,:]; d_y (tokens, C), d_table (V, C) f32. Rows of tokens that do
//            not occur, and that of the id `padding`, get 0; where adds_to says so it is added to instead.
// The gradient first sorts the tokens by id, keeping their order among equals: a radix sort by 8 bits a pass, least
// significant first, each pass a kernel that counts digits and one that places tokens. Then one kernel notes which ids
// occur, and the last one does two things. A warp has 16 places of the order and 256 columns: it walks over its tokens'
// rows of d_y, 4 KB of them on their way, and stores a sum where the id changes; ids that began before its first place
// are the warp's before it, and its own last id it follows to the end. The blocks after those write zeros to the rows
// of ids that do not occur. A single writer an element, no atomics: the bits are those of the host's loop over tokens.
//
// Bytes an element (f32 / bf16): forward 8 / 4, at 90 % of the copy rate. Grad: d_y once, 4 / 2, and the table once, 4
// (8 for the rows that are added to): 90 % of the copy rate is expected, less what the five to seven small kernels
// before cost, 3 us each. A row that very many tokens share is summed by one warp per 256 columns since the order is
// fixed: 65,536 equal tokens take about 5 ms.
#include "gpu.cuh"
#include "gpu/pointwise.cuh"
#include "gpu/row.cuh"

constexpr int ROWS = 8;        // rows of a block, one warp each
constexpr int IN_FLIGHT = 4;   // packs that a lane has on their way at once

// One warp a row. The rows are copied bit by bit, so T may be any type of the element's size. A row whose id is outside
// the table, which the loader rules out, becomes 0.
template <class T>
DEV void pick_rows(T* out, const int* ids, const T* table, int64_t tokens, int table_rows, int cols) {
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
extern "C" __global__ void __launch_bounds__(ROWS * 32)
    embedding_forward_f32(float* out, const int* ids, const float* table, int64_t tokens, int table_rows, int cols) {
  pick_rows(out, ids, table, tokens, table_rows, cols);
}
extern "C" __global__ void __launch_bounds__(ROWS * 32)
    embedding_forward_bf16(bf16* out, const int* ids, const bf16* table, int64_t tokens, int table_rows, int cols) {
  pick_rows(out, ids, table, tokens, table_rows, cols);
}
GPU_EXPORT(embedding_forward_f32)
GPU_EXPORT(embedding_forward_bf16)

constexpr int SORT_WARPS = 8;
constexpr int SORT_ROUNDS = 8;                                // tokens of a lane
constexpr int SORT_KEYS = SORT_WARPS * SORT_ROUNDS * 32;      // tokens of a block
constexpr int DIGITS = 256;                                   // values of a digit, one thread each

// What a token sorts by: its id, or past all ids where that is outside the table or the padding's, whose rows are added
// nowhere.
DEV unsigned sort_key(const int* ids, int token, int table_rows, unsigned padding) {
  unsigned id = (unsigned)ids[token];
  return id < (unsigned)table_rows && id != padding ? id : (unsigned)table_rows;
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
template <class Visit>
DEV void each_key(const int* ids, const int* order, int tokens, int table_rows, unsigned padding, int shift,
                  Visit visit) {
  int64_t first = (int64_t)blockIdx.x * SORT_KEYS + threadIdx.x / 32 * (SORT_ROUNDS * 32) + threadIdx.x % 32;
  int token[SORT_ROUNDS];
  unsigned digit[SORT_ROUNDS];
#pragma unroll
  for (int r = 0; r < SORT_ROUNDS; r++) {
    int64_t s = first + r * 32;
    token[r] = s < tokens ? token_at(order, (int)s) : 0;
    digit[r] = s < tokens ? sort_key(ids, token[r], table_rows, padding) >> shift & (DIGITS - 1) : 0;
  }
#pragma unroll
  for (int r = 0; r < SORT_ROUNDS; r++) {
    bool has_token = first + r * 32 < tokens;
    visit(token[r], digit[r], has_token, lanes_alike(digit[r], has_token));
  }
}

// Counts the digits of each warp's tokens. Ends with every thread seeing all counts.
DEV void count_digits(int (&counts)[SORT_WARPS][DIGITS], const int* ids, const int* order, int tokens, int table_rows,
                      unsigned padding, int shift) {
  for (int w = 0; w < SORT_WARPS; w++) counts[w][threadIdx.x] = 0;
  __syncthreads();
  int (&mine)[DIGITS] = counts[threadIdx.x / 32];
  unsigned below = (1u << threadIdx.x % 32) - 1;
  each_key(ids, order, tokens, table_rows, padding, shift, [&](int, unsigned digit, bool has_token, unsigned alike) {
    if (has_token && (alike & below) == 0) mine[digit] += __popc(alike);
    __syncwarp();
  });
  __syncthreads();
}

// counts (blocks, 256): how many of a block's tokens have each digit.
extern "C" __global__ void __launch_bounds__(DIGITS)
    embedding_grad_count(int* counts, const int* ids, const int* order, int tokens, int table_rows, unsigned padding,
                         int shift) {
  GPU_SHARED(int, by_warp, [SORT_WARPS][DIGITS]);
  count_digits(by_warp, ids, order, tokens, table_rows, padding, shift);
  int sum = 0;
  for (int w = 0; w < SORT_WARPS; w++) sum += by_warp[w][threadIdx.x];
  counts[(int64_t)blockIdx.x * DIGITS + threadIdx.x] = sum;
}
GPU_EXPORT(embedding_grad_count)

// Puts each token into its place by this digit: after all tokens with smaller digits, and after those with the same
// that come before it.
extern "C" __global__ void __launch_bounds__(DIGITS)
    embedding_grad_place(int* placed, const int* counts, const int* ids, const int* order, int tokens, int table_rows,
                         unsigned padding, int shift) {
  GPU_SHARED(int, next, [SORT_WARPS][DIGITS]);  // counts by warp, then the place of a warp's next token of each digit
  GPU_SHARED(int, totals, [DIGITS]);
  count_digits(next, ids, order, tokens, table_rows, padding, shift);
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
  each_key(ids, order, tokens, table_rows, padding, shift,
           [&](int token, unsigned digit, bool has_token, unsigned alike) {
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

// seen (V): 1 for the ids that occur. The others' stay 0.
extern "C" __global__ void __launch_bounds__(256)
    embedding_grad_seen(int* seen, const int* ids, const int* order, int tokens, int table_rows, unsigned padding) {
  int64_t s = (int64_t)blockIdx.x * 256 + threadIdx.x;
  if (s >= tokens) return;
  unsigned key = sort_key(ids, order[s], table_rows, padding), outside = (unsigned)table_rows;
  if (key != outside && (s == 0 || sort_key(ids, order[s - 1], table_rows, padding) != key)) seen[key] = 1;
}
GPU_EXPORT(embedding_grad_seen)

constexpr int GROUP_LANE = 8;                     // columns of a lane
constexpr int GROUP = 32 * GROUP_LANE;            // columns of a warp
constexpr int CHUNK = 16;                         // places of the order that a warp has
constexpr int ZEROED = 32;                        // rows that a block looks at, one warp a row, for what to zero

// Warp `number` of chunks times groups.
template <class T, bool WIDE>
DEV void add_chunk(float* d_table, const T* d_y, const int* ids, const int* order, int64_t number, int tokens,
                   int table_rows, unsigned padding, int cols, bool adds) {
  constexpr int TOKENS_AHEAD = 16 / sizeof(T);   // rows of d_y that a lane has on their way at once: 128 bytes
  int groups = (cols + GROUP - 1) / GROUP, chunk = (int)(number / groups),
      first = (int)(number - (int64_t)chunk * groups) * GROUP;
  int begin = chunk * CHUNK, end = tokens - begin < CHUNK ? tokens : begin + CHUNK;
  if (begin >= tokens) return;
  int lane = threadIdx.x % 32, here = cols - first < GROUP ? cols - first : GROUP;
  unsigned outside = (unsigned)table_rows;
  // The ids before, in and, last of all, at the end of the chunk: lane l has that of place begin + l - 1.
  int place = begin + lane - 1;
  unsigned key = place >= 0 && place < end ? sort_key(ids, order[place], table_rows, padding) : ~0u;
  unsigned before = __shfl_sync(~0u, key, 0), last = __shfl_sync(~0u, key, end - begin), current = outside;
  begin += __popc(__ballot_sync(~0u, lane > 0 && place < end && key == before));
  if (begin == end) return;
  d_y += first, d_table += first;
  float sum[GROUP_LANE] = {};
  for (int s = begin;; s += 32) {
    place = s + lane;
    int token = place < tokens ? order[place] : 0;
    key = place < tokens ? sort_key(ids, token, table_rows, padding) : ~0u;
    int count = __popc(__ballot_sync(~0u, place < tokens && (place < end || key == last)));
#pragma unroll 1
    for (int k = 0; k < count; k += TOKENS_AHEAD) {
      Part<T, GROUP_LANE> rows[TOKENS_AHEAD];
#pragma unroll
      for (int j = 0; j < TOKENS_AHEAD; j++) {
        int64_t t = __shfl_sync(~0u, token, (k + j) % 32);
        if (k + j < count) rows[j].template load<WIDE>(d_y + t * cols, here, lane, 32);
      }
#pragma unroll
      for (int j = 0; j < TOKENS_AHEAD; j++) {
        unsigned id = __shfl_sync(~0u, key, (k + j) % 32);
        if (k + j >= count) continue;
        if (id != current) {
          if (current != outside) store_floats<T, WIDE>(d_table + (int64_t)current * cols, sum, here, lane, 32);
          current = id;
#pragma unroll
          for (int i = 0; i < GROUP_LANE; i++) sum[i] = 0;
          if (adds && id != outside) load_floats<T, WIDE>(sum, d_table + (int64_t)id * cols, here, lane, 32);
        }
#pragma unroll
        for (int i = 0; i < GROUP_LANE; i++) sum[i] += rows[j].at(i);
      }
    }
    if (count < 32) break;
  }
  if (current != outside) store_floats<T, WIDE>(d_table + (int64_t)current * cols, sum, here, lane, 32);
}

// Zeros to those of rows first.. that no token has, one warp a row.
DEV void zero_rows(float* d_table, const int* seen, int64_t first, int table_rows, int cols) {
  constexpr int N = FEW<float>;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  bool wide = cols % N == 0 && aligned_few<N>(d_table);
  int empty = first + lane < table_rows && seen[first + lane] == 0;
  for (int r = warp; r < ZEROED; r += ROWS) {
    if (!__shfl_sync(~0u, empty, r)) continue;
    float* row = d_table + (first + r) * cols;
    if (wide) {
#pragma unroll 4
      for (int c = lane * N; c < cols; c += 32 * N) store_few<N>(row + c, Few<float, N>{});
    } else {
      for (int c = lane; c < cols; c += 32) row[c] = 0;
    }
  }
}

// `adding` blocks of 8 warps, then those that zero.
template <class T>
DEV void add_rows_back(float* d_table, const T* d_y, const int* ids, const int* order, const int* seen, int adding,
                       int tokens, int table_rows, unsigned padding, int cols, int accumulator, const Now* now) {
  bool adds = adds_to(accumulator, now);
  if ((int)blockIdx.x >= adding) {
    if (!adds) zero_rows(d_table, seen, (int64_t)(blockIdx.x - adding) * ZEROED, table_rows, cols);
    return;
  }
  int64_t number = (int64_t)blockIdx.x * ROWS + threadIdx.x / 32;
  if (cols % FEW<T> == 0 && aligned_few<FEW<float>>(d_table) && aligned_few<FEW<T>>(d_y)) {
    add_chunk<T, true>(d_table, d_y, ids, order, number, tokens, table_rows, padding, cols, adds);
  } else {
    add_chunk<T, false>(d_table, d_y, ids, order, number, tokens, table_rows, padding, cols, adds);
  }
}
extern "C" __global__ void __launch_bounds__(ROWS * 32, GPU_BLOCKS(GPU_HOPPER ? 3 : 2))
    embedding_grad_f32(float* d_table, const float* d_y, const int* ids, const int* order, const int* seen, int adding,
                       int tokens, int table_rows, unsigned padding, int cols, int accumulator, const Now* now) {
  add_rows_back(d_table, d_y, ids, order, seen, adding, tokens, table_rows, padding, cols, accumulator, now);
}
extern "C" __global__ void __launch_bounds__(ROWS * 32, GPU_BLOCKS(GPU_HOPPER ? 3 : 2))
    embedding_grad_bf16(float* d_table, const bf16* d_y, const int* ids, const int* order, const int* seen, int adding,
                        int tokens, int table_rows, unsigned padding, int cols, int accumulator, const Now* now) {
  add_rows_back(d_table, d_y, ids, order, seen, adding, tokens, table_rows, padding, cols, accumulator, now);
}
GPU_EXPORT(embedding_grad_f32)
GPU_EXPORT(embedding_grad_bf16)
